"""``snapshot``: a copy that a compiled graph keeps for backward, and does not make anew there.

AOTAutograd may save a buffer instead of what was computed from it, and compute that again in backward. If the buffer
has been changed in place by then (a counter), the gradient is that of another step. PyTorch's partitioner never
recomputes an operator that it does not know, so what is computed from a snapshot stays what it was.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .operator import library

library.define("snapshot(Tensor x) -> Tensor")
library.impl("snapshot", Tensor.clone, "CompositeExplicitAutograd")

_snapshot = torch.ops.sfr_ext.snapshot.default


def copied(x: Tensor) -> Tensor:
    """The contents now, in memory of its own; for tensors without gradient."""
    return _snapshot(x) if torch.compiler.is_compiling() else x.clone()
