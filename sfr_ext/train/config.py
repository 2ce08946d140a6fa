"""The options of a training run.

Each is declared once: its default, its help, what is allowed, and what a resumed run may change.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Container
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_type_hints

from .errors import UsageError

DATA = ("digits", "fashion-mnist", "cifar10", "cifar100", "imagefolder", "hf")
ARMS = {
    "ce": "cross-entropy",
    "ls": "cross-entropy with constant label smoothing",
    "dls": "cross-entropy with dynamic label smoothing",
    "sfr": "dynamic label smoothing + EMD between feature maps",
    "emd": "cross-entropy + EMD between feature maps",
    "l2": "cross-entropy + l2 between feature maps, pixel by pixel",
    "tfd": "cross-entropy + squared error between feature maps, deep channels cropped (Tf-FD)",
    "byot": "classifiers on the stages, taught by the last one (BYOT)",
    "pskd": "labels softened by the predictions of the epoch before (PS-KD)",
    "cskd": "cross-entropy + divergence from the prediction for another image of the class (CS-KD)",
    "tfkd": "cross-entropy + divergence from a virtual teacher (Tf-KD)",
    "ols": "labels softened by the mean prediction for their class (OLS)",
    "cutmix": "cross-entropy, with a part of each image from another one (CutMix)",
}
# Arms that teach by feature maps with --emd-weight, and what --distill and --temperature are where they are not given.
FEATURE_ARMS = ("sfr", "emd", "l2", "tfd")
DISTILL = {"byot": 0.1, "pskd": 0.8, "cskd": 1.0, "tfkd": 0.1, "ols": 0.5}
TEMPERATURE = {"byot": 3.0, "cskd": 4.0, "tfkd": 20.0}
# The arms that an option is for, where it is not for all; and what else uses it.
_EMD_ARMS = ("sfr", "emd")
FOR_ARMS: dict[str, tuple[str, ...]] = {
    "emd_weight": FEATURE_ARMS,
    "emd_warmup": FEATURE_ARMS,
    "layers": (*FEATURE_ARMS, "byot"),
    "pairs": FEATURE_ARMS,
    "channel_mode": ("sfr", "emd", "l2"),
    "solver": _EMD_ARMS,
    "eps": _EMD_ARMS,
    "objective": _EMD_ARMS,
    "distill": tuple(DISTILL),
    "temperature": tuple(TEMPERATURE),
    "hint": ("byot",),
    "smoothing": ("ls", "dls", "sfr"),
    "schedule": ("dls", "sfr"),
    "prior": ("dls", "sfr"),
}
FOR_MONITOR = ("layers", "pairs", "channel_mode", "solver", "eps", "objective")
FOR_PROBE = ("layers",)
PRECISIONS = ("32", "bf16-mixed", "16-mixed", "64")

LAST_CHECKPOINT = Path("checkpoints") / "last.ckpt"  # of OUT
KEPT_OPTIONS = LAST_CHECKPOINT.with_name("options.json")
PREVIOUS_CHECKPOINT = LAST_CHECKPOINT.with_name("previous.ckpt")  # the one before

LARGEST_SEED = 2**32 - 1  # that NumPy and torch both take

SAME = "same"  # a resumed run must have what its beginning had: it would train something else otherwise
FREE = "free"  # says where and how the work is done, not what is trained
GROW = "grow"  # may become larger

# What is wrong with a value, as the words after "must be"; None when nothing is.
Check = Callable[[Any], str | None]


@dataclass(frozen=True)
class Option:
    """What is known of one option beside its name, type and default."""

    group: str
    help: str
    on_resume: str
    check: Check | None = None
    choices: tuple[str, ...] | None = None
    metavar: str | None = None
    before: Any = None  # what runs had that are older than the option; None: its default


def option(default: Any, group: str, help: str, on_resume: str, **more: Any) -> Any:
    """A field of :class:`TrainConfig`; :func:`options` finds its declaration."""
    return field(default=default, metadata={"option": Option(group, help, on_resume, **more)})


def whole(least: int, most: int = 2**31 - 1) -> Check:
    """A whole number in a range."""

    def check(value: Any) -> str | None:
        if not isinstance(value, int) or isinstance(value, bool):
            return "a whole number"
        if value < least:
            return f"at least {least}"
        return f"at most {most}" if value > most else None

    return check


def finite(least: float, *, above: bool = False) -> Check:
    """A finite number from ``least`` on, or above it."""

    def check(value: Any) -> str | None:
        if not (value > least if above else value >= least):
            return f"{'above' if above else 'at least'} {least}"
        return None if math.isfinite(value) else "finite"

    return check


def share(value: Any) -> str | None:
    """A number from 0 to 1."""
    return None if 0 <= value <= 1 else "in [0, 1]"


def less_than_1(value: Any) -> str | None:
    """A number from 0 on, below 1."""
    return None if 0 <= value < 1 else "in [0, 1)"


def names(value: Any) -> str | None:
    """At least one, none of them empty."""
    return None if value and all(value) else "names of layers"


def devices(value: Any) -> str | None:
    """A count in the digits that ``int`` takes everywhere, or "auto"."""
    count = value.isascii() and value.isdecimal() and int(value) >= 1
    return None if value == "auto" or count else "a number from 1 or 'auto'"


@dataclass(frozen=True)
class TrainConfig:
    """Options of one run; the names are those of the flags of ``sfr-ext train``.

    Raises:
        UsageError: a value that is not allowed.
    """

    data: str = option("digits", "data", "data set", SAME, choices=DATA)
    data_dir: Path | None = option(
        None,
        "data",
        "folder that holds it, or into which it is downloaded; of hf a folder or a name",
        FREE,
        metavar="DIR",
    )
    limit: int | None = option(None, "data", "train on N images only", SAME, check=whole(1), metavar="N")
    label_noise: float = option(
        0.0,
        "data",
        "share of the training labels, held-out ones too, that are replaced by other classes",
        SAME,
        check=less_than_1,
        metavar="SHARE",
    )
    image_size: int = option(64, "data", "of imagefolder and hf, in pixels", SAME, check=whole(1))
    augment: bool = option(True, "data", "random crops and mirroring", SAME)
    mixup: float = option(
        0.0, "data", "mix pairs of images, by a share from Beta(X, X); 0: none", SAME, check=finite(0)
    )
    validation: float = option(
        0.0,
        "data",
        "share of the training images to hold out: the best epoch by them is tested, once",
        SAME,
        check=less_than_1,
        metavar="SHARE",
    )

    arch: str = option("resnet8", "model and method", "resnet8, 14, 20, 26, 32, 18; torchvision's, timm's", SAME)
    pretrained: bool = option(False, "model and method", "begin with timm's weights, downloaded", SAME)
    arm: str = option(
        "sfr", "model and method", "; ".join(f"{k}: {v}" for k, v in ARMS.items()), SAME, choices=tuple(ARMS)
    )
    emd_weight: float = option(1.0, "model and method", "factor on the feature loss", SAME, check=finite(0))
    emd_warmup: float = option(
        1.0, "model and method", "over which that factor rises", SAME, check=finite(0), metavar="EPOCHS"
    )
    layers: tuple[str, ...] | None = option(
        None,
        "model and method",
        "layers to compare, shallow to deep (default: all stages, or those that sfr-ext layers suggests)",
        SAME,
        check=names,
        metavar="A,B,...",
    )
    pairs: str = option("all", "model and method", "which layers teach which", SAME, choices=("all", "last"))
    channel_mode: str = option(
        "match",
        "model and method",
        "how many deep channels face few shallow ones",
        SAME,
        choices=("match", "mean", "crop", "project"),
    )
    solver: str = option(
        "exact",
        "model and method",
        "of the EMD: exact, or sinkhorn with --eps",
        SAME,
        choices=("exact", "sinkhorn"),
        before="sinkhorn",
    )
    eps: float | None = option(
        None,
        "model and method",
        "regularisation of sinkhorn, in standard deviations of cost (default: 0.05)",
        SAME,
        check=finite(0, above=True),
        metavar="X",
        before=0.05,
    )
    objective: str = option(
        "transport",
        "model and method",
        "of sinkhorn: transport, or divergence, which is 0 between equal maps",
        SAME,
        choices=("transport", "divergence"),
    )
    distill: float | None = option(
        None,
        "model and method",
        "weight of the target that is not the label, in byot, pskd, cskd, tfkd, ols (default: as published)",
        SAME,
        check=finite(0),
        metavar="X",
    )
    temperature: float | None = option(
        None,
        "model and method",
        "by which predictions are softened in byot, cskd, tfkd (default: as published)",
        SAME,
        check=finite(0, above=True),
        metavar="X",
    )
    hint: float = option(
        1.28e-4,
        "model and method",
        "of byot: weight of the squared difference between each stage's features and the last one's",
        SAME,
        check=finite(0),
    )
    smoothing: float = option(0.1, "model and method", "largest label smoothing", SAME, check=share)
    schedule: str = option(
        "linear", "model and method", "of dynamic smoothing", SAME, choices=("linear", "cosine", "constant")
    )
    prior: str = option(
        "uniform", "model and method", "where the smoothed mass goes", SAME, choices=("uniform", "online")
    )

    epochs: int = option(10, "training", "passes over the training images", GROW, check=whole(1))
    batch_size: int = option(128, "training", "per device", SAME, check=whole(1))
    accumulate: int = option(1, "training", "batches whose gradients make one step", SAME, check=whole(1), metavar="N")
    optimizer: str = option("sgd", "training", "sgd (Nesterov momentum 0.9) or adamw", SAME, choices=("sgd", "adamw"))
    lr: float = option(0.1, "training", "largest learning rate", SAME, check=finite(0, above=True))
    weight_decay: float = option(5e-4, "training", "of all parameters", SAME, check=finite(0))
    ema: float | None = option(
        None,
        "training",
        "test a moving average of the weights, which keeps this share of itself in each step (0.999, say)",
        SAME,
        check=less_than_1,
        metavar="SHARE",
    )
    test_every: int = option(
        1, "training", "epochs from one test to the next, a divisor of --epochs", SAME, check=whole(1), metavar="N"
    )
    precision: str = option("32", "training", "bits of the network's arithmetic", SAME, choices=PRECISIONS)
    seed: int = option(0, "training", "of everything that is random", SAME, check=whole(0, LARGEST_SEED))

    out: Path = option(None, "run", "folder for everything written (default: runs/ARM-DATA-SEED)", FREE, metavar="DIR")
    resume: Path | None = option(
        None,
        "run",
        "go on with the run of this folder or checkpoint, with its options; without a name, of OUT",
        FREE,
        metavar="CHECKPOINT",
    )
    overwrite: bool = option(False, "run", "replace the run that OUT holds", FREE)
    devices: str = option("1", "run", "how many, or auto", FREE, check=devices, metavar="N")
    strategy: str = option(
        "ddp",
        "run",
        "of several devices: each with all parameters (ddp), or with a share of them (fsdp2)",
        FREE,
        choices=("ddp", "fsdp2"),
    )
    accelerator: str = option("auto", "run", "where to train", FREE, choices=("auto", "cpu", "gpu"))
    workers: int | None = option(
        None,
        "run",
        "processes that read files (default: none for images in memory, else one a core up to 8)",
        FREE,
        check=whole(0, 1024),
        metavar="N",
    )
    nodes: int = option(1, "run", "machines", FREE, check=whole(1))
    compile: bool = option(False, "run", "compile the network by torch.compile", FREE)
    progress: bool | None = option(None, "run", "a bar (default: on a terminal)", FREE)
    tensorboard: bool | None = option(
        None, "run", "also write OUT/tensorboard (default: where TensorBoard is installed)", FREE
    )
    probe: bool = option(False, "run", "at the end, how much a linear classifier finds in each layer's features", FREE)
    monitor: bool = option(
        False, "run", "save how an image's patches are matched between layers, by epoch: OUT/monitor.png", FREE
    )

    def __post_init__(self) -> None:
        out: Any = self.out
        if out is None:
            object.__setattr__(self, "out", Path("runs") / f"{self.arm}-{self.data}-{self.seed}")
        for name, declared in options().items():
            value = getattr(self, name)
            if value is None and not may_be_none(name):
                raise UsageError(f"{flag(name)} must be {wanted_of(name)}, got nothing")
            if declared.choices is not None and value not in declared.choices:
                raise UsageError(f"{flag(name)} must be one of {', '.join(declared.choices)}, got {value!r}")
            if declared.check is not None and value is not None and (wanted := declared.check(value)) is not None:
                raise UsageError(f"{flag(name)} must be {wanted}, got {value!r}")
        if self.epochs % self.test_every:
            raise UsageError(f"--test-every must be a divisor of --epochs {self.epochs}, got {self.test_every}")
        if self.resume is not None and self.overwrite:
            raise UsageError("--resume continues a run and --overwrite begins it anew: give one of them")
        if self.solver == "exact" and self.eps is not None:
            raise UsageError(f"--eps is for --solver sinkhorn, got {self.eps} with --solver exact")
        if self.solver == "exact" and self.objective != "transport":
            raise UsageError(f"--objective {self.objective} is for --solver sinkhorn, got it with --solver exact")
        if self.solver == "sinkhorn" and self.eps is None:
            object.__setattr__(self, "eps", 0.05)
        if self.probe and self.compile:
            raise UsageError("--probe looks into the network, into which --compile lets nobody look: give one of them")
        for name in ("distill", "temperature"):
            self._refuse_idle(name)
        if self.distill is not None and self.distill > 1 and self.arm != "cskd":
            raise UsageError(f"--distill must be a share, in [0, 1], for --arm {self.arm}, got {self.distill}")
        if self.mixup > 0 and (self.arm in DISTILL or self.arm == "cutmix"):
            raise UsageError(f"--mixup mixes labels, which --arm {self.arm} must have as they are or mixes itself")
        if self.mixup > 0 and self.prior == "online":
            raise UsageError("--mixup makes probabilities of the labels, from which --prior online cannot learn")

    def refuse_idle(self, named: Container[str] = ()) -> None:
        """Raises UsageError where an option does nothing that is changed, or ``named``, be it with its default.

        (A study may give some to all its arms.)
        """
        for name in FOR_ARMS:
            self._refuse_idle(name, name in named)

    def _refuse_idle(self, name: str, named: bool = False) -> None:
        given, default = getattr(self, name), TrainConfig.__dataclass_fields__[name].default
        used = (self.monitor and name in FOR_MONITOR) or (self.probe and name in FOR_PROBE)
        if (named or given != default) and self.arm not in FOR_ARMS[name] and not used:
            raise UsageError(f"{flag(name)} is for --arm {', '.join(FOR_ARMS[name])}, got it with --arm {self.arm}")

    def to_keep(self) -> dict[str, Any]:
        """What is left beside the checkpoints, as values of JSON: the options without those of one start of the run."""
        once = ("out", "resume", "overwrite", "progress")
        kept = {name: getattr(self, name) for name in options() if name not in once}
        return {name: str(value) if isinstance(value, Path) else value for name, value in kept.items()}

    def emd_options(self) -> dict[str, Any]:
        """Of the EMD between feature maps, for those who compute it."""
        return {"solver": "exact"} if self.solver == "exact" else {"eps": self.eps, "objective": self.objective}

    def identity(self) -> dict[str, Any]:
        """The options that a resumed run must share with its beginning, as plain values."""
        return {name: getattr(self, name) for name, declared in options().items() if declared.on_resume == SAME}


def options() -> dict[str, Option]:
    """The declaration of each option, by its name."""
    return {f.name: f.metadata["option"] for f in fields(TrainConfig)}


@cache
def may_be_none(name: str) -> bool:
    """Whether None stands for something: no limit, a default that depends on others, ..."""
    return name == "out" or type(None) in get_args(get_type_hints(TrainConfig)[name])


def wanted_of(name: str) -> str:
    """The kind of an option's value, in words."""
    declared, hint = options()[name], get_type_hints(TrainConfig)[name]
    if declared.choices is not None:
        return f"one of {', '.join(declared.choices)}"
    return {bool: "true or false", int: "a whole number", float: "a number"}.get(hint, "a name")


def flag(name: str) -> str:
    """The flag of an option: ``batch_size`` is ``--batch-size``."""
    return "--" + name.replace("_", "-")


def counted(number: int, word: str) -> str:
    """``1 epoch``, ``2 epochs``."""
    return f"{number} {word}" if number == 1 else f"{number} {word}s"


def near_misses(word: str, known: list[str]) -> str:
    """``"; near to it: ..."`` with the known words like ``word``, or nothing."""
    close = difflib.get_close_matches(word, known, n=3)
    return f"; near to it: {', '.join(close)}" if close else ""
