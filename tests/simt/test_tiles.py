"""Maps that are too large for panels of all their pixels: devices with little shared memory show it at small sizes."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest
import torch
from cases import METRICS
from gpu_model.devices import DEVICES
from gpu_model.layout import Layout, Task, choose
from torch import Tensor

from sfr_ext import cost_matrix
from simt import build
from simt.test_kernels import FLAVOUR, SEEDS, Maps, cases, check, emulated, layout, of_maps

# name: maps, strategy, KiB of shared memory of a block
CASES: dict[str, tuple[Maps, str, int]] = {
    "maps": (((2, 5, 6, 10), (2, 5, 9, 8), 1, torch.float32), "stream", 1),
    "groups": (((1, 9, 7, 9), (1, 2, 9, 8, 7), 1, torch.float32), "stream", 1),
    "sevens": (((1, 4, 14, 7), (1, 4, 7, 7), 1, torch.float32), "stream", 1),
    "bfloat16": (((1, 40, 8, 8), (1, 40, 8, 8), 1, torch.bfloat16), "stream", 1),
    "float64": (((1, 9, 7, 8), (1, 9, 7, 7), 2, torch.float64), "stream", 2),
    # Few patches, whose plan fits, of many pixels, which do not.
    "windows, one block": (((1, 3, 8, 8), (1, 2, 3, 8, 7), 6, torch.float32), "block", 2),
    "windows, several": (((1, 3, 16, 15), (1, 2, 3, 14, 15), 14, torch.float32), "cooperative", 3),
    "windows, one warp": (((2, 3, 8, 8), (2, 3, 8, 8), 7, torch.float64), "warp", 2),
    "one pixel": (((2, 3, 16, 20), (2, 3, 1, 1), 1, torch.float32), "stream", 1),
}
# Two metrics for each, all of them in turn.
EVERY = [(name, METRICS[(k + more) % 4]) for k, name in enumerate(CASES) for more in (0, 1)]
QUICK = {("groups", "cosine"), ("windows, one block", "sqeuclidean"), ("windows, several", "cosine")}


def laid_out(name: str, **options: bool) -> Layout:
    (x, y, patch, dtype), strategy, shared = CASES[name]
    patches = [(s[-2] - patch + 1) * (s[-1] - patch + 1) for s in (x, y)]
    groups = y[1] if len(y) == 5 else 1
    task = Task(
        *patches,
        x[-2] * x[-1],
        y[-2] * y[-1],
        x[1],
        groups,
        windows=patch > 1,
        float64=dtype == torch.float64,
        **options,
    )
    device = dataclasses.replace(DEVICES["T4"], processors=4, shared=shared * 1024)
    return choose(task, device, strategy)


@pytest.mark.parametrize("name", CASES)
def test_these_maps_are_cut(name: str) -> None:
    (x, y, *_), *_ = CASES[name]
    whole = (x[-2] * x[-1], y[-2] * y[-1])
    found = laid_out(name, backward=True)
    assert (found.pull_x, found.pull_y) != whole
    if name != "windows, one block":  # which compares them in the room of the plan to come
        assert (found.compare_x, found.compare_y) != whole


@pytest.mark.parametrize(("name", "metric"), cases(EVERY, QUICK))
def test_tiles_have_no_race(name: str, metric: str) -> None:
    maps, strategy, shared = CASES[name]
    with emulated("race", strategy, 1, shared):
        of_maps(maps, metric, **layout(metric))


@pytest.mark.parametrize(("name", "metric"), cases(EVERY, QUICK))
def test_tiles_under_every_schedule(name: str, metric: str) -> None:
    maps, strategy, shared = CASES[name]
    results = []
    for seed in SEEDS:
        with emulated(FLAVOUR, strategy, seed, shared):
            results.append(of_maps(maps, metric, **layout(metric)))
    tolerance = {torch.float64: 1e-5, torch.float32: 5e-3, torch.bfloat16: 2e-2}[maps[3]]
    check(results, of_maps(maps, metric, **layout(metric)), tolerance)


@pytest.mark.skipif(FLAVOUR != "plain", reason="this is the process of the sanitizers")
def test_tiles_under_sanitizers(sanitized: dict[str, str]) -> None:
    build.build("asan/_C.so")
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(
        [*command, "-k", "(under_every_schedule and (groups or block) and not cosine) or (strided and l1)"],
        cwd=build.ROOT,
        env={**sanitized, "SFR_SIMT_FLAVOUR": "asan"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


def cost_and_gradients(x: Tensor, y: Tensor, metric: str, patch: int) -> list[Tensor]:
    x, y = x.detach().requires_grad_(), y.detach().requires_grad_()
    cost = cost_matrix(x, y, patch_size=patch, metric=metric)
    upstream = torch.linspace(-1, 1, cost.numel(), dtype=cost.dtype).view_as(cost)
    found = [cost.detach(), *torch.autograd.grad(cost, (x, y), upstream, retain_graph=True)]
    for leaf in (x, y):  # one alone
        found += torch.autograd.grad(cost, leaf, upstream, retain_graph=True)
    return found


def strided(t: Tensor) -> Tensor:
    """The same numbers in every second row and column of something larger."""
    wide = t.new_full((*t.shape[:-2], 2 * t.shape[-2], 2 * t.shape[-1]), torch.nan)
    wide[..., ::2, 1::2] = t
    return wide[..., ::2, 1::2]


@pytest.mark.parametrize("patch", [1, 2])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("kind", ["contiguous", "channels last", "strided"])
def test_tiles_change_no_gradient_by_a_bit(kind: str, metric: str, patch: int) -> None:
    """Sums over pixels run in their order however the maps are cut; over channels too where a thread has one tile."""
    torch.manual_seed(0)
    x, y = torch.randn(1, 6, 13, 15), torch.randn(1, 6, 14, 12)
    if kind == "channels last":
        x, y = (t.to(memory_format=torch.channels_last) for t in (x, y))
    if kind == "strided":
        x, y = strided(x), strided(y)
    found = []
    for shared in (99, 12, 5, 2, 1):
        with emulated(FLAVOUR, "automatic", 1, shared):
            found.append(cost_and_gradients(x, y, metric, patch))
    # The weights of the other metrics follow from costs, whose sums over channels are cut into slices.
    exact = metric in ("sqeuclidean", "l1")
    for result in found[1:]:
        torch.testing.assert_close(result, found[0], rtol=1e-5, atol=1e-5)
        assert not exact or all(map(torch.equal, result[1:], found[0][1:]))
    assert all(torch.equal(*pair) for result in found for pair in zip(result[1:3], result[3:], strict=True))


def test_a_number_that_is_none_stays_where_it_is() -> None:
    """A NaN in one tile must not reach the next by the ends of a panel's rows."""
    torch.manual_seed(0)
    x, y = torch.randn(1, 3, 9, 13), torch.randn(1, 3, 9, 11)
    x[0, 1, 2, 3] = y[0, 2, 4, 5] = torch.nan
    found = []
    for shared in (99, 1):
        with emulated(FLAVOUR, "automatic", 1, shared):
            found.append(cost_and_gradients(x, y, "sqeuclidean", 1))
    for whole, tiled in zip(*found, strict=True):
        assert torch.equal(whole.isnan(), tiled.isnan())
        assert torch.equal(whole.nan_to_num(), tiled.nan_to_num())
