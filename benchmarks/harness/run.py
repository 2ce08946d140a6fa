"""One run of the harness: what all its tables share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..data.workloads import Problem
from .device import Device
from .limits import Calibration, Limits
from .results import Table
from .row import Clock, Entry
from .timing import time_rows


@dataclass
class Run:
    device: Device
    threads: int
    rounds: int
    seconds: float  # that a library may take in the rounds of one table
    limits: Limits
    calibration: Calibration
    say: Callable[[str], None]
    dry: bool = False  # every path, on problems so small that the figures say nothing

    def problem(self, made: Problem) -> Problem:
        """As this run solves it: on its device, and cut down in a dry run."""
        return (made.cut() if self.dry else made).to(self.device.name)

    def time(self, table: Table, entries: list[Entry], rounds: int | None = None, clock: Clock | None = None) -> None:
        """Into the table's rows, which are those of the entries."""
        table.rows = [row for row, _ in entries]
        table.calibration = time_rows(
            entries, self.device, rounds or self.rounds, self.seconds, self.calibration, clock or self.device.until_done
        )
