"""Data sets of the `datasets` library, saved to disk."""

from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("lightning", reason="the extra [train] is not installed")
pytest.importorskip("datasets", reason="the library datasets is not installed")
pytest.importorskip("PIL.Image", reason="pillow is not installed")

import datasets
import kill_runs
from PIL import Image

from sfr_ext import cli
from sfr_ext.train.config import LAST_CHECKPOINT, TrainConfig
from sfr_ext.train.data import load_data
from sfr_ext.train.errors import TrainError
from sfr_ext.train.folder import FileImages
from sfr_ext.train.run import run

pytestmark = pytest.mark.usefixtures("one_thread")


def rows(count, **columns):
    """Small images of two classes, and what else there is to be in a row."""
    levels = np.random.default_rng(0).integers(0, 256, (count, 12, 16, 3), dtype=np.uint8)
    return [{"picture": Image.fromarray(levels[i]), "label": i % 2, **columns} for i in range(count)]


def features(**more):
    return datasets.Features({"picture": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"]), **more})


def part(count, kinds=None, **columns):
    kinds = kinds or features()
    found = rows(count, **columns)
    return datasets.Dataset.from_dict({name: [row[name] for row in found] for name in kinds}, features=kinds)


def saved(folder, **parts):
    datasets.DatasetDict(parts).save_to_disk(str(folder))
    return folder


@pytest.fixture
def folder(tmp_path):
    return saved(tmp_path / "set", train=part(24), test=part(6))


def hf(folder, out, **more):
    few = {"image_size": 8, "batch_size": 8, "epochs": 2, "progress": False, "arm": "ce", "tensorboard": False}
    return TrainConfig(data="hf", data_dir=folder, out=out, **{**few, **more})


def test_images_and_labels_are_those_of_the_rows(folder, tmp_path):
    data = load_data(hf(folder, tmp_path))
    assert data.class_names == ("cat", "dog") and data.num_classes == 2
    assert data.train_labels.tolist() == [0, 1] * 12 and len(data.test_labels) == 6
    found = np.asarray(data.train.image(5))
    assert np.array_equal(found, np.asarray(rows(6)[5]["picture"]))
    kept = data.train.at(torch.tensor([7, 5]))
    assert np.array_equal(np.asarray(kept.image(1)), found) and kept.labels.tolist() == [1, 1]
    batch, labels = FileImages(data.test, 8, 0, False, -100).__getitems__([(0, 3), (0, -1)])
    assert batch.shape == (2, 3, 8, 8) and labels.tolist() == [1, -100]


def test_a_run_is_resumed_with_other_workers(folder, tmp_path):
    """With held-out rows and a limit."""
    config = hf(folder, tmp_path / "whole", validation=0.25, limit=20)
    result = run(config)
    assert result["class_names"] == ["cat", "dog"] and result["train_images"] == 15 and result["validation_images"] == 5
    run(replace(config, out=tmp_path / "parts", epochs=1, workers=1))
    (tmp_path / "parts" / "result.json").unlink()
    run(replace(config, out=tmp_path / "two", workers=1))
    assert kill_runs.same(kill_runs.end_of(tmp_path / "two"), kill_runs.end_of(tmp_path / "whole"))
    again = replace(config, out=tmp_path / "parts", resume=tmp_path / "parts" / LAST_CHECKPOINT)
    assert run(again)["epochs"] == 2


def test_as_a_command(folder, tmp_path):
    few = ["--image-size", "8", "--batch-size", "8", "--epochs", "1", "--no-progress", "--workers", "0"]
    out = str(tmp_path / "out")
    assert cli.main(["train", "--data", "hf", "--data-dir", str(folder), "--arm", "ce", "--out", out, *few]) == 0


@pytest.mark.parametrize(
    "parts, message",
    [
        (lambda: {"train": part(4)}, r"must have the parts train and test \(or validation\), got train"),
        (lambda: {"all": part(4), "test": part(4)}, "got all, test"),
        (
            lambda: {"train": part(4, features(other=datasets.Image()), other=rows(1)[0]["picture"]), "test": part(4)},
            "must have one column of images .* and one of classes .*, got picture .Image., label .ClassLabel., other",
        ),
        (
            lambda: {
                "train": part(4),
                "test": part(4, datasets.Features({**features(), "label": datasets.ClassLabel(names=["a", "b"])})),
            },
            "the parts train and test of .* do not have the same classes: .*(in train alone|another order)",
        ),
    ],
)
def test_sets_that_cannot_be_used(parts, message, tmp_path):
    with pytest.raises(TrainError, match=message):
        load_data(hf(saved(tmp_path / "set", **parts()), tmp_path))


def test_a_part_alone(tmp_path):
    part(4).save_to_disk(str(tmp_path / "set"))
    with pytest.raises(TrainError, match="got one part without a name"):
        load_data(hf(tmp_path / "set", tmp_path))


def test_validation_stands_for_a_test_that_is_missing(tmp_path):
    data = load_data(hf(saved(tmp_path / "set", train=part(4), validation=part(2)), tmp_path))
    assert len(data.test_labels) == 2


def test_a_row_that_cannot_be_read(tmp_path):
    table = part(4).cast_column("picture", datasets.Image(decode=False))
    broken = table.map(
        lambda row, i: {"picture": {"bytes": b"nothing", "path": None}} if i == 2 else row, with_indices=True
    )
    broken = broken.cast_column("picture", datasets.Image())
    data = load_data(hf(saved(tmp_path / "set", train=broken, test=part(2)), tmp_path))
    said = FileImages(data.train, 8, 0, False, -100).__getitems__([(0, 1), (0, 2)])
    assert isinstance(said, str) and said.startswith("image 2 of train of") and "cannot be read" in said


def test_names_that_nobody_has(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(TrainError, match="hf: .*nowhere cannot be loaded: "):
        load_data(hf(tmp_path / "nowhere", tmp_path))
    with pytest.raises(TrainError, match="hf: --data-dir is needed"):
        load_data(TrainConfig(data="hf", out=tmp_path))


def test_without_the_library(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(TrainError, match=r"--data hf needs the library datasets .*pip install datasets pillow"):
        load_data(hf(tmp_path, tmp_path))
