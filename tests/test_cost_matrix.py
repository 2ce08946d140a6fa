"""Ground costs, forward and backward, against direct differences in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import HALVES, METRICS, error, features, value_and_gradients
from torch import Tensor

from sfr_ext import cost_matrix, reference


def test_values_by_hand() -> None:
    x, y = torch.tensor([[[0.0, 0.0], [3.0, 4.0]]]), torch.tensor([[[3.0, 0.0]]])
    assert cost_matrix(x, y).flatten().tolist() == [3.0, 4.0]
    assert cost_matrix(x, y, metric="sqeuclidean").flatten().tolist() == [9.0, 16.0]
    assert cost_matrix(x, -y, metric="l1").flatten().tolist() == [3.0, 10.0]
    torch.testing.assert_close(cost_matrix(x, y, metric="cosine").flatten(), torch.tensor([1.0, 0.4]))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    ("x_shape", "y_shape", "patch_size"),
    [
        ((2, 5, 4, 3), (2, 5, 3, 5), 1),
        ((2, 5, 4, 3), (2, 5, 3, 5), 2),
        ((1, 3, 5, 5), (1, 3, 3, 3), 3),
        ((2, 3, 4, 4), (2, 4, 3, 2, 3), 1),  # groups
        ((2, 3, 4, 4), (2, 4, 3, 3, 3), 2),
        ((3, 7, 5), (3, 2, 5), 1),  # tokens
        ((3, 7, 5), (3, 2, 2, 5), 1),
    ],
)
def test_gradcheck_and_reference(
    metric: str, x_shape: tuple[int, ...], y_shape: tuple[int, ...], patch_size: int
) -> None:
    x, y = (features(*shape, dtype=torch.float64, grad=True) for shape in (x_shape, y_shape))
    options = {"metric": metric, "patch_size": patch_size}
    torch.testing.assert_close(
        cost_matrix(x, y, **options), reference.cost_matrix(x, y, **options), rtol=1e-12, atol=1e-13
    )
    assert torch.autograd.gradcheck(lambda x, y: cost_matrix(x, y, **options), (x, y), atol=1e-7)


def weighted(function: Any, x: Tensor, y: Tensor, metric: str, upstream: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Costs and gradients for the upstream gradient `upstream`."""
    return value_and_gradients(lambda x, y: function(x, y, metric=metric) * upstream, x, y)


# 1, a vector and its neighbours for every width, the tiles' heights, a panel of channels and its neighbours.
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 23, 24, 25, 31, 32, 33, 49, 64, 65, 97, 130])
@pytest.mark.parametrize("metric", METRICS)
def test_sizes_at_tile_edges(size: int, metric: str) -> None:
    fewest = 2 if metric == "cosine" else 1  # in one dimension cosines are 1 or -1 and gradients 0
    for n, m, channels in ((size, 11, 6), (11, size, 6), (7, 5, max(size, fewest))):
        x, y = features(1, n, channels, grad=True), features(1, m, channels, grad=True)
        upstream = torch.randn(1, n, m)
        cost, grads = weighted(cost_matrix, x, y, metric, upstream)
        expected, expected_grads = weighted(reference.cost_matrix, x.double(), y.double(), metric, upstream)
        assert error(cost, expected) < 2e-6
        for grad, expected_grad in zip(grads, expected_grads, strict=True):
            assert error(grad, expected_grad) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES])
def test_memory_layouts_are_read_in_place_and_agree_to_the_bit(dtype: torch.dtype) -> None:
    x, y = features(2, 70, 5, 7, dtype=dtype), features(2, 70, 4, 6, dtype=dtype)
    wide = features(2, 140, 5, 14, dtype=dtype)
    wide[:, ::2, :, ::2] = x
    upstream = torch.randn(2, 35, 24, dtype=torch.promote_types(dtype, torch.float32))
    results = []
    for layout in (
        x,
        x.contiguous(memory_format=torch.channels_last),
        wide[:, ::2, :, ::2],
        x.transpose(2, 3).contiguous().transpose(2, 3),
        x.flatten(2).transpose(1, 2),  # tokens
    ):
        leaf = layout.detach().requires_grad_()
        other = y.flatten(2).transpose(1, 2) if leaf.dim() == 3 else y
        cost = cost_matrix(leaf, other)
        (grad,) = torch.autograd.grad(cost, leaf, upstream)
        assert grad.shape == leaf.shape and grad.dtype == dtype
        results.append((cost, grad if grad.dim() == 4 else grad.transpose(1, 2).reshape(x.shape)))
    for cost, grad in results[1:]:
        assert torch.equal(cost, results[0][0])
        assert torch.equal(grad, results[0][1])


# A gradient of the costs that is nearly all zeros, as that of exact transport is


def few_entries(shape: tuple[int, ...], of_each_row: int) -> Tensor:
    """So many entries of each row that are not 0, at random columns."""
    chosen = torch.rand(shape).argsort(-1) < of_each_row
    return torch.randn(shape) * chosen


@pytest.mark.parametrize("of_each_row", [0, 1, 2, 4, 5, 9])
@pytest.mark.parametrize("metric", METRICS)
def test_gradients_of_few_entries(metric: str, of_each_row: int) -> None:
    """None, one, as many as there are slots for, and more; both sides, groups, more channels than a panel has."""
    for n, m, channels, groups in ((19, 23, 60, 3), (49, 49, 16, 1), (70, 7, 5, 2)):
        x, y = features(2, n, channels, grad=True), features(2, groups, m, channels, grad=True)
        upstream = few_entries((2, groups, n, m), of_each_row)
        upstream[1, groups - 1] = torch.randn(n, m)  # one of the groups is dense
        _, grads = weighted(cost_matrix, x, y, metric, upstream)
        _, expected = weighted(reference.cost_matrix, x.double(), y.double(), metric, upstream)
        for grad, wanted in zip(grads, expected, strict=True):
            assert error(grad, wanted) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES])
def test_few_entries_in_any_layout(dtype: torch.dtype) -> None:
    x, y = features(2, 70, 5, 7, dtype=dtype), features(2, 70, 4, 6, dtype=dtype)
    upstream = few_entries((2, 35, 24), 1).to(torch.promote_types(dtype, torch.float32))
    gradients = []
    for layout in (x, x.contiguous(memory_format=torch.channels_last), x.transpose(2, 3).contiguous().transpose(2, 3)):
        leaf = layout.detach().requires_grad_()
        gradients += torch.autograd.grad(cost_matrix(leaf, y), leaf, upstream)
    assert torch.equal(gradients[0], gradients[1]) and torch.equal(gradients[0], gradients[2])


@pytest.mark.parametrize("metric", ["l2", "sqeuclidean", "l1"])
def test_patches_without_an_entry_are_not_looked_at(metric: str) -> None:
    """Whatever they hold: the pairs of the others have their gradients."""
    x, y = features(1, 6, 4), features(1, 6, 4)
    upstream = torch.diag(torch.randn(6)).unsqueeze(0)
    upstream[0, 0, 0] = upstream[0, 5, 5] = 0
    _, (wanted,) = value_and_gradients(lambda x: cost_matrix(x, y, metric=metric) * upstream, x.requires_grad_())
    bad_x, bad_y = x.detach().clone(), y.clone()
    bad_x[0, 5], bad_y[0, 0] = float("nan"), float("inf")
    (grad,) = torch.autograd.grad(cost_matrix(bad_x.requires_grad_(), bad_y, metric=metric), bad_x, upstream)
    assert torch.equal(grad[0, :5], wanted[0, :5]) and torch.equal(grad[0, 5], torch.zeros(4))


def test_gradients_of_few_entries_by_several_threads(threads: None) -> None:
    gradients = []
    for count in (1, 3):
        torch.set_num_threads(count)
        torch.manual_seed(0)
        x, y = features(1, 300, 130, grad=True), features(1, 300, 130, grad=True)
        gradients.append(torch.autograd.grad(cost_matrix(x, y), (x, y), few_entries((1, 300, 300), 1)))
    assert all(torch.equal(one, three) for one, three in zip(*gradients, strict=True))


def test_channels_last_gradient_keeps_its_layout() -> None:
    x = features(2, 8, 4, 4).contiguous(memory_format=torch.channels_last).requires_grad_()
    cost_matrix(x, features(2, 8, 4, 4)).sum().backward()
    assert x.grad is not None and x.grad.is_contiguous(memory_format=torch.channels_last)


def test_expanded_input() -> None:
    x = features(1, 6, 3, 3).expand(4, -1, -1, -1)
    y = features(4, 6, 3, 3)
    assert torch.equal(cost_matrix(x, y), cost_matrix(x.contiguous(), y))


@pytest.mark.parametrize("dtype", HALVES)
def test_half_inputs_are_read_exactly(dtype: torch.dtype) -> None:
    """Every value whose square float32 can hold, subnormal ones of float16 included, is the number it stands for."""
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    size = values.float().abs()
    values = values[(size == 0) | ((size > 1e-18) & (size < 1e18))]
    tokens = values.reshape(1, -1, 1)
    assert torch.equal(cost_matrix(tokens, torch.zeros(1, 1, 1)).flatten(), values.float().abs())


@pytest.mark.parametrize("dtype", HALVES)
def test_half_gradients_are_rounded_to_nearest(dtype: torch.dtype) -> None:
    x = features(1, 40, 64, dtype=dtype)
    y = features(1, 30, 64, dtype=dtype)
    _, (half,) = value_and_gradients(cost_matrix, x.requires_grad_(), y)
    _, (single,) = value_and_gradients(cost_matrix, x.float().detach().requires_grad_(), y.float())
    assert torch.equal(half, single.to(dtype))


def test_coincident_patches_have_cost_and_gradient_zero() -> None:
    x = features(1, 4, 3, 3, grad=True)
    cost, (grad,) = value_and_gradients(lambda x: cost_matrix(x, x.detach()).diagonal(dim1=1, dim2=2), x)
    assert torch.equal(cost, torch.zeros(1, 9)) and torch.equal(grad, torch.zeros_like(x))


def test_zero_vectors_under_cosine() -> None:
    x = torch.zeros(1, 2, 4, requires_grad=True)
    cost, (grad,) = value_and_gradients(cost_matrix, x, features(1, 3, 4), metric="cosine")
    assert torch.equal(cost, torch.ones(1, 2, 3)) and torch.equal(grad, torch.zeros_like(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES])
@pytest.mark.parametrize("patch_size", [1, 2])
def test_l1_is_signs(dtype: torch.dtype, patch_size: int) -> None:
    """d/dx = sign(x - y), 0 where the two are equal, in every pair of windows that a value is part of."""
    torch.manual_seed(1)
    x, y = (torch.randint(-2, 3, (2, 37, 5, h)).to(dtype).requires_grad_() for h in (4, 3))  # many coincide
    upstream = torch.randint(-4, 5, (2, (6 - patch_size) * (5 - patch_size), (6 - patch_size) * (4 - patch_size)))

    def signs(x: Tensor, y: Tensor) -> Tensor:
        p, q = (F.unfold(z, patch_size).mT for z in (x, y))
        return (p[:, :, None] - q[:, None]).sign() * upstream[..., None]

    expected = signs(x.detach().double(), y.detach().double())
    cost, grads = value_and_gradients(
        lambda x, y: cost_matrix(x, y, metric="l1", patch_size=patch_size) * upstream, x, y
    )
    found = [F.fold(side.mT, (5, width), patch_size) for side, width in ((expected.sum(2), 4), (-expected.sum(1), 3))]
    assert all(torch.equal(grad, other.to(dtype)) for grad, other in zip(grads, found, strict=True))
    exact = reference.cost_matrix(x, y, metric="l1", patch_size=patch_size) * upstream
    assert torch.equal(cost.double(), exact)


@pytest.mark.parametrize("metric", METRICS)
def test_what_is_not_finite_stays_in_its_own_problem(metric: str) -> None:
    x, y = features(3, 5, 7, grad=True), features(3, 4, 7, grad=True)
    with torch.no_grad():
        x[1, 2, 3] = float("nan")
    cost, (grad_x, grad_y) = value_and_gradients(cost_matrix, x, y, metric=metric)
    assert cost[1, 2].isnan().all() and cost[[0, 2]].isfinite().all()
    assert grad_x[1, 2, 3].isnan() and grad_y[1, :, 3].isnan().all()
    assert grad_x[[0, 2]].isfinite().all() and grad_y[[0, 2]].isfinite().all()


def test_no_cancellation_between_neighbours_far_from_the_origin() -> None:
    """Where |x|^2 + |y|^2 - 2 x.y has no digit left, direct differences have them all."""
    x = features(1, 20, 64) + 100
    y = x + 1e-3 * features(1, 20, 64)
    exact = reference.cost_matrix(x, y)
    assert error(cost_matrix(x, y), exact) < 1e-6
    assert error(torch.cdist(x, y, compute_mode="use_mm_for_euclid_dist"), exact) > 1e-6
    _, (ours,) = value_and_gradients(lambda x, y: cost_matrix(x, y).diagonal(dim1=1, dim2=2), x.requires_grad_(), y)
    _, (expected,) = value_and_gradients(
        lambda x, y: reference.cost_matrix(x, y).diagonal(dim1=1, dim2=2),
        x.double().detach().requires_grad_(),
        y.double(),
    )
    assert error(ours, expected) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("metric", METRICS)
def test_error_is_at_most_twice_that_of_plain_torch(dtype: torch.dtype, metric: str) -> None:
    def plain(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        if metric == "cosine":
            x, y = F.normalize(x.float(), dim=-1), F.normalize(y.float(), dim=-1)
            return 1 - x @ y.transpose(1, 2)
        difference = x.float()[:, :, None] - y.float()[:, None]
        if metric == "l1":
            return difference.abs().sum(-1)
        return difference.norm(dim=-1) if metric == "l2" else difference.square().sum(-1)

    x, y = features(2, 33, 200, dtype=dtype, grad=True), features(2, 21, 200, dtype=dtype, grad=True)
    upstream = torch.randn(2, 33, 21)
    ours = weighted(cost_matrix, x, y, metric, upstream)
    theirs = value_and_gradients(lambda x, y: plain(x, y) * upstream, x, y)
    exact = weighted(reference.cost_matrix, x.double(), y.double(), metric, upstream)
    for mine, other, truth in zip([ours[0], *ours[1]], [theirs[0], *theirs[1]], [exact[0], *exact[1]], strict=True):
        assert error(mine, truth) <= 2 * error(other, truth) + torch.finfo(torch.float32).eps
