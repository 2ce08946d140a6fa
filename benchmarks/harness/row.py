"""One way to do the work of a table: what it is, its samples, and their ratios to another row's."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import sfr_ext

# Milliseconds of a call.
Clock = Callable[[Callable[[], Any]], float]


@dataclass
class Row:
    """One way to do the work of a table."""

    name: str
    version: str | None = None
    objective: str = ""
    ours: bool = False
    base: str = ""  # the row that ratios are to
    setting: Any = None
    reached: bool = True  # the tolerance
    marginal_error: float | None = None  # largest of the batch
    value_error: float | None = None  # relative, largest of the checked problems
    gradient_error: float | None = None  # relative in norm, of the gradient of the features
    problem: str | None = None  # why there are no times
    floor: float | None = None  # milliseconds
    warm: float = 0.0  # milliseconds of a run before the timing
    milliseconds: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)  # milliseconds of all threads, for the same samples
    rounds: list[int] = field(default_factory=list)  # in which the samples were taken
    ratios: list[float] = field(default_factory=list)  # to the base's samples of the same rounds

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def take(self, round_: int, clock: Clock, run: Callable[[], Any]) -> None:
        """One sample."""
        begin = time.process_time()
        self.milliseconds.append(clock(run))
        self.processor.append(1e3 * (time.process_time() - begin))
        self.rounds.append(round_)

    @property
    def of_floor(self) -> float | None:
        """The median as a multiple of the floor."""
        return quartiles(self.milliseconds)[1] / self.floor if self.floor and self.milliseconds else None


def own_row(name: str, **more: Any) -> Row:
    """One of ours."""
    return Row(name, sfr_ext.__version__, ours=True, **more)


# A row and what is timed for it.
Entry = tuple[Row, Callable[[], Any]]


def set_bases(rows: list[Row]) -> None:
    """Ratios are to our first row of the same value, else to the first row."""
    for row in rows:
        own = [other.name for other in rows if other.ours and other.objective == row.objective]
        row.base = own[0] if own else rows[0].name


def set_ratios(rows: list[Row]) -> None:
    by_name = {row.name: row for row in rows}
    for row in rows:
        row.ratios = ratios(row, by_name.get(row.base, rows[0]))


def ratios(row: Row, base: Row) -> list[float]:
    """Pair by pair, of the rounds in which both ran."""
    found = dict(zip(base.rounds, base.milliseconds, strict=True))
    samples = zip(row.rounds, row.milliseconds, strict=True)
    return [own / found[round_] for round_, own in samples if round_ in found]


def quartiles(samples: list[float]) -> tuple[float, float, float]:
    if len(samples) == 1:
        return samples[0], samples[0], samples[0]
    low, middle, high = statistics.quantiles(samples, n=4, method="inclusive")
    return low, middle, high
