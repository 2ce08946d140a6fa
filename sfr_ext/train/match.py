"""``sfr-ext match``: which patch of one image is matched to which of another, as a picture."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import plot, solve_sample
from ..extras import how_to_install
from ..result import OTResult
from ..sfr import maps
from ..sfr.candidates import candidates
from .config import near_misses
from .errors import TrainError, UsageError
from .files import atomic_write
from .images import read_image

if TYPE_CHECKING:
    from .trained import Trained

_PIXELS = 4  # of a patch, along each side: what it looks like, not each hair of it


def match(
    a: Path,
    b: Path,
    out: Path,
    *,
    patches: int,
    checkpoint: Path | None,
    layer: str | None,
    eps: float | None,
    metric: str = "l2",
    reach: float | None = None,
) -> str:
    """Match two image files and draw the matching into ``out``; return a sentence about it.

    Args:
        a, b: image files.
        out: a file of any format that matplotlib writes; its suffix says which.
        patches: at most so many along the longer side.
        checkpoint: a run's folder or checkpoint, whose network makes the features; None: the pixels are the features.
        layer: of the network; None: its last stage.
        eps: of the entropic plan, in standard deviations of the cost; None: the exact plan.
        metric: the cost of two patches, as in `cost_matrix`.
        reach: patches without a counterpart within this cost mostly stay unmatched; None: every patch is matched.

    Raises:
        TrainError: a missing package, a file that cannot be read or written, no such layer.
    """
    _require("match", "plot", "matplotlib", "PIL")
    if checkpoint is not None:  # of Lightning, which wrote it
        _require("match --checkpoint", "train", "lightning", "filelock")
    if checkpoint is None and layer is not None:
        raise UsageError("--layer needs --checkpoint, whose network it is a layer of")
    if out.suffix[1:].lower() not in (formats := _formats()):
        raise UsageError(f"-o: {out} must end with one of {', '.join(sorted(formats))}")
    images = [_tensor(read_image(path)) for path in (a, b)]
    if checkpoint is None:
        features, what = [_pixels(image, patches) for image in images], "pixels"
    else:
        from .trained import load_trained

        trained = load_trained(checkpoint)
        images = [_square(image) for image in images]
        features, name = _features(trained, images, layer, patches)
        what = f"{name} of {checkpoint}"
    result = _solve(features, eps, metric, reach)
    cost = float(result.transport_cost)
    title = f"{a.name} and {b.name} by {what}: cost {cost:.3f}"
    try:
        figure = plot.overview(images[0], images[1], result, title=title)
    except ImportError as error:
        raise TrainError(f"match cannot draw: {error}") from error
    with atomic_write(out) as temporary:
        figure.savefig(temporary, dpi=150)
    left = "" if reach is None else f", {1 - float(result.plan.sum()):.0%} of the mass left unmatched"
    return (
        f"cost {cost:.4f} between {_count(features[0])} and {_count(features[1])} patches of {what}{left}; wrote {out}"
    )


def _require(what: str, extra: str, *names: str) -> None:
    if missing := [name for name in names if importlib.util.find_spec(name) is None]:
        how = how_to_install(extra, *missing)
        raise TrainError(f"{what} needs {' and '.join(missing)}, not installed here: {how}")


def _solve(features: list[Tensor], eps: float | None, metric: str, reach: float | None) -> OTResult:
    a, b = features
    with torch.no_grad():
        if eps is None:
            return solve_sample(a, b, solver="exact", metric=metric, reach=reach)
        return solve_sample(a, b, eps=eps, metric=metric, reach=reach)


def _formats() -> set[str]:
    from matplotlib.backend_bases import FigureCanvasBase

    return set(FigureCanvasBase.get_supported_filetypes())


def _tensor(image: Any) -> Tensor:
    """``[3, H, W]`` from 0 to 1."""
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(image.height, image.width, 3).permute(2, 0, 1).float() / 255


def _pixels(image: Tensor, patches: int) -> Tensor:
    """The colours of ``4 x 4`` places of each patch, ``[1, 48, h, w]``."""
    height, width = image.shape[1:]
    scale = patches / max(height, width)
    rows, columns = (max(1, round(scale * side)) for side in (height, width))
    small = F.interpolate(image[None], (rows * _PIXELS, columns * _PIXELS), mode="area")
    return F.pixel_unshuffle(small, _PIXELS)


def _square(image: Tensor) -> Tensor:
    """The middle."""
    side = min(image.shape[1:])
    top, left = ((length - side) // 2 for length in image.shape[1:])
    return image[:, top : top + side, left : left + side]


def _features(trained: Trained, images: list[Tensor], layer: str | None, patches: int) -> tuple[list[Tensor], str]:
    """Directions of a layer's features ``[1, C, h, w]`` for each image, and the layer's name."""
    batch = torch.cat([F.interpolate(image[None], trained.size, mode="area") for image in images])
    if trained.channels == 1:
        batch = batch.mean(1, keepdim=True)
    batch = trained.normalised(batch)
    known = {candidate.name: candidate for candidate in candidates(trained.model, batch)}
    name = layer or (trained.stages[-1] if trained.stages else "")
    if name not in known:
        if layer is None:
            raise TrainError(f"--layer is needed for this network: {', '.join(list(known)[-8:])}, ...")
        raise TrainError(f"--layer: no layer {name!r} returns maps of these images{near_misses(name, list(known))}")
    found: list[Tensor] = []
    transform = known[name].transform

    def keep(module: Any, arguments: Any, output: Any) -> None:
        found.append(output if transform is None else transform(output))

    handle = trained.model.get_submodule(name).register_forward_hook(keep)
    try:
        with torch.no_grad():
            trained.model(batch)
    finally:
        handle.remove()
    x = found[-1]
    x = maps.unit(maps.pool(x, *(min(side, patches) for side in x.shape[2:])))
    return [x[:1], x[1:]], name


def _count(features: Tensor) -> str:
    return f"{features.shape[2]} x {features.shape[3]}"
