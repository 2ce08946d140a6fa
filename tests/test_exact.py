"""The exact solver: every result proves itself, by a plan and dual variables of the same value."""

from __future__ import annotations

import math

import pytest
import torch
from cases import weights
from torch import Tensor

from benchmarks.studies.optimality import COSTS, certify, problems_of_all_kinds
from sfr_ext import reference
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
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("weighted", [False, True])
def test_nan_and_inf_stay_in_their_own_problem(weighted: bool, bad: float) -> None:
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
    (grad,) = torch.autograd.grad(exact_forward(cost, None, None, *OPTIONS, "solve")[0].square().sum(), cost, create_graph=True)
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
    with pytest.raises(ValueError, match=r"expected b to be finite.*got only zeros at \[0\]"):
        exact_forward(torch.rand(2, 1, 3, 3), None, torch.eye(2, 3) * torch.tensor([[0.0], [1.0]]), *OPTIONS, "solve")


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
