"""Costs that backward reads again: when they are kept, and that it makes no difference but to time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import HALVES, METRICS, OBJECTIVES, features, value_and_gradients, weights
from torch import Tensor

from sfr_ext import emd_l2
from sfr_ext.ops import SolverOptions, emd

ALWAYS, NEVER = 0, 1 << 40


def saved_shapes(x: Tensor, y: Tensor, **options: Any) -> set[tuple[int, ...]]:
    """Of all that autograd keeps of a call."""
    seen = set()

    def pack(tensor: Tensor) -> Tensor:
        seen.add(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        emd_l2(x, y, **options)
    return seen


# 10 x 12 costs of 4 bytes are 480; what both sides hold for each channel is 88 bytes, or half of it.
@pytest.mark.parametrize(
    ("channels", "dtype", "kept"),
    [
        (54, torch.float32, False),
        (55, torch.float32, True),
        (109, torch.bfloat16, False),
        (110, torch.float16, True),
        (54, torch.float64, False),
        (55, torch.float64, True),
    ],
)
@pytest.mark.parametrize("groups", [None, 3])
def test_costs_are_kept_where_they_take_a_tenth_of_the_features(
    channels: int, dtype: torch.dtype, kept: bool, groups: int | None
) -> None:
    lead = (2,) if groups is None else (2, groups)
    x, y = features(2, 10, channels, dtype=dtype, grad=True), features(*lead, 12, channels, dtype=dtype)
    if groups is not None:  # x is there once for all of them
        kept = 10 * groups * 10 * 12 * max(4, dtype.itemsize) <= (10 + groups * 12) * channels * dtype.itemsize
    assert ((*lead, 10, 12) in saved_shapes(x, y, objective="transport")) == kept


def test_a_divergence_keeps_those_of_each_problem_by_itself() -> None:
    x, y = features(2, 3, 64, grad=True), features(2, 16, 64, grad=True)
    shapes = saved_shapes(x, y, objective="divergence")
    assert {(2, 3, 16), (2, 3, 3)} <= shapes and (2, 16, 16) not in shapes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES])
@pytest.mark.parametrize("patch_size", [1, 2])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("objective", [*OBJECTIVES, "divergence"])
def test_bits_are_those_of_costs_computed_again(
    objective: str, metric: str, patch_size: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, threads: None
) -> None:
    x, y = features(3, 6, 5, 5, dtype=dtype, grad=True), features(3, 2, 6, 4, 5, dtype=dtype, grad=True)
    n, m = (5 - patch_size + 1) ** 2, (4 - patch_size + 1) * (5 - patch_size + 1)
    kind = torch.float64 if dtype == torch.float64 else torch.float32
    a, b = weights(3, n, dtype=kind), weights(3, 2, m, dtype=kind)
    a[0, 1] = b[0, 1, 0] = b[2, 0, 5] = 0  # removed: kept costs are those of the others
    options: dict[str, Any] = {"metric": metric, "patch_size": patch_size, "objective": objective, "reduction": "none"}

    def loss(x: Tensor, y: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return emd_l2(x, y, student_weight=a, teacher_weight=b, **options)

    results = []
    for share in (NEVER, ALWAYS):
        monkeypatch.setattr(emd, "FEATURES_TO_COSTS", share)
        for count in (1, 3):
            torch.set_num_threads(count)
            value, grads = value_and_gradients(loss, x, y, a.requires_grad_(), b.requires_grad_())
            results.append([value, *grads])
    for result in results[1:]:
        for ours, theirs in zip(result, results[0], strict=True):
            assert torch.equal(ours, theirs)


def test_teams_of_threads_share_what_is_kept(monkeypatch: pytest.MonkeyPatch, threads: None) -> None:
    x, y = features(1, 150, 40, grad=True), features(1, 170, 40, grad=True)
    results = []
    for share in (NEVER, ALWAYS):
        monkeypatch.setattr(emd, "FEATURES_TO_COSTS", share)
        for count in (1, 4):
            torch.set_num_threads(count)
            results.append(value_and_gradients(emd_l2, x, y, metric="cosine")[1])
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


def test_a_nan_stays_in_its_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emd, "FEATURES_TO_COSTS", ALWAYS)
    x, y = features(3, 5, 4), features(3, 6, 4)
    x[1, 2, 0] = float("nan")
    value, (gx, gy) = value_and_gradients(emd_l2, x.requires_grad_(), y.requires_grad_(), reduction="none")
    assert value.isnan().tolist() == [False, True, False]
    assert gx[1].isnan().all() and gy[1].isnan().all()
    assert gx[[0, 2]].isfinite().all() and gy[[0, 2]].isfinite().all()


def test_opcheck_with_costs_that_are_kept() -> None:
    x, y = features(2, 4, 64, grad=True), features(2, 3, 5, 64, grad=True)
    torch.library.opcheck(
        torch.ops.sfr_ext.emd_forward.default, (x, y, None, None, None, 0, 1, *SolverOptions(0.1, True), "emd_l2")
    )


@pytest.mark.parametrize("objective", ["transport", "divergence"])
def test_vmap_keeps_them_too(objective: str) -> None:
    x, y = features(2, 3, 4, 64), features(2, 3, 5, 64)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return emd_l2(x, y, objective=objective)

    expected = torch.stack([torch.func.grad(loss)(*pair) for pair in zip(x, y, strict=True)])
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss))(x, y), expected, rtol=0, atol=0)
