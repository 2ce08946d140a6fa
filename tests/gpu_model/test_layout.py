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
    either = (False, True)
    return [
        Task.of_maps(
            side * side, other * other, C, norms=norms, products=products, solved=solved, reach=reach, float64=float64
        )
        for C, norms, products, solved, reach, float64 in itertools.product(CHANNELS, *[either] * 5)
        if (solved or not reach) and not (products and (norms or float64 or not 32 <= C <= 4096))
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


def test_small_balanced_plans_lie_in_registers() -> None:
    """Four warps hold 64 x 64, and one 16 x 32; a reach and float64 have kernels that know no such plan."""
    device = DEVICES["T4"]

    def in_registers(rows: int, columns: int, **options: bool) -> bool:
        return choose(Task.of_maps(rows, columns, 64, **options), device).in_registers

    assert in_registers(49, 49) and in_registers(64, 64) and in_registers(40, 1, backward=True)
    assert not in_registers(65, 64) and not in_registers(64, 65)
    assert not in_registers(49, 49, reach=True) and not in_registers(49, 49, float64=True)
    assert in_registers(16, 16) and in_registers(16, 32) and in_registers(9, 25, backward=True)
    assert not in_registers(17, 16), "one warp solves them, in shared memory"
    for strategy in ("cooperative", "stream"):
        assert not choose(Task.of_maps(49, 49, 64), device, strategy).in_registers


def test_larger_balanced_plans_are_held_while_products_are_taken() -> None:
    """By 8 warps of one block, of up to 224 x 200; where the plan lies in shared memory."""

    def held(rows: int, columns: int, device: str = "H100", strategy: str = "automatic", **options: bool) -> bool:
        return choose(Task.of_maps(rows, columns, 64, **options), DEVICES[device], strategy).held

    assert held(65, 65) and held(196, 196) and held(196, 196, backward=True) and held(224, 200)
    assert not held(49, 49) and not held(225, 100) and not held(100, 201)
    assert held(100, 100, "T4") and not held(196, 196, "T4"), "several blocks solve it there"
    assert not held(100, 100, reach=True) and not held(100, 100, float64=True)
    for strategy in ("cooperative", "stream"):
        assert not held(100, 100, strategy=strategy)


@pytest.mark.parametrize("device", EVERY, ids=lambda device: device.name)
@pytest.mark.parametrize("side", SIDES)
def test_forward_fits(device: Device, side: int) -> None:
    """docs/kernels.md: any size."""
    for task in tasks(side, side):
        choose(task, device)
