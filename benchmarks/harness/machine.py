"""Where and with what figures are made, and how many threads everybody gets."""

from __future__ import annotations

import contextlib
import datetime
import os
import platform
import subprocess
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import sfr_ext

PACKAGES = ("torch", "numpy", "scipy", "POT", "geomloss", "lapx", "jax", "jaxlib", "ott-jax", "regot", "flash-sinkhorn")
SMI_FIELDS = (
    "name,driver_version,compute_cap,clocks.sm,clocks.max.sm,clocks.mem,clocks.max.mem,power.limit,ecc.mode.current"
)
# Read when a library is loaded: JAX is not yet when this is set. XLA has no option for its number of threads, but
# takes NPROC for the number of processors.
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NPROC")


def pin_threads(threads: int) -> None:
    """``threads`` for torch, for us, and for libraries that are loaded from now on. SciPy, lapx and POT's exact
    solver use one in any case."""
    torch.set_num_threads(threads)
    for variable in THREAD_VARIABLES:
        os.environ[variable] = str(threads)
    os.environ["XLA_FLAGS"] = f"--xla_cpu_multi_thread_eigen={str(threads > 1).lower()}"


@contextlib.contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """Within it, torch and sfr_ext have another number."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def version_of(distribution: str) -> str | None:
    """None where it is not installed."""
    if distribution == "sfr_ext":  # perhaps built in this folder, not installed
        return sfr_ext.__version__
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def machine(threads: int, source: str | None = None) -> dict[str, Any]:
    """Everything that figures depend on; ``source``: what the tree is called, where git does not know."""
    found = {name: version_of(name) for name in PACKAGES}
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": source or commit(),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "nvidia_smi": nvidia_smi(),
        "threads": threads,
        "load_before": os.getloadavg()[0],
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "versions": {name: version for name, version in found.items() if version},
        "sfr_ext": sfr_ext.build_info(),
    }


def commit() -> str:
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent, capture_output=True, text=True
        )
    except OSError:
        return "of unknown commit"
    return done.stdout.strip() or "of unknown commit"


def nvidia_smi(fields: str = SMI_FIELDS) -> dict[str, str]:
    """What it says of the first GPU; empty where it says nothing."""
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    lines = done.stdout.strip().splitlines()
    if done.returncode != 0 or not lines:
        return {}
    return dict(zip(fields.split(","), map(str.strip, lines[0].split(",")), strict=False))


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
