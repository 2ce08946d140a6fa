"""Kills training runs and goes on with them: do they end with the bits of a run that nobody killed?

    python tools/kill_runs.py [--kills 20] [--data digits] [--out FOLDER]

Runs of six epochs on 192 images, with dropout, SFR, and the two priors of label smoothing in turn, are
stopped in these ways and then resumed:

* SIGKILL at random moments, `--kills` of them;
* SIGKILL at each step of writing a file, one after another: half written, written, on the disk, between two renames;
* a disk that becomes full: a small tmpfs where one may be mounted, else a limit on the size of files;
* all of this with `--out` on the file system of the temporary folder, and random kills on /dev/shm too.

Exits with 1 if a run did not end with the same bits, or ended in another way than a sentence.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

from sfr_ext import cli
from sfr_ext.train import files, run
from sfr_ext.train.checkpoints import find_checkpoint
from sfr_ext.train.config import LAST_CHECKPOINT
from sfr_ext.train.models import ResNet

PRIORS = ("uniform", "online")
EPOCHS = 6
OPTIONS = (
    f"--limit 192 --batch-size 64 --epochs {EPOCHS} --arm sfr --emd-warmup 2 --no-progress --accelerator cpu"
).split()


def main() -> int:
    parser = argparse.ArgumentParser(description="Kill training runs, resume them, compare the bits.")
    parser.add_argument("--kills", type=int, default=20, help="random moments")
    parser.add_argument("--every", type=int, default=1, help="of the steps of writing, take each so-manieth")
    parser.add_argument("--data", choices=("digits", "fashion-mnist"), default="digits", help="whose images")
    parser.add_argument("--out", type=Path, help="folder for the runs (default: a temporary one, removed)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    OPTIONS.extend(["--data", arguments.data])
    mock.patch.object(run, "build_model", network_with_dropout).start()
    with tempfile.TemporaryDirectory(dir=arguments.out, prefix="kill-runs-") as folder:
        return Trials(Path(folder)).all(arguments.kills, arguments.every)


def network_with_dropout(arch: str, channels: int, num_classes: int) -> tuple[nn.Module, tuple[str, ...]]:
    """A small ResNet that drops a fifth of the features before its last layer."""
    model = ResNet((8, 16, 32), 1, channels, num_classes)
    model.fc = nn.Sequential(nn.Dropout(0.2), model.fc)  # type: ignore[assignment]
    return model, model.stages


@dataclasses.dataclass
class Outcome:
    """How a run ended: its exit code (negative: the signal), what it wrote on stderr, its seconds."""

    code: int
    said: str
    seconds: float


class Trials:
    """The runs that nobody kills, and those that are compared with them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bad = 0
        self.wanted: dict[str, dict[str, Any]] = {}
        self.seconds = 0.0
        self.bytes = 0

    def all(self, kills: int, every: int) -> int:
        for prior in PRIORS:
            out = self.folder / f"whole-{prior}"
            whole = start(out, prior).wait()
            assert whole.code == 0, whole.said
            self.wanted[prior] = end_of(out)
            self.seconds = whole.seconds
            self.bytes = (out / LAST_CHECKPOINT).stat().st_size
        print(f"a whole run takes {self.seconds:.1f} s")
        self.random_moments("random moments", self.folder, kills)
        if Path("/dev/shm").is_dir() and os.stat("/dev/shm").st_dev != os.stat(tempfile.gettempdir()).st_dev:
            with tempfile.TemporaryDirectory(dir="/dev/shm") as other:
                self.random_moments("random moments, another file system", Path(other), max(1, kills // 4))
        self.steps_of_writing(every)
        self.full_disk()
        return 1 if self.bad else 0

    def random_moments(self, name: str, folder: Path, kills: int) -> None:
        moments, resumed = random.Random(kills), 0
        for i in range(kills):
            prior, out = PRIORS[i % 2], folder / f"random-{i}"
            begun = start(out, prior)
            begun.kill_in_epoch(i % EPOCHS, moments.uniform(0.0, 1.2), out)
            resumed += (out / LAST_CHECKPOINT).exists()
            self.finish(f"{name} {i}", out, prior)
        self.tell(name, f"{kills} kills, {resumed} with a checkpoint to go on from")

    def steps_of_writing(self, every: int) -> None:
        step = 0
        while True:
            prior, out = PRIORS[step % 2], self.folder / f"step-{step}"
            ended = start(out, prior, before=functools.partial(kill_at_write, step)).wait()
            if ended.code == 0:
                break
            assert ended.code == -signal.SIGKILL, ended
            self.finish(f"step of writing {step}", out, prior)
            step += every
        self.tell("steps of writing", f"{-(-step // every)} of {step}")

    def full_disk(self) -> None:
        with small_disk(self.folder / "disk", self.bytes * 5 // 2) as disk:
            out, prior = disk.folder / "full", PRIORS[1]
            ended = start(out, prior, before=disk.fill).wait()
            kept = find_checkpoint(out / LAST_CHECKPOINT)[1]["epoch"] + 1
            sentence = ended.code == 1 and ended.said.count("\n") == 1 and "cannot be written" in ended.said
            self.check(f"full disk: {ended.said.strip()}", sentence)
            disk.free()
            self.finish("full disk", out, prior)
        self.tell("full disk", f"{disk.kind}: {ended.said.strip()!r}, epoch {kept} kept")

    def finish(self, name: str, out: Path, prior: str) -> None:
        """Go on with the run as a user would; its end must be that of the whole run."""
        complete = (out / "result.json").exists()
        ended = None if complete else start(out, prior, resume=begun_before(out)).wait()
        self.check(f"{name}: {ended}", ended is None or ended.code == 0)
        self.check(f"{name}: other bits", same(end_of(out), self.wanted[prior]))
        left = [path.name for path in out.rglob(".*")]
        self.check(f"{name}: left {left}", complete or not left)
        if out.parent == self.folder:
            shutil.rmtree(out)

    def check(self, what: str, good: bool) -> None:
        if not good:
            self.bad += 1
            print(f"FAILED {what}", flush=True)

    def tell(self, name: str, what: str) -> None:
        print(f"{name}: {what}; failures so far: {self.bad}", flush=True)


@dataclasses.dataclass
class Started:
    """A run in a process of its own."""

    pid: int
    log: Path
    begin: float

    def wait(self) -> Outcome:
        _, status = os.waitpid(self.pid, 0)
        return Outcome(os.waitstatus_to_exitcode(status), self.log.read_text(), time.perf_counter() - self.begin)

    def kill_in_epoch(self, epoch: int, part: float, out: Path) -> Outcome:
        """Kills the run when it has written the rows of so many epochs, and that part of one more has gone by.

        By the run's own pace, not by the clock: a busy machine would kill all runs before their first checkpoint.
        """
        while (rows := rows_of(out)) < epoch and not self.ended():
            time.sleep(0.005)
        time.sleep(part * (time.perf_counter() - self.begin) / (rows + 1))
        os.kill(self.pid, signal.SIGKILL)
        return self.wait()

    def ended(self) -> bool:
        """Whether the process is there to be waited for only."""
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def start(out: Path, prior: str, resume: bool = False, before: Callable[[], None] = lambda: None) -> Started:
    """`sfr-ext train` in a copy of this process, which has loaded everything already."""
    log = Path(tempfile.gettempdir()) / f"kill-runs-{os.getpid()}.log"
    begin = time.perf_counter()
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        before()
        code = cli.main(["train", *OPTIONS, "--prior", prior, "--out", str(out), *(["--resume"] if resume else [])])
        os._exit(code)
    return Started(pid, log, begin)


def kill_at_write(step: int) -> None:
    """From here on, this process dies at the step-th thing it does to the disk while it replaces a file."""
    left = [step]

    def counted(function: Callable[..., Any], half: Callable[..., Any] | None = None) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            if left[0] == 0:
                if half is not None:
                    half(*arguments)
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
            return function(*arguments)

        return call

    class System:
        replace, fsync = staticmethod(counted(os.replace)), staticmethod(counted(os.fsync))

        def __getattr__(self, name: str) -> Any:
            return getattr(os, name)

    whole = Path.write_bytes
    mock.patch.object(files, "os", System()).start()
    mock.patch.object(
        Path, "write_bytes", counted(whole, lambda path, data: whole(path, data[: len(data) // 2]))
    ).start()


class SmallDisk:
    """A folder on a tmpfs that holds two checkpoints, but no third one beside them."""

    kind = "tmpfs"

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def fill(self) -> None:
        """What the process does that is to meet the full disk."""

    def free(self) -> None:
        """Give it room."""
        subprocess.run(["mount", "-o", "remount,size=64m", str(self.folder)], check=True)


class SizeLimit(SmallDisk):
    """For those who may mount nothing: from the third checkpoint on no file may grow over half of its size."""

    kind = "limit on the size of files"

    def fill(self) -> None:
        write, written = Path.write_bytes, [0]

        def limited(path: Path, data: Any) -> int:
            written[0] += 1
            if written[0] == 3:
                resource.setrlimit(resource.RLIMIT_FSIZE, (len(data) // 2, resource.RLIM_INFINITY))
            return write(path, data)

        mock.patch.object(Path, "write_bytes", limited).start()

    def free(self) -> None:
        """Nothing: the limit ended with the process."""


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[SmallDisk]:
    """A disk of so many bytes, or what comes near to it where none may be mounted."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode != 0:
        yield SizeLimit(folder)
        return
    try:
        yield SmallDisk(folder)
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def rows_of(out: Path) -> int:
    """Of metrics.csv: the epochs that a run has told of."""
    path = out / "metrics.csv"
    return len(path.read_text().splitlines()) - 1 if path.exists() else 0


def begun_before(out: Path) -> bool:
    """Whether there is something to resume; a run that was killed earlier begins anew."""
    return (out / LAST_CHECKPOINT).exists() or (out / LAST_CHECKPOINT).with_name("previous.ckpt").exists()


def end_of(out: Path) -> dict[str, Any]:
    """What a run has come to: weights, momentum, counters, and the rows of metrics.csv without the clock's columns."""
    content = torch.load(out / LAST_CHECKPOINT, weights_only=True)
    rows = [line.split(",") for line in (out / "metrics.csv").read_text().splitlines()]
    timeless = [i for i, name in enumerate(rows[0]) if "seconds" not in name]
    return {
        "weights": content["state_dict"],
        "optimizer": content["optimizer_states"],
        "rows": [[row[i] for i in timeless] for row in rows],
    }


def same(one: Any, other: Any) -> bool:
    """Whether two trees of values are equal to the last bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


if __name__ == "__main__":
    sys.exit(main())
