"""What every solver takes and gives: room for its outputs, what backward needs of them."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from .contracts import Solved, written

Outputs = TypeVar("Outputs", bound=tuple[Any, ...])

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
    return Saved(*_SAVED(solved))


def again(saved: Saved) -> Solved:
    """What backward's kernel is given of `Solved`."""
    return _ABSENT._replace(**saved._asdict())


_SAVED = operator.attrgetter(*Saved._fields)
_ABSENT = Solved(*[None] * len(Solved._fields))  # type: ignore[arg-type]


def room(outputs: type[Outputs], like: Tensor, lead: tuple[int, ...], n: int, m: int, dtype: torch.dtype) -> Outputs:
    """Tensors for all that is listed in ``outputs``, of problems of shape ``lead`` with n x m patches."""
    value = like.new_empty(lead, dtype=dtype)
    make: dict[str, Callable[[], Tensor]] = {
        "Value": lambda: torch.empty_like(value),
        "Count": lambda: torch.empty_like(value, dtype=torch.int64),
        "OfRows": lambda: value.new_empty((*lead, n)),
        "OfColumns": lambda: value.new_empty((*lead, m)),
        "Entries": lambda: value.new_empty((*lead, n + m - 1)),
        "EntryIndices": lambda: value.new_empty((*lead, n + m - 1), dtype=torch.int32),
    }
    return outputs(*(make[kind]() for kind in _written(outputs)))


@functools.cache
def _written(outputs: Any) -> tuple[str, ...]:
    return tuple(written(outputs).values())
