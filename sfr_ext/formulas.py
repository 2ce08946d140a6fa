"""Ground costs and directions in plain torch, differentiable any number of times: what second derivatives go through.

Written for that alone, in float64; the kernels compute these and first derivatives.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def cost_matrix(x: Tensor, y: Tensor, *, metric: str, patch_size: int) -> Tensor:
    """As `sfr_ext.cost_matrix`, float64."""
    p, q = patches(x, patch_size, x.dim() == 4), patches(y, patch_size, x.dim() == 4)
    return METRICS[metric](p if p.dim() == q.dim() else p.unsqueeze(1), q)


def directions(x: Tensor, groups: int, height: int, width: int) -> Tensor:
    """``[B, G, C, h, w]`` as csrc/contracts/directions.h has it, float64."""
    pooled = F.adaptive_avg_pool2d(x.double(), (height, width)).unflatten(1, (groups, -1))
    squared = pooled.square().sum(-3, keepdim=True)
    floor = 1e-3 * squared.detach().sqrt().mean((-2, -1), keepdim=True)
    return pooled / torch.maximum(squared, floor.square().clamp_min(torch.finfo(x.dtype).tiny)).sqrt()


def patches(features: Tensor, size: int, maps: bool) -> Tensor:
    """``[..., N, values of a patch]`` of maps ``[..., C, H, W]`` or tokens ``[..., N, C]``."""
    features = features.double()
    if not maps:
        return features
    cut = F.unfold(features.flatten(0, -4), size)
    return cut.mT.unflatten(0, features.shape[:-3])


def _l2(p: Tensor, q: Tensor) -> Tensor:
    return _length(_differences(p, q))


def _sqeuclidean(p: Tensor, q: Tensor) -> Tensor:
    return _differences(p, q).square().sum(-1)


def _l1(p: Tensor, q: Tensor) -> Tensor:
    return _differences(p, q).abs().sum(-1)


def _cosine(p: Tensor, q: Tensor) -> Tensor:
    return 1 - _direction(p) @ _direction(q).mT


METRICS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "l2": _l2,
    "sqeuclidean": _sqeuclidean,
    "cosine": _cosine,
    "l1": _l1,
}


def _differences(p: Tensor, q: Tensor) -> Tensor:
    return p[..., :, None, :] - q[..., None, :, :]


def _length(vectors: Tensor) -> Tensor:
    """Derivatives at 0 are 0."""
    squared = vectors.square().sum(-1)
    return torch.where(squared == 0, 0.0, torch.where(squared == 0, 1.0, squared).sqrt())


def _direction(vectors: Tensor) -> Tensor:
    """Unit vectors; 0 for 0, with derivatives 0."""
    length = _length(vectors)[..., None]
    return torch.where(length == 0, 0.0, vectors / torch.where(length == 0, 1.0, length))
