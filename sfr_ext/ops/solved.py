"""What every solver takes and gives: room for its outputs, what backward needs of them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .contracts import Solved

VALUES = 2  # of `Solved` carry gradients: transport and entropic


class Given(NamedTuple):
    """Costs ``[B,G,N,M]`` and weights ``[B,G,N]``, ``[B,G,M]`` (or, for the exact solver, ``[B,N]``, ``[B,M]``)."""

    cost: Tensor
    a: Tensor | None
    b: Tensor | None


class Saved(NamedTuple):
    """What backward reads again of `Solved`."""

    f: Tensor
    g: Tensor
    eps: Tensor
    centre: Tensor
    shift: Tensor


class Upstream(NamedTuple):
    """Gradients of the values; None: not used."""

    grad_transport: Tensor | None
    grad_entropic: Tensor | None


def saved(solved: Solved) -> Saved:
    return Saved(solved.f, solved.g, solved.eps, solved.centre, solved.shift)


def again(saved: Saved) -> Solved:
    """What backward's kernel is given of `Solved`."""
    absent: Any = None
    return Solved(absent, absent, saved.f, saved.g, saved.eps, saved.centre, saved.shift, absent, absent, absent)


def room(like: Tensor, lead: tuple[int, ...], n: int, m: int, dtype: torch.dtype) -> Solved:
    """For the outputs of problems of shape ``lead``, by name."""
    value = like.new_empty(lead, dtype=dtype)
    return Solved(
        transport=value,
        entropic=torch.empty_like(value),
        f=value.new_empty((*lead, n)),
        g=value.new_empty((*lead, m)),
        eps=torch.empty_like(value),
        centre=torch.empty_like(value),
        shift=torch.empty_like(value),
        excess=torch.empty_like(value),
        n_iter=torch.empty_like(value, dtype=torch.int64),
        error=torch.empty_like(value),
    )
