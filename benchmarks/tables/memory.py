"""Peak memory of forward and backward beyond their inputs and outputs.

Each figure is a process of its own: how far the largest resident size (VmHWM, set back before) of one step lies above
the resident size before it, after a step on a batch of one has loaded everything; less the two gradients, which are
outputs. Linux alone says this.
"""

from __future__ import annotations

import ctypes
import json
import re
import subprocess
import sys
from pathlib import Path

import torch

from ..data.workloads import Problem, random_maps
from ..harness.check import step
from ..harness.results import Table, Verdict
from ..harness.row import Row
from ..harness.run import Run
from ..peers import PEERS

BATCH, CHANNELS = 512, 16
LIBRARIES = ("sfr_ext, transport", "plain torch, log domain, eager")
MEBI = float(1 << 20)


def extra_bytes(name: str, side: int, threads: int) -> int:
    """In this process, which must be a fresh one."""
    torch.set_num_threads(threads)
    peer = next(peer for peer in PEERS if peer.name == name)
    # A tolerance that the first look at the error satisfies: iterations do not add memory.
    problem = random_maps(BATCH, side, CHANNELS, eps=0.3)
    problem = Problem(problem.x, problem.y, problem.eps, 1.0)
    x, y = (problem.x, problem.y) if peer.takes_maps else problem.tokens()
    small = Problem(problem.x[:1], problem.y[:1], problem.eps, problem.tol)
    step(peer, x[:1].clone().requires_grad_(), y[:1].clone().requires_grad_(), small, peer.settings[0])
    x, y = x.clone().requires_grad_(), y.clone().requires_grad_()
    ctypes.CDLL(None).malloc_trim(0)  # or it would use again, unseen, what was freed above
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    step(peer, x, y, problem, peer.settings[0])
    return _resident("VmHWM") - before - sum(t.numel() * t.element_size() for t in (x, y))


def _resident(which: str) -> int:
    found = re.search(rf"{which}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return 1024 * int(found[1])


def memory(run: Run) -> Table:
    """Ours against the batch's cost matrices, which others keep at least one of."""
    table = Table("memory", f"peak extra memory of forward and backward, B={BATCH}, C={CHANNELS}, MiB")
    extra: dict[str, dict[str, float]] = {name: {} for name in ("B (N + M)", "one B N M", *LIBRARIES)}
    for side in (4,) if run.dry else (4, 7, 14):
        n = side * side
        extra["B (N + M)"][str(n)] = 4 * BATCH * 2 * n / MEBI
        extra["one B N M"][str(n)] = 4 * BATCH * n * n / MEBI
        for name in LIBRARIES:
            arguments = [sys.executable, "-m", "benchmarks.tables.memory", name, str(side), str(run.threads)]
            done = subprocess.run(arguments, capture_output=True, text=True, timeout=300, cwd=Path(__file__).parents[2])
            if done.returncode != 0:
                table.rows.append(Row(f"{name}, N={n}", problem=f"failed: {done.stderr.strip().splitlines()[-1]}"))
                continue
            extra[name][str(n)] = json.loads(done.stdout) / MEBI
    table.facts = {"MiB by N": extra}
    ours, matrix, least = (extra[name].get("196") for name in (LIBRARIES[0], "one B N M", "B (N + M)"))
    text = "extra memory is O(B (N + M)) and a workspace for each thread"
    if ours is None or matrix is None or least is None:
        table.verdicts = [Verdict(text, "no figure", None)]
        return table
    # A workspace: the plan, what is derived from it and both sides' panels, some matrices of N x M each.
    allowed = 4 * least + run.threads * 16 * 4 * 196 * 196 / MEBI + 1
    measured = f"{ours:.1f} MiB at N = M = 196; B (N + M) is {least:.1f}, one B N M {matrix:.0f}, allowed {allowed:.1f}"
    table.verdicts = [Verdict(text, measured, ours <= allowed)]
    return table


if __name__ == "__main__":
    print(json.dumps(extra_bytes(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))
