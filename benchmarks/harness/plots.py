"""The results as pictures, one file each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .results import Results, Table
from .row import quartiles


def draw(results: Results, out: Path) -> list[Path]:
    """Those that the results have figures for; none where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return []
    tables = {table.name: table for table in results.tables}
    written = []
    for axis in ("N", "B", "C"):
        if table := tables.get(f"growth in {axis}"):
            figure, axes = _axes(Figure, f"Time by {axis}: {table.description}", axis, "ms, forward + backward")
            _growth(axes, table)
            written.append(_save(figure, axes, out / f"time_by_{axis.lower()}.png"))
    if table := tables.get("accuracy"):
        figure, axes = _axes(Figure, "Time against accuracy", "L1 marginal error reached", "ms, forward + backward")
        _accuracy(axes, table)
        axes.invert_xaxis()
        written.append(_save(figure, axes, out / "accuracy.png"))
    if table := tables.get("memory"):
        figure, axes = _axes(Figure, f"Memory by N: {table.description}", "N = M", "MiB")
        for name, by_n in table.facts["MiB by N"].items():
            style = "--" if " M" in name else "o-"
            axes.plot([int(n) for n in by_n], [max(value, 1e-3) for value in by_n.values()], style, label=name)
        written.append(_save(figure, axes, out / "memory_by_n.png"))
    bars = [
        (f"{table.name}: {row.name.removeprefix('sfr_ext, ')}", 1 / row.of_floor)
        for table in results.tables
        if not table.name.startswith(("growth", "accuracy"))
        for row in table.rows
        if row.ours and row.of_floor
    ]
    if bars:
        figure = Figure(figsize=(8, 1 + 0.25 * len(bars)), layout="constrained")
        axes = figure.add_subplot()
        axes.barh([name for name, _ in bars][::-1], [share for _, share in bars][::-1])
        axes.axvline(1.0, color="black", linewidth=1)
        axes.set_title("Fraction of the floor: 1 is the machine's limit")
        axes.tick_params(labelsize=8)
        figure.savefig(out / "fraction_of_floor.png", dpi=120)
        written.append(out / "fraction_of_floor.png")
    return written


def _axes(figure_type: Any, title: str, x: str, y: str) -> tuple[Any, Any]:
    figure = figure_type(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    axes.set(title=title, xlabel=x, ylabel=y, xscale="log", yscale="log")
    axes.grid(alpha=0.3)
    return figure, axes


def _save(figure: Any, axes: Any, path: Path) -> Path:
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    return path


def _growth(axes: Any, table: Table) -> None:
    series: dict[str, list[tuple[float, tuple[float, float, float]]]] = {}
    floor = {}
    for row in table.rows:
        if not row.milliseconds:
            continue
        point, _, name = row.name.partition(", ")
        size = float(point.partition("=")[2])
        series.setdefault(name, []).append((size, quartiles(row.milliseconds)))
        if row.floor:
            floor[size] = row.floor
    for name, points in series.items():
        sizes = [size for size, _ in points]
        (line,) = axes.plot(sizes, [spread[1] for _, spread in points], "o-", label=name)
        axes.fill_between(
            sizes, [s[0] for _, s in points], [s[2] for _, s in points], color=line.get_color(), alpha=0.2
        )
    if floor:
        axes.plot(list(floor), list(floor.values()), "k--", label="limit of the machine")


def _accuracy(axes: Any, table: Table) -> None:
    series: dict[str, list[tuple[float, float]]] = {}
    for row in table.rows:
        if row.milliseconds and row.marginal_error:
            name = row.name.rpartition(", ")[0]
            series.setdefault(name, []).append((row.marginal_error, quartiles(row.milliseconds)[1]))
    for name, points in series.items():
        axes.plot(*zip(*sorted(points), strict=True), "o-", label=name)
