"""Maps that lie in memory as the kernels want them are read where they are: the same bits, and nothing beyond them."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from cases import METRICS, features
from torch import Tensor

from sfr_ext import cost_matrix, emd_l2, solve


def everything(x: Tensor, y: Tensor, metric: str, patch_size: int) -> list[Tensor]:
    x, y = (z.detach().requires_grad_() for z in (x, y))
    options = {"metric": metric, "patch_size": patch_size}
    cost = cost_matrix(x, y, **options)
    value = emd_l2(x, y, reduction="none", tol=1e-2, **options)
    return [cost, value, *torch.autograd.grad((cost * cost).sum() + value.sum(), (x, y))]


def with_gaps(maps: Tensor, gap: int) -> Tensor:
    """The same maps with NaNs between the channels."""
    *lead, height, width = maps.shape
    room = torch.full((*lead, height * width + gap), torch.nan, dtype=maps.dtype)
    inside = room[..., : height * width].unflatten(-1, (height, width))
    inside.copy_(maps)
    return inside


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("patch_size", [1, 2])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("channels", [1, 5, 48, 49, 100])
def test_bits_do_not_depend_on_the_layout(channels: int, metric: str, patch_size: int, dtype: torch.dtype) -> None:
    for size in ((2, 2), (3, 3), (7, 7), (8, 4)):
        x, y = features(2, channels, *size, dtype=dtype), features(2, 2, channels, 3, 5, dtype=dtype)
        copied = [z.transpose(-1, -2).contiguous().transpose(-1, -2) for z in (x, y)]
        expected = everything(*copied, metric, patch_size)
        for pair in ([x, y], [with_gaps(x, 1), with_gaps(y, 3)], [with_gaps(x, 20), with_gaps(y, 64)]):
            for ours, theirs in zip(everything(*pair, metric, patch_size), expected, strict=True):
                assert torch.equal(ours, theirs), (size, [z.stride() for z in pair])


GUARDED = """
import ctypes, mmap, sys
import torch
import sfr_ext

def at_the_end_of_memory(values):
    size, page = values.numel() * values.element_size(), mmap.PAGESIZE
    whole = -(-size // page) * page
    room = mmap.mmap(-1, whole + page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(room))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mprotect(ctypes.c_void_p(start + whole), ctypes.c_size_t(page), 0) != 0:
        raise OSError(ctypes.get_errno(), "mprotect")
    inside = torch.frombuffer(room, dtype=values.dtype, count=values.numel(), offset=whole - size).view(values.shape)
    return inside.copy_(values).requires_grad_()

for dtype in (torch.float32, torch.float64, torch.bfloat16):
    for shape in ((1, 1, 1, 1), (2, 5, 7, 7), (1, 48, 7, 7), (1, 100, 3, 3), (2, 60, 2, 4), (1, 3, 14, 14), (1, 9, 70)):
        x, y = (at_the_end_of_memory(torch.randn(shape, dtype=dtype)) for _ in range(2))
        for metric in ("l2", "cosine"):
            (sfr_ext.emd_l2(x, y, metric=metric) + sfr_ext.cost_matrix(x, y, metric=metric).sum()).backward()
print("sound", flush=True)
if "beyond" in sys.argv:
    print(ctypes.string_at(x.data_ptr(), x.numel() * x.element_size() + 1))
"""


@pytest.mark.parametrize("beyond", [False, True], ids=["ours", "a read too far"])
def test_nothing_is_read_beyond_the_last_feature(beyond: bool) -> None:
    """Features that end where memory ends; and that such a memory notices."""
    command = [sys.executable, "-c", GUARDED, *(["beyond"] if beyond else [])]
    done = subprocess.run(command, capture_output=True, text=True)
    assert "sound" in done.stdout, done.stderr
    assert (done.returncode == 0) != beyond, done.stderr


NEGATED = ["student", "teacher", "weight", "upstream"]


@pytest.mark.parametrize("which", NEGATED)
@pytest.mark.parametrize(
    "options", [{}, {"objective": "divergence"}, {"solver": "exact"}, {"metric": "cosine"}], ids=str
)
def test_views_of_the_negative(options: dict[str, str], which: str) -> None:
    """The imaginary part of a conjugate: its memory holds the other sign."""

    def negative(values: Tensor) -> Tensor:
        view = torch.complex(torch.zeros_like(values), -values).conj().imag
        assert view.is_neg() and torch.equal(view, values)
        return view

    inputs = {"student": features(2, 6, 4), "teacher": features(2, 5, 4), "weight": torch.rand(2, 6)}
    results = []
    for negated in (False, True):
        x, y, a = (
            (negative(t) if negated and name == which else t.clone()).detach().requires_grad_()
            for name, t in inputs.items()
        )
        value = emd_l2(x, y, student_weight=a, reduction="none", **options)
        up = torch.ones(2)
        grads = torch.autograd.grad(value, (x, y, a), negative(up) if negated and which == "upstream" else up)
        results.append((value, *grads))
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize("solver", ["sinkhorn", "exact"])
def test_costs_that_are_views_of_the_negative(solver: str) -> None:
    cost, a = torch.rand(2, 4, 5), torch.rand(2, 4)
    views = [torch.complex(torch.zeros_like(t), -t).conj().imag for t in (cost, a)]
    ours, expected = solve(*views, solver=solver), solve(cost, a, solver=solver)
    for name in ("transport_cost", "f", "plan"):
        assert torch.equal(getattr(ours, name), getattr(expected, name))
