"""``emd_forward``: from features and weights to solved problems, no cost matrix kept. Contract: contracts/emd.h."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import implicit, reference
from .derivatives import differentiable, second_derivatives
from .gradients import feature_gradients, fold_groups, named, weight_gradients
from .launch import implement, library, run
from .solved import NEEDS, OPTIONS, OUTPUTS, PROBLEM, SOLVED, VALUES, options_for, solve_outputs
from .views import address, compute_dtype, features_of, metric_name, patch_grids, problems, weight_view
from .weights import check_status

library.define(
    "emd_forward(Tensor x, Tensor y, Tensor? a, Tensor? b, Tensor? init_g, int metric, int patch_size, "
    f"{OPTIONS}) -> {OUTPUTS}"
)
library.define(
    "emd_backward(Tensor? grad_transport, Tensor? grad_entropic, Tensor x, Tensor y, Tensor? a, Tensor? b, "
    f"{SOLVED}, int metric, int patch_size, {PROBLEM}, bool need_x, bool need_y, {NEEDS}) -> "
    "(Tensor, Tensor, Tensor, Tensor)"
)


def _emd_outputs(x: Tensor, y: Tensor, patch_size: int) -> tuple[Tensor, ...]:
    n, m = map(math.prod, patch_grids(x, y, patch_size))
    return solve_outputs(x, problems(x, y), n, m, compute_dtype(x, y))


def _emd_forward(
    x: Tensor,
    y: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    init_g: Tensor | None,
    metric: int,
    patch_size: int,
    eps: float,
    relative: bool,
    reach_a: float,
    reach_b: float,
    tol: float,
    max_iter: int,
    caller: str,
) -> tuple[Tensor, ...]:
    options = options_for((eps, relative, reach_a, reach_b), tol, max_iter)
    return solve_features(x, y, a, b, init_g, metric, patch_size, options, caller)


def solve_features(
    x: Tensor,
    y: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    init_g: Tensor | None,
    metric: int,
    patch_size: int,
    options: tuple[Any, ...],
    caller: str,
) -> tuple[Tensor, ...]:
    """Calls the forward kernel; ``options`` as `options_for` makes them."""
    out = _emd_outputs(x, y, patch_size)
    sizes, x_view, y_view, _ = features_of(x, y, metric, patch_size, out[0].dtype)
    init_g = None if init_g is None else init_g.contiguous()
    status = run(
        "emd_forward",
        x,
        sizes,
        x_view,
        y_view,
        weight_view(a),
        weight_view(b),
        options,
        address(init_g),
        tuple(t.data_ptr() for t in out),
    )
    check_status(status, caller, a, b)
    return out


def _emd_gradients(
    x: Tensor,
    y: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    f: Tensor,
    g: Tensor,
    need: tuple[bool, bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_x, grad_y = feature_gradients(x, y, *need[:2])
    grad_a, grad_b = weight_gradients(a, b, f, g, *need[2:])
    return grad_x, grad_y, grad_a, grad_b


def _emd_backward(
    grad_transport: Tensor | None,
    grad_entropic: Tensor | None,
    x: Tensor,
    y: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    f: Tensor,
    g: Tensor,
    eps_used: Tensor,
    mean: Tensor,
    metric: int,
    patch_size: int,
    eps: float,
    relative: bool,
    reach_a: float,
    reach_b: float,
    need_x: bool,
    need_y: bool,
    need_a: bool,
    need_b: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    need = (need_x, need_y, need_a, need_b)
    options = options_for((eps, relative, reach_a, reach_b))
    upstream = (grad_transport, grad_entropic, None)
    return features_backward(upstream, x, y, a, b, (f, g, eps_used, mean), metric, patch_size, options, need)


def features_backward(
    upstream: tuple[Tensor | None, Tensor | None, Tensor | None],
    x: Tensor,
    y: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    solved: tuple[Tensor, Tensor, Tensor, Tensor],
    metric: int,
    patch_size: int,
    options: tuple[Any, ...],
    need: tuple[bool, bool, bool, bool],
    grad_eps_given: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Calls the backward kernel. ``upstream`` of transport, entropic, eps; ``solved``: f, g, eps, mean."""
    grad_x, grad_y, grad_a, grad_b = _emd_gradients(x, y, a, b, *solved[:2], need)
    need_x, need_y, need_a, need_b = need
    sizes, x_view, y_view, view = features_of(x, y, metric, patch_size, solved[0].dtype)
    kept = [None if grad is None else grad.contiguous() for grad in upstream]
    run(
        "emd_backward",
        x,
        sizes,
        x_view,
        y_view,
        weight_view(a),
        weight_view(b),
        options,
        (
            *(t.data_ptr() for t in solved),
            *map(address, kept),
            address(grad_a if need_a else None),
            address(grad_b if need_b else None),
            address(grad_eps_given),
        ),
        view(grad_x if need_x else None),
        view(grad_y if need_y else None),
    )
    return grad_x, grad_y, fold_groups(grad_a, a), fold_groups(grad_b, b)


implement(_emd_forward, _emd_backward)


@torch.library.register_fake("sfr_ext::emd_forward", lib=library)
def _(x: Tensor, y: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return _emd_outputs(x, y, rest[4])


@torch.library.register_fake("sfr_ext::emd_backward", lib=library)
def _(
    grad_transport: Tensor | None,
    grad_entropic: Tensor | None,
    x: Tensor,
    y: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    f: Tensor,
    g: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_x, grad_y, grad_a, grad_b = _emd_gradients(x, y, a, b, f, g, rest[-4:])
    return grad_x, grad_y, fold_groups(grad_a, a), fold_groups(grad_b, b)


def _emd_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, y, a, b, _, ctx.metric, ctx.patch_size, *ctx.problem, _, _, _ = inputs
    ctx.save_for_backward(x, y, a, b, *output[2:6])


def _emd_autograd(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    wanted = ctx.needs_input_grad[:4]
    gradients = emd_backward(*grads[:2], *ctx.saved_tensors, ctx.metric, ctx.patch_size, *ctx.problem, *wanted)
    return (*named(gradients, wanted), *[None] * 10)


def _emd_second_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.metric, ctx.patch_size, eps, relative, reach_a, reach_b, _, _, _, _ = inputs
    ctx.problem = implicit.Problem(eps, relative, reach_a, reach_b)
    ctx.save_for_backward(*tensors)


def _emd_second(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    grads, inputs, solved = tensors[:2], tensors[2:6], tensors[6:]

    def values(x: Tensor, y: Tensor, a: Tensor | None, b: Tensor | None) -> tuple[Tensor, Tensor]:
        cost = implicit.costs(x, y, a, b, metric_name(ctx.metric), ctx.patch_size, reference.cost_matrix)
        return implicit.values(cost, a, b, solved, ctx.problem)

    found = second_derivatives(values, grads, inputs, upstream, ctx.needs_input_grad[:6])
    return (*found, *[None] * 14)


emd_backward = differentiable("emd_backward", _emd_second_context, _emd_second)
emd_forward = differentiable("emd_forward", _emd_context, _emd_autograd, values=VALUES)
