"""The same calls by every instruction set that runs here: ``python -m benchmarks.studies.isa``.

One thread. Each instruction set has a process of its own, in which SFR_EXT_CPU_ISA names it, and the processes take
turns; the last one has two, for distances by differences and by products (SFR_EXT_CPU_DISTANCES). Figures are processor
time of the thread: the least of all runs, and its ratio to the narrowest vectors'.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from sfr_ext import build_info, cost_matrix, emd_l2, solve
from sfr_ext.ops import forced

from ..harness.report import markdown

Call = Callable[[], object]


def both(x: Tensor, y: Tensor) -> Call:
    """Forward and backward."""
    x, y = x.requires_grad_(), y.requires_grad_()
    return lambda: torch.autograd.grad(emd_l2(x, y), (x, y))


def costs(x: Tensor, y: Tensor) -> Call:
    return lambda: cost_matrix(x, y)


def solved(cost: Tensor, solver: str = "sinkhorn") -> Call:
    return lambda: solve(cost, solver=solver)


def iterations(cost: Tensor, count: int = 100) -> Call:
    """At an eps at which none of them fails, to a tolerance that none of them reaches."""

    def run() -> object:
        with forced(method="plain"):
            return solve(cost, eps=1.0, tol=0.0, max_iter=count)

    return run


def calls() -> dict[str, Call]:
    """What is timed, by name."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def distances(batch: int, patches: int, channels: int) -> Tensor:
        return torch.cdist(random(batch, patches, channels), random(batch, patches, channels))

    tokens, maps = (32, 49, 512), (32, 512, 7, 7)
    return {
        "costs, 32 x 49 x 49, C = 512, tokens": costs(random(*tokens), random(*tokens)),
        "costs, 32 x 49 x 49, C = 512, maps": costs(random(*maps), random(*maps)),
        "costs, 8 x 196 x 196, C = 64, maps": costs(random(8, 64, 14, 14), random(8, 64, 14, 14)),
        "forward + backward, 32 x 49 x 49, C = 512, tokens": both(random(*tokens), random(*tokens)),
        "forward + backward, 32 x 49 x 49, C = 512, maps": both(random(*maps), random(*maps)),
        "forward + backward, 128 x 49 x 49, C = 16, groups": both(random(64, 16, 7, 7), random(64, 2, 16, 7, 7)),
        "forward + backward, 32 x 196 x 196, C = 16, groups": both(random(16, 16, 14, 14), random(16, 2, 16, 14, 14)),
        "100 iterations, 64 x 49 x 49": iterations(distances(64, 49, 512)),
        "100 iterations, 8 x 196 x 196": iterations(distances(8, 196, 256)),
        "solve, 64 x 49 x 49": solved(distances(64, 49, 512)),
        "solve, 64 x 64 x 64": solved(distances(64, 64, 512)),
        "solve, 256 x 16 x 16": solved(distances(256, 16, 64)),
        "solve, 8 x 196 x 196": solved(distances(8, 196, 256)),
        "exact, 64 x 49 x 49": solved(distances(64, 49, 512), "exact"),
        "exact, 8 x 196 x 196": solved(distances(8, 196, 256), "exact"),
    }


def serve() -> None:
    """Times what the lines of standard input name."""
    torch.set_num_threads(1)
    timed = calls()
    for name in map(str.strip, sys.stdin):
        begin = time.thread_time_ns()
        timed[name]()
        print(time.thread_time_ns() - begin, flush=True)


def kinds() -> dict[str, dict[str, str]]:
    """What to set for each of the kernels: the instruction sets that were compiled in and that this processor has,
    narrowest vectors first, and both ways of the last."""

    def runs(isa: str) -> bool:
        command = [sys.executable, "-c", "import sfr_ext; sfr_ext.build_info()"]
        done = subprocess.run(command, env={**os.environ, "SFR_EXT_CPU_ISA": isa}, capture_output=True)
        return done.returncode == 0

    found = {isa: {"SFR_EXT_CPU_ISA": isa} for isa in build_info()["cpu_isas"] if runs(isa)}
    isa, best = found.popitem()
    ways = {f"{isa}, {way}": {**best, "SFR_EXT_CPU_DISTANCES": way} for way in ("differences", "products")}
    return {**found, **ways}


def measure(environments: Iterable[dict[str, str]], rounds: int) -> Iterator[tuple[str, list[float]]]:
    """Each call's least milliseconds, by environment."""
    command = [sys.executable, "-m", "benchmarks.studies.isa", "--serve"]

    def start(changes: dict[str, str]) -> subprocess.Popen[str]:
        environment = {**os.environ, **changes}
        return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(server: subprocess.Popen[str], name: str) -> float:
        assert server.stdin and server.stdout
        print(name, file=server.stdin, flush=True)
        return float(server.stdout.readline()) / 1e6

    servers = list(map(start, environments))
    try:
        for name in calls():
            samples = [[ask(server, name) for server in servers] for _ in range(rounds + 1)]
            yield name, [min(of_one) for of_one in zip(*samples[1:], strict=True)]
    finally:
        for server in servers:
            server.kill()
            server.wait()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.studies.isa", description=__doc__)
    parser.add_argument("--rounds", type=int, default=50, help="times that each call runs (default: 50)")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.serve:
        return serve()
    timed = kinds()
    rows = []
    for name, least in measure(timed.values(), options.rounds):
        rows.append([name, f"{least[0]:.3g}", *(f"{ms:.3g} ({ms / least[0]:.2f})" for ms in least[1:])])
        print(f"{name} done", file=sys.stderr, flush=True)
    print(markdown(["ms", *timed], rows))


if __name__ == "__main__":
    main()
