"""Calls from several threads of one process: the GIL is released while kernels run, and nothing is shared."""

from __future__ import annotations

import subprocess
import sys
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


FIRST_CALLS = """
import sys, threading, torch
gil = getattr(sys, "_is_gil_enabled", lambda: True)
before = gil()
import sfr_ext
assert gil() == before, "import sfr_ext has turned the GIL on"
x, together, values = torch.arange(150.0).reshape(2, 25, 3).sin(), threading.Barrier(8), []
def call(k):
    together.wait()
    values.append(sfr_ext.emd_l2(x, x.cos(), solver="exact" if k % 2 else "sinkhorn", objective="transport"))
threads = [threading.Thread(target=call, args=(k,)) for k in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(len(values), len(set(map(float, values))))
"""


def test_first_calls_may_come_from_several_threads_and_turn_no_gil_on() -> None:
    command = [sys.executable, "-c", FIRST_CALLS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.stdout.split() == ["8", "2"], done.stdout + done.stderr
