"""Inputs as they were when a problem was solved: what is computed from them later must not see other contents."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


class Inputs:
    """Tensors by name, and which version of each a problem was solved for.

    Tensors are not copied: torch counts their changes in place, also those under ``no_grad`` and through views. Two
    kinds carry no count to go by and are copied: inference tensors, and those of a graph that is being compiled,
    where a copy that nothing asks for is never made.
    """

    def __init__(self, **tensors: Tensor | None) -> None:
        self._tensors: dict[str, Tensor] = {}
        self._versions: dict[str, int] = {}
        self._names = tuple(tensors)
        for name, value in tensors.items():
            if value is None:
                continue
            if torch.compiler.is_compiling() or value.is_inference():
                self._tensors[name] = value.clone()
            else:
                self._tensors[name], self._versions[name] = value, _version(value)

    @property
    def requires_grad(self) -> bool:
        return any(map(wants_gradient, self._tensors.values()))

    def unchanged(self, what: str) -> tuple[Tensor | None, ...]:
        """The tensors, in the order in which they were named.

        Raises:
            RuntimeError: one was changed in place, so that ``what`` would be made of a mixture.
        """
        for name, version in self._versions.items():
            now = _version(self._tensors[name])
            if now != version:
                raise RuntimeError(
                    f"sfr_ext.{what}: expected {name} as it was when the problem was solved, got it modified by an "
                    f"inplace operation: it is at version {now}; expected version {version} instead. Ask before "
                    "changing it, or solve with a clone"
                )
        return tuple(self._tensors.get(name) for name in self._names)


def wants_gradient(tensor: Tensor) -> bool:
    return any(layer.requires_grad for layer in _layers(tensor))


def _layers(tensor: Tensor) -> Iterator[Tensor]:
    """The tensor, and what transforms of torch.func have wrapped up in it. (Nothing public unwraps them.)"""
    yield tensor
    while not torch.compiler.is_compiling() and torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
        yield tensor


def _version(tensor: Tensor) -> int:
    *_, innermost = _layers(tensor)  # vmap's wrappers count nothing
    return innermost._version
