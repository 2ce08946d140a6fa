"""Teacher-free knowledge distillation by a virtual teacher (Tf-KD_reg)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Relative, soft_cross_entropy

CORRECT = 0.99  # what the virtual teacher gives the label


class TeacherFree(Relative):
    """A teacher that is right and otherwise knows nothing:

    .. code-block:: text

        loss = (1 - a) CE(p, y) + a KL( softmax(t / T) || p ),    t_k = 0.99 if k = y, else 0.01 / (K - 1)

    Yuan, Tay, Li, Wang, Feng: "Revisiting Knowledge Distillation via Label Smoothing Regularization", CVPR 2020;
    a = 0.1 and T = 20, as their code computes it: ``p`` is not softened, and the probabilities ``t`` stand where logits
    would. The paper writes ``p_T``, softened as well.
    """

    def __init__(self, share: float = 0.1, temperature: float = 20.0) -> None:
        super().__init__()
        self.share, self.temperature = share, temperature

    def forward(self, images: Tensor, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        classes = logits.shape[1]
        teacher = torch.full_like(logits, (1 - CORRECT) / (classes - 1)) if classes > 1 else torch.ones_like(logits)
        teacher.scatter_(1, labels[:, None], CORRECT)
        targets = (teacher / self.temperature).softmax(1)
        entropy_of_targets = -(targets * targets.log()).sum(1).mean()
        divergence = soft_cross_entropy(logits, targets) - entropy_of_targets
        loss = (1 - self.share) * F.cross_entropy(logits, labels) + self.share * divergence
        return loss, loss.new_zeros(())
