"""The plan itself, as a heat map of its matrix."""

from __future__ import annotations

from typing import Any

from ..result import OTResult
from .canvas import INK, coupling_of, new_figure


def plan(result: OTResult, *, problem: int = 0) -> Any:
    """The plan ``[N, M]`` of one problem as a picture, a row for each patch of the student.

    Args:
        result, problem: as for :func:`matches`.

    Returns:
        A ``matplotlib.figure.Figure``.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError, ValueError: an argument of another kind, or no such problem.

    >>> import torch, sfr_ext
    >>> figure = sfr_ext.plot.plan(sfr_ext.solve(torch.rand(2, 9, 9)), problem=1)
    """
    values, _ = coupling_of("plot.plan", result, problem)
    height = max(2.5, min(10.0, 6.4 * values.shape[0] / values.shape[1]))
    figure = new_figure(6.9, height)
    axes = figure.subplots()
    heat = axes.imshow(values, cmap="Blues", vmin=0.0, interpolation="nearest")
    axes.set_xlabel("patch of the teacher", color=INK)
    axes.set_ylabel("patch of the student", color=INK)
    axes.tick_params(colors=INK, length=2)
    for spine in axes.spines.values():
        spine.set_color("#c8ced6")
    bar = figure.colorbar(heat, ax=axes, shrink=0.85, pad=0.02, aspect=26)
    bar.set_label("mass", color=INK)
    bar.outline.set_visible(False)
    return figure
