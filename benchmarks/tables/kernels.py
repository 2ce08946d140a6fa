"""Forward and backward of our kernels apart, for a GPU: launched, replayed as CUDA graphs, and what a call costs the
host."""

from __future__ import annotations

import torch
from torch import Tensor

import sfr_ext

from ..data.workloads import Workload
from ..harness.floors import kernel_floors
from ..harness.results import Table
from ..harness.row import Entry, own_row, set_ratios
from ..harness.run import Run
from ..peers import MAX_ITER
from .graphs import replayed

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def kernels(name: str, workload: Workload, run: Run) -> Table:
    """Times of the device, by its own clock, for each type of features."""
    table = Table(f"kernels, {name}", f"{workload.description}: forward and backward apart, the device's own time")
    entries: list[Entry] = []
    stream = run.device.stream()
    with torch.cuda.stream(stream):  # a backward runs, and is captured, on the stream of its forward
        for kind, dtype in DTYPES.items():
            entries += _directions(kind, dtype, workload, run, table, stream)
        run.time(table, entries, clock=run.device.milliseconds)
    return table


def _directions(
    kind: str, dtype: torch.dtype, workload: Workload, run: Run, table: Table, stream: torch.cuda.Stream | None
) -> list[Entry]:
    problem = run.problem(workload.make())
    x, y = (side.to(dtype).requires_grad_() for side in (problem.x, problem.y))
    options = {**problem.options(), "max_iter": MAX_ITER}
    with torch.no_grad():
        solved = sfr_ext.solve_sample(x, y, **options)
    floors = kernel_floors(problem, int(solved.n_iter.max()), run.limits)
    table.facts |= {f"{kind}: largest number of iterations": int(solved.n_iter.max())}
    table.facts |= {f"{kind}: largest marginal error": float(solved.marginal_error.max())}

    def forward() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (sfr_ext.emd_l2(x, y, reduction="none", **options),)

    values = sfr_ext.emd_l2(x, y, reduction="none", **options)
    upstream = torch.full_like(values, 1 / values.numel())

    def backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(values, (x, y), upstream, retain_graph=True)

    entries: list[Entry] = []
    for direction, function in (("forward", forward), ("backward", backward)):
        row = own_row(f"{direction}, {kind}", floor=floors[direction].milliseconds)
        row.base = row.name
        function()
        entries += [(row, function), replayed(row, function, run.device, stream)]
    return entries


def calls(name: str, workload: Workload, run: Run) -> Table:
    """The host's time of an eager forward and backward: until it returns, and until the device is done too."""
    table = Table(f"calls, {name}", f"{workload.description}: an eager forward and backward, the host's time")
    problem = run.problem(workload.make())
    x, y = (side.clone().requires_grad_() for side in (problem.x, problem.y))

    def call() -> None:
        x.grad = y.grad = None
        sfr_ext.emd_l2(x, y, **problem.options(), max_iter=MAX_ITER).backward()

    table.rows = [
        own_row(text, base="until the device is done") for text in ("until the device is done", "until it returns")
    ]
    for _ in range(3):
        call()
    for round_ in range(run.rounds):
        table.calibration.append(run.calibration.milliseconds())
        returned, done = run.device.wall(call)
        for row, sample in zip(table.rows, (done, returned), strict=True):
            row.milliseconds.append(sample)
            row.rounds.append(round_)
    set_ratios(table.rows)
    return table
