"""Matching rows with columns: `linear_assignment`."""

from __future__ import annotations

import math
import sys
from typing import Any

import torch
from torch import Tensor

from . import checks, ops
from .transport import _four_axes


def linear_assignment(cost: Tensor, *, maximize: bool = False, max_cost: float | None = None) -> Tensor:
    r"""The column matched to each row, for every problem: as many pairs as possible, and of these the least sum.

    .. math:: \min_\sigma \sum_i C_{i \sigma(i)} \quad\text{over one-to-one}\ \sigma\ \text{of the most rows}

    by shortest augmenting paths (Jonker and Volgenant 1987), as `scipy.optimize.linear_sum_assignment` does for one
    problem; what that refuses as infeasible leaves rows without a column. Of several optima it is any one, the same on
    every run.

    Args:
        cost: ``[..., N, M]``, any strides; float16, bfloat16, float32, float64; or integers or bool, which are exact as
            far as float64 holds them and their sums. +inf (with ``maximize`` -inf) forbids a pair.
        maximize: the greatest sum instead.
        max_cost: forbids pairs that cost more (with ``maximize``: less), ``cost > max_cost`` as torch compares them: in
            the type of the costs. A gate, not a price: for the price of staying unmatched see the ``reach`` of `solve`
            with ``solver="exact"``.

    Returns:
        int64 ``[..., N]``; -1 where a row stays unmatched. All -1 for a problem with NaN or an infinity that does not
        forbid, and where ``M = 0``. No gradient.

    Raises:
        TypeError: an argument is of the wrong kind or type.
        ValueError: ``cost`` has fewer than two axes, or ``max_cost`` is NaN.

    >>> import torch
    >>> from sfr_ext import linear_assignment
    >>> linear_assignment(torch.tensor([[4, 1, 3], [2, 0, 5], [3, 2, 2]]))
    tensor([1, 0, 2])
    >>> linear_assignment(torch.tensor([[0.1, 0.9], [0.2, 0.8], [0.7, 0.3]]), max_cost=0.25)
    tensor([ 0, -1, -1])
    """
    where = "linear_assignment"
    checks.a_tensor(where, "cost", cost)
    if not (cost.dtype.is_floating_point or cost.is_complex() or cost.is_quantized):
        cost = cost.double()
    checks.tensor(where, "cost", cost)
    if cost.dim() < 2:
        checks.refuse(ValueError, where, "cost", "of shape [..., N, M]", checks.shape_of(cost))
    maximize = checks.a_bool(where, "maximize", maximize)
    limit = _limit(where, max_cost, maximize, cost.dtype)
    if 0 in cost.shape[-2:]:
        return cost.new_full(cost.shape[:-1], -1, dtype=torch.int64)
    matched = ops.assignment_forward(_four_axes(cost.detach(), 2), maximize, limit)
    return matched.view(cost.shape[:-1])


def _limit(where: str, max_cost: Any, maximize: bool, dtype: torch.dtype) -> float:
    """As torch compares costs with a number: in their type."""
    if max_cost is None:
        return -math.inf if maximize else math.inf
    max_cost = checks.a_number(where, "max_cost", max_cost)
    if max_cost != max_cost:
        checks.refuse(ValueError, where, "max_cost", "to be a number", max_cost)
    if abs(max_cost) > sys.float_info.max:  # an int may be beyond any float
        return math.inf if max_cost > 0 else -math.inf
    if dtype == torch.float64:
        return float(max_cost)
    return _rounded(_rounded(float(max_cost), torch.float32), dtype)  # by way of float32, also to half types


def _rounded(x: float, dtype: torch.dtype) -> float:
    """To nearest; a number of Python, so that a graph that is compiled knows it."""
    kind = torch.finfo(dtype)
    if x == 0 or math.isinf(x):
        return x
    exponent = max(math.frexp(x)[1], math.frexp(kind.smallest_normal)[1])
    unit = math.ldexp(kind.eps, exponent - 1)
    nearest = round(x / unit) * unit  # ties to even
    return nearest if abs(nearest) <= kind.max else math.copysign(math.inf, x)
