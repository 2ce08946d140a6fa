"""What the transport of each patch costs, as a heat map over the image."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..result import OTResult
from .canvas import GAP, INK, Grid, bare, coupling_of, grid_of, new_figure, picture, show
from .lines import shape_of

# A patch in so many rows and columns, of which the outermost ones are left to the image.
_CELL, _RIM = 10, 2


def cost(
    image_a: Any,
    image_b: Any,
    result: OTResult,
    *,
    problem: int = 0,
    grid_a: Grid | None = None,
    grid_b: Grid | None = None,
) -> Any:
    """Two images beside each other; on each patch a tile in the colour of what its mass costs: dark red is dear.

    Of a patch of the student ``sum_j P_ij C_ij / sum_j P_ij``, of one of the teacher the same over ``i``, in units of
    the cost: what is red has no counterpart in the other image. What is left unmatched, with a reach, has no tile.

    Args:
        image_a, image_b, result, problem, grid_a, grid_b: as for :func:`matches`.

    Returns:
        A ``matplotlib.figure.Figure``.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError, ValueError: an argument of another kind or shape.

    >>> import torch, sfr_ext
    >>> x, y = torch.rand(1, 8, 4, 4), torch.rand(1, 8, 4, 4)
    >>> figure = sfr_ext.plot.cost(torch.rand(32, 32), torch.rand(32, 32), sfr_ext.solve_sample(x, y))
    """
    where = "plot.cost"
    a, b = picture(where, "image_a", image_a), picture(where, "image_b", image_b)
    plan, moved = coupling_of(where, result, problem)
    grids = grid_of(where, "grid_a", grid_a, result._grids[0]), grid_of(where, "grid_b", grid_b, result._grids[1])
    figure = new_figure(10, 10 * shape_of(a, b))
    draw(figure, figure.subplots(), a, b, plan, moved, grids)
    return figure


def draw(
    figure: Any,
    axes: Any,
    a: np.ndarray,
    b: np.ndarray,
    plan: np.ndarray,
    moved: np.ndarray,
    grids: tuple[Grid, Grid],
) -> None:
    """As :func:`matches` places them."""
    per_patch = [moved.sum(axis) / np.where(plan.sum(axis) > 0, plan.sum(axis), np.nan) for axis in (1, 0)]
    most = max(np.nan_to_num(x).max() for x in per_patch) or 1.0
    heights = [image.shape[0] / image.shape[1] for image in (a, b)]
    for image, grid, values, left, height in zip((a, b), grids, per_patch, (0.0, 1.0 + GAP), heights, strict=True):
        low = (max(heights) - height) / 2
        box = (left, left + 1, low, low + height)
        grey = np.repeat(image.mean(2, keepdims=True), 3, 2)
        show(axes, grey, box, fade=0.45)
        heat = axes.imshow(
            _tiles(values.reshape(grid)),
            extent=box,
            cmap="YlOrRd",
            vmin=0.0,
            vmax=most,
            interpolation="nearest",
            aspect="auto",
            zorder=1,
        )
    axes.set_xlim(0, 2 + GAP)
    axes.set_ylim(0, max(heights))
    bare(axes)
    bar = figure.colorbar(heat, ax=axes, shrink=0.8, pad=0.015, aspect=22)
    bar.set_label("cost of a patch's mass", color=INK)
    bar.outline.set_visible(False)


def _tiles(values: np.ndarray) -> Any:
    """The middle of each patch that sends mass: its colour is that of the bar, and around it the image is seen."""
    cell = np.zeros((_CELL, _CELL), bool)
    cell[_RIM:-_RIM, _RIM:-_RIM] = True
    return np.ma.masked_where(
        ~np.kron(~np.isnan(values), cell).astype(bool), np.kron(values, np.ones_like(cell, float))
    )
