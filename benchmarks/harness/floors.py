"""The least that a workload can take on this machine."""

from __future__ import annotations

import dataclasses

import torch

from ..data.workloads import Problem
from .limits import Limits

EXPONENTIAL = 10  # multiply-adds: reduction of the argument, a polynomial of degree 6, assembly
PLAN_EVALUATIONS = 3  # for the first iteration, at the end, and in backward


@dataclasses.dataclass(frozen=True)
class Floor:
    multiply_adds: float
    bytes: float
    milliseconds: float


def step_floor(problem: Problem, iterations: int, limits: Limits) -> Floor:
    """Of forward and backward of a batch whose problems took so many iterations together.

    In multiply-adds, for B problems of N x M patches of C channels:

    * distances: B N M C, and again in backward, which does not find them in memory. (Each is also a difference. On
      processors that add beside multiplying, as those of the last decade do, that is free; elsewhere it doubles this.)
    * gradients of the features: B N M C for each side.
    * iterations: 2 N M each, both passes over the plan.
    * evaluations of the plan: 3 B N M exponentials of 10 multiply-adds. None where there are no iterations (exact).

    Bytes: both features read in forward and in backward, and their gradients written. The two can overlap, so the
    larger counts: multiply-adds over the measured peak, bytes over the measured copy. In float64 the peak is half.
    """
    count, n, m, c = problem.sizes()
    entries = float(count * n * m)
    operations = 4 * entries * c + 2 * float(iterations) * n * m
    if iterations:
        operations += PLAN_EVALUATIONS * EXPONENTIAL * entries
    size = 3 * sum(t.numel() * t.element_size() for t in (problem.x, problem.y))
    wide = 2 if problem.x.dtype == torch.float64 else 1
    return floor_of(operations * wide, size, limits)


def floor_of(multiply_adds: float, size: float, limits: Limits) -> Floor:
    return Floor(multiply_adds, size, 1e3 * max(multiply_adds / limits.multiply_adds, size / limits.copy_bytes))


# Instructions of a GPU for a pair and channel: difference and multiply-add; backward three times that.
FORWARD_INSTRUCTIONS, BACKWARD_INSTRUCTIONS = 2, 6
ITERATION_CLOCKS = 150  # of one iteration of one problem: two passes over the plan, one after the other


def kernel_floors(problem: Problem, iterations: int, limits: Limits) -> dict[str, Floor]:
    """Of forward and of backward on a GPU, whose longest problem took so many iterations.

    The larger of arithmetic by direct differences at the vector units' rate and of bytes at that of a copy (features
    once; for backward twice, and their gradients), plus the iterations, which wait for each other. Elsewhere than on a
    GPU, by the limits of the processor: for dry runs.
    """
    count, n, m, c = problem.sizes()
    size = sum(t.numel() * t.element_size() for t in (problem.x, problem.y))
    rate, clock = limits.vector_multiply_adds or limits.multiply_adds, limits.clock or 1e9
    found = {}
    for name, instructions, volume, waits in (
        ("forward", FORWARD_INSTRUCTIONS, size, iterations),
        ("backward", BACKWARD_INSTRUCTIONS, 3 * size, 0),
    ):
        operations = float(instructions * count * n * m * c)
        seconds = max(operations / rate, volume / limits.copy_bytes) + waits * ITERATION_CLOCKS / clock
        found[name] = Floor(operations, volume, 1e3 * seconds)
    return found
