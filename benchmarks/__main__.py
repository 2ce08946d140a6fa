"""Speed beside other libraries and beside the machine's limits.

A run writes results.json (every sample), results.md and plots. ``--compare`` tells whether a build got slower.
"""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

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
from .tables.goals import GOALS
from .tables.growth import growth
from .tables.memory import memory


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.compare:
        return _compare(parser, *options.compare)
    if options.threads < 1 or options.rounds < 1:
        parser.error("--threads and --rounds: expected at least 1")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU; python -m benchmarks.cuda --dry goes through that code without")

    pin_threads(options.threads)
    where = machine(options.threads)
    terminal, device = Terminal(), Device(options.device)
    run = Run(
        device,
        options.threads,
        options.rounds,
        options.seconds,
        limits.measure(device),
        limits.Calibration(device),
        terminal.say,
    )
    command = shlex.join(["python", "-m", "benchmarks", *arguments])
    results = Results(command, where, dataclasses.asdict(run.limits))
    steps = _steps(options, run)
    with terminal.steps(len(steps)):
        for name, step in steps.items():
            terminal.begin(name)
            table = step()
            results.tables.append(table)
            terminal.table(table)
            if options.out:  # after each table: an interrupted run keeps what it has
                _write(results, options.out)
            terminal.end()
    terminal.verdicts(results.tables)
    if options.out:
        terminal.say(f"written: {options.out / 'results.md'}, results.json, plots")
    # Our own failure is a failure of the run; a peer's is a line in the table, and so is a target that was missed.
    return int(any(row.problem for table in results.tables for row in table.rows if row.ours))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--suite", choices=SUITES, default="quick", help="quick: minutes; full: an hour or more")
    parser.add_argument("--workload", choices=WORKLOADS, action="append", help="these workloads alone, not a suite")
    parser.add_argument("--alone", action="store_true", help="our own rows alone: enough for --compare")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="for everybody (default: 2)")
    parser.add_argument("--rounds", type=int, default=15, help="times that each row runs (default: 15)")
    parser.add_argument(
        "--seconds", type=float, default=3.0, help="a slower library runs less often in a table (default: 3)"
    )
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
    for name, goal in GOALS.items():
        steps[name] = partial(goal, run)
    if options.alone:
        return steps
    steps["accuracy"] = partial(accuracy, run)
    if not run.device.on_gpu:
        steps["memory"] = partial(memory, run)
    steps.update({f"growth {index}": step for index, step in enumerate(growth(options.suite, run), 1)})
    return steps


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
    sys.exit(main())
