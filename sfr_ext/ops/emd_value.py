"""``emd_value``: one value of ``emd_forward`` and nothing else, as a training step wants it.

On plain tensors all else that the kernel writes is in one tensor: to allocate eleven, and have autograd know of them,
takes longer than to solve a small problem.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import emd
from .contracts import Solve, Solved, SolveGrad, SolverOptions
from .derivatives import on_plain_tensors
from .gradients import fold_groups, named
from .solved import VALUES, Saved, again
from .views import Ground, Pair, compute_dtype, dense, patch_grids, problems, weight_view


class Task(NamedTuple):
    """All that is given beside tensors, and what follows from their shapes."""

    ground: Ground
    options: SolverOptions
    caller: str
    which: int  # of the values of `Solved`
    lead: tuple[int, ...]  # axes of the problems
    n: int
    m: int
    compute: torch.dtype

    @property
    def problems(self) -> int:
        return math.prod(self.lead)

    def places(self) -> dict[str, int]:
        """Of the outputs in their tensor: the bytes before each; of ``end``, of all."""
        return _places(self.problems, self.n, self.m, self.compute.itemsize)


@functools.lru_cache(256)
def _places(count: int, n: int, m: int, size: int) -> dict[str, int]:
    entries = {"f": n, "g": m}
    places, used = {"n_iter": 0}, 8 * count  # the widest first: all are aligned
    for name in Solved._fields:
        if name not in places:
            places[name] = used
            used += size * count * entries.get(name, 1)
    return {**places, "end": used}


def emd_value(pair: Pair, ground: Ground, options: SolverOptions, caller: str, which: int) -> Tensor:
    """Value ``which`` (0: transport, 1: entropic) of each problem, ``[B]`` | ``[B, G]``; perhaps a scalar, of one.

    With the derivatives of `emd_forward`.
    """
    if not on_plain_tensors(*pair):
        values: Tensor = emd.emd_forward(*pair, None, *ground, *options, caller)[which]
        return values
    n, m = map(math.prod, patch_grids(pair.x, pair.y, ground.patch_size))
    compute = compute_dtype(pair.x, pair.y)
    task = Task(ground, options, caller, which, problems(pair.x, pair.y), n, m, compute)
    if torch.is_grad_enabled() and any(z is not None and z.requires_grad for z in pair):
        value: Tensor = emd_forward.apply(*pair, task)
        return value
    return _solve(pair, task)[0]


class emd_forward(torch.autograd.Function):  # by this name tensors show where they came from
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, a: Tensor | None, b: Tensor | None, task: Task) -> Tensor:
        value, outputs, cost = _solve(Pair(x, y, a, b), task)
        ctx.task = task
        ctx.save_for_backward(x, y, a, b, outputs, cost)
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *pair, outputs, cost = ctx.saved_tensors
        outputs, cost = dense(outputs), dense(cost)
        pull = _pull if on_plain_tensors(grad) and not torch.is_grad_enabled() else _pull_by_operator
        return (*pull(Pair(*pair), ctx.task, outputs, cost, grad, ctx.needs_input_grad[:4]), None)


def _solve(pair: Pair, task: Task) -> tuple[Tensor, Tensor, Tensor | None]:
    """The value; one tensor with the other outputs; the costs, where they are kept."""
    x, y, a, b = pair
    size, places = task.compute.itemsize, task.places()
    value = x.new_empty(() if task.problems == 1 else task.lead, dtype=task.compute)
    outputs = x.new_empty(places["end"] // size, dtype=task.compute)
    kept = emd.keeps_costs(pair, task.problems * task.n * task.m * size)
    cost = x.new_empty((*task.lead, task.n, task.m), dtype=task.compute) if kept else None
    into: list[Any] = [(outputs, places[name]) for name in Solved._fields]
    into[task.which] = value
    solve = Solve(Solved(*into), task.options, weight_view(a), weight_view(b))
    emd.run_forward(pair, task.ground, solve, cost, False, task.compute, task.caller)
    return value, outputs, cost


def _pull(
    pair: Pair, task: Task, outputs: Tensor, cost: Tensor | None, grad: Tensor, wanted: tuple[bool, ...]
) -> list[Tensor | None]:
    x, y, a, b = pair
    need_x, need_y, need_a, need_b = wanted
    grad_x, grad_y = torch.empty_like(x) if need_x else None, torch.empty_like(y) if need_y else None
    grad_a = outputs.new_empty((*task.lead, task.n)) if need_a else None
    grad_b = outputs.new_empty((*task.lead, task.m)) if need_b else None
    places = task.places()
    saved: list[Any] = [(outputs, places[name]) for name in Saved._fields]
    solve = Solve(again(Saved(*saved)), task.options, weight_view(a), weight_view(b))
    transport, entropic = _upstream(task, dense(grad))
    of_solve = SolveGrad(solve, transport, entropic, None, grad_a, grad_b, None)
    emd.run_backward(pair, task.ground, of_solve, cost, grad_x, grad_y, task.compute)
    of_a, of_b = (None if g is None else fold_groups(g, w) for g, w in ((grad_a, a), (grad_b, b)))
    return [grad_x, grad_y, of_a, of_b]


def _pull_by_operator(
    pair: Pair, task: Task, outputs: Tensor, cost: Tensor | None, grad: Tensor, wanted: tuple[bool, ...]
) -> list[Tensor | None]:
    """The same, differentiable, and known to transforms."""
    places = task.places()

    def output(name: str) -> Tensor:
        shape = (*task.lead, *{"f": (task.n,), "g": (task.m,)}.get(name, ()))
        return outputs.narrow(0, places[name] // outputs.itemsize, math.prod(shape)).view(shape)

    upstream = _upstream(task, grad.reshape(task.lead))
    saved = map(output, Saved._fields)
    return named(emd.emd_backward(*upstream, *pair, *saved, cost, *task.ground, *task.options, *wanted), wanted)


def _upstream(task: Task, grad: Tensor | None) -> list[Tensor | None]:
    """Of the values of `Solved`."""
    return [grad if which == task.which else None for which in range(VALUES)]
