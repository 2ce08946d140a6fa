"""Inputs on which solvers break: large and forbidden costs, tiny eps, empty sides, weights of any size, far patches.

Right values are those of linear programming, of closed forms, of central differences and of `sfr_ext.reference` in
float64. Each test names the kind of input; the numbers in it are one of many.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cases import METRICS, OBJECTIVES, error, features, value_and_gradients, weights
from torch import Tensor

from sfr_ext import OTResult, cost_matrix, emd_l2, reference, solve, solve_sample

F32, F64 = torch.float32, torch.float64
INF = math.inf


def expected_of(cost: Tensor, a: Tensor | None = None, b: Tensor | None = None, **options: Any) -> Any:
    """The reference's result, converged."""
    wide = [None if t is None else t.detach().double() for t in (cost, a, b)]
    return reference.sinkhorn(*wide, **{"tol": 1e-12, "max_iter": 100_000, **options})


# --- Costs


def with_a_mask(large: float, dtype: torch.dtype) -> Tensor:
    return torch.tensor([[0.1, 0.5, large], [0.4, 0.2, 0.7], [large, 0.6, 0.3]], dtype=dtype)


LARGE = [
    (F32, 1e4),
    (F32, 3e4),
    (F32, 65504.0),
    (F32, 1e5),
    (F32, 1e6),
    (F32, 1e9),
    (F32, 1e20),
    (F32, 3.4e38),
    (F32, INF),
]
LARGE += [(F64, 1e9), (F64, 1e15), (F64, 1e100), (F64, 1.7e308), (F64, INF)]
LARGE += [
    (torch.float16, 6e4),
    (torch.float16, 65504.0),
    (torch.float16, INF),
    (torch.bfloat16, 3e38),
    (torch.bfloat16, INF),
]


@pytest.mark.parametrize("reach", [None, 0.5, (None, 0.5)], ids=str)
@pytest.mark.parametrize(("dtype", "large"), LARGE, ids=str)
def test_a_large_cost_means_never(dtype: torch.dtype, large: float, reach: Any) -> None:
    """The usual mask: the plan, values and gradients are those of the pair forbidden."""
    options = {"eps": 0.05, "eps_scale": "absolute", "reach": reach}
    cost = with_a_mask(large, dtype).requires_grad_()
    result = solve(cost, tol=1e-6, **options)
    forbidden = with_a_mask(INF, dtype).requires_grad_()
    expected = expected_of(with_a_mask(INF, dtype), **options)
    assert result.converged
    accuracy = 1e-5
    if reach is None:
        assert expected.transport_cost.item() == pytest.approx(0.200584, abs=1e-3 if dtype.itemsize == 2 else 1e-6)
    torch.testing.assert_close(result.plan.double(), expected.plan, rtol=1e-4, atol=1e-5)
    for name in ("transport_cost", "entropic_cost"):
        ours = getattr(result, name)
        assert ours.item() == pytest.approx(getattr(expected, name).item(), rel=accuracy)
        (grad,) = torch.autograd.grad(ours, cost, retain_graph=True)
        wide = forbidden.detach().double().requires_grad_()
        value = getattr(reference.sinkhorn(wide, **options, tol=1e-12), name)
        (wanted,) = torch.autograd.grad(value, wide)
        torch.testing.assert_close(grad.double(), wanted, rtol=1e-2, atol=1e-2 if dtype.itemsize == 2 else 1e-4)


def masked_at_random(n: int, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Costs, and what is masked of them: never the diagonal, so that there is a plan without."""
    generator = torch.Generator().manual_seed(seed)
    cost = torch.rand(n, n, generator=generator, dtype=F64)
    hidden = torch.rand(n, n, generator=generator) < share
    return cost, hidden.fill_diagonal_(False)


def outside_of_a_band(n: int, width: int, seed: int) -> tuple[Tensor, Tensor]:
    cost, place = masked_at_random(n, 0, seed)[0], torch.arange(n)
    return cost, (place[:, None] - place).abs() > width


DENSE = [*((masked_at_random, n, share) for n in (8, 16, 30) for share in (0.5, 0.8, 0.9)), (outside_of_a_band, 16, 1)]


@pytest.mark.parametrize("large", [1e4, 1e6, 1e9, 1e20, 3.4e38])
@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize(("masked", "n", "of"), DENSE, ids=lambda of: getattr(of, "__name__", str(of)))
def test_masks_that_leave_few_pairs(masked: Any, n: int, of: Any, dtype: torch.dtype, large: float) -> None:
    """As if the pairs were forbidden, and at the eps that was asked for."""
    costs, hidden = zip(*(masked(n, of, seed) for seed in range(8)), strict=True)
    cost, hidden = torch.stack(costs), torch.stack(hidden)
    options = {"eps": 0.05, "eps_scale": "absolute"}
    result = solve(torch.where(hidden, large, cost).to(dtype), **options)
    right = solve(torch.where(hidden, INF, cost), max_iter=20_000, **options)
    assert right.converged.all()
    for found, expected in (
        (result.transport_cost, right.transport_cost),
        (result.entropic_cost, right.entropic_cost),
        (result.eps, right.eps),
    ):
        torch.testing.assert_close(found.double(), expected, rtol=2e-3, atol=0)


@pytest.mark.parametrize("large", [1e4, 1e9, 1e17, 1e20, 3e38])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_a_mask_beside_weights(dtype: torch.dtype, large: float) -> None:
    a, b = torch.tensor([3.0, 1, 2], dtype=dtype), torch.tensor([1.0, 2, 2], dtype=dtype)
    result = solve(with_a_mask(large, dtype), a, b, eps=0.01, eps_scale="absolute")
    assert result.transport_cost.item() == pytest.approx(0.336667, rel=1e-4) and result.converged


@pytest.mark.parametrize("eps_scale", ["std", "absolute"])
@pytest.mark.parametrize("reach", [None, 0.3, (0.2, None)], ids=str)
@pytest.mark.parametrize("shape", [(7, 9), (16, 16), (33, 20)])
def test_forbidden_pairs(shape: tuple[int, int], reach: Any, eps_scale: str) -> None:
    """A third of the pairs forbidden, with weights: value, gradients, plan, against float64."""
    cost = torch.rand(3, *shape, dtype=F64)
    cost = torch.where(torch.rand(3, *shape) < 0.33, INF, cost)
    cost[:, :, 0] = cost[:, 0] = 0.4  # so that there is a plan
    a, b = weights(3, shape[0], dtype=F64), weights(3, shape[1], dtype=F64)
    a[0, 1] = b[1, 2] = 0
    options = {"eps": 0.1, "eps_scale": eps_scale, "reach": reach}
    leaves = [t.clone().requires_grad_() for t in (cost, a, b)]
    result = solve(*leaves, tol=1e-11, max_iter=10_000, **options)
    wide = [t.clone().requires_grad_() for t in (cost, a, b)]
    expected = reference.sinkhorn(*wide, tol=1e-12, max_iter=100_000, **options)
    torch.testing.assert_close(result.plan, expected.plan, rtol=1e-6, atol=1e-9)
    assert (result.plan[cost == INF] == 0).all()
    for name in ("transport_cost", "entropic_cost"):
        ours, theirs = getattr(result, name), getattr(expected, name)
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)
        found = torch.autograd.grad(ours.sum(), leaves, retain_graph=True)
        for grad, wanted in zip(found, torch.autograd.grad(theirs.sum(), wide, retain_graph=True), strict=True):
            torch.testing.assert_close(grad, wanted, rtol=1e-5, atol=1e-7)
        assert (found[0][cost == INF] == 0).all()


def test_a_patch_that_nothing_is_allowed_to() -> None:
    """Its problem has no plan: inf, no gradient, not converged; its neighbours are untouched."""
    cost = torch.rand(3, 4, 5)
    cost[1, 2] = INF
    leaf = cost.clone().requires_grad_()
    result, alone = solve(leaf), solve(cost[::2])
    for value in (result.transport_cost, result.entropic_cost):
        assert value[1] == INF
        (grad,) = torch.autograd.grad(value[::2].sum() + value[1], leaf, retain_graph=True)
        assert torch.equal(grad[1], torch.zeros(4, 5)) and grad.isfinite().all()
    assert result.converged.tolist() == [True, False, True]
    assert torch.equal(result.transport_cost[::2], alone.transport_cost)
    left_behind = solve(cost[1], reach=0.5)  # its mass may stay where it is
    assert left_behind.converged and left_behind.transport_cost.isfinite() and (left_behind.plan[2] == 0).all()


@pytest.mark.parametrize("bad", [math.nan, -INF])
def test_what_is_no_cost(bad: float) -> None:
    cost = torch.rand(3, 4, 5)
    cost[1, 2, 3] = bad
    result = solve(cost)
    assert result.transport_cost.isnan().tolist() == [False, True, False]
    assert result.converged.tolist() == [True, False, True]


@pytest.mark.parametrize(("dtype", "scale"), [(F32, 1e-36), (F32, 4e-37), (F64, 1e-299), (F64, 1e-305)], ids=str)
@pytest.mark.parametrize("reach", [None, 0.5], ids=str)
def test_tiny_costs_still_differ(dtype: torch.dtype, scale: float, reach: float | None) -> None:
    cost = torch.rand(6, 7, dtype=dtype)
    small = (cost * scale).clone().requires_grad_()
    result = solve(small, reach=None if reach is None else reach * scale)
    expected = solve(small.detach().double() / scale, reach=reach)
    assert (result.transport_cost.double() / scale).item() == pytest.approx(expected.transport_cost.item(), rel=1e-3)
    assert error(result.plan, expected.plan) < 1e-2
    (grad,) = torch.autograd.grad(result.transport_cost, small)
    wide = (small.detach().double() / scale).requires_grad_()
    (wanted,) = torch.autograd.grad(solve(wide, reach=reach, tol=1e-10).transport_cost, wide)
    assert error(grad, wanted) < 1e-2


@pytest.mark.parametrize(("dtype", "scale"), [(F32, 1e-38), (F32, 1e-41), (F64, 1e-307)], ids=str)
def test_costs_that_leave_no_room_for_eps(dtype: torch.dtype, scale: float) -> None:
    """It is as small as the type can do with, and the result says so."""
    cost = torch.rand(6, 7, dtype=dtype) * scale
    result = solve(cost)
    assert result.converged and result.eps.item() > 0
    expected = solve(cost.double() / scale, eps=result.eps.item() / scale, eps_scale="absolute")
    assert error(result.plan, expected.plan) < 1e-2


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e20, 1e30])
@pytest.mark.parametrize("value", ["transport_cost", "entropic_cost"])
@pytest.mark.parametrize("reach", [(None, None), (0.5, 0.5), (None, 0.5)], ids=str)
def test_gradients_do_not_depend_on_the_scale(
    reach: tuple[float | None, float | None], value: str, scale: float
) -> None:
    """A relative eps: d/dC stays, d/da and d/db grow with the scale."""
    cost, a, b = torch.rand(6, 7), weights(6), weights(7)

    def gradients(scale: float, dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [t.to(dtype).requires_grad_() for t in (cost * scale, a, b)]
        scaled = tuple(None if r is None else r * scale for r in reach)
        grads = torch.autograd.grad(getattr(solve(*leaves, reach=scaled, tol=1e-6), value), leaves)
        return grads[0].double(), grads[1].double() / scale, grads[2].double() / scale

    for ours, expected in zip(gradients(scale, F32), gradients(1.0, F64), strict=True):
        assert error(ours, expected) < 1e-3


# --- eps


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("eps", [1e-6, 1e-8, 1e-12, 1e-30, 1e-50])
def test_tiny_absolute_eps(eps: float, dtype: torch.dtype) -> None:
    """Never worse than what the type can hold: near to the exact value, and a gradient near to its plan."""
    x, y = features(1, 12, 3, dtype=dtype, grad=True), features(1, 12, 3, dtype=dtype)
    exact = reference.exact_emd(cost_matrix(x, y))
    (wanted,) = torch.autograd.grad(emd_l2(x, y, solver="exact"), x)
    for objective in OBJECTIVES:
        value = emd_l2(x, y, eps=eps, eps_scale="absolute", objective=objective)
        (grad,) = torch.autograd.grad(value, x)
        assert value.item() == pytest.approx(exact.item(), rel=1e-2)
        assert grad.isfinite().all() and grad.norm() < 10 * wanted.norm()


@pytest.mark.parametrize("eps", [1e-300, 1e-40, 1e-30])
@pytest.mark.parametrize(
    ("dtype", "scale"), [(F32, 1e4), (F32, 1e9), (F32, 1e20), (F32, 1e30), (F64, 1e12), (F64, 1e200)]
)
def test_an_eps_far_below_large_costs(dtype: torch.dtype, scale: float, eps: float) -> None:
    """What is out of sight of the costs is what the type can hold of them."""
    cost = torch.rand(7, 7, dtype=F64)
    exact = reference.exact_emd(cost).item()
    given = (cost * scale).to(dtype).requires_grad_()
    result = solve(given, eps=eps, eps_scale="absolute")
    for value in (result.transport_cost, result.entropic_cost):
        assert value.item() / scale == pytest.approx(exact, rel=2e-3)
        (grad,) = torch.autograd.grad(value, given, retain_graph=True)
        assert grad.isfinite().all()
    assert result.n_iter.item() < 200


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("eps", [1e10, 1e39, 1e300])
def test_huge_eps(eps: float, dtype: torch.dtype) -> None:
    """The product of the weights."""
    cost, a, b = torch.rand(6, 7, dtype=dtype), weights(6, dtype=dtype), weights(7, dtype=dtype)
    product = (a / a.sum())[:, None] * (b / b.sum())
    for eps_scale in ("absolute", "std"):
        result = solve(cost, a, b, eps=eps, eps_scale=eps_scale)
        torch.testing.assert_close(result.plan, product, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(result.transport_cost, (product * cost).sum(), rtol=1e-4, atol=1e-6)
        assert result.converged


def bumps(n: int, m: int, at: float, width: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    x, y = torch.linspace(-1, 2, n, dtype=F64), torch.linspace(-1, 2, m, dtype=F64)
    a, b = torch.exp(-((x - 1) ** 2) / 0.08), torch.exp(-((y - at) ** 2) / (2 * width**2))
    return tuple(t.to(dtype) for t in ((x[:, None] - y) ** 2, a, b))  # type: ignore[return-value]


@pytest.mark.parametrize(("n", "m", "at", "width"), [(58, 54, 0.69, 0.19), (50, 50, 0.3, 0.2), (40, 60, 1.4, 0.1)])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_does_not_run_away(n: int, m: int, at: float, width: float, dtype: torch.dtype) -> None:
    """Two bumps on a line at a small eps: near to the sorted transport, and gradients of the size of the potentials."""
    cost, a, b = bumps(n, m, at, width, dtype)
    leaves = [t.requires_grad_() for t in (cost, a, b)]
    exact = reference.exact_emd(*leaves).item()
    for max_iter in (500, 1000):
        result = solve(*leaves, eps=1e-4, eps_scale="absolute", max_iter=max_iter)
        assert result.transport_cost.item() == pytest.approx(exact, rel=0.02)
        assert result.entropic_cost.item() == pytest.approx(exact, rel=0.02)
        grads = torch.autograd.grad(result.transport_cost, leaves)
        assert all(grad.isfinite().all() for grad in grads)
        assert (grads[0].abs().sum() < 100) and (grads[1].abs().max() < 1e3 * cost.max())


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize(
    ("cost", "a", "b"),
    [
        ([[8.6, 1.8], [4.8, 1.3]], [5.0, 3], [3.0, 4]),
        ([[8.6, 1.8, 3.0], [4.8, 1.3, 2.0]], [5.0, 3], [3.0, 4, 1]),
        ([[0.0, 4.0], [3.0, 0.1]], [1.0, 9], [8.0, 3]),
    ],
)
@pytest.mark.parametrize("eps", [0.01, 0.003, 0.001])
def test_small_eps_within_the_default_iterations(
    cost: list[list[float]], a: list[float], b: list[float], eps: float, dtype: torch.dtype
) -> None:
    """No value is more than 2 % below the exact one, and few patches are solved to the end."""
    inputs = [torch.tensor(t, dtype=dtype) for t in (cost, a, b)]
    exact = reference.exact_emd(*inputs).item()
    result = solve(*inputs, eps=eps, eps_scale="absolute")
    assert 0.98 * exact <= result.transport_cost.item() <= 1.02 * exact


@pytest.mark.parametrize("eps", [1e-3, 1e-4])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_ahead_of_plain_iterations_with_falling_eps(eps: float, dtype: torch.dtype) -> None:
    x, y = torch.rand(1, 100, 2, dtype=F64), torch.rand(1, 100, 2, dtype=F64)
    cost = cost_matrix(x, y, metric="sqeuclidean")[0]
    exact = reference.exact_emd(cost).item()
    scale = cost.std(correction=0).item() * eps
    f, g = torch.zeros(100, dtype=F64), torch.zeros(100, dtype=F64)
    width = cost.max().item()
    for _ in range(1000):
        width = max(scale, width * 0.9)
        f = -width * (torch.logsumexp((g - cost) / width, 1) - math.log(100))
        g = -width * (torch.logsumexp((f[:, None] - cost) / width, 0) - math.log(100))
    plan = ((f[:, None] + g - cost) / width).exp() / 1e4
    plain = abs((plan * cost).sum().item() - exact) / exact
    ours = solve(cost.to(dtype), eps=eps).transport_cost.item()
    assert abs(ours - exact) / exact <= plain + 1e-3
    assert ours >= 0.98 * exact


@pytest.mark.parametrize("eps", [1e-3, 3e-4, 1.4e-4, 1e-4])
@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize(("n", "dims"), [(20, 1), (45, 1), (64, 1), (100, 1), (64, 2), (49, 3)])
def test_small_eps_on_grids(n: int, dims: int, power: int, dtype: torch.dtype, eps: float) -> None:
    """Histograms on the points of a grid, where mass has far to go in small steps: not below the exact value."""
    side = torch.arange(round(n ** (1 / dims)), dtype=F64)
    points = torch.cartesian_prod(*[side] * dims).view(-1, dims)
    cost = torch.cdist(points, points) ** power
    a, b = weights(len(points), dtype=F64), weights(len(points), dtype=F64)
    exact = reference.exact_emd(cost, a, b).item()
    result = solve(cost.to(dtype), a, b, eps=eps)
    value = result.transport_cost.item()
    smoothed = solve(cost, a, b, eps=result.eps.item(), eps_scale="absolute", tol=1e-8, max_iter=100_000)
    assert smoothed.converged and 0.98 * exact <= value == pytest.approx(smoothed.transport_cost.item(), rel=0.02)


@pytest.mark.parametrize("eps", [1.0, 0.05, 0.01, 1e-3])
@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("light", [1e-3, 1e-6, 1e-8, 1e-12, 1e-30])
def test_mass_on_different_patches(light: float, dtype: torch.dtype, eps: float) -> None:
    """Nearly all of either side has to go where nearly nothing of the other is: costs hardly deviate, and are large."""
    cost = torch.tensor([[0.0, 9, 7], [9, 0, 8], [7, 8, 0]], dtype=dtype)
    a, b = torch.tensor([1.0, light, light], dtype=dtype), torch.tensor([light, light, 1.0], dtype=dtype)
    exact = reference.exact_emd(cost, a, b).item()
    result = solve(cost, a, b, eps=eps)
    assert result.transport_cost.item() == pytest.approx(exact, rel=0.02)
    assert emd_l2(
        torch.tensor([[[0.0], [3.0]]]),
        torch.tensor([[[0.0], [3.0]]]),
        eps=eps,
        student_weight=torch.tensor([1.0, light]),
        teacher_weight=torch.tensor([light, 1.0]),
    ).item() == pytest.approx(3, rel=0.02)


@pytest.mark.parametrize("max_iter", [1000, 5000])
@pytest.mark.parametrize(("dtype", "far"), [(F32, 1e2), (F32, 1e3), (F32, 1e4), (F64, 1e5), (F64, 1e6)], ids=str)
def test_mass_that_has_to_cross_a_large_cost(dtype: torch.dtype, far: float, max_iter: int) -> None:
    """Two clusters with two of four patches each, and one and three on the other side: a quarter has no way around."""
    x = torch.tensor([0.0, 1.0, far, far + 1], dtype=dtype)
    y = torch.tensor([0.0, far, far + 1, far + 2], dtype=dtype)
    cost = (x[:, None] - y).abs()
    result = solve(cost, eps=0.05, eps_scale="absolute", max_iter=max_iter)
    assert result.transport_cost.item() == pytest.approx(reference.exact_emd(cost).item(), rel=2e-3)


@pytest.mark.parametrize(("dtype", "eps"), [(F32, 1e-3), (F32, 1e-5), (F64, 1e-6), (F64, 1e-7)], ids=str)
def test_labels_whose_counts_differ(dtype: torch.dtype, eps: float) -> None:
    """Costs of 0 and 1 alone: some mass has to pay."""
    x, y = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2]), torch.tensor([0, 1, 1, 1, 1, 2, 2, 2])
    cost = (x[:, None] != y).to(dtype)
    assert solve(cost, eps=eps).transport_cost.item() == pytest.approx(0.25, rel=2e-2)


@pytest.mark.parametrize("dtype", [F32, F64])
def test_few_columns_are_kept_of_many(dtype: torch.dtype) -> None:
    """As if the others had never been."""
    side = torch.arange(17, dtype=F64)
    points = torch.cartesian_prod(side, side)
    cost = torch.cdist(points, points).to(dtype)
    b = torch.zeros(289, dtype=dtype)
    kept = torch.arange(0, 289, 2)
    b[kept] = weights(len(kept), dtype=dtype)
    options = {"eps": 1e-4, "max_iter": 2000}
    result = solve(cost.requires_grad_(), None, b, **options)
    alone = solve(cost[:, kept], None, b[kept], **options)
    assert torch.equal(result.transport_cost, alone.transport_cost) and torch.equal(result.n_iter, alone.n_iter)
    (grad,) = torch.autograd.grad(result.transport_cost, cost)
    assert grad.isfinite().all()


@pytest.mark.parametrize("eps", [1e-10, 1e-20, 1e-30])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_one_row_whose_plan_is_given_by_the_columns(dtype: torch.dtype, eps: float) -> None:
    cost = torch.tensor([[1.0, 100.0]], dtype=dtype, requires_grad=True)
    b = torch.tensor([1.0, 1e-3], dtype=dtype)
    result = solve(cost, None, b, eps=eps, eps_scale="absolute")
    (grad,) = torch.autograd.grad(result.transport_cost, cost)
    torch.testing.assert_close(grad[0], b / b.sum(), rtol=1e-3, atol=1e-5)
    assert result.transport_cost.item() == pytest.approx(1.0989, rel=1e-3)


@pytest.mark.parametrize("eps", [0.05, 0.02, 0.01])
def test_one_heavy_patch_on_each_side(eps: float) -> None:
    """At the defaults, nearly all converge, and values are right."""
    generator = torch.Generator().manual_seed(0)
    cost = torch.rand(200, 4, 16, generator=generator, dtype=F64)
    a, b = torch.full((4,), 1e-3, dtype=F64), torch.full((16,), 5e-4, dtype=F64)
    a[0] = b[0] = 1
    result = solve(cost, a, b, eps=eps)
    assert result.converged.float().mean() > 0.97
    expected = solve(cost, a, b, eps=eps, tol=1e-9, max_iter=100_000)
    assert ((result.transport_cost / expected.transport_cost - 1).abs() < 0.01).all()


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("sharpness", [8.0, 12.0, 20.0])
def test_attention_weights_on_both_sides(sharpness: float, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    cost = torch.cdist(*(torch.randn(20, 9, 8, generator=generator, dtype=F64) for _ in range(2)))
    a, b = (torch.softmax(sharpness * torch.randn(20, 9, generator=generator, dtype=F64), -1) for _ in range(2))
    result = solve(cost.to(dtype), a.to(dtype), b.to(dtype))
    exact = solve(cost, a, b, solver="exact").transport_cost
    assert ((result.transport_cost.double() / exact - 1).abs() < 0.02).all()


CONCENTRATED = {
    "crossing": ([[0, 1], [2, 0]], [7e-4, 1], [1e-3, 1], 0.001),
    "crossing, far apart": ([[0, 1], [2, 0]], [7e-4, 1], [1e-5, 0.01], 0.001),
    "labels": ([[1, 0], [0, 1]], [1, 1e-4], [1e-8, 1], 0.003),
    "a chain": ([[0, 1, 4], [1, 0, 1], [4, 1, 0]], [1, 1e-3, 1e-3], [1e-3, 1e-3, 1], 0.001),
    "three": ([[1, 1, 0], [0, 0, 3], [4, 0, 4]], [8e-6, 1, 1e-6], [0.9973, 0.00257, 0.000117], 0.003),
}


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("name", CONCENTRATED)
def test_small_eps_under_concentrated_weights(name: str, dtype: torch.dtype) -> None:
    """What may move is little, and is to move all the same."""
    cost, a, b, eps = CONCENTRATED[name]
    given = [torch.tensor(t, dtype=dtype) for t in (cost, a, b)]
    exact = reference.exact_emd(*(t.double() for t in given)).item()
    assert solve(*given, eps=eps).transport_cost.item() == pytest.approx(exact, rel=0.02)


@pytest.mark.parametrize("eps", [0.05, 0.003, 0.001])
@pytest.mark.parametrize("size", [2, 4, 12])
def test_random_concentrated_weights(size: int, eps: float) -> None:
    generator = torch.Generator().manual_seed(size)
    cost = torch.randint(0, 5, (300, size, size), generator=generator).double()
    a, b = (10.0 ** torch.randint(-6, 1, (300, size), generator=generator).double() for _ in range(2))
    result = solve(cost, a, b, eps=eps)
    exact = solve(cost, a, b, solver="exact").transport_cost
    within = 2e-4 * (cost.amax((1, 2)) - cost.amin((1, 2)))  # what an error of tol may come to
    assert (result.transport_cost >= 0.98 * exact - torch.where(result.converged, within, 0)).all()
    assert result.converged.float().mean() > 0.98


@pytest.mark.parametrize("weight", [1e-16, 1e-20, 1e-24, 1e-30])
@pytest.mark.parametrize("eps", [0.05, 0.005])
@pytest.mark.parametrize("far", [1e6, 1e9, 1e12])
def test_a_far_patch_that_weighs_next_to_nothing(far: float, eps: float, weight: float) -> None:
    """float32 does not hold its potential: the others are what they are without it, and no gradient is NaN."""
    cost = torch.tensor([[far, 1.0], [0.4, 0.3], [0.8, 0.2], [0.37, 0.9]], requires_grad=True)
    for costs in (cost, cost[:, :1]):
        b = torch.linspace(1, 2, costs.shape[1])
        a = torch.tensor([weight, 1e-3, 1.0, 0.1], requires_grad=True)
        result = solve(costs, a, b, eps=eps)
        right = solve(
            costs[1:].detach().double(), a[1:].detach().double(), b, eps=result.eps.item(), eps_scale="absolute"
        )
        paid = (a[0] / a.sum()).item() * costs[0].min().item()
        assert right.transport_cost.item() + paid == pytest.approx(result.transport_cost.item(), rel=5e-3)
        for value in (result.transport_cost, result.entropic_cost):
            assert all(g.isfinite().all() for g in torch.autograd.grad(value, (cost, a), retain_graph=True))


@pytest.mark.parametrize("max_iter", [100, 1000])
@pytest.mark.parametrize("reach", [100.0, (100.0, None), (None, 10.0)], ids=str)
@pytest.mark.parametrize("ratio", [1e-6, 1e-7, 1e-8, 1e-10, 1e8])
def test_masses_far_apart_under_a_reach(ratio: float, reach: Any, max_iter: int) -> None:
    cost, b = torch.rand(12, 10, generator=torch.Generator().manual_seed(0), dtype=F64), weights(10, dtype=F64)
    a = torch.full((12,), ratio / 12, dtype=F64)
    options = {"eps": 0.05, "eps_scale": "absolute", "reach": reach}
    result = solve(cost, a, b, max_iter=max_iter, **options)
    right = expected_of(cost, a, b, tol=1e-6, max_iter=1000, **options)
    assert result.converged and result.transport_cost.item() == pytest.approx(right.transport_cost.item(), rel=1e-3)


@pytest.mark.parametrize("scale", [1.0, 1e10, 1e12, 1e18])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_a_patch_without_a_pair_that_a_reach_leaves_behind(dtype: torch.dtype, scale: float) -> None:
    cost = (torch.tensor([[0, 1], [1, 0.5], [INF, INF]], dtype=dtype) * scale).requires_grad_()
    a = torch.ones(3, dtype=dtype, requires_grad=True)
    result = solve(cost, a, reach=scale)
    assert result.converged and result.f.isfinite().all()
    for gradient in torch.autograd.grad(result.transport_cost, (cost, a)):
        assert gradient.isfinite().all() and (gradient[2] == 0).all()


@pytest.mark.parametrize("max_iter", [20, 60, 200, 320, 400, 700, 1000])
@pytest.mark.parametrize("shape", [(20, 21), (32, 37)])
def test_an_eps_that_max_iter_has_no_room_for(shape: tuple[int, int], max_iter: int) -> None:
    """At the end of max_iter the last larger eps that was solved for counts, not one that was just begun."""
    cost = torch.rand(16, *shape, generator=torch.Generator().manual_seed(11), dtype=F64)
    exact = solve(cost, solver="exact").transport_cost
    result = solve(cost, eps=1e-4, max_iter=max_iter)
    least = 0.98 if max_iter >= 200 else 0.9
    assert (result.transport_cost >= least * exact).all()


@pytest.mark.parametrize("eps", [1e-10, 1e-12])
def test_hopeless_eps_ends_soon(eps: float) -> None:
    """Iterations that change nothing any more are not gone on with."""
    result = solve(torch.rand(50, 50), eps=eps, max_iter=10**6)
    assert result.n_iter.item() < 20_000 and result.transport_cost.isfinite()


def test_a_start_far_away() -> None:
    """No worse than without a start."""
    cost = torch.rand(1, 30, 30, dtype=F32)
    for std in (10, 100, 1000):
        init = (std * torch.randn(1, 30), std * torch.randn(1, 30))
        result, without = solve(cost, init=init), solve(cost)
        assert result.converged
        torch.testing.assert_close(result.transport_cost, without.transport_cost, rtol=1e-3, atol=1e-5)


# --- Weights


def emptied(of: int, groups: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, y = features(3, 6, 4), features(3, *[2] * groups, 5, 4)
    a, b = weights(3, 6), weights(3, *[2] * groups, 5)
    (a, b)[of][1] = 0
    return x, y, a, b


EMPTY = [
    {},
    {"objective": "entropic"},
    {"objective": "divergence"},
    {"objective": "divergence", "eps_scale": "absolute"},
    {"solver": "exact"},
    {"reach": 0.5},
    {"reach": (None, 0.5)},
    {"reach": 0.5, "objective": "divergence"},
    {"eps_scale": "absolute"},
    {"metric": "cosine"},
]


@pytest.mark.parametrize("groups", [False, True])
@pytest.mark.parametrize("of", [0, 1], ids=["student", "teacher"])
@pytest.mark.parametrize("options", EMPTY, ids=str)
def test_an_empty_problem_is_no_error(options: dict[str, Any], of: int, groups: bool) -> None:
    """An image without objects: 0 and no gradient, and its neighbours have the bits that they have without it."""
    x, y, a, b = emptied(of, groups)
    others = torch.tensor([0, 2])

    def value(x: Tensor, y: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return emd_l2(x, y, student_weight=a, teacher_weight=b, reduction="none", **options)

    ours, grads = value_and_gradients(value, *(t.requires_grad_() for t in (x, y, a, b)))
    kept, wanted = value_and_gradients(value, *(t.detach()[others].requires_grad_() for t in (x, y, a, b)))
    assert torch.equal(ours[1], torch.zeros_like(ours[1])) and torch.equal(ours[others], kept)
    for grad, theirs in zip(grads, wanted, strict=True):
        assert torch.equal(grad[1], torch.zeros_like(grad[1])) and torch.equal(grad[others], theirs)
    mean = emd_l2(x, y, student_weight=a, teacher_weight=b, **options)
    torch.testing.assert_close(mean, ours.mean())


@pytest.mark.parametrize("solver", ["sinkhorn", "exact"])
@pytest.mark.parametrize("reach", [None, 0.5])
def test_results_of_an_empty_problem(solver: str, reach: float | None) -> None:
    options = {"solver": solver} if reach is None else {"reach": reach}
    x, y, a, b = emptied(1, False)
    for result in (solve_sample(x, y, a, b, **options), solve(cost_matrix(x, y), a, b, **options)):
        for name in ("transport_cost", "entropic_cost", "f", "g", "plan", "n_iter", "marginal_error"):
            assert (getattr(result, name)[1] == 0).all(), name
        assert result.converged.all()
        assert torch.equal(result.barycentric(y)[1], torch.zeros(6, 4))
    every = solve(torch.rand(2, 3, 3), torch.zeros(3), **options)
    assert torch.equal(every.transport_cost, torch.zeros(2)) and every.converged.all()


def gradients_by_both(
    x: Tensor, y: Tensor, a: Tensor | None, b: Tensor | None, **options: Any
) -> tuple[list[Tensor], list[Tensor]]:
    """In float32 at tol 1e-5, and in float64 converged."""

    def value(tol: float) -> Any:
        def of(x: Tensor, y: Tensor, *sides: Tensor) -> Tensor:
            given = iter(sides)
            side_a, side_b = (None if w is None else next(given) for w in (a, b))
            limits = {"tol": tol, "max_iter": 20_000}
            return emd_l2(x, y, student_weight=side_a, teacher_weight=side_b, **limits, **options)

        return of

    given = [t for t in (x, y, a, b) if t is not None]
    _, ours = value_and_gradients(value(1e-5), *(t.float().requires_grad_() for t in given))
    _, exact = value_and_gradients(value(1e-12), *(t.float().double().requires_grad_() for t in given))
    return ours, exact


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("sharpness", [3, 6, 10, 15])
def test_gradients_at_small_weights(sharpness: float, objective: str) -> None:
    """A teacher's attention: as near to float64 as uniform weights are."""
    for seed in range(5):
        torch.manual_seed(seed)
        x, y = features(1, 49, 16), features(1, 49, 16)
        b = (sharpness * torch.randn(1, 49, dtype=F64)).softmax(-1)
        ours, exact = gradients_by_both(x, y, None, b, objective=objective)
        assert all(grad.isfinite().all() for grad in ours)
        assert error(ours[0], exact[0]) < 5e-3 and error(ours[1], exact[1]) < 5e-3


@pytest.mark.parametrize("least", [1e-10, 1e-20, 1e-30, 1e-36])
def test_gradients_at_a_tiny_weight(least: float) -> None:
    x, y = features(1, 9, 4), features(1, 8, 4)
    a = weights(1, 9)
    a[0, 3] = least
    for objective in OBJECTIVES:
        ours, exact = gradients_by_both(x, y, a, None, objective=objective)
        for found, wanted in zip(ours, exact, strict=True):
            assert found.isfinite().all() and error(found, wanted) < 5e-3


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("sides", ["student", "teacher", "both"])
@pytest.mark.parametrize("least", [1e-4, 1e-10, 1e-20, 1e-30, 1e-36])
def test_small_weights_are_as_exact_as_equal_ones(least: float, sides: str, objective: str) -> None:
    """A third of the patches of a side next to nothing: features and weights, and no more iterations."""
    x, y = features(1, 25, 8), features(1, 23, 8)
    a, b = torch.ones(1, 25), torch.ones(1, 23)
    equal = solve_sample(x, y, a, b, tol=1e-5, max_iter=20_000)
    if sides != "teacher":
        a[:, ::3] = least
    if sides != "student":
        b[:, 1::3] = least
    result = solve_sample(x, y, a, b, tol=1e-5, max_iter=20_000)
    assert result.converged and result.n_iter <= 2 * equal.n_iter + 20
    ours, exact = gradients_by_both(x, y, a, b, objective=objective)
    for found, wanted in zip(ours, exact, strict=True):
        assert found.isfinite().all() and error(found, wanted) < 2e-3


@pytest.mark.parametrize("options", [{"metric": metric} for metric in METRICS] + [{"patch_size": 2}], ids=str)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_small_weights_of_maps(objective: str, options: dict[str, Any]) -> None:
    """A batch with groups; beside padding; attention of any sharpness on both sides."""
    x, y = features(2, 6, 5, 5), features(2, 2, 6, 4, 5)
    size = 16 if "patch_size" in options else 25
    a, b = (8 * torch.randn(2, size)).softmax(-1), (8 * torch.randn(2, 2, 12 if size == 16 else 20)).softmax(-1)
    a[1, 3:7] = b[0, 1, ::4] = 0
    a[0, 0] = b[1, 0, 2] = 1e-30
    ours, exact = gradients_by_both(x, y, a, b, objective=objective, eps=0.2, **options)
    for found, wanted in zip(ours, exact, strict=True):
        assert found.isfinite().all() and error(found, wanted) < 5e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_small_weights_of_halves(dtype: torch.dtype) -> None:
    x, y = features(1, 12, 8, dtype=dtype), features(1, 11, 8, dtype=dtype)
    a, b = weights(1, 12), weights(1, 11)
    a[:, ::3], b[:, 1] = 1e-30, 1e-12

    def grads(x: Tensor, y: Tensor, a: Tensor, b: Tensor, tol: float) -> list[Tensor]:
        limits = {"tol": tol, "max_iter": 20_000}
        leaves = [t.requires_grad_() for t in (x, y, a, b)]
        value = emd_l2(leaves[0], leaves[1], student_weight=leaves[2], teacher_weight=leaves[3], **limits)
        return list(torch.autograd.grad(value, leaves))

    ours = grads(x, y, a, b, 1e-5)
    exact = grads(*(t.detach().double() for t in (x, y, a, b)), 1e-12)
    for found, wanted, within in zip(ours, exact, (1e-2, 1e-2, 1e-3, 1e-3), strict=True):
        assert found.isfinite().all() and error(found, wanted) < within


@pytest.mark.parametrize(("dtype", "least"), [(F32, 1e-25), (F32, 1e-36), (F64, 1e-100), (F64, 1e-300)], ids=str)
@pytest.mark.parametrize("reach", [None, 0.5], ids=str)
@pytest.mark.parametrize("symmetric", [False, True])
def test_a_patch_that_weighs_nothing_follows_the_others(
    symmetric: bool, reach: float | None, dtype: torch.dtype, least: float
) -> None:
    """Nobody notices it, and its potential is a soft minimum over what the others pay."""
    x, y = features(1, 9, 4, dtype=dtype), features(1, 8, 4, dtype=dtype)
    a, b = weights(1, 9, dtype=dtype), weights(1, 8, dtype=dtype)
    if symmetric:
        y, b = x, a
    a[0, 4] = 0
    eps = 0.5
    options = {"eps": eps, "eps_scale": "absolute", "reach": reach, "tol": 1e-5 if dtype == F32 else 1e-12}
    without = solve_sample(x, y, a, b, **options, max_iter=5000)
    a[0, 4] = least
    result = solve_sample(x, y, a, b, **options, max_iter=5000)
    assert result.converged
    within = {"rtol": 1e-3, "atol": 1e-4} if dtype == F32 else {"rtol": 1e-8, "atol": 1e-9}
    others = torch.arange(9) != 4
    kept = others if symmetric else torch.ones(8, dtype=torch.bool)
    ours, expected = (r.f[0, others, None] + r.g[0, kept] for r in (result, without))
    torch.testing.assert_close(ours, expected, **within)
    if not symmetric:
        mass = b[0] if reach else b[0] / b.sum()
        paid = eps * torch.logsumexp(mass.log() + (result.g[0] - cost_matrix(x, y)[0, 4]) / eps, 0)
        torch.testing.assert_close(result.f[0, 4], -paid if reach is None else -paid * reach / (reach + eps), **within)


@pytest.mark.parametrize("distance", [0.0, 10.0, 100.0])
@pytest.mark.parametrize("least", [1.0, 1e-8, 1e-30])
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("reach", [0.05, 0.5, 5.0, (0.5, None), (None, 0.5)], ids=str)
def test_far_patches_and_small_weights(reach: Any, objective: str, least: float, distance: float) -> None:
    """Some of both sides' patches far from everything, some next to nothing."""
    x, y = features(1, 14, 5), features(1, 12, 5)
    x[:, :3] += distance
    y[:, :3] -= distance
    a, b = torch.full((1, 14), 1 / 14), torch.full((1, 12), 1 / 12)
    a[:, ::3] *= least
    b[:, 1::3] *= least
    ours, exact = gradients_by_both(x, y, a, b, reach=reach, eps=0.1, eps_scale="absolute", objective=objective)
    for found, wanted in zip(ours, exact, strict=True):
        assert found.isfinite().all() and error(found, wanted) < 5e-3


@pytest.mark.parametrize("apart", [10.0, 30.0, 1000.0])
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("reach", [0.1, 0.5, (0.1, None), (None, 0.1)], ids=str)
def test_gradients_where_a_reach_leaves_a_patch_behind(reach: Any, objective: str, apart: float) -> None:
    x = torch.tensor([[[0.0, 0], [1, 0], [0, 1]]])
    y = x + 0.05
    y[0, 0] += apart
    a, b = torch.full((1, 3), 1 / 3), torch.full((1, 3), 1 / 3)
    options = {"reach": reach, "eps": 0.05, "eps_scale": "absolute", "objective": objective}
    ours, exact = gradients_by_both(x, y, a, b, **options)
    for found, wanted in zip(ours, exact, strict=True):
        assert found.isfinite().all()
        torch.testing.assert_close(found.double(), wanted, rtol=1e-2, atol=1e-4)


def test_all_patches_out_of_reach() -> None:
    """Nothing is matched: finite, and no gradient for the features."""
    x = features(1, 5, 3, grad=True)
    a = weights(1, 5, grad=True)
    value = emd_l2(x, features(1, 4, 3) + 100, student_weight=a, reach=0.1, eps=0.05, eps_scale="absolute")
    grads = torch.autograd.grad(value, (x, a))
    assert value.item() == pytest.approx(0, abs=1e-6)
    assert all(grad.isfinite().all() for grad in grads) and grads[0].abs().max() < 1e-6


# --- Reach


def check_unbalanced(result: OTResult, cost: Tensor, a: Tensor, b: Tensor, **options: Any) -> None:
    expected = expected_of(cost, a, b, tol=1e-9, **options)
    assert result.converged
    assert result.transport_cost.item() == pytest.approx(expected.transport_cost.item(), rel=2e-3)
    assert result.entropic_cost.item() == pytest.approx(expected.entropic_cost.item(), rel=2e-3)


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("reach", [10.0, 100.0, 1000.0])
def test_masses_that_differ_and_a_long_reach(reach: float, dtype: torch.dtype) -> None:
    cost = torch.tensor([[0.0, 1], [1, 0]], dtype=dtype)
    a, b = torch.tensor([3.0, 7], dtype=dtype), torch.tensor([7.0, 30], dtype=dtype)
    options = {"eps": 0.05, "eps_scale": "absolute", "reach": reach}
    result = solve(cost, a, b, **options)
    if reach == 100:
        assert result.transport_cost.item() == pytest.approx(2.0669, abs=2e-3)
    check_unbalanced(result, cost, a, b, **options)


@pytest.mark.parametrize("reach", [1.0, 100.0, 1e4])
@pytest.mark.parametrize("masses", [(1.0, 1.0), (30.0, 1.0), (1.0, 30.0)])
def test_unbalanced_takes_as_long_as_balanced(masses: tuple[float, float], reach: float) -> None:
    cost = cost_matrix(features(1, 49, 8), features(1, 40, 8))[0]
    a, b = (w / w.sum() * mass for w, mass in zip((weights(49), weights(40)), masses, strict=True))
    balanced = solve(cost, a, b)
    result = solve(cost, a, b, reach=reach)
    assert result.converged and result.n_iter <= 2 * balanced.n_iter + 10


@pytest.mark.parametrize("reach", [1.5, 0.01, 1e-10, 1e-50])
@pytest.mark.parametrize("scale", [1.0, 1e5])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_a_reach_far_below_eps(reach: float, scale: float, dtype: torch.dtype) -> None:
    cost = torch.rand(33, 17, dtype=dtype) * scale
    result = solve(cost, eps=0.5, reach=reach)
    expected = expected_of(cost, eps=0.5, reach=reach)
    assert result.converged and result.n_iter < 100
    assert result.transport_cost.item() == pytest.approx(expected.transport_cost.item(), rel=1e-3)
    assert result.entropic_cost.item() == pytest.approx(expected.entropic_cost.item(), rel=1e-3)


@pytest.mark.parametrize("value", ["transport_cost", "entropic_cost"])
@pytest.mark.parametrize("reach", [0.5, (0.5, None)], ids=str)
def test_one_pair_and_a_reach(reach: Any, value: str) -> None:
    """A relative eps where there is one cost: the gradient is that of the value that is returned."""
    cost = torch.tensor([[0.7]], dtype=F64, requires_grad=True)

    def of(cost: Tensor) -> Tensor:
        return getattr(solve(cost, reach=reach, tol=1e-13), value)

    (grad,) = torch.autograd.grad(of(cost), cost)
    step = 1e-6
    with torch.no_grad():
        slope = (of(cost + step) - of(cost - step)) / (2 * step)
    assert grad.item() == pytest.approx(slope.item(), rel=1e-5)


@pytest.mark.parametrize("price", [0.7, -0.4, 30.0])
@pytest.mark.parametrize("reach", [(0.5, 0.5), (0.3, 2.0), (None, 0.5)], ids=str)
@pytest.mark.parametrize("value", ["transport_cost", "entropic_cost"])
def test_equal_costs_and_a_reach(value: str, reach: Any, price: float) -> None:
    """Several pairs of one cost: along their common cost the gradient is the slope, and even with even weights."""

    def of(price: Tensor, a: Tensor) -> Tensor:
        return getattr(solve(price.expand(3, 4), a, reach=reach, tol=1e-13), value)

    leaves = [torch.tensor(price, dtype=F64, requires_grad=True), torch.tensor([0.2, 0.5, 0.4], dtype=F64)]
    leaves[1].requires_grad_()
    step = 1e-6
    for grad, leaf in zip(torch.autograd.grad(of(*leaves), leaves), leaves, strict=True):
        for k in range(leaf.numel()):
            ends = []
            for by in (step, -step):
                moved = [t.detach().clone() for t in leaves]
                moved[leaf.dim()].view(-1)[k] += by
                ends.append(of(*moved))
            slope = ((ends[0] - ends[1]) / (2 * step)).item()
            assert grad.view(-1)[k].item() == pytest.approx(slope, rel=1e-5, abs=1e-6 * abs(price))


# --- The divergence of nearly equal sets


@pytest.mark.parametrize("noise", [1e-2, 1e-3, 1e-4])
def test_divergence_of_nearly_equal_clouds(noise: float) -> None:
    x = torch.rand(1, 100, 3, dtype=F64)
    y = x + noise * torch.randn_like(x)
    options = {"metric": "sqeuclidean", "objective": "divergence", "eps": 0.05, "eps_scale": "absolute"}
    x, y = x.float(), y.float()
    exact = emd_l2(x.double(), y.double(), tol=1e-12, max_iter=20_000, **options).item()
    assert emd_l2(x, y, tol=1e-6, **options).item() == pytest.approx(
        exact, rel={1e-2: 1e-3, 1e-3: 0.02, 1e-4: 1.0}[noise]
    )


@pytest.mark.parametrize("apart", [1e3, 1e5, 1e9])
@pytest.mark.parametrize("reach", [None, 0.5], ids=str)
@pytest.mark.parametrize("metric", ["l2", "l1", "sqeuclidean"])
def test_far_clusters_do_not_raise_eps(metric: str, reach: float | None, apart: float) -> None:
    """Costs that no plan uses say nothing of the eps that the others can be solved with."""
    x, y = torch.randn(1, 16, 8), torch.randn(1, 16, 8)
    x[:, 8:] += apart
    y[:, 8:] += apart
    x, y = x.requires_grad_(), y.requires_grad_()
    wide = [t.detach().double().requires_grad_() for t in (x, y)]
    options = {"eps": 0.05, "eps_scale": "absolute", "reach": reach, "metric": metric}
    result = solve_sample(x, y, **options)
    expected = solve_sample(*wide, **options, tol=1e-10)
    assert result.converged and result.eps.item() == pytest.approx(0.05)
    assert result.transport_cost.item() == pytest.approx(expected.transport_cost.item(), rel=1e-3, abs=1e-6)
    assert result.entropic_cost.item() == pytest.approx(expected.entropic_cost.item(), rel=1e-3)
    found = torch.autograd.grad(result.transport_cost, (x, y))
    for grad, wanted in zip(found, torch.autograd.grad(expected.transport_cost, wide), strict=True):
        assert error(grad, wanted) < 1e-2


@pytest.mark.parametrize("size", [1e2, 1e5, 1e8, 1e30])
@pytest.mark.parametrize("reach", [0.5, (None, 0.5), None], ids=str)
def test_a_start_far_away_and_a_reach(reach: Any, size: float) -> None:
    cost, start = torch.rand(30, 25), (size * torch.randn(30), size * torch.randn(25))
    result, expected = solve(cost, init=start, reach=reach), solve(cost.double(), reach=reach, tol=1e-10)
    assert result.converged
    assert result.transport_cost.item() == pytest.approx(expected.transport_cost.item(), rel=1e-3)
    assert result.entropic_cost.item() == pytest.approx(expected.entropic_cost.item(), rel=1e-4)


@pytest.mark.parametrize(("dtype", "scale"), [(F32, 1e-38), (F32, 1e-41), (F64, 1e-307), (F64, 1e-311)], ids=str)
def test_gradients_at_the_smallest_numbers(dtype: torch.dtype, scale: float) -> None:
    cost, a = (torch.rand(6, 7, dtype=dtype) * scale).requires_grad_(), weights(6, dtype=dtype).requires_grad_()
    of_cost, of_a = torch.autograd.grad(solve(cost, a, eps=0.1).transport_cost, (cost, a))
    assert of_cost.isfinite().all() and of_a.isfinite().all()
    assert of_cost.sum().item() == pytest.approx(1, rel=1e-3)


def test_divergence_where_all_pairs_cost_the_same() -> None:
    """Its own terms are of product plans, too, but their costs differ."""
    x, y = torch.rand(2, 20, 1, dtype=F64), torch.zeros(2, 1, 1, dtype=F64)
    x[:, ::2] = 0
    options = {"metric": "cosine", "objective": "divergence", "student_weight": weights(20)[None].expand(2, -1)}
    expected = reference.emd_l2(x, y, **options)
    assert emd_l2(x, y, **options).item() == pytest.approx(expected.item(), rel=1e-9)


def test_gradient_of_weights_whose_sum_overflows() -> None:
    cost, a = torch.rand(6, 7), (2e38 * torch.rand(6)).requires_grad_()
    (grad,) = torch.autograd.grad(solve(cost, a).transport_cost, a)
    wide = a.detach().double().requires_grad_()
    (wanted,) = torch.autograd.grad(solve(cost.double(), wide, tol=1e-10).transport_cost, wide)
    assert error(1e38 * grad.double(), 1e38 * wanted) < 1e-2


# --- Iterations


def test_more_iterations_are_no_worse() -> None:
    """That rounding was met at a larger eps says nothing of the last one."""
    generator = torch.Generator().manual_seed(0)
    cost = torch.rand(200, 12, 10, generator=generator)
    a, b = (torch.rand(200, n, generator=generator) + 0.01 for n in (12, 10))
    exact = solve(cost.double(), a.double(), b.double(), solver="exact").transport_cost
    result = solve(cost, a, b, eps=3e-5, max_iter=5000)
    assert result.marginal_error.max() < 0.05
    assert (result.transport_cost > 0.99 * exact).all()


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("constant", [1.0, 100.0, 300.0, 1e4, 1e6])
def test_a_constant_in_a_start_changes_nothing(constant: float, dtype: torch.dtype) -> None:
    """Moved from one side's potentials to the other's, which leaves the plan as it is."""
    cost = torch.rand(8, 40, 30, generator=torch.Generator().manual_seed(1), dtype=dtype)
    options = {"eps": 1e-3, "tol": 1e-8, "max_iter": 5000} if dtype == F64 else {}
    cold = solve(cost, **options)
    warm = solve(cost, **options, init=(cold.f + constant, cold.g - constant))
    assert cold.converged.all() and warm.converged.all()
    assert (warm.n_iter <= cold.n_iter).all() and error(warm.transport_cost, cold.transport_cost) < 1e-4


@pytest.mark.parametrize("objective", ["transport", "entropic"])
@pytest.mark.parametrize("weight", [1e-33, 1e-35, 5e-37, 5e-38, 2e-38, 1e-38, 1e-39, 1e-42, 1e-45])
def test_the_gradient_in_a_weight_at_the_end_of_float32(weight: float, objective: str) -> None:
    """It is right, or that of a weight of 0; just above these some digits are lost."""
    x, y = features(1, 20, 6), features(1, 15, 6)
    a = torch.full((1, 20), 1 / 19)
    a[0, 3] = weight
    found = []
    for dtype in (F32, F64):
        given = a.to(dtype, copy=True).requires_grad_()
        options = {"objective": objective, "eps": 0.3, "tol": 1e-6}
        value = emd_l2(x.to(dtype), y.to(dtype), student_weight=given, **options)
        found.append(torch.autograd.grad(value, given)[0][0, 3].item())
    near = found[0] == pytest.approx(found[1], rel=1e-3 if weight > 3e-38 else 0.1)
    assert near or (found[0] == 0 and weight < 2e-38)


@pytest.mark.parametrize("weight", [1e-8, 1e-12, 1e-20])
@pytest.mark.parametrize("far", [1e3, 1e4, 1e5])
def test_a_far_patch_of_next_to_no_weight_costs_no_eps(far: float, weight: float) -> None:
    """float32's rounding of one potential is no reason to smooth the others."""
    for _ in range(5):
        x, y = features(1, 16, 8), features(1, 20, 8)
        x[0, 3] *= far
        a = torch.ones(1, 16)
        a[0, 3] = weight
        found, right = (solve_sample(x.to(dtype), y.to(dtype), a) for dtype in (F32, F64))
        assert found.eps.item() == pytest.approx(right.eps.item(), rel=1e-3)
        assert found.transport_cost.item() == pytest.approx(right.transport_cost.item(), rel=1e-2)


@pytest.mark.parametrize("reach", [None, 50.0])
def test_an_eps_is_that_asked_for_whoever_wants_a_gradient(reach: float | None) -> None:
    """One patch against many, of which one is near: nothing may move, but for rounding."""
    for _ in range(10):
        x, y = features(1, 1, 8), features(1, 49, 8)
        y[0, 7] = x[0, 0] + 1e-2
        b = weights(1, 49)
        plain = solve_sample(x, y, None, b, reach=reach)
        wanted = solve_sample(x, y, None, b.clone().requires_grad_(), reach=reach)
        assert torch.equal(plain.eps, wanted.eps)


def test_costs_far_beyond_a_reach() -> None:
    """Nothing is moved, and the value says so."""
    cost = 2242 + 208 * torch.rand(100, 4, 2, generator=torch.Generator().manual_seed(0), dtype=F64)
    b = torch.tensor([0.3, 0.9], dtype=F64)
    result = solve(cost, None, b, reach=2.0, eps=0.5, eps_scale="absolute")
    torch.testing.assert_close(result.entropic_cost, torch.full((100,), 2 * 1 + 2 * 1.2 + 0.5 * 1.2, dtype=F64))


SLOW_UNDER_A_REACH = {
    # cost, a, b, eps, reach: Newton steps are right in direction and too long
    "two": ([[0.774, 0.796], [0.975, 0.534]], (0.4086, 0.5914), (0.4392, 0.5608), 0.01, 5.0),
    "three": (
        [[0.435, 0.455], [0.66, 0.495], [1.109, 0.888]],
        (0.1142857, 0.3142857, 0.5714286),
        (0.1170213, 0.8829787),
        0.003,
        10.0,
    ),
}


@pytest.mark.parametrize(("name", "dtype"), [("two", torch.float32), ("two", torch.float64), ("three", torch.float64)])
def test_a_reach_of_some_times_the_costs(name: str, dtype: torch.dtype) -> None:
    cost, a, b, eps, reach = SLOW_UNDER_A_REACH[name]
    given = [torch.tensor(z, dtype=dtype) for z in (cost, a, b)]
    given[0].requires_grad_()
    result = solve(*given, eps=eps, reach=reach)
    assert result.converged and result.n_iter < 400
    right = [torch.tensor(z, dtype=torch.float64) for z in (cost, a, b)]
    right[0].requires_grad_()
    reference = solve(*right, eps=eps, reach=reach, tol=1e-12, max_iter=100_000)
    assert reference.converged
    ours, theirs = (torch.autograd.grad(r.transport_cost, z[0])[0] for r, z in ((result, given), (reference, right)))
    assert (ours - theirs).norm() < 2e-3 * theirs.norm()
