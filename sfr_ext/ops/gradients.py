"""Room for gradients: of features, of weights, and of what nobody asked for."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .views import Pair


def nothing(like: Tensor) -> Tensor:
    """Stands for a gradient that nobody asked for: an operator has to return tensors."""
    return like.new_empty(0)


class NeedPair(NamedTuple):
    """Which gradients are wanted of `Pair`."""

    need_x: bool
    need_y: bool
    need_a: bool
    need_b: bool


class NeedGiven(NamedTuple):
    """Which gradients are wanted of costs and weights."""

    need_cost: bool
    need_a: bool
    need_b: bool


def named(gradients: tuple[Tensor, ...], wanted: tuple[bool, ...]) -> list[Tensor | None]:
    return [grad if want else None for grad, want in zip(gradients, wanted, strict=True)]


def feature_gradients(x: Tensor, y: Tensor, need_x: bool, need_y: bool) -> tuple[Tensor, Tensor]:
    return (torch.empty_like(x) if need_x else nothing(x)), (torch.empty_like(y) if need_y else nothing(y))


def weight_gradients(f: Tensor, g: Tensor, need_a: bool, need_b: bool) -> tuple[Tensor, Tensor]:
    """One gradient a problem; `fold_groups` brings them to the shape of the weights."""
    return (torch.empty_like(f) if need_a else nothing(f)), (torch.empty_like(g) if need_b else nothing(g))


def pair_gradients(pair: Pair, f: Tensor, g: Tensor, need: NeedPair) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Those of features and, one a problem, of weights."""
    grad_x, grad_y = feature_gradients(pair.x, pair.y, need.need_x, need.need_y)
    return (grad_x, grad_y, *weight_gradients(f, g, need.need_a, need.need_b))


def fold_groups(grad: Tensor, weight: Tensor | None) -> Tensor:
    """A weight shared by the groups gets the sum of their gradients."""
    return grad.sum(1) if weight is not None and weight.dim() < grad.dim() else grad
