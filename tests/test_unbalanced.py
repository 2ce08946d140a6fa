"""Unbalanced transport: against the slow reference, finite differences, GeomLoss, and its own limits."""

from __future__ import annotations

import math

import pytest
import torch
from cases import EPS_SCALES, error, features, value_and_gradients, weights
from torch import Tensor

from sfr_ext import emd_l2, reference, solve, solve_sample

REACHES = [0.5, (None, 1.0), (2.0, None), (0.2, 3.0), 10.0]
VALUES = ["transport_cost", "entropic_cost"]


def masses(*shape: int, dtype: torch.dtype = torch.float32, total: float = 1.3) -> Tensor:
    """Weights that do not sum to 1."""
    weight = weights(*shape, dtype=torch.float64)
    return (total * weight / weight.sum(-1, keepdim=True)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("eps_scale", EPS_SCALES)
@pytest.mark.parametrize("reach", REACHES, ids=str)
@pytest.mark.parametrize("value", VALUES)
def test_values_and_gradients_are_those_of_the_reference(
    value: str, reach: object, eps_scale: str, dtype: torch.dtype
) -> None:
    """With a patch of weight 0 on one side, and masses that differ."""
    inputs = [features(2, 17, 6), features(2, 12, 6), masses(2, 17), masses(2, 12, total=0.8)]
    inputs[2][:, 3] = 0
    inputs = [t.to(dtype).requires_grad_() for t in inputs]
    options = {"eps": 0.2, "eps_scale": eps_scale, "reach": reach}

    def ours(x: Tensor, y: Tensor, a: Tensor, b: Tensor) -> Tensor:
        tol = 1e-6 if dtype == torch.float32 else 1e-12
        return getattr(solve_sample(x, y, a, b, tol=tol, **options), value)

    def slow(x: Tensor, y: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return getattr(reference.sinkhorn(reference.cost_matrix(x, y), a, b, **options, tol=1e-13), value)

    bound = 2e-5 if dtype == torch.float32 else 1e-10
    (found, gradients), (expected, wanted) = (value_and_gradients(f, *inputs) for f in (ours, slow))
    assert error(found, expected) < bound / 10
    for ours_grad, its_grad in zip(gradients, wanted, strict=True):
        assert error(ours_grad, its_grad) < bound


@pytest.mark.parametrize("reach", [0.5, (None, 1.0)], ids=str)
@pytest.mark.parametrize("objective", ["transport", "entropic", "divergence"])
def test_gradcheck(objective: str, reach: object) -> None:
    x, y = features(1, 5, 3, dtype=torch.float64), features(1, 2, 4, 3, dtype=torch.float64)
    a, b = masses(1, 5, dtype=torch.float64), masses(1, 2, 4, dtype=torch.float64, total=0.7)

    def value(x: Tensor, y: Tensor, a: Tensor, b: Tensor) -> Tensor:
        options = {"objective": objective, "reach": reach, "eps": 0.3, "reduction": "none", "tol": 1e-13}
        return emd_l2(x, y, student_weight=a, teacher_weight=b, **options)

    inputs = tuple(t.requires_grad_() for t in (x, y, a, b))
    assert torch.autograd.gradcheck(value, inputs, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("reach", [0.3, 2.0])
@pytest.mark.parametrize("metric, p", [("l2", 1), ("sqeuclidean", 2)])
def test_geomloss_agrees(metric: str, p: int, reach: float) -> None:
    """Its cost for p = 2 is |x - y|^2 / 2, its eps blur^p, its rho reach^p, and its KL leaves out what only the masses
    matter to: eps (|a| + |b|) / 2 stands for eps |a| |b|."""
    geomloss = pytest.importorskip("geomloss")
    x, y = features(3, 9, 4, dtype=torch.float64), features(3, 7, 4, dtype=torch.float64)
    a, b = masses(3, 9, dtype=torch.float64), masses(3, 7, dtype=torch.float64)
    blur = 0.4
    theirs = geomloss.SamplesLoss(
        "sinkhorn", p=p, blur=blur, reach=reach, debias=False, scaling=0.999, backend="tensorized"
    )(a, x, b, y)
    scale = 1 if p == 1 else 2
    options = {"metric": metric, "eps": scale * blur**p, "eps_scale": "absolute", "reach": scale * reach**p}
    ours = solve_sample(x, y, a, b, tol=1e-10, **options).entropic_cost / scale
    masses_only = blur**p * (a.sum(-1) * b.sum(-1) - (a.sum(-1) + b.sum(-1)) / 2)
    assert error(ours - masses_only, theirs) < 1e-5  # as far as its annealing goes


def test_the_marginals_bend() -> None:
    cost = torch.rand(6, 8, dtype=torch.float64)
    a, b = masses(6, dtype=torch.float64), masses(8, dtype=torch.float64, total=0.6)
    result = solve(cost, a, b, reach=(0.4, 0.9), eps=0.1, tol=1e-12)
    plan = (a[:, None] * b * ((result.f[:, None] + result.g - cost) / result.eps).exp()).sum(1)
    torch.testing.assert_close(plan, a * (-result.f / 0.4).exp(), rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(result.plan.sum(0), b * (-result.g / 0.9).exp(), rtol=1e-10, atol=1e-14)
    torch.testing.assert_close((result.plan * cost).sum(), result.transport_cost, rtol=1e-10, atol=0)


def test_a_far_reach_is_balanced_transport() -> None:
    x, y = features(2, 9, 4, dtype=torch.float64), features(2, 11, 4, dtype=torch.float64)
    near, far = (solve_sample(x, y, reach=reach, tol=1e-10).transport_cost for reach in (None, 1e7))
    assert 0 < error(far, near) < 1e-5


def test_a_short_reach_leaves_everything_behind() -> None:
    x, y = features(2, 9, 4), features(2, 11, 4)
    result = solve_sample(x, y + 100, reach=0.5)
    assert result.converged.all()
    torch.testing.assert_close(result.transport_cost, torch.zeros(2))
    torch.testing.assert_close(result.entropic_cost, torch.ones(2), rtol=0.1, atol=0)  # two sides, 0.5 each


def test_an_outlier_is_left_behind() -> None:
    x = features(1, 20, 3)
    y = x.clone()
    y[:, 0] += 50
    balanced, bent = (emd_l2(x, y, reach=reach, eps=0.05, eps_scale="absolute") for reach in (None, 1.0))
    assert balanced > 4 and bent < 0.02


def test_one_patch_each() -> None:
    """All costs equal: eps is then in units of their mean, and the mass has a closed form."""
    x, y = torch.zeros(1, 1, 2, dtype=torch.float64), torch.tensor([[[3.0, 4.0]]], dtype=torch.float64)
    result = solve_sample(x, y, reach=2.0, eps=0.1, tol=1e-12)
    eps, reach = 0.1 * 5, 2.0
    mass = math.exp(-5 / (eps + 2 * reach))  # eps ln m + 2 reach ln m + cost = 0
    assert math.isclose(result.transport_cost.item(), 5 * mass, rel_tol=1e-9)
    same = solve_sample(x, x, reach=2.0, eps=0.1)
    assert same.transport_cost.item() == 0 and math.isclose(same.plan.sum().item(), 1, rel_tol=1e-6)


def test_a_nan_stays_in_its_problem() -> None:
    x, y = features(3, 9, 4, grad=True), features(3, 9, 4)
    with torch.no_grad():
        x[1, 2, 0] = float("nan")
    value = emd_l2(x, y, reach=0.5, reduction="none")
    value[[0, 2]].sum().backward()
    assert value.isnan().tolist() == [False, True, False] and x.grad[[0, 2]].isfinite().all()


@pytest.mark.parametrize("reach", [-1.0, 0.0, float("nan"), (1.0, -2.0), (1.0, 2.0, 3.0)], ids=str)
def test_a_bad_reach_raises(reach: object) -> None:
    with pytest.raises(ValueError, match=r"sfr_ext.emd_l2: expected reach to be"):
        emd_l2(features(1, 4, 3), features(1, 4, 3), reach=reach)


def test_what_a_reach_does_not_go_with() -> None:
    with pytest.raises(TypeError, match=r"expected reach to be a number, got str"):
        solve(torch.rand(3, 3), reach="far")
    with pytest.raises(ValueError, match="expected a balanced problem"):
        solve(torch.rand(3, 3), solver="exact", reach=1.0).rounded_plan()
    with pytest.raises(ValueError, match="expected a balanced problem"):
        solve(torch.rand(3, 3), reach=1.0).rounded_plan()


@pytest.mark.parametrize("reach", [30.0, 1e3, 1e5, (1e3, None), (None, 1e4), (50.0, 5e3)], ids=str)
@pytest.mark.parametrize("value", VALUES)
def test_gradients_under_a_reach_far_above_the_costs(value: str, reach: object) -> None:
    """float32 beside float64, which finite differences agree with: masses differ, so that the shift is large."""
    shapes = ((2, 9, 6), (2, 7, 6))
    x, y = (features(*shape, dtype=torch.float64) for shape in shapes)
    a, b = masses(2, 9, dtype=torch.float64, total=1.0), masses(2, 7, dtype=torch.float64, total=3.0)
    a[:, 2] = b[0, 4] = 0

    def cost(dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
        inputs = [t.to(dtype).requires_grad_() for t in (x, y, a, b)]
        tol = 1e-6 if dtype == torch.float32 else 1e-12
        return value_and_gradients(
            lambda *now: getattr(solve_sample(*now, eps=0.2, reach=reach, tol=tol), value), *inputs
        )

    (found, gradients), (expected, wanted) = cost(torch.float32), cost(torch.float64)
    assert error(found, expected) < 1e-5
    for ours, right in zip(gradients, wanted, strict=True):
        assert error(ours, right) < 2e-5

    def at(step: Tensor) -> Tensor:
        return getattr(solve_sample(x, y, a + step, b, eps=0.2, reach=reach, tol=1e-13), value).sum()

    for i in (0, 5):
        step = torch.zeros_like(a)
        step[1, i] = 1e-5
        slope = (at(step) - at(-step)) / 2e-5
        assert abs(slope - wanted[2][1, i]) < 1e-4 * wanted[2].abs().max()


def test_what_two_costs_and_masses_that_differ_come_to() -> None:
    cost = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    found = {}
    for dtype in (torch.float32, torch.float64):
        a, b = torch.tensor([3.0, 7.0], dtype=dtype), torch.tensor([7.0, 30.0], dtype=dtype)
        a.requires_grad_()
        result = solve(cost.to(dtype), a, b, eps=0.05, eps_scale="absolute", reach=1000.0, tol=1e-6)
        (found[dtype],) = torch.autograd.grad(result.transport_cost, a)
    assert found[torch.float32].tolist() == pytest.approx(found[torch.float64].tolist(), rel=1e-5)
    assert found[torch.float64].tolist() == pytest.approx([1.451989, -0.470490], abs=2e-6)
