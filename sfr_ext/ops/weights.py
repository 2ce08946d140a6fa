"""The contents of weights, which only the kernels look at, and the error that a bad one becomes."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import refuse

_WEIGHT_NAMES = {"emd_l2": ("student_weight", "teacher_weight")}


def check_status(status: int, caller: str, a: Tensor | None, b: Tensor | None) -> None:
    """The contents of weights are only looked at inside the operator, so that a compiled graph stays whole."""
    if status == 0:
        return
    name = _WEIGHT_NAMES.get(caller, ("a", "b"))[status - 1]
    weight = (a, b)[status - 1]
    assert weight is not None
    index = (~(torch.isfinite(weight) & (weight >= 0))).nonzero()[0].tolist()
    came = f"{weight[tuple(index)].item():g} at {index}"
    refuse(ValueError, caller, name, "to be finite and non-negative", came)
