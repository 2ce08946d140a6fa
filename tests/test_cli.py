"""The command ``sfr-ext``: output, exit codes, and errors told in one sentence."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from sfr_ext import cli
from sfr_ext.train import fashion_mnist

TRAIN_EXTRA = all(importlib.util.find_spec(name) for name in ("lightning", "matplotlib", "sklearn"))
needs_extra = pytest.mark.skipif(not TRAIN_EXTRA, reason="the extra [train] is not installed")

QUICK = ["--data", "digits", "--limit", "192", "--batch-size", "64", "--epochs", "1", "--accelerator", "cpu"]


pytestmark = pytest.mark.usefixtures("one_thread")


def one_sentence(captured):
    assert captured.err.startswith("sfr-ext: ") and captured.err.count("\n") == 1
    return captured.err


def test_info(capsys):
    assert cli.main(["info"]) == 0
    printed = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    assert {"version", "cpu_isa", "cuda", "torch"} <= set(printed)


def test_help_names_every_flag(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["train", "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    flags = "data data-dir arch arm epochs batch-size lr limit seed emd-weight layers out resume"
    for flag in [*flags.split(), "devices", "precision"]:
        assert f"--{flag}" in text


def test_bench_hands_its_options_on(capfd):
    assert cli.main(["bench", "--suite", "huge"]) == 2
    said = capfd.readouterr().err
    assert "usage: python -m benchmarks" in said and "'huge'" in said


def test_bench_without_a_checkout(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "site-packages" / "sfr_ext" / "cli.py"))
    assert cli.main(["bench", "--suite", "quick"]) == 1
    assert "clone the repository" in one_sentence(capsys.readouterr())


@pytest.mark.parametrize(
    "arguments", [[], ["fly"], ["train", "--fly"], ["train", "--arm", "kd"], ["train", "--epochs", "many"]]
)
def test_wrong_usage(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert "usage: sfr-ext" in capsys.readouterr().err


def test_without_the_extra(monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in ("lightning", "sklearn") else find(name)
    )
    assert cli.main(["train"]) == 1
    assert "train needs lightning and sklearn" in (sentence := one_sentence(capsys.readouterr()))
    assert "pip install 'sfr_ext[train]'" in sentence


@needs_extra
def test_errors_have_no_traceback(capsys, tmp_path):
    assert cli.main(["train", *QUICK, "--out", str(tmp_path), "--arch", "resnet9"]) == 1
    assert "resnet9" in one_sentence(capsys.readouterr())
    assert cli.main(["train", *QUICK, "--out", str(tmp_path), "--resume"]) == 1
    assert "last.ckpt does not exist" in one_sentence(capsys.readouterr())
    assert cli.main(["train", "--epochs", "0"]) == 1
    assert "--epochs must be at least 1" in one_sentence(capsys.readouterr())
    assert not list(tmp_path.iterdir())


@needs_extra
def test_corrupt_data(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(fashion_mnist, "SYSTEM_DIR", tmp_path / "none")
    folder = tmp_path / "data"
    folder.mkdir()
    for name in fashion_mnist.SHA256:
        (folder / name).write_bytes(b"broken")
    out = tmp_path / "out"
    assert cli.main(["train", "--data", "fashion-mnist", "--data-dir", str(folder), "--out", str(out)]) == 1
    assert "is corrupt" in one_sentence(capsys.readouterr())
    assert not out.exists() or not list(out.iterdir())


@needs_extra
def test_train_and_resume(capsys, tmp_path):
    arguments = ["train", *QUICK, "--arm", "sfr", "--out", str(tmp_path), "--layers", "layer2, layer3"]
    assert cli.main(arguments) == 0
    printed = capsys.readouterr().out
    result = json.loads((tmp_path / "result.json").read_text())
    assert f"test accuracy {100 * result['test_accuracy']:.2f} %" in printed and "in the feature loss" in printed
    assert result["options"]["layers"] == ["layer2", "layer3"]
    assert cli.main([*arguments, "--epochs", "2", "--resume"]) == 0
    assert json.loads((tmp_path / "result.json").read_text())["epochs"] == 2


@needs_extra
def test_interrupt(monkeypatch, capsys, tmp_path):
    from sfr_ext.train.module import Classifier

    def interrupted(self, batch, index):
        raise KeyboardInterrupt

    monkeypatch.setattr(Classifier, "training_step", interrupted)
    assert cli.main(["train", *QUICK, "--out", str(tmp_path)]) == 130
    assert "interrupted" in one_sentence(capsys.readouterr())


@needs_extra
def test_two_devices_as_a_command(tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "sfr_ext",
            "train",
            *QUICK,
            "--arm",
            "sfr",
            "--devices",
            "2",
            "--out",
            str(tmp_path),
        ],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["devices"] == 2
    # Both devices' shares together are the 359 test images, each once.
    assert result["test_accuracy"] * 359 == pytest.approx(round(result["test_accuracy"] * 359), abs=1e-4)
    assert done.stdout.count("epoch 1/1") == done.stdout.count("wrote") == 1


def test_importing_the_package_needs_torch_alone():
    code = (
        "import sys, sfr_ext, sfr_ext.cli; "
        "print([m for m in ('lightning', 'matplotlib', 'sklearn', 'scipy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stderr
