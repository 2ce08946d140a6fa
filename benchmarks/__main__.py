"""Speed against other libraries: ``python -m benchmarks --help``."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path

import torch

from . import report
from .measure import Reference, check, time_all
from .peers import PEERS
from .workloads import SUITES, WORKLOADS


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--suite", choices=SUITES, default="quick", help="which workloads (default: quick)")
    parser.add_argument("--workload", choices=WORKLOADS, action="append", help="these workloads instead of a suite")
    parser.add_argument("--threads", type=int, default=2, help="threads for everybody (default: 2)")
    parser.add_argument("--rounds", type=int, default=15, help="times that each library runs (default: 15)")
    parser.add_argument("--out", type=Path, help="folder for results.json and results.md")
    options = parser.parse_args(arguments)
    if options.threads < 1 or options.rounds < 1:
        parser.error("--threads and --rounds: expected at least 1")

    torch.set_num_threads(options.threads)
    where = report.machine(options.threads)
    results, tables = [], []
    for name in options.workload or SUITES[options.suite]:
        description, make = WORKLOADS[name]
        problem = make()
        print(f"{name}: {description}, eps {problem.eps:.3g}", flush=True)
        truth = Reference(problem)
        rows = []
        for peer in PEERS:
            row = check(peer, problem, truth)
            print(f"  {peer.name}: {row.problem or f'marginal error {row.marginal_error:.1e}'}", flush=True)
            rows.append(row)
        time_all(PEERS, rows, problem, options.rounds)
        tables.append(report.table(rows))
        print(f"\n{tables[-1]}\n", flush=True)
        results.append(
            {
                "workload": name,
                "description": description,
                "eps": problem.eps,
                "tol": problem.tol,
                "rounds": options.rounds,
                "rows": [row.as_dict() for row in rows],
            }
        )
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        command = shlex.join(["python", "-m", "benchmarks", *(arguments if arguments is not None else sys.argv[1:])])
        content = {"command": command, "machine": where, "results": results}
        (options.out / "results.json").write_text(json.dumps(content, indent=1) + "\n")
        (options.out / "results.md").write_text(report.page(results, tables, where, command))
        print(f"written: {options.out / 'results.md'}, {options.out / 'results.json'}")
    # Our own failure is a failure of the run; a peer's is a line in the table.
    return int(any(row["problem"] for result in results for row in result["rows"] if row["name"].startswith("sfr_ext")))


if __name__ == "__main__":
    sys.exit(main())
