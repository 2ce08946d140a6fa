"""Two results, row by row: is the new build slower, or only the machine?

Both files hold every sample, by the clock and of the processor, and of every round what a fixed product of matrices
and a fixed copy took. A row's ratio is that of the medians, new over old. It is divided by the same ratio of the
product and of the copy, whichever leaves the row faster, since a row is bound by either. The interval is a percentile
bootstrap over rounds; the confidence is 99 % for all rows and both clocks together. A row is slower where the interval
of either clock lies beyond the margin, as a whole. (The processor's time says more where other programs run: it does
not grow while they do. The clock says more where threads wait.)

What slows one row mostly slows many, so the geometric mean of all is judged as well: it wavers least.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import torch
from torch import Tensor

from .report import markdown
from .results import Results, Table
from .row import Row

CONFIDENCE = 0.99
RESAMPLES = 4000
# What separate runs of one build differ by, beyond the noise within each: code and memory lie elsewhere.
MARGIN = 1.04
# The samples of a row, and the loops of the calibration by the same clock.
CLOCKS = {"milliseconds": ("matmul", "copy"), "processor": ("matmul, processor", "copy, processor")}
# A machine that differs by more than this was busy with something else: such files say little of a build.
BUSY = 1.5
TOGETHER = "all rows, geometric mean"


@dataclass(frozen=True)
class Change:
    """By one clock."""

    ratio: float  # of medians, new / old
    machine: float  # the same of the calibration
    low: float  # of ratio / machine
    high: float


@dataclass(frozen=True)
class RowChange:
    name: str
    clocks: dict[str, Change]

    @property
    def slower(self) -> bool:
        return any(change.low > MARGIN for change in self.clocks.values())

    @property
    def faster(self) -> bool:
        return not self.slower and any(change.high < 1 / MARGIN for change in self.clocks.values())

    @property
    def word(self) -> str:
        return "SLOWER" if self.slower else "faster" if self.faster else "no change beyond noise"


def changes(old: Results, new: Results) -> list[RowChange]:
    """Of our rows that both have, and of all together."""
    before = _rows(old)
    pairs = [(name, *before[name], *found) for name, found in _rows(new).items() if name in before]
    if not pairs:
        return []
    tail = (1 - CONFIDENCE) / 2 / ((len(pairs) + 1) * len(CLOCKS))
    found = [RowChange(name, {}) for name, *_ in pairs]
    together = RowChange(TOGETHER, {})
    for clock, loops in CLOCKS.items():
        ratios, machines, drawn = [], [], []
        for change, (_, old_table, old_row, new_table, new_row) in zip(found, pairs, strict=True):
            if not (getattr(old_row, clock) and getattr(new_row, clock)):
                continue
            now = _medians(new_table, new_row, clock, loops) / _medians(old_table, old_row, clock, loops)
            calibrated = now[0] / now[1:].amax(0)
            ratios.append(float(now[0, 0]))
            machines.append(float(now[1:, 0].max()))
            drawn.append(calibrated.log())
            change.clocks[clock] = Change(ratios[-1], machines[-1], *_interval(calibrated[1:], tail))
        if drawn:
            mean = torch.stack(drawn).mean(0).exp()
            middle = [statistics.geometric_mean(values) for values in (ratios, machines)]
            together.clocks[clock] = Change(middle[0], middle[1], *_interval(mean[1:], tail))
    return [*found, together]


def _rows(results: Results) -> dict[str, tuple[Table, Row]]:
    return {
        f"{table.name}: {row.name}": (table, row)
        for table in results.tables
        for row in table.rows
        if row.ours and row.milliseconds and table.calibration
    }


def _medians(table: Table, row: Row, clock: str, loops: tuple[str, ...]) -> Tensor:
    """Of the row and of the loops, ``[1 + loops, 1 + RESAMPLES]``; the first is that of the samples themselves.

    Rows of a table share its rounds, and so the rounds drawn: what disturbed one disturbed all.
    """
    own = torch.tensor(getattr(row, clock), dtype=torch.float64)
    beside = [torch.tensor([table.calibration[r][loop] for r in row.rounds], dtype=torch.float64) for loop in loops]
    samples = torch.stack([own, *beside])
    count = samples.shape[1]
    drawn = torch.randint(count, (RESAMPLES, count), generator=torch.Generator().manual_seed(0))
    chosen = torch.cat([torch.arange(count)[None], drawn])
    return samples[:, chosen].quantile(0.5, dim=2)


def _interval(drawn: Tensor, tail: float) -> tuple[float, float]:
    return float(drawn.quantile(tail)), float(drawn.quantile(1 - tail))


def text(found: list[RowChange]) -> str:
    rows = []
    for change in found:
        cells = [change.name]
        for clock in CLOCKS:
            by = change.clocks.get(clock)
            cells += [f"{by.ratio:.3f}", f"{by.machine:.3f}", f"{by.low:.3f} - {by.high:.3f}"] if by else [""] * 3
        rows.append([*cells, change.word])
    header = ("row", "clock", "machine", "interval", "processor", "machine", "interval", "")
    lines = [
        f"Ratios new / old of medians; intervals of ratio / machine, {100 * CONFIDENCE:g} % for all together; slower "
        f"beyond {MARGIN}",
        "",
        markdown(header, rows),
    ]
    slower = [change.name for change in found if change.slower]
    machine = found[-1].clocks["milliseconds"].machine
    lines += ["", f"The machine took {machine:.2f} times as long for the calibration."]
    if not 1 / BUSY < machine < BUSY:
        lines.append("It was too busy in one of the two for a small loss to be seen: run both again, with --threads 1.")
    if slower:
        lines.append(f"SLOWER beyond noise: {'; '.join(slower)}")
    else:
        lines.append(f"None of {len(found) - 1} rows got slower beyond noise, nor all together.")
    return "\n".join(lines)
