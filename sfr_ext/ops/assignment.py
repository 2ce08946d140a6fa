"""``assignment_forward``: the column of each row. Contract: csrc/contracts/assignment.h."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .contracts import DTYPES, AssignmentForwardParams
from .derivatives import folded
from .launch import run
from .operator import Operator, library
from .views import compute_dtype, cost_view

FORWARD = Operator("assignment_forward", "Tensor", cost="Tensor", maximize="bool", limit="float")


@FORWARD.fake
def _room(cost: Tensor, maximize: bool, limit: float) -> Tensor:
    return cost.new_empty(cost.shape[:-1], dtype=torch.int64)


@FORWARD.kernel
def _forward(cost: Tensor, maximize: bool, limit: float) -> Tensor:
    B, G, N, M = cost.shape
    columns, compute = _room(cost, maximize, limit), DTYPES[compute_dtype(cost)]
    threads = torch.get_num_threads()
    params = AssignmentForwardParams(B, G, N, M, compute, cost_view(cost), maximize, limit, columns, threads)
    run("assignment_forward", cost, params)
    return columns


assignment_forward = FORWARD.registered

if hasattr(torch.library, "register_vmap"):  # torch 2.5; before, torch goes over the axis, and not over an empty one

    def _over_an_axis(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Any, Any]:
        return folded(assignment_forward, info.batch_size, in_dims, inputs)

    torch.library.register_vmap("sfr_ext::assignment_forward", _over_an_axis, lib=library)
