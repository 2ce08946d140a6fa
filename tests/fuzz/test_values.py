"""Values and gradients against float64, linear programming, central differences, and the bounds of duality."""

from __future__ import annotations

import torch
from cases import value_and_gradients
from hypothesis import assume, given
from hypothesis import strategies as st
from problems import Problem, problems
from torch import Tensor

from sfr_ext import cost_matrix, emd_l2, reference, solve, solve_sample

F32, F64 = torch.float32, torch.float64
REACHES = (None, None, (2.0, 2.0), (1.0, None), (None, 4.0))
OBJECTIVES = ["transport", "entropic", "divergence"]


def tolerance(dtype: torch.dtype) -> float:
    return 1e-9 if dtype == F64 else 1e-5


def unit_of(cost: Tensor, problem: Problem) -> Tensor:
    """What an error of a value is compared with: the costs and the reach, or what rounds where all of them are 0."""
    metric, size = problem.options["metric"], problem.x.abs().amax().double().item()
    least = 1.0 if metric == "cosine" else 1e-6 * (size * size if metric == "sqeuclidean" else size)
    reach = max((r for r in problem.options.get("reach", ()) if r is not None), default=0.0)
    return cost.abs().amax((-2, -1)).clamp_min(max(least, reach, 1e-300))


@given(problems(most=600, reaches=REACHES), st.sampled_from(OBJECTIVES))
def test_values_are_those_of_the_reference(problem: Problem, objective: str) -> None:
    dtype = F64 if F64 in (problem.x.dtype, problem.y.dtype) else F32
    tol = tolerance(dtype)
    options = {**problem.options, "objective": objective, "reduction": "none"}
    value = emd_l2(problem.x, problem.y, **problem.weights, tol=tol, max_iter=5000, **options)
    result = solve_sample(problem.x, problem.y, problem.a, problem.b, tol=tol, max_iter=5000, **problem.options)
    wide = problem.wide()
    cost = reference.cost_matrix(wide.x, wide.y, metric=problem.options["metric"])
    mass = 1.0
    if "reach" in problem.options:
        mass = max(1.0, *(w.double().sum(-1).max().item() for w in (problem.a, problem.b) if w is not None), 0.0)
    assert value.isfinite().all() and result.converged.all()
    for iterations in (20_000, 500_000):  # the reference has plain ones, which clusters make slow
        expected = reference.emd_l2(wide.x, wide.y, **wide.weights, tol=1e-10, max_iter=iterations, **options)
        apart = (value.double() - expected).abs() / (unit_of(cost, problem) * mass * mass)
        if (apart <= 20 * tol).all():
            return
    raise AssertionError((value, expected))


@given(problems(most=9500))
def test_duality_bounds_the_value(problem: Problem) -> None:
    """Any potentials bound the entropic value from below, any plan with the marginals from above."""
    dtype = F64 if F64 in (problem.x.dtype, problem.y.dtype) else F32
    tol = tolerance(dtype)
    result = solve_sample(problem.x, problem.y, problem.a, problem.b, tol=tol, **problem.options)
    wide = problem.wide()
    cost = reference.cost_matrix(wide.x, wide.y, metric=problem.options["metric"])
    plan = result.rounded_plan().double()
    a, b = plan.sum(-1), plan.sum(-2)
    product, eps = a[..., :, None] * b[..., None, :], result.eps.double()
    # Where costs differ by their rounding alone, potentials of rounded ones bound nothing of the exact ones.
    rounding = torch.finfo(dtype).eps * (unit_of(cost, problem) + cost.amax((-2, -1)))
    assume((eps > 100 * rounding).all())
    per_pair = eps[..., None, None]
    f, g = result.f.double(), result.g.double()
    exponent = (f[..., :, None] + g[..., None, :] - cost) / per_pair
    mass = torch.where(product > 0, product * exponent.clamp_max(50).exp(), 0.0).sum((-2, -1))
    below = (torch.where(a > 0, a * f, 0.0)).sum(-1) + (torch.where(b > 0, b * g, 0.0)).sum(-1) + eps * (1 - mass)
    ratio = torch.where(plan > 0, plan / torch.where(product > 0, product, 1.0), 1.0)
    above = (plan * cost).sum((-2, -1)) + eps * (plan * ratio.log() - plan + product).sum((-2, -1))
    slack = 50 * tol * unit_of(cost, problem)
    # Or as far as potentials can be told apart.
    assert (result.converged | (result.marginal_error <= rounding / eps)).all()
    value, kept = result.entropic_cost.double(), result.converged
    assert (above - below <= slack)[kept].all(), (below, above)
    assert (value >= below - slack)[kept].all() and (value <= above + slack)[kept].all()


@given(problems(most=300, dtypes=[F32, F64]))
def test_exact_is_linear_programming(problem: Problem) -> None:
    cost = cost_matrix(problem.x, problem.y, metric=problem.options["metric"])
    value = emd_l2(
        problem.x, problem.y, **problem.weights, solver="exact", metric=problem.options["metric"], reduction="none"
    )
    groups = cost.dim() == 4

    def spread(weight: Tensor | None) -> Tensor | None:
        if weight is None or weight.dim() == 1 or not groups or weight.dim() == 3:
            return weight
        return weight[:, None]

    unit = unit_of(cost.double(), problem)
    assume((unit < 1e300).all())
    # The linear programme's tolerances are absolute.
    largest = cost.double().abs().amax((-2, -1)).clamp_min(1e-300)
    wide = cost.double() / largest[..., None, None]
    expected = reference.exact_emd(wide, spread(problem.a), spread(problem.b)) * (largest / unit)
    assert ((value.double() / unit - expected).abs() <= (1e-9 if cost.dtype == F64 else 1e-6)).all()


@given(
    problems(
        most=260,
        dtypes=[F32, F64],
        weights=["none", "mild", "skewed", "zeros", "counts", "large"],
        scales=(-18, 18),
        reaches=REACHES,
    ),
    st.sampled_from(OBJECTIVES),
)
def test_gradients_are_those_of_the_reference(problem: Problem, objective: str) -> None:
    dtype = F64 if F64 in (problem.x.dtype, problem.y.dtype) else F32
    options = {**problem.options, "objective": objective, "reduction": "none"}
    sides = (None if w is None else w.to(dtype) for w in (problem.a, problem.b))
    wanting = [None if t is None else t.clone().requires_grad_() for t in (problem.x, problem.y, *sides)]
    wide = [None if t is None else t.detach().double().requires_grad_() for t in wanting]

    def ours(x: Tensor, y: Tensor, a: Tensor | None, b: Tensor | None) -> Tensor:
        limits = {"tol": 1e-6 if dtype == F32 else 1e-11, "max_iter": 10_000}
        return emd_l2(x, y, student_weight=a, teacher_weight=b, **limits, **options)

    def theirs(x: Tensor, y: Tensor, a: Tensor | None, b: Tensor | None) -> Tensor:
        limits = {"tol": 1e-11, "max_iter": 20_000}
        return reference.emd_l2(x, y, student_weight=a, teacher_weight=b, **limits, **options)

    cost = reference.cost_matrix(problem.x, problem.y, metric=problem.options["metric"])
    unit = unit_of(cost, problem).max()
    found = value_and_gradients(ours, *wanting)[1]
    leaves = [t for t in wanting if t is not None]
    for grad, wanted, leaf in zip(found, value_and_gradients(theirs, *wide)[1], leaves, strict=True):
        size = unit / leaf.detach().double().abs().amax().clamp_min(1e-300)
        assert grad.isfinite().all()
        allowed = (2e-3 if dtype == F32 else 1e-5) * size + torch.finfo(grad.dtype).tiny
        assert (grad.double() - wanted).abs().amax() <= allowed, (grad, wanted)


@given(problems(most=120, dtypes=[F64], weights=["none", "mild", "zeros"], scales=(-3, 3)), st.sampled_from(OBJECTIVES))
def test_gradients_are_slopes(problem: Problem, objective: str) -> None:
    """Central differences along a random direction, of every input."""
    assume(not problem.x.equal(torch.ones_like(problem.x)))
    options = {**problem.options, "objective": objective, "tol": 1e-13, "max_iter": 20_000}

    def value(x: Tensor, y: Tensor) -> Tensor:
        return emd_l2(x, y, **problem.weights, **options)

    x, y = problem.x.clone().requires_grad_(), problem.y.clone().requires_grad_()
    grads = torch.autograd.grad(value(x, y), (x, y))
    generator = torch.Generator().manual_seed(0)
    size = max(x.abs().max().item(), y.abs().max().item(), 1e-300)
    ways = [torch.randn(t.shape, generator=generator, dtype=F64) * size for t in (x, y)]
    if problem.options["metric"] == "l1":
        # Two values that change places within the smaller step have two slopes there; equal ones have their mean.
        maps = x.dim() == 4
        by_channel = [[t.flatten(-2) if maps else t.mT for t in both] for both in ((x, y), ways)]
        lead = (slice(None), None) if y.dim() > x.dim() else ()  # y has groups
        compared = [(of_x[lead], of_y) for of_x, of_y in by_channel]
        for one, other in ((0, 1), (0, 0), (1, 1)):  # the divergence compares each map with itself, too
            between, pace = ((both[one][..., :, None] - both[other][..., None, :]).abs() for both in compared)
            assume(not ((between > 0) & (between < 1e-6 * pace)).any())
    slope = sum((grad * way).sum() for grad, way in zip(grads, ways, strict=True))
    with torch.no_grad():
        differences = []
        for step in (1e-5, 1e-6):
            ahead, behind = value(x + step * ways[0], y + step * ways[1]), value(x - step * ways[0], y - step * ways[1])
            differences.append((ahead - behind) / (2 * step))
    near = min(abs(slope - difference) for difference in differences)
    kinks = abs(
        differences[0] - differences[1]
    )  # where two patches coincide, or two values under "l1", there is no slope
    assert near <= 1e-4 * abs(slope) + 1e-4 * size + 2 * kinks


@given(problems(most=300, dtypes=[F32, F64]), st.sampled_from([torch.nan, torch.inf, -torch.inf]), st.data())
def test_a_value_that_is_not_finite_stays_in_its_problem(problem: Problem, bad: float, data: st.DataObject) -> None:
    assume(problem.x.shape[0] > 1 and (problem.a is None or problem.a.dim() > 1))
    clean = emd_l2(problem.x, problem.y, **problem.weights, reduction="none", **problem.options)
    x = problem.x.clone(memory_format=torch.contiguous_format)
    which = data.draw(st.integers(0, x.shape[0] - 1))
    x[which] = bad
    value = emd_l2(x, problem.y, **problem.weights, reduction="none", **problem.options)
    others = [k for k in range(x.shape[0]) if k != which]
    assert value[which].isnan().all() and torch.equal(value[others], clean[others])
    cost = cost_matrix(x, problem.y, metric=problem.options["metric"])
    assert not solve(cost).converged[which].any()
