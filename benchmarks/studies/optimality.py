"""Proofs that the exact solver's results are optimal: ``python -m benchmarks.studies.optimality``.

Random problems of all kinds (costs x weights x sizes, float64). Each result is its own certificate: a plan with the
right marginals, dual variables that exceed no cost, and the same value from both. Nothing is compared with another
solver.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sfr_ext.ops import ExactOptions
from sfr_ext.ops.exact import exact_forward

from ..harness.report import markdown

SIZES = [(1, 1), (1, 6), (6, 1), (2, 2), (3, 5), (8, 8), (16, 16), (17, 16), (20, 31), (49, 49), (49, 12), (70, 64)]


def _points(b: int, n: int, m: int, c: int) -> Tensor:
    return torch.cdist(torch.randn(b, n, c, dtype=torch.float64), torch.randn(b, m, c, dtype=torch.float64))


def _same_points(b: int, n: int, m: int) -> Tensor:
    points = torch.randn(b, max(n, m), 4, dtype=torch.float64)
    return torch.cdist(points[:, :n], points[:, :m], compute_mode="donot_use_mm_for_euclid_dist")


def _few_points(b: int, n: int, m: int) -> Tensor:
    """Points that occur several times over."""
    points = torch.randn(b, 4, 3, dtype=torch.float64)
    x, y = (torch.stack([p[torch.randint(4, (k,))] for p in points]) for k in (n, m))
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")


def _masked(b: int, n: int, m: int) -> Tensor:
    cost = torch.rand(b, n, m, dtype=torch.float64)
    return torch.where(torch.rand(b, n, m) < 0.3, 1e30, cost)


COSTS: dict[str, Callable[[int, int, int], Tensor]] = {
    "uniform": lambda b, n, m: torch.rand(b, n, m, dtype=torch.float64),
    "of both signs": lambda b, n, m: torch.randn(b, n, m, dtype=torch.float64),
    "points in space": lambda b, n, m: _points(b, n, m, 3),
    "points of 64 dimensions": lambda b, n, m: _points(b, n, m, 64),
    "the same points": _same_points,
    "few points": _few_points,
    "integers": lambda b, n, m: torch.randint(0, 4, (b, n, m)).double(),
    "all equal": lambda b, n, m: torch.full((b, n, m), 0.7, dtype=torch.float64),
    "zeros": lambda b, n, m: torch.zeros(b, n, m, dtype=torch.float64),
    "tiny": lambda b, n, m: 1e-30 * torch.rand(b, n, m, dtype=torch.float64),
    "huge": lambda b, n, m: 1e30 * torch.rand(b, n, m, dtype=torch.float64),
    "1e-30 to 1e30": lambda b, n, m: 10 ** (60 * torch.rand(b, n, m, dtype=torch.float64) - 30),
    "forbidden pairs at 1e30": _masked,
}


def _some_zero(b: int, n: int) -> Tensor:
    weight = torch.rand(b, n, dtype=torch.float64) * (torch.rand(b, n) < 0.6)
    weight[:, 0] += 0.1
    return weight


def _both(one: Callable[[int, int], Tensor]) -> Callable[[int, int, int], tuple[Tensor, Tensor]]:
    return lambda b, n, m: (one(b, n), one(b, m))


def _reordered(b: int, n: int, m: int) -> tuple[Tensor, Tensor]:
    """The same weights in another order, so that their sums may differ in the last bits; cut where m < n."""
    a = torch.rand(b, n, dtype=torch.float64)
    return a, a[:, torch.randperm(n)].repeat(1, -(-m // n))[:, :m]


WEIGHTS: dict[str, Callable[[int, int, int], tuple[Tensor | None, Tensor | None]]] = {
    "none": lambda b, n, m: (None, None),
    "ones": _both(lambda b, n: torch.ones(b, n, dtype=torch.float64)),
    "random": _both(lambda b, n: torch.rand(b, n, dtype=torch.float64) + 1e-3),
    "some 0": _both(_some_zero),
    "counts": _both(lambda b, n: torch.randint(1, 5, (b, n)).double()),
    "1e-12 to 1": _both(lambda b, n: 10 ** (-12 * torch.rand(b, n, dtype=torch.float64))),
    "softmax in float32": _both(lambda b, n: torch.randn(b, n).softmax(-1).double()),
    "reordered": _reordered,
}


@dataclass
class Certificate:
    """How far from a proof, largest of a batch; in units of the largest dual variable or cost that is in use."""

    gap: float = 0.0  # |<P, C> - <a, f> - <b, g>|, and of the value returned
    excess: float = 0.0  # largest f_i + g_j - C_ij between kept patches
    marginals: float = 0.0  # |P 1 - a|_1 + |P^T 1 - b|_1

    def take(self, other: Certificate) -> None:
        self.gap = max(self.gap, other.gap)
        self.excess = max(self.excess, other.excess)
        self.marginals = max(self.marginals, other.marginals)


def certify(cost: Tensor, a: Tensor | None, b: Tensor | None, solved: tuple[Tensor, ...]) -> Certificate:
    """Of what ``exact_forward`` returned for float64 costs ``[B, 1, N, M]``, from its outputs alone."""
    value, f, g, rows, columns, mass = solved[:6]

    def share(weight: Tensor | None, like: Tensor) -> Tensor:
        weight = torch.ones_like(like) if weight is None else weight.reshape(like.shape)
        return weight / weight.sum(-1, keepdim=True)

    p, q = share(a, f), share(b, g)
    kept = (p > 0)[..., :, None] & (q > 0)[..., None, :]
    used = cost.flatten(2).gather(2, rows.long() * cost.shape[-1] + columns.long()) * (mass > 0)
    duals = torch.cat([f * (p > 0), g * (q > 0)], -1)
    unit = torch.cat([used, duals], -1).abs().amax(-1).clamp_min(1e-300)
    primal = (mass * used).sum(-1)
    dual = (p * f).sum(-1) + (q * g).sum(-1)
    excess = (f[..., :, None] + g[..., None, :] - cost).masked_fill(~kept, 0.0).amax((-2, -1))
    row_sums = torch.zeros_like(f).scatter_add(-1, rows.long(), mass)
    column_sums = torch.zeros_like(g).scatter_add(-1, columns.long(), mass)
    marginals = (row_sums - p).abs().sum(-1) + (column_sums - q).abs().sum(-1)
    assert bool((mass >= 0).all())
    gap = torch.maximum((primal - dual).abs(), (value - primal).abs())
    return Certificate(float((gap / unit).max()), float((excess / unit).max()), float(marginals.max()))


def problems_of_all_kinds(each: int, costs: str) -> Iterator[tuple[Tensor, Tensor | None, Tensor | None]]:
    """``each`` problems for each kind of weights and size: cost ``[each, 1, N, M]``, a, b."""
    torch.manual_seed(0)
    for weigh in WEIGHTS.values():
        for n, m in SIZES:
            yield COSTS[costs](each, n, m)[:, None], *weigh(each, n, m)


def prove(each: int) -> str:
    rows = []
    for costs in COSTS:
        worst, count = Certificate(), 0
        for cost, a, b in problems_of_all_kinds(each, costs):
            worst.take(certify(cost, a, b, exact_forward(cost, a, b, *ExactOptions(), "benchmark")))
            count += each
        rows.append([costs, str(count), f"{worst.gap:.0e}", f"{worst.excess:.0e}", f"{worst.marginals:.0e}"])
    return markdown(("costs", "problems", "duality gap", "dual excess", "marginals"), rows)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.studies.optimality", description=__doc__)
    parser.add_argument("--each", type=int, default=9, help="problems of each kind and size (default: 9)")
    print(prove(parser.parse_args(arguments).each))


if __name__ == "__main__":
    main()
