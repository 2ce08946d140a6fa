"""The reference against values worked out by hand, SciPy, unrolled iterations and finite differences."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import METRICS

from sfr_ext import reference


def rand(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, dtype=torch.float64)


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


TOKENS = torch.arange(40, dtype=torch.float32).view(2, 5, 4)


# --- costs


@pytest.mark.parametrize("metric", METRICS)
def test_cost_matrix_entry_by_entry(metric):
    x, y = randn(2, 3, 4), randn(2, 5, 4)
    cost = reference.cost_matrix(x, y, metric=metric)
    assert cost.shape == (2, 3, 5)
    for b in range(2):
        for i in range(3):
            for j in range(5):
                p, q = x[b, i], y[b, j]
                want = {
                    "l2": (p - q).norm(),
                    "sqeuclidean": (p - q).norm() ** 2,
                    "l1": sum(abs(p[c] - q[c]) for c in range(4)),
                    "cosine": 1 - F.cosine_similarity(p, q, dim=0),
                }[metric]
                torch.testing.assert_close(cost[b, i, j], want)


def test_cost_matrix_of_maps_is_that_of_their_tokens():
    x, y = randn(2, 4, 2, 3), randn(2, 4, 3, 3)
    want = reference.cost_matrix(x.flatten(2).transpose(1, 2), y.flatten(2).transpose(1, 2))
    torch.testing.assert_close(reference.cost_matrix(x, y), want)


@pytest.mark.parametrize("tokens", [False, True])
def test_cost_matrix_with_groups_is_one_matrix_per_group(tokens):
    x, y = (randn(2, 6, 4), randn(2, 3, 5, 4)) if tokens else (randn(2, 4, 2, 3), randn(2, 3, 4, 5, 1))
    cost = reference.cost_matrix(x, y)
    assert cost.shape == (2, 3, 6, 5)
    for group in range(3):
        torch.testing.assert_close(cost[:, group], reference.cost_matrix(x, y[:, group]))


@pytest.mark.parametrize("grouped", [False, True])
def test_patches_are_windows(grouped):
    x, y = randn(1, 2, 3, 4), randn(1, 2, 3, 3)
    cost = reference.cost_matrix(x, y[:, None] if grouped else y, patch_size=2).reshape(6, 4)
    # Student window 4: second row and column of 2 x 3 windows. Teacher window 1: first row, second column.
    want = (x[0, :, 1:3, 1:3] - y[0, :, 0:2, 1:3]).norm()
    torch.testing.assert_close(cost[4, 1], want)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("patch_size", [1, 2])
def test_cost_matrix_gradient(metric, patch_size):
    x, y = randn(2, 3, 3, 2).requires_grad_(), randn(2, 3, 2, 3).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, y: reference.cost_matrix(x, y, metric=metric, patch_size=patch_size), (x, y)
    )


@pytest.mark.parametrize("metric", METRICS)
def test_coincident_and_zero_patches_have_finite_gradients(metric):
    x = torch.tensor([[[1.0, 2.0], [0.0, 0.0]]], dtype=torch.float64, requires_grad=True)
    cost = reference.cost_matrix(x, x.detach(), metric=metric)
    (grad,) = torch.autograd.grad(cost.diagonal(dim1=1, dim2=2).sum(), x)
    torch.testing.assert_close(grad, torch.zeros_like(grad))
    own = torch.tensor([0.0, 1.0 if metric == "cosine" else 0.0], dtype=torch.float64)
    torch.testing.assert_close(cost[0].diagonal().detach(), own)


def test_cost_matrix_refuses():
    x = rand(1, 2, 3)
    with pytest.raises(
        ValueError,
        match="expected metric to be one of 'l2', 'sqeuclidean', 'cosine', 'l1', got 'l3'",
    ):
        reference.cost_matrix(x, x, metric="l3")
    with pytest.raises(ValueError, match="reference.cost_matrix: expected patch_size to be 1 for tokens .* got 2"):
        reference.cost_matrix(x, x, patch_size=2)


# --- exact


def test_exact_by_hand():
    cost = torch.tensor([[0.0, 1, 4], [2, 1, 0]])
    # One half at row 0 goes to columns 0 (1/4) and 1 (1/4, at 1); row 1 goes to column 2 at no cost.
    value = reference.exact_emd(cost, torch.tensor([2.0, 2]), torch.tensor([1.0, 1, 2]))
    torch.testing.assert_close(value, torch.tensor(0.25, dtype=torch.float64))


def test_exact_assignment_and_linear_program_agree():
    cost = rand(2, 3, 5, 5)
    assignment = reference.exact_emd(cost)
    program = reference.exact_emd(cost, torch.ones(5), torch.ones(5))
    assert assignment.shape == (2, 3)
    torch.testing.assert_close(assignment, program)


def test_exact_ignores_removed_patches():
    cost, a, b = rand(4, 6), torch.tensor([1.0, 0, 2, 1]), torch.tensor([0.0, 1, 1, 3, 0, 1])
    want = reference.exact_emd(cost[a > 0][:, b > 0], a[a > 0], b[b > 0])
    torch.testing.assert_close(reference.exact_emd(cost, a, b), want)


def test_exact_of_an_empty_batch():
    assert reference.exact_emd(rand(0, 3, 3)).shape == (0,)


@pytest.mark.parametrize("bad", [[1.0, -1.0], [1.0, float("nan")]])
@pytest.mark.parametrize("solve", [reference.exact_emd, reference.sinkhorn])
def test_bad_weights(bad, solve):
    with pytest.raises(ValueError, match=r"expected b to be finite and non-negative, got (-1|nan) at \[1\]"):
        solve(rand(2, 2), None, torch.tensor(bad))


@pytest.mark.parametrize("reach", [None, 0.5])
def test_an_empty_problem_is_0_and_leaves_its_neighbours_alone(reach):
    """No weight on one side: value, gradients, plan and potentials are 0."""
    cost = rand(3, 4, 5).requires_grad_()
    a, b = torch.rand(3, 4, dtype=torch.float64), torch.rand(3, 5, dtype=torch.float64)
    a[1] = 0
    result = reference.sinkhorn(cost, a, b, reach=reach)
    alone = reference.sinkhorn(cost[::2], a[::2], b[::2], reach=reach)
    for name in ("transport_cost", "entropic_cost", "f", "g", "plan", "n_iter", "marginal_error"):
        found = getattr(result, name)
        assert torch.equal(found[1], torch.zeros_like(found[1]))
        torch.testing.assert_close(found[::2], getattr(alone, name))
    (grad,) = torch.autograd.grad(result.transport_cost.sum(), cost)
    assert torch.equal(grad[1], torch.zeros_like(grad[1])) and grad[::2].isfinite().all()
    torch.testing.assert_close(reference.exact_emd(cost, a, b)[1], torch.zeros((), dtype=torch.float64))


def test_weights_at_the_edge_of_the_range():
    """Their sum overflows; so do squares of costs."""
    cost = rand(4, 5)
    large, even = torch.full((4,), 1.7e308, dtype=torch.float64), torch.ones(4)
    torch.testing.assert_close(
        reference.sinkhorn(cost, large).transport_cost, reference.sinkhorn(cost, even).transport_cost
    )
    plain = reference.sinkhorn(cost).transport_cost
    for scale in (1e200, 1e-200):
        torch.testing.assert_close(reference.sinkhorn(cost * scale).transport_cost / scale, plain)


# --- Sinkhorn


@pytest.mark.parametrize("eps_scale", ["std", "absolute"])
def test_sinkhorn_satisfies_its_definition(eps_scale):
    cost, a, b = rand(3, 5, 7), rand(3, 5), rand(3, 7)
    result = reference.sinkhorn(cost, a, b, 0.2, eps_scale=eps_scale, tol=1e-12)
    a, b = a / a.sum(-1, keepdim=True), b / b.sum(-1, keepdim=True)
    product = a[:, :, None] * b[:, None]
    if eps_scale == "std":
        mean = (product * cost).sum((1, 2), keepdim=True)
        torch.testing.assert_close(result.eps, 0.2 * (product * (cost - mean) ** 2).sum((1, 2)).sqrt())
    else:
        torch.testing.assert_close(result.eps, torch.full((3,), 0.2, dtype=torch.float64))
    eps = result.eps[:, None, None]
    plan = product * ((result.f[:, :, None] + result.g[:, None] - cost) / eps).exp()
    torch.testing.assert_close(result.plan, plan)
    torch.testing.assert_close(plan.sum(2), a)
    torch.testing.assert_close(plan.sum(1), b)
    assert (result.marginal_error <= 1e-12).all()
    torch.testing.assert_close(result.transport_cost, (plan * cost).sum((1, 2)))
    divergence = (plan * (plan / product).log()).sum((1, 2))
    torch.testing.assert_close(result.entropic_cost, result.transport_cost + result.eps * divergence)


def test_sinkhorn_approaches_the_exact_value_from_above():
    cost, a, b = rand(4, 6, 5), rand(4, 6), rand(4, 5)
    exact = reference.exact_emd(cost, a, b)
    excess = [reference.sinkhorn(cost, a, b, eps, tol=1e-8).transport_cost / exact - 1 for eps in (1.0, 0.3, 0.1, 0.03)]
    assert all((wide > narrow).all() for wide, narrow in zip(excess, excess[1:], strict=False))
    assert (excess[-1] > 0).all() and (excess[-1] < 0.01).all()


def test_sinkhorn_does_not_depend_on_the_batch():
    cost = rand(3, 6, 6) ** torch.tensor([1.0, 3.0, 9.0])[:, None, None]
    together = reference.sinkhorn(cost, eps=0.2)
    assert len(set(together.n_iter.tolist())) > 1
    for i in range(3):
        alone = reference.sinkhorn(cost[i], eps=0.2)
        assert alone.n_iter == together.n_iter[i]
        torch.testing.assert_close(alone.transport_cost, together.transport_cost[i], rtol=1e-13, atol=0)


def test_sinkhorn_stops_at_max_iter_and_says_so():
    result = reference.sinkhorn(rand(5, 5), eps=0.01, max_iter=3)
    assert result.n_iter == 3
    assert result.marginal_error > 1e-9


def test_removed_patches_change_nothing():
    cost, a, b = rand(4, 6), torch.tensor([1.0, 0, 2, 1]), torch.tensor([0.0, 1, 1, 3, 0, 1])
    few = reference.sinkhorn(cost[a > 0][:, b > 0], a[a > 0], b[b > 0])
    cost[1], cost[:, 4] = float("nan"), float("inf")
    leaves = [z.double().requires_grad_() for z in (cost, a, b)]
    many = reference.sinkhorn(*leaves)
    torch.testing.assert_close(many.transport_cost.detach(), few.transport_cost)
    torch.testing.assert_close(many.plan[a > 0][:, b > 0], few.plan)
    assert many.f[1] == 0 and many.g[0] == 0 and many.plan[1].sum() == 0
    grad_cost, grad_a, grad_b = torch.autograd.grad(many.transport_cost, leaves)
    assert not grad_cost[1].any() and not grad_cost[:, 4].any() and grad_a[1] == 0 and grad_b[0] == 0


@pytest.mark.parametrize("value", [0.0, 0.1, 3.7])
def test_equal_costs_give_the_product_plan(value):
    cost = torch.full((3, 4), value, dtype=torch.float64, requires_grad=True)
    a, b = torch.tensor([1.0, 2, 1]), torch.tensor([1.0, 1, 1, 5])
    result = reference.sinkhorn(cost, a, b)
    plan = (a / 4)[:, None] * (b / 8)
    torch.testing.assert_close(result.plan, plan.double())
    assert result.eps == 0
    for cost_value in (result.transport_cost, result.entropic_cost):
        assert abs(cost_value.item() - value) < 1e-12
        (grad,) = torch.autograd.grad(cost_value, cost, retain_graph=True)
        torch.testing.assert_close(grad, plan.double())


def test_one_patch_on_a_side():
    cost, b = rand(1, 5), rand(5)
    result = reference.sinkhorn(cost, None, b)
    torch.testing.assert_close(result.transport_cost, (cost[0] * b).sum() / b.sum())


def test_nan_stays_in_its_problem():
    cost = rand(3, 4, 4)
    want = reference.sinkhorn(cost[[0, 2]], eps=0.3)
    cost[1, 2, 2] = float("nan")
    cost.requires_grad_()
    result = reference.sinkhorn(cost, eps=0.3)
    assert result.transport_cost[1].isnan() and result.marginal_error[1].isnan()
    torch.testing.assert_close(result.transport_cost[[0, 2]].detach(), want.transport_cost)
    (grad,) = torch.autograd.grad(result.transport_cost[[0, 2]].sum(), cost)
    assert grad[[0, 2]].isfinite().all()


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: reference.cost_matrix(np.ones((2, 5, 4)), TOKENS), TypeError, r"cost_matrix: .*torch.from_numpy\(x\)"),
        (lambda: reference.cost_matrix(TOKENS, [[1.0]]), TypeError, r"y to be a Tensor, got list; give torch.tensor"),
        (lambda: reference.cost_matrix(TOKENS, TOKENS[..., :3]), ValueError, r"expected y of shape .*got \[2, 5, 3\]"),
        (lambda: reference.cost_matrix(TOKENS[0], TOKENS), ValueError, r"got \[5, 4\]; .*give x\[None\]"),
        (
            lambda: reference.cost_matrix(TOKENS.to(torch.cfloat), TOKENS),
            TypeError,
            "to be real, got torch.complex64",
        ),
        (lambda: reference.cost_matrix(TOKENS, TOKENS, patch_size=1.5), TypeError, "patch_size to be an int"),
        (lambda: reference.exact_emd(np.ones((3, 3))), TypeError, r"exact_emd: .* got ndarray; give torch.from_numpy"),
        (lambda: reference.exact_emd(torch.ones(3)), ValueError, r"cost of shape \[..., N, M\] .* got \[3\]"),
        (lambda: reference.exact_emd(TOKENS, torch.ones(4)), ValueError, r"expected a of shape \[2, 5\].* got \[4\]"),
        (lambda: reference.exact_emd(TOKENS, None, [1, 1, 1, 1]), TypeError, r"b to be a Tensor, got list; give"),
        (lambda: reference.sinkhorn(TOKENS, torch.ones(3, 2, 5)), ValueError, r"expected a of shape \[2, 5\]"),
        (lambda: reference.sinkhorn([TOKENS[0]]), TypeError, r"sinkhorn: expected cost .*torch.stack\(cost\)"),
        (lambda: reference.sinkhorn(TOKENS, eps=0), ValueError, "eps to be finite and above 0, got 0"),
        (lambda: reference.sinkhorn(TOKENS, eps="1"), TypeError, "eps to be a number, got str"),
        (lambda: reference.sinkhorn(TOKENS, eps=torch.ones(3)), ValueError, r"eps of shape \[2\], got \[3\]"),
        (lambda: reference.sinkhorn(TOKENS, reach=-1), ValueError, "reach to be finite and above 0, got -1"),
        (lambda: reference.sinkhorn(TOKENS, reach=(1, 2, 3)), ValueError, "reach to be None, a number, or one"),
        (lambda: reference.sinkhorn(TOKENS, max_iter=0), ValueError, "max_iter to be at least 1"),
        (
            lambda: reference.emd_l2(TOKENS, TOKENS, objective="emd"),
            ValueError,
            "emd_l2: expected objective to be",
        ),
        (lambda: reference.emd_l2(TOKENS, TOKENS, reduction="max"), ValueError, "reduction to be one of"),
        (lambda: reference.emd_l2(TOKENS, TOKENS, tol="x"), TypeError, "reference.emd_l2: expected tol to be a number"),
        (
            lambda: reference.emd_l2(TOKENS, TOKENS, student_weight=torch.ones(4)),
            ValueError,
            r"expected student_weight of shape \[2, 5\], or \[5\] for all, got \[4\]",
        ),
        (
            lambda: reference.emd_l2(TOKENS, TOKENS, teacher_weight=-torch.ones(5)),
            ValueError,
            r"reference.emd_l2: expected teacher_weight to be finite and non-negative, got -1 at \[0\]",
        ),
        (lambda: reference.emd_l2(TOKENS.mT, TOKENS), ValueError, r"one side looks like \[B, C, N\]: give student"),
    ],
)
def test_what_the_functions_refuse(call, error, message):
    with pytest.raises(error, match=message) as caught:
        call()
    assert str(caught.value).startswith("sfr_ext.reference.")


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_are_refused():
    ragged = torch.nested.nested_tensor([torch.rand(3, 4), torch.rand(5, 4)])
    for call in (reference.exact_emd, reference.sinkhorn, lambda z: reference.cost_matrix(z, z)):
        with pytest.raises(TypeError, match="to be dense, got a nested tensor"):
            call(ragged)


def test_other_kinds_of_numbers_and_costs():
    whole = torch.tensor([[4, 1, 3], [2, 0, 5], [3, 2, 2]])
    assert reference.exact_emd(whole) == 5 / 3
    one, other = (
        reference.sinkhorn(whole, eps=eps, reach=reach)
        for eps, reach in ((0.5, (2, None)), (np.float32(0.5), [2, None]))
    )
    assert torch.equal(one.transport_cost, other.transport_cost)


def test_sinkhorn_refuses_an_unknown_scale():
    with pytest.raises(ValueError, match="expected eps_scale to be one of 'std', 'absolute', got 'mean'"):
        reference.sinkhorn(rand(2, 2), eps_scale="mean")


@pytest.mark.parametrize("objective", ["transport_cost", "entropic_cost"])
@pytest.mark.parametrize("eps_scale", ["std", "absolute"])
def test_gradient_by_finite_differences(objective, eps_scale):
    inputs = [z.requires_grad_() for z in (rand(2, 4, 6), rand(2, 4) + 0.1, rand(2, 6) + 0.1)]

    def value(cost, a, b):
        return getattr(reference.sinkhorn(cost, a, b, 0.3, eps_scale=eps_scale, tol=1e-14), objective)

    assert torch.autograd.gradcheck(value, inputs, atol=1e-7)


def test_gradient_is_that_of_the_unrolled_iterations():
    cost, a, b = rand(4, 6).requires_grad_(), rand(4).requires_grad_(), rand(6).requires_grad_()

    def unrolled():
        p, q = a / a.sum(), b / b.sum()
        f, g = torch.zeros(4), torch.zeros(6)
        for _ in range(500):
            f = -0.3 * torch.logsumexp(q.log() + (g - cost) / 0.3, dim=1)
            g = -0.3 * torch.logsumexp(p.log()[:, None] + (f[:, None] - cost) / 0.3, dim=0)
        return (p[:, None] * q * ((f[:, None] + g - cost) / 0.3).exp() * cost).sum()

    implicit = reference.sinkhorn(cost, a, b, 0.3, eps_scale="absolute", tol=1e-14).transport_cost
    for got, want in zip(*(torch.autograd.grad(v, [cost, a, b]) for v in (implicit, unrolled())), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


# --- the whole


def test_emd_l2_puts_the_parts_together():
    x, y, a, b = randn(2, 3, 2, 2), randn(2, 4, 3, 3, 2), rand(2, 4), rand(2, 6)
    value = reference.emd_l2(x, y, student_weight=a, teacher_weight=b, reduction="none")
    assert value.shape == (2, 4)
    for group in range(4):
        cost = reference.cost_matrix(x, y[:, group])
        torch.testing.assert_close(value[:, group], reference.sinkhorn(cost, a, b).transport_cost)
    for reduction in ("mean", "sum"):
        whole = reference.emd_l2(x, y, student_weight=a, teacher_weight=b, reduction=reduction)
        torch.testing.assert_close(whole, getattr(value, reduction)())


def test_emd_l2_takes_weights_as_maps_and_per_group():
    x, y, a, b = randn(2, 3, 2, 2), randn(2, 4, 3, 3, 2), rand(2, 2, 2), rand(2, 4, 3, 2)
    value = reference.emd_l2(x, y, student_weight=a, teacher_weight=b, objective="entropic", reduction="none")
    cost = reference.cost_matrix(x, y[:, 1])
    want = reference.sinkhorn(cost, a.flatten(1), b[:, 1].flatten(1)).entropic_cost
    torch.testing.assert_close(value[:, 1], want)


def test_a_removed_patch_beyond_all_exponents():
    """Its entry of the plan is 0, however far its potential is."""
    cost, b = torch.tensor([[10.0, 11.0], [12.0, 10.0]]), torch.tensor([0.0, 1.0])
    result = reference.sinkhorn(cost, None, b, 0.01, eps_scale="absolute")
    assert result.plan.tolist() == [[0, 0.5], [0, 0.5]]
    assert result.entropic_cost == result.transport_cost == 10.5
