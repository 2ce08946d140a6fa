"""sfr_ext."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import sfr_ext

from ..data.workloads import Problem
from .base import MAX_ITER, Peer, Solved


def _sinkhorn(objective: str) -> Callable[[Tensor, Tensor, Problem, Any], Solved]:
    def solve(x: Tensor, y: Tensor, problem: Problem, tol_share: float) -> Solved:
        options = {**problem.options(), "tol": tol_share * problem.tol, "max_iter": MAX_ITER}
        values = sfr_ext.emd_l2(x, y, objective=objective, reduction="none", **options)
        return Solved(values.flatten(), lambda: sfr_ext.solve_sample(x, y, **options).plan.flatten(0, -3))

    return solve


def _exact(x: Tensor, y: Tensor, problem: Problem, setting: None) -> Solved:
    options: dict[str, Any] = {"solver": "exact", "metric": problem.metric}
    values = sfr_ext.emd_l2(x, y, reduction="none", **options)
    return Solved(values.flatten(), lambda: sfr_ext.solve_sample(x, y, **options).plan.flatten(0, -3))


_TRANSPORT, _SHARES = _sinkhorn("transport"), (1.0, 0.5)
_ANY: dict[str, Any] = {"metrics": ("l2", "sqeuclidean"), "takes_maps": True}
OURS = [
    Peer("sfr_ext, transport", "sfr_ext", "transport", _SHARES, _TRANSPORT, **_ANY),
    Peer("sfr_ext, entropic", "sfr_ext", "entropic", _SHARES, _sinkhorn("entropic"), **_ANY),
    Peer("sfr_ext, exact", "sfr_ext", "exact", (None,), _exact, **_ANY),
]
TO_1E_6 = [
    dataclasses.replace(OURS[0], name=f"sfr_ext, transport, {kind} to 1e-6", settings=(1.0,), tol=1e-6, dtype=dtype)
    for kind, dtype in (("float32", torch.float32), ("float64", torch.float64))
]
