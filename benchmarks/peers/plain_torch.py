"""What people write by hand. The plan is found without a graph and held fixed in backward."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..data.workloads import Problem
from .base import MAX_ITER, Peer, Solved, hold_fixed

EVERY = 10  # iterations between two looks at the error

Pair = tuple[Tensor, Tensor]


def log_domain(scaled: Tensor, f: Tensor, g: Tensor) -> Pair:
    """Potentials in units of eps."""
    log_n, log_m = (math.log(size) for size in scaled.shape[1:])
    for _ in range(EVERY):
        f = -torch.logsumexp(g[:, None] - scaled - log_m, dim=2)
        g = -torch.logsumexp(f[:, :, None] - scaled - log_n, dim=1)
    return f, g


def log_domain_plan(scaled: Tensor, f: Tensor, g: Tensor) -> Tensor:
    return (f[:, :, None] + g[:, None] - scaled).exp() / (scaled.shape[1] * scaled.shape[2])


def scaling(kernel: Tensor, u: Tensor, v: Tensor) -> Pair:
    n, m = kernel.shape[1:]
    for _ in range(EVERY):
        u = 1 / (n * torch.bmm(kernel, v[:, :, None])[:, :, 0])
        v = 1 / (m * torch.bmm(u[:, None], kernel)[:, 0])
    return u, v


def scaling_plan(kernel: Tensor, u: Tensor, v: Tensor) -> Tensor:
    return u[:, :, None] * kernel * v[:, None]


@functools.cache
def _steps(in_logs: bool, compiled: bool) -> tuple[Callable[..., Pair], Callable[..., Tensor]]:
    """Iterations, and the plan that they lead to. Compiled when first asked for: not every system can."""
    iterate, plan_of = (log_domain, log_domain_plan) if in_logs else (scaling, scaling_plan)
    if not compiled:
        return iterate, plan_of
    fused = torch.compile(fullgraph=True, dynamic=False)
    return fused(iterate), fused(plan_of)


def _solver(in_logs: bool, compiled: bool) -> Callable[[Tensor, Tensor, Problem, Any], Solved]:
    def solve(x: Tensor, y: Tensor, problem: Problem, tol_share: float) -> Solved:
        iterate, plan_of = _steps(in_logs, compiled)
        cost = torch.cdist(x, y)
        with torch.no_grad():
            # Less what potentials can take over, or float32 would not hold the kernel.
            lowered = cost - cost.amin(2, keepdim=True)
            matrix = (lowered - lowered.amin(1, keepdim=True)) / problem.eps
            if not in_logs:
                matrix = (-matrix).exp()
            start = torch.zeros_like if in_logs else torch.ones_like
            u, v = start(cost[:, :, 0]), start(cost[:, 0])
            for _ in range(MAX_ITER // EVERY):
                u, v = iterate(matrix, u, v)
                plan = plan_of(matrix, u, v)
                # The last half-step has just made the columns exact.
                error = (plan.sum(2) - 1 / plan.shape[1]).abs().sum(1).max()
                if not error > tol_share * problem.tol:  # or NaN
                    break
        return hold_fixed(plan, cost)

    return solve


PLAIN_TORCH = [
    Peer(f"plain torch, {domain}, {kind}", "torch", "transport", (1.0, 0.9, 0.5), _solver(in_logs, compiled))
    for domain, in_logs in (("log domain", True), ("scaling", False))
    for kind, compiled in (("eager", False), ("torch.compile", True))
]
