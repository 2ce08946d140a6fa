"""The libraries compared, each used as its documentation says and in the way that is fastest for it.

A peer turns two leaves into the values of a batch, with a graph for backward. It also says which plan they
belong to, so that everybody's marginal error is measured by the same code. The settings of a peer go from
coarse to fine; the first one that reaches the wanted marginal error is timed, else the last one, with the
error that it reached.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import sfr_ext

from .workloads import Problem

MAX_ITER = 5000


@dataclass(frozen=True)
class Solved:
    values: Tensor  # [B], with a graph
    plan: Callable[[], Tensor]  # [B, N, M]; asked for outside the timing


@dataclass(frozen=True)
class Peer:
    name: str
    distribution: str  # its name on the package index
    objective: str  # "transport": <P, C> | "entropic": <P, C> + eps KL
    takes_maps: bool  # [B, C, H, W], else tokens [B, N, C]
    settings: tuple[Any, ...]
    solve: Callable[[Tensor, Tensor, Problem, Any], Solved]

    def version(self) -> str | None:
        """None where it is not installed."""
        try:
            return importlib.metadata.version(self.distribution)
        except importlib.metadata.PackageNotFoundError:
            return None


def _ours(objective: str) -> Callable[[Tensor, Tensor, Problem, Any], Solved]:
    def solve(x: Tensor, y: Tensor, problem: Problem, tol_share: float) -> Solved:
        tol = tol_share * problem.tol
        values = sfr_ext.emd_l2(
            x,
            y,
            objective=objective,
            eps=problem.eps,
            eps_scale="absolute",
            tol=tol,
            max_iter=MAX_ITER,
            reduction="none",
        )
        same = {"eps": problem.eps, "eps_scale": "absolute", "tol": tol, "max_iter": MAX_ITER}
        return Solved(values, lambda: sfr_ext.solve_sample(x, y, **same).plan)  # type: ignore[arg-type]

    return solve


def _torch_log_domain(x: Tensor, y: Tensor, problem: Problem, tol_share: float) -> Solved:
    """What people write by hand. The plan is found without a graph and held fixed in backward."""
    cost = torch.cdist(x, y)
    with torch.no_grad():
        scaled = cost / problem.eps
        log_n, log_m = -torch.tensor(cost.shape[1:]).log()
        f, g = torch.zeros_like(cost[:, :, 0]), torch.zeros_like(cost[:, 0])
        for iteration in range(MAX_ITER):
            f = -torch.logsumexp(g[:, None] - scaled + log_m, dim=2)
            g = -torch.logsumexp(f[:, :, None] - scaled + log_n, dim=1)
            if iteration % 10 == 9:
                plan = (f[:, :, None] + g[:, None] - scaled + (log_n + log_m)).exp()
                # g has just made the columns exact.
                if (plan.sum(2) - log_n.exp()).abs().sum(1).max() <= tol_share * problem.tol:
                    break
        plan = (f[:, :, None] + g[:, None] - scaled + (log_n + log_m)).exp()
    return Solved((plan * cost).sum((1, 2)), lambda: plan)


def _pot(x: Tensor, y: Tensor, problem: Problem, tol: float) -> Solved:
    """With grad="detach": its default, "envelope", records every iteration and then drops the record."""
    import ot

    cost = torch.cdist(x, y)
    result = ot.solve_batch(
        cost.detach(), reg=problem.eps, method="log_sinkhorn", tol=tol, max_iter=MAX_ITER, grad="detach"
    )
    plan = result.plan
    return Solved((plan * cost).sum((1, 2)), lambda: plan)


def _geomloss(x: Tensor, y: Tensor, problem: Problem, scaling: float) -> Solved:
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


# The first is the one that the others are compared with. Where a library checks another norm, or only now and
# then, a smaller tolerance is tried when the measured error is still too large.
PEERS = [
    Peer("sfr_ext, transport", "sfr_ext", "transport", True, (1.0, 0.5), _ours("transport")),
    Peer("sfr_ext, entropic", "sfr_ext", "entropic", True, (1.0, 0.5), _ours("entropic")),
    Peer("plain torch, log domain", "torch", "transport", False, (1.0, 0.9, 0.5), _torch_log_domain),
    Peer("POT solve_batch, log_sinkhorn", "POT", "transport", False, (1e-3, 5e-4, 2e-4, 1e-4, 5e-5), _pot),
    Peer("GeomLoss tensorized", "geomloss", "entropic", False, (0.9, 0.95, 0.98, 0.99), _geomloss),
]
