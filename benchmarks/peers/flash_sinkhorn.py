"""FlashSinkhorn: Triton, CUDA, squared distances only. ``python -m benchmarks.cuda`` has a table of its own for it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..data.workloads import Problem
from .base import Peer, Solved, Unsuited


def _solve(x: Tensor, y: Tensor, problem: Problem, setting: Any) -> Solved:
    raise Unsuited("squared distances only: a table of its own, python -m benchmarks.cuda")


FLASH = [Peer("FlashSinkhorn", "flash-sinkhorn", "entropic", (None,), _solve, device="cuda")]
