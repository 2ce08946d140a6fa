"""Each image of a batch mixed with another one, and their labels likewise.

Mixup: Zhang, Cisse, Dauphin, Lopez-Paz: "mixup: Beyond Empirical Risk Minimization", ICLR 2018. CutMix: Yun, Han, Oh,
Chun, Choe, Yoo: "CutMix: Regularization Strategy to Train Strong Classifiers with Localizable Features", ICCV 2019.
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


CUT_ALPHA, CUT_PROBABILITY = 1.0, 0.5  # as in the paper, for CIFAR


def cutmix(images: Tensor, labels: Tensor, num_classes: int, seed: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """``M x + (1 - M) x[permuted]`` with ``M`` 0 in a box; labels by the area that is left of each.

    The box has a share ``1 - s`` of the area, with ``s`` from Beta(1, 1), and a centre that is anywhere; what hangs
    over the edge is cut off. One box for a batch, in half of the batches.

    Args:
        images: ``[B, C, H, W]``.
        labels: class numbers ``[B]``.
        num_classes: of the labels.
        seed: of what is drawn, on every device alike.

    Returns:
        Images of the same shape, and probabilities ``[B, num_classes]``.
    """
    random = np.random.default_rng(seed)
    classes = F.one_hot(labels, num_classes).to(images.dtype)
    if random.random() >= CUT_PROBABILITY:
        return images, classes
    side = float(np.sqrt(1 - random.beta(CUT_ALPHA, CUT_ALPHA)))
    partner = torch.from_numpy(random.permutation(len(images))).to(images.device)
    rows, columns = (_span(size, side, random) for size in images.shape[2:])
    mixed = images.clone()
    mixed[:, :, rows, columns] = images[partner][:, :, rows, columns]
    height, width = images.shape[2:]
    left = 1 - (rows.stop - rows.start) * (columns.stop - columns.start) / (height * width)
    return mixed, left * classes + (1 - left) * classes[partner]


def _span(size: int, share: float, random: np.random.Generator) -> slice:
    """Of one side, around a centre that is drawn."""
    half, centre = int(size * share) // 2, int(random.integers(size))
    return slice(max(centre - half, 0), min(centre + half, size))
