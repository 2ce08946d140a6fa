"""One problem at a time, beside its share of a batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import sfr_ext

from ..data.workloads import Problem, random_maps
from ..harness import limits
from ..harness.floors import step_floor
from ..harness.machine import torch_threads
from ..harness.results import Table, Verdict
from ..harness.row import Entry, own_row, quartiles
from ..harness.run import Run
from .comparison import iterations_of


def single(run: Run) -> Table:
    """All problems of a batch one after the other, beside the batch in one call; forward and backward, one thread."""
    sizes = {"49 x 49, C=512": (128, 7, 512), "16 x 16, C=64": (128, 4, 64), "196 x 196, C=256": (16, 14, 256)}
    table = Table("single", "milliseconds of one problem, alone and in a batch, forward and backward, one thread")
    with torch_threads(1):
        entries: list[Entry] = []
        batches: list[int] = []
        peak = limits.measure(run.device)
        for name, (b, side, c) in sizes.items():
            batch = run.problem(random_maps(b, side, c))
            b = len(batch.x)
            batches.append(b)
            floor = step_floor(batch, iterations_of(batch), peak).milliseconds / b
            alone = [
                _step(dataclasses.replace(batch, x=x[None], y=y[None])) for x, y in zip(batch.x, batch.y, strict=True)
            ]

            def each(alone: list[Callable[[], Any]] = alone) -> None:
                for step in alone:
                    step()

            entries.append((own_row(f"{name}, B={b}", floor=floor), _step(batch)))
            entries.append((own_row(f"{name}, B=1", base=f"{name}, B={b}", floor=floor), each))
        run.time(table, entries)
    for row, b in zip(table.rows, (b for b in batches for _ in range(2)), strict=True):
        row.milliseconds, row.processor = ([s / b for s in clock] for clock in (row.milliseconds, row.processor))
    for row in table.rows[1::2]:
        low, middle, high = quartiles(row.ratios)
        measured = f"{middle:.2f} ({low:.2f} - {high:.2f}) times"
        table.verdicts.append(Verdict(f"{row.name}: at most 1.3 times its share of a batch", measured, middle <= 1.3))
    return table


def _step(problem: Problem) -> Callable[[], Any]:
    x, y = (side.clone().requires_grad_() for side in (problem.x, problem.y))

    def step() -> None:
        x.grad = y.grad = None
        sfr_ext.emd_l2(x, y, **problem.options()).backward()

    return step
