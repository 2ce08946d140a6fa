"""Problems of every kind: sizes at the edges of tiles, scales, layouts, weights, ties, masks, options."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from sfr_ext import ops

# Vectors hold 2 to 16 entries, tiles 8, 16 or 48 patches, warps 32 of them.
EDGES = [1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 31, 32, 33, 47, 48, 49, 50, 63, 64, 65, 96, 97]
METRICS = list(ops.METRICS)
# The power of the features' scale that a cost has. Squares, and products of squares, overflow and underflow: how much
# of the exponents that are asked for float32 takes.
POWERS = {"l2": 1, "sqeuclidean": 2, "cosine": 0, "l1": 1}
SHARES = {"l2": 0.5, "sqeuclidean": 0.25, "cosine": 0.5, "l1": 1.0}
assert set(METRICS) == set(POWERS) == set(SHARES)
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
CONTENTS = ["normal", "positive", "ties", "equal", "clusters", "offset", "sparse"]
LAYOUTS = ["contiguous", "permuted", "strided", "negative", "expanded"]
WEIGHTS = ["none", "equal", "mild", "skewed", "zeros", "mask", "counts", "one", "shared", "large"]


@dataclass
class Problem:
    """Features, weights and options of `emd_l2`."""

    x: Tensor
    y: Tensor
    a: Tensor | None
    b: Tensor | None
    options: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        def of(t: Tensor | None) -> str:
            return "None" if t is None else f"{str(t.dtype)[6:]}{list(t.shape)}{list(t.stride())}"

        return f"Problem({', '.join(map(of, (self.x, self.y, self.a, self.b)))}, {self.options})"

    @property
    def weights(self) -> dict[str, Tensor | None]:
        return {"student_weight": self.a, "teacher_weight": self.b}

    def wide(self) -> Problem:
        """The same numbers in float64."""
        sides = (None if w is None else w.double() for w in (self.a, self.b))
        return Problem(self.x.double(), self.y.double(), *sides, self.options)


def random(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def contents(kind: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    values = torch.randn(shape, generator=generator, dtype=torch.float64)
    if kind == "positive":
        return values.abs()
    if kind == "ties":
        return values.round()
    if kind == "equal":
        return torch.ones(shape, dtype=torch.float64)
    if kind == "clusters":
        return 0.1 * values + 3 * torch.randint(0, 2, (*shape[:-1], 1), generator=generator)
    if kind == "offset":
        return values + 20
    if kind == "sparse":
        return values.relu()
    return values


def laid_out(values: Tensor, layout: str) -> Tensor:
    """The same values, elsewhere in memory."""
    if layout == "permuted":
        return values.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "strided":
        room = torch.full((*values.shape, 3), torch.nan, dtype=values.dtype)
        room[..., 1] = values
        return room[..., 1]
    if layout == "negative" and values.dtype in (torch.float32, torch.float64):
        return torch.complex(torch.zeros_like(values), -values).conj().imag
    if layout == "expanded":
        return values[:1].expand_as(values)
    return values


def weight(kind: str, lead: tuple[int, ...], n: int, generator: torch.Generator) -> Tensor | None:
    shape = (*lead, n)
    uniform = torch.rand(shape, generator=generator, dtype=torch.float64)
    if kind == "none":
        return None
    if kind == "equal":
        return torch.full(shape, 0.3)
    if kind == "skewed":
        return (2 * torch.randn(shape, generator=generator, dtype=torch.float64)).softmax(-1)
    if kind == "zeros":
        found = torch.where(uniform < 0.3, 0.0, uniform)
        found[..., 0] = 0.5
        return found
    if kind == "mask":
        found = uniform < 0.6
        found[..., -1] = True
        return found
    if kind == "counts":
        return torch.randint(1, 9, shape, generator=generator)
    if kind == "one":
        found = torch.zeros(shape)
        found[..., n // 2] = 7.0
        return found
    if kind == "shared":
        return uniform.flatten(0, -2)[0].float() + 0.1
    if kind == "large":
        return (uniform.float() + 0.1) * 3e38
    return uniform.float() + 0.2


@st.composite
def sizes(draw: st.DrawFn, most: int) -> tuple[int, int]:
    """Patches of both sides, with no more than ``most`` pairs."""
    n = draw(st.sampled_from([k for k in EDGES if k <= most]))
    return n, draw(st.sampled_from([k for k in EDGES if k * n <= most]))


@st.composite
def problems(
    draw: st.DrawFn,
    most: int = 1100,
    dtypes: list[torch.dtype] = DTYPES,
    weights: list[str] = WEIGHTS,
    scales: tuple[int, int] = (-30, 30),
    reaches: tuple[Any, ...] = (None,),
) -> Problem:
    n, m = draw(sizes(most))
    batch, groups = draw(st.integers(1, 3)), draw(st.sampled_from([(), (1,), (2,)]))
    channels = draw(st.sampled_from([1, 2, 3, 8, 17, 49]))
    generator = random(draw(st.integers(0, 2**32 - 1)))
    kind, dtype = draw(st.sampled_from(CONTENTS)), draw(st.sampled_from(dtypes))
    metric = draw(st.sampled_from(METRICS))
    exponent = draw(st.one_of(st.just(0), st.integers(*scales)))
    if dtype == torch.float16:
        exponent = max(-2, min(2, exponent))
    elif dtype != torch.float64:
        exponent = int(exponent * SHARES[metric])
    maps = draw(st.booleans())
    sides = []
    for lead, count in (((batch,), n), ((batch, *groups), m)):
        values = (contents(kind, (*lead, count, channels), generator) * 10.0**exponent).to(dtype)
        if maps:
            width = next(k for k in (7, 4, 3, 2, 1) if count % k == 0)
            values = values.mT.unflatten(-1, (count // width, width)).contiguous()
        sides.append(laid_out(values, draw(st.sampled_from(LAYOUTS))))
    reach = draw(st.sampled_from(reaches))
    if min(n, m) == 1 or kind in ("equal", "ties") or (metric == "cosine" and channels == 1):
        reach = None  # a relative eps where all costs are equal: see test_one_pair_and_a_reach
    if reach is not None:
        weights = [kind for kind in weights if kind in ("none", "skewed")]  # of mass 1: see test_masses_that_differ
    a = weight(draw(st.sampled_from(weights)), (batch,), n, generator)
    b = weight(draw(st.sampled_from(weights)), (batch, *groups), m, generator)
    options: dict[str, Any] = {"metric": metric, "eps": draw(st.sampled_from([0.1, 0.3, 1.0, 5.0]))}
    if reach is not None:
        unit = 10.0 ** (POWERS[metric] * exponent)  # of the cost
        options["reach"] = tuple(None if r is None else r * unit for r in reach)
    return Problem(*sides, a, b, options)
