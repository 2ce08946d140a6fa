"""The lists of csrc/contracts: NamedTuples with the members of the C++ structs of the same names, in the same order.

:mod:`sfr_ext._C` takes these, and says of what members they are made; whether both agree is checked at import. What is
a pointer there is a tensor here, or a part of one as (tensor, bytes before it), or None.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from .. import _C

# Numbers of the choices that _C lists.
DType: TypeAlias = int
Metric: TypeAlias = int
Method: TypeAlias = int
Strategy: TypeAlias = int

# Tensors that a solver returns: what shape and type they have (`solved.room`). Of N x M patches, with the axes of the
# problems in front; of the type that is computed in, but for counts.
Value: TypeAlias = Tensor  # [...]
Count: TypeAlias = Tensor  # [...], int64
OfRows: TypeAlias = Tensor  # [..., N]
OfColumns: TypeAlias = Tensor  # [..., M]
Entries: TypeAlias = Tensor  # [..., N + M - 1]
EntryIndices: TypeAlias = Tensor  # [..., N + M - 1], int32
OUTPUTS = ("Value", "Count", "OfRows", "OfColumns", "Entries", "EntryIndices")


def _numbered(choice: str) -> dict[str, int]:
    return {name: number for number, name in enumerate(_C.choices[choice])}


METRICS = _numbered("Metric")
METHODS = _numbered("Method")
STRATEGIES = _numbered("Strategy")
DTYPES: dict[torch.dtype, int] = {getattr(torch, name): number for name, number in _numbered("DType").items()}
METRIC_NAMES = tuple(METRICS)


class FeatureView(NamedTuple):
    data: Tensor | None = None
    dtype: DType = DTYPES[torch.float32]
    H: int = 0
    W: int = 0
    stride_b: int = 0
    stride_g: int = 0
    stride_c: int = 0
    stride_h: int = 0
    stride_w: int = 0


class CostView(NamedTuple):
    data: Tensor
    dtype: DType
    stride_b: int
    stride_g: int
    stride_n: int
    stride_m: int


class WeightView(NamedTuple):
    data: Tensor | None = None
    stride_b: int = 0
    stride_g: int = 0
    stride_n: int = 0


class SolverOptions(NamedTuple):
    """How problems are regularised and solved. A ``reach`` of 0 is none."""

    eps: float
    relative: bool
    reach_a: float = 0.0
    reach_b: float = 0.0
    tol: float = 1e-4
    max_iter: int = 1000
    symmetric: bool = False
    method: Method = METHODS["automatic"]


class Solved(NamedTuple):
    """What a solver returns, for problems `[B]` or `[B, G]`."""

    transport: Value
    entropic: Value
    f: OfRows
    g: OfColumns
    eps: Value
    centre: Value
    shift: Value
    excess: Value
    n_iter: Count
    error: Value


class Solve(NamedTuple):
    solved: Solved
    options: SolverOptions
    a: WeightView
    b: WeightView
    eps_given: Tensor | None = None
    init_g: Tensor | None = None


class SolveGrad(NamedTuple):
    solve: Solve
    grad_transport: Tensor | None
    grad_entropic: Tensor | None
    grad_eps: Tensor | None
    grad_a: Tensor | None
    grad_b: Tensor | None
    grad_eps_given: Tensor | None


class CostParams(NamedTuple):
    B: int
    G: int
    C: int
    patch: int
    metric: Metric
    compute: DType
    x: FeatureView
    y: FeatureView
    threads: int


class CostForwardParams(NamedTuple):
    problem: CostParams
    cost: Tensor


class CostBackwardParams(NamedTuple):
    problem: CostParams
    cost: Tensor
    grad_cost: Tensor
    grad_x: FeatureView
    grad_y: FeatureView


class SinkhornParams(NamedTuple):
    B: int
    G: int
    N: int
    M: int
    compute: DType
    cost: CostView
    threads: int


class SinkhornForwardParams(NamedTuple):
    problem: SinkhornParams
    solve: Solve


class SinkhornBackwardParams(NamedTuple):
    problem: SinkhornParams
    solve: SolveGrad
    grad_cost: Tensor | None


class EmdForwardParams(NamedTuple):
    problem: CostParams
    solve: Solve
    cost: Tensor | None = None
    known: bool = False


class EmdBackwardParams(NamedTuple):
    problem: CostParams
    solve: SolveGrad
    cost: Tensor | None
    grad_x: FeatureView
    grad_y: FeatureView


class ExactOptions(NamedTuple):
    """Prices of mass left behind, a unit; whether the costs are those of features; the rounding of narrow weights."""

    price_a: float = math.inf
    price_b: float = math.inf
    features: bool = False
    rounding: float = 0.0


class ExactParams(NamedTuple):
    B: int
    G: int
    N: int
    M: int
    compute: DType
    a: WeightView
    b: WeightView
    options: ExactOptions
    threads: int


class ExactSolved(NamedTuple):
    """What the exact solver returns, for problems `[B, G]`: the entries of a plan among it."""

    value: Value
    f: OfRows
    g: OfColumns
    rows: EntryIndices
    columns: EntryIndices
    mass: Entries
    n_iter: Count
    gap: Value
    magnitude: Value
    error: Value


class ExactSaved(NamedTuple):
    f: Tensor
    g: Tensor
    rows: Tensor
    columns: Tensor
    mass: Tensor


class ExactForwardParams(NamedTuple):
    problem: ExactParams
    solved: ExactSolved
    cost: CostView


class ExactBackwardParams(NamedTuple):
    problem: ExactParams
    saved: ExactSaved
    grad_value: Tensor
    grad_cost: Tensor | None
    grad_a: Tensor | None
    grad_b: Tensor | None


class ExactEmdForwardParams(NamedTuple):
    problem: CostParams
    a: WeightView
    b: WeightView
    options: ExactOptions
    solved: ExactSolved


class ExactEmdBackwardParams(NamedTuple):
    problem: CostParams
    a: WeightView
    b: WeightView
    options: ExactOptions
    saved: ExactSaved
    grad_value: Tensor
    grad_x: FeatureView
    grad_y: FeatureView
    grad_a: Tensor | None
    grad_b: Tensor | None


class DirectionsParams(NamedTuple):
    B: int
    G: int
    C: int
    h: int
    w: int
    compute: DType
    x: FeatureView
    threads: int


class DirectionsForwardParams(NamedTuple):
    problem: DirectionsParams
    directions: Tensor
    inverse: Tensor


class DirectionsBackwardParams(NamedTuple):
    problem: DirectionsParams
    directions: Tensor
    inverse: Tensor
    grad: Tensor


class AssignmentForwardParams(NamedTuple):
    B: int
    G: int
    N: int
    M: int
    compute: DType
    cost: CostView
    maximize: bool
    limit: float
    columns: Tensor
    threads: int


class Where(NamedTuple):
    device: int
    queue: int
    strategy: Strategy
    scratch: Tensor | None = None
    scratch_bytes: int = 0


def written(of: Any) -> dict[str, str]:
    """Names and annotations of a NamedTuple's members."""
    annotations = of.__annotations__
    return {name: getattr(annotations[name], "__forward_arg__", annotations[name]) for name in of._fields}


def kinds(of: Any) -> dict[str, str]:
    """The same with every output as the Tensor that it is: what _C and schemas call them."""
    return {name: "Tensor" if kind in OUTPUTS else kind for name, kind in written(of).items()}


def check(fields: dict[str, tuple[tuple[str, str, Any], ...]]) -> None:
    """Raises ImportError unless the module's lists, ``{struct: ((member, kind, default), ...)}``, are those above."""
    for name, members in fields.items():
        ours: Any = globals().get(name)
        defaults = ours._field_defaults if ours else {}
        here = [(m, kind.removesuffix(" | None"), defaults.get(m)) for m, kind in kinds(ours).items()] if ours else []
        there = [(m, kind, value if m in defaults else None) for m, kind, value in members]
        if here != there:
            raise ImportError(
                "sfr_ext: the compiled module and its Python code are not of the same version; build it again. "
                f"{name}, as (member, kind, default), is {there} in sfr_ext._C and {here} in sfr_ext/ops/contracts.py"
            )


check(_C.fields)
