"""Exponentials and quotients that are as far off as a GPU's may be: nothing may lean on them being exact.

A GPU's `ex2.approx.ftz` and `div.approx` are within 2 units in the last place; denormals are 0. So are `div.full` and
`sqrt.approx`, which keep denormals. The emulator's are exact unless it is told otherwise.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import numpy as np
import pytest
import torch
from cases import error, weights
from torch import Tensor

from sfr_ext import emd_l2, solve, solve_sample
from simt import build
from simt.test_kernels import FORCED, MAPS, emulated, layout, of_kind, of_maps

ULPS = [(2, 1), (2, 2), (2, 3)]  # units in the last place, seed


def exp2(x: np.ndarray) -> np.ndarray:
    return np.array([build.planted().calls.planted_exp2(ctypes.c_float(v)) for v in x], np.float32)


def quotient(x: np.ndarray, y: np.ndarray, name: str = "planted_quotient") -> np.ndarray:
    call = getattr(build.planted().calls, name)
    return np.array([call(ctypes.c_float(a), ctypes.c_float(b)) for a, b in zip(x, y, strict=True)], np.float32)


def ratio(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return quotient(x, y, "planted_ratio")


def root(x: np.ndarray) -> np.ndarray:
    return np.array([build.planted().calls.planted_root(ctypes.c_float(v)) for v in x], np.float32)


def distance(ours: np.ndarray, exact: np.ndarray) -> np.ndarray:
    return ours.view(np.int32).astype(np.int64) - exact.view(np.int32)


def test_exact_unless_told_otherwise() -> None:
    x = np.linspace(-148, 127, 500, dtype=np.float32)
    assert np.abs(distance(exp2(x), np.exp2(x.astype(np.float64)).astype(np.float32))).max() <= 1
    assert (exp2(np.float32([-127, -140])) > 0).all(), "denormals are kept"
    assert np.array_equal(quotient(x, x[::-1]), x / x[::-1])
    assert np.array_equal(ratio(x, x[::-1]), x / x[::-1]) and np.array_equal(root(np.abs(x)), np.sqrt(np.abs(x)))


def test_off_by_up_to_2_units_and_the_same_each_time() -> None:
    x = np.linspace(-120, 120, 2000, dtype=np.float32)
    exact, exact_quotient = exp2(x), quotient(x, x[::-1])
    with build.planted().approximate(2, seed=1):
        ours, again, divided = exp2(x), exp2(x), quotient(x, x[::-1])
    with build.planted().approximate(2, seed=2):
        other = exp2(x)
    assert set(distance(ours, exact)) == set(distance(divided, exact_quotient)) == {-2, -1, 0, 1, 2}
    assert np.array_equal(ours, again) and not np.array_equal(ours, other)
    assert exp2(np.float32([0]))[0] == 1, "and exact again"


def test_ratios_and_roots_are_off_but_denormals_are_kept() -> None:
    x = np.linspace(1, 120, 2000, dtype=np.float32)
    with build.planted().approximate(2, seed=1, flush=True):
        ratios, roots = ratio(x, x[::-1]), root(x)
        assert ratio(np.float32([1e-39]), np.float32([1]))[0] > 0 and root(np.float32([1e-40]))[0] > 0
        assert ratio(np.float32([2e38]), np.float32([2e38]))[0] == pytest.approx(1)
    assert set(distance(ratios, x / x[::-1])) == set(distance(roots, np.sqrt(x))) == {-2, -1, 0, 1, 2}


def test_denormals_are_0() -> None:
    with build.planted().approximate(0, flush=True):
        assert (exp2(np.float32([-126.5, -127, -149])) == 0).all() and exp2(np.float32([-126]))[0] == 2.0**-126
        assert quotient(np.float32([1e-39]), np.float32([1]))[0] == 0
        assert quotient(np.float32([1, -1]), np.float32([2e38, 2e38])).tolist() == [0, 0], "as CUDA documents it"


def check(call: Callable[[], list[Tensor]], tolerance: float, strategy: str) -> None:
    with emulated("plain", strategy, None):
        exact = call()
    library = build.emulator()
    for ulps, seed in ULPS:
        found = []
        for schedule in (None, 1):
            with library.approximate(ulps, seed=seed), emulated("plain", strategy, schedule):
                found.append(call())
        assert all(map(torch.equal, *found)), "the same bits under every schedule"
        for ours, theirs in zip(found[0], exact, strict=True):
            assert error(ours, theirs) < tolerance or (ours - theirs).abs().max() < tolerance * 1e-2


@pytest.mark.parametrize(("name", "metric"), [("groups", "l2"), ("small", "cosine"), ("windows", "sqeuclidean")])
def test_maps(name: str, metric: str) -> None:
    # The potentials, at the end, may differ by a constant.
    check(lambda: of_maps(MAPS[name], metric, **layout(metric))[:-2], 5e-3, "automatic")


@pytest.mark.parametrize("name", ["reach", "one reach", "symmetric", "small", "small, reach"])
def test_kinds(name: str) -> None:
    check(lambda: of_kind(name, torch.float32)[:-2], 5e-4, "automatic")


@pytest.mark.parametrize("strategy", FORCED)
def test_strategies(strategy: str) -> None:
    check(lambda: of_kind("given, reach", torch.float32)[:-2], 5e-4, strategy)


@pytest.mark.parametrize("tol", [1e-3, 1e-5, 1e-6])
@pytest.mark.parametrize("eps", [0.5, 0.05, 0.01])
def test_iterations_do_not_run_on(eps: float, tol: float) -> None:
    """Stopping rules compare with rounding: a problem that converges with exact functions does so with these."""
    torch.manual_seed(0)
    x, y = torch.randn(2, 20, 8), torch.randn(2, 23, 8)
    a = weights(2, 20)

    def counts() -> tuple[Tensor, Tensor]:
        result = solve_sample(x, y, a, eps=eps, tol=tol, max_iter=2000)
        return result.n_iter, result.marginal_error

    with emulated("plain", "automatic", None):
        exact, reached = counts()
    for ulps, seed in ULPS:
        with build.emulator().approximate(ulps, seed=seed), emulated("plain", "automatic", None):
            found, error_of_it = counts()
        assert (found <= 1.5 * exact + 8).all(), (found, exact)
        assert (error_of_it <= torch.maximum(2 * reached, torch.tensor(tol))).all()


def test_costs_that_underflow() -> None:
    """Entries of the kernel below float's normal range are 0 on a GPU, and hold no mass that counts."""
    cost = torch.linspace(0, 300, 12 * 10).view(1, 12, 10)
    results = []
    for approximate in (False, True):
        with emulated("plain", "automatic", None):
            if approximate:
                with build.emulator().approximate(2):
                    results.append(solve(cost, eps=1.0, eps_scale="absolute").transport_cost)
            else:
                results.append(solve(cost, eps=1.0, eps_scale="absolute").transport_cost)
    torch.testing.assert_close(*results, rtol=1e-4, atol=0)


def test_training_step_under_approximations() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(2, 6, 7, 7, requires_grad=True), torch.randn(2, 6, 7, 7)
    check(lambda: list(torch.autograd.grad(emd_l2(x, y), x)), 2e-3, "block")
