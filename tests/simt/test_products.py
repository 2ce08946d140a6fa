"""Distances and gradients by products (csrc/cuda/centred.cuh), on the emulator."""

from __future__ import annotations

from collections.abc import Callable

import products_checks as checks
import pytest
import torch
from torch import Tensor

from sfr_ext import cost_matrix, emd_l2, solve_sample
from sfr_ext.ops import forced, launch
from sfr_ext.ops.contracts import Where
from simt import build
from simt.test_kernels import FLAVOUR, emulated

# strategy, KiB of shared memory of a block, whose code: with or without matrix instructions
DEVICES = {
    "automatic": ("automatic", None, 90),
    "cooperative": ("cooperative", None, 90),
    "tiles": ("stream", 8, 90),
    "no matrix instructions": ("automatic", None, 75),
    "tiles, no matrix instructions": ("stream", 8, 75),
}
ARCHS = (90, 75)
EVERYWHERE = [
    checks.costs_are_as_near_as_those_of_differences,
    checks.gradients_are_those_of_float64,
    checks.batch_threads_and_groups_change_no_bit,
    checks.equal_features_are_0_apart,
    checks.what_is_no_number_stays_in_its_problem,
    checks.empty_problems_have_no_gradient,
    checks.copies_have_the_same_bits,
    checks.half_types_are_read,
]


@pytest.mark.parametrize("check", EVERYWHERE, ids=lambda check: check.__name__)
@pytest.mark.parametrize("device", DEVICES)
def test_what_holds_on_a_cpu(device: str, check: Callable[..., None]) -> None:
    strategy, shared, arch = DEVICES[device]
    # A thread adds up more channels one after the other than a CPU does: 9e-7 in 8 million pairs.
    most = {"most": 1.2e-6} if check is checks.costs_are_as_near_as_those_of_differences else {}
    with emulated(FLAVOUR, strategy, 1, shared, arch):
        check(**most)


def some_near(n: int = 37, m: int = 34, channels: int = 40) -> tuple[Tensor, Tensor]:
    """Maps [2, C, H, W]: no pair is near in the first problem, some are in the second."""
    torch.manual_seed(0)
    x, y = torch.randn(2, channels, 1, n), torch.randn(2, channels, 1, m)
    y[1, ..., 3], y[1, ..., 7] = x[1, ..., 5], x[1, ..., 0] + 1e-3
    return x, y


def values_and_gradients(x: Tensor, y: Tensor, **options: object) -> list[Tensor]:
    x, y = x.detach().clone().requires_grad_(), y.detach().clone().requires_grad_()
    value = emd_l2(x, y, eps=0.1, tol=1e-5, reduction="none", **options)
    cost = cost_matrix(x, y)
    return [
        *torch.autograd.grad(value.sum(), (x, y)),
        *torch.autograd.grad(cost, (x, y), torch.linspace(-1, 1, cost.numel()).view_as(cost)),
        value.detach(),
        cost.detach(),
    ]


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("strategy", ["block", "cooperative", "stream"])
@pytest.mark.parametrize("weighted", [False, True])
def test_no_race(strategy: str, weighted: bool, arch: int) -> None:
    x, y = some_near(channels=44)  # the last group of 8 is not whole
    a = torch.ones(2, x.shape[-1])
    a[:, ::4] = 0
    b = torch.ones(2, y.shape[-1])
    b[:, :2] = 0
    options = {"student_weight": a, "teacher_weight": b} if weighted else {}
    right = values_and_gradients(x.double(), y.double(), **options)
    for shared in (None, 6) if strategy == "stream" else (None,):
        with emulated("race", strategy, 1, shared, arch):
            found = values_and_gradients(x, y, **options)
        for ours, theirs in zip(found, right, strict=True):
            assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()


@pytest.mark.parametrize("arch", ARCHS)
def test_products_are_taken(arch: int) -> None:
    """What a pair comes to by differences does not hang on the teacher's first patch."""
    x, y = some_near(40, 36)
    other = y.clone()
    other[..., 0] += 1
    for channels, same in ((31, True), (40, False)):
        with emulated(FLAVOUR, "automatic", 1, arch=arch):
            costs = [cost_matrix(x[:, :channels], z[:, :channels])[..., 1:] for z in (y, other)]
        assert torch.equal(*costs) == same
    with emulated(FLAVOUR, "automatic", 1, arch=arch):  # near pairs are summed by differences
        near = [cost_matrix(x, z)[1, [5, 0], [3, 7]] for z in (y, other)]
    assert torch.equal(*near) and near[0][0] == 0


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("strategy", ["block", "stream"])
def test_removed_patches_are_not_read(strategy: str, arch: int) -> None:
    x, y = some_near(40, 30, 64)
    a, b = torch.rand(2, 40) + 0.1, torch.rand(2, 30) + 0.1
    a[:, ::3] = b[:, :2] = b[:, 9:14] = 0
    kept_a, kept_b = a[0] > 0, b[0] > 0
    x[..., ~kept_a] = y[..., ~kept_b] = torch.nan
    with emulated(FLAVOUR, strategy, 1, arch=arch):
        found = values_and_gradients(x, y, student_weight=a, teacher_weight=b)
        plan = solve_sample(x, y, a, b, eps=0.1, tol=1e-5).plan
        right = values_and_gradients(
            x[..., kept_a], y[..., kept_b], student_weight=a[:, kept_a], teacher_weight=b[:, kept_b]
        )
    torch.testing.assert_close(found[4], right[4], rtol=1e-5, atol=0)
    for ours, theirs, kept in zip(found[:2], right[:2], (kept_a, kept_b), strict=True):
        assert (ours[..., kept] - theirs).abs().max() < 1e-4 * theirs.abs().max()
        assert (ours[..., ~kept] == 0).all()
    assert (plan.sum(-1) - a / a.sum(-1, keepdim=True)).abs().sum() < 1e-3


def test_a_plan_is_made_of_the_costs_that_were_solved() -> None:
    """Those are computed again, some rows at a time, by several blocks."""
    x, y = (torch.randn(1, 64, 1, n) for n in (200, 196))
    y[..., 100] = x[..., 150] + 1e-3
    with emulated(FLAVOUR, "automatic", 1):
        plan = solve_sample(x, y, eps=0.3, tol=1e-6)
        cost = cost_matrix(x, y)
    found = (plan.plan * cost).sum()
    torch.testing.assert_close(found, plan.transport_cost[0], rtol=1e-5, atol=0)


def test_gradients_of_maps_whose_sums_of_weights_lie_in_global_memory() -> None:
    torch.manual_seed(0)
    x, y = (torch.randn(1, 32, 24, 24).requires_grad_() for _ in range(2))
    upstream = torch.rand(1, 576, 576)
    with emulated(FLAVOUR, "automatic", 1):
        found = torch.autograd.grad(cost_matrix(x, y), (x, y), upstream)
    right = torch.autograd.grad(cost_matrix(x.double(), y.double()), (x, y), upstream.double())
    for ours, theirs in zip(found, right, strict=True):
        assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
@pytest.mark.parametrize("at", [0, 20])
def test_a_teacher_that_is_no_number_spoils_no_other(at: int, broken: float, arch: int) -> None:
    """Not even where it is the centre, and others have no weight at all."""
    x, y = torch.randn(1, 40, 1, 40), torch.randn(1, 40, 1, 36)
    y[0, 7, 0, at] = broken
    y.requires_grad_()
    upstream = torch.zeros(1, 40, 36)
    upstream[0, 10:14, 24:28] = 1
    with emulated(FLAVOUR, "automatic", 1, arch=arch):
        (found,) = torch.autograd.grad(cost_matrix(x, y), y, upstream)
    others = [j for j in range(36) if j != at]
    assert found[..., others].isfinite().all() and found[..., 24:28].abs().sum() > 0


def test_a_problem_with_itself_is_symmetric() -> None:
    x, y = some_near(36, 36)
    with emulated(FLAVOUR, "automatic", 1):
        assert emd_l2(x, x.clone(), objective="divergence").abs() < 1e-6
        found = emd_l2(x, y, objective="divergence", reduction="none", tol=1e-6)
    right = emd_l2(x.double(), y.double(), objective="divergence", reduction="none", tol=1e-9)
    torch.testing.assert_close(found.double(), right, rtol=1e-4, atol=1e-6)


def errors(x: Tensor, y: Tensor, arch: int) -> Tensor:
    """Of distances and both gradients, in the largest of each."""
    up = torch.linspace(-1, 1, x.shape[-1] * y.shape[-1]).view(1, x.shape[-1], y.shape[-1])

    def all_of(x: Tensor, y: Tensor, up: Tensor) -> list[Tensor]:
        leaves = x.clone().requires_grad_(), y.clone().requires_grad_()
        cost = cost_matrix(*leaves)
        return [cost.detach(), *torch.autograd.grad(cost, leaves, up)]

    with emulated(FLAVOUR, "automatic", 1, 227, arch):
        found = all_of(x, y, up)
    right = all_of(x.double(), y.double(), up.double())
    return torch.stack([(a - b).abs().max() / b.abs().max() for a, b in zip(found, right, strict=True)])


@pytest.mark.parametrize("n, m", [(33, 33), (49, 64), (64, 57), (65, 130), (17, 200), (196, 16), (3, 113)])
@pytest.mark.parametrize("channels", [32, 33, 39, 72])
def test_matrix_instructions_at_the_ends_of_tiles(n: int, m: int, channels: int) -> None:
    """Of 16 x 8 pairs and 8 channels, units of 64 x 56, one to eight of them for a warp: as near as usual ones."""
    x, y = torch.randn(1, channels, 1, n), torch.randn(1, channels, 1, m)
    found = errors(x, y, 90)
    assert found[0] < 5e-7
    assert (found <= 1.5 * errors(x, y, 75) + 3e-7).all()


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
@pytest.mark.parametrize("channels", [64, 1024])
def test_matrix_instructions_lose_nothing(channels: int, scale: float) -> None:
    """What they add they cut off, always to the same side, which would add up in sums of positive products. Their
    numbers have 11 bits; two of them are taken for each."""
    x, y = (torch.rand(1, channels, 1, n) for n in (49, 40))
    y[..., 0] = 0
    y[..., 1:] += 4  # all on one side of the centre
    x, y = scale * (x + 1), scale * y
    found = errors(x, y, 90)
    assert found[0] < 5e-7
    assert (found <= 1.5 * errors(x, y, 75) + 3e-7).all()


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("n, m, channels, shared", [(65, 7, 48, 227), (49, 49, 36, 99), (130, 150, 32, 5)])
def test_no_race_where_pairs_are_near(n: int, m: int, channels: int, shared: int, arch: int) -> None:
    """Those are summed, and pulled, again: in slices of the channels; or beside what matrix instructions have pulled, a
    part of the maps at a time."""
    x, y = torch.randn(1, channels, 1, n), torch.randn(1, channels, 1, m)
    y[..., : m // 3] = x[..., : m // 3] + 1e-3
    up = torch.randn(1, n, m)

    def all_of(x: Tensor, y: Tensor, up: Tensor) -> list[Tensor]:
        leaves = x.clone().requires_grad_(), y.clone().requires_grad_()
        cost = cost_matrix(*leaves)
        return [cost.detach(), *torch.autograd.grad(cost, leaves, up)]

    with emulated("race", "automatic", 1, shared, arch):
        found = all_of(x, y, up)
    for ours, theirs in zip(found, all_of(x.double(), y.double(), up.double()), strict=True):
        assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()


def test_float64_decides_nothing_for_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a GPU of 9.0 float64 runs the code of the oldest architecture, float32 its own."""
    x, y = some_near(40, 36)
    costs = {}
    for arch in ARCHS:
        with emulated(FLAVOUR, "automatic", 1, 99, arch):
            costs[arch] = cost_matrix(x, y)
    library, device = build.emulator(FLAVOUR), 5
    monkeypatch.setattr(launch, "Where", lambda _, *rest: Where(device, *rest))
    with forced(emulated=build.module(FLAVOUR)):
        for wide, arch in ((True, 75), (False, 90)):
            library.device(device, 4, 99, arch)
            found = cost_matrix(*(z.double() if wide else z for z in (x, y)))
    assert torch.equal(found, costs[90]) and not torch.equal(found, costs[75])
