"""The GPUs that predictions are made for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .hot_loops import table


@dataclass(frozen=True)
class Device:
    name: str
    arch: str  # whose machine code it runs
    processors: int
    shared: int  # bytes that a block can have
    clock: float  # hertz
    memory: float  # bytes a second
    l2: int  # bytes
    lanes: int  # float32 multiply-adds of a multiprocessor in a clock
    matrix: int = 0  # multiply-adds in TF32 of a multiprocessor in a clock, where kernels take them
    l2_latency: int = 270  # clocks
    l2_bandwidth: float = 5e12  # bytes a second

    @property
    def copies_async(self) -> bool:
        """`has_async_copies` in csrc/cuda/device.cuh."""
        return self.arch in ("80", "90", "100")

    @property
    def l2_bytes(self) -> float:
        """Of the whole device in a clock."""
        return self.l2_bandwidth / self.clock


DEVICES = {name: Device(name=name, **entry) for name, entry in table(Path(__file__).with_name("devices.toml")).items()}
