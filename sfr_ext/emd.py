"""``emd_l2`` and its module."""

from __future__ import annotations

import inspect
import sys
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from . import checks, counters, ops
from .divergence import SelfTerm, check_teacher_self, divergence_between
from .result import certified
from .transport import Reach, exact_between, ground, solved_between, value_between, weights_of


class ConvergenceWarning(UserWarning):
    """`emd_l2` stopped before a problem's marginals were within ``tol``: at ``max_iter``, or at the precision of the
    type that is computed in, or because features are NaN or infinite; or an exact plan is not proven to be one. The
    text says which."""


_warn = False


def warn_on_nonconvergence(enabled: bool = True) -> None:
    """Make `emd_l2` warn (`ConvergenceWarning`, once per call site) when a problem did not converge.

    Off by default, because looking at the result would make a GPU wait. Inside ``torch.compile`` it never warns.
    Independent of this, `OTResult.converged` always tells.

    >>> import torch, warnings
    >>> from sfr_ext import emd_l2, warn_on_nonconvergence
    >>> warn_on_nonconvergence()
    >>> with warnings.catch_warnings(record=True) as caught:
    ...     _ = emd_l2(torch.randn(1, 9, 4), torch.randn(1, 9, 4), max_iter=1, tol=1e-6)
    >>> caught[0].category.__name__
    'ConvergenceWarning'
    >>> warn_on_nonconvergence(False)
    """
    global _warn
    _warn = checks.a_bool("warn_on_nonconvergence", "enabled", enabled)


def emd_l2(
    student_feat: Tensor,
    teacher_feat: Tensor,
    *,
    student_weight: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    metric: str = "l2",
    patch_size: int = 1,
    solver: str = "sinkhorn",
    objective: str = "transport",
    eps: float = 0.05,
    eps_scale: str = "std",
    reach: Reach = None,
    tol: float = 1e-4,
    max_iter: int = 1000,
    reduction: str = "mean",
    teacher_self: SelfTerm | None = None,
) -> Tensor:
    r"""Earth mover's distance between the local features of two maps; differentiable in everything it is given.

    The distance is the least cost of moving the mass of one set onto the other (Rubner et al. 2000; Peyre and Cuturi,
    "Computational Optimal Transport", 2019, chapter 2). By default it is that of a smoothed plan (``"sinkhorn"``,
    Cuturi 2013): about 0.2 % above on feature maps of networks, far more for points in 2 or 3 dimensions.
    ``solver="exact"`` computes it as it is.

    With the costs :math:`C_{ij}` of `cost_matrix` and the entropic plan :math:`P` of `solve`, the value of each pair is
    :math:`\langle P, C \rangle` (``"transport"``), or
    :math:`E(x, y) = \langle P, C \rangle + \varepsilon\,\mathrm{KL}(P | a b^T)` (``"entropic"``), or
    :math:`E(x, y) - E(x, x) / 2 - E(y, y) / 2` (``"divergence"``; Feydy et al. 2019): 0 for equal inputs and positive
    otherwise, up to rounding. The gradient is that of the value returned, including the plan's own dependence on the
    costs (implicit differentiation) and that of a relative ``eps``: exact at convergence, else off by the order of
    ``tol``.

    Args:
        student_feat: ``[B, C, H, W]``, contiguous or channels_last or any other strides, read in place; or tokens
            ``[B, N, C]``. float16, bfloat16, float32 or float64.
        teacher_feat: the same kind with its own ``H', W'`` or ``M``; with one more axis, ``[B, G, C, H', W']`` or
            ``[B, G, M, C]``, one student faces ``G`` teachers.
        student_weight: ``[B, N]`` or ``[B, H, W]``, or ``[N]`` or ``[H, W]`` for the whole batch; non-negative
            (floating-point, integer or bool), normalised to sum to 1; 0 removes the patch (padding, masks): its
            features are never looked at and it gets no gradient. In a mask True keeps a patch (a
            ``key_padding_mask`` of torch's attention says the opposite: pass ``~key_padding_mask``). Default uniform.
            With groups also one per group, ``[B, G, ...]``. A problem with all of a side removed is empty: its value
            and gradients are 0.
        teacher_weight: likewise ``[B, M]`` or ``[B, H', W']``, shared by the groups, or one per group ``[B, G, ...]``.
        metric: ``"l2"`` | ``"sqeuclidean"`` | ``"cosine"`` | ``"l1"``, as in `cost_matrix`.
        patch_size: ``k > 1`` matches ``k x k`` neighbourhoods.
        solver: ``"sinkhorn"``, or ``"exact"``: the earth mover's distance itself, whatever the objective, with a
            gradient that follows the optimal plan and dual variables. ``eps``, ``eps_scale``, ``tol`` and ``max_iter``
            do not apply. Memory: ``N x M`` per problem on a GPU, with ``patch_size > 1``, and for ``"cosine"``; else
            for one problem a thread.
        objective: ``"transport"`` | ``"entropic"`` | ``"divergence"``, as above. Of the divergence, all three values
            have the eps of ``E(x, y)``; where a reach lets masses differ, ``eps / 2 (|a| - |b|)^2`` is added (Sejourne
            et al. 2019).
        eps: regularisation; smaller is nearer to the exact distance and takes more iterations. The default suits most
            losses between feature maps (0.2 % above, 49 iterations); 0.3 for a smoother one (3 %, 16 iterations), and
            for learned patch weights in float32; below 0.03, and for points in 2 or 3 dimensions, rather
            ``solver="exact"``.
        eps_scale: ``"std"``: in standard deviations of each problem's costs. ``"absolute"``: in units of the cost.
        reach: unbalanced transport: mass that is further away than this, in units of the cost, mostly stays. One
            number, or a pair for student and teacher; None: balanced. A side with a reach keeps the sum of its
            weights. `solve` has the formula.
        tol: stop when a problem's L1 marginal error is at most this. Where weights want a gradient, which is made of
            the potentials, a problem is solved nearly to rounding (1e-6, or 1e-13 in float64).
        max_iter: iterations at most; see `warn_on_nonconvergence`.
        reduction: over batch and groups: ``"mean"`` | ``"sum"`` | ``"none"``.
        teacher_self: for ``"divergence"`` and a teacher that does not change: its problem with itself, from
            `self_term`, not solved again; no gradient flows through it. ``eps_scale`` must be ``"absolute"``.

    Returns:
        A scalar, or ``[B]`` (``[B, G]`` with groups) for ``"none"``; float32, or float64 if an input is. A NaN or Inf
        in the features gives NaN for its own problem alone.

    Raises:
        TypeError: an argument is of the wrong kind or type.
        ValueError: shapes do not fit, an option is out of range, tensors are on different devices, or weights are
            negative or not finite (on a GPU, where looking would make it wait, such a problem gives NaN).
        NotImplementedError: a forward-mode derivative is asked for, or a second one of the divergence or through the
            weights of exact transport. (Other second derivatives are computed densely in float64: slow, for small
            problems, and as exact as ``tol``.)

    >>> import torch
    >>> from sfr_ext import emd_l2
    >>> student = torch.randn(4, 16, 7, 7, requires_grad=True)
    >>> loss = emd_l2(student, torch.randn(4, 16, 7, 7))
    >>> loss.backward()
    >>> student.grad.shape
    torch.Size([4, 16, 7, 7])
    >>> emd_l2(student, torch.randn(4, 3, 16, 7, 7), reduction="none").shape   # three teachers each
    torch.Size([4, 3])
    """
    where = "emd_l2"
    patch_size = checks.features(where, "student_feat", student_feat, "teacher_feat", teacher_feat, metric, patch_size)
    checks.choice(where, "objective", objective, checks.OBJECTIVES)
    options = checks.solver_options(where, solver, eps, eps_scale, reach, tol, max_iter)
    checks.choice(where, "reduction", reduction, checks.REDUCTIONS)
    if teacher_self is not None:
        check_teacher_self(where, teacher_self, objective, solver)
    named = ("student_weight", student_weight), ("teacher_weight", teacher_weight)
    a, b = weights_of(where, *named, student_feat, teacher_feat, patch_size)
    pair, costs = ops.Pair(student_feat, teacher_feat, a, b), ground(metric, patch_size)
    value = _values(where, pair, costs, options, solver, objective, teacher_self)
    if reduction == "none":
        return value if value.dim() else value.view(ops.problems(student_feat, teacher_feat))
    if value.dim() == 0:
        return value
    if value.shape == (1,):  # a view, which takes autograd less time than a mean
        return value.squeeze(0)
    return value.mean() if reduction == "mean" else value.sum()


def _values(
    where: str,
    pair: ops.Pair,
    costs: ops.Ground,
    options: ops.SolverOptions,
    solver: str,
    objective: str,
    teacher_self: SelfTerm | None,
) -> Tensor:
    """Of each problem; of one perhaps a scalar. Warns, where that was asked for."""
    if solver == "exact":
        exact = exact_between(where, pair, costs, options)
        if _warn and _has_numbers(exact.error):
            _check_certificates(exact, options)
        return exact.value.view(ops.problems(pair.x, pair.y))
    if objective == "divergence":
        divergence = divergence_between(where, pair, costs, options, teacher_self)
        value, error, n_iter = divergence.value, divergence.error, divergence.n_iter
    elif _warn:
        solved = solved_between(where, pair, costs, options)
        value = solved.transport if objective == "transport" else solved.entropic
        error, n_iter = solved.error, solved.n_iter
    else:
        return value_between(where, pair, costs, options, objective)
    if _warn and _has_numbers(error):
        _check_convergence(error, n_iter, options, value.dim())
    return value


def _has_numbers(error: Tensor) -> bool:
    """Not inside of a graph, under ``vmap``, or without memory: nobody is to be warned there."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return False
    return not error.is_meta and not (counters.transformed() and counters.plain(error) is None)


def _check_convergence(error: Tensor, n_iter: Tensor, options: ops.SolverOptions, dims: int) -> None:
    if error.dim() > dims:  # of three problems, the one that is furthest from its marginals
        error, which = error.max(-1)
        n_iter = n_iter.gather(-1, which[..., None])[..., 0]
    late = ~(error <= options.tol)
    if not late.any():
        return
    broken = late & ~error.isfinite()
    cut = late & ~broken & (n_iter >= options.max_iter)
    rounded = late & ~broken & ~cut
    dtype = str(error.dtype).removeprefix("torch.")
    finer = "float64 features" if error.dtype == torch.float32 else "a larger eps"
    larger = "a larger tol" if options.tol > 0 else "a tol above 0"
    most = error.masked_fill(broken, 0).max().item()
    _tell(
        f"did not converge to tol = {options.tol:g} (marginal error up to {most:.2g})",
        late,
        (cut, f"stopped at max_iter = {options.max_iter}: give more, a larger eps, or {larger}"),
        (rounded, f"stopped at the precision of {dtype}: give {larger}, or {finer}"),
        (broken, f"without a finite marginal error: look for NaN, Inf and costs beyond {dtype} in the features"),
    )


def _check_certificates(exact: ops.ExactSolved, options: ops.SolverOptions) -> None:
    late = ~certified(exact, options.tol)
    if not late.any():
        return
    broken = late & ~(exact.value.isfinite() & exact.error.isfinite())
    dtype = str(exact.value.dtype).removeprefix("torch.")
    _tell(
        "have no plan that is proven to be exact",
        late,
        (late & ~broken, f"at the precision of {dtype}: give a tol above {options.tol:g}, or weights of nearer sizes"),
        (broken, f"without a finite value: look for NaN, Inf and costs beyond {dtype} in the features"),
    )


def _tell(what: str, late: Tensor, *reasons: tuple[Tensor, str]) -> None:
    counted = "; ".join(f"{int(which.sum())} {reason}" for which, reason in reasons if which.any())
    message = f"sfr_ext.emd_l2: {int(late.sum())} of {late.numel()} problems {what}. {counted}"
    warnings.warn(_Told(message), ConvergenceWarning, stacklevel=_level())


class _Told(str):
    """Equal to any other: Python shows a text once for each line of code, and this one whatever numbers it has."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Told)

    def __hash__(self) -> int:
        return hash(_Told)


def _level() -> int:
    """How far up from the caller of this function the code is that called the package, past modules of torch."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in ("sfr_ext", "torch"):
        frame, level = frame.f_back, level + 1
    return level


class EMDL2Loss(nn.Module):
    """`emd_l2` as a module: options at construction, features and weights at the call.

    Args:
        **options: keyword arguments of `emd_l2` other than the weights.

    Raises:
        TypeError, ValueError: an option that `emd_l2` does not have, or a value that it does not take.

    >>> import torch
    >>> from sfr_ext import EMDL2Loss
    >>> criterion = EMDL2Loss(metric="cosine", eps=0.1)
    >>> criterion(torch.randn(2, 8, 4, 4), torch.randn(2, 8, 4, 4)).dim()
    0
    """

    _OPTIONS = tuple(
        name
        for name, parameter in inspect.signature(emd_l2).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and name not in ("student_weight", "teacher_weight")
    )

    def __init__(self, **options: Any) -> None:
        super().__init__()
        for name in options:
            if name not in self._OPTIONS:
                at_the_call = ", which is given at the call" if name in ("student_weight", "teacher_weight") else ""
                came = repr(name) + at_the_call
                checks.refuse(TypeError, "EMDL2Loss", "options", f"among {', '.join(self._OPTIONS)}", came)
        options = checks.emd_options("EMDL2Loss", options)
        if (term := options.get("teacher_self")) is not None:
            solver = options.get("solver", "sinkhorn")
            check_teacher_self("EMDL2Loss", term, options.get("objective", "transport"), solver)
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
