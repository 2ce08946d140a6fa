"""DynamicLabelSmoothing: its formula, its schedules, its running means, its state."""

import math
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from sfr_ext import DynamicLabelSmoothing


def batch(size=7, classes=5, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(size, classes, dtype=dtype, generator=generator)
    return logits.requires_grad_(), torch.randint(0, classes, (size,), generator=generator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.37, 1.0])
def test_constant_uniform_is_torchs_label_smoothing_bit_for_bit(dtype, smoothing):
    logits, target = batch(dtype=dtype)
    ours = DynamicLabelSmoothing(smoothing, schedule="constant")(logits, target)
    theirs = F.cross_entropy(logits, target, label_smoothing=smoothing)
    assert torch.equal(ours, theirs)
    ours_grad, theirs_grad = (torch.autograd.grad(loss, logits)[0] for loss in (ours, theirs))
    torch.testing.assert_close(ours_grad, theirs_grad)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    logits, target = batch(dtype=dtype)
    loss = DynamicLabelSmoothing(0.1, schedule="constant")(logits, target)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, F.cross_entropy(logits.float(), target, label_smoothing=0.1))


@pytest.mark.parametrize(
    "schedule, expected",
    [
        ("linear", [0.0, 0.05, 0.1, 0.15, 0.2, 0.2]),
        ("cosine", [0.1 * (1 - math.cos(math.pi * x)) for x in (0, 0.25, 0.5, 0.75, 1, 1)]),
        ("constant", [0.2] * 6),
    ],
)
def test_schedule_and_loss_follow_the_steps(schedule, expected):
    smooth = DynamicLabelSmoothing(0.2, total_steps=4, schedule=schedule)
    logits, target = batch(dtype=torch.float64)
    for eps in expected:
        assert smooth.current == pytest.approx(eps, abs=1e-12)
        torch.testing.assert_close(smooth(logits, target), F.cross_entropy(logits, target, label_smoothing=eps))
        smooth.step()


def test_online_prior_starts_uniform_and_learns_correct_samples_only():
    smooth = DynamicLabelSmoothing(0.1, schedule="constant", prior="online")
    # Sample 0 is classified correctly, sample 1 is not.
    logits = torch.tensor([[3.0, 1.0, 0.0], [3.0, 1.0, 0.0]])
    target = torch.tensor([0, 1])
    first = smooth(logits, target)
    torch.testing.assert_close(first, F.cross_entropy(logits, target, label_smoothing=0.1))
    third = torch.full((3,), 1 / 3)
    torch.testing.assert_close(smooth.class_prior[0], third * 0.998 + logits[0].softmax(0) * 0.002)
    assert torch.equal(smooth.class_prior[1:], third.expand(2, 3))
    # The second time, the loss is the cross-entropy against the mixed labels.
    labels = 0.9 * F.one_hot(target, 3) + 0.1 * smooth.class_prior[target]
    torch.testing.assert_close(smooth(logits, target), -(labels * logits.log_softmax(1)).sum(1).mean())


def test_online_prior_does_not_depend_on_how_samples_are_batched():
    logits, _ = batch(8000, 4)
    target = logits.argmax(1)  # all correct
    whole, parts = (DynamicLabelSmoothing(0.1, schedule="constant", prior="online") for _ in range(2))
    for _ in range(3):
        whole(logits, target)
        for part in range(10):
            parts(logits[part::10], target[part::10])
    torch.testing.assert_close(whole.class_prior.sum(1), torch.ones(4))
    torch.testing.assert_close(whole.class_prior, parts.class_prior, atol=0.01, rtol=0)
    for k in range(4):
        mean = logits[target == k].softmax(1).mean(0)
        torch.testing.assert_close(whole.class_prior[k], mean, atol=1e-3, rtol=0)


def test_online_prior_rests_in_evaluation():
    smooth = DynamicLabelSmoothing(0.1, schedule="constant", prior="online").eval()
    smooth(*batch())
    assert torch.equal(smooth.class_prior, torch.full((5, 5), 0.2))


def test_online_prior_gradient_leaves_the_prior_alone():
    smooth = DynamicLabelSmoothing(0.3, schedule="constant", prior="online")
    logits, target = batch()
    smooth(logits, target).backward()
    assert torch.isfinite(logits.grad).all()
    assert not smooth.class_prior.requires_grad


@pytest.mark.parametrize("prior", ["uniform", "online"])
def test_state_round_trip(prior):
    first = DynamicLabelSmoothing(0.1, total_steps=10, prior=prior)
    for _ in range(3):
        first(*batch())
        first.step()
    second = DynamicLabelSmoothing(0.1, total_steps=10, prior=prior)
    second.load_state_dict(first.state_dict())
    assert second.current == first.current == pytest.approx(0.03)
    assert torch.equal(first(*batch()), second(*batch()))


def test_compiled_loss_is_not_compiled_anew_at_each_step():
    smooth = DynamicLabelSmoothing(0.1, total_steps=8)
    compilations = []

    def backend(graph, inputs):
        compilations.append(graph)
        return graph.forward

    compiled = torch.compile(smooth, backend=backend, fullgraph=True)
    logits, target = batch()
    for _ in range(4):
        torch.testing.assert_close(compiled(logits, target), smooth(logits, target))
        smooth.step()
    assert len(compilations) == 1
    torch._dynamo.reset()


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_total_steps_needed(schedule):
    with pytest.raises(ValueError, match=f"schedule '{schedule}' needs total_steps"):
        DynamicLabelSmoothing(0.1, schedule=schedule)


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"smoothing": 1.5}, ValueError, r"smoothing in \[0, 1\], got 1.5"),
        ({"smoothing": float("nan")}, ValueError, r"smoothing in \[0, 1\], got nan"),
        ({"smoothing": "0.1"}, TypeError, "smoothing to be a number, got str"),
        ({"total_steps": 0}, ValueError, "total_steps >= 1, got 0"),
        ({"total_steps": 2**63}, ValueError, "total_steps < 2"),
        ({"total_steps": 2.0}, TypeError, "total_steps to be an int, got float"),
        ({"schedule": "exp"}, ValueError, "got 'exp'"),
        ({"prior": "teacher"}, ValueError, "got 'teacher'"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        DynamicLabelSmoothing(**{"total_steps": 5, **options})


@pytest.mark.parametrize(
    "logits, target, error, message",
    [
        (torch.zeros(2, 3, 4), torch.zeros(2, dtype=torch.long), ValueError, r"logits of shape \[B, K\]"),
        (torch.zeros(2, 3), torch.zeros(3, dtype=torch.long), ValueError, r"\[B\] with B = 2 .* got \[3\]"),
        (torch.zeros(2, 3), torch.zeros(2), TypeError, r"int64 class .* got torch.float32 .*; give target.long\(\)"),
        (torch.zeros(2, 3).int(), torch.zeros(2, dtype=torch.long), TypeError, "logits to be floating point"),
        (
            [0.0],
            torch.zeros(2, dtype=torch.long),
            TypeError,
            "logits to be a Tensor, got list; give torch.tensor",
        ),
        (torch.zeros(2, 3), [0, 1], TypeError, r"target to be a Tensor, got list; give torch.tensor\(target\)"),
        (torch.zeros(2, 3), torch.eye(3)[:2].int(), TypeError, r"give target.float\(\) or target.argmax\(1\)"),
        (torch.zeros(2, 3), torch.eye(3)[:2].long(), ValueError, r"give target.float\(\) or target.argmax\(1\)"),
        (torch.zeros(2, 3), torch.zeros(2, 1).long(), ValueError, r"got \[2, 1\] .*; give target.squeeze\(1\)$"),
        (torch.zeros(2, 3), torch.zeros(2, 1), TypeError, r"; give target.squeeze\(1\).long\(\)$"),
        (torch.zeros(2, 3), torch.zeros(2).int(), TypeError, r"; give target.long\(\)$"),
        (torch.zeros(3), torch.tensor(1), ValueError, r"got \[3\]; for one sample, give logits\[None\] and target"),
    ],
)
def test_bad_batches(logits, target, error, message):
    with pytest.raises(error, match=message):
        DynamicLabelSmoothing(0.1, schedule="constant")(logits, target)


@pytest.mark.parametrize("prior", ["uniform", "online"])
@pytest.mark.parametrize("label", [-1, 5, 20])
def test_labels_of_no_class_are_named(prior, label):
    smooth = DynamicLabelSmoothing(0.1, total_steps=4, prior=prior, ignore_index=-7)
    smooth.step()
    logits, target = batch(classes=5)
    target[1:3] = torch.tensor([-7, label])
    message = rf"target to be in 0 ... 4 for logits of 5 classes, or ignore_index = -7, got {label}"
    with pytest.raises(ValueError, match=message):
        smooth(logits, target)
    target[2] = 4
    assert smooth(logits, target).isfinite()


def test_numbers_of_numpy():
    smooth = DynamicLabelSmoothing(np.float32(0.5), np.int64(4), ignore_index=np.int8(-7))
    assert type(smooth.total_steps) is int and type(smooth.ignore_index) is int
    smooth.step()
    assert smooth.current == 0.125


def test_online_prior_keeps_its_number_of_classes():
    smooth = DynamicLabelSmoothing(0.1, schedule="constant", prior="online")
    smooth(*batch(classes=5))
    with pytest.raises(ValueError, match=r"K = 5 \(from earlier batches\), got K = 6"):
        smooth(*batch(classes=6))


# What F.cross_entropy does, case by case; test_smoothing_properties.py has all of them together


def test_ignored_labels_count_for_nothing():
    logits, target = batch(4)
    target[[1, 3]] = -100
    loss = DynamicLabelSmoothing(0.2, schedule="constant")(logits, target)
    torch.testing.assert_close(loss, F.cross_entropy(logits[[0, 2]], target[[0, 2]], label_smoothing=0.2))


def test_a_masked_logit_costs_nothing_until_there_is_smoothing():
    logits, target = batch(3)
    logits = logits.detach().masked_fill(F.one_hot((target + 1) % 5, 5).bool(), -math.inf).requires_grad_()
    smooth = DynamicLabelSmoothing(0.1, total_steps=4)
    for finite in (True, False):
        loss = smooth(logits, target)
        assert bool(loss.isfinite()) == finite
        (grad,) = torch.autograd.grad(loss, logits)
        (wanted,) = torch.autograd.grad(F.cross_entropy(logits, target, label_smoothing=smooth.current), logits)
        torch.testing.assert_close(grad, wanted, equal_nan=True)
        smooth.step()


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_row_that_is_not_finite_teaches_an_online_prior_nothing(value):
    logits, target = batch(8)
    logits, target = logits.detach(), logits.argmax(1)
    spoilt = logits.clone()
    spoilt[2, 0] = value
    smooth, other = (DynamicLabelSmoothing(0.1, schedule="constant", prior="online") for _ in range(2))
    smooth(spoilt, target)
    keep = torch.arange(8) != 2
    other(logits[keep], target[keep])
    torch.testing.assert_close(smooth.class_prior, other.class_prior)


def test_weight_averaging_from_before_the_first_batch():
    model = torch.nn.ModuleDict(
        {"smooth": DynamicLabelSmoothing(0.1, schedule="constant", prior="online"), "norm": torch.nn.BatchNorm1d(5)}
    )
    averages = [torch.optim.swa_utils.AveragedModel(model, use_buffers=buffers) for buffers in (False, True)]
    model["norm"](batch()[0])
    model["smooth"](*batch())
    for average in averages:
        average.update_parameters(model)
        average.update_parameters(model)
        torch.testing.assert_close(average.module["norm"].running_mean, model["norm"].running_mean)
        average.module["smooth"](*batch())


def test_state_of_version_0_1_0_loads():
    smooth = DynamicLabelSmoothing(0.1, total_steps=10, prior="online")
    smooth.load_state_dict({"steps": torch.tensor(3), "class_prior": torch.empty(0, 0)})
    assert smooth.current == pytest.approx(0.03)
    smooth.load_state_dict({"steps": torch.tensor(4), "class_prior": torch.full((5, 5), 0.2)})
    assert smooth.class_prior.shape == (5, 5)
    assert sorted(smooth.state_dict()) == ["class_prior", "steps"]


def test_class_weights_move_and_are_not_saved():
    smooth = DynamicLabelSmoothing(0.1, total_steps=10, weight=torch.rand(5))
    assert list(smooth.state_dict()) == ["steps"]
    assert smooth.double().weight.dtype == torch.float64


def test_probabilities_and_an_online_prior():
    smooth = DynamicLabelSmoothing(0.1, schedule="constant", prior="online")
    with pytest.raises(ValueError, match="class numbers for prior=.online., got probabilities"):
        smooth(batch()[0], torch.rand(7, 5))


@pytest.mark.parametrize(
    "total_steps, calls, warns",
    [(10, 5, False), (10, 6, True), (5, 2, False), (5, 3, True), (1, 1, False), (1, 2, True)],
)
def test_a_schedule_that_nobody_advances(total_steps, calls, warns):
    """More than max(1, total_steps / 2) calls, as the docstring says."""
    assert (calls > max(1, total_steps / 2)) == warns
    smooth = DynamicLabelSmoothing(0.1, total_steps=total_steps)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(calls):
            smooth(*batch())
        smooth.eval()
        smooth(*batch())
    assert ["without .step()" in str(warning.message) for warning in caught] == [True] * warns
    assert all(warning.filename == __file__ for warning in caught)


def test_a_schedule_that_is_advanced_or_constant_warns_of_nothing():
    for smooth in (DynamicLabelSmoothing(0.1, 4), DynamicLabelSmoothing(0.1, schedule="constant")):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for _ in range(12):
                smooth(*batch())
                smooth.step()


@pytest.mark.parametrize("fraction", [1.5, -0.1, math.nan])
def test_a_schedule_out_of_range(fraction):
    with pytest.raises(ValueError, match=r"schedule to return a fraction in \[0, 1\]"):
        DynamicLabelSmoothing(0.1, 4, lambda x: fraction)(*batch())


# Where the table of an online prior is made and kept


@pytest.mark.parametrize("training", [True, False])
def test_a_table_made_under_inference_mode_learns_later(training):
    smooth = DynamicLabelSmoothing(0.1, total_steps=4, prior="online").train(training)
    with torch.inference_mode():
        smooth(*batch())
        smooth.step()
    smooth.train()
    smooth(*batch()).backward()
    smooth.step()
    assert smooth.current == pytest.approx(0.05)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_module_in_half_precision_learns_as_any(dtype):
    smooth, other = (DynamicLabelSmoothing(0.1, schedule="constant", prior="online") for _ in range(2))
    logits, target = batch(8)
    smooth(logits, target)
    other(logits, target)
    smooth.to(dtype)
    for _ in range(20):
        smooth(logits.to(dtype), logits.argmax(1))
        other(logits.to(dtype), logits.argmax(1))
    assert torch.equal(smooth.class_prior, other.class_prior) and not torch.equal(
        other.class_prior, torch.full((5, 5), 0.2)
    )


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_loss(reentrant):
    """Computed again in backward it is the same, or refused: an online prior has moved on."""
    logits, target = batch(8)
    smooth = DynamicLabelSmoothing(0.2, total_steps=4)
    smooth.step()
    loss = checkpoint(smooth, logits, target, use_reentrant=reentrant)
    (ours,) = torch.autograd.grad(loss, logits) if not reentrant else (None,)
    if reentrant:
        loss.backward()
        ours = logits.grad
    (wanted,) = torch.autograd.grad(F.cross_entropy(logits, target, label_smoothing=0.05), logits)
    torch.testing.assert_close(ours, wanted)

    smooth = DynamicLabelSmoothing(0.2, schedule="constant", prior="online")
    loss = checkpoint(smooth, logits, target, use_reentrant=reentrant)
    with pytest.raises(RuntimeError, match="keep the loss out of torch.utils.checkpoint"):
        loss.backward()
    smooth.eval()
    checkpoint(smooth, logits, target, use_reentrant=reentrant).backward()
