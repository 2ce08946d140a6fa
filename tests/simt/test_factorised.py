"""Systems that conjugate gradients take too long for are factorised, on a GPU where one block has all of a problem."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sfr_ext import OTResult, cost_matrix, solve
from simt.test_kernels import FLAVOUR, SEEDS, emulated

# Strategy, patches: both in registers, with few patches and with many; with a plan in shared memory that threads hold
# copies of, and without.
SHAPES = [
    ("warp", 20, 24),
    ("warp", 24, 20),
    ("block", 40, 49),
    ("block", 49, 40),
    ("block", 30, 110),
    ("block", 70, 12),
]


def far_apart(n: int, m: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Costs and weights of patches of which half nearly coincide: hardly any mass is between the pairs."""
    generator = torch.Generator().manual_seed(100 * n + m)
    x, y = (torch.randn(2, k, 8, generator=generator, dtype=torch.float64) for k in (n, m))
    half = min(n, m) // 2
    y[:, :half] = x[:, :half] + 1e-3 * torch.randn(2, half, 8, generator=generator, dtype=torch.float64)
    a = torch.rand(2, n, generator=generator, dtype=torch.float64) + 0.05
    return cost_matrix(x, y).to(dtype), a.to(dtype)


def solved(cost: Tensor, a: Tensor, tol: float, reach: float | None = None) -> tuple[OTResult, Tensor, Tensor]:
    cost, a = cost.clone().requires_grad_(), a.clone().requires_grad_()
    result = solve(cost, a, eps=0.005, tol=tol, reach=reach)
    return result, *torch.autograd.grad((result.transport_cost + 0.5 * result.entropic_cost).sum(), (cost, a))


@pytest.mark.parametrize("reach", [None, 2.0])
@pytest.mark.parametrize(("strategy", "n", "m"), SHAPES)
def test_both_devices_take_the_same_steps(strategy: str, n: int, m: int, reach: float | None) -> None:
    """In float64, where sums in another order do not change what the solver does next."""
    problem = far_apart(n, m, torch.float64)
    ours, *expected = solved(*problem, tol=1e-9, reach=reach)
    with emulated(FLAVOUR, strategy, None):
        theirs, *found = solved(*problem, tol=1e-9, reach=reach)
    assert theirs.converged.all() and theirs.n_iter.tolist() == ours.n_iter.tolist()
    torch.testing.assert_close(theirs.transport_cost, ours.transport_cost, rtol=1e-9, atol=0)
    for ours_, theirs_ in zip(expected, found, strict=True):
        torch.testing.assert_close(theirs_, ours_, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(("strategy", "n", "m"), SHAPES)
def test_gradients_that_conjugate_gradients_do_not_find(strategy: str, n: int, m: int) -> None:
    cost, a = far_apart(n, m, torch.float32)
    _, *expected = solved(cost.double(), a.double(), tol=1e-9)
    with emulated(FLAVOUR, strategy, None):
        _, *found = solved(cost, a, tol=1e-5)
    for theirs, ours in zip(found, expected, strict=True):
        torch.testing.assert_close(theirs.double(), ours, rtol=0, atol=5e-3 * float(ours.abs().max()))


@pytest.mark.parametrize(
    ("strategy", "n", "m"), [pytest.param(*s, marks=[pytest.mark.quick] if s[1] != 40 else []) for s in SHAPES]
)
def test_factors_have_no_race_and_the_same_bits_under_every_schedule(strategy: str, n: int, m: int) -> None:
    problem = far_apart(n, m, torch.float32)
    results = []
    for flavour, seed in (("race", 1), *((FLAVOUR, seed) for seed in SEEDS)):
        with emulated(flavour, strategy, seed):
            result, *gradients = solved(*problem, tol=1e-5)
        results.append([result.transport_cost, result.f, result.n_iter, *gradients])
    for other in results[1:]:
        assert all(torch.equal(theirs, ours) for theirs, ours in zip(other, results[0], strict=True))


def test_patches_of_no_weight_have_no_part_in_it() -> None:
    cost, a = far_apart(40, 30, torch.float64)
    b = torch.ones(2, 30, dtype=torch.float64)
    a[:, ::7] = b[:, 3] = 0
    kept = [i for i in range(40) if i % 7], [j for j in range(30) if j != 3]
    with emulated(FLAVOUR, "block", None):
        whole = solve(cost, a, b, eps=0.01, eps_scale="absolute", tol=1e-9)
        part = solve(
            cost[:, kept[0]][:, :, kept[1]], a[:, kept[0]], b[:, kept[1]], eps=0.01, eps_scale="absolute", tol=1e-9
        )
    assert whole.converged.all() and part.converged.all()
    torch.testing.assert_close(whole.transport_cost, part.transport_cost, rtol=1e-8, atol=0)
