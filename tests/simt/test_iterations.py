"""The kernels and those of the CPU step for step: cut off after any number of iterations, both have done the same.

In float64, where sums in another order do not change what the solver does next.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import weights

from sfr_ext.ops import Ground, Pair, Solved, SolverOptions, forced
from sfr_ext.ops.contracts import METHODS, METRICS
from sfr_ext.ops.emd import solve_features
from simt.test_kernels import FLAVOUR, FORCED, emulated

USUAL: dict[str, Any] = {"eps": 0.2, "relative": True, "reach": (0.0, 0.0), "symmetric": False, "method": "automatic"}
USUAL["least"] = USUAL["away"] = None
KINDS: dict[str, dict[str, Any]] = {
    "balanced": {},
    "plain": {"method": "plain"},
    "relaxed": {"method": "relaxed"},
    "reach": {"reach": (0.5, 0.8)},
    "one reach": {"reach": (0.0, 1.0), "method": "relaxed"},
    "symmetric": {"symmetric": True},
    "symmetric, reach": {"symmetric": True, "reach": (0.7, 0.7)},
    # Kernels that underflow at the start: larger eps come first, and updates in the log domain.
    "cold": {"eps": 0.02, "relative": False},
    "cold, plain": {"eps": 0.02, "relative": False, "method": "plain"},
    "cold, symmetric": {"eps": 0.3, "relative": False, "symmetric": True},  # below it hardly any mass moves
    "cold, reach": {"eps": 0.02, "relative": False, "reach": (0.0, 0.7)},
    "colder": {"eps": 0.004, "relative": False},
    # From the solution of features that are as far away.
    "started": {"away": 0.01},
    "cold, started": {"eps": 0.002, "away": 0.01},
    "cold, started far": {"eps": 0.002, "away": 0.3},
    "cold, started, reach": {"eps": 0.002, "away": 0.03, "reach": (0.5, 0.8)},
    "small weights": {"least": 1e-12},
    "light": {"least": 1e-250},
    "light, reach": {"least": 1e-250, "reach": (0.5, 0.0)},
    "light, symmetric": {"least": 1e-250, "symmetric": True},
}
LIMITS = [*range(1, 10), 12, 17, 40, 100]


def solved(name: str, max_iter: int) -> Solved:
    kind = {**USUAL, **KINDS[name]}
    torch.manual_seed(0)
    x, y = torch.randn(3, 13, 5, dtype=torch.float64), torch.randn(3, 11, 5, dtype=torch.float64)
    a, b = weights(3, 13, dtype=torch.float64), weights(3, 11, dtype=torch.float64)
    a[0, 3] = b[1, 7] = 0
    if kind["least"]:
        a[:, ::4] = b[:, 2::5] = kind["least"]
    a, b = a / a.sum(1, keepdim=True), b / b.sum(1, keepdim=True)
    if kind["symmetric"]:
        y, b = x.clone(), a.clone()
    options = SolverOptions(
        kind["eps"],
        kind["relative"],
        *kind["reach"],
        tol=1e-9,
        max_iter=max_iter,
        symmetric=kind["symmetric"],
        method=METHODS[kind["method"]],
    )
    ground, init_g = Ground(METRICS["l2"], 1), None
    if kind["away"]:
        with forced(emulated=None):
            near = solve_features(
                Pair(x + kind["away"] * x.roll(1, 1), y, a, b), ground, options._replace(max_iter=1000), ""
            )
        init_g = near.g + (near.centre / 2 - near.shift)[..., None]
    return solve_features(Pair(x, y, a, b), ground, options, "", init_g=init_g)


@pytest.mark.parametrize("strategy", FORCED)
@pytest.mark.parametrize("name", KINDS)
def test_both_devices_have_done_the_same(name: str, strategy: str) -> None:
    for max_iter in [*LIMITS, 10_000]:
        ours = solved(name, max_iter)
        with emulated(FLAVOUR, strategy, None):
            theirs = solved(name, max_iter)
        assert ours.n_iter.tolist() == theirs.n_iter.tolist(), max_iter
        for what in ("transport", "entropic", "f", "g"):
            torch.testing.assert_close(getattr(theirs, what), getattr(ours, what), rtol=1e-7, atol=1e-9, msg=what)
        # An error that is all rounding may be any such.
        torch.testing.assert_close(theirs.error, ours.error, rtol=1e-5, atol=1e-12)
    assert (ours.error < 1e-8).all() and (theirs.error < 1e-8).all()


@pytest.mark.parametrize("name", KINDS)
def test_limits_cut_off(name: str) -> None:
    counts = [int(solved(name, limit).n_iter.max()) for limit in LIMITS]
    assert counts[-1] >= 8 and counts == [min(limit, counts[-1]) for limit in LIMITS]
