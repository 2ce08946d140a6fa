"""Speed beside other libraries and beside the machine's limits.

A run writes results.json (every sample), results.md and plots. ``--compare`` tells whether a build got slower.
``--dry-run`` goes through all of it on problems so small that the figures say nothing, and writes nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from sfr_ext.pipes import quietly

from .data.workloads import SUITES, WORKLOADS
from .harness import compare, limits, plots, report
from .harness.device import Device
from .harness.machine import machine, pin_threads
from .harness.results import Results, Table
from .harness.run import Run
from .harness.terminal import Terminal
from .peers import OURS
from .tables.accuracy import accuracy
from .tables.comparison import compare_peers
from .tables.distances import distances
from .tables.growth import growth
from .tables.iteration import iteration
from .tables.kernels import calls, kernels
from .tables.memory import memory
from .tables.single import single
from .tables.training import training


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.compare:
        return _compare(parser, *options.compare)
    if options.threads < 1 or options.rounds < 1:
        parser.error("--threads and --rounds: expected at least 1")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU; --dry-run goes through the code without one")

    begun = time.monotonic()
    pin_threads(options.threads)
    where = machine(options.threads, options.source)
    terminal, device = Terminal(), Device(options.device)
    run = Run(
        device,
        options.threads,
        2 if options.dry_run else options.rounds,
        options.seconds,
        limits.measure(device),
        limits.Calibration(device),
        terminal.say,
        options.dry_run,
    )
    command = shlex.join(["python", "-m", "benchmarks", *arguments])
    results = Results(command, where, dataclasses.asdict(run.limits))
    steps, out = _steps(options, run), None if options.dry_run else options.out
    with terminal.steps(len(steps)):
        for name, step in steps.items():
            if options.limit and time.monotonic() - begun > options.limit:
                terminal.say(f"{name}: not begun, {options.limit:.0f} s are over")
                continue
            terminal.begin(name)
            table = step()
            results.tables.append(table)
            terminal.table(table)
            if out:  # after each table: an interrupted run keeps what it has
                _write(results, out)
            terminal.end()
    terminal.verdicts(results.tables)
    if out:
        terminal.say(f"written: {out / 'results.md'}, results.json, plots")
    # Our own failure is a failure of the run; a peer's is a line in the table, and so is a target that was missed.
    return int(any(row.problem for table in results.tables for row in table.rows if row.ours))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--suite", choices=SUITES, default="quick", help="quick: minutes; full: an hour or more; kernels: a GPU"
    )
    parser.add_argument("--workload", choices=WORKLOADS, action="append", help="these workloads alone, not a suite")
    parser.add_argument("--alone", action="store_true", help="our own rows alone: enough for --compare")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="for everybody (default: 2)")
    parser.add_argument("--rounds", type=int, default=15, help="times that each row runs (default: 15)")
    parser.add_argument(
        "--seconds", type=float, default=3.0, help="a slower library runs less often in a table (default: 3)"
    )
    parser.add_argument("--limit", type=float, help="seconds after which no further table is begun")
    parser.add_argument("--dry-run", action="store_true", help="every path of it, on tiny problems; writes nothing")
    parser.add_argument("--source", help="what the tree is called in the results (default: git's commit)")
    parser.add_argument("--out", type=Path, help="folder for results.json, results.md and plots")
    parser.add_argument(
        "--compare", nargs=2, type=Path, metavar=("OLD", "NEW"), help="two results.json; 1 where a row got slower"
    )
    return parser


def _steps(options: argparse.Namespace, run: Run) -> dict[str, Callable[[], Table]]:
    peers = OURS if options.alone else None
    steps: dict[str, Callable[[], Table]] = {
        name: partial(compare_peers, name, WORKLOADS[name], run, peers)
        for name in options.workload or SUITES[options.suite]
    }
    if options.workload:
        return steps
    if options.suite == "kernels":  # ours first: a limit may leave out the others
        return {**_kernel_steps(run), **steps}
    for goal in (distances, iteration, single, training):
        steps[goal.__name__] = partial(goal, run)
    if options.alone:
        return steps
    steps["accuracy"] = partial(accuracy, run)
    if not run.device.on_gpu:
        steps["memory"] = partial(memory, run)
    steps.update({f"growth {index}": step for index, step in enumerate(growth(options.suite, run), 1)})
    return steps


def _kernel_steps(run: Run) -> dict[str, Callable[[], Table]]:
    return {
        f"{table.__name__}, {name}": partial(table, name, WORKLOADS[name], run)
        for name in ("w1", "small", "large", "huge")
        for table in (kernels, calls)
    }


def _write(results: Results, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    results.save(out / "results.json")
    (out / "results.md").write_text(report.page(results, plots.draw(results, out)))


def _compare(parser: argparse.ArgumentParser, old: Path, new: Path) -> int:
    for path in (old, new):
        if not path.is_file():
            parser.error(f"--compare: {path} does not exist")
    found = compare.changes(Results.load(old), Results.load(new))
    if not found:
        parser.error("--compare: the two files share no row of ours")
    print(compare.text(found))
    return int(any(change.slower for change in found))


if __name__ == "__main__":
    sys.exit(quietly(main))
