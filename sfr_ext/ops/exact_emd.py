"""``exact_emd_forward``: from features and weights to exact transport, no cost matrix kept. Contract: exact_emd.h."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import formulas, implicit
from .contracts import (
    METRIC_NAMES,
    METRICS,
    ExactEmdBackwardParams,
    ExactEmdForwardParams,
    ExactOptions,
    ExactSaved,
    ExactSolved,
)
from .derivatives import differentiable, second_derivatives
from .exact import exact_plan
from .gradients import NeedPair, fold_groups, named, pair_gradients
from .launch import on_cpu, run
from .operator import Operator
from .solved import room
from .views import (
    Ground,
    Pair,
    all_dense,
    compute_dtype,
    cost_params,
    dense,
    patch_grids,
    problems,
    view_of,
    weight_view,
)
from .weights import check_status

FORWARD = Operator("exact_emd_forward", ExactSolved, pair=Pair, ground=Ground, options=ExactOptions, caller="str")
BACKWARD = Operator(
    "exact_emd_backward",
    "(Tensor, Tensor, Tensor, Tensor)",
    grad_value="Tensor",
    pair=Pair,
    saved=ExactSaved,
    ground=Ground,
    options=ExactOptions,
    need=NeedPair,
)
Gradients = tuple[Tensor, Tensor, Tensor, Tensor]


def in_one_pass(x: Tensor, ground: Ground) -> bool:
    """Whether ``exact_emd_forward`` takes it; else costs are made first."""
    return on_cpu(x) and ground.patch_size == 1 and ground.metric != METRICS["cosine"]


@FORWARD.fake
def _room(pair: Pair, ground: Ground, *_: Any) -> ExactSolved:
    lead = problems(pair.x, pair.y)
    n, m = map(math.prod, patch_grids(pair.x, pair.y, ground.patch_size))
    return room(ExactSolved, pair.x, lead if len(lead) == 2 else (*lead, 1), n, m, compute_dtype(pair.x, pair.y))


@FORWARD.kernel_on("CPU")
def _forward(pair: Pair, ground: Ground, options: ExactOptions, caller: str) -> ExactSolved:
    x, y, a, b = pair
    out = _room(pair, ground)
    problem = cost_params(x, y, ground, out.f.dtype)
    params = ExactEmdForwardParams(problem, weight_view(a), weight_view(b), options, out)
    check_status(run("exact_emd_forward", x, params), caller, a, b)
    return out


@BACKWARD.fake
def _(
    grad_value: Tensor, pair: Pair, saved: ExactSaved, ground: Ground, options: ExactOptions, need: NeedPair
) -> Gradients:
    grad_x, grad_y, grad_a, grad_b = pair_gradients(pair, saved.f, saved.g, need)
    return grad_x, grad_y, fold_groups(grad_a, pair.a), fold_groups(grad_b, pair.b)


@BACKWARD.kernel_on("CPU")
def _backward(
    grad_value: Tensor, pair: Pair, saved: ExactSaved, ground: Ground, options: ExactOptions, need: NeedPair
) -> Gradients:
    gradients = pair_gradients(pair, saved.f, saved.g, need)
    grad_x, grad_y, grad_a, grad_b = named(gradients, need)
    view = view_of(pair.x)
    params = ExactEmdBackwardParams(
        problem=cost_params(pair.x, pair.y, ground, saved.f.dtype),
        a=weight_view(pair.a),
        b=weight_view(pair.b),
        options=options,
        saved=all_dense(saved),
        grad_value=dense(grad_value),
        grad_x=view(grad_x),
        grad_y=view(grad_y),
        grad_a=grad_a,
        grad_b=grad_b,
    )
    run("exact_emd_backward", pair.x, params)
    return *gradients[:2], fold_groups(gradients[2], pair.a), fold_groups(gradients[3], pair.b)


def _save(ctx: Any, solved: ExactSolved, pair: Pair, ground: Ground, options: ExactOptions, caller: str) -> None:
    ctx.ground, ctx.options = ground, options
    ctx.save_for_backward(*pair, *(getattr(solved, name) for name in ExactSaved._fields))


def _pull(ctx: Any, grad_value: Tensor, *others: None) -> list[Tensor | None]:
    wanted = ctx.needs_input_grad[:4]
    gradients = exact_emd_backward(grad_value, *ctx.saved_tensors, *ctx.ground, *ctx.options, *wanted)
    return named(gradients, wanted)


def _save_again(
    ctx: Any,
    output: Gradients,
    grad_value: Tensor,
    pair: Pair,
    saved: ExactSaved,
    ground: Ground,
    options: ExactOptions,
    need: NeedPair,
) -> None:
    ctx.ground = ground
    ctx.save_for_backward(grad_value, *pair, *saved)


def _pull_again(ctx: Any, *above: Tensor | None) -> list[Tensor | None]:
    # By symmetry the plan's own dependence on the weights is among these.
    if any(grad is not None for grad in above[2:]) or any(ctx.needs_input_grad[3:5]):
        raise NotImplementedError(
            "sfr_ext.exact_emd_backward: second derivatives through the weights' gradients are not implemented; call "
            "backward without create_graph=True"
        )
    grad_value, x, y, a, b, f, g, rows, columns, mass = ctx.saved_tensors
    of_plan = exact_plan(rows, columns, mass, f.shape[-1], g.shape[-1])  # moves nowhere, but jumps

    def values(x: Tensor, y: Tensor) -> tuple[Tensor]:
        metric, patch_size = METRIC_NAMES[ctx.ground.metric], ctx.ground.patch_size
        cost = implicit.costs(x, y, a, b, metric, patch_size, formulas.cost_matrix).view(of_plan.shape)
        return ((torch.where(of_plan > 0, cost, 0) * of_plan).sum((-2, -1)),)

    return second_derivatives(values, (grad_value,), (x, y), above[:2], ctx.needs_input_grad[:3])


exact_emd_backward = differentiable(BACKWARD, _save_again, _pull_again)
exact_emd_forward = differentiable(FORWARD, _save, _pull, values=1)
