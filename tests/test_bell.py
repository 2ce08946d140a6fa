"""No ring is lost on a thread that is about to fall asleep (csrc/cpu/threads.h), wherever it is held up."""

from __future__ import annotations

import subprocess
from pathlib import Path

import native_build

ROOT = Path(__file__).resolve().parents[1]
CPU = ROOT / "csrc" / "cpu"


def test_a_ring_between_any_two_steps_is_heard(tmp_path: Path) -> None:
    before, rest = (CPU / "threads.h").read_text().split("for (;;) {", 1)
    steps, after = rest.split("sleep(heard);", 1)
    assert steps.count(";\n") == 4, steps
    steps = steps.replace(";\n", "; delay();\n")
    (tmp_path / "threads.h").write_text(f"void delay();\n{before}for (;;) {{{steps}sleep(heard);{after}")
    (tmp_path / "threads.cpp").write_text((CPU / "threads.cpp").read_text())
    sources = [str(ROOT / "tests" / "threads" / "bell.cpp"), str(tmp_path / "threads.cpp")]
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-DSFR_ISA=baseline", f"-I{tmp_path}", "-pthread"]
    program = str(tmp_path / "bell")
    subprocess.run([*native_build.find_toolchain().cxx, *flags, *sources, "-o", program], check=True)
    done = subprocess.run([program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
