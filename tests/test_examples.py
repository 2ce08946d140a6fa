"""The examples run, and find what they look for."""

from __future__ import annotations

import runpy
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def test_deepemd_similarity() -> None:
    accuracy, off = runpy.run_path(str(EXAMPLES / "deepemd_similarity.py"))["main"]()
    assert accuracy > 0.8 and off < 1e-6


def test_point_cloud() -> None:
    error = runpy.run_path(str(EXAMPLES / "point_cloud.py"))["main"]()
    assert error < 0.01
