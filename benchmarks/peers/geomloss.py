"""GeomLoss, its dense backend. It anneals eps down to the wanted one and stops: finer annealing, smaller error."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..data.workloads import Problem
from .base import Peer, Solved


def _solve(x: Tensor, y: Tensor, problem: Problem, scaling: float) -> Solved:
    from geomloss import SamplesLoss

    def loss(potentials: bool) -> Any:
        # p=1 makes the cost |x - y| and the temperature equal to the blur.
        return SamplesLoss(
            "sinkhorn",
            p=1,
            blur=problem.eps,
            scaling=scaling,
            debias=False,
            potentials=potentials,
            backend="tensorized",
        )(x, y)

    def plan() -> Tensor:
        with torch.no_grad():
            f, g = loss(potentials=True)
            exponent = (f[:, :, None] + g[:, None] - torch.cdist(x, y)) / problem.eps
            return exponent.exp() / (f.shape[1] * g.shape[1])

    return Solved(loss(potentials=False), plan)


GEOMLOSS = [Peer("GeomLoss tensorized", "geomloss", "entropic", (0.9, 0.95, 0.98, 0.99), _solve)]
