"""Systems that conjugate gradients take too long for are factorised on either device."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sfr_ext import OTResult, cost_matrix, solve
from simt.test_kernels import FLAVOUR, SEEDS, emulated

# Strategy, patches, KiB of shared memory: plans in registers of one warp and of four; in shared memory, held by threads
# while products are taken, and not; with factors that have no room there; of several blocks.
SHAPES = [
    ("warp", 20, 24, None),
    ("warp", 24, 20, None),
    ("block", 40, 49, None),
    ("block", 49, 40, None),
    ("block", 30, 110, None),
    ("block", 70, 12, None),
    ("block", 49, 40, 48),
    ("block", 90, 101, 227),
    ("cooperative", 40, 49, None),
    ("cooperative", 49, 40, None),
    ("stream", 40, 49, None),
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
    result = solve(cost, a, eps=0.005, tol=tol, reach=reach, max_iter=5_000)
    return result, *torch.autograd.grad((result.transport_cost + 0.5 * result.entropic_cost).sum(), (cost, a))


@pytest.mark.parametrize("reach", [None, 2.0])
@pytest.mark.parametrize(("strategy", "n", "m", "shared"), SHAPES)
def test_both_devices_take_the_same_steps(
    strategy: str, n: int, m: int, shared: int | None, reach: float | None
) -> None:
    """In float64, where sums in another order change hardly anything: some steps of conjugate gradients of many."""
    problem = far_apart(n, m, torch.float64)
    ours, *expected = solved(*problem, tol=1e-9, reach=reach)
    with emulated(FLAVOUR, strategy, None, shared):
        theirs, *found = solved(*problem, tol=1e-9, reach=reach)
    assert theirs.converged.all() and (theirs.n_iter - ours.n_iter).abs().max() <= 10
    torch.testing.assert_close(theirs.transport_cost, ours.transport_cost, rtol=1e-9, atol=0)
    for ours_, theirs_ in zip(expected, found, strict=True):
        torch.testing.assert_close(theirs_, ours_, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(("strategy", "n", "m", "shared"), SHAPES)
def test_gradients_that_conjugate_gradients_do_not_find(strategy: str, n: int, m: int, shared: int | None) -> None:
    cost, a = far_apart(n, m, torch.float32)
    _, *expected = solved(cost.double(), a.double(), tol=1e-9)
    with emulated(FLAVOUR, strategy, None, shared):
        _, *found = solved(cost, a, tol=1e-5)
    for theirs, ours in zip(found, expected, strict=True):
        torch.testing.assert_close(theirs.double(), ours, rtol=0, atol=5e-3 * float(ours.abs().max()))


QUICK = [pytest.param(*shape, marks=[pytest.mark.quick] if shape[1] in (24, 49) else []) for shape in SHAPES]


@pytest.mark.parametrize(("strategy", "n", "m", "shared"), QUICK)
def test_factors_have_no_race_and_the_same_bits_under_every_schedule(
    strategy: str, n: int, m: int, shared: int | None
) -> None:
    problem = far_apart(n, m, torch.float32)
    results = []
    for flavour, seed in (("race", 1), *((FLAVOUR, seed) for seed in SEEDS)):
        with emulated(flavour, strategy, seed, shared):
            result, *gradients = solved(*problem, tol=1e-5)
        results.append([result.transport_cost, result.f, result.n_iter, *gradients])
    for other in results[1:]:
        assert all(torch.equal(theirs, ours) for theirs, ours in zip(other, results[0], strict=True))


@pytest.mark.parametrize(("strategy", "more"), [("block", 9), ("block", 40), ("cooperative", 40), ("automatic", 240)])
def test_padding_of_no_weight_changes_nothing(strategy: str, more: int) -> None:
    """Neither whether systems are factorised, nor over which side; to more patches than are factorised, too."""
    cost, a = far_apart(40, 49, torch.float64)
    b = torch.ones(2, 49, dtype=torch.float64)

    def padded(x: Tensor, *last: int) -> Tensor:
        return torch.nn.functional.pad(x, last, value=0.7 if x is cost else 0.0)

    options = {"eps": 0.01, "eps_scale": "absolute", "tol": 1e-9, "reach": 1.0}
    with emulated(FLAVOUR, strategy, None, 227):
        results = []
        for problem in ((cost, a, b), (padded(cost, 0, more, 0, 3 * more), padded(a, 0, 3 * more), padded(b, 0, more))):
            inputs = [x.clone().requires_grad_() for x in problem]
            result = solve(*inputs, **options)
            results.append((result, *torch.autograd.grad(result.transport_cost.sum(), inputs)))
    (bare, *expected), (whole, *found) = results
    assert (whole.n_iter - bare.n_iter).abs().max() <= 10
    torch.testing.assert_close(whole.transport_cost, bare.transport_cost, rtol=1e-9, atol=0)
    torch.testing.assert_close(found[0][:, :40, :49], expected[0], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(found[1][:, :40], expected[1], rtol=1e-6, atol=1e-9)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("n", "m"), [(2, 225), (4, 150), (25, 37), (37, 25)])
def test_integer_costs_take_the_iterations_that_they_take_on_a_cpu(n: int, m: int, dtype: torch.dtype) -> None:
    """Nearly all mass lies between parts of the plan that hardly touch; conjugate gradients took up to 1,216."""
    generator = torch.Generator().manual_seed(n * m)
    cost = torch.randint(0, 4, (48, n, m), generator=generator).to(dtype)
    a, b = (torch.rand(48, k, generator=generator, dtype=torch.float64).to(dtype) + 0.1 for k in (n, m))
    ours = solve(cost, a, b)
    with emulated(FLAVOUR, "automatic", None, 227):
        theirs = solve(cost, a, b)
    assert theirs.converged.all() and theirs.n_iter.max() < 200
    assert (theirs.n_iter - ours.n_iter).abs().max() <= 20
