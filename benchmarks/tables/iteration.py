"""One plain Sinkhorn iteration beside the multiply-adds that it is made of."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import sfr_ext
from sfr_ext.ops import forced

from ..data.workloads import random_maps
from ..harness import limits
from ..harness.floors import floor_of
from ..harness.machine import torch_threads
from ..harness.results import Table, Verdict
from ..harness.row import own_row, set_ratios
from ..harness.run import Run


def iteration(run: Run) -> Table:
    """On a cost that is given, cache-resident, one thread: the difference of a call with
    many iterations and one with few, over their number. So many that what a call costs besides, which wavers, is little
    beside their difference."""
    batch, few, many = 4, 100, 4100
    table = Table("iteration", f"one Sinkhorn iteration (difference of {many} and {few}), float32, one thread")
    with torch_threads(1):
        peak = limits.measure(run.device)
        calls: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {}
        for side in (49, 196):
            problem = run.problem(random_maps(batch, math.isqrt(side), 64))
            cost, n = torch.cdist(*problem.tokens()), problem.sizes()[1]

            def solve(iterations: int, cost: Tensor = cost) -> Any:
                return sfr_ext.solve(cost, eps=0.05, tol=0.0, max_iter=iterations)

            with forced(method="plain"):
                taken = [int(solve(iterations).n_iter.min()) for iterations in (few, many)]
            assert taken == [few, many], f"iterations were cut short: {taken}"
            row = own_row(f"{side} x {side}", floor=floor_of(2.0 * n * n, 0, peak).milliseconds)
            table.rows.append(row)
            calls[row.name] = (partial(solve, few), partial(solve, many))
        with forced(method="plain"):
            for round_ in range(run.rounds):
                table.calibration.append(run.calibration.milliseconds())
                for row in table.rows:
                    calls[row.name][0]()  # the first after another row's finds the caches cold
                    short, long = (run.device.until_done(call) for call in calls[row.name])
                    row.milliseconds.append((long - short) / ((many - few) * batch))
                    row.rounds.append(round_)
    set_ratios(table.rows)
    for row in table.rows:
        times = row.of_floor
        assert times is not None
        target = f"an iteration of {row.name} within 2 times the multiply-add limit"
        table.verdicts.append(Verdict(target, f"{times:.2f} times", times <= 2))
    table.facts = {"multiply-adds a second, one thread": peak.multiply_adds}
    return table
