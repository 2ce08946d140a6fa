"""From what a layer returns to the features of an image: maps ``[B, C, H, W]`` or tokens ``[B, N, C]``.

`SelfFeatureRegularizer` and `FeatureDistiller` never guess what a layer returns. Where it is anything but one tensor
``[B, C, H, W]``, give the transform:

>>> from sfr_ext import layouts
>>> swin = {"layers.0": layouts.nhwc, "layers.1": layouts.nhwc}
>>> vit = {"blocks.3": layouts.tokens(), "blocks.11": layouts.tokens()}
>>> first_of_a_tuple = layouts.compose(layouts.item(0), layouts.tokens(prefix=2))

Any function from the layer's output to such a tensor is a transform.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from . import checks

Transform = Callable[[Any], Any]

__all__ = ["compose", "item", "nchw", "nhwc", "tokens"]


def nhwc(output: Tensor) -> Tensor:
    """``[B, H, W, C]`` -> ``[B, C, H, W]``, a view. Swin and other networks that keep channels last.

    >>> import torch
    >>> from sfr_ext.layouts import nhwc
    >>> nhwc(torch.zeros(2, 7, 7, 96)).shape
    torch.Size([2, 96, 7, 7])
    """
    _tensor("nhwc", output, 4, "[B, H, W, C]")
    return output.permute(0, 3, 1, 2)


def nchw(output: Tensor) -> Tensor:
    """``[B, C, H, W]`` as it is. Says that the shape is meant, where it looks like ``[B, H, W, C]``.

    >>> import torch
    >>> from sfr_ext.layouts import nchw
    >>> nchw(torch.zeros(2, 8, 8, 32)).shape
    torch.Size([2, 8, 8, 32])
    """
    _tensor("nchw", output, 4, "[B, C, H, W]")
    return output


class tokens:
    """``[B, prefix + N, C]`` -> ``[B, C, H, W]``, or ``[B, N, C]`` where N is no square. Views.

    Args:
        prefix: tokens at the front that are no part of the image: 1 for a ViT's class token, 2 for DeiT's class and
            distillation token, more with registers, 0 for none.
        grid: ``(H, W)`` with ``H W = N``. None: a square if N is one, else tokens without a grid.

    Raises:
        TypeError: the output is no Tensor; arguments of the wrong kind.
        ValueError: it has another shape, or too few tokens.

    >>> import torch
    >>> from sfr_ext.layouts import tokens
    >>> tokens()(torch.zeros(2, 197, 384)).shape
    torch.Size([2, 384, 14, 14])
    >>> tokens(prefix=0, grid=(4, 6))(torch.zeros(2, 24, 384)).shape
    torch.Size([2, 384, 4, 6])
    """

    def __init__(self, prefix: int = 1, grid: tuple[int, int] | None = None) -> None:
        given: Any = prefix
        if isinstance(given, Tensor) and given.dim() > 0:  # as if the class were the transform
            came = "Tensor; write layouts.tokens()(output)"
            checks.refuse(TypeError, "layouts.tokens", "prefix", "to be an int", came)
        prefix = checks.whole("layouts.tokens", "prefix", prefix, 0)
        if grid is not None:
            if not isinstance(grid, (tuple, list)) or len(grid) != 2:
                checks.refuse(TypeError, "layouts.tokens", "grid", "to be None or a pair (H, W)", repr(grid))
            rows, columns = (checks.whole("layouts.tokens", "grid", size, 1) for size in grid)
        self.prefix = prefix
        self.grid = None if grid is None else (rows, columns)

    def __call__(self, output: Tensor) -> Tensor:
        _tensor("tokens", output, 3, "[B, prefix + N, C]")
        patches = output[:, self.prefix :]
        count = patches.shape[1]
        if count == 0:
            wanted = f"with more than {self.prefix} tokens (prefix)"
            checks.refuse(ValueError, "layouts.tokens", "output", wanted, checks.shape_of(output))
        grid = self.grid
        if grid is None:
            side = math.isqrt(count)
            if side * side != count:
                return patches
            grid = (side, side)
        if grid[0] * grid[1] != count:
            wanted = f"with {self.prefix} + {grid[0]} x {grid[1]} tokens (prefix + grid)"
            checks.refuse(ValueError, "layouts.tokens", "output", wanted, checks.shape_of(output))
        return patches.transpose(1, 2).unflatten(2, grid)

    def __repr__(self) -> str:
        return f"tokens(prefix={self.prefix}, grid={self.grid})"


class item:
    """One item of a tuple, list, dict or model output: ``output[key]``, or the attribute of that name.

    >>> from sfr_ext.layouts import item
    >>> item(1)(("first", "second")), item("maps")({"maps": "third"})
    ('second', 'third')
    """

    def __init__(self, key: int | str) -> None:
        self.key = key

    def __call__(self, output: Any) -> Any:
        if isinstance(output, Tensor):
            checks.refuse(TypeError, "layouts.item", "output", "to be a tuple, list, dict or model output", "a Tensor")
        try:
            if isinstance(self.key, str) and not hasattr(output, "keys"):
                return getattr(output, self.key)
            return output[self.key]
        except (AttributeError, IndexError, KeyError, TypeError) as error:
            has = f"keys {list(output.keys())}" if hasattr(output, "keys") else f"a {type(output).__name__}"
            if hasattr(output, "__len__"):
                has += f" of length {len(output)}"
            raise ValueError(f"sfr_ext.layouts.item: expected output to have {self.key!r}, got {has}") from error

    def __repr__(self) -> str:
        return f"item({self.key!r})"


class compose:
    """One transform after the other, from left to right.

    >>> import torch
    >>> from sfr_ext.layouts import compose, item, tokens
    >>> compose(item("hidden"), tokens())({"hidden": torch.zeros(2, 50, 8)}).shape
    torch.Size([2, 8, 7, 7])
    """

    def __init__(self, *transforms: Transform) -> None:
        for transform in transforms:
            if not is_transform(transform):
                checks.refuse(TypeError, "layouts.compose", "transforms", "to be functions", kind_of(transform))
        self.transforms = transforms

    def __call__(self, output: Any) -> Any:
        for transform in self.transforms:
            output = transform(output)
        return output

    def __repr__(self) -> str:
        return f"compose({', '.join(getattr(t, '__name__', repr(t)) for t in self.transforms)})"


def is_transform(value: object) -> bool:
    """A function, and not the class of one: called with an output, ``tokens`` would take it for its ``prefix``."""
    return callable(value) and not isinstance(value, type)


def kind_of(value: object) -> str:
    """Of what is no transform, for messages."""
    if not isinstance(value, type):
        return type(value).__name__
    ours = value.__module__ == __name__
    written = f"layouts.{value.__name__}({_WRITTEN.get(value.__name__, '')})" if ours else f"{value.__name__}()"
    return f"the class {value.__name__}; write {written}"


_WRITTEN = {"item": "key", "compose": "..."}


def _tensor(where: str, output: object, dims: int, shape: str) -> None:
    if isinstance(output, (tuple, list, dict)):
        came = f"{type(output).__name__} (sfr_ext.layouts.item takes one of several)"
        checks.refuse(TypeError, f"layouts.{where}", "output", "to be a Tensor", came)
    checks.a_tensor(f"layouts.{where}", "output", output)
    assert isinstance(output, Tensor)
    if output.dim() != dims:
        checks.refuse(ValueError, f"layouts.{where}", "output", f"of shape {shape}", checks.shape_of(output))
