"""The examples run, and find what they look for."""

from __future__ import annotations

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
