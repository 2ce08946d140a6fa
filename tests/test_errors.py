"""Bad input gets one error that names the argument, what was wanted, and what came."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

import sfr_ext
from sfr_ext import cost_matrix, cross_reference_weights, emd_l2, linear_assignment, solve, solve_sample

x, y = torch.rand(2, 4, 3, 3), torch.rand(2, 4, 2, 2)
tokens = torch.rand(2, 5, 4)
cost = torch.rand(2, 3, 4)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: emd_l2([1.0], y),
            TypeError,
            "sfr_ext.emd_l2: expected student_feat to be a Tensor, got list",
        ),
        (
            lambda: emd_l2(x, y.long()),
            TypeError,
            "expected teacher_feat to be float16, bfloat16, float32 or float64, got torch.int64",
        ),
        (
            lambda: emd_l2(x[0, 0], y),
            ValueError,
            r"expected student_feat of shape \[B, C, H, W\] or \[B, N, C\], got \[3, 3\]",
        ),
        (
            lambda: emd_l2(x, y[:1]),
            ValueError,
            r"expected teacher_feat of shape \[B, C, H', W'\] or \[B, G, C, H', W'\] with B = 2 and C = 4 "
            r"\(from student_feat\), got \[1, 4, 2, 2\]",
        ),
        (
            lambda: emd_l2(x, y.to("meta")),
            ValueError,
            "expected teacher_feat on cpu, where the others are, got a tensor on meta",
        ),
        (lambda: emd_l2(x, y[:, :3]), ValueError, r"with B = 2 and C = 4 .*got \[2, 3, 2, 2\]"),
        (
            lambda: emd_l2(tokens, y[0, 0]),
            ValueError,
            r"teacher_feat of shape \[B, M, C\] or \[B, G, M, C\].*got \[2, 2\]",
        ),
        (
            lambda: emd_l2(x, y[..., :0]),
            ValueError,
            r"expected teacher_feat to have no empty axis but the batch, got \[2, 4, 2, 0\]",
        ),
        (
            lambda: emd_l2(x, y, metric="l3"),
            ValueError,
            "expected metric to be one of 'l2', 'sqeuclidean', 'cosine', 'l1', got 'l3'",
        ),
        (
            lambda: emd_l2(x, y, patch_size=3),
            ValueError,
            r"expected patch_size to fit into teacher_feat of shape \[2, 4, 2, 2\], got 3",
        ),
        (lambda: emd_l2(x, y, metric=["l2"]), TypeError, "expected metric to be a str, got list"),
        (lambda: emd_l2(x, y, patch_size=0), ValueError, "expected patch_size to be at least 1, got 0"),
        (lambda: emd_l2(x, y, patch_size=1.5), TypeError, "expected patch_size to be an int, got float"),
        (
            lambda: emd_l2(tokens, tokens, patch_size=2),
            ValueError,
            "expected patch_size to be 1 for tokens .* got 2",
        ),
        (
            lambda: emd_l2(x, y, objective="emd"),
            ValueError,
            "expected objective to be one of 'transport', 'entropic', 'divergence', got 'emd'",
        ),
        (lambda: emd_l2(x, y, eps=0.0), ValueError, "expected eps to be finite and above 0, got 0.0"),
        (
            lambda: emd_l2(x, y, eps=float("nan")),
            ValueError,
            "expected eps to be finite and above 0, got nan",
        ),
        (lambda: emd_l2(x, y, eps="small"), TypeError, "expected eps to be a number, got str"),
        (
            lambda: emd_l2(x, y, eps_scale="mean"),
            ValueError,
            "expected eps_scale to be one of 'std', 'absolute', got 'mean'",
        ),
        (lambda: emd_l2(x, y, tol=-1.0), ValueError, "expected tol to be finite and at least 0, got -1.0"),
        (lambda: emd_l2(x, y, max_iter=0), ValueError, "expected max_iter to be at least 1, got 0"),
        (
            lambda: emd_l2(x, y, reduction="max"),
            ValueError,
            "expected reduction to be one of 'mean', 'sum', 'none', got 'max'",
        ),
        (
            lambda: emd_l2(x, y, student_weight=torch.rand(2, 8)),
            ValueError,
            r"expected student_weight of shape \[2, 9\] or \[2, 3, 3\], or \[9\] or \[3, 3\] for all, got \[2, 8\]",
        ),
        (
            lambda: emd_l2(x, torch.rand(2, 3, 4, 2, 2), teacher_weight=torch.rand(2, 3)),
            ValueError,
            r"expected teacher_weight of shape .*\[2, 4\].*\[2, 3, 4\].* got \[2, 3\]",
        ),
        (
            lambda: cost_matrix(x, tokens),
            ValueError,
            r"sfr_ext.cost_matrix: expected y of shape .*got \[2, 5, 4\]",
        ),
        (
            lambda: solve(cost[0, 0]),
            ValueError,
            r"sfr_ext.solve: expected cost of shape \[..., N, M\].* got \[4\]",
        ),
        (
            lambda: solve(cost, torch.rand(2, 5)),
            ValueError,
            r"expected a of shape \[2, 3\] .* for cost of shape \[2, 3, 4\], got \[2, 5\]",
        ),
        (
            lambda: solve(cost, init=torch.zeros(2, 3)),
            TypeError,
            r"expected init to be a pair \(f, g\), got Tensor",
        ),
        (
            lambda: solve_sample(x, y, init=(torch.zeros(2, 9), torch.zeros(2, 5))),
            ValueError,
            r"expected init\[1\] \(g\) of shape \[2, 4\], got \[2, 5\]",
        ),
        (
            lambda: solve_sample(x, y, torch.rand(3, 9)),
            ValueError,
            r"expected a of shape \[2, 9\] or \[2, 3, 3\], or \[9\] or \[3, 3\] for all, got \[3, 9\]",
        ),
        (
            lambda: sfr_ext.EMDL2Loss(epsilon=0.1),
            TypeError,
            "expected options among metric, .* got 'epsilon'$",
        ),
        (
            lambda: sfr_ext.EMDL2Loss(student_weight=torch.ones(9)),
            TypeError,
            "expected options among metric, .* got 'student_weight', which is given at the call$",
        ),
    ],
)
def test_message(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


@pytest.mark.cpu_only("contents of weights are not looked at: they give NaN")
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: emd_l2(x, y, student_weight=torch.tensor([[1.0] * 9, [1.0] * 8 + [-0.5]])),
            r"sfr_ext.emd_l2: expected student_weight to be finite and non-negative, got -0.5 at \[1, 8\]",
        ),
        (
            lambda: emd_l2(x, y, teacher_weight=torch.full((2, 4), torch.nan)),
            r"teacher_weight .* got nan at \[0, 0\]",
        ),
        (
            lambda: solve(cost, None, -torch.ones(4)),
            r"sfr_ext.solve: expected b to be .* got -1 at",
        ),
    ],
)
def test_message_about_the_contents_of_weights(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.cpu_only("contents of weights are not looked at: they give NaN")
def test_weights_are_only_refused_where_they_are() -> None:
    """A good batch beside a bad one: the index says which entry it was."""
    weight = torch.ones(2, 3, 4)
    weight[1, 2, 3] = -1
    with pytest.raises(ValueError, match=r"teacher_weight .* got -1 at \[1, 2, 3\]"):
        emd_l2(x, torch.rand(2, 3, 4, 2, 2), teacher_weight=weight)


def _one_argument(kind: str) -> list[tuple[str, Callable[[Any], object]]]:
    """Every public function that takes features, costs or weights, by what it calls them."""
    good, matrix = torch.rand(2, 5, 4), torch.rand(2, 5, 5)
    return {
        "features": [
            ("student_feat", lambda z: emd_l2(z, good)),
            ("teacher_feat", lambda z: emd_l2(good, z)),
            ("student_feat", lambda z: sfr_ext.EMDL2Loss()(z, good)),
            ("x", lambda z: cost_matrix(z, good)),
            ("y", lambda z: cost_matrix(good, z)),
            ("x", lambda z: solve_sample(z, good)),
            ("y", lambda z: solve_sample(good, z)),
            ("student", lambda z: cross_reference_weights(z, good)),
            ("teacher", lambda z: cross_reference_weights(good, z)),
            ("teacher_feat", lambda z: sfr_ext.self_term(z, eps=0.1)),
            ("teacher_feat", lambda z: sfr_ext.self_term(z, groups=True, eps=0.1)),
            ("y", lambda z: solve(matrix).barycentric(z)),
            ("deep", lambda z: sfr_ext.group_channels(z, 2)),
            ("logits", lambda z: sfr_ext.DynamicLabelSmoothing(schedule="constant")(z, torch.zeros(2).long())),
            ("layer '0'", lambda z: sfr_ext.self_feature_loss([z, good])),
        ],
        "costs": [("cost", lambda z: solve(z)), ("cost", lambda z: linear_assignment(z))],
        "weights": [
            ("student_weight", lambda z: emd_l2(good, good, student_weight=z)),
            ("teacher_weight", lambda z: emd_l2(good, good, teacher_weight=z)),
            ("a", lambda z: solve(matrix, z)),
            ("b", lambda z: solve(matrix, None, z)),
            ("a", lambda z: solve_sample(good, good, z)),
            ("teacher_weight", lambda z: sfr_ext.self_term(good, z, eps=0.1)),
            ("target", lambda z: sfr_ext.DynamicLabelSmoothing(schedule="constant")(torch.zeros(2, 3), z)),
            ("weight", lambda z: sfr_ext.DynamicLabelSmoothing(schedule="constant", weight=z)),
            ("init[0] (f)", lambda z: solve(matrix, init=(z, z))),
        ],
    }[kind]


ARGUMENTS = [(name, call) for kind in ("features", "costs", "weights") for name, call in _one_argument(kind)]
by_argument = pytest.mark.parametrize(("name", "call"), ARGUMENTS, ids=[f"{i}-{x[0]}" for i, x in enumerate(ARGUMENTS)])


@by_argument
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensors(name: str, call: Callable[[Any], object], layout: torch.layout) -> None:
    """Before anything of them is read, where torch would speak of an internal error."""
    ragged = torch.nested.nested_tensor([torch.rand(3, 4), torch.rand(5, 4)], layout=layout)
    padded = r"got a nested tensor; give torch.nested.to_padded_tensor\("
    with pytest.raises(TypeError, match=rf"^sfr_ext.\S+ expected {re.escape(name)} to be dense, {padded}"):
        call(ragged)


@by_argument
def test_sparse_tensors(name: str, call: Callable[[Any], object]) -> None:
    message = rf"^sfr_ext.\S+ expected {re.escape(name)} to be dense, got torch.sparse_coo; give .*.to_dense\(\)$"
    with pytest.raises(TypeError, match=message):
        call(torch.ones(2, 5, 4).to_sparse())


@by_argument
def test_arrays(name: str, call: Callable[[Any], object]) -> None:
    message = rf"expected {re.escape(name)} to be a Tensor, got ndarray; give torch.from_numpy\("
    with pytest.raises(TypeError, match=message):
        call(np.ones((2, 5, 4), np.float32))


RAGGED = [torch.rand(3, 4), torch.rand(5, 4)]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: emd_l2(RAGGED, tokens),
            r"student_feat to be a Tensor, got list of tensors; pad them to one size "
            r"\(torch.nn.utils.rnn.pad_sequence\), with weights of 0 for the padding$",
        ),
        (lambda: emd_l2(tuple(y), x), r"student_feat to be a Tensor, got tuple; give torch.stack\(student_feat\)$"),
        (lambda: emd_l2(x, [x[0], y[0]]), r"teacher_feat .*\(torch.nn.functional.pad\), with weights of 0"),
        (
            lambda: linear_assignment([torch.rand(3, 4), torch.rand(5, 2)]),
            r"cost .* \(torch.nn.functional.pad\), with a cost of inf \(maximize: -inf\) for the padding$",
        ),
        (lambda: emd_l2(x, y, student_weight=[torch.ones(3), torch.ones(9)]), r"rnn.pad_sequence\)$"),
        (lambda: emd_l2(x, y, teacher_weight=[1, 0, 1, True]), r"got list; give torch.tensor\(teacher_weight\)$"),
        (lambda: solve([[0.0, 1.0], [1.0, 0.0]]), r"got list; give torch.tensor\(cost\)$"),
        (
            lambda: emd_l2((x, x[0]), y),
            r"got tuple of tensors; give the one that is meant, such as student_feat\[0\]$",
        ),
        (lambda: sfr_ext.cost_matrix(RAGGED, tokens), r"\(torch.nn.utils.rnn.pad_sequence\)$"),  # without weights
        (lambda: emd_l2(["a"], y), r"to be a Tensor, got list$"),
        (lambda: emd_l2([], y), r"to be a Tensor, got list$"),
    ],
)
def test_lists(call: Callable[[], object], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        call()


def test_padding_a_ragged_list_as_its_error_says() -> None:
    pad = torch.nn.utils.rnn.pad_sequence
    ragged, others = [torch.rand(3, 4), torch.rand(5, 4)], torch.rand(2, 6, 4)
    padded, weight = pad(ragged, batch_first=True), pad([torch.ones(len(each)) for each in ragged], batch_first=True)
    values = emd_l2(padded, others, student_weight=weight, reduction="none")
    alone = torch.stack([emd_l2(each[None], other[None]) for each, other in zip(ragged, others, strict=True)])
    torch.testing.assert_close(values, alone, rtol=1e-5, atol=0)


def rand(*shape: int) -> torch.Tensor:
    return torch.rand(shape)


@pytest.mark.parametrize(
    ("student", "teacher", "hint"),
    [
        ((2, 7, 7, 64), (2, 64, 7, 7), "student_feat looks like [B, H, W, C]: give student_feat.permute(0, 3, 1, 2)"),
        ((2, 64, 7, 7), (2, 7, 7, 64), "teacher_feat looks like [B, H, W, C]: give teacher_feat.permute(0, 3, 1, 2)"),
        ((2, 24, 24, 3), (2, 3, 24, 24), "student_feat looks like [B, H, W, C]: give student_feat.permute(0, 3, 1, 2)"),
        ((2, 5, 7, 64), (2, 64, 5, 7), "student_feat looks like [B, H, W, C]: give student_feat.permute(0, 3, 1, 2)"),
        ((2, 64, 7, 7), (2, 3, 7, 7, 64), "teacher_feat looks like [B, H, W, C]: give teacher_feat.movedim(-1, -3)"),
        ((2, 14, 7, 7), (2, 7, 7, 64), "features of different channels have no distance: project one side to the"),
        ((2, 16, 32, 32), (2, 32, 16, 16), "features of different channels have no distance: project one side to the"),
        (
            (2, 64, 32),
            (2, 49, 64),
            "student_feat looks like [B, C, N]: give student_feat.mT; features of different channels",
        ),
        ((4, 16, 7, 7), (10, 4, 16, 7, 7), "groups come second: give teacher_feat.transpose(0, 1)"),
        (
            (5, 9, 8),
            (3, 5, 9, 8),
            "for student_feat without a batch, give student_feat.expand(3, *student_feat.shape) (or",
        ),
        (
            (5, 5, 25, 64),
            (5, 25, 64),
            "groups are the other side's: swap the two (or, without a batch",
        ),
        ((8, 49, 64), (8, 64), "for one vector in place of each set, give teacher_feat[:, None]"),
        ((2, 16, 7, 7), (2, 32, 7, 7), "features of different channels have no distance: project one side to the"),
        ((2, 64, 36), (2, 49, 64), "student_feat looks like [B, C, N]: give student_feat.mT"),
        ((2, 49, 64), (2, 3, 64, 36), "teacher_feat looks like [B, C, N]: give teacher_feat.mT"),
        ((2, 64, 49), (2, 49, 64), "one side looks like [B, C, N]: give student_feat.mT or teacher_feat.mT"),
        ((49, 8), (2, 49, 8), "for one set of tokens, give student_feat[None]"),
        (
            (2, 49, 8),
            (36, 8),
            "to compare each of student_feat with teacher_feat, give teacher_feat.expand(2, *",
        ),
        (
            (1, 8, 7, 7),
            (8, 7, 7),
            "to compare each of student_feat with teacher_feat, give teacher_feat.expand(1, *",
        ),
        ((8, 7, 7), (2, 8, 7, 7), "for student_feat without a batch, give student_feat.expand(2, *student_feat.shape)"),
        ((2, 3, 8, 7, 7), (2, 8, 7, 7), "groups are the other side's: swap the two"),
        ((2, 3, 49, 8), (2, 36, 8), "groups are the other side's: swap the two (or, for [B, H, W, C], flatten(1, 2))"),
        ((2, 3, 8, 7, 7), (2, 3, 8, 7, 7), "for pairs of groups, give student_feat.flatten(0, 1) and the other side's"),
        (
            (4, 8, 3, 3),
            (5, 8, 3, 3),
            "to compare each of student_feat with all of teacher_feat, give teacher_feat.exp",
        ),
        ((2, 8, 7, 7), (2, 49, 8), "to compare a map with tokens, give student_feat.flatten(2).mT"),
        ((2, 49, 8), (2, 8, 7, 7), "to compare tokens with a map, give teacher_feat.flatten(2).mT"),
    ],
)
def test_what_to_give_instead(student: tuple[int, ...], teacher: tuple[int, ...], hint: str) -> None:
    """Each way out that is named works."""
    sides = {"student_feat": rand(*student), "teacher_feat": rand(*teacher)}
    with pytest.raises(ValueError) as caught:
        emd_l2(**sides)
    _, _, said = str(caught.value).partition("; ")
    assert said.startswith(hint)
    for way in re.findall(r"(?:give|or) ((?:student|teacher)_feat[.\[].*?)(?= or |$| and |; | \(or)", said):
        changed = {**sides, way.partition(".")[0].partition("[")[0]: eval(way, {}, sides)}
        if changed["student_feat"].shape[0] != changed["teacher_feat"].shape[0] or " and " in said:
            continue  # two sides are to be changed
        assert emd_l2(**changed).isfinite(), way


def test_features_that_are_counted_in_integers() -> None:
    for dtype, call in itertools.product((torch.uint8, torch.int64, torch.bool), (emd_l2, cost_matrix)):
        with pytest.raises(TypeError, match=rf"float64, got {dtype}; give (x|student_feat).float\(\)$"):
            call(x.to(dtype), y)
    with pytest.raises(TypeError, match=r"got torch.complex64$"):
        emd_l2(x.to(torch.complex64), y)


@pytest.mark.parametrize(
    ("shape", "hint"),
    [
        ((2, 1, 9), "give student_weight.squeeze(1)"),
        ((1, 9), "give student_weight.squeeze(0)"),
        ((2, 1, 3, 3), "give student_weight.squeeze(1)"),
        ((1, 3, 3), "give student_weight.squeeze(0)"),
        ((2, 9, 1), "give student_weight.squeeze(2)"),
        ((2, 8), ""),
        ((9, 1, 1), ""),
        ((), ""),
    ],
)
def test_weights_with_an_axis_too_many(shape: tuple[int, ...], hint: str) -> None:
    weight = rand(*shape)
    with pytest.raises(ValueError, match=r"of shape \[2, 9\] or \[2, 3, 3\], or \[9\] or \[3, 3\] for all") as caught:
        emd_l2(x, y, student_weight=weight)
    assert str(caught.value).partition("; ")[2] == hint
    if hint:
        given = eval(hint.removeprefix("give "), {}, {"student_weight": weight})
        assert emd_l2(x, y, student_weight=given).isfinite()


def test_weights_of_the_other_side() -> None:
    for sides in ((rand(4), None), (None, rand(3))):
        with pytest.raises(ValueError, match=r"; a is for the rows of cost, b for its columns$"):
            solve(cost, *sides)
    with pytest.raises(ValueError, match=r"got \[5\]$"):
        solve(cost, rand(5))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("eps", np.float32(0.25)),
        ("eps", np.float16(0.25)),
        ("eps", np.int64(1)),
        ("eps", Fraction(1, 4)),
        ("tol", np.float32(0.125)),
        ("reach", np.float32(2)),
        ("reach", (None, np.int8(2))),
        ("max_iter", np.int64(7)),
        ("patch_size", np.int32(2)),
    ],
)
def test_numbers_of_other_libraries(name: str, value: Any) -> None:
    """As Python's, in every bit; compared with 2 x 2 windows, too."""
    plain = tuple(p if p is None else int(p) for p in value) if isinstance(value, tuple) else value
    plain = plain if isinstance(plain, tuple) else int(plain) if plain == int(plain) else float(plain)
    for call in (emd_l2, sfr_ext.EMDL2Loss):
        one, other = (
            call(x, y, **{name: each}) if call is emd_l2 else call(**{name: each})(x, y) for each in (value, plain)
        )
        assert torch.equal(one, other)
    if name != "patch_size":
        one, other = (solve(cost, **{name: each}) for each in (value, plain))
        assert torch.equal(one.transport_cost, other.transport_cost) and torch.equal(one.converged, other.converged)


def test_numbers_that_are_none() -> None:
    for name, value, message in (
        ("eps", torch.tensor(0.1), r"to be a number, got Tensor; give eps.item\(\)$"),
        ("max_iter", torch.tensor(3), r"to be an int, got Tensor; give max_iter.item\(\)$"),
        ("eps", torch.rand(2), "to be a number, got Tensor$"),
        ("eps", True, "to be a number, got bool$"),
        ("eps", np.bool_(True), "to be a number, got bool"),
        ("max_iter", np.float32(3), "to be an int, got float32$"),
    ):
        with pytest.raises(TypeError, match=f"expected {name} {message}"):
            emd_l2(x, y, **{name: value})
    with pytest.raises(ValueError, match="expected eps to be finite and above 0, got nan"):
        emd_l2(x, y, eps=np.float32("nan"))


def test_bools() -> None:
    net = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.Conv2d(2, 4, 3))
    calls: dict[str, Callable[[Any], object]] = {
        "maximize": lambda value: linear_assignment(cost, maximize=value),
        "detach": lambda value: cross_reference_weights(x, y, detach=value),
        "groups": lambda value: sfr_ext.self_term(x, groups=value, eps=0.1),
        "enabled": lambda value: sfr_ext.warn_on_nonconvergence(value),
        "attach": lambda value: sfr_ext.SelfFeatureRegularizer(net, ["0", "1"], attach=value),
        "normalize": lambda value: sfr_ext.self_feature_loss([x, x], normalize=value),
        "detach_teacher": lambda value: sfr_ext.FeatureDistiller(net, net, {"0": "1"}, detach_teacher=value),
    }
    for name, call in calls.items():
        for value in (1, "yes", None):
            with pytest.raises(TypeError, match=f"expected {name} to be a bool, got {type(value).__name__}$"):
                call(value)
        call(np.bool_(False))


@pytest.mark.filterwarnings("ignore:.*quantize")
def test_quantised_features() -> None:
    counted = torch.quantize_per_tensor(torch.rand(2, 5, 4), 0.1, 0, torch.quint8)
    for call in (lambda: emd_l2(counted, counted), lambda: linear_assignment(counted)):
        with pytest.raises(TypeError, match=r"got torch.quint8; give \S+.dequantize\(\)$"):
            call()


def test_one_hot_labels_of_an_online_prior() -> None:
    smooth = sfr_ext.DynamicLabelSmoothing(0.1, total_steps=4, prior="online")
    with pytest.raises(ValueError, match=r"of one-hot ones, give target.argmax\(1\)$"):
        smooth(torch.zeros(2, 3), torch.eye(3)[:2])


def test_numpys_numbers_where_a_graph_is_made() -> None:
    """They are kept as Python's, which a compiler knows."""
    loss = sfr_ext.EMDL2Loss(
        eps=np.float32(0.25), max_iter=np.int64(50), reach=(np.float64(2), None), tol=np.float64(1)
    )
    assert [type(value) for value in (*loss.options["reach"], loss.options["tol"])] == [float, type(None), float]
    assert torch.equal(torch.compile(loss, backend="eager", fullgraph=True)(x, y), loss(x, y))


def test_numpys_numbers_elsewhere() -> None:
    deep = torch.rand(2, 8, 3, 3)
    assert torch.equal(sfr_ext.group_channels(deep, np.int64(4)), sfr_ext.group_channels(deep, 4))
    limit = np.float32(0.5)
    assert torch.equal(linear_assignment(cost, max_cost=limit), linear_assignment(cost, max_cost=0.5))
    plain = sfr_ext.self_feature_loss([x, x], weight=0.5, max_grid=2)
    assert torch.equal(sfr_ext.self_feature_loss([x, x], weight=np.float32(0.5), max_grid=np.int64(2)), plain)
    assert repr(sfr_ext.layouts.tokens(np.int64(2), (np.int8(2), 3))) == "tokens(prefix=2, grid=(2, 3))"
    net = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.Conv2d(2, 4, 3))
    with sfr_ext.SelfFeatureRegularizer(net, ["0", "1"], weight=np.float32(0.5), warmup_steps=np.int64(4)) as sfr:
        net(torch.rand(1, 1, 8, 8))
        assert sfr.loss().isfinite() and sfr.current_weight == 0.125


def test_a_start_is_looked_at_by_both_solvers() -> None:
    for solver in ("sinkhorn", "exact"):
        with pytest.raises(TypeError, match=r"expected init to be a pair \(f, g\), got int"):
            solve_sample(x, y, init=3, solver=solver)


@pytest.mark.parametrize("name", ["eps", "tol", "max_iter", "reach", "patch_size"])
def test_numbers_beyond_what_kernels_count_with(name: str) -> None:
    """A Python int has no end; a float has."""
    huge = 10**400 if name in ("eps", "tol", "reach") else 2**63
    with pytest.raises(ValueError, match=rf"sfr_ext.emd_l2: expected {name} to .* got {huge}"):
        emd_l2(x, y, **{name: huge})
    with pytest.raises(ValueError, match=f"sfr_ext.emd_l2: expected {name} to"):
        emd_l2(x, y, **{name: -huge})
    assert emd_l2(x, y, **{name: {"max_iter": 2**63 - 1, "patch_size": 2}.get(name, 1)}).isfinite()


NO_MEMORY = """
import resource, torch, sfr_ext
cost = torch.zeros(1).expand(40_000, 40_000)
small = torch.rand(3, 3)
sfr_ext.solve(small, solver={solver!r})
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30), resource.RLIM_INFINITY))
try:
    sfr_ext.solve(cost, solver={solver!r})
except MemoryError as error:
    print(error)
print(sfr_ext.solve(small, solver={solver!r}).converged.item())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits of memory are Linux's")
@pytest.mark.parametrize("solver", ["sinkhorn", "exact"])
def test_a_workspace_that_does_not_fit(solver: str) -> None:
    """Says what for, and the process goes on."""
    done = subprocess.run([sys.executable, "-c", NO_MEMORY.format(solver=solver)], capture_output=True, text=True)
    message = (
        f"sfr_ext.{solver}_forward: not enough memory for the workspace that an input of shape [1, 1, 40000, 40000]"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(message) and done.stdout.endswith("True\n")
