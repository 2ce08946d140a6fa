"""Memory of a run that streams image files, by their number.

``python -m benchmarks.studies.streaming --images 1000 10000 50000`` makes JPEG files of 96 x 96 pixels in two classes,
trains one epoch on them by ``sfr-ext train --data imagefolder`` with one worker, and prints the most memory that each
process of the run had: resident pages (VmHWM of /proc), those shared with others included.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

MEGABYTE = 2**20
TRAIN = "--data imagefolder --arch resnet8 --arm ce --image-size 16 --epochs 1 --batch-size 250 --workers 1"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.studies.streaming", description=__doc__)
    parser.add_argument("--images", type=int, nargs="+", default=[1000, 10000, 50000], help="of the training set")
    options = parser.parse_args(arguments)
    print("| training images | files, MB | reading after, s | main process, MB | worker, MB |")
    print("|---|---|---|---|---|")
    for count in options.images:
        with tempfile.TemporaryDirectory() as folder:
            size = make_files(Path(folder) / "images", count)
            first, peaks = train(Path(folder))
        workers = max(peaks[1:], default=0)
        cells = (count, f"{size / MEGABYTE:.0f}", f"{first:.0f}", *(f"{p / MEGABYTE:.0f}" for p in (peaks[0], workers)))
        print("| " + " | ".join(map(str, cells)) + " |", flush=True)
    return 0


def make_files(root: Path, count: int) -> int:
    """``count`` files to train on and 250 to test on; their bytes."""
    from PIL import Image

    random = np.random.default_rng(0)
    size = 0
    for part, number in (("train", count), ("test", 250)):
        for name in ("a", "b"):
            (root / part / name).mkdir(parents=True)
        for i in range(number):
            coarse = Image.fromarray(random.integers(0, 256, (6, 6, 3), dtype=np.uint8))
            path = root / part / "ab"[i % 2] / f"{i:07d}.jpg"
            coarse.resize((96, 96), resample=2).save(path, quality=80)
            size += path.stat().st_size
    return size


def train(folder: Path) -> tuple[float, list[int]]:
    """Seconds until the worker reads, and the peaks of the processes, the first one's first."""
    out = folder / "out"
    command = [sys.executable, "-m", "sfr_ext", "train", "--data-dir", str(folder / "images"), "--out", str(out)]
    begin, first = time.perf_counter(), float("nan")
    peaks: dict[int, int] = {}
    with open(folder / "log", "w") as log:
        run = subprocess.Popen([*command, *TRAIN.split(), "--no-progress"], stdout=log, stderr=log)
        while run.poll() is None:
            for process in (run.pid, *children(run.pid)):
                peaks[process] = max(peaks.get(process, 0), peak(process))
            if first != first and any(peaks.get(child) for child in children(run.pid)):
                first = time.perf_counter() - begin
            time.sleep(0.05)
    if run.returncode:
        raise SystemExit((folder / "log").read_text())
    return first, [peaks[run.pid], *(value for process, value in peaks.items() if process != run.pid)]


def children(process: int) -> list[int]:
    try:
        return list(map(int, Path(f"/proc/{process}/task/{process}/children").read_text().split()))
    except OSError:
        return []


def peak(process: int) -> int:
    """Bytes; 0 of a process that has just ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


if __name__ == "__main__":
    sys.exit(main())
