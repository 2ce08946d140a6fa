"""Slow, obvious, float64: what the fast code has to agree with.

Plain torch, and SciPy for :func:`exact_emd`; no code is shared with the kernels. Costs may have any leading
batch dimensions, written ``...`` below. Results are float64, whatever comes in.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def cost_matrix(x: Tensor, y: Tensor, *, metric: str = "l2", patch_size: int = 1) -> Tensor:
    """Costs between all patches of ``x`` and all patches of ``y``, by direct differences.

    ``l2``: ``|x_i - y_j|``, with gradient 0 at coincident patches. ``sqeuclidean``: ``|x_i - y_j|^2``.
    ``cosine``: ``1 - x_i . y_j / (|x_i| |y_j|)``; 1, with gradient 0, where either patch is 0.

    Args:
        x: maps ``[B, C, H, W]`` or tokens ``[B, N, C]``.
        y: the same kind, or with groups: ``[B, G, C, H', W']`` or ``[B, G, M, C]``.
        metric: "l2" | "sqeuclidean" | "cosine".
        patch_size: side of the square neighbourhoods that are compared, cut as :func:`F.unfold` cuts them.

    Returns:
        ``[B, N, M]``, or ``[B, G, N, M]`` with groups; differentiable.

    Raises:
        ValueError: for an unknown metric, or tokens with ``patch_size > 1``.

    >>> x = torch.tensor([[[0.0, 0.0], [3.0, 4.0]]])
    >>> cost_matrix(x, x)
    tensor([[[0., 5.],
             [5., 0.]]], dtype=torch.float64)
    """
    maps = x.dim() == 4
    p, q = _patches(x, patch_size, maps), _patches(y, patch_size, maps)
    if q.dim() == 4:
        p = p[:, None]
    if metric == "cosine":
        return 1 - _unit(p) @ _unit(q).transpose(-1, -2)
    # Row by row, so that the differences of all pairs are never in memory at once.
    squared = torch.stack([(row[..., None, :] - q).square().sum(-1) for row in p.unbind(-2)], dim=-2)
    if metric == "sqeuclidean":
        return squared
    if metric == "l2":
        return _sqrt(squared)
    raise ValueError(f'metric: expected "l2", "sqeuclidean" or "cosine", got {metric!r}')


def exact_emd(cost: Tensor, a: Tensor | None = None, b: Tensor | None = None) -> Tensor:
    """The earth mover's distance ``min <P, C>`` over ``P >= 0, P 1 = a, P^T 1 = b``, by SciPy.

    With no weights given and N = M it is an assignment problem (``scipy.optimize.linear_sum_assignment``),
    otherwise a linear program (``scipy.optimize.linprog``, HiGHS).

    Args:
        cost: ``[..., N, M]``.
        a: weights ``[..., N]``, normalised here to sum to 1; None: uniform.
        b: weights ``[..., M]``, likewise.

    Returns:
        ``[...]``, without gradient.

    Raises:
        ImportError: when SciPy is missing (``pip install sfr_ext[reference]`` brings it).
        ValueError: for weights that are negative, not finite, or all 0.

    >>> far = 1e4
    >>> rows = [[16, 16, 13, 22, 17], [14, 14, 13, 19, 15], [19, 19, 20, 23, far], [far, 0, far, 0, 0]]
    >>> cost = torch.tensor(rows)
    >>> a, b = torch.tensor([50.0, 60, 50, 50]), torch.tensor([30.0, 20, 70, 30, 60])
    >>> round(float(exact_emd(cost, a, b)) * 210, 6)  # a test case of OpenCV's
    2460.0
    """
    device, cost = cost.device, cost.detach().double().cpu()
    a, b = (None if w is None else w.detach().cpu() for w in (a, b))
    batch = cost.shape[:-2]
    solve = _assignment if a is None and b is None and cost.shape[-1] == cost.shape[-2] else _transport
    sides = _weights("a", a, cost, -2), _weights("b", b, cost, -1)
    problems = [z.reshape(math.prod(batch), *z.shape[len(batch) :]) for z in (cost, *sides)]
    values = [solve(*problem) for problem in zip(*problems, strict=True)]
    return torch.tensor(values, dtype=torch.float64, device=device).reshape(batch)


def _assignment(cost: Tensor, a: Tensor, b: Tensor) -> float:
    from scipy.optimize import linear_sum_assignment

    matrix = cost.numpy()
    return float(matrix[linear_sum_assignment(matrix)].mean())


def _transport(cost: Tensor, a: Tensor, b: Tensor) -> float:
    from scipy.optimize import linprog
    from scipy.sparse import identity, kron, vstack

    n, m = cost.shape
    # The plan is one vector, row by row; these are its row sums and its column sums.
    sums = vstack([kron(identity(n), np.ones((1, m))), kron(np.ones((1, n)), identity(m))])
    done = linprog(cost.numpy().ravel(), A_eq=sums.tocsr(), b_eq=torch.cat([a, b]).numpy(), method="highs")
    if not done.success:
        raise RuntimeError(f"linprog found no plan: {done.message}")
    return float(done.fun)


@dataclass(frozen=True)
class SinkhornResult:
    """What :func:`sinkhorn` returns, one entry per problem.

    The two costs are differentiable in the costs and both weights; the rest is without gradient.
    """

    # entropic_cost is <P, C> + eps KL(P | a b^T), as the dual value <a, f> + <b, g> + eps (1 - sum P).
    transport_cost: Tensor  # [...]        <P, C>
    entropic_cost: Tensor  # [...]
    f: Tensor  # [..., N]                  potentials, up to a constant between f and g; 0 at removed patches
    g: Tensor  # [..., M]
    plan: Tensor  # [..., N, M]
    eps: Tensor  # [...]                   in units of the cost
    n_iter: Tensor  # [...]                updates of both potentials
    marginal_error: Tensor  # [...]        |P 1 - a|_1 + |P^T 1 - b|_1


def sinkhorn(
    cost: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    eps: float = 0.05,
    *,
    eps_scale: str = "std",
    tol: float = 1e-9,
    max_iter: int = 10_000,
) -> SinkhornResult:
    """Entropic optimal transport by alternating updates in the log domain (Sinkhorn; Cuturi, 2013).

    ``P_ij = a_i b_j exp((f_i + g_j - C_ij) / eps)``. An iteration sets f so that the rows sum to ``a``, then
    g so that the columns sum to ``b``. Each problem stops by itself: its result does not depend on its batch.

    Args:
        cost: ``[..., N, M]``.
        a: weights ``[..., N]``, normalised here to sum to 1; None: uniform. A weight of 0 removes the patch.
        b: weights ``[..., M]``, likewise.
        eps: regularisation.
        eps_scale: "std": eps is in units of the standard deviation of the problem's costs under ``a b^T``;
            "absolute": in units of the cost.
        tol: stop at this ``marginal_error``.
        max_iter: stop after this many iterations at the latest.

    Returns:
        A :class:`SinkhornResult`. Its costs have the gradient of the converged value, including what the plan
        and a relative eps contribute: the implicit function theorem with a dense solve of size N + M.

    Raises:
        ValueError: for an unknown ``eps_scale``, or weights that are negative, not finite, or all 0.

    >>> cost = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    >>> result = sinkhorn(cost, eps=0.5, eps_scale="absolute")
    >>> share = 1 / (1 + math.exp(-1 / 0.5))  # by symmetry, what stays in place
    >>> math.isclose(result.transport_cost, 1 - share)
    True
    """
    a, b = _weights("a", a, cost, -2), _weights("b", b, cost, -1)
    cost = cost.double().masked_fill((a[..., :, None] == 0) | (b[..., None, :] == 0), 0.0)
    eps_used, eps_shown = _regularisation(cost, a, b, eps, eps_scale)

    # Differentiable in everything but the potentials, which the iterations below find without a graph.
    def plan_of(f: Tensor, g: Tensor) -> Tensor:
        exponent = (f[..., :, None] + g[..., None, :] - cost) / eps_used[..., None, None]
        return a[..., :, None] * b[..., None, :] * exponent.exp()

    with torch.no_grad():
        log_a, log_b, scaled = a.log()[..., :, None], b.log()[..., None, :], eps_used[..., None]
        f, g = torch.zeros_like(a), torch.zeros_like(b)
        active = torch.ones(cost.shape[:-2], dtype=torch.bool, device=cost.device)
        n_iter = torch.zeros(cost.shape[:-2], dtype=torch.int64, device=cost.device)
        for _ in range(max_iter):
            f_next = -scaled * torch.logsumexp(log_b + (g[..., None, :] - cost) / scaled[..., None], dim=-1)
            g_next = -scaled * torch.logsumexp(log_a + (f_next[..., :, None] - cost) / scaled[..., None], dim=-2)
            f, g = torch.where(active[..., None], f_next, f), torch.where(active[..., None], g_next, g)
            n_iter += active
            active &= _marginal_error(plan_of(f, g), a, b) > tol
            if not active.any():
                break
        f, g = f.masked_fill(a == 0, 0.0), g.masked_fill(b == 0, 0.0)

    plan = plan_of(f, g)
    transport = (plan * cost).sum((-2, -1))
    if transport.requires_grad:
        transport = transport + _through_the_plan(plan, cost, a, b)
    # At the optimum this value is stationary in f and g, so they need no graph.
    entropic = (a * f).sum(-1) + (b * g).sum(-1) + eps_used * (1 - plan.sum((-2, -1)))
    plan = plan.detach()
    error = _marginal_error(plan, a.detach(), b.detach())
    return SinkhornResult(transport, entropic, f, g, plan, eps_shown.detach(), n_iter, error)


def emd_l2(
    student_feat: Tensor,
    teacher_feat: Tensor,
    *,
    student_weight: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    metric: str = "l2",
    patch_size: int = 1,
    objective: str = "transport",
    eps: float = 0.05,
    eps_scale: str = "std",
    tol: float = 1e-9,
    max_iter: int = 10_000,
    reduction: str = "mean",
) -> Tensor:
    """:func:`sfr_ext.emd_l2`, with the same arguments, out of the functions above.

    >>> x, y = torch.zeros(1, 1, 2), torch.tensor([[[3.0, 4.0]]])
    >>> emd_l2(x, y)
    tensor(5., dtype=torch.float64)
    """
    cost = cost_matrix(student_feat, teacher_feat, metric=metric, patch_size=patch_size)
    a = None if student_weight is None else student_weight.reshape(len(cost), -1)
    if a is not None and cost.dim() == 4:
        a = a[:, None]
    b = None if teacher_weight is None else teacher_weight.reshape(*_teacher_shape(teacher_weight, cost), -1)
    result = sinkhorn(cost, a, b, eps, eps_scale=eps_scale, tol=tol, max_iter=max_iter)
    value = {"transport": result.transport_cost, "entropic": result.entropic_cost}[objective]
    if reduction == "none":
        return value
    return value.sum() if reduction == "sum" else value.mean()


def _teacher_shape(weight: Tensor, cost: Tensor) -> tuple[int, ...]:
    """Batch shape of the teacher's weights: with groups, one set for all of them or one for each."""
    if cost.dim() == 3:
        return (len(cost),)
    return tuple(cost.shape[:2]) if weight[0].numel() == cost.shape[1] * cost.shape[3] else (len(cost), 1)


def _patches(z: Tensor, k: int, maps: bool) -> Tensor:
    """``[..., patches, values of a patch]``."""
    z = z.double()
    if maps:
        columns = F.unfold(z.reshape(-1, *z.shape[-3:]), k).transpose(1, 2)
        return columns.reshape(*z.shape[:-3], *columns.shape[1:])
    if k != 1:
        raise ValueError(f"patch_size: tokens have no neighbourhood; expected 1, got {k}")
    return z


def _sqrt(z: Tensor) -> Tensor:
    """Square root with derivative 0 at 0."""
    zero = z == 0
    return torch.where(zero, 0.0, torch.where(zero, 1.0, z).sqrt())


def _unit(z: Tensor) -> Tensor:
    """Unit vectors along the last dimension; zero vectors stay 0, with derivative 0."""
    norm = _sqrt(z.square().sum(-1, keepdim=True))
    return torch.where(norm == 0, 0.0, z / torch.where(norm == 0, 1.0, norm))


def _weights(name: str, weight: Tensor | None, cost: Tensor, dim: int) -> Tensor:
    """One side's weights ``[..., N]``, summing to 1."""
    shape = (*cost.shape[:-2], cost.shape[dim])
    if weight is None:
        return torch.full(shape, 1.0 / shape[-1], dtype=torch.float64, device=cost.device)
    weight = weight.double().expand(shape)
    if not ((weight >= 0).all() and weight.isfinite().all() and (weight > 0).any(-1).all()):
        raise ValueError(f"{name}: expected finite non-negative weights, not all 0, got {weight}")
    # Removed patches take no part in the gradient either.
    weight = torch.where(weight > 0, weight, 0.0)
    return weight / weight.sum(-1, keepdim=True)


def _regularisation(cost: Tensor, a: Tensor, b: Tensor, eps: float, eps_scale: str) -> tuple[Tensor, Tensor]:
    """eps per problem in units of the cost: the one to compute with, and the one to show."""
    if eps_scale == "absolute":
        absolute = torch.full(cost.shape[:-2], eps, dtype=torch.float64, device=cost.device)
        return absolute, absolute
    if eps_scale != "std":
        raise ValueError(f'eps_scale: expected "std" or "absolute", got {eps_scale!r}')
    product = a[..., :, None] * b[..., None, :]
    mean = (product * cost).sum((-2, -1), keepdim=True)
    std = _sqrt((product * (cost - mean).square()).sum((-2, -1)))
    # All costs equal up to rounding: every plan is optimal, and any fixed eps picks a b^T.
    flat = std <= 64 * torch.finfo(torch.float64).eps * (product * cost.abs()).sum((-2, -1))
    return torch.where(flat, 1.0, eps * std), torch.where(flat, 0.0, eps * std)


def _marginal_error(plan: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return (plan.sum(-1) - a).abs().sum(-1) + (plan.sum(-2) - b).abs().sum(-1)


def _through_the_plan(plan: Tensor, cost: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """0, with the gradient that ``<P, C>`` has through the potentials.

    The potentials are defined by ``R = (P 1 - a, P^T 1 - b) = 0``. With ``lambda`` solving
    ``(dR/d(f, g))^T lambda = d<P, C>/d(f, g)``, the total derivative is that of ``<P, C> - <lambda, R>`` at
    fixed potentials. Both sides carry a factor 1/eps, left out here.
    """
    p, c = plan.detach(), cost.detach()
    matrix = torch.cat(
        [
            torch.cat([torch.diag_embed(p.sum(-1)), p], dim=-1),
            torch.cat([p.transpose(-1, -2), torch.diag_embed(p.sum(-2))], dim=-1),
        ],
        dim=-2,
    )
    wanted = torch.cat([(p * c).sum(-1), (p * c).sum(-2)], dim=-1)
    # Singular: a constant may move from f to g. The solution of least norm will do. The solver does not take
    # NaN; where there was one, the plan has it too, and so the result.
    solved = torch.linalg.lstsq(matrix.nan_to_num(), wanted.nan_to_num()[..., None], driver="gelsd")
    lam = solved.solution[..., 0]
    residual = torch.cat([plan.sum(-1) - a, plan.sum(-2) - b], dim=-1)
    return -(lam * (residual - residual.detach())).sum(-1)
