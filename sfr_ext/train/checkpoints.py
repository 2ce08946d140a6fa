"""Checkpoints that outlive their writer: one is always whole, and one that is not is told apart from a foreign file."""

from __future__ import annotations

import io
import pickle
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch

from .config import LAST_CHECKPOINT, PREVIOUS_CHECKPOINT
from .engine import TorchCheckpointIO
from .errors import TrainError
from .files import atomic_write


class KeepingIO(TorchCheckpointIO):
    """Writes a checkpoint beside its target and renames it; the one before stays as ``previous.ckpt``."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        # In memory first: torch's writer answers a full disk with an error of its own that does not say so.
        whole = io.BytesIO()
        torch.save(checkpoint, whole)
        path = Path(path)
        with atomic_write(path, keep=path.with_name(PREVIOUS_CHECKPOINT.name)) as temporary:
            temporary.write_bytes(whole.getbuffer())


def find_checkpoint(path: Path) -> tuple[Path, dict[str, Any], str | None]:
    """The checkpoint at ``path``, or the one before it where that one is damaged or gone.

    Returns:
        Its path, its content, and what there is to say if it is not at ``path``.

    Raises:
        TrainError: neither can be used; the first reason is told.
    """
    try:
        return path, read_checkpoint(path), None
    except TrainError as error:
        before = path.with_name(PREVIOUS_CHECKPOINT.name)
        if path.name != LAST_CHECKPOINT.name or not before.is_file():
            raise
        try:
            content = read_checkpoint(before)
        except TrainError:
            raise TrainError(f"{error}, and the one before it, {before}, cannot be used either") from error
        done = content["epoch"] + 1
        return before, content, f"{error}; going on from the one before it, {before}, after epoch {done}"


def read_checkpoint(path: Path, flag: str = "--resume") -> dict[str, Any]:
    """The content of a checkpoint of ``sfr-ext train``; every byte is checked. ``flag`` is named by errors.

    Raises:
        TrainError: the file does not exist, is damaged, or is something else.
    """
    if not path.is_file():
        raise TrainError(f"{flag}: {path} does not exist")
    foreign = TrainError(f"{flag}: {path} is not a checkpoint of sfr-ext train")
    try:
        with path.open("rb") as file:
            start = file.read(4)
        # A checkpoint is a zip file. Files end up empty or full of zeros when a machine stops before they were on disk.
        if start.strip(b"\0") and not b"PK\x03\x04".startswith(start):
            raise foreign
        with zipfile.ZipFile(path) as file:
            if (member := file.testzip()) is not None:
                raise TrainError(f"{flag}: {path} is damaged (wrong checksum of {member})")
    except OSError as error:
        raise TrainError(f"{flag}: {path} cannot be read: {error.strerror or error}") from error
    except (zipfile.BadZipFile, NotImplementedError, EOFError, ValueError, zlib.error) as error:
        raise TrainError(f"{flag}: {path} is damaged (it ends early, or bytes in it were changed)") from error
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise foreign from error
    ours = isinstance(content, dict) and isinstance(content.get("sfr_ext"), dict)
    whole = ours and isinstance(content.get("epoch"), int) and {"state_dict", "optimizer_states"} <= content.keys()
    if not whole:
        raise foreign
    return dict(content)
