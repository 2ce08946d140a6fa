"""Time of the exact solver beside others: ``python -m benchmarks.studies.exact``.

A batch of problems whose costs are given, values and dual variables wanted. Other libraries take one problem at a call
and run on one thread; a row here is their loop. A sample of short work is several calls.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import timeit
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sfr_ext import linear_assignment, solve
from sfr_ext.ops import ExactOptions
from sfr_ext.ops.exact import exact_forward

from ..data.workloads import WORKLOADS, Problem, as_tokens
from ..harness.device import Device
from ..harness.machine import torch_threads, version_of
from ..harness.report import markdown
from ..harness.row import Entry, Row
from ..harness.timing import time_rows


@dataclass(frozen=True)
class Solver:
    name: str
    distribution: str
    # "plan": transport, with any weights; "matching": the same where sides are equal and nothing is weighted;
    # "plan of a matching": that as a plan.
    finds: str
    threads: int
    solve: Callable[[Tensor, Tensor | None, Tensor | None], Any]


def _ours(cost: Tensor, a: Tensor | None, b: Tensor | None) -> Any:
    return exact_forward(cost[:, None], a, b, *ExactOptions(), "benchmark")


def _assignment(cost: Tensor, a: Tensor | None, b: Tensor | None) -> Any:
    return linear_assignment(cost)


def _plan(cost: Tensor, a: Tensor | None, b: Tensor | None) -> Any:
    return solve(cost, a, b, solver="exact").plan


def _one_by_one(function: Callable[[Any], Any]) -> Callable[[Tensor, Tensor | None, Tensor | None], Any]:
    return lambda cost, a, b: [function(matrix) for matrix in cost.numpy()]


def _lapjvx(matrix: Any) -> Any:
    import lap

    return lap.lapjvx(matrix, extend_cost=True)


def _lapjvs(matrix: Any) -> Any:
    import lap

    return lap.lapjvs(matrix, extend_cost=True)


def _scipy(matrix: Any) -> Any:
    from scipy.optimize import linear_sum_assignment

    return linear_sum_assignment(matrix)


def _scipy_plan(cost: Tensor, a: Tensor | None, b: Tensor | None) -> Any:
    """What `_plan` gives, of square problems."""
    plan, share = torch.zeros_like(cost), 1 / cost.shape[-1]
    for matrix, entries in zip(cost.numpy(), plan.numpy(), strict=True):
        entries[_scipy(matrix)] = share
    return plan


def _pot(cost: Tensor, a: Tensor | None, b: Tensor | None) -> Any:
    import ot

    matrices = cost.numpy()
    if a is None or b is None:
        return [ot.emd2([], [], matrix) for matrix in matrices]
    return [ot.emd2(p, q, matrix) for p, q, matrix in zip(a.numpy(), b.numpy(), matrices, strict=True)]


SOLVERS = [
    Solver("1 thread", "sfr_ext", "plan", 1, _ours),
    Solver("2 threads", "sfr_ext", "plan", 2, _ours),
    Solver("linear_assignment", "sfr_ext", "matching", 1, _assignment),
    Solver("solve, dense plan", "sfr_ext", "plan", 1, _plan),
    Solver("lapjvx", "lapx", "matching", 1, _one_by_one(_lapjvx)),
    Solver("lapjvs", "lapx", "matching", 1, _one_by_one(_lapjvs)),
    Solver("linear_sum_assignment", "scipy", "matching", 1, _one_by_one(_scipy)),
    Solver("linear_sum_assignment, dense plan", "scipy", "plan of a matching", 1, _scipy_plan),
    Solver("emd2", "POT", "plan", 1, _pot),
]


def _l2(problem: Problem) -> Tensor:
    return torch.cdist(as_tokens(problem.x.double()), as_tokens(problem.y.double()))


@functools.cache
def workloads() -> dict[str, tuple[str, Tensor, Tensor | None, Tensor | None]]:
    """Costs and weights, float64: the type that every one of these libraries computes in."""
    generator = torch.Generator().manual_seed(0)

    def weight(b: int, n: int) -> Tensor:
        weights = torch.rand(b, n, generator=generator, dtype=torch.float64) + 0.2
        return weights / weights.sum(-1, keepdim=True)

    def uniform(b: int, n: int) -> Tensor:
        return torch.full((b, n), 1 / n, dtype=torch.float64)

    w1, maps, large = (_l2(WORKLOADS[name].make()) for name in ("w1", "maps", "large"))
    x, y = (F.normalize(torch.randn(16, 196, 3, generator=generator, dtype=torch.float64), dim=-1) for _ in range(2))
    points = torch.cdist(x, y)
    many = torch.rand(1000, 20, 40, generator=generator, dtype=torch.float64)
    return {
        "49 x 49": ("unit vectors of 512 channels, uniform", w1, None, None),
        "49 x 49 maps": ("feature maps of a trained network, uniform", maps, None, None),
        "196 x 196": ("unit vectors of 256 channels, uniform", large, None, None),
        "196 x 196 sphere": ("points on a sphere, uniform", points, None, None),
        "49 x 49 weights": ("random weights", w1, weight(128, 49), weight(128, 49)),
        "49 x 49 ones": ("equal weights passed", w1, uniform(128, 49), uniform(128, 49)),
        "49 x 49 maps, weights": ("random weights", maps, weight(32, 49), weight(32, 49)),
        "49 x 36": ("uniform", w1[:, :, :36].contiguous(), uniform(128, 49), uniform(128, 36)),
        "196 x 196 weights": ("random weights", large, weight(16, 196), weight(16, 196)),
        "196 x 196 sphere, weights": ("random weights", points, weight(16, 196), weight(16, 196)),
        "1,000 of 20 x 40": ("random costs, uniform", many, uniform(1000, 20), uniform(1000, 40)),
        "1,000 of 20 x 40, matched": ("random costs", many, None, None),
        "196 x 49": ("uniform", large[:, :, :49].contiguous(), uniform(16, 196), uniform(16, 49)),
        **hard_shapes(generator, weight, uniform),
        **trivial_batches(),
    }


def hard_shapes(
    generator: torch.Generator, weight: Callable[[int, int], Tensor], uniform: Callable[[int, int], Tensor]
) -> dict[str, tuple[str, Tensor, Tensor | None, Tensor | None]]:
    """One problem each, of kinds that solvers differ in most, or that are trivial."""

    def random(*shape: int) -> Tensor:
        return torch.rand(1, *shape, generator=generator, dtype=torch.float64)

    def clouds(n: int, m: int, dimensions: int = 3) -> Tensor:
        return torch.cdist(random(n, dimensions), random(m, dimensions))

    def zeros(n: int, share: float) -> Tensor:
        return (random(n, n) > share).double()

    def at_minima(n: int) -> Tensor:
        cost = 1 + random(n, n)
        cost[0, torch.randperm(n, generator=generator), torch.arange(n)] = random(n)[0] / 2
        return cost

    i = torch.arange(1, 1001, dtype=torch.float64)
    line = (random(1000, 1) - random(1, 1000)).abs()
    return {
        "1000 x 1000, products": ("cost i * j", (i[:, None] * i)[None], None, None),
        "1000 x 1000 line": ("points on a line", line, None, None),
        "1000 x 1000 line, squares": ("squared distances on a line", line.square(), None, None),
        "1000 x 1000 line, weights": ("points on a line, random weights", line, weight(1, 1000), weight(1, 1000)),
        "5000 x 5": ("points in space, uniform", clouds(5000, 5), uniform(1, 5000), uniform(1, 5)),
        "5 x 5000": ("points in space, uniform", clouds(5, 5000), uniform(1, 5), uniform(1, 5000)),
        "2000 x 20": ("points in space, random weights", clouds(2000, 20), weight(1, 2000), weight(1, 20)),
        "20 x 2000": ("points in space, random weights", clouds(20, 2000), weight(1, 20), weight(1, 2000)),
        "2000 x 2000, 5 % zeros": ("0 or 1", zeros(2000, 0.05), None, None),
        "2000 x 2000, 0.5 % zeros": ("0 or 1", zeros(2000, 0.005), None, None),
        "2000 x 2000, 0.1 % zeros": ("0 or 1", zeros(2000, 0.001), None, None),
        "2000 x 2000, 0.03 % zeros": ("0 or 1", zeros(2000, 0.0003), None, None),
        "500 x 500, 2 % zeros": ("0 or 1", zeros(500, 0.02), None, None),
        "500 x 500, 0.5 % zeros": ("0 or 1", zeros(500, 0.005), None, None),
        "1000 x 1000, 0 to 3": ("integers", (4 * random(1000, 1000)).floor(), None, None),
        "1000 x 1000, 0 to 99": ("integers", (100 * random(1000, 1000)).floor(), None, None),
        "2000 x 2000 plane": ("points in a plane", clouds(2000, 2000, 2), None, None),
        "2000 x 2000 space": ("points in space", clouds(2000, 2000), None, None),
        "3500 x 3500 space": ("points in space", clouds(3500, 3500), None, None),
        "4000 x 4000 space": ("points in space", clouds(4000, 4000), None, None),
        "2000 x 2000 clouds apart": ("points 5 apart", torch.cdist(random(2000, 3), random(2000, 3) + 5), None, None),
        "1000 x 1000, minima": ("optimum at the column minima", at_minima(1000), None, None),
        "1000 x 1000, constant": ("all costs are 1", torch.ones(1, 1000, 1000, dtype=torch.float64), None, None),
        "1000 x 1000, diagonal": ("0 there, 1 elsewhere", 1 - torch.eye(1000, dtype=torch.float64)[None], None, None),
        "1000 x 1000, same rows": ("all rows are the same", random(1, 1000).repeat(1, 1000, 1), None, None),
        "1000 x 1000, sums": (
            "a number of the row and one of the column",
            random(1000, 1) + random(1, 1000),
            None,
            None,
        ),
    }


def trivial_batches() -> dict[str, tuple[str, Tensor, Tensor | None, Tensor | None]]:
    """Batches of 100 small problems whose optimum is seen at once, where a call's own cost shows."""
    return {
        f"100 of {n} x {n}, {kind}": ("trivial", cost.expand(100, n, n).contiguous(), None, None)
        for n in (5, 12, 20)
        for kind, cost in (
            ("constant", torch.ones(n, n, dtype=torch.float64)),
            ("diagonal", 1 - torch.eye(n, dtype=torch.float64)),
        )
    }


# Milliseconds of our sample at least: one short call after others' would time the caches that they leave cold.
SHORTEST = 2.0


def calls_of(cost: Tensor, a: Tensor | None, b: Tensor | None) -> int:
    """Calls of a sample, for every solver of a problem."""
    once = min(timeit.repeat(lambda: _ours(cost, a, b), number=1, repeat=3))
    return max(1, round(SHORTEST / (1e3 * once)))


def timed(solver: Solver, cost: Tensor, a: Tensor | None, b: Tensor | None, calls: int) -> Entry:
    row = Row(
        f"{solver.distribution} {solver.name}", version_of(solver.distribution), ours=solver.distribution == "sfr_ext"
    )

    def run() -> None:
        with torch_threads(solver.threads):
            for _ in range(calls):
                solver.solve(cost, a, b)

    return row, run


def rows(names: list[str], rounds: int, seconds: float, once: bool) -> Iterator[list[str]]:
    for name in names:
        kind, cost, a, b = workloads()[name]
        goals = {"matching"} if a is None else {"plan"}
        if cost.shape[1] == cost.shape[2]:
            goals.add("plan")
            if a is None:
                goals.add("plan of a matching")
        able = [s for s in SOLVERS if version_of(s.distribution) is not None and s.finds in goals]
        calls = 1 if once else calls_of(cost, a, b)
        entries = [timed(solver, cost, a, b, calls) for solver in able]
        time_rows(entries, Device("cpu"), rounds, seconds)
        for row, _ in entries:
            spent = [1e3 * sample / (calls * len(cost)) for sample in row.milliseconds]
            label = f"{name}, {kind}" if row is entries[0][0] else ""
            times = f"{statistics.median(spent):.0f} ({min(spent):.0f})"
            yield [label, f"{row.name} {row.version}", times, f"{statistics.median(row.ratios):.2f}"]
        print(f"{name} done", file=sys.stderr, flush=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.studies.exact", description=__doc__)
    parser.add_argument("--problem", choices=workloads(), action="append", help="these alone")
    parser.add_argument("--rounds", type=int, default=15, help="times that each solver runs (default: 15)")
    parser.add_argument("--seconds", type=float, default=5, help="that another's runs take, roughly (default: 5)")
    parser.add_argument("--once", action="store_true", help="a sample is one call, however short")
    options = parser.parse_args(arguments)
    header = ("problem", "solver", "us a problem, median (smallest)", "times the first")
    print(markdown(header, rows(options.problem or list(workloads()), options.rounds, options.seconds, options.once)))


if __name__ == "__main__":
    main()
