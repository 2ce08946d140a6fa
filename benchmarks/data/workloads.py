"""What is solved: batches of feature map pairs, always the same for the same name, and what is to be reached."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

FEATURE_MAPS = Path(__file__).with_name("feature_maps.npz")


@dataclass(frozen=True)
class Problem:
    """A batch of transport problems with uniform weights and one regularisation for all."""

    x: Tensor  # [B, C, H, W]
    y: Tensor  # [B, C, H', W'], or [B, G, C, H', W']: every x against G of them
    eps: float  # in units of the cost, so that it means the same in every library
    tol: float  # L1 marginal error, both sides summed
    metric: str = "l2"

    def to(self, device: str) -> Problem:
        return dataclasses.replace(self, x=self.x.to(device), y=self.y.to(device))

    def cut(self) -> Problem:
        """A corner of it, small enough for a dry run."""
        x, y = (side[:3, ..., :8, :3, :3].contiguous() for side in (self.x, self.y))
        return dataclasses.replace(self, x=x, y=y)

    def options(self) -> dict[str, Any]:
        """Keyword arguments for sfr_ext."""
        return {"metric": self.metric, "eps": self.eps, "eps_scale": "absolute", "tol": self.tol}

    def pairs(self) -> tuple[Tensor, Tensor]:
        """Without groups: as many x as y, ``[B G, C, H, W]``."""
        if self.y.dim() == 4:
            return self.x, self.y
        return self.x[:, None].expand(-1, self.y.shape[1], -1, -1, -1).flatten(0, 1), self.y.flatten(0, 1)

    def tokens(self) -> tuple[Tensor, Tensor]:
        """Pairs as ``[B G, N, C]`` and ``[B G, M, C]``, contiguous."""
        x, y = self.pairs()
        return as_tokens(x), as_tokens(y)

    def sizes(self) -> tuple[int, int, int, int]:
        """Number of problems, N, M, C."""
        count = math.prod(self.y.shape[:-3])
        return count, self.x[0, 0].numel(), math.prod(self.y.shape[-2:]), self.x.shape[1]


@dataclass(frozen=True)
class Target:
    """Our row is to be at least so many times faster than these rows of libraries that reach the same error."""

    times: float
    peers: tuple[str, ...] = ()  # empty: every one that no other target names
    to_1e_6: bool = False  # our rows that solve to 1e-6, against the others' at the workload's tolerance


@dataclass(frozen=True)
class Workload:
    description: str
    make: Callable[[], Problem]
    targets: tuple[Target, ...] = ()
    peers: bool = True  # else our own rows alone


def as_tokens(maps: Tensor) -> Tensor:
    return maps.flatten(2).transpose(1, 2).contiguous()


def cost_std(x: Tensor, y: Tensor, *, metric: str = "l2") -> Tensor:
    """Standard deviation of each pair's costs, l2 or squared, ``[B]``."""
    distances = torch.cdist(as_tokens(x.double()), as_tokens(y.double()))
    costs = distances.square() if metric == "sqeuclidean" else distances
    return costs.flatten(1).std(1, correction=0)


def load_feature_maps() -> tuple[Tensor, Tensor]:
    """Maps of a small trained network (make_feature_maps.py), unit vectors at each place.

    Returns:
        shallow ``[B, C, H, W]`` and deep ``[B, G, C, H, W]``, float32.
    """
    with np.load(FEATURE_MAPS) as file:
        shallow, deep = (torch.from_numpy(file[name].astype(np.float32)) for name in ("shallow", "deep"))
    return F.normalize(shallow, dim=1), F.normalize(deep, dim=2)


def random_maps(
    b: int,
    side: int,
    c: int,
    *,
    other: int | None = None,
    groups: int = 0,
    eps: float = 0.05,
    dtype: torch.dtype = torch.float32,
    metric: str = "l2",
) -> Problem:
    """Random unit vectors; ``other``: side of the teacher's maps; eps in standard deviations of the costs."""
    generator = torch.Generator().manual_seed(0)
    lead = (b, groups) if groups else (b,)
    x = torch.randn(b, c, side, side, generator=generator)
    y = torch.randn(*lead, c, other or side, other or side, generator=generator)
    x, y = F.normalize(x, dim=-3).to(dtype), F.normalize(y, dim=-3).to(dtype)
    one = Problem(x, y, eps=0.0, tol=1e-3, metric=metric)
    few = (side[:64] for side in one.pairs())  # of so many patches that more of them change nothing
    return dataclasses.replace(one, eps=eps * float(cost_std(*few, metric=metric).mean()))


def real_maps() -> Problem:
    shallow, deep = load_feature_maps()
    x = shallow[:, None].expand_as(deep).flatten(0, 1)
    y = deep.flatten(0, 1)
    # The costs of real maps spread differently from pair to pair. An l2 cost scales with its features, so
    # after this one eps is 0.05 standard deviations for every pair.
    std = cost_std(x, y).float()[:, None, None, None]
    return Problem(x / std, y / std, eps=0.05, tol=1e-3)


def _described(b: int, side: int, c: int, extra: str = "", other: int | None = None) -> str:
    return f"B={b}, {side**2} x {(other or side) ** 2} patches, C={c}, random unit vectors{extra}"


def _goals() -> dict[str, Workload]:
    eager_and_ott = ("plain torch, log domain, eager", "plain torch, scaling, eager", "OTT-JAX")
    tight = Target(5, to_1e_6=True)
    sizes: dict[str, tuple[tuple[int, int, int], tuple[Target, ...]]] = {
        "w1": ((128, 7, 512), (Target(40, eager_and_ott), Target(20), tight)),
        "small": ((128, 4, 64), (Target(25),)),
        "large": ((16, 14, 256), (Target(15), tight)),
        "huge": ((2, 28, 256), (Target(8),)),
    }
    return {
        name: Workload(_described(*size), partial(random_maps, *size), targets)
        for name, (size, targets) in sizes.items()
    }


def _grid() -> dict[str, Workload]:
    """One thing at a time is other than in "w1", so that a row tells what that one thing does."""
    grid = {}
    for side in (4, 8, 14, 28):
        make = partial(random_maps, 16, side, 512)
        grid[f"side {side}"] = Workload(_described(16, side, 512), make, peers=side < 28)
    for c in (16, 64, 2048):
        grid[f"C {c}"] = Workload(_described(128, 7, c), partial(random_maps, 128, 7, c))
    for b in (1, 16, 1024):
        grid[f"B {b}"] = Workload(_described(b, 7, 512), partial(random_maps, b, 7, 512), peers=b < 1024)
    for eps in (0.3, 0.01):
        text = _described(128, 7, 512, f", eps {eps} std")
        grid[f"eps {eps}"] = Workload(text, partial(random_maps, 128, 7, 512, eps=eps))
    grid["bfloat16"] = Workload(
        _described(128, 7, 512, ", bfloat16"), partial(random_maps, 128, 7, 512, dtype=torch.bfloat16), peers=False
    )
    grid["49 x 16"] = Workload(_described(128, 7, 512, other=4), partial(random_maps, 128, 7, 512, other=4))
    grid["groups"] = Workload(
        _described(32, 7, 128, ", 4 teachers for each student"), partial(random_maps, 32, 7, 128, groups=4)
    )
    return grid


def _squared() -> dict[str, Workload]:
    """For libraries that have squared distances only."""
    return {
        f"{name}, squared": Workload(
            _described(*size, ", squared distances"), partial(random_maps, *size, metric="sqeuclidean")
        )
        for name, size in {"w1": (128, 7, 512), "large": (16, 14, 256)}.items()
    }


REAL = Workload("B=32, 49 x 49 patches, C=32, feature maps of a trained network", real_maps)
WORKLOADS = {**_goals(), "maps": REAL, **_grid(), **_squared()}
# "quick" has the workloads that something is to be reached on, and real maps. "full" has all. "kernels" has the first
# that a GPU is asked. Peers run where one call takes them seconds, not minutes, and where they take the type.
SUITES = {"quick": [*_goals(), "maps"], "full": list(WORKLOADS), "kernels": ["w1", "large", *_squared()]}
