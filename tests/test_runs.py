"""Runs that cannot be lost: checkpoints that survive their writer, resuming, and the folder of a run."""

import json
import os
import random
import shutil
import subprocess
import sys
import threading
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("lightning", reason="the extra [train] is not installed")
pytest.importorskip("matplotlib", reason="the extra [train] is not installed")
pytest.importorskip("sklearn", reason="the extra [train] is not installed")

import kill_runs

from sfr_ext.train import files
from sfr_ext.train import run as run_module
from sfr_ext.train.checkpoints import KeepingIO, find_checkpoint, read_checkpoint
from sfr_ext.train.config import FREE, GROW, LAST_CHECKPOINT, PREVIOUS_CHECKPOINT, SAME, TrainConfig, flag, options
from sfr_ext.train.errors import TrainError
from sfr_ext.train.models import build_model
from sfr_ext.train.module import Classifier, seed_everything
from sfr_ext.train.run import run

pytestmark = pytest.mark.usefixtures("one_thread")


def quick(out, **changed):
    """192 digits, three steps of 64 an epoch."""
    few = {"data": "digits", "limit": 192, "batch_size": 64, "epochs": 2, "progress": False, "out": out}
    return TrainConfig(**{**few, **changed})


def resumed(config, **changed):
    return replace(config, resume=config.out / LAST_CHECKPOINT, **changed)


class PowerCut(Exception):
    pass


@pytest.fixture
def cut_in_epoch(monkeypatch):
    """Runs a configuration that ends without warning in the given epoch, counted from 1."""

    def cut(config, epoch):
        step = Classifier.training_step

        def breaks(self, batch, index):
            if self.current_epoch == epoch - 1:
                raise PowerCut
            return step(self, batch, index)

        with monkeypatch.context() as patch, pytest.raises(PowerCut):
            patch.setattr(Classifier, "training_step", breaks)
            run(config)

    return cut


class Noisy(nn.Module):
    """Draws from every generator there is: torch's by dropout, Python's and NumPy's by noise."""

    def __init__(self, channels, num_classes):
        super().__init__()
        self.layer1 = nn.Conv2d(channels, 4, 3, padding=1)
        self.layer2 = nn.Conv2d(4, 8, 3, 2, padding=1)
        self.head = nn.Sequential(nn.Dropout(0.3), nn.Linear(8, num_classes))

    def forward(self, x):
        if self.training:
            x = x + 0.1 * random.random() + 0.1 * float(np.random.rand())
        return self.head(self.layer2(self.layer1(x).relu()).mean((2, 3)))


# The same bits


@pytest.mark.parametrize("prior", ["uniform", "online"])
def test_every_generator_is_resumed(prior, tmp_path, monkeypatch, cut_in_epoch):
    monkeypatch.setattr(
        run_module, "build_model", lambda arch, channels, classes: (Noisy(channels, classes), ("layer1", "layer2"))
    )
    config = quick(tmp_path / "parts", epochs=3, prior=prior, emd_warmup=2.0)
    run(replace(config, out=tmp_path / "whole"))
    cut_in_epoch(config, 2)
    random.seed(5), np.random.seed(5), torch.manual_seed(5)  # whatever the process has drawn before
    run(resumed(config))
    assert kill_runs.same(kill_runs.end_of(tmp_path / "parts"), kill_runs.end_of(tmp_path / "whole"))
    # The comparison can fail: another seed ends with other bits.
    run(replace(config, out=tmp_path / "other", seed=1))
    assert not kill_runs.same(kill_runs.end_of(tmp_path / "other"), kill_runs.end_of(tmp_path / "whole"))


def test_generators_differ_by_seed_epoch_and_process():
    draws = set()
    for state in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (2**32 - 1, 10**6, 10**4)]:
        seed_everything(*state)
        first = (random.random(), float(np.random.rand()), float(torch.rand(())))
        seed_everything(*state)
        assert first == (random.random(), float(np.random.rand()), float(torch.rand(())))
        draws.add(first)
    assert len(draws) == 5


def test_killed_at_any_moment():
    """A few moments; `python tools/kill_runs.py` tries twenty and every step of writing."""
    if not hasattr(os, "fork"):
        pytest.skip("runs are copied by fork, which this system does not have")
    command = [sys.executable, kill_runs.__file__, "--kills", "2", "--every", "17"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "failures so far: 0" in done.stdout.splitlines()[-1]


@pytest.mark.parametrize("options_", [{"optimizer": "adamw", "lr": 0.01}, {"accumulate": 2}, {"accumulate": 5}])
def test_resumed_with_other_optimisers_and_accumulation(options_, tmp_path, cut_in_epoch):
    config = quick(tmp_path / "parts", epochs=3, emd_warmup=2.0, **options_)
    run(replace(config, out=tmp_path / "whole"))
    steps = -(-3 // config.accumulate)
    content = read_checkpoint(tmp_path / "whole" / LAST_CHECKPOINT)
    assert content["global_step"] == 3 * steps == int(content["state_dict"]["smoothing.steps"])
    assert int(content["state_dict"]["regularizer.steps"]) == 9
    cut_in_epoch(config, 3)
    run(resumed(config))
    assert kill_runs.same(kill_runs.end_of(tmp_path / "parts"), kill_runs.end_of(tmp_path / "whole"))


@pytest.fixture
def image_files(tmp_path):
    """A folder of 24 + 4 small images of two classes."""
    image = pytest.importorskip("PIL.Image", reason="pillow is not installed")
    levels = np.random.default_rng(0).integers(0, 256, (28, 12, 16, 3), dtype=np.uint8)
    for i in range(28):
        path = tmp_path / "images" / ("train" if i < 24 else "test") / "ab"[i % 2] / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.fromarray(levels[i]).save(path)
    return tmp_path / "images"


def test_files_read_by_other_workers_are_resumed(image_files, tmp_path, cut_in_epoch):
    config = quick(tmp_path / "parts", data="imagefolder", data_dir=image_files, image_size=8, batch_size=8, limit=None)
    result = run(replace(config, out=tmp_path / "whole", workers=0))
    assert result["class_names"] == ["a", "b"] and result["train_images"] == 24 and result["test_images"] == 4
    cut_in_epoch(replace(config, workers=1), 2)
    run(resumed(config, workers=2))
    assert kill_runs.same(kill_runs.end_of(tmp_path / "parts"), kill_runs.end_of(tmp_path / "whole"))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_truncated_file_is_named_in_one_sentence(workers, image_files, tmp_path):
    bad = image_files / "train" / "b" / "03.png"
    bad.write_bytes(bad.read_bytes()[:60])
    config = quick(
        tmp_path / "out",
        data="imagefolder",
        data_dir=image_files,
        image_size=8,
        batch_size=8,
        limit=None,
        workers=workers,
    )
    with pytest.raises(TrainError, match=r"^[^\n]*b/03.png cannot be read: [^\n]*$"):
        run(config)


# Checkpoints


@pytest.fixture(scope="module")
def two_epochs(tmp_path_factory):
    out = tmp_path_factory.mktemp("two")
    run(quick(out, arm="ce"))
    (out / "result.json").unlink()
    return out


@pytest.fixture
def checkpoints(two_epochs, tmp_path):
    """A folder with last.ckpt (epoch 2) and previous.ckpt (epoch 1), and its configuration."""
    shutil.copytree(two_epochs, tmp_path, dirs_exist_ok=True)
    return quick(tmp_path, arm="ce")


def epoch_of(path):
    return read_checkpoint(path)["epoch"] + 1


def test_the_one_before_is_kept(checkpoints):
    out = checkpoints.out
    assert [epoch_of(out / name) for name in (LAST_CHECKPOINT, PREVIOUS_CHECKPOINT)] == [2, 1]
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == [
        "last.ckpt",
        "options.json",
        "previous.ckpt",
    ]


def torn(data):
    return data[: len(data) // 2]


DAMAGE = {
    "half of it": torn,
    "all but the last byte": lambda data: data[:-1],
    "empty": lambda data: b"",
    "zeros": lambda data: bytes(len(data)),
    "two bytes": lambda data: data[:2],
    "one bit in the middle": lambda data: (
        data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :]
    ),
}
FOREIGN = {
    "text": lambda data: b"nonsense",
    "a picture": lambda data: b"\x89PNG\r\n\x1a\n" + bytes(100),
}


@pytest.mark.parametrize("kind", [*DAMAGE, *FOREIGN])
def test_a_bad_checkpoint_is_named_and_the_one_before_it_taken(kind, checkpoints, tmp_path, capsys):
    last = tmp_path / LAST_CHECKPOINT
    bad = {**DAMAGE, **FOREIGN}[kind](last.read_bytes())
    last.write_bytes(bad)
    what = "is damaged" if kind in DAMAGE else "is not a checkpoint of sfr-ext train"
    with pytest.raises(TrainError, match=f"last.ckpt {what}"):
        read_checkpoint(last)
    result = run(resumed(checkpoints))
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("sfr-ext: ")]
    assert len(said) == 1 and what in said[0] and "previous.ckpt, after epoch 1" in said[0]
    assert result["epochs"] == 2 and epoch_of(last) == 2
    # What is bad is set aside, and is not the one before the next.
    assert (last.parent / "damaged.ckpt").read_bytes() == bad
    assert epoch_of(tmp_path / PREVIOUS_CHECKPOINT) == 1


def test_somebody_elses_checkpoint(checkpoints, tmp_path):
    other = tmp_path / "other.ckpt"
    for content in (
        {"epoch": 3},
        {"sfr_ext": {}},
        [1, 2],
        {"sfr_ext": 3, "epoch": 1},
        {"sfr_ext": {}, "epoch": 1},
        torch.zeros(3),
    ):
        torch.save(content, other)
        with pytest.raises(TrainError, match="other.ckpt is not a checkpoint of sfr-ext train"):
            run(replace(checkpoints, resume=other))
    with pytest.raises(TrainError, match="other2.ckpt does not exist"):
        run(replace(checkpoints, resume=tmp_path / "other2.ckpt"))


def test_a_checkpoint_of_another_network(checkpoints, tmp_path):
    """As another version may have left it: of the same options, with other layers."""
    content = read_checkpoint(tmp_path / LAST_CHECKPOINT)
    content["state_dict"]["model.stem.weight"] = content["state_dict"].pop("model.conv1.weight")
    torch.save(content, tmp_path / LAST_CHECKPOINT)
    with pytest.raises(
        TrainError, match=r"last.ckpt does not fit --arch resnet8 \(Missing key.*conv1.weight"
    ) as caught:
        run(resumed(checkpoints, epochs=3))
    assert "\n" not in str(caught.value)


def test_last_is_gone_or_both_are_bad(checkpoints, tmp_path):
    last, previous = tmp_path / LAST_CHECKPOINT, tmp_path / PREVIOUS_CHECKPOINT
    last.unlink()
    path, _, note = find_checkpoint(last)
    assert path == previous and "last.ckpt does not exist; going on from the one before it" in note
    previous.write_bytes(b"")
    last.write_bytes(b"")
    with pytest.raises(TrainError, match="last.ckpt is damaged .*, and the one before it, .* cannot be used either"):
        run(resumed(checkpoints))


@pytest.mark.parametrize("moment", ["write", "fsync", "first rename", "second rename"])
def test_a_failing_disk_leaves_a_whole_checkpoint(moment, tmp_path, monkeypatch):
    path = tmp_path / "last.ckpt"
    writer = KeepingIO()
    empty = {"sfr_ext": {}, "state_dict": {}, "optimizer_states": []}
    for epoch in (0, 1):
        writer.save_checkpoint(empty | {"epoch": epoch}, path)

    def full(*arguments):
        raise OSError(28, "No space left on device")

    renames = []

    def replace_(*arguments):
        renames.append(arguments)
        (full if len(renames) == ("first rename", "second rename").index(moment) + 1 else rename)(*arguments)

    rename = os.replace
    if moment == "write":
        monkeypatch.setattr(Path, "write_bytes", full)
    elif moment == "fsync":
        monkeypatch.setattr(files.os, "fsync", full)
    else:
        monkeypatch.setattr(files.os, "replace", replace_)
    with pytest.raises(TrainError, match="last.ckpt cannot be written: No space left on device"):
        writer.save_checkpoint(empty | {"epoch": 2}, path)
    monkeypatch.undo()
    assert find_checkpoint(path)[1]["epoch"] == 1
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_checkpoints_are_written_beside_their_target(tmp_path, monkeypatch):
    """Not in the temporary folder, which may be on another file system: from there a file would be copied."""
    monkeypatch.setattr(files.tempfile, "tempdir", str(tmp_path / "nowhere"))
    seen = []
    rename = os.replace
    monkeypatch.setattr(files.os, "replace", lambda a, b: (seen.append((Path(a), Path(b))), rename(a, b)))
    run(quick(tmp_path / "out", arm="ce"))
    assert len(seen) >= 6 and all(source.parent == target.parent for source, target in seen)


# What may differ on resume


def test_every_option_says_what_may_change_on_resume():
    assert set(options()) == {field.name for field in fields(TrainConfig)}
    assert {declared.on_resume for declared in options().values()} == {SAME, FREE, GROW}
    assert set(TrainConfig().identity()) == {name for name, o in options().items() if o.on_resume == SAME}


OTHER = {
    "data": "fashion-mnist",
    "data_dir": Path("elsewhere"),
    "limit": 100,
    "image_size": 32,
    "augment": False,
    "arch": "resnet14",
    "arm": "dls",
    "emd_weight": 2.0,
    "emd_warmup": 3.0,
    "layers": ("layer1", "layer2"),
    "pairs": "last",
    "channel_mode": "mean",
    "solver": "exact",
    "eps": 0.1,
    "smoothing": 0.2,
    "schedule": "cosine",
    "prior": "online",
    "epochs": 3,
    "batch_size": 32,
    "lr": 0.2,
    "accumulate": 2,
    "optimizer": "adamw",
    "pretrained": True,
    "weight_decay": 0.0,
    "precision": "64",
    "seed": 1,
    "devices": "auto",
    "accelerator": "cpu",
    "nodes": 1,
    "strategy": "fsdp2",
    "workers": 1,
    "progress": None,
    "monitor": True,
    "compile": True,
    "tensorboard": True,
    "mixup": 0.2,
    "validation": 0.2,
    "ema": 0.9,
    "label_noise": 0.1,
    "objective": "divergence",
    "distill": 0.3,
    "temperature": 2.0,
    "hint": 0.1,
    "probe": True,
    "test_every": 2,
}


def stopped_at_the_end(folder, **options):
    """A run of one epoch whose result.json was not written any more."""
    config = quick(folder, epochs=1, **options)
    run(config)
    (config.out / "result.json").unlink()
    return config


@pytest.fixture(scope="module")
def unfinished(tmp_path_factory):
    return stopped_at_the_end(tmp_path_factory.mktemp("unfinished"), solver="sinkhorn")


@pytest.fixture(scope="module")
def unfinished_relative(tmp_path_factory):
    """Of an arm with options of its own."""
    return stopped_at_the_end(tmp_path_factory.mktemp("relative"), arm="byot")


@pytest.mark.parametrize("name", sorted(set(options()) - {"out", "resume", "overwrite"}))
def test_each_option_on_resume(name, unfinished, unfinished_relative, tmp_path, monkeypatch):
    """Whether the check lets the change pass; nothing is trained."""
    # The exact solver has no eps; tests divide the epochs, which may grow.
    more = {"solver": {"eps": None}, "test_every": {"epochs": 2}}.get(name, {})
    if name in ("distill", "temperature"):
        unfinished = unfinished_relative
    changed = resumed(unfinished, out=tmp_path, **{name: OTHER[name]}, **more)
    monkeypatch.setattr(run_module, "load_data", lambda config: load_data(replace(config, data="digits", limit=192)))
    monkeypatch.setattr(run_module, "_build_trainer", lambda *arguments: (_ for _ in ()).throw(PowerCut))
    load_data = sys.modules["sfr_ext.train.data"].load_data
    if options()[name].on_resume == SAME:
        was = getattr(unfinished, name)
        with pytest.raises(TrainError) as caught:
            run(changed)
        assert f"was trained with {flag(name)} {was}, got {OTHER[name]}" in str(caught.value)
    else:
        with pytest.raises(PowerCut):
            run(changed)


def test_a_checkpoint_without_an_option(tmp_path):
    """It is younger than the checkpoint, whose run had what was the only way then."""
    config = quick(tmp_path, epochs=1, solver="sinkhorn")
    run(config)
    path = tmp_path / LAST_CHECKPOINT
    content = torch.load(path, weights_only=True)
    for name in ("solver", "eps", "ema", "validation"):
        del content["sfr_ext"][name]
    torch.save(content, path)
    assert run(resumed(config, epochs=2))["epochs"] == 2
    torch.save(content, path)
    for changed, message in (
        ({"solver": "exact", "eps": None}, "was trained with --solver sinkhorn, got exact"),
        ({"ema": 0.9}, "was trained with --ema None, got 0.9"),
    ):
        with pytest.raises(TrainError, match=message):
            run(resumed(config, epochs=3, **changed))


def test_other_classes(unfinished, tmp_path, monkeypatch):
    load_data = run_module.load_data
    for change, message in (
        ({"num_classes": 12}, "was trained on 10 classes, --data digits has 12 now"),
        ({"train_labels": torch.zeros(5, dtype=torch.int64)}, "on 192 training images, --data digits has 5 now"),
        ({"test_labels": torch.zeros(5, dtype=torch.int64)}, "on 359 test images, --data digits has 5 now"),
        ({"train_images": torch.zeros(5, 3, 8, 8)}, "on 1 channels, --data digits has 3 now"),
    ):
        monkeypatch.setattr(run_module, "load_data", lambda config, c=change: replace(load_data(config), **c))
        with pytest.raises(TrainError, match=message):
            run(resumed(unfinished, out=tmp_path))


def test_killed_between_the_last_epoch_and_the_result(unfinished, tmp_path):
    """The run is finished from its checkpoint alone: also the row of metrics.csv that was not written any more."""
    out = tmp_path / "copy"
    (out / "checkpoints").mkdir(parents=True)
    (out / LAST_CHECKPOINT).write_bytes((unfinished.out / LAST_CHECKPOINT).read_bytes())
    before = (out / LAST_CHECKPOINT).stat()
    result = run(resumed(replace(unfinished, out=out)))
    assert result["epochs"] == 1 and json.loads((out / "result.json").read_text()) == json.loads(json.dumps(result))
    assert (out / "metrics.csv").read_text() == (unfinished.out / "metrics.csv").read_text()
    assert (out / "curves.png").is_file() and (out / LAST_CHECKPOINT).stat().st_mtime_ns == before.st_mtime_ns
    with pytest.raises(TrainError, match="has already run 1 epoch; give more with --epochs"):
        run(resumed(replace(unfinished, out=out)))


def test_fewer_epochs_than_were_run(checkpoints):
    with pytest.raises(TrainError, match="has already run 2 epochs"):
        run(resumed(checkpoints, epochs=1))


def test_a_longer_schedule_begins_where_it_would_be(tmp_path):
    """Not with the learning rate 0 in which the shorter one ended."""
    config = quick(tmp_path, arm="dls", epochs=2)
    run(config)
    rates = []
    step = Classifier.training_step

    class Watched(Classifier):
        def training_step(self, batch, index):
            rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])
            assert int(self.smoothing.steps) == 6 + len(rates) - 1
            return step(self, batch, index)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "Classifier", Watched)
        run(resumed(config, epochs=4))
    wanted = [0.05 + 0.05 * np.cos(np.pi * (n - 1) / 11) for n in range(6, 12)]
    assert rates == pytest.approx(wanted)


# The folder of a run


def test_a_finished_run_is_left_alone(tmp_path):
    config = quick(tmp_path, arm="ce", epochs=1)
    run(config)
    kept = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(TrainError, match="--out: .* holds a finished run; --resume .*, --overwrite"):
        run(replace(config, seed=1))
    assert kept == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    # A mistake that is found before training costs the old run nothing either.
    with pytest.raises(TrainError, match="resnet9"):
        run(replace(config, arch="resnet9", overwrite=True))
    assert kept == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    (tmp_path / "notes.txt").write_text("mine")
    result = run(replace(config, seed=1, overwrite=True))
    assert result["seed"] == 1 and (tmp_path / "notes.txt").exists()
    assert not (tmp_path / PREVIOUS_CHECKPOINT).exists()
    assert [path.name for path in (tmp_path / "steps").iterdir()] == ["version_0"]


def test_the_folder_of_another_run_is_left_alone(tmp_path, checkpoints):
    """--resume says what goes on; it is no leave to write over what a folder holds of another run."""
    other = quick(tmp_path / "other", arm="ls", epochs=1, layers=("layer1", "layer2"))
    run(other)
    kept = {path: path.read_bytes() for path in other.out.rglob("*") if path.is_file()}
    longer = replace(resumed(checkpoints), out=other.out, epochs=checkpoints.epochs + 1)
    with pytest.raises(TrainError, match="holds another run than .*, with --arm ls instead of ce;"):
        run(longer)
    (other.out / "result.json").unlink()
    with pytest.raises(TrainError, match="holds another run"):
        run(longer)
    assert all(path.read_bytes() == was for path, was in kept.items() if path.exists())
    # A copy of one of its own checkpoints is its own.
    shutil.copy(other.out / LAST_CHECKPOINT, tmp_path / "copy.ckpt")
    assert run(replace(other, resume=tmp_path / "copy.ckpt", epochs=2))["epochs"] == 2


def test_a_run_that_was_interrupted_is_left_alone(tmp_path, cut_in_epoch):
    config = quick(tmp_path, arm="ce")
    cut_in_epoch(config, 2)
    with pytest.raises(TrainError, match="holds a run that has not finished; --resume"):
        run(config)
    assert run(resumed(config))["epochs"] == 2

    early = quick(tmp_path / "early", arm="ce")
    cut_in_epoch(early, 1)
    assert run(early)["epochs"] == 2  # nothing was there to be lost


def test_resume_and_overwrite():
    with pytest.raises(TrainError, match="--resume continues a run and --overwrite begins it anew"):
        TrainConfig(resume=Path("last.ckpt"), overwrite=True)


def test_two_runs_into_one_folder(tmp_path):
    config = quick(tmp_path, arm="ce", epochs=1)
    with files.alone_in(tmp_path), pytest.raises(TrainError, match="another run is writing into"):
        run(config)
    assert run(config)["epochs"] == 1
    assert not (tmp_path / ".lock").exists()


def test_a_folder_is_held_by_one_at_a_time(tmp_path):
    inside, most = [0], [0]

    def enter():
        for _ in range(50):
            try:
                with files.alone_in(tmp_path):
                    inside[0] += 1
                    most[0] = max(most[0], inside[0])
                    inside[0] -= 1
            except TrainError:
                pass

    threads = [threading.Thread(target=enter) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most[0] == 1


def test_what_a_killed_writer_left_is_removed(tmp_path):
    config = quick(tmp_path, arm="ce", epochs=1)
    (tmp_path / "checkpoints").mkdir()
    left = [tmp_path / ".metrics-abc.partial.csv", tmp_path / "checkpoints" / ".last-abc.partial.ckpt"]
    for path in left:
        path.write_text("half")
    run(config)
    assert not any(path.exists() for path in left)


@pytest.mark.parametrize("out", ["/proc/runs", "/dev/null/runs", "/sys/runs"])
def test_out_that_cannot_be_written(out):
    if not Path(out).parent.exists():
        pytest.skip(f"this system has no {Path(out).parent}")
    with pytest.raises(TrainError, match=f"--out: {out} cannot be made: "):
        run(quick(Path(out)))


def test_a_read_only_out(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("nothing may be mounted here")
    try:
        for out, what in ((disk, "written"), (disk / "runs", "made")):
            with pytest.raises(TrainError, match=f"--out: {out} cannot be {what}: Read-only file system"):
                run(quick(out))
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_fills_up_while_steps_are_logged(tmp_path, monkeypatch):
    from sfr_ext.train.engine import CSVLogger

    def full(self):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(CSVLogger, "save", full)
    with pytest.raises(TrainError, match="--out: .* cannot be written: No space left on device"):
        run(quick(tmp_path, arm="ce"))


def test_a_folder_that_is_removed_while_it_is_written_to(tmp_path, monkeypatch):
    from sfr_ext.train.engine import CSVLogger

    for name, error in ((tmp_path / "runs" / "steps" / "metrics.csv", TrainError), ("elsewhere", FileNotFoundError)):

        def gone(self, name=name):
            raise FileNotFoundError(2, "No such file or directory", str(name))

        monkeypatch.setattr(CSVLogger, "save", gone)
        with pytest.raises(error) as caught:
            run(quick(tmp_path / "runs", arm="ce"))
        said = f"--out: {name} cannot be written: No such file or directory"
        assert (str(caught.value) == said) == (error is TrainError)


# A loss that is not finite


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["training_step", "weights"])
def test_a_loss_that_is_not_finite_ends_the_run(where, value, tmp_path, monkeypatch):
    step, end = Classifier.training_step, Classifier.on_train_batch_end

    def bad_loss(self, batch, index):
        loss = step(self, batch, index)
        if self.current_epoch == 1 and index == 1:
            self.train_sums[0] += value
        return loss

    def bad_weights(self, outputs, batch, index):
        end(self, outputs, batch, index)
        if self.current_epoch == 1 and index == 2:  # after the last step of the epoch: its training loss is finite
            self.model.fc.weight.data.fill_(value)

    monkeypatch.setattr(
        Classifier, *(("training_step", bad_loss) if where == "training_step" else ("on_train_batch_end", bad_weights))
    )
    name = "training" if where == "training_step" else "test"
    with pytest.raises(TrainError, match=f"the {name} loss is not finite .* in epoch 2, .* after epoch 1 is kept"):
        run(quick(tmp_path, epochs=3))
    assert not (tmp_path / "result.json").exists()
    assert epoch_of(tmp_path / LAST_CHECKPOINT) == 1
    assert all(
        bool(value.isfinite().all()) for value in read_checkpoint(tmp_path / LAST_CHECKPOINT)["state_dict"].values()
    )


def test_a_learning_rate_that_is_far_too_large(tmp_path):
    with pytest.raises(TrainError, match="loss is not finite .* in epoch 1, .*there is no checkpoint yet.*lower --lr"):
        run(quick(tmp_path, lr=1e30, arm="ce"))
    assert not (tmp_path / "result.json").exists() and not (tmp_path / LAST_CHECKPOINT).exists()


# A network that does not fit


@pytest.mark.parametrize("options_", [{"batch_size": 1}, {"limit": 1}])
def test_a_batch_of_one_at_one_pixel(options_, tmp_path):
    message = r"--arch resnet18 normalises over a batch.* 1 image of 1 x 8 x 8 .*raise --batch-size"
    with pytest.raises(TrainError, match=message):
        run(quick(tmp_path, arch="resnet18", arm="ce", **options_))


class Whatever(nn.Module):
    def __init__(self, output):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(10))
        self.output = output

    def forward(self, x):
        return self.output(x, self.weight)


@pytest.mark.parametrize(
    "output, message",
    [
        (lambda x, w: (w.expand(len(x), 10), x), r"--arch net: expected logits of shape \[64, 10\], got tuple"),
        (lambda x, w: w.expand(len(x), 10)[:, :7], r"expected logits of shape \[64, 10\], got \[64, 7\]"),
        (lambda x, w: torch.zeros(3) @ torch.zeros(4), r"--arch net cannot take batches of 64 images of 1 x 8 x 8"),
    ],
)
def test_outputs_that_are_no_logits(output, message, tmp_path, monkeypatch):
    monkeypatch.setattr(run_module, "build_model", lambda *arguments: (Whatever(output), None))
    with pytest.raises(TrainError, match=message):
        run(quick(tmp_path, arch="net", arm="ce"))


def test_a_layer_that_is_never_called(tmp_path, monkeypatch):
    def with_idle_layer(*arguments):
        model, stages = build_model(*arguments)
        model.idle = nn.Conv2d(1, 1, 1)
        return model, stages

    monkeypatch.setattr(run_module, "build_model", with_idle_layer)
    with pytest.raises(TrainError, match="^--layers: 'idle' is not run"):
        run(quick(tmp_path, layers=("layer1", "idle")))
