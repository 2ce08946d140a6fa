"""Folders of image files, decoded when asked for, in worker processes: memory does not grow with their number."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .errors import TrainError
from .hub import Rows
from .images import read_image

SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
# Of ImageNet's training images; what networks with weights from there expect.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Where an image is tested, the square that is kept is 224 of the 256 pixels of its shorter side.
TEST_SHARE = 224 / 256


class Names:
    """Many short strings in two arrays. Millions of Python's strings would be copied into every worker, one by one."""

    def __init__(self, names: list[str]) -> None:
        whole = [os.fsencode(name) for name in names]
        self.ends = np.cumsum([0, *map(len, whole)])
        self.text = np.frombuffer(b"".join(whole), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, i: int) -> str:
        return os.fsdecode(self.text[self.ends[i] : self.ends[i + 1]].tobytes())

    def at(self, kept: Tensor) -> Names:
        """Those at these places."""
        return Names([self[i] for i in kept.tolist()])


@dataclass(frozen=True)
class Files:
    """The images of one part of a data set: paths below ``folder``, and labels ``[N]``."""

    folder: Path
    names: Names
    labels: Tensor

    def at(self, kept: Tensor) -> Files:
        """Those at these places."""
        return Files(self.folder, self.names.at(kept), self.labels[kept])

    def image(self, place: int) -> Any:
        """As ``PIL.Image`` of mode RGB."""
        return read_image(self.folder / self.names[place])


def find_files(folder: Path) -> tuple[Files, tuple[str, ...]]:
    """All images below ``folder/<class>/``, sorted by class and name, and the names of the classes.

    Hidden files and folders are those of programs, such as ``.ipynb_checkpoints``, and are passed over. Links are
    followed, to each folder once in a class.

    Raises:
        TrainError: a folder that cannot be read, without classes, or with a class without images.
    """
    names: list[str] = []
    counts: list[int] = []
    try:
        classes = tuple(
            sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not _hidden(entry.name))
        )
        for name in classes:
            before = len(names)
            for below, files in _walk(folder, name):
                images = [file for file in files if file.lower().endswith(SUFFIXES)]
                names += [os.path.join(below, file) for file in images]
            counts.append(len(names) - before)
            if counts[-1] == 0:
                raise TrainError(f"imagefolder: {folder / name} holds no image ({', '.join(SUFFIXES)})")
    except OSError as error:
        raise TrainError(f"imagefolder: {error.filename or folder} cannot be read: {error.strerror}") from error
    if not classes:
        raise TrainError(f"imagefolder: {folder} holds no folders, one of which stands for a class")
    labels = torch.arange(len(classes)).repeat_interleave(torch.tensor(counts))
    return Files(folder, Names(names), labels), classes


def _walk(folder: Path, name: str) -> Iterator[tuple[str, list[str]]]:
    """Paths below the folder, from the one of that name down, through links, with their files, all in order.

    Each folder once, by whichever way comes first, and not the one around all: the ways through links may be endless.

    Raises:
        OSError: one of them cannot be read.
    """
    seen = {_identity(folder)}
    waiting = [name]
    while waiting:
        below = waiting.pop()
        here = folder / below
        if (identity := _identity(here)) in seen:
            continue
        seen.add(identity)
        with os.scandir(here) as found:
            entries = sorted((entry for entry in found if not _hidden(entry.name)), key=lambda entry: entry.name)
        yield below, [entry.name for entry in entries if not entry.is_dir()]
        waiting += [os.path.join(below, entry.name) for entry in reversed(entries) if entry.is_dir()]


def _identity(folder: Path) -> tuple[int, int]:
    here = folder.stat()
    return here.st_dev, here.st_ino


def _hidden(name: str) -> bool:
    return name.startswith(".")


class FileImages(Dataset[Any]):
    """Images of ``size`` pixels a side from their files or rows, a batch at a time.

    An index is a pair of epoch and place: what is random of an image depends on seed, epoch and place alone, and not on
    the worker that reads it. Place -1 gives a place filler.
    """

    def __init__(self, files: Files | Rows, size: int, seed: int, augment: bool, filler_label: int) -> None:
        self.files, self.size, self.seed = files, size, seed
        self.augment = augment
        self.filler_label = filler_label

    def __len__(self) -> int:
        return len(self.files.labels)

    def __getitems__(self, indices: list[tuple[int, int]]) -> tuple[Tensor, Tensor] | str:
        """uint8 ``[B, 3, size, size]`` and labels ``[B]``; or the sentence about a file that cannot be read."""
        images = torch.zeros(len(indices), 3, self.size, self.size, dtype=torch.uint8)
        labels = torch.full((len(indices),), self.filler_label)
        try:
            for i, (epoch, place) in enumerate(indices):
                if place >= 0:
                    images[i] = self._image(epoch, place)
                    labels[i] = self.files.labels[place]
        except TrainError as error:  # raised here, it would reach the run wrapped in a worker's traceback
            return str(error)
        return images, labels

    def _image(self, epoch: int, place: int) -> Tensor:
        image = self.files.image(place)
        width, height = image.size
        random = np.random.default_rng((self.seed, epoch, place)) if self.augment else None
        box = centre_box(width, height) if random is None else random_box(width, height, random)
        square = image.resize((self.size, self.size), resample=2, box=box, reducing_gap=3.0)  # 2: bilinear
        pixels = np.asarray(square)
        if random is not None and random.random() < 0.5:
            pixels = pixels[:, ::-1]
        return torch.from_numpy(pixels.copy()).permute(2, 0, 1)


def centre_box(width: int, height: int) -> tuple[float, float, float, float]:
    """The middle square whose side is 224/256 of the shorter one."""
    side = min(width, height) * TEST_SHARE
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def random_box(width: int, height: int, random: np.random.Generator) -> tuple[float, float, float, float]:
    """A part of 8 to 100 percent of the area, of sides 3:4 to 4:3, at a random place.

    Szegedy et al.: "Going deeper with convolutions", CVPR 2015, section 6; after ten tries that do not fit into the
    image the largest middle part of such sides.
    """
    for _ in range(10):
        area = width * height * random.uniform(0.08, 1.0)
        ratio = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
        across, down = math.sqrt(area * ratio), math.sqrt(area / ratio)
        if across <= width and down <= height:
            left, top = random.uniform(0, width - across), random.uniform(0, height - down)
            return left, top, left + across, top + down
    across, down = min(width, height * 4 / 3), min(height, width * 4 / 3)
    left, top = (width - across) / 2, (height - down) / 2
    return left, top, left + across, top + down
