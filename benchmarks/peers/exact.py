"""Exact solvers, one problem after the other; the plan is held fixed in backward, which is its gradient."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..data.workloads import Problem
from .base import Peer, Solved, Unsuited, hold_fixed

Assign = Callable[[Tensor], Tensor]  # costs [B, N, N] to the column of each row, [B, N]


def _assignment(assign: Assign) -> Callable[[Tensor, Tensor, Problem, Any], Solved]:
    def solve(x: Tensor, y: Tensor, problem: Problem, setting: None) -> Solved:
        cost = torch.cdist(x, y)
        if cost.shape[1] != cost.shape[2]:
            raise Unsuited("assignments only, needs N = M")
        column = assign(cost.detach()).long()[:, :, None]
        values = cost.gather(2, column)[:, :, 0].mean(1)
        return Solved(values, lambda: torch.zeros_like(cost).scatter(2, column, 1 / cost.shape[1]))

    return solve


def _scipy(cost: Tensor) -> Tensor:
    from scipy.optimize import linear_sum_assignment

    return torch.tensor([linear_sum_assignment(matrix)[1].tolist() for matrix in cost.numpy()])


def _lapx(cost: Tensor) -> Tensor:
    import lap

    return torch.tensor([lap.lapjv(matrix, return_cost=False)[0].tolist() for matrix in cost.double().numpy()])


def _lap_cuda(cost: Tensor) -> Tensor:
    return importlib.import_module("lap_cuda").solve_lap(cost)


def _pot(x: Tensor, y: Tensor, problem: Problem, setting: None) -> Solved:
    import ot

    cost = torch.cdist(x, y)
    plans = [ot.emd2([], [], m, return_matrix=True)[1]["G"] for m in cost.detach().double().numpy()]
    return hold_fixed(torch.stack([torch.from_numpy(plan) for plan in plans]).to(cost.dtype), cost)


EXACT = [
    Peer("SciPy linear_sum_assignment, one by one", "scipy", "exact", (None,), _assignment(_scipy), device="cpu"),
    Peer("lapx lapjv, one by one", "lapx", "exact", (None,), _assignment(_lapx), device="cpu"),
    Peer("POT emd2, one by one", "POT", "exact", (None,), _pot, device="cpu"),
    Peer("torch-lap-cuda", "torch-lap-cuda", "exact", (None,), _assignment(_lap_cuda), device="cuda"),
]
