"""Calls on a machine whose cores are taken.

``python -m benchmarks.studies.busy_cores --rounds 21`` solves one problem and batches, in one thread and in more, first
on the machine as it is and then beside processes that burn every core of it. A row is in units of one thread under the
same conditions, the median of rounds that take all settings in turns. torch's own ``logsumexp`` of 100 arrays as large
as the costs stands beside them: a region of threads each, as the solver would have them.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

import sfr_ext

Call = Callable[[], object]


def calls() -> dict[str, Call]:
    """What is timed, by name."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator)

    one, batch, small = random(128, 128), random(32, 49, 49), random(2, 30, 30)
    return {
        "one problem, 128 x 128": lambda: sfr_ext.solve(one),
        "32 problems, 49 x 49": lambda: sfr_ext.solve(batch),
        "2 problems, 30 x 30": lambda: sfr_ext.solve(small),
        '2 problems, 30 x 30, solver="exact"': lambda: sfr_ext.solve(small, solver="exact"),
        "logsumexp of 128 x 128, 100 times": lambda: [one.logsumexp(1) for _ in range(100)],
    }


@contextmanager
def taken_cores() -> Iterator[None]:
    """Beside one process for each core, that does nothing but compute."""
    burn = [sys.executable, "-c", "while True: pass"]
    burning = [subprocess.Popen(burn) for _ in range(os.cpu_count() or 1)]
    try:
        yield
    finally:
        for process in burning:
            process.kill()
            process.wait()


def milliseconds(call: Call, seconds: float = 0.02) -> float:
    """Of a call, of as many as fill ``seconds``."""
    begin, count = time.perf_counter(), 0
    while count == 0 or time.perf_counter() - begin < seconds:
        call()
        count += 1
    return 1e3 * (time.perf_counter() - begin) / count


def measure(threads: Sequence[int], rounds: int) -> dict[str, dict[int, list[float]]]:
    """Samples by call and number of threads."""
    timed = calls()
    samples: dict[str, dict[int, list[float]]] = {name: {n: [] for n in threads} for name in timed}
    for round_ in range(rounds + 1):
        for name, call in timed.items():
            for n in threads:
                torch.set_num_threads(n)
                taken = milliseconds(call)
                if round_ > 0:
                    samples[name][n].append(taken)
    return samples


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.studies.busy_cores", description=__doc__)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--threads", type=int, nargs="+", default=[2, 16], help="beside one")
    options = parser.parse_args(arguments)
    before, threads = torch.get_num_threads(), [1, *options.threads]
    try:
        quiet = measure(threads, options.rounds)
        with taken_cores():
            busy = measure(threads, options.rounds)
    finally:
        torch.set_num_threads(before)
    print("| call | cores | 1 thread, ms | " + " | ".join(f"{n} threads" for n in options.threads) + " |")
    print("|---|---|" + "---|" * len(threads))
    for name in quiet:
        for cores, samples in (("free", quiet[name]), ("taken", busy[name])):
            alone = statistics.median(samples[1])
            others = [f"{statistics.median(samples[n]) / alone:.2f}" for n in options.threads]
            print(f"| {name} | {cores} | {alone:.3g} | " + " | ".join(others) + " |")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
