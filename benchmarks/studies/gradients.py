"""How far every gradient lies from central differences: ``python -m benchmarks.studies.gradients``.

Float64, 6 x 9 patches of 5 channels, random weights, eps = 0.3, converged to 1e-13. A cell is the largest deviation
of any component, divided by the largest component.
"""

from __future__ import annotations

import argparse
import itertools

import torch
from torch import Tensor

import sfr_ext
from sfr_ext import ops

from ..harness.report import markdown

METRICS = tuple(ops.METRICS)
OBJECTIVES = ("transport", "entropic", "divergence")
EPS_SCALES = ("std", "absolute")
INPUTS = ("student", "teacher", "student weight", "teacher weight")
STEP = 1e-5


def deviations(objective: str, metric: str, eps_scale: str) -> list[float]:
    """One number per input."""
    torch.manual_seed(0)
    inputs = [torch.randn(1, 6, 5), torch.randn(1, 9, 5), torch.rand(1, 6) + 0.2, torch.rand(1, 9) + 0.2]
    leaves = [t.double().requires_grad_() for t in inputs]

    def value(x: Tensor, y: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return sfr_ext.emd_l2(
            x,
            y,
            student_weight=a,
            teacher_weight=b,
            metric=metric,
            objective=objective,
            eps=0.3,
            eps_scale=eps_scale,
            tol=1e-13,
            max_iter=50_000,
        )

    gradients = torch.autograd.grad(value(*leaves), leaves)
    found = []
    for which, gradient in enumerate(gradients):
        numeric = torch.empty_like(gradient)
        for k in range(gradient.numel()):
            ends = []
            for sign in (1, -1):
                moved = [t.detach().clone() for t in leaves]
                moved[which].view(-1)[k] += sign * STEP
                ends.append(value(*moved))
            numeric.view(-1)[k] = (ends[0] - ends[1]) / (2 * STEP)
        found.append(((gradient - numeric).abs().max() / numeric.abs().max()).item())
    return found


def table() -> str:
    cases = itertools.product(OBJECTIVES, METRICS, EPS_SCALES)
    return markdown(
        ("objective", "metric", "eps_scale", *INPUTS),
        ([*case, *(f"{d:.0e}" for d in deviations(*case))] for case in cases),
    )


def main() -> None:
    argparse.ArgumentParser(prog="python -m benchmarks.studies.gradients", description=__doc__).parse_args()
    print(table())


if __name__ == "__main__":
    main()
