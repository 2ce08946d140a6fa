"""Distances and gradients by products (csrc/cpu/centred.h), which processors of some kinds take by themselves."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sfr_ext import _C, build_info

CHECKS = Path(__file__).with_name("products_checks.py")
pytestmark = pytest.mark.cpu_only("about the CPU's kernels")


def run(**environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(CHECKS)], env={**os.environ, **environment}, capture_output=True, text=True
    )


@pytest.mark.parametrize("way", ["products", "differences"])
@pytest.mark.parametrize("isa", build_info()["cpu_isas"])
def test_by_every_instruction_set(isa: str, way: str) -> None:
    if isa not in _C.cpu_isas():
        pytest.skip(f"this processor cannot run the {isa} kernels that were compiled")
    done = run(SFR_EXT_CPU_DISTANCES=way, SFR_EXT_CPU_ISA=isa)
    assert done.returncode == 0 and done.stdout.startswith(isa), done.stdout + done.stderr


def test_another_way_is_refused() -> None:
    done = run(SFR_EXT_CPU_DISTANCES="roots")
    assert done.returncode != 0
    assert "SFR_EXT_CPU_DISTANCES must be products or differences, got 'roots'" in done.stderr
