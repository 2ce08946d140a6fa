"""Operations that a CPU does in one pass: exact transport of features, pooled directions. The same as one by one."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from cases import weights
from torch import Tensor

from sfr_ext import emd_l2, ops
from sfr_ext.ops import ExactOptions, Ground
from sfr_ext.sfr import maps
from sfr_ext.transport import prices

pytestmark = pytest.mark.cpu_only("these operations are a CPU's alone")

EXACT = torch.ops.sfr_ext.exact_emd_forward.default
DIRECTIONS = torch.ops.sfr_ext.directions_forward.default
METRICS = ("l2", "sqeuclidean", "l1")


def one_by_one(x: Tensor, y: Tensor, a: Tensor | None, b: Tensor | None, metric: str, options: ExactOptions) -> list:
    cost = ops.cost_forward(x, y, *Ground(ops.METRICS[metric], 1))
    return list(ops.exact_forward(cost if cost.dim() == 4 else cost.unsqueeze(1), a, b, *options, "emd_l2"))


def in_one_pass(x: Tensor, y: Tensor, a: Tensor | None, b: Tensor | None, metric: str, options: ExactOptions) -> list:
    return list(ops.exact_emd_forward(x, y, a, b, *Ground(ops.METRICS[metric], 1), *options, "emd_l2"))


def removing(weight: Tensor) -> Tensor:
    weight = weight.clone()
    weight[..., 1::3] = 0
    return weight


PRICED = ExactOptions(0.4, math.inf, True)
CASES: dict[str, tuple[tuple[int, ...], tuple[int, ...], bool, bool, ExactOptions]] = {
    # student, teacher, weighted, some removed, options
    "groups": ((2, 16, 7, 7), (2, 3, 16, 7, 7), False, False, ExactOptions(features=True)),
    "one": ((2, 5, 4, 4), (2, 5, 4, 4), False, False, ExactOptions(features=True)),
    "wide": ((2, 60, 3, 3), (2, 2, 60, 3, 4), True, False, ExactOptions(features=True)),
    "turned": ((2, 9, 5), (2, 2, 4, 5), True, True, ExactOptions(features=True)),
    "left behind": ((2, 6, 4, 5), (2, 6, 3, 3), True, False, PRICED),
}


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("case", CASES)
def test_exact_values_and_gradients(case: str, metric: str, dtype: torch.dtype = torch.float32) -> None:
    of_x, of_y, weighted, removed, options = CASES[case]
    x, y = torch.randn(of_x, requires_grad=True), torch.randn(of_y, requires_grad=True)
    a = b = None
    if weighted:
        n, m = (math.prod(s[-2:]) if len(of_x) == 4 else s[-2] for s in (of_x, of_y))
        a, b = weights(2, n), weights(*of_y[: len(of_y) - len(of_x) + 1], m)
        a, b = (removing(w) if removed else w for w in (a, b))
        a.requires_grad_(), b.requires_grad_()
    inputs = [t for t in (x, y, a, b) if t is not None]
    found, expected = (f(x, y, a, b, metric, options) for f in (in_one_pass, one_by_one))
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)
    upstream = torch.randn_like(found[0])
    for ours, theirs in zip(*(torch.autograd.grad(out[0], inputs, upstream) for out in (found, expected)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=2e-7)


def test_exact_gradients_of_one_patch_that_gives_to_all() -> None:
    x, y = torch.randn(1, 3, 1, 1, requires_grad=True), torch.randn(1, 3, 6, 7, requires_grad=True)
    ours = torch.autograd.grad(emd_l2(x, y, solver="exact"), (x, y))
    theirs = torch.autograd.grad(torch.linalg.vector_norm(x - y, dim=1).mean(), (x, y))
    for found, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found, expected)


def test_exact_gradcheck() -> None:
    x, y = (torch.randn(2, *shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 2, 3), (2, 3, 2, 3)))
    a, b = weights(2, 6, dtype=torch.float64, grad=True), weights(2, 2, 6, dtype=torch.float64, grad=True)
    for metric in METRICS:
        torch.autograd.gradcheck(
            lambda *inputs, metric=metric: in_one_pass(*inputs, metric, ExactOptions(features=True))[0], (x, y, a, b)
        )


def test_exact_equal_patches_have_no_slope() -> None:
    x = torch.rand(2, 4, 3, 3, requires_grad=True)
    assert not torch.autograd.grad(emd_l2(x, x.detach().flip(-1), solver="exact"), x)[0].any()


def test_exact_a_nan_stays_in_its_problem() -> None:
    x, y = torch.randn(2, 4, 3, 3), torch.randn(2, 2, 4, 3, 3)
    y[0, 1, 2, 1, 1] = math.nan
    x.requires_grad_(), y.requires_grad_()
    value = emd_l2(x, y, solver="exact", reduction="none")
    assert value.isnan().tolist() == [[False, True], [False, False]]
    of_x, of_y = torch.autograd.grad(value.sum(), (x, y))
    assert of_x[0].isnan().all() and of_x[1].isfinite().all()
    assert of_y[0, 1].isnan().all() and of_y[0, 0].isfinite().all() and of_y[1].isfinite().all()
    x = torch.randn(1, 4, 3, 3)
    x[0, :, 0, 1] = math.nan
    kept = (~x[:, 0].isnan()).float()
    x.requires_grad_()
    value = emd_l2(x, y[1:, 0], student_weight=kept, solver="exact")
    (grad,) = torch.autograd.grad(value, x)
    assert value.isfinite() and grad.isfinite().all() and not grad[0, :, 0, 1].any()


def test_exact_second_derivatives() -> None:
    x, y = torch.randn(1, 3, 2, 3, dtype=torch.float64), torch.randn(1, 2, 3, 2, 3, dtype=torch.float64)
    x.requires_grad_()

    def twice(value: Callable[..., list]) -> Tensor:
        out = value(x, y, None, None, "l2", ExactOptions(features=True))[0]
        (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), x)[0]

    torch.testing.assert_close(twice(in_one_pass), twice(one_by_one))
    a = weights(1, 6, dtype=torch.float64, grad=True)
    value = emd_l2(x, y, student_weight=a, solver="exact")
    (grad,) = torch.autograd.grad(value, x, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives .* are not implemented"):
        torch.autograd.grad(grad.sum(), a)


def test_exact_does_not_depend_on_threads() -> None:
    x, y = torch.randn(3, 8, 7, 7, requires_grad=True), torch.randn(3, 2, 8, 7, 7)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 8):
            torch.set_num_threads(threads)
            value = emd_l2(x, y, solver="exact", reduction="none")
            results.append((value, *torch.autograd.grad(value.sum(), x)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(p, q) for p, q in zip(results[0], other, strict=True))


def test_what_is_left_to_two_operations() -> None:
    """Windows and the cosine: values that agree with the plan's own."""
    for more in ({"patch_size": 2}, {"metric": "cosine"}):
        x, y = torch.randn(1, 4, 4, 4, requires_grad=True), torch.randn(1, 4, 4, 4)
        assert torch.autograd.grad(emd_l2(x, y, solver="exact", **more), x)[0].any()


def test_operators() -> None:
    x, y = torch.rand(2, 3, 2, 2, requires_grad=True), torch.rand(2, 2, 3, 2, 2, requires_grad=True)
    a, b = weights(2, 4, grad=True), weights(2, 2, 4, grad=True)
    rest = (*Ground(ops.METRICS["l2"], 1), *prices(ops.SolverOptions(0.0, False), features=True), "emd_l2")
    torch.library.opcheck(EXACT, (x, y, a, b, *rest))
    torch.library.opcheck(EXACT, (x, y, None, None, *rest))
    torch.library.opcheck(DIRECTIONS, (torch.rand(2, 4, 4, 6, requires_grad=True), 2, 2, 3))


# ---------------------------------------------------------------------------------------------- directions

GRIDS = [((3, 16, 28, 28), 1, 7, 7), ((3, 32, 14, 14), 2, 7, 7), ((3, 8, 7, 7), 4, 7, 7), ((2, 6, 9, 12), 3, 3, 4)]
GRIDS += [((2, 4, 5, 5), 1, 1, 1), ((0, 4, 4, 4), 2, 2, 2)]


def plain(x: Tensor, groups: int, height: int, width: int) -> Tensor:
    return maps.unit(F.adaptive_avg_pool2d(x, (height, width)).unflatten(1, (groups, -1)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("shape", "groups", "height", "width"), GRIDS)
def test_directions(shape: tuple[int, ...], groups: int, height: int, width: int, dtype: torch.dtype) -> None:
    x = torch.randn(shape, dtype=dtype).relu()
    dead = slice(shape[2] // height), slice(shape[3] // width)
    x[:1, :, dead[0], dead[1]] *= 1e-6  # below the floor
    x[1:2, :, dead[0], dead[1]] = 0
    x.requires_grad_()
    assert ops.directions_in_one_pass(x, height, width)
    found, expected = maps.directions(x, groups, height, width), plain(x, groups, height, width)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-14
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    upstream = torch.randn_like(found)
    ours, theirs = (torch.autograd.grad(out, x, upstream)[0] for out in (found, expected))
    if len(x):
        # By the largest of each pixel's channels: those below the floor have thousands of times the gradient.
        apart, largest = (t.abs().amax(1) for t in (ours - theirs, theirs))
        assert (apart <= 5 * tolerance * largest).all()


def test_directions_of_other_strides_and_what_has_none() -> None:
    x = torch.rand(2, 4, 6, 12)
    for view in (x[:, :, ::2], x[:, 1:3, :, 3:9], x[:, :1].expand(2, 4, 6, 12)):
        height, width = view.shape[2] // 3, view.shape[3] // 3
        torch.testing.assert_close(maps.directions(view, 2, height, width), plain(view, 2, height, width))
    assert not ops.directions_in_one_pass(x.to(memory_format=torch.channels_last), 3, 3)
    assert not ops.directions_in_one_pass(x, 4, 3)
    assert not ops.directions_in_one_pass(x.half(), 3, 3)


def test_directions_of_a_nan_are_nan_in_its_map_alone() -> None:
    x = torch.rand(2, 4, 4, 4)
    x[1, 0, 1, 1] = math.nan
    found = maps.directions(x, 2, 2, 2)
    assert found.isnan().flatten(2).all(2).tolist() == [[False, False], [True, False]]
    assert torch.equal(found.isnan(), plain(x, 2, 2, 2).isnan())


def test_directions_second_derivatives() -> None:
    x = torch.rand(2, 4, 4, 6, dtype=torch.float64, requires_grad=True)
    results = []
    for value in (maps.directions, plain):
        (grad,) = torch.autograd.grad(value(x, 2, 2, 3).pow(3).sum(), x, create_graph=True)
        results.append(torch.autograd.grad(grad.square().sum(), x)[0])
    torch.testing.assert_close(*results)


def test_directions_under_transforms_of_torch_func() -> None:
    x = torch.rand(3, 2, 4, 4, 4, dtype=torch.float64)

    def value(x: Tensor) -> Tensor:
        return maps.directions(x, 2, 2, 2).pow(3).sum()

    each = torch.func.vmap(torch.func.grad(value))(x)
    assert torch.equal(each, torch.stack([torch.func.grad(value)(part) for part in x]))
