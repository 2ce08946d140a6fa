"""Features that are not finite: what they may spoil, and what not."""

from __future__ import annotations

import math

import not_finite
import pytest
import torch
from cases import METRICS, features

from sfr_ext import cost_matrix, emd_l2


@pytest.mark.parametrize("patch_size", [1, 2])
@pytest.mark.parametrize("metric", METRICS)
def test_an_empty_problem_has_no_gradient(metric: str, patch_size: int) -> None:
    not_finite.empty_problems_have_no_gradient(metric, patch_size)


@pytest.mark.parametrize("patch_size", [1, 2])
@pytest.mark.parametrize("metric", METRICS)
def test_a_patch_removed_in_one_group_alone(metric: str, patch_size: int) -> None:
    not_finite.groups_have_their_own_patches(metric, patch_size)


@pytest.mark.parametrize("channels", [3, 40])
@pytest.mark.parametrize("patch_size", [1, 2])
@pytest.mark.parametrize("metric", METRICS)
def test_a_cost_that_is_not_finite_has_gradient_nan(metric: str, patch_size: int, channels: int) -> None:
    not_finite.costs_that_are_not_finite_have_gradient_nan(metric, patch_size, channels)


@pytest.mark.parametrize("metric", METRICS)
def test_one_pair(metric: str) -> None:
    x, y = features(1, 1, 4), features(1, 1, 4)
    x[0, 0, 2] = math.inf
    leaves = [z.requires_grad_() for z in (x, y)]
    for upstream, expected in ((1.0, torch.nan), (0.0, 0.0)):
        gradients = torch.autograd.grad(cost_matrix(*leaves, metric=metric), leaves, torch.full((1, 1, 1), upstream))
        for gradient in gradients:
            torch.testing.assert_close(gradient, torch.full_like(gradient, expected), equal_nan=True)


@pytest.mark.parametrize("options", [{}, {"solver": "exact"}])
def test_second_derivatives_of_an_empty_problem(options: dict[str, str]) -> None:
    x, y = features(2, 3, 4), features(2, 5, 4)
    x[0, 0, 0] = y[0, 1, 1] = math.nan
    b = torch.ones(2, 5)
    b[0] = 0
    leaves = [z.requires_grad_() for z in (x, y)]
    value = emd_l2(*leaves, teacher_weight=b, eps=0.5, **options)
    first = torch.autograd.grad(value, leaves, create_graph=True)
    second = torch.autograd.grad(sum((g * g).sum() for g in first), leaves)
    for gradient in (*first, *second):
        assert (gradient[0] == 0).all() and gradient.isfinite().all()
