"""Calls from several threads of one process: the GIL is released while kernels run, and nothing is shared."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import sfr_ext

pytestmark = pytest.mark.usefixtures("one_thread")


def call(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(6, 25, 16, generator=generator, requires_grad=True)
    y = torch.randn(6, 30, 16, generator=generator, requires_grad=True)
    solver = "exact" if seed % 2 else "sinkhorn"
    value = sfr_ext.emd_l2(x, y, solver=solver, reduction="none")
    value.sum().backward()
    assert x.grad is not None and y.grad is not None
    plan = sfr_ext.solve_sample(x.detach(), y.detach(), solver=solver).plan
    assignment = sfr_ext.linear_assignment(sfr_ext.cost_matrix(x.detach(), y.detach()))
    return [value.detach(), x.grad, y.grad, plan, assignment]


def test_eight_threads_have_the_bits_of_one() -> None:
    seeds = [seed % 8 for seed in range(48)]
    alone = [call(seed) for seed in range(8)]
    with ThreadPoolExecutor(8) as threads:
        for seed, together in zip(seeds, threads.map(call, seeds), strict=True):
            assert all(torch.equal(a, b) for a, b in zip(alone[seed], together, strict=True))
