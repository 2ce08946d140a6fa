r"""A solved problem as a function of its costs and weights, in plain torch, differentiable as often as one likes.

The kernels return potentials. Here the scalings :math:`p = f/\varepsilon + \ln a`, :math:`q = g/\varepsilon + \ln b`
are made functions of everything they were solved from (implicit function theorem); plan and values follow by ordinary
operations, so that their derivatives of any order are torch's:

.. math:: P = \exp(p_i + q_j - Z_{ij}), \quad Z = C / \varepsilon, \qquad
          \ln (P 1) + s_a p = (1 + s_a) \ln a, \quad \ln (P^T 1) + s_b q = (1 + s_b) \ln b

with :math:`s = \varepsilon / \mathrm{reach}`, and 0 where a marginal is met. With :math:`r = P 1`, :math:`c = P^T 1`,

.. math:: \begin{pmatrix} (1 + s_a)\,\mathrm{diag}(r) & P \\ P^T & (1 + s_b)\,\mathrm{diag}(c) \end{pmatrix}
          \begin{pmatrix} \alpha \\ \beta \end{pmatrix} = \begin{pmatrix} \bar p \\ \bar q \end{pmatrix}
          \quad\Rightarrow\quad \bar Z = P * (\alpha_i + \beta_j)

turns gradients of the scalings into those of the costs. This is for what is asked for now and then (plans that a loss
looks at, second derivatives): float64, dense, O(N M min(N, M)). First derivatives of the values are the kernels'.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

CostMatrix = Callable[..., Tensor]


class Problem(Protocol):
    """How a problem was regularised: what `SolverOptions` says of it."""

    @property
    def eps(self) -> float: ...
    @property
    def relative(self) -> bool: ...
    @property
    def reach_a(self) -> float: ...
    @property
    def reach_b(self) -> float: ...


class Solution(NamedTuple):
    """Float64, one entry per problem; the potentials are those of the costs as they are, and 0 at removed patches."""

    plan: Tensor  # [..., N, M]
    f: Tensor  # [..., N]
    g: Tensor  # [..., M]
    eps: Tensor  # [...]
    a: Tensor  # [..., N]  as the solver saw them: normalised unless the side has a reach
    b: Tensor  # [..., M]
    kept: Tensor  # [..., N, M]  pairs that may be matched


def solution(
    cost: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    solved: tuple[Tensor, ...],
    problem: Problem,
    converged: Tensor | None = None,
) -> Solution:
    """What the kernels solved, as a function of costs ``[..., N, M]`` and weights.

    Args:
        cost: as it was given; what stands at removed patches is not looked at.
        a: ``[..., N]``, or without the axis of the groups; b likewise.
        solved: ``(f, g, eps, centre, shift)`` as the operator returned them.
        converged: where potentials may be moved on to where the marginals of the plan are met: rounded to float32,
            they make one that is further off than what the kernels saw.
    """
    f, g, eps, centre, shift = (t.detach().double() for t in solved)
    infeasible = centre == math.inf
    centre = centre.masked_fill(infeasible, 0.0)
    a, b = marginal(a, f, problem.reach_a), marginal(b, g, problem.reach_b)
    kept = (a > 0)[..., :, None] & (b > 0)[..., None, :]
    kept = kept & (cost != math.inf) & ~infeasible[..., None, None]
    cost = torch.where(kept, cost.double(), centre[..., None, None])
    flat = eps == 0
    eps = torch.where(flat, 1.0, eps)
    if problem.relative:
        # The solver's own number, with the derivative of the standard deviation; of equal costs, under a reach, with
        # that of their size.
        scaled, mean = _deviation(cost, kept, a, b)
        size = mean.abs()
        # To the solver, which says so by the eps it took. (Of no axis, vmap over nothing fails.)
        used, little = eps[..., None] / problem.eps, 1e-3 * size[..., None]
        equal = (scaled[..., None] < little) & ((used - size[..., None]).abs() < little)
        scaled = torch.where(equal[..., 0], size, scaled)
        eps = torch.where(flat | (scaled == 0), eps, eps * (scaled / torch.where(scaled > 0, scaled, 1.0).detach()))
    per_side, per_pair = eps[..., None], eps[..., None, None]
    # The potentials that were returned are those of the centred costs, and so are these scalings.
    exponent = torch.where(flat[..., None, None], 0.0, (cost - centre[..., None, None]) / per_pair)
    log_a, log_b = _log(a), _log(b)
    # Where all costs are equal potentials hold their mean, and the plan is that of the weights.
    mean_f, mean_g = (torch.where(flat[..., None], h, 0.0).detach() for h in (f, g))
    with torch.no_grad():
        p, q = (f - mean_f) / per_side + log_a, (g - mean_g) / per_side + log_b
    half, shift = centre[..., None] / 2, shift[..., None]
    centre_f, centre_g = half + shift, half - shift
    s_a, s_b = (per_side / reach if reach else None for reach in (problem.reach_a, problem.reach_b))
    target_p = log_a if s_a is None else (1 + s_a) * log_a - centre_f / problem.reach_a
    target_q = log_b if s_b is None else (1 + s_b) * log_b - centre_g / problem.reach_b
    system = exponent, target_p, target_q, s_a, s_b, kept
    if converged is not None:
        p, q = _settled(*system, p, q, converged)
    p, q = _Scalings.apply(*system, p, q)
    plan = _plan(p, q, exponent, kept)
    f = torch.where(a > 0, per_side * (p - log_a) + centre_f + mean_f, 0.0)
    g = torch.where(b > 0, per_side * (q - log_b) + centre_g + mean_g, 0.0)
    return Solution(plan, f, g, eps, a, b, kept)


def values(
    cost: Tensor, a: Tensor | None, b: Tensor | None, solved: tuple[Tensor, ...], problem: Problem
) -> tuple[Tensor, Tensor]:
    """(transport, entropic) of csrc/contracts/sinkhorn.h, ``[...]``, as `solution` takes its arguments."""
    plan, f, g, eps, a, b, _ = solution(cost, a, b, solved, problem)
    transport = (plan * torch.where(plan > 0, cost.double(), 0.0)).sum((-2, -1))
    slack = a.sum(-1) * b.sum(-1) - plan.sum((-2, -1))
    entropic = _dual(a, f, problem.reach_a) + _dual(b, g, problem.reach_b) + eps * slack
    if problem.reach_a or problem.reach_b:
        return transport, entropic
    return transport, torch.where(solved[2] == 0, transport, entropic)  # eps: of equal costs


def costs(
    x: Tensor, y: Tensor, a: Tensor | None, b: Tensor | None, metric: str, patch_size: int, matrix: CostMatrix
) -> Tensor:
    """Costs of features, by a function such as `sfr_ext.cost_matrix`, with other pixels in place of those that no kept
    patch has: 0, or, of the teacher, what the first kept patch has, from which distances may count
    (csrc/ground/products.h). Of an empty problem no patch is kept.

    Nothing follows from those, but a gradient of 0 times a NaN would be NaN.
    """
    if a is not None or b is not None:
        tokens = x.dim() == 3
        kept_a, kept_b = _kept_patches(a, b)
        x, y = _kept(x, kept_a, patch_size, tokens), _kept(y, kept_b, patch_size, tokens, like_first=patch_size == 1)
    return matrix(x, y, metric=metric, patch_size=patch_size)


def _kept_patches(a: Tensor | None, b: Tensor | None) -> tuple[Tensor, Tensor]:
    """Of both sides, ``[..., N]`` and ``[..., M]``; ``[..., 1]`` for all patches of a side without weights."""
    some = [w.amax(-1, keepdim=True) > 0 for w in (a, b) if w is not None]
    lead = max(s.dim() for s in some)

    def in_all_groups(t: Tensor) -> Tensor:
        return t if t.dim() == lead else t.unsqueeze(-2)

    full = functools.reduce(torch.logical_and, map(in_all_groups, some))
    kept_a, kept_b = (full if w is None else full & in_all_groups(w > 0) for w in (a, b))
    return kept_a, kept_b


def _kept(features: Tensor, kept: Tensor, patch_size: int, tokens: bool, like_first: bool = False) -> Tensor:
    own = 2 if tokens else 3  # axes of a patch's position and its channels
    while kept.dim() > features.dim() - own + 1:  # one student for several groups
        kept = kept.any(-2)
    while kept.dim() < features.dim() - own + 1:
        kept = kept.unsqueeze(-2)
    if like_first:
        pixels = features if tokens else features.flatten(-2).mT
        filled = torch.where(kept[..., None], pixels, _first(pixels.detach(), kept))
        return filled if tokens else filled.mT.unflatten(-1, features.shape[-2:])
    if tokens:
        return torch.where(kept[..., None], features, 0)
    grid = [size - patch_size + 1 for size in features.shape[-2:]]
    kept = kept.expand(*kept.shape[:-1], math.prod(grid)).unflatten(-1, grid)
    covering = F.pad(kept.to(torch.float32), [patch_size - 1] * 4)
    covered = F.max_pool2d(covering.flatten(0, -3)[:, None], patch_size, stride=1) > 0
    return torch.where(covered.view(*kept.shape[:-2], 1, *features.shape[-2:]), features, 0)


def _first(pixels: Tensor, kept: Tensor) -> Tensor:
    """The first of the pixels ``[..., M, C]`` that is kept, ``[..., 1, C]``; 0 where none is."""
    place = kept.to(torch.uint8).argmax(-1).expand(pixels.shape[:-2])
    first = pixels.gather(-2, place[..., None, None].expand(*pixels.shape[:-2], 1, pixels.shape[-1]))
    return torch.where(kept.any(-1)[..., None, None], first, 0)


def _dual(weight: Tensor, potential: Tensor, reach: float) -> Tensor:
    if reach:
        potential = -reach * torch.expm1(-potential / reach)
    return (weight * potential).sum(-1)


def total(weight: Tensor) -> Tensor:
    """Over the patches: on the CPU in their order, so that patches of weight 0 between them change no bit."""
    return weight.cumsum(-1)[..., -1] if weight.device.type == "cpu" else weight.sum(-1)


def marginal(weight: Tensor | None, potential: Tensor, reach: float = 0.0) -> Tensor:
    """Weights of every problem, in shape and type of its potential; with a reach they are not normalised.

    As the kernels read them: in units of the largest, so that no sum overflows, and 0 where that is too small for the
    weights' type. All of them 0 in an empty problem.
    """
    if weight is None:
        return torch.full_like(potential, 1 / potential.shape[-1])
    least = torch.finfo(weight.dtype).tiny
    weight = weight.to(potential.dtype)
    most = weight.detach().amax(-1, keepdim=True)
    unit = weight / torch.where(most > 0, most, 1.0)
    kept = ~(unit < least)  # which a NaN is
    if reach:
        weight = torch.where(kept, weight, 0.0)
    else:
        unit = torch.where(kept, unit, 0.0)
        weight = unit / torch.where(most > 0, total(unit)[..., None], 1.0)
    return (weight if weight.dim() == potential.dim() else weight.unsqueeze(-2)).expand_as(potential)


def _log(weight: Tensor) -> Tensor:
    """Logarithm, and 0 with derivative 0 at a removed patch."""
    return torch.where(weight > 0, weight, 1.0).log()


def _deviation(cost: Tensor, kept: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Standard deviation of the costs under a (x) b on pairs that are kept; derivative 0 where they are all equal. And
    their mean.

    In units of the largest distance from the mean, so that no square overflows or underflows.
    """
    product = torch.where(kept, a[..., :, None] * b[..., None, :], 0.0)
    total = product.sum((-2, -1), keepdim=True)
    product = product / torch.where(total > 0, total, 1.0)
    mean = (product * cost).sum((-2, -1), keepdim=True)
    apart = torch.where(product > 0, cost - mean, 0.0)
    unit = apart.detach().abs().amax((-2, -1), keepdim=True)
    unit = torch.where(unit > 0, unit, 1.0)
    variance = (product * (apart / unit).square()).sum((-2, -1))
    deviation = unit[..., 0, 0] * torch.where(variance > 0, torch.where(variance > 0, variance, 1.0).sqrt(), 0.0)
    return deviation, mean[..., 0, 0]


def _plan(p: Tensor, q: Tensor, exponent: Tensor, kept: Tensor) -> Tensor:
    # Of a pair that is not kept the exponential may be inf, of which backward would make NaN.
    return torch.where(kept, p[..., :, None] + q[..., None, :] - exponent, -math.inf).exp()


@torch.no_grad()
def _settled(
    exponent: Tensor,
    target_p: Tensor,
    target_q: Tensor,
    s_a: Tensor | None,
    s_b: Tensor | None,
    kept: Tensor,
    p: Tensor,
    q: Tensor,
    where: Tensor,
) -> tuple[Tensor, Tensor]:
    """Two of Sinkhorn's iterations in the log domain, of the problems `where`; the rest as `_Scalings` takes it."""

    def update(x: Tensor, entries: Tensor, axis: int, target: Tensor, s: Tensor | None) -> Tensor:
        log_sum = torch.where(kept, entries, -math.inf).logsumexp(axis)
        found = target - log_sum if s is None else (target - log_sum) / (1 + s)
        return torch.where(where[..., None] & log_sum.isfinite(), found, x)

    for _ in range(2):
        p = update(p, q[..., None, :] - exponent, -1, target_p, s_a)
        q = update(q, p[..., :, None] - exponent, -2, target_q, s_b)
    return p, q


class _Scalings(torch.autograd.Function):
    """The scalings ``p``, ``q`` as a function of everything else: that is, what was found, with its derivative."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        exponent: Tensor,
        target_p: Tensor,
        target_q: Tensor,
        s_a: Tensor | None,
        s_b: Tensor | None,
        kept: Tensor,
        p: Tensor,
        q: Tensor,
    ) -> tuple[Tensor, Tensor]:
        return p.clone(), q.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        exponent, _, _, s_a, s_b, kept, _, _ = inputs
        ctx.save_for_backward(exponent, s_a, s_b, kept, *output)

    @staticmethod
    def backward(ctx: Any, grad_p: Tensor, grad_q: Tensor) -> tuple[Tensor | None, ...]:
        exponent, s_a, s_b, kept, p, q = ctx.saved_tensors
        plan = _plan(p, q, exponent, kept)
        alpha, beta = _solve(plan, s_a, s_b, grad_p, grad_q)
        target_p, target_q = plan.sum(-1) * alpha, plan.sum(-2) * beta
        return (
            plan * (alpha[..., :, None] + beta[..., None, :]),
            target_p,
            target_q,
            None if s_a is None else -(target_p * p).sum(-1, keepdim=True),
            None if s_b is None else -(target_q * q).sum(-1, keepdim=True),
            None,
            None,
            None,
        )


def _solve(
    plan: Tensor, s_a: Tensor | None, s_b: Tensor | None, right_a: Tensor, right_b: Tensor
) -> tuple[Tensor, Tensor]:
    """The system above, by the Cholesky factors of the smaller side's Schur complement."""
    n, m = plan.shape[-2:]
    if n < m:
        beta, alpha = _solve(plan.mT, s_b, s_a, right_b, right_a)
        return alpha, beta
    rows, columns = plan.sum(-1), plan.sum(-2)
    root_a = _root(rows if s_a is None else (1 + s_a) * rows)
    root_b = _root(columns if s_b is None else (1 + s_b) * columns)
    between = plan / (root_a[..., :, None] * root_b[..., None, :])
    right_a, right_b = right_a / root_a, right_b / root_b
    right = right_b - (between.mT @ right_a[..., None])[..., 0]
    # A constant that moves from one side to the other changes nothing, or with a reach next to nothing: it is fixed.
    constant = torch.where(columns > 0, root_b, 0.0)
    length = constant.square().sum(-1, keepdim=True).sqrt()
    constant = constant / torch.where(length > 0, length, 1.0)
    schur = (1 + _ridge(s_a, s_b, m)) * torch.eye(m, dtype=plan.dtype, device=plan.device) - between.mT @ between
    schur = schur + constant[..., :, None] * constant[..., None, :]
    factor = torch.linalg.cholesky_ex(schur).L

    def solved(right_a: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        beta = torch.cholesky_solve(right[..., None], factor)[..., 0]
        alpha = right_a - (between @ beta[..., None])[..., 0]
        return alpha / root_a, beta / root_b

    if s_a is None and s_b is None:  # nothing asks for it
        return solved(right_a, right - constant * (constant * right).sum(-1, keepdim=True))

    def missing(alpha: Tensor, beta: Tensor) -> Tensor:
        """s_a r.alpha - s_b c.beta, the sum of the rows' equations less that of the columns'."""
        of_rows, of_columns = (rows * alpha).sum(-1, keepdim=True), (columns * beta).sum(-1, keepdim=True)
        return (0 if s_a is None else s_a) * of_rows - (0 if s_b is None else s_b) * of_columns

    # With a reach, the sum of all equations says how much of it there is, which the matrix hardly does.
    alpha, beta = solved(right_a, right)
    alpha_moved, beta_moved = solved(torch.zeros_like(right_a), constant)
    of_rows = torch.where(rows > 0, right_a * root_a, 0.0)
    of_columns = torch.where(columns > 0, right_b * root_b, 0.0)
    wanted = of_rows.sum(-1, keepdim=True) - of_columns.sum(-1, keepdim=True)
    # Those of the plan's entries add up to the same on both sides: what rounding makes of that says nothing.
    size = of_rows.abs().sum(-1, keepdim=True) + of_columns.abs().sum(-1, keepdim=True)
    wanted = torch.where(wanted.abs() > 32 * torch.finfo(plan.dtype).eps * size, wanted, 0.0)
    of_moved = missing(alpha_moved, beta_moved)
    moved = (wanted - missing(alpha, beta)) / torch.where(of_moved != 0, of_moved, 1.0)
    return alpha + moved * alpha_moved, beta + moved * beta_moved


def _ridge(s_a: Tensor | None, s_b: Tensor | None, size: int) -> Tensor | float:
    """What is added to a matrix whose eigenvalues lie in [0, 1]: parts of a plan that exchange no mass make some of
    them 0, and the gradient has no component there; or, with a reach, about ``s_a + s_b``."""
    least, most = 1e-15 * size, 1e-12
    sides = [s for s in (s_a, s_b) if s is not None]
    return (1e-6 * torch.stack(sides).sum(0)[..., None]).clamp(min(least, most), most) if sides else most


def _root(sums: Tensor) -> Tensor:
    """Square root, and 1 for a removed patch."""
    return torch.where(sums > 0, sums, 1.0).sqrt()
