"""State that training changes in place: step counters and running means.

In place, as batch normalisation does: the address stays the same, so that a CUDA graph can hold it and replay the
change. Two things must then be taken care of. What backward saves may not be this memory, or the gradient would be
that of a later step: `read` it. And ``torch.func`` forbids changing what a transform did not make: change it inside
of `writable`.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

from .ops import copied as read

__all__ = ["MOST", "advance", "lasting", "plain", "read", "recomputing", "transformed", "writable"]


MOST = torch.iinfo(torch.int64).max  # that a step counter can come to


def transformed() -> bool:
    """Whether a transform of ``torch.func`` is going on."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def writable() -> contextlib.AbstractContextManager[object]:
    """Within it, tensors that the transforms of ``torch.func`` did not make may be changed in place."""
    return temporarily_clear_interpreter_stack() if transformed() else contextlib.nullcontext()


def lasting() -> contextlib.AbstractContextManager[object]:
    """Within it, what is made may be changed in place later, though it be made under ``torch.inference_mode``."""
    return contextlib.nullcontext() if torch.compiler.is_compiling() else torch.inference_mode(False)


def recomputing() -> bool:
    """Whether autograd runs: a forward that a checkpoint computes again in backward."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def plain(x: Tensor) -> Tensor | None:
    """The tensor that ``torch.func.grad`` has wrapped; None inside of ``vmap``, where there is a batch of them."""
    if not transformed():
        return x
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(x):
        if functorch.is_batchedtensor(x):
            return None
        x = functorch.get_unwrapped(x)
    return x


def advance(steps: Tensor) -> None:
    """Adds 1, once for each call, whatever ``torch.func`` makes of it."""
    if plain(steps) is not steps:  # handed over by functional_call, the transform's own
        steps.add_(1)
        return
    with writable():
        steps.add_(1)
