"""``directions_forward``: maps pooled to a grid, as directions. Contract: csrc/contracts/directions.h."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import formulas
from .contracts import DTYPES, DirectionsBackwardParams, DirectionsForwardParams, DirectionsParams
from .derivatives import differentiable, second_derivatives
from .launch import on_cpu, run
from .operator import Operator
from .views import dense, feature_view


class Grid(NamedTuple):
    """What the channels are cut into, and rows and columns."""

    groups: int
    height: int
    width: int


class Directions(NamedTuple):
    directions: Tensor  # [B, G, C, h, w]
    inverse: Tensor  # [B, G, h, w]


FORWARD = Operator("directions_forward", Directions, x="Tensor", grid=Grid)
BACKWARD = Operator(
    "directions_backward", "Tensor", grad="Tensor", x="Tensor", directions="Tensor", inverse="Tensor", grid=Grid
)


def in_one_pass(x: Tensor, height: int, width: int) -> bool:
    """Whether ``directions_forward`` takes it."""
    known = x.dim() == 4 and x.dtype in (torch.float32, torch.float64) and on_cpu(x)
    return known and 0 not in x.shape[1:] and x.stride(3) == 1 and x.shape[2] % height == 0 and x.shape[3] % width == 0


@FORWARD.fake
def _room(x: Tensor, grid: Grid) -> Directions:
    batch, channels = x.shape[:2]
    groups, *size = grid
    directions = x.new_empty((batch, groups, channels // groups, *size))
    return Directions(directions, x.new_empty((batch, groups, *size)))


def _problem(x: Tensor, grid: Grid) -> DirectionsParams:
    batch, channels = x.shape[:2]
    each = channels // grid.groups
    view = feature_view(x)._replace(stride_g=each * x.stride(1))
    return DirectionsParams(
        batch, grid.groups, each, grid.height, grid.width, DTYPES[x.dtype], view, torch.get_num_threads()
    )


@FORWARD.kernel_on("CPU")
def _forward(x: Tensor, grid: Grid) -> Directions:
    out = _room(x, grid)
    run("directions_forward", x, DirectionsForwardParams(_problem(x, grid), *out))
    return out


@BACKWARD.kernel_on("CPU")
def _backward(grad: Tensor, x: Tensor, directions: Tensor, inverse: Tensor, grid: Grid) -> Tensor:
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    given = map(dense, (directions, inverse, grad))
    run("directions_backward", x, DirectionsBackwardParams(_problem(out, grid), *given))
    return out


@BACKWARD.fake
def _(grad: Tensor, x: Tensor, directions: Tensor, inverse: Tensor, grid: Grid) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _save(ctx: Any, found: Directions, x: Tensor, grid: Grid) -> None:
    ctx.grid = grid
    ctx.save_for_backward(x, *found)


def _pull(ctx: Any, grad: Tensor, *others: None) -> tuple[Tensor]:
    return (directions_backward(grad, *ctx.saved_tensors, *ctx.grid),)


def _save_again(
    ctx: Any, output: Tensor, grad: Tensor, x: Tensor, directions: Tensor, inverse: Tensor, grid: Grid
) -> None:
    ctx.grid = grid
    ctx.save_for_backward(grad, x)


def _pull_again(ctx: Any, above: Tensor | None) -> list[Tensor | None]:
    grad, x = ctx.saved_tensors

    def values(x: Tensor) -> tuple[Tensor]:
        return (formulas.directions(x, *ctx.grid),)

    return second_derivatives(values, (grad,), (x,), (above,), ctx.needs_input_grad[:2])


directions_backward = differentiable(BACKWARD, _save_again, _pull_again)
directions_forward = differentiable(FORWARD, _save, _pull, values=1)
