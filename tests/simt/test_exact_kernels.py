"""The exact solver's kernels on the emulator: no race, the same bits under every schedule, the steps of the CPU's."""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest
import torch
from cases import error, weights
from torch import Tensor

from sfr_ext.ops import ExactOptions
from sfr_ext.ops.exact import exact_forward
from simt import build
from simt.test_kernels import FLAVOUR, SEEDS, cases, emulated

OPTIONS = ExactOptions()
# name: B, N, M, weights
SHAPES = {
    "square": (2, 9, 9, False),
    "more than a warp": (1, 41, 41, False),
    "weighted": (1, 12, 12, True),
    "wide": (1, 5, 37, True),
    "long": (2, 34, 6, False),
    # More than run at the same time: a block that works in global memory takes one after the other.
    "many": (66, 3, 3, False),
    "many, weighted": (66, 3, 4, True),
}
CASES = list(itertools.product(["several", "block", "stream"], SHAPES))
QUICK = {("several", "square"), ("block", "weighted"), ("stream", "long")}


def solved(name: str, dtype: torch.dtype) -> list[Tensor]:
    """Plan and number of steps, then what is rounded: dual variables, value, gradients."""
    torch.manual_seed(0)
    batch, n, m, weighted = SHAPES[name]
    leaves = [torch.rand(batch, 1, n, m, dtype=torch.float64).to(dtype)]
    if weighted:
        kind = torch.float64 if dtype == torch.float64 else torch.float32
        leaves += [weights(batch, n, dtype=kind), weights(batch, m, dtype=kind)]
        leaves[1][0, 2] = leaves[2][-1, -1] = 0
    for leaf in leaves:
        leaf.requires_grad_()
    value, f, g, rows, columns, mass, n_iter, *_ = exact_forward(
        *leaves, *[None] * (3 - len(leaves)), *OPTIONS, "solve"
    )
    return [rows, columns, mass, n_iter, f, g, value.detach(), *torch.autograd.grad(value.sum(), leaves)]


@pytest.mark.parametrize(("strategy", "name"), cases(CASES, QUICK))
def test_no_race(strategy: str, name: str) -> None:
    for dtype in (torch.float64, torch.float16):
        with emulated("race", strategy, 1):
            solved(name, dtype)


@pytest.mark.parametrize(("strategy", "name"), cases(CASES, QUICK))
def test_under_every_schedule(strategy: str, name: str) -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        results = []
        for seed in SEEDS:
            with emulated(FLAVOUR, strategy, seed):
                results.append(solved(name, dtype))
        for result in results[1:]:
            assert all(torch.equal(ours, other) for ours, other in zip(result, results[0], strict=True))
        expected = solved(name, dtype)
        # To the bit; but sums are taken in another order.
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(results[0][:4], expected[:4], strict=True))
        tolerance = 1e-14 if dtype == torch.float64 else 1e-6
        assert all(error(*pair) < tolerance for pair in zip(results[0][4:], expected[4:], strict=True))


def test_nan_and_bad_weights_stay_in_their_own_problem() -> None:
    cost, a = torch.rand(4, 1, 5, 7), weights(4, 5)
    expected = exact_forward(cost, a, None, *OPTIONS, "solve")
    cost[1, 0, 2, 3] = torch.nan
    a[2, 1] = -1
    with emulated(FLAVOUR, "automatic", None):
        for value, right in zip(exact_forward(cost, a, None, *OPTIONS, "solve")[:3], expected[:3], strict=True):
            assert value[1:3].isnan().all()
            assert (value[::3] - right[::3]).abs().max() < 1e-6


@pytest.mark.skipif(FLAVOUR != "plain", reason="this is the process of the sanitizers")
def test_under_sanitizers(sanitized: dict[str, str]) -> None:
    build.build("asan/_C.so")
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", __file__, "-k", "every_schedule"]
    environment = {**sanitized, "SFR_SIMT_FLAVOUR": "asan"}
    done = subprocess.run(command, cwd=build.ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
