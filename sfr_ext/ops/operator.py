"""An operator ``torch.ops.sfr_ext.*``: its schema, made of the lists it is given, and what runs on every device."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from .contracts import kinds

library = torch.library.Library("sfr_ext", "DEF")

# Annotations that stand for another type in a schema.
_SCHEMA = {"Tensor | None": "Tensor?", "Metric": "int", "Method": "int"}


class Operator:
    """``sfr_ext::name``, whose flat arguments are the members of named groups, one group after the other.

    Args:
        name: of the operator.
        returns: a NamedTuple of tensors, or a type of a schema.
        groups: by name, each a NamedTuple or a type of a schema. The tensors come first, with the batch in front. Where
            two groups have a member of one name, the later one's is ``group_member`` in the schema.
    """

    function: Callable[..., Any]

    def __init__(self, name: str, returns: Any, **groups: Any) -> None:
        self.name = name
        arguments: dict[str, str] = {}
        self._groups: list[tuple[Any, Any]] = []
        for group, kind in groups.items():
            start = len(arguments)
            for member, annotation in members(kind).items() if is_list(kind) else [(group, kind)]:
                arguments[f"{group}_{member}" if member in arguments else member] = annotation
            make = functools.partial(tuple.__new__, kind) if is_list(kind) else None
            self._groups.append((make, slice(start, len(arguments)) if make else start))
        self.count = len(arguments)
        self.tensors = sum(kind.startswith("Tensor") for kind in arguments.values())
        self._result = returns._make if is_list(returns) else None
        if is_list(returns):
            returns = "(" + ", ".join(f"{kind} {member}" for member, kind in members(returns).items()) + ")"
        library.define(f"{name}({', '.join(f'{kind} {member}' for member, kind in arguments.items())}) -> {returns}")
        self.registered = getattr(torch.ops.sfr_ext, name).default

    def split(self, arguments: tuple[Any, ...]) -> list[Any]:
        """Flat arguments as groups."""
        return [make(arguments[place]) if make else arguments[place] for make, place in self._groups]

    def result(self, output: Any) -> Any:
        """What torch returned, as the list that it is."""
        return self._result(output) if self._result else output

    def implementation(self, *arguments: Any) -> Any:
        return self.function(*self.split(arguments))

    def kernel(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function for every device: it takes the groups, and passes on where their tensors are."""
        return self.kernel_on("CPU", "CUDA")(function)

    def kernel_on(self, *devices: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """The same for these devices alone."""

        def register(function: Callable[..., Any]) -> Callable[..., Any]:
            self.function = function
            for device in devices:
                library.impl(self.name, self.implementation, device)
            return function

        return register

    def fake(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Outputs without contents, from the same groups."""

        def without_contents(*arguments: Any) -> Any:
            return function(*self.split(arguments))

        torch.library.register_fake(f"sfr_ext::{self.name}", without_contents, lib=library)
        return function


def is_list(kind: Any) -> bool:
    return hasattr(kind, "_fields")


def members(kind: Any) -> dict[str, str]:
    """Names and schema types of a NamedTuple's members."""
    return {name: _SCHEMA.get(written, written) for name, written in kinds(kind).items()}
