"""Slow, obvious, float64: what the fast code has to agree with.

Plain torch, and SciPy for :func:`exact_emd`; no code is shared with the kernels. Costs may have any leading
batch dimensions, written ``...`` below. Results are float64, whatever comes in.
"""

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference_checks as checks
from .extras import how_to_install

# One for both sides, or a pair; None: balanced.
Reach = float | tuple[float | None, float | None] | None


def cost_matrix(x: Tensor, y: Tensor, *, metric: str = "l2", patch_size: int = 1) -> Tensor:
    """Costs between all patches of ``x`` and all patches of ``y``, by direct differences.

    ``l2``: ``|x_i - y_j|``, with gradient 0 at coincident patches. ``sqeuclidean``: ``|x_i - y_j|^2``.
    ``cosine``: ``1 - x_i . y_j / (|x_i| |y_j|)``; 1, with gradient 0, where either patch is 0. ``l1``: the sum of
    ``|x_ic - y_jc|``, with gradient 0 where two values coincide.

    Args:
        x: maps ``[B, C, H, W]`` or tokens ``[B, N, C]``.
        y: the same kind, or with groups: ``[B, G, C, H', W']`` or ``[B, G, M, C]``.
        metric: "l2" | "sqeuclidean" | "cosine" | "l1".
        patch_size: side of the square neighbourhoods that are compared, cut as :func:`F.unfold` cuts them.

    Returns:
        ``[B, N, M]``, or ``[B, G, N, M]`` with groups; differentiable.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: for an unknown metric, shapes that do not fit, or tokens with ``patch_size > 1``.

    >>> import torch
    >>> from sfr_ext.reference import cost_matrix
    >>> x = torch.tensor([[[0.0, 0.0], [3.0, 4.0]]])
    >>> cost_matrix(x, x)
    tensor([[[0., 5.],
             [5., 0.]]], dtype=torch.float64)
    """
    return _costs(x, y, metric, checks.features("reference.cost_matrix", "x", x, "y", y, metric, patch_size))


def _costs(x: Tensor, y: Tensor, metric: str, patch_size: int) -> Tensor:
    maps = x.dim() == 4
    p, q = _patches(x, patch_size, maps), _patches(y, patch_size, maps)
    if q.dim() == 4:
        p = p[:, None]
    if metric == "cosine":
        return 1 - _unit(p) @ _unit(q).transpose(-1, -2)
    if metric == "l1":
        return torch.stack([(row[..., None, :] - q).abs().sum(-1) for row in p.unbind(-2)], dim=-2)
    # Row by row, so that the differences of all pairs are never in memory at once.
    squared = torch.stack([(row[..., None, :] - q).square().sum(-1) for row in p.unbind(-2)], dim=-2)
    if metric == "sqeuclidean":
        return squared
    if metric == "l2":
        return _sqrt(squared)
    raise ValueError(f"sfr_ext.reference.cost_matrix: metric {metric!r} has no formula here")


def exact_emd(cost: Tensor, a: Tensor | None = None, b: Tensor | None = None) -> Tensor:
    """The earth mover's distance ``min <P, C>`` over ``P >= 0, P 1 = a, P^T 1 = b``, by SciPy.

    With no weights given and N = M it is an assignment problem (``scipy.optimize.linear_sum_assignment``),
    otherwise a linear program (``scipy.optimize.linprog``, HiGHS).

    Args:
        cost: ``[..., N, M]``. +inf forbids a pair; a problem without a plan has value inf.
        a: weights ``[..., N]``, normalised here to sum to 1; None: uniform.
        b: weights ``[..., M]``, likewise. Where all of a side are 0 the problem is empty, and its value 0.

    Returns:
        ``[...]``, without gradient.

    Raises:
        ImportError: when SciPy is missing; the message has the command that installs it.
        TypeError: an argument is of the wrong kind.
        ValueError: for shapes that do not fit, and weights that are negative or not finite.

    >>> import torch
    >>> from sfr_ext.reference import exact_emd
    >>> far = 1e4
    >>> rows = [[16, 16, 13, 22, 17], [14, 14, 13, 19, 15], [19, 19, 20, 23, far], [far, 0, far, 0, 0]]
    >>> cost = torch.tensor(rows)
    >>> a, b = torch.tensor([50.0, 60, 50, 50]), torch.tensor([30.0, 20, 70, 30, 60])
    >>> round(float(exact_emd(cost, a, b)) * 210, 6)  # a test case of OpenCV's
    2460.0
    """
    if importlib.util.find_spec("scipy") is None:
        how = how_to_install("reference", "scipy")
        raise ImportError(f"sfr_ext.reference.exact_emd needs scipy, not installed here: {how}", name="scipy")
    checks.problem("reference.exact_emd", cost, a, b)
    device, cost = cost.device, cost.detach().double().cpu()
    a, b = (None if w is None else w.detach().cpu() for w in (a, b))
    batch = cost.shape[:-2]
    solve = _assignment if a is None and b is None and cost.shape[-1] == cost.shape[-2] else _transport
    sides = _weights(a, cost, -2), _weights(b, cost, -1)
    problems = [z.reshape(math.prod(batch), *z.shape[len(batch) :]) for z in (cost, *sides)]
    values = [solve(*problem) for problem in zip(*problems, strict=True)]
    return torch.tensor(values, dtype=torch.float64, device=device).reshape(batch)


def _assignment(cost: Tensor, a: Tensor, b: Tensor) -> float:
    from scipy.optimize import linear_sum_assignment

    matrix = cost.numpy()
    try:
        return float(matrix[linear_sum_assignment(matrix)].mean())
    except ValueError:  # what SciPy says where forbidden pairs leave no assignment
        return math.inf


def _transport(cost: Tensor, a: Tensor, b: Tensor) -> float:
    from scipy.optimize import linprog
    from scipy.sparse import identity, kron, vstack

    if not (a.any() and b.any()):
        return 0.0
    n, m = cost.shape
    # The plan is one vector, row by row; these are its row sums and its column sums. The last follows from the others,
    # and rounding would contradict it.
    sums = vstack([kron(identity(n), np.ones((1, m))), kron(np.ones((1, n)), identity(m))])
    allowed = np.isfinite(cost.numpy().ravel())
    if not allowed.any():
        return math.inf
    sums, marginals = sums.tocsc()[:-1, allowed], torch.cat([a, b])[:-1].numpy()
    done = linprog(cost.numpy().ravel()[allowed], A_eq=sums, b_eq=marginals, method="highs")
    if done.status == 2:  # infeasible
        return math.inf
    if not done.success:
        raise RuntimeError(f"linprog found no plan: {done.message}")
    return float(done.fun)


@dataclass(frozen=True)
class SinkhornResult:
    """What :func:`sinkhorn` returns, one entry per problem.

    The two costs are differentiable in the costs and both weights; the rest is without gradient.
    """

    # entropic_cost is <P, C> + eps KL(P | a b^T), as the dual value <a, f> + <b, g> + eps (1 - sum P).
    # With a reach, the minimum of the unbalanced problem, from its own dual.
    transport_cost: Tensor  # [...]        <P, C>
    entropic_cost: Tensor  # [...]
    f: Tensor  # [..., N]                  potentials, up to a constant between f and g; 0 at removed patches
    g: Tensor  # [..., M]
    plan: Tensor  # [..., N, M]
    eps: Tensor  # [...]                   in units of the cost
    n_iter: Tensor  # [...]                updates of both potentials
    marginal_error: Tensor  # [...]        |P 1 - a|_1 + |P^T 1 - b|_1; with a reach: see `sinkhorn`


def sinkhorn(
    cost: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    eps: float | Tensor = 0.05,
    *,
    eps_scale: str = "std",
    reach: Reach = None,
    tol: float = 1e-9,
    max_iter: int = 10_000,
) -> SinkhornResult:
    """Entropic optimal transport by alternating updates in the log domain (Sinkhorn; Cuturi, 2013).

    ``P_ij = a_i b_j exp((f_i + g_j - C_ij) / eps)``. An iteration sets f so that the rows sum to ``a``, then
    g so that the columns sum to ``b``. Each problem stops by itself: its result does not depend on its batch.

    With a reach (Chizat et al., 2018; Sejourne et al., 2019) it is ``min <P, C> + eps KL(P | a b^T) +
    reach_a KL(P 1 | a) + reach_b KL(P^T 1 | b)``: the rows sum to ``a exp(-f / reach_a)``, the columns likewise.

    Args:
        cost: ``[..., N, M]``. +inf forbids a pair: its entry of the plan is 0, and "std" is taken over the others.
            Where that leaves nothing to a patch whose marginal is to be met, the value is inf.
        a: weights ``[..., N]``, normalised here to sum to 1 unless their side has a reach; None: uniform. A weight
            of 0 removes the patch. Where all of a side are removed the problem is empty: everything about it is 0.
        b: weights ``[..., M]``, likewise.
        eps: regularisation.
        eps_scale: "std": eps is in units of the standard deviation of the problem's costs under ``a b^T``;
            "absolute": in units of the cost, and then it may be a tensor, differentiable, with one for each problem.
        reach: what it costs to leave mass behind, in units of the cost; one for both sides or a pair, None: balanced.
        tol: stop at this ``marginal_error``. With a reach the marginals that it bends stand in for a and b, the
            distance of a side is divided by ``1 + eps / reach``, which is how much faster than the plan they move,
            and both are in units of the plan's mass.
        max_iter: stop after this many iterations at the latest.

    Returns:
        A :class:`SinkhornResult`. Its costs have the gradient of the converged value, including what the plan
        and a relative eps contribute: the implicit function theorem with a dense solve of size N + M.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: for an option out of range, shapes that do not fit, and weights that are negative or not finite.

    >>> import math, torch
    >>> from sfr_ext.reference import sinkhorn
    >>> cost = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    >>> result = sinkhorn(cost, eps=0.5, eps_scale="absolute")
    >>> share = 1 / (1 + math.exp(-1 / 0.5))  # by symmetry, what stays in place
    >>> math.isclose(result.transport_cost, 1 - share)
    True
    """
    where = "reference.sinkhorn"
    checks.problem(where, cost, a, b)
    eps, sides, tol, max_iter = checks.solver(where, eps, eps_scale, reach, tol, max_iter, tuple(cost.shape[:-2]))
    reach_a, reach_b = sides
    raw, (a, b) = (a, b), (_weights(a, cost, -2), _weights(b, cost, -1))
    removed = (a[..., :, None] == 0) | (b[..., None, :] == 0)
    forbidden = (cost == math.inf) & ~removed
    cost = cost.double().masked_fill(removed | forbidden, 0.0)
    empty = _empty(a, b)
    stuck = _left_without(~forbidden & ~removed, a, b, reach_a, reach_b) & ~empty
    forbidden = forbidden & ~stuck[..., None, None]  # solved without, and put to inf at the end
    # Solved all the same, with equal weights, and put to 0 at the end.
    a, b = (torch.where(empty[..., None], 1 / w.shape[-1], w) for w in (a, b))
    eps_used, eps_shown = _regularisation(cost, a, b, eps, eps_scale, reach_a or reach_b, ~forbidden)
    a, b = (
        given.double().expand_as(normal).where(~empty[..., None], 1.0).where(normal > 0, 0.0)
        if side and given is not None
        else normal
        for normal, given, side in zip((a, b), raw, (reach_a, reach_b), strict=True)
    )

    def residual(f: Tensor, g: Tensor, plan: Tensor) -> tuple[Tensor, Tensor]:
        wanted_a = a if reach_a is None else a * (-f / reach_a).exp()
        wanted_b = b if reach_b is None else b * (-g / reach_b).exp()
        return plan.sum(-1) - wanted_a, plan.sum(-2) - wanted_b

    def error_of(f: Tensor, g: Tensor) -> Tensor:
        plan = plan_of(f, g)
        rows, columns = (side.abs().sum(-1) for side in residual(f, g, plan))
        if not (reach_a or reach_b):
            return rows + columns
        gains = [1.0 if reach is None else 1 + eps_used / reach for reach in (reach_a, reach_b)]
        return (rows / gains[0] + columns / gains[1]) / plan.sum((-2, -1))

    # Differentiable in everything but the potentials, which the iterations below find without a graph.
    def plan_of(f: Tensor, g: Tensor) -> Tensor:
        outside = forbidden | removed
        apart = (f[..., :, None] + g[..., None, :] - cost).masked_fill(outside, 0.0)
        exponent = (apart / eps_used[..., None, None]).masked_fill(outside, -math.inf)
        return a[..., :, None] * b[..., None, :] * exponent.exp()

    with torch.no_grad():
        log_a, log_b, scaled = a.log()[..., :, None], b.log()[..., None, :], eps_used[..., None]
        give_a = 1.0 if reach_a is None else reach_a / (reach_a + scaled)
        give_b = 1.0 if reach_b is None else reach_b / (reach_b + scaled)
        soft_a, soft_b = (0.0 if r is None else 1 / r for r in (reach_a, reach_b))
        stiffness = soft_a + soft_b
        f, g = torch.zeros_like(a), torch.zeros_like(b)
        active = torch.ones(cost.shape[:-2], dtype=torch.bool, device=cost.device)
        n_iter = torch.zeros(cost.shape[:-2], dtype=torch.int64, device=cost.device)

        def logarithm(start: Tensor, potential: Tensor, dim: int) -> Tensor:
            """Of what one side's sums are, were the other's potential all there is."""
            exponents = start + (potential - cost) / scaled[..., None]
            return scaled * torch.logsumexp(exponents.masked_fill(forbidden, -math.inf), dim=dim)

        for _ in range(max_iter):
            f_next = -give_a * logarithm(log_b, g[..., None, :], -1)
            g_next = -give_b * logarithm(log_a, f_next[..., :, None], -2)
            if (
                stiffness
            ):  # a constant moves from f to g, so that both bent masses are equal: nothing else does, but slowly
                bent = [(w * (-p * k).exp()).sum(-1) for w, p, k in ((a, f_next, soft_a), (b, g_next, soft_b))]
                shift = ((bent[0] / bent[1]).log() / stiffness)[..., None]
                f_next, g_next = f_next + shift, g_next - shift
            f, g = torch.where(active[..., None], f_next, f), torch.where(active[..., None], g_next, g)
            n_iter += active
            active &= error_of(f, g) > tol
            if not active.any():
                break
        f, g = f.masked_fill(a == 0, 0.0), g.masked_fill(b == 0, 0.0)

    plan = plan_of(f, g)
    transport = (plan * cost).sum((-2, -1))
    if transport.requires_grad:
        soft = [0.0 if r is None else eps_used.detach()[..., None] / r for r in (reach_a, reach_b)]
        transport = transport + _through_the_plan(plan, cost, residual(f, g, plan), *soft)
    # At the optimum this value is stationary in f and g, so they need no graph.
    entropic = _dual(a, f, reach_a) + _dual(b, g, reach_b) + eps_used * (a.sum(-1) * b.sum(-1) - plan.sum((-2, -1)))
    entropic = torch.where(eps_shown > 0, entropic, transport)  # all costs equal: what eps is then does not matter
    found: Any = transport, entropic, f, g, plan.detach(), eps_shown.detach(), n_iter, error_of(f, g).detach()
    found = [t.masked_fill(_like(empty | stuck, t), 0) for t in found]
    for which in (0, 1, -1):  # both costs, and the error
        found[which] = found[which].masked_fill(stuck, math.inf)
    return SinkhornResult(*found)


def _like(which: Tensor, values: Tensor) -> Tensor:
    """Problems, with axes for what each of them has."""
    return which[(..., *[None] * (values.dim() - which.dim()))]


def _dual(weight: Tensor, potential: Tensor, reach: float | None) -> Tensor:
    """What one side's marginal condition adds to the dual value."""
    kept = potential if reach is None else -reach * torch.expm1(-potential / reach)
    return (weight * kept).sum(-1)


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
    reach: Reach = None,
    tol: float = 1e-9,
    max_iter: int = 10_000,
    reduction: str = "mean",
) -> Tensor:
    """:func:`sfr_ext.emd_l2`, with the same arguments, out of the functions above.

    The divergence is ``OT(x, y) - OT(x, x) / 2 - OT(y, y) / 2 + eps / 2 (|a| - |b|)^2`` of entropic values, all with
    the eps of ``OT(x, y)`` (Feydy et al., 2019; the last term, for masses that differ: Sejourne et al., 2019).

    >>> import torch
    >>> from sfr_ext.reference import emd_l2
    >>> x, y = torch.zeros(1, 1, 2), torch.tensor([[[3.0, 4.0]]])
    >>> emd_l2(x, y)
    tensor(5., dtype=torch.float64)
    """
    where = "reference.emd_l2"
    names = "student_feat", "teacher_feat"
    patch_size = checks.features(where, names[0], student_feat, names[1], teacher_feat, metric, patch_size)
    checks.options(where, objective, reduction)
    eps, reach, tol, max_iter = checks.solver(where, eps, eps_scale, reach, tol, max_iter)
    lead = tuple(teacher_feat.shape[: 1 + teacher_feat.dim() - student_feat.dim()])
    for name, weight, z in (
        ("student_weight", student_weight, student_feat),
        ("teacher_weight", teacher_weight, teacher_feat),
    ):
        checks.weight(where, name, weight, lead, _grid(z, student_feat.dim() == 4, patch_size))
    cost = _costs(student_feat, teacher_feat, metric, patch_size)
    a, b = _for_problems(student_weight, cost, -2), _for_problems(teacher_weight, cost, -1)
    solver: dict[str, Any] = {"reach": reach, "tol": tol, "max_iter": max_iter}
    if objective == "divergence":
        value = _divergence(student_feat, teacher_feat, cost, a, b, metric, patch_size, eps, eps_scale, solver)
    else:
        result = sinkhorn(cost, a, b, eps, eps_scale=eps_scale, **solver)
        value = {"transport": result.transport_cost, "entropic": result.entropic_cost}[objective]
    if reduction == "none":
        return value
    return value.sum() if reduction == "sum" else value.mean()


def _divergence(
    x: Tensor,
    y: Tensor,
    cost: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    metric: str,
    patch_size: int,
    eps: float,
    eps_scale: str,
    solver: dict[str, Any],
) -> Tensor:
    reach = solver.pop("reach")
    normal = _weights(a, cost, -2), _weights(b, cost, -1)
    used, shown = _regularisation(cost, *normal, eps, eps_scale, reach[0] or reach[1])

    def entropic(cost: Tensor, a: Tensor | None, b: Tensor | None, reach: Reach) -> Tensor:
        value = sinkhorn(cost, a, b, used, eps_scale="absolute", reach=reach, **solver).entropic_cost
        # Equal costs between x and y give no eps: all three plans are a b^T then.
        weight_a, weight_b = _weights(a, cost, -2), _weights(b, cost, -1)
        return torch.where(shown > 0, value, (weight_a[..., :, None] * weight_b[..., None, :] * cost).sum((-2, -1)))

    def with_itself(z: Tensor) -> Tensor:
        flat = z.flatten(0, used.dim() - 1)
        return _costs(flat, flat, metric, patch_size).unflatten(0, used.shape)

    if used.dim() == 2:  # a student for each group
        x = x[:, None].expand(*used.shape, *x.shape[1:])
    value = entropic(cost, a, b, reach)
    value = value - entropic(with_itself(x), a, a, (reach[0], reach[0])) / 2
    value = value - entropic(with_itself(y), b, b, (reach[1], reach[1])) / 2
    masses = [
        1.0 if side is None or weight is None else weight.double().where(weight > 0, 0.0).sum(-1)
        for weight, side in zip((a, b), reach, strict=True)
    ]
    return (value + used / 2 * (masses[0] - masses[1]) ** 2).masked_fill(_empty(*normal), 0.0)


def _for_problems(weight: Tensor | None, cost: Tensor, dim: int) -> Tensor | None:
    """Weights of maps or tokens, one set for all problems, for each of the batch or for each of its groups."""
    if weight is None:
        return None
    count, sets = cost.shape[dim], weight.numel() // cost.shape[dim]
    if weight.shape[0] != len(cost) or sets < len(cost):
        return weight.reshape(count)
    if sets == math.prod(cost.shape[:-2]):
        return weight.reshape(*cost.shape[:-2], count)
    return weight.reshape(len(cost), 1, count)


def _grid(z: Tensor, maps: bool, k: int) -> tuple[int, ...]:
    """Rows and columns of patches, or their number."""
    return (z.shape[-2] - k + 1, z.shape[-1] - k + 1) if maps else (z.shape[-2],)


def _patches(z: Tensor, k: int, maps: bool) -> Tensor:
    """``[..., patches, values of a patch]``."""
    z = z.double()
    if maps:
        columns = F.unfold(z.reshape(-1, *z.shape[-3:]), k).transpose(1, 2)
        return columns.reshape(*z.shape[:-3], *columns.shape[1:])
    return z


def _sqrt(z: Tensor) -> Tensor:
    """Square root with derivative 0 at 0."""
    zero = z == 0
    return torch.where(zero, 0.0, torch.where(zero, 1.0, z).sqrt())


def _unit(z: Tensor) -> Tensor:
    """Unit vectors along the last dimension; zero vectors stay 0, with derivative 0."""
    norm = _sqrt(z.square().sum(-1, keepdim=True))
    return torch.where(norm == 0, 0.0, z / torch.where(norm == 0, 1.0, norm))


def _weights(weight: Tensor | None, cost: Tensor, dim: int) -> Tensor:
    """One side's weights ``[..., N]``, summing to 1, or all 0."""
    shape = (*cost.shape[:-2], cost.shape[dim])
    if weight is None:
        return torch.full(shape, 1.0 / shape[-1], dtype=torch.float64, device=cost.device)
    weight = weight.double().expand(shape)
    # Removed patches take no part in the gradient either.
    weight = torch.where(weight > 0, weight, 0.0)
    most = weight.detach().amax(-1, keepdim=True)
    weight = weight / torch.where(most > 0, most, 1.0)  # so that the sum does not overflow
    return weight / torch.where(most > 0, weight.sum(-1, keepdim=True), 1.0)


def _left_without(allowed: Tensor, a: Tensor, b: Tensor, reach_a: float | None, reach_b: float | None) -> Tensor:
    """Where a patch has weight, but no pair, and may not be left behind."""
    rows = (a > 0) & ~allowed.any(-1) & (reach_a is None)
    columns = (b > 0) & ~allowed.any(-2) & (reach_b is None)
    return rows.any(-1) | columns.any(-1)


def _empty(a: Tensor, b: Tensor) -> Tensor:
    """Where one side has no weight at all."""
    return (a == 0).all(-1) | (b == 0).all(-1)


def _regularisation(
    cost: Tensor,
    a: Tensor,
    b: Tensor,
    eps: float | Tensor,
    eps_scale: str,
    reach: float | None,
    allowed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """eps per problem in units of the cost: the one to compute with, and the one to show."""
    if eps_scale == "absolute":
        absolute = torch.as_tensor(eps, dtype=torch.float64, device=cost.device).expand(cost.shape[:-2])
        return absolute, absolute
    product = a[..., :, None] * b[..., None, :]
    if allowed is not None:
        product = product * allowed
        product = product / product.sum((-2, -1), keepdim=True)
    mean = (product * cost).sum((-2, -1), keepdim=True)
    apart = torch.where(product > 0, cost - mean, 0.0)
    unit = apart.detach().abs().amax((-2, -1), keepdim=True)
    unit = torch.where(unit > 0, unit, 1.0)  # so that no square overflows or underflows
    std = unit[..., 0, 0] * _sqrt((product * (apart / unit).square()).sum((-2, -1)))
    # All costs equal up to rounding: every plan is optimal, and any fixed eps picks a b^T.
    flat = std <= 64 * torch.finfo(torch.float64).eps * (product * cost.abs()).sum((-2, -1))
    if reach:  # the plan's mass still depends on eps
        mean = mean.abs()[..., 0, 0]
        used = eps * torch.where(flat, torch.where(mean > 0, mean, reach), std)
        return used, used
    size = mean.detach().abs()[..., 0, 0]
    return torch.where(flat, torch.where(size > 0, size, 1.0), eps * std), torch.where(flat, 0.0, eps * std)


def _through_the_plan(
    plan: Tensor, cost: Tensor, residual: tuple[Tensor, Tensor], soft_a: Tensor | float, soft_b: Tensor | float
) -> Tensor:
    """0, with the gradient that ``<P, C>`` has through the potentials.

    The potentials are defined by ``R = (P 1 - a, P^T 1 - b) = 0``, with bent a and b on a side with a reach. With
    ``lambda`` solving ``(dR/d(f, g))^T lambda = d<P, C>/d(f, g)``, the total derivative is that of
    ``<P, C> - <lambda, R>`` at fixed potentials. Both sides carry a factor 1/eps, left out here; ``soft`` is
    eps / reach.
    """
    p, c = plan.detach(), cost.detach()
    matrix = torch.cat(
        [
            torch.cat([torch.diag_embed(p.sum(-1) * (1 + soft_a)), p], dim=-1),
            torch.cat([p.transpose(-1, -2), torch.diag_embed(p.sum(-2) * (1 + soft_b))], dim=-1),
        ],
        dim=-2,
    )
    wanted = torch.cat([(p * c).sum(-1), (p * c).sum(-2)], dim=-1)
    # Singular: a constant may move from f to g. The solution of least norm will do. The solver does not take
    # NaN; where there was one, the plan has it too, and so the result.
    solved = torch.linalg.lstsq(matrix.nan_to_num(), wanted.nan_to_num()[..., None], driver="gelsd")
    lam = solved.solution[..., 0]
    left = torch.cat(residual, dim=-1)
    return -(lam * (left - left.detach())).sum(-1)
