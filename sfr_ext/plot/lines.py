"""Which patch is matched to which: a line from each to where its mass goes."""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import checks
from ..result import OTResult
from .canvas import GAP, Grid, bare, centres, colours, coupling_of, grid_of, matplotlib, new_figure, picture, show

_POINTS = 32  # of a curve


def matches(
    image_a: Any,
    image_b: Any,
    result: OTResult,
    *,
    problem: int = 0,
    grid_a: Grid | None = None,
    grid_b: Grid | None = None,
    least: float = 0.05,
) -> Any:
    """Two images beside each other, and a line from each patch to each that it sends mass to.

    Width and strength of a line are by the plan. A patch on the left has the colour of its place; one on the right the
    mean colour of what it receives, so that two images that are matched place by place have the same colours.

    Args:
        image_a: the student's side: ``[H, W]``, ``[1, H, W]``, ``[3, H, W]`` or ``[H, W, 3]``, bytes or floats from 0
            to 1.
        image_b: the teacher's side.
        result: of :func:`sfr_ext.solve_sample` or :func:`sfr_ext.solve`.
        problem: which one of the batch. With groups, the mean of their plans is drawn.
        grid_a: rows and columns of the patches, where the result has none (tokens, costs): by default a square.
        grid_b: of the teacher's side.
        least: lines below this share of the heaviest one are left out.

    Returns:
        A ``matplotlib.figure.Figure``.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError, ValueError: an argument of another kind or shape.

    >>> import torch, sfr_ext
    >>> x, y = torch.rand(1, 8, 4, 4), torch.rand(1, 8, 4, 4)
    >>> result = sfr_ext.solve_sample(x, y, solver="exact")
    >>> figure = sfr_ext.plot.matches(torch.rand(3, 32, 32), torch.rand(3, 32, 32), result)
    """
    where = "plot.matches"
    a, b = picture(where, "image_a", image_a), picture(where, "image_b", image_b)
    plan, _ = coupling_of(where, result, problem)
    grids = (
        grid_of(where, "grid_a", grid_a, result._grids[0]),
        grid_of(where, "grid_b", grid_b, result._grids[1]),
    )
    checks.a_number(where, "least", least)
    shape = shape_of(a, b)
    figure = new_figure(10, 10 * shape)
    draw(figure.subplots(), a, b, plan, grids, least)
    return figure


def shape_of(a: np.ndarray, b: np.ndarray) -> float:
    """Height over width of two images beside each other, each one unit wide."""
    return max(a.shape[0] / a.shape[1], b.shape[0] / b.shape[1]) / (2 + GAP)


def draw(axes: Any, a: np.ndarray, b: np.ndarray, plan: np.ndarray, grids: tuple[Grid, Grid], least: float) -> None:
    """Images one unit wide, the second one beside the first."""
    heights = [image.shape[0] / image.shape[1] for image in (a, b)]
    lefts = (0.0, 1.0 + GAP)
    places = []
    for image, grid, left, height in zip((a, b), grids, lefts, heights, strict=True):
        low = (max(heights) - height) / 2
        show(axes, image, (left, left + 1, low, low + height), fade=0.25)
        x, y = centres(grid).T
        places.append(np.stack((left + x, low + height * (1 - y)), 1))
    sent = colours(grids[0])
    mass = plan.sum(0)
    received = (plan.T @ sent) / np.where(mass > 0, mass, 1.0)[:, None]
    _draw_lines(axes, places[0], places[1], plan, sent, least)
    for place, colour, weight, grid in zip(places, (sent, received), (plan.sum(1), mass), grids, strict=True):
        size = 340 / max(grid) * weight / max(weight.max(), 1e-300)
        axes.scatter(*place.T, s=size, c=colour, edgecolors="white", linewidths=0.8, zorder=3)
    axes.set_xlim(0, 2 + GAP)
    axes.set_ylim(0, max(heights))
    bare(axes)


def _draw_lines(
    axes: Any, ours: np.ndarray, theirs: np.ndarray, plan: np.ndarray, colour: np.ndarray, least: float
) -> None:
    share = plan / max(plan.max(), 1e-300)
    rows, columns = np.nonzero((share >= least) & (share > 0))
    order = np.argsort(share[rows, columns])  # the heaviest on top
    rows, columns = rows[order], columns[order]
    t = np.linspace(0, 1, _POINTS)
    x = ours[rows, :1] + (theirs[columns, :1] - ours[rows, :1]) * t
    y = ours[rows, 1:] + (theirs[columns, 1:] - ours[rows, 1:]) * (3 - 2 * t) * t * t  # level where it begins and ends
    strength = share[rows, columns][:, None]
    many = min(1.0, (80 / max(len(rows), 1)) ** 0.5)  # the more lines, the finer
    rgba = np.concatenate((colour[rows], (0.1 + 0.75 * strength) * (0.3 + 0.7 * many)), 1)
    lines = matplotlib("collections").LineCollection(
        np.stack((x, y), 2),
        colors=rgba,
        linewidths=(0.4 + 1.8 * strength[:, 0] ** 0.5) * (0.4 + 0.6 * many),
        capstyle="round",
        zorder=2,
    )
    axes.add_collection(lines)
