"""``sinkhorn_forward``: entropic transport for costs that are given. Contract: csrc/contracts/sinkhorn.h."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import implicit
from .derivatives import differentiable, second_derivatives
from .gradients import named, nothing, weight_gradients
from .launch import implement, library, run
from .solved import NEEDS, OPTIONS, OUTPUTS, PROBLEM, SOLVED, VALUES, options_for, solve_outputs
from .views import DTYPES, address, compute_dtype, weight_view
from .weights import check_status

# cost [B, G, N, M], a [B, G, N], b [B, G, M]
library.define(f"sinkhorn_forward(Tensor cost, Tensor? a, Tensor? b, Tensor? init_g, {OPTIONS}) -> {OUTPUTS}")
library.define(
    "sinkhorn_backward(Tensor? grad_transport, Tensor? grad_entropic, Tensor cost, Tensor? a, Tensor? b, "
    f"{SOLVED}, {PROBLEM}, bool need_cost, {NEEDS}) -> (Tensor, Tensor, Tensor)"
)


def _sinkhorn_sizes(cost: Tensor, compute: torch.dtype) -> tuple[Any, Any]:
    sizes = (*cost.shape, DTYPES[compute], torch.get_num_threads())
    return sizes, (cost.data_ptr(), DTYPES[cost.dtype], *cost.stride())


def _sinkhorn_outputs(cost: Tensor) -> tuple[Tensor, ...]:
    lead, (n, m) = tuple(cost.shape[:2]), cost.shape[2:]
    return solve_outputs(cost, lead, n, m, compute_dtype(cost))


def _sinkhorn_forward(
    cost: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    init_g: Tensor | None,
    eps: float,
    relative: bool,
    reach_a: float,
    reach_b: float,
    tol: float,
    max_iter: int,
    caller: str,
) -> tuple[Tensor, ...]:
    out = _sinkhorn_outputs(cost)
    init_g = None if init_g is None else init_g.contiguous()
    status = run(
        "sinkhorn_forward",
        cost,
        *_sinkhorn_sizes(cost, out[0].dtype),
        weight_view(a),
        weight_view(b),
        options_for((eps, relative, reach_a, reach_b), tol, max_iter),
        address(init_g),
        tuple(t.data_ptr() for t in out),
    )
    check_status(status, caller, a, b)
    return out


def _sinkhorn_gradients(
    cost: Tensor, a: Tensor | None, b: Tensor | None, f: Tensor, g: Tensor, need: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor, Tensor]:
    grad_cost = cost.new_empty(cost.shape, dtype=f.dtype) if need[0] else nothing(f)
    return (grad_cost, *weight_gradients(a, b, f, g, *need[1:]))


def _sinkhorn_backward(
    grad_transport: Tensor | None,
    grad_entropic: Tensor | None,
    cost: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    f: Tensor,
    g: Tensor,
    eps_used: Tensor,
    mean: Tensor,
    eps: float,
    relative: bool,
    reach_a: float,
    reach_b: float,
    need_cost: bool,
    need_a: bool,
    need_b: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    need = (need_cost, need_a, need_b)
    gradients = _sinkhorn_gradients(cost, a, b, f, g, need)
    upstream = [None if grad is None else grad.contiguous() for grad in (grad_transport, grad_entropic)]
    grad_cost, grad_a, grad_b = named(gradients, need)
    run(
        "sinkhorn_backward",
        cost,
        *_sinkhorn_sizes(cost, f.dtype),
        weight_view(a),
        weight_view(b),
        options_for((eps, relative, reach_a, reach_b)),
        (
            *(t.data_ptr() for t in (f, g, eps_used, mean)),
            *map(address, (*upstream, None, grad_a, grad_b, None)),
        ),
        address(grad_cost),
    )
    return gradients


implement(_sinkhorn_forward, _sinkhorn_backward)


@torch.library.register_fake("sfr_ext::sinkhorn_forward", lib=library)
def _(cost: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return _sinkhorn_outputs(cost)


@torch.library.register_fake("sfr_ext::sinkhorn_backward", lib=library)
def _(
    grad_transport: Tensor | None,
    grad_entropic: Tensor | None,
    cost: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    f: Tensor,
    g: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    return _sinkhorn_gradients(cost, a, b, f, g, rest[-3:])


def _sinkhorn_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    cost, a, b, _, *ctx.problem, _, _, _ = inputs
    ctx.cost_dtype = cost.dtype
    ctx.save_for_backward(cost, a, b, *output[2:6])


def _sinkhorn_autograd(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    wanted = ctx.needs_input_grad[:3]
    gradients = sinkhorn_backward(*grads[:2], *ctx.saved_tensors, *ctx.problem, *wanted)
    grad_cost, grad_a, grad_b = named(gradients, wanted)
    if grad_cost is not None:
        grad_cost = grad_cost.to(ctx.cost_dtype)
    return (grad_cost, grad_a, grad_b, *[None] * 8)


def _sinkhorn_second_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, eps, relative, reach_a, reach_b, _, _, _ = inputs
    ctx.problem = implicit.Problem(eps, relative, reach_a, reach_b)
    ctx.save_for_backward(*tensors)


def _sinkhorn_second(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
    grad_transport, grad_entropic, cost, a, b, *solved = ctx.saved_tensors

    def values(cost: Tensor, a: Tensor | None, b: Tensor | None) -> tuple[Tensor, Tensor]:
        return implicit.values(cost, a, b, tuple(solved), ctx.problem)

    inputs = (cost.to(solved[0].dtype), a, b)  # of the type that its gradient has
    grads = (grad_transport, grad_entropic)
    found = second_derivatives(values, grads, inputs, upstream, ctx.needs_input_grad[:5])
    return (*found, *[None] * 11)


sinkhorn_backward = differentiable("sinkhorn_backward", _sinkhorn_second_context, _sinkhorn_second)
sinkhorn_forward = differentiable("sinkhorn_forward", _sinkhorn_context, _sinkhorn_autograd, values=VALUES)
