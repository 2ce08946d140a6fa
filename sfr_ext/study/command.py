"""``sfr-ext study``: all runs of a study that have not been finished."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..train.config import counted, near_misses
from ..train.errors import TrainError, UsageError
from ..train.files import atomic_write
from .cluster import run_on_ray
from .local import Finished, cores, run_locally
from .names import OUTLINE
from .plan import Run, Study, read_study
from .progress import StudyProgress
from .work import is_finished, may_go_on

EXECUTORS = ("local", "ray")


def study(
    path: Path,
    out: Path,
    executor: str,
    jobs: int | None,
    threads: int | None,
    gpus: float,
    settings: Sequence[str] | None,
    seeds: int | None,
    given: dict[str, Any],
) -> int:
    """Execute the study; return the command's exit code: 1 if a run has failed.

    Args:
        path: the study's file.
        out: its folder.
        executor: "local" | "ray".
        jobs: runs at a time; None: one a core.
        threads: of each run; None: those of OMP_NUM_THREADS, else its share of the cores.
        gpus: of each run, for Ray.
        settings: to execute now; None: all.
        seeds: of each setting, so many of the first; None: all.
        given: options of ``sfr-ext train`` that win over the file's.

    Raises:
        TrainError: mistakes in the file, a folder that holds something else.
    """
    plan = read_study(path, out, given)
    runs = _chosen(plan, settings, seeds)
    waiting = _unfinished(runs)
    with atomic_write(out / OUTLINE) as temporary:
        temporary.write_text(json.dumps(plan.outline(), indent=2) + "\n")
    jobs = max(1, min(jobs or cores(), len(waiting)))
    threads = threads or _threads_asked_for() or max(1, cores() // jobs)
    found = len(runs) - len(waiting)
    of_each = f"{counted(threads, 'thread')} each"
    how = f"; {jobs} at a time, {of_each}" if waiting else ""
    print(f"{plan.name}: {counted(len(runs), 'run')}, of which {found} are finished{how}", flush=True)
    failures = _execute(runs, waiting, executor, jobs, threads, gpus)
    if failures:
        print(f"sfr-ext: {len(failures)} of {counted(len(runs), 'run')} failed:", file=sys.stderr)
        for run, failure in failures:
            print(f"  {run.name}: {failure}", file=sys.stderr)
        return 1
    print(f"all {len(runs)} runs are finished; `sfr-ext report {out}` reports on them")
    return 0


def _threads_asked_for() -> int | None:
    """By the variable of OpenMP, which may have a list by levels."""
    first = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    return int(first) if first.isdecimal() and int(first) > 0 else None


def _chosen(plan: Study, settings: Sequence[str] | None, seeds: int | None) -> list[Run]:
    for name in settings or ():
        if name not in plan.settings:
            known = list(plan.settings)
            raise UsageError(f"--settings: there is no setting {name!r}{near_misses(name, known) or f' among {known}'}")
    chosen = [run for run in plan.runs if settings is None or run.setting in settings]
    first = {name: sorted({run.seed for run in chosen if run.setting == name})[:seeds] for name in plan.settings}
    return [run for run in chosen if run.seed in first[run.setting]]


def _unfinished(runs: Sequence[Run]) -> list[Run]:
    waiting, mistakes = [], []
    for run in runs:
        try:
            if not is_finished(run.config):
                may_go_on(run.config)
                waiting.append(run)
        except TrainError as error:
            mistakes.append(str(error))
    if mistakes:
        more = f" ({len(mistakes) - 1} more runs likewise)" if len(mistakes) > 1 else ""
        raise TrainError(mistakes[0] + more)
    return waiting


def _execute(
    runs: Sequence[Run], waiting: Sequence[Run], executor: str, jobs: int, threads: int, gpus: float
) -> list[tuple[Run, str]]:
    if not waiting:
        return []
    ending: Iterator[Finished | None] = (
        run_locally(waiting, jobs, threads) if executor == "local" else run_on_ray(waiting, jobs, threads, gpus)
    )
    failures = []
    with StudyProgress(runs, waiting) as progress:
        try:
            for ended in ending:
                if ended is None:
                    progress.look()
                    continue
                run, failure = ended
                progress.end(run, failure)
                if failure is not None:
                    failures.append((run, failure))
        except KeyboardInterrupt as error:
            raise KeyboardInterrupt("the same command goes on where the study was") from error
        finally:
            ending.close()  # type: ignore[attr-defined]
    return failures
