"""Rows that run as CUDA graphs: for sizes at which launching takes longer than computing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..data.workloads import Problem
from ..peers import Peer, Solved
from ..peers.plain_torch import log_domain, log_domain_plan
from .device import Device
from .measure import WRONG, Reference, Row, marginal_error

Entry = tuple[Row, Callable[[], Any]]


def replayed(row: Row, run: Callable[[], Any], device: Device) -> Entry:
    """The same row as a replay of what it launched."""
    again = dataclasses.replace(row, name=f"{row.name}, CUDA graph", milliseconds=[], rounds=[], ratios=[])
    try:
        return again, device.graphed(run)[0]
    except RuntimeError as error:
        again.problem = f"no graph: {error}"
        return again, lambda: None


def compiled_torch(problem: Problem, truth: Reference, device: Device) -> Entry:
    """Plain torch at its best: iterations fused by torch.compile, as many as are needed, forward and backward in one
    CUDA graph."""
    row = Row("plain torch, compiled, one CUDA graph", torch.__version__, "transport")
    x, y = (t.requires_grad_() for t in problem.tokens())
    backend = "inductor" if device.on_gpu else "aot_eager"
    iterate = torch.compile(log_domain, fullgraph=True, dynamic=False, backend=backend)

    def run() -> tuple[Tensor, Tensor, Tensor, Tensor]:
        cost = torch.cdist(x, y)
        with torch.no_grad():
            scaled = cost / problem.eps
            f, g = torch.zeros_like(cost[:, :, 0]), torch.zeros_like(cost[:, 0])
            for _ in range(int(row.setting)):
                f, g = iterate(scaled, f, g)
            plan = log_domain_plan(scaled, f, g)
        values = (plan * cost).sum((1, 2))
        grad_x, grad_y = torch.autograd.grad(values.mean(), (x, y))
        return values.detach(), plan, grad_x, grad_y

    try:
        for row.setting in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 256):
            row.marginal_error = marginal_error(run()[1])
            row.reached = row.marginal_error <= 1.01 * problem.tol
            if row.reached:
                break
        replay, written = device.graphed(run)
        replay()
        device.synchronize()
        values, plan, x.grad, y.grad = written
        solved = Solved(values, lambda: plan)
        holder = Peer(row.name, "torch", "transport", (), lambda *_: solved)
        row.value_error, row.gradient_error = truth.compare(holder, solved, x, y)
    except Exception as error:
        row.problem = f"failed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        return row, lambda: None
    if not row.value_error <= WRONG:
        row.problem = f"disagrees with the reference: values off by {row.value_error:.2g}"
    return row, replay
