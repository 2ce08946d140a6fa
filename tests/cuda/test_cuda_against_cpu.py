"""CPU and GPU agree within rounding: every strategy with types, metrics, patches, groups, weights and layouts."""

from __future__ import annotations

import itertools

import gpu
import pytest
import torch
from cases import HALVES, METRICS, error, features, value_and_gradients, weights
from torch import Tensor

from sfr_ext import cost_matrix, solve, solve_sample

# name: shapes of x and y, patch size. Sizes around what a warp, a tile, a block and a team take.
MAPS: dict[str, tuple[tuple[int, ...], tuple[int, ...], int]] = {
    "one pixel": ((3, 4, 1, 1), (3, 4, 1, 2), 1),
    "small": ((5, 64, 4, 4), (5, 64, 4, 4), 1),
    "ragged": ((2, 37, 5, 6), (2, 37, 3, 9), 1),
    "usual": ((4, 130, 7, 7), (4, 130, 7, 7), 1),
    "groups": ((2, 33, 7, 7), (2, 3, 33, 6, 8), 1),
    "windows": ((2, 9, 7, 8), (2, 9, 6, 7), 2),
    "windows and groups": ((2, 5, 6, 6), (2, 2, 5, 7, 5), 3),
    "tokens": ((2, 50, 24), (2, 31, 24), 1),
    "large": ((1, 40, 14, 14), (1, 40, 14, 14), 1),
    "teams": ((1, 16, 28, 28), (1, 16, 28, 27), 1),
}
TYPES = [torch.float64, torch.float32, *HALVES]
COSTS = {"one": (2, 1, 1), "small": (3, 16, 15), "long": (2, 150, 6), "wide": (2, 5, 230), "square": (2, 97, 97)}
# Largest relative error of values and of gradients, in norm. Both sides stop at a tolerance, so it is that which shows
# in the gradients; a half gradient is rounded on top.
LIMITS = {torch.float64: (1e-9, 1e-6), torch.float32: (1e-5, 2e-3), torch.float16: (1e-5, 4e-3)}
LIMITS[torch.bfloat16] = (1e-5, 1e-2)
TOL = {torch.float64: 1e-11}
# Slow on the emulator, and of nothing that the others are not.
EMULATED_TOO = ("one pixel", "ragged", "windows and groups", "one", "small")


def check(name: str, function, leaves: list[Tensor | None], dtype: torch.dtype) -> None:
    if gpu.EMULATED and name not in EMULATED_TOO:
        pytest.skip("takes long on the emulator")
    with gpu.unwritten_is_nan():
        ours = value_and_gradients(function, *leaves)
    theirs = gpu.on_cpu(lambda *copies: value_and_gradients(function, *copies), *leaves)
    limit, gradient_limit = LIMITS[dtype]
    assert ours[0].device.type == gpu.DEVICE
    assert error(ours[0].cpu(), theirs[0]) <= limit
    for mine, other in zip(ours[1], theirs[1], strict=True):
        assert mine.dtype == other.dtype and mine.stride() == other.stride()
        # Where a gradient vanishes, so does what it could be compared with.
        assert error(mine.cpu(), other) <= gradient_limit or (mine.cpu() - other).abs().max() <= 1e-6


# Of the largest, which the CPU takes long for, a few.
MAP_CASES = [
    (name, metric, dtype, weighted)
    for name, metric, dtype, weighted in itertools.product(MAPS, METRICS, TYPES, (False, True))
    if name not in ("large", "teams") or (metric == "l2" and dtype in (torch.float32, torch.bfloat16) and weighted)
]


@pytest.mark.every_strategy
@pytest.mark.parametrize(("name", "metric", "dtype", "weighted"), MAP_CASES)
def test_maps_agree(name: str, metric: str, dtype: torch.dtype, weighted: bool) -> None:
    x_shape, y_shape, patch = MAPS[name]
    x, y = features(*x_shape, dtype=dtype), features(*y_shape, dtype=dtype)
    if weighted and x.dim() == 4:  # and another layout
        x = x.contiguous(memory_format=torch.channels_last)
    leaves: list[Tensor | None] = [x.requires_grad_(), y.requires_grad_(), None, None]
    if weighted:
        kind = torch.float64 if dtype == torch.float64 else torch.float32
        for index, shape in ((2, x_shape), (3, y_shape)):
            n = shape[-2] if len(x_shape) == 3 else (shape[-2] - patch + 1) * (shape[-1] - patch + 1)
            lead = y_shape[:2] if name == "windows and groups" else shape[:1]  # one for each group, or for all
            side = weights(*lead, n, dtype=kind)
            if n > 2:
                side[0, ..., n // 2] = side[-1, ..., -1] = 0
            leaves[index] = side.requires_grad_()

    def value(x: Tensor, y: Tensor, a: Tensor | None, b: Tensor | None) -> Tensor:
        result = solve_sample(
            x, y, a, b, metric=metric, patch_size=patch, eps=0.2, tol=TOL.get(dtype, 1e-5), max_iter=5000
        )
        return result.transport_cost + 0.5 * result.entropic_cost

    check(name, value, leaves, dtype)


@pytest.mark.every_strategy
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("name", COSTS)
def test_costs_agree(name: str, dtype: torch.dtype) -> None:
    batch, n, m = COSTS[name]
    cost = torch.rand(batch, n, m, dtype=torch.float64).to(dtype).requires_grad_()
    kind = torch.float64 if dtype == torch.float64 else torch.float32
    a, b = weights(batch, n, dtype=kind, grad=True), weights(m, dtype=kind, grad=True)

    def value(cost: Tensor, a: Tensor, b: Tensor) -> Tensor:
        result = solve(cost, a, b, eps=0.2, tol=TOL.get(dtype, 1e-5), max_iter=5000)
        return result.transport_cost + 0.5 * result.entropic_cost

    check(name, value, [cost, a, b], dtype)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("name", MAPS)
def test_cost_matrices_agree(name: str, metric: str, dtype: torch.dtype) -> None:
    x_shape, y_shape, patch = MAPS[name]
    x, y = features(*x_shape, dtype=dtype, grad=True), features(*y_shape, dtype=dtype, grad=True)
    check(name, lambda x, y: cost_matrix(x, y, metric=metric, patch_size=patch), [x, y], dtype)


@pytest.mark.parametrize("metric", METRICS)
def test_iterations_agree(metric: str) -> None:
    """The rules are the same, so the counts differ by what rounding does to the steps of the conjugate gradients."""
    x, y = features(8, 64, 7, 7), features(8, 64, 7, 7)
    ours = solve_sample(x, y, metric=metric, tol=1e-4)
    theirs = gpu.on_cpu(lambda x, y: solve_sample(x, y, metric=metric, tol=1e-4), x, y)
    assert ours.converged.all() and theirs.converged.all()
    counts, expected = ours.n_iter.cpu(), theirs.n_iter
    assert abs(counts.median() - expected.median()) <= 0.2 * expected.median() + 5
    assert counts.max() <= 2 * expected.max() + 10


@pytest.mark.every_strategy
def test_weight_zero_removes_a_patch() -> None:
    """Padding, even with NaN in it, changes what rounding does and no more, and gets no gradient."""
    x, y = features(2, 5, 7, grad=True), features(2, 9, 7, grad=True)
    a, b = weights(2, 5), weights(2, 9)
    keep_x, keep_y = torch.tensor([0, 2, 3, 5, 6]), torch.tensor([1, 2, 3, 4, 5, 6, 8, 9, 10])
    wide_x, wide_y = torch.full((2, 7, 7), torch.nan), torch.full((2, 12, 7), torch.inf)
    wide_x[:, keep_x], wide_y[:, keep_y] = x.detach(), y.detach()
    wide_a, wide_b = torch.zeros(2, 7), torch.zeros(2, 12)
    wide_a[:, keep_x], wide_b[:, keep_y] = a, b

    def value(x: Tensor, y: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return solve_sample(x, y, a, b, tol=1e-5, max_iter=5000).transport_cost

    plain, grads = value_and_gradients(value, x, y, a, b)
    padded, wide = value_and_gradients(value, wide_x.requires_grad_(), wide_y.requires_grad_(), wide_a, wide_b)
    assert error(padded, plain) < 1e-5
    for grad, keep, expected in zip(wide, (keep_x, keep_y), grads, strict=True):
        assert error(grad[:, keep], expected) < 2e-3
        assert grad.count_nonzero() == expected.count_nonzero()
