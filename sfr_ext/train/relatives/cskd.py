"""Class-wise self-knowledge distillation: images of one class are to be seen alike (CS-KD)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Relative, tempered_kl


class ClassWise(Relative):
    """The prediction for another image of the same class is a target:

    .. code-block:: text

        loss = CE(p(x), y) + w T^2 KL( p_T(x') || p_T(x) ),    y(x') = y(x), no gradient through x'

    Yun, Park, Lee, Shin: "Regularizing Class-wise Predictions via Self-knowledge Distillation", CVPR 2020; w = 1 and
    T = 4, as in their code.

    ``x'`` is the next image of that class in the batch, whose logits are there already; one without a partner adds 0.
    (Their batches are made of pairs, and ``x'`` has a forward of its own.)
    """

    def __init__(self, weight: float = 1.0, temperature: float = 4.0) -> None:
        super().__init__()
        self.weight, self.temperature = weight, temperature

    def forward(self, images: Tensor, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        consistency = tempered_kl(logits[partners(labels)], logits, self.temperature)
        loss = F.cross_entropy(logits, labels) + self.weight * consistency
        return loss, loss.new_zeros(())


def partners(labels: Tensor) -> Tensor:
    """For each place the next one with the same label, after the last one the first; itself if there is no other."""
    order = labels.argsort(stable=True)
    ordered = labels[order]
    places = torch.arange(len(labels), device=labels.device)
    first = torch.searchsorted(ordered, ordered)  # of the same label
    last = torch.searchsorted(ordered, ordered, right=True) - 1
    following = torch.where(places == last, first, places + 1)
    return torch.empty_like(order).index_copy_(0, order, order[following])
