"""An operator with its derivatives: under plain autograd and torch.compile, and under the transforms of torch.func."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from .operator import Operator, library

SetupContext = Callable[..., None]
Backward = Callable[..., Any]


def differentiable(
    operator: Operator, setup_context: SetupContext, backward: Backward, values: int | None = None
) -> Callable[..., Any]:
    """Registers the autograd of an operator and returns the operator, to be called as a function.

    ``setup_context(ctx, output, *groups)`` keeps what ``backward(ctx, *grads)`` needs. Only the first ``values``
    outputs carry gradients (None: all); ``backward`` gets None for one that is not used, and returns gradients for the
    first arguments.

    There are three ways to call it, made of the same functions. Compilers and dispatch modes see the operator. What
    torch registers for an operator knows nothing of ``torch.func`` (and forward mode would drop tangents in silence),
    so calls under its transforms take an ``autograd.Function``. And on plain tensors the dispatcher would cost more
    than a small problem: there another ``autograd.Function`` calls the implementation itself.

    The tensors that the operator takes come first, and have the batch in front: an axis that ``vmap`` adds is folded
    into it.
    """
    name, registered, tensors = operator.name, operator.registered, operator.tensors

    def context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        setup_context(ctx, operator.result(output), *operator.split(inputs))
        if values is not None:
            ctx.mark_non_differentiable(*output[values:])
        ctx.set_materialize_grads(False)

    def pull(ctx: Any, *grads: Any) -> Any:
        if all(grad is None for grad in grads[:values]):
            return (None,) * operator.count
        found = backward(ctx, *grads)
        return (*found, *(None,) * (operator.count - len(found)))

    torch.library.register_autograd(f"sfr_ext::{name}", pull, setup_context=context, lib=library)

    class Transformed(torch.autograd.Function):
        @staticmethod
        def forward(*inputs: Any) -> Any:
            return registered(*inputs)

        setup_context = staticmethod(context)
        backward = staticmethod(pull)

        @staticmethod
        def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Any, Any]:
            return folded(call, info.batch_size, in_dims, inputs)

        @staticmethod
        def jvp(ctx: Any, *tangents: Any) -> NoReturn:
            raise NotImplementedError(
                f"sfr_ext.{name}: forward-mode derivatives are not implemented; use reverse mode "
                "(backward, torch.func.grad, vjp, jacrev)"
            )

    class Eager(torch.autograd.Function):
        """Told of no more than autograd has to know: it takes time for every input and output."""

        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> Any:
            inputs, others = arguments[-1]
            groups = operator.split(inputs)
            output = operator.function(*groups)
            setup_context(ctx, output, *groups)
            ctx.set_materialize_grads(False)
            if values is None:
                return output
            others.extend(output[values:])
            return output[:values]

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return (*pull(ctx, *grads)[:tensors], None)

    # By the operator's name, which is what a tensor's grad_fn shows.
    transformed: Any = type(name, (Transformed,), {"__module__": __name__})
    eager: Any = type(name, (Eager,), {"__module__": __name__})

    def call(*inputs: Any) -> Any:
        if _recorded():
            return registered(*inputs)
        if _transformed():
            return transformed.apply(*inputs)
        if not _plain(inputs):
            return registered(*map(_unwrapped, inputs))
        if not torch.is_grad_enabled() or not any(x is not None and x.requires_grad for x in inputs[:tensors]):
            return operator.function(*operator.split(inputs))
        others: list[Tensor] = []
        output = eager.apply(*inputs[:tensors], (inputs, others))
        return (*output, *others) if others else output

    call.__name__ = call.__qualname__ = name
    return call


def on_plain_tensors(*inputs: Any) -> bool:
    """Whether neither a compiler, nor a transform, nor a dispatch mode looks on, and all are what they look like."""
    return not _recorded() and not _transformed() and _plain(inputs)


def _recorded() -> bool:
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def _transformed() -> bool:
    # Private names, the same since torch 2.1: nothing public tells.
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _unwrapped(value: Any) -> Any:
    """What a transform that has ended wrapped up: ``vjp`` calls backward after it, with what forward saved."""
    while isinstance(value, Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(value):
        value = torch._C._functorch.get_unwrapped(value)
    return value


_PLAIN = frozenset((Tensor, Parameter, type(None), bool, int, float, str))


def _plain(inputs: tuple[Any, ...]) -> bool:
    """Whether all are what they look like: no subclass of a tensor, no symbol for a number, memory behind them; and no
    dispatch mode looks on.

    A view may also stand for the negative of what its memory holds; the dispatcher resolves that.
    """
    if torch._C._len_torch_dispatch_stack() or not _PLAIN.issuperset(map(type, inputs)):
        return False
    for value in inputs:
        if not isinstance(value, Tensor):
            continue
        if value.is_meta or value.is_neg() or value._is_zerotensor():
            return False
        if torch._C._functorch.is_functorch_wrapped_tensor(value) or torch._C._functorch.is_legacy_batchedtensor(value):
            return False
    return True


def no_second_derivative(operator: Operator) -> Callable[..., Any]:
    """The operator of a first derivative that has none of its own."""

    def setup_context(ctx: Any, output: Any, *groups: Any) -> None:
        pass

    def backward(ctx: Any, *grads: Tensor) -> NoReturn:
        raise NotImplementedError(
            f"sfr_ext.{operator.name}: second derivatives are not implemented; call backward without create_graph=True"
        )

    return differentiable(operator, setup_context, backward)


def second_derivatives(
    values: Callable[..., tuple[Tensor, ...]],
    grads: tuple[Tensor | None, ...],
    inputs: tuple[Tensor | None, ...],
    upstream: tuple[Tensor | None, ...],
    needed: tuple[bool, ...],
) -> list[Tensor | None]:
    """The backward of a backward, by differentiating a plain function of the same values twice.

    Args:
        values: what forward computes, in operations that torch differentiates any number of times.
        grads: gradients of the values, as backward got them; None: that value was not used.
        inputs: of ``values``.
        upstream: gradients of what backward returned, one for each input; None: not used.
        needed: which of ``(*grads, *inputs)`` want a gradient.
    """
    arguments = (*grads, *inputs)
    used = [i for i, grad in enumerate(grads) if grad is not None]
    returned = [i for i, grad in enumerate(upstream) if grad is not None]
    free = [i for i, need in enumerate(needed) if need]
    if not used or not returned:
        return [None] * len(arguments)

    def with_arguments(positions: list[int], new: tuple[Tensor, ...], old: tuple[Any, ...]) -> list[Any]:
        replaced = list(old)
        for position, value in zip(positions, new, strict=True):
            replaced[position] = value
        return replaced

    def first(*chosen: Tensor) -> tuple[Tensor, ...]:
        now = with_arguments(free, chosen, arguments)
        at, around = tuple(now[: len(grads)]), tuple(now[len(grads) :])

        def used_values(*wanted: Tensor) -> tuple[Tensor, ...]:
            results = values(*with_arguments(returned, wanted, around))
            return tuple(results[i].to(at[i].dtype) for i in used)

        pull = torch.func.vjp(used_values, *(around[i] for i in returned))[1]
        return pull(tuple(at[i] for i in used))

    pull = torch.func.vjp(first, *(arguments[i] for i in free))[1]
    found = pull(tuple(upstream[i] for i in returned))
    return with_arguments(free, found, (None,) * len(arguments))


def folded(
    function: Callable[..., Any], count: int, in_dims: tuple[int | None, ...], inputs: tuple[Any, ...]
) -> tuple[Any, Any]:
    """``function`` with an axis of ``count`` more on some inputs, folded into the batch; what is shared is expanded.

    A batch of one stays a view of what is expanded.
    """

    def in_front(value: Any, dim: int | None) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.expand(count, *value.shape) if dim is None else value.movedim(dim, 0)

    moved = [in_front(value, dim) for value, dim in zip(inputs, in_dims, strict=True)]
    both = next(tuple(value.shape[:2]) for value in moved if isinstance(value, Tensor))

    def unfold(value: Tensor) -> tuple[Tensor, int | None]:
        if value.shape[0] != math.prod(both):  # stands for a gradient that nobody asked for
            return value, None
        return value.unflatten(0, both), 0

    outputs = function(*(value.flatten(0, 1) if isinstance(value, Tensor) else value for value in moved))
    if isinstance(outputs, Tensor):
        return unfold(outputs)
    pairs = [unfold(value) for value in outputs]
    return tuple(value for value, _ in pairs), tuple(dim for _, dim in pairs)
