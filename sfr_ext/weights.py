"""Weights for patches, from the features themselves."""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks
from .ops import compute_dtype


def cross_reference_weights(student: Tensor, teacher: Tensor, *, detach: bool = True) -> tuple[Tensor, Tensor]:
    r"""DeepEMD's weights: a patch counts for as much as it has in common with the other side as a whole.

    .. math:: a_i \propto \max(0,\ s_i \cdot \tfrac1M \textstyle\sum_j t_j) + 10^{-3}, \qquad
              b_j \propto \max(0,\ t_j \cdot \tfrac1N \textstyle\sum_i s_i) + 10^{-3}

    (Zhang et al., CVPR 2020, "cross-reference mechanism"; the constant is that of their code), each side
    normalised to sum to 1. Patches that only show background, which the other image does not, lose their say.

    Args:
        student: maps ``[B, C, H, W]`` or tokens ``[B, N, C]``; float16, bfloat16, float32 or float64.
        teacher: the same kind, ``[B, C, H', W']`` or ``[B, M, C]``, or with groups ``[B, G, ...]``.
        detach: no gradient into the features through the weights. False: differentiable in both.

    Returns:
        ``(student_weight, teacher_weight)`` for `emd_l2`: ``[B, N]`` and ``[B, M]``, with groups ``[B, G, N]`` and
        ``[B, G, M]``; float32, or float64 if an input is.

    Raises:
        TypeError: an argument is of the wrong kind or type.
        ValueError: shapes do not fit, or the tensors are on different devices.

    >>> import torch
    >>> from sfr_ext import emd_l2
    >>> from sfr_ext import cross_reference_weights
    >>> query, support = torch.randn(2, 16, 5, 5), torch.randn(2, 3, 16, 5, 5)    # three classes
    >>> a, b = cross_reference_weights(query, support)
    >>> emd_l2(query, support, student_weight=a, teacher_weight=b, metric="cosine", reduction="none").shape
    torch.Size([2, 3])
    """
    checks.features("cross_reference_weights", "student", student, "teacher", teacher, "l2", 1)
    detach = checks.a_bool("cross_reference_weights", "detach", detach)
    maps = student.dim() == 4
    dtype = compute_dtype(student, teacher)
    s, t = ((z.flatten(-2).mT if maps else z).to(dtype) for z in (student, teacher))
    if detach:
        s, t = s.detach(), t.detach()
    if t.dim() > s.dim():
        s = s[:, None]
    return _relevance(s, t), _relevance(t, s)


def _relevance(patches: Tensor, others: Tensor) -> Tensor:
    """Weights ``[..., N]`` of ``[..., N, C]``."""
    # In units of the largest entries, powers of 2, so that no sum overflows and no bit changes.
    ours, theirs = _unit(patches), _unit(others)
    common = ((patches / ours) * (others / theirs).mean(-2, keepdim=True)).sum(-1).relu()
    weight = common + (1e-3 / ours / theirs)[..., 0]
    return weight / weight.sum(-1, keepdim=True)


def _unit(features: Tensor) -> Tensor:
    """``[..., 1, 1]``: at least 1, and so large that nothing is above it by more than a factor of 2."""
    exponent = torch.frexp(features.detach().abs().amax((-2, -1), keepdim=True)).exponent
    return torch.ldexp(torch.ones_like(features[..., :1, :1].detach()), (exponent - 1).clamp_min(0))
