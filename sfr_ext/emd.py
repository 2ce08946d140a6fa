"""The public functions: ``emd_l2`` and its module, and the problem behind them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import checks, ops


class ConvergenceWarning(UserWarning):
    """`emd_l2` stopped at ``max_iter`` before a problem's marginals were within ``tol``."""


_warn = False


def warn_on_nonconvergence(enabled: bool = True) -> None:
    """Make `emd_l2` warn (`ConvergenceWarning`, once per call site) when a problem did not converge.

    Off by default, because looking at the result would make a GPU wait. Inside ``torch.compile`` it never warns.
    Independent of this, `OTResult.converged` always tells.

    >>> import torch
    >>> warn_on_nonconvergence()
    >>> with warnings.catch_warnings(record=True) as caught:
    ...     _ = emd_l2(torch.randn(1, 9, 4), torch.randn(1, 9, 4), max_iter=1, tol=1e-6)
    >>> caught[0].category.__name__
    'ConvergenceWarning'
    >>> warn_on_nonconvergence(False)
    """
    global _warn
    _warn = enabled


class OTResult:
    """Solved transport problems, one per entry of ``[B]`` (``[B, G]`` with groups).

    Attributes:
        transport_cost: ``<P, C>``, differentiable.
        entropic_cost: ``<P, C> + eps KL(P | a b^T)``, differentiable. Computed as ``<a, f> + <b, g>``.
        f: ``[..., N]`` potential of the student's side, in units of the cost. Without meaning at removed patches.
        g: ``[..., M]`` potential of the teacher's side. Only the sum ``f_i + g_j`` is determined.
        eps: regularisation used, in units of the cost.
        n_iter: iterations that each problem took: updates of both potentials, or steps of the conjugate gradients
            inside a Newton step, which cost as much.
        marginal_error: ``|P 1 - a|_1 + |P^T 1 - b|_1``, with ``a`` and ``b`` summing to 1.
        converged: ``marginal_error <= tol``.
    """

    def __init__(
        self,
        solved: tuple[Tensor, ...],
        cost: Callable[[], Tensor],
        a: Tensor | None,
        b: Tensor | None,
        tol: float,
    ) -> None:
        self.transport_cost, self.entropic_cost, self._f, self._g = solved[:4]
        self.eps, self._mean, self.n_iter, self.marginal_error = solved[4:]
        self._cost, self._a, self._b = cost, a, b
        self.converged = self.marginal_error <= tol
        self._plan: Tensor | None = None

    @property
    def f(self) -> Tensor:
        return self._f + self._mean[..., None] / 2

    @property
    def g(self) -> Tensor:
        return self._g + self._mean[..., None] / 2

    @property
    def plan(self) -> Tensor:
        """``P_ij = a_i b_j exp((f_i + g_j - C_ij) / eps)``, ``[..., N, M]``. Computed when first asked for."""
        if self._plan is None:
            with torch.no_grad():
                cost = self._cost()
                # As the solver sees it: potentials of the centred cost, which loses no digits to the mean.
                mean, eps = self._mean[..., None, None], self.eps[..., None, None]
                exponent = self._f[..., :, None] + self._g[..., None, :] - (cost.to(mean.dtype) - mean)
                exponent = torch.where(eps > 0, exponent / eps, 0.0 * mean)
                self._plan = _marginal(self._a, self._f)[..., :, None] * _marginal(self._b, self._g)[..., None, :]
                self._plan = self._plan * exponent.exp()
        return self._plan

    def __repr__(self) -> str:
        n, m = self._f.shape[-1], self._g.shape[-1]
        lead = list(self.eps.shape)
        return f"OTResult(problems={lead}, N={n}, M={m}, converged={int(self.converged.sum())})"


def _marginal(weight: Tensor | None, potential: Tensor) -> Tensor:
    if weight is None:
        return torch.full_like(potential, 1 / potential.shape[-1])
    weight = weight / weight.sum(-1, keepdim=True)
    if weight.dim() < potential.dim():
        weight = weight.unsqueeze(1)
    return weight


def cost_matrix(x: Tensor, y: Tensor, *, metric: str = "l2", patch_size: int = 1) -> Tensor:
    r"""Ground cost between every patch of ``x`` and every patch of ``y``; differentiable in both.

    ``"l2"``: :math:`|x_i - y_j|`, with subgradient 0 where they coincide. ``"sqeuclidean"``: its square.
    ``"cosine"``: :math:`1 - x_i \cdot y_j / (|x_i| |y_j|)`, and 1 with gradient 0 where either is 0. Distances are
    summed from direct differences, never from ``|x|^2 + |y|^2 - 2 x.y``, which cancels.

    Args:
        x: ``[B, C, H, W]`` (any strides, read in place) or tokens ``[B, N, C]``; float16, bfloat16, float32, float64.
        y: the same kind, ``[B, C, H', W']`` or ``[B, M, C]``, or with groups ``[B, G, C, H', W']``, ``[B, G, M, C]``.
        metric: ``"l2"`` | ``"sqeuclidean"`` | ``"cosine"``.
        patch_size: ``k > 1``: a patch is a ``k x k`` neighbourhood as ``F.unfold`` would cut it (valid windows).

    Returns:
        ``[B, N, M]`` (``[B, G, N, M]`` with groups), ``N = (H - k + 1)(W - k + 1)``; float32, or float64 if an
        input is.

    Raises:
        TypeError: an argument is of the wrong kind or type.
        ValueError: shapes do not fit, or an option is none of those listed.

    >>> import torch
    >>> cost_matrix(torch.tensor([[[0., 0.], [3., 4.]]]), torch.tensor([[[0., 0.]]]))
    tensor([[[0.],
             [5.]]])
    """
    checks.features("cost_matrix", "x", x, "y", y, metric, patch_size)
    return ops.cost_forward(x, y, ops.METRICS[metric], patch_size)


def solve(
    cost: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    eps: float = 0.05,
    eps_scale: str = "std",
    tol: float = 1e-3,
    max_iter: int = 1000,
    init: tuple[Tensor, Tensor] | None = None,
) -> OTResult:
    r"""Entropic optimal transport for given costs, one problem per leading index.

    .. math:: \min_P \langle P, C \rangle + \varepsilon\,\mathrm{KL}(P \,|\, a b^T), \quad P 1 = a,\ P^T 1 = b

    by over-relaxed Sinkhorn iterations (Cuturi 2013; relaxation: Thibault et al. 2021), then Newton steps near the
    solution, with per-problem stopping.

    Args:
        cost: ``[..., N, M]``; float16, bfloat16, float32, float64; any strides.
        a: ``[..., N]`` weights, broadcast over the leading axes of ``cost``; normalised to sum to 1; 0 removes the
            patch; default uniform.
        b: ``[..., M]``, likewise.
        eps: regularisation, in units that ``eps_scale`` says.
        eps_scale: ``"std"``: standard deviations of the costs under ``a (x) b``, problem by problem; gradients include
            this dependence. ``"absolute"``: units of the cost.
        tol: stop when ``|P 1 - a|_1 + |P^T 1 - b|_1 <= tol``.
        max_iter: iterations at most. A problem stopped by it has ``converged = False``.
        init: potentials ``(f, g)`` to start from, as an `OTResult` gave them. (``f`` follows from ``g`` in half an
            iteration.)

    Returns:
        `OTResult`; both costs are differentiable in ``cost``, ``a`` and ``b``. A patch of weight 0 gets no gradient.

    Raises:
        TypeError: an argument is of the wrong kind or type.
        ValueError: shapes do not fit, an option is out of range, tensors are on different devices, or weights are
            negative, not finite, or all 0 (on a GPU, where looking would make it wait, such a problem gives NaN).

    >>> import torch
    >>> result = solve(torch.tensor([[0., 1.], [1., 0.]]), eps=0.1)
    >>> round(result.transport_cost.item(), 6), result.plan.shape, result.converged.item()
    (0.0, torch.Size([2, 2]), True)
    """
    where = "solve"
    checks.tensor(where, "cost", cost)
    if cost.dim() < 2 or cost.shape[-1] == 0 or cost.shape[-2] == 0:
        checks.refuse(ValueError, where, "cost", "of shape [..., N, M] with N, M at least 1", checks.shape_of(cost))
    checks.solver_options(where, eps, eps_scale, tol, max_iter)
    lead, (n, m) = tuple(cost.shape[:-2]), tuple(cost.shape[-2:])
    a = _side(where, "a", a, lead, n, cost)
    b = _side(where, "b", b, lead, m, cost)
    init_g = None
    if init is not None:
        checks.potentials(where, init, (*lead, n), (*lead, m), cost)
        init_g = init[1].to(ops.compute_dtype(cost))
    solved = ops.sinkhorn_forward(
        _four_axes(cost, 2),
        _four_axes(a, 1),
        _four_axes(b, 1),
        init_g,
        eps,
        eps_scale == "std",
        tol,
        max_iter,
        where,
    )
    solved = tuple(t.view((*lead, *t.shape[2:])) for t in solved)
    return OTResult(solved, lambda: cost, a, b, tol)


def _side(where: str, name: str, value: Any, lead: tuple[int, ...], n: int, cost: Tensor) -> Tensor | None:
    """Weights ``[..., N]`` broadcast to the problems."""
    if value is None:
        return None
    checks.tensor(where, name, value, cost)
    fits = value.dim() >= 1 and value.shape[-1] == n and value.dim() <= len(lead) + 1
    ours = tuple(value.shape[:-1])
    fits = fits and all(s in (1, w) for s, w in zip(ours[::-1], lead[::-1], strict=False))
    if not fits:
        wanted = f"of shape {[*lead, n]} (or broadcastable to it) for cost of shape {checks.shape_of(cost)}"
        checks.refuse(ValueError, where, name, wanted, checks.shape_of(value))
    return value.to(ops.compute_dtype(cost)).expand(*lead, n)


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
    eps: float = 0.05,
    eps_scale: str = "std",
    tol: float = 1e-3,
    max_iter: int = 1000,
    init: tuple[Tensor, Tensor] | None = None,
) -> OTResult:
    """`solve` on ``cost_matrix(x, y)`` without ever storing that matrix, forward or backward.

    Args:
        x, y, metric, patch_size: as in `cost_matrix`.
        a: ``[B, N]`` or ``[B, H, W]``; b: ``[B, M]`` or ``[B, H', W']``, or with the groups ``[B, G, ...]``.
        eps, eps_scale, tol, max_iter, init: as in `solve`.

    Returns:
        `OTResult` of shape ``[B]`` (``[B, G]`` with groups), differentiable in ``x``, ``y``, ``a`` and ``b``. Only
        its ``plan`` needs the matrix, and recomputes it when asked for.

    Raises:
        TypeError, ValueError: as in `cost_matrix` and `solve`.

    >>> import torch
    >>> x = torch.randn(2, 8, 7, 7)
    >>> result = solve_sample(x, x.roll(1, -1))
    >>> result.transport_cost.shape, result.plan.shape, result.f.shape
    (torch.Size([2]), torch.Size([2, 49, 49]), torch.Size([2, 49]))
    """
    where = "solve_sample"
    checks.features(where, "x", x, "y", y, metric, patch_size)
    a, b = _weights(where, ("a", a), ("b", b), x, y, patch_size)
    solved = _solve_features(where, x, y, a, b, metric, patch_size, eps, eps_scale, tol, max_iter, init)
    return OTResult(solved, lambda: cost_matrix(x, y, metric=metric, patch_size=patch_size), a, b, tol)


def _weights(
    where: str, a: tuple[str, Any], b: tuple[str, Any], x: Tensor, y: Tensor, patch_size: int
) -> tuple[Tensor | None, Tensor | None]:
    grid_x, grid_y = ops.patch_grids(x, y, patch_size)
    return (
        checks.weight(where, *a, (x.shape[0],), grid_x, (x, y)),
        checks.weight(where, *b, ops.problems(x, y), grid_y, (x, y)),
    )


def _solve_features(
    where: str,
    x: Tensor,
    y: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    metric: str,
    patch_size: int,
    eps: float,
    eps_scale: str,
    tol: float,
    max_iter: int,
    init: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, ...]:
    checks.solver_options(where, eps, eps_scale, tol, max_iter)
    init_g = None
    if init is not None:
        n, m = map(math.prod, ops.patch_grids(x, y, patch_size))
        lead = ops.problems(x, y)
        checks.potentials(where, init, (*lead, n), (*lead, m), x)
        init_g = init[1].to(ops.compute_dtype(x, y))
    return ops.emd_forward(
        x, y, a, b, init_g, ops.METRICS[metric], patch_size, eps, eps_scale == "std", tol, max_iter, where
    )


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
    tol: float = 1e-3,
    max_iter: int = 1000,
    reduction: str = "mean",
) -> Tensor:
    r"""Earth mover's distance between the local features of two maps; differentiable in everything it is given.

    With the costs :math:`C_{ij}` of `cost_matrix` and the entropic plan :math:`P` of `solve`, the value of each pair is
    :math:`\langle P, C \rangle` (``"transport"``) or :math:`\langle P, C \rangle + \varepsilon\,\mathrm{KL}(P | a b^T)`
    (``"entropic"``). The gradient is that of the value returned, including the plan's own dependence on the costs
    (implicit differentiation) and that of a relative ``eps``: exact at convergence, else off by the order of ``tol``.

    Args:
        student_feat: ``[B, C, H, W]``, contiguous or channels_last or any other strides, read in place; or tokens
            ``[B, N, C]``. float16, bfloat16, float32 or float64.
        teacher_feat: the same kind with its own ``H', W'`` or ``M``; with one more axis, ``[B, G, C, H', W']`` or
            ``[B, G, M, C]``, one student faces ``G`` teachers.
        student_weight: ``[B, N]`` or ``[B, H, W]``, non-negative, normalised to sum to 1; 0 removes the patch
            (padding, masks): its features are never looked at and it gets no gradient. Default uniform.
        teacher_weight: ``[B, M]`` or ``[B, H', W']``, shared by the groups, or one per group ``[B, G, ...]``.
        metric: ``"l2"`` | ``"sqeuclidean"`` | ``"cosine"``, as in `cost_matrix`.
        patch_size: ``k > 1`` matches ``k x k`` neighbourhoods.
        objective: ``"transport"`` | ``"entropic"``.
        eps: regularisation; smaller is nearer to the exact distance and takes more iterations.
        eps_scale: ``"std"``: in standard deviations of each problem's costs. ``"absolute"``: in units of the cost.
        tol: stop when a problem's L1 marginal error is at most this.
        max_iter: iterations at most; see `warn_on_nonconvergence`.
        reduction: over batch and groups: ``"mean"`` | ``"sum"`` | ``"none"``.

    Returns:
        A scalar, or ``[B]`` (``[B, G]`` with groups) for ``"none"``; float32, or float64 if an input is. A NaN or Inf
        in the features gives NaN for its own problem alone.

    Raises:
        TypeError: an argument is of the wrong kind or type.
        ValueError: shapes do not fit, an option is out of range, tensors are on different devices, or weights are
            negative, not finite, or all 0 (on a GPU, where looking would make it wait, such a problem gives NaN).
        NotImplementedError: a second derivative is asked for.

    >>> import torch
    >>> student = torch.randn(4, 16, 7, 7, requires_grad=True)
    >>> loss = emd_l2(student, torch.randn(4, 16, 7, 7))
    >>> loss.backward()
    >>> student.grad.shape
    torch.Size([4, 16, 7, 7])
    >>> emd_l2(student, torch.randn(4, 3, 16, 7, 7), reduction="none").shape   # three teachers each
    torch.Size([4, 3])
    """
    where = "emd_l2"
    checks.features(where, "student_feat", student_feat, "teacher_feat", teacher_feat, metric, patch_size)
    checks.choice(where, "objective", objective, checks.OBJECTIVES)
    checks.choice(where, "reduction", reduction, checks.REDUCTIONS)
    named = ("student_weight", student_weight), ("teacher_weight", teacher_weight)
    a, b = _weights(where, *named, student_feat, teacher_feat, patch_size)
    solved = _solve_features(
        where, student_feat, teacher_feat, a, b, metric, patch_size, eps, eps_scale, tol, max_iter, None
    )
    if _warn and not torch.compiler.is_compiling():
        _check_convergence(solved[7], tol, max_iter)
    value = solved[0] if objective == "transport" else solved[1]
    if reduction == "none":
        return value
    return value.mean() if reduction == "mean" else value.sum()


def _check_convergence(error: Tensor, tol: float, max_iter: int) -> None:
    late = ~(error <= tol)
    if late.any():
        message = (
            f"sfr_ext.emd_l2: {int(late.sum())} of {late.numel()} problems did not converge in max_iter = {max_iter} "
            f"iterations: marginal error up to {error.max().item():.2g}, tol = {tol:g}"
        )
        warnings.warn(message, ConvergenceWarning, stacklevel=3)


class EMDL2Loss(nn.Module):
    """`emd_l2` as a module: options at construction, features and weights at the call.

    Args:
        **options: keyword arguments of `emd_l2` other than the weights.

    Raises:
        TypeError: an option that `emd_l2` does not have.

    >>> import torch
    >>> criterion = EMDL2Loss(metric="cosine", eps=0.1)
    >>> criterion(torch.randn(2, 8, 4, 4), torch.randn(2, 8, 4, 4)).dim()
    0
    """

    _OPTIONS = ("metric", "patch_size", "objective", "eps", "eps_scale", "tol", "max_iter", "reduction")

    def __init__(self, **options: Any) -> None:
        super().__init__()
        for name in options:
            if name not in self._OPTIONS:
                raise TypeError(f"sfr_ext.EMDL2Loss: expected options among {', '.join(self._OPTIONS)}, got {name!r}")
        self.options = options

    def forward(
        self,
        student_feat: Tensor,
        teacher_feat: Tensor,
        student_weight: Tensor | None = None,
        teacher_weight: Tensor | None = None,
    ) -> Tensor:
        """As `emd_l2`."""
        return emd_l2(
            student_feat,
            teacher_feat,
            student_weight=student_weight,
            teacher_weight=teacher_weight,
            **self.options,
        )

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())
