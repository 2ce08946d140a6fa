"""Same input, same bits: run to run, in any batch, with any number of threads; and NaN stays where it is."""

from __future__ import annotations

import pytest
import torch
from cases import METRICS, OBJECTIVES, features, value_and_gradients, weights
from torch import Tensor

from sfr_ext import cost_matrix, emd_l2, solve, solve_sample

# One block of rows; several; with groups; windows.
SHAPES = [
    ((3, 40, 7, 7), (3, 40, 7, 7), 1),
    ((3, 20, 14, 14), (3, 20, 14, 14), 1),
    ((3, 16, 11, 11), (3, 2, 16, 7, 5), 1),
    ((2, 6, 12, 12), (2, 6, 11, 11), 2),
]


def everything(x: Tensor, y: Tensor, a: Tensor, b: Tensor, patch_size: int, metric: str = "l2") -> list[Tensor]:
    x, y = x.detach().requires_grad_(), y.detach().requires_grad_()
    a, b = a.detach().requires_grad_(), b.detach().requires_grad_()
    result = solve_sample(x, y, a, b, patch_size=patch_size, metric=metric)
    value = result.transport_cost - 2 * result.entropic_cost
    return [value, result.f, result.g, result.n_iter, *torch.autograd.grad(value.sum(), (x, y, a, b))]


def problem(
    shapes: tuple[tuple[int, ...], tuple[int, ...], int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    x_shape, y_shape, k = shapes
    grids = [(s[-2] - k + 1) * (s[-1] - k + 1) for s in (x_shape, y_shape)]
    a, b = weights(x_shape[0], grids[0]), weights(x_shape[0], grids[1])
    a[0, 1] = b[1, 0] = 0
    return features(*x_shape), features(*y_shape), a, b, k


@pytest.mark.every_strategy
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("shapes", SHAPES)
def test_bits_do_not_depend_on_run_threads_or_batch(
    shapes: tuple[tuple[int, ...], tuple[int, ...], int], metric: str, threads: None
) -> None:
    *inputs, k = problem(shapes)
    torch.set_num_threads(1)
    expected = everything(*inputs, k, metric)
    for count in (1, 2, 3, 5, 8):
        torch.set_num_threads(count)
        for ours, theirs in zip(everything(*inputs, k, metric), expected, strict=True):
            assert torch.equal(ours, theirs)
    for i in range(len(inputs[0])):
        for count in (1, 4):
            torch.set_num_threads(count)
            alone = everything(*(t[i : i + 1] for t in inputs), k, metric)
            for ours, theirs in zip(alone, expected, strict=True):
                assert torch.equal(ours[0], theirs[i])


def test_teams_of_threads_on_one_large_problem(threads: None) -> None:
    """784 x 784: blocks of rows and columns, more threads than cores."""
    cost = torch.rand(1, 784, 784)
    results = []
    for count in (1, 2, 7):
        torch.set_num_threads(count)
        leaf = cost.clone().requires_grad_()
        result = solve(leaf, tol=1e-2, eps=0.1)
        (grad,) = torch.autograd.grad(result.transport_cost.sum(), leaf)
        results.append((result.transport_cost, result.g, grad))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def of_features(x: Tensor, y: Tensor, metric: str, patch_size: int) -> list[Tensor]:
    """A dense upstream gradient, one of few entries, and every solver, of one problem that several threads share."""
    cost = cost_matrix(x, y, metric=metric, patch_size=patch_size)
    few = torch.eye(*cost.shape[-2:]).expand_as(cost)
    results = [cost, *torch.autograd.grad(cost, (x, y), torch.ones_like(cost), retain_graph=True)]
    results += torch.autograd.grad(cost, (x, y), few)
    for solver in ("exact", "sinkhorn"):
        value = emd_l2(x, y, metric=metric, patch_size=patch_size, solver=solver, max_iter=20)
        results += [value, *torch.autograd.grad(value, (x, y))]
    return results


@pytest.mark.parametrize("patch_size", [1, 2])
@pytest.mark.parametrize("metric", METRICS)
def test_teams_of_threads_on_many_channels(metric: str, patch_size: int, threads: None) -> None:
    """Panels of channels, each of which any thread of the team may take."""
    x, y = features(1, 300, 20, 17, grad=True), features(1, 300, 17, 20, grad=True)
    torch.set_num_threads(1)
    expected = of_features(x, y, metric, patch_size)
    for count in (2, 3, 8) * 4:
        torch.set_num_threads(count)
        assert all(map(torch.equal, of_features(x, y, metric, patch_size), expected))


@pytest.mark.every_strategy
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_nan_and_inf_stay_in_their_own_problem(side: str, metric: str, objective: str, bad: float) -> None:
    x, y = features(3, 8, 5, 5, grad=True), features(3, 8, 4, 4, grad=True)
    options = {"metric": metric, "objective": objective, "reduction": "none"}
    clean, clean_grads = value_and_gradients(lambda x, y: emd_l2(x, y, **options), x, y)
    broken_x, broken_y = x.detach().clone(), y.detach().clone()
    (broken_x if side == "student" else broken_y)[1, 3, 2, 2] = bad
    value, grads = value_and_gradients(
        lambda x, y: emd_l2(x, y, **options), broken_x.requires_grad_(), broken_y.requires_grad_()
    )
    others = torch.tensor([0, 2])
    assert value[1].isnan() and torch.equal(value[others], clean[others])
    for grad, clean_grad in zip(grads, clean_grads, strict=True):
        assert grad[1].isnan().all() and torch.equal(grad[others], clean_grad[others])
    result = solve_sample(broken_x, broken_y, metric=metric)
    assert result.converged.tolist() == [True, False, True]


@pytest.mark.every_strategy
def test_nan_in_one_group_leaves_the_other_teachers_alone() -> None:
    x, y = features(2, 6, 4, 4, grad=True), features(2, 3, 6, 4, 4)
    y[1, 2, 0, 0, 0] = torch.nan
    value, (grad_x, grad_y) = value_and_gradients(lambda x, y: emd_l2(x, y, reduction="none"), x, y.requires_grad_())
    assert value.isnan().nonzero().tolist() == [[1, 2]]
    assert grad_x[0].isfinite().all() and grad_x[1].isnan().all()
    assert grad_y[1, 2].isnan().all() and grad_y[1, :2].isfinite().all() and grad_y[0].isfinite().all()


@pytest.mark.every_strategy
def test_weights_of_a_broken_problem_get_nan() -> None:
    cost = torch.rand(2, 4, 5)
    cost[0, 1, 1] = torch.nan
    a = torch.ones(2, 4, requires_grad=True)
    (grad,) = torch.autograd.grad(solve(cost, a).transport_cost.sum(), a)
    assert grad[0].isnan().all() and grad[1].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("spread", [0.0, 1.0, 5.0])
@pytest.mark.parametrize("options", [{}, {"reach": 1.0}, {"reach": (None, 0.3), "eps_scale": "absolute"}], ids=str)
def test_padding_changes_no_bit(options: dict[str, object], spread: float, dtype: torch.dtype) -> None:
    """Patches of weight 0 anywhere between the others, with a NaN for their costs."""
    for n, m in ((1, 1), (5, 7), (17, 3), (48, 49), (97, 64)):
        cost = torch.rand(n, m, dtype=dtype)
        a, b = ((spread * torch.randn(k, dtype=dtype)).softmax(0) for k in (n, m))
        i, j = (torch.randperm(150)[:k].sort().values for k in (n, m))
        wide = torch.full((150, 150), torch.nan, dtype=dtype)
        wide[i[:, None], j] = cost
        wide_a, wide_b = torch.zeros(150, dtype=dtype), torch.zeros(150, dtype=dtype)
        wide_a[i], wide_b[j] = a, b
        ours, expected = solve(wide, wide_a, wide_b, **options), solve(cost, a, b, **options)
        for name in ("transport_cost", "entropic_cost", "n_iter", "marginal_error", "eps"):
            assert torch.equal(getattr(ours, name), getattr(expected, name)), (n, m, name)
        assert torch.equal(ours.f[i], expected.f) and torch.equal(ours.g[j], expected.g)
        assert torch.equal(ours.plan[i[:, None], j], expected.plan)
        assert ours.plan.count_nonzero() == expected.plan.count_nonzero()
