"""Feature maps on one grid, and as directions."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops


def pool(x: Tensor, height: int, width: int) -> Tensor:
    """``adaptive_avg_pool2d``; where the sizes divide by its twin that is deterministic on a GPU, too."""
    if x.shape[2:] == (height, width):
        return x
    if x.shape[2] % height == 0 and x.shape[3] % width == 0:
        window = x.shape[2] // height, x.shape[3] // width
        by_slices = x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64)
        if by_slices and max(window) <= _MOST_SLICES and not torch.compiler.is_compiling():
            mean: Tensor = _BlockMean.apply(x, *window)
            return mean
        return F.avg_pool2d(x, window)
    return F.adaptive_avg_pool2d(x, (height, width))


# With more, the slices would be read in more passes than they save.
_MOST_SLICES = 4


class _BlockMean(torch.autograd.Function):
    """``F.avg_pool2d(x, (down, across))`` in whole rows: half the time of it on a CPU, forward and backward."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, down: int, across: int) -> Tensor:
        rows = x[..., ::down, :]
        for i in range(1, down):
            rows = rows + x[..., i::down, :]
        blocks = rows[..., ::across]
        for i in range(1, across):
            blocks = blocks + rows[..., i::across]
        return blocks * (1 / (down * across))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int, int], output: Tensor) -> None:
        _, ctx.down, ctx.across = inputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        share = (grad * (1 / (ctx.down * ctx.across))).unsqueeze(-1)
        rows = share.expand(*grad.shape, ctx.across).flatten(-2).unsqueeze(-2)
        return rows.expand(*rows.shape[:-2], ctx.down, -1).flatten(-3, -2), None, None


def in_one_pass(x: Tensor, height: int, width: int) -> bool:
    """Whether `directions` takes a map: a compiler does better with the operations one by one."""
    return ops.directions_in_one_pass(x, height, width) and not torch.compiler.is_compiling()


def directions(x: Tensor, groups: int, height: int, width: int) -> Tensor:
    """``[B, groups, C, height, width]``: `unit` of `pool`, of the groups that channels are cut into."""
    found: Tensor = ops.directions_forward(x, groups, height, width)[0]
    return found


def unit(x: Tensor) -> Tensor:
    """Channel vectors (third axis from the end) scaled to length 1, in float32 at least."""
    if x.dtype in (torch.float16, torch.bfloat16):
        x = x.float()
    # Squares and a sum: a norm along an axis that is not the last is over ten times slower on a CPU.
    squared = x.square().sum(dim=-3, keepdim=True)
    # After a ReLU some pixels are all but zero, where the gradient of the direction, 1 / length, explodes.
    floor = 1e-3 * squared.detach().sqrt().mean(dim=(-2, -1), keepdim=True)
    return x / torch.maximum(squared, floor.square().clamp_min(torch.finfo(x.dtype).tiny)).sqrt()
