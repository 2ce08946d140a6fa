"""What an operation asks of the CUDA runtime, counted by the emulator's: each call costs the host time."""

from __future__ import annotations

import pytest
import torch

from sfr_ext import emd_l2
from simt import build
from simt.test_contexts import CALLS, on_device
from simt.test_kernels import emulated

# Where there is no scratch: nothing but the launch. With it an operation is prepared twice, once to learn how much.
LAUNCH = {"cudaGetDevice": 1, "cudaLaunchKernelEx": 1}
IN_SCRATCH = {
    "cudaGetDevice": 2,
    "cudaLaunchKernelEx": 1,
    "cudaMemsetAsync": 1,
    "cudaOccupancyMaxActiveBlocksPerMultiprocessor": 2,
}
EXPECTED = {
    "emd_l2": LAUNCH,
    "backward": {name: 2 * number for name, number in LAUNCH.items()},
    "cost_matrix": LAUNCH,
    "solve": LAUNCH,
    "exact": LAUNCH,
    "large": IN_SCRATCH,
}


@pytest.mark.parametrize("name", CALLS)
def test_calls_of_an_operation_that_has_run_before(name: str) -> None:
    def call() -> dict[str, int]:
        CALLS[name]()
        with build.emulator().counting_calls() as calls:
            CALLS[name]()
        return calls

    assert on_device(0, call) == EXPECTED[name]  # in a thread that has no other device current


@pytest.mark.parametrize("strategy", ["block", "cooperative", "stream"])
def test_nothing_waits_for_the_device(strategy: str) -> None:
    x = torch.randn(2, 3, 6, 6, requires_grad=True)
    with emulated("plain", strategy, None), build.emulator().counting_calls() as calls:
        emd_l2(x, torch.randn(2, 3, 6, 6)).backward()
    assert calls["cudaLaunchKernelEx"] == 2
    assert not {"cudaDeviceSynchronize", "cudaStreamSynchronize", "cudaMemcpyAsync"} & calls.keys()


def test_limits_of_a_device_are_asked_for_once() -> None:
    with emulated("plain", "automatic", None, 98), build.emulator().counting_calls() as calls:
        for _ in range(3):
            CALLS["emd_l2"]()
    assert (calls["cudaDeviceGetAttribute"], calls["cudaFuncSetAttribute"]) == (3, 1)


def test_counter_counts() -> None:
    library = build.emulator()
    with library.counting_calls() as calls:
        pass
    assert calls == {}
    with library.counting_calls() as calls:
        build.module().cuda.why_unusable_on(0)
    assert calls["cudaSetDevice"] == calls["cudaFuncGetAttributes"] == 1
