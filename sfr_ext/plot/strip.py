"""How a matching changes: one image several times, with the way of each patch's mass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .. import checks
from .canvas import INK, Grid, bare, centres, colours, is_grid, matplotlib, new_figure, picture, show


def strip(
    image: Any,
    plans: Mapping[str, Sequence[Any]],
    grid: Grid | Mapping[str, Grid],
    *,
    titles: Sequence[str],
    values: Mapping[str, Sequence[float]] | None = None,
    least: float = 0.25,
) -> Any:
    """A row for each name, a column for each moment: where the mass of each patch of an image goes on the same image.

    A tile has the mean colour of the mass that it receives; the first column shows the colour of each place. A white
    dot is the share of a patch's mass that stays, by its size; a wedge is a share that moves, to where it tapers.

    Args:
        image: ``[H, W]``, ``[1, H, W]``, ``[3, H, W]`` or ``[H, W, 3]``, bytes or floats from 0 to 1.
        plans: by name, a plan ``[N, N]`` for each moment, on the same patches on both sides.
        grid: rows and columns of the patches, with product ``N``; one for all rows, or by name.
        titles: of the moments.
        values: numbers below the pictures, as many as plans.
        least: wedges below this share of a patch's mass are left out.

    Returns:
        A ``matplotlib.figure.Figure``.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError, ValueError: an argument of another kind or shape.

    >>> import torch, sfr_ext
    >>> stays, mixed = torch.eye(4) / 4, torch.full((4, 4), 1 / 16)
    >>> figure = sfr_ext.plot.strip(torch.rand(8, 8), {"1 - 2": [mixed, stays]}, (2, 2), titles=["before", "after"])
    """
    where = "plot.strip"
    drawn = picture(where, "image", image)
    if not isinstance(plans, Mapping):
        checks.refuse(TypeError, where, "plans", "to be a dict from names to plans", type(plans).__name__)
    grids = grid if isinstance(grid, Mapping) else dict.fromkeys(plans, grid)
    for name, moments in plans.items():
        if name not in grids or not is_grid(grids[name]):
            checks.refuse(TypeError, where, "grid", f"to be a pair (rows, columns), for {name!r} too", repr(grid))
        count = grids[name][0] * grids[name][1]
        if len(moments) != len(titles):
            checks.refuse(ValueError, where, "plans", f"to hold {len(titles)} of {name!r}", len(moments))
        for plan in moments:
            if tuple(np.shape(plan)) != (count, count):
                checks.refuse(ValueError, where, "plans", f"of shape [{count}, {count}]", list(np.shape(plan)))
    if not plans or not titles:
        checks.refuse(ValueError, where, "plans", "to hold at least one plan", "none")
    side, height = 1.6, drawn.shape[0] / drawn.shape[1]
    figure = new_figure(side * (len(titles) + 1) + 0.4, (side * height + 0.26) * len(plans) + 0.3)
    rows = figure.subplots(len(plans), len(titles) + 1, squeeze=False)
    for axes, title in zip(rows[0], ("colours of places", *titles), strict=True):
        axes.set_title(title, color=INK, fontsize=9.5)
    for row, (name, moments) in zip(rows, plans.items(), strict=True):
        _draw_tiles(row[0], drawn, colours(grids[name]), grids[name], height)
        row[0].text(-0.06, height / 2, name, color=INK, fontsize=10, rotation=90, ha="right", va="center")
        for i, (axes, plan) in enumerate(zip(row[1:], moments, strict=True)):
            _draw_moment(axes, drawn, np.asarray(plan, dtype=np.float64), grids[name], height, least)
            if values is not None:
                axes.text(0.5, -0.03, f"{values[name][i]:.3f}", color=INK, fontsize=8.5, ha="center", va="top")
    return figure


def _draw_tiles(axes: Any, image: np.ndarray, tiles: np.ndarray, grid: Grid, height: float) -> None:
    """The image in grey, and over it a tile for each patch."""
    box = (0, 1, 0, height)
    show(axes, np.repeat(image.mean(2, keepdims=True), 3, 2), box, fade=0.5)
    axes.imshow(tiles.reshape(*grid, 3), extent=box, alpha=0.6, interpolation="nearest", aspect="auto", zorder=1)
    axes.set_xlim(0, 1)
    axes.set_ylim(0, height)
    bare(axes)


def _draw_moment(axes: Any, image: np.ndarray, plan: np.ndarray, grid: Grid, height: float, least: float) -> None:
    sent, mass = colours(grid), plan.sum(0)
    received = (plan.T @ sent) / np.where(mass > 0, mass, 1.0)[:, None]
    _draw_tiles(axes, image, received, grid, height)
    x, y = centres(grid).T
    places = np.stack((x, height * (1 - y)), 1)
    share = plan / np.where(plan.sum(1) > 0, plan.sum(1), 1.0)[:, None]
    apart = share * (1 - np.eye(len(plan)))
    rows, columns = np.nonzero(apart >= least)
    order = np.argsort(apart[rows, columns])  # the heaviest on top
    rows, columns = rows[order], columns[order]
    strength = apart[rows, columns][:, None]
    begin, end = places[rows], places[columns]
    across = np.stack((begin[:, 1] - end[:, 1], end[:, 0] - begin[:, 0]), 1)
    half = 0.13 / max(grid) * strength * across / np.linalg.norm(across, axis=1, keepdims=True)
    wedges = np.stack((begin - half, begin + half, end), 1)  # wide where the mass leaves, a point where it arrives
    rgba = np.concatenate((0.75 * sent[rows], 0.3 + 0.7 * strength), 1)
    axes.add_collection(matplotlib("collections").PolyCollection(wedges, facecolors=rgba, linewidths=0, zorder=2))
    stays = np.diagonal(share)
    axes.scatter(*places.T, s=220 / max(grid) * stays, c="white", linewidths=0, zorder=3)
