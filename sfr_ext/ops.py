"""The operators ``torch.ops.sfr_ext.*``: what they are called, how each device runs them, their fakes, their autograd.

Arguments have been checked by :mod:`sfr_ext.checks`; formulas and shapes are stated once, in ``csrc/*.h``. An
operator allocates its outputs with torch and hands addresses, sizes and strides to :mod:`sfr_ext._C`, which knows
nothing of torch.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any, NoReturn

import torch
from torch import Tensor

from . import _C

METRICS = {"l2": 0, "sqeuclidean": 1, "cosine": 2}  # csrc/types.h
_DTYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2, torch.float64: 3}

STRATEGIES = {"automatic": 0, "several": 1, "block": 2, "team": 3, "stream": 4}  # csrc/cuda/cuda.h

_lib = torch.library.Library("sfr_ext", "DEF")

# ------------------------------------------------------------------------------------------------ kernels

# For tests and benchmarks: a strategy other than the one that follows from a problem's shape, and a module whose CUDA
# kernels are emulated and take the place of those for the CPU.
_strategy = "automatic"
_emulated: Any = None


@contextlib.contextmanager
def forced(strategy: str = "automatic", emulated: Any = None) -> Iterator[None]:
    """Within it, CUDA kernels use this strategy, and tensors on the CPU go to this module's emulated ones."""
    global _strategy, _emulated
    before = _strategy, _emulated
    _strategy, _emulated = strategy, emulated
    try:
        yield
    finally:
        _strategy, _emulated = before


def _run(name: str, like: Tensor, *arguments: Any) -> int:
    """Calls a kernel on the device of ``like``; returns its status."""
    on_cpu = like.device.type == "cpu"
    if on_cpu and _emulated is None:
        return getattr(_C, name)(*arguments)
    kernel = getattr((_emulated or _C).cuda, name)
    stream = 0 if on_cpu else torch.cuda.current_stream(like.device).cuda_stream
    place = (like.device.index or 0, stream, STRATEGIES[_strategy])
    missing = kernel(*arguments, (*place, 0, 0))
    if missing:
        scratch = torch.empty(missing, dtype=torch.uint8, device=like.device)
        kernel(*arguments, (*place, scratch.data_ptr(), missing))
    return 0  # the contents of weights are not looked at: that would make the device wait


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """The type that sums are taken in and values are returned in: float64 if any input is, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


# ---------------------------------------------------------------------------------------- views for _C


def _feature_view(features: Tensor | None) -> tuple[int, ...]:
    """(address, dtype, H, W, strides of B, G, C, H, W) of ``[B,C,H,W]`` | ``[B,G,C,H,W]``."""
    if features is None:
        return (0,) * 9
    s = features.stride()
    address, dtype = features.data_ptr(), _DTYPES[features.dtype]
    if len(s) == 5:  # [B, G, C, H, W]
        return (address, dtype, *features.shape[3:], *s)
    return (address, dtype, *features.shape[2:], s[0], 0, *s[1:])


def _token_view(tokens: Tensor | None) -> tuple[int, ...]:
    """The same for ``[B,N,C]`` | ``[B,G,N,C]``: a map of height 1."""
    if tokens is None:
        return (0,) * 9
    s = tokens.stride()
    group = s[1] if len(s) == 4 else 0
    return (tokens.data_ptr(), _DTYPES[tokens.dtype], 1, tokens.shape[-2], s[0], group, s[-1], 0, s[-2])


def _weight_view(weight: Tensor | None) -> tuple[int, ...]:
    """(address, strides of B, G, N) of ``[B,N]`` | ``[B,G,N]``."""
    if weight is None:
        return (0, 0, 0, 0)
    s = weight.stride()
    return (weight.data_ptr(), s[0], s[1] if len(s) == 3 else 0, s[-1])


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def problems(x: Tensor, y: Tensor) -> tuple[int, ...]:
    """(B,) or, with groups, (B, G)."""
    return tuple(y.shape[: 1 + y.dim() - x.dim()])


def patch_grids(x: Tensor, y: Tensor, patch: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(H, W) or (N,) of the patches of the student, and of the teacher."""
    if x.dim() == 3:
        return (x.shape[-2],), (y.shape[-2],)
    grids = [(t.shape[-2] - patch + 1, t.shape[-1] - patch + 1) for t in (x, y)]
    return grids[0], grids[1]


def _features(x: Tensor, y: Tensor, metric: int, patch: int, compute: torch.dtype) -> tuple[Any, Any, Any, Any]:
    """Sizes and views of a pair, and the function that makes views of their gradients."""
    tokens = x.dim() == 3
    view = _token_view if tokens else _feature_view
    groups = y.shape[1] if y.dim() > x.dim() else 1
    channels = x.shape[-1] if tokens else x.shape[-3]
    sizes = (x.shape[0], groups, channels, patch, metric, _DTYPES[compute], torch.get_num_threads())
    return sizes, view(x), view(y), view


def _nothing(like: Tensor) -> Tensor:
    """Stands for a gradient that nobody asked for: an operator has to return tensors."""
    return like.new_empty(0)


def _named(gradients: tuple[Tensor, ...], wanted: tuple[bool, ...]) -> list[Tensor | None]:
    return [grad if want else None for grad, want in zip(gradients, wanted, strict=True)]


def _implement(*functions: Any) -> None:
    """The same function for every device: it passes on where its tensors are."""
    for function in functions:
        for device in ("CPU", "CUDA"):
            _lib.impl(function.__name__.removeprefix("_"), function, device)


def _no_second_derivative(name: str) -> None:
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    def backward(ctx: Any, *grads: Tensor) -> NoReturn:
        raise NotImplementedError(
            f"sfr_ext.{name}: second derivatives are not implemented; call backward without create_graph=True"
        )

    torch.library.register_autograd(f"sfr_ext::{name}", backward, setup_context=setup_context, lib=_lib)


# ------------------------------------------------------------------------------------------------ weights

_WEIGHT_NAMES = {"emd_l2": ("student_weight", "teacher_weight")}


def _check_status(status: int, caller: str, a: Tensor | None, b: Tensor | None) -> None:
    """The contents of weights are only looked at inside the operator, so that a compiled graph stays whole."""
    if status == 0:
        return
    name = _WEIGHT_NAMES.get(caller, ("a", "b"))[status - 1]
    weight = (a, b)[status - 1]
    assert weight is not None
    bad = ~(torch.isfinite(weight) & (weight >= 0))
    if bad.any():
        index = bad.nonzero()[0].tolist()
        came = f"{weight[tuple(index)].item():g} at {index}"
    else:
        came = f"only zeros at {(weight == 0).all(-1).nonzero()[0].tolist()}"
    raise ValueError(
        f"sfr_ext.{caller}: expected {name} to be finite and non-negative, with a weight above 0 for each problem, "
        f"got {came}"
    )


# ------------------------------------------------------------------------------------------- cost_forward

_lib.define("cost_forward(Tensor x, Tensor y, int metric, int patch_size) -> Tensor")
_lib.define(
    "cost_backward(Tensor grad_cost, Tensor cost, Tensor x, Tensor y, int metric, int patch_size, bool need_x, "
    "bool need_y) -> (Tensor, Tensor)"
)


def _cost_like(x: Tensor, y: Tensor, patch: int) -> Tensor:
    shape = (*problems(x, y), *map(math.prod, patch_grids(x, y, patch)))
    return x.new_empty(shape, dtype=compute_dtype(x, y))


def _cost_forward(x: Tensor, y: Tensor, metric: int, patch_size: int) -> Tensor:
    cost = _cost_like(x, y, patch_size)
    sizes, x_view, y_view, _ = _features(x, y, metric, patch_size, cost.dtype)
    _run("cost_forward", x, sizes, x_view, y_view, cost.data_ptr())
    return cost


def _cost_backward(
    grad_cost: Tensor,
    cost: Tensor,
    x: Tensor,
    y: Tensor,
    metric: int,
    patch_size: int,
    need_x: bool,
    need_y: bool,
) -> tuple[Tensor, Tensor]:
    grad_x, grad_y = _feature_gradients(x, y, need_x, need_y)
    sizes, x_view, y_view, view = _features(x, y, metric, patch_size, cost.dtype)
    grad_cost = grad_cost.contiguous()
    _run(
        "cost_backward",
        x,
        sizes,
        x_view,
        y_view,
        cost.data_ptr(),
        grad_cost.data_ptr(),
        view(grad_x if need_x else None),
        view(grad_y if need_y else None),
    )
    return grad_x, grad_y


def _feature_gradients(x: Tensor, y: Tensor, need_x: bool, need_y: bool) -> tuple[Tensor, Tensor]:
    return (torch.empty_like(x) if need_x else _nothing(x)), (torch.empty_like(y) if need_y else _nothing(y))


_implement(_cost_forward, _cost_backward)


@torch.library.register_fake("sfr_ext::cost_forward", lib=_lib)
def _(x: Tensor, y: Tensor, metric: int, patch_size: int) -> Tensor:
    return _cost_like(x, y, patch_size)


@torch.library.register_fake("sfr_ext::cost_backward", lib=_lib)
def _(grad_cost: Tensor, cost: Tensor, x: Tensor, y: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _feature_gradients(x, y, *rest[-2:])


def _cost_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, y, ctx.metric, ctx.patch_size = inputs
    ctx.save_for_backward(output, x, y)


def _cost_autograd(ctx: Any, grad_cost: Tensor) -> tuple[Tensor | None, ...]:
    wanted = ctx.needs_input_grad[:2]
    gradients = torch.ops.sfr_ext.cost_backward.default(
        grad_cost, *ctx.saved_tensors, ctx.metric, ctx.patch_size, *wanted
    )
    return (*_named(gradients, wanted), None, None)


torch.library.register_autograd("sfr_ext::cost_forward", _cost_autograd, setup_context=_cost_context, lib=_lib)
_no_second_derivative("cost_backward")

cost_forward = torch.ops.sfr_ext.cost_forward.default


# ------------------------------------------------------------------- what emd_forward and sinkhorn_forward share

_SOLVE_OPTIONS = "float eps, bool relative, float tol, int max_iter, str caller"
# transport, entropic, f, g, eps, mean, n_iter, error
_SOLVE_OUTPUTS = "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
_SOLVED = "Tensor f, Tensor g, Tensor eps_used, Tensor mean"
_NEEDS = "bool need_a, bool need_b"


def _solve_outputs(like: Tensor, lead: tuple[int, ...], n: int, m: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    value = like.new_empty(lead, dtype=dtype)
    f, g = like.new_empty((*lead, n), dtype=dtype), like.new_empty((*lead, m), dtype=dtype)
    n_iter = like.new_empty(lead, dtype=torch.int64)
    return (
        value,
        torch.empty_like(value),
        f,
        g,
        torch.empty_like(value),
        torch.empty_like(value),
        n_iter,
        torch.empty_like(value),
    )


def _weight_gradients(
    a: Tensor | None, b: Tensor | None, f: Tensor, g: Tensor, need_a: bool, need_b: bool
) -> tuple[Tensor, Tensor]:
    """One gradient a problem; `_fold_groups` brings them to the shape of the weights."""
    return (torch.empty_like(f) if need_a else _nothing(f)), (torch.empty_like(g) if need_b else _nothing(g))


def _fold_groups(grad: Tensor, weight: Tensor | None) -> Tensor:
    """A weight shared by the groups gets the sum of their gradients."""
    return grad.sum(1) if weight is not None and weight.dim() < grad.dim() else grad


def _set_solved(ctx: Any, output: tuple[Tensor, ...]) -> None:
    """Only the two values carry gradients, and one that is not used costs nothing."""
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)


# -------------------------------------------------------------------------------------------- emd_forward

_lib.define(
    "emd_forward(Tensor x, Tensor y, Tensor? a, Tensor? b, Tensor? init_g, int metric, int patch_size, "
    f"{_SOLVE_OPTIONS}) -> {_SOLVE_OUTPUTS}"
)
_lib.define(
    "emd_backward(Tensor? grad_transport, Tensor? grad_entropic, Tensor x, Tensor y, Tensor? a, Tensor? b, "
    f"{_SOLVED}, int metric, int patch_size, float eps, bool relative, bool need_x, bool need_y, {_NEEDS}) -> "
    "(Tensor, Tensor, Tensor, Tensor)"
)


def _emd_outputs(x: Tensor, y: Tensor, patch_size: int) -> tuple[Tensor, ...]:
    n, m = map(math.prod, patch_grids(x, y, patch_size))
    return _solve_outputs(x, problems(x, y), n, m, compute_dtype(x, y))


def _emd_forward(
    x: Tensor,
    y: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    init_g: Tensor | None,
    metric: int,
    patch_size: int,
    eps: float,
    relative: bool,
    tol: float,
    max_iter: int,
    caller: str,
) -> tuple[Tensor, ...]:
    out = _emd_outputs(x, y, patch_size)
    sizes, x_view, y_view, _ = _features(x, y, metric, patch_size, out[0].dtype)
    init_g = None if init_g is None else init_g.contiguous()
    status = _run(
        "emd_forward",
        x,
        sizes,
        x_view,
        y_view,
        _weight_view(a),
        _weight_view(b),
        (eps, relative, tol, max_iter),
        _address(init_g),
        tuple(t.data_ptr() for t in out),
    )
    _check_status(status, caller, a, b)
    return out


def _emd_gradients(
    x: Tensor,
    y: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    f: Tensor,
    g: Tensor,
    need: tuple[bool, bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_x, grad_y = _feature_gradients(x, y, *need[:2])
    grad_a, grad_b = _weight_gradients(a, b, f, g, *need[2:])
    return grad_x, grad_y, grad_a, grad_b


def _emd_backward(
    grad_transport: Tensor | None,
    grad_entropic: Tensor | None,
    x: Tensor,
    y: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    f: Tensor,
    g: Tensor,
    eps_used: Tensor,
    mean: Tensor,
    metric: int,
    patch_size: int,
    eps: float,
    relative: bool,
    need_x: bool,
    need_y: bool,
    need_a: bool,
    need_b: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    need = (need_x, need_y, need_a, need_b)
    grad_x, grad_y, grad_a, grad_b = _emd_gradients(x, y, a, b, f, g, need)
    sizes, x_view, y_view, view = _features(x, y, metric, patch_size, f.dtype)
    upstream = [None if grad is None else grad.contiguous() for grad in (grad_transport, grad_entropic)]
    _run(
        "emd_backward",
        x,
        sizes,
        x_view,
        y_view,
        _weight_view(a),
        _weight_view(b),
        (eps, relative, 0.0, 0),
        (
            *(t.data_ptr() for t in (f, g, eps_used, mean)),
            *map(_address, upstream),
            _address(grad_a if need_a else None),
            _address(grad_b if need_b else None),
        ),
        view(grad_x if need_x else None),
        view(grad_y if need_y else None),
    )
    return grad_x, grad_y, _fold_groups(grad_a, a), _fold_groups(grad_b, b)


_implement(_emd_forward, _emd_backward)


@torch.library.register_fake("sfr_ext::emd_forward", lib=_lib)
def _(x: Tensor, y: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return _emd_outputs(x, y, rest[4])


@torch.library.register_fake("sfr_ext::emd_backward", lib=_lib)
def _(
    grad_transport: Tensor | None,
    grad_entropic: Tensor | None,
    x: Tensor,
    y: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    f: Tensor,
    g: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_x, grad_y, grad_a, grad_b = _emd_gradients(x, y, a, b, f, g, rest[-4:])
    return grad_x, grad_y, _fold_groups(grad_a, a), _fold_groups(grad_b, b)


def _emd_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, y, a, b, _, ctx.metric, ctx.patch_size, ctx.eps, ctx.relative, _, _, _ = inputs
    ctx.save_for_backward(x, y, a, b, *output[2:6])
    _set_solved(ctx, output)


def _emd_autograd(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    wanted = ctx.needs_input_grad[:4]
    gradients = torch.ops.sfr_ext.emd_backward.default(
        *grads[:2], *ctx.saved_tensors, ctx.metric, ctx.patch_size, ctx.eps, ctx.relative, *wanted
    )
    return (*_named(gradients, wanted), *[None] * 8)


torch.library.register_autograd("sfr_ext::emd_forward", _emd_autograd, setup_context=_emd_context, lib=_lib)
_no_second_derivative("emd_backward")

emd_forward = torch.ops.sfr_ext.emd_forward.default


# --------------------------------------------------------------------------------------- sinkhorn_forward

# cost [B, G, N, M], a [B, G, N], b [B, G, M]
_lib.define(
    f"sinkhorn_forward(Tensor cost, Tensor? a, Tensor? b, Tensor? init_g, {_SOLVE_OPTIONS}) -> {_SOLVE_OUTPUTS}"
)
_lib.define(
    "sinkhorn_backward(Tensor? grad_transport, Tensor? grad_entropic, Tensor cost, Tensor? a, Tensor? b, "
    f"{_SOLVED}, float eps, bool relative, bool need_cost, {_NEEDS}) -> (Tensor, Tensor, Tensor)"
)


def _sinkhorn_sizes(cost: Tensor, compute: torch.dtype) -> tuple[Any, Any]:
    sizes = (*cost.shape, _DTYPES[compute], torch.get_num_threads())
    return sizes, (cost.data_ptr(), _DTYPES[cost.dtype], *cost.stride())


def _sinkhorn_outputs(cost: Tensor) -> tuple[Tensor, ...]:
    lead, (n, m) = tuple(cost.shape[:2]), cost.shape[2:]
    return _solve_outputs(cost, lead, n, m, compute_dtype(cost))


def _sinkhorn_forward(
    cost: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    init_g: Tensor | None,
    eps: float,
    relative: bool,
    tol: float,
    max_iter: int,
    caller: str,
) -> tuple[Tensor, ...]:
    out = _sinkhorn_outputs(cost)
    init_g = None if init_g is None else init_g.contiguous()
    status = _run(
        "sinkhorn_forward",
        cost,
        *_sinkhorn_sizes(cost, out[0].dtype),
        _weight_view(a),
        _weight_view(b),
        (eps, relative, tol, max_iter),
        _address(init_g),
        tuple(t.data_ptr() for t in out),
    )
    _check_status(status, caller, a, b)
    return out


def _sinkhorn_gradients(
    cost: Tensor, a: Tensor | None, b: Tensor | None, f: Tensor, g: Tensor, need: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor, Tensor]:
    grad_cost = cost.new_empty(cost.shape, dtype=f.dtype) if need[0] else _nothing(f)
    return (grad_cost, *_weight_gradients(a, b, f, g, *need[1:]))


def _sinkhorn_backward(
    grad_transport: Tensor | None,
    grad_entropic: Tensor | None,
    cost: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    f: Tensor,
    g: Tensor,
    eps_used: Tensor,
    mean: Tensor,
    eps: float,
    relative: bool,
    need_cost: bool,
    need_a: bool,
    need_b: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    need = (need_cost, need_a, need_b)
    gradients = _sinkhorn_gradients(cost, a, b, f, g, need)
    upstream = [None if grad is None else grad.contiguous() for grad in (grad_transport, grad_entropic)]
    grad_cost, grad_a, grad_b = _named(gradients, need)
    _run(
        "sinkhorn_backward",
        cost,
        *_sinkhorn_sizes(cost, f.dtype),
        _weight_view(a),
        _weight_view(b),
        (eps, relative, 0.0, 0),
        (
            *(t.data_ptr() for t in (f, g, eps_used, mean)),
            *map(_address, (*upstream, grad_a, grad_b)),
        ),
        _address(grad_cost),
    )
    return gradients


_implement(_sinkhorn_forward, _sinkhorn_backward)


@torch.library.register_fake("sfr_ext::sinkhorn_forward", lib=_lib)
def _(cost: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return _sinkhorn_outputs(cost)


@torch.library.register_fake("sfr_ext::sinkhorn_backward", lib=_lib)
def _(
    grad_transport: Tensor | None,
    grad_entropic: Tensor | None,
    cost: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    f: Tensor,
    g: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    return _sinkhorn_gradients(cost, a, b, f, g, rest[-3:])


def _sinkhorn_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    cost, a, b, _, ctx.eps, ctx.relative, _, _, _ = inputs
    ctx.cost_dtype = cost.dtype
    ctx.save_for_backward(cost, a, b, *output[2:6])
    _set_solved(ctx, output)


def _sinkhorn_autograd(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    wanted = ctx.needs_input_grad[:3]
    gradients = torch.ops.sfr_ext.sinkhorn_backward.default(
        *grads[:2], *ctx.saved_tensors, ctx.eps, ctx.relative, *wanted
    )
    grad_cost, grad_a, grad_b = _named(gradients, wanted)
    if grad_cost is not None:
        grad_cost = grad_cost.to(ctx.cost_dtype)
    return (grad_cost, grad_a, grad_b, *[None] * 6)


torch.library.register_autograd(
    "sfr_ext::sinkhorn_forward", _sinkhorn_autograd, setup_context=_sinkhorn_context, lib=_lib
)
_no_second_derivative("sinkhorn_backward")

sinkhorn_forward = torch.ops.sfr_ext.sinkhorn_forward.default
