"""Weights: DeepEMD's cross-reference, weights of their own for each group, and a softmax's gradient through them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import HALVES, error, features, weights
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sfr_ext import cost_matrix, cross_reference_weights, emd_l2, reference, self_term, solve, solve_sample

F64 = torch.float64
CONVERGED = {"tol": 1e-13, "max_iter": 50_000}


def _deepemd(ours: Tensor, theirs: Tensor) -> Tensor:
    """As the authors wrote it: pool the other map, correlate, relu, add 1e-3 (``get_weight_vector``)."""
    pooled = F.adaptive_avg_pool2d(theirs, [1, 1])
    combination = (ours * pooled).sum(1).view(len(ours), -1).relu() + 1e-3
    return combination / combination.sum(1, keepdim=True)


def test_cross_reference_is_deepemds() -> None:
    x, y = features(3, 8, 4, 5, dtype=F64), features(3, 8, 3, 2, dtype=F64)
    a, b = cross_reference_weights(x, y)
    torch.testing.assert_close((a, b), (_deepemd(x, y), _deepemd(y, x)))
    assert a.shape == (3, 20) and b.shape == (3, 6)
    tokens = cross_reference_weights(x.flatten(2).mT, y.flatten(2).mT)
    torch.testing.assert_close(tokens, (a, b))


def test_cross_reference_with_groups() -> None:
    x, y = features(2, 8, 4, 4), features(2, 3, 8, 2, 3)
    a, b = cross_reference_weights(x, y)
    assert a.shape == (2, 3, 16) and b.shape == (2, 3, 6)
    for g in range(3):
        torch.testing.assert_close((a[:, g], b[:, g]), cross_reference_weights(x, y[:, g]))


def test_cross_reference_gradient() -> None:
    x, y = features(1, 4, 2, 2, dtype=F64, grad=True), features(1, 2, 4, 3, 1, dtype=F64, grad=True)
    assert not any(w.requires_grad for w in cross_reference_weights(x, y))
    assert torch.autograd.gradcheck(lambda x, y: cross_reference_weights(x, y, detach=False), (x, y))


def test_cross_reference_halves_and_nothing_in_common() -> None:
    x = features(2, 8, 3, 3, dtype=torch.float16).abs()
    a, b = cross_reference_weights(x, -x)
    assert a.dtype == b.dtype == torch.float32
    torch.testing.assert_close(a, torch.full((2, 9), 1 / 9))
    torch.testing.assert_close(b, torch.full((2, 9), 1 / 9))


def test_cross_reference_refuses() -> None:
    with pytest.raises(ValueError, match=r"sfr_ext.cross_reference_weights: expected teacher of shape"):
        cross_reference_weights(torch.rand(2, 3, 4, 4), torch.rand(2, 4, 4, 4))
    with pytest.raises(TypeError, match="expected student to be a Tensor, got float"):
        cross_reference_weights(1.0, torch.rand(2, 4, 4, 4))


@pytest.mark.parametrize("objective", ["transport", "entropic"])
def test_student_weights_for_each_group(objective: str) -> None:
    """``[B, G, N]``: as many calls with one teacher each, value and gradients."""
    x, y = features(2, 5, 3, 3, dtype=F64, grad=True), features(2, 3, 5, 2, 2, dtype=F64)
    a, b = weights(2, 3, 9, dtype=F64, grad=True), weights(2, 4, dtype=F64)
    options = {"objective": objective, "reduction": "none", "tol": 1e-10, "max_iter": 10_000}
    ours = emd_l2(x, y, student_weight=a, teacher_weight=b, **options)
    each = [emd_l2(x, y[:, g], student_weight=a[:, g], teacher_weight=b, **options) for g in range(3)]
    expected = torch.stack(each, dim=1)
    torch.testing.assert_close(ours, expected)
    scale = torch.rand(2, 3, dtype=F64)
    found = torch.autograd.grad((ours * scale).sum(), (x, a))
    torch.testing.assert_close(found, torch.autograd.grad((expected * scale).sum(), (x, a)))
    maps = emd_l2(x, y, student_weight=a.view(2, 3, 3, 3), teacher_weight=b, **options)
    assert torch.equal(maps, ours)


@pytest.mark.every_strategy
@pytest.mark.parametrize("objective", ["transport", "entropic", "divergence", "exact"])
@pytest.mark.parametrize("eps_scale", ["std", "absolute"])
@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize("patch", [1, 2])
def test_patches_that_only_some_groups_keep(objective: str, eps_scale: str, metric: str, patch: int) -> None:
    options = {"solver": "exact"} if objective == "exact" else {"objective": objective, "tol": 1e-12}
    options |= {"metric": metric, "patch_size": patch, "eps": 0.3, "eps_scale": eps_scale, "reduction": "none"}
    n = (6 - patch) * (7 - patch)
    x, y = features(2, 5, 5, 6, dtype=F64), features(2, 3, 5, 4, 5, dtype=F64)
    a, b = weights(2, 3, n, dtype=F64), weights(2, 3, (5 - patch) * (6 - patch), dtype=F64)
    a[0, 0, 2:] = a[0, 1, :3] = a[1, 2, ::2] = 0  # few in the first group, others in the next
    leaves = [t.requires_grad_() for t in (x, y, a, b)]
    values = emd_l2(x, y, student_weight=a, teacher_weight=b, **options)
    each = [emd_l2(x, y[:, g], student_weight=a[:, g], teacher_weight=b[:, g], **options) for g in range(3)]
    alone = torch.stack(each, 1)
    assert error(values, alone) < 1e-10
    up = torch.rand_like(alone)
    for _ in range(3):  # memory that others have used before
        ours = torch.autograd.grad(values, leaves, up, retain_graph=True)
        theirs = torch.autograd.grad(alone, leaves, up, retain_graph=True)
        assert all(error(*pair) < 1e-7 for pair in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("value", ["transport_cost", "entropic_cost"])
def test_gradcheck_through_a_softmax(value: str) -> None:
    """Logit distillation: distributions over classes, one cost between classes for the whole batch."""
    student = torch.randn(3, 6, dtype=F64, requires_grad=True)
    teacher = torch.randn(3, 6, dtype=F64, requires_grad=True)
    between = torch.rand(6, 6, dtype=F64, requires_grad=True)

    def distance(student: Tensor, teacher: Tensor, between: Tensor) -> Tensor:
        return getattr(solve(between, student.softmax(-1), teacher.softmax(-1), eps=0.3, **CONVERGED), value)

    assert distance(student, teacher, between).shape == (3,)
    assert torch.autograd.gradcheck(distance, (student, teacher, between), atol=1e-7)


def test_softmax_gradient_in_float32_against_float64() -> None:
    """100 classes, one of them likely: weights from 1e-6 to almost 1."""
    embedding = features(100, 16)
    student, teacher = 3 * features(8, 100), 3 * features(8, 100)

    def gradient(dtype: torch.dtype, **options: float) -> Tensor:
        logits = student.to(dtype).requires_grad_()
        between = cost_matrix(embedding.to(dtype)[None], embedding.to(dtype)[None])[0]
        cost = solve(between, logits.softmax(-1), teacher.to(dtype).softmax(-1), eps=0.3, **options).transport_cost
        return torch.autograd.grad(cost.sum(), logits)[0]

    exact = gradient(F64, tol=1e-12, max_iter=50_000)
    assert error(gradient(torch.float32), exact) < 2e-2
    assert error(gradient(torch.float32, tol=1e-5), exact) < 1e-3


class _Largest(TorchDispatchMode):
    """The most elements that an operation within it has written anew."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        inputs = {t.untyped_storage().data_ptr() for t in args if isinstance(t, Tensor)}
        for out in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(out, Tensor) and out.untyped_storage().data_ptr() not in inputs:
                self.elements = max(self.elements, out.numel())
        return result


def test_a_shared_cost_is_not_copied() -> None:
    between, a, b = torch.rand(20, 30), weights(50, 20), weights(50, 30)
    with _Largest() as seen:
        result = solve(between, a, b)
    assert seen.elements == 50 * 30  # a potential; the costs of all problems would be 30,000
    expanded = solve(between.expand(50, 20, 30).contiguous(), a, b)
    assert torch.equal(result.transport_cost, expanded.transport_cost)
    with _Largest() as seen:
        solve(between.expand(50, 20, 30).contiguous(), a, b)
    assert seen.elements == 50 * 20 * 30  # so that the measure can tell


@pytest.mark.parametrize(
    ("cost", "a", "b", "lead"),
    [
        ((4, 5), (3, 4), None, (3,)),
        ((4, 5), (3, 4), (2, 1, 5), (2, 3)),
        ((3, 1, 4, 5), (1, 2, 4), (5,), (3, 2)),
        ((2, 4, 5), None, (4, 3, 1, 5), (4, 3, 2)),
    ],
)
def test_leading_axes_broadcast(
    cost: tuple[int, ...], a: tuple[int, ...] | None, b: tuple[int, ...] | None, lead: tuple[int, ...]
) -> None:
    leaves = [None if shape is None else weights(*shape, dtype=F64, grad=True) for shape in (cost, a, b)]
    result = solve(*leaves, eps=0.2, **CONVERGED)
    assert result.transport_cost.shape == lead and result.plan.shape == (*lead, 4, 5)
    whole = [None if t is None else t.expand(*lead, *t.shape[-own:]) for t, own in zip(leaves, (2, 1, 1), strict=True)]
    expected = reference.sinkhorn(*whole, eps=0.2, tol=1e-13, max_iter=50_000)
    torch.testing.assert_close(result.transport_cost, expected.transport_cost)
    wanted = [t for t in leaves if t is not None]
    found = torch.autograd.grad(result.transport_cost.sum(), wanted)
    for ours, theirs in zip(found, torch.autograd.grad(expected.transport_cost.sum(), wanted), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)


def test_axes_that_do_not_broadcast_are_refused() -> None:
    with pytest.raises(ValueError, match=r"sfr_ext.solve: expected b of shape \[3, 5\] .* got \[2, 5\]"):
        solve(torch.rand(4, 5), torch.rand(3, 4), torch.rand(2, 5))


def test_cross_reference_weights_in_use() -> None:
    """A region the other image does not have loses its say: the match gets nearer."""
    common = features(4, 8, 3, 3).abs()
    left, right = (torch.cat([common, 0.1 * features(4, 8, 3, 2)], dim=3) for _ in range(2))
    a, b = cross_reference_weights(left, right)
    plain = solve_sample(left, right, metric="cosine").transport_cost
    weighted = solve_sample(left, right, a, b, metric="cosine").transport_cost
    assert (weighted < 0.8 * plain).all()


KINDS = [torch.bool, torch.uint8, torch.int8, torch.int32, torch.int64, torch.uint16, *HALVES]


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("solver", ["sinkhorn", "exact"])
def test_kinds_of_weights(solver: str, dtype: torch.dtype) -> None:
    """Masks and counts mean what the same numbers in float32 mean; balanced and with a reach."""
    x, y = features(2, 4, 3, 3), features(2, 3, 4, 2, 2)
    a, b = torch.randint(0, 3, (2, 9)).to(dtype), torch.randint(0, 3, (2, 3, 4)).to(dtype)
    a[:, 0] = b[..., 0] = 1
    plain = a.float(), b.float()
    options = {"solver": solver, "reduction": "none"}
    for extra in ({}, {"reach": 2.0}, {"objective": "divergence"}) if solver == "sinkhorn" else ({},):
        ours = emd_l2(x, y, student_weight=a, teacher_weight=b, **options, **extra)
        assert torch.equal(ours, emd_l2(x, y, student_weight=plain[0], teacher_weight=plain[1], **options, **extra))
    result, expected = (solve_sample(x, y, *sides, solver=solver) for sides in ((a, b), plain))
    assert torch.equal(result.plan, expected.plan)
    cost = cost_matrix(x, y)
    assert torch.equal(
        solve(cost, a[:, None], b, solver=solver).plan, solve(cost, plain[0][:, None], plain[1], solver=solver).plan
    )
    term, plain_term = (self_term(y, w, groups=True, eps=0.1) for w in (b, plain[1]))
    assert torch.equal(term.value, plain_term.value)


def test_float64_weights_of_float32_features() -> None:
    x, y, a = features(2, 6, 4), features(2, 5, 4), weights(2, 6, dtype=F64, grad=True)
    value = emd_l2(x, y, student_weight=a)
    assert value.dtype == torch.float32 and torch.equal(value, emd_l2(x, y, student_weight=a.float()))
    (grad,) = torch.autograd.grad(value, a)
    assert grad.dtype == F64 and grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_kinds_that_are_no_weights(dtype: torch.dtype) -> None:
    with pytest.raises(
        TypeError, match="expected student_weight to be bool, integer or floating-point, got torch.complex"
    ):
        emd_l2(torch.rand(1, 2, 3), torch.rand(1, 2, 3), student_weight=torch.ones(1, 2, dtype=dtype))
    with pytest.raises(TypeError, match="expected b to be bool, integer or floating-point, got torch.complex"):
        solve(torch.rand(2, 3), None, torch.ones(3, dtype=dtype))


@pytest.mark.parametrize("groups", [False, True])
@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize("options", [{}, {"reach": 1.0}, {"objective": "divergence"}, {"solver": "exact"}], ids=str)
def test_one_set_of_weights_for_the_whole_batch(options: dict[str, object], tokens: bool, groups: bool) -> None:
    """``[N]`` or ``[H, W]``: as if repeated, value and gradients."""
    group = (2,) * groups
    if tokens:
        x, y, shapes = features(3, 6, 4), features(3, *group, 5, 4), ((6,), (5,))
    else:
        x, y, shapes = features(3, 4, 2, 3), features(3, *group, 4, 5, 1), ((2, 3), (5, 1))
    a, b = (weights(*shape, grad=True) for shape in shapes)
    factor = torch.rand(3, *group)

    def value(a: Tensor, b: Tensor) -> Tensor:
        return emd_l2(x, y, student_weight=a, teacher_weight=b, reduction="none", **options)

    repeated = [w.detach().expand(3, *w.shape).clone().requires_grad_() for w in (a, b)]
    expected = torch.autograd.grad((value(*repeated) * factor).sum(), repeated)
    for given in ((a, b), (a.reshape(-1), b.reshape(-1))):
        assert torch.equal(value(*given), value(*repeated))
        ours = torch.autograd.grad((value(*given) * factor).sum(), (a, b))
        torch.testing.assert_close(ours, tuple(grad.sum(0) for grad in expected))


def test_the_reference_takes_the_same_weights() -> None:
    """``[N]``, ``[H, W]``, counts, masks; one set, for each of the batch, for each group."""
    x, y = features(3, 4, 2, 3), features(3, 2, 4, 5, 1)
    mask = torch.tensor([[True, True, False], [True, False, True]])
    counts = torch.randint(1, 4, (3, 2, 5))
    for a, b in (
        (mask, counts),
        (mask.view(-1), counts[0, 0]),
        (mask.expand(3, 2, 3), counts[:, 0]),
        (None, counts[0, :1].view(5, 1)),
    ):
        options = {"student_weight": a, "teacher_weight": b, "tol": 1e-5, "reduction": "none"}
        expected = reference.emd_l2(x, y, **options)
        torch.testing.assert_close(emd_l2(x, y, **options).double(), expected, rtol=1e-4, atol=1e-5)


def test_shapes_that_are_no_weights() -> None:
    with pytest.raises(ValueError, match=r"of shape \[2, 6\] or \[2, 2, 3\], or \[6\] or \[2, 3\] for all, got \[5\]"):
        emd_l2(features(2, 4, 2, 3), features(2, 4, 2, 3), student_weight=torch.ones(5))
    with pytest.raises(ValueError, match=r"expected a .*got \[\]"):
        solve_sample(features(2, 6, 4), features(2, 6, 4), torch.tensor(1.0))


@pytest.mark.parametrize("solver", ["sinkhorn", "exact"])
def test_weights_of_a_batch_beside_as_many_groups(solver: str) -> None:
    """``[B, N]`` beside ``[B, B, N, M]`` could mean either: refused, and both ways of saying it agree with features."""
    x, y = features(3, 6, 4), features(3, 3, 5, 4)
    cost, a, b = cost_matrix(x, y), weights(3, 6), weights(3, 5)
    for sides, name, count in (((a, None), "a", 6), ((None, b), "b", 5)):
        message = rf"expected {name} of shape \[3, 1, {count}\].* or \[1, 3, {count}\].* got \[3, {count}\]"
        with pytest.raises(ValueError, match=message):
            solve(cost, *sides, solver=solver)
    said = solve(cost, a[:, None], b[:, None], solver=solver)
    torch.testing.assert_close(said.plan, solve_sample(x, y, a, b, solver=solver).plan)
    grouped = solve(cost, a[None], solver=solver)
    torch.testing.assert_close(grouped.plan, solve_sample(x, y, a.expand(3, 3, 6), solver=solver).plan)
    # Nothing to mistake: one problem, other numbers of groups, one set for all.
    assert solve(cost[:1, :1], a[:1], solver=solver).plan.shape == (1, 1, 6, 5)
    assert solve(cost[:, :2], a[:2], solver=solver).plan.shape == (3, 2, 6, 5)
    assert solve(cost, a[0], solver=solver).plan.shape == (3, 3, 6, 5)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("solver", ["sinkhorn", "exact"])
def test_weights_whose_sum_overflows(solver: str, dtype: torch.dtype) -> None:
    """... or that are as small as the type has them: only their ratios count."""
    info = torch.finfo(dtype)
    x, y = features(1, 6, 4, dtype=dtype), features(1, 5, 4, dtype=dtype)
    shares, others = (
        torch.tensor([[1.0, 0.5, 1, 0, 0.25, 1]], dtype=dtype),
        torch.tensor([[0.5, 1, 1, 1, 0]], dtype=dtype),
    )
    expected = solve_sample(x, y, shares, others, solver=solver)
    cost = cost_matrix(x, y)
    for scale in (info.max, info.max / 2, info.tiny * 4):
        a, b = shares * scale, others * scale
        for result in (solve_sample(x, y, a, b, solver=solver), solve(cost, a, b, solver=solver)):
            torch.testing.assert_close(result.plan, expected.plan)
            torch.testing.assert_close(result.rounded_plan(), expected.rounded_plan())
            torch.testing.assert_close(result.barycentric(y), expected.barycentric(y))
            assert result.plan.sum().item() == pytest.approx(1, rel=1e-5)


def test_weights_too_small_beside_the_largest_are_removed_from_the_plan_too() -> None:
    """As the kernels see them: below what the type can hold in units of the largest."""
    cost = torch.rand(3, 4)
    tiny = torch.tensor([3e38, 1e-3, 1e38])
    result, without = solve(cost, tiny), solve(cost, torch.tensor([3e38, 0, 1e38]))
    assert torch.equal(result.plan, without.plan) and torch.equal(result.plan[1], torch.zeros(4))


@pytest.mark.parametrize("scale", [1e-30, 1e15, 1e19, 1e25, 1e37])
def test_cross_reference_at_any_scale(scale: float) -> None:
    x, y = features(2, 8, 5).float() * scale, features(2, 3, 6, 5) * scale
    ours = cross_reference_weights(x, y)
    for found, expected in zip(ours, cross_reference_weights(x.double(), y.double()), strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(found.sum(-1), torch.ones(2, 3))


@pytest.mark.parametrize("objective", ["transport", "entropic", "divergence"])
@pytest.mark.parametrize(("n", "channels"), [(3, 3), (5, 3), (16, 8), (25, 64)])
def test_equal_weights_on_as_many_patches(n: int, channels: int, objective: str) -> None:
    """Where the plan nearly matches patch with patch, hardly anything holds the potentials together that weights'
    gradients are made of: they are right all the same, at the default ``tol``."""
    worst = []
    for _ in range(6):
        x, y = (torch.rand(1, n, channels, dtype=torch.float64) for _ in range(2))
        weight = torch.ones(1, n, dtype=torch.float64, requires_grad=True)
        grads = []
        for options in ({}, {"tol": 1e-14, "max_iter": 50_000}):
            value = emd_l2(x, y, student_weight=weight, objective=objective, **options)
            grads += torch.autograd.grad(value, weight)
        worst.append(error(*grads))
    assert sorted(worst)[3] < 1e-9 and max(worst) < 1e-2


def test_weights_without_gradients_are_solved_to_tol_alone() -> None:
    x, y = features(4, 20, 6), features(4, 20, 6)
    weight = weights(4, 20)
    plain = solve_sample(x, y, weight)
    with torch.no_grad():
        unasked = solve_sample(x, y, weight.requires_grad_())
    asked = solve_sample(x, y, weight)
    assert torch.equal(plain.n_iter, unasked.n_iter) and (asked.n_iter > plain.n_iter).all()
    assert (asked.marginal_error < plain.marginal_error).all() and asked.converged.all()
