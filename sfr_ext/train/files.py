"""Writing files so that a reader never sees half of one, whenever the writer is stopped; and alone in a folder."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import TrainError

_PARTIAL = ".partial"
# What a folder answers that cannot be written to. Other errors of the system are no news about the folder.
_UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)


@contextmanager
def atomic_write(path: Path, keep: Path | None = None) -> Iterator[Path]:
    """Yield a temporary path in the same folder; it becomes ``path`` when the block ends without an error.

    The bytes are on the disk before the name is: after a power cut, too, ``path`` is the old file or the new one. With
    ``keep``, the old file is kept under that name. The temporary name has the suffix of ``path``, by which some writers
    choose the format.

    Raises:
        TrainError: the folder cannot be written to; ``path`` is as it was.
    """
    with told(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=_PARTIAL + path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        with told(path):
            yield temporary
            # mkstemp makes files that only their owner may read.
            mask = os.umask(0)
            os.umask(mask)
            temporary.chmod(0o666 & ~mask)
            _to_disk(temporary)
            if keep is not None and path.exists():
                os.replace(path, keep)
            os.replace(temporary, path)
        with suppress(OSError):  # not every file system takes folders
            _to_disk(path.parent)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


@contextmanager
def told(path: Path) -> Iterator[None]:
    """Turn the system's refusal to write ``path`` into one sentence."""
    try:
        yield
    except OSError as error:
        raise TrainError(f"{path} cannot be written: {error.strerror or error}") from error


def refuses_writing(error: OSError) -> bool:
    """Whether this error says that a disk is full, read-only, or not ours."""
    return error.errno in _UNWRITABLE


def remove_partial(folder: Path) -> None:
    """Remove what writers left that were killed. Nobody else may be writing into the folder."""
    for path in folder.glob(f".*{_PARTIAL}*"):
        path.unlink(missing_ok=True)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Make the folder and hold it: a second run that wants the same one is refused.

    The lock is the kernel's, so that a killed run does not leave one behind.

    Raises:
        TrainError: another run holds it, or it cannot be written to.
    """
    from filelock import FileLock, Timeout

    path = folder / ".lock"
    lock = FileLock(path)
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrainError(f"--out: {folder} cannot be made: {error.strerror or error}") from error
    try:
        lock.acquire(blocking=False)
    except Timeout as error:
        raise TrainError(f"--out: another run is writing into {folder}; give this one a folder of its own") from error
    except OSError as error:
        raise TrainError(f"--out: {folder} cannot be written: {error.strerror or error}") from error
    try:
        yield
    finally:
        # While it is held: whoever gets the lock of a name that is gone makes a new one.
        with suppress(OSError):
            path.unlink()
        if made:
            with suppress(OSError):  # what nothing was written into, of a run that was refused
                folder.rmdir()
        lock.release()


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
