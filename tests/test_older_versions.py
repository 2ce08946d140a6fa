"""What 0.1.0 has saved is still good: a run of two batches, `sfr-ext train --data digits --arm sfr --prior online
--limit 128 --batch-size 64 --epochs 1`, made by the source of f35e498.
"""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import sfr_ext
from sfr_ext import cli
from sfr_ext.train.models import build_model

pytestmark = pytest.mark.usefixtures("one_thread")
RUN = Path(__file__).with_name("data") / "run-0.1.0"


def state() -> dict[str, Any]:
    return torch.load(RUN / "checkpoints" / "last.ckpt", weights_only=False, map_location="cpu")["state_dict"]


def part(prefix: str) -> dict[str, Any]:
    return {name.removeprefix(prefix): value for name, value in state().items() if name.startswith(prefix)}


def test_states_load_into_the_modules_of_now() -> None:
    model, stages = build_model("resnet8", channels=1, num_classes=10)
    model.load_state_dict(part("model."))
    sfr = sfr_ext.SelfFeatureRegularizer(model, stages)
    sfr.load_state_dict(part("regularizer."))
    smooth = sfr_ext.DynamicLabelSmoothing(0.1, total_steps=4, prior="online")
    smooth.load_state_dict(part("smoothing."))
    assert int(sfr.steps) == int(smooth.steps) == 2
    assert torch.equal(smooth.class_prior, part("smoothing.")["class_prior"])
    model(torch.rand(4, 1, 8, 8))
    assert sfr.loss().isfinite()


def test_a_run_goes_on(tmp_path: Path) -> None:
    pytest.importorskip("lightning")
    pytest.importorskip("jsonargparse")
    pytest.importorskip("sklearn")
    out = tmp_path / "run"
    shutil.copytree(RUN, out)
    before = next(csv.DictReader((out / "metrics.csv").open()))
    assert cli.main(["train", "--resume", str(out), "--epochs", "2", "--no-progress"]) == 0
    result = json.loads((out / "result.json").read_text())
    options = {key: result["options"][key] for key in ("arm", "solver", "eps", "prior", "limit", "batch_size")}
    wanted = {"arm": "sfr", "solver": "sinkhorn", "eps": 0.05, "prior": "online", "limit": 128, "batch_size": 64}
    assert result["epochs"] == 2 and options == wanted
    rows = list(csv.DictReader((out / "metrics.csv").open()))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    for name in ("train_cross_entropy", "train_feature_loss", "test_accuracy"):
        assert rows[0][name] == before[name]


def test_what_a_checkpoint_of_then_does_not_say(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of its images: a picture of a matching by its network is refused in one sentence."""
    plot = pytest.importorskip("PIL.Image")
    pytest.importorskip("matplotlib")
    for name in ("a.png", "b.png"):
        plot.new("RGB", (32, 32)).save(tmp_path / name)
    images = [str(tmp_path / name) for name in ("a.png", "b.png")]
    assert cli.main(["match", *images, "-o", str(tmp_path / "c.png"), "--checkpoint", str(RUN)]) == 1
    assert "it is of an older version" in capsys.readouterr().err
