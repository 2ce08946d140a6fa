"""Studies: the file, the runs in processes and as Ray's tasks, and what becomes of a study that is killed."""

import datetime
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("lightning", reason="the extra [train] is not installed")
pytest.importorskip("matplotlib", reason="the extra [train] is not installed")
pytest.importorskip("sklearn", reason="the extra [train] is not installed")
pytest.importorskip("yaml", reason="the extra [train] is not installed")

import kill_runs
import yaml

from sfr_ext.cli import main
from sfr_ext.study.command import _threads_asked_for as threads_asked_for
from sfr_ext.study.plan import read_study
from sfr_ext.study.work import work
from sfr_ext.train.config import KEPT_OPTIONS, LAST_CHECKPOINT
from sfr_ext.train.errors import TrainError
from sfr_ext.train.module import Classifier

ROOT = Path(__file__).resolve().parents[1]
COMMON = {"data": "digits", "limit": 192, "batch_size": 64, "epochs": 2, "tensorboard": False}
BAD = {"arm": "ce", "data": "imagefolder", "data_dir": "/nowhere"}  # a run that fails


def written(path, **changed):
    content = {"seeds": 2, "common": COMMON, "arms": ["ce", "ls"], "settings": {"small": None}, **changed}
    path.write_text(
        yaml.safe_dump({key: value for key, value in content.items() if value != "left out"}, sort_keys=False)
    )
    return path


def command(file, out, *more):
    return [sys.executable, "-m", "sfr_ext", "study", str(file), "--out", str(out), "--threads", "1", *more]


@pytest.fixture
def begun():
    """Begins a study, which does not outlive the test."""
    studies = []

    def begin(*arguments):
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        # As in a shell, also where the tests run in the background, which leaves out SIGINT.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        studies.append(subprocess.Popen(command(*arguments), cwd=ROOT, **pipes))
        signal.signal(signal.SIGINT, before)
        return studies[-1]

    yield begin
    for study in studies:
        study.kill()
        study.wait()


def wait_for(condition, seconds=400):
    until = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < until
        time.sleep(0.02)
    return found


def epochs_of(out):
    path = out / "metrics.csv"
    return len(path.read_text().splitlines()) - 1 if path.exists() else 0


# The file


def test_settings_arms_and_seeds_make_the_runs(tmp_path):
    file = written(
        tmp_path / "s.yaml",
        arms={"ce": None, "wide": {"arm": "sfr", "emd_weight": 2}, "short": {"arm": "ls", "epochs": 1}},
        settings={
            "small": {"about": "few", "options": {"epochs": 5, "lr": 0.05}},
            "other": {"arms": {"wide": {"emd_weight": 3}, "ce": None}, "seeds": [7, 9]},
        },
    )
    study = read_study(file, tmp_path / "out", {"batch_size": 32})
    runs = {run.name: run.config for run in study.runs}
    assert list(runs) == [
        *(f"small/{arm}/seed-{seed}" for seed in (0, 1) for arm in ("ce", "wide", "short")),
        *(f"other/{arm}/seed-{seed}" for seed in (7, 9) for arm in ("wide", "ce")),
    ]
    assert all(config.out == tmp_path / "out" / name and f"seed-{config.seed}" in name for name, config in runs.items())
    assert {config.batch_size for config in runs.values()} == {32}  # a flag wins over the file
    wide = runs["small/wide/seed-1"]
    assert (wide.arm, wide.emd_weight, wide.epochs, wide.lr) == ("sfr", 2, 5, 0.05)  # a setting wins over common
    assert runs["small/short/seed-0"].epochs == 1  # and an arm over a setting
    assert runs["other/wide/seed-7"].emd_weight == 3  # and an arm of a setting over both
    assert study.outline()["settings"] == {
        "small": {"about": "few", "arms": ["ce", "wide", "short"], "seeds": [0, 1]},
        "other": {"about": "", "arms": ["wide", "ce"], "seeds": [7, 9]},
    }
    assert study.references == ("ce",)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"arms": ["ce", "cee"]}, "arms: 'cee' is no arm of sfr-ext train; say which by `arm:`; near to it: ce"),
        ({"arms": {"x": {"arm": "srf"}}}, "settings: small, arm x: --arm: expected one of 'ce', .*, got srf"),
        ({"arms": {"ce": {"epoch": 3}}}, "arms: ce: there is no option 'epoch'; near to it: epochs"),
        ({"arms": ["ce", "ls", "ce"]}, "arms: 'ce' is there twice"),
        ({"arms": "left out"}, "arms: expected names, or a mapping from names to options, got nothing"),
        ({"arms": {"a/b": {"arm": "ce"}}}, "arms: expected a name of letters, .*, got 'a/b'"),
        ({"settings": {"small": {"arms": ["dls"]}}}, r"small: arms: there is no arm 'dls'; near to it: ls"),
        ({"settings": {"small": {"epochs": 3}}}, "small: unknown key 'epochs', .*; options of train go under"),
        ({"settings": "left out"}, "settings: expected a mapping from names to options, got nothing"),
        ({"settings": {"small": 3}}, "settings: small: expected a mapping, got a int"),
        ({"common": {"epochs": 0}}, "settings: small, arm ce: --epochs must be at least 1, got 0"),
        ({"common": {"epochs": "many"}}, "settings: small, arm ce: --epochs: expected int, got many"),
        ({"common": {"augment": "perhaps"}}, "--augment: expected true or false, got 'perhaps'"),
        ({"common": {"seed": 3}}, "common: 'seed' is set by the study itself, for each run"),
        ({"common": {"out": "x"}}, "common: 'out' is set by the study itself, for each run"),
        ({"common": {"devices": 2}}, "settings: small, arm ce: --devices must be 1 in a study, .* got '2'"),
        ({"common": {"devices": "auto"}}, "settings: small, arm ce: --devices must be 1 in a study, .* got 'auto'"),
        ({"common": {"nodes": 2}}, "settings: small, arm ce: --nodes must be 1 in a study, .* got 2"),
        ({"seeds": 0}, "seeds: expected a number from 1, or a list of whole numbers from 0, got 0"),
        ({"seeds": [1, 2, 1]}, "seeds: 1 is there twice"),
        ({"seeds": [2**32]}, f"seeds: expected seeds of at most {2**32 - 1}, got {2**32}"),
        ({"seeds": 10**12}, "seeds: expected at most 10000 seeds, got 1000000000000"),
        ({"settings": {"small": {"seeds": [2**32]}}}, "settings: small: seeds: expected seeds of at most"),
        (
            {"arms": {"ce": {"shift_seeds": 2**32 - 1}}},
            "settings: small, arm ce: shift_seeds: expected seeds of at most 4294967295, got 1 \\+ 4294967295",
        ),
        ({"common": {"arch": "nosuch"}}, "settings: small, arm ce: --arch 'nosuch' is neither one of resnet8"),
        ({"common": {"pretrained": True}}, "settings: small, arm ce: --pretrained is for timm's models"),
        ({"common": {"layers": ["layer1", "layr2"]}}, "ce: --layers: the network has no layer 'layr2'; near to it: "),
        ({"common": {"layers": []}}, "ce: --layers must be names of layers"),
        ({"common": {"epochs": None}}, "ce: --epochs: expected a whole number, got nothing"),
        ({"common": {"mixup": None}}, "ce: --mixup: expected a number, got nothing"),
        ({"common": {"test_every": None}}, "ce: --test-every: expected a whole number, got nothing"),
        ({"common": {"arch": None}}, "ce: --arch: expected a name, got nothing"),
        ({"common": {"precision": None}}, "ce: --precision: expected one of 32, .*, got nothing"),
        ({"common": {"data_dir": 3}}, "ce: --data-dir: expected a path, got 3"),
        ({"common": {"data_dir": ["a"]}}, r"ce: --data-dir: expected a path, got \['a'\]"),
        ({"common": {"data_dir": True}}, "ce: --data-dir: expected a path, got True"),
        ({"common": {"data_dir": datetime.date(2020, 1, 1)}}, "ce: --data-dir: expected a path, got datetime.date"),
        ({"common": {"data_dir": ""}}, "ce: --data-dir must name a folder, got ''"),
        ({"common": {"workers": "x"}}, "ce: --workers: expected a whole number, got 'x'"),
        ({"common": {"lr": True}}, "ce: --lr: expected a number, got True"),
        ({"references": "ce"}, "references: expected a list of names of arms, got 'ce'"),
        ({"references": ["ce", "ce"]}, "references: 'ce' is there twice"),
        ({"references": {"ce": 1}}, "references: expected a list of names of arms, got {'ce': 1}"),
        ({"references": [{"ce": 1}]}, r"references: expected a list of names of arms, got \[{'ce': 1}\]"),
        ({"references": None}, "references: expected a list of names of arms, got nothing"),
        ({"references": ["ce", "dls"]}, "references: there is no arm 'dls'"),
        ({"settings": {"figures": None}}, "settings: expected a name that study and report do not use .*'figures'"),
        ({"settings": {"results.jsonl": None}}, "settings: expected a name that .* do not use .*'results.jsonl'"),
        ({"judged_by": "luck"}, "judged_by: expected one of test, validation, got 'luck'"),
        ({"judged_by": "validation"}, "small/ce: judged_by: validation needs the option validation"),
        ({"sedes": 3}, "the study: unknown key 'sedes'"),
    ],
)
def test_each_mistake_is_told_once(changed, told, tmp_path):
    file = written(tmp_path / "s.yaml", **changed)
    with pytest.raises(TrainError) as caught:
        read_study(file, tmp_path / "out")
    lines = str(caught.value).splitlines()
    assert all(line.startswith(f"{file}: ") for line in lines)
    matching = [line for line in lines if re.search(told, line)]
    assert len(matching) == 1, lines
    # Beside it only what follows for the other arm.
    assert len(lines) == (2 if changed == {"judged_by": "validation"} else 1), lines


def test_all_mistakes_are_told(tmp_path, capsys):
    file = written(tmp_path / "s.yaml", arms=["ce", "xyz"], seeds=-1, common={"epoch": 3})
    assert main(["study", str(file), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "'xyz'" in error and "seeds: expected" in error and "'epoch'" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("arms: {ce: , ce: }\nsettings: {a: }", "line 1: 'ce' is there twice"),
        ("settings:\n  a:\n  b:\n  a:\narms: [ce]", "line 4: 'a' is there twice"),
        ("seeds: 1\n? [a, b]\n: 3\narms: [ce]", "line 2: expected a name before the colon, got a sequence"),
        ("common:\n  ? {a: 1}\n  : 3\narms: [ce]", "line 2: expected a name before the colon, got a mapping"),
        ("arms: {ce: {<<: 3}}\nsettings: {a: }", "is no YAML: .* expected a mapping or list of mappings for merging"),
        ("arms: [ce", "is no YAML"),
        ("- ce", "expected a mapping with settings and arms, got a list"),
    ],
)
def test_what_is_no_study(text, told, tmp_path):
    (tmp_path / "s.yaml").write_text(text)
    with pytest.raises(TrainError, match=told):
        read_study(tmp_path / "s.yaml", tmp_path)


def test_merge_keys_of_yaml(tmp_path):
    """Also in what is merged itself: the own key wins, and is no repetition."""
    file = tmp_path / "s.yaml"
    file.write_text(
        "common: &x {epochs: 2, lr: 0.3}\n"
        "arms: {ce: &y {<<: *x, epochs: 3}, ls: {<<: [*y], lr: 0.2}}\n"
        "settings: {a: , b: {options: {<<: *y}}}\n"
    )
    runs = {run.name: run.config for run in read_study(file, tmp_path).runs}
    found = {name: (config.epochs, config.lr) for name, config in runs.items()}
    assert found == {f"{s}/{arm}/seed-0": value for s in "ab" for arm, value in (("ce", (3, 0.3)), ("ls", (3, 0.2)))}
    file.write_text("arms: {ce: &y {epochs: 2, epochs: 3}, ls: {<<: *y}}\nsettings: {a: }")
    with pytest.raises(TrainError, match="line 1: 'epochs' is there twice"):
        read_study(file, tmp_path)


def test_flags(tmp_path, capsys):
    file = written(tmp_path / "s.yaml")
    for flags, told in (
        (["--epoch", "3"], "unrecognized arguments: --epoch 3; near to it: --epochs"),
        (["--nosuch", "3"], "unrecognized arguments: --nosuch 3"),
        (["--epochs", "0"], "--epochs must be at least 1, got 0"),
        (["--seed", "3"], "--seed of a run is set by the study itself"),
    ):
        assert main(["study", str(file), "--out", str(tmp_path / "out"), *flags]) == 2
        assert told in capsys.readouterr().err
    assert main(["study", str(tmp_path / "none.yaml"), "--out", str(tmp_path / "out")]) == 1
    assert "none.yaml cannot be read" in capsys.readouterr().err


# The runs


def test_one_failing_run_does_not_stop_the_others(tmp_path):
    file = written(tmp_path / "s.yaml", seeds=1, arms={"bad": BAD, "ce": None, "ls": None})
    out = tmp_path / "out"
    ended = subprocess.run(command(file, out), capture_output=True, text=True, cwd=ROOT)
    assert ended.returncode == 1, ended.stderr
    assert "1 of 3 runs failed:\n  small/bad/seed-0: imagefolder: " in ended.stderr
    results = [out / "small" / arm / "seed-0" / "result.json" for arm in ("ce", "ls")]
    assert all(json.loads(path.read_text())["epochs"] == 2 for path in results)
    times = [path.stat().st_mtime_ns for path in results]

    # What is finished is not repeated, and the arm that is mended is caught up on.
    file = written(tmp_path / "s.yaml", seeds=1, arms={"bad": {"arm": "ce", "lr": 0.01}, "ce": None, "ls": None})
    ended = subprocess.run(command(file, out), capture_output=True, text=True, cwd=ROOT)
    assert ended.returncode == 0, ended.stderr
    assert "3 runs, of which 2 are finished" in ended.stdout
    assert [path.stat().st_mtime_ns for path in results] == times
    assert (out / "small" / "bad" / "seed-0" / "result.json").exists()

    # A study that asks for something else does not take their results for its own.
    file = written(tmp_path / "s.yaml", seeds=1, arms=["ce", "ls"], common={**COMMON, "lr": 0.3})
    ended = subprocess.run(command(file, out), capture_output=True, text=True, cwd=ROOT)
    assert ended.returncode == 1
    assert "holds a finished run with --lr 0.1, and the study asks for 0.3" in ended.stderr
    assert "(1 more runs likewise)" in ended.stderr


@pytest.mark.parametrize(("name", "value"), [("epochs", 3), ("lr", 0.3)])
def test_an_unfinished_run_does_not_go_on_under_other_options(name, value, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    (run,) = read_study(written(tmp_path / "s.yaml", seeds=1, arms=["ce"]), out).runs
    step = Classifier.training_step

    def breaks(self, batch, index):
        if self.current_epoch == 1:
            raise KeyError("power cut")
        return step(self, batch, index)

    monkeypatch.setattr(Classifier, "training_step", breaks)
    with pytest.raises(KeyError):
        work(run.config)
    monkeypatch.setattr(Classifier, "training_step", step)
    checkpoint = run.config.out / LAST_CHECKPOINT
    before = checkpoint.read_bytes()
    other = written(tmp_path / "other.yaml", seeds=1, arms=["ce"], common={**COMMON, name: value})
    told = f"holds an unfinished run with --{name} {getattr(run.config, name)}, and the study asks for {value}; "
    assert main(["study", str(other), "--out", str(out)]) == 1
    assert told in capsys.readouterr().err
    with pytest.raises(TrainError, match=re.escape(told)):  # a worker sees it, too
        work(read_study(other, out).runs[0].config)
    assert checkpoint.read_bytes() == before
    (run.config.out / KEPT_OPTIONS).write_text("[")
    with pytest.raises(TrainError, match="options.json is damaged; remove"):
        work(run.config)
    work(read_study(tmp_path / "s.yaml", tmp_path / "again").runs[0].config)
    (run.config.out / KEPT_OPTIONS).unlink()  # as an older version left it
    work(run.config)
    assert kill_runs.same(*(kill_runs.end_of(folder / "small/ce/seed-0") for folder in (out, tmp_path / "again")))


def holder(path):
    """The process that has the file open."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if any(os.readlink(entry) == str(path) for entry in (process / "fd").iterdir()):
                return int(process.name)
        except OSError:
            continue
    return None


needs_proc = pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="no /proc to find a run's process by")


@needs_proc
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_study_goes_on(how, begun, tmp_path):
    file = written(tmp_path / "s.yaml", seeds=1, arms=["ls", "sfr"], common={**COMMON, "epochs": 20})
    out = tmp_path / "out"
    study = begun(file, out, "--jobs", "1")
    first = out / "small" / "ls" / "seed-0"
    wait_for(lambda: epochs_of(first) >= 3)
    child = holder(first / ".lock")
    study.send_signal(how)
    said = study.communicate()[1]
    assert study.returncode == (130 if how == signal.SIGINT else -how)
    assert how == signal.SIGKILL or "goes on where the study was" in said
    # The run does not outlive the study.
    wait_for(lambda: holder(first / ".lock") is None and not Path(f"/proc/{child}/fd").is_dir())
    assert not (first / "result.json").exists()

    done = epochs_of(first)
    subprocess.run(command(file, out, "--jobs", "2"), cwd=ROOT, check=True, capture_output=True)
    assert (first / "log.txt").read_text().count("epoch 1/20") == 1  # it has not begun anew
    assert f"epoch {done + 1}/20" in (first / "log.txt").read_text()
    subprocess.run(command(file, tmp_path / "whole"), cwd=ROOT, check=True, capture_output=True)
    for arm in ("ls", "sfr"):
        parts, whole = (kill_runs.end_of(folder / "small" / arm / "seed-0") for folder in (out, tmp_path / "whole"))
        assert kill_runs.same(parts, whole)


@needs_proc
def test_ray_takes_a_killed_run_up_again(begun, tmp_path):
    pytest.importorskip("ray", reason="the extra [cluster] is not installed")
    arms = {"ce": None, "ls": None, "bad": BAD}
    file = written(tmp_path / "s.yaml", seeds=1, arms=arms, common={**COMMON, "epochs": 30})
    out = tmp_path / "out"
    study = begun(file, out, "--executor", "ray", "--jobs", "2")
    first = out / "small" / "ce" / "seed-0"
    wait_for(lambda: epochs_of(first) >= 3 and epochs_of(out / "small" / "ls" / "seed-0") >= 1)
    worker = holder(first / ".lock")
    os.kill(worker, signal.SIGKILL)
    after = wait_for(lambda: (pid := holder(first / ".lock")) not in (None, worker) and pid)
    assert not (first / "result.json").exists()  # killed in the middle
    said = study.communicate(timeout=300)
    assert study.returncode == 1 and "1 of 3 runs failed:\n  small/bad/seed-0: imagefolder: " in said[1], said
    assert after != worker
    for arm in ("ce", "ls"):
        result = json.loads((out / "small" / arm / "seed-0" / "result.json").read_text())
        assert result["epochs"] == 30
    said = (first / "log.txt").read_text()
    assert said.count("epoch 1/30") == 1 and "epoch 30/30" in said  # it has gone on, not begun anew
    # The same as without Ray and without the kill.
    file = written(tmp_path / "s.yaml", seeds=1, arms=["ce"], common={**COMMON, "epochs": 30})
    subprocess.run(command(file, tmp_path / "whole"), cwd=ROOT, check=True, capture_output=True)
    whole = tmp_path / "whole" / "small" / "ce" / "seed-0"
    assert kill_runs.same(kill_runs.end_of(first), kill_runs.end_of(whole))


def test_without_ray(tmp_path, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "ray" else find(name))
    file = written(tmp_path / "s.yaml")
    assert main(["study", str(file), "--out", str(tmp_path / "out"), "--executor", "ray"]) == 1
    assert "pip install ray (or" in capsys.readouterr().err


# The files of the repository


@pytest.mark.parametrize("file", sorted((ROOT / "studies").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_files_can_be_read(file, tmp_path):
    study = read_study(file, tmp_path)
    assert study.runs and study.references
    # A run of one arm sees the data of the same seed of another, but for the null control.
    for run in study.runs:
        assert run.config.seed == run.seed + (1000 if run.arm == "ce-again" else 0)
    # The test set chooses nothing.
    assert study.judged_by == ("validation" if "sweep" in file.stem else "test")
    assert all((run.config.validation > 0) == ("sweep" in file.stem) for run in study.runs)


def test_the_subset_of_imagenet_with_a_stand_in(tmp_path):
    image = pytest.importorskip("PIL.Image")
    for part in ("train", "val"):
        for label, colour in (("n01", (200, 30, 30)), ("n02", (30, 30, 200))):
            (tmp_path / part / label).mkdir(parents=True)
            for i in range(8):
                image.new("RGB", (90 + i, 70), colour).save(tmp_path / part / label / f"{i}.JPEG")
    file, out = ROOT / "studies" / "imagenet-subset.yaml", tmp_path / "out"
    few = "--settings all --seeds 1 --epochs 1 --test-every 1 --batch-size 8 --image-size 16 --workers 0"
    more = [*few.split(), "--arch", "resnet8", "--precision", "32", "--data-dir", str(tmp_path)]
    ended = subprocess.run(command(file, out, *more), cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert len(list(out.glob("all/*/seed-0/result.json"))) == 3 and not (out / "labels-10pct").exists()
    assert main(["report", str(out)]) == 0
    text = (out / "report.md").read_text()
    assert "No run of this setting has been finished." in text.split("## labels-10pct")[1].split("## all")[0]


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_with_a_stand_in(name, tmp_path, monkeypatch):
    """In this process: what stands in for torchvision is not there in another."""
    classes = int(name.removeprefix("cifar"))

    def factory(folder, train, download):
        random = np.random.default_rng(train)
        return types.SimpleNamespace(
            data=random.integers(0, 256, (128, 32, 32, 3), dtype=np.uint8), targets=[i % classes for i in range(128)]
        )

    package, datasets = types.ModuleType("torchvision"), types.ModuleType("torchvision.datasets")
    datasets.CIFAR10 = datasets.CIFAR100 = factory
    monkeypatch.setitem(sys.modules, "torchvision", package)
    monkeypatch.setitem(sys.modules, "torchvision.datasets", datasets)
    few = {"epochs": 1, "test_every": 1, "batch_size": 64, "precision": "32", "arch": "resnet8"}
    study = read_study(ROOT / "studies" / f"{name}.yaml", tmp_path, few)
    runs = {run.arm: run for run in study.runs if run.setting == "all" and run.seed == 0}
    assert len(runs) == 14
    for arm in ("ce", "sfr-project", "cutmix"):
        work(runs[arm].config)
        result = json.loads((runs[arm].config.out / "result.json").read_text())
        assert result["data"] == name and set(result["probe_accuracy"]) == {"layer1", "layer2", "layer3"}


@pytest.mark.parametrize(
    ("variable", "more", "wanted"),
    [("1", ["--jobs", "1"], 1), ("1", ["--jobs", "1", "--threads", "2"], 2)],
)
def test_threads_are_those_asked_for(variable, more, wanted, tmp_path, monkeypatch):
    """By the option, else by OpenMP's variable; and what they were is told."""
    monkeypatch.setenv("OMP_NUM_THREADS", variable)
    common = {**COMMON, "epochs": 1, "limit": 64}
    file, out = written(tmp_path / "s.yaml", seeds=1, arms=["ce"], common=common), tmp_path / "out"
    ended = subprocess.run(
        [sys.executable, "-m", "sfr_ext", "study", str(file), "--out", str(out), *more],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert ended.returncode == 0, ended.stderr
    assert f"1 at a time, {wanted} thread" in ended.stdout
    assert json.loads((out / "small/ce/seed-0/result.json").read_text())["threads"] == wanted


def test_threads_of_the_variable(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert threads_asked_for() is None
    for text, wanted in (("many", None), ("0", None), ("3", 3), ("3,2", 3)):
        monkeypatch.setenv("OMP_NUM_THREADS", text)
        assert threads_asked_for() == wanted


def test_parts_of_a_study(tmp_path, capsys):
    file = written(tmp_path / "s.yaml", settings={"small": None, "other": None})
    out = tmp_path / "out"
    assert main(["study", str(file), "--out", str(out), "--settings", "small,othr"]) == 2
    assert "--settings: there is no setting 'othr'; near to it: other" in capsys.readouterr().err
    arguments = command(file, out, "--settings", "other", "--seeds", "1", "--epochs", "1")
    ended = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    found = sorted(str(path.relative_to(out)) for path in out.rglob("result.json"))
    assert found == ["other/ce/seed-0/result.json", "other/ls/seed-0/result.json"]
    assert list(json.loads((out / "study.json").read_text())["settings"]) == ["small", "other"]


def test_other_seeds_for_a_null_control(tmp_path):
    file = written(tmp_path / "s.yaml", arms={"ce": None, "again": {"arm": "ce", "shift_seeds": 50}})
    runs = {run.name: run.config for run in read_study(file, tmp_path).runs}
    assert [runs[f"small/again/seed-{seed}"].seed for seed in (0, 1)] == [50, 51]
    file = written(tmp_path / "s.yaml", arms={"ce": {"shift_seeds": -1}})
    with pytest.raises(TrainError, match="arms: ce: shift_seeds: expected a whole number from 0, got -1"):
        read_study(file, tmp_path)
