"""What a newcomer meets first: imports that cannot work, packages that are missing, commands and their mistakes."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sfr_ext
from sfr_ext import cli
from sfr_ext.extras import how_to_install

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path(sfr_ext.__file__).parent


def python(*arguments: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    own = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=120, cwd=cwd, env=own)


# An editable installation, whose finder would find the compiled part all the same, is out of the way.
PLAIN = "import sys; sys.meta_path[:] = [finder for finder in sys.meta_path if 'ditable' not in str(finder)]; "


@pytest.mark.parametrize("code", ["import torch, sfr_ext", "import sfr_ext; sfr_ext.emd_l2"])
def test_a_source_folder_in_the_way(code: str, tmp_path: Path) -> None:
    """As in a clone after `pip install .`: the folder there has no compiled part."""
    leave_out = shutil.ignore_patterns("_C*.so", "__pycache__", "build_config.json")
    shutil.copytree(PACKAGE, tmp_path / "sfr_ext", ignore=leave_out)
    done = python("-c", PLAIN + code, cwd=tmp_path, PYTHONPATH=str(tmp_path))
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and last.startswith(f"ImportError: sfr_ext has no compiled part in {tmp_path}/sfr_ext.")
    assert "leave its folder after `pip install .`" in last and "circular" not in done.stderr

    info = "from sfr_ext import cli; raise SystemExit(cli.main(['info']))"
    done = python("-c", PLAIN + info, cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert done.returncode == 1 and done.stderr.startswith("sfr-ext: sfr_ext has no compiled part")
    assert done.stderr.count("\n") == 1

    (tmp_path / "sfr_ext" / "_C.cpython-27-x86_64-linux-gnu.so").touch()
    done = python("-c", PLAIN + code, cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert "(_C.cpython-27-x86_64-linux-gnu.so) was built for another Python" in done.stderr


def test_every_extra_that_is_named_exists() -> None:
    """In messages and pages; and nobody says that PyPI has it."""
    known = set(re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.M))
    pages = [*(ROOT / "docs").glob("*.md"), ROOT / "README.md", *(ROOT / "examples").glob("*.py")]
    for path in [*PACKAGE.rglob("*.py"), *pages]:
        text = path.read_text()
        assert not re.search(r"pip install '?sfr_ext\[", text), path
        for names in [*re.findall(r"'\.\[([\w,]+)\]'", text), *re.findall(r"how_to_install\(\W(\w+)", text)]:
            if names != "extra":
                assert set(names.split(",")) <= known, (path, names)


def test_how_to_install_names_distributions() -> None:
    assert how_to_install("train", "sklearn", "yaml").startswith("pip install scikit-learn pyyaml (or ")
    assert how_to_install("train", "rich").endswith("in a clone of sfr_ext: pip install '.[train]')")


def test_exact_emd_without_scipy(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "scipy" else find(name))
    with pytest.raises(ImportError, match="exact_emd needs scipy, not installed here: pip install scipy"):
        sfr_ext.reference.exact_emd(torch.rand(3, 3))


@pytest.mark.parametrize("tokens", [False, True])
def test_queries_and_classes_get_a_hint(tokens: bool) -> None:
    query, support = torch.rand(15, 8, 4, 4), torch.rand(5, 8, 4, 4)
    if tokens:
        query, support = query.flatten(2).mT, support.flatten(2).mT
    with pytest.raises(ValueError, match=r"give teacher_feat.expand\(15, \*teacher_feat.shape\)$"):
        sfr_ext.emd_l2(query, support)
    assert sfr_ext.emd_l2(query, support.expand(15, *support.shape), reduction="none").shape == (15, 5)
    with pytest.raises(ValueError) as caught:  # other channels: no expansion would help
        sfr_ext.emd_l2(query, support[..., :3] if tokens else support[:, :3])
    assert "expand" not in str(caught.value)


def test_a_map_against_tokens_gets_a_hint() -> None:
    fmap, tokens = torch.rand(2, 8, 4, 4), torch.rand(2, 10, 8)
    for student, teacher, side in ((fmap, tokens, "student_feat"), (tokens, fmap, "teacher_feat")):
        with pytest.raises(ValueError, match=rf"give {side}.flatten\(2\).mT$"):
            sfr_ext.emd_l2(student, teacher)
    assert sfr_ext.emd_l2(fmap.flatten(2).mT, tokens).isfinite()
    # [B, N, C] against [B, G, M, C] are tokens with groups; a map with other channels is not helped by that.
    assert sfr_ext.emd_l2(tokens, torch.rand(2, 3, 7, 8)).isfinite()
    with pytest.raises(ValueError) as caught:
        sfr_ext.emd_l2(fmap, torch.rand(2, 10, 9))
    assert "flatten" not in str(caught.value)


def test_other_channels_get_a_hint() -> None:
    x = torch.rand(2, 8, 4, 4)
    for student, teacher in ((x, x[:, :5]), (x, x[:, None, :5]), (x.flatten(2).mT, x[:, :5].flatten(2).mT)):
        with pytest.raises(ValueError, match='as FeatureDistiller with channel_mode="project" does'):
            sfr_ext.emd_l2(student, teacher)


def test_a_mask_is_a_weight() -> None:
    x, y = torch.rand(2, 8, 4, 4), torch.rand(2, 8, 4, 4)
    mask = torch.rand(2, 4, 4) > 0.3
    assert torch.equal(sfr_ext.emd_l2(x, y, student_weight=mask), sfr_ext.emd_l2(x, y, student_weight=mask.to(x.dtype)))


@pytest.mark.parametrize(
    "arguments, near",
    [
        (["match", "a.png", "b.png", "-o", "c.png", "--patchs", "3"], "--patches"),
        (["layers", "resnet8", "--sizes=8"], "--size"),
        (["report", "runs", "--second", "x"], None),  # argparse takes a beginning that is clear
    ],
)
def test_near_misses_of_every_command(
    arguments: list[str], near: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    if near is None:
        assert cli.main(arguments) == 1
        return
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    said = capsys.readouterr().err
    assert caught.value.code == 2 and f"near to it: {near}" in said and f"usage: sfr-ext {arguments[0]}" in said


def test_near_misses_of_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["trian"])
    assert caught.value.code == 2 and "near to it: train" in capsys.readouterr().err


def test_help_of_bench_needs_no_benchmarks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "site-packages" / "sfr_ext" / "cli.py"))
    assert cli.main(["bench", "--help"]) == 0
    assert capsys.readouterr().out.startswith("usage: sfr-ext bench")


def test_the_help_of_bench_is_that_of_the_benchmarks() -> None:
    done = python("-m", "benchmarks", "--help", cwd=ROOT)
    for flag in re.findall(r"^  (--\w+)", cli._BENCH_HELP, re.M):
        assert flag in done.stdout


def test_compare_names_runs_that_have_no_result_yet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = (
        '{"arm": "ce", "data": "digits", "arch": "resnet8", "seed": 0, "epochs": 2, "test_accuracy": 0.5, '
        '"seconds": 1.0, "emd_seconds": 0.0}'
    )
    (tmp_path / "done").mkdir()
    (tmp_path / "done" / "result.json").write_text(result)
    (tmp_path / "running").mkdir()
    assert cli.main(["compare", *map(str, sorted(tmp_path.iterdir()))]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and lines[2] == f"without a result yet: {tmp_path / 'running'}"


@pytest.mark.parametrize("arguments", [["info"], ["layers", "--help"], ["train", "--help"]])
def test_threads_wait_asleep_in_every_command(arguments: list[str]) -> None:
    code = f"""if True:
        import os, sys
        os.environ.pop("OMP_WAIT_POLICY", None)
        from sfr_ext import cli
        try:
            cli.main({arguments!r})
        except SystemExit:
            pass
        print(os.environ.get("OMP_WAIT_POLICY"))
        """
    wanted = "passive" if arguments == ["info"] else None if "train" not in arguments else "passive"
    assert python("-c", code).stdout.splitlines()[-1] == str(wanted)


def test_examples_set_it_before_torch() -> None:
    for path in (ROOT / "examples").glob("*.py"):
        text = path.read_text()
        assert text.index('os.environ.setdefault("OMP_WAIT_POLICY", "passive")') < text.index("import torch"), path


def test_one_version() -> None:
    cited = re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.M)
    assert cited is not None and cited[1] == sfr_ext.__version__
    assert f"## [{sfr_ext.__version__}]" in (ROOT / "CHANGELOG.md").read_text()
