"""What is solved: batches of feature map pairs, always the same for the same name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

FEATURE_MAPS = Path(__file__).with_name("data") / "feature_maps.npz"


@dataclass(frozen=True)
class Problem:
    """A batch of transport problems with uniform weights, l2 cost and one regularisation for all."""

    x: Tensor  # [B, C, H, W]
    y: Tensor  # [B, C, H, W]
    eps: float  # in units of the cost, so that it means the same in every library
    tol: float  # L1 marginal error, both sides summed

    def tokens(self) -> tuple[Tensor, Tensor]:
        """Both sides as ``[B, N, C]``, contiguous."""
        return as_tokens(self.x), as_tokens(self.y)


def as_tokens(maps: Tensor) -> Tensor:
    return maps.flatten(2).transpose(1, 2).contiguous()


def cost_std(x: Tensor, y: Tensor) -> Tensor:
    """Standard deviation of each pair's l2 costs, ``[B]``."""
    return torch.cdist(as_tokens(x.double()), as_tokens(y.double())).flatten(1).std(1, correction=0)


def load_feature_maps() -> tuple[Tensor, Tensor]:
    """Maps of a small trained network (make_feature_maps.py), unit vectors at each place.

    Returns:
        shallow ``[B, C, H, W]`` and deep ``[B, G, C, H, W]``, float32.
    """
    with np.load(FEATURE_MAPS) as file:
        shallow, deep = (torch.from_numpy(file[name].astype(np.float32)) for name in ("shallow", "deep"))
    return F.normalize(shallow, dim=1), F.normalize(deep, dim=2)


def _random(b: int, side: int, c: int) -> Problem:
    generator = torch.Generator().manual_seed(0)
    x, y = (F.normalize(torch.randn(b, c, side, side, generator=generator), dim=1) for _ in range(2))
    return Problem(x, y, eps=0.05 * float(cost_std(x, y).mean()), tol=1e-3)


def _maps() -> Problem:
    shallow, deep = load_feature_maps()
    x = shallow[:, None].expand_as(deep).flatten(0, 1)
    y = deep.flatten(0, 1)
    # The costs of real maps spread differently from pair to pair. An l2 cost scales with its features, so
    # after this one eps is 0.05 standard deviations for every pair.
    std = cost_std(x, y).float()[:, None, None, None]
    return Problem(x / std, y / std, eps=0.05, tol=1e-3)


WORKLOADS: dict[str, tuple[str, Callable[[], Problem]]] = {
    "w1": ("B=128, 49 x 49 patches, C=512, random unit vectors", lambda: _random(128, 7, 512)),
    "small": ("B=128, 16 x 16 patches, C=64, random unit vectors", lambda: _random(128, 4, 64)),
    "large": ("B=16, 196 x 196 patches, C=256, random unit vectors", lambda: _random(16, 14, 256)),
    "maps": ("B=32, 49 x 49 patches, C=32, feature maps of a trained network", _maps),
}
SUITES = {"quick": ["w1"], "full": list(WORKLOADS)}
