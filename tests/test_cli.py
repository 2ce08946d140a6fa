"""The command ``sfr-ext``: output, exit codes, and errors told in one sentence."""

import contextlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import sfr_ext
from sfr_ext import cli, ops
from sfr_ext.train import fashion_mnist
from sfr_ext.train.config import ARMS, TrainConfig, flag, options

TRAIN_EXTRA = all(importlib.util.find_spec(name) for name in ("lightning", "matplotlib", "sklearn", "jsonargparse"))
if TRAIN_EXTRA:
    from sfr_ext.train.parser import parse
needs_extra = pytest.mark.skipif(not TRAIN_EXTRA, reason="the extra [train] is not installed")

ROOT = Path(__file__).resolve().parents[1]
QUICK = ["--data", "digits", "--limit", "192", "--batch-size", "64", "--epochs", "1", "--accelerator", "cpu"]


pytestmark = pytest.mark.usefixtures("one_thread")


def one_sentence(captured):
    assert captured.err.startswith("sfr-ext: ") and captured.err.count("\n") == 1
    return captured.err


def test_info(capsys):
    assert cli.main(["info"]) == 0
    printed = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    assert {"version", "machine", "cpu_isa", "cuda", "torch"} <= set(printed)


def test_help_names_every_flag(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["train", "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    flags = "data data-dir arch arm epochs batch-size lr limit seed emd-weight layers out resume"
    for name in [*flags.split(), "devices", "precision"]:
        assert f"--{name}" in text


@needs_extra
def test_help_shows_no_address_in_memory(capsys):
    for command in ([], ["train"], ["study"], ["report"], ["compare"], ["layers"], ["match"], ["bench"], ["info"]):
        with contextlib.suppress(SystemExit):
            cli.main([*command, "--help"])
        text = capsys.readouterr().out
        assert "usage: sfr-ext" in text and "<" not in text and "0x" not in text, command


def completed(*words):
    """What bash completes of these words, with the script that the command prints; "COMMANDS": what it is for."""
    pytest.importorskip("shtab", reason="the extra [train] is not installed")
    script = subprocess.run(
        [sys.executable, "-m", "sfr_ext", "--print-completion", "bash"], capture_output=True, text=True, timeout=120
    )
    assert script.returncode == 0, script.stderr
    last = "complete -p" if not words else "_shtab_sfr_ext; printf '%s\\n' \"${COMPREPLY[@]}\""
    line = f"COMP_WORDS=({' '.join(words)}); COMP_CWORD={len(words) - 1}; {last}"
    done = subprocess.run(["bash", "-c", script.stdout + line], capture_output=True, text=True, timeout=60)
    return done.stdout.split() if words else done.stdout.splitlines()


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_completion(tmp_path, monkeypatch):
    assert completed("sfr-ext", "tr") == ["train"]
    assert {"--out", "--reach", "--checkpoint"} <= set(completed("sfr-ext", "match", "--"))
    assert {flag(name) for name in options()} <= set(completed("sfr-ext", "train", "--"))
    assert completed("sfr-ext", "train", "--arm", "s") == ["sfr"]
    assert completed("sfr-ext", "study", "--se") == ["--settings", "--seeds"]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    assert completed("sfr-ext", "compare", "ru") == ["runs"]
    assert [line.split()[-1] for line in completed()] == ["sfr-ext"]  # and no other command


def test_completion_without_shtab(monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "shtab" else find(name))
    with pytest.raises(SystemExit, match="1"):
        cli.main(["--print-completion", "bash"])
    assert "--print-completion needs shtab: pip install shtab" in one_sentence(capsys.readouterr())


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["compare", "--x"], "unrecognized arguments: --x\n"),
        (["match", "a", "b", "--outt", "c"], "unrecognized arguments: --outt; near to it: --out\n"),
        (["study", "s.yaml", "--sedes", "3"], "unrecognized arguments: --sedes; near to it: --seeds, "),
        (["study", "s.yaml", "--epochs", "3"], "the following arguments are required: --out\n"),
        (["match", "a", "b", "--eps=3", "--"], "the following arguments are required: -o/--out\n"),
    ],
)
def test_a_wrong_flag_is_told_before_what_lacks_because_of_it(arguments, said, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(arguments)
    assert said in capsys.readouterr().err


@needs_extra
def test_near_flags_of_a_study_are_those_that_it_takes(capsys):
    assert cli.main(["study", "s.yaml", "--out", "o", "--sedes", "3"]) == 2
    sentence = one_sentence(capsys.readouterr())
    assert "unrecognized arguments: --sedes 3; near to it: --seeds" in sentence and "--seed," not in sentence


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


@needs_extra
@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--bach-size", "3"], "unrecognized arguments: --bach-size 3; near to it: --batch-size"),
        (["--epoch", "3"], "near to it: --epochs"),
        (["--epochs", "many"], "--epochs: expected int, got many"),
        (["--lr", "fast"], "expected a number, got 'fast'"),
        (["--arm", "kd"], f"--arm: expected one of {', '.join(map(repr, ARMS))}, got kd"),
        (["--config", "nowhere.yaml"], "--config: File does not exist: '"),
    ],
)
def test_wrong_usage_names_the_flag_and_what_is_near(arguments, said, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["train", *arguments])
    printed = capsys.readouterr().err
    assert caught.value.code == 2 and said in printed and printed.count("\n") == 2


@needs_extra
def test_options_from_a_file(tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text("batch_size: 7\nlr: 1e-2\nprecision: 64\ndevices: 2\nlayers: [layer1, layer3]\naugment: false\n")
    config = parse(["--config", str(file), "--batch-size", "9"])
    assert (config.batch_size, config.lr, config.precision, config.devices) == (9, 0.01, "64", "2")
    assert config.layers == ("layer1", "layer3") and config.augment is False and config.limit is None

    with pytest.raises(SystemExit) as caught:
        parse(["--config", str(file), "--print_config"])
    again = tmp_path / "again.yaml"
    again.write_text(capsys.readouterr().out)
    assert caught.value.code == 0 and parse(["--config", str(again)]) == parse(["--config", str(file)])

    for text, said in (
        ("batch-sizes: 7", "near to it: --batch-size"),
        ("lr: fast", "--lr: expected a number, got 'fast'"),
        ("layers: 3", "--layers: expected names, got 3"),
        ("epochs: null", f"--config: {file}: epochs: expected a whole number, got nothing"),
        ("epochs: 2\nlr:\n", f"--config: {file}: lr: expected a number, got nothing"),
        ("lr:", f"--config: {file}: lr: expected a number, got nothing"),
        ("ler:", f"--config: {file}: there is no option 'ler'; near to it: lr"),
        ("epochs: 2\narm:", f"--config: {file}: arm: expected one of ce, "),
        ("epochs: 2\naugment:", f"--config: {file}: augment: expected true or false, got nothing"),
        ("epochs: 2\ndevices:", f"--config: {file}: devices: expected a name, got nothing"),
        ("data_dir: 3", "--data-dir: expected a path, got 3"),
        ("workers: x", "--workers: expected a whole number, got 'x'"),
        ("epochs: [", "Problems parsing config"),
    ):
        file.write_text(text)
        with pytest.raises(SystemExit) as caught:
            parse(["--config", str(file)])
        assert caught.value.code == 2 and said in capsys.readouterr().err


@needs_extra
@pytest.mark.parametrize("text", ["", "# nothing yet\n", "---\n", "out:\n", "out:\nlimit: null\n"])
@pytest.mark.parametrize("written", ["--config={}", "--config {}"])
def test_a_file_without_options(text, written, tmp_path):
    file, other = tmp_path / "empty.yaml", tmp_path / "other.yaml"
    file.write_text(text)
    other.write_text("epochs: 3\n")
    words = written.format(file).split()
    assert parse(words) == parse([])
    assert parse(["--config", str(other), *words, "--lr", "0.5"]) == parse(["--epochs", "3", "--lr", "0.5"])


@needs_extra
def test_what_is_printed_is_a_file_that_is_taken(tmp_path, capsys):
    """And not one with an option that does nothing, which would be refused."""
    assert cli.main(["train", "--arm", "ce", "--emd-weight", "3", "--print_config"]) == 2
    said = capsys.readouterr()
    assert "--emd-weight is for --arm sfr" in said.err and said.out == ""
    with pytest.raises(SystemExit, match="0"):
        cli.main(["train", "--arm", "ce", "--print_config"])
    file = tmp_path / "options.yaml"
    file.write_text(capsys.readouterr().out)
    assert parse(["--config", str(file)]) == parse(["--arm", "ce"])


@needs_extra
@pytest.mark.parametrize("flag_word", ["--emd-weight=1.0", "--emd-weight 1.0", "--layers layer1,layer3"])
def test_an_option_that_does_nothing_is_refused_with_its_default(flag_word, capsys):
    assert cli.main(["train", "--arm", "ce", *flag_word.split()]) == 2
    assert "is for --arm" in capsys.readouterr().err


@needs_extra
def test_an_accelerator_that_is_not_there(tmp_path, capsys):
    if pytest.importorskip("torch").cuda.is_available():
        pytest.skip("this machine has a GPU")
    few = ["--data", "digits", "--limit", "64", "--epochs", "1", "--out", str(tmp_path / "run")]
    assert cli.main(["train", *few, "--accelerator", "gpu"]) == 1
    assert "--accelerator gpu --devices 1: " in capsys.readouterr().err


@needs_extra
def test_choices_are_told_once(capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["train", "--precision", "8"])
    told = capsys.readouterr().err
    assert "one of '32', 'bf16-mixed', '16-mixed', '64', got 8" in told


@pytest.mark.parametrize("text", ["-1", "x", "nan", "inf"])
def test_gpus_of_a_study(text, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["study", "study.yaml", f"--gpus={text}"])
    assert f"expected a finite number, 0 or above, got {text!r}" in capsys.readouterr().err


@needs_extra
def test_defaults_are_those_of_the_configuration():
    assert parse([]) == TrainConfig()
    assert (parse([]).solver, parse([]).eps, parse([]).ema) == ("exact", None, None)
    config = parse(["--solver", "sinkhorn", "--eps", "1e-2", "--ema", "0.99"])
    assert (config.eps, config.ema) == (0.01, 0.99) and parse(["--solver", "sinkhorn"]).eps == 0.05


@needs_extra
@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--seed", "-1"], "--seed must be at least 0, got -1"),
        (["--emd-warmup", "inf"], "--emd-warmup must be finite, got inf"),
        (["--emd-weight", "nan"], "--emd-weight must be at least 0, got nan"),
        (["--devices", "²"], "--devices must be a number from 1 or 'auto', got '²'"),
        (["--devices", "1.5"], "--devices must be a number from 1 or 'auto', got '1.5'"),
        (["--resume", "--overwrite"], "--resume continues a run and --overwrite begins it anew"),
        (["--out", ""], "--out must name a folder, got ''"),
        (["--data-dir="], "--data-dir must name a folder, got ''"),
        (["--arch", "resnet8", "--layers", ""], "--layers must be names of layers, got ('',)"),
        (["--eps", "0.1"], "--eps is for --solver sinkhorn"),
    ],
)
def test_values_that_are_not_allowed(arguments, said, capsys):
    assert cli.main(["train", *arguments]) == 2
    assert said in one_sentence(capsys.readouterr())


@needs_extra
def test_a_folder_that_cannot_be_made(capsys):
    assert cli.main(["train", "--out", "/dev/null/runs"]) == 1
    assert "--out: /dev/null/runs cannot be made: " in one_sentence(capsys.readouterr())


@needs_extra
@pytest.mark.parametrize("more", [["--emd-warmup", "1e300"], ["--accumulate", "1000"]])
def test_extreme_values_that_are_allowed(more, capsys, tmp_path):
    assert cli.main(["train", *QUICK, *more, "--out", str(tmp_path)]) == 0
    assert without_notes(capsys.readouterr()) == []


@needs_extra
def test_a_config_that_is_no_text(tmp_path, capsys):
    (tmp_path / "options.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SystemExit, match="2"):
        cli.main(["train", "--config", str(tmp_path / "options.yaml")])
    assert "--config: expected a text in UTF-8" in capsys.readouterr().err


def without_notes(captured):
    """stderr less the lines of Lightning's log, which pytest shows and the command line does not."""
    return [line for line in captured.err.splitlines() if not line.startswith("INFO")]


@needs_extra
def test_a_loss_that_is_not_finite_is_exit_code_1(capsys, tmp_path):
    assert cli.main(["train", *QUICK, "--arm", "ce", "--lr", "1e30", "--out", str(tmp_path)]) == 1
    said = without_notes(capsys.readouterr())
    assert len(said) == 1 and "loss is not finite" in said[0]
    assert not (tmp_path / "result.json").exists()


BROKEN = """
raise RuntimeError("operator torchvision::nms does not exist")
"""


@needs_extra
def test_a_torchvision_of_another_torch(tmp_path):
    """It must not disturb a run that does not need it, and one that does is told why it cannot have it."""
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(BROKEN)
    info = tmp_path / "torchvision-0.99.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torchvision\nVersion: 0.99.0\n")
    search = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))
    for i, (more, code, said) in enumerate(
        (
            ([], 0, ""),
            (["--arch", "resnet9"], 1, "torchvision does not load (operator torchvision::nms does not exist)"),
            (["--data", "cifar10"], 1, "--data cifar10 needs torchvision: torchvision does not load (operator"),
        )
    ):
        done = subprocess.run(
            [sys.executable, "-m", "sfr_ext", "train", *QUICK, "--arm", "ce", "--out", str(tmp_path / str(i)), *more],
            capture_output=True,
            text=True,
            timeout=300,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": search},
        )
        assert done.returncode == code, done.stderr
        assert said in done.stderr and "Traceback" not in done.stderr


@needs_extra
def test_interrupted_after_an_epoch(monkeypatch, capsys, tmp_path):
    from sfr_ext.train.module import Classifier

    step = Classifier.training_step

    def interrupted(self, batch, index):
        if self.current_epoch == 1:
            raise KeyboardInterrupt
        return step(self, batch, index)

    monkeypatch.setattr(Classifier, "training_step", interrupted)
    assert cli.main(["train", *QUICK, "--epochs", "2", "--out", str(tmp_path)]) == 130
    assert "--resume goes on after the last whole epoch" in capsys.readouterr().err


def test_without_the_extra(monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in ("lightning", "sklearn") else find(name)
    )
    assert cli.main(["train"]) == 1
    assert "train needs lightning and sklearn" in (sentence := one_sentence(capsys.readouterr()))
    assert "pip install lightning scikit-learn (or all" in sentence


@pytest.mark.parametrize("command, more", [("train", []), ("study", ["s.yaml", "--out", "o"]), ("report", ["o"])])
def test_without_any_of_the_extra(command, more, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert cli.main([command, *more]) == 1
    sentence = one_sentence(capsys.readouterr())
    assert f"{command} needs {' and '.join(cli.NEEDED[command])}, not installed" in sentence
    assert {"train": "scikit-learn", "study": "rich", "report": "scipy"}[command] in sentence
    extra = re.search(r"^train = \[(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.M | re.S)[1]
    installed = re.search(r"pip install (.*?) \(or all", sentence)[1].split()
    assert set(installed) <= set(re.findall(r'"([\w-]+)>=', extra))


@needs_extra
def test_errors_have_no_traceback(capsys, tmp_path):
    assert cli.main(["train", *QUICK, "--out", str(tmp_path), "--arch", "resnet9"]) == 1
    assert "resnet9" in one_sentence(capsys.readouterr())
    assert cli.main(["train", *QUICK, "--out", str(tmp_path), "--resume"]) == 1
    assert "last.ckpt does not exist" in one_sentence(capsys.readouterr())
    assert cli.main(["train", "--epochs", "0"]) == 2
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
    assert cli.main(arguments) == 1
    assert "holds a finished run" in capsys.readouterr().err
    assert cli.main([*arguments, "--epochs", "2", "--resume"]) == 0
    assert json.loads((tmp_path / "result.json").read_text())["epochs"] == 2


@needs_extra
def test_resume_takes_its_options_from_the_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", *QUICK, "--arm", "ce", "--seed", "3", "--lr", "0.05", "--no-augment"]) == 0
    out = tmp_path / "runs" / "ce-digits-3"
    assert (out / "result.json").is_file()
    for i, resume in enumerate((["runs/ce-digits-3"], [str(out / "checkpoints" / "last.ckpt")], [])):
        more = [] if resume else ["--out", str(out)]
        assert cli.main(["train", "--resume", *resume, *more, "--epochs", str(2 + i)]) == 0
        result = json.loads((out / "result.json").read_text())
        options = {key: result["options"][key] for key in ("arm", "seed", "lr", "augment", "limit", "epochs")}
        assert options == {"arm": "ce", "seed": 3, "lr": 0.05, "augment": False, "limit": 192, "epochs": 2 + i}
    capsys.readouterr()
    assert cli.main(["train", "--resume", str(out), "--lr", "0.1", "--epochs", "9"]) == 1
    assert "was trained with --lr 0.05, got 0.1" in capsys.readouterr().err
    assert cli.main(["train", "--resume", "runs/nowhere"]) == 2
    assert "runs/nowhere does not exist" in one_sentence(capsys.readouterr())


@needs_extra
@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"\xff"])
def test_options_of_a_run_that_are_damaged(text, tmp_path, capsys):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "options.json").write_bytes(text)
    assert cli.main(["train", "--resume", str(tmp_path)]) == 1
    assert "options.json is damaged; remove it" in one_sentence(capsys.readouterr())


def closed_pipe():
    reader, writer = os.pipe()
    os.close(reader)
    return writer


WHAT_PRINTS = [["info"], ["layers", "resnet8"], ["--version"], ["--print-completion", "bash"]]
HELP = [[command, "--help"] for command in ("train", "study", "report", "compare", "layers", "match", "bench", "info")]


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("arguments", [*WHAT_PRINTS, *HELP], ids=" ".join)
def test_a_reader_that_has_gone(arguments, unbuffered):
    """As with ``| head``: no traceback, whether what is printed waits in a buffer or not."""
    if arguments[0] in ("train", "--print-completion") and not (TRAIN_EXTRA and importlib.util.find_spec("shtab")):
        pytest.skip("the extra [train] is not installed")
    command, environment = [sys.executable, "-m", "sfr_ext", *arguments], {"PYTHONUNBUFFERED": unbuffered}
    pipe = closed_pipe()
    try:
        done = subprocess.run(
            command, stdout=pipe, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment}
        )
    finally:
        os.close(pipe)
    assert not done.stderr
    # argparse itself passes over help that cannot be written.
    assert done.returncode == 1 or (done.returncode == 0 and arguments[-1] in ("--help", "--version"))


def test_errors_that_nobody_reads():
    pipe = closed_pipe()
    try:
        done = subprocess.run([sys.executable, "-m", "sfr_ext", "layers", "none"], stdout=subprocess.PIPE, stderr=pipe)
    finally:
        os.close(pipe)
    assert done.returncode in (1, 2) and not done.stdout


def test_a_pipe_of_the_command_is_not_its_output(monkeypatch):
    def broken(arguments):
        raise BrokenPipeError

    monkeypatch.setattr(cli, "_info", broken)
    with pytest.raises(BrokenPipeError), open(os.devnull, "w") as nowhere:
        monkeypatch.setattr(sys, "stdout", nowhere)
        monkeypatch.setattr(sys, "stderr", nowhere)
        cli.main(["info"])


@needs_extra
def test_interrupt(monkeypatch, capsys, tmp_path):
    from sfr_ext.train.module import Classifier

    def interrupted(self, batch, index):
        raise KeyboardInterrupt

    monkeypatch.setattr(Classifier, "training_step", interrupted)
    assert cli.main(["train", *QUICK, "--out", str(tmp_path)]) == 130
    assert "interrupted; no epoch was finished" in one_sentence(capsys.readouterr())


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


@pytest.mark.parametrize(
    "started, options, said",
    [
        (2, [], "torchrun started 2 processes, --devices is 1:"),
        (2, ["--devices", "auto", "--accelerator", "cpu"], "torchrun started 2 processes, --devices is 1:"),
        (1, ["--devices", "2"], "torchrun started 1 process, --devices is 2:"),
        (3, ["--devices", "2", "--nodes", "2"], "torchrun started 3 processes, --devices is 2, --nodes is 2:"),
    ],
)
def test_torchrun_with_other_devices(started, options, said, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("WORLD_SIZE", str(started))
    assert cli.main(["train", "--limit", "64", "--out", str(tmp_path / "run"), *options]) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "run").exists()


@needs_extra
def test_nodes_without_a_launcher(tmp_path, monkeypatch, capsys):
    """The other machine's processes would be waited for without a word."""
    for name in ("MASTER_ADDR", "TORCHELASTIC_RUN_ID", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    options = ["train", "--limit", "64", "--out", str(tmp_path / "run"), "--accelerator", "cpu", "--nodes", "2"]
    for devices in ([], ["--devices", "4"]):
        assert cli.main([*options, *devices]) == 2
        said = capsys.readouterr().err
        n = devices[1] if devices else "1"
        assert f"`torchrun --nnodes 2 --nproc_per_node {n} --rdzv_backend c10d" in said
        assert f"`srun --nodes 2 --ntasks-per-node {n} sfr-ext train --nodes 2 --devices {n} " in said
    assert not (tmp_path / "run").exists()


@needs_extra
@pytest.mark.parametrize(
    "variables",
    [{"MASTER_ADDR": "localhost"}, {"SLURM_NTASKS": "2", "SLURM_STEP_ID": "0"}, {"TORCHELASTIC_RUN_ID": "none"}],
)
def test_nodes_with_a_launcher(variables, monkeypatch):
    """Somebody else's variables are enough: which machine this one is, they say."""
    from sfr_ext.train.config import TrainConfig
    from sfr_ext.train.launched import check_launched

    for name, value in {**variables, "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    check_launched(TrainConfig(nodes=2, devices="1", accelerator="cpu"))


@needs_extra
def test_torchrun_is_the_same_run(tmp_path):
    """Two processes that somebody else started; their sums are those of the two that Lightning starts."""
    results = []
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    for name, launcher in (("torchrun", torchrun), ("lightning", [])):
        out = tmp_path / name
        done = subprocess.run(
            [sys.executable, *launcher, "-m", "sfr_ext", "train", *QUICK, "--devices", "2", "--out", str(out)],
            capture_output=True,
            text=True,
            timeout=300,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("epoch 1/1") == done.stdout.count("wrote") == 1
        results.append(json.loads((out / "result.json").read_text()))
    assert [result["devices"] for result in results] == [2, 2]
    for key in ("test_accuracy", "train_accuracy"):
        assert results[0][key] == pytest.approx(results[1][key], abs=1e-12)


@needs_extra
@pytest.mark.parametrize("options, said", [(["--lr", "1e30"], "loss is not finite"), (["--batch-size", "1"], "raise")])
def test_two_devices_end_together_with_one_sentence(options, said, tmp_path):
    command = [sys.executable, "-m", "sfr_ext", "train", *QUICK, "--arm", "ce", "--arch", "resnet18", "--devices", "2"]
    done = subprocess.run(
        [*command, "--limit", "42", "--out", str(tmp_path), *options],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 1, done.stderr
    assert done.stderr.count("sfr-ext: ") == 1 and said in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["--version"], ["train", "--help"], ["train", "--print_config"], ["layers", "--help"]],
)
def test_what_needs_no_torch_does_not_load_it(arguments):
    if arguments[0] == "train" and not TRAIN_EXTRA:
        pytest.skip("the extra [train] is not installed")
    code = f"""if True:
        import sys
        from sfr_ext import cli
        try:
            cli.main({arguments!r})
        except SystemExit as end:
            assert end.code == 0
        assert "torch" not in sys.modules and "lightning" not in sys.modules
        """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout, done.stderr


def test_metrics_are_those_of_the_library():
    assert tuple(ops.METRICS) == cli.METRICS


def test_version(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"sfr-ext {sfr_ext.__version__}\n"


@pytest.mark.parametrize(
    "code",
    [
        "import sfr_ext; assert 'torch' not in __import__('sys').modules; sfr_ext.emd_l2; sfr_ext.reference.exact_emd",
        "from sfr_ext import *; emd_l2; reference",
        "from sfr_ext import reference, emd_l2",
        "import torch, sfr_ext; torch.ops.sfr_ext.emd_forward",
        "import sfr_ext.smoothing, sfr_ext; sfr_ext.solve",
        "import sfr_ext.regularizer",
        "import sfr_ext.ops",
        "import sfr_ext; assert set(sfr_ext.__all__) <= set(dir(sfr_ext)) and not hasattr(sfr_ext, 'emd_l3')",
        "import sfr_ext; assert {n for n in dir(sfr_ext) if n[:2] != '__'} == set(sfr_ext.__all__) - {'__version__'}",
    ],
)
def test_public_names_are_there_however_the_package_is_imported(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@needs_extra
def test_threads_wait_asleep_unless_told_otherwise(monkeypatch, tmp_path):
    for told, wanted in ((None, "passive"), ("active", "active")):
        monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
        if told:
            monkeypatch.setenv("OMP_WAIT_POLICY", told)
        assert cli.main(["train", "--arch", "resnet9", "--out", str(tmp_path)]) == 1
        assert os.environ["OMP_WAIT_POLICY"] == wanted


def result_of(folder, **changed):
    """A folder with a result.json as a run leaves it."""
    result = {"arm": "ce", "data": "digits", "arch": "resnet8", "seed": 0, "epochs": 2, "test_accuracy": 0.5}
    folder.mkdir()
    (folder / "result.json").write_text(json.dumps({**result, "seconds": 10.0, "emd_seconds": 2.5, **changed}))
    return str(folder)


def test_compare(tmp_path, capsys):
    runs = [
        result_of(tmp_path / "a", seed=0, test_accuracy=0.9),
        result_of(tmp_path / "b", seed=1, test_accuracy=0.92),
        result_of(tmp_path / "c", arm="sfr", test_accuracy=0.875),
    ]
    assert cli.main(["compare", *runs]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:3] == ["run", "arm", "data"] and len(lines) == 6
    assert lines[3].split()[:2] == [runs[2], "sfr"] and "87.50 %" in lines[3] and "25 % of them" in lines[3]
    assert lines[5] == "ce on digits, resnet8, 2 epochs: 91.00 % +- 1.41 over 2 seeds"


def test_compare_what_is_no_run(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert cli.main(["compare", str(tmp_path / "empty")]) == 1
    assert "empty/result.json cannot be read: No such file" in one_sentence(capsys.readouterr())
    (tmp_path / "other").mkdir()
    for text in ("{", "{}", "[]", "3"):
        (tmp_path / "other" / "result.json").write_text(text)
        assert cli.main(["compare", str(tmp_path / "other")]) == 1
        assert "is not the result of a run of sfr-ext train" in one_sentence(capsys.readouterr())


def test_importing_the_package_needs_torch_alone():
    code = (
        "import sys, sfr_ext, sfr_ext.cli; sfr_ext.emd_l2; "
        "print([m for m in ('lightning', 'matplotlib', 'sklearn', 'scipy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize(
    "options, said",
    [
        ("--layers layer1", "--layers must name at least two, shallow to deep, for --arm sfr, got 'layer1'"),
        ("--layers layer1,layer1", "--layers must name at least two"),
        ("--layers layer1,layer9", "the network has no layer 'layer9'"),
        ("--layers layer2,layer1", "--layers must be from shallow to deep, but 'layer1' runs before 'layer2'"),
        ("--layers layer2,layer1 --channel-mode project", "must be from shallow to deep"),
        (
            "--layers layer1,fc",
            "--layers: 'fc' returns [2, 10], and no features of places in an image; `sfr-ext layers",
        ),
        ("--layers layer1,fc --arm byot", "--layers: 'fc' returns [2, 10]"),
        ("--strategy fsdp2 --ema 0.9", "--strategy fsdp2 does not go with --ema"),
        ("--pretrained", "--pretrained is for timm's models"),
        ("--data imagefolder", "--data-dir is needed"),
        ("--resume nosuch", "--resume: nosuch does not exist"),
        ("--precision 16-mixed --accelerator cpu", "--precision 16-mixed is for GPUs"),
        ("--hint 2", "--hint is for --arm byot, got it with --arm sfr"),
        ("--arm ce --channel-mode mean", "--channel-mode is for --arm sfr, emd, l2, got it with --arm ce"),
        ("--arm tfd --channel-mode mean", "--channel-mode is for --arm sfr, emd, l2, got it with --arm tfd"),
        ("--arm ce --layers layer1,layer2", "--layers is for --arm sfr, emd, l2, tfd, byot, got it with --arm ce"),
        ("--arm ce --emd-weight 3", "--emd-weight is for --arm"),
        ("--arm l2 --solver sinkhorn", "--solver is for --arm sfr, emd, got it with --arm l2"),
        ("--arm ce --smoothing 0.2", "--smoothing is for --arm ls, dls, sfr, got it with --arm ce"),
        ("--arm ls --schedule cosine", "--schedule is for --arm dls, sfr, got it with --arm ls"),
        ("--arm ce --temperature 2", "--temperature is for --arm byot, cskd, tfkd, got it with --arm ce"),
    ],
)
def test_what_no_run_could_have_is_refused_before_a_folder_is_made(options, said, tmp_path, capsys):
    out = tmp_path / "run"
    assert cli.main(["train", "--limit", "64", "--epochs", "1", "--out", str(out), *options.split()]) == 2
    assert said in capsys.readouterr().err and not out.exists()


def test_options_that_another_one_needs_are_taken():
    assert parse(["--arm", "ce", "--monitor", "--layers", "layer1,layer2", "--channel-mode", "mean"]).arm == "ce"
    assert parse(["--arm", "ce", "--probe", "--layers", "layer1"]).probe


@pytest.mark.parametrize("written", ["--config={}", "--config {}"])
def test_a_name_twice_in_a_file_of_options(written, tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text("arm: ce\nlr: 0.1\narm: sfr\n")
    assert cli.main(["train", "--out", str(tmp_path / "run"), *written.format(file).split()]) == 2
    assert f"{file}: line 3: 'arm' is there twice" in " ".join(capsys.readouterr().err.split())
