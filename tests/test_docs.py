"""What the documentation names is there: links and their anchors, paths, commands, tests, public names."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import sfr_ext
from sfr_ext import cli, ops

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    *sorted((ROOT / "docs").rglob("*.md")),
    *(ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "benchmarks/README.md")),
]
# What a path in a page is relative to, beside the page itself.
FOLDERS = ["", "csrc", "sfr_ext", "tests", "benchmarks", "docs"]
SUFFIXES = "py|pyi|h|cpp|cu|cuh|md|json|npz|toml|txt|cff|ipynb"
# Written by runs, not part of the repository.
WRITTEN = {
    "results.md",
    "results.json",
    "metrics.csv",
    "result.json",
    "old.json",
    "new.json",
    "checkpoints/options.json",
    "config.json",
    "report.md",
    "report.html",
    "log.txt",
}
# Named like tests, but columns of results.
COLUMNS = {"test_accuracy", "test_loss", "test_calibration_error"}

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def prose(page: Path) -> str:
    """Without blocks of code."""
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)


def quoted(page: Path) -> Iterator[str]:
    """What stands between backticks."""
    return (match[1] for match in re.finditer(r"`([^`\n]+)`", prose(page)))


def anchors(page: Path) -> set[str]:
    """As the usual renderers make them from headings."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def there(path: str, page: Path) -> bool:
    return any((folder / path).exists() for folder in (page.parent, *(ROOT / name for name in FOLDERS)))


@pages
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith(("https://", "http://")):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), target
        if anchor:
            assert anchor in anchors(linked), target


@pages
def test_paths_exist(page: Path) -> None:
    for text in quoted(page):
        for path in re.findall(rf"(?<![\w/<.*-])((?:[\w.-]+/)*[\w-]+\.(?:{SUFFIXES}))(?![\w(])", text):
            assert path in WRITTEN or there(path, page) or named_alone(path, page), path
        if re.fullmatch(r"(?:csrc|sfr_ext|tests|tools|docs|benchmarks|examples)(?:/[\w.-]+)+/?", text):
            ours = text.rstrip("/")
            assert there(ours, page) or ours == "benchmarks/out", text


def named_alone(path: str, page: Path) -> bool:
    """A file of a folder that the page is about, named without it."""
    return "/" not in path and any(
        path == found.name for folder in ("csrc", "sfr_ext", "tests", "benchmarks", "tools") for found in files(folder)
    )


def files(folder: str) -> list[Path]:
    return [path for path in (ROOT / folder).rglob("*") if path.is_file()]


@pages
def test_commands_exist(page: Path) -> None:
    """Modules, scripts, targets of make, subcommands; and the options of those that say theirs."""
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    for text in [*quoted(page), *page.read_text().splitlines()]:
        for module in re.findall(r"python -m ([\w.]+)", text):
            if not module.startswith(("pip", "pytest", "venv")):
                assert importlib.util.find_spec(module) is not None, module
        for script in re.findall(r"python ((?:tools|examples|tests)/[\w/]+\.py)", text):
            assert (ROOT / script).is_file(), script
        if match := re.match(r"make ([a-z][\w-]*)", text):
            assert match[1] in targets, text
        if match := re.fullmatch(r"sfr-ext ([a-z]+)(?: .*)?", text):
            assert match[1] in subcommands(), text


def subcommands() -> set[str]:
    (commands,) = (action for action in cli._parser()._actions if isinstance(action, argparse._SubParsersAction))
    return set(commands.choices)


@pages
def test_options_of_benchmarks_exist(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text in quoted(page):
        match = re.fullmatch(r"python -m (benchmarks[\w.]*)((?: .*)?)", text)
        options = set(re.findall(r"--[\w-]+", match[2])) if match else set()
        if not match or not options:
            continue
        name = "benchmarks.__main__" if match[1] == "benchmarks" else match[1]
        with pytest.raises(SystemExit):
            importlib.import_module(name).main(["--help"])
        assert options <= set(re.findall(r"--[\w-]+", capsys.readouterr().out)), text


@pages
def test_tests_and_public_names_exist(page: Path) -> None:
    known = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    for text in quoted(page):
        if re.fullmatch(r"test_\w+", text) and text not in COLUMNS:
            assert re.search(rf"def {text}\(", known), text
        if match := re.fullmatch(r"sfr_ext((?:\.\w+)+)(?:\(.*\))?", text):
            owner: object = sfr_ext
            for name in match[1][1:].split("."):
                owner = getattr(owner, name, None) or importlib.import_module(f"sfr_ext.{name}")


def test_every_metric_is_described() -> None:
    """Where a user looks for what there is."""
    for of in (sfr_ext.emd_l2, sfr_ext.cost_matrix, sfr_ext.reference.cost_matrix):
        for metric in ops.METRICS:
            assert metric in str(of.__doc__), (of, metric)
    for page in ("guide", "features", "accuracy"):
        for metric in ops.METRICS:
            assert f"`{metric}`" in (ROOT / "docs" / f"{page}.md").read_text().replace('"', ""), (page, metric)


def test_every_page_can_be_reached() -> None:
    """From the README, by links."""
    found, waiting = set(), [ROOT / "README.md"]
    while waiting:
        page = waiting.pop()
        if page in found or page.suffix != ".md":
            continue
        found.add(page)
        links = (target.partition("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)))
        waiting += [(page.parent / link).resolve() for link in links if link and "://" not in link]
    assert set((ROOT / "docs").rglob("*.md")) <= found


def test_every_study_is_listed() -> None:
    listed = (ROOT / "benchmarks" / "README.md").read_text()
    for path in (ROOT / "benchmarks" / "studies").glob("[!_]*.py"):
        assert f"benchmarks.studies.{path.stem}`" in listed, path.stem
