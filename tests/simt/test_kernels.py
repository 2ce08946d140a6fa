"""The real kernels on the emulator: no race, the same bits under every schedule, and the values of the CPU's kernels.

Small problems, for every strategy; what the operations are worth is tested elsewhere.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import not_finite
import pytest
import torch
from cases import METRICS, error, features, weights
from torch import Tensor

from sfr_ext import cost_matrix, solve, solve_sample
from sfr_ext.ops import STRATEGIES, Ground, Pair, SolverOptions, emd, forced, launch, saved
from sfr_ext.ops.contracts import METHODS, Where
from sfr_ext.ops.contracts import METRICS as METRIC_NUMBERS
from sfr_ext.ops.emd import features_backward, solve_features
from sfr_ext.ops.gradients import NeedPair
from sfr_ext.ops.solved import Upstream
from simt import build

# What the sanitizers' process runs again with its own flavour.
FLAVOUR = os.environ.get("SFR_SIMT_FLAVOUR", "plain")

# Shapes of x and y, patch size, type.
Maps = tuple[tuple[int, ...], tuple[int, ...], int, torch.dtype]
MAPS: dict[str, Maps] = {
    "small": ((2, 5, 3, 3), (2, 5, 2, 4), 1, torch.float32),
    "groups": ((2, 9, 4, 5), (2, 3, 9, 5, 4), 1, torch.float32),
    "bfloat16": ((1, 40, 7, 7), (1, 40, 7, 7), 1, torch.bfloat16),
    "windows": ((2, 3, 5, 6), (2, 2, 3, 4, 5), 2, torch.float32),
    "float64": ((1, 17, 8, 9), (1, 17, 7, 7), 3, torch.float64),
    "slabs": ((1, 3, 9, 9), (1, 3, 6, 11), 1, torch.float32),  # the last tiles are not whole
    "rounds": ((1, 8, 17, 17), (1, 8, 2, 2), 1, torch.bfloat16),  # panels larger than what is fetched at once
    "one pixel": ((3, 4, 1, 1), (3, 4, 1, 2), 1, torch.float32),
}
COSTS = {"small": (3, 9, 8), "square": (1, 33, 33), "long": (1, 70, 6), "wide": (2, 5, 130), "thirds": (1, 40, 70)}
# What 8 warps of a block hold of a plan at most, in rows and in columns.
COSTS |= {"held rows": (1, 224, 12), "held columns": (1, 13, 200)}
# What else a problem can be: with reaches of its sides, an eps of its own, symmetric; and how it may be iterated on.
BALANCED = {
    "eps": 0.2,
    "reach": (0.0, 0.0),
    "relative": True,
    "given": False,
    "symmetric": False,
    "method": "automatic",
    "least": None,
}
KINDS: dict[str, dict[str, Any]] = {
    "reach": {"reach": (0.5, 0.8)},
    "one reach": {"reach": (0.0, 1.0), "relative": False, "method": "relaxed"},
    "given": {"given": True, "method": "plain"},
    "given, reach": {"reach": (0.7, 0.0), "given": True},
    "symmetric": {"given": True, "symmetric": True},
    "symmetric, reach": {"reach": (0.7, 0.7), "symmetric": True},
    "small": {"eps": 0.03},  # which is approached from larger ones
    "small, reach": {"eps": 0.03, "reach": (0.0, 0.7)},
    # Weights that are small, and so small that the plan does not show them.
    "small weights": {"least": (1e-7, 1e-12)},
    "light": {"least": (1e-30, 1e-250)},
    "light, reach": {"least": (1e-30, 1e-250), "reach": (0.5, 0.0)},
    "light, symmetric": {"least": (1e-30, 1e-250), "given": True, "symmetric": True},
}
SEEDS = [None, 1, 2]


@contextlib.contextmanager
def emulated(
    flavour: str, strategy: str, seed: int | None, shared_kib: int | None = None, arch: int = 90
) -> Iterator[None]:
    """Within it the emulator stands in for the CPU; memory that nobody has written is NaN.

    ``shared_kib``: what a block can have of shared memory. ``arch``: whose code runs."""
    build.emulator(flavour).seed(seed)
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.MonkeyPatch.context() as patch, forced(strategy=strategy, emulated=build.module(flavour)):
            if shared_kib is not None or arch != 90:
                device = build.emulator(flavour).device_with(shared_kib or 99, arch)
                patch.setattr(launch, "Where", lambda _, *rest: Where(device, *rest))
            yield
    finally:
        torch.use_deterministic_algorithms(False)


def gradients(values: list[Tensor], leaves: list[Tensor]) -> list[Tensor]:
    return [*(v.detach() for v in values), *torch.autograd.grad(sum(v.sum() for v in values), leaves)]


def of_maps(maps: Maps, metric: str, weighted: bool, channels_last: bool, kept: bool = False) -> list[Tensor]:
    """Values and gradients of everything that can be asked of two maps; at the end the potentials.

    ``kept``: backward is given the costs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(emd, "FEATURES_TO_COSTS", 0 if kept else 1 << 40)
        return _of_maps(maps, metric, weighted, channels_last)


def _of_maps(maps: Maps, metric: str, weighted: bool, channels_last: bool) -> list[Tensor]:
    torch.manual_seed(0)
    x_shape, y_shape, patch, dtype = maps
    x, y = features(*x_shape, dtype=dtype), features(*y_shape, dtype=dtype)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    leaves = [x.requires_grad_(), y.requires_grad_()]
    a = b = None
    if weighted:
        n, m = ((s[-2] - patch + 1) * (s[-1] - patch + 1) for s in (x_shape, y_shape))
        kind = torch.float64 if dtype == torch.float64 else torch.float32
        a, b = weights(x_shape[0], n, dtype=kind), weights(x_shape[0], m, dtype=kind)
        a[0, n // 2] = b[0, 0] = b[-1, -1] = 0
        a[0, 0] = b[-1, 0] = 1
        leaves += [a.requires_grad_(), b.requires_grad_()]
    tol = 1e-7 if dtype == torch.float64 else 1e-4
    result = solve_sample(x, y, a, b, patch_size=patch, metric=metric, tol=tol)
    found = gradients([result.transport_cost, 0.5 * result.entropic_cost], leaves)
    found += gradients([cost_matrix(x, y, patch_size=patch, metric=metric)], leaves[:2])
    return [*found, result.f.detach(), result.g.detach()]


def of_costs(name: str, dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(0)
    cost = torch.rand(COSTS[name], dtype=torch.float64).to(dtype).requires_grad_()
    batch, n, m = COSTS[name]
    kind = torch.float64 if dtype == torch.float64 else torch.float32
    a, b = weights(batch, n, dtype=kind, grad=True), weights(batch, m, dtype=kind, grad=True)
    tol = 1e-7 if dtype == torch.float64 else 1e-4
    result = solve(cost, a, b, tol=tol)
    found = gradients([result.transport_cost, 0.5 * result.entropic_cost], [cost, a, b])
    found += gradients([solve(cost, a, b, tol=tol).entropic_cost], [cost, a, b])  # which needs no linear system
    return [*found, result.f.detach(), result.g.detach()]


def of_kind(name: str, dtype: torch.dtype) -> list[Tensor]:
    kind = {**BALANCED, **KINDS[name]}
    torch.manual_seed(0)
    x, y = torch.randn(2, 13, 5, dtype=dtype), torch.randn(2, 11, 5, dtype=dtype)
    a, b = weights(2, 13, dtype=dtype) * 1.5, weights(2, 11, dtype=dtype)
    a[0, 3] = b[1, 7] = 0
    if kind["least"]:
        a[:, ::4] = b[:, 2::5] = kind["least"][dtype == torch.float64]
    if kind["symmetric"]:
        y, b = x.clone(), a.clone()
    # The second is so small that scalings alone would not do.
    given = torch.tensor([[0.5], [0.05]], dtype=dtype) if kind["given"] else None
    tol = 1e-9 if dtype == torch.float64 else 1e-5
    options = SolverOptions(
        kind["eps"],
        kind["relative"],
        *kind["reach"],
        tol=tol,
        max_iter=3000,
        symmetric=kind["symmetric"],
        method=METHODS[kind["method"]],
    )
    pair, ground = Pair(x, y, a, b), Ground(METRIC_NUMBERS["l2"], 1)
    out = solve_features(pair, ground, options, "", eps_given=given)
    transport, entropic, grad_eps = torch.rand(3, 2, 1, dtype=dtype).unbind()
    found = [out.transport, out.entropic, out.eps]
    # The transport value of a set of patches with itself says little about the weights: hardly any mass moves.
    for upstream, of_eps in [
        (Upstream(None, entropic), grad_eps),
        (Upstream(transport, None), None),
    ][: 1 if kind["symmetric"] else 2]:
        slope = torch.empty_like(entropic)
        found += features_backward(
            upstream,
            pair,
            saved(out),
            None,
            ground,
            options,
            NeedPair(True, True, True, True),
            grad_eps=of_eps,
            eps_given=given,
            grad_eps_given=slope,
        )
        found.append(slope)
    return [*found, out.f, out.g]


def fits(strategy: str, *pixels: int) -> bool:
    return strategy != "warp" or max(pixels) <= 32


FORCED = [strategy for strategy in STRATEGIES if strategy != "automatic"]
MAP_CASES = [
    (strategy, name, metric)
    for strategy, (name, shapes), metric in itertools.product(FORCED, MAPS.items(), METRICS)
    if fits(strategy, *(s[-1] * s[-2] for s in shapes[:2]))
]
COST_CASES = [(s, name) for s, name in itertools.product(FORCED, COSTS) if fits(s, *COSTS[name][1:])]
# For mutants: every strategy and metric, and what only some of the code is for.
QUICK = {
    ("warp", "groups", "cosine"),
    ("block", "bfloat16", "l2"),
    ("block", "windows", "cosine"),
    ("cooperative", "float64", "sqeuclidean"),
    ("cooperative", "groups", "l2"),
    ("stream", "windows", "l2"),
    ("stream", "groups", "cosine"),
    ("block", "slabs", "l2"),
}


def cases(all_cases: list, quick: set) -> list:
    return [pytest.param(*case, marks=[pytest.mark.quick] if case in quick else []) for case in all_cases]


def layout(metric: str) -> dict[str, bool]:
    return {"weighted": metric != "sqeuclidean", "channels_last": metric != "l2"}


def check(results: list[list[Tensor]], expected: list[Tensor], tolerance: float) -> None:
    for result in results[1:]:
        assert all(torch.equal(ours, other) for ours, other in zip(result, results[0], strict=True))
    # Potentials that have converged as far as was asked may still differ by a constant.
    for ours, theirs in list(zip(results[0], expected, strict=True))[:-2]:
        assert error(ours, theirs) < tolerance or (ours - theirs).abs().max() < tolerance * 1e-2


@pytest.mark.parametrize(("strategy", "name", "metric"), cases(MAP_CASES, QUICK))
def test_maps_have_no_race(strategy: str, name: str, metric: str) -> None:
    with emulated("race", strategy, 1):
        of_maps(MAPS[name], metric, **layout(metric), kept=metric != "l1")


@pytest.mark.parametrize(("strategy", "name"), cases(COST_CASES, {("stream", "long"), ("cooperative", "wide")}))
def test_costs_have_no_race(strategy: str, name: str) -> None:
    for dtype in (torch.float64, torch.float16):
        with emulated("race", strategy, 1):
            of_costs(name, dtype)


@pytest.mark.parametrize("what", [torch.inf, torch.nan])
@pytest.mark.parametrize(("strategy", "name"), COST_CASES)
def test_costs_that_are_no_numbers_have_no_race(strategy: str, name: str, what: float) -> None:
    """One pair that is forbidden, and one problem that is not sound: neither reads what nobody has written."""
    for dtype, reach in ((torch.float32, None), (torch.float32, 1.0), (torch.float64, None)):
        torch.manual_seed(0)
        cost = torch.rand(COSTS[name], dtype=dtype)
        cost[0, 1, 2] = what
        with emulated("race", strategy, 1):
            value = solve(cost.requires_grad_(), reach=reach).transport_cost
            (gradient,) = torch.autograd.grad(value.sum(), cost)
        if what == torch.inf:
            assert value.isfinite().all() and gradient[0, 1, 2] == 0
        else:
            assert value[0].isnan() and gradient[0].isnan().all() and value[1:].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize(
    ("n", "m"), [(32, 20), (49, 49), (65, 16), (66, 8), (100, 30), (196, 16), (196, 49), (200, 210)]
)
def test_costs_alone_are_those_that_were_solved(n: int, m: int, metric: str, dtype: torch.dtype) -> None:
    """To the bit: a plan is made of them later, and eps may be as small as their rounding."""
    torch.manual_seed(0)
    x, y = torch.randn(1, n, 37, dtype=dtype), torch.randn(1, m, 37, dtype=dtype)
    y[0, m // 2] = x[0, n // 2] + 1e-3  # a pair of which products tell too little
    pair, ground = Pair(x, y, None, None), Ground(METRIC_NUMBERS[metric], 1)
    with emulated(FLAVOUR, "automatic", None):
        assert torch.equal(cost_matrix(x, y, metric=metric).view_as(kept := kept_costs(pair, ground)), kept)


def kept_costs(pair: Pair, ground: Ground) -> Tensor:
    """Those that a problem was solved with."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(emd, "FEATURES_TO_COSTS", 0)
        return emd.solve_and_keep(pair, ground, SolverOptions(1.0, True, max_iter=1), "")[-1]


@pytest.mark.parametrize(("shared", "arch"), [(227, 90), (99, 90), (163, 80), (99, 75)])
@pytest.mark.parametrize("strategy", ["automatic", "cooperative", "stream"])
@pytest.mark.parametrize(("n", "m", "channels"), [(100, 196, 96), (113, 255, 48), (196, 196, 64), (256, 256, 64)])
def test_costs_alone_are_those_of_any_device(
    n: int, m: int, channels: int, strategy: str, shared: int, arch: int
) -> None:
    """Where maps are compared in parts, and problems are split."""
    torch.manual_seed(0)
    x, y = torch.randn(1, n, channels), torch.randn(1, m, channels)
    with emulated(FLAVOUR, strategy, None, shared, arch):
        kept = kept_costs(Pair(x, y, None, None), Ground(METRIC_NUMBERS["l2"], 1))
        assert torch.equal(cost_matrix(x, y).view_as(kept), kept)


@pytest.mark.parametrize(("strategy", "name", "metric"), cases(MAP_CASES, QUICK))
def test_maps_under_every_schedule(strategy: str, name: str, metric: str) -> None:
    results = []
    for seed in SEEDS:
        with emulated(FLAVOUR, strategy, seed):
            results.append(of_maps(MAPS[name], metric, **layout(metric), kept=seed == SEEDS[-1]))
    tolerance = {torch.float64: 1e-5, torch.float32: 5e-3, torch.bfloat16: 2e-2}[MAPS[name][3]]
    check(results, of_maps(MAPS[name], metric, **layout(metric)), tolerance)


@pytest.mark.parametrize(("strategy", "name"), cases(COST_CASES, {("stream", "long"), ("cooperative", "wide")}))
def test_costs_under_every_schedule(strategy: str, name: str) -> None:
    for dtype, tolerance in ((torch.float32, 5e-3), (torch.float64, 1e-5), (torch.float16, 1e-2)):
        results = []
        for seed in SEEDS:
            with emulated(FLAVOUR, strategy, seed):
                results.append(of_costs(name, dtype))
        check(results, of_costs(name, dtype), tolerance)


KIND_CASES = list(itertools.product(FORCED, KINDS))
QUICK_KINDS = {
    ("warp", "one reach"),
    ("cooperative", "reach"),
    ("block", "symmetric"),
    ("stream", "symmetric, reach"),
    ("block", "small, reach"),
    ("warp", "light"),
    ("cooperative", "light, reach"),
    ("stream", "light, symmetric"),
    ("cooperative", "small"),
}


@pytest.mark.parametrize(("strategy", "name"), cases(KIND_CASES, QUICK_KINDS))
def test_kinds_have_no_race(strategy: str, name: str) -> None:
    with emulated("race", strategy, 1):
        of_kind(name, torch.float32)


@pytest.mark.parametrize(("strategy", "name"), cases(KIND_CASES, QUICK_KINDS))
def test_kinds_under_every_schedule(strategy: str, name: str) -> None:
    for dtype, tolerance in ((torch.float32, 5e-4), (torch.float64, 1e-7)):
        results = []
        for seed in SEEDS:
            with emulated(FLAVOUR, strategy, seed):
                results.append(of_kind(name, dtype))
        check(results, of_kind(name, dtype), tolerance)


@pytest.mark.skipif(FLAVOUR != "plain", reason="this is the process of the sanitizers")
@pytest.mark.parametrize("what", ["maps", "costs", "kinds"])
def test_under_sanitizers(what: str, sanitized: dict[str, str]) -> None:
    build.build("asan/_C.so")
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(
        [*command, "-k", f"{what}_under_every_schedule"],
        cwd=build.ROOT,
        env={**sanitized, "SFR_SIMT_FLAVOUR": "asan"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize("strategy", FORCED)
def test_an_empty_problem_is_nothing(strategy: str, metric: str, side: int) -> None:
    """Everything about it is 0, whatever its features hold; its neighbours have the bits that they have alone."""
    torch.manual_seed(0)
    x, y = features(3, 4, 3, 3), features(3, 4, 2, 4)
    given = [weights(3, 9), weights(3, 8)]
    given[side][1] = 0
    (x, y)[side][1] = torch.nan
    leaves = [t.requires_grad_() for t in (x, y, *given)]
    with emulated(FLAVOUR, strategy, None):
        result = solve_sample(*leaves, metric=metric)
        found = gradients([result.transport_cost, result.entropic_cost], leaves)
        costs = solve(torch.rand(3, 9, 8), *given)
        alone = [solve_sample(*(t[k : k + 1] for t in leaves), metric=metric).transport_cost for k in (0, 2)]
    for value in (*found, result.f, result.g, result.n_iter, result.marginal_error, costs.entropic_cost, costs.f):
        assert (value[1] == 0).all() and value.isfinite().all()
    assert result.converged.all() and costs.converged.all()
    assert torch.equal(torch.cat(alone), result.transport_cost[::2])


@pytest.mark.quick
@pytest.mark.parametrize("strategy", ["warp", "block"])
def test_pixels_of_no_kept_window_are_not_read(strategy: str) -> None:
    """Along every edge of a map, where a window further on has the number that comes next to the edge's own."""
    x, y = features(1, 3, 4, 4), features(1, 3, 3, 3)
    for axis, at in itertools.product((-2, -1), (0, -1)):
        mask, broken = torch.ones(1, 3, 3), x.clone()
        mask.select(axis, at).zero_()
        broken.select(axis, at).fill_(torch.nan)
        leaves = [broken.requires_grad_(), y.clone().requires_grad_()]
        with emulated(FLAVOUR, strategy, None):
            result = solve_sample(*leaves, mask, patch_size=2)
            found = gradients([result.transport_cost], leaves)
        assert all(value.isfinite().all() for value in found), (axis, at)


@pytest.mark.parametrize("patch_size", [1, 2])
@pytest.mark.parametrize("metric", METRICS)
def test_an_empty_problem_has_no_gradient(metric: str, patch_size: int) -> None:
    with emulated(FLAVOUR, "automatic", None):
        not_finite.empty_problems_have_no_gradient(metric, patch_size)


@pytest.mark.parametrize("patch_size", [1, 2])
@pytest.mark.parametrize("metric", METRICS)
def test_a_patch_removed_in_one_group_alone(metric: str, patch_size: int) -> None:
    with emulated(FLAVOUR, "automatic", None):
        not_finite.groups_have_their_own_patches(metric, patch_size)


@pytest.mark.parametrize("arch", [90, 75])
@pytest.mark.parametrize(("patch_size", "channels"), [(1, 3), (1, 40), (2, 3)])
@pytest.mark.parametrize("metric", METRICS)
def test_a_cost_that_is_not_finite_has_gradient_nan(metric: str, patch_size: int, channels: int, arch: int) -> None:
    for strategy in ("block", "cooperative", "stream"):
        with emulated(FLAVOUR, strategy, None, arch=arch):
            not_finite.costs_that_are_not_finite_have_gradient_nan(metric, patch_size, channels)
