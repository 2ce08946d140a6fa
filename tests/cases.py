"""Inputs and measures that several test files share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sfr_ext import ops

METRICS = list(ops.METRICS)
OBJECTIVES = ["transport", "entropic"]
EPS_SCALES = ["std", "absolute"]
HALVES = [torch.float16, torch.bfloat16]


def features(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = False) -> Tensor:
    """Normally distributed features."""
    return torch.randn(*shape, dtype=torch.float64).to(dtype).requires_grad_(grad)


def weights(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = False) -> Tensor:
    """Weights that are neither equal nor near 0."""
    return (torch.rand(*shape, dtype=torch.float64) + 0.2).to(dtype).requires_grad_(grad)


def error(ours: Tensor, reference: Tensor) -> float:
    """``|ours - reference| / |reference|`` over all entries; NaN if either has one."""
    ours, reference = ours.detach().double(), reference.detach().double()
    return ((ours - reference).norm() / reference.norm().clamp_min(1e-300)).item()


def value_and_gradients(function: Any, *inputs: Tensor | None, **options: Any) -> tuple[Tensor, list[Tensor]]:
    """The value of ``function(*inputs)`` and the gradient of its sum for every input that wants one."""
    leaves = [None if t is None else t.detach().clone().requires_grad_(t.requires_grad) for t in inputs]
    value = function(*leaves, **options)
    wanted = [t for t in leaves if t is not None and t.requires_grad]
    return value, list(torch.autograd.grad(value.sum(), wanted))
