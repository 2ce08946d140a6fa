"""``exact_forward``: exact transport for costs that are given. Contract: csrc/contracts/exact.h."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .contracts import (
    DTYPES,
    ExactBackwardParams,
    ExactForwardParams,
    ExactOptions,
    ExactParams,
    ExactSaved,
    ExactSolved,
)
from .derivatives import differentiable
from .gradients import NeedGiven, fold_groups, named, nothing, weight_gradients
from .launch import run
from .operator import Operator
from .solved import Given, room
from .views import all_dense, compute_dtype, cost_view, dense, weight_view
from .weights import check_status

FORWARD = Operator("exact_forward", ExactSolved, given=Given, options=ExactOptions, caller="str")
# The cost is not looked at: it is here so that a second derivative finds its way to it.
BACKWARD = Operator(
    "exact_backward",
    "(Tensor, Tensor, Tensor)",
    grad_value="Tensor",
    cost="Tensor?",
    a="Tensor?",
    b="Tensor?",
    saved=ExactSaved,
    options=ExactOptions,
    need=NeedGiven,
)
Gradients = tuple[Tensor, Tensor, Tensor]


@FORWARD.fake
def _room(given: Given, *_: Any) -> ExactSolved:
    lead, (n, m) = tuple(given.cost.shape[:2]), given.cost.shape[2:]
    return room(ExactSolved, given.cost, lead, n, m, compute_dtype(given.cost))


def _problem(f: Tensor, g: Tensor, a: Tensor | None, b: Tensor | None, options: ExactOptions) -> ExactParams:
    B, G, N = f.shape
    sides, threads = (weight_view(a), weight_view(b)), torch.get_num_threads()
    return ExactParams(B, G, N, g.shape[-1], DTYPES[f.dtype], *sides, options, threads)


@FORWARD.kernel
def _forward(given: Given, options: ExactOptions, caller: str) -> ExactSolved:
    cost, a, b = given
    out = _room(given)
    params = ExactForwardParams(_problem(out.f, out.g, a, b, options), out, cost_view(cost))
    check_status(run("exact_forward", cost, params), caller, a, b)
    return out


def _gradients(saved: ExactSaved, need: NeedGiven) -> Gradients:
    f, g = saved.f, saved.g
    grad_cost = f.new_empty((*f.shape, g.shape[-1])) if need.need_cost else nothing(f)
    return (grad_cost, *weight_gradients(f, g, need.need_a, need.need_b))


def _folded(gradients: Gradients, a: Tensor | None, b: Tensor | None) -> Gradients:
    grad_cost, grad_a, grad_b = gradients
    return grad_cost, fold_groups(grad_a, a), fold_groups(grad_b, b)


@BACKWARD.kernel
def _backward(
    grad_value: Tensor,
    cost: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    saved: ExactSaved,
    options: ExactOptions,
    need: NeedGiven,
) -> Gradients:
    gradients = _gradients(saved, need)
    grad_cost, grad_a, grad_b = named(gradients, need)
    params = ExactBackwardParams(
        problem=_problem(saved.f, saved.g, a, b, options),
        saved=all_dense(saved),
        grad_value=dense(grad_value),
        grad_cost=grad_cost,
        grad_a=grad_a,
        grad_b=grad_b,
    )
    run("exact_backward", saved.f, params)
    return _folded(gradients, a, b)


@BACKWARD.fake
def _(
    grad_value: Tensor,
    cost: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    saved: ExactSaved,
    options: ExactOptions,
    need: NeedGiven,
) -> Gradients:
    return _folded(_gradients(saved, need), a, b)


def _save(ctx: Any, solved: ExactSolved, given: Given, options: ExactOptions, caller: str) -> None:
    ctx.cost_dtype, ctx.options = given.cost.dtype, options
    ctx.save_for_backward(*given, *(getattr(solved, name) for name in ExactSaved._fields))


def _pull(ctx: Any, grad_value: Tensor, *others: None) -> tuple[Tensor | None, ...]:
    wanted = ctx.needs_input_grad[:3]
    grad_cost, grad_a, grad_b = named(exact_backward(grad_value, *ctx.saved_tensors, *ctx.options, *wanted), wanted)
    if grad_cost is not None:
        grad_cost = grad_cost.to(ctx.cost_dtype)
    return grad_cost, grad_a, grad_b


def _save_again(
    ctx: Any,
    output: Gradients,
    grad_value: Tensor,
    cost: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    saved: ExactSaved,
    options: ExactOptions,
    need: NeedGiven,
) -> None:
    ctx.sizes = saved.f.shape[-1], saved.g.shape[-1]
    ctx.save_for_backward(saved.rows, saved.columns, saved.mass)


def _pull_again(ctx: Any, grad_cost: Tensor | None, *of_weights: Tensor | None) -> tuple[Tensor | None]:
    # By symmetry the plan's own dependence on the weights is among these.
    if any(grad is not None for grad in of_weights) or any(ctx.needs_input_grad[2:4]):
        raise NotImplementedError(
            "sfr_ext.exact_backward: second derivatives through the weights' gradients are not implemented; call "
            "backward without create_graph=True"
        )
    # The plan moves nowhere, but jumps.
    grad_value = None if grad_cost is None else (grad_cost * exact_plan(*ctx.saved_tensors, *ctx.sizes)).sum((-2, -1))
    return (grad_value,)


exact_backward = differentiable(BACKWARD, _save_again, _pull_again)
exact_forward = differentiable(FORWARD, _save, _pull, values=1)


def exact_plan(rows: Tensor, columns: Tensor, mass: Tensor, n: int, m: int) -> Tensor:
    """The plan ``[B, G, n, m]``: what the value's gradient for the cost is."""
    f, g = mass.new_empty((*mass.shape[:2], n)), mass.new_empty((*mass.shape[:2], m))  # not looked at
    ones = mass.new_ones(mass.shape[:2])
    saved, need = ExactSaved(f, g, rows, columns, mass), NeedGiven(True, False, False)
    return exact_backward(ones, None, None, None, *saved, *ExactOptions(), *need)[0]
