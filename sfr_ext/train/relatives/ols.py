"""Online label smoothing: targets from what the network has thought of each class (OLS)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Relative, soft_cross_entropy


class OnlineSmoothing(Relative):
    """The mean prediction for each class, of the epoch before, softens the labels:

    .. code-block:: text

        loss_t = a CE(p, y) + (1 - a) CE(p, S_(t-1)[y]),    S_t[c] = mean of p over hits of class c in epoch t

    Zhang, Jiang, Hou, Wei, Han, Li, Cheng: "Delving Deep into Label Smoothing", IEEE TIP 2021; a = 0.5. ``S`` is
    uniform in the first epoch, and a class without a hit keeps its row. Of several devices, the first one counts.

    `sfr_ext.DynamicLabelSmoothing` with ``prior="online"`` has a sliding window instead of epochs, and a schedule.
    """

    targets: Tensor
    sums: Tensor

    def __init__(self, num_classes: int, share: float = 0.5) -> None:
        super().__init__()
        self.share = share
        self.register_buffer("targets", torch.full((num_classes, num_classes), 1.0 / num_classes))
        self.register_buffer("sums", torch.zeros(num_classes, num_classes))

    def begin_epoch(self, epoch: int, model: nn.Module) -> None:
        if epoch > 0:
            counts = self.sums.sum(1, keepdim=True)  # each hit has added 1
            self.targets.copy_(torch.where(counts > 0, self.sums / counts.clamp(min=1e-12), self.targets))
        self.sums.zero_()

    def forward(self, images: Tensor, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        soft = soft_cross_entropy(logits, self.targets[labels].to(logits.dtype))
        loss = self.share * F.cross_entropy(logits, labels) + (1 - self.share) * soft
        with torch.no_grad():
            hit = (logits.argmax(1) == labels).to(self.sums.dtype)
            self.sums.index_add_(0, labels, logits.softmax(1).to(self.sums.dtype) * hit[:, None])
        return loss, loss.new_zeros(())
