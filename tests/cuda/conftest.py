"""The tests of the CPU's kernels, collected again for those of the GPU; and tests of their own.

A test that is marked `every_strategy` runs with each strategy, the others with the one that follows from the shape. One
that is marked `cpu_only` says why it says nothing about a GPU.

Without a usable GPU each file is skipped with the reason. With SFR_EXT_CUDA_EMULATE=1 the emulator of tests/simt
stands in for the GPU, which is slow: pick a few tests with -k.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gpu
import pytest
import test_errors
import torch

from sfr_ext import ops, reference

HERE = Path(__file__).resolve().parent


class _Unusable(pytest.Module):
    def collect(self) -> Any:
        pytest.skip(gpu.why_not(), allow_module_level=True)


def pytest_pycollect_makemodule(module_path: Path, parent: Any) -> pytest.Module | None:
    """One skip for each file, not one for each test."""
    return _Unusable.from_parent(parent, path=module_path) if gpu.why_not() else None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "strategy" in metafunc.fixturenames:
        every = metafunc.definition.get_closest_marker("every_strategy") is not None
        metafunc.parametrize("strategy", list(ops.STRATEGIES) if every else ["automatic"], indirect=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        marker = item.get_closest_marker("cpu_only") if HERE in item.path.parents else None
        if marker is not None:
            item.add_marker(pytest.mark.skip(reason=f"not on a GPU: {marker.args[0]}"))


@pytest.fixture
def strategy(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(autouse=True)
def _on_the_gpu(strategy: str, monkeypatch: pytest.MonkeyPatch, _seed: None) -> Iterator[None]:
    for name in ("x", "y", "tokens", "cost"):  # made when the module was imported
        monkeypatch.setattr(test_errors, name, getattr(test_errors, name).to(gpu.DEVICE))
    exact = reference.exact_emd  # SciPy wants its arrays on the CPU
    monkeypatch.setattr(reference, "exact_emd", lambda *costs: gpu.on_cpu(exact, *costs).to(gpu.DEVICE))
    torch.set_default_device(gpu.DEVICE)
    try:
        with gpu.running(strategy):
            yield
    finally:
        torch.set_default_device(None)


@pytest.fixture
def real_gpu() -> None:
    """For what the emulator does not have: streams, graphs, torch's memory."""
    if gpu.EMULATED:
        pytest.skip("needs a GPU, not the emulator")


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Iterator[None]:
    try:
        result = yield
        # A launch that failed belongs to the test that made it, not to the one after.
        gpu.synchronize()
        return result
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != "scipy":
            raise
        pytest.skip("scipy is not installed")
    except RuntimeError as error:
        if any(text in str(error) for text in gpu.STICKY):
            pytest.exit(f"{pyfuncitem.nodeid}: {error}; nothing after it would run", returncode=3)
        if "do not fit on this GPU with the strategy that was asked for" not in str(error):
            raise
        pytest.skip("too large for the strategy that was asked for")
