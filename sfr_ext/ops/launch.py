"""How an operator is registered, and how its kernel is called on the device where its tensors are."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .. import _C

STRATEGIES = {"automatic": 0, "several": 1, "block": 2, "team": 3, "stream": 4}  # csrc/cuda/cuda.h

library = torch.library.Library("sfr_ext", "DEF")
implementations: dict[str, Callable[..., Any]] = {}

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


def forced_to(name: str) -> Any:
    return _forced[name]


def run(name: str, like: Tensor, *arguments: Any) -> int:
    """Calls a kernel on the device of ``like``; returns its status."""
    on_cpu = like.device.type == "cpu"
    if on_cpu and _forced["emulated"] is None:
        return getattr(_C, name)(*arguments)
    kernel = getattr((_forced["emulated"] or _C).cuda, name)
    stream = 0 if on_cpu else torch.cuda.current_stream(like.device).cuda_stream
    place = (like.device.index or 0, stream, STRATEGIES[_forced["strategy"]])
    missing = kernel(*arguments, (*place, 0, 0))
    if missing:
        scratch = torch.empty(missing, dtype=torch.uint8, device=like.device)
        kernel(*arguments, (*place, scratch.data_ptr(), missing))
    return 0  # the contents of weights are not looked at: that would make the device wait


def implement(*functions: Any) -> None:
    """The same function for every device: it passes on where its tensors are."""
    for function in functions:
        name = function.__name__.removeprefix("_")
        implementations[name] = function
        for device in ("CPU", "CUDA"):
            library.impl(name, function, device)
