"""`ops.emd_value`: the bits of `emd_forward` and of its backward, whichever way it is called."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sfr_ext import ops

Given = dict[str, Any]
OPTIONS = ops.SolverOptions(0.1, True)


def features(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype).requires_grad_()


def weights(*shape: int, seed: int = 0) -> Tensor:
    return (torch.rand(shape, generator=torch.Generator().manual_seed(seed)) + 0.1).requires_grad_()


def cases() -> dict[str, tuple[ops.Pair, int]]:
    """Features and weights, and the size of a patch."""
    x, y = features(2, 6, 3, 4), features(2, 3, 6, 4, 2, seed=1)
    half = [features(2, 9, 5, dtype=torch.bfloat16, seed=k) for k in (0, 1)]
    double = [features(1, 7, 4, dtype=torch.float64, seed=k) for k in (0, 1)]
    nothing = features(0, 5, 4), features(0, 6, 4)
    wide = [features(2, 8, 500, seed=k) for k in (0, 1)]
    return {
        "one problem": (ops.Pair(features(1, 8, 4), features(1, 5, 4, seed=1), None, None), 1),
        "groups": (ops.Pair(x, y, weights(2, 12), weights(2, 8, seed=1)), 1),
        "weights of groups": (ops.Pair(x, y, weights(2, 3, 12), weights(2, 3, 8, seed=1)), 1),
        "windows": (ops.Pair(x, y, None, weights(2, 3, seed=1)), 2),
        "bfloat16": (ops.Pair(*half, weights(2, 9), None), 1),
        "float64": (ops.Pair(*double, None, None), 1),
        "costs kept": (ops.Pair(*wide, None, None), 1),
        "no problems": (ops.Pair(*nothing, None, None), 1),
        "teacher alone": (ops.Pair(x.detach(), y, None, None), 1),
    }


def by_operator(pair: ops.Pair, ground: ops.Ground, which: int) -> Tensor:
    return ops.emd_forward(*pair, None, *ground, *OPTIONS, "emd_l2")[which]


def alone(pair: ops.Pair, ground: ops.Ground, which: int) -> Tensor:
    value = ops.emd_value(pair, ground, OPTIONS, "emd_l2", which)
    return value if value.dim() else value.view(ops.problems(pair.x, pair.y))


def wanted(pair: ops.Pair) -> list[Tensor]:
    return [z for z in pair if z is not None and z.requires_grad]


@pytest.mark.parametrize("which", [0, 1], ids=["transport", "entropic"])
@pytest.mark.parametrize("name", cases())
def test_it_has_the_bits_of_the_operator(name: str, which: int) -> None:
    pair, patch = cases()[name]
    ground = ops.Ground(0, patch)
    found, right = alone(pair, ground, which), by_operator(pair, ground, which)
    assert torch.equal(found, right) and found.dtype == right.dtype and found.shape == right.shape
    upstream = torch.linspace(0.5, 2, found.numel(), dtype=found.dtype).view(found.shape)
    gradients = [torch.autograd.grad(value, wanted(pair), upstream) for value in (found, right)]
    for ours, theirs in zip(*gradients, strict=True):
        assert torch.equal(ours, theirs) and ours.dtype == theirs.dtype
    with torch.no_grad():
        assert torch.equal(alone(pair, ground, which), right)


def test_which_inputs_want_a_gradient_changes_no_bit() -> None:
    pair = cases()["groups"][0]
    value = alone(pair, ops.Ground(0, 1), 0).sum()
    together = torch.autograd.grad(value, wanted(pair))
    for k, right in enumerate(together):
        one = ops.Pair(*(z.detach().requires_grad_(i == k) for i, z in enumerate(pair) if z is not None))
        assert torch.equal(torch.autograd.grad(alone(one, ops.Ground(0, 1), 0).sum(), one[k])[0], right)


@pytest.mark.parametrize("name", ["one problem", "weights of groups", "costs kept"])
def test_second_derivatives_are_those_of_the_operator(name: str) -> None:
    pair = cases()[name][0]
    found = []
    for function in (alone, by_operator):
        value = function(pair, ops.Ground(0, 1), 0).sum()
        first = torch.autograd.grad(value, wanted(pair), create_graph=True)
        found.append((*first, *torch.autograd.grad(sum(g.square().sum() for g in first), wanted(pair))))
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)


def test_many_gradients_at_once() -> None:
    pair = cases()["weights of groups"][0]
    value = alone(pair, ops.Ground(0, 1), 0).flatten()
    rows = torch.eye(len(value))
    at_once = torch.autograd.grad(value, pair.x, rows, retain_graph=True, is_grads_batched=True)[0]
    for row, found in zip(rows, at_once, strict=True):
        right = torch.autograd.grad(value, pair.x, row, retain_graph=True)[0]
        torch.testing.assert_close(found, right, rtol=0, atol=1e-7)


def test_what_is_kept_may_lie_elsewhere_meanwhile() -> None:
    pair = cases()["groups"][0]
    right = torch.autograd.grad(alone(pair, ops.Ground(0, 1), 0).sum(), pair.x)[0]
    kept: list[Tensor] = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda z: (kept.append(z), z.clone())[1], lambda z: z.clone())
    with hooks:
        value = alone(pair, ops.Ground(0, 1), 0).sum()
    # The features, the weights, and one tensor for all else.
    assert len(kept) == 5
    assert torch.equal(torch.autograd.grad(value, pair.x)[0], right)


def test_features_that_change_before_backward_are_noticed() -> None:
    x, y = features(1, 8, 4), features(1, 8, 4, seed=1)
    value = alone(ops.Pair(x, y, None, None), ops.Ground(0, 1), 0)
    with torch.no_grad():
        x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.sum().backward()


def test_it_shows_what_it_comes_from() -> None:
    x, y = features(1, 8, 4), features(1, 8, 4, seed=1)
    value = ops.emd_value(ops.Pair(x, y, None, None), ops.Ground(0, 1), OPTIONS, "emd_l2", 0)
    assert value.grad_fn is not None and value.grad_fn.name() == "emd_forwardBackward"
