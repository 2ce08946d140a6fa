"""What every solver takes and gives: options, the tuple that comes out, what backward needs of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .launch import forced_to
from .views import address

# What is solved, which backward needs as well, and how well.
PROBLEM = "float eps, bool relative, float reach_a, float reach_b"
OPTIONS = f"{PROBLEM}, float tol, int max_iter, str caller"
# transport, entropic, f, g, eps, mean, n_iter, error
OUTPUTS = "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
VALUES = 2  # carry gradients
SOLVED = "Tensor f, Tensor g, Tensor eps_used, Tensor mean"
NEEDS = "bool need_a, bool need_b"

METHODS = {"automatic": 0, "relaxed": 1, "plain": 2}  # csrc/contracts/sinkhorn.h


def options_for(
    problem: tuple[float, bool, float, float],
    tol: float = 0.0,
    max_iter: int = 0,
    symmetric: bool = False,
    eps_given: Tensor | None = None,
) -> tuple[Any, ...]:
    """As `_C` takes them; a reach of 0 is none."""
    eps, relative, reach_a, reach_b = problem
    return (eps, relative, tol, max_iter, reach_a, reach_b, symmetric, METHODS[forced_to("method")], address(eps_given))


def solve_outputs(like: Tensor, lead: tuple[int, ...], n: int, m: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    value = like.new_empty(lead, dtype=dtype)
    f, g = like.new_empty((*lead, n), dtype=dtype), like.new_empty((*lead, m), dtype=dtype)
    n_iter = like.new_empty(lead, dtype=torch.int64)
    return (
        value,
        torch.empty_like(value),
        f,
        g,
        torch.empty_like(value),
        torch.empty_like(value),
        n_iter,
        torch.empty_like(value),
    )
