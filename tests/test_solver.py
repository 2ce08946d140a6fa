"""``solver="exact"`` through the public functions."""

from __future__ import annotations

import pytest
import torch
from cases import METRICS, features, weights
from torch import Tensor

from sfr_ext import EMDL2Loss, cost_matrix, cross_reference_weights, emd_l2, reference, solve, solve_sample

F64 = torch.float64


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("with_weights", [False, True])
def test_value_is_the_emd(with_weights: bool, metric: str) -> None:
    """Uniform and square: an assignment; else a transport problem. With groups, maps, tokens, windows."""
    x, y = features(2, 5, 3, 3), features(2, 3, 5, 3, 3)
    a = weights(2, 9) if with_weights else None
    b = weights(2, 3, 9) if with_weights else None
    truth = reference.exact_emd(
        reference.cost_matrix(x, y, metric=metric), None if a is None else a[:, None].expand(2, 3, 9), b
    )
    options = {"metric": metric, "solver": "exact"}
    ours = emd_l2(x, y, student_weight=a, teacher_weight=b, reduction="none", **options)
    torch.testing.assert_close(ours.double(), truth, rtol=1e-5, atol=1e-6)
    tokens = emd_l2(x.flatten(2).mT, y.flatten(3).mT, student_weight=a, teacher_weight=b, **options)
    torch.testing.assert_close(tokens, ours.mean(), rtol=1e-5, atol=1e-6)
    windows = emd_l2(x, y, patch_size=2, reduction="none", **options)
    expected = reference.exact_emd(reference.cost_matrix(x, y, metric=metric, patch_size=2))
    torch.testing.assert_close(windows.double(), expected, rtol=1e-5, atol=1e-6)


def test_result() -> None:
    x, y = features(2, 4, 5, dtype=F64), features(2, 7, 5, dtype=F64)
    a, b = weights(2, 4, dtype=F64), weights(2, 7, dtype=F64)
    result = solve_sample(x, y, a, b, solver="exact")
    cost = cost_matrix(x, y)
    assert torch.equal(result.transport_cost, result.entropic_cost)
    assert torch.equal(result.eps, torch.zeros(2, dtype=F64)) and result.converged.all()
    torch.testing.assert_close((result.plan * cost).sum((1, 2)), result.transport_cost)
    rows, columns = a / a.sum(1, keepdim=True), b / b.sum(1, keepdim=True)
    torch.testing.assert_close((rows * result.f).sum(1) + (columns * result.g).sum(1), result.transport_cost)
    assert (result.f[:, :, None] + result.g[:, None] <= cost + 1e-12).all()
    torch.testing.assert_close((result.plan.sum(2), result.plan.sum(1)), (rows, columns))
    assert ((result.plan > 0).sum((1, 2)) <= 10).all() and not result.plan.requires_grad
    assert "converged=2" in repr(result)


@pytest.mark.parametrize("shape", [(4, 5), (3, 4, 5), (2, 3, 4, 5), (2, 1, 3, 4, 5)])
def test_leading_axes_of_solve(shape: tuple[int, ...]) -> None:
    cost, a = torch.rand(shape, dtype=F64), weights(*shape[:-1], dtype=F64)
    result = solve(cost, a, solver="exact")
    assert result.transport_cost.shape == shape[:-2] and result.plan.shape == shape
    assert result.f.shape == shape[:-1] and result.n_iter.shape == shape[:-2]
    torch.testing.assert_close(result.transport_cost, reference.exact_emd(cost, a))


def test_a_shared_cost() -> None:
    cost, a, b = torch.rand(4, 5, dtype=F64, requires_grad=True), weights(3, 4, dtype=F64), weights(3, 5, dtype=F64)
    result = solve(cost, a, b, solver="exact")
    torch.testing.assert_close(result.transport_cost, reference.exact_emd(cost.expand(3, 4, 5), a, b))
    (grad,) = torch.autograd.grad(result.transport_cost.sum(), cost)
    torch.testing.assert_close(grad, result.plan.sum(0))


@pytest.mark.parametrize("wanted", ["student", "teacher", "student_weight", "teacher_weight"])
def test_gradcheck(wanted: str) -> None:
    """Random problems have one optimal vertex, and the value is smooth around it."""
    names = ["student", "teacher", "student_weight", "teacher_weight"]
    inputs = [features(2, 4, 3, dtype=F64), features(2, 2, 5, 3, dtype=F64), weights(2, 4, dtype=F64)]
    inputs.append(weights(2, 2, 5, dtype=F64))
    index = names.index(wanted)

    def value(leaf: Tensor) -> Tensor:
        x, y, a, b = (leaf if i == index else t for i, t in enumerate(inputs))
        return emd_l2(x, y, student_weight=a, teacher_weight=b, solver="exact", reduction="none")

    assert torch.autograd.gradcheck(value, inputs[index].requires_grad_(), atol=1e-7)


def test_removed_patches_and_nan() -> None:
    x, y = features(2, 5, 3, 3), features(2, 5, 3, 3)
    a = torch.ones(2, 3, 3)
    a[:, 2] = 0
    holed = x.clone()
    holed[:, :, 2] = torch.nan
    ours, expected = (t.requires_grad_() for t in (holed, x[:, :, :2].clone()))
    value = emd_l2(ours, y, student_weight=a, solver="exact", reduction="none")
    whole = emd_l2(expected, y, solver="exact", reduction="none")
    torch.testing.assert_close(value, whole)
    (grad,), (other,) = torch.autograd.grad(value.sum(), ours), torch.autograd.grad(whole.sum(), expected)
    torch.testing.assert_close(grad[:, :, :2], other)
    assert (grad[:, :, 2] == 0).all()

    bad = x.detach().clone()
    bad[1, 0, 0, 0] = torch.nan
    result = solve_sample(bad, y, solver="exact")
    assert result.converged.tolist() == [True, False]
    assert result.transport_cost[0].isfinite() and result.transport_cost[1].isnan()


def test_barycentric_is_the_assignment() -> None:
    x = features(1, 6, 4)
    order = torch.randperm(6)
    result = solve_sample(x, x[:, order] + 1e-3, solver="exact")
    torch.testing.assert_close(result.barycentric(x[:, order]), x)
    torch.testing.assert_close(result.rounded_plan(), result.plan)


def test_entropic_values_come_near() -> None:
    x, y = features(2, 8, 4, 4), features(2, 8, 4, 4)
    exact = emd_l2(x, y, solver="exact", reduction="none")
    assert exact.shape == (2,)
    gaps = [emd_l2(x, y, eps=eps, tol=1e-5, reduction="none") - exact for eps in (0.3, 0.1, 0.03)]
    assert (gaps[0] > gaps[1]).all() and (gaps[1] > gaps[2]).all() and (gaps[2] > -1e-6).all()
    assert (gaps[2] < 0.02 * exact).all()


def test_module_functions_and_compile() -> None:
    x, y = features(2, 4, 3, 3), features(2, 4, 3, 3)
    a, b = cross_reference_weights(x, y)
    value = EMDL2Loss(solver="exact", metric="cosine")(x, y, a, b)
    assert torch.equal(value, emd_l2(x, y, student_weight=a, teacher_weight=b, solver="exact", metric="cosine"))

    def loss(x: Tensor) -> Tensor:
        return emd_l2(x, y, solver="exact")

    assert torch.equal(torch.compile(loss, fullgraph=True)(x), loss(x))
    pairs = torch.func.vmap(loss)(torch.stack([x, y, 2 * x]))
    torch.testing.assert_close(pairs, torch.stack([loss(x), loss(y), loss(2 * x)]))
    leaf = x.clone().requires_grad_()
    torch.testing.assert_close(torch.func.grad(loss)(x), torch.autograd.grad(loss(leaf), leaf)[0])


def test_refusals() -> None:
    x = features(1, 4, 3)
    with pytest.raises(ValueError, match="sfr_ext.emd_l2: expected solver to be one of 'sinkhorn', 'exact', got 'lp'"):
        emd_l2(x, x, solver="lp")
    with pytest.raises(TypeError, match="sfr_ext.solve: expected solver to be a str, got bool"):
        solve(torch.rand(3, 3), solver=True)
    with pytest.raises(ValueError, match=r"sfr_ext.solve_sample: expected b to be .*, got -1 at \[0, 2\]"):
        solve_sample(x, x, None, torch.tensor([[1.0, 0.0, -1.0, 0.0]]), solver="exact")


def test_second_derivatives() -> None:
    """Of features: the plan is constant but for jumps. Of weights: refused, also where they are only on the way."""
    x, y = features(1, 4, 3, dtype=F64, grad=True), features(1, 5, 3, dtype=F64, grad=True)
    a = weights(1, 4, dtype=F64, grad=True)

    def value(x: Tensor, y: Tensor) -> Tensor:
        return emd_l2(x, y, student_weight=a.detach(), solver="exact").square()

    assert torch.autograd.gradgradcheck(value, (x, y), atol=1e-6)
    of_x, of_a = torch.autograd.grad(emd_l2(x, y, student_weight=a, solver="exact"), (x, a), create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives through the weights' gradients"):
        torch.autograd.grad(of_x.sum() + of_a.square().sum(), x)
