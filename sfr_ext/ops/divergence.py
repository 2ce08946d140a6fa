"""``divergence_forward``: the debiased divergence, three problems of csrc/contracts/emd.h with one eps.

``S = E(x, y) - E(x, x) / 2 - E(y, y) / 2 + eps / 2 (|a| - |b|)^2`` of entropic values (Feydy et al., 2019; the last
term, for masses that differ: Sejourne et al., 2019). With a relative eps all three share that of ``E(x, y)``. A problem
with itself is solved by symmetric updates, and its gradient is taken on one side, twice. ``E(x, y)`` starts from the
potential that ``y`` has with itself: where ``x = y`` that is the solution, and the divergence vanishes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .derivatives import differentiable, no_second_derivative
from .emd import features_backward, solve_features
from .gradients import feature_gradients, fold_groups, named, weight_gradients
from .launch import implement, library
from .solved import NEEDS, OPTIONS, PROBLEM, options_for
from .views import compute_dtype, patch_grids, problems

# The teacher's problem with itself may have been solved beforehand, by self_forward.
library.define(
    "divergence_forward(Tensor x, Tensor y, Tensor? a, Tensor? b, Tensor? teacher_value, Tensor? teacher_potential, "
    f"int metric, int patch_size, {OPTIONS}) -> "
    "(Tensor value, Tensor f, Tensor g, Tensor eps_used, Tensor mean, Tensor x_potential, Tensor x_mean, "
    "Tensor y_potential, Tensor y_mean, Tensor n_iter, Tensor error)"
)
library.define(
    "divergence_backward(Tensor grad, Tensor x, Tensor y, Tensor? a, Tensor? b, Tensor f, Tensor g, Tensor eps_used, "
    "Tensor mean, Tensor x_potential, Tensor x_mean, Tensor y_potential, Tensor y_mean, int metric, int patch_size, "
    f"{PROBLEM}, bool teacher_given, bool need_x, bool need_y, {NEEDS}) -> (Tensor, Tensor, Tensor, Tensor)"
)
# value, potential in units of the cost, error
library.define(
    "self_forward(Tensor y, Tensor? b, int metric, int patch_size, float eps, float reach, int max_iter, "
    "str caller) -> (Tensor value, Tensor potential, Tensor error)"
)


def _solve_itself(
    x: Tensor,
    y: Tensor,
    weight: Tensor | None,
    eps: Tensor,
    metric: int,
    patch_size: int,
    reach: float,
    max_iter: int,
    caller: str,
) -> tuple[Tensor, ...]:
    """As `solve_features`, for ``y`` = ``x`` or ``x`` once for each group; to rounding, which costs little."""
    tol = 1e-6 if eps.dtype == torch.float32 else 1e-13
    options = options_for((1.0, False, reach, reach), tol, max_iter, symmetric=True, eps_given=eps)
    return solve_features(x, y, weight, weight, None, metric, patch_size, options, caller)


def flat(y: Tensor, b: Tensor | None, lead: tuple[int, ...]) -> tuple[Tensor, Tensor | None]:
    """Teachers and their weights with groups folded into the batch."""
    if len(lead) == 1:
        return y, b
    if b is not None:
        b = (b if b.dim() == 3 else b[:, None].expand(*lead, -1)).flatten(0, 1)
    return y.flatten(0, 1), b


def _for_each_group(x: Tensor, lead: tuple[int, ...], relative: bool) -> Tensor:
    """What ``x`` is compared with as itself: a relative eps differs from group to group."""
    return x[:, None].expand(*lead, *x.shape[1:]) if relative and len(lead) == 2 else x


def _masses(a: Tensor | None, b: Tensor | None, reach_a: float, reach_b: float, lead: tuple[int, ...]) -> Tensor | None:
    """|a| - |b|, where weights are given and not normalised."""
    if (a is None or not reach_a) and (b is None or not reach_b):
        return None
    sums = [w.sum(-1) if w is not None and reach else None for w, reach in ((a, reach_a), (b, reach_b))]
    mass_a, mass_b = (1 if s is None else s if s.dim() == len(lead) else s[:, None] for s in sums)
    return torch.as_tensor(mass_a - mass_b)


def _divergence_outputs(x: Tensor, y: Tensor, patch_size: int) -> tuple[Tensor, ...]:
    lead, dtype = problems(x, y), compute_dtype(x, y)
    n, m = (torch.Size(grid).numel() for grid in patch_grids(x, y, patch_size))
    shapes = [lead, (*lead, n), (*lead, m), lead, lead, (*lead, n), lead, (*lead, m), lead]
    n_iter = x.new_empty(lead, dtype=torch.int64)
    return (*(x.new_empty(shape, dtype=dtype) for shape in shapes), n_iter, x.new_empty(lead, dtype=dtype))


def _divergence_forward(
    x: Tensor,
    y: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    teacher_value: Tensor | None,
    teacher_potential: Tensor | None,
    metric: int,
    patch_size: int,
    eps: float,
    relative: bool,
    reach_a: float,
    reach_b: float,
    tol: float,
    max_iter: int,
    caller: str,
) -> tuple[Tensor, ...]:
    lead, dtype = problems(x, y), compute_dtype(x, y)
    problem = (eps, relative, reach_a, reach_b)
    how = metric, patch_size
    if relative:
        used = solve_features(x, y, a, b, None, *how, options_for(problem), caller)[4]
    else:
        used = x.new_full(lead, eps, dtype=dtype)

    itself = _for_each_group(x, lead, relative)
    own = used if relative or len(lead) == 1 else used[:, 0].contiguous()
    _, value_x, f_x, _, _, mean_x, steps_x, error_x = _solve_itself(x, itself, a, own, *how, reach_a, max_iter, caller)
    if own.shape != lead:
        value_x, f_x, mean_x, steps_x, error_x = (
            t[:, None].expand(*lead, *t.shape[1:]).contiguous() for t in (value_x, f_x, mean_x, steps_x, error_x)
        )
    if teacher_value is None or teacher_potential is None:
        each, b_each = flat(y, b, lead)
        solved = _solve_itself(each, each, b_each, used.flatten(), *how, reach_b, max_iter, caller)
        _, value_y, f_y, _, _, mean_y, steps_y, error_y = (t.unflatten(0, lead) for t in solved)
    else:
        # The potential is also an output, which may not be an input.
        value_y, f_y, mean_y = teacher_value, teacher_potential.clone(), torch.zeros_like(used)
        steps_y, error_y = torch.zeros_like(steps_x), torch.zeros_like(error_x)

    start = f_y + mean_y[..., None] / 2
    options = options_for(problem, tol, max_iter)
    _, value, f, g, _, mean, steps, error = solve_features(x, y, a, b, start, *how, options, caller)
    value = value - (value_x + value_y) / 2
    masses = _masses(a, b, reach_a, reach_b, lead)
    if masses is not None:
        value = value + used / 2 * masses.square()
    n_iter = steps + steps_x + steps_y
    return (
        value,
        f,
        g,
        used,
        mean,
        f_x,
        mean_x,
        f_y,
        mean_y,
        n_iter,
        torch.maximum(error, torch.maximum(error_x, error_y)),
    )


def _itself_backward(
    grad: Tensor,
    x: Tensor,
    y: Tensor,
    weight: Tensor | None,
    solved: tuple[Tensor, Tensor, Tensor],
    metric: int,
    patch_size: int,
    reach: float,
    need: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of ``-E(x, x) / 2``: by symmetry that of ``-E`` on one side. With d/deps."""
    potential, eps, mean = solved
    slope = torch.empty_like(eps)
    options = options_for((1.0, False, reach, reach), eps_given=eps)
    grad_x, _, grad_a, _ = features_backward(
        (None, -grad, None),
        x,
        y,
        weight,
        weight,
        (potential, potential, eps, mean),
        metric,
        patch_size,
        options,
        (need, False, need_weight, False),
        slope,
    )
    return grad_x, grad_a, slope / 2


def _divergence_backward(
    grad: Tensor,
    x: Tensor,
    y: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    f: Tensor,
    g: Tensor,
    eps_used: Tensor,
    mean: Tensor,
    x_potential: Tensor,
    x_mean: Tensor,
    y_potential: Tensor,
    y_mean: Tensor,
    metric: int,
    patch_size: int,
    eps: float,
    relative: bool,
    reach_a: float,
    reach_b: float,
    teacher_given: bool,
    need_x: bool,
    need_y: bool,
    need_a: bool,
    need_b: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    lead, how = problems(x, y), (metric, patch_size)
    slope = torch.zeros_like(eps_used)
    to_x = to_y = to_a = to_b = None
    if need_x or need_a or relative:
        itself = _for_each_group(x, lead, relative)
        student, up = (x_potential, eps_used, x_mean), grad
        if itself is x and len(lead) == 2:  # one problem for all groups
            potential, used, centre = (t[:, 0].contiguous() for t in student)
            student, up = (potential, used, centre), grad.sum(1)
        to_x, to_a, own = _itself_backward(up, x, itself, a, student, *how, reach_a, need_x, need_a)
        if relative:
            slope = slope + own
    if (need_y or need_b or relative) and not teacher_given:
        each, b_each = flat(y, b, lead)
        teacher = y_potential.flatten(0, -2), eps_used.flatten(), y_mean.flatten()
        to_y, to_b, own = _itself_backward(grad.flatten(), each, each, b_each, teacher, *how, reach_b, need_y, need_b)
        slope = slope + own.view(lead)
    masses = _masses(a, b, reach_a, reach_b, lead)
    if masses is not None:
        slope = slope + grad * masses.square() / 2
    options = options_for((eps, relative, reach_a, reach_b))
    need = (need_x, need_y, need_a, need_b)
    grad_x, grad_y, grad_a, grad_b = features_backward(
        (None, grad, slope), x, y, a, b, (f, g, eps_used, mean), *how, options, need
    )
    if need_x and to_x is not None:
        grad_x += to_x
    if need_y and to_y is not None:
        grad_y += to_y.view_as(grad_y)
    if need_a and to_a is not None:
        grad_a += to_a
    if need_b and to_b is not None:
        grad_b += fold_groups(to_b.view(*lead, -1), b)
    if masses is not None:  # the same for every patch, but for those that are removed
        apart = grad * eps_used * masses
        if need_a and a is not None and reach_a:
            grad_a += torch.where(a > 0, fold_groups(apart, a[..., 0])[..., None], 0.0)
        if need_b and b is not None and reach_b:
            grad_b -= torch.where(b > 0, fold_groups(apart, b[..., 0])[..., None], 0.0)
    return grad_x, grad_y, grad_a, grad_b


def _self_forward(
    y: Tensor,
    b: Tensor | None,
    metric: int,
    patch_size: int,
    eps: float,
    reach: float,
    max_iter: int,
    caller: str,
) -> tuple[Tensor, Tensor, Tensor]:
    lead = tuple(y.shape[:1])
    used = y.new_full(lead, eps, dtype=compute_dtype(y))
    _, value, potential, _, _, mean, _, error = _solve_itself(
        y, y, b, used, metric, patch_size, reach, max_iter, caller
    )
    return value, potential + mean[..., None] / 2, error


implement(_divergence_forward, _divergence_backward, _self_forward)


@torch.library.register_fake("sfr_ext::divergence_forward", lib=library)
def _(x: Tensor, y: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return _divergence_outputs(x, y, rest[5])


@torch.library.register_fake("sfr_ext::divergence_backward", lib=library)
def _(
    grad: Tensor, x: Tensor, y: Tensor, a: Tensor | None, b: Tensor | None, f: Tensor, g: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_a, grad_b = weight_gradients(a, b, f, g, *rest[-2:])
    return (*feature_gradients(x, y, *rest[-4:-2]), fold_groups(grad_a, a), fold_groups(grad_b, b))


@torch.library.register_fake("sfr_ext::self_forward", lib=library)
def _(y: Tensor, b: Tensor | None, metric: int, patch_size: int, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    value, _, potential, *_ = _divergence_outputs(y, y, patch_size)
    return value, potential, torch.empty_like(value)


def _divergence_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, y, a, b, teacher_value, _, *ctx.how = inputs[:12]
    ctx.teacher_given = teacher_value is not None
    ctx.save_for_backward(x, y, a, b, *output[1:9])


def _divergence_autograd(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    wanted = ctx.needs_input_grad[:4]
    gradients = divergence_backward(grad.contiguous(), *ctx.saved_tensors, *ctx.how, ctx.teacher_given, *wanted)
    return (*named(gradients, wanted), *[None] * 11)


divergence_backward = no_second_derivative("divergence_backward")
divergence_forward = differentiable("divergence_forward", _divergence_context, _divergence_autograd, values=1)
self_forward = torch.ops.sfr_ext.self_forward.default
