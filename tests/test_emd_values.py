"""Values, plans and potentials against hand-computed cases and the float64 reference."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cases import EPS_SCALES, HALVES, METRICS, OBJECTIVES, error, features, value_and_gradients, weights
from torch._subclasses.fake_tensor import FakeTensorMode

import sfr_ext
from sfr_ext import emd_l2, reference, solve, solve_sample


@pytest.mark.every_strategy
def test_two_points_by_hand() -> None:
    """Symmetric 2 x 2: the mass that changes places is 1 / (1 + e^(1/eps))."""
    cost = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
    for eps in (2.0, 0.5, 0.1):
        result = solve(cost, eps=eps, eps_scale="absolute", tol=1e-14)
        moved = 1 / (1 + torch.tensor(1 / eps, dtype=torch.float64).exp())
        torch.testing.assert_close(result.transport_cost, moved, rtol=1e-12, atol=0)
        entropy = torch.special.xlogy(moved, 2 * moved) + torch.special.xlogy(1 - moved, 2 * (1 - moved))
        torch.testing.assert_close(result.entropic_cost, moved + eps * entropy, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("cost", "a", "b", "exact", "dearest"),
    [
        (
            [[16, 16, 13, 22, 17], [14, 14, 13, 19, 15], [19, 19, 20, 23, 1e4], [1e4, 0, 1e4, 0, 0]],
            [50, 60, 50, 50],
            [30, 20, 70, 30, 60],
            2460 / 210,
            23,
        ),
        ([[0, 1, 4], [2, 1, 0]], [2, 2], [1, 1, 2], 0.25, 4),
    ],
)
def test_known_distances_in_the_limit_of_small_eps(
    cost: list[list[float]], a: list[float], b: list[float], exact: float, dearest: float
) -> None:
    """Within what mass `tol` in the wrong place can cost, `dearest` being the largest cost worth paying."""
    matrix, *sides = (torch.tensor(t, dtype=torch.float64) for t in (cost, a, b))
    result = solve(matrix, *sides, eps=0.01, eps_scale="absolute", tol=1e-4)
    assert result.converged
    assert abs(result.transport_cost.item() - exact) <= 1e-4 * dearest
    assert reference.exact_emd(matrix, *sides).item() == pytest.approx(exact, rel=1e-9)


@pytest.mark.parametrize("eps_scale", EPS_SCALES)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    ("x_shape", "y_shape", "options"),
    [
        ((3, 6, 4, 5), (3, 6, 3, 4), {}),
        ((2, 6, 4, 5), (2, 3, 6, 3, 4), {}),
        ((3, 20, 6), (3, 12, 6), {}),
        ((2, 20, 6), (2, 3, 12, 6), {}),
        ((2, 4, 5, 5), (2, 4, 4, 4), {"patch_size": 2}),
        ((2, 4, 5, 5), (2, 2, 4, 4, 4), {"patch_size": 3}),
        ((2, 4, 1), (2, 1, 1), {}),
        ((1, 1, 3), (1, 9, 3), {}),
    ],
)
def test_reference_float64(
    x_shape: tuple[int, ...], y_shape: tuple[int, ...], options: dict[str, int], metric: str, eps_scale: str
) -> None:
    x, y = features(*x_shape, dtype=torch.float64), features(*y_shape, dtype=torch.float64)
    for objective in OBJECTIVES:
        kwargs = dict(metric=metric, eps=0.2, eps_scale=eps_scale, objective=objective, reduction="none", **options)
        ours = emd_l2(x, y, tol=1e-11, max_iter=50_000, **kwargs)
        theirs = reference.emd_l2(x, y, tol=1e-11, max_iter=50_000, **kwargs)
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


@pytest.mark.every_strategy
def test_weights_forms_and_normalisation() -> None:
    x, y = features(2, 5, 3, 4, dtype=torch.float64), features(2, 3, 5, 2, 3, dtype=torch.float64)
    a, b, b_all = (weights(*s, dtype=torch.float64) for s in ((2, 3, 4), (2, 2, 3), (2, 3, 6)))
    options = {"eps": 0.2, "tol": 1e-11, "max_iter": 50_000, "reduction": "none"}
    value = emd_l2(x, y, student_weight=a, teacher_weight=b, **options)
    expected = reference.emd_l2(x, y, student_weight=a, teacher_weight=b, **options)
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-10)
    flat = emd_l2(x, y, student_weight=7 * a.flatten(1), teacher_weight=b.flatten(1), **options)
    torch.testing.assert_close(flat, value, rtol=1e-12, atol=0)
    each = emd_l2(x, y, student_weight=a, teacher_weight=b_all, **options)
    for g in range(3):
        alone = emd_l2(x, y[:, g], student_weight=a, teacher_weight=b_all[:, g], **options)
        assert torch.equal(each[:, g], alone)


@pytest.mark.cpu_only("it stays where it is, with no mass: within rounding, which is in test_cuda_against_cpu.py")
def test_weight_zero_removes_a_patch_to_the_bit() -> None:
    """Padding, even with NaN in it, changes nothing: not a bit of the value, the potentials or the gradients."""
    x, y = features(2, 5, 7, grad=True), features(2, 9, 7, grad=True)
    a, b = weights(2, 5, grad=True), weights(2, 9)
    plain = solve_sample(x, y, a, b)
    plain_grads = torch.autograd.grad(plain.transport_cost.sum(), (x, y))
    keep_x, keep_y = torch.tensor([0, 2, 3, 5, 6]), torch.tensor([1, 2, 3, 4, 5, 6, 8, 9, 10])
    wide_x, wide_y = torch.full((2, 7, 7), torch.nan), torch.full((2, 12, 7), torch.inf)
    wide_x[:, keep_x], wide_y[:, keep_y] = x.detach(), y.detach()
    wide_x.requires_grad_(), wide_y.requires_grad_()
    wide_a, wide_b = torch.zeros(2, 7), torch.zeros(2, 12)
    wide_a[:, keep_x], wide_b[:, keep_y] = a.detach(), b
    wide_a.requires_grad_()
    padded = solve_sample(wide_x, wide_y, wide_a, wide_b)
    grads = torch.autograd.grad(padded.transport_cost.sum(), (wide_x, wide_y, wide_a))
    assert torch.equal(padded.transport_cost, plain.transport_cost)
    assert torch.equal(padded.f[:, keep_x], plain.f)
    for grad, keep, expected in zip(grads[:2], (keep_x, keep_y), plain_grads, strict=True):
        assert torch.equal(grad[:, keep], expected)
        assert grad.count_nonzero() == expected.count_nonzero()
    assert grads[2].isfinite().all() and (grads[2][:, [1, 4]] == 0).all()


@pytest.mark.cpu_only("padding stays where it is: within rounding")
@pytest.mark.parametrize(("kept", "padded"), [(60, 120), (64, 70), (96, 130), (97, 98)])
def test_padding_to_another_size_changes_no_bit(kept: int, padded: int) -> None:
    """How a problem is laid out and iterated on follows from the patches that it has."""
    x, y = features(2, kept, 4, grad=True), features(2, kept, 4, grad=True)
    value, grads = value_and_gradients(emd_l2, x, y, reduction="none")
    more = torch.full((2, padded - kept, 4), torch.nan)
    wide = [torch.cat([t.detach(), more], 1).requires_grad_() for t in (x, y)]
    mask = (torch.arange(padded) < kept).float().expand(2, -1)
    other, others = value_and_gradients(emd_l2, *wide, student_weight=mask, teacher_weight=mask, reduction="none")
    assert torch.equal(value, other)
    assert all(torch.equal(grad, wider[:, :kept]) for grad, wider in zip(grads, others, strict=True))


@pytest.mark.every_strategy
@pytest.mark.parametrize("edge", ["above", "below", "left", "right"])
def test_masked_windows_ignore_nan_in_uncovered_pixels(edge: str) -> None:
    x, y = features(1, 3, 4, 4), features(1, 3, 4, 4)
    axis, at = (-2 if edge in ("above", "below") else -1), (0 if edge in ("above", "left") else -1)
    mask, broken = torch.ones(1, 3, 3), x.clone()
    mask.select(axis, at).zero_()  # the windows that hold the pixels along an edge of the map
    broken.select(axis, at).fill_(torch.nan)
    results = []
    for student in (x, broken):
        leaf = student.requires_grad_()
        value = emd_l2(leaf, y, student_weight=mask, patch_size=2)
        (grad,) = torch.autograd.grad(value, leaf)
        results.append((value, grad))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


@pytest.mark.every_strategy
def test_plan_potentials_and_costs_fit_together() -> None:
    x, y = features(3, 5, 4, 4, dtype=torch.float64), features(3, 2, 5, 3, 4, dtype=torch.float64)
    a, b = weights(3, 16, dtype=torch.float64), weights(3, 12, dtype=torch.float64)
    cost = sfr_ext.cost_matrix(x, y)
    fused = solve_sample(x, y, a, b, tol=1e-10, max_iter=10_000)
    given = solve(cost, a[:, None], b[:, None], tol=1e-10, max_iter=10_000)
    for result in (fused, given):
        plan = result.plan
        a_, b_ = (a / a.sum(1, keepdim=True))[:, None], (b / b.sum(1, keepdim=True))[:, None]
        torch.testing.assert_close(plan.sum(-1), a_.expand(3, 2, 16), atol=1e-10, rtol=0)
        torch.testing.assert_close(plan.sum(-2), b_.expand(3, 2, 12), atol=1e-10, rtol=0)
        torch.testing.assert_close((plan * cost).sum((-2, -1)), result.transport_cost, rtol=1e-9, atol=0)
        ratio = plan / (a_[..., None] * b_[..., None, :])
        entropic = result.transport_cost + result.eps * (plan * ratio.log()).sum((-2, -1))
        torch.testing.assert_close(entropic, result.entropic_cost, rtol=1e-8, atol=1e-10)
        exponent = (result.f[..., None] + result.g[..., None, :] - cost) / result.eps[..., None, None]
        torch.testing.assert_close(ratio.log(), exponent, rtol=1e-7, atol=1e-7)
        assert result.converged.all() and (result.n_iter > 0).all()
    assert torch.equal(fused.transport_cost, given.transport_cost)
    assert torch.equal(fused.f, given.f)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_excess_over_exact_falls_with_eps(objective: str) -> None:
    x, y = features(4, 8, 5, 5), features(4, 8, 5, 5)
    exact = reference.exact_emd(sfr_ext.cost_matrix(x, y))
    excess = [
        (emd_l2(x, y, eps=eps, objective=objective, reduction="none", max_iter=5000) / exact - 1).mean().item()
        for eps in (0.3, 0.1, 0.03)
    ]
    assert excess[0] > excess[1] > excess[2] > 0
    assert excess[2] < 0.05


@pytest.mark.every_strategy
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_lower_precision_against_float64(dtype: torch.dtype, objective: str) -> None:
    x, y = features(3, 16, 5, 5, dtype=dtype), features(3, 16, 4, 6, dtype=dtype)
    options = {"objective": objective, "tol": 1e-5, "max_iter": 10_000, "reduction": "none"}
    value = emd_l2(x, y, **options)
    assert value.dtype == torch.float32
    assert error(value, emd_l2(x.double(), y.double(), **options)) < 3e-6


def test_mixed_dtypes_promote() -> None:
    x, y = features(2, 8, 3, 3, dtype=torch.float16), features(2, 8, 3, 3)
    assert torch.equal(emd_l2(x, y), emd_l2(x.float(), y))
    assert emd_l2(x, y.double()).dtype == torch.float64


@pytest.mark.cpu_only("autocast of the CPU; that of the GPU is in test_cuda_device.py")
def test_nothing_is_cast_down_under_autocast() -> None:
    x, y = features(2, 8, 3, 3), features(2, 8, 3, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = emd_l2(x, y)
    assert torch.equal(inside, emd_l2(x, y))


@pytest.mark.every_strategy
def test_warm_start_needs_no_iteration() -> None:
    x, y = features(3, 8, 5, 5), features(3, 2, 8, 5, 5)
    cold = solve_sample(x, y)
    warm = solve_sample(x, y, init=(cold.f, cold.g))
    assert (cold.n_iter > 5).all() and (warm.n_iter <= 1).all() and warm.converged.all()
    torch.testing.assert_close(warm.transport_cost, cold.transport_cost, rtol=1e-3, atol=0)
    again = solve(sfr_ext.cost_matrix(x, y), init=(cold.f, cold.g))
    assert (again.n_iter <= 1).all()


@pytest.mark.every_strategy
def test_every_problem_stops_by_itself() -> None:
    easy, hard = torch.rand(20, 20) * 1e-3 + 1, torch.rand(20, 20)
    result = solve(torch.stack([easy, hard]), eps=0.02, eps_scale="absolute", tol=1e-5)
    assert result.n_iter[0] < result.n_iter[1] / 4
    assert result.converged.all() and (result.marginal_error <= 1e-5).all()


def test_non_convergence_is_reported_and_can_be_warned_of() -> None:
    x, y = features(2, 8, 5, 5), features(2, 8, 5, 5)
    assert not solve_sample(x, y, tol=1e-6, max_iter=3).converged.any()
    assert (solve_sample(x, y, tol=1e-6, max_iter=3).n_iter == 3).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        emd_l2(x, y, tol=1e-6, max_iter=3)  # silent unless asked
    sfr_ext.warn_on_nonconvergence()
    try:
        message = (
            r"2 of 2 problems did not converge to tol = 1e-06 \(marginal .*\). 2 stopped at max_iter = 3: give more"
        )
        with pytest.warns(sfr_ext.ConvergenceWarning, match=message):
            emd_l2(x, y, tol=1e-6, max_iter=3)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            emd_l2(x, y)
    finally:
        sfr_ext.warn_on_nonconvergence(False)


@pytest.fixture
def warned() -> Iterator[Callable[..., list[str]]]:
    """The texts of the warnings of a call."""

    def call(*arguments: torch.Tensor, **options: Any) -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            emd_l2(*arguments, **options)
        assert all(each.filename == __file__ for each in caught)
        return [str(each.message) for each in caught]

    sfr_ext.warn_on_nonconvergence()
    yield call
    sfr_ext.warn_on_nonconvergence(False)


@pytest.mark.filterwarnings("error")
def test_nobody_is_warned_where_there_are_no_numbers() -> None:
    """Under vmap, without memory, and in a graph."""
    x, y = features(3, 2, 9, 8), features(3, 2, 9, 8)
    sfr_ext.warn_on_nonconvergence()
    try:
        assert torch.vmap(lambda x, y: emd_l2(x, y, max_iter=1, tol=1e-9))(x, y).shape == (3,)
        assert emd_l2(x[0].to("meta"), y[0].to("meta"), max_iter=1, tol=1e-9).is_meta
        with FakeTensorMode():
            assert emd_l2(torch.empty(2, 9, 8), torch.empty(2, 9, 8), max_iter=1, tol=1e-9).shape == ()
    finally:
        sfr_ext.warn_on_nonconvergence(False)


@pytest.mark.parametrize("objective", ["transport", "entropic", "divergence"])
def test_the_warning_says_what_stopped_each_problem(objective: str, warned: Callable[..., list[str]]) -> None:
    x, y = features(3, 8, 5, 5), features(3, 8, 5, 5)
    (fine,) = warned(x, y, tol=1e-8, max_iter=100_000, objective=objective)
    assert "3 stopped at the precision of float32: give a larger tol, or float64 features" in fine
    assert "max_iter" not in fine and "3 of 3 problems did not converge to tol = 1e-08" in fine
    (fine,) = warned(x.double(), y, tol=1e-17, objective=objective)
    assert "3 stopped at the precision of float64: give a larger tol, or a larger eps" in fine
    assert warned(x.double(), y, tol=1e-8, objective=objective) == []
    x[1, 0, 0, 0] = torch.nan
    (mixed,) = warned(x, y, tol=1e-8, max_iter=3, objective=objective)
    assert (
        "2 stopped at max_iter = 3: give more, a larger eps, or a larger tol; 1 without a finite marginal error: "
        in mixed
    )
    assert "nan" not in mixed and "precision" not in mixed


def test_what_to_give_for_a_tol_that_cannot_be_met(warned: Callable[..., list[str]]) -> None:
    x, y = features(3, 8, 5, 5), features(3, 8, 5, 5)
    (text,) = warned(x, y, tol=0.0, max_iter=3)
    assert "give more, a larger eps, or a tol above 0" in text
    (text,) = warned(x, y, tol=0.0, max_iter=100_000)
    assert "give a tol above 0, or float64 features" in text
    (text,) = warned(x * 3e38, y)
    assert "look for NaN, Inf and costs beyond float32 in the features" in text


def test_exact_plans_that_are_not_proven_are_warned_of(warned: Callable[..., list[str]]) -> None:
    x, y = features(3, 8, 5, 5), features(3, 8, 5, 5)
    assert warned(x, y, solver="exact") == []
    x[1, 0, 0, 0] = torch.nan
    (text,) = warned(x, y, solver="exact")
    assert "1 of 3 problems have no plan that is proven to be exact. 1 without a finite value: look for NaN" in text
    (text,) = warned(x, y, solver="exact", tol=0.0, student_weight=torch.rand(3, 25))
    assert "2 at the precision of float32: give a tol above 0, or weights of nearer sizes; 1 without a finite" in text


def test_each_problem_has_a_reason_of_its_own(warned: Callable[..., list[str]]) -> None:
    x, y = features(6, 8, 5, 5), features(6, 8, 5, 5)
    counts = solve_sample(x, y, tol=1e-8, max_iter=100_000).n_iter
    limit = int(counts.median())
    cut = int((solve_sample(x, y, tol=1e-8, max_iter=limit).n_iter >= limit).sum())
    assert 0 < cut < 6
    (mixed,) = warned(x, y, tol=1e-8, max_iter=limit)
    assert f"{cut} stopped at max_iter = {limit}: " in mixed and f"{6 - cut} stopped at the precision" in mixed


@pytest.mark.usefixtures("warned")
def test_the_warning_comes_once_for_each_line_that_calls() -> None:
    x, y = features(1, 8, 5, 5), features(1, 8, 5, 5)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        loss = sfr_ext.EMDL2Loss(max_iter=2)
        for scale in (1.0, 2.0, 3.0):  # other numbers in the text each time
            emd_l2(x, scale + scale * y * y, max_iter=2)
            loss(x, scale + scale * y * y)
            sfr_ext.self_feature_loss([x, scale + scale * y * y], max_iter=2)
    lines = [each.lineno for each in caught]
    assert len(lines) == 3 and lines == [lines[0], lines[0] + 1, lines[0] + 2]
    assert all(each.filename == __file__ for each in caught)


def test_solve_takes_any_leading_axes_and_strides() -> None:
    cost = torch.rand(2, 3, 2, 5, 6, dtype=torch.float64)
    a, b = weights(3, 1, 5, dtype=torch.float64), weights(6, dtype=torch.float64)
    result = solve(cost, a, b, eps=0.3)
    assert (
        result.transport_cost.shape == (2, 3, 2) and result.plan.shape == cost.shape and result.f.shape == (2, 3, 2, 5)
    )
    for i in range(2):
        for j in range(3):
            one = solve(cost[i, j, 1].T.contiguous().T, a[j, 0], b, eps=0.3)
            assert one.transport_cost.shape == () and torch.equal(one.transport_cost, result.transport_cost[i, j, 1])


@pytest.mark.every_strategy
@pytest.mark.parametrize("eps", [0.3, 0.05, 0.01, 0.001])
@pytest.mark.parametrize("case", ["equal", "constant", "duplicates", "huge", "tiny", "outlier", "skewed"])
def test_hard_inputs_stay_finite(case: str, eps: float) -> None:
    x, y = features(2, 8, 5, 5), features(2, 8, 5, 5)
    a = None
    if case == "equal":
        y = x.clone()
    elif case == "constant":
        x, y = torch.ones(2, 8, 5, 5), torch.full((2, 8, 5, 5), 2.0)
    elif case == "duplicates":
        x = x[..., :1, :1].expand(2, 8, 5, 5)
    elif case == "huge":
        x, y = 1e15 * x, 1e15 * y
    elif case == "tiny":
        x, y = 1e-15 * x, 1e-15 * y
    elif case == "outlier":
        x[0, :, 0, 0] = 1e6
    else:
        a = torch.cat([torch.full((2, 1), 1e10), torch.full((2, 24), 1e-10)], 1).requires_grad_()
    x, y = x.clone().requires_grad_(), y.clone().requires_grad_()
    for objective in OBJECTIVES:
        value = emd_l2(x, y, student_weight=a, eps=eps, objective=objective, reduction="none", max_iter=500)
        grads = torch.autograd.grad(value.sum(), [x, y] + ([a] if a is not None else []))
        assert value.isfinite().all() and all(g.isfinite().all() for g in grads)
    if case == "equal":
        assert (emd_l2(x, y, eps=eps, reduction="none") >= 0).all()


@pytest.mark.every_strategy
def test_all_costs_equal_takes_the_product_plan() -> None:
    result = solve(torch.full((3, 4), 2.0), torch.tensor([1.0, 2.0, 1.0]))
    assert result.transport_cost == 2 and result.entropic_cost == 2 and result.eps == 0 and result.converged
    torch.testing.assert_close(result.plan, torch.tensor([0.25, 0.5, 0.25])[:, None].expand(3, 4) / 4)
    rounded = solve(torch.full((3, 7), 1.1), torch.tensor([1.0, 2.0, 4.0]))  # whose mean is not 1.1 to the last bit
    assert rounded.eps == 0 and rounded.n_iter == 0


@pytest.mark.every_strategy
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_empty_batch(reduction: str) -> None:
    x = torch.empty(0, 4, 3, 3, requires_grad=True)
    value = emd_l2(x, torch.empty(0, 2, 4, 2, 2), reduction=reduction)
    assert value.shape == ((0, 2) if reduction == "none" else ())
    if reduction == "sum":
        assert value == 0
    value.sum().backward()
    assert x.grad is not None and x.grad.shape == x.shape
    assert solve(torch.empty(0, 3, 4)).plan.shape == (0, 3, 4)


def test_module_is_the_function() -> None:
    x, y, a = features(2, 4, 3, 3), features(2, 4, 3, 3), weights(2, 9)
    module = sfr_ext.EMDL2Loss(metric="cosine", eps=0.1)
    assert torch.equal(module(x, y, student_weight=a), emd_l2(x, y, student_weight=a, metric="cosine", eps=0.1))
    assert "cosine" in repr(module)
