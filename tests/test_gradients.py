"""Gradients: exact for the value returned, by finite differences and against the dense implicit formula."""

from __future__ import annotations

import pytest
import torch
from cases import EPS_SCALES, HALVES, METRICS, OBJECTIVES, error, features, value_and_gradients, weights
from torch import Tensor

from sfr_ext import emd_l2, reference, solve

CONVERGED = {"tol": 1e-13, "max_iter": 50_000}
INPUTS = ["student", "teacher", "student_weight", "teacher_weight"]


@pytest.mark.parametrize("wanted", INPUTS)
@pytest.mark.parametrize("eps_scale", EPS_SCALES)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_gradcheck(objective: str, metric: str, eps_scale: str, wanted: str) -> None:
    """The table: every objective x metric x eps_scale x input, with groups and random weights."""
    x, y = features(2, 4, 2, 3, dtype=torch.float64), features(2, 2, 4, 3, 3, dtype=torch.float64)
    a, b = weights(2, 6, dtype=torch.float64), weights(2, 2, 9, dtype=torch.float64)
    inputs = [x, y, a, b]
    index = INPUTS.index(wanted)

    def value(leaf: Tensor) -> Tensor:
        x, y, a, b = (leaf if i == index else t for i, t in enumerate(inputs))
        return emd_l2(
            x,
            y,
            student_weight=a,
            teacher_weight=b,
            metric=metric,
            objective=objective,
            eps=0.3,
            eps_scale=eps_scale,
            reduction="none",
            **CONVERGED,
        )

    assert torch.autograd.gradcheck(value, inputs[index].requires_grad_(), atol=1e-7, rtol=1e-5)


@pytest.mark.every_strategy
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("patch_size", [2, 3])
def test_gradcheck_windows(patch_size: int, objective: str) -> None:
    x = features(1, 3, 4, 3, dtype=torch.float64, grad=True)
    y = features(1, 2, 3, 3, 4, dtype=torch.float64, grad=True)
    options = {"patch_size": patch_size, "objective": objective, "eps": 0.3, **CONVERGED}
    assert torch.autograd.gradcheck(lambda x, y: emd_l2(x, y, **options), (x, y), atol=1e-7, rtol=1e-5)


@pytest.mark.every_strategy
@pytest.mark.parametrize("value", ["transport_cost", "entropic_cost"])
def test_gradcheck_solve(value: str) -> None:
    cost = torch.rand(2, 5, 7, dtype=torch.float64, requires_grad=True)
    a, b = weights(2, 5, dtype=torch.float64, grad=True), weights(7, dtype=torch.float64, grad=True)
    assert torch.autograd.gradcheck(
        lambda cost, a, b: getattr(solve(cost, a, b, eps=0.2, **CONVERGED), value),
        (cost, a, b),
        atol=1e-7,
        rtol=1e-5,
    )


def test_both_costs_of_one_result() -> None:
    cost = torch.rand(2, 5, 7, dtype=torch.float64, requires_grad=True)

    def mixed(cost: Tensor) -> Tensor:
        result = solve(cost, eps=0.2, **CONVERGED)
        return result.transport_cost.square() - 3 * result.entropic_cost

    assert torch.autograd.gradcheck(mixed, cost, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("n", [1, 7, 8, 33, 97, 130])
def test_dense_implicit_formula(n: int, objective: str) -> None:
    """Sizes with one block of rows, several, and ragged ends."""
    x, y = (
        features(1, n, 5, dtype=torch.float64, grad=True),
        features(1, 20, 5, dtype=torch.float64, grad=True),
    )
    a, b = weights(1, n, dtype=torch.float64, grad=True), weights(1, 20, dtype=torch.float64, grad=True)

    def call(function: object) -> list[Tensor]:
        def with_weights(x: Tensor, y: Tensor, a: Tensor, b: Tensor) -> Tensor:
            return function(  # type: ignore[operator]
                x,
                y,
                student_weight=a,
                teacher_weight=b,
                eps=0.2,
                objective=objective,
                tol=1e-12,
                max_iter=50_000,
            )

        return value_and_gradients(with_weights, x, y, a, b)[1]

    for ours, expected in zip(call(emd_l2), call(reference.emd_l2), strict=True):
        assert ours.allclose(expected, rtol=1e-6, atol=1e-9)


def test_the_fixed_plan_gradient_would_be_wrong() -> None:
    """The transport value's plan moves; a gradient that holds it fixed is far off, so the tests above can tell."""
    cost = torch.rand(1, 8, 8, dtype=torch.float64, requires_grad=True)
    result = solve(cost, eps=0.2, **CONVERGED)
    (grad,) = torch.autograd.grad(result.transport_cost.sum(), cost)
    assert error(result.plan, grad) > 0.05


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_error_is_at_most_twice_that_of_plain_torch(dtype: torch.dtype, objective: str) -> None:
    """Plain torch in the same precision: the converged float64 plan's system, solved densely in float32."""
    x, y = features(2, 8, 4, 4, dtype=dtype, grad=True), features(2, 8, 4, 4, dtype=dtype, grad=True)
    options = {"objective": objective, "eps": 0.2}
    ours = value_and_gradients(lambda x, y: emd_l2(x, y, tol=1e-6, max_iter=20_000, **options), x, y)
    exact = value_and_gradients(lambda x, y: reference.emd_l2(x, y, tol=1e-13, **options), x.double(), y.double())
    plain = value_and_gradients(lambda x, y: _unrolled(x, y, objective), x, y)
    for mine, other, truth in zip([ours[0], *ours[1]], [plain[0], *plain[1]], [exact[0], *exact[1]], strict=True):
        assert error(mine, truth) <= 2 * error(other, truth) + torch.finfo(torch.float32).eps


def _unrolled(x: Tensor, y: Tensor, objective: str) -> Tensor:
    """What people write: log-domain Sinkhorn in plain torch, differentiated through its iterations."""
    tokens = [t.float().flatten(2).transpose(1, 2) for t in (x, y)]
    cost = (tokens[0][:, :, None] - tokens[1][:, None]).norm(dim=-1)
    n, m = cost.shape[1:]
    eps = 0.2 * cost.std((1, 2), correction=0, keepdim=True)
    f, g = cost.new_zeros(len(cost), n, 1), cost.new_zeros(len(cost), 1, m)
    for _ in range(1000):
        f = -eps * (((g - cost) / eps).logsumexp(2, keepdim=True) - torch.tensor(m).log())
        g = -eps * (((f - cost) / eps).logsumexp(1, keepdim=True) - torch.tensor(n).log())
    plan = ((f + g - cost) / eps).exp() / (n * m)
    transport = (plan * cost).sum((1, 2))
    if objective == "entropic":
        transport = transport + (eps * plan * (f + g - cost) / eps).sum((1, 2))
    return transport.mean()


@pytest.mark.every_strategy
def test_upstream_gradients_scale_and_zero_ones_vanish() -> None:
    x, y = features(3, 6, 4, 4, grad=True), features(3, 6, 4, 4)
    value = emd_l2(x, y, reduction="none")
    (whole,) = torch.autograd.grad(value, x, torch.tensor([2.0, 0.0, 1.0]), retain_graph=True)
    (ones,) = torch.autograd.grad(value.sum(), x)
    torch.testing.assert_close(whole[0], 2 * ones[0])
    assert torch.equal(whole[1], torch.zeros_like(ones[1])) and torch.equal(whole[2], ones[2])


def test_early_stopping_costs_the_order_of_tol() -> None:
    x, y = features(4, 16, 7, 7, grad=True), features(4, 16, 7, 7)
    grads = {
        tol: value_and_gradients(lambda x: emd_l2(x, y, eps=0.1, tol=tol, max_iter=10_000), x)[1][0]  # noqa: B023
        for tol in (1e-2, 1e-3, 1e-6)
    }
    assert error(grads[1e-3], grads[1e-6]) < 1e-2
    assert error(grads[1e-3], grads[1e-6]) < error(grads[1e-2], grads[1e-6])


def test_only_what_is_asked_for_is_computed() -> None:
    x, y = features(2, 6, 4, 4), features(2, 6, 4, 4, grad=True)
    emd_l2(x, y).backward()
    assert x.grad is None and y.grad is not None
    with torch.no_grad():
        assert not emd_l2(x, y).requires_grad


def test_nothing_but_costs_and_plan_is_differentiable() -> None:
    result = solve(torch.rand(2, 4, 4, requires_grad=True))
    assert result.transport_cost.requires_grad and result.entropic_cost.requires_grad and result.plan.requires_grad
    for name in ("f", "g", "eps", "marginal_error"):
        assert not getattr(result, name).requires_grad
