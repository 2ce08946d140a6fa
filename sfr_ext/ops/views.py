"""Addresses, sizes and strides of tensors, as :mod:`sfr_ext._C` takes them; numbers for types and metrics."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

METRICS = {"l2": 0, "sqeuclidean": 1, "cosine": 2}  # csrc/contracts/types.h
DTYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2, torch.float64: 3}


def metric_name(number: int) -> str:
    return next(name for name, of_name in METRICS.items() if of_name == number)


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """The type that sums are taken in and values are returned in: float64 if any input is, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def feature_view(features: Tensor | None) -> tuple[int, ...]:
    """(address, dtype, H, W, strides of B, G, C, H, W) of ``[B,C,H,W]`` | ``[B,G,C,H,W]``."""
    if features is None:
        return (0,) * 9
    s = features.stride()
    address, dtype = features.data_ptr(), DTYPES[features.dtype]
    if len(s) == 5:  # [B, G, C, H, W]
        return (address, dtype, *features.shape[3:], *s)
    return (address, dtype, *features.shape[2:], s[0], 0, *s[1:])


def token_view(tokens: Tensor | None) -> tuple[int, ...]:
    """The same for ``[B,N,C]`` | ``[B,G,N,C]``: a map of height 1."""
    if tokens is None:
        return (0,) * 9
    s = tokens.stride()
    group = s[1] if len(s) == 4 else 0
    return (tokens.data_ptr(), DTYPES[tokens.dtype], 1, tokens.shape[-2], s[0], group, s[-1], 0, s[-2])


def weight_view(weight: Tensor | None) -> tuple[int, ...]:
    """(address, strides of B, G, N) of ``[B,N]`` | ``[B,G,N]``."""
    if weight is None:
        return (0, 0, 0, 0)
    s = weight.stride()
    return (weight.data_ptr(), s[0], s[1] if len(s) == 3 else 0, s[-1])


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def problems(x: Tensor, y: Tensor) -> tuple[int, ...]:
    """(B,) or, with groups, (B, G)."""
    return tuple(y.shape[: 1 + y.dim() - x.dim()])


def patch_grids(x: Tensor, y: Tensor, patch: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(H, W) or (N,) of the patches of the student, and of the teacher."""
    if x.dim() == 3:
        return (x.shape[-2],), (y.shape[-2],)
    grids = [(t.shape[-2] - patch + 1, t.shape[-1] - patch + 1) for t in (x, y)]
    return grids[0], grids[1]


def features_of(x: Tensor, y: Tensor, metric: int, patch: int, compute: torch.dtype) -> tuple[Any, Any, Any, Any]:
    """Sizes and views of a pair, and the function that makes views of their gradients."""
    tokens = x.dim() == 3
    view = token_view if tokens else feature_view
    groups = y.shape[1] if y.dim() > x.dim() else 1
    channels = x.shape[-1] if tokens else x.shape[-3]
    sizes = (x.shape[0], groups, channels, patch, metric, DTYPES[compute], torch.get_num_threads())
    return sizes, view(x), view(y), view
