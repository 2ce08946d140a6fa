"""The exact solver's kernels on the emulator: no race, the same bits under every schedule, the steps of the CPU's."""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest
import torch
from cases import error, weights
from torch import Tensor

from sfr_ext.ops import ExactOptions, assignment_forward
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
CASES = list(itertools.product(["warp", "block", "stream"], SHAPES))
QUICK = {("warp", "square"), ("block", "weighted"), ("stream", "long")}


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


def hard(name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor | None, Tensor | None, ExactOptions]:
    """A problem of each way through the solver: costs ``[1, 1, N, M]``, weights, options."""
    torch.manual_seed(1)
    weight = torch.float64 if dtype == torch.float64 else torch.float32
    cost, a, b = torch.rand(1, 1, 9, 12, dtype=dtype), weights(1, 9, dtype=weight), weights(1, 12, dtype=weight)
    if name == "forbidden":
        cost[torch.rand(cost.shape) < 0.4] = torch.inf
        cost[0, 0, :, 5] = 0.5  # one column that all may use, so that there may be a plan
    if name == "infeasible":
        cost[..., 2, :] = torch.inf
    if name == "blocks":  # a cost far above all others, and parts that no flow connects
        a, b = torch.ones(1, 9, dtype=weight), torch.ones(1, 12, dtype=weight)
        a[0, :4], b[0, :4] = 3, 3
        a[0, 4:], b[0, 4:] = 8, 5
        cost[..., :4, 4:] = cost[..., 4:, :4] = 1e30
    if name == "square, forbidden":
        cost, a, b = cost[..., :9].clone(), None, None
        cost[torch.rand(cost.shape) < 0.3] = torch.inf
    if name == "clouds apart":  # long searches: the simplex method takes over
        x = torch.randn(80, 3, dtype=dtype)
        cost, a, b = torch.cdist(x, torch.randn(80, 3, dtype=dtype) + 5)[None, None], None, None
    if name == "few zeros":  # tight pairs, and a search from all rows that wait
        cost, a, b = (torch.rand(1, 1, 70, 70) > 1.5 / 70).to(dtype), None, None
    if "order" in name:
        x, y = torch.rand(45, 1, dtype=torch.float64), torch.rand(1, 38, dtype=torch.float64)
        cost = ((x - y) ** 2).to(dtype)[None, None]
        a, b = weights(1, 45, dtype=weight), weights(1, 38, dtype=weight)
    if name == "nearly in order":
        cost += 1e-6 * torch.rand(45, 38).to(dtype)
    if name == "empty" and b is not None:
        b[:] = 0
    return cost, a, b, ExactOptions(0.2, 0.1) if name == "prices" else OPTIONS


HARD = ["forbidden", "infeasible", "blocks", "square, forbidden", "clouds apart", "few zeros", "empty", "prices"]
HARD += ["in order", "nearly in order"]


@pytest.mark.parametrize("name", HARD)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_way_is_the_cpus(name: str, dtype: torch.dtype) -> None:
    cost, a, b, options = hard(name, dtype)
    expected = exact_forward(cost, a, b, *options, "solve")
    for seed in SEEDS[:2]:
        with emulated(FLAVOUR, "automatic", seed):
            out = exact_forward(cost, a, b, *options, "solve")
        for ours, theirs in zip(out[3:7], expected[3:7], strict=True):
            assert torch.equal(ours, theirs)
        for ours, theirs in zip(out[:3], expected[:3], strict=True):
            assert torch.allclose(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["forbidden", "blocks", "prices", "square, forbidden", "few zeros", "in order"])
def test_no_race_on_other_ways(name: str) -> None:
    cost, a, b, options = hard(name, torch.float32)
    with emulated("race", "block", 1):
        exact_forward(cost, a, b, *options, "solve")


@pytest.mark.parametrize("shape", [(5, 5), (4, 37), (37, 4), (12, 12)])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.9])
def test_assignments_are_the_cpus(shape: tuple[int, int], share: float) -> None:
    torch.manual_seed(2)
    cost = torch.rand(3, 1, *shape)
    cost[torch.rand(cost.shape) < share] = torch.inf
    cost[2, 0, 0, 0] = torch.nan
    expected = assignment_forward(cost, False, 0.8)
    for strategy in ("warp", "block", "stream"):
        with emulated(FLAVOUR, strategy, 1):
            assert torch.equal(assignment_forward(cost, False, 0.8), expected)
    with emulated("race", "block", 1):
        assert torch.equal(assignment_forward(cost, False, 0.8), expected)


@pytest.mark.parametrize("turned", [False, True])
def test_rows_that_compete_for_few_columns(turned: bool) -> None:
    """Of columns next to those that rows have the numbers of, with other rows in between."""
    cost = torch.full((1, 1, 5, 37), torch.inf)
    cost[0, 0, ::2, 5:7], cost[0, 0, 1, 10], cost[0, 0, 3, 12] = torch.rand(3, 2), 0.5, 0.5
    cost = cost.mT.contiguous() if turned else cost
    expected = assignment_forward(cost, False, torch.inf)
    assert (expected >= 0).sum() == 4
    for flavour in (FLAVOUR, "race"):
        with emulated(flavour, "block", 1):
            assert torch.equal(assignment_forward(cost, False, torch.inf), expected)


@pytest.mark.parametrize("strategy", ["block", "stream"])
def test_no_race_between_the_problems_of_a_block(strategy: str) -> None:
    """More of them than blocks at a time: each block takes several, one after the other, in the same memory."""
    torch.manual_seed(3)
    cost, a = torch.rand(150, 1, 3, 4), weights(150, 3)
    cost[::7, 0, 1, 2] = torch.nan
    a[::5] = 0
    expected = exact_forward(cost, a, None, *OPTIONS, "solve")
    pairs = assignment_forward(cost, False, 0.8)
    with emulated("race", strategy, 1):
        out = exact_forward(cost, a, None, *OPTIONS, "solve")
        assert torch.equal(assignment_forward(cost, False, 0.8), pairs)
    assert all(torch.equal(ours.isnan(), theirs.isnan()) for ours, theirs in zip(out[:3], expected[:3], strict=True))


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
