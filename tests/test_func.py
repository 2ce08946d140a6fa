"""torch.func: transforms of the public functions agree with loops, or say that they cannot."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cases import METRICS, OBJECTIVES, features, weights
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, jacfwd, jacrev, jvp, vmap

from sfr_ext import cost_matrix, emd_l2, self_feature_loss, solve, solve_sample

F64 = torch.float64


def same(ours: object, expected: object) -> None:
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_grad(objective: str) -> None:
    x, y = features(2, 6, 4, dtype=F64), features(2, 3, 5, 4, dtype=F64)
    a = weights(2, 6, dtype=F64)

    def loss(x: Tensor, y: Tensor, a: Tensor) -> Tensor:
        return emd_l2(x, y, student_weight=a, objective=objective)

    leaves = tuple(t.clone().requires_grad_() for t in (x, y, a))
    same(grad(loss, (0, 1, 2))(x, y, a), torch.autograd.grad(loss(*leaves), leaves))


@pytest.mark.parametrize("in_dims", [(0, 0, 0, 0), (1, None, 0, None), (None, 2, None, 1), (None, None, 1, None)])
def test_vmap_over_features_and_weights(in_dims: tuple[int | None, ...]) -> None:
    """An axis at any place of any argument, others shared; with groups."""
    shapes = ((2, 4, 3, 2), (2, 3, 4, 2, 2), (2, 6), (2, 3, 4))
    inputs = []
    for shape, dim in zip(shapes, in_dims, strict=True):
        full = list(shape) if dim is None else [*shape[:dim], 5, *shape[dim:]]
        inputs.append(torch.rand(full, dtype=F64) + 0.1)

    def both(x: Tensor, y: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        result = solve_sample(x, y, a, b)
        loss = emd_l2(x, y, student_weight=a, teacher_weight=b)
        return loss, result.entropic_cost, result.f, result.n_iter, result.plan, result.converged

    ours = vmap(both, in_dims)(*inputs)
    for k in range(5):
        one = [t if dim is None else t.select(dim, k) for t, dim in zip(inputs, in_dims, strict=True)]
        same(tuple(t[k] for t in ours), both(*one))


def test_vmap_without_weights_and_nested() -> None:
    x, y = features(3, 2, 4, 6, 5, dtype=F64), features(4, 7, 5, dtype=F64)
    ours = vmap(vmap(lambda x: emd_l2(x, y, metric="cosine")))(x)
    same(ours, torch.stack([torch.stack([emd_l2(one, y, metric="cosine") for one in row]) for row in x]))


def test_vmap_over_solve_and_cost_matrix() -> None:
    cost, b = torch.rand(3, 2, 4, 5, dtype=F64), weights(3, 2, 5, dtype=F64)
    ours = vmap(lambda cost, b: solve(cost, None, b).transport_cost)(cost, b)
    same(ours, solve(cost, None, b).transport_cost)
    same(vmap(lambda b: solve(cost[0], None, b).transport_cost)(b), solve(cost[0], None, b).transport_cost)
    x, y = features(3, 2, 4, 5, dtype=F64), features(2, 6, 5, dtype=F64)
    same(vmap(cost_matrix, (0, None))(x, y), torch.stack([cost_matrix(one, y) for one in x]))


def test_gradients_per_sample() -> None:
    x, y = features(3, 2, 6, 4, dtype=F64), features(3, 2, 5, 4, dtype=F64)
    ours = vmap(grad(emd_l2, (0, 1)))(x, y)
    leaves = x.clone().requires_grad_(), y.clone().requires_grad_()
    expected = torch.autograd.grad(sum(emd_l2(*pair) for pair in zip(*leaves, strict=True)), leaves)
    same(ours, expected)


@pytest.mark.parametrize("of", ["emd_l2", "solve", "cost_matrix", "plan"])
def test_jacrev(of: str) -> None:
    x, y = features(2, 4, 3, dtype=F64), features(2, 5, 3, dtype=F64)
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "emd_l2": lambda x: emd_l2(x, y, reduction="none"),
        "solve": lambda x: solve(cost_matrix(x, y), weights_of).transport_cost,
        "cost_matrix": lambda x: cost_matrix(x, y),
        "plan": lambda x: solve_sample(x, y).plan,
    }
    weights_of = weights(2, 4, dtype=F64)
    leaf = x.clone().requires_grad_()
    outputs = functions[of](leaf)
    rows = [torch.autograd.grad(value, leaf, retain_graph=True)[0] for value in outputs.flatten()]
    same(jacrev(functions[of])(x), torch.stack(rows).view(*outputs.shape, *x.shape))


ONE_BATCH_OF_ONE = {
    **{metric: lambda x, y, metric=metric: cost_matrix(x, y, metric=metric) for metric in METRICS},
    "groups": lambda x, y: cost_matrix(x, torch.stack([y, 2 * y, -y], 1)),
    "windows": lambda x, y: cost_matrix(*(z.mT.reshape(1, 3, 2, 2) for z in (x, y[:, :4])), patch_size=2),
    **{objective: lambda x, y, objective=objective: emd_l2(x, y, objective=objective) for objective in OBJECTIVES},
    "divergence of groups": lambda x, y: emd_l2(
        x, torch.stack([y, 2 * y], 1), objective="divergence", reduction="none"
    ),
    "exact": lambda x, y: emd_l2(x, y, solver="exact"),
    "exact of groups": lambda x, y: emd_l2(x, torch.stack([y, 2 * y], 1), solver="exact", reduction="none"),
    "solve": lambda x, y: solve(cost_matrix(x, y)).entropic_cost,
    "solve exactly": lambda x, y: solve(cost_matrix(x, y), solver="exact").transport_cost,
    "weights": lambda x, y: solve_sample(x, y, x[..., 0].square(), y[..., 1].square()).transport_cost,
    "plan": lambda x, y: solve_sample(x, y).plan,
    "barycentric": lambda x, y: solve_sample(x, y).barycentric(y),
    "directions": lambda x, y: self_feature_loss([x.reshape(1, 3, 2, 2), y[:, :4].reshape(1, 6, 2, 1)]),
}


@pytest.mark.parametrize("of", ONE_BATCH_OF_ONE)
def test_all_rows_at_once_of_a_batch_of_one(of: str) -> None:
    """What forward kept is then the same for all rows: expanded, a batch of one stays a view."""
    torch.manual_seed(0)
    x, y = features(1, 4, 3, dtype=F64), features(1, 5, 3, dtype=F64)
    values = ONE_BATCH_OF_ONE[of](x, y).numel()
    scale = torch.linspace(1, 2, 7, dtype=F64)

    def call(x: Tensor) -> Tensor:
        return ONE_BATCH_OF_ONE[of](x, y)

    row_by_row = torch.autograd.functional.jacobian(call, x)
    same(jacrev(call)(x), row_by_row)
    if values == 1:
        same(
            vmap(lambda s: grad(lambda x: s * call(x).sum())(x))(scale),
            torch.stack([s * row_by_row for s in scale]).view(-1, *x.shape),
        )
    leaf = x.clone().requires_grad_()
    outputs = call(leaf)
    rows = torch.eye(values, dtype=F64).view(values, *outputs.shape)
    found = vmap(lambda row: torch.autograd.grad(outputs, leaf, row, retain_graph=True)[0])(rows)
    same(found.view(row_by_row.shape), row_by_row)


def test_operators_take_what_was_kept_with_any_strides() -> None:
    def spread(value: object) -> object:
        return torch.stack([value, value], -1)[..., 0] if isinstance(value, Tensor) else value

    torch.manual_seed(0)
    for of in ONE_BATCH_OF_ONE:
        leaf = features(1, 4, 3, dtype=F64).requires_grad_()
        y = features(1, 5, 3, dtype=F64)
        found = []
        for hook in (lambda kept: kept, spread):
            with torch.autograd.graph.saved_tensors_hooks(lambda kept: kept, hook):
                found += torch.autograd.grad(ONE_BATCH_OF_ONE[of](leaf, y).square().sum(), leaf)
        assert torch.equal(*found), of


def test_hessian_by_jacrev_twice() -> None:
    x, y = features(1, 4, 2, dtype=F64), features(1, 3, 2, dtype=F64)

    def loss(x: Tensor) -> Tensor:
        return emd_l2(x, y, objective="entropic", eps=0.3, tol=1e-13, max_iter=10_000)

    hessian = jacrev(jacrev(loss))(x)
    same(hessian, torch.autograd.functional.hessian(loss, x))
    matrix = hessian.view(8, 8)
    torch.testing.assert_close(matrix, matrix.T)


def test_forward_mode_is_refused() -> None:
    """Never a tangent dropped in silence."""
    x, y = features(1, 4, 2), features(1, 3, 2)
    message = "sfr_ext.emd_forward: forward-mode derivatives are not implemented"
    with pytest.raises(NotImplementedError, match=message):
        jvp(lambda x: emd_l2(x, y), (x,), (x,))
    with pytest.raises(NotImplementedError, match=message):
        jacfwd(jacrev(lambda x: emd_l2(x, y)))(x)
    with pytest.raises(NotImplementedError, match=message), forward_ad.dual_level():
        emd_l2(forward_ad.make_dual(x, x), y)
    with pytest.raises(NotImplementedError, match="cost_forward: forward-mode"), forward_ad.dual_level():
        cost_matrix(forward_ad.make_dual(x, x), y)
    with forward_ad.dual_level():
        assert torch.equal(emd_l2(x, y), emd_l2(x, y))  # nothing to differentiate


def test_vmap_over_nothing() -> None:
    """An axis of no entries, and problems of an empty batch under an axis that has some."""
    y, cost = features(2, 5, 4), torch.rand(0, 2, 3, 4)
    assert vmap(lambda x: emd_l2(x, y, reduction="none"))(torch.rand(0, 2, 6, 4)).shape == (0, 2)
    assert vmap(emd_l2)(torch.rand(3, 0, 6, 4), torch.rand(3, 0, 5, 4)).shape == (3,)
    assert vmap(lambda cost: solve(cost, solver="exact").f)(cost).shape == (0, 2, 3)
    assert vmap(grad(lambda x: emd_l2(x, y)))(torch.rand(0, 2, 6, 4)).shape == (0, 2, 6, 4)
    assert vmap(cost_matrix, (0, None))(torch.rand(0, 2, 6, 4), y).shape == (0, 2, 6, 5)


CALLS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "emd_l2": lambda x, y: emd_l2(x, y),
    "exact": lambda x, y: emd_l2(x, y, solver="exact"),
    "divergence": lambda x, y: emd_l2(x, y, objective="divergence"),
    "windows": lambda x, y: emd_l2(*(t.mT.unflatten(2, (2, 2)) for t in (x, y[:, 1:])), patch_size=2),
    "solve_sample": lambda x, y: solve_sample(x, y).entropic_cost.sum(),
    "solve": lambda x, y: solve(cost_matrix(x, y, metric="cosine")).transport_cost.sum(),
    "self_feature_loss": lambda x, y: self_feature_loss(
        [x.mT.unflatten(2, (2, 2)), y.mT.unflatten(2, (1, 5))], detach_teacher=False
    ),
}


@pytest.mark.parametrize("call", CALLS)
def test_vjp_is_called_when_its_transform_has_ended(call: str) -> None:
    function = CALLS[call]
    x, y = features(2, 4, 8), features(2, 5, 8)
    x_leaf, y_leaf = x.clone().requires_grad_(), y.clone().requires_grad_()
    wanted = torch.autograd.grad(function(x_leaf, y_leaf), (x_leaf, y_leaf), materialize_grads=True)
    value, pull = torch.func.vjp(function, x, y)
    for ours, theirs in zip(pull(torch.ones_like(value)), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)
    batched = torch.func.vmap(pull)(torch.tensor([1.0, 2.0]))
    torch.testing.assert_close(batched[0][1], 2 * wanted[0], rtol=1e-5, atol=1e-7)


def test_jacobians_by_chunks_and_products_with_second_derivatives() -> None:
    x, y = features(2, 4, 8, dtype=torch.float64), features(2, 5, 8, dtype=torch.float64)

    def each(x: Tensor) -> Tensor:
        return emd_l2(x, y, reduction="none", tol=1e-12)

    torch.testing.assert_close(torch.func.jacrev(each, chunk_size=1)(x), torch.func.jacrev(each)(x))
    direction = features(2, 4, 8, dtype=torch.float64)
    gradient = torch.func.grad(lambda x: each(x).sum())
    (product,) = torch.func.vjp(gradient, x)[1](direction)
    step = 1e-5 * direction
    torch.testing.assert_close(product, (gradient(x + step) - gradient(x - step)) / 2e-5, rtol=1e-4, atol=1e-7)


ROWS_AT_ONCE: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    **{
        objective: lambda x, y, a, objective=objective: emd_l2(
            x, y, student_weight=a, objective=objective, reduction="none"
        )
        for objective in OBJECTIVES
    },
    "exact": lambda x, y, a: emd_l2(x, y, student_weight=a, solver="exact", reduction="none"),
    "cost_matrix": lambda x, y, a: cost_matrix(x, y).sum(1) + a.sum(),
    "solve": lambda x, y, a: solve(torch.cdist(x, y), a).transport_cost,
    "solve exactly": lambda x, y, a: solve(torch.cdist(x, y), a, solver="exact").transport_cost,
    "plan": lambda x, y, a: solve_sample(x, y, a).plan.sum(1),
}


@pytest.mark.parametrize("call", ROWS_AT_ONCE)
def test_jacobians_of_autograd_with_all_rows_at_once(call: str) -> None:
    """``is_grads_batched``, which is an older kind of vmap."""
    x, y, a = features(2, 6, 4, dtype=F64), features(2, 5, 4, dtype=F64), weights(2, 6, dtype=F64)

    def values(x: Tensor, a: Tensor) -> Tensor:
        return ROWS_AT_ONCE[call](x, y, a)

    row_by_row = torch.autograd.functional.jacobian(values, (x, a))
    same(torch.autograd.functional.jacobian(values, (x, a), vectorize=True), row_by_row)


@pytest.mark.parametrize("of", ["plan", "rounded_plan", "barycentric"])
def test_an_empty_axis_of_vmap(of: str) -> None:
    def function(cost: Tensor) -> Tensor:
        result = solve(cost)
        if of == "plan":
            return result.plan
        return result.rounded_plan() if of == "rounded_plan" else result.barycentric(torch.zeros(3, 3))

    assert vmap(function)(torch.rand(0, 5, 3)).shape == (0, 5, 3)
