"""Plans: differentiable, rounded to exact marginals, and what they match each patch with."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cases import EPS_SCALES, METRICS, error, features, weights
from torch import Tensor

from sfr_ext import cost_matrix, solve, solve_sample

F64 = torch.float64
CONVERGED = {"tol": 1e-13, "max_iter": 50_000}


@pytest.mark.parametrize("eps_scale", EPS_SCALES)
@pytest.mark.parametrize("shape", [(2, 5, 7), (2, 7, 4)])
def test_gradcheck(shape: tuple[int, ...], eps_scale: str) -> None:
    """Costs and both weights; the smaller side is the one that is solved for, so both orders."""
    cost = torch.rand(shape, dtype=F64, requires_grad=True)
    a, b = weights(*shape[:2], dtype=F64, grad=True), weights(shape[2], dtype=F64, grad=True)

    def plan(cost: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return solve(cost, a, b, eps=0.2, eps_scale=eps_scale, **CONVERGED).plan

    assert torch.autograd.gradcheck(plan, (cost, a, b), atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize("reach", [0.5, (0.5, None), (None, 2.0)])
def test_gradcheck_with_a_reach(reach: object) -> None:
    cost = torch.rand(1, 4, 3, dtype=F64, requires_grad=True)
    a, b = weights(1, 4, dtype=F64, grad=True), weights(1, 3, dtype=F64, grad=True)

    def plan(cost: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return solve(cost, a, b, eps=0.3, reach=reach, **CONVERGED).plan

    assert torch.autograd.gradcheck(plan, (cost, a, b), atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize("metric", METRICS)
def test_gradcheck_features(metric: str) -> None:
    """Through the costs, with groups, windows and weights of 0."""
    x, y = features(1, 3, 3, 3, dtype=F64, grad=True), features(1, 2, 3, 2, 3, dtype=F64, grad=True)
    a, b = weights(1, 4, dtype=F64), weights(1, 2, 2, dtype=F64)
    a[0, 1] = 0

    def plan(x: Tensor, y: Tensor) -> Tensor:
        return solve_sample(x, y, a, b, metric=metric, patch_size=2, eps=0.3, **CONVERGED).plan

    assert torch.autograd.gradcheck(plan, (x, y), atol=1e-8, rtol=1e-6)


def test_gradient_of_the_transport_cost_through_the_plan() -> None:
    """``<P, C>`` from the plan has the gradient that the operator has by itself."""
    x, y = features(2, 6, 5, dtype=F64, grad=True), features(2, 8, 5, dtype=F64)
    a = weights(2, 6, dtype=F64, grad=True)
    result = solve_sample(x, y, a, eps=0.1, **CONVERGED)
    dense = (result.plan * cost_matrix(x, y)).sum()
    ours = torch.autograd.grad(result.transport_cost.sum(), (x, a), retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(dense, (x, a)), ours, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("eps", [0.02, 0.005])
def test_parts_that_exchange_nothing(eps: float) -> None:
    """A plan near an assignment: the system is nearly singular, and the gradient of a smooth loss stays right."""
    cost = torch.rand(1, 12, 12, dtype=F64)
    cost[0, :6, 6:] += 40
    cost[0, 6:, :6] += 40
    cost.requires_grad_()
    wanted = torch.rand(1, 12, 12, dtype=F64)

    def loss(cost: Tensor) -> Tensor:
        return (solve(cost, eps=eps, eps_scale="absolute", **CONVERGED).plan * wanted).sum()

    (grad,) = torch.autograd.grad(loss(cost), cost)
    direction = torch.rand_like(cost)
    step = 1e-6
    with torch.no_grad():
        difference = (loss(cost + step * direction) - loss(cost - step * direction)) / (2 * step)
    assert abs((grad * direction).sum() - difference) < 1e-6 * grad.abs().sum()


def test_equal_costs_and_removed_patches() -> None:
    flat = torch.ones(1, 3, 4, requires_grad=True)
    plan = solve(flat).plan
    torch.testing.assert_close(plan, torch.full((1, 3, 4), 1 / 12))
    (grad,) = torch.autograd.grad((plan * torch.rand(1, 3, 4)).sum(), flat)
    assert torch.equal(grad, torch.zeros_like(grad))

    x, y = features(1, 4, 3, 3), features(1, 4, 3, 3)
    a = torch.ones(1, 3, 3)
    a[0, 2] = 0
    whole = x.clone().requires_grad_()
    with torch.no_grad():
        x[0, :, 2] = torch.nan
    x.requires_grad_()
    plan = solve_sample(x, y, a).plan
    assert torch.equal(plan[0, 6:], torch.zeros(3, 9))
    (ours,) = torch.autograd.grad(plan[0, 0, 0], x)
    (expected,) = torch.autograd.grad(solve_sample(whole, y, a).plan[0, 0, 0], whole)
    assert torch.equal(ours, expected) and ours[0, :, :2].abs().sum() > 0


@pytest.mark.parametrize(
    ("cost", "a", "b", "dtype"),
    [
        ([[0.0, 1.0], [2.0, 5.0]], (1.0, 1e-16), (1e-16, 1.0), torch.float32),
        ([[0.0, 1.0], [2.0, 5.0]], (1.0, 1e-40), (1e-40, 1.0), torch.float64),
        ([[1e9, 1e9 + 128], [1e9 + 128, 1e9]], (0.5, 0.5), (0.25, 0.75), torch.float32),
        ([[1e18, 1e18 + 256], [1e18 + 256, 1e18]], (0.5, 0.5), (0.25, 0.75), torch.float64),
        ([[7.0, 7.0], [7.0, 7.0]], (0.5, 0.5), (0.25, 0.75), torch.float32),
    ],
)
def test_costs_that_are_equal_but_for_rounding(cost: Any, a: Any, b: Any, dtype: torch.dtype) -> None:
    """Any plan is optimal within rounding: that of the weights is meant. Potentials hold the mean."""
    given = torch.tensor(cost, dtype=dtype, requires_grad=True)
    result = solve(given, torch.tensor(a, dtype=dtype), torch.tensor(b, dtype=dtype))
    product = torch.outer(torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64))
    assert result.eps == 0 and result.converged
    torch.testing.assert_close(result.plan.double(), product, rtol=1e-6, atol=1e-30)
    value = (product * torch.tensor(cost, dtype=torch.float64)).sum()
    torch.testing.assert_close(result.transport_cost.double(), value, rtol=1e-6, atol=0)
    (gradient,) = torch.autograd.grad(result.transport_cost, given)
    torch.testing.assert_close(gradient.double(), product, rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("which", ["removed", "forbidden"])
@pytest.mark.parametrize("eps", [1e-2, 1e-3, 1e-4])
def test_a_pair_that_is_left_out_has_no_gradient(which: str, eps: float, dtype: torch.dtype) -> None:
    """Its exponential may be inf where eps is small."""
    torch.manual_seed(0)
    cost = torch.rand(20, 5, 6, dtype=dtype)
    a, b = torch.rand(20, 5, dtype=dtype) + 0.1, torch.rand(20, 6, dtype=dtype) + 0.1
    if which == "removed":
        a[:, 2] = 0
    else:
        cost[:, 1, 3] = cost[:, 4, 0] = math.inf
    result = solve(cost.requires_grad_(), a.requires_grad_(), b, eps=eps)
    upstream = torch.linspace(-1, 1, 30, dtype=dtype).view(5, 6)
    of_plan = torch.autograd.grad((result.plan * upstream).sum(), (cost, a), retain_graph=True)
    for value in (result.transport_cost, result.entropic_cost):
        first = torch.autograd.grad(value.sum(), cost, create_graph=True)[0]
        of_plan += torch.autograd.grad((first * upstream).sum(), cost, retain_graph=True)
    assert all(gradient.isfinite().all() for gradient in of_plan)


@pytest.mark.parametrize("reach", [2.0, (None, 2.0), 50.0])
def test_equal_costs_under_a_reach(reach: Any) -> None:
    """Their size stands for the deviation, in derivatives too."""

    def call(size: Tensor) -> tuple[Tensor, ...]:
        result = solve(size.expand(2, 3), eps=0.5, reach=reach, tol=1e-12, max_iter=10_000)
        return result.plan, result.transport_cost, result.entropic_cost

    size = torch.tensor([[7.0]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(call, size, eps=1e-5, atol=1e-6)
    assert torch.autograd.gradgradcheck(lambda size: call(size)[1:], size, eps=1e-5, atol=1e-6)


@pytest.mark.parametrize("one_side", [True, False])
@pytest.mark.parametrize("eps", [0.05, 0.5])
def test_a_reach_beyond_all_costs(one_side: bool, eps: float) -> None:
    """It holds the common constant of the potentials and nothing else: derivatives do not hang on how large it is."""
    torch.manual_seed(0)
    cost = torch.rand(4, 3, dtype=torch.float64)
    a, b = (torch.rand(n, dtype=torch.float64) + 0.2 for n in (4, 3))
    upstream = torch.randn(4, 3, dtype=torch.float64)

    def derivatives(reach: float) -> list[Tensor]:
        leaves = [cost.clone().requires_grad_(), a.clone().requires_grad_()]
        sides = (reach, None) if one_side else reach
        result = solve(*leaves, b, eps=eps, eps_scale="absolute", reach=sides, tol=1e-13, max_iter=100_000)
        of_plan = torch.autograd.grad((result.plan * upstream).sum(), leaves, retain_graph=True)
        (first,) = torch.autograd.grad(result.transport_cost, leaves[0], create_graph=True)
        return [*of_plan, *torch.autograd.grad((first * upstream).sum(), leaves)]

    far = derivatives(1e5)
    for reach in (1e7, 1e9, 1e11):
        for ours, right in zip(derivatives(reach), far, strict=True):
            assert (ours - right).abs().max() < 1e-4 * right.abs().max()


@pytest.mark.parametrize("eps", [0.05, 1e-3, 1e-4])
def test_a_plan_of_rounded_potentials_has_the_marginals(eps: float) -> None:
    """It is made in float64 of those that float32 holds, whose rounding counts for more the smaller eps is."""
    generator = torch.Generator().manual_seed(0)
    cost = (4 * torch.randn(400, 3, 3, generator=generator)).exp()
    a, b = (torch.rand(400, 3, generator=generator) + 0.05 for _ in range(2))
    result = solve(cost, a, b, eps=eps, max_iter=3000)
    off = sum(
        (result.plan.double().sum(axis) - w.double() / w.double().sum(-1, keepdim=True)).abs().sum(-1)
        for axis, w in ((-1, a), (-2, b))
    )
    assert result.converged.sum() > 250
    assert (off[result.converged] < 2e-4).all()


def test_nan_stays_in_its_own_problem() -> None:
    cost = torch.rand(2, 4, 5)
    cost[1, 0, 0] = torch.nan
    cost.requires_grad_()
    plan = solve(cost).plan
    (grad,) = torch.autograd.grad(plan[:, 0, 0].sum(), cost)
    assert grad[0].isfinite().all() and plan[0].isfinite().all()
    assert grad[1].isnan().all() and plan[1].isnan().all()


def test_computed_when_first_asked_for_and_once() -> None:
    cost = torch.rand(2, 4, 5, requires_grad=True)
    result = solve(cost)
    with torch.no_grad():
        assert not result.plan.requires_grad and result.plan is result.plan
    assert result.plan.requires_grad and result.plan is result.plan


ROUNDED = ["converged", "stopped", "uniform", "equal costs", "float64"]


@pytest.mark.parametrize("which", ROUNDED)
def test_rounded_plan_has_the_marginals(which: str) -> None:
    a = b = None
    if which in ("converged", "stopped"):
        a, b = weights(2, 12), weights(2, 3, 4)
        a[0, 3] = b[1, 2, 1] = 0
        options = {"eps": 0.01, "max_iter": 1} if which == "stopped" else {}
        result = solve_sample(features(2, 5, 3, 4), features(2, 3, 5, 2, 2), a, b, **options)
        a = a[:, None]
    elif which == "equal costs":
        result = solve(torch.ones(1, 4, 4))
    else:
        dtype = F64 if which == "float64" else torch.float32
        result = solve(torch.rand(3, 8, 9, dtype=dtype), eps=0.02, max_iter=1)
    plan, before = result.rounded_plan(), result.plan
    resolution = torch.finfo(plan.dtype).eps
    for weight, sums in ((a, plan.sum(-1)), (b, plan.sum(-2))):
        share = torch.ones_like(sums) if weight is None else weight.expand_as(sums)
        share = share / share.sum(-1, keepdim=True)
        assert (sums - share).abs().max() <= 4 * resolution * share.max()
        assert (sums[share == 0] == 0).all()
    assert (plan >= 0).all()
    assert ((plan - before).abs().sum((-2, -1)) <= 2 * result.marginal_error + 20 * resolution).all()
    if which == "stopped":
        assert (result.marginal_error > 0.1).all()  # so there was something to round


def test_rounded_plan_is_differentiable() -> None:
    cost = torch.rand(5, 6, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda cost: solve(cost, eps=0.2, tol=1e-13, max_iter=10_000).rounded_plan(), cost, atol=1e-7
    )


def test_barycentric_tokens_maps_and_groups() -> None:
    x, y = features(2, 5, 3, 4, dtype=F64), features(2, 3, 5, 2, 2, dtype=F64)
    a = torch.ones(2, 12, dtype=F64)
    a[1, 4] = 0
    result = solve_sample(x, y, a)
    matched = result.barycentric(y)
    assert matched.shape == (2, 3, 5, 3, 4)
    expected = torch.einsum("bgnm,bgcm->bgcn", result.plan, y.flatten(-2)) / result.plan.sum(-1)[:, :, None]
    expected[1, :, :, 4] = 0
    torch.testing.assert_close(matched.flatten(-2), expected, equal_nan=False)
    tokens = result.barycentric(y.flatten(-2).mT)
    torch.testing.assert_close(tokens.mT, matched.flatten(-2))
    assert result.barycentric(torch.rand(2, 3, 4, 7)).shape == (2, 3, 12, 7)
    assert solve(torch.rand(6, 4)).barycentric(torch.rand(4, 3).half()).dtype == torch.float32


@pytest.mark.parametrize("solver", ["sinkhorn", "exact"])
def test_nothing_is_down_cast_under_autocast(solver: str) -> None:
    x, y = features(2, 6, 4), features(2, 5, 4)
    plain = solve_sample(x, y, solver=solver)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = solve_sample(x, y, solver=solver)
        for name in ("plan", "transport_cost", "f"):
            assert torch.equal(getattr(result, name), getattr(plain, name))
        assert torch.equal(result.rounded_plan(), plain.rounded_plan())
        for features_to_match in (y, y.half(), y.double()):
            matched = result.barycentric(features_to_match)
            assert matched.dtype == torch.promote_types(features_to_match.dtype, torch.float32)
            torch.testing.assert_close(matched, plain.barycentric(features_to_match), rtol=0, atol=0)


def test_backward_under_autocast_is_no_other() -> None:
    x, y = features(2, 6, 4, grad=True), features(2, 5, 4, grad=True)

    def gradients() -> tuple[Tensor, ...]:
        return torch.autograd.grad(solve_sample(x, y).barycentric(y).square().sum(), (x, y))

    plain = gradients()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(gradients(), plain, rtol=0, atol=0)


def test_barycentric_ignores_removed_teachers() -> None:
    x, y = features(1, 6, 4), features(1, 5, 4)
    b = torch.tensor([[1.0, 1, 1, 0, 0]])
    y[0, 3:] = torch.nan
    matched = solve_sample(x, y, b=b).barycentric(y)
    torch.testing.assert_close(matched, solve_sample(x, y[:, :3]).barycentric(y[:, :3]))


def test_barycentric_is_differentiable() -> None:
    x, y = features(1, 4, 3, dtype=F64, grad=True), features(1, 5, 3, dtype=F64, grad=True)
    assert torch.autograd.gradcheck(
        lambda x, y: solve_sample(x, y, eps=0.3, **CONVERGED).barycentric(y), (x, y), atol=1e-8
    )


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 4, 3), r"expected y of shape \[2, 6, C\] or \[2, C, 2, 3\], got \[2, 4, 3\]"),
        ((2, 3, 3, 2), r"or \[2, C, 2, 3\], got \[2, 3, 3, 2\]"),
        ((6, 3), r"got \[6, 3\]"),
    ],
)
def test_barycentric_refuses(shape: tuple[int, ...], message: str) -> None:
    result = solve_sample(features(2, 3, 2, 2), features(2, 3, 2, 3))
    with pytest.raises(ValueError, match=message):
        result.barycentric(torch.rand(shape))


def test_plan_in_float32_against_float64() -> None:
    x, y = features(2, 16, 5, 5), features(2, 16, 5, 5)
    target = torch.rand(2, 25, 25)

    def gradient(dtype: torch.dtype, **options: float) -> Tensor:
        leaf = x.to(dtype).requires_grad_()
        return torch.autograd.grad((solve_sample(leaf, y.to(dtype), **options).plan * target).sum(), leaf)[0]

    exact = gradient(F64, tol=1e-12, max_iter=50_000)
    assert error(gradient(torch.float32, tol=1e-6), exact) < 1e-4
    assert error(gradient(torch.float32), exact) < 1e-1


@pytest.mark.parametrize("solver", ["sinkhorn", "exact"])
def test_what_a_result_returns_may_be_changed_in_place(solver: str) -> None:
    torch.manual_seed(0)
    cost = torch.rand(3, 5, 6)
    wanted = solve(cost, solver=solver)
    result = solve(cost, solver=solver)
    for name in ("eps", "marginal_error", "dual_gap", "f", "g", "n_iter"):
        getattr(result, name).mul_(5).add_(1)
    assert torch.equal(result.plan, wanted.plan) and torch.equal(result.converged, wanted.converged)
    assert torch.equal(result.rounded_plan(), wanted.rounded_plan())


FORBIDDEN = [[0.1, 0.5, math.inf], [0.4, 0.2, 0.7], [math.inf, 0.6, 0.3]]


@pytest.mark.parametrize("options", [{}, {"max_iter": 20}, {"max_iter": 1}, {"solver": "exact"}], ids=str)
def test_rounded_plan_leaves_forbidden_pairs_empty(options: dict[str, Any]) -> None:
    cost = torch.tensor(FORBIDDEN)
    result = solve(cost, eps=0.3, **options)
    plan = result.rounded_plan()
    assert (plan[cost == math.inf] == 0).all()
    for sums in (plan.sum(-1), plan.sum(-2)):
        short = 1 / 3 - sums
        assert short.min() > -1e-7 and short.sum() <= result.marginal_error + 1e-6
    assert not solve(torch.tensor([[math.inf, math.inf], [0.0, 1.0]]), **options).rounded_plan()[0].any()


def test_no_part_of_an_exact_plan_has_a_gradient() -> None:
    a = torch.tensor([0.3, 0.7], requires_grad=True)
    result = solve(torch.rand(2, 2, requires_grad=True), a, solver="exact")
    assert result.transport_cost.requires_grad
    assert not (result.plan.requires_grad or result.rounded_plan().requires_grad)
