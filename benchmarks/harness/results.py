"""What a run leaves behind: tables of rows with every sample, and what was to be reached."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .row import Row


@dataclass
class Verdict:
    """One thing that was to be reached. ``met`` is None where it could not be measured."""

    target: str
    measured: str
    met: bool | None

    @property
    def word(self) -> str:
        return {True: "met", False: "MISSED", None: "not measured"}[self.met]


@dataclass
class Table:
    name: str
    description: str
    rows: list[Row] = field(default_factory=list)
    verdicts: list[Verdict] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)  # eps, tolerance, iterations, floor, ...
    notes: list[str] = field(default_factory=list)
    calibration: list[dict[str, float]] = field(default_factory=list)  # milliseconds, in each round


@dataclass
class Results:
    command: str
    machine: dict[str, Any]
    limits: dict[str, float]
    tables: list[Table] = field(default_factory=list)

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @staticmethod
    def load(path: Path) -> Results:
        content = json.loads(path.read_text())
        for table in content["tables"]:
            table["rows"] = [Row(**row) for row in table["rows"]]
            table["verdicts"] = [Verdict(**verdict) for verdict in table["verdicts"]]
        content["tables"] = [Table(**table) for table in content["tables"]]
        return Results(**content)
