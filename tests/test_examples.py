"""The examples run, and find what they look for."""

from __future__ import annotations

import json
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def registered(error: float) -> None:
    assert error < 0.01


def recognised(found: tuple[float, float]) -> None:
    accuracy, off = found
    assert accuracy > 0.8 and off < 1e-6


def learnt(accuracy: float) -> None:
    assert accuracy > 0.8  # chance is 0.1


def distilled(found: tuple[float, float, float]) -> None:
    teacher, alone, taught = found
    assert teacher > 0.9 and min(alone, taught) > 0.6  # chance is 0.1


def taught_by_a_cnn(found: tuple[float, float]) -> None:
    accuracy, share = found
    assert accuracy > 0.75 and share < 0.95  # of the distance at the start


# What each is to return.
EXPECTED: dict[str, Callable[[Any], None]] = {
    "deepemd_similarity": recognised,
    "distil_resnet": distilled,
    "point_cloud": registered,
    "train_with_sfr": learnt,
    "vit_from_cnn": taught_by_a_cnn,
}


def test_every_example_is_run() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_example(name: str, one_thread: None) -> None:
    if name in ("distil_resnet", "train_with_sfr", "vit_from_cnn"):
        pytest.importorskip("sklearn")
    EXPECTED[name](runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]())


GALLERY = sorted((EXAMPLES / "gallery").glob("plot_*.py"))


def test_the_gallery_is_there() -> None:
    assert len(GALLERY) >= 10


@pytest.mark.parametrize("path", GALLERY, ids=lambda path: path.stem)
def test_gallery(path: Path, one_thread: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each runs, draws something, and takes seconds: `make docs` shows what."""
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pytest.importorskip("sklearn")
    pytest.importorskip("PIL")
    pyplot.switch_backend("agg")
    names = runpy.run_path(str(path))
    try:
        figures = [value for value in names.values() if isinstance(value, pyplot.Figure)]
        assert figures and all(figure.axes for figure in figures)
    finally:
        pyplot.close("all")


def test_the_notebook_runs_from_top_to_bottom(one_thread: None) -> None:
    """Cell by cell, in one namespace, as a kernel does it."""
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("agg")
    cells = json.loads((EXAMPLES / "tour.ipynb").read_text())["cells"]
    names: dict[str, Any] = {}
    for number, cell in enumerate(cells):
        if cell["cell_type"] == "code":
            assert not cell["outputs"], "outputs are not kept"
            exec(compile("".join(cell["source"]), f"tour.ipynb, cell {number}", "exec"), names)
    pyplot.close("all")
    assert names["curve"][-1][0] < names["curve"][0][0]
