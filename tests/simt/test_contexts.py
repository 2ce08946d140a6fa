"""Which GPUs a call makes a context on, and which one it leaves current: on the emulator, whose runtime counts them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from sfr_ext import cost_matrix, emd_l2, solve
from sfr_ext.ops import forced, launch
from sfr_ext.ops.contracts import Where
from simt import build


def on_device(device: int, call: Callable[[], Any]) -> Any:
    """What the call returns in a new thread, with tensors that are taken to be on this device."""
    found: list[Any] = []

    def body() -> None:
        with pytest.MonkeyPatch.context() as patch, forced(emulated=build.module()):
            patch.setattr(launch, "Where", lambda _, *rest: Where(device, *rest))
            found.append(call())

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    return found[0]


@pytest.fixture
def unused() -> build.Library:
    """The emulator, with devices that nobody has used."""
    library = build.emulator()
    for device in range(4):
        library.device(device, 4, 99)
    return library


def used(library: build.Library) -> list[int]:
    return [device for device in range(4) if library.has_context(device)]


def training_step() -> None:
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    emd_l2(x, torch.randn(2, 3, 4, 4)).sum().backward()


CALLS: dict[str, Callable[[], Any]] = {
    "emd_l2": lambda: emd_l2(torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)),
    "backward": training_step,
    "cost_matrix": lambda: cost_matrix(torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)),
    "solve": lambda: solve(torch.rand(1, 5, 6)),
    "exact": lambda: solve(torch.rand(1, 5, 6), solver="exact"),
    "large": lambda: solve(torch.rand(1, 150, 150)),  # in scratch
}


@pytest.mark.parametrize("name", CALLS)
def test_a_thread_that_never_touched_cuda_uses_the_tensors_device_alone(unused: build.Library, name: str) -> None:
    def call() -> int:
        CALLS[name]()
        return unused.current_device()

    # There is no going back to device 0 that would not take its memory.
    assert on_device(1, call) == 1
    assert used(unused) == [1]


def test_a_thread_goes_back_to_a_device_that_is_in_use(unused: build.Library) -> None:
    def call() -> int:
        CALLS["emd_l2"]()
        return unused.current_device()

    on_device(0, call)
    assert on_device(1, call) == 0
    assert used(unused) == [0, 1]
    assert on_device(3, call) == 0
    assert used(unused) == [0, 1, 3]


@pytest.mark.parametrize("device", [0, 2])
def test_asking_whether_a_device_can_be_used_leaves_the_thread_where_it_is(unused: build.Library, device: int) -> None:
    def call() -> int:
        assert build.module().cuda.why_unusable_on(device) == ""
        return unused.current_device()

    assert on_device(0, call) == 0
    assert used(unused) == [device]


def test_asking_about_a_device_that_there_is_not(unused: build.Library) -> None:
    assert build.module().cuda.why_unusable_on(64).startswith("GPU 64 cannot be used: ")
    assert used(unused) == []
