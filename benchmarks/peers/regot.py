"""RegOT's second-order solvers, one problem after the other, in float64; the plan is held fixed in backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.workloads import Problem
from .base import MAX_ITER, Peer, Solved, hold_fixed


def _solver(method: str) -> Callable[[Tensor, Tensor, Problem, Any], Solved]:
    def solve(x: Tensor, y: Tensor, problem: Problem, tol_share: float) -> Solved:
        import regot

        cost, tol = torch.cdist(x, y), tol_share * problem.tol
        a, b = (np.full(n, 1 / n) for n in cost.shape[1:])
        solver = getattr(regot, f"sinkhorn_{method}")
        # By columns, as it holds them.
        matrices = [np.asfortranarray(matrix) for matrix in cost.detach().double().numpy()]
        plans = [solver(matrix, a, b, problem.eps, tol=tol, max_iter=MAX_ITER).plan for matrix in matrices]
        return hold_fixed(torch.from_numpy(np.stack(plans)).to(cost.dtype), cost)

    return solve


# It checks another norm than L1.
_SHARES = (1.0, 0.3, 0.1, 0.03, 0.01)
REGOT = [
    Peer(f"RegOT {name}, one by one", "regot", "transport", _SHARES, _solver(method), device="cpu")
    for name, method in (("SSNS", "ssns"), ("SPLR", "splr"))
]
