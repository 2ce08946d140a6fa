"""What features that are not finite may spoil, and what not: checks for every device."""

from __future__ import annotations

import itertools
import math

import torch
import torch.nn.functional as F
from cases import error, value_and_gradients
from torch import Tensor

from sfr_ext import cost_matrix, emd_l2

# Solver and objective.
PROBLEMS = [
    {"objective": "transport"},
    {"objective": "entropic", "reach": 0.5},
    {"objective": "divergence"},
    {"objective": "divergence", "reach": 0.5},
    {"solver": "exact"},
]
BROKEN = [math.nan, math.inf, -math.inf]


def maps(*, groups: int | None = None) -> tuple[Tensor, Tensor]:
    """Two problems of 4 x 4 and 3 x 4 pixels."""
    torch.manual_seed(0)
    lead = (2,) if groups is None else (2, groups)
    return torch.randn(2, 3, 4, 4), torch.randn(*lead, 3, 3, 4)


def ones(features: Tensor, patch_size: int) -> Tensor:
    """A weight for every patch."""
    return torch.ones(*features.shape[:-3], *(size - patch_size + 1 for size in features.shape[-2:]))


def empty_problems_have_no_gradient(metric: str, patch_size: int) -> None:
    """Whichever side has no weights, and whichever holds what is no number; with all weights given, or those alone."""
    for broken, empty, bad, one in itertools.product(BROKEN[:2], (0, 1), (0, 1), (False, True)):
        pair = maps()
        pair[bad][0, 0, 1, 1] = broken
        weights: list[Tensor | None] = [ones(z, patch_size).requires_grad_() for z in pair]
        with torch.no_grad():
            weights[empty][0] = 0
        if one:
            weights[1 - empty] = None
        for options in PROBLEMS:

            def values(x: Tensor, y: Tensor, a: Tensor | None, b: Tensor | None, options: dict = options) -> Tensor:
                kind = {"metric": metric, "patch_size": patch_size, "reduction": "none", **options}
                return emd_l2(x, y, student_weight=a, teacher_weight=b, **kind)

            value, gradients = value_and_gradients(values, *(z.requires_grad_() for z in pair), *weights)
            case = metric, patch_size, broken, empty, bad, one, options
            assert value[0] == 0 and value[1].isfinite(), case
            assert all((grad[0] == 0).all() and grad[1].isfinite().all() for grad in gradients), case
            assert gradients[0][1].any() and gradients[1][1].any(), case


def groups_have_their_own_patches(metric: str, patch_size: int) -> None:
    """A student's patch that is no number is removed for one group, and spoils the other; or that one is empty."""
    x, y = maps(groups=2)
    a, b = ones(y.new_empty(2, 2, 3, 4, 4), patch_size), ones(y, patch_size)
    a[0, 0, :2] = 0
    spoilt = x.clone()
    spoilt[0, 0, 0, 0] = math.nan
    for options in PROBLEMS:
        for empty in (False, True):
            weight = b.clone()
            if empty:
                weight[0, 1] = 0
            kind = {"metric": metric, "patch_size": patch_size, "reduction": "none", **options}
            case = metric, patch_size, options, empty
            found = [
                value_and_gradients(
                    emd_l2,
                    student.requires_grad_(),
                    y.requires_grad_(),
                    student_weight=a,
                    teacher_weight=weight,
                    **kind,
                )
                for student in (x, spoilt)
            ]
            (right, (right_x, right_y)), (value, (grad_x, grad_y)) = found
            others = torch.tensor([[True, empty], [True, True]])
            assert torch.equal(value[others], right[others]) and value[0, 1].isnan() == (not empty), case
            assert error(grad_y[others], right_y[others]) < 1e-5, case
            students = slice(0 if empty else 1, None)  # the first has a part in the group that is spoilt
            assert error(grad_x[students], right_x[students]) < 1e-5, case


def costs_that_are_not_finite_have_gradient_nan(metric: str, patch_size: int, channels: int) -> None:
    """In all channels of both patches, unless no gradient comes for them; those of other pairs are what they were."""
    for broken, bad, share in itertools.product(BROKEN, (0, 1), (0.05, 0.6, 1)):
        torch.manual_seed(1)
        pair = [torch.randn(2, channels, 6, 7), torch.randn(2, channels, 5, 8)]
        pair[bad][0, 1, 0, 0] = pair[bad][1, 2, 3, 2] = broken  # the first, of which centres are made, and another
        options = {"metric": metric, "patch_size": patch_size}
        cost = cost_matrix(*pair, **options)
        upstream = torch.randn(cost.shape) * (torch.rand(cost.shape) < share)
        finite = cost.isfinite()
        leaves = [z.requires_grad_() for z in pair]
        found = torch.autograd.grad(cost_matrix(*leaves, **options), leaves, upstream)
        plain = [torch.where(z.isfinite(), z, 0.0).detach().requires_grad_() for z in pair]
        right = torch.autograd.grad(cost_matrix(*plain, **options), plain, torch.where(finite, upstream, 0.0))
        spoilt = ~finite & (upstream != 0)
        for grad, other, axis in ((found[0], right[0], 2), (found[1], right[1], 1)):
            grid = [size - patch_size + 1 for size in grad.shape[-2:]]
            of_patches = F.pad(spoilt.any(axis).view(2, 1, *grid).float(), [patch_size - 1] * 4)
            nan = (F.max_pool2d(of_patches, patch_size, stride=1) > 0).expand_as(grad)
            case = metric, patch_size, channels, broken, bad, share
            assert torch.equal(grad.isnan(), nan), case
            assert error(grad[~nan], other[~nan]) < 1e-5, case
