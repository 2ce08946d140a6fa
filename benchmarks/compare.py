"""Two results, row by row: is the new build slower, or only the machine?

Both files hold every sample, and of every round what a fixed product of matrices and a fixed copy took. A row's ratio
is that of the medians, new over old. It is divided by the same ratio of the calibration: of the product and of the
copy, whichever leaves the row faster, since a row is bound by either. The interval is a percentile bootstrap over
rounds; the confidence is 99 % for all rows together. A row is slower where the whole interval lies beyond the margin
that separate runs of one build differ by (code and memory lie elsewhere each time).
"""

from __future__ import annotations

import math
import random
import statistics
from dataclasses import dataclass

from .measure import Row
from .results import Results, Table

CONFIDENCE = 0.99
RESAMPLES = 2000
MARGIN = 1.04
LOOPS = ("matmul", "copy")


@dataclass(frozen=True)
class Change:
    name: str
    ratio: float  # of medians, new / old
    machine: float  # the same of the calibration
    low: float  # of ratio / machine
    high: float

    @property
    def slower(self) -> bool:
        return self.low > MARGIN

    @property
    def faster(self) -> bool:
        return self.high < 1 / MARGIN

    @property
    def word(self) -> str:
        return "SLOWER" if self.slower else "faster" if self.faster else "no change beyond noise"


@dataclass(frozen=True)
class Samples:
    own: list[float]
    loops: dict[str, list[float]]  # of the same rounds

    def drawn(self, random_: random.Random) -> Samples:
        rounds = random_.choices(range(len(self.own)), k=len(self.own))
        return Samples(
            [self.own[i] for i in rounds], {name: [loop[i] for i in rounds] for name, loop in self.loops.items()}
        )


def changes(old: Results, new: Results) -> list[Change]:
    """Of our rows that both have."""
    before = _rows(old)
    shared = {name: (before[name], samples) for name, samples in _rows(new).items() if name in before}
    tail = (1 - CONFIDENCE) / max(1, len(shared)) / 2
    return [_change(name, *pair, tail) for name, pair in shared.items()]


def _rows(results: Results) -> dict[str, Samples]:
    return {
        f"{table.name}: {row.name}": _samples(table, row)
        for table in results.tables
        for row in table.rows
        if row.ours and row.milliseconds and table.calibration
    }


def _samples(table: Table, row: Row) -> Samples:
    return Samples(row.milliseconds, {name: [table.calibration[r][name] for r in row.rounds] for name in LOOPS})


def _ratios(old: Samples, new: Samples) -> tuple[float, float]:
    """Of the row, and of the calibration."""
    machine = [statistics.median(new.loops[name]) / statistics.median(old.loops[name]) for name in LOOPS]
    return statistics.median(new.own) / statistics.median(old.own), max(machine)


def _change(name: str, old: Samples, new: Samples, tail: float) -> Change:
    ratio, machine = _ratios(old, new)
    random_ = random.Random(0)
    found = []
    for _ in range(RESAMPLES):
        own, loops = _ratios(old.drawn(random_), new.drawn(random_))
        found.append(own / loops)
    found.sort()
    cut = math.floor(tail * RESAMPLES)
    return Change(name, ratio, machine, found[cut], found[-1 - cut])


def text(found: list[Change]) -> str:
    lines = [
        f"Ratios new / old of medians; interval of ratio / machine, {100 * CONFIDENCE:g} % for all rows together; "
        f"slower beyond {MARGIN}",
        "",
        "| row | ratio | machine | interval | |",
        "|---|---|---|---|---|",
    ]
    for change in found:
        interval = f"{change.low:.3f} - {change.high:.3f}"
        lines.append(f"| {change.name} | {change.ratio:.3f} | {change.machine:.3f} | {interval} | {change.word} |")
    slower = [change.name for change in found if change.slower]
    machine = statistics.median(change.machine for change in found)
    lines += ["", f"The machine took {machine:.2f} times as long for the calibration."]
    if slower:
        lines.append(f"SLOWER: {len(slower)} of {len(found)} rows got slower beyond noise: {'; '.join(slower)}")
    else:
        lines.append(f"None of {len(found)} rows got slower beyond noise.")
    return "\n".join(lines)
