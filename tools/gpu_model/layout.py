"""How a problem is laid out on a device: csrc/cuda/layout.h itself, compiled for the host."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import subprocess
from dataclasses import astuple, dataclass, fields
from pathlib import Path

import native_build

from sfr_ext.ops.contracts import STRATEGIES

from .devices import Device

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "gpu_model"


FLAGS = ("resident", "cost_near", "in_registers", "held", "by_matrix", "pull_by_matrix")


class DoesNotFit(Exception):
    """What the launch would raise."""


@dataclass(frozen=True)
class Task:
    """Of csrc/cuda/layout.h, in its order, and whether it computes in float64."""

    N: int
    M: int
    x_pixels: int = 0
    y_pixels: int = 0
    C: int = 0
    G: int = 1
    windows: bool = False
    norms: bool = False
    products: bool = False
    solved: bool = True
    backward: bool = False
    reach: bool = False
    float64: bool = False

    @classmethod
    def of_maps(cls, pixels: int, other_pixels: int, channels: int, **options: bool) -> Task:
        """Every pixel is a patch."""
        return cls(pixels, other_pixels, pixels, other_pixels, channels, 1, **options)


@dataclass(frozen=True)
class Layout:
    """The shape that `choose` gives, and how its threads cover the plan and the pairs of pixels."""

    threads: int
    solvers: int
    teams: int
    blocks: int
    slab: int
    resident: bool
    cost_near: bool
    in_registers: bool
    held: bool  # a copy of a plan in shared memory, while products of it are taken
    ld: int
    panel_channels: int
    compare_x: int  # pixels of a panel
    compare_y: int
    pull_channels: int
    pull_x: int
    pull_y: int
    shared_bytes: int
    near_bytes: int
    far_bytes: int
    lanes: int
    width: int
    slices: int
    slice_rows: int
    edge: int
    tiles: int
    tile_slices: int
    passes: int
    by_matrix: bool  # features are compared by matrix instructions
    matrix_units: int
    matrix_slices: int
    pull_by_matrix: bool

    @property
    def strategy(self) -> str:
        if self.threads == 32:
            return "warp"
        if not self.resident:
            return "stream"
        return "cooperative" if self.blocks > 1 else "block"

    @property
    def place(self) -> str:
        """What its kernel knows of where it lies; of one without a reach, in float32."""
        return "near" if self.resident and self.blocks == 1 else "any"

    @property
    def idle(self) -> float:
        """Share of the threads' turns in which there is no tile of pairs for them."""
        turns = self.passes * self.threads
        if self.by_matrix:
            return 1 - 32 * self.matrix_units * self.matrix_slices / turns
        return 1 - self.tiles * self.tile_slices / turns if self.tile_slices > 1 else 1 - self.tiles / turns


@functools.cache
def _library() -> ctypes.CDLL:
    source = Path(__file__).with_name("layout.cpp")
    headers = [path for path in sorted((ROOT / "csrc").rglob("*")) if path.suffix in (".h", ".cuh")]
    flags = ["-std=c++17", "-O1", "-shared", "-fPIC", "-Wno-unknown-pragmas", f"-I{ROOT / 'csrc'}"]
    flags += [f"-I{ROOT / 'tests' / 'simt' / 'include'}"]
    command = [*native_build.find_toolchain().cxx, *flags]
    stamp = hashlib.sha256(repr(command).encode() + b"".join(path.read_bytes() for path in [source, *headers]))
    path = BUILD / f"layout-{stamp.hexdigest()[:16]}.so"
    if not path.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        subprocess.run([*command, str(source), "-o", str(path)], check=True)
    library = ctypes.CDLL(str(path))
    library.choose_layout.restype = ctypes.c_bool
    return library


def choose(task: Task, device: Device, strategy: str = "automatic") -> Layout:
    """
    Raises:
        DoesNotFit: with the message of the launch.
    """
    given = [*map(int, astuple(task)), device.processors, device.shared, 1, STRATEGIES[strategy], device.matrix > 0]
    out = (ctypes.c_int64 * len(fields(Layout)))()
    why = ctypes.create_string_buffer(300)
    if not _library().choose_layout((ctypes.c_int64 * len(given))(*given), out, why, len(why)):
        raise DoesNotFit(why.value.decode())
    values = dict(zip((field.name for field in fields(Layout)), out, strict=True))
    flags = {name: bool(values[name]) for name in FLAGS}
    return Layout(**{**values, **flags})
