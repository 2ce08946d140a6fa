"""The CUDA kernels, compiled: without a warning, and within what a GPU's registers hold. Needs nvcc, but no GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import cuda_report
import cuda_toolchain
import native_build
import pytest

ROOT = Path(__file__).resolve().parents[1]

LOG = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN3sfr4cuda4waveIfLi4EEEvPT_' for 'sm_90'
ptxas info    : Function properties for _ZN3sfr4cuda4waveIfLi4EEEvPT_
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 2 barriers, 1024 bytes smem, 360 bytes cmem[0]
ptxas info    : Compile time = 2.321 ms
ptxas info    : Compiling entry function 'second' for 'sm_90'
ptxas info    : Function properties for second
    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 255 registers, used 0 barriers, 16 bytes cumulative stack size
ptxas info    : Function properties for called
    8 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
"""

SPILLING = """
__global__ void planted_kernel(float* x, int n) {
  float local[64] = {};
  for (int k = 0; k < n; ++k) local[int(x[k]) % 64] += x[k];
  for (int k = 0; k < 64; ++k) x[k] = local[k];
}
"""


@pytest.fixture(scope="session")
def nvcc():
    try:
        cuda_toolchain.find_cuda(native_build.find_toolchain().cxx)
    except cuda_toolchain.NoCuda as reason:
        pytest.skip(str(reason))


def run(*arguments):
    command = [sys.executable, ROOT / "tools" / "cuda_report.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_kernels_compile_cleanly(nvcc):
    """For the oldest and the newest architecture; the table is left where .ci/run and people look for it."""
    done = run("--out", ROOT / "build" / "cuda_resources")
    assert done.returncode == 0, done.stdout + done.stderr
    kernels = json.loads((ROOT / "build" / "cuda_resources.json").read_text())
    assert kernels and all(kernel["registers"] is None or kernel["registers"] > 0 for kernel in kernels)


def test_stack_frame_is_reported(nvcc, tmp_path):
    (tmp_path / "planted.cu").write_text(SPILLING)
    done = run(tmp_path / "planted.cu", "--archs", "75", "--out", tmp_path / "out")
    assert done.returncode == 1 and "of planted.cu on sm_75 has a stack frame of 256 bytes" in done.stderr
    assert "| `planted_kernel` | planted.cu | sm_75 |" in (tmp_path / "out.md").read_text()


def test_warning_is_an_error(nvcc, tmp_path):
    (tmp_path / "planted.cu").write_text("__global__ void planted_kernel(float* x) { int unused; *x = 1.0f; }")
    done = run(tmp_path / "planted.cu", "--archs", "75", "--out", tmp_path / "out")
    assert done.returncode == 1 and "planted.cu does not compile for sm_75 without a warning" in done.stderr


def test_parse():
    wave, second, called = cuda_report.parse(LOG, "a.cu", "sm_90")
    assert (wave.registers, wave.barriers, wave.shared, wave.clean) == (40, 2, 1024, True)
    assert (second.registers, second.stack, second.spill_stores, second.spill_loads) == (255, 16, 8, 12)
    assert (called.kernel, called.registers, called.clean) == ("called", None, False)


def test_names():
    assert cuda_report._short("void sfr::cuda::(anonymous namespace)::wave<float, (sfr::DType)1>(X<int>)") == (
        "wave<float, (DType)1>"
    )
    assert cuda_report._short("unsigned int sfr::cuda::add<double>(int, X<int, 2>)") == "add<double>"
    assert cuda_report._short("plain(int)") == "plain"
    phase = "sfr::cuda::Phase<&(unsigned int sfr::cuda::solve<float, (sfr::cuda::Place)0>(X<int>, long))>::call(X<int>)"
    assert cuda_report._short(phase) == "solve<float, any>"
    assert cuda_report._short("void sfr::cuda::wave<float, (sfr::cuda::Place)1>(X<int>)") == "wave<float, near>"


def test_allowed(monkeypatch):
    second = cuda_report.parse(LOG, "a.cu", "sm_90")[1]
    assert second.reason is None
    monkeypatch.setattr(cuda_report, "ALLOWED", {"second* sm_*": "cold"})
    assert second.reason == "cold" and "`second` of a.cu on sm_90: cold" in cuda_report.table([second])
