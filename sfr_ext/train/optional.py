"""Packages that a run may do without, and may have in a state that does not load."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from typing import Any
from unittest import mock


@functools.cache
def broken_torchvision() -> str | None:
    """Why the installed torchvision does not load; None when it does, or when there is none.

    One built for another torch fails with "operator torchvision::nms does not exist".
    """
    try:
        importlib.import_module("torchvision")
    except ModuleNotFoundError as error:
        return None if error.name == "torchvision" else str(error)
    except Exception as error:
        return str(error).split("\n")[0]
    return None


@contextmanager
def without_broken_torchvision() -> Iterator[None]:
    """For importing what would load torchvision only because it is there, and fail with it.

    torchmetrics, which Lightning loads, is one: it looks at the installed version alone. In here, and for whoever asks
    later in this process, a torchvision that does not load is as good as not installed.
    """
    if broken_torchvision() is None:
        yield
        return
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    sys.modules["torchvision"] = None  # type: ignore[assignment]  # this makes `import torchvision` an ImportError
    known = metadata.version

    def version(name: str) -> str:
        if name == "torchvision":
            raise metadata.PackageNotFoundError(name)
        return known(name)

    imports = importlib.import_module("lightning_utilities.core.imports")
    with mock.patch.object(imports, "_version", version):
        yield


def import_optional(name: str) -> tuple[Any, str | None]:
    """The module and None; or None and why it cannot be had."""
    package = name.split(".")[0]
    if package == "torchvision" and (reason := broken_torchvision()) is not None:
        return None, f"torchvision does not load ({reason})"
    try:
        return importlib.import_module(name), None
    except ModuleNotFoundError as error:
        if error.name == package:
            return None, f"{package} is not installed"
        return None, f"{package} does not load ({error})"
    except Exception as error:  # whatever the package does while it is loaded
        return None, f"{package} does not load ({str(error).splitlines()[0]})"
