"""First whether results agree, then how long they take."""

from __future__ import annotations

import gc
import statistics
import time
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from sfr_ext import reference

from .peers import Peer, Solved
from .workloads import Problem

# Problems of the batch that are also solved by the float64 reference.
CHECKED = 4
# A result further from the reference than this is not timed.
WRONG = 0.01


@dataclass
class Row:
    """One peer on one workload."""

    name: str
    version: str | None
    objective: str
    setting: Any = None
    marginal_error: float | None = None  # largest of the batch
    value_error: float | None = None  # relative, largest of the checked problems
    gradient_error: float | None = None  # relative in norm, of the gradient of the features
    problem: str | None = None  # why there are no times
    milliseconds: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)  # to the first row, round by round

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def leaves(peer: Peer, problem: Problem) -> tuple[Tensor, Tensor]:
    x, y = (problem.x, problem.y) if peer.takes_maps else problem.tokens()
    return x.clone().requires_grad_(), y.clone().requires_grad_()


def step(peer: Peer, x: Tensor, y: Tensor, problem: Problem, setting: Any) -> Solved:
    """What is timed: forward and backward of the mean."""
    solved = peer.solve(x, y, problem, setting)
    solved.values.mean().backward()
    return solved


def marginal_error(plan: Tensor) -> float:
    plan = plan.detach().double()
    rows = (plan.sum(2) - 1 / plan.shape[1]).abs().sum(1)
    columns = (plan.sum(1) - 1 / plan.shape[2]).abs().sum(1)
    return float((rows + columns).max())


class Reference:
    """Values and gradients of the first problems of a batch, in float64, for both objectives."""

    def __init__(self, problem: Problem) -> None:
        x, y = (side[:CHECKED].double().requires_grad_() for side in (problem.x, problem.y))
        cost = reference.cost_matrix(x, y)
        result = reference.sinkhorn(cost, eps=problem.eps, eps_scale="absolute", tol=1e-3 * problem.tol)
        self.values = {"transport": result.transport_cost, "entropic": result.entropic_cost}
        self.gradients = {
            name: torch.autograd.grad(value.sum(), (x, y), retain_graph=True) for name, value in self.values.items()
        }

    def compare(self, peer: Peer, solved: Solved, x: Tensor, y: Tensor) -> tuple[float, float]:
        """Relative errors of values and of gradients."""
        want = self.values[peer.objective].detach()
        value_error = float(((solved.values[:CHECKED].detach() - want) / want).abs().max())
        off, size = 0.0, 0.0
        for leaf, gradient in zip((x, y), self.gradients[peer.objective], strict=True):
            assert leaf.grad is not None
            # Of the mean over the batch, hence the factor.
            got = leaf.grad[:CHECKED].double() * len(leaf)
            expected = gradient if peer.takes_maps else gradient.flatten(2).transpose(1, 2)
            off, size = off + float((got - expected).square().sum()), size + float(expected.square().sum())
        return value_error, (off / size) ** 0.5


def check(peer: Peer, problem: Problem, truth: Reference) -> Row:
    """Finds the coarsest setting that reaches the tolerance, and compares its result with the reference."""
    row = Row(peer.name, peer.version(), peer.objective)
    if row.version is None:
        row.problem = f"not installed (pip install {peer.distribution})"
        return row
    try:
        for row.setting in peer.settings:
            x, y = leaves(peer, problem)
            solved = step(peer, x, y, problem, row.setting)
            row.marginal_error = marginal_error(solved.plan())
            # Measured on a plan in float32, whose own rounding must not fail a solver at its limit.
            if row.marginal_error <= 1.01 * problem.tol:
                break
        row.value_error, row.gradient_error = truth.compare(peer, solved, x, y)
    except Exception as error:
        row.problem = f"failed: {type(error).__name__}: {error}"
        return row
    if not row.value_error <= WRONG:
        row.problem = f"disagrees with the reference: values off by {row.value_error:.2g}"
    return row


def time_all(peers: list[Peer], rows: list[Row], problem: Problem, rounds: int) -> None:
    """A B C A B C ...: what else the machine does meanwhile meets everybody alike."""
    running = [(peer, row, *leaves(peer, problem)) for peer, row in zip(peers, rows, strict=True) if not row.problem]
    for _ in range(rounds):
        gc.collect()
        for peer, row, x, y in running:
            x.grad = y.grad = None
            start = time.perf_counter()
            step(peer, x, y, problem, row.setting)
            row.milliseconds.append(1e3 * (time.perf_counter() - start))
    base = rows[0].milliseconds
    for row in rows:
        row.ratios = [own / first for own, first in zip(row.milliseconds, base, strict=False)]


def quartiles(samples: list[float]) -> tuple[float, float, float]:
    if len(samples) == 1:
        return samples[0], samples[0], samples[0]
    low, middle, high = statistics.quantiles(samples, n=4, method="inclusive")
    return low, middle, high
