"""The data sets: small ones whole, in memory, as bytes; folders of files as lists of what is there."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import fashion_mnist, folder
from .classes import differing
from .config import TrainConfig
from .errors import TrainError, UsageError
from .folder import Files, find_files
from .hub import Rows, load_rows
from .optional import import_optional


@dataclass(frozen=True)
class ImageData:
    """A classification data set.

    ``images``: uint8 ``[N, C, H, W]``; ``labels``: int64 ``[N]``; ``mean`` and ``std`` of the training images
    on the scale 0..1, per channel. ``padding`` and ``flip`` say which augmentation suits it: random crops
    after padding by that many pixels, random mirroring. ``source``: where it came from.
    """

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    padding: int
    flip: bool
    source: str
    class_names: tuple[str, ...]
    held_out: tuple[Tensor, Tensor] | None = None  # images and labels to validate by

    @property
    def channels(self) -> int:
        return int(self.train_images.shape[1])

    @property
    def held_out_labels(self) -> Tensor | None:
        return None if self.held_out is None else self.held_out[1]

    def at(self, kept: Tensor) -> ImageData:
        """With the training images at these places."""
        return replace(self, train_images=self.train_images[kept], train_labels=self.train_labels[kept])

    def holding_out(self, places: Tensor) -> ImageData:
        """These training images to validate by."""
        return replace(self, held_out=(self.train_images[places], self.train_labels[places]))

    def labelled(self, labels: Tensor) -> ImageData:
        """With these training labels."""
        return replace(self, train_labels=labels)

    def identity(self) -> dict[str, Any]:
        """What a resumed run must find as it was, in words."""
        return {"classes": self.num_classes, "channels": self.channels, **_counts(self)}


@dataclass(frozen=True)
class FolderData:
    """A classification data set in files or rows of a table: what :class:`ImageData` says of it, but the images."""

    train: Files | Rows
    test: Files | Rows
    class_names: tuple[str, ...]
    size: int
    source: str
    held_out: Files | Rows | None = None
    mean = folder.MEAN
    std = folder.STD
    channels = 3

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def train_labels(self) -> Tensor:
        return self.train.labels

    @property
    def test_labels(self) -> Tensor:
        return self.test.labels

    @property
    def held_out_labels(self) -> Tensor | None:
        return None if self.held_out is None else self.held_out.labels

    def at(self, kept: Tensor) -> FolderData:
        """With the training images at these places."""
        return replace(self, train=self.train.at(kept))

    def holding_out(self, places: Tensor) -> FolderData:
        """These training images to validate by."""
        return replace(self, held_out=self.train.at(places))

    def labelled(self, labels: Tensor) -> FolderData:
        """With these training labels."""
        return replace(self, train=replace(self.train, labels=labels))

    def identity(self) -> dict[str, Any]:
        """What a resumed run must find as it was, in words."""
        return {"classes": ", ".join(self.class_names), **_counts(self)}


def _counts(data: ImageData | FolderData) -> dict[str, int]:
    counts = {"training images": len(data.train_labels), "test images": len(data.test_labels)}
    return counts if data.held_out_labels is None else {**counts, "validation images": len(data.held_out_labels)}


def load_data(config: TrainConfig) -> ImageData | FolderData:
    """The data set that ``config`` names; with ``limit``, the first so many images of a permutation fixed by
    the seed, and with ``label_noise`` so many of their labels replaced. Both follow from the seed alone: all arms see
    the same.

    The test images are never limited, and their labels are right.

    Raises:
        TrainError: a missing or corrupt file, a missing package.
    """
    loaders: dict[str, Callable[[TrainConfig], ImageData | FolderData]] = {
        "digits": _digits,
        "fashion-mnist": _fashion_mnist,
        "cifar10": _cifar,
        "cifar100": _cifar,
        "imagefolder": _image_folder,
        "hf": _hugging_face,
    }
    data = loaders[config.data](config)
    generator = torch.Generator().manual_seed(config.seed)
    if config.limit is not None and config.limit < len(data.train_labels):
        data = data.at(torch.randperm(len(data.train_labels), generator=generator)[: config.limit])
    if config.label_noise > 0:
        data = data.labelled(noisy_labels(data.train_labels, data.num_classes, config.label_noise, config.seed))
    if config.validation == 0:
        return data
    count = len(data.train_labels)
    held_out = round(config.validation * count)
    if not 0 < held_out < count:
        raise TrainError(f"--validation {config.validation} of {count} training images leaves one of both without any")
    order = torch.randperm(count, generator=generator)
    return data.holding_out(order[:held_out]).at(order[held_out:].sort().values)


def noisy_labels(labels: Tensor, num_classes: int, share: float, seed: int) -> Tensor:
    """Symmetric label noise: a share of the labels, each replaced by one of the other classes, all equally likely.

    Raises:
        TrainError: there is no other class.
    """
    if num_classes < 2:
        raise TrainError(f"--label-noise {share} needs two classes, the data has {num_classes}")
    random = np.random.default_rng((seed, 1))
    wrong = torch.from_numpy(random.permutation(len(labels))[: round(share * len(labels))])
    steps = torch.from_numpy(random.integers(1, num_classes, len(wrong)))
    noisy = labels.clone()
    noisy[wrong] = (labels[wrong] + steps) % num_classes
    return noisy


def _digits(config: TrainConfig) -> ImageData:
    """1797 handwritten digits of 8 x 8 pixels, in scikit-learn; every fifth is for testing."""
    bunch = importlib.import_module("sklearn.datasets").load_digits()
    images = torch.from_numpy(np.round(bunch.images * (255.0 / 16.0)).astype(np.uint8)).unsqueeze(1)
    labels = torch.from_numpy(bunch.target).long()
    test = torch.arange(len(labels)) % 5 == 4
    return _pack(images[~test], labels[~test], images[test], labels[test], padding=1, flip=False, source="scikit-learn")


def _fashion_mnist(config: TrainConfig) -> ImageData:
    arrays, source = fashion_mnist.load(config.data_dir)
    images = {k: torch.from_numpy(v.copy()).unsqueeze(1) for k, v in arrays.items() if "images" in k}
    labels = {k: torch.from_numpy(v.astype(np.int64)) for k, v in arrays.items() if "labels" in k}
    return _pack(
        images["train-images-idx3-ubyte.gz"],
        labels["train-labels-idx1-ubyte.gz"],
        images["t10k-images-idx3-ubyte.gz"],
        labels["t10k-labels-idx1-ubyte.gz"],
        padding=2,
        flip=True,
        source=source,
        class_names=fashion_mnist.CLASSES,
    )


def _cifar(config: TrainConfig) -> ImageData:
    """CIFAR-10 or CIFAR-100 by torchvision, downloaded into ``data_dir`` (default: the user's cache)."""
    datasets = _torchvision_datasets(config.data)
    folder = config.data_dir or fashion_mnist.cache_dir().parent / "cifar"
    factory = datasets.CIFAR10 if config.data == "cifar10" else datasets.CIFAR100
    try:
        train, test = (factory(str(folder), train=part, download=True) for part in (True, False))
    except (OSError, RuntimeError) as error:
        raise TrainError(f"{config.data}: cannot be read from or downloaded into {folder}: {error}") from error
    names = getattr(train, "classes", ())
    parts = (*_cifar_part(train), *_cifar_part(test))
    return _pack(*parts, padding=4, flip=True, source=str(folder), class_names=names)


def _cifar_part(part: Any) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(part.targets)


def _image_folder(config: TrainConfig) -> FolderData:
    """DIR/train/<class>/*, DIR/test/<class>/* (or DIR/val)."""
    root = config.data_dir
    if root is None:
        raise UsageError("imagefolder: --data-dir is needed, a folder with train/ and test/ in it")
    held_out = next((root / name for name in ("test", "val") if (root / name).is_dir()), root / "test")
    for part in (root / "train", held_out):
        if not part.is_dir():
            raise TrainError(f"imagefolder: {part} does not exist; {root} must hold train/ and test/ (or val/)")
    if import_optional("PIL.Image")[0] is None:
        raise TrainError("--data imagefolder needs pillow, not installed here: pip install pillow")
    (train, classes), (test, test_classes) = find_files(root / "train"), find_files(held_out)
    if classes != test_classes:
        which = differing(classes, test_classes, "train", held_out.name)
        raise TrainError(f"imagefolder: {root / 'train'} and {held_out} do not have the same classes: {which}")
    return FolderData(train, test, classes, config.image_size, str(root))


def _hugging_face(config: TrainConfig) -> FolderData:
    train, test, classes, source = load_rows(config.data_dir)
    return FolderData(train, test, classes, config.image_size, source)


def _torchvision_datasets(name: str) -> Any:
    datasets, reason = import_optional("torchvision.datasets")
    if datasets is None:
        raise TrainError(f"--data {name} needs torchvision: {reason}")
    return datasets


def _pack(
    train_images: Tensor,
    train_labels: Tensor,
    test_images: Tensor,
    test_labels: Tensor,
    *,
    padding: int,
    flip: bool,
    source: str,
    class_names: Sequence[str] = (),
) -> ImageData:
    num_classes = int(max(train_labels.max(), test_labels.max())) + 1
    # From a histogram per channel: a float copy of all images would be four times their size.
    mean, std = [], []
    levels = torch.arange(256, dtype=torch.float64) / 255
    for channel in range(train_images.shape[1]):
        share = torch.bincount(train_images[:, channel].flatten().int(), minlength=256).double()
        share /= share.sum()
        centre = float((share * levels).sum())
        mean.append(centre)
        std.append(max(float((share * (levels - centre) ** 2).sum()) ** 0.5, 1e-3))
    return ImageData(
        train_images=train_images,
        train_labels=train_labels,
        test_images=test_images,
        test_labels=test_labels,
        num_classes=num_classes,
        mean=tuple(mean),
        std=tuple(std),
        padding=padding,
        flip=flip,
        source=source,
        class_names=tuple(class_names or map(str, range(num_classes))),
    )
