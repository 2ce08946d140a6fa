"""Where the tests of this folder run: on a GPU, or with SFR_EXT_CUDA_EMULATE=1 on the emulator of tests/simt."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from sfr_ext import _C, build_info, ops

EMULATED = os.environ.get("SFR_EXT_CUDA_EMULATE") == "1"
DEVICE = "cpu" if EMULATED else "cuda"

# After one of these nothing works any more in a process.
STICKY = (
    "illegal memory access",
    "misaligned address",
    "unspecified launch failure",
    "device-side assert",
    "illegal instruction",
    "launch timed out",
)


def why_not() -> str:
    """Why nothing here can run; empty if it can."""
    if EMULATED:
        return ""
    if not torch.cuda.is_available():
        return "needs a GPU, and torch sees none"
    if not build_info()["cuda"]:
        return str(build_info()["why_no_cuda"])
    on_this = getattr(_C.cuda, "why_unusable_on", lambda index: "")
    return str(_C.cuda.why_unusable() or on_this(torch.cuda.current_device()))


@contextlib.contextmanager
def running(strategy: str) -> Iterator[None]:
    """Within it, kernels of the GPU (or the emulated ones) use this strategy."""
    emulated = None
    if EMULATED:
        from simt import build

        emulated = build.module("plain")
    with ops.forced(strategy=strategy, emulated=emulated):
        yield


@contextlib.contextmanager
def unwritten_is_nan() -> Iterator[None]:
    """Within it, a new tensor is NaN until it is written."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def on_cpu(function: Callable[..., Any], *inputs: Tensor | None, **options: Any) -> Any:
    """``function`` on copies of these leaves, by the kernels of the CPU."""
    with ops.forced(strategy="automatic", emulated=None), torch.device("cpu"):
        leaves = [None if t is None else t.detach().cpu().requires_grad_(t.requires_grad) for t in inputs]
        return function(*leaves, **options)


def synchronize() -> None:
    if not EMULATED:
        torch.cuda.synchronize()
