"""What may not change a result: the order, the batch, padding, the layout, the side, the unit."""

from __future__ import annotations

import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from problems import LAYOUTS, Problem, laid_out, problems, random
from torch import Tensor

from sfr_ext import emd_l2, solve

F32, F64 = torch.float32, torch.float64
REACHES = (None, (2.0, 2.0), (1.0, None))
HOW = [{}, {"objective": "divergence"}, {"solver": "exact"}]


def value_of(problem: Problem, **options: object) -> Tensor:
    merged = {**problem.options, **options}
    if merged.get("solver") == "exact":
        merged.pop("reach", None)
    return emd_l2(problem.x, problem.y, **problem.weights, reduction="none", **merged)


@given(problems(most=4200, reaches=REACHES), st.sampled_from(HOW))
def test_the_batch(problem: Problem, how: dict[str, str]) -> None:
    """Each problem alone has the bits that it has in the batch."""
    together = value_of(problem, **how)
    for k in range(len(problem.x)):
        sides = (w if w is None or w.dim() == 1 else w[k : k + 1] for w in (problem.a, problem.b))
        alone = Problem(problem.x[k : k + 1], problem.y[k : k + 1], *sides, problem.options)
        assert torch.equal(value_of(alone, **how)[0], together[k])


@given(problems(reaches=REACHES), st.sampled_from(LAYOUTS), st.sampled_from(HOW))
def test_the_layout(problem: Problem, layout: str, how: dict[str, str]) -> None:
    """The same numbers anywhere in memory give the same bits."""
    assume(layout != "expanded")
    copies = (t.clone(memory_format=torch.contiguous_format) for t in (problem.x, problem.y))
    moved = Problem(*(laid_out(t, layout) for t in copies), problem.a, problem.b, problem.options)
    assert torch.equal(value_of(moved, **how), value_of(problem, **how))


@given(problems(most=1600, weights=["mild", "skewed", "zeros"], reaches=REACHES), st.integers(0, 99), st.data())
def test_padding(problem: Problem, seed: int, data: st.DataObject) -> None:
    """Tokens of weight 0, anywhere and of any value, change no bit."""
    assume(problem.x.dim() == 3)
    how = data.draw(st.sampled_from([{}, {"objective": "divergence"}]))
    generator = random(seed)

    def padded(tokens: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        n, more = tokens.shape[-2], data.draw(st.integers(0, 40))
        kept = torch.randperm(n + more, generator=generator)[:n].sort().values
        wide = torch.full((*tokens.shape[:-2], n + more, tokens.shape[-1]), torch.nan, dtype=tokens.dtype)
        wide[..., kept, :] = tokens
        share = torch.zeros(*weight.shape[:-1], n + more, dtype=weight.dtype)
        share[..., kept] = weight
        return wide, share

    assert problem.a is not None and problem.b is not None
    (x, a), (y, b) = padded(problem.x, problem.a), padded(problem.y, problem.b)
    assert torch.equal(value_of(Problem(x, y, a, b, problem.options), **how), value_of(problem, **how))


def near(ours: Tensor, expected: Tensor, problem: Problem) -> bool:
    wide = F64 in (problem.x.dtype, problem.y.dtype)
    size = (
        expected.abs().amax() + value_of(problem, solver="exact").abs().amax() + (problem.options["metric"] == "cosine")
    )
    return bool(((ours - expected).abs() <= (1e-7 if wide else 2e-4) * size).all())


@given(problems(reaches=REACHES), st.integers(0, 99))
def test_the_order_of_patches(problem: Problem, seed: int) -> None:
    assume(problem.x.dim() == 3)
    options = {"tol": 1e-9 if F64 in (problem.x.dtype, problem.y.dtype) else 1e-6, "max_iter": 5000}
    order = [torch.randperm(t.shape[-2], generator=random(seed)) for t in (problem.x, problem.y)]
    sides = (None if w is None else w[..., p] for w, p in zip((problem.a, problem.b), order, strict=True))
    other = Problem(problem.x[..., order[0], :], problem.y[..., order[1], :], *sides, problem.options)
    assert near(value_of(other, **options), value_of(problem, **options), problem)


@given(problems(reaches=REACHES), st.sampled_from([{}, {"objective": "divergence"}, {"solver": "exact"}]))
def test_which_side_is_which(problem: Problem, how: dict[str, str]) -> None:
    assume(problem.x.dim() == problem.y.dim())
    options = dict(problem.options)
    if "reach" in options:
        options["reach"] = options["reach"][::-1]
    other = Problem(problem.y, problem.x, problem.b, problem.a, options)
    tight = {"tol": 1e-9 if F64 in (problem.x.dtype, problem.y.dtype) else 1e-6, "max_iter": 5000}
    assert near(value_of(other, **how, **tight), value_of(problem, **how, **tight), problem)


@given(problems(dtypes=[F32, F64], scales=(-5, 5)), st.integers(-60, 60))
def test_the_unit_of_costs(problem: Problem, exponent: int) -> None:
    """A relative eps: costs times a power of 2 give the value times it, to the last bit."""
    cost = torch.rand(7, 9, dtype=problem.x.dtype, generator=random(exponent + 60))
    by = 2.0**exponent
    for options in ({}, {"solver": "exact"}, {"reach": 0.5}):
        scaled = {**options, "reach": 0.5 * by} if "reach" in options else options
        ours, expected = solve(cost * by, **scaled), solve(cost, **options)
        torch.testing.assert_close(ours.transport_cost / by, expected.transport_cost, rtol=1e-6, atol=0)
        torch.testing.assert_close(ours.plan, expected.plan, rtol=1e-5, atol=1e-7)
