"""How time grows with each size: one thing at a time is changed, and an exponent fitted."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

import sfr_ext
from sfr_ext.ops import forced

from ..data.workloads import Problem, random_maps
from ..harness.check import adapted, leaves, run_of, step
from ..harness.floors import step_floor
from ..harness.machine import torch_threads
from ..harness.results import Table
from ..harness.row import Entry, Row, own_row, quartiles
from ..harness.run import Run
from ..harness.truth import marginal_error
from ..peers import OURS, PEERS, Peer
from .comparison import iterations_of

# The others that are drawn beside us: a fixed choice of those that take no compiling.
DRAWN = ("plain torch, log domain, eager", "POT solve_batch, log_sinkhorn")
LONGEST = 2.0  # seconds that another library may take for the largest point; larger ones are left out


@dataclass(frozen=True)
class Sweep:
    axis: str
    described: str
    values: tuple[int, ...]
    make: Callable[[int], Problem]
    peers: bool = True


def sweeps(suite: str) -> list[Sweep]:
    full = suite == "full"
    sides = (4, 7, 14, 28) if full else (4, 7, 14, 20)
    batches = (1, 4, 16, 64, 256, 1024) if full else (1, 4, 16, 64, 256)
    channels = (16, 64, 256, 1024, 2048) if full else (16, 64, 256, 1024)
    return [
        Sweep(
            "N", "B=4, N x N patches, C=64", tuple(s * s for s in sides), lambda n: random_maps(4, math.isqrt(n), 64)
        ),
        Sweep("B", "49 x 49 patches, C=64", batches, lambda b: random_maps(b, 7, 64)),
        Sweep("C", "B=32, 49 x 49 patches", channels, lambda c: random_maps(32, 7, c)),
    ]


def exponent(x: list[float], y: list[float]) -> float:
    """Slope of the line through the logarithms, least squares."""
    a, b = ([math.log(value) for value in values] for values in (x, y))
    mean_a, mean_b = sum(a) / len(a), sum(b) / len(b)
    across = sum((p - mean_a) ** 2 for p in a)
    return sum((p - mean_a) * (q - mean_b) for p, q in zip(a, b, strict=True)) / across


def grow(sweep: Sweep, run: Run) -> Table:
    """Forward and backward at each size; an exponent over all sizes and one over the upper half."""
    table = Table(f"growth in {sweep.axis}", sweep.described)
    drawn = [OURS[0], *(peer for peer in PEERS if peer.name in DRAWN and sweep.peers)]
    entries: list[Entry] = []
    too_slow: set[str] = set()
    for value in sweep.values:
        problem = run.problem(sweep.make(value))
        floor = step_floor(problem, iterations_of(problem), run.limits).milliseconds
        for peer in drawn:
            if peer.name in too_slow or peer.version() is None:
                continue
            row = _point(peer, problem, f"{sweep.axis}={value}, {peer.name}", run)
            row.floor, row.base = floor, f"{sweep.axis}={value}, {OURS[0].name}"
            if row.warm > 1e3 * LONGEST:
                too_slow.add(peer.name)
            entries.append((row, run_of(peer, row, problem)))
    run.time(table, entries, max(3, run.rounds // 2))
    _fit(table, sweep.axis)
    return table


def _point(peer: Peer, problem: Problem, name: str, run: Run) -> Row:
    """Without a reference: that they agree is shown where they are compared."""
    row = Row(name, peer.version(), peer.objective, peer.ours, setting=peer.settings[0])
    asked = adapted(peer, problem)
    row.marginal_error = marginal_error(step(peer, *leaves(peer, asked), asked, row.setting).plan())
    row.warm = run.device.until_done(lambda: step(peer, *leaves(peer, asked), asked, row.setting))
    row.reached = row.marginal_error <= 1.01 * asked.tol
    return row


def _fit(table: Table, axis: str) -> None:
    """Into the facts: for every library, the points and the exponents."""
    series: dict[str, list[tuple[float, float]]] = {}
    for row in table.rows:
        point, _, name = row.name.partition(", ")
        series.setdefault(name, []).append((float(point.partition("=")[2]), quartiles(row.milliseconds)[1]))
    fits = {}
    for name, points in series.items():
        x, y = ([p[i] for p in points] for i in (0, 1))
        if len(points) > 1:
            half = len(points) // 2
            fits[name] = {"exponent": exponent(x, y), "upper half": exponent(x[half - 1 :], y[half - 1 :])}
    table.facts = {"axis": axis, "exponents": fits}


def grow_iterations(run: Run) -> Table:
    """Plain iterations of a cost that is given, forward."""
    table = Table("growth in iterations", "B=16, 49 x 49 patches, plain iterations on given costs, forward")
    cost = torch.cdist(*run.problem(random_maps(16, 7, 64)).tokens())
    entries: list[Entry] = []
    for count in (25, 100, 400, 1600):
        row = own_row(f"iterations={count}, sfr_ext", base="iterations=25, sfr_ext")
        entries.append((row, partial(sfr_ext.solve, cost, eps=0.05, tol=0.0, max_iter=count)))
    with forced(method="plain"):
        run.time(table, entries)
    _fit(table, "iterations")
    return table


def grow_threads(run: Run) -> Table:
    """Powers of two up to the number pinned."""
    table = Table("growth in threads", "B=64, 49 x 49 patches, C=256, forward and backward")
    problem = run.problem(random_maps(64, 7, 256))
    counts = [count for count in (1, 2, 4, 8, 16, 32, 64) if count <= run.threads]
    entries: list[Entry] = []
    for count in counts:
        row = own_row(f"threads={count}, sfr_ext", base="threads=1, sfr_ext", setting=1.0)
        whole = run_of(OURS[0], row, problem)

        def with_threads(count: int = count, whole: Callable[[], Any] = whole) -> None:
            with torch_threads(count):
                whole()

        entries.append((row, with_threads))
    run.time(table, entries)
    _fit(table, "threads")
    return table


def growth(suite: str, run: Run) -> list[Callable[[], Table]]:
    tables: list[Callable[[], Table]] = [partial(grow, sweep, run) for sweep in sweeps(suite)]
    tables.append(partial(grow_iterations, run))
    if not run.device.on_gpu:
        tables.append(partial(grow_threads, run))
    return tables
