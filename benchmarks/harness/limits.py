"""What the machine can do at most, found by two loops that do nothing else."""

from __future__ import annotations

import dataclasses
import time

import torch

from .device import Device

ROUNDS = 9
# Float32 matrices that stay in a core's own caches, and larger ones: whichever multiplies fastest counts.
CPU_EDGES = (128, 256, 512, 768)
CPU_COPY_BYTES = 1 << 27  # beyond the caches
LANES = 128  # float32 instructions of a GPU's multiprocessor in a clock


@dataclasses.dataclass(frozen=True)
class Limits:
    """With all threads that were pinned. Best of several runs: a limit is not to be beaten by a quiet moment."""

    copy_bytes: float  # read and written a second by a large copy
    multiply_adds: float  # float32 without TF32, a second, in the best matrix product
    vector_multiply_adds: float = 0.0  # of a GPU without its matrix units: multiprocessors x lanes x clock
    clock: float = 0.0  # of a GPU while it is busy, hertz


def measure(device: Device, rounds: int = ROUNDS) -> Limits:
    size, edges = (1 << 30, (8192,)) if device.on_gpu else (CPU_COPY_BYTES, CPU_EDGES)
    source = torch.ones(size, dtype=torch.uint8, device=device.name)
    target = torch.empty_like(source)
    copy = min(device.milliseconds(lambda: target.copy_(source)) for _ in range(rounds))
    best = 0.0
    for edge in edges:
        a, b, out = (torch.randn(edge, edge, device=device.name) for _ in range(3))
        repeats = 1 if device.on_gpu else max(1, (1 << 26) // edge**3)

        def product(a=a, b=b, out=out, repeats=repeats) -> None:
            for _ in range(repeats):
                torch.mm(a, b, out=out)

        best = max(best, *(repeats * edge**3 / device.milliseconds(product) for _ in range(rounds)))
    if not device.on_gpu:
        return Limits(2e3 * size / copy, 1e3 * best)
    cycles = 20_000_000
    clock = 1e3 * cycles / min(device.milliseconds(lambda: torch.cuda._sleep(cycles)) for _ in range(rounds))
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    return Limits(2e3 * size / copy, 1e3 * best, processors * LANES * clock, clock)


class Calibration:
    """The same work in every run of the harness, on the same tensors: how fast the machine is at this moment.

    A product of matrices in the caches and a copy beyond them. ``compare`` divides by their time what is to be told
    apart from a machine that was slower as a whole.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._a, self._out = (torch.ones(384, 384, device=device.name) for _ in range(2))
        self._source = torch.ones(1 << 24, dtype=torch.uint8, device=device.name)
        self._target = torch.empty_like(self._source)

    def milliseconds(self) -> dict[str, float]:
        def product() -> None:
            for _ in range(4):
                torch.mm(self._a, self._a, out=self._out)

        found = {}
        for name, loop in (("matmul", product), ("copy", lambda: self._target.copy_(self._source))):
            begin = time.process_time()
            found[name] = self._device.wall(loop)[1]
            found[f"{name}, processor"] = 1e3 * (time.process_time() - begin)
        return found
