"""Sizes and strides of tensors, as :mod:`sfr_ext._C` takes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from .contracts import DTYPES, CostParams, CostView, FeatureView, Metric, WeightView

List = TypeVar("List", bound=tuple[Any, ...])
Maybe = TypeVar("Maybe", Tensor, Tensor | None)


class Pair(NamedTuple):
    """Features of the student ``[B,C,H,W]`` | ``[B,N,C]`` and the teacher, perhaps with groups, and their weights."""

    x: Tensor
    y: Tensor
    a: Tensor | None
    b: Tensor | None


class Ground(NamedTuple):
    """The ground cost."""

    metric: Metric
    patch_size: int


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """The type that sums are taken in and values are returned in: float64 if any input is, else float32."""
    for tensor in tensors:
        if tensor.dtype == torch.float64:
            return torch.float64
    return torch.float32


_NO_FEATURES, _UNIFORM = FeatureView(), WeightView()


# Members in the order of their lists: by name they would take half of a microsecond more, six times a step.
def feature_view(features: Tensor | None) -> FeatureView:
    """Of ``[B,C,H,W]`` | ``[B,G,C,H,W]``."""
    if features is None:
        return _NO_FEATURES
    shape, s = features.shape, features.stride()
    group = s[1] if len(s) == 5 else 0
    return FeatureView(features, DTYPES[features.dtype], shape[-2], shape[-1], s[0], group, s[-3], s[-2], s[-1])


def token_view(tokens: Tensor | None) -> FeatureView:
    """Of ``[B,N,C]`` | ``[B,G,N,C]``: a map of height 1."""
    if tokens is None:
        return _NO_FEATURES
    s = tokens.stride()
    group = s[1] if len(s) == 4 else 0
    return FeatureView(tokens, DTYPES[tokens.dtype], 1, tokens.shape[-2], s[0], group, s[-1], 0, s[-2])


def weight_view(weight: Tensor | None) -> WeightView:
    """Of ``[B,N]`` | ``[B,G,N]``."""
    if weight is None:
        return _UNIFORM
    s = weight.stride()
    return WeightView(weight, s[0], s[1] if len(s) == 3 else 0, s[-1])


def cost_view(cost: Tensor) -> CostView:
    """Of ``[B,G,N,M]``."""
    return CostView(cost, DTYPES[cost.dtype], *cost.stride())


def dense(tensor: Maybe) -> Maybe:
    """As kernels want what they are given no strides of."""
    return tensor if tensor is None else tensor.contiguous()


def all_dense(tensors: List) -> List:
    """The same for a list, such as of what forward saved: a transform or a hook may give it back with other strides."""
    return type(tensors)(*map(dense, tensors))


def problems(x: Tensor, y: Tensor) -> tuple[int, ...]:
    """(B,) or, with groups, (B, G)."""
    return tuple(y.shape[: 1 + y.dim() - x.dim()])


def patch_grids(x: Tensor, y: Tensor, patch: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(H, W) or (N,) of the patches of the student, and of the teacher."""
    if x.dim() == 3:
        return (x.shape[-2],), (y.shape[-2],)
    p, q, less = x.shape, y.shape, patch - 1
    return (p[-2] - less, p[-1] - less), (q[-2] - less, q[-1] - less)


def view_of(x: Tensor) -> Callable[[Tensor | None], FeatureView]:
    """What makes views of features of the kind of a student ``x``."""
    return token_view if x.dim() == 3 else feature_view


def cost_params(x: Tensor, y: Tensor, ground: Ground, compute: torch.dtype) -> CostParams:
    shape, others = x.shape, y.shape
    view = view_of(x)
    return CostParams(
        B=shape[0],
        G=others[1] if len(others) > len(shape) else 1,
        C=shape[-1] if view is token_view else shape[-3],
        patch=ground.patch_size,
        metric=ground.metric,
        compute=DTYPES[compute],
        x=view(x),
        y=view(y),
        threads=torch.get_num_threads(),
    )
