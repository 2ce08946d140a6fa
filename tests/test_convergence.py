"""How soon the solver gets there, counted in iterations: on the feature maps of a trained network."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from benchmarks.studies import convergence
from sfr_ext import emd_l2, ops, self_term, solve, solve_sample


@pytest.fixture(scope="module")
def costs() -> Tensor:
    return convergence.costs()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_small_eps_converges(costs: Tensor, dtype: torch.dtype) -> None:
    """Where Sinkhorn's own iterations need hundreds: larger eps first, then Newton steps."""
    cost = costs.to(dtype).requires_grad_()
    result = solve(cost, eps=0.01)
    assert result.converged.all() and result.n_iter.max() < 300
    (grad,) = torch.autograd.grad(result.transport_cost.sum(), cost)
    assert grad.isfinite().all()
    with ops.forced(method="plain"):
        plain = solve(cost, eps=0.01)
    assert plain.n_iter.double().median() > 5 * result.n_iter.double().median()
    torch.testing.assert_close(result.transport_cost, plain.transport_cost, rtol=2e-3, atol=0)


def test_tight_tolerance_costs_little(costs: Tensor) -> None:
    rough, tight = (solve(costs.double(), eps=0.05, tol=tol) for tol in (1e-3, 1e-12))
    assert tight.converged.all()
    assert tight.n_iter.double().mean() < 3 * rough.n_iter.double().mean()


def test_it_ends_where_rounding_does(costs: Tensor) -> None:
    """Potentials in float32 mean no plan within 1e-7; that is seen, not iterated on."""
    result = solve(costs, eps=0.01, tol=1e-7, max_iter=100_000)
    assert not result.converged.any() and result.marginal_error.max() < 1e-3
    assert result.n_iter.max() < 5_000


def test_a_start_is_taken_as_it_is(costs: Tensor) -> None:
    """No detour over larger eps from potentials that are near."""
    cost = costs.double()
    once = solve(cost, eps=0.01)
    again = solve(cost, eps=0.01, init=(once.f, once.g))
    assert again.converged.all() and again.n_iter.max() <= 2


@pytest.mark.parametrize("max_iter", [1, 7, 30])
def test_iterations_at_larger_eps_count(costs: Tensor, max_iter: int) -> None:
    result = solve(costs, eps=0.01, max_iter=max_iter)
    assert (result.n_iter == max_iter).all() and result.plan.isfinite().all()
    assert (
        result.eps[result.converged] > 0.011 * costs[result.converged].std((1, 2), correction=0)
    ).all()  # of a larger one


def of_few_levels(n: int, m: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Integer costs and uneven weights: nearly all mass lies between parts of the plan that hardly touch."""
    generator = torch.Generator().manual_seed(n * m)
    cost = torch.randint(0, 4, (128, n, m), generator=generator).to(dtype)
    a, b = (torch.rand(128, k, generator=generator, dtype=torch.float64).to(dtype) + 0.1 for k in (n, m))
    return cost, a, b


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("n", "m"), [(2, 225), (3, 200), (4, 150), (2, 100)])
def test_few_patches_against_many(n: int, m: int, dtype: torch.dtype) -> None:
    """Systems are factorised over the side that has fewer patches; over the other, one took up to 2,169 iterations."""
    cost, a, b = of_few_levels(n, m, dtype)
    ours, other = solve(cost, a, b), solve(cost.mT, b, a)
    with ops.forced(method="plain"):
        plain = solve(cost, a, b, max_iter=20_000)
    assert ours.converged.all() and other.converged.all()
    assert ours.n_iter.max() < 300 and other.n_iter.max() < 300
    assert (ours.n_iter < 1.25 * plain.n_iter + 40).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("reach", [None, 1.0])
@pytest.mark.parametrize(("n", "m"), [(12, 49), (30, 61)])
def test_both_ways_are_one_problem(n: int, m: int, reach: float | None, dtype: torch.dtype) -> None:
    """The values and gradients of either way round, where systems are factorised over rows and over columns."""
    generator = torch.Generator().manual_seed(5)
    x, y = (torch.randn(8, k, 3, generator=generator, dtype=torch.float64) for k in (n, m))
    single = dtype == torch.float32
    cost = torch.cdist(x, y).to(dtype).requires_grad_()
    a, b = (torch.rand(8, k, generator=generator, dtype=torch.float64).to(dtype) + 0.1 for k in (n, m))
    tol = 1e-4 if single else 1e-10
    ours, other = (
        solve(c, *weights, eps=3e-3, tol=tol, reach=reach, max_iter=5_000)
        for c, weights in ((cost, (a, b)), (cost.mT, (b, a)))
    )
    assert ours.converged.all() and other.converged.all()
    torch.testing.assert_close(ours.transport_cost, other.transport_cost, rtol=1e-3 if single else 1e-9, atol=1e-9)
    if single:
        return
    upstream = torch.linspace(1, 2, 8, dtype=dtype)
    one, two = (torch.autograd.grad((r.transport_cost * upstream).sum(), cost)[0] for r in (ours, other))
    torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-8)


def test_small_patches_that_hold_nothing_are_brought_to_their_weight() -> None:
    """Within tol from the start; a Newton step has no way to them, a logarithmic update has."""
    cost = torch.tensor([[0.0, 0.0, 1.0]], dtype=torch.float64)
    b = torch.tensor([1.0, 1e-6, 1e-6], dtype=torch.float64)
    result = solve(cost, torch.ones(1, dtype=torch.float64), b, tol=1e-3)
    assert result.converged and result.n_iter <= 5
    torch.testing.assert_close(result.plan[0], b / b.sum())


SIZES = [(49, 12), (64, 9), (16, 16), (10, 33)]  # mass between few patches of a teacher moves slowest


def pairs(n: int, m: int, count: int = 24) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 * n + m)
    return tuple(torch.randn(count, k, 3, generator=generator, dtype=torch.float64) for k in (n, m))  # type: ignore[return-value]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("away", [0.1, 0.01])
@pytest.mark.parametrize(("size", "eps"), [*itertools.product(SIZES[:3], [3e-3, 1e-3]), (SIZES[3], 3e-3)])
def test_a_start_makes_no_result_worse(size: tuple[int, int], away: float, eps: float, dtype: torch.dtype) -> None:
    """From the solution of features that are as far away: at a small eps, mass would stay where that put it."""
    x, y = pairs(*size)
    torch.manual_seed(0)
    moved = [(t + away * torch.randn_like(t)).to(dtype) for t in (x, y)]
    right = solve_sample(x, y, eps=eps, tol=1e-9, max_iter=20_000)
    assert right.converged.all()
    x, y = x.to(dtype), y.to(dtype)
    cold, near = solve_sample(x, y, eps=eps), solve_sample(*moved, eps=eps)
    warm = solve_sample(x, y, eps=eps, init=(near.f, near.g))
    # One more, as which of the hardest do not end depends on the path.
    ends = warm.converged
    assert ends.sum() >= cold.converged.sum() - 1
    torch.testing.assert_close(warm.transport_cost[ends].double(), right.transport_cost[ends], rtol=5e-4, atol=0)
    assert warm.n_iter.double().mean() < 1.05 * cold.n_iter.double().mean()


@pytest.mark.parametrize(("n", "m"), SIZES)
def test_a_good_start_is_as_fast_at_a_small_eps(n: int, m: int) -> None:
    x, y = pairs(n, m)
    once = solve_sample(x, y, eps=1e-3, tol=1e-9, max_iter=20_000)
    again = solve_sample(x, y, eps=1e-3, init=(once.f, once.g))
    assert again.converged.all() and again.n_iter.max() <= 2
    near = solve_sample(1.001 * x, y, eps=1e-3, tol=1e-9, max_iter=20_000)
    again = solve_sample(x, y, eps=1e-3, init=(near.f, near.g))
    cold = solve_sample(x, y, eps=1e-3)
    assert again.converged.all() and again.n_iter.double().mean() < 0.6 * cold.n_iter.double().mean()


@pytest.mark.parametrize("eps", [3e-3, 1e-3])
@pytest.mark.parametrize(("n", "m"), SIZES)
def test_divergence_at_a_small_eps(n: int, m: int, eps: float) -> None:
    """It starts from the teacher's own potential, which is not near."""
    x, y = pairs(n, m)
    right = solve_sample(x, y, eps=eps, tol=1e-10, max_iter=20_000)
    ends = solve_sample(x, y, eps=eps).n_iter < 600
    found = emd_l2(x, y, objective="divergence", eps=eps, reduction="none")
    for k in ends.nonzero().flatten().tolist():
        own = [self_term(t[k : k + 1], eps=float(right.eps[k])).value for t in (x, y)]
        expected = right.entropic_cost[k] - sum(own) / 2
        torch.testing.assert_close(found[k : k + 1], expected, rtol=5e-4, atol=0)


def test_divergence_is_the_same_both_ways() -> None:
    generator = torch.Generator().manual_seed(282)
    x, y = (torch.randn(1, n, 3, generator=generator, dtype=torch.float64) for n in (40, 12))
    for one, other in ((x, y), (y, x)):
        value = emd_l2(one, other, objective="divergence", eps=1e-4)
        assert float(value) == pytest.approx(float(emd_l2(x, y, solver="exact")), rel=1e-3)
