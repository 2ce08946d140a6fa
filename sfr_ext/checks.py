"""What every public function asks of its arguments; each error names the argument, what was wanted, what came.

Only kinds, types and shapes are looked at, never contents: looking would break a compiled graph and make a GPU wait.
"""

from __future__ import annotations

import functools
import math
import sys
from typing import Any

import torch
from torch import Tensor

from .errors import refuse as refuse
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
    a_tensor(where, name, value)
    if value.dtype not in dtypes:
        *names, last = (str(dtype).removeprefix("torch.") for dtype in DTYPES)
        kinds = f"{', '.join(names)} or {last}" if dtypes is FLOATING else "bool, integer or floating-point"
        hint = "" if value.is_complex() else f"; give {name.split()[0]}.float()"
        refuse(TypeError, where, name, f"to be {kinds}", f"{value.dtype}{hint}")
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
    if isinstance(reach, (tuple, list)):
        if len(reach) != 2:
            refuse(ValueError, where, "reach", "to be None, a number, or one of these for each side", reach)
        sides = tuple(reach)
    else:
        sides = (reach, reach)
    reaches = [0.0 if side is None else number(where, "reach", side, positive=True) for side in sides]
    return SolverOptions(
        eps=eps,
        relative=eps_scale == "std",
        reach_a=reaches[0],
        reach_b=reaches[1],
        tol=tol,
        max_iter=max_iter,
        method=forced_method(),
    )


def emd_options(where: str, options: dict[str, Any]) -> None:
    """The options of ``emd_l2`` that say nothing of the features, before there are any."""
    choices: dict[str, Any] = {"metric": METRICS, "objective": OBJECTIVES, "reduction": REDUCTIONS}
    for name in options:
        if name in choices:
            choice(where, name, options[name], choices[name])
    whole(where, "patch_size", options.get("patch_size", 1), 1)
    usual = {"solver": "sinkhorn", "eps": 1.0, "eps_scale": "std", "reach": None, "tol": 0.0, "max_iter": 1}
    solver_options(where, **{name: options.get(name, value) for name, value in usual.items()})


def features(where: str, x_name: str, x: Any, y_name: str, y: Any, metric: Any, patch_size: Any) -> int:
    """A student ``[B,C,H,W]`` | ``[B,N,C]`` and a teacher of the same kind, perhaps with groups; the patch size."""
    tensor(where, x_name, x)
    tensor(where, y_name, y, like=x)
    choice(where, "metric", metric, METRICS)
    size = whole(where, "patch_size", patch_size, 1)
    if x.dim() not in (3, 4):
        refuse(ValueError, where, x_name, "of shape [B, C, H, W] or [B, N, C]", shape_of(x) + _other_axes(x_name, x, y))
    maps = x.dim() == 4
    channel = -3 if maps else -1
    fits = y.dim() - x.dim() in (0, 1)
    if not fits or y.shape[0] != x.shape[0] or y.shape[channel] != x.shape[channel]:
        kind = "[B, C, H', W'] or [B, G, C, H', W']" if maps else "[B, M, C] or [B, G, M, C]"
        sizes = f"B = {x.shape[0]} and C = {x.shape[channel]} (from {x_name})"
        refuse(ValueError, where, y_name, f"of shape {kind} with {sizes}", shape_of(y) + _hint(x_name, x, y_name, y))
    for name, value in ((x_name, x), (y_name, y)):
        if 0 in value.shape[1:]:
            refuse(ValueError, where, name, "to have no empty axis but the batch", shape_of(value))
    if size == 1:
        return size
    if not maps:
        wanted = f"to be 1 for tokens ({x_name} of shape {shape_of(x)})"
        refuse(ValueError, where, "patch_size", wanted, size)
    for name, value in ((x_name, x), (y_name, y)):
        if min(value.shape[-2:]) < size:
            refuse(ValueError, where, "patch_size", f"to fit into {name} of shape {shape_of(value)}", size)
    return size


def _other_axes(name: str, x: Tensor, y: Tensor) -> str:
    """What to do about a student with an axis too many or too few."""
    if x.dim() == 2:
        return f"; for one set of tokens, give {name}[None]"
    if x.dim() != 5:
        return ""
    if y.dim() == 5:
        return f"; for pairs of groups, give {name}.flatten(0, 1) and the other side's, too"
    return "; groups are the other side's: swap the two"


def _hint(x_name: str, x: Tensor, y_name: str, y: Tensor) -> str:
    """What to do about a usual mistake: axes in another order, a map and tokens, no batch, groups of the student,
    other channels, or queries and classes of another number."""
    p, q, maps = tuple(x.shape), tuple(y.shape), x.dim() == 4
    channel = -3 if maps else -1
    if not maps and len(q) == 4 and q[:2] == (p[0], p[2]):
        return f"; to compare tokens with a map, give {y_name}.flatten(2).mT"
    if maps and len(q) == 3 and (q[0], q[2]) == p[:2]:
        return f"; to compare a map with tokens, give {x_name}.flatten(2).mT"
    same_kind = len(q) == len(p) or (len(q) == len(p) + 1 and q[0] == p[0])
    if same_kind and q[channel] != p[channel]:
        found = _in_another_order(x_name, p, y_name, q, maps)
        return found or (
            "; features of different channels have no distance: project one side to the other's channels, as "
            'FeatureDistiller with channel_mode="project" does for layers of networks'
        )
    if len(q) == len(p) - 1:
        if q[channel:] and q[channel] == p[channel]:
            return f"; to compare each of {x_name} with {y_name}, give {y_name}.expand({p[0]}, *{y_name}.shape)"
        if q[0] == p[0] and q[-1] == p[-1]:
            return "; groups are the other side's: swap the two (or, for [B, H, W, C], flatten(1, 2))"
        return ""
    if len(q) == len(p) + 1 and p[0] == q[1]:  # a map without its batch passes for tokens
        return f"; for {x_name} without a batch, give {x_name}.expand({q[0]}, *{x_name}.shape)"
    if len(q) != len(p) or q[0] == p[0]:
        return ""
    return f"; to compare each of {x_name} with all of {y_name}, give {y_name}.expand({p[0]}, *{y_name}.shape)"


def _in_another_order(x_name: str, p: tuple[int, ...], y_name: str, q: tuple[int, ...], maps: bool) -> str:
    """Where the channels of one side of shapes ``p`` and ``q`` are as many as what another axis of the other has."""
    channel, other = (-3, -1) if maps else (-1, -2)
    sides = [(name, s) for name, s, t in ((x_name, p, q), (y_name, q, p)) if s[other] == t[channel]]
    if maps:  # of [B, p, p, q] and [B, q, p, p] it is the first
        last = [(name, s) for name, s in ((x_name, p), (y_name, q)) if s[-3] == s[-2] != s[-1]]
        sides = [side for side in sides if side in last] or ([] if last else sides)
    ways = []
    for name, s in sides:
        order = "mT" if not maps else "permute(0, 3, 1, 2)" if len(s) == 4 else "movedim(-1, -3)"
        ways.append(f"{name}.{order}")
    if not ways:
        return ""
    layout = "[B, H, W, C]" if maps else "[B, C, N]"
    which = sides[0][0] if len(sides) == 1 else "one side"
    return f"; {which} looks like {layout}: give {' or '.join(ways)}"


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
    tails = sorted({(count,), grid}, key=len)
    each = sorted({(*head, *tail) for head in (lead[:1], lead) for tail in tails}, key=lambda s: (len(s), s))
    wanted = f"of shape {_either(each)}, or {_either(tails)} for all"
    refuse(ValueError, where, name, wanted, shape_of(value) + _squeezed(name, value, [*tails, *each]))


def _either(shapes: list[tuple[int, ...]]) -> str:
    return " or ".join(str(list(shape)) for shape in shapes)


def _squeezed(name: str, value: Tensor, taken: list[tuple[int, ...]]) -> str:
    """What to do about a single axis of size 1 too many, as masks have it."""
    shape = tuple(value.shape)
    axes = [i for i, size in enumerate(shape) if size == 1 and shape[:i] + shape[i + 1 :] in taken]
    return f"; give {name}.squeeze({axes[0]})" if axes else ""


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
