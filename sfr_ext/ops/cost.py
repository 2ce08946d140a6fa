"""``cost_forward``: the ground costs of every pair of patches. Contract: csrc/contracts/cost.h."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import reference
from .derivatives import differentiable, second_derivatives
from .gradients import feature_gradients, named
from .launch import implement, library, run
from .views import compute_dtype, features_of, metric_name, patch_grids, problems

library.define("cost_forward(Tensor x, Tensor y, int metric, int patch_size) -> Tensor")
library.define(
    "cost_backward(Tensor grad_cost, Tensor cost, Tensor x, Tensor y, int metric, int patch_size, bool need_x, "
    "bool need_y) -> (Tensor, Tensor)"
)


def _cost_like(x: Tensor, y: Tensor, patch: int) -> Tensor:
    shape = (*problems(x, y), *map(math.prod, patch_grids(x, y, patch)))
    return x.new_empty(shape, dtype=compute_dtype(x, y))


def _cost_forward(x: Tensor, y: Tensor, metric: int, patch_size: int) -> Tensor:
    cost = _cost_like(x, y, patch_size)
    sizes, x_view, y_view, _ = features_of(x, y, metric, patch_size, cost.dtype)
    run("cost_forward", x, sizes, x_view, y_view, cost.data_ptr())
    return cost


def _cost_backward(
    grad_cost: Tensor,
    cost: Tensor,
    x: Tensor,
    y: Tensor,
    metric: int,
    patch_size: int,
    need_x: bool,
    need_y: bool,
) -> tuple[Tensor, Tensor]:
    grad_x, grad_y = feature_gradients(x, y, need_x, need_y)
    sizes, x_view, y_view, view = features_of(x, y, metric, patch_size, cost.dtype)
    grad_cost = grad_cost.contiguous()
    run(
        "cost_backward",
        x,
        sizes,
        x_view,
        y_view,
        cost.data_ptr(),
        grad_cost.data_ptr(),
        view(grad_x if need_x else None),
        view(grad_y if need_y else None),
    )
    return grad_x, grad_y


implement(_cost_forward, _cost_backward)


@torch.library.register_fake("sfr_ext::cost_forward", lib=library)
def _(x: Tensor, y: Tensor, metric: int, patch_size: int) -> Tensor:
    return _cost_like(x, y, patch_size)


@torch.library.register_fake("sfr_ext::cost_backward", lib=library)
def _(grad_cost: Tensor, cost: Tensor, x: Tensor, y: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return feature_gradients(x, y, *rest[-2:])


def _cost_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, y, ctx.metric, ctx.patch_size = inputs
    ctx.save_for_backward(output, x, y)


def _cost_autograd(ctx: Any, grad_cost: Tensor) -> tuple[Tensor | None, ...]:
    wanted = ctx.needs_input_grad[:2]
    gradients = cost_backward(grad_cost, *ctx.saved_tensors, ctx.metric, ctx.patch_size, *wanted)
    return (*named(gradients, wanted), None, None)


def _cost_second_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    grad_cost, _, x, y, ctx.metric, ctx.patch_size, _, _ = inputs
    ctx.save_for_backward(grad_cost, x, y)


def _cost_second(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
    grad_cost, x, y = ctx.saved_tensors

    def values(x: Tensor, y: Tensor) -> tuple[Tensor]:
        return (reference.cost_matrix(x, y, metric=metric_name(ctx.metric), patch_size=ctx.patch_size),)

    # The cost itself was an argument too, as forward's output; here it is a function of x and y.
    needed = ctx.needs_input_grad
    grad_grad, grad_x, grad_y = second_derivatives(values, (grad_cost,), (x, y), upstream, (needed[0], *needed[2:4]))
    return (grad_grad, None, grad_x, grad_y, *[None] * 4)


cost_backward = differentiable("cost_backward", _cost_second_context, _cost_second)
cost_forward = differentiable("cost_forward", _cost_context, _cost_autograd)
