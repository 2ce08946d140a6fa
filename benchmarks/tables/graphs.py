"""Rows that run as CUDA graphs: for sizes at which launching takes longer than computing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..data.workloads import Problem
from ..harness.check import disagreement, failure
from ..harness.device import Device
from ..harness.row import Entry, Row
from ..harness.truth import Truth, marginal_error
from ..peers import Peer, Solved
from ..peers.plain_torch import log_domain, log_domain_plan


def replayed(row: Row, run: Callable[[], Any], device: Device, stream: Any = None) -> Entry:
    """The same row as a replay of what it launched; it must have the bits of a call."""
    again = dataclasses.replace(
        row, name=f"{row.name}, CUDA graph", milliseconds=[], processor=[], rounds=[], ratios=[]
    )
    try:
        replay, written = device.captured(run, stream)
        expected = run()
        replay()
        device.synchronize()
    except RuntimeError as error:
        again.problem = f"no graph: {error}"
        return again, lambda: None
    if written is not None and not all(torch.equal(a, b) for a, b in zip(written, expected, strict=True)):
        again.problem = "a replay has other bits than a call"
    return again, replay


def compiled_torch(problem: Problem, truth: Truth, device: Device) -> Entry:
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
        replay, written = device.captured(run)
        replay()
        device.synchronize()
        values, plan, x.grad, y.grad = written
        solved = Solved(values, lambda: plan)
        holder = Peer(row.name, "torch", "transport", (), lambda *_: solved)
        row.value_error, row.gradient_error = truth.compare(holder, solved, x, y)
        row.problem = disagreement(row)
    except Exception as error:
        row.problem = failure(error)
    return row, (lambda: None) if row.problem else replay
