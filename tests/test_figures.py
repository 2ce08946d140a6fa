"""What a finished run says of its network beside the accuracy; and labels that are wrong on purpose."""

import json

import numpy as np
import pytest
import torch

pytest.importorskip("lightning", reason="the extra [train] is not installed")
pytest.importorskip("matplotlib", reason="the extra [train] is not installed")
pytest.importorskip("sklearn", reason="the extra [train] is not installed")

from sklearn import linear_model

from sfr_ext.train.config import TrainConfig
from sfr_ext.train.data import load_data, noisy_labels
from sfr_ext.train.errors import TrainError
from sfr_ext.train.figures import calibration_error
from sfr_ext.train.probe import RIDGE, ridge
from sfr_ext.train.run import run

pytestmark = pytest.mark.usefixtures("one_thread")


def quick(out, **changed):
    few = {"data": "digits", "limit": 192, "batch_size": 64, "epochs": 1, "progress": False, "tensorboard": False}
    return TrainConfig(**{**few, "out": out, **changed})


# Calibration


def test_calibration_error_is_the_sum_over_bins():
    # Confidences 0.55, 0.58 (one bin of ten: 0.5 to 0.6), 0.95 and 1.0 (another), and hits.
    probabilities = torch.tensor([[0.55, 0.45], [0.42, 0.58], [0.95, 0.05], [0.0, 1.0]])
    labels = torch.tensor([0, 0, 0, 0])
    expected = 2 / 4 * abs(1 / 2 - 0.565) + 2 / 4 * abs(1 / 2 - 0.975)
    assert calibration_error(probabilities, labels, bins=10) == pytest.approx(expected, abs=1e-7)


def test_calibration_error_against_a_plain_loop():
    probabilities = torch.randn(500, 7).mul(2).softmax(1)
    labels = torch.randint(7, (500,))
    confidence, found = probabilities.max(1)
    expected = 0.0
    for low in np.arange(15) / 15:
        inside = (confidence > low) & (confidence <= low + 1 / 15)
        if inside.any():
            gap = (found[inside] == labels[inside]).double().mean() - confidence[inside].double().mean()
            expected += float(inside.double().mean() * gap.abs())
    assert calibration_error(probabilities, labels) == pytest.approx(expected, abs=1e-9)


def test_who_is_sure_and_right_is_calibrated():
    sure = torch.eye(5)
    assert calibration_error(sure, torch.arange(5)) == 0
    assert calibration_error(sure, torch.arange(5).roll(1)) == 1


# Probes


def test_ridge_is_that_of_scikit_learn():
    x, labels, test = torch.randn(80, 6) * torch.arange(1, 7) + 3, torch.randint(4, (80,)), torch.randn(20, 6)
    mean, deviation = x.double().mean(0), x.double().std(0, correction=0)
    model = linear_model.Ridge(alpha=80 * RIDGE).fit((x.double() - mean) / deviation, np.eye(4)[labels])
    expected = model.predict((test.double() - mean) / deviation)
    assert ridge(x, labels, test, 4).numpy() == pytest.approx(expected, abs=1e-9)


def test_a_constant_feature_and_a_class_without_images():
    x = torch.cat((torch.randn(30, 2), torch.full((30, 1), 7.0)), 1)
    labels = (x[:, 0] > 0).long()
    scores = ridge(x, labels, x, 3)
    assert scores.isfinite().all() and (scores.argmax(1) == labels).double().mean() > 0.8


# Whole runs


def test_a_run_says_them(tmp_path):
    result = run(quick(tmp_path, arm="ce", epochs=3, probe=True))
    assert json.loads((tmp_path / "result.json").read_text()) == json.loads(json.dumps(result))
    assert set(result["probe_accuracy"]) == {"layer1", "layer2", "layer3"}
    # Of digits, one of ten is found by chance; what a linear classifier finds in any layer is far more.
    assert all(0.5 < accuracy <= 1 for accuracy in result["probe_accuracy"].values())
    assert 0 < result["test_calibration_error"] < 1
    last = [line.split(",") for line in (tmp_path / "metrics.csv").read_text().splitlines()]
    row = dict(zip(last[0], map(float, last[-1]), strict=True))
    assert result["test_loss"] == pytest.approx(row["test_loss"], rel=1e-4)
    assert result["test_accuracy"] == pytest.approx(row["test_accuracy"], rel=1e-4)


def test_a_probe_changes_nothing_of_the_run(tmp_path):
    with_probe, without = (run(quick(tmp_path / str(on), arm="sfr", probe=on)) for on in (True, False))
    assert with_probe["test_loss"] == without["test_loss"] and "probe_accuracy" not in without


def test_a_probe_of_the_best_epoch_and_the_average(tmp_path):
    result = run(quick(tmp_path, arm="ce", epochs=2, probe=True, validation=0.25, ema=0.5))
    assert len(result["probe_accuracy"]) == 3 and 0 <= result["test_calibration_error"] <= 1


def test_a_probe_that_cannot_be(tmp_path):
    with pytest.raises(TrainError, match="no layer 'layer9'; near to it: layer3"):
        run(quick(tmp_path, arm="ce", probe=True, layers=("layer1", "layer9")))
    with pytest.raises(TrainError, match="--probe looks into the network"):
        quick(tmp_path, probe=True, compile=True)


# Label noise


def test_a_share_of_the_labels_is_wrong():
    labels = torch.randint(10, (1000,))
    noisy = noisy_labels(labels, 10, 0.2, seed=3)
    wrong = noisy != labels
    assert wrong.sum() == 200
    assert noisy.min() >= 0 and noisy.max() <= 9
    # To all other classes alike: 200 steps around the classes, 9 kinds.
    counts = ((noisy - labels)[wrong] % 10).bincount(minlength=10)
    assert counts[0] == 0 and (counts[1:] > 8).all()
    assert torch.equal(noisy, noisy_labels(labels, 10, 0.2, seed=3))
    assert not torch.equal(noisy, noisy_labels(labels, 10, 0.2, seed=4))


def test_noise_is_the_same_for_every_arm_and_leaves_the_test_labels(tmp_path):
    def data(**changed):
        return load_data(quick(tmp_path, **changed))

    clean, noisy = data(arm="ce"), data(arm="ce", label_noise=0.3)
    assert torch.equal(clean.test_labels, noisy.test_labels)
    assert torch.equal(clean.train_images, noisy.train_images)
    assert (clean.train_labels != noisy.train_labels).sum() == round(0.3 * 192)
    assert torch.equal(noisy.train_labels, data(arm="sfr", label_noise=0.3).train_labels)
    part = data(label_noise=0.3, validation=0.25)
    assert len(part.train_labels) == 144  # the split is another matter
    split, plain = part.held_out[0], data(validation=0.25).held_out[0]
    assert torch.equal(split, plain)


def test_noise_needs_classes():
    with pytest.raises(TrainError, match="needs two classes"):
        noisy_labels(torch.zeros(4, dtype=torch.int64), 1, 0.5, 0)


def test_divergence_is_for_sinkhorn(tmp_path):
    with pytest.raises(TrainError, match="--objective divergence is for --solver sinkhorn"):
        quick(tmp_path, objective="divergence")
    result = run(quick(tmp_path, arm="sfr", objective="divergence", solver="sinkhorn"))
    assert result["emd_seconds"] > 0
