"""What all tests share: a fixed seed, and a closing list of what was skipped and why."""

from __future__ import annotations

import collections
import os
import sys
import tempfile
from collections.abc import Iterator

import pytest
import torch

# A cache of compiled graphs that no earlier version of the operators has filled: its keys do not hold their schemas.
if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
    _cache = tempfile.TemporaryDirectory(prefix="sfr_ext-inductor-")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = _cache.name


# Tests that build the kernels in build/, one after the other.
_KERNELS = "tests/simt", "tests/gpu_model", "tests/test_cuda_build.py"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """For several processes (pytest-xdist, ``--dist loadgroup``): a file's tests share what they have made."""
    if not config.pluginmanager.hasplugin("xdist"):
        return
    for item in items:
        file = item.nodeid.split("::")[0]
        item.add_marker(pytest.mark.xdist_group("kernels" if file.startswith(_KERNELS) else file))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _nothing_compiled() -> Iterator[None]:
    """What one test compiles does not count towards the recompilations that another is allowed."""
    yield
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


@pytest.fixture
def threads() -> Iterator[None]:
    """Puts the number of threads back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def one_thread(threads: None) -> None:
    """For batches so small that threads gain nothing, and lose much when the machine is busy."""
    torch.set_num_threads(1)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """One line for each reason, so that a green run cannot hide what it did not do."""
    reasons: collections.Counter[str] = collections.Counter()
    for report in terminalreporter.stats.get("skipped", []):
        # (path, line, "Skipped: reason") for a skip; an xfail carries its reason elsewhere.
        why = report.longrepr[2] if isinstance(report.longrepr, tuple) else getattr(report, "wasxfail", "no reason")
        reasons[why.removeprefix("Skipped: ")] += 1
    terminalreporter.section("not tested here")
    for why, count in sorted(reasons.items()):
        terminalreporter.write_line(f"{count} skipped: {why}")
    if not reasons:
        terminalreporter.write_line("nothing was skipped")
