"""How far a study is: epochs of all runs, with the time that is left."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from .plan import Run

_LOOK_EVERY = 2.0  # seconds


class StudyProgress:
    """A bar on a terminal, else a line for each finished run. Epochs are counted in the runs' ``metrics.csv``."""

    def __init__(self, runs: Sequence[Run], waiting: Sequence[Run]) -> None:
        self.total = len(runs)
        self.open = list(waiting)
        self.ended = self.total - len(self.open)
        self.failed = 0
        self.epochs = sum(run.config.epochs for run in runs)
        self.behind = sum(run.config.epochs for run in runs) - sum(run.config.epochs for run in waiting)
        self.console = Console(file=sys.stderr)
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("epochs"),
            TimeElapsedColumn(),
            TextColumn("left:"),
            TimeRemainingColumn(),
            console=self.console,
            speed_estimate_period=3600,  # runs differ in speed: a mean over many
            disable=not self.console.is_terminal,
        )
        self.begin = time.monotonic()
        self.at_start = self._epochs_done()
        self.looked = 0.0

    def __enter__(self) -> StudyProgress:
        self.bar.start()
        self.task = self.bar.add_task(self._words(), total=self.epochs, completed=self.at_start)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.look(now=True)
        self.bar.stop()

    def look(self, now: bool = False) -> None:
        """Bring the bar up to date, not too often."""
        if now or time.monotonic() - self.looked > _LOOK_EVERY:
            self.looked = time.monotonic()
            self.bar.update(self.task, completed=self._epochs_done(), description=self._words())

    def end(self, run: Run, failure: str | None) -> None:
        """A run has ended."""
        self.open.remove(run)
        self.behind += run.config.epochs
        self.ended += 1
        self.failed += failure is not None
        if failure is not None:
            self.console.print(f"{run.name} failed: {failure}", markup=False, highlight=False, soft_wrap=True)
        if not self.console.is_terminal:
            self.console.print(
                f"{self.ended}/{self.total} runs: {run.name}, {self._left()} left",
                markup=False,
                highlight=False,
                soft_wrap=True,
            )
        self.look(now=True)

    def _words(self) -> str:
        return f"{self.ended}/{self.total} runs" + (f", {self.failed} failed" if self.failed else "")

    def _epochs_done(self) -> int:
        return self.behind + sum(min(_rows(run), run.config.epochs) for run in self.open)

    def _left(self) -> str:
        done = self._epochs_done()
        if done <= self.at_start:
            return "unknown time"
        seconds = (time.monotonic() - self.begin) / (done - self.at_start) * (self.epochs - done)
        minutes, seconds = divmod(round(seconds), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02}:{seconds:02}"


def _rows(run: Run) -> int:
    try:
        with (run.config.out / "metrics.csv").open("rb") as file:
            return max(0, sum(1 for _ in file) - 1)
    except OSError:
        return 0
