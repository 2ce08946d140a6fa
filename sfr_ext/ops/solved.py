"""What every solver takes and gives: room for its outputs, what backward needs of them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from .contracts import Solved, written

Outputs = TypeVar("Outputs", bound=tuple[Any, ...])

VALUES = 2  # of `Solved` carry gradients: transport and entropic

# A `tol` nearly of rounding, by the type that is computed in: to it potentials are solved that values or gradients are
# made of themselves, not by way of the plan.
FINEST = {torch.float32: 1e-6, torch.float64: 1e-13}


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


def saved(solved: Any) -> Saved:
    """Of a list that has all of its members."""
    return Saved(solved.f, solved.g, solved.eps, solved.centre, solved.shift)


def again(saved: Saved) -> Solved:
    """What backward's kernel is given of `Solved`."""
    return Solved(*map((*saved, None).__getitem__, _PLACES))  # type: ignore[arg-type]


# Of each member of `Solved` among those of `Saved`; behind them for what is not.
_PLACES = [(*Saved._fields, name).index(name) for name in Solved._fields]


def room(outputs: type[Outputs], like: Tensor, lead: tuple[int, ...], n: int, m: int, dtype: torch.dtype) -> Outputs:
    """Tensors for all that is listed in ``outputs``, of problems of shape ``lead`` with n x m patches."""
    value = like.new_empty(lead, dtype=dtype)  # which every list begins with
    return outputs(value, *[make(value, lead, n, m) for make in _makers(outputs)])


# By the names of contracts.OUTPUTS, from a value.
_MAKE: dict[str, Callable[[Tensor, tuple[int, ...], int, int], Tensor]] = {
    "Value": lambda value, lead, n, m: torch.empty_like(value),
    "Count": lambda value, lead, n, m: torch.empty_like(value, dtype=torch.int64),
    "OfRows": lambda value, lead, n, m: value.new_empty((*lead, n)),
    "OfColumns": lambda value, lead, n, m: value.new_empty((*lead, m)),
    "Entries": lambda value, lead, n, m: value.new_empty((*lead, n + m - 1)),
    "EntryIndices": lambda value, lead, n, m: value.new_empty((*lead, n + m - 1), dtype=torch.int32),
}


@functools.cache
def _makers(outputs: Any) -> tuple[Callable[[Tensor, tuple[int, ...], int, int], Tensor], ...]:
    first, *others = written(outputs).values()
    if first != "Value":
        raise TypeError(f"{outputs.__name__} begins with {first}, not with a Value")
    return tuple(_MAKE[kind] for kind in others)
