"""The debiased divergence of features, and its term of a teacher that does not change."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from torch import Tensor

from . import checks, ops
from .transport import as_weights_of_pair_want, ground


class SelfTerm(NamedTuple):
    """A set of patches solved with itself, for `emd_l2`'s ``teacher_self``; made by `self_term`.

    Attributes:
        value: ``[B]`` or ``[B, G]``, the entropic value, in float64: others are subtracted from it that are nearly
            equal.
        potential: ``[B, M]`` or ``[B, G, M]``, the dual variable ``f = g`` of each patch.
        marginal_error: ``[B]`` or ``[B, G]``, the L1 error of the plan's sums; see `OTResult.converged`.
        options: ``(metric, patch_size, eps, reach)``, with which `emd_l2` must be called.
    """

    value: Tensor
    potential: Tensor
    marginal_error: Tensor
    options: tuple[Any, ...]


def self_term(
    teacher_feat: Tensor,
    teacher_weight: Tensor | None = None,
    *,
    groups: bool = False,
    metric: str = "l2",
    patch_size: int = 1,
    eps: float,
    reach: float | None = None,
    max_iter: int = 1000,
) -> SelfTerm:
    """The teacher's own term of ``objective="divergence"``, computed once for a teacher that does not change.

    ``E(y, y)`` with ``E`` the entropic value. ``f = g`` there, and the mean of a potential and its update,
    ``f <- (f + T f) / 2``, halves the error (Feydy et al. 2019).

    Args:
        teacher_feat: as in `emd_l2`; ``groups`` says whether its second axis is that of groups.
        teacher_weight: as in `emd_l2`.
        metric, patch_size: as in `emd_l2`.
        eps: in units of the cost (a relative eps would follow from the student).
        reach: of the teacher's side, as in `emd_l2`.
        max_iter: iterations at most, to a marginal error of 1e-6 (1e-13 in float64) or what rounding leaves.

    Returns:
        `SelfTerm`, without gradient.

    Raises:
        TypeError, ValueError: as in `emd_l2`.

    >>> import torch
    >>> import sfr_ext
    >>> from sfr_ext import self_term
    >>> teacher = torch.randn(4, 49, 16)
    >>> term = self_term(teacher, eps=0.1)
    >>> options = {"objective": "divergence", "eps": 0.1, "eps_scale": "absolute"}
    >>> loss = sfr_ext.emd_l2(torch.randn(4, 49, 16), teacher, teacher_self=term, **options)
    """
    where = "self_term"
    groups = checks.a_bool(where, "groups", groups)
    each = _each_teacher(where, teacher_feat, groups)
    patch_size = checks.features(where, "teacher_feat", each, "teacher_feat", each, metric, patch_size)
    lead = tuple(teacher_feat.shape[:2] if groups else teacher_feat.shape[:1])
    grid = ops.patch_grids(each, each, patch_size)[1]
    weight = checks.weight(where, "teacher_weight", teacher_weight, lead, grid, (each,))
    each, weight = ops.flat(teacher_feat, weight, lead)
    options = checks.solver_options(where, "sinkhorn", eps, "absolute", reach, 0.0, max_iter)
    costs = ground(metric, patch_size)
    solved = ops.self_forward(each.detach(), weight, *costs, *options, where)
    value, potential, error = (t.unflatten(0, lead) for t in solved)
    return SelfTerm(value, potential, error, (metric, patch_size, options.eps, options.reach_b))


def _each_teacher(where: str, teacher_feat: Any, groups: bool) -> Tensor:
    """Groups as further problems of the batch."""
    checks.tensor(where, "teacher_feat", teacher_feat)
    dims = (4, 5) if groups else (3, 4)
    if teacher_feat.dim() not in dims:
        wanted = "[B, G, C, H, W] or [B, G, M, C] with groups=True" if groups else "[B, C, H, W] or [B, M, C]"
        hint = "; for groups, give groups=True" if teacher_feat.dim() == 5 else ""
        checks.refuse(ValueError, where, "teacher_feat", f"of shape {wanted}", checks.shape_of(teacher_feat) + hint)
    each: Tensor = teacher_feat.flatten(0, 1) if groups else teacher_feat
    return each


def check_teacher_self(where: str, teacher_self: Any, objective: str, solver: str) -> None:
    """Where it would not be looked at, it is refused."""
    if not isinstance(teacher_self, SelfTerm):
        checks.refuse(TypeError, where, "teacher_self", "to be a SelfTerm, from self_term", type(teacher_self).__name__)
    if objective != "divergence" or solver != "sinkhorn":
        wanted = 'with objective="divergence" and solver="sinkhorn" only'
        checks.refuse(ValueError, where, "teacher_self", wanted, f"objective={objective!r} and solver={solver!r}")


def divergence_between(
    where: str,
    pair: ops.Pair,
    costs: ops.Ground,
    options: ops.SolverOptions,
    teacher: SelfTerm | None,
) -> ops.Divergence:
    """Values of the divergence."""
    given = (None, None) if teacher is None else _given(where, pair, costs, options, teacher)
    options = as_weights_of_pair_want(options, pair)
    return ops.Divergence(*ops.divergence_forward(*pair, *given, *costs, *options, where))


def _given(
    where: str, pair: ops.Pair, costs: ops.Ground, options: ops.SolverOptions, teacher: SelfTerm
) -> tuple[Tensor, Tensor]:
    if options.relative:
        wanted = 'to come with eps_scale="absolute" (a relative eps depends on the student)'
        checks.refuse(ValueError, where, "teacher_self", wanted, 'eps_scale="std"')
    computed = (ops.METRIC_NAMES[costs.metric], costs.patch_size, options.eps, options.reach_b)
    if teacher.options != computed:
        wanted = f"to be computed with (metric, patch_size, eps, reach) = {computed}"
        checks.refuse(ValueError, where, "teacher_self", wanted, teacher.options)
    lead, dtype = ops.problems(pair.x, pair.y), ops.compute_dtype(pair.x, pair.y)
    count = math.prod(ops.patch_grids(pair.x, pair.y, costs.patch_size)[1])
    if teacher.potential.shape != (*lead, count):
        wanted = f"for a teacher of {[*lead, count]} patches"
        checks.refuse(ValueError, where, "teacher_self", wanted, list(teacher.potential.shape))
    return teacher.value.double(), teacher.potential.to(dtype)
