"""The kernels' machine code: what tools/cuda_report.py compiled, or now compiles, of float32."""

from __future__ import annotations

import functools
from pathlib import Path

import cuda_report
import native_build

from .machine_code import Kernel, disassemble

CACHE = cuda_report.ROOT / "build" / "cuda_resources.cache"


@functools.cache
def kernels(arch: str) -> tuple[Kernel, ...]:
    """All float32 kernels for one architecture.

    Raises:
        cuda_toolchain.NoCuda: no nvcc works here.
        machine_code.NoDisassembler: nvdisasm is not installed.
    """
    units = [unit for unit in native_build.cuda_units(cuda_report.ROOT / "csrc" / "cuda") if unit[2] == "float"]
    cuda_report.compile_all(units, [arch], CACHE)
    cubins: list[Path] = [CACHE / f"{name}.sm_{arch}.cubin" for _, name, _ in units]
    return tuple(kernel for cubin in cubins for kernel in disassemble(cubin))
