"""Data sets of the ``datasets`` library, from disk or by their name on its hub; rows are decoded when asked for."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..extras import how_to_install
from .classes import differing
from .errors import TrainError, UsageError
from .images import read_image
from .optional import import_optional

_HELD_OUT = ("test", "validation", "val", "valid")
_LABELS = ("label", "labels", "fine_label")


@dataclass(frozen=True)
class Rows:
    """Images of one part of a data set: rows of a table, of which an image is read when it is asked for."""

    table: Any  # datasets.Dataset with one column, of encoded bytes or paths
    column: str
    name: str
    places: Tensor  # in the table
    labels: Tensor

    def at(self, kept: Tensor) -> Rows:
        """Those at these places."""
        return Rows(self.table, self.column, self.name, self.places[kept], self.labels[kept])

    def image(self, place: int) -> Any:
        """As ``PIL.Image`` of mode RGB."""
        row = int(self.places[place])
        found = self.table[row][self.column]
        if not found or not (found["bytes"] or found["path"]):
            raise TrainError(f"image {row} of {self.name} cannot be read: it is empty")
        return read_image(
            io.BytesIO(found["bytes"]) if found["bytes"] else found["path"], f"image {row} of {self.name}"
        )


def load_rows(place: Path | None) -> tuple[Rows, Rows, tuple[str, ...], str]:
    """Training and test images, the names of the classes, and where they came from.

    Args:
        place: a folder that ``save_to_disk`` has written or ``load_dataset`` takes, or a name on the hub, from where it
            is downloaded unless the library's cache has it.

    Raises:
        TrainError: a missing package, a data set that cannot be had or has no such parts or columns.
    """
    if place is None:
        raise UsageError("hf: --data-dir is needed, a folder or the name of a data set on the hub")
    library, reason = import_optional("datasets")
    if library is None:
        raise TrainError(f"--data hf needs the library datasets ({reason}): {how_to_install('hf', 'datasets', 'PIL')}")
    if import_optional("PIL.Image")[0] is None:
        raise TrainError("--data hf needs pillow, not installed here: pip install pillow")
    saved = any((place / name).is_file() for name in ("dataset_dict.json", "state.json"))
    try:
        found = library.load_from_disk(str(place)) if saved else library.load_dataset(str(place))
    except Exception as error:  # of many kinds: connections, formats, names that nobody has
        raise TrainError(f"hf: {place} cannot be loaded: {_first_line(error)}") from error
    parts = dict(found) if isinstance(found, dict) else {}
    held_out = next((name for name in _HELD_OUT if name in parts), None)
    if "train" not in parts or held_out is None:
        came = ", ".join(parts) or "one part without a name"
        raise TrainError(f"hf: {place} must have the parts train and test (or validation), got {came}")
    image, label = _columns(library, parts["train"].features, str(place))
    names = parts["train"].features[label].names
    if parts[held_out].features.get(label) != parts["train"].features[label]:
        theirs = getattr(parts[held_out].features.get(label), "names", None)
        which = (
            differing(names, theirs, "train", held_out) if theirs else f"{held_out} has no names of them at {label!r}"
        )
        raise TrainError(f"hf: the parts train and {held_out} of {place} do not have the same classes: {which}")
    train, test = (
        _rows(library, parts[part], image, label, f"{part} of {place}", len(names)) for part in ("train", held_out)
    )
    return train, test, tuple(names), str(place)


def _columns(library: Any, features: Any, place: str) -> tuple[str, str]:
    """The columns of images and of class numbers."""
    images = [name for name, kind in features.items() if isinstance(kind, library.Image)]
    labels = [name for name, kind in features.items() if isinstance(kind, library.ClassLabel)]
    labels = [name for name in _LABELS if name in labels][:1] or labels
    if len(images) != 1 or len(labels) != 1:
        came = ", ".join(f"{name} ({type(kind).__name__})" for name, kind in features.items())
        raise TrainError(
            f"hf: {place} must have one column of images (Image) and one of classes (ClassLabel), got {came}"
        )
    return images[0], labels[0]


def _rows(library: Any, part: Any, image: str, label: str, name: str, num_classes: int) -> Rows:
    labels = torch.as_tensor(part.with_format("numpy")[label][:]).long()
    if len(labels) == 0:
        raise TrainError(f"hf: {name} holds no image")
    if not bool(((labels >= 0) & (labels < num_classes)).all()):
        raise TrainError(f"hf: {name} has images without a class")
    table = part.with_format(None).select_columns([image]).cast_column(image, library.Image(decode=False))
    return Rows(table, image, name, torch.arange(len(labels)), labels)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
