"""How soon the solver gets there, counted in iterations: on the feature maps of a trained network."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.studies import convergence
from sfr_ext import ops, solve


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
    assert not result.converged.any() and (result.n_iter == max_iter).all()
    assert result.plan.isfinite().all()
