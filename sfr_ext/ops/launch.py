"""How a kernel is called on the device where its tensors are."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .. import _C
from .contracts import METHODS, STRATEGIES, Where

# For tests and benchmarks.
_forced: dict[str, Any] = {"strategy": "automatic", "method": "automatic", "emulated": None}


@contextlib.contextmanager
def forced(**what: Any) -> Iterator[None]:
    """Within it, something else than usual.

    ``strategy``: how CUDA kernels spread a problem, instead of what follows from its shape. ``method``: how problems
    are iterated on. ``emulated``: a module whose CUDA kernels are emulated; tensors on the CPU go to them.
    """
    unknown = what.keys() - _forced.keys()
    if unknown:
        raise TypeError(f"sfr_ext.ops.forced: expected {', '.join(_forced)}, got {', '.join(unknown)}")
    before = dict(_forced)
    _forced.update(what)
    try:
        yield
    finally:
        _forced.update(before)


def forced_method() -> int:
    return METHODS[_forced["method"]]


def on_cpu(like: Tensor) -> bool:
    """Whether kernels of a CPU run on it, and not those of a GPU or of one that is emulated."""
    return like.is_cpu and _forced["emulated"] is None


def run(name: str, like: Tensor, params: tuple[Any, ...]) -> int:
    """Calls a kernel of the module on the device of ``like`` with its ``...Params``; returns its status."""
    if on_cpu(like):
        try:
            return getattr(_C, name)(params)
        except MemoryError:
            needed = f"the workspace that an input of shape {list(like.shape)} needs"
            raise MemoryError(f"sfr_ext.{name}: not enough memory for {needed}") from None
    kernel = getattr((_forced["emulated"] or _C).cuda, name)
    queue = 0 if like.is_cpu else torch.cuda.current_stream(like.device).cuda_stream
    where = Where(like.device.index or 0, queue, STRATEGIES[_forced["strategy"]])
    missing = kernel(params, where)
    if missing:
        scratch = torch.empty(missing, dtype=torch.uint8, device=like.device)
        kernel(params, where._replace(scratch=scratch, scratch_bytes=missing))
    return 0  # the contents of weights are not looked at: that would make the device wait
