"""Gradients where weights are small, or a reach leaves patches behind: ``python -m benchmarks.studies.small_weights``.

How far float32 at tol = 1e-5 lies from float64 converged to 1e-12, in norm, for features and for weights (student's
and teacher's together): the largest of five draws of 49 x 40 patches of 16 channels. A weight of 1 is that of equal
weights, a distance of 0 that of patches which are all alike. First, every third patch of both sides has the weight of
its line, and the others 1; then, with a reach, four patches of either side are moved away from all others.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import sfr_ext

from ..harness.report import markdown

OBJECTIVES = ("transport", "entropic", "divergence")
WEIGHTS = (1.0, 1e-2, 1e-4, 1e-8, 1e-12, 1e-16, 1e-20, 1e-24, 1e-30, 1e-36)
DISTANCES = (0.0, 3.0, 10.0, 30.0, 100.0, 300.0)
REACHES = (0.1, 1.0)
DRAWS = 5
FAR = 4


def problem(seed: int, weight: float, distance: float) -> list[Tensor]:
    """Features and weights of both sides."""
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(1, n, 16, generator=generator) for n in (49, 40))
    x[:, :FAR] += distance
    y[:, :FAR] -= distance
    a, b = torch.ones(1, 49), torch.ones(1, 40)
    a[:, ::3] = b[:, 1::3] = weight
    return [x, y, a / a.sum(), b / b.sum()]


def gradients(given: list[Tensor], dtype: torch.dtype, tol: float, options: dict[str, Any]) -> list[Tensor]:
    """Of the features, and of the weights."""
    leaves = [t.to(dtype).requires_grad_() for t in given]
    x, y, a, b = leaves
    value = sfr_ext.emd_l2(x, y, student_weight=a, teacher_weight=b, tol=tol, max_iter=20_000, **options)
    grads = [g.double().flatten() for g in torch.autograd.grad(value, leaves)]
    return [torch.cat(grads[:2]), torch.cat(grads[2:])]


def largest_errors(weight: float, distance: float, **options: Any) -> list[float]:
    worst = [0.0, 0.0]
    for seed in range(DRAWS):
        given = problem(seed, weight, distance)
        pairs = zip(
            gradients(given, torch.float32, 1e-5, options), gradients(given, torch.float64, 1e-12, options), strict=True
        )
        for which, (ours, exact) in enumerate(pairs):
            error = ((ours - exact).norm() / exact.norm()).item()
            worst[which] = error if error != error else max(worst[which], error)  # a NaN stays
    return worst


def cells(lines: tuple[float, ...], **options: Any) -> Iterator[list[str]]:
    by_distance = "reach" in options
    for line in lines:
        row = [f"{line:g}"]
        for objective in OBJECTIVES:
            case = (1.0, line) if by_distance else (line, 0.0)
            row += [f"{error:.0e}" for error in largest_errors(*case, objective=objective, **options)]
        yield row


def main() -> None:
    argparse.ArgumentParser(prog="python -m benchmarks.studies.small_weights", description=__doc__).parse_args()
    columns = [f"{objective}, {what}" for objective in OBJECTIVES for what in ("features", "weights")]
    print(markdown(("weight", *columns), cells(WEIGHTS)))
    for reach in REACHES:
        print(f"\nreach = {reach}\n")
        options = {"reach": reach, "eps": 0.05, "eps_scale": "absolute"}
        print(markdown(("distance", *columns), cells(DISTANCES, **options)))


if __name__ == "__main__":
    main()
