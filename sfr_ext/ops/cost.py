"""``cost_forward``: the ground costs of every pair of patches. Contract: csrc/contracts/cost.h."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from torch import Tensor

from .. import formulas
from .contracts import METRIC_NAMES, CostBackwardParams, CostForwardParams
from .derivatives import differentiable, second_derivatives
from .gradients import feature_gradients, named
from .launch import run
from .operator import Operator
from .views import Ground, compute_dtype, cost_params, dense, patch_grids, problems, view_of


class Features(NamedTuple):
    x: Tensor
    y: Tensor


class Need(NamedTuple):
    need_x: bool
    need_y: bool


FORWARD = Operator("cost_forward", "Tensor", features=Features, ground=Ground)
BACKWARD = Operator(
    "cost_backward",
    "(Tensor, Tensor)",
    grad_cost="Tensor",
    cost="Tensor",
    features=Features,
    ground=Ground,
    need=Need,
)


@FORWARD.fake
def _room(features: Features, ground: Ground) -> Tensor:
    x, y = features
    shape = (*problems(x, y), *map(math.prod, patch_grids(x, y, ground.patch_size)))
    return x.new_empty(shape, dtype=compute_dtype(x, y))


@FORWARD.kernel
def _forward(features: Features, ground: Ground) -> Tensor:
    cost = _room(features, ground)
    run("cost_forward", cost, CostForwardParams(cost_params(*features, ground, cost.dtype), cost))
    return cost


@BACKWARD.kernel
def _backward(grad_cost: Tensor, cost: Tensor, features: Features, ground: Ground, need: Need) -> tuple[Tensor, Tensor]:
    gradients = feature_gradients(*features, *need)
    view = view_of(features.x)
    grad_x, grad_y = map(view, named(gradients, need))
    problem = cost_params(*features, ground, cost.dtype)
    run("cost_backward", cost, CostBackwardParams(problem, dense(cost), dense(grad_cost), grad_x, grad_y))
    return gradients


@BACKWARD.fake
def _(grad_cost: Tensor, cost: Tensor, features: Features, ground: Ground, need: Need) -> tuple[Tensor, Tensor]:
    return feature_gradients(*features, *need)


def _save(ctx: Any, cost: Tensor, features: Features, ground: Ground) -> None:
    ctx.ground = ground
    ctx.save_for_backward(cost, *features)


def _pull(ctx: Any, grad_cost: Tensor) -> list[Tensor | None]:
    wanted = ctx.needs_input_grad[:2]
    return named(cost_backward(grad_cost, *ctx.saved_tensors, *ctx.ground, *wanted), wanted)


def _save_again(
    ctx: Any, output: Any, grad_cost: Tensor, cost: Tensor, features: Features, ground: Ground, need: Need
) -> None:
    ctx.ground = ground
    ctx.save_for_backward(grad_cost, *features)


def _pull_again(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
    grad_cost, *features = ctx.saved_tensors

    def values(x: Tensor, y: Tensor) -> tuple[Tensor]:
        metric = METRIC_NAMES[ctx.ground.metric]
        return (formulas.cost_matrix(x, y, metric=metric, patch_size=ctx.ground.patch_size),)

    # The cost itself was an argument too, as forward's output; here it is a function of x and y.
    needed = ctx.needs_input_grad
    found = second_derivatives(values, (grad_cost,), tuple(features), upstream, (needed[0], *needed[2:4]))
    return (found[0], None, *found[1:])


cost_backward = differentiable(BACKWARD, _save_again, _pull_again)
cost_forward = differentiable(FORWARD, _save, _pull)
