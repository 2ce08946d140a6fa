"""The problem behind `emd_l2`: costs of features, and optimal transport for costs or for features."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from . import checks, implicit, ops
from .result import OTResult, of_exact, of_sinkhorn
from .versions import Inputs, wants_gradient

Reach = float | tuple[float | None, float | None] | None


def cost_matrix(x: Tensor, y: Tensor, *, metric: str = "l2", patch_size: int = 1) -> Tensor:
    r"""Ground cost between every patch of ``x`` and every patch of ``y``; differentiable in both.

    ``"l2"``: :math:`|x_i - y_j|`, with subgradient 0 where they coincide. ``"sqeuclidean"``: its square.
    ``"cosine"``: :math:`1 - x_i \cdot y_j / (|x_i| |y_j|)`, and 1 with gradient 0 where either is 0. ``"l1"``:
    :math:`\sum_c |x_{ic} - y_{jc}|`, with subgradient 0 where two values coincide. Distances are summed from direct
    differences; on a GPU, and on some processors, those of 32 channels or more, computed in float32, from
    ``|x|^2 + |y|^2 - 2 x.y`` of centred features, and where that cancels from differences all the same.

    A cost that is not finite, because a feature is not or squares leave the type, has the gradient NaN in all channels
    of both patches. Where the gradient that comes for a cost is 0, nothing is added to theirs, whatever they hold.

    Args:
        x: ``[B, C, H, W]`` (any strides, read in place) or tokens ``[B, N, C]``; float16, bfloat16, float32, float64.
        y: the same kind, ``[B, C, H', W']`` or ``[B, M, C]``, or with groups ``[B, G, C, H', W']``, ``[B, G, M, C]``.
        metric: ``"l2"`` | ``"sqeuclidean"`` | ``"cosine"`` | ``"l1"``.
        patch_size: ``k > 1``: a patch is a ``k x k`` neighbourhood as ``F.unfold`` would cut it (valid windows).

    Returns:
        ``[B, N, M]`` (``[B, G, N, M]`` with groups), ``N = (H - k + 1)(W - k + 1)``; float32, or float64 if an
        input is.

    Raises:
        TypeError: an argument is of the wrong kind or type.
        ValueError: shapes do not fit, or an option is none of those listed.

    >>> import torch
    >>> from sfr_ext import cost_matrix
    >>> cost_matrix(torch.tensor([[[0., 0.], [3., 4.]]]), torch.tensor([[[0., 0.]]]))
    tensor([[[0.],
             [5.]]])
    """
    patch_size = checks.features("cost_matrix", "x", x, "y", y, metric, patch_size)
    return ops.cost_forward(x, y, *ground(metric, patch_size))


def solve(
    cost: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    solver: str = "sinkhorn",
    eps: float = 0.05,
    eps_scale: str = "std",
    reach: Reach = None,
    tol: float = 1e-4,
    max_iter: int = 1000,
    init: tuple[Tensor, Tensor] | None = None,
) -> OTResult:
    r"""Optimal transport for given costs, entropic or exact, one problem per leading index.

    .. math:: \min_P \langle P, C \rangle + \varepsilon\,\mathrm{KL}(P \,|\, a b^T), \quad P 1 = a,\ P^T 1 = b

    by over-relaxed Sinkhorn iterations (Cuturi 2013; relaxation: Thibault et al. 2021), at larger eps first, then
    Newton steps near the solution, with per-problem stopping. Or exactly, without the second term:
    ``solver="exact"``. With a ``reach`` :math:`\rho`, marginals need not be met, and what they lack has a price
    (unbalanced transport; Chizat et al. 2018, Sejourne et al. 2019):

    .. math:: \min_P \langle P, C \rangle + \varepsilon\,\mathrm{KL}(P \,|\, a b^T)
              + \rho_a\,\mathrm{KL}(P 1 \,|\, a) + \rho_b\,\mathrm{KL}(P^T 1 \,|\, b),
              \quad P 1 = a\, e^{-f / \rho_a},\ P^T 1 = b\, e^{-g / \rho_b}

    Args:
        cost: ``[..., N, M]``; float16, bfloat16, float32, float64; any strides. +inf forbids a pair: nothing is moved
            there. A problem without a plan has the value inf, gradient 0 and ``converged = False``; one with NaN or
            -inf has NaN.
        a: ``[..., N]`` weights, floating-point, integer or bool, normalised to sum to 1 unless their side has a reach;
            0 removes the patch; default uniform, ``1 / N``. A problem with all of a side removed is empty: its value,
            gradients, plan, potentials and marginal error are 0.
        b: ``[..., M]``, likewise. The leading axes of ``cost``, ``a`` and ``b`` broadcast; what is shared by several
            problems, such as one cost ``[N, M]`` between classes, is not copied. (One leading axis beside two equal
            ones of ``cost`` could mean either, and is refused.)
        solver: ``"sinkhorn"``: as above. ``"exact"``: an optimal vertex and its dual variables, to the rounding of
            float64. Both costs are then the earth mover's distance; their gradient is the plan for ``cost`` and the
            dual variables for the weights (where several are optimal, those of one). Of the options below ``reach``
            applies, in its own way, and ``tol``, in ``converged`` alone.
        eps: regularisation, in units that ``eps_scale`` says. Kept within what the type can tell apart: not above
            65536 times (float64: 2^30) what costs differ by or a reach, where the plan is that of an infinite one, and
            not so small that rounding of the potentials is all there is. `OTResult` says which eps it was.
        eps_scale: ``"std"``: standard deviations of the costs under ``a (x) b``, problem by problem; gradients include
            this dependence. ``"absolute"``: units of the cost.
        reach: what leaving mass behind costs, in units of the cost (``rho`` of POT and OTT-JAX; GeomLoss's ``reach``
            for ``p=1``, its square for ``p=2``): mass further away than this mostly stays. None: balanced.
            A pair: one for each side, such as ``(None, 0.5)``. For ``solver="exact"`` a price of each unit, not the
            limit of the above: ``min <P, C> + reach_a / 2 (|a| - |P|) + reach_b / 2 (|b| - |P|)`` over ``P 1 <= a``,
            ``P^T 1 <= b``, where nothing may be left on a side without a reach. A pair that costs more than
            ``(reach_a + reach_b) / 2`` is never matched; ``f <= reach_a / 2``, ``g <= reach_b / 2``.
        tol: stop when ``|P 1 - a|_1 + |P^T 1 - b|_1 <= tol``. With a reach, the marginals that it bends stand for ``a``
            and ``b``; the distance of a side is divided by ``1 + eps / reach``, which is how much faster than the plan
            they move; and the sum is in units of the plan's mass. Where weights want a gradient, which is made of the
            potentials, a problem is solved nearly to rounding (1e-6, or 1e-13 in float64).
        max_iter: iterations at most. A problem stopped by it has ``converged = False``.
        init: potentials ``(f, g)`` to start from, as an `OTResult` gave them. (``f`` follows from ``g`` in half an
            iteration.)

    Returns:
        `OTResult`; both costs and the plan are differentiable in ``cost``, ``a`` and ``b``. A patch of weight 0 gets no
        gradient.

    Raises:
        TypeError: an argument is of the wrong kind or type.
        ValueError: shapes do not fit, an option is out of range, tensors are on different devices, or weights are
            negative or not finite (on a GPU, where looking would make it wait, such a problem gives NaN).

    >>> import torch
    >>> from sfr_ext import solve
    >>> result = solve(torch.tensor([[0., 1.], [1., 0.]]), eps=0.1)
    >>> round(result.transport_cost.item(), 6), result.plan.shape, result.converged.item()
    (0.0, torch.Size([2, 2]), True)
    >>> left_over = solve(torch.tensor([[0., 9.], [9., 5.]]), solver="exact", reach=2.0)   # 5 is too dear
    >>> left_over.plan, left_over.transport_cost                                          # 0.5 left on either side
    (tensor([[0.5000, 0.0000],
            [0.0000, 0.0000]]), tensor(1.))
    """
    where = "solve"
    checks.tensor(where, "cost", cost)
    if cost.dim() < 2 or cost.shape[-1] == 0 or cost.shape[-2] == 0:
        checks.refuse(ValueError, where, "cost", "of shape [..., N, M] with N, M at least 1", checks.shape_of(cost))
    options = checks.solver_options(where, solver, eps, eps_scale, reach, tol, max_iter)
    lead, (n, m) = tuple(cost.shape[:-2]), tuple(cost.shape[-2:])
    lead = checks.side(where, "a", a, lead, n, cost)
    lead = checks.side(where, "b", b, lead, m, cost)
    inputs = Inputs(cost=cost, a=a, b=b)

    def broadcast(cost: Tensor, a: Tensor | None, b: Tensor | None) -> ops.Given:
        return ops.Given(cost.expand(*lead, n, m), _shared(a, lead, n, cost), _shared(b, lead, m, cost))

    rounding = max(_rounding(a), _rounding(b))
    cost, a, b = broadcast(cost, a, b)
    init_g = None
    if init is not None:
        checks.potentials(where, init, (*lead, n), (*lead, m), cost)
        init_g = init[1].to(ops.compute_dtype(cost))
    given, grids = (_four_axes(cost, 2), _four_axes(a, 1), _four_axes(b, 1)), ((n,), (m,))
    if solver == "exact":
        exact = ops.ExactSolved(*ops.exact_forward(*given, *prices(options)._replace(rounding=rounding), where))
        return of_exact(exact, lead, options, inputs, lambda *now: broadcast(*now)[1:], grids)
    finer = as_weights_want(options, a, b, ops.compute_dtype(cost))
    solved = ops.Solved(*ops.sinkhorn_forward(*given, init_g, *finer, where))
    return of_sinkhorn(solved, options, inputs, broadcast, grids, lead)


def as_weights_want(
    options: ops.SolverOptions, a: Tensor | None, b: Tensor | None, compute: torch.dtype
) -> ops.SolverOptions:
    """Options for problems whose weights may want a gradient.

    It is made of the potentials. Where parts of both sides match each other and hardly anything else, as happens with
    as many patches on both and equal weights, so little of the plan holds the potentials of different parts together
    that they are far off when the marginals are not. The plan and gradients of costs are not concerned.
    """
    wanted = torch.is_grad_enabled() and any(w is not None and wants_gradient(w) for w in (a, b))
    return options._replace(tol=min(options.tol, ops.FINEST[compute])) if wanted else options


def prices(options: ops.SolverOptions, features: bool = False) -> ops.ExactOptions:
    """Of mass left behind, for the exact solver: half of a side's reach."""
    price_a, price_b = (reach / 2 if reach else math.inf for reach in (options.reach_a, options.reach_b))
    return ops.ExactOptions(price_a, price_b, features)


def _rounding(weight: Tensor | None) -> float:
    """Of sums of weights, in 64ths of what they may differ by: of half types, whose unit is large, 4 units."""
    if weight is None or not weight.is_floating_point():
        return 0.0
    unit = torch.finfo(weight.dtype).eps
    return unit / 16 if weight.itemsize == 2 else unit


def _shared(weight: Tensor | None, lead: tuple[int, ...], n: int, cost: Tensor) -> Tensor | None:
    """Weights ``[..., N]`` broadcast to the problems, without a copy."""
    return None if weight is None else weight.to(ops.compute_dtype(cost)).expand(*lead, n)


def _four_axes(value: Any, own: int) -> Any:
    """``[..., own axes]`` as ``[B, G, own axes]``; a copy only where three or more leading axes do not fold."""
    if value is None:
        return None
    lead, tail = value.shape[:-own], value.shape[-own:]
    if len(lead) == 2:
        return value
    if len(lead) <= 1:
        return value.reshape(*lead, *[1] * (2 - len(lead)), *tail)
    return value.reshape(lead[0], -1 if lead[0] else 1, *tail)


def solve_sample(
    x: Tensor,
    y: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    metric: str = "l2",
    patch_size: int = 1,
    solver: str = "sinkhorn",
    eps: float = 0.05,
    eps_scale: str = "std",
    reach: Reach = None,
    tol: float = 1e-4,
    max_iter: int = 1000,
    init: tuple[Tensor, Tensor] | None = None,
) -> OTResult:
    """`solve` on ``cost_matrix(x, y)`` in one pass, without that matrix in memory but for the problem that a thread is
    at. It is kept for backward only where it takes at most a tenth of the bytes of both features; ``"exact"`` makes it
    on a GPU, for windows and for the cosine.

    Args:
        x, y, metric, patch_size: as in `cost_matrix`.
        a: ``[B, N]`` or ``[B, H, W]``; b: ``[B, M]`` or ``[B, H', W']``; each also one per group, ``[B, G, ...]``, or
            one for the whole batch, ``[N]`` or ``[H, W]``.
        solver, eps, eps_scale, reach, tol, max_iter, init: as in `solve`.

    Returns:
        `OTResult` of shape ``[B]`` (``[B, G]`` with groups), differentiable in ``x``, ``y``, ``a`` and ``b``. Only
        its ``plan``, and second derivatives, need the matrix, and recompute it.

    Raises:
        TypeError, ValueError: as in `cost_matrix` and `solve`.

    >>> import torch
    >>> from sfr_ext import solve_sample
    >>> x = torch.randn(2, 8, 7, 7)
    >>> result = solve_sample(x, x.roll(1, -1))
    >>> result.transport_cost.shape, result.plan.shape, result.f.shape
    (torch.Size([2]), torch.Size([2, 49, 49]), torch.Size([2, 49]))
    """
    where = "solve_sample"
    patch_size = checks.features(where, "x", x, "y", y, metric, patch_size)

    def paired(x: Tensor, y: Tensor, a: Tensor | None, b: Tensor | None) -> ops.Pair:
        return ops.Pair(x, y, *weights_of(where, ("a", a), ("b", b), x, y, patch_size))

    pair, inputs = paired(x, y, a, b), Inputs(x=x, y=y, a=a, b=b)
    options = checks.solver_options(where, solver, eps, eps_scale, reach, tol, max_iter)
    grids, costs = ops.patch_grids(x, y, patch_size), ground(metric, patch_size)
    if solver == "exact":
        if init is not None:  # refused or not as for the other solver, though of no use
            checked_init(where, init, pair, costs)
        exact = exact_between(where, pair, costs, options)
        return of_exact(exact, ops.problems(x, y), options, inputs, lambda *now: paired(*now)[2:], grids)

    def as_solved(*now: Any) -> ops.Given:
        pair = paired(*now)
        return ops.Given(costs_between(pair, costs), pair.a, pair.b)

    solved, lead = solved_between(where, pair, costs, options, init), ops.problems(x, y)
    return of_sinkhorn(solved, options, inputs, as_solved, grids, lead)


def ground(metric: str, patch_size: int) -> ops.Ground:
    return ops.Ground(ops.METRICS[metric], patch_size)


def weights_of(
    where: str, a: tuple[str, Any], b: tuple[str, Any], x: Tensor, y: Tensor, patch_size: int
) -> tuple[Tensor | None, Tensor | None]:
    if a[1] is None and b[1] is None:
        return None, None
    lead, grids = ops.problems(x, y), ops.patch_grids(x, y, patch_size)
    return checks.weight(where, *a, lead, grids[0], (x, y)), checks.weight(where, *b, lead, grids[1], (x, y))


def costs_between(pair: ops.Pair, costs: ops.Ground) -> Tensor:
    """Costs of features, differentiable."""
    metric = ops.METRIC_NAMES[costs.metric]
    return implicit.costs(*pair, metric, costs.patch_size, cost_matrix)


def exact_between(where: str, pair: ops.Pair, costs: ops.Ground, options: ops.SolverOptions) -> ops.ExactSolved:
    """What `ops.exact_forward` returns for features."""
    if ops.exact_in_one_pass(pair.x, costs):
        return ops.ExactSolved(*ops.exact_emd_forward(*pair, *costs, *prices(options, features=True), where))
    cost = costs_between(pair, costs)
    given = ops.Given(cost if cost.dim() == 4 else cost.unsqueeze(1), pair.a, pair.b)
    return ops.ExactSolved(*ops.exact_forward(*given, *prices(options, features=True), where))


def checked_init(where: str, init: Any, pair: ops.Pair, costs: ops.Ground) -> Tensor:
    """The teacher's of the potentials ``init=(f, g)``."""
    n, m = map(math.prod, ops.patch_grids(pair.x, pair.y, costs.patch_size))
    lead = ops.problems(pair.x, pair.y)
    checks.potentials(where, init, (*lead, n), (*lead, m), pair.x)
    g: Tensor = init[1]
    return g.to(ops.compute_dtype(pair.x, pair.y))


def solved_between(
    where: str,
    pair: ops.Pair,
    costs: ops.Ground,
    options: ops.SolverOptions,
    init: tuple[Tensor, Tensor] | None = None,
) -> ops.Solved:
    """What `ops.emd_forward` returns for features."""
    init_g = None if init is None else checked_init(where, init, pair, costs)
    options = as_weights_of_pair_want(options, pair)
    return ops.Solved(*ops.emd_forward(*pair, init_g, *costs, *options, where)[:-1])


def value_between(where: str, pair: ops.Pair, costs: ops.Ground, options: ops.SolverOptions, objective: str) -> Tensor:
    """What `ops.emd_value` returns for features."""
    which = ops.Solved._fields.index(objective)
    return ops.emd_value(pair, costs, as_weights_of_pair_want(options, pair), where, which)


def as_weights_of_pair_want(options: ops.SolverOptions, pair: ops.Pair) -> ops.SolverOptions:
    if pair.a is None and pair.b is None:
        return options
    return as_weights_want(options, pair.a, pair.b, ops.compute_dtype(pair.x, pair.y))
