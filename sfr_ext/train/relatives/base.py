"""What the relatives have in common."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class Relative(nn.Module):
    """The losses of one arm. What it learns or counts is in its ``state_dict``, and so in checkpoints."""

    def begin_epoch(self, epoch: int, model: nn.Module) -> None:
        """Before the first batch of an epoch, counted from 0."""

    def forward(self, images: Tensor, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The loss on outputs and the loss on features, both to be minimised; labels are class numbers."""
        raise NotImplementedError

    def remove(self) -> None:
        """Take hooks off."""


def tempered_kl(teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
    """``T^2 KL(softmax(teacher / T) || softmax(student / T))``, the mean over the batch; no gradient to the teacher.

    Hinton, Vinyals, Dean: "Distilling the Knowledge in a Neural Network", 2015.
    """
    targets = F.log_softmax(teacher.detach() / temperature, dim=1)
    found = F.log_softmax(student / temperature, dim=1)
    return temperature**2 * F.kl_div(found, targets, reduction="batchmean", log_target=True)


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """``-sum_k targets_k log p_k``, the mean over the batch."""
    return -(targets * F.log_softmax(logits, dim=1)).sum(1).mean()
