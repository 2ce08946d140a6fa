"""What this installation was built with, and what it can run."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

from . import _C
from ._version import __version__


def build_info() -> dict[str, Any]:
    """Says what was built, what runs, and why not more.

    Returns:
        A dict, ready for a bug report or for JSON:

        - ``version`` (str): version of this package.
        - ``machine`` (str): the kind of processor, "x86_64" or "aarch64".
        - ``cpu_isa`` (str): the instruction set that the CPU kernels use in this process: the best that both
          processor and build offer, or the one that the environment variable ``SFR_EXT_CPU_ISA`` names. "baseline"
          is what every processor of the kind has: SSE2 on x86_64, NEON on aarch64.
        - ``cpu_isas`` (list of str): the instruction sets that were compiled in.
        - ``openmp`` (bool): False where the compiler had no OpenMP; the kernels then run on one thread.
        - ``compiler`` (str): the C++ compiler and its version.
        - ``cuda`` (bool): whether CUDA kernels were compiled in. Whether this machine can run them is another
          question, and is not asked here: that would wake the GPU's driver.
        - ``cuda_version`` (str or None): the CUDA release that they were compiled with, as "13.0".
        - ``cuda_archs`` (list of str): what they were compiled to: "sm_90" is machine code for GPUs of compute
          capability 9.0, "compute_120" is code that the driver compiles for GPUs newer than 12.0.
        - ``why_no_cuda`` (str or None): where ``cuda`` is False, the reason: SFR_EXT_CUDA=0, no nvcc found, or what
          was wrong with it.

    Raises:
        FileNotFoundError: the installation is not complete.

    >>> from sfr_ext import build_info
    >>> info = build_info()
    >>> info["cpu_isa"] in info["cpu_isas"]
    True
    >>> info["cuda"] or isinstance(info["why_no_cuda"], str)
    True
    """
    built = _built()
    return {
        "version": __version__,
        "machine": platform.machine(),
        "cpu_isa": _C.cpu_isa(),
        **{key: built[key] for key in ("cpu_isas", "openmp", "compiler")},
        **{key: built[key] for key in ("cuda", "cuda_version", "cuda_archs", "why_no_cuda")},
    }


def _built() -> dict[str, Any]:
    """What the build has written beside the compiled part."""
    path = Path(__file__).with_name("build_config.json")
    try:
        built: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError):
        raise FileNotFoundError(
            f"sfr_ext.build_info: expected what the build has written in {path}, got no such file or a part of one; "
            "install again (in a clone: pip install --editable .)"
        ) from None
    return built
