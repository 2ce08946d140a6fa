"""The exact solver: every result proves itself, by a plan and dual variables of the same value."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import error, weights
from scipy import sparse
from scipy.optimize import linear_sum_assignment, linprog
from torch import Tensor

from benchmarks.studies.optimality import COSTS, certify, problems_of_all_kinds
from sfr_ext import cost_matrix, emd_l2, reference, solve, solve_sample
from sfr_ext.ops import ExactOptions
from sfr_ext.ops.exact import exact_forward, exact_plan

OPTIONS = ExactOptions()
OUTPUTS = ("value", "f", "g", "rows", "columns", "mass", "n_iter", "gap", "magnitude", "error")
# Uniform squares, where it is an assignment problem, and others.
SIZES = [(1, 1), (7, 7), (33, 33), (12, 5), (5, 30)]


def solved(cost: Tensor, a: Tensor | None = None, b: Tensor | None = None) -> dict[str, Tensor]:
    """Of costs ``[B, N, M]``, one problem each."""
    return dict(zip(OUTPUTS, exact_forward(cost[:, None], a, b, *OPTIONS, "solve"), strict=True))


def rand(*shape: int) -> Tensor:
    return torch.rand(*shape, dtype=torch.float64)


@pytest.mark.parametrize("costs", COSTS)
def test_every_result_is_its_own_proof(costs: str, one_thread: None) -> None:
    for cost, a, b in problems_of_all_kinds(2, costs):
        out = exact_forward(cost, a, b, *OPTIONS, "solve")
        proof = certify(cost, a, b, out)
        assert max(proof.gap, proof.excess) < 5e-14 and proof.marginals < 1e-14
        assert out[9].max() < 1e-14


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("n", "m"), SIZES)
def test_values_agree_with_scipy(n: int, m: int, weighted: bool) -> None:
    cost = rand(3, n, m)
    a, b = (weights(3, n, dtype=torch.float64), weights(3, m, dtype=torch.float64)) if weighted else (None, None)
    expected = reference.exact_emd(cost, a, b)
    assert (solved(cost, a, b)["value"][:, 0] - expected).abs().max() < 1e-14


def test_values_by_hand() -> None:
    far = 1e4  # a test case of OpenCV's
    rows = [[16, 16, 13, 22, 17], [14, 14, 13, 19, 15], [19, 19, 20, 23, far], [far, 0, far, 0, 0]]
    a, b = torch.tensor([[50.0, 60, 50, 50]]), torch.tensor([[30.0, 20, 70, 30, 60]])
    assert solved(torch.tensor([rows]), a, b)["value"].item() == pytest.approx(2460 / 210, rel=1e-7)
    out = solved(torch.tensor([[[0.0, 1, 4], [2, 1, 0]]]), torch.tensor([[2.0, 2]]), torch.tensor([[1.0, 1, 2]]))
    assert out["value"].item() == 0.25
    assert out["mass"].tolist() == [[[0.25, 0.25, 0.5, 0]]]
    assert out["rows"].tolist() == [[[0, 0, 1, 0]]] and out["columns"].tolist() == [[[0, 1, 2, 0]]]


@pytest.mark.parametrize("weighted", [False, True])
def test_forbidden_pairs_do_not_blur_the_others(weighted: bool) -> None:
    cost = rand(6, 30, 30)
    a, b = (weights(6, 30, dtype=torch.float64), weights(6, 30, dtype=torch.float64)) if weighted else (None, None)
    allowed = torch.rand(6, 30, 30) < 0.5
    values = [solved(torch.where(allowed, cost, far), a, b)["value"] for far in (1e2, 1e30)]
    assert ((values[0] - values[1]).abs() < 1e-14 * values[0]).all()


@pytest.mark.parametrize(("n", "m"), SIZES)
def test_plan_is_a_vertex_on_tight_pairs(n: int, m: int) -> None:
    cost, a, b = rand(4, n, m), weights(4, n, dtype=torch.float64), weights(4, m, dtype=torch.float64)
    for out in (solved(cost), solved(cost, a, b)):
        used = out["mass"] > 0
        assert (used.long().diff(dim=-1) <= 0).all()  # unused entries come last, and are 0
        assert all(not out[name][~used].any() for name in ("rows", "columns", "mass"))
        dense = exact_plan(out["rows"], out["columns"], out["mass"], n, m)
        assert torch.equal((dense > 0).sum((-2, -1)), used.sum(-1))
        slack = cost[:, None] - out["f"][..., :, None] - out["g"][..., None, :]
        assert slack[dense > 0].abs().max() < 1e-14
        for entries, rows, columns in zip(used, out["rows"], out["columns"], strict=True):
            # Without a cycle: as edges between rows and columns, the entries are independent.
            i, j = rows[entries].long(), columns[entries].long()
            incidence = torch.zeros(len(i), n + m, dtype=torch.float64)
            incidence[torch.arange(len(i)), i] = incidence[torch.arange(len(i)), n + j] = 1
            assert torch.linalg.matrix_rank(incidence) == len(i)


def test_dual_variables_share_the_value() -> None:
    cost, a, b = rand(2, 9, 14), weights(2, 9, dtype=torch.float64), weights(2, 14, dtype=torch.float64)
    out = solved(cost, a, b)
    for side, weight in (("f", a), ("g", b)):
        share = (out[side][:, 0] * weight / weight.sum(-1, keepdim=True)).sum(-1)
        assert (share - out["value"][:, 0] / 2).abs().max() < 1e-15


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("n", "m"), [(20, 20), (20, 13)])
def test_lower_precision_is_float64_rounded(n: int, m: int, dtype: torch.dtype) -> None:
    cost, a, b = rand(3, n, m).to(dtype), weights(3, n), weights(3, m)
    for ours, exact in (
        (solved(cost), solved(cost.double())),
        (solved(cost, a, b), solved(cost.double(), a.double(), b.double())),
    ):
        assert ours["value"].dtype == torch.float32
        for name in OUTPUTS:
            assert torch.equal(ours[name], exact[name].to(ours[name].dtype)) or name == "error"
        assert ours["error"].max() < 1e-14


def test_any_strides_and_a_shared_cost_without_a_copy() -> None:
    cost, a = rand(3, 8, 6), weights(3, 8, dtype=torch.float64)
    expected = solved(cost, a)
    padded = torch.full((3, 16, 12), math.nan, dtype=torch.float64)
    padded[:, ::2, ::2] = cost
    for same in (cost.transpose(1, 2).contiguous().transpose(1, 2), padded[:, ::2, ::2]):
        for ours, theirs in zip(solved(same, a).values(), expected.values(), strict=True):
            assert torch.equal(ours, theirs)
    shared, repeated = solved(cost[:1].expand(3, 8, 6), a), solved(cost[:1].repeat(3, 1, 1), a)
    for ours, theirs in zip(shared.values(), repeated.values(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.every_strategy
@pytest.mark.parametrize("weighted", [False, True])
def test_bits_do_not_depend_on_run_threads_or_batch(weighted: bool, threads: None) -> None:
    cost = torch.rand(6, 40, 40)
    a, b = (weights(6, 40), weights(6, 40)) if weighted else (None, None)
    torch.set_num_threads(1)
    expected = solved(cost, a, b)
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        for ours, theirs in zip(solved(cost, a, b).values(), expected.values(), strict=True):
            assert torch.equal(ours, theirs)
    alone = solved(cost[4:5], None if a is None else a[4:5], None if b is None else b[4:5])
    for ours, theirs in zip(alone.values(), expected.values(), strict=True):
        assert torch.equal(ours[0], theirs[4])


@pytest.mark.every_strategy
@pytest.mark.parametrize("bad", [math.nan, -math.inf])
@pytest.mark.parametrize("weighted", [False, True])
def test_nan_and_minus_inf_stay_in_their_own_problem(weighted: bool, bad: float) -> None:
    cost = rand(3, 9, 9)
    a = weights(3, 9, dtype=torch.float64) if weighted else torch.ones(3, 9, dtype=torch.float64)
    expected = solved(cost, a)
    cost[1, 2, 3] = bad
    leaves = [cost.requires_grad_(), a.requires_grad_()]
    out = solved(*leaves)
    grads = torch.autograd.grad(out["value"].sum(), leaves)
    for name in ("value", "f", "g", "mass", "gap", "error"):
        assert out[name][1].isnan().all()
        assert torch.equal(out[name][::2], expected[name][::2])
    assert all(grad[1].isnan().all() and grad[::2].isfinite().all() for grad in grads)


def test_removed_patches_are_not_looked_at() -> None:
    cost, a, b = rand(2, 8, 8), weights(2, 8, dtype=torch.float64), weights(2, 8, dtype=torch.float64)
    a[:, 3] = b[:, 5] = b[:, 0] = 0
    rows, columns = [0, 1, 2, 4, 5, 6, 7], [1, 2, 3, 4, 6, 7]
    small = solved(cost[:, rows][:, :, columns], a[:, rows], b[:, columns])
    full = solved(cost, a, b)
    assert torch.equal(full["value"], small["value"])
    assert torch.equal(full["f"][..., rows], small["f"]) and torch.equal(full["g"][..., columns], small["g"])
    # What they would cost is in their dual variables, unless it is not a number.
    slope = (cost[:, None, 3, columns] - small["g"]).amin(-1)
    assert torch.equal(full["f"][..., 3], slope)
    cost[:, 3] = math.nan
    cost[:, :, 0] = math.inf
    broken = solved(cost, a, b)
    assert torch.equal(broken["value"], full["value"])
    assert (broken["f"][..., 3] == 0).all() and (broken["g"][..., 0] == 0).all()


@pytest.mark.parametrize("ones", [False, True])
def test_equal_weights_are_no_weights(ones: bool) -> None:
    cost = rand(3, 15, 15)
    weight = torch.full((3, 15), 1.0 if ones else 0.3, dtype=torch.float64)
    for ours, theirs in zip(solved(cost, weight, weight).values(), solved(cost).values(), strict=True):
        assert torch.equal(ours, theirs) or (ours - theirs).abs().max() < 1e-15  # the marginals' own rounding


def test_weights_in_another_order_give_whole_entries() -> None:
    """Sums that differ in the last bits: nothing is left over, nor moved in crumbs."""
    torch.manual_seed(3)
    points, a = torch.randn(1, 40, 2, dtype=torch.float64), rand(1, 40)
    order = torch.randperm(40)
    cost = torch.cdist(points, points[:, order], compute_mode="donot_use_mm_for_euclid_dist")
    out = solved(cost, a, a[:, order])
    assert out["value"].item() == 0
    assert (out["mass"] > 0).sum() == 40
    assert torch.equal(order[out["columns"][0, 0, :40].long()], out["rows"][0, 0, :40].long())


@pytest.mark.parametrize(("n", "m"), [(6, 6), (5, 8)])
def test_gradcheck(n: int, m: int) -> None:
    cost = rand(2, 3, n, m).requires_grad_()
    a, b = weights(2, n, dtype=torch.float64, grad=True), weights(2, 3, m, dtype=torch.float64, grad=True)
    torch.autograd.gradcheck(lambda *inputs: exact_forward(*inputs, *OPTIONS, "solve")[0], (cost, a, b))
    torch.autograd.gradcheck(lambda c: exact_forward(c, None, None, *OPTIONS, "solve")[0], (cost,))


def test_gradient_of_the_cost_is_the_plan() -> None:
    cost = torch.rand(2, 1, 7, 9).to(torch.bfloat16).requires_grad_()
    value, _, _, rows, columns, mass, *_ = exact_forward(cost, None, None, *OPTIONS, "solve")
    (grad,) = torch.autograd.grad(value, cost, torch.tensor([[2.0], [0.0]]))
    plan = exact_plan(rows, columns, mass, 7, 9)
    assert grad.dtype == torch.bfloat16
    assert torch.equal(grad[0], (2 * plan[0]).to(torch.bfloat16)) and not grad[1].any()
    assert (plan.sum(-1) - 1 / 7).abs().max() < 1e-7 and (plan.sum(-2) - 1 / 9).abs().max() < 1e-7


def test_removed_patches_get_no_gradient_but_their_slope_is_known() -> None:
    cost, a, b = rand(1, 6, 7), weights(1, 6, dtype=torch.float64), weights(1, 7, dtype=torch.float64)
    a[0, 2] = 0
    out = solved(cost, a.requires_grad_(), b)
    (grad,) = torch.autograd.grad(out["value"].sum(), a)
    assert grad[0, 2] == 0
    step = torch.zeros_like(a).index_fill(1, torch.tensor([2]), 1e-6)
    mean = (a * out["f"][:, 0]).sum() / a.sum()
    slope = (solved(cost, a + step, b)["value"] - out["value"]).item() / 1e-6
    assert slope == pytest.approx(((out["f"][0, 0, 2] - mean) / a.sum()).item(), rel=1e-4)


def test_second_derivatives() -> None:
    """In the costs alone the value is linear, piece by piece; the plan's dependence on the weights is refused."""
    cost, a = rand(1, 1, 4, 4).requires_grad_(), weights(1, 4, dtype=torch.float64, grad=True)
    (grad,) = torch.autograd.grad(
        exact_forward(cost, None, None, *OPTIONS, "solve")[0].square().sum(), cost, create_graph=True
    )
    (second,) = torch.autograd.grad(grad[0, 0, 0].sum(), cost)
    assert (second - 2 * (grad / grad.sum())[0, 0, 0].sum() * (grad / grad.sum())).abs().max() < 1e-14
    (grad,) = torch.autograd.grad(exact_forward(cost, a, None, *OPTIONS, "solve")[0].sum(), cost, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives .* are not implemented"):
        torch.autograd.grad(grad[0, 0, 0].sum(), a)


def test_under_transforms_of_torch_func() -> None:
    cost = rand(3, 2, 1, 5, 6)

    def value(cost: Tensor) -> Tensor:
        return exact_forward(cost, None, None, *OPTIONS, "solve")[0].sum()

    each = torch.func.vmap(torch.func.grad(value))(cost)
    assert torch.equal(each, torch.stack([torch.func.grad(value)(c) for c in cost]))


@pytest.mark.cpu_only("contents of weights are not looked at: they give NaN")
def test_bad_weights_are_refused() -> None:
    a = torch.ones(2, 3)
    a[1, 2] = -1
    with pytest.raises(
        ValueError, match=r"sfr_ext.solve: expected a to be finite and non-negative.*got -1 at \[1, 2\]"
    ):
        exact_forward(torch.rand(2, 1, 3, 3), a, None, *OPTIONS, "solve")


@pytest.mark.every_strategy
def test_empty_batch() -> None:
    cost = torch.rand(0, 2, 5, 4, requires_grad=True)
    out = exact_forward(cost, None, None, *OPTIONS, "solve")
    assert [tuple(t.shape) for t in out[:6]] == [(0, 2), (0, 2, 5), (0, 2, 4), *[(0, 2, 8)] * 3]
    assert torch.autograd.grad(out[0].sum(), cost)[0].shape == (0, 2, 5, 4)


def test_operators() -> None:
    cost, a, b = torch.rand(2, 3, 4, 5, requires_grad=True), weights(2, 4, grad=True), weights(2, 3, 5, grad=True)
    torch.library.opcheck(torch.ops.sfr_ext.exact_forward.default, (cost, a, b, *OPTIONS, "solve"))
    torch.library.opcheck(torch.ops.sfr_ext.exact_forward.default, (cost, None, None, *OPTIONS, "solve"))


# ------------------------------------------------------------------------------------------- mixed scales


def linear_program(cost: np.ndarray, a: np.ndarray, b: np.ndarray) -> float:
    """The least cost of moving ``a`` to ``b``, of the same sum; inf where it takes a pair of infinite cost."""
    n, m = cost.shape
    sums = np.vstack([np.kron(np.eye(n), np.ones(m)), np.kron(np.ones(n), np.eye(m))])
    bounds = [(0, None if np.isfinite(c) else 0) for c in cost.ravel()]
    finite = np.where(np.isfinite(cost), cost, 0)
    found = linprog(finite.ravel(), A_eq=sums, b_eq=np.concatenate([a, b]), bounds=bounds, method="highs")
    return float(found.fun) if found.status == 0 else math.inf


def blocks(rng: np.random.Generator, big: float, unit: float) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """Three problems side by side and ``big`` between them, in any order; and the value of all."""
    parts = []
    for _ in range(3):
        n, m = rng.integers(2, 6, 2)
        flow = rng.integers(0, 4, (n, m)) + np.eye(n, m, dtype=int)[rng.permutation(n)] + 1
        parts.append((rng.integers(0, 10, (n, m)).astype(float), flow.sum(1) * 1.0, flow.sum(0) * 1.0))
    value = unit * sum(linear_program(*part) for part in parts)
    a, b = (np.concatenate([part[k] for part in parts]) for k in (1, 2))
    cost = np.full((len(a), len(b)), big)
    i = j = 0
    for part, _, _ in parts:
        cost[i : i + part.shape[0], j : j + part.shape[1]] = unit * part
        i, j = i + part.shape[0], j + part.shape[1]
    rows, columns = rng.permutation(len(a)), rng.permutation(len(b))
    return cost[rows][:, columns], a[rows], b[columns], value / a.sum()


@pytest.mark.parametrize("big", [1e12, 1e16, 1e30, 1e100, 1e300, 1.7e308])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_blocks_with_a_large_number_between_them(big: float, dtype: torch.dtype) -> None:
    rng = np.random.default_rng(0)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    for unit in (1.0, 1e-3, 1e-12):
        for _ in range(8):
            cost, a, b, value = blocks(rng, min(big, 3e38) if dtype == torch.float32 else big, unit)
            result = solve(*(torch.tensor(x, dtype=dtype) for x in (cost, a, b)), solver="exact")
            assert result.transport_cost.item() == pytest.approx(value, rel=tolerance)
            assert result.converged.item()
            assert result.dual_gap.item() <= tolerance * value


def test_the_case_that_was_reported() -> None:
    cost = [[2.0, 0, 1e16, 1e16], [2, 3, 1e16, 1e16], [1e16, 1e16, 3, 3], [1e16, 1e16, 1, 1]]
    a, b = torch.tensor([3.0, 3, 3, 4]).double(), torch.tensor([2.0, 4, 6, 1]).double()
    result = solve(torch.tensor(cost, dtype=torch.float64), a, b, solver="exact")
    assert result.transport_cost.item() == pytest.approx(20 / 13, rel=1e-15) and result.converged


@pytest.mark.parametrize("far", [1e4, 1e7, 1e10])
def test_clusters_far_apart(far: float) -> None:
    rng = np.random.default_rng(1)
    x, y = rng.standard_normal((2, 18, 3))
    a = rng.integers(1, 9, 18).astype(float)
    b = a[np.concatenate([rng.permutation(10), 10 + rng.permutation(8)])]
    offset = np.zeros((18, 3))
    offset[10:] = far
    cost = (((x + offset)[:, None] - (y + offset)[None]) ** 2).sum(-1)
    parts = ((slice(0, 10),) * 2, (slice(10, 18),) * 2)
    value = sum(linear_program(cost[part], a[part[0]], b[part[1]]) for part in parts) / a.sum()
    result = solve(*(torch.tensor(t) for t in (cost, a, b)), solver="exact")
    assert result.transport_cost.item() == pytest.approx(value, rel=1e-12) and result.converged


@pytest.mark.parametrize("kind", ["any", "both signs", "rows", "forbidden by 1e300"])
@pytest.mark.parametrize("weighted", [False, True])
def test_costs_and_weights_of_all_scales_are_certified(kind: str, weighted: bool) -> None:
    rng = np.random.default_rng(2)
    for _ in range(20):
        n, m = rng.integers(2, 30, 2)
        cost = 10 ** (60 * rng.random((n, m)) - 30)
        if kind == "both signs":
            cost *= rng.choice([-1, 1], (n, m))
        if kind == "rows":
            cost = rng.random((n, m)) * 10.0 ** rng.integers(-30, 30, (n, 1))
        if kind == "forbidden by 1e300":
            cost[rng.random((n, m)) < 0.3] = 1e300
        scales = [10 ** (-12 * rng.random(k)) if weighted else np.ones(k) for k in (n, m)]
        result = solve(torch.tensor(cost), *map(torch.tensor, scales), solver="exact")
        moved = (result.plan.numpy() * np.abs(cost)).sum()
        assert result.converged and result.dual_gap <= 1e-9 * moved
        excess = (result.plan.sum(-1) - torch.tensor(scales[0] / scales[0].sum())).abs().max()
        assert excess < 1e-15


def test_a_weight_of_next_to_nothing_that_costs_most() -> None:
    """1e-12 of the mass at 1e16: the rest of the plan is exact beside it."""
    cost = torch.tensor([[1e16, 1e16, 1e16], [5.0, 1, 2], [4, 3, 1]], dtype=torch.float64)
    a, b = torch.tensor([1e-12, 1, 1]).double(), torch.tensor([0.5, 0.5, 1 + 1e-12]).double()
    result = solve(cost, a, b, solver="exact")
    p, q = a / a.sum(), b / b.sum()
    # Row 0 ships anywhere at the same price; of the rest row 1 fills column 1, row 2 column 2.
    value = 1e16 * p[0] + (4 * (p[2] - (q[2] - p[0])) + (q[2] - p[0])) + 5 * (p[1] - q[1]) + q[1]
    assert result.converged and result.transport_cost <= value * (1 + 1e-12)


# ----------------------------------------------------------------------------------- forbidden, empty, left behind


@pytest.mark.parametrize("square", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_forbidden_pairs(square: bool, dtype: torch.dtype) -> None:
    rng = np.random.default_rng(3)
    costs, rows, columns, expected = [], [], [], []
    for share in (0.0, 0.2, 0.4, 0.6, 0.8) * 6:
        cost = torch.tensor(rng.random((6, 6 if square else 9))).to(dtype)
        cost[torch.tensor(rng.random(cost.shape) < share)] = math.inf
        a = np.ones(6) if square else rng.integers(1, 4, 6) * 3.0
        b = np.ones(6) if square else np.bincount(rng.integers(0, 9, int(a.sum()) - 9), minlength=9) + 1.0
        costs.append(cost), rows.append(torch.tensor(a)), columns.append(torch.tensor(b))
        expected.append(linear_program(cost.double().numpy(), a, b) / a.sum())
    cost, a, b = torch.stack(costs).requires_grad_(), torch.stack(rows), torch.stack(columns)
    weight = torch.float64 if dtype == torch.float64 else torch.float32
    leaves = [cost, a.to(weight).requires_grad_(), b.to(weight).requires_grad_()]
    result = solve(*leaves, solver="exact")
    value, feasible = torch.tensor(expected, dtype=torch.float64), torch.tensor(expected) < math.inf
    assert 5 < int(feasible.sum()) < 28
    assert torch.equal(result.converged, feasible)
    assert (result.transport_cost[~feasible] == math.inf).all() and (result.plan[~feasible] == 0).all()
    error = (result.transport_cost.double() - value)[feasible].abs().max()
    assert error < (1e-12 if dtype == torch.float64 else 1e-6)
    assert (result.plan[cost == math.inf] == 0).all()
    excess = result.f[..., :, None] + result.g[..., None, :] - cost.to(result.f.dtype)
    assert excess[feasible].max() < 1e-5
    for grad in torch.autograd.grad(result.transport_cost.sum(), leaves):
        assert grad.isfinite().all() and (grad[~feasible] == 0).all()


def test_an_infinite_cost_of_features_is_not_meant() -> None:
    x, y = torch.randn(3, 5, 4), torch.randn(3, 5, 4)
    expected = solve_sample(x, y, metric="sqeuclidean", solver="exact").transport_cost
    x[1, 2] = 3e38
    value = solve_sample(x, y, metric="sqeuclidean", solver="exact").transport_cost
    assert value[1].isnan() and torch.equal(value[::2], expected[::2])


@pytest.mark.parametrize("reach", [None, 1.0])
@pytest.mark.parametrize("side", [1, 2])
def test_an_empty_problem_is_nothing(side: int, reach: float | None) -> None:
    leaves = [rand(3, 5, 7), rand(3, 5), rand(3, 7)]
    expected = solve(*(leaf.clone() for leaf in leaves), solver="exact", reach=reach)
    leaves[side][1] = 0
    for leaf in leaves:
        leaf.requires_grad_()
    result = solve(*leaves, solver="exact", reach=reach)
    for name in ("transport_cost", "f", "g", "n_iter", "marginal_error", "dual_gap", "plan"):
        assert (getattr(result, name)[1] == 0).all()
        assert torch.equal(getattr(result, name)[::2], getattr(expected, name)[::2])
    assert result.converged.all()
    for grad in torch.autograd.grad(result.transport_cost.sum(), leaves):
        assert (grad[1] == 0).all() and grad.isfinite().all()


REACHES = [1.0, (0.4, 1.1), (0.5, None), (None, 0.9), (1e-3, 1e-3), (50.0, 50.0)]


@pytest.mark.parametrize("reach", REACHES)
@pytest.mark.parametrize(("n", "m"), [(6, 6), (4, 9), (9, 4), (1, 3)])
def test_what_is_left_behind_has_a_price(n: int, m: int, reach: Any) -> None:
    cost, a, b = rand(4, n, m), 2 * rand(4, n), rand(4, m)
    sides = reach if isinstance(reach, tuple) else (reach, reach)
    if sides[0] is None:
        b *= 3 / b.sum(-1, keepdim=True)
    if sides[1] is None:
        a *= 3 / a.sum(-1, keepdim=True)
    result = solve(cost, a, b, solver="exact", reach=reach)
    for k in range(4):
        p, q = (w[k].numpy() / (w[k].sum().item() if side is None else 1) for w, side in ((a, sides[0]), (b, sides[1])))
        wider = np.full((n + 1, m + 1), math.inf)
        wider[:n, :m] = cost[k]
        wider[:n, m] = math.inf if sides[0] is None else sides[0] / 2
        wider[n, :m] = math.inf if sides[1] is None else sides[1] / 2
        wider[n, m] = 0
        value = linear_program(wider, np.append(p, q.sum()), np.append(q, p.sum()))
        assert result.transport_cost[k].item() == pytest.approx(value, rel=1e-9)
        plan = result.plan[k].numpy()
        moved = plan.sum()
        paid = sum((w.sum() - moved) * s / 2 for w, s in ((p, sides[0]), (q, sides[1])) if s is not None)
        assert (plan * cost[k].numpy()).sum() + paid == pytest.approx(value, rel=1e-12)
        assert (plan.sum(1) <= p + 1e-15).all() and (plan.sum(0) <= q + 1e-15).all()
        f, g = result.f[k].numpy(), result.g[k].numpy()
        assert (f[:, None] + g - cost[k].numpy()).max() < 1e-14
        assert sides[0] is None or f.max() <= sides[0] / 2 + 1e-14
        assert sides[1] is None or g.max() <= sides[1] / 2 + 1e-14
        assert p @ f + q @ g == pytest.approx(value, rel=1e-12)
    assert result.converged.all() and torch.equal(result.entropic_cost, result.transport_cost)


def own_columns(rows: int, each: int, dtype: torch.dtype) -> Tensor:
    """Each row may go to columns of its own."""
    own = torch.arange(rows)[:, None] == torch.arange(rows * each) // each
    return torch.where(own, 1.0, math.inf).to(dtype)


@pytest.mark.parametrize("reach", [None, (None, 10.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sums_that_are_equal_but_for_rounding(dtype: torch.dtype, reach: Any) -> None:
    """A block has as much on one side as on the other; the sums of what was rounded differ in their last digits."""
    b = torch.rand(200, 12, dtype=dtype)
    b = b / b.sum(-1, keepdim=True)
    for cost, a in (
        (own_columns(3, 4, dtype), b.unflatten(-1, (3, 4)).sum(-1)),
        (own_columns(1, 12, dtype), b.sum(-1)[:, None]),
    ):
        for turned in (False, True):
            problem = (cost.T, b, a) if turned else (cost, a, b)
            sides = reach if reach is None or not turned else reach[::-1]
            result = solve(*problem, solver="exact", reach=sides)
            torch.testing.assert_close(result.transport_cost, torch.ones(200, dtype=dtype))
            assert result.converged.all() and (result.marginal_error < 1e-5).all()
            assert (result.plan.sum((-2, -1)) - 1).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_weights_that_are_narrower_than_the_costs(dtype: torch.dtype) -> None:
    b = torch.rand(50, 12).to(dtype)
    a = b.unflatten(-1, (3, 4)).sum(-1)
    for costs in (torch.float32, torch.float64):
        result = solve(own_columns(3, 4, costs), a, b, solver="exact")
        assert ((result.transport_cost - 1).abs() < 4 * torch.finfo(dtype).eps).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("each", [1, 3])
def test_an_imbalance_is_not_shared_out(each: int, dtype: torch.dtype) -> None:
    """What one block has too much goes to many others, or comes from many columns, a little to each."""
    unit = torch.finfo(dtype).eps
    for blocks_ in (100, 400):
        a = torch.ones(blocks_, dtype=dtype)
        a[0] += 1e4 * unit
        assert solve(own_columns(blocks_, each, dtype), a, solver="exact").transport_cost == math.inf
    cost = torch.full((2, 502), 1.0, dtype=dtype)
    cost[0, 501:] = cost[1, :501] = math.inf
    b = torch.full((502,), 25 * unit, dtype=dtype)
    b[0] = b[501] = 0.5
    for order in (torch.arange(502), torch.arange(502).flip(0)):
        result = solve(cost[:, order], torch.tensor([0.5, 0.5], dtype=dtype), b[order], solver="exact")
        assert result.transport_cost == math.inf and not result.converged


@pytest.mark.parametrize("n", [2, 3, 7, 10])
def test_uniform_weights_that_are_written_out(n: int) -> None:
    a, b = torch.full((n,), 1 / n, dtype=torch.float64), torch.full((3 * n,), 1 / (3 * n), dtype=torch.float64)
    for reach in (None, (None, 10.0), (10.0, None)):
        result = solve(own_columns(n, 3, torch.float64), a, b, solver="exact", reach=reach)
        assert abs(result.transport_cost - 1) < 1e-12 and result.converged


def test_sums_that_differ_by_more_than_rounding_leave_no_plan() -> None:
    cost = own_columns(2, 2, torch.float64)
    for a, b in (
        ([0.5, 0.5], [0.25, 0.25, 0.25 + 1e-9, 0.25 - 1e-9 + 1e-7]),
        ([1.0, 1e-20], [0.5, 0.5, 1e-20, 1e-20]),  # the second block's masses, however small, are 1 and 2
    ):
        result = solve(cost, *(torch.tensor(w, dtype=torch.float64) for w in (a, b)), solver="exact")
        assert result.transport_cost == math.inf and not result.converged
    cost[1] = math.inf  # a patch that weighs nothing beside the others, and may go nowhere
    a = torch.tensor([1.0, 1e-18], dtype=torch.float64)
    cost[0] = 1
    assert solve(cost, a, solver="exact").transport_cost == math.inf


def test_too_little_to_fill_a_side_without_a_reach_is_no_plan() -> None:
    cost, a = rand(2, 3, 4), torch.tensor([[0.2, 0.2, 0.2], [0.4, 0.4, 0.4]]).double()
    result = solve(cost, a, solver="exact", reach=(1.0, None))
    assert result.transport_cost[0] == math.inf and result.converged.tolist() == [False, True]


@pytest.mark.parametrize("reach", [1.0, (0.6, 0.9), (0.7, None)])
def test_gradcheck_with_a_reach(reach: Any) -> None:
    cost, a, b = rand(2, 4, 5), 2 + rand(2, 4), weights(2, 5, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (cost, a, b)]
    torch.autograd.gradcheck(lambda *t: solve(*t, solver="exact", reach=reach).transport_cost, leaves)


def test_a_reach_between_features() -> None:
    x, y = rand(2, 6, 3).requires_grad_(), rand(2, 5, 3).requires_grad_()
    value = emd_l2(x, y, solver="exact", reach=0.5, reduction="none")
    expected = solve(cost_matrix(x, y), solver="exact", reach=0.5).transport_cost
    assert torch.equal(value, expected)
    torch.autograd.gradcheck(lambda x, y: emd_l2(x, y, solver="exact", reach=0.5), (x, y))


# --------------------------------------------------------------------------------------------- padding, order


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("n", "m"), [(7, 7), (5, 9), (9, 5), (130, 140)])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reach", [None, 0.5])
def test_padding_changes_no_bit(n: int, m: int, weighted: bool, reach: float | None, dtype: torch.dtype) -> None:
    cost = rand(1, n, m).to(dtype)
    a, b = ((torch.rand(1, k) if weighted else torch.full((1, k), 0.25)).to(dtype) for k in (n, m))
    small = solve(cost, a, b, solver="exact", reach=reach)
    for more_a, more_b in ((0, 3), (200, 0), (30, 77)):
        wide = torch.full((1, n + more_a, m + more_b), math.nan, dtype=dtype)
        wide[:, :n, :m] = cost
        padded = solve(wide, F.pad(a, (0, more_a)), F.pad(b, (0, more_b)), solver="exact", reach=reach)
        assert torch.equal(padded.f[:, :n], small.f) and torch.equal(padded.g[:, :m], small.g)
        assert torch.equal(padded.plan[:, :n, :m], small.plan)
        for name in ("transport_cost", "n_iter", "marginal_error", "dual_gap"):
            assert torch.equal(getattr(padded, name), getattr(small, name))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("reach", [None, (None, 0.5)])
def test_padding_changes_no_bit_of_a_gradient(reach: Any, dtype: torch.dtype) -> None:
    def gradients(*inputs: Tensor) -> tuple[Tensor, ...]:
        leaves = [t.clone().requires_grad_() for t in inputs]
        return torch.autograd.grad(solve(*leaves, solver="exact", reach=reach).transport_cost.sum(), leaves)

    cost, a, b = rand(30, 5, 4).to(dtype), (rand(30, 5) + 0.1).to(dtype), (rand(30, 4) + 0.1).to(dtype)
    wide = rand(30, 7, 12).to(dtype)
    wide[:, :5, :4] = cost
    of_cost, of_a, of_b = gradients(wide, F.pad(a, (0, 2)), F.pad(b, (0, 8)))
    small = gradients(cost, a, b)
    for ours, theirs in zip((of_cost[:, :5, :4], of_a[:, :5], of_b[:, :4]), small, strict=True):
        assert torch.equal(ours, theirs)
    assert not of_cost[:, 5:].any() and not of_a[:, 5:].any() and not of_b[:, 4:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("metric", ["l2", "sqeuclidean", "cosine", "l1"])
def test_padding_changes_no_bit_of_features_gradients(metric: str, dtype: torch.dtype) -> None:
    for n, m, more in itertools.product((5, 23), (3, 7, 9, 26), (1, 6)):
        x, y = rand(2, n, 11).to(dtype).requires_grad_(), rand(2, m, 11).to(dtype).requires_grad_()
        a, b = (rand(2, n) + 0.1).to(dtype), (rand(2, m) + 0.1).to(dtype)
        options = {"solver": "exact", "metric": metric, "reduction": "sum"}
        small = emd_l2(x, y, student_weight=a, teacher_weight=b, **options)
        wide = emd_l2(
            torch.cat([x, rand(2, more, 11).to(dtype)], 1),
            torch.cat([y, rand(2, more, 11).to(dtype)], 1),
            student_weight=F.pad(a, (0, more)),
            teacher_weight=F.pad(b, (0, more)),
            **options,
        )
        assert torch.equal(small, wide)
        assert all(map(torch.equal, torch.autograd.grad(small, (x, y)), torch.autograd.grad(wide, (x, y))))


@pytest.mark.parametrize("reach", [None, 1.0])
def test_dual_variables_at_removed_patches(reach: float | None) -> None:
    cost, a, b = 50 * rand(2, 9, 6), rand(2, 9), rand(2, 6)
    a[:, [1, 5]] = b[:, [0]] = 0
    result = solve(cost, a, b, solver="exact", reach=reach)
    price = math.inf if reach is None else reach / 2
    kept_a, kept_b = a[0] > 0, b[0] > 0
    slopes_a = (cost[:, ~kept_a][..., kept_b] - result.g[:, None, kept_b]).amin(-1).clamp_max(price)
    slopes_b = (cost[:, kept_a][..., ~kept_b] - result.f[:, kept_a, None]).amin(-2).clamp_max(price)
    assert torch.equal(result.f[:, ~kept_a], slopes_a) and torch.equal(result.g[:, ~kept_b], slopes_b)
    x, y = rand(2, 9, 3), rand(2, 6, 3)
    sample = solve_sample(x, y, a, b, solver="exact", reach=reach)
    assert (sample.f[:, ~kept_a] == 0).all() and (sample.g[:, ~kept_b] == 0).all()


# ------------------------------------------------------------------------------------------ ways through the solver

HARD = {
    "ties": lambda n: torch.randint(0, 3, (1, n, n)).double(),
    "few zeros": lambda n: (rand(1, n, n) > 0.02).double(),
    "next to no zeros": lambda n: (rand(1, n, n) > 1 / n).double(),
    "sorted": lambda n: (torch.arange(n)[:, None] * torch.arange(n))[None].double(),
    "large integers": lambda n: torch.randint(-50, 50, (1, n, n)).double(),
    "the same but for a shift": lambda n: rand(1, n, 1) + rand(1, 1, n),
    "clouds apart": lambda n: torch.cdist(torch.randn(1, n, 3).double(), torch.randn(1, n, 3).double() + 5),
    "optimum at the minima": lambda n: 1 + rand(1, n, n) - torch.eye(n).double()[torch.randperm(n)],
    "on a line": lambda n: (rand(1, n, 1) - rand(1, 1, n)).abs(),
}


@pytest.mark.parametrize("kind", HARD)
@pytest.mark.parametrize("n", [60, 200, 333])
def test_assignments_of_all_ways_agree_with_scipy(kind: str, n: int) -> None:
    torch.manual_seed(n)
    cost = HARD[kind](n)
    result = solve(cost, solver="exact")
    rows, columns = linear_sum_assignment(cost[0].numpy())
    assert result.transport_cost.item() == pytest.approx(cost[0].numpy()[rows, columns].sum() / n, rel=1e-12)
    assert result.converged
    lying = solve(cost.float(), solver="exact")
    assert lying.transport_cost.item() == pytest.approx(result.transport_cost.item(), rel=1e-5)


# In some order of rows and columns, C_ij + C_kl <= C_il + C_kj for i < k, j < l.
IN_ORDER = {
    "distance": lambda x, y: (x - y).abs(),
    "squared distance": lambda x, y: (x - y) ** 2,
    "another power": lambda x, y: (x - y).abs() ** 1.3,
    "product": lambda x, y: x * y,
    "product of other signs": lambda x, y: -3 * (x - 0.5) * y,
    "softplus": lambda x, y: torch.logaddexp(x, -y),
    "with a number for each row and column": lambda x, y: (x - y) ** 2 + torch.sin(50 * x) + torch.cos(70 * y),
}


@pytest.mark.parametrize("kind", IN_ORDER)
@pytest.mark.parametrize(("n", "m"), [(8, 8), (50, 50), (130, 130), (9, 31), (140, 20)])
@pytest.mark.parametrize("weighted", [False, True])
def test_costs_in_an_order_need_no_search(kind: str, n: int, m: int, weighted: bool) -> None:
    cost = IN_ORDER[kind](rand(3, n, 1), rand(3, 1, m))
    a, b = (weights(3, n, dtype=torch.float64), weights(3, m, dtype=torch.float64)) if weighted else (None, None)
    out = exact_forward(cost[:, None], a, b, *OPTIONS, "solve")
    proof = certify(cost[:, None], a, b, out)
    assert max(proof.gap, proof.excess) < 1e-13 and proof.marginals < 1e-13
    # The proof is to 1e-13; HiGHS, which the reference asks where there are weights, stops at 1e-7.
    assert (out[0][:, 0] - reference.exact_emd(cost, a, b)).abs().max() < (1e-7 if weighted else 1e-13)
    if kind != "distance":  # rounding leaves some of these a pivot or two
        assert (out[6] == 0).all()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("much", [1e-12, 1e-5, 1e-2, 10.0])
def test_an_order_that_is_spoilt(weighted: bool, much: float) -> None:
    x, y = rand(4, 40, 1), rand(4, 1, 40)
    a, b = (weights(4, 40, dtype=torch.float64), weights(4, 40, dtype=torch.float64)) if weighted else (None, None)
    few = (rand(4, 40, 40) < 0.01) * (rand(4, 40, 40) - 0.5)
    cost = (x - y) ** 2 + much * few
    cost[3] = (x[3] - y[3]) ** 2 + much * rand(40, 40)
    out = exact_forward(cost[:, None], a, b, *OPTIONS, "solve")
    proof = certify(cost[:, None], a, b, out)
    assert max(proof.gap, proof.excess) < 1e-13 and proof.marginals < 1e-13


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("kind", IN_ORDER)
def test_an_order_of_rounded_costs(kind: str, dtype: torch.dtype) -> None:
    cost = IN_ORDER[kind](rand(2, 60, 1), rand(2, 1, 60)).to(dtype)
    out = exact_forward(cost[:, None], None, None, *OPTIONS, "solve")
    assert error(out[0][:, 0].double(), reference.exact_emd(cost.double())) < 1e-6


def test_an_order_beyond_what_sums_can_hold() -> None:
    i = torch.arange(1.0, 41, dtype=torch.float64)
    for scale in (1e305, 1e-305):
        cost = (scale * i[:, None] * i)[None]
        value = solve(cost, solver="exact").transport_cost.item()
        assert value / scale == pytest.approx((i * i.flip(0)).mean().item(), rel=1e-13)


@pytest.mark.parametrize(("n", "m"), [(700, 5), (5, 700), (300, 20), (3, 2500)])
def test_long_and_wide_problems(n: int, m: int) -> None:
    cost = rand(1, n, m)
    result = solve(cost, solver="exact")
    same = solve(cost.mT, solver="exact")
    assert result.transport_cost.item() == pytest.approx(same.transport_cost.item(), rel=1e-13)
    assert result.converged and same.converged and result.marginal_error < 1e-13
    assert result.transport_cost.item() == pytest.approx(linear_program_of_few(cost[0]), rel=1e-9)


def linear_program_of_few(cost: Tensor) -> float:
    n, m = cost.shape
    rows = sparse.kron(sparse.eye(n), np.ones((1, m)))
    columns = sparse.kron(np.ones((1, n)), sparse.eye(m))
    marginals = np.concatenate([np.full(n, 1 / n), np.full(m, 1 / m)])
    return float(linprog(cost.numpy().ravel(), A_eq=sparse.vstack([rows, columns]), b_eq=marginals, method="highs").fun)


@pytest.mark.parametrize("noise, offset", [(1e-3, 1e8), (1e-4, 1e6), (1e-6, 1e3)])
def test_an_order_within_a_common_offset_is_proven_by_what_costs_differ_by(noise: float, offset: float) -> None:
    generator = torch.Generator().manual_seed(0)
    sides = torch.rand(2, 10, 40, generator=generator, dtype=torch.float64)
    cost = sides[0, :, :, None] * sides[1, :, None] + offset
    cost += noise * torch.randn(10, 40, 40, generator=generator, dtype=torch.float64)
    result = solve(cost, solver="exact")
    for ours, one in zip(result.transport_cost, cost.numpy(), strict=True):
        assert ours - one[linear_sum_assignment(one)].mean() <= 1e-14 * offset


@pytest.mark.parametrize("large", [1e300, 9e307, 1.7e308])
def test_weights_whose_sum_overflows(large: float) -> None:
    result = solve(torch.rand(3, 3, dtype=torch.float64), torch.full((3,), large, dtype=torch.float64), solver="exact")
    assert result.converged and result.marginal_error < 1e-12
