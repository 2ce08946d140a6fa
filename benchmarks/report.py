"""Results as a markdown table and as JSON with every sample."""

from __future__ import annotations

import datetime
import os
import platform
from pathlib import Path
from typing import Any

import torch

import sfr_ext

from .measure import Row, quartiles


def machine(threads: int) -> dict[str, Any]:
    """Where and with what the figures were made."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": threads,
        "load_before": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "sfr_ext": sfr_ext.build_info(),
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def table(rows: list[Row]) -> str:
    lines = [
        "| library | value | ms, median (quartiles) | times the first row (quartiles) | marginal error "
        "| value off by | gradient off by |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        name = f"{row.name} {row.version or ''}".strip()
        if row.problem:
            lines.append(f"| {name} | {row.objective} | {row.problem} | | | | |")
            continue
        cells = [_spread(row.milliseconds), _spread(row.ratios) if row.ratios else "-"]
        errors = [
            f"{error:.1e}" for error in (row.marginal_error, row.value_error, row.gradient_error) if error is not None
        ]
        lines.append(f"| {' | '.join([name, row.objective, *cells, *errors])} |")
    return "\n".join(lines)


def _spread(samples: list[float]) -> str:
    low, middle, high = quartiles(samples)
    return f"{_number(middle)} ({_number(low)} - {_number(high)})"


def _number(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def page(results: list[dict[str, Any]], tables: list[str], where: dict[str, Any], command: str) -> str:
    """The tables of all workloads, with what is needed to make them again and to read them."""
    head = [
        "# Forward and backward, interleaved runs",
        "",
        f"`{command}` on {where['cpu']}, {where['threads']} threads, torch {where['torch']}, "
        f"instruction set {where['sfr_ext']['cpu_isa']}, {where['date']}; load before the run "
        f"{where['load_before']:.1f}.",
        "",
        "All solve the same problems at the same eps. Marginal error: L1, both sides summed, largest of the "
        "batch, measured on each library's own plan; 1e-3 is asked for. Errors of values and gradients: "
        "relative, against the float64 reference for the same value, transport `<P, C>` or entropic "
        "`<P, C> + eps KL`.",
    ]
    for result, text in zip(results, tables, strict=True):
        head += ["", f"## {result['workload']}: {result['description']}", ""]
        head += [f"eps {result['eps']:.3g}, {result['rounds']} rounds", "", text]
    return "\n".join(head) + "\n"
