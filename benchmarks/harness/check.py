"""Does a library agree with the float64 reference, and with which of its settings?"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..data.workloads import Problem
from ..peers import Peer, Solved, Unsuited
from .row import Row
from .truth import Truth, marginal_error

# A result further from the reference than this is not timed.
WRONG = 0.01


def adapted(peer: Peer, problem: Problem) -> Problem:
    """The problem as this peer is to solve it."""
    x, y = (problem.x, problem.y) if peer.dtype is None else (problem.x.to(peer.dtype), problem.y.to(peer.dtype))
    return dataclasses.replace(problem, x=x, y=y, tol=problem.tol if peer.tol is None else peer.tol)


def leaves(peer: Peer, problem: Problem) -> tuple[Tensor, Tensor]:
    x, y = (problem.x, problem.y) if peer.takes_maps else problem.tokens()
    return x.clone().requires_grad_(), y.clone().requires_grad_()


def step(peer: Peer, x: Tensor, y: Tensor, problem: Problem, setting: Any) -> Solved:
    """What is timed: forward and backward of the mean."""
    solved = peer.solve(x, y, problem, setting)
    if solved.gradients is None:
        solved.values.mean().backward()
    else:
        x.grad, y.grad = solved.gradients
    return solved


def check(peer: Peer, problem: Problem, truth: Truth) -> Row:
    """Finds the coarsest setting that reaches the tolerance, and compares its result with the reference."""
    row = Row(peer.name, peer.version(), peer.objective, peer.ours)
    row.problem = _unsuited(peer, problem)
    if row.problem:
        return row
    try:
        problem = adapted(peer, problem)
        for row.setting in peer.settings:
            x, y = leaves(peer, problem)
            solved = step(peer, x, y, problem, row.setting)
            row.marginal_error = marginal_error(solved.plan())
            # Measured on a plan in float32, whose own rounding must not fail a solver at its limit.
            row.reached = row.marginal_error <= 1.01 * problem.tol
            if row.reached:
                break
            if math.isnan(row.marginal_error):  # with finer settings too
                row.problem = "failed: NaN in the plan of at least one problem"
                return row
        row.value_error, row.gradient_error = truth.compare(peer, solved, x, y)
        begin = time.perf_counter()  # not of the first run, which may have compiled something
        step(peer, *leaves(peer, problem), problem, row.setting)
        row.warm = 1e3 * (time.perf_counter() - begin)
    except Unsuited as reason:
        row.problem = str(reason)
        return row
    except Exception as error:
        row.problem = failure(error)
        return row
    row.problem = disagreement(row)
    return row


def failure(error: Exception) -> str:
    return f"failed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def disagreement(row: Row) -> str | None:
    """With the reference; None where there is none."""
    assert row.value_error is not None
    return None if row.value_error <= WRONG else f"disagrees with the reference: values off by {row.value_error:.2g}"


def _unsuited(peer: Peer, problem: Problem) -> str | None:
    device = problem.x.device.type
    if peer.device and peer.device != device:
        return f"not run: needs {'a GPU' if peer.device == 'cuda' else 'the CPU'}"
    if peer.version() is None:
        return f"not installed (pip install {peer.distribution})"
    if problem.metric not in peer.metrics:
        return f"not run: no {problem.metric} cost"
    if not peer.ours and problem.x.dtype not in (torch.float32, torch.float64):
        return f"not run: others get no {str(problem.x.dtype).removeprefix('torch.')}"
    return None


def run_of(peer: Peer, row: Row, problem: Problem) -> Callable[[], Any]:
    problem = adapted(peer, problem)
    x, y = leaves(peer, problem)

    def run() -> None:
        x.grad = y.grad = None
        step(peer, x, y, problem, row.setting)

    return run
