"""Feature maps on one grid, and as directions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def pool(x: Tensor, height: int, width: int) -> Tensor:
    """``adaptive_avg_pool2d``; where the sizes divide by its twin that is deterministic on a GPU, too."""
    if x.shape[2:] == (height, width):
        return x
    if x.shape[2] % height == 0 and x.shape[3] % width == 0:
        return F.avg_pool2d(x, (x.shape[2] // height, x.shape[3] // width))
    return F.adaptive_avg_pool2d(x, (height, width))


def unit(x: Tensor) -> Tensor:
    """Channel vectors (third axis from the end) scaled to length 1, in float32 at least."""
    if x.dtype in (torch.float16, torch.bfloat16):
        x = x.float()
    # Squares and a sum: a norm along an axis that is not the last is over ten times slower on a CPU.
    squared = x.square().sum(dim=-3, keepdim=True)
    # After a ReLU some pixels are all but zero, where the gradient of the direction, 1 / length, explodes.
    floor = 1e-3 * squared.detach().sqrt().mean(dim=(-2, -1), keepdim=True)
    return x / torch.maximum(squared, floor.square().clamp_min(torch.finfo(x.dtype).tiny)).sqrt()
