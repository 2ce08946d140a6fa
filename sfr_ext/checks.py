"""What every public function asks of its arguments; each error names the argument, what was wanted, what came.

Only kinds, types and shapes are looked at, never contents: looking would break a compiled graph and make a GPU wait.
"""

from __future__ import annotations

import functools
import math
import sys
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.compiler import is_compiling

from . import hints
from .errors import refuse as refuse
from .kinds import a_bool as a_bool
from .kinds import a_number as a_number
from .kinds import a_tensor as a_tensor
from .kinds import an_int as an_int
from .ops import DTYPES, METRICS, SolverOptions, compute_dtype, forced_method

INTEGERS = tuple(getattr(torch, f"{sign}int{bits}") for sign in ("", "u") for bits in (8, 16, 32, 64))
FLOATING = tuple(DTYPES)
WEIGHT_DTYPES = (*DTYPES, torch.bool, *INTEGERS)
SOLVERS = ("sinkhorn", "exact")
OBJECTIVES = ("transport", "entropic", "divergence")
EPS_SCALES = ("std", "absolute")
REDUCTIONS = ("mean", "sum", "none")
_MOST = 2**63 - 1  # what kernels count with
_LARGEST = sys.float_info.max  # by a name of its own, since torch.compile of torch 2.4 does not look into sys


def shape_of(tensor: Tensor) -> str:
    return str(list(tensor.shape))


@functools.cache
def _why_not_on_gpu(index: int) -> str:
    """Why tensors on this GPU cannot be taken; empty if they can."""
    from . import _C
    from .build import build_info

    if not build_info()["cuda"]:
        return build_info()["why_no_cuda"]
    return _C.cuda.why_unusable() or _C.cuda.why_unusable_on(index)


def tensor(
    where: str, name: str, value: Any, like: Tensor | None = None, dtypes: tuple[torch.dtype, ...] = FLOATING
) -> None:
    """A tensor of one of the types, on a device that kernels run on, the same as that of ``like``."""
    if not isinstance(value, Tensor) or value.layout is not torch.strided or (not is_compiling() and value.is_nested):
        a_tensor(where, name, value)
    if value.dtype not in dtypes:
        *names, last = (str(dtype).removeprefix("torch.") for dtype in DTYPES)
        kinds = f"{', '.join(names)} or {last}" if dtypes is FLOATING else "bool, integer or floating-point"
        way = "dequantize" if value.is_quantized else "float"
        hint = "" if value.is_complex() else f"; give {name.split()[0]}.{way}()"
        refuse(TypeError, where, name, f"to be {kinds}", f"{value.dtype}{hint}")
    if value.is_cpu and (like is None or like.is_cpu):
        return
    if value.device.type not in ("cpu", "meta", "cuda"):
        refuse(ValueError, where, name, "on the CPU or a CUDA device", f"a tensor on {value.device}")
    if value.device.type == "cuda" and (reason := _why_not_on_gpu(value.device.index or 0)):
        refuse(ValueError, where, name, f"on the CPU ({reason})", f"a tensor on {value.device}")
    if like is not None and value.device != like.device:
        refuse(ValueError, where, name, f"on {like.device}, where the others are", f"a tensor on {value.device}")


def choice(where: str, name: str, value: Any, choices: tuple[str, ...] | dict[str, int]) -> None:
    if not isinstance(value, str):
        refuse(TypeError, where, name, "to be a str", type(value).__name__)
    if value not in choices:
        refuse(ValueError, where, name, "to be one of " + ", ".join(map(repr, choices)), repr(value))


def number(where: str, name: str, value: Any, *, positive: bool) -> Any:
    value = a_number(where, name, value)
    if not 0 <= value <= _LARGEST or (positive and value == 0):  # an int may be beyond any float
        refuse(ValueError, where, name, f"to be finite and {'above' if positive else 'at least'} 0", value)
    return value


def whole(where: str, name: str, value: Any, least: int) -> int:
    value = an_int(where, name, value)
    if value < least:
        refuse(ValueError, where, name, f"to be at least {least}", value)
    if value > _MOST:
        refuse(ValueError, where, name, f"to be at most {_MOST}", value)
    return value


def solver_options(
    where: str, solver: Any, eps: Any, eps_scale: Any, reach: Any, tol: Any, max_iter: Any
) -> SolverOptions:
    choice(where, "solver", solver, SOLVERS)
    eps = number(where, "eps", eps, positive=True)
    choice(where, "eps_scale", eps_scale, EPS_SCALES)
    tol = number(where, "tol", tol, positive=False)
    max_iter = whole(where, "max_iter", max_iter, 1)
    reach_a, reach_b = (None, None) if reach is None else reaches(where, reach)
    return SolverOptions(
        eps=eps,
        relative=eps_scale == "std",
        reach_a=reach_a or 0.0,
        reach_b=reach_b or 0.0,
        tol=tol,
        max_iter=max_iter,
        method=forced_method(),
    )


def reaches(where: str, reach: Any) -> tuple[Any, Any]:
    """That of each side; None: balanced."""
    if isinstance(reach, (tuple, list)):
        if len(reach) != 2:
            refuse(ValueError, where, "reach", "to be None, a number, or one of these for each side", reach)
        first, second = reach
    else:
        first = second = reach
    a = None if first is None else number(where, "reach", first, positive=True)
    return a, None if second is None else number(where, "reach", second, positive=True)


def emd_options(where: str, options: dict[str, Any]) -> dict[str, Any]:
    """The options of ``emd_l2`` that say nothing of the features, before there are any; with Python's own numbers."""
    choices: dict[str, Any] = {"metric": METRICS, "objective": OBJECTIVES, "reduction": REDUCTIONS}
    for name in options:
        if name in choices:
            choice(where, name, options[name], choices[name])
    size = whole(where, "patch_size", options.get("patch_size", 1), 1)
    usual = {"solver": "sinkhorn", "eps": 1.0, "eps_scale": "std", "reach": None, "tol": 0.0, "max_iter": 1}
    given = solver_options(where, **{name: options.get(name, value) for name, value in usual.items()})
    plain: dict[str, Any] = {"patch_size": size, "eps": given.eps, "tol": given.tol, "max_iter": given.max_iter}
    if (reach := options.get("reach")) is not None:
        pair = given.reach_a or None, given.reach_b or None
        plain["reach"] = pair if isinstance(reach, (tuple, list)) else pair[0]
    return {name: plain.get(name, value) for name, value in options.items()}


def features(where: str, x_name: str, x: Any, y_name: str, y: Any, metric: Any, patch_size: Any) -> int:
    """A student ``[B,C,H,W]`` | ``[B,N,C]`` and a teacher of the same kind, perhaps with groups; the patch size."""
    tensor(where, x_name, x)
    tensor(where, y_name, y, like=x)
    choice(where, "metric", metric, METRICS)
    size = whole(where, "patch_size", patch_size, 1)
    feature_shapes(where, x_name, x, y_name, y, size)
    return size


def feature_shapes(where: str, x_name: str, x: Tensor, y_name: str, y: Tensor, size: int) -> None:
    if x.dim() not in (3, 4):
        came = shape_of(x) + hints.other_axes(x_name, x, y)
        refuse(ValueError, where, x_name, "of shape [B, C, H, W] or [B, N, C]", came)
    maps = x.dim() == 4
    channel = -3 if maps else -1
    fits = y.dim() - x.dim() in (0, 1)
    if not fits or y.shape[0] != x.shape[0] or y.shape[channel] != x.shape[channel]:
        kind = "[B, C, H', W'] or [B, G, C, H', W']" if maps else "[B, M, C] or [B, G, M, C]"
        sizes = f"B = {x.shape[0]} and C = {x.shape[channel]} (from {x_name})"
        came = shape_of(y) + hints.features(x_name, x, y_name, y)
        refuse(ValueError, where, y_name, f"of shape {kind} with {sizes}", came)
    for name, value in ((x_name, x), (y_name, y)):
        if 0 in value.shape[1:]:
            refuse(ValueError, where, name, "to have no empty axis but the batch", shape_of(value))
    if size == 1:
        return
    if not maps:
        wanted = f"to be 1 for tokens ({x_name} of shape {shape_of(x)})"
        refuse(ValueError, where, "patch_size", wanted, size)
    for name, value in ((x_name, x), (y_name, y)):
        if min(value.shape[-2:]) < size:
            refuse(ValueError, where, "patch_size", f"to fit into {name} of shape {shape_of(value)}", size)


def weight(
    where: str, name: str, value: Any, lead: tuple[int, ...], grid: tuple[int, ...], like: tuple[Tensor, ...]
) -> Tensor | None:
    """Weights as ``[B,N]`` | ``[B,G,N]``, from ``[B,N]`` | ``[B,H,W]``, ``[B,G,...]``, or ``[N]`` | ``[H,W]`` for all.

    Args:
        lead: (B,) or (B, G), for messages and for the check.
        grid: (N,) or (H, W).
        like: the tensors whose accumulator type the weights take.
    """
    if value is None:
        return None
    tensor(where, name, value, like[0], WEIGHT_DTYPES)
    dtype, count = compute_dtype(*like), math.prod(grid)
    for head in (lead[:1], lead):
        if value.shape == (*head, count):
            return value.to(dtype)
        if value.shape == (*head, *grid):
            return value.reshape(*head, count).to(dtype)
    if value.shape in ((count,), grid):
        return value.reshape(count).to(dtype).expand(lead[0], count)
    refuse_weight(where, name, value, lead, grid)


def weight_shapes(lead: tuple[int, ...], grid: tuple[int, ...]) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """Shapes that weights may have: one set for all problems, and more."""
    tails = sorted({(math.prod(grid),), grid}, key=len)
    each = sorted({(*head, *tail) for head in (lead[:1], lead) for tail in tails}, key=lambda s: (len(s), s))
    return tails, each


def refuse_weight(where: str, name: str, value: Tensor, lead: tuple[int, ...], grid: tuple[int, ...]) -> NoReturn:
    tails, each = weight_shapes(lead, grid)
    wanted = f"of shape {_either(each)}, or {_either(tails)} for all"
    refuse(ValueError, where, name, wanted, shape_of(value) + hints.squeezed(name, value, [*tails, *each]))


def _either(shapes: list[tuple[int, ...]]) -> str:
    return " or ".join(str(list(shape)) for shape in shapes)


def side(where: str, name: str, value: Any, lead: tuple[int, ...], n: int, cost: Tensor) -> tuple[int, ...]:
    """Weights ``[..., N]`` of a cost matrix; the leading axes that they and ``lead`` have together."""
    if value is None:
        return lead
    tensor(where, name, value, cost, WEIGHT_DTYPES)
    ours = tuple(value.shape[:-1])
    if len(ours) == 1 and tuple(cost.shape[:-2]) == 2 * ours and ours != (1,):
        k = ours[0]
        wanted = f"of shape [{k}, 1, {n}], one for each problem of the batch, or [1, {k}, {n}], one for each group,"
        refuse(ValueError, where, name, f"{wanted} for cost of shape {shape_of(cost)}", shape_of(value))
    longer, shorter = (ours, lead) if len(ours) > len(lead) else (lead, ours)
    start = len(longer) - len(shorter)
    pairs = list(zip(longer[start:], shorter, strict=True))
    if value.dim() < 1 or value.shape[-1] != n or any(p != q and 1 not in (p, q) for p, q in pairs):
        wanted = f"of shape {[*lead, n]} (or broadcastable to it) for cost of shape {shape_of(cost)}"
        others = cost.shape[-1 if name == "a" else -2]
        swapped = value.dim() > 0 and value.shape[-1] == others != n
        hint = "; a is for the rows of cost, b for its columns" if swapped else ""
        refuse(ValueError, where, name, wanted, shape_of(value) + hint)
    return (*longer[:start], *(q if p == 1 else p for p, q in pairs))


def potentials(where: str, init: Any, f_shape: tuple[int, ...], g_shape: tuple[int, ...], like: Tensor) -> None:
    """``init=(f, g)``."""
    if not isinstance(init, (tuple, list)) or len(init) != 2:
        refuse(TypeError, where, "init", "to be a pair (f, g)", type(init).__name__)
    for name, value, shape in (("init[0] (f)", init[0], f_shape), ("init[1] (g)", init[1], g_shape)):
        tensor(where, name, value, like)
        if value.shape != shape:
            refuse(ValueError, where, name, f"of shape {list(shape)}", shape_of(value))
