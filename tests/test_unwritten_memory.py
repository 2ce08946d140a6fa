"""Memory that nobody has written decides nothing: results are the same, to the bit, whatever an allocation holds."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from sfr_ext import _C

pytestmark = pytest.mark.cpu_only("the emulator fills memory by itself, and watches it")

# glibc fills what it allocates with the complement of this byte: zeros, large indices, bits that are nearly all set.
FILLINGS = ("255", "230", "1")

SCRIPT = r"""
import hashlib, sys
import torch
import sfr_ext

torch.set_num_threads(1)
torch.manual_seed(0)
digest = hashlib.sha256()


def see(*tensors):
    for x in tensors:
        digest.update(x.detach().numpy().tobytes())


def of_result(r):
    see(r.transport_cost, r.entropic_cost, r.f, r.g, r.plan, r.dual_gap, r.marginal_error, r.n_iter)


# Widths around whole words of bits and whole vectors, with costs that tie and costs that do not.
SHAPES = [(1, 1), (3, 64), (31, 33), (64, 64), (96, 96), (100, 128), (128, 128), (129, 127), (160, 160), (118, 256)]
for dtype in (torch.float32, torch.float64):
    for n, m in SHAPES:
        few = (torch.rand(n, m) > 0.03).to(dtype)
        forbidden = few.masked_fill(few > 0, torch.inf)
        forbidden.fill_diagonal_(0)
        whole = torch.randint(0, 60, (n, m)).to(dtype)
        for cost in (few, whole, torch.rand(n, m, dtype=dtype), few.mT, whole.mT):
            of_result(sfr_ext.solve(cost, solver="exact"))
            see(sfr_ext.linear_assignment(cost), sfr_ext.linear_assignment(cost, max_cost=0.5))
        see(sfr_ext.linear_assignment(forbidden), sfr_ext.linear_assignment(forbidden.mT))
        a, b = torch.rand(2, n, dtype=dtype), torch.rand(2, m, dtype=dtype)
        a[0, 0] = b[1, -1] = 0
        pair = torch.stack([few, whole])
        for options in ({"solver": "exact"}, {"solver": "exact", "reach": 0.5}, {}, {"reach": (1.0, None)}):
            of_result(sfr_ext.solve(pair, a, b, **options))
    for count, others, channels in ((16, 16, 3), (49, 64, 20), (97, 33, 5)):
        for metric in ("l2", "sqeuclidean", "cosine", "l1"):
            x = torch.randn(2, count, channels, dtype=dtype, requires_grad=True)
            y = torch.randn(2, 3, others, channels, dtype=dtype, requires_grad=True)
            a = torch.rand(2, count, dtype=dtype, requires_grad=True)
            for options in ({"solver": "exact"}, {}, {"objective": "divergence"}, {"reach": 1.0}):
                value = sfr_ext.emd_l2(x, y, student_weight=a, metric=metric, reduction="none", **options)
                see(value, *torch.autograd.grad(value.sum(), (x, y, a)))
print(digest.hexdigest())
"""


@pytest.mark.parametrize("isa", _C.cpu_isas())
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="MALLOC_PERTURB_ is glibc's")
def test_whatever_memory_holds(isa: str) -> None:
    found = []
    for filling in FILLINGS:
        environment = {**os.environ, "MALLOC_PERTURB_": filling, "SFR_EXT_CPU_ISA": isa, "OMP_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"filled with ~{filling}: exit status {done.returncode}\n{done.stderr[-2000:]}"
        found.append(done.stdout)
    assert len(set(found)) == 1, dict(zip(FILLINGS, found, strict=True))
