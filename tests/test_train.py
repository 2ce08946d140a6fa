"""The training run: arms, files, repeatability, resuming, networks, and how the seconds are counted."""

import json
import re
import sys
import types
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("lightning", reason="the extra [train] is not installed")
pytest.importorskip("matplotlib", reason="the extra [train] is not installed")
pytest.importorskip("sklearn", reason="the extra [train] is not installed")

from sfr_ext.train import stopwatch
from sfr_ext.train.arms import PointwiseL2
from sfr_ext.train.config import ARMS, TrainConfig
from sfr_ext.train.errors import TrainError
from sfr_ext.train.loader import Share
from sfr_ext.train.models import RESNETS, build_model
from sfr_ext.train.module import Classifier
from sfr_ext.train.records import read_rows
from sfr_ext.train.run import run
from sfr_ext.train.stopwatch import TimedRegularizer

pytestmark = pytest.mark.usefixtures("one_thread")


def quick(out, **options):
    """192 digits, three steps of 64 an epoch."""
    return TrainConfig(
        **{
            "data": "digits",
            "limit": 192,
            "batch_size": 64,
            "epochs": 1,
            "progress": False,
            "tensorboard": False,
            "out": out,
            **options,
        }
    )


def rows_of(out):
    return read_rows(out / "metrics.csv")


def without_clock(rows):
    return [{k: v for k, v in row.items() if "seconds" not in k} for row in rows]


# Whole runs


@pytest.mark.parametrize("arm", list(ARMS))
def test_every_arm_writes_its_files(arm, tmp_path):
    returned = run(quick(tmp_path, arm=arm, epochs=2))
    result = json.loads((tmp_path / "result.json").read_text())
    assert result == json.loads(json.dumps(returned))
    expected = {"arm": arm, "seed": 0, "data": "digits", "arch": "resnet8", "epochs": 2, "devices": 1}
    assert {k: result[k] for k in expected} == expected
    assert set(result["versions"]) == {"sfr_ext", "torch", "lightning", "python"}
    # A whole number of the 359 test images.
    assert result["test_accuracy"] * 359 == pytest.approx(round(result["test_accuracy"] * 359), abs=1e-6)
    has_features = arm in ("sfr", "emd", "l2", "tfd", "byot")
    timed = has_features and arm != "byot"  # whose hint is computed with its heads
    assert (0 < result["emd_seconds"] < result["seconds"]) if timed else result["emd_seconds"] == 0

    rows = rows_of(tmp_path)
    assert [row["epoch"] for row in rows] == [1, 2] and [row["step"] for row in rows] == [3, 6]
    last = rows[-1]
    assert last["test_accuracy"] == pytest.approx(result["test_accuracy"], rel=1e-5)
    assert last["smoothing"] == pytest.approx({"ls": 0.1, "dls": 0.1, "sfr": 0.1}.get(arm, 0.0))
    assert (last["train_feature_loss"] > 0) == has_features
    assert last["train_loss"] == pytest.approx(last["train_cross_entropy"] + last["train_feature_loss"], rel=1e-4)
    assert last["learning_rate"] == 0
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "checkpoints",
        "curves.png",
        "metrics.csv",
        "result.json",
        "steps",
    ]


def test_the_feature_loss_is_told_without_its_factor(tmp_path, capsys):
    """A warm-up would look like a loss that grows; the file has what is in the loss."""
    run(quick(tmp_path, arm="emd", emd_weight=1e-3, emd_warmup=0.0))
    (told,) = re.findall(r"feature loss (\S+)", capsys.readouterr().out)
    assert float(told) == pytest.approx(1e3 * rows_of(tmp_path)[-1]["train_feature_loss"], abs=1e-3)
    assert float(told) > 0.1
    run(quick(tmp_path / "warmup", arm="emd", emd_warmup=1.0))
    (told,) = re.findall(r"feature loss (\S+)", capsys.readouterr().out)
    assert float(told) > 1.2 * rows_of(tmp_path / "warmup")[-1]["train_feature_loss"]


def test_it_learns(tmp_path):
    result = run(quick(tmp_path, arm="sfr", limit=None, batch_size=32, epochs=2))
    assert result["test_accuracy"] > 0.8


def test_same_seed_same_run_other_seed_another(tmp_path):
    runs = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run(quick(tmp_path / name, arm="sfr", seed=seed))
        runs.append(without_clock(rows_of(tmp_path / name)))
    assert runs[0] == runs[1] != runs[2]


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, monkeypatch):
    options = {"arm": "sfr", "epochs": 3, "prior": "online", "emd_warmup": 2.0}
    run(quick(tmp_path / "whole", **options))

    step = Classifier.training_step

    def breaks(self, batch, index):
        if self.current_epoch == 2:
            raise RuntimeError("power cut")
        return step(self, batch, index)

    config = quick(tmp_path / "parts", **options)
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "result.json").write_text("of an earlier run")
    with pytest.raises(TrainError, match="holds a finished run"):
        run(config)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="power cut"):
        patch.setattr(Classifier, "training_step", breaks)
        run(replace(config, overwrite=True))
    assert not (tmp_path / "parts" / "result.json").exists()
    assert len(rows_of(tmp_path / "parts")) == 2

    last = tmp_path / "parts" / "checkpoints" / "last.ckpt"
    result = run(quick(tmp_path / "parts", **options, resume=last))
    assert without_clock(rows_of(tmp_path / "parts")) == without_clock(rows_of(tmp_path / "whole"))
    assert result["epochs"] == 3
    assert result["seconds"] == pytest.approx(sum(row["seconds"] for row in rows_of(tmp_path / "parts")), rel=1e-4)

    for changes, message in (
        ({"arm": "emd"}, "was trained with --arm sfr, got emd"),
        ({"epochs": 3}, "has already run 3 epochs"),
    ):
        with pytest.raises(TrainError, match=message):
            run(quick(tmp_path / "parts", **{**options, **changes}, resume=last))


@pytest.mark.parametrize("precision", ["bf16-mixed", "64"])
def test_precisions(precision, tmp_path):
    result = run(quick(tmp_path, arm="sfr", precision=precision))
    assert result["options"]["precision"] == precision
    assert all(abs(value) < 1e6 for value in rows_of(tmp_path)[0].values())


def test_layers_that_do_not_exist_or_do_not_fit(tmp_path):
    with pytest.raises(TrainError, match="--layers: the network has no layer 'layer9'; near to it: layer"):
        run(quick(tmp_path, layers=("layer1", "layer9")))
    with pytest.raises(TrainError, match="--layers: the network has no layer 'nope'"):  # and not: at least 2 layers
        run(quick(tmp_path, layers=("nope",)))
    with pytest.raises(TrainError, match=r"'fc' returns \[2, 10\]"):
        run(quick(tmp_path, layers=("layer1", "fc")))


def test_out_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainError, match="--out: .* cannot be made"):
        run(quick(tmp_path / "file" / "out"))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"arm": "kd"}, "--arm must be one of ce, ls, .*'kd'"),
        ({"data": "mnist"}, "--data must be one of"),
        ({"epochs": 0}, "--epochs must be at least 1, got 0"),
        ({"batch_size": -1}, "--batch-size must be at least 1, got -1"),
        ({"limit": 0}, "--limit must be at least 1, got 0"),
        ({"lr": 0.0}, "--lr must be above 0"),
        ({"lr": float("nan")}, "--lr must be above 0"),
        ({"eps": 0.0}, "--eps must be above 0"),
        ({"eps": 0.1}, "--eps is for --solver sinkhorn, got 0.1 with --solver exact"),
        ({"solver": "simplex"}, "--solver must be one of exact, sinkhorn, got 'simplex'"),
        ({"smoothing": 1.5}, r"--smoothing must be in \[0, 1\], got 1.5"),
        ({"emd_weight": -1.0}, "--emd-weight must be at least 0"),
        ({"devices": "none"}, "--devices must be a number from 1 or 'auto', got 'none'"),
        ({"devices": "0"}, "--devices must be a number from 1 or 'auto', got '0'"),
        ({"devices": "²"}, "--devices must be a number from 1 or 'auto', got '²'"),
        ({"devices": "٣"}, "--devices must be a number"),
        ({"devices": "-1"}, "--devices must be a number"),
        ({"devices": ""}, "--devices must be a number"),
        ({"seed": -1}, "--seed must be at least 0, got -1"),
        ({"seed": 2**32}, "--seed must be at most 4294967295"),
        ({"emd_warmup": float("inf")}, "--emd-warmup must be finite, got inf"),
        ({"emd_warmup": float("nan")}, "--emd-warmup must be at least 0, got nan"),
        ({"emd_weight": float("inf")}, "--emd-weight must be finite"),
        ({"weight_decay": float("inf")}, "--weight-decay must be finite"),
        ({"lr": float("inf")}, "--lr must be finite"),
        ({"smoothing": float("nan")}, r"--smoothing must be in \[0, 1\]"),
        ({"batch_size": 10**30}, "--batch-size must be at most"),
        ({"epochs": 2.5}, "--epochs must be a whole number, got 2.5"),
        ({"schedule": "step"}, "--schedule must be one of linear, cosine, constant, got 'step'"),
        ({"pairs": "first"}, "--pairs must be one of"),
        ({"accelerator": "npu"}, "--accelerator must be one of"),
        ({"precision": "8"}, "--precision must be one of"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(TrainError, match=message):
        TrainConfig(**options)


# Networks


@pytest.mark.parametrize("arch", list(RESNETS))
def test_resnets(arch):
    model, stages = build_model(arch, 1, 7)
    shapes = {}
    for stage in stages:
        getattr(model, stage).register_forward_hook(
            lambda module, args, out, stage=stage: shapes.update({stage: tuple(out.shape[1:])})
        )
    assert model(torch.rand(2, 1, 16, 16)).shape == (2, 7)
    widths = (64, 128, 256, 512) if arch == "resnet18" else (16, 32, 64)
    assert list(shapes.values()) == [(w, 16 >> i, 16 >> i) for i, w in enumerate(widths)]


@pytest.mark.parametrize("arch, millions", [("resnet20", 0.27), ("resnet32", 0.47), ("resnet18", 11.17)])
def test_sizes_are_those_of_the_literature(arch, millions):
    model, _ = build_model(arch, 3, 10)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.01)


def test_unknown_arch():
    with pytest.raises(TrainError, match="'resnet9' is neither one of resnet8, resnet14.*near to it: resnet"):
        build_model("resnet9", 1, 10)


@pytest.fixture
def torchvision_models(monkeypatch):
    """A torchvision.models of one classifier, with the detectors in a package of theirs, as the real one has them."""
    models, detection = types.ModuleType("torchvision.models"), types.ModuleType("torchvision.models.detection")
    detection.__path__ = []
    names = {models: ["tiny", "googlenet"], detection: ["fasterrcnn_tiny"]}
    models.detection = detection
    models.list_models = lambda module=None: names[module] if module else sum(names.values(), [])
    models.asked = []

    def get_model(name, weights, num_classes, **options):
        models.asked.append((name, options))
        assert weights is None and name != "fasterrcnn_tiny", "a download"
        return nn.Sequential(nn.Conv2d(3, 2, 1), nn.Flatten(), nn.Linear(8, num_classes))

    models.get_model = get_model
    package = types.ModuleType("torchvision")
    package.models = models
    monkeypatch.setitem(sys.modules, "torchvision", package)
    monkeypatch.setitem(sys.modules, "torchvision.models", models)
    return models


def test_torchvision_names_that_are_no_classifiers(torchvision_models):
    with pytest.raises(TrainError, match="fasterrcnn_tiny is no classifier"):
        build_model("fasterrcnn_tiny", 3, 5)
    build_model("googlenet", 3, 5)
    assert torchvision_models.asked == [("googlenet", {"aux_logits": False, "init_weights": True})]


def test_torchvision_and_timm_names(monkeypatch):
    def get_model(name, weights, num_classes):
        return nn.Sequential(nn.Conv2d(3, 2, 1), nn.Flatten(), nn.Linear(8, num_classes))

    models = types.ModuleType("torchvision.models")
    models.list_models, models.get_model = lambda: ["tiny"], get_model
    timm = types.ModuleType("timm")
    timm.is_model = lambda name: name == "small"
    timm.create_model = lambda name, pretrained, num_classes, in_chans: nn.Conv2d(in_chans, num_classes, 1)
    monkeypatch.setitem(sys.modules, "torchvision", types.ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.models", models)
    monkeypatch.setitem(sys.modules, "timm", timm)
    model, stages = build_model("tiny", 1, 5)
    assert model(torch.rand(2, 1, 2, 2)).shape == (2, 5) and stages is None
    model, _ = build_model("small", 4, 5)
    assert model(torch.rand(2, 4, 2, 2)).shape == (2, 5, 2, 2)


# Parts


def test_accumulated_batches_are_the_large_batch(tmp_path):
    """A network without batch statistics: two batches of 32 make the step of one of 64."""

    class Plain(nn.Module):
        def __init__(self, *_):
            super().__init__()
            self.fc = nn.Linear(64, 10)

        def forward(self, x):
            return self.fc(x.flatten(1))

    ends = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sfr_ext.train.run.build_model", lambda *shape: (Plain(), None))
        for name, options in (("large", {"batch_size": 64}), ("small", {"batch_size": 32, "accumulate": 2})):
            run(quick(tmp_path / name, arm="ce", augment=False, **options))
            checkpoint = torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True)
            ends.append(checkpoint["state_dict"]["model.fc.weight"])
    torch.testing.assert_close(*ends, rtol=1e-4, atol=1e-6)


def test_pretrained_is_for_timm_and_asked_for(monkeypatch):
    timm = types.ModuleType("timm")
    timm.is_model = lambda name: name in ("small", "offline")

    def create_model(name, pretrained, num_classes, in_chans):
        if name == "offline":
            raise OSError("no network")
        model = nn.Conv2d(in_chans, num_classes, 1)
        model.pretrained = pretrained
        return model

    timm.create_model = create_model
    monkeypatch.setitem(sys.modules, "timm", timm)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    assert build_model("small", 3, 5)[0].pretrained is False
    assert build_model("small", 3, 5, pretrained=True)[0].pretrained is True
    with pytest.raises(TrainError, match="--pretrained is for timm's models, and --arch 'resnet8' is none here"):
        build_model("resnet8", 3, 5, pretrained=True)
    with pytest.raises(TrainError, match="weights cannot be had .no network"):
        build_model("offline", 3, 5, pretrained=True)


def test_share_covers_every_image_once():
    for length, world in ((10, 3), (9, 3), (1, 2), (7, 1)):
        shares = [list(Share(length, world, rank)) for rank in range(world)]
        assert len({len(share) for share in shares}) == 1
        assert sorted(i for share in shares for _, i in share if i >= 0) == list(range(length))


class Two(nn.Module):
    """Two maps; both convolutions go through functions that let a clock run."""

    def __init__(self):
        super().__init__()
        self.shallow, self.deep = nn.Conv2d(1, 2, 1), nn.Conv2d(2, 4, 2, 2)

    def forward(self, x):
        return self.deep(Costly.apply(self.shallow(x), 100.0))


class Costly(torch.autograd.Function):
    """Identity that takes some seconds of the fake clock forward, and ten times as many backward."""

    clock = 0.0

    @staticmethod
    def forward(ctx, x, seconds):
        Costly.clock += seconds
        ctx.seconds = seconds
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        Costly.clock += 10 * ctx.seconds
        return grad, None


def test_seconds_are_those_of_the_loss_forward_and_backward(monkeypatch):
    monkeypatch.setattr(stopwatch.time, "perf_counter", lambda: Costly.clock)

    class Slow(TimedRegularizer):
        def _distance(self, student, teacher):
            return super()._distance(Costly.apply(student, 1.0), teacher)

    model = Two()
    sfr = Slow(model, ["shallow", "deep"])
    for step in (1, 2):
        logits = model(torch.rand(2, 1, 4, 4)).mean((2, 3))
        feature = sfr.loss()
        (Costly.apply(F.cross_entropy(logits, torch.tensor([0, 1])), 7.0) + feature).backward()
        assert sfr.stopwatch.seconds() == pytest.approx(11.0 * step)
    with torch.no_grad():
        model(torch.rand(2, 1, 4, 4))
        sfr.loss()
    assert sfr.stopwatch.seconds() == pytest.approx(23.0)


def test_timing_changes_nothing():
    images, results = torch.rand(2, 1, 4, 4), []
    model = Two()
    for kind in (TimedRegularizer, TimedRegularizer.__mro__[1]):
        with kind(model, ["shallow", "deep"]) as sfr:
            model(images)
            loss = sfr.loss()
            results.append((loss.detach(), *torch.autograd.grad(loss, model.shallow.weight)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_pointwise_l2_by_hand():
    model = Two()
    x = torch.rand(2, 1, 4, 4)
    with PointwiseL2(model, ["shallow", "deep"]) as l2:
        model(x)
        loss = l2.loss()
    student = F.normalize(F.avg_pool2d(model.shallow(x), 2), dim=1)
    deep = model.deep(model.shallow(x))
    groups = [F.normalize(deep[:, c : c + 2], dim=1) for c in (0, 2)]
    wanted = sum((student - group).norm(dim=1).mean() for group in groups) / 2
    torch.testing.assert_close(loss, wanted)
