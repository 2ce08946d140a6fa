"""``emd_forward``: from features and weights to solved problems. Contract: contracts/emd.h.

The costs are kept for backward where they are little beside the features (`costs_room`).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import formulas, implicit
from .contracts import (
    METRIC_NAMES,
    Count,
    EmdBackwardParams,
    EmdForwardParams,
    OfColumns,
    OfRows,
    Solve,
    Solved,
    SolveGrad,
    SolverOptions,
    Value,
)
from .derivatives import differentiable, second_derivatives
from .gradients import NeedPair, fold_groups, named, pair_gradients
from .launch import run
from .operator import Operator
from .solved import VALUES, Saved, Upstream, again, room, saved
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


class EmdSolved(NamedTuple):
    """The members of `Solved`, and the costs: ``[..., N, M]``, or where they are not kept ``[..., 0, 0]``."""

    transport: Value
    entropic: Value
    f: OfRows
    g: OfColumns
    eps: Value
    centre: Value
    shift: Value
    excess: Value
    n_iter: Count
    error: Value
    cost: Tensor


FORWARD = Operator(
    "emd_forward", EmdSolved, pair=Pair, init_g="Tensor?", ground=Ground, options=SolverOptions, caller="str"
)
BACKWARD = Operator(
    "emd_backward",
    "(Tensor, Tensor, Tensor, Tensor)",
    upstream=Upstream,
    pair=Pair,
    saved=Saved,
    cost="Tensor?",
    ground=Ground,
    options=SolverOptions,
    need=NeedPair,
)
Gradients = tuple[Tensor, Tensor, Tensor, Tensor]


FEATURES_TO_COSTS = 10  # bytes of both features for each of the costs from which on they are kept


def keeps_costs(pair: Pair, bytes_of_costs: int) -> bool:
    """Costs are kept for backward where they take at most a tenth of the bytes of both features."""
    x, y = pair.x, pair.y  # whose nbytes knows no symbols
    return FEATURES_TO_COSTS * bytes_of_costs <= x.numel() * x.itemsize + y.numel() * y.itemsize


def costs_room(pair: Pair, solved: Solved) -> Tensor:
    """Room for costs ``[..., N, M]`` where they are kept, else ``[..., 0, 0]``. ``solved``: for the other outputs."""
    f = solved.f
    *lead, n = f.shape
    m = solved.g.shape[-1]
    return f.new_empty((*lead, n, m) if keeps_costs(pair, f.numel() * m * f.itemsize) else (*lead, 0, 0))


def solved_room(pair: Pair, ground: Ground, *others: Tensor) -> Solved:
    n, m = map(math.prod, patch_grids(pair.x, pair.y, ground.patch_size))
    return room(Solved, pair.x, problems(pair.x, pair.y), n, m, compute_dtype(pair.x, pair.y, *others))


@FORWARD.fake
def _(pair: Pair, init_g: Tensor | None, ground: Ground, options: SolverOptions, caller: str) -> EmdSolved:
    out = solved_room(pair, ground)
    return EmdSolved(*out, costs_room(pair, out))


@FORWARD.kernel
def _forward(pair: Pair, init_g: Tensor | None, ground: Ground, options: SolverOptions, caller: str) -> EmdSolved:
    return EmdSolved._make(solve_and_keep(pair, ground, options, caller, init_g=init_g))


def solve_features(*arguments: Any, **options: Any) -> Solved:
    """`solve_and_keep` without the costs."""
    return Solved._make(solve_and_keep(*arguments, **options)[:-1])


def solve_and_keep(
    pair: Pair,
    ground: Ground,
    options: SolverOptions,
    caller: str,
    *,
    init_g: Tensor | None = None,
    eps_given: Tensor | None = None,
    known: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Calls the forward kernel; returns the members of `EmdSolved`. ``eps_given`` of each problem, instead of that of
    the options.

    It says what to compute in: where the features are half of a problem whose other half is float64, so are weights.
    ``known``: costs that were kept before.
    """
    out = solved_room(pair, ground, *[] if eps_given is None else [eps_given])
    cost = costs_room(pair, out) if known is None else known
    solve = Solve(
        solved=out,
        options=options,
        a=weight_view(pair.a),
        b=weight_view(pair.b),
        eps_given=eps_given,
        init_g=dense(init_g),
    )
    run_forward(pair, ground, solve, some(cost), known is not None, out.f.dtype, caller)
    return (*out, cost)


def run_forward(
    pair: Pair, ground: Ground, solve: Solve, cost: Tensor | None, known: bool, compute: torch.dtype, caller: str
) -> None:
    params = EmdForwardParams(cost_params(pair.x, pair.y, ground, compute), solve, cost, known)
    check_status(run("emd_forward", pair.x, params), caller, pair.a, pair.b)


def some(tensor: Tensor | None) -> Tensor | None:
    """None for one without elements, which stands for what is not there."""
    return tensor if tensor is not None and tensor.numel() else None


@BACKWARD.fake
def _(
    upstream: Upstream,
    pair: Pair,
    saved: Saved,
    cost: Tensor | None,
    ground: Ground,
    options: SolverOptions,
    need: NeedPair,
) -> Gradients:
    grad_x, grad_y, grad_a, grad_b = pair_gradients(pair, saved.f, saved.g, need)
    return grad_x, grad_y, fold_groups(grad_a, pair.a), fold_groups(grad_b, pair.b)


@BACKWARD.kernel
def features_backward(
    upstream: Upstream,
    pair: Pair,
    saved: Saved,
    cost: Tensor | None,
    ground: Ground,
    options: SolverOptions,
    need: NeedPair,
    *,
    grad_eps: Tensor | None = None,
    eps_given: Tensor | None = None,
    grad_eps_given: Tensor | None = None,
) -> Gradients:
    """Calls the backward kernel. ``grad_eps``: upstream, of the eps that was used; ``grad_eps_given``: out."""
    gradients = pair_gradients(pair, saved.f, saved.g, need)
    grad_x, grad_y, grad_a, grad_b = named(gradients, need)
    saved = all_dense(saved)
    solve = SolveGrad(
        solve=Solve(again(saved), options, weight_view(pair.a), weight_view(pair.b), dense(eps_given)),
        grad_transport=dense(upstream.grad_transport),
        grad_entropic=dense(upstream.grad_entropic),
        grad_eps=dense(grad_eps),
        grad_a=grad_a,
        grad_b=grad_b,
        grad_eps_given=grad_eps_given,
    )
    run_backward(pair, ground, solve, dense(some(cost)), grad_x, grad_y, saved.f.dtype)
    return *gradients[:2], fold_groups(gradients[2], pair.a), fold_groups(gradients[3], pair.b)


def run_backward(
    pair: Pair,
    ground: Ground,
    solve: SolveGrad,
    cost: Tensor | None,
    grad_x: Tensor | None,
    grad_y: Tensor | None,
    compute: torch.dtype,
) -> None:
    """Gradients of the weights are in ``solve``."""
    view = view_of(pair.x)
    problem = cost_params(pair.x, pair.y, ground, compute)
    run("emd_backward", pair.x, EmdBackwardParams(problem, solve, cost, view(grad_x), view(grad_y)))


def _save(
    ctx: Any,
    out: EmdSolved,
    pair: Pair,
    init_g: Tensor | None,
    ground: Ground,
    options: SolverOptions,
    caller: str,
) -> None:
    ctx.ground, ctx.options = ground, options
    ctx.save_for_backward(*pair, *saved(out), out.cost)


def _pull(ctx: Any, *grads: Tensor | None) -> list[Tensor | None]:
    wanted = ctx.needs_input_grad[:4]
    gradients = emd_backward(*grads[:VALUES], *ctx.saved_tensors, *ctx.ground, *ctx.options, *wanted)
    return named(gradients, wanted)


def _save_again(
    ctx: Any,
    output: Gradients,
    upstream: Upstream,
    pair: Pair,
    saved: Saved,
    cost: Tensor | None,
    ground: Ground,
    options: SolverOptions,
    need: NeedPair,
) -> None:
    ctx.ground, ctx.options = ground, options
    ctx.save_for_backward(*upstream, *pair, *saved)


def _pull_again(ctx: Any, *above: Tensor | None) -> list[Tensor | None]:
    tensors = ctx.saved_tensors
    upstream, pair, saved = Upstream(*tensors[:2]), Pair(*tensors[2:6]), Saved(*tensors[6:])

    def values(x: Tensor, y: Tensor, a: Tensor | None, b: Tensor | None) -> tuple[Tensor, Tensor]:
        metric, patch_size = METRIC_NAMES[ctx.ground.metric], ctx.ground.patch_size
        cost = implicit.costs(x, y, a, b, metric, patch_size, formulas.cost_matrix)
        return implicit.values(cost, a, b, saved, ctx.options)

    return second_derivatives(values, upstream, pair, above, ctx.needs_input_grad[:6])


emd_backward = differentiable(BACKWARD, _save_again, _pull_again)
emd_forward = differentiable(FORWARD, _save, _pull, values=VALUES)
