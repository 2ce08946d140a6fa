"""The figures of a report, as SVG."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .statistics import Difference

_SETTINGS: dict[Any, Any] = {
    "svg.hashsalt": "sfr_ext",
    "font.size": 10.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
_INK, _GREY, _FOUND = "#222222", "#999999", "#0a5fa8"
_COLOURS = [matplotlib.colormaps["tab10"](i) for i in range(10)]
_DASHES = ("-", "--")

Curve = tuple[list[float], list[float], list[float], list[float]]  # x, mean, lowest, highest


def forest(arms: Sequence[str], differences: Mapping[str, Mapping[str, Difference]], unit: str) -> str:
    """Differences of the arms to each reference, with their intervals; filled where the test finds one."""
    references = [reference for reference in differences if differences[reference]]
    names = [name for name in arms if any(name in differences[reference] for reference in references)]
    with matplotlib.rc_context(_SETTINGS):
        figure = Figure(figsize=(1.5 + 4.2 * len(references), 1.3 + 0.34 * len(names)), layout="constrained")
        for axes, reference in zip(_row(figure, len(references), sharey=True), references, strict=True):
            for place, name in enumerate(names):
                if (difference := differences[reference].get(name)) is not None:
                    _mark(axes, place, difference)
            axes.axvline(0, color=_INK, linewidth=0.8)
            axes.set_yticks(range(len(names)), names)
            axes.set_ylim(len(names) - 0.4, -0.6)
            axes.set_xlabel(f"difference to {reference}, {unit}")
            axes.grid(axis="x", alpha=0.3)
            axes.tick_params(axis="y", length=0)
            low, high = axes.get_xlim()
            axes.set_xlim(min(low, -0.05), max(high, 0.05))
        return _svg(figure)


def _mark(axes: Axes, place: int, difference: Difference) -> None:
    colour = _FOUND if difference.found else _GREY
    if difference.interval is not None:
        axes.plot(difference.interval, (place, place), color=colour, linewidth=2, solid_capstyle="butt")
    face = colour if difference.found else "white"
    axes.plot([difference.mean], [place], "o", color=colour, markerfacecolor=face, markersize=6)


def curves(panels: Sequence[tuple[str, Mapping[str, Curve]]], ylabel: str) -> str:
    """Accuracy along epochs and along seconds, one line an arm: the mean over seeds, between lowest and highest."""
    names = list(dict.fromkeys(name for _, lines in panels for name in lines))
    with matplotlib.rc_context(_SETTINGS):
        figure = Figure(figsize=(10.5, 4.4), layout="constrained")
        each = _row(figure, len(panels), sharey=True)
        for axes, (label, lines) in zip(each, panels, strict=True):
            for name, (x, mean, low, high) in lines.items():
                colour, dash = _style(names.index(name))
                axes.plot(x, mean, dash, color=colour, linewidth=1.6, label=name)
                if len(names) <= 5:  # more bands hide one another
                    axes.fill_between(x, low, high, color=colour, alpha=0.08, linewidth=0)
            axes.set_xlabel(label)
            axes.grid(alpha=0.3)
        each[0].set_ylabel(ylabel)
        each[0].xaxis.set_major_locator(MaxNLocator(integer=True))
        each[0].set_ylim(*_range(panels))
        handles, labels = each[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right center", frameon=False)
        return _svg(figure)


def probes(accuracies: Mapping[str, Mapping[str, tuple[float, float]]]) -> str:
    """What linear probes find in each layer, mean and deviation: a row an arm, a panel a layer, all of one scale."""
    layers = list(dict.fromkeys(layer for found in accuracies.values() for layer in found))
    names = list(accuracies)
    ends = {
        layer: [
            m + s * d for found in accuracies.values() if layer in found for m, d in [found[layer]] for s in (-1, 1)
        ]
        for layer in layers
    }
    half = max(0.5, *(0.55 * (max(values) - min(values)) for values in ends.values()))
    with matplotlib.rc_context(_SETTINGS):
        figure = Figure(figsize=(1.5 + 2.9 * len(layers), 1.3 + 0.3 * len(names)), layout="constrained")
        for axes, layer in zip(_row(figure, len(layers), sharey=True), layers, strict=True):
            values = [accuracies[name][layer] for name in names if layer in accuracies[name]]
            places = [place for place, name in enumerate(names) if layer in accuracies[name]]
            means, deviations = zip(*values, strict=True)
            axes.axvline(means[0], color=_GREY, linewidth=0.8, linestyle=":")  # the first arm, for the eye
            axes.errorbar(means, places, xerr=deviations, fmt="o", color=_FOUND, markersize=5, ecolor=_GREY)
            middle = (max(ends[layer]) + min(ends[layer])) / 2
            axes.set_xlim(middle - half, middle + half)
            axes.set_yticks(range(len(names)), names)
            axes.set_ylim(len(names) - 0.4, -0.6)
            axes.set_title(layer)
            axes.set_xlabel("probe accuracy, %")
            axes.grid(alpha=0.3)
            axes.tick_params(axis="y", length=0)
            axes.xaxis.set_major_locator(MaxNLocator(5))
        return _svg(figure)


def _range(panels: Sequence[tuple[str, Mapping[str, Curve]]]) -> tuple[float, float]:
    """From where the later half of the epochs lies: the first epochs would press all else together."""
    later = [value for _, lines in panels for _, _, low, _ in lines.values() for value in low[len(low) // 2 :]]
    most = max(value for _, lines in panels for *_, high in lines.values() for value in high)
    least = min(later)
    room = max(0.06 * (most - least), 0.2)
    return least - room, min(most + room, 100.0 + room / 2)


def _style(place: int) -> tuple[tuple[float, ...], str]:
    return _COLOURS[place % len(_COLOURS)], _DASHES[place // len(_COLOURS) % len(_DASHES)]


def _row(figure: Figure, count: int, sharey: bool) -> list[Axes]:
    return list(figure.subplots(1, count, squeeze=False, sharey=sharey)[0])


def _svg(figure: Figure) -> str:
    written = io.StringIO()
    figure.savefig(written, format="svg", metadata={"Date": None})
    text = written.getvalue()
    return text[text.index("<svg") :]
