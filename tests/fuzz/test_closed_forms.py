"""Problems whose solution can be written down."""

from __future__ import annotations

import decimal
import math

import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import EDGES, random
from torch import Tensor

from sfr_ext import cost_matrix, emd_l2, reference, solve

F64 = torch.float64
# Beyond these, squares in float32 overflow and underflow.
scales = st.integers(-15, 15).map(lambda k: 10.0**k)
counts = st.sampled_from(EDGES)
seeds = st.integers(0, 2**32 - 1)
solvers = st.sampled_from(["sinkhorn", "exact"])
metrics = st.sampled_from(["l2", "sqeuclidean", "l1"])


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=random(seed), dtype=F64)


@given(counts, st.integers(1, 9), seeds, scales, solvers, st.sampled_from([torch.float32, F64]))
def test_one_point_on_a_side(m: int, channels: int, seed: int, scale: float, solver: str, dtype: torch.dtype) -> None:
    """All of it goes there: the mean cost, whatever eps."""
    x, y = (normal(seed + k, 1, n, channels).to(dtype) * scale for k, n in enumerate((1, m)))
    b = (normal(seed + 2, 1, m).abs() + 0.1).to(dtype)
    cost = cost_matrix(x, y)[0, 0].double()
    expected = (cost * (b[0].double() / b[0].double().sum())).sum().item()
    for sides in ((x, y, None, b), (y, x, b, None)):
        value = emd_l2(*sides[:2], student_weight=sides[2], teacher_weight=sides[3], solver=solver)
        assert math.isclose(value.item(), expected, rel_tol=1e-5 if dtype == torch.float32 else 1e-10)


@given(seeds, st.floats(0.02, 3))
def test_two_points_on_either_side(seed: int, eps: float) -> None:
    """A 2 x 2 plan with given marginals has one parameter, the root of a quadratic equation."""
    cost, (a, b) = normal(seed, 2, 2), (normal(seed + 1, 2, 2).abs() + 0.1)
    a, b = a / a.sum(), b / b.sum()
    a0, b0 = a[0].item(), b[0].item()
    # p (1 - a0 - b0 + p) = ratio (a0 - p) (b0 - p); its entries cancel where the ratio is large or small
    with decimal.localcontext(decimal.Context(prec=1000)):
        u, v, one = decimal.Decimal(a0), decimal.Decimal(b0), decimal.Decimal(1)
        ratio = (
            decimal.Decimal((cost[0, 1] + cost[1, 0] - cost[0, 0] - cost[1, 1]).item()) / decimal.Decimal(eps)
        ).exp()
        square, linear, constant = one - ratio, one - u - v + ratio * (u + v), -ratio * u * v
        p = -2 * constant / (linear + (linear * linear - 4 * square * constant).sqrt())
        plan = torch.tensor([[float(p), float(u - p)], [float(v - p), float(one - u - v + p)]], dtype=F64)
    result = solve(cost, a, b, eps=eps, eps_scale="absolute", tol=1e-13, max_iter=50_000)
    if result.converged:
        torch.testing.assert_close(result.plan, plan, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(result.transport_cost, (plan * cost).sum(), rtol=1e-7, atol=1e-9)
    exact = max(0.0, a0 + b0 - 1), min(a0, b0)
    values = [(torch.tensor([[q, a0 - q], [b0 - q, 1 - a0 - b0 + q]], dtype=F64) * cost).sum().item() for q in exact]
    assert math.isclose(solve(cost, a, b, solver="exact").transport_cost.item(), min(values), abs_tol=1e-12)


@given(counts, st.integers(1, 9), seeds, scales)
def test_a_translation(n: int, channels: int, seed: int, scale: float) -> None:
    """The exact distance of a set from itself moved is the square of the way, for squared costs."""
    x, way = normal(seed, 1, n, channels) * scale, normal(seed + 1, channels) * scale
    value = emd_l2(x, x + way, solver="exact", metric="sqeuclidean")
    assert math.isclose(value.item(), way.square().sum().item(), rel_tol=1e-9)


@given(counts, seeds, scales, metrics)
def test_points_on_a_line(n: int, seed: int, scale: float, metric: str) -> None:
    """Sorted points go to sorted points, for every convex cost."""
    x, y = (normal(seed + k, 1, n, 1) * scale for k in (0, 1))
    apart = (x.sort(1).values - y.sort(1).values).abs()
    expected = (apart.square() if metric == "sqeuclidean" else apart).mean().item()
    assert math.isclose(emd_l2(x, y, solver="exact", metric=metric).item(), expected, rel_tol=1e-9)


@given(
    st.floats(0.5, 1.5), st.floats(0.5, 1.5), st.floats(-1, 1), st.floats(0.3, 4), st.sampled_from([torch.float32, F64])
)
def test_gaussians(s: float, t: float, apart: float, eps: float, dtype: torch.dtype) -> None:
    """The optimal coupling is a Gaussian, whose covariance c solves 2 (s^2 t^2 - c^2) = eps c."""
    grid = torch.linspace(-8, 8, 97, dtype=F64)
    a, b = (torch.exp(-((grid - at) ** 2) / (2 * width**2)).to(dtype) for at, width in ((0.0, s), (apart, t)))
    cost = ((grid[:, None] - grid) ** 2).to(dtype)
    both = s * s * t * t
    c = (math.sqrt(eps * eps + 16 * both) - eps) / 4
    transport = apart**2 + s * s + t * t - 2 * c
    entropic = transport - eps / 2 * math.log(1 - c * c / both)
    result = solve(cost, a, b, eps=eps, eps_scale="absolute", tol=1e-6, max_iter=5000)
    assert math.isclose(result.transport_cost.item(), transport, abs_tol=2e-4)
    assert math.isclose(result.entropic_cost.item(), entropic, abs_tol=2e-4)


@given(counts, st.integers(1, 9), seeds, scales)
def test_a_set_and_itself(n: int, channels: int, seed: int, scale: float) -> None:
    """Exact distance and divergence vanish, and the divergence's gradient with them."""
    x = normal(seed, 1, n, channels).float() * scale
    leaf = x.clone().requires_grad_()
    assert emd_l2(x, x.flip(1), solver="exact").item() == 0
    value = emd_l2(leaf, x, objective="divergence", tol=1e-6, max_iter=3000)
    (grad,) = torch.autograd.grad(value, leaf)
    assert abs(value.item()) <= 1e-4 * scale and grad.isfinite().all()


@given(counts, counts, seeds, st.floats(0.2, 5))
def test_equal_costs(n: int, m: int, seed: int, price: float) -> None:
    """Every plan costs the same; Sinkhorn takes the product, with a reach of which less is left."""
    cost = torch.full((n, m), price, dtype=F64)
    a = normal(seed, n).abs() + 0.1
    result = solve(cost, a)
    torch.testing.assert_close(result.transport_cost, torch.tensor(price, dtype=F64))
    torch.testing.assert_close(result.plan, (a / a.sum())[:, None].expand(n, m) / m)
    expected = reference.sinkhorn(cost, eps=0.3, eps_scale="absolute", reach=2.0)
    found = solve(cost, eps=0.3, eps_scale="absolute", reach=2.0, tol=1e-10)
    torch.testing.assert_close(found.transport_cost, expected.transport_cost, rtol=1e-7, atol=1e-9)
