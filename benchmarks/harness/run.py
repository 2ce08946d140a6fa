"""One run of the harness: what all its tables share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .device import Device
from .limits import Calibration, Limits
from .measure import Row, time_rows
from .results import Table


@dataclass
class Run:
    device: Device
    threads: int
    rounds: int
    seconds: float  # that a library may take in the rounds of one table
    limits: Limits
    calibration: Calibration
    say: Callable[[str], None]

    def time(self, table: Table, entries: list[tuple[Row, Callable[[], Any]]], rounds: int | None = None) -> None:
        """Into the table's rows, which are those of the entries."""
        table.rows = [row for row, _ in entries]
        table.calibration = time_rows(entries, self.device, rounds or self.rounds, self.seconds, self.calibration)
