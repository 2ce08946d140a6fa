"""What every library has to offer to be compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..data.workloads import Problem
from ..harness.machine import version_of

MAX_ITER = 5000


class Unsuited(Exception):
    """This problem is not one that the library solves."""


@dataclass(frozen=True)
class Solved:
    values: Tensor  # [B], with a graph unless the gradients are given
    plan: Callable[[], Tensor]  # [B, N, M]; asked for outside the timing
    gradients: tuple[Tensor, Tensor] | None = None  # of the mean of the values, where torch does not find them


@dataclass(frozen=True)
class Peer:
    """A library and how it is used.

    It turns two leaves into the values of a batch, with a graph for backward or with the gradients. It also says which
    plan they belong to, so that everybody's marginal error is measured by the same code.
    """

    name: str
    distribution: str  # its name on the package index
    objective: str  # "transport": <P, C> | "entropic": <P, C> + eps KL | "exact": the least <P, C>
    settings: tuple[Any, ...]  # from coarse to fine; the first that reaches the wanted marginal error is timed
    solve: Callable[[Tensor, Tensor, Problem, Any], Solved]
    metrics: tuple[str, ...] = ("l2",)
    takes_maps: bool = False  # [B, C, H, W] and groups, else tokens [B, N, C]
    device: str = ""  # "cpu" | "cuda": there alone
    tol: float | None = None  # instead of the problem's
    dtype: torch.dtype | None = None  # instead of the problem's

    @property
    def ours(self) -> bool:
        return self.distribution == "sfr_ext"

    def version(self) -> str | None:
        """None where it is not installed."""
        return version_of(self.distribution)


def hold_fixed(plan: Tensor, cost: Tensor) -> Solved:
    """<P, C> with a gradient in C alone."""
    return Solved((plan * cost).sum((1, 2)), lambda: plan)
