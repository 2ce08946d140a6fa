"""The registered operators under torch's own checks, and under torch.compile."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from cases import features, value_and_gradients, weights
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

from sfr_ext import _C, build_info, cost_matrix, emd_l2, ops, solve

OPTIONS = ops.SolverOptions(eps=0.3, relative=True, tol=1e-3, max_iter=100)


@pytest.mark.parametrize("grad", [False, True])
def test_opcheck_forward(grad: bool) -> None:
    x, y = features(2, 5, 3, 3, grad=grad), features(2, 2, 5, 2, 3, grad=grad)
    a, b = weights(2, 9, grad=grad), weights(2, 2, 6, grad=grad)
    opcheck(torch.ops.sfr_ext.cost_forward.default, (x, y, 0, 1))
    opcheck(torch.ops.sfr_ext.emd_forward.default, (x, y, a, b, None, 0, 1, *OPTIONS, "emd_l2"))
    opcheck(torch.ops.sfr_ext.emd_forward.default, (x, y, None, None, torch.zeros(2, 2, 6), 2, 2, *OPTIONS, "emd_l2"))
    cost = torch.rand(2, 1, 4, 5, requires_grad=grad)
    opcheck(
        torch.ops.sfr_ext.sinkhorn_forward.default, (cost, weights(2, 1, 4, grad=grad), None, None, *OPTIONS, "solve")
    )


def test_opcheck_backward() -> None:
    x, y = features(2, 5, 9), features(2, 5, 9)
    a, b = weights(2, 5), weights(2, 5)
    solved = ops.emd_forward(x, y, a, b, None, 0, 1, *OPTIONS, "emd_l2")
    value = torch.ones(2)
    args: tuple[Any, ...] = (
        value,
        None,
        x,
        y,
        a,
        b,
        *ops.saved(ops.EmdSolved(*solved)),
        ops.EmdSolved(*solved).cost,
        0,
        1,
        *OPTIONS,
        True,
        False,
        True,
        True,
    )
    opcheck(torch.ops.sfr_ext.emd_backward.default, args)
    opcheck(
        torch.ops.sfr_ext.cost_backward.default,
        (torch.ones(2, 5, 5), cost_matrix(x, y), x, y, 0, 1, True, True),
    )


class Seen(TorchDispatchMode):
    """The names of the operators that pass by."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(str(function))
        return function(*args, **(kwargs or {}))


def test_who_asks_sees_operators_and_gets_the_same_bits() -> None:
    """On plain tensors no operator is called; under a dispatch mode, and where a graph is recorded, they are."""
    x, y, a = features(2, 5, 3, 3, grad=True), features(2, 5, 2, 3), weights(2, 9, grad=True)
    value, grads = value_and_gradients(emd_l2, x, y, student_weight=a, reduction="none")
    with Seen() as seen:
        other, other_grads = value_and_gradients(emd_l2, x, y, student_weight=a, reduction="none")
    assert {"sfr_ext.emd_forward.default", "sfr_ext.emd_backward.default"} <= seen.names
    assert torch.equal(value, other) and all(map(torch.equal, grads, other_grads))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_trace_is_of_the_operator() -> None:
    y, other = features(2, 5, 2, 3), features(2, 5, 3, 3)
    traced = torch.jit.trace(lambda x: emd_l2(x, y), features(2, 5, 3, 3), check_trace=False)
    assert torch.equal(traced(other), emd_l2(other, y))


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(dynamic: bool) -> None:
    compiled = torch.compile(emd_l2, fullgraph=True, dynamic=dynamic)
    for batch, size in ((2, 3), (3, 4), (5, 6)) if dynamic else ((2, 3), (3, 3)):
        x, y, a = (
            features(batch, 5, size, size, grad=True),
            features(batch, 3, 5, 4, 4),
            weights(batch, size, size, grad=True),
        )
        for options in (
            {},
            {"objective": "entropic", "patch_size": 2, "metric": "cosine", "student_weight": None},
        ):
            options = {"student_weight": a, **options}
            inputs = [x, y] + ([a] if options["student_weight"] is not None else [])
            results = []
            for function in (emd_l2, compiled):
                value = function(x, y, **options)
                results.append((value, *torch.autograd.grad(value, [t for t in inputs if t.requires_grad])))
            for eager, other in zip(*results, strict=True):
                torch.testing.assert_close(other, eager, rtol=1e-6, atol=1e-8)


@pytest.mark.slow
def test_compile_solve_and_cost_matrix_fullgraph() -> None:
    def distance(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        result = solve(cost_matrix(x, y), eps=0.1)
        return result.transport_cost.sum() + result.entropic_cost.sum()

    x, y = features(2, 6, 4, grad=True), features(2, 5, 4)
    eager = value_and_gradients(distance, x, y)
    fused = value_and_gradients(torch.compile(distance, fullgraph=True), x, y)
    torch.testing.assert_close(fused, eager, rtol=1e-6, atol=1e-8)


_ISA_SCRIPT = """
import torch, sfr_ext
assert sfr_ext.build_info()["cpu_isa"] == {isa!r}
torch.manual_seed(0)
for shape in ((2, 30, 7, 7), (1, 8, 12, 12)):
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        for metric in ("l2", "cosine"):
            x = torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_()
            y = torch.randn(shape, dtype=torch.float64).to(dtype)
            for patch_size in (1, 2):
                value = sfr_ext.emd_l2(x, y, metric=metric, patch_size=patch_size, eps=0.2, tol=1e-6)
                expected = sfr_ext.reference.emd_l2(
                    x.double(), y.double(), metric=metric, patch_size=patch_size, eps=0.2, tol=1e-6
                )
                (grad,) = torch.autograd.grad(value, x)
                (truth,) = torch.autograd.grad(expected, x)
                tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-3
                assert abs(value - expected) < 1e-5 * expected, (value, expected)
                assert (grad - truth).norm() < tolerance * truth.norm()
"""


@pytest.mark.cpu_only("about the CPU's instruction sets")
@pytest.mark.parametrize("isa", build_info()["cpu_isas"])
def test_every_instruction_set(isa: str) -> None:
    if isa not in _C.cpu_isas():
        pytest.skip(f"this processor cannot run the {isa} kernels that were compiled")
    environment = {**os.environ, "SFR_EXT_CPU_ISA": isa}
    done = subprocess.run(
        [sys.executable, "-c", _ISA_SCRIPT.format(isa=isa)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.cpu_only("about the CPU's instruction sets")
def test_unknown_instruction_set_is_refused() -> None:
    script = "import torch, sfr_ext; sfr_ext.emd_l2(torch.rand(1, 2, 3), torch.rand(1, 2, 3))"
    environment = {**os.environ, "SFR_EXT_CPU_ISA": "mmx"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode != 0
    assert "SFR_EXT_CPU_ISA must be one of" in done.stderr and "got 'mmx'" in done.stderr
