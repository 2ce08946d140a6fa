"""Unbalanced and debiased values beside GeomLoss and OTT-JAX: ``python -m benchmarks.studies.values``.

The same inputs for all: float64, point clouds of 49 and 40 points in 8 dimensions, l2 cost, masses 1 and 1 (with a
reach also 1.3 and 0.8).
OTT-JAX solves to 1e-12, or for 5,000 iterations; GeomLoss follows its own annealing (scaling 0.999), which ends nearby.
Printed: the largest relative difference over 8 problems, of the value and of its gradient in the first cloud.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import sfr_ext

from ..harness.machine import version_of
from ..harness.report import markdown

EPS = 0.2
REACHES: tuple[float | None, ...] = (None, 0.3, 3.0)


def ours(x: Tensor, y: Tensor, a: Tensor, b: Tensor, objective: str, reach: float | None) -> Tensor:
    return sfr_ext.emd_l2(
        x,
        y,
        student_weight=a,
        teacher_weight=b,
        objective=objective,
        eps=EPS,
        eps_scale="absolute",
        reach=reach,
        tol=1e-12,
        max_iter=20_000,
        reduction="none",
    )


def by_geomloss(x: Tensor, y: Tensor, a: Tensor, b: Tensor, objective: str, reach: float | None) -> Tensor:
    from geomloss import SamplesLoss

    debias = objective == "divergence"
    loss = SamplesLoss("sinkhorn", p=1, blur=EPS, reach=reach, debias=debias, scaling=0.999, backend="tensorized")
    value = loss(a, x, b, y)
    if reach and not debias:  # its KL has eps (|a| + |b|) / 2 where KL(P | a b^T) has eps |a| |b|
        value = value + EPS * (a.sum(-1) * b.sum(-1) - (a.sum(-1) + b.sum(-1)) / 2)
    return value


def by_ott(x: Tensor, y: Tensor, a: Tensor, b: Tensor, objective: str, reach: float | None) -> tuple[Tensor, Tensor]:
    """Values and gradients in x. The value is that of its plan: with a reach, reg_ot_cost is another."""
    import jax
    import jax.numpy as jnp
    from ott.geometry.geometry import Geometry
    from ott.problems.linear.linear_problem import LinearProblem
    from ott.solvers.linear.sinkhorn import Sinkhorn

    jax.config.update("jax_enable_x64", True)
    tau = 1.0 if reach is None else reach / (reach + EPS)
    solver = Sinkhorn(threshold=1e-12, max_iterations=5_000)

    def kl(p: Any, q: Any) -> Any:
        return (p * jnp.log(p / q) - p + q).sum()

    def entropic(x: Any, y: Any, a: Any, b: Any) -> Any:
        """What has the gradient, and the value."""
        squared = ((x[:, None] - y[None]) ** 2).sum(-1)
        cost = jnp.where(squared > 0, jnp.sqrt(jnp.where(squared > 0, squared, 1.0)), 0.0)
        shifted = cost
        if reach:  # its entropy is that of P alone: this makes it KL(P | a b^T)
            shifted = cost - EPS * (jnp.log(a)[:, None] + jnp.log(b))
        solved = solver(LinearProblem(Geometry(shifted, epsilon=EPS), a, b, tau_a=tau, tau_b=tau))
        plan = solved.matrix
        primal = (plan * cost).sum() + EPS * kl(plan, a[:, None] * b)
        if reach:
            primal = primal + reach * (kl(plan.sum(1), a) + kl(plan.sum(0), b))
        return jnp.stack([solved.reg_ot_cost, primal])

    def value(x: Any, y: Any, a: Any, b: Any) -> Any:
        found = entropic(x, y, a, b)
        if objective == "divergence":
            found = found - (entropic(x, x, a, a) + entropic(y, y, b, b)) / 2
            found = found + EPS / 2 * (a.sum() - b.sum()) ** 2
        return found[0], found[1]

    both = jax.jit(jax.vmap(jax.value_and_grad(value, has_aux=True)))
    (_, found), slope = both(*(t.detach().numpy() for t in (x, y, a, b)))
    return torch.tensor(found.tolist(), dtype=torch.float64), torch.tensor(slope.tolist(), dtype=torch.float64)


def with_slope(function: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    """Values and gradients in x."""

    def both(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        leaf = x.clone().requires_grad_()
        values = function(leaf, *rest)
        return values.detach(), torch.autograd.grad(values.sum(), leaf)[0]

    return both


def difference(found: Tensor, expected: Tensor) -> float:
    found, expected = found.flatten(1) if found.dim() > 1 else found[:, None], expected.reshape(len(expected), -1)
    return ((found - expected).norm(dim=1) / expected.norm(dim=1)).max().item()


def main() -> None:
    argparse.ArgumentParser(prog="python -m benchmarks.studies.values", description=__doc__).parse_args()
    header = ("value", "reach", "masses", "first value", "OTT-JAX: value, gradient", "GeomLoss: value, gradient")
    print(markdown(header, rows()))


def rows() -> Iterator[list[str]]:
    torch.manual_seed(0)
    x, y = torch.randn(8, 49, 8, dtype=torch.float64), torch.randn(8, 40, 8, dtype=torch.float64)
    weights = [torch.rand(8, n, dtype=torch.float64) + 0.2 for n in (49, 40)]
    a, b = (w / w.sum(-1, keepdim=True) for w in weights)
    for objective in ("entropic", "divergence"):
        for reach in REACHES:
            for masses in ((1.0, 1.0), (1.3, 0.8)) if reach else ((1.0, 1.0),):
                sides = x, y, a * masses[0], b * masses[1]
                value, slope = with_slope(ours)(*sides, objective, reach)
                cells = []
                for distribution, library in (("ott-jax", by_ott), ("geomloss", with_slope(by_geomloss))):
                    if version_of(distribution) is None:
                        cells.append(f"{distribution} is not installed")
                        continue
                    other, other_slope = library(*sides, objective, reach)
                    cells.append(f"{difference(value, other):.0e}, {difference(slope, other_slope):.0e}")
                shown = f"{masses[0]}, {masses[1]}"
                yield [objective, str(reach), shown, f"{value[0].item():.6f}", *cells]


if __name__ == "__main__":
    main()
