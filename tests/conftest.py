"""What all tests share: a fixed seed, and a closing list of what was skipped and why."""

from __future__ import annotations

import collections

import pytest
import torch


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


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
