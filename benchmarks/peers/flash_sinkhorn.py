"""FlashSinkhorn: Triton, CUDA, squared distances only, a number of iterations that the caller names."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from ..data.workloads import Problem
from .base import Peer, Solved


def _solve(x: Tensor, y: Tensor, problem: Problem, iterations: int) -> Solved:
    def loss(potentials: bool) -> Any:
        return importlib.import_module("flash_sinkhorn").SamplesLoss(
            "sinkhorn",
            backend="alternating",
            use_epsilon_scaling=False,
            eps=problem.eps,
            n_iters=iterations,
            debias=False,
            allow_tf32=False,
            potentials=potentials,
        )(x, y)

    def plan() -> Tensor:
        with torch.no_grad():
            f, g = loss(potentials=True)
            exponent = (f[:, :, None] + g[:, None] - torch.cdist(x, y).square()) / problem.eps
            return exponent.exp() / (f.shape[1] * g.shape[1])

    return Solved(loss(potentials=False), plan)


FLASH = [
    Peer(
        "FlashSinkhorn, alternating",
        "flash-sinkhorn",
        "entropic",
        (20, 50, 100, 200, 500, 1000),
        _solve,
        metrics=("sqeuclidean",),
        device="cuda",
    )
]
