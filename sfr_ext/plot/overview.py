"""A matching whole: lines above, costs below."""

from __future__ import annotations

from typing import Any

from ..result import OTResult
from . import costs, lines
from .canvas import INK, Grid, coupling_of, grid_of, new_figure, picture


def overview(
    image_a: Any,
    image_b: Any,
    result: OTResult,
    *,
    problem: int = 0,
    grid_a: Grid | None = None,
    grid_b: Grid | None = None,
    least: float = 0.05,
    title: str | None = None,
) -> Any:
    """What :func:`matches` and :func:`cost` draw, one above the other.

    Args:
        image_a, image_b, result, problem, grid_a, grid_b, least: as for :func:`matches`.
        title: above both.

    Returns:
        A ``matplotlib.figure.Figure``.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError, ValueError: an argument of another kind or shape.

    >>> import torch, sfr_ext
    >>> x, y = torch.rand(1, 8, 4, 4), torch.rand(1, 8, 4, 4)
    >>> result = sfr_ext.solve_sample(x, y, solver="exact")
    >>> figure = sfr_ext.plot.overview(torch.rand(32, 32), torch.rand(32, 32), result, title="noise")
    """
    where = "plot.overview"
    a, b = picture(where, "image_a", image_a), picture(where, "image_b", image_b)
    plan, moved = coupling_of(where, result, problem)
    grids = grid_of(where, "grid_a", grid_a, result._grids[0]), grid_of(where, "grid_b", grid_b, result._grids[1])
    figure = new_figure(9.6, 2 * 9 * lines.shape_of(a, b) + (0.5 if title else 0.1))
    above, below = figure.subplots(2, 1)
    lines.draw(above, a, b, plan, grids, least)
    costs.draw(figure, below, a, b, plan, moved, grids)
    if title:
        figure.suptitle(title, color=INK, fontsize=13)
    return figure
