"""One image file, read as 8-bit RGB."""

from __future__ import annotations

import io
import os
import stat
from pathlib import Path
from typing import Any

import numpy as np

from .errors import TrainError


def read_image(path: Path | str | io.BytesIO, name: str | None = None) -> Any:
    """The image as ``PIL.Image`` of mode RGB, whatever its own. ``name``: for errors, where it has no path.

    Of 16-bit grey levels the upper eight bits are taken, as Pillow itself does for 16-bit colours; its conversion of
    grey ones cuts them off at 255, which leaves white. Transparency is dropped.

    Raises:
        TrainError: a file that is missing, damaged, or of levels whose range is not known; it is named.
    """
    from PIL import Image, UnidentifiedImageError

    name = name or str(path)
    try:
        if not isinstance(path, io.BytesIO) and not stat.S_ISREG(os.stat(path).st_mode):
            raise TrainError(f"{name} cannot be read: it is no regular file")  # a pipe would be waited for without end
        with Image.open(path) as image:
            if image.mode == "F" or (image.mode == "I" and image.format != "PNG"):
                raise TrainError(f"{name} has levels of no known range (mode {image.mode}); store it with 8 or 16 bits")
            if image.mode.startswith("I"):
                levels = np.asarray(image).astype(np.uint32) >> 8
                return Image.fromarray(levels.astype(np.uint8)).convert("RGB")
            return image.convert("RGB")
    except TrainError:
        raise
    except Exception as error:  # decoders raise whatever their parts raise: OSError, SyntaxError, struct.error, ...
        if isinstance(error, UnidentifiedImageError):
            raise TrainError(f"{name} cannot be read: {_what_it_is(path)}") from error
        told = isinstance(error, OSError) and error.strerror  # "No such file or directory", without the path again
        reason = told or str(error).replace(str(path), "it").replace("\n", " ")
        raise TrainError(f"{name} cannot be read: {reason or type(error).__name__}") from error


def _what_it_is(path: Path | str | io.BytesIO) -> str:
    empty = path.getbuffer().nbytes == 0 if isinstance(path, io.BytesIO) else Path(path).stat().st_size == 0
    return "it is empty" if empty else "it is no image, or of a format that Pillow does not know"
