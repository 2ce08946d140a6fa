"""What a run may have beside its arm: averaged weights, mixup, held-out images, a compiled network, TensorBoard."""

import importlib.util
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("lightning", reason="the extra [train] is not installed")
pytest.importorskip("matplotlib", reason="the extra [train] is not installed")
pytest.importorskip("sklearn", reason="the extra [train] is not installed")

import kill_runs

from sfr_ext.train import run as run_module
from sfr_ext.train.best import BEST_CHECKPOINT
from sfr_ext.train.checkpoints import read_checkpoint
from sfr_ext.train.config import LAST_CHECKPOINT, TrainConfig
from sfr_ext.train.data import load_data
from sfr_ext.train.errors import TrainError
from sfr_ext.train.mixing import mixup
from sfr_ext.train.module import Classifier
from sfr_ext.train.records import read_rows
from sfr_ext.train.run import run
from sfr_ext.train.trained import load_trained

pytestmark = pytest.mark.usefixtures("one_thread")


def quick(out, **changed):
    """128 digits, two steps of 64 an epoch."""
    few = {"data": "digits", "limit": 128, "batch_size": 64, "epochs": 3, "arm": "ce", "progress": False}
    return TrainConfig(**{**few, "tensorboard": False, "out": out, **changed})


def cut_and_resumed(config, epoch):
    """Ends without warning in that epoch, and goes on."""
    step = Classifier.training_step

    def breaks(self, batch, index):
        if self.current_epoch == epoch - 1:
            raise KeyError("power cut")
        return step(self, batch, index)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyError):
        patch.setattr(Classifier, "training_step", breaks)
        run(config)
    return run(replace(config, resume=config.out / LAST_CHECKPOINT))


@pytest.mark.parametrize(
    "more",
    [
        {"ema": 0.8},
        {"mixup": 0.4, "arm": "sfr"},
        {"channel_mode": "project", "arm": "sfr"},
        {"validation": 0.25},
        {"ema": 0.8, "mixup": 0.4, "validation": 0.25, "arm": "sfr", "optimizer": "adamw", "lr": 0.01, "accumulate": 2},
    ],
    ids=lambda more: "+".join(more),
)
def test_a_resumed_run_is_the_uninterrupted_one(more, tmp_path):
    whole = run(quick(tmp_path / "whole", **more))
    parts = cut_and_resumed(quick(tmp_path / "parts", **more), 3)
    assert kill_runs.same(kill_runs.end_of(tmp_path / "parts"), kill_runs.end_of(tmp_path / "whole"))
    for key in {"test_accuracy", "val_accuracy", "best_epoch", "test_loss"} & set(whole):
        assert parts[key] == whole[key]


# Layers of any network


class Tokens(nn.Module):
    """A small ViT: a class token and 4 x 4 patches, 12 channels."""

    def __init__(self, channels, num_classes):
        super().__init__()
        self.patches = nn.Conv2d(channels, 12, 2, 2)
        self.first = nn.Parameter(torch.zeros(1, 1, 12))
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(12, 2, 24, 0.0, batch_first=True) for _ in range(4))
        self.head = nn.Linear(12, num_classes)

    def forward(self, x):
        x = self.patches(x).flatten(2).mT
        x = torch.cat((self.first.expand(len(x), -1, -1), x), 1)
        for block in self.blocks:
            x = block(x)
        return self.head(x[:, 0])


@pytest.mark.parametrize("layers", [None, ("blocks.0", "blocks.3")])
def test_tokens_are_found_out(layers, tmp_path, monkeypatch, capsys):
    """Layers that return tokens are compared as maps: those that are named, or those that sfr-ext layers suggests."""
    monkeypatch.setattr(run_module, "build_model", lambda arch, channels, classes: (Tokens(channels, classes), None))
    kept = []
    setup = Classifier.setup

    def watched(self, stage):
        setup(self, stage)
        assert all(module.training for module in self.model.modules())
        kept.append(self.regularizer)

    monkeypatch.setattr(Classifier, "setup", watched)
    result = run(quick(tmp_path, arm="sfr", layers=layers, lr=0.01, epochs=1, monitor=True))
    (regularizer,) = kept
    assert regularizer.layers == (layers or ("blocks.0", "blocks.1", "blocks.2", "blocks.3"))
    assert result["layers"] == json.loads((tmp_path / "result.json").read_text())["layers"] == list(regularizer.layers)
    assert f"\nlayers: {', '.join(regularizer.layers)}\n" in capsys.readouterr().out
    assert None not in regularizer._transforms.values()
    assert read_rows(tmp_path / "metrics.csv")[0]["train_feature_loss"] > 0
    assert (tmp_path / "monitor.png").is_file()


def test_images_that_the_network_does_not_take(tmp_path, monkeypatch):
    monkeypatch.setattr(
        run_module, "build_model", lambda arch, channels, classes: (nn.Conv2d(channels, classes, 9), None)
    )
    with pytest.raises(TrainError, match=r"--arch resnet8 cannot take images of 1 x 8 x 8 \("):
        run(quick(tmp_path, arm="sfr"))


def test_projections_are_learned(tmp_path):
    run(quick(tmp_path, arm="sfr", channel_mode="project", layers=("layer1", "layer3")))
    state = read_checkpoint(tmp_path / LAST_CHECKPOINT)
    assert state["state_dict"]["regularizer.projections.pair0"].shape == (64, 16, 1, 1)
    count = sum(len(group["params"]) for group in state["optimizer_states"][0]["param_groups"])
    assert count == 1 + sum(
        name.startswith("model.") and "running" not in name and "num_b" not in name for name in state["state_dict"]
    )
    with pytest.raises(TrainError, match=r"--layers: 'fc' returns \[2, 10\], and no features"):
        run(quick(tmp_path / "fc", arm="sfr", channel_mode="project", layers=("layer1", "fc")))
    with pytest.raises(TrainError, match="--monitor does not show --channel-mode project"):
        run(quick(tmp_path / "m", arm="sfr", channel_mode="project", monitor=True))


# Averaged weights


def test_ema_is_the_average_of_the_steps(tmp_path, monkeypatch):
    seen = []
    end = Classifier.on_train_batch_end

    def watched(self, *arguments):
        end(self, *arguments)
        seen.append(self.model.fc.weight.detach().clone())

    monkeypatch.setattr(Classifier, "on_train_batch_end", watched)
    run(quick(tmp_path, ema=0.75))
    average = seen[0]
    for weight in seen[1:]:
        average = 0.75 * average + 0.25 * weight
    state = read_checkpoint(tmp_path / LAST_CHECKPOINT)["state_dict"]
    torch.testing.assert_close(state["average.module.fc.weight"], average)
    torch.testing.assert_close(state["model.fc.weight"], seen[-1])


def test_the_averaged_network_is_tested(tmp_path):
    """And it is what is taken from a checkpoint."""
    result = run(quick(tmp_path, ema=0.75))
    data = load_data(TrainConfig())
    trained = load_trained(tmp_path)
    with torch.no_grad():
        found = trained.model(trained.normalised(data.test_images / 255)).argmax(1)
    assert result["test_accuracy"] == pytest.approx(float((found == data.test_labels).double().mean()), abs=2.1 / 359)
    weights = read_checkpoint(tmp_path / LAST_CHECKPOINT)["state_dict"]
    assert torch.equal(trained.model.fc.weight, weights["average.module.fc.weight"])


def test_training_does_not_depend_on_the_average(tmp_path):
    for name, more in (("with", {"ema": 0.9}), ("without", {})):
        run(quick(tmp_path / name, **more))
    states = [read_checkpoint(tmp_path / name / LAST_CHECKPOINT)["state_dict"] for name in ("with", "without")]
    assert all(torch.equal(states[0][name], value) for name, value in states[1].items())


# Mixup


def test_mixup_by_hand():
    images, labels = torch.rand(4, 3, 2, 2), torch.tensor([0, 1, 2, 1])
    mixed, shares = mixup(images, labels, 3, 1.0, (7, 0, 0, 0))
    random = np.random.default_rng((7, 0, 0, 0))
    share, partner = random.beta(1.0, 1.0), random.permutation(4)
    torch.testing.assert_close(mixed, share * images + (1 - share) * images[partner])
    for i, j in enumerate(partner):
        wanted = torch.zeros(3)
        wanted[labels[i]] += share
        wanted[labels[j]] += 1 - share
        torch.testing.assert_close(shares[i], wanted)
    again = mixup(images, labels, 3, 1.0, (7, 0, 0, 0))
    assert torch.equal(again[0], mixed) and not torch.equal(mixup(images, labels, 3, 1.0, (7, 0, 1, 0))[0], mixed)


def test_mixup_in_a_run(tmp_path):
    run(quick(tmp_path, mixup=0.4, arm="dls", epochs=1))
    row = read_rows(tmp_path / "metrics.csv")[0]
    assert row["train_cross_entropy"] > 0 and 0 < row["train_accuracy"] < 1
    with pytest.raises(TrainError, match="--mixup makes probabilities of the labels, .* --prior online"):
        quick(tmp_path, mixup=0.4, prior="online")


# Held-out images


def test_held_out_images_are_not_trained_on():
    for name in ("digits",):
        plain, split = (load_data(TrainConfig(data=name, validation=share, seed=3)) for share in (0.0, 0.2))
        images, labels = split.held_out
        assert len(labels) == round(0.2 * len(plain.train_labels))
        assert len(labels) + len(split.train_labels) == len(plain.train_labels)
        together = torch.cat((split.train_images, images)).flatten(1).double()
        weights = torch.rand(together.shape[1], dtype=torch.float64)
        ours, theirs = ((x @ weights).sort().values for x in (together, plain.train_images.flatten(1).double()))
        torch.testing.assert_close(ours, theirs)
        assert torch.equal(split.test_images, plain.test_images)
    other = load_data(TrainConfig(validation=0.2, seed=4))
    assert not torch.equal(other.held_out[1], labels)
    for share in (0.0001, 0.9999):
        with pytest.raises(
            TrainError, match=f"--validation {share} of 1438 training images leaves one of both without"
        ):
            load_data(TrainConfig(validation=share))


def test_held_out_files(tmp_path):
    image = pytest.importorskip("PIL.Image", reason="pillow is not installed")
    for i in range(20):
        path = tmp_path / "images" / ("train" if i < 16 else "test") / "ab"[i % 2] / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.new("RGB", (9, 9), (10 * i, 0, 0)).save(path)
    few = {"data": "imagefolder", "data_dir": tmp_path / "images", "image_size": 8, "batch_size": 4, "limit": None}
    config = quick(tmp_path / "out", **few, validation=0.25, workers=1)
    data = load_data(config)
    names = {files.names[i] for files in (data.train, data.held_out) for i in range(len(files.labels))}
    assert len(data.held_out.labels) == 4 and len(data.train.labels) == 12 and len(names) == 16
    result = run(config)
    assert result["validation_images"] == 4 and result["train_images"] == 12 and 0 <= result["test_accuracy"] <= 1


def test_the_best_epoch_is_tested_once(tmp_path, monkeypatch, capsys):
    """Validation that is best after the second of four epochs: the weights of that epoch are what is tested."""
    after = {}
    given = iter([0.1, 0.9, 0.5, 0.9])
    means = Classifier.take_means

    def chosen(self):
        after[self.current_epoch + 1] = {k: v.clone() for k, v in self.model.state_dict().items()}
        return {**means(self), "val_accuracy": next(given)}

    monkeypatch.setattr(Classifier, "take_means", chosen)
    result = run(quick(tmp_path, validation=0.25, epochs=4))
    assert result["best_epoch"] == 2 and result["val_accuracy"] == 0.9 and result["epochs"] == 4
    assert "of epoch 2, the best by validation" in capsys.readouterr().out
    best = read_checkpoint(tmp_path / BEST_CHECKPOINT)
    assert all(torch.equal(best["state_dict"][f"model.{name}"], value) for name, value in after[2].items())
    rows = read_rows(tmp_path / "metrics.csv")
    assert "val_accuracy" in rows[0] and "test_accuracy" not in rows[0] and "test_loss" not in rows[0]

    data = load_data(TrainConfig())
    trained = load_trained(tmp_path / BEST_CHECKPOINT)
    with torch.no_grad():
        logits = trained.model(trained.normalised(data.test_images / 255))
    hits = float((logits.argmax(1) == data.test_labels).double().mean())
    assert result["test_accuracy"] == pytest.approx(hits, abs=2.1 / 359)
    loss = nn.functional.cross_entropy(logits, data.test_labels)
    assert result["test_loss"] == pytest.approx(float(loss), rel=1e-3)
    assert json.loads((tmp_path / "result.json").read_text()) == json.loads(json.dumps(result))
    with pytest.raises(TrainError, match="best.ckpt holds the weights of the best epoch alone; last.ckpt beside it"):
        run(quick(tmp_path, validation=0.25, epochs=5, resume=tmp_path / BEST_CHECKPOINT))


def test_other_held_out_images_on_resume(tmp_path, monkeypatch):
    run(quick(tmp_path, validation=0.25, epochs=1))
    data = load_data(quick(tmp_path, validation=0.25))
    monkeypatch.setattr(
        run_module, "load_data", lambda config: replace(data, held_out=(data.train_images, data.train_labels))
    )
    with pytest.raises(TrainError, match="was trained on 32 validation images, --data digits has 96 now"):
        run(quick(tmp_path, validation=0.25, resume=tmp_path / LAST_CHECKPOINT))


@pytest.mark.parametrize("precision", ["bf16-mixed", "64"])
def test_the_test_has_the_precision_of_the_run(precision, tmp_path):
    assert 0 <= run(quick(tmp_path, validation=0.25, epochs=1, precision=precision))["test_accuracy"] <= 1


# Compiled


@pytest.mark.slow
def test_a_compiled_network(tmp_path):
    """Trains as the plain one does, and is resumed with its bits."""
    compiled = {"compile": True, "arm": "sfr", "ema": 0.8, "epochs": 2, "limit": 64, "batch_size": 32}
    run(quick(tmp_path / "compiled", **compiled))
    run(quick(tmp_path / "plain", **{**compiled, "compile": False}))
    ours, theirs = (read_rows(tmp_path / name / "metrics.csv") for name in ("compiled", "plain"))
    for row, other in zip(ours, theirs, strict=True):
        for key in ("train_cross_entropy", "train_feature_loss", "test_loss"):
            assert row[key] == pytest.approx(other[key], rel=2e-2), key
    cut_and_resumed(quick(tmp_path / "parts", **compiled), 2)
    assert kill_runs.same(kill_runs.end_of(tmp_path / "parts"), kill_runs.end_of(tmp_path / "compiled"))


def test_what_is_compiled_is_the_network(tmp_path, monkeypatch):
    """With its hooks; by a backend that keeps the operations as they are."""
    compile_ = nn.Module.compile
    seen = []

    def eagerly(self):
        seen.append(type(self).__name__)
        compile_(self, backend="eager", fullgraph=True)

    monkeypatch.setattr(nn.Module, "compile", eagerly)
    few = {"arm": "sfr", "epochs": 1, "monitor": True}
    run(quick(tmp_path / "compiled", compile=True, **few))
    run(quick(tmp_path / "plain", **few))
    assert seen == ["ResNet"]
    assert kill_runs.same(kill_runs.end_of(tmp_path / "compiled"), kill_runs.end_of(tmp_path / "plain"))


# What is shown


def test_tensorboard(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    run(quick(tmp_path, tensorboard=None, epochs=2))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    rows = read_rows(tmp_path / "metrics.csv")
    for key in ("train_loss", "test_accuracy", "learning_rate"):
        logged = [(event.step, event.value) for event in events.Scalars(key)]
        for row in rows:
            assert any(s == row["step"] and v == pytest.approx(row[key], rel=1e-5) for s, v in logged), key
    run(quick(tmp_path, tensorboard=False, epochs=1, overwrite=True))
    assert not (tmp_path / "tensorboard").exists()


def test_tensorboard_that_is_not_there(tmp_path, monkeypatch):
    def missing(*arguments, **options):
        raise ModuleNotFoundError("tensorboard")

    monkeypatch.setattr(run_module, "TensorBoardLogger", missing)
    with pytest.raises(TrainError, match="--tensorboard needs tensorboard, not installed here"):
        run(quick(tmp_path, tensorboard=True))
    monkeypatch.setattr(run_module, "_is_installed", lambda name: False)
    assert run(quick(tmp_path, tensorboard=None, epochs=1))["epochs"] == 1


@pytest.mark.skipif(importlib.util.find_spec("rich") is None, reason="rich is not installed")
def test_a_bar_by_rich(tmp_path, capsys):
    run(quick(tmp_path, progress=True, epochs=1, arm="sfr"))
    said = capsys.readouterr().out
    # Apart: their sum rises in a healthy run.
    assert "Epoch 0" in said and "cross-entropy:" in said and "feature" in said and "train_loss" not in said


@pytest.mark.parametrize("more", [{}, {"validation": 0.25}])
def test_tests_may_be_further_apart(more, tmp_path):
    options = {"epochs": 4, "arm": "sfr", **more}
    often = run(quick(tmp_path / "often", **options))
    seldom = run(quick(tmp_path / "seldom", test_every=2, **options))
    part = "val" if more else "test"
    rows = {name: read_rows(tmp_path / name / "metrics.csv") for name in ("often", "seldom")}
    for one, two in zip(rows["often"], rows["seldom"], strict=True):
        assert one["train_loss"] == two["train_loss"]  # a test changes nothing
        if two["epoch"] % 2:
            assert np.isnan(two[f"{part}_accuracy"])
        else:
            assert one[f"{part}_accuracy"] == two[f"{part}_accuracy"]
    if not more:
        assert often["test_accuracy"] == seldom["test_accuracy"]
    cut_and_resumed(quick(tmp_path / "parts", test_every=2, **options), epoch=4)
    assert kill_runs.same(kill_runs.end_of(tmp_path / "parts"), kill_runs.end_of(tmp_path / "seldom"))
    with pytest.raises(TrainError, match="--test-every must be a divisor of --epochs 4, got 3"):
        quick(tmp_path, test_every=3, **options)
