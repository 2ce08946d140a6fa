"""What is true: values and gradients in float64, and how well a plan meets its marginals."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import sfr_ext
from sfr_ext import reference

from ..data.workloads import Problem
from ..peers import Peer, Solved

# Members of the batch that are also solved by the float64 reference; fewer where its differences of all pairs, kept for
# backward, would fill the memory.
CHECKED, LARGEST = 4, 1 << 27


def marginal_error(plan: Tensor) -> float:
    plan = plan.detach().double()
    rows = (plan.sum(2) - 1 / plan.shape[1]).abs().sum(1)
    columns = (plan.sum(1) - 1 / plan.shape[2]).abs().sum(1)
    return float((rows + columns).max())


class Truth:
    """Values and gradients of the first members of a batch, in float64, for every objective."""

    def __init__(self, problem: Problem) -> None:
        self._groups = groups = problem.sizes()[0] // len(problem.x)
        _, n, m, c = problem.sizes()
        checked = max(1, min(CHECKED, LARGEST // (groups * n * m * c)))
        x, y = (side[: checked * groups].double().requires_grad_() for side in problem.pairs())
        cost = reference.cost_matrix(x, y, metric=problem.metric)
        # A cost less f_i + g_j has the same plan and the same gradient. So the reference may begin where another solver
        # ended; that this was the solution is shown by its own marginal error.
        options: dict[str, Any] = {"eps": problem.eps, "eps_scale": "absolute", "tol": 1e-3 * problem.tol}
        start = sfr_ext.solve(cost.detach(), **(options | {"tol": 1e-10}), max_iter=20_000)
        shift = start.f.detach()[:, :, None] + start.g.detach()[:, None]
        result = reference.sinkhorn(cost - shift, **options)
        assert bool((result.marginal_error <= options["tol"]).all()), "the reference did not converge"
        back = start.f.mean(1) + start.g.mean(1)
        values = {"transport": result.transport_cost + back, "entropic": result.entropic_cost + back}
        if _has_scipy():
            exact = sfr_ext.solve(cost, solver="exact").transport_cost
            true = reference.exact_emd(cost)
            # The gradient is the plan's, which an equal value proves optimal.
            assert bool(((exact - true).abs() <= 1e-9 * true.abs()).all()), "two exact solvers disagree"
            values["exact"] = exact
        self.values = {name: value.detach() for name, value in values.items()}
        self.gradients = {
            name: torch.autograd.grad(value.sum(), (x, y), retain_graph=True) for name, value in values.items()
        }

    def compare(self, peer: Peer, solved: Solved, x: Tensor, y: Tensor) -> tuple[float, float]:
        """Relative errors of values and of gradients."""
        want = self.values[peer.objective]
        count = len(want)
        value_error = float(((solved.values[:count].detach() - want) / want).abs().max())
        off, size = 0.0, 0.0
        for leaf, gradient in zip((x, y), self.gradients[peer.objective], strict=True):
            assert leaf.grad is not None
            expected = gradient if peer.takes_maps else gradient.flatten(2).transpose(1, 2)
            grouped = expected.unflatten(0, (-1, self._groups))
            if peer.takes_maps and self._groups > 1:
                expected = grouped if leaf.dim() == 5 else grouped.sum(1)
            # Of the mean over all problems, hence the factor.
            got = leaf.grad[: len(expected)].double() * len(solved.values)
            off, size = off + float((got - expected).square().sum()), size + float(expected.square().sum())
        return value_error, (off / size) ** 0.5


def _has_scipy() -> bool:
    try:
        import scipy  # noqa: F401
    except ImportError:
        return False
    return True
