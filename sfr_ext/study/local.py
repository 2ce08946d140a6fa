"""Runs as processes of this machine, each with its share of the threads."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path

from .plan import Run
from .work import to_json

LOG = "log.txt"  # in a run's folder: what it prints
TICK = 0.5  # seconds between two looks at the runs

Finished = tuple[Run, str | None]  # and why it failed


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_locally(runs: Sequence[Run], jobs: int, threads: int) -> Iterator[Finished | None]:
    """Execute the runs, ``jobs`` at a time; yield each as it ends, and None now and then while none does."""
    children = _Children(threads)
    pool = ThreadPoolExecutor(jobs)
    waiting: dict[Future[str | None], Run] = {pool.submit(children.execute, run): run for run in runs}
    try:
        while waiting:
            done, _ = wait(waiting, timeout=TICK, return_when=FIRST_COMPLETED)
            for future in done:
                yield waiting.pop(future), future.result()
            yield None
    finally:
        children.end()
        pool.shutdown(cancel_futures=True)


class _Children:
    """Processes that run, so that all can be ended."""

    def __init__(self, threads: int) -> None:
        # Threads that wait asleep: spinning ones hold the other runs up.
        own = {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive", "PYTHONUNBUFFERED": "1"}
        self.environment = {**os.environ, **own}
        self.lock = threading.Lock()
        self.running: set[subprocess.Popen[str]] = set()
        self.ended = False

    def execute(self, run: Run) -> str | None:
        """Wait for the run; return why it failed, or None."""
        log = run.config.out / LOG
        try:
            log.parent.mkdir(parents=True, exist_ok=True)
            with log.open("a") as said, self.lock:
                if self.ended:
                    return "not begun"
                process = subprocess.Popen(
                    [sys.executable, "-m", "sfr_ext.study.child"],
                    stdin=subprocess.PIPE,
                    stdout=said,
                    stderr=subprocess.STDOUT,
                    text=True,
                    env=self.environment,
                    start_new_session=True,  # an interrupt from the keyboard is the parent's to deal with
                )
                self.running.add(process)
        except OSError as error:
            return f"{error.filename or log} cannot be written: {error.strerror or error}"
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps(to_json(run.config)) + "\n")
            process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended already; its code says so
        code = process.wait()
        with self.lock:
            self.running.discard(process)
        return None if code == 0 else _why(code, log)

    def end(self) -> None:
        """End what still runs, and begin nothing more."""
        with self.lock:
            self.ended = True
            for process in self.running:
                process.kill()


def _why(code: int, log: Path) -> str:
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].removeprefix("sfr-ext: ") if lines else f"exit code {code}"
