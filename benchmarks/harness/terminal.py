"""What is seen while the harness runs: rich where it is installed, plain lines where not."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from . import report
from .results import Table

RICH = importlib.util.find_spec("rich") is not None
if RICH:
    import rich.console
    import rich.markup
    import rich.progress
    import rich.table


class Terminal:
    def __init__(self) -> None:
        self._console: Any = rich.console.Console() if RICH else None
        if self._console and not self._console.is_terminal:
            self._console.width = 200  # a file has no edge
        self._progress: Any = None
        self._task: Any = None

    @contextmanager
    def steps(self, count: int) -> Iterator[None]:
        """A bar of so many steps, where this is a terminal."""
        if self._console is None or not self._console.is_terminal:
            yield
            return
        columns = rich.progress.BarColumn(), rich.progress.MofNCompleteColumn(), rich.progress.TimeElapsedColumn()
        text = rich.progress.TextColumn("{task.description}")
        with rich.progress.Progress(*columns, text, console=self._console) as self._progress:
            self._task = self._progress.add_task("", total=count)
            yield
        self._progress = None

    def begin(self, name: str) -> None:
        if self._progress:
            self._progress.update(self._task, description=name)
        else:
            self.say(f"{name} ...")

    def end(self) -> None:
        if self._progress:
            self._progress.advance(self._task)

    def say(self, text: str) -> None:
        if self._console is None:
            print(text, flush=True)
        else:
            self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def table(self, one: Table) -> None:
        if one.rows:
            self._grid(f"{one.name}: {one.description}", report.HEADER, [report.cells(row) for row in one.rows])
        for verdict in one.verdicts:
            self.say(f"{one.name}: target {verdict.target}; measured {verdict.measured}: {verdict.word}")

    def verdicts(self, tables: list[Table]) -> None:
        rows = report.verdict_rows(tables)
        if rows:
            self._grid("What was to be reached", ("table", "target", "measured", ""), rows)

    def _grid(self, title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        if self._console is None:
            self.say("\n".join([title, *(" | ".join(row) for row in (header, *rows))]))
            return
        grid = rich.table.Table(*header, title=title, title_justify="left", header_style="bold")
        for row in rows:
            grid.add_row(*(rich.markup.escape(cell) for cell in row))
        self._console.print(grid)
