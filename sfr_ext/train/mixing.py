"""Mixup: each image of a batch mixed with another one, and their labels likewise.

Zhang, Cisse, Dauphin, Lopez-Paz: "mixup: Beyond Empirical Risk Minimization", ICLR 2018.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def mixup(
    images: Tensor, labels: Tensor, num_classes: int, alpha: float, seed: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """``share x + (1 - share) x[permuted]``, of images and of one-hot labels, with one share for the batch.

    Args:
        images: ``[B, C, H, W]``.
        labels: class numbers ``[B]``.
        num_classes: of the labels.
        alpha: the share is drawn from Beta(alpha, alpha).
        seed: of what is drawn, on every device alike.

    Returns:
        Images of the same shape, and probabilities ``[B, num_classes]``.
    """
    random = np.random.default_rng(seed)
    share = float(random.beta(alpha, alpha))
    partner = torch.from_numpy(random.permutation(len(images))).to(images.device)
    classes = F.one_hot(labels, num_classes).to(images.dtype)
    return share * images + (1 - share) * images[partner], share * classes + (1 - share) * classes[partner]
