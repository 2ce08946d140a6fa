"""The debiased divergence: what it is, that it vanishes where it should, and the term that may be given."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases import EPS_SCALES, HALVES, METRICS, error, features, value_and_gradients, weights
from torch import Tensor

from sfr_ext import EMDL2Loss, emd_l2, reference, self_term, solve_sample
from sfr_ext.ops import SolverOptions

DIVERGENCE = {"objective": "divergence", "reduction": "none"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("groups", [False, True])
@pytest.mark.parametrize("eps_scale", EPS_SCALES)
@pytest.mark.parametrize("metric", METRICS)
def test_values_and_gradients_are_those_of_the_reference(
    metric: str, eps_scale: str, groups: bool, dtype: torch.dtype
) -> None:
    x = features(2, 4, 3, 3, dtype=dtype, grad=True)
    y = features(*((2, 2) if groups else (2,)), 4, 2, 4, dtype=dtype, grad=True)
    a, b = weights(2, 9, dtype=dtype, grad=True), weights(2, 8, dtype=dtype, grad=True)
    eps = 6.0 if (metric, eps_scale) == ("sqeuclidean", "absolute") else 0.8  # large, for the sake of the slow one
    options = {**DIVERGENCE, "metric": metric, "eps": eps, "eps_scale": eps_scale}
    tight = 1e-5 if dtype == torch.float32 else 1e-12

    def value(function: object, x: Tensor, y: Tensor, a: Tensor, b: Tensor, tol: float) -> Tensor:
        return function(x, y, student_weight=a, teacher_weight=b, tol=tol, **options)  # type: ignore[operator]

    found, gradients = value_and_gradients(lambda *t: value(emd_l2, *t, tol=tight), x, y, a, b)
    expected, wanted = value_and_gradients(lambda *t: value(reference.emd_l2, *t, tol=1e-12), x, y, a, b)
    assert error(found, expected) < tight
    for ours, theirs in zip(gradients, wanted, strict=True):
        assert error(ours, theirs) < 10 * tight


@pytest.mark.parametrize("eps_scale", EPS_SCALES)
def test_gradcheck(eps_scale: str) -> None:
    x, y = features(1, 5, 3, dtype=torch.float64, grad=True), features(1, 2, 4, 3, dtype=torch.float64, grad=True)
    a, b = weights(1, 5, dtype=torch.float64, grad=True), weights(1, 4, dtype=torch.float64, grad=True)

    def value(x: Tensor, y: Tensor, a: Tensor, b: Tensor) -> Tensor:
        options = {**DIVERGENCE, "eps": 0.3, "eps_scale": eps_scale, "tol": 1e-13}
        return emd_l2(x, y, student_weight=a, teacher_weight=b, **options)

    assert torch.autograd.gradcheck(value, (x, y, a, b), atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("reach", [None, 0.5])
@pytest.mark.parametrize("eps", [1.0, 0.05, 0.01])
@pytest.mark.parametrize("metric", METRICS)
def test_equal_inputs_have_no_divergence_and_no_gradient(
    metric: str, eps: float, reach: float | None, dtype: torch.dtype
) -> None:
    """At the default tol; in units of the cost, and of the gradient that unequal inputs have without a reach."""
    x, other = features(3, 16, 6, 6, dtype=dtype, grad=True), features(3, 16, 6, 6, dtype=dtype)
    twin = x.detach().clone().requires_grad_()
    options = {**DIVERGENCE, "metric": metric, "eps": eps, "reach": reach}
    value, gradients = value_and_gradients(lambda x, y: emd_l2(x, y, **options), x, twin)
    scale, (slope,) = value_and_gradients(lambda x: emd_l2(x, other, **{**options, "reach": None}), x)
    rounding = torch.finfo(dtype).eps
    assert (value.abs() <= 8 * rounding * scale).all()
    for gradient in gradients:
        assert gradient.abs().max() <= 1000 * rounding * slope.abs().max()


@pytest.mark.every_strategy
@pytest.mark.parametrize("metric", ["l2", "sqeuclidean", "l1"])
@pytest.mark.parametrize(("n", "m"), [(3, 5), (40, 60)])
def test_all_pairs_between_the_sides_cost_the_same(n: int, m: int, metric: str) -> None:
    """Then eps is 0, and what the sides have with themselves is the mean cost."""
    x, y = torch.eye(n + m)[None, :n], torch.eye(n + m)[None, n:]
    a, b = weights(1, n), weights(1, m)
    a[0, 1] = 0
    options = {**DIVERGENCE, "metric": metric}
    found, gradients = value_and_gradients(
        lambda a, b: emd_l2(x, y, student_weight=a, teacher_weight=b, **options), a.requires_grad_(), b.requires_grad_()
    )
    apart = {"l2": 2**0.5, "sqeuclidean": 2.0, "l1": 2.0}[metric]

    def mean_cost(w: Tensor) -> Tensor:
        w = w / w.sum()
        return apart * (1 - w.square().sum())

    expected, wanted = value_and_gradients(lambda a, b: apart - mean_cost(a) / 2 - mean_cost(b) / 2, a, b)
    assert error(found, expected.detach()[None]) < 1e-5
    assert error(gradients[1], wanted[1]) < 1e-4
    assert gradients[0][0, 1] == 0 and error(gradients[0][a > 0], wanted[0][a > 0]) < 1e-4


def test_it_is_not_negative_beyond_rounding() -> None:
    """Inputs that hardly differ, or are permuted, at a loose tol."""
    x = features(32, 25, 8)
    for y in (x + 1e-6 * features(32, 25, 8), x + 1e-3 * features(32, 25, 8), x.flip(1)):
        value = emd_l2(x, y, tol=1e-2, **DIVERGENCE)
        assert (value > -1e-6 * emd_l2(x, features(32, 25, 8), reduction="none")).all()


def test_without_debiasing_equal_inputs_have_a_cost() -> None:
    """So that the tests above can tell."""
    x = features(3, 25, 8)
    assert (emd_l2(x, x, eps=1.0, objective="entropic", reduction="none") > 0.1).all()


def test_geomloss_agrees() -> None:
    geomloss = pytest.importorskip("geomloss")
    x, y = features(3, 9, 4, dtype=torch.float64), features(3, 7, 4, dtype=torch.float64)
    a, b = (
        w / w.sum(-1, keepdim=True) for w in (weights(3, 9, dtype=torch.float64), weights(3, 7, dtype=torch.float64))
    )
    for reach in (None, 1.0):
        loss = geomloss.SamplesLoss("sinkhorn", p=1, blur=0.5, reach=reach, scaling=0.999, backend="tensorized")
        options = {**DIVERGENCE, "eps": 0.5, "eps_scale": "absolute", "reach": reach, "tol": 1e-10}
        ours = emd_l2(x, y, student_weight=a, teacher_weight=b, **options)
        assert error(ours, loss(a, x, b, y)) < 2e-4  # as far as its annealing goes


@pytest.mark.parametrize("groups", [False, True])
@pytest.mark.parametrize("reach", [None, 0.7])
def test_a_given_teacher_changes_nothing(reach: float | None, groups: bool) -> None:
    """Neither the value nor the student's gradient."""
    x = features(2, 4, 3, 3, grad=True)
    y = features(*((2, 3) if groups else (2,)), 4, 2, 4)
    b = weights(2, 8) / 8
    options = {**DIVERGENCE, "eps": 0.3, "eps_scale": "absolute", "reach": reach, "teacher_weight": b, "tol": 1e-6}
    term = self_term(y, b, groups=groups, eps=0.3, reach=reach)
    with_it, without = (
        value_and_gradients(lambda x, given=given: emd_l2(x, y, teacher_self=given, **options), x)
        for given in (term, None)
    )
    torch.testing.assert_close(with_it, without, rtol=1e-5, atol=1e-6)


def test_a_teacher_that_does_not_fit_raises() -> None:
    x, y = features(2, 9, 4), features(2, 7, 4)
    term = self_term(y, eps=0.3)
    options = {"objective": "divergence", "eps": 0.3, "eps_scale": "absolute"}
    with pytest.raises(TypeError, match="expected teacher_self to be a SelfTerm, from self_term, got int"):
        emd_l2(x, y, teacher_self=3, **options)
    with pytest.raises(ValueError, match="expected teacher_self to come with eps_scale"):
        emd_l2(x, y, teacher_self=term, objective="divergence", eps=0.3)
    with pytest.raises(ValueError, match="expected teacher_self to be computed with"):
        emd_l2(x, y, teacher_self=term, **{**options, "eps": 0.2})
    with pytest.raises(ValueError, match=r"expected teacher_self for a teacher of \[2, 8\] patches, got \[2, 7\]"):
        emd_l2(x, features(2, 8, 4), teacher_self=term, **options)


@pytest.mark.parametrize(
    "options",
    [{}, {"objective": "entropic"}, {"solver": "exact"}, {"objective": "divergence", "solver": "exact"}],
    ids=str,
)
def test_a_teacher_that_would_not_be_looked_at_is_refused(options: dict[str, str]) -> None:
    x, y = features(2, 9, 4), features(2, 7, 4)
    term = self_term(y, eps=0.3)
    given = {"eps": 0.3, "eps_scale": "absolute", **options, "teacher_self": term}
    came = f"objective={options.get('objective', 'transport')!r} and solver={options.get('solver', 'sinkhorn')!r}"
    message = f'expected teacher_self with objective="divergence" and solver="sinkhorn" only, got {came}$'
    with pytest.raises(ValueError, match=f"^sfr_ext.emd_l2: {message}"):
        emd_l2(x, y, **given)
    with pytest.raises(ValueError, match=f"^sfr_ext.EMDL2Loss: {message}"):
        EMDL2Loss(**given)
    with pytest.raises(TypeError, match="expected teacher_self to be a SelfTerm"):
        EMDL2Loss(teacher_self=3)


def test_kinds_and_shapes_of_a_teacher() -> None:
    groups = features(2, 3, 4, 5, 5)
    with pytest.raises(ValueError, match=r"\[B, C, H, W\] or .* got \[2, 3, 4, 5, 5\]; .*groups=True"):
        self_term(groups, eps=0.3)
    for shape in ((4,), (3, 4), (2, 3, 4)):
        with pytest.raises(ValueError, match=rf"\[B, G, M, C\] with groups=True, got \[{', '.join(map(str, shape))}\]"):
            self_term(torch.rand(shape), groups=True, eps=0.3)
    with pytest.raises(TypeError, match="expected groups to be a bool, got int"):
        self_term(groups, groups=1, eps=0.3)  # type: ignore[arg-type]
    term = self_term(features(2, 7, 4), eps=np.float32(0.25))  # type: ignore[arg-type]
    options = {"objective": "divergence", "eps": 0.25, "eps_scale": "absolute"}
    assert emd_l2(features(2, 9, 4), features(2, 7, 4), teacher_self=term, **options).isfinite()


def test_a_nan_stays_in_its_problem() -> None:
    x, y = features(3, 9, 4, grad=True), features(3, 9, 4)
    with torch.no_grad():
        x[1, 2, 0] = float("nan")
    value = emd_l2(x, y, **DIVERGENCE)
    value[[0, 2]].sum().backward()
    assert value.isnan().tolist() == [False, True, False] and x.grad[[0, 2]].isfinite().all()


def test_an_empty_batch() -> None:
    assert emd_l2(features(0, 9, 4), features(0, 9, 4), **DIVERGENCE).shape == (0,)


@pytest.mark.parametrize("options", [{}, {"eps_scale": "absolute"}, {"reach": 1.0}], ids=str)
def test_operators_are_sound(options: dict[str, object]) -> None:
    """As torch's own checker sees them, and compiled whole."""
    x, y = features(2, 9, 4, grad=True), features(2, 3, 7, 4)
    compiled = torch.compile(emd_l2, fullgraph=True, backend="aot_eager")
    (eager, slopes), (traced, same) = (
        value_and_gradients(lambda x, f=f: f(x, y, **DIVERGENCE, **options), x) for f in (emd_l2, compiled)
    )
    assert torch.equal(eager, traced) and torch.equal(slopes[0], same[0])
    relative = "eps_scale" not in options
    reach = float(options.get("reach", 0.0))  # type: ignore[arg-type]
    solve = SolverOptions(eps=0.1, relative=relative, reach_a=reach, reach_b=reach, tol=1e-3, max_iter=100)
    arguments = (x, y, None, None, None, None, 0, 1, *solve, "emd_l2")
    torch.library.opcheck(torch.ops.sfr_ext.divergence_forward.default, arguments)


@pytest.mark.parametrize("groups", [False, True])
@pytest.mark.parametrize("reach", [None, 1.0, (None, 2.0)], ids=str)
@pytest.mark.parametrize("eps_scale", EPS_SCALES)
@pytest.mark.parametrize("low", [torch.float32, *HALVES])
@pytest.mark.parametrize("wide", ["student", "teacher"])
def test_one_side_in_float64(wide: str, low: torch.dtype, eps_scale: str, reach: object, groups: bool) -> None:
    """Everything is computed in float64, also what the other side has with itself; gradients have the inputs' types."""
    x = features(2, 4, 2, 3, dtype=torch.float64 if wide == "student" else low, grad=True)
    y = features(2, *[3] * groups, 4, 2, 2, dtype=torch.float64 if wide == "teacher" else low, grad=True)
    a, b = weights(2, 6, grad=True), weights(2, 4, grad=True)
    options = {**DIVERGENCE, "eps": 0.3, "eps_scale": eps_scale, "reach": reach, "tol": 1e-12}

    def value(*inputs: Tensor) -> Tensor:
        return emd_l2(*inputs[:2], student_weight=inputs[2], teacher_weight=inputs[3], **options)

    ours, gradients = value_and_gradients(value, x, y, a, b)
    leaves = [t.detach().double().requires_grad_() for t in (x, y, a, b)]
    expected, wanted = value_and_gradients(value, *leaves)
    assert ours.dtype == torch.float64 and torch.equal(ours, expected)
    for found, exact, leaf in zip(gradients, wanted, (x, y, a, b), strict=True):
        assert found.dtype == leaf.dtype
        torch.testing.assert_close(found, exact.to(leaf.dtype))


def test_a_self_term_of_another_type() -> None:
    x, y = features(2, 5, 3, dtype=torch.float64), features(2, 6, 3)
    options = {**DIVERGENCE, "eps": 0.3, "eps_scale": "absolute"}
    term = self_term(y, eps=0.3)
    assert term.potential.dtype == torch.float32
    torch.testing.assert_close(
        emd_l2(x, y, teacher_self=term, **options), emd_l2(x, y, **options), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("reach", [None, 1.0, (0.5, None)], ids=str)
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_masks_make_the_value_of_what_is_left(side: str, reach: object) -> None:
    """Bit for bit, with patches of weight 0 between the others."""
    x, y = features(2, 37, 3, grad=True), features(2, 21, 3, grad=True)
    a, b = weights(2, 37, grad=True), weights(2, 21, grad=True)
    options = {**DIVERGENCE, "reach": reach}

    def value(x: Tensor, y: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return emd_l2(x, y, student_weight=a, teacher_weight=b, **options)

    expected, wanted = value_and_gradients(value, x, y, a, b)
    own = 0 if side == "student" else 1
    kept = torch.randperm(90)[: (37, 21)[own]].sort().values
    padded = [t.detach() for t in (x, y, a, b)]
    for i in (own, own + 2):
        wide = torch.zeros(2, 90, *padded[i].shape[2:]) if i > 1 else torch.full((2, 90, 3), torch.nan)
        wide[:, kept] = padded[i]
        padded[i] = wide
    ours, gradients = value_and_gradients(value, *(t.requires_grad_() for t in padded))
    assert torch.equal(ours, expected)
    for i, (found, exact) in enumerate(zip(gradients, wanted, strict=True)):
        assert torch.equal(found[:, kept] if i % 2 == own else found, exact)


@pytest.mark.parametrize("eps_scale", EPS_SCALES)
@pytest.mark.parametrize("eps", [1e-6, 1e-9, 1e-16])
@pytest.mark.parametrize("metric", METRICS)
def test_an_eps_below_what_float32_holds(metric: str, eps: float, eps_scale: str) -> None:
    """All three problems are solved with the least that the type holds: the value is that of exact transport."""
    x, y = features(2, 12, 8, grad=True), features(2, 2, 10, 8)
    options = {"metric": metric, "reduction": "none"}
    value, (grad,) = value_and_gradients(emd_l2, x, y, objective="divergence", eps=eps, eps_scale=eps_scale, **options)
    exact, (right,) = value_and_gradients(emd_l2, x, y, solver="exact", **options)
    assert error(value, exact) < 1e-3 and error(grad, right) < 2e-2


def test_a_self_term_at_an_eps_below_what_float32_holds() -> None:
    x, y = features(2, 12, 8), features(2, 10, 8)
    options = {"eps": 1e-12, "eps_scale": "absolute", "objective": "divergence"}
    given = emd_l2(x, y, teacher_self=self_term(y, eps=1e-12), **options)
    assert error(given, emd_l2(x, y, **options)) < 1e-4


@pytest.mark.parametrize("reach", [(1e-8, None), (None, 1e-12), (1e-15, 1e-15), (1e-20, 1.0), (1e-30, 1e3)])
@pytest.mark.parametrize("mass", [1.0, 7.0])
def test_a_reach_below_the_rounding_of_potentials(reach: tuple[float | None, float | None], mass: float) -> None:
    """Their quotient says nothing of how much is moved; there is not more than there is."""
    x, y = torch.randn(2, 7, 3), torch.randn(2, 6, 3)
    a, b = mass * torch.rand(2, 7), mass * torch.rand(2, 6)
    a[1, 3] = 0
    options = {"objective": "divergence", "reach": reach, "reduction": "none", "eps": 0.05, "eps_scale": "absolute"}
    single = emd_l2(x, y, student_weight=a, teacher_weight=b, **options)
    double = emd_l2(x.double(), y.double(), student_weight=a.double(), teacher_weight=b.double(), **options)
    larger = options | {"reach": tuple(r and max(r, 1e-5) for r in reach)}
    near = emd_l2(x.double(), y.double(), student_weight=a.double(), teacher_weight=b.double(), **larger)
    torch.testing.assert_close(single.double(), double, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(double, near, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("reach", [None, 1.0])
@pytest.mark.parametrize("empty", [0, 1])
def test_an_empty_group_leaves_the_others_as_they_are(empty: int, reach: float | None) -> None:
    x, y = features(2, 6, 3, dtype=torch.float64, grad=True), features(2, 3, 5, 3, dtype=torch.float64)
    b = torch.ones(2, 3, 5, dtype=torch.float64)
    b[0, empty] = 0
    options = {"eps": 0.3, "eps_scale": "absolute", "reach": reach, **DIVERGENCE}
    value, gradients = value_and_gradients(lambda x: emd_l2(x, y, teacher_weight=b, **options), x)
    alone = [
        value_and_gradients(lambda x, g=g: emd_l2(x, y[:, g], teacher_weight=b[:, g], **options), x) for g in range(3)
    ]
    assert value[0, empty] == 0 and value[0].count_nonzero() == 2
    assert error(value, torch.stack([of for of, _ in alone], 1)) < 1e-9
    assert error(gradients[0], sum(grad for _, (grad,) in alone)) < 1e-7


@pytest.mark.parametrize("reach", [None, 0.1])
@pytest.mark.parametrize("far", [3e3, 1e5])
def test_an_absolute_eps_beside_far_clusters_is_held(far: float, reach: float | None) -> None:
    """What potentials span says what the type holds, not how far apart the costs are."""
    x, y = features(2, 20, 4), features(2, 20, 4)
    x[:, 10:] += far
    y[:, 10:] += far
    options = {"eps": 0.05, "eps_scale": "absolute", "reach": reach, "tol": 1e-5, "max_iter": 20_000, **DIVERGENCE}
    wide = [z.double().requires_grad_() for z in (x, y)]
    ours, grads = value_and_gradients(lambda x, y: emd_l2(x, y, **options), x.requires_grad_(), y.requires_grad_())
    expected, right = value_and_gradients(lambda x, y: emd_l2(x, y, **{**options, "tol": 1e-10}), *wide)
    assert error(ours, expected) < 1e-4
    for grad, wanted in zip(grads, right, strict=True):
        assert error(grad, wanted) < 2e-2 * max(1, far / 1e4)
    term = self_term(y.detach(), eps=0.05, reach=reach)
    assert error(emd_l2(x, y, teacher_self=term, **options), expected) < 1e-4
    assert emd_l2(y, y, teacher_self=term, **options).abs().max() < 1e-5


def test_an_eps_that_gave_way_is_that_of_all_three() -> None:
    """One patch far from all others, and an eps that float32 does not hold there."""
    x, y = features(3, 12, 3), features(3, 12, 3)
    x[1, 0] += 1e5
    options = {"eps": 1e-3, "eps_scale": "absolute", "max_iter": 20_000, **DIVERGENCE}
    used = solve_sample(x, y, eps=1e-3, eps_scale="absolute", max_iter=20_000).eps
    assert used[1] > 2 * used[0] and used[0] == used[2]
    ours = emd_l2(x, y, **options)
    for b in range(3):
        expected = emd_l2(x[b : b + 1].double(), y[b : b + 1].double(), **{**options, "eps": used[b].item()})
        assert error(ours[b : b + 1], expected) < 1e-4


@pytest.mark.parametrize("groups", [None, 2])
def test_no_problems_at_all(groups: int | None) -> None:
    lead = (0,) if groups is None else (0, groups)
    x, y = torch.rand(0, 5, 4).requires_grad_(), torch.rand(*lead, 6, 4).requires_grad_()
    a, b = torch.rand(0, 5).requires_grad_(), torch.rand(*lead, 6).requires_grad_()
    value = emd_l2(x, y, student_weight=a, teacher_weight=b, objective="divergence", reduction="none")
    gradients = torch.autograd.grad(value.sum(), (x, y, a, b))
    assert value.shape == lead and [g.shape for g in gradients] == [t.shape for t in (x, y, a, b)]
