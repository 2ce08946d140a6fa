"""Results as markdown: what was to be reached, then every table, then the plots."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from .results import Results, Table
from .row import Row, quartiles

HEADER = (
    "library",
    "value",
    "ms, median (quartiles)",
    "runs",
    "ratio (quartiles)",
    "x of limit",
    "marginal error",
    "value off by",
    "gradient off by",
)


def cells(row: Row) -> list[str]:
    """One for each entry of HEADER."""
    name = f"{row.name} {row.version or ''}".strip()
    if row.problem:
        return [name, row.objective, row.problem, *[""] * (len(HEADER) - 3)]
    errors = [
        "" if error is None else f"{error:.1e}" for error in (row.marginal_error, row.value_error, row.gradient_error)
    ]
    if not row.reached:
        errors[0] += " (not reached)"
    limit = "" if row.of_floor is None else _number(row.of_floor)
    ratio = _spread(row.ratios) if row.ratios else "-"
    return [name, row.objective, _spread(row.milliseconds), str(len(row.milliseconds)), ratio, limit, *errors]


def table(rows: list[Row]) -> str:
    return markdown(HEADER, map(cells, rows))


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table."""
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *rows))


def _spread(samples: list[float]) -> str:
    low, middle, high = quartiles(samples)
    return f"{_number(middle)} ({_number(low)} - {_number(high)})"


def _number(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def verdict_rows(tables: list[Table]) -> list[tuple[str, str, str, str]]:
    return [(t.name, v.target, v.measured, v.word) for t in tables for v in t.verdicts]


def exponent_rows(tables: list[Table]) -> list[tuple[str, str, str, str]]:
    """Axis, library, both exponents."""
    found = []
    for one in tables:
        for name, fit in one.facts.get("exponents", {}).items():
            found.append((one.facts["axis"], name, f"{fit['exponent']:.2f}", f"{fit['upper half']:.2f}"))
    return found


def _facts(one: Table) -> str:
    shown = [f"{key} {value:.3g}" for key, value in one.facts.items() if isinstance(value, (int, float))]
    return "; ".join([*shown, *one.notes])


def page(results: Results, plots: list[Path]) -> str:
    """Everything, with what is needed to make it again and to read it."""
    where, most = results.machine, results.limits
    gpu = f", {where['gpu']}" if where["gpu"] else ""
    if where["gpu"]:
        said = ", ".join(f"{key} {value}" for key, value in where["nvidia_smi"].items())
        built = where["sfr_ext"]
        gpu += f" ({said or 'nvidia-smi says nothing'}; kernels of CUDA {built['cuda_version']})"
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    multiplies, copies, vectors = (
        f"{most[name] / 1e9:.3g}" for name in ("multiply_adds", "copy_bytes", "vector_multiply_adds")
    )
    clock = (
        f"; {vectors} multiply-adds of a GPU's vector units, at {most['clock'] / 1e6:.0f} MHz" if most["clock"] else ""
    )
    lines = [
        "# Speed",
        "",
        f"`{results.command}` on {where['cpu']}{gpu}, {where['cores']} cores, {where['threads']} threads each, commit "
        f"{where['commit']}, instruction set {where['sfr_ext']['cpu_isa']}, {where['date']}; load before the run "
        f"{where['load_before']:.1f}. {versions}.",
        "",
        f"Limits measured at the start, in a nanosecond: {multiplies} multiply-adds; {copies} bytes read and written "
        f"by a copy{clock}. "
        '"x of limit" is the median over what the work takes at these rates at least '
        "(benchmarks/harness/floors.py says what is counted).",
        "",
        "Forward and backward unless a table says otherwise, in turns: one run of each row in a round. Ratios are pair "
        "by pair to our row of the same value, or to the row that the table says. All solve the same problems at the "
        "same eps. Marginal error: L1, both sides summed, largest of the batch, measured on each library's own plan; a "
        "library that never gets to the tolerance is shown at its best. Errors of values and gradients: relative, "
        "against the float64 reference for the same value: transport `<P, C>`, entropic `<P, C> + eps KL`, exact. "
        "A library that is slow runs less often.",
        "",
        "## What was to be reached",
        "",
        markdown(("table", "target", "measured", ""), verdict_rows(results.tables)),
    ]
    if exponents := exponent_rows(results.tables):
        lines += [
            "",
            "## Growth",
            "",
            "Time as a power of one size, others fixed: least squares through the logarithms of the medians.",
            "",
            markdown(("in", "library", "exponent", "over the upper half"), exponents),
        ]
    if plots:
        lines += ["", "## Plots", "", *(f"![{path.stem.replace('_', ' ')}]({path.name})" for path in plots)]
    for one in results.tables:
        lines += ["", f"## {one.name}: {one.description}", ""]
        if facts := _facts(one):
            lines += [facts, ""]
        if "MiB by N" in one.facts:
            lines += [_memory(one), ""]
        if one.rows:
            lines.append(table(one.rows))
    return "\n".join(lines).rstrip() + "\n"


def _memory(one: Table) -> str:
    series = one.facts["MiB by N"]
    sizes = list(next(iter(series.values())))
    return markdown(
        ["MiB", *(f"N = M = {n}" for n in sizes)],
        ([name, *(f"{by_n[n]:.2f}" if n in by_n else "-" for n in sizes)] for name, by_n in series.items()),
    )
