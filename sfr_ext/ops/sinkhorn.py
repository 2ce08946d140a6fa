"""``sinkhorn_forward``: entropic transport for costs that are given. Contract: csrc/contracts/sinkhorn.h."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import implicit
from .contracts import (
    DTYPES,
    SinkhornBackwardParams,
    SinkhornForwardParams,
    SinkhornParams,
    Solve,
    Solved,
    SolveGrad,
    SolverOptions,
)
from .derivatives import differentiable, second_derivatives
from .gradients import NeedGiven, named, nothing, weight_gradients
from .launch import run
from .operator import Operator
from .solved import VALUES, Given, Saved, Upstream, again, room, saved
from .views import all_dense, compute_dtype, cost_view, dense, weight_view
from .weights import check_status

FORWARD = Operator("sinkhorn_forward", Solved, given=Given, init_g="Tensor?", options=SolverOptions, caller="str")
BACKWARD = Operator(
    "sinkhorn_backward",
    "(Tensor, Tensor, Tensor)",
    upstream=Upstream,
    given=Given,
    saved=Saved,
    options=SolverOptions,
    need=NeedGiven,
)
Gradients = tuple[Tensor, Tensor, Tensor]


def _problem(cost: Tensor, compute: torch.dtype) -> SinkhornParams:
    B, G, N, M = cost.shape
    return SinkhornParams(B, G, N, M, DTYPES[compute], cost_view(cost), torch.get_num_threads())


@FORWARD.fake
def _room(given: Given, *_: Any) -> Solved:
    lead, (n, m) = tuple(given.cost.shape[:2]), given.cost.shape[2:]
    return room(Solved, given.cost, lead, n, m, compute_dtype(given.cost))


@FORWARD.kernel
def _forward(given: Given, init_g: Tensor | None, options: SolverOptions, caller: str) -> Solved:
    out = _room(given)
    solve = Solve(
        solved=out,
        options=options,
        a=weight_view(given.a),
        b=weight_view(given.b),
        init_g=dense(init_g),
    )
    params = SinkhornForwardParams(_problem(given.cost, out.f.dtype), solve)
    check_status(run("sinkhorn_forward", given.cost, params), caller, given.a, given.b)
    return out


@BACKWARD.fake
def _gradients(upstream: Upstream, given: Given, saved: Saved, options: SolverOptions, need: NeedGiven) -> Gradients:
    f, g = saved.f, saved.g
    grad_cost = f.new_empty((*f.shape, g.shape[-1])) if need.need_cost else nothing(f)
    return (grad_cost, *weight_gradients(f, g, need.need_a, need.need_b))


@BACKWARD.kernel
def _backward(upstream: Upstream, given: Given, saved: Saved, options: SolverOptions, need: NeedGiven) -> Gradients:
    gradients = _gradients(upstream, given, saved, options, need)
    grad_cost, grad_a, grad_b = named(gradients, need)
    solve = SolveGrad(
        solve=Solve(again(all_dense(saved)), options, weight_view(given.a), weight_view(given.b)),
        grad_transport=dense(upstream.grad_transport),
        grad_entropic=dense(upstream.grad_entropic),
        grad_eps=None,
        grad_a=grad_a,
        grad_b=grad_b,
        grad_eps_given=None,
    )
    params = SinkhornBackwardParams(_problem(given.cost, saved.f.dtype), solve, grad_cost)
    run("sinkhorn_backward", given.cost, params)
    return gradients


def _save(ctx: Any, solved: Solved, given: Given, init_g: Tensor | None, options: SolverOptions, caller: str) -> None:
    ctx.options = options
    ctx.cost_dtype = given.cost.dtype
    ctx.save_for_backward(*given, *saved(solved))


def _pull(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    wanted = ctx.needs_input_grad[:3]
    gradients = sinkhorn_backward(*grads[:VALUES], *ctx.saved_tensors, *ctx.options, *wanted)
    grad_cost, grad_a, grad_b = named(gradients, wanted)
    if grad_cost is not None:
        grad_cost = grad_cost.to(ctx.cost_dtype)
    return (grad_cost, grad_a, grad_b)


def _save_again(
    ctx: Any, output: Gradients, upstream: Upstream, given: Given, saved: Saved, options: SolverOptions, need: NeedGiven
) -> None:
    ctx.options = options
    ctx.save_for_backward(*upstream, *given, *saved)


def _pull_again(ctx: Any, *above: Tensor | None) -> list[Tensor | None]:
    tensors = ctx.saved_tensors
    upstream, given, saved = Upstream(*tensors[:2]), Given(*tensors[2:5]), Saved(*tensors[5:])

    def values(cost: Tensor, a: Tensor | None, b: Tensor | None) -> tuple[Tensor, Tensor]:
        return implicit.values(cost, a, b, saved, ctx.options)

    inputs = (given.cost.to(saved.f.dtype), given.a, given.b)  # of the type that its gradient has
    return second_derivatives(values, upstream, inputs, above, ctx.needs_input_grad[:5])


sinkhorn_backward = differentiable(BACKWARD, _save_again, _pull_again)
sinkhorn_forward = differentiable(FORWARD, _save, _pull, values=VALUES)
