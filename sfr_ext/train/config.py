"""The options of a training run, checked once."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .errors import TrainError

DATA = ("digits", "fashion-mnist", "cifar10", "cifar100", "imagefolder")
ARMS = {
    "ce": "cross-entropy",
    "ls": "cross-entropy with constant label smoothing",
    "dls": "cross-entropy with dynamic label smoothing",
    "sfr": "dynamic label smoothing + EMD between feature maps",
    "emd": "cross-entropy + EMD between feature maps",
    "l2": "cross-entropy + l2 between feature maps, pixel by pixel",
}
PRECISIONS = ("32", "bf16-mixed", "16-mixed", "64")

# A resumed run must agree with its beginning in these; the others (epochs, devices, out, ...) may differ.
IDENTITY = (
    "data",
    "arch",
    "arm",
    "batch_size",
    "lr",
    "weight_decay",
    "limit",
    "seed",
    "augment",
    "smoothing",
    "schedule",
    "prior",
    "emd_weight",
    "emd_warmup",
    "layers",
    "pairs",
    "channel_mode",
    "eps",
    "precision",
)


@dataclass(frozen=True)
class TrainConfig:
    """Options of one run; the names are those of the flags of ``sfr-ext train``."""

    data: str = "digits"
    data_dir: Path | None = None
    image_size: int = 64
    arch: str = "resnet8"
    arm: str = "sfr"
    epochs: int = 10
    batch_size: int = 128
    lr: float = 0.1
    weight_decay: float = 5e-4
    limit: int | None = None
    seed: int = 0
    augment: bool = True
    smoothing: float = 0.1
    schedule: str = "linear"
    prior: str = "uniform"
    emd_weight: float = 1.0
    emd_warmup: float = 1.0
    layers: tuple[str, ...] | None = None
    pairs: str = "all"
    channel_mode: str = "match"
    eps: float = 0.05
    out: Path = Path("runs/sfr")
    resume: Path | None = None
    devices: str = "1"
    accelerator: str = "auto"
    nodes: int = 1
    precision: str = "32"
    progress: bool | None = None

    def __post_init__(self) -> None:
        _one_of("--data", self.data, DATA)
        _one_of("--arm", self.arm, tuple(ARMS))
        _one_of("--precision", self.precision, PRECISIONS)
        for name in ("epochs", "batch_size", "nodes", "image_size"):
            _at_least("--" + name.replace("_", "-"), getattr(self, name), 1)
        if self.limit is not None:
            _at_least("--limit", self.limit, 1)
        for name in ("weight_decay", "emd_weight", "emd_warmup"):
            _at_least("--" + name.replace("_", "-"), getattr(self, name), 0)
        for name, value in (("lr", self.lr), ("eps", self.eps)):
            if not 0 < value < float("inf"):
                raise TrainError(f"--{name} must be above 0, got {value}")
        if not 0 <= self.smoothing <= 1:
            raise TrainError(f"--smoothing must be in [0, 1], got {self.smoothing}")
        if self.devices != "auto" and not (self.devices.isdigit() and int(self.devices) >= 1):
            raise TrainError(f"--devices must be a number from 1 or 'auto', got {self.devices!r}")

    def identity(self) -> dict[str, Any]:
        """The options that a resumed run must share with its beginning."""
        options = asdict(self)
        return {name: options[name] for name in IDENTITY}


def _one_of(flag: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise TrainError(f"{flag} must be one of {', '.join(allowed)}, got {value!r}")


def _at_least(flag: str, value: float, least: int) -> None:
    if not value >= least:
        raise TrainError(f"{flag} must be at least {least}, got {value}")
