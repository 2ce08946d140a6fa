"""Second derivatives: Hessian-vector products by differentiating a gradient, for everything that backward knows."""

from __future__ import annotations

import pytest
import torch
from cases import EPS_SCALES, METRICS, OBJECTIVES, error, features, weights
from torch import Tensor

from sfr_ext import cost_matrix, emd_l2, solve

F64 = torch.float64
CONVERGED = {"tol": 1e-13, "max_iter": 50_000}
INPUTS = ["student", "teacher", "student_weight", "teacher_weight"]


def _hessian_product(value: Tensor, leaves: tuple[Tensor, ...], direction: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    gradients = torch.autograd.grad(value, leaves, create_graph=True)
    return torch.autograd.grad(sum((g * d).sum() for g, d in zip(gradients, direction, strict=True)), leaves)


@pytest.mark.parametrize("eps_scale", EPS_SCALES)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_against_differences_of_gradients(objective: str, metric: str, eps_scale: str) -> None:
    """The Hessian over both features and both weights at once, mixed parts included, along a direction."""
    x, y = features(2, 4, 2, 3, dtype=F64), features(2, 2, 4, 3, 2, dtype=F64)
    inputs = (x, y, weights(2, 6, dtype=F64), weights(2, 2, 6, dtype=F64))
    direction = tuple(torch.randn_like(t) for t in inputs)
    eps = 0.3 if eps_scale == "std" else 1.0

    def value(x: Tensor, y: Tensor, a: Tensor, b: Tensor) -> Tensor:
        options = {"metric": metric, "objective": objective, "eps": eps, "eps_scale": eps_scale, **CONVERGED}
        return emd_l2(x, y, student_weight=a, teacher_weight=b, **options)

    def gradient(step: float) -> tuple[Tensor, ...]:
        leaves = tuple((t + step * d).requires_grad_() for t, d in zip(inputs, direction, strict=True))
        return torch.autograd.grad(value(*leaves), leaves)

    leaves = tuple(t.clone().requires_grad_() for t in inputs)
    ours = _hessian_product(value(*leaves), leaves, direction)
    step = 1e-5
    for product, above, below in zip(ours, gradient(step), gradient(-step), strict=True):
        assert error(product, (above - below) / (2 * step)) < 1e-7


@pytest.mark.parametrize("reach", [None, 0.5, (None, 2.0)])
@pytest.mark.parametrize("value", ["transport_cost", "entropic_cost"])
def test_gradgradcheck_solve(value: str, reach: object) -> None:
    cost = torch.rand(1, 4, 5, dtype=F64, requires_grad=True)
    a = weights(1, 4, dtype=F64, grad=True)

    def cost_of(cost: Tensor, a: Tensor) -> Tensor:
        return getattr(solve(cost, a, eps=0.3, reach=reach, **CONVERGED), value)

    assert torch.autograd.gradgradcheck(cost_of, (cost, a), atol=1e-6, fast_mode=True)


@pytest.mark.parametrize("value", ["transport_cost", "entropic_cost"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (2, 3)])
def test_equal_costs(value: str, shape: tuple[int, int]) -> None:
    """Their plan is that of the weights, and a relative eps 0: both values are its cost."""
    cost = torch.full(shape, 3.0, dtype=F64, requires_grad=True)
    a, b = (weights(1, n, dtype=F64)[0].requires_grad_() for n in shape)
    direction = torch.rand(shape, dtype=F64)
    (first,) = torch.autograd.grad(getattr(solve(cost, a, b), value), cost, create_graph=True)
    of_a, of_b = torch.autograd.grad((first * direction).sum(), (a, b))

    def of_plan(a: Tensor, b: Tensor) -> Tensor:
        return (a[:, None] / a.sum() * b / b.sum() * direction).sum()

    for ours, right in zip((of_a, of_b), torch.autograd.grad(of_plan(a, b), (a, b)), strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("objective", OBJECTIVES[:2])
def test_one_patch_a_side(objective: str) -> None:
    x, y = torch.rand(2, 1, 3, dtype=F64), torch.rand(2, 1, 3, dtype=F64)

    def value(x: Tensor) -> Tensor:
        return emd_l2(x, y, objective=objective, metric="sqeuclidean", reduction="sum")

    hessian = torch.autograd.functional.hessian(value, x)
    torch.testing.assert_close(hessian.view(6, 6), 2 * torch.eye(6, dtype=F64))


@pytest.mark.parametrize("metric", METRICS)
def test_gradgradcheck_cost_matrix(metric: str) -> None:
    x, y = features(1, 3, 3, 2, dtype=F64, grad=True), features(1, 3, 2, 3, dtype=F64, grad=True)
    assert torch.autograd.gradgradcheck(
        lambda x, y: cost_matrix(x, y, metric=metric, patch_size=2), (x, y), fast_mode=True
    )


def test_gradgradcheck_plan() -> None:
    cost = torch.rand(1, 4, 5, dtype=F64, requires_grad=True)
    assert torch.autograd.gradgradcheck(
        lambda cost: solve(cost, eps=0.3, **CONVERGED).plan, cost, atol=1e-6, fast_mode=True
    )


def test_third_derivative() -> None:
    cost = torch.rand(1, 3, 4, dtype=F64, requires_grad=True)

    def second(cost: Tensor) -> Tensor:
        (first,) = torch.autograd.grad(solve(cost, eps=0.3, **CONVERGED).entropic_cost.sum(), cost, create_graph=True)
        return torch.autograd.grad(first.square().sum(), cost, create_graph=True)[0]

    assert torch.autograd.gradcheck(second, cost, atol=1e-6, fast_mode=True)


def test_entropic_hessian_is_negative() -> None:
    """OT_eps is a minimum of functions that are linear in the costs, hence concave (eps given)."""
    cost = torch.rand(1, 5, 5, dtype=F64)
    hessian = torch.autograd.functional.hessian(
        lambda cost: solve(cost, eps=0.1, eps_scale="absolute", **CONVERGED).entropic_cost.sum(), cost
    ).view(25, 25)
    torch.testing.assert_close(hessian, hessian.T)
    assert torch.linalg.eigvalsh(hessian).max() < 1e-10


def test_float32_and_removed_patches() -> None:
    """Removed patches that hold NaN; as exact as float32 with a tight tol allows."""
    x, y = features(2, 8, 3, 3), features(2, 8, 3, 3)
    a = torch.ones(2, 3, 3)
    a[:, 1, 1] = 0
    holed = x.clone()
    holed[:, :, 1, 1] = torch.nan
    direction = torch.randn_like(x)
    direction[:, :, 1, 1] = 0

    def product(x: Tensor, y: Tensor, **options: float) -> Tensor:
        leaf = x.clone().requires_grad_()
        value = emd_l2(leaf, y, student_weight=a, objective="entropic", eps=0.2, **options)
        return _hessian_product(value, (leaf,), (direction.to(x.dtype),))[0]

    exact = product(x.double(), y.double(), tol=1e-12, max_iter=50_000)
    ours = product(holed, y, tol=1e-6)
    assert ours.dtype == torch.float32 and (ours[:, :, 1, 1] == 0).all()
    assert error(ours, exact) < 1e-4
