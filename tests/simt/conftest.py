"""What the tests on the emulator share."""

from __future__ import annotations

import sys

import pytest

from simt import build


@pytest.fixture(scope="session")
def sanitized() -> dict[str, str]:
    """The environment for the processes of the asan flavour."""
    environment = build.sanitized()
    if environment is None:
        pytest.skip("g++ has no AddressSanitizer here")
    return environment


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if sys.platform != "linux":
        for item in items:
            if "simt" in item.path.parts:
                item.add_marker(pytest.mark.skip(reason="the emulator needs Linux"))
