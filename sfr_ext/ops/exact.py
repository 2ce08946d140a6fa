"""``exact_forward``: exact transport for costs that are given. Contract: csrc/contracts/exact.h."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .derivatives import differentiable
from .gradients import fold_groups, named, nothing, weight_gradients
from .launch import implement, library, run
from .views import DTYPES, address, compute_dtype, weight_view
from .weights import check_status

# cost [B, G, N, M], a [B, G, N] or [B, N], b [B, G, M] or [B, M] ->
# value, f, g, rows, columns, mass, n_iter, gap, error
library.define(
    "exact_forward(Tensor cost, Tensor? a, Tensor? b, str caller) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
library.define(
    "exact_backward(Tensor grad_value, Tensor? cost, Tensor? a, Tensor? b, Tensor f, Tensor g, Tensor rows, "
    "Tensor columns, Tensor mass, bool need_cost, bool need_a, bool need_b) -> (Tensor, Tensor, Tensor)"
)


def _exact_outputs(cost: Tensor) -> tuple[Tensor, ...]:
    b, g, n, m = cost.shape
    value = cost.new_empty((b, g), dtype=compute_dtype(cost))
    mass = value.new_empty((b, g, n + m - 1))
    rows, columns = torch.empty_like(mass, dtype=torch.int32), torch.empty_like(mass, dtype=torch.int32)
    n_iter = torch.empty_like(value, dtype=torch.int64)
    gap, error = torch.empty_like(value), torch.empty_like(value)
    return value, value.new_empty((b, g, n)), value.new_empty((b, g, m)), rows, columns, mass, n_iter, gap, error


def _exact_forward(cost: Tensor, a: Tensor | None, b: Tensor | None, caller: str) -> tuple[Tensor, ...]:
    out = _exact_outputs(cost)
    status = run(
        "exact_forward",
        cost,
        (*cost.shape, DTYPES[out[0].dtype], torch.get_num_threads()),
        (cost.data_ptr(), DTYPES[cost.dtype], *cost.stride()),
        weight_view(a),
        weight_view(b),
        tuple(t.data_ptr() for t in out),
    )
    check_status(status, caller, a, b)
    return out


def _exact_gradients(
    a: Tensor | None, b: Tensor | None, f: Tensor, g: Tensor, need: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor, Tensor]:
    grad_cost = f.new_empty((*f.shape, g.shape[-1])) if need[0] else nothing(f)
    return (grad_cost, *weight_gradients(a, b, f, g, *need[1:]))


def _exact_backward(
    grad_value: Tensor,
    cost: Tensor | None,  # not looked at: here so that a second derivative finds its way to it
    a: Tensor | None,
    b: Tensor | None,
    f: Tensor,
    g: Tensor,
    rows: Tensor,
    columns: Tensor,
    mass: Tensor,
    need_cost: bool,
    need_a: bool,
    need_b: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    need = (need_cost, need_a, need_b)
    gradients = _exact_gradients(a, b, f, g, need)
    grad_value = grad_value.contiguous()
    run(
        "exact_backward",
        f,
        (*f.shape, g.shape[-1], DTYPES[f.dtype], torch.get_num_threads()),
        weight_view(a),
        weight_view(b),
        tuple(t.data_ptr() for t in (f, g, rows, columns, mass, grad_value)),
        tuple(map(address, named(gradients, need))),
    )
    grad_cost, grad_a, grad_b = gradients
    return grad_cost, fold_groups(grad_a, a), fold_groups(grad_b, b)


implement(_exact_forward, _exact_backward)


@torch.library.register_fake("sfr_ext::exact_forward", lib=library)
def _(cost: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return _exact_outputs(cost)


@torch.library.register_fake("sfr_ext::exact_backward", lib=library)
def _(
    grad_value: Tensor, cost: Tensor | None, a: Tensor | None, b: Tensor | None, f: Tensor, g: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    grad_cost, grad_a, grad_b = _exact_gradients(a, b, f, g, rest[-3:])
    return grad_cost, fold_groups(grad_a, a), fold_groups(grad_b, b)


def _exact_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    cost, a, b, _ = inputs
    ctx.cost_dtype = cost.dtype
    ctx.save_for_backward(cost, a, b, *output[1:6])


def _exact_autograd(ctx: Any, grad_value: Tensor, *others: None) -> tuple[Tensor | None, ...]:
    wanted = ctx.needs_input_grad[:3]
    grad_cost, grad_a, grad_b = named(exact_backward(grad_value, *ctx.saved_tensors, *wanted), wanted)
    if grad_cost is not None:
        grad_cost = grad_cost.to(ctx.cost_dtype)
    return grad_cost, grad_a, grad_b, None


def _exact_second_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    f, g, *plan = inputs[4:9]
    ctx.sizes = f.shape[-1], g.shape[-1]
    ctx.save_for_backward(*plan)


def _exact_second(ctx: Any, grad_cost: Tensor | None, *of_weights: Tensor | None) -> tuple[Tensor | None, ...]:
    # By symmetry the plan's own dependence on the weights is among these.
    if any(grad is not None for grad in of_weights) or any(ctx.needs_input_grad[2:4]):
        raise NotImplementedError(
            "sfr_ext.exact_backward: second derivatives through the weights' gradients are not implemented; call "
            "backward without create_graph=True"
        )
    # The plan moves nowhere, but jumps.
    grad_value = None if grad_cost is None else (grad_cost * exact_plan(*ctx.saved_tensors, *ctx.sizes)).sum((-2, -1))
    return (grad_value, *[None] * 11)


exact_backward = differentiable("exact_backward", _exact_second_context, _exact_second)
exact_forward = differentiable("exact_forward", _exact_context, _exact_autograd, values=1)


def exact_plan(rows: Tensor, columns: Tensor, mass: Tensor, n: int, m: int) -> Tensor:
    """The plan ``[B, G, n, m]``: what the value's gradient for the cost is."""
    f, g = mass.new_zeros((*mass.shape[:2], n)), mass.new_zeros((*mass.shape[:2], m))
    ones = mass.new_ones(mass.shape[:2])
    return exact_backward(ones, None, None, None, f, g, rows, columns, mass, True, False, False)[0]
