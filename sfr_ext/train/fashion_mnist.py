"""Fashion-MNIST: finding its four files, or downloading them, and reading them. Every byte is checked before
use.

Xiao, Rasul, Vollgraf: "Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning Algorithms",
2017.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np

from .errors import TrainError
from .files import atomic_write

SYSTEM_DIR = Path("/usr/share/datasets/fashion-mnist")  # Debian package dataset-fashion-mnist
URL = "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/"

# SHA-256 of the files as distributed, that is, compressed.
SHA256 = {
    "train-images-idx3-ubyte.gz": "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7",
    "train-labels-idx1-ubyte.gz": "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056",
    "t10k-images-idx3-ubyte.gz": "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa",
    "t10k-labels-idx1-ubyte.gz": "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05",
}
CLASSES = (
    "T-shirt/top",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)


def load(data_dir: Path | None) -> tuple[dict[str, np.ndarray], str]:
    """The arrays by file name (images ``[N, 28, 28]``, labels ``[N]``, uint8), and the folders they came
    from.

    Each file is taken from ``data_dir``, else from the system's folder, else from the download folder
    (``data_dir``, or the user's cache), into which it is downloaded if it is nowhere.

    Raises:
        TrainError: a file that has the wrong checksum, or is nowhere and cannot be downloaded.
    """
    download_dir = data_dir if data_dir is not None else cache_dir()
    folders = [data_dir] if data_dir is not None else []
    folders += [SYSTEM_DIR, download_dir]
    arrays, used = {}, []
    for name, sha256 in SHA256.items():
        path = next((folder / name for folder in folders if (folder / name).is_file()), None)
        if path is None:
            path = download_dir / name
            _download(path, sha256, folders)
        arrays[name] = _parse(_read_checked(path, sha256), path)
        if str(path.parent) not in used:
            used.append(str(path.parent))
    return arrays, ", ".join(used)


def cache_dir() -> Path:
    """Where downloads go when no folder is given."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "sfr_ext" / "fashion-mnist"


def _read_checked(path: Path, sha256: str) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise TrainError(f"{path} cannot be read: {error.strerror}") from error
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise TrainError(
            f"{path} is corrupt (SHA-256 {found[:12]}..., expected {sha256[:12]}...); delete it to have it replaced"
        )
    return data


def _download(path: Path, sha256: str, searched: list[Path]) -> None:
    url = URL + path.name
    try:
        with urllib.request.urlopen(url, timeout=60) as response:
            data: bytes = response.read()
    except (OSError, urllib.error.URLError) as error:
        places = ", ".join(dict.fromkeys(map(str, searched)))
        reason = getattr(error, "reason", None) or error
        raise TrainError(
            f"fashion-mnist: {path.name} is not in {places} and {url} cannot be downloaded ({reason}); "
            "install the Debian package dataset-fashion-mnist or give the folder with --data-dir"
        ) from error
    if hashlib.sha256(data).hexdigest() != sha256:
        raise TrainError(f"fashion-mnist: {url} gave a file with the wrong SHA-256; nothing was kept")
    with atomic_write(path) as temporary:
        temporary.write_bytes(data)


def _parse(data: bytes, path: Path) -> np.ndarray:
    """An idx file: two zeros, type 8 (uint8), the axes, their sizes as big-endian uint32, the values."""
    raw = gzip.decompress(data)
    axes = raw[3]
    shape = np.frombuffer(raw, ">u4", axes, 4).astype(int)
    values = np.frombuffer(raw, np.uint8, offset=4 + 4 * axes)
    if raw[:3] != b"\0\0\x08" or values.size != shape.prod():
        raise TrainError(f"{path} is not an idx file of bytes")
    return values.reshape(shape)
