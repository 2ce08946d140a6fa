"""How problems are laid out, over shapes, devices and directions: csrc/cuda/layout.h on the host."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
from gpu_model.devices import DEVICES, Device
from gpu_model.layout import DoesNotFit, Layout, Task, choose

SIDES = (1, 2, 4, 5, 7, 8, 12, 14, 16, 28, 32, 40, 56, 64, 80, 96, 128)
CHANNELS = (1, 3, 64, 512, 2048)
# A GPU with the least shared memory that a block can have on any.
SMALL = Device("least", "75", 1, 48 * 1024, 1e9, 1e9, 1, 64)
EVERY = [*DEVICES.values(), SMALL]


def fits(task: Task, device: Device) -> Layout | None:
    try:
        return choose(task, device)
    except DoesNotFit:
        return None


def tasks(side: int, other: int) -> list[Task]:
    return [
        Task.of_maps(side * side, other * other, C, norms=norms, solved=solved, reach=solved, float64=float64)
        for C, norms, solved, float64 in itertools.product(CHANNELS, (False, True), (False, True), (False, True))
    ]


@pytest.mark.parametrize("device", EVERY, ids=lambda device: device.name)
@pytest.mark.parametrize("side", SIDES)
def test_backward_fits_wherever_forward_does(device: Device, side: int) -> None:
    missing = []
    for other in {side, 1, max(1, side // 2), 7}:
        for task in tasks(side, other):
            backward = dataclasses.replace(task, backward=True)
            if fits(task, device) and not fits(backward, device):
                missing.append(f"{side} x {side} against {other} x {other}: {backward}")
    assert not missing, f"{len(missing)} do not fit on {device.name}, the first: {missing[0]}"


@pytest.mark.parametrize("device", EVERY, ids=lambda device: device.name)
@pytest.mark.parametrize("side", SIDES)
def test_forward_fits(device: Device, side: int) -> None:
    """docs/kernels.md: any size."""
    for task in tasks(side, side):
        choose(task, device)
