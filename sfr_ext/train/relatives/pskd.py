"""Progressive self-knowledge distillation: labels softened by one's own past predictions (PS-KD)."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Relative, soft_cross_entropy


class PastPredictions(Relative):
    """The network of the epoch before softens the labels, more and more:

    .. code-block:: text

        loss_t = CE( p, (1 - a_t) y + a_t P_(t-1)(x) ),    a_t = a t / epochs,    t = 1, 2, ...

    Kim, Ji, Yoon, Hwang: "Self-Knowledge Distillation with Progressive Refinement of Targets", ICCV 2021; a = 0.8. In
    the first epoch there is no past, and labels are as they are.

    The past predictions are those of a copy of the network, in evaluation mode, for the very images of the batch: one
    more forward a step. (Their code keeps the predictions that training has made, of images augmented in another way.)
    """

    def __init__(self, epochs: int, share: float = 0.8) -> None:
        super().__init__()
        self.epochs, self.share = epochs, share
        self.current = 0.0
        # No submodule: a resumed run has this network at the same place, as its own weights.
        self._past: list[nn.Module] = []

    def begin_epoch(self, epoch: int, model: nn.Module) -> None:
        self.current = self.share * (epoch + 1) / self.epochs if epoch > 0 else 0.0
        self._past = [copy.deepcopy(model).requires_grad_(False).eval()] if epoch > 0 else []

    def forward(self, images: Tensor, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        if not self._past:
            return F.cross_entropy(logits, labels), logits.new_zeros(())
        with torch.no_grad():
            past = self._past[0](images).to(logits.dtype).softmax(1)
        hard = F.one_hot(labels, logits.shape[1]).to(logits.dtype)
        loss = soft_cross_entropy(logits, (1 - self.current) * hard + self.current * past)
        return loss, loss.new_zeros(())
