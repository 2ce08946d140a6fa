"""What all pictures share: matplotlib, images, patches and their colours."""

from __future__ import annotations

import importlib
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import checks
from ..extras import how_to_install
from ..result import OTResult

GAP = 0.12  # between two images, in widths of one
INK = "#26323f"
# Of patches at the corners of an image: top left, top right, bottom left, bottom right; between them, a mixture.
CORNERS = np.array([[0xE6, 0x39, 0x46], [0xF6, 0xAE, 0x2D], [0x3A, 0x6E, 0xC4], [0x1F, 0xA1, 0x87]]) / 255

Grid = tuple[int, int]


def matplotlib(module: str) -> Any:
    """A module of matplotlib.

    Raises:
        ImportError: it is not installed.
    """
    try:
        return importlib.import_module(f"matplotlib.{module}")
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "matplotlib":
            raise
        raise ImportError(
            f"sfr_ext.plot needs matplotlib, not installed here: {how_to_install('plot', 'matplotlib')}",
            name="matplotlib",
        ) from error


def new_figure(width: float, height: float) -> Any:
    """Inches."""
    return matplotlib("figure").Figure(figsize=(width, height), layout="constrained", facecolor="white")


def picture(where: str, name: str, image: Any) -> np.ndarray:
    """An image as floats ``[H, W, 3]`` from 0 to 1.

    Args:
        image: tensor, array or Pillow's image, ``[H, W]``, ``[1, H, W]``, ``[3, H, W]`` or ``[H, W, 3]``; bytes from
            0 to 255, or floats from 0 to 1, beyond which they are cut off.
    """
    if isinstance(image, Tensor):
        checks.a_tensor(where, name, image)
    array = image.detach().cpu().numpy() if isinstance(image, Tensor) else np.asarray(image)
    if array.ndim == 3 and array.shape[0] in (1, 3):
        array = array.transpose(1, 2, 0)
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3 or array.shape[2] not in (1, 3) or 0 in array.shape:
        came = f"shape {list(array.shape)}" + (f"; give {name}[0]" if array.ndim == 4 and len(array) == 1 else "")
        checks.refuse(ValueError, where, name, "of shape [H, W], [1, H, W], [3, H, W] or [H, W, 3]", came)
    if array.dtype.kind not in "fu" or (array.dtype.kind == "u" and array.dtype != np.uint8):
        checks.refuse(TypeError, where, name, "to hold bytes or floating point", array.dtype)
    scaled = array / 255 if array.dtype == np.uint8 else np.nan_to_num(array.astype(np.float64))
    return np.broadcast_to(scaled.clip(0, 1), (*array.shape[:2], 3))


def grid_of(where: str, name: str, asked: Grid | None, known: tuple[int, ...]) -> Grid:
    """Rows and columns of patches: those asked for, those known, or a square."""
    count = int(np.prod(known))
    if asked is not None:
        if not is_grid(asked) or asked[0] * asked[1] != count:
            checks.refuse(ValueError, where, name, f"to be two numbers with product {count}", asked)
        return int(asked[0]), int(asked[1])
    if len(known) == 2:
        return known[0], known[1]
    side = round(count**0.5)
    if side * side != count:
        checks.refuse(ValueError, where, name, f"(rows, columns), since {count} patches are no square", None)
    return side, side


def is_grid(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and len(value) == 2 and all(isinstance(each, Integral) for each in value)


def coupling_of(where: str, result: Any, problem: int) -> tuple[np.ndarray, np.ndarray]:
    """Plan ``[N, M]`` and cost times plan ``[N, M]`` of one problem of the batch; the mean over its groups.

    The cost is read off the plan, ``C_ij = f_i + g_j - eps log(P_ij / (a_i b_j))``, where there is any mass: a result
    does not keep it.
    """
    if not isinstance(result, OTResult):
        checks.refuse(TypeError, where, "result", "of sfr_ext.solve or solve_sample", type(result).__name__)
    problem = checks.an_int(where, "problem", problem)
    with torch.no_grad():
        plan, a, b = (x.detach().double() for x in result._coupled("plan")[:3])
        f, g, eps = (x.detach().double() for x in (result.f, result.g, result.eps))
        weights = a[..., :, None] * b[..., None, :]
        some = (plan > 0) & (weights > 0)
        log = torch.where(some, plan, 1.0).log() - torch.where(some, weights, 1.0).log()
        cost = torch.where(some, f[..., :, None] + g[..., None, :] - eps[..., None, None] * log, 0.0)
        both = torch.stack((plan, plan * cost))
    if both.dim() > 3:
        if not -both.shape[1] <= problem < both.shape[1]:
            checks.refuse(ValueError, where, "problem", f"to be one of {both.shape[1]}", problem)
        both = both[:, problem]
    while both.dim() > 3:  # groups
        both = both.mean(1)
    plan, moved = both.cpu().numpy()
    return plan, moved


def centres(grid: Grid) -> np.ndarray:
    """Of patches, ``[N, 2]`` as (x, y) in shares of an image."""
    y, x = np.mgrid[0 : grid[0], 0 : grid[1]].reshape(2, -1) + 0.5
    return np.stack((x / grid[1], y / grid[0]), 1)


def colours(grid: Grid) -> np.ndarray:
    """Of patches, by their place, ``[N, 3]``."""
    x, y = centres(grid).T[:, :, None]
    left_top, right_top, left_bottom, right_bottom = CORNERS
    return (1 - y) * ((1 - x) * left_top + x * right_top) + y * ((1 - x) * left_bottom + x * right_bottom)


def show(axes: Any, image: np.ndarray, box: tuple[float, float, float, float], fade: float = 0.0) -> None:
    """Draw an image into ``(left, right, bottom, top)``, faded towards white."""
    smooth = "nearest" if max(image.shape[:2]) <= 64 else "antialiased"
    axes.imshow(image + fade * (1 - image), extent=box, interpolation=smooth, aspect="auto", zorder=0)


def bare(axes: Any) -> None:
    """No ticks, no frame."""
    axes.set_axis_off()
    axes.set_aspect("equal")
