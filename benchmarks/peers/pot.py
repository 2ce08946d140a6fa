"""POT's batched solvers. With grad="detach": its default, "envelope", records every iteration and then drops the
record."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..data.workloads import Problem
from .base import MAX_ITER, Peer, Solved, hold_fixed


def _solver(method: str) -> Callable[[Tensor, Tensor, Problem, Any], Solved]:
    def solve(x: Tensor, y: Tensor, problem: Problem, tol_share: float) -> Solved:
        import ot

        cost, tol = torch.cdist(x, y), tol_share * problem.tol
        found = ot.solve_batch(cost.detach(), reg=problem.eps, method=method, tol=tol, max_iter=MAX_ITER, grad="detach")
        return hold_fixed(found.plan, cost)

    return solve


# It checks another norm than L1, and only now and then.
_SHARES = (1.0, 0.5, 0.2, 0.1, 0.05)
POT = [
    Peer(f"POT solve_batch, {method}", "POT", "transport", _SHARES, _solver(method))
    for method in ("log_sinkhorn", "sinkhorn")
]
