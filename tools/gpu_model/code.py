"""Figures of the hot loops and kernels against their budgets."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from . import built
from .flow import Flow
from .hot_loops import Figures, exceeded, hot_loops, named, table
from .timing import Latencies


@dataclass(frozen=True)
class Measured:
    name: str
    what: str
    figures: Figures
    over: list[str]  # budgets that it exceeds


@functools.cache
def flow_of(arch: str, part: str) -> Flow:
    return Flow(named(built.kernels(arch), part))


def of_loops(arch: str) -> list[Measured]:
    found = []
    for loop in hot_loops(table()):
        figures = Figures.of(loop.path(flow_of(arch, loop.kernel)), Latencies())
        found.append(Measured(loop.name, loop.what, figures, exceeded(loop.name, figures, loop.budget)))
    return found


def of_kernels(arch: str) -> list[Measured]:
    found = []
    for part, budget in table()["kernel"].items():
        kernel = named(built.kernels(arch), part)
        figures = Figures.of(kernel.code)
        found.append(Measured(part, f"{kernel.bytes} bytes", figures, exceeded(part, figures, budget)))
    return found


def report(arch: str) -> str:
    """Both tables in Markdown."""
    lines = [
        f"Machine code of sm_{arch}, by `python -m gpu_model code`. Instructions are counted; clocks are a model.",
        "",
        "| loop | a pass | instructions | multiply-adds | instructions per multiply-add | generic | shared | local "
        "| R2UR | calls | barriers | modelled clocks |",
        "|---|---|" + "---:|" * 10,
    ]
    for m in of_loops(arch):
        f = m.figures
        ratio = f"{f.per_multiply_add:.2f}" if f.multiply_adds else "-"
        cells = [f.instructions, f.multiply_adds, ratio, f.generic, f.shared, f.local, f.r2ur, f.calls, f.barriers]
        lines.append(f"| {m.name} | {m.what} | {' | '.join(map(str, cells))} | {f.clocks} |")
    lines += ["", "| kernel | bytes | generic | shared | local | R2UR | calls |", "|---|" + "---:|" * 6]
    for m in of_kernels(arch):
        f = m.figures
        cells = [f.instructions * 16, f.generic, f.shared, f.local, f.r2ur, f.calls]
        lines.append(f"| `{m.name}` | {' | '.join(map(str, cells))} |")
    return "\n".join(lines)
