"""Bad input gets one error that names the argument, what was wanted, and what came."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

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
            r"expected student_weight of shape \[2, 9\] or \[2, 3, 3\], got \[2, 8\]",
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
            r"expected a of shape \[2, 9\] or \[2, 3, 3\], got \[3, 9\]",
        ),
        (
            lambda: sfr_ext.EMDL2Loss(epsilon=0.1),
            TypeError,
            "expected options among metric, .* got 'epsilon'",
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


@pytest.mark.parametrize("call", [linear_assignment, solve, cross_reference_weights])
def test_sparse_tensors(call: Callable[..., object]) -> None:
    dense = torch.eye(3) if call is not cross_reference_weights else torch.ones(1, 2, 3, 3)
    others = () if call is not cross_reference_weights else (torch.ones(1, 2, 3, 3),)
    with pytest.raises(TypeError, match=f"sfr_ext.{call.__name__}: expected .* to be dense, got torch.sparse_coo"):
        call(dense.to_sparse(), *others)


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
