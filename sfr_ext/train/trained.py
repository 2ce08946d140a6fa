"""A network from a checkpoint of ``sfr-ext train``, for looking at it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoints import read_checkpoint
from .config import LAST_CHECKPOINT
from .errors import TrainError
from .models import build_model

WEIGHTS = "model."  # what names of the network's weights begin with in a checkpoint
AVERAGE = "average.module."  # those of the averaged one, where there is one


@dataclass(frozen=True)
class Trained:
    """A network in evaluation mode, and what its images are like."""

    model: nn.Module
    stages: tuple[str, ...] | None
    channels: int
    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def normalised(self, images: Tensor) -> Tensor:
        """What the network takes, of images ``[B, C, H, W]`` from 0 to 1."""
        mean, std = (torch.tensor(x, dtype=images.dtype).view(1, -1, 1, 1) for x in (self.mean, self.std))
        return (images - mean) / std


def images_of(data: Any) -> dict[str, Any]:
    """What a checkpoint says of a data set's images, so that others can be brought to the network."""
    size = [data.size, data.size] if hasattr(data, "size") else list(data.train_images.shape[2:])
    return {
        "channels": data.channels,
        "num_classes": data.num_classes,
        "size": size,
        "mean": list(data.mean),
        "std": list(data.std),
    }


def load_trained(path: Path) -> Trained:
    """The network of a run's folder or checkpoint.

    Raises:
        TrainError: no such checkpoint, a damaged one, or one that does not say what its images were like.
    """
    path = path / LAST_CHECKPOINT if path.is_dir() else path
    content = read_checkpoint(path, "--checkpoint")
    options, images = content["sfr_ext"], content.get("sfr_ext_images")
    if images is None:
        raise TrainError(f"--checkpoint: {path} does not say what its images were like; it is of an older version")
    model, stages = build_model(options["arch"], images["channels"], images["num_classes"])
    state = content["state_dict"]
    prefix = AVERAGE if any(name.startswith(AVERAGE) for name in state) else WEIGHTS
    weights = {name.removeprefix(prefix): x for name, x in state.items() if name.startswith(prefix)}
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise TrainError(f"--checkpoint: {path} does not fit --arch {options['arch']} as it is here") from error
    height, width = images["size"]
    means = tuple(images["mean"]), tuple(images["std"])
    return Trained(model.float().eval(), stages, images["channels"], (height, width), *means)
