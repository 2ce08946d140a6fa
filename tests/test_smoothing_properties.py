"""DynamicLabelSmoothing against F.cross_entropy: whatever the shapes, targets, weights and special values."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings

from sfr_ext import DynamicLabelSmoothing

HALF = (torch.float16, torch.bfloat16)
SPECIAL = (0.0, -math.inf, math.inf, math.nan, 1e30, -1e30)


@st.composite
def cases(draw):
    """Keyword arguments of F.cross_entropy, and how far a schedule of 8 steps has come."""
    batch, classes = draw(st.integers(0, 5)), draw(st.integers(1, 6))
    places = draw(st.sampled_from([(), (3,), (2, 2), (2, 1, 2)]))
    dtype = draw(st.sampled_from([torch.float32, torch.float64, *HALF]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    logits = 3 * torch.randn(batch, classes, *places, generator=generator).to(dtype)
    if batch:
        flat = logits.view(-1)
        for where, value in draw(st.lists(st.tuples(st.integers(0, 10**6), st.sampled_from(SPECIAL)), max_size=4)):
            flat[where % flat.numel()] = value
    kind = {"reduction": draw(st.sampled_from(["mean", "sum", "none"]))}
    if draw(st.booleans()):
        kind["weight"] = torch.rand(classes, generator=generator).to(dtype)
        if draw(st.booleans()):
            kind["weight"][0] = draw(st.sampled_from([0.0, 0.0, -1.0, math.inf]))
    if draw(st.booleans()):
        target = torch.rand(batch, classes, *places, generator=generator).softmax(1).to(dtype)
        if draw(st.booleans()):
            target = F.one_hot(target.argmax(1), classes).movedim(-1, 1).to(dtype)
    else:
        target = torch.randint(0, classes, (batch, *places), generator=generator)
        kind["ignore_index"] = draw(st.sampled_from([-100, 0, 1, 255]))
        unknown = torch.rand(target.shape, generator=generator) < draw(st.sampled_from([0.0, 0.3, 1.0]))
        target = target.masked_fill(unknown, kind["ignore_index"])
        if draw(st.booleans()) and (target >= 0).all():
            target = target.byte()
    smoothing = draw(st.sampled_from([0.0, 0.1, 0.37, 1.0]))
    schedule = draw(st.sampled_from(["linear", "cosine", "constant", math.sqrt, lambda x: x * x]))
    return logits, target, kind, smoothing, schedule, draw(st.integers(0, 9))


def torchs(logits, target, weight=None, **kind):
    """F.cross_entropy with what it has no answer for taken as what it is: half precision, and numbers in bytes."""
    if logits.dtype in HALF:
        logits, weight = logits.float(), None if weight is None else weight.float()
        target = target.float() if target.is_floating_point() else target
    return F.cross_entropy(logits, target if target.is_floating_point() else target.long(), weight, **kind)


def with_gradient(loss, *inputs):
    """The value, and the gradients of the sum of all of it."""
    inputs = [x for x in inputs if x.requires_grad]
    return [loss.detach(), *torch.autograd.grad(loss.sum(), inputs)]


@settings(max_examples=400, deadline=None, derandomize=True)
@given(cases())
def test_value_and_gradient_are_those_of_torch(case):
    logits, target, kind, smoothing, schedule, steps = case
    logits.requires_grad_()
    if target.is_floating_point():
        target.requires_grad_()
    smooth = DynamicLabelSmoothing(smoothing, 8, schedule, **kind)
    for _ in range(steps):
        smooth.step()
    ours = smooth(logits, target)
    theirs = torchs(logits, target, label_smoothing=smooth.current, **kind)
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(
        with_gradient(ours, logits, target), with_gradient(theirs, logits, target), equal_nan=True
    )


@settings(max_examples=200, deadline=None, derandomize=True)
@given(cases())
def test_an_online_prior_that_has_learnt_nothing_is_uniform(case):
    logits, target, kind, smoothing, schedule, steps = case
    logits.requires_grad_()
    smooth = DynamicLabelSmoothing(smoothing, 8, schedule, "online", **kind).eval()
    for _ in range(steps):
        smooth.step()
    if target.is_floating_point():
        with pytest.raises(ValueError, match="class numbers"):
            smooth(logits, target)
        return
    theirs = torchs(logits, target, label_smoothing=smooth.current, **kind)
    torch.testing.assert_close(
        with_gradient(smooth(logits, target), logits), with_gradient(theirs, logits), equal_nan=True
    )


@settings(max_examples=200, deadline=None, derandomize=True)
@given(cases())
def test_an_online_prior_stays_a_distribution(case):
    logits, target, kind, smoothing, schedule, _ = case
    if target.is_floating_point():
        return
    smooth = DynamicLabelSmoothing(smoothing, 8, schedule, "online", **kind)
    for _ in range(3):
        smooth(logits, target)
    table = smooth.class_prior.double()
    torch.testing.assert_close(table.sum(1), torch.ones(len(table), dtype=torch.float64), rtol=1e-5, atol=0)
    assert (table >= 0).all()
    # Whoever teaches nothing, teaches nothing: the same table from the usable rows alone.
    rows, labels = logits.movedim(1, -1).flatten(0, -2), target.flatten()
    usable = rows.isfinite().all(1) & (labels != smooth.ignore_index)
    alone = DynamicLabelSmoothing(smoothing, 8, schedule, "online", **kind)
    for _ in range(3):
        alone(rows[usable], labels[usable])
    torch.testing.assert_close(smooth.class_prior, alone.class_prior)
