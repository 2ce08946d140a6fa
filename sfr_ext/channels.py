"""Splitting the many channels of a deep feature map into groups as wide as a shallow one."""

from __future__ import annotations

from torch import Tensor

from . import checks


def group_channels(deep: Tensor, num_channels: int) -> Tensor:
    """Cut the channels of a deep map into consecutive groups of ``num_channels``.

    ``out[b, g, c] = deep[b, g * num_channels + c]``: many deep channels face one shallow channel
    ("many-to-one in the channel dimension"). The same cut as NORM (ICLR 2023) makes. No data is copied: the
    result is a view.

    Args:
        deep: ``[B, Cd, H, W]``, any memory format.
        num_channels: channels of one group, ``C``; must divide ``Cd``.

    Returns:
        ``[B, G, C, H, W]`` with ``G = Cd / C``.

    Raises:
        TypeError: ``deep`` is no tensor, or ``num_channels`` no int.
        ValueError: ``deep`` is not 4-D, or ``num_channels`` does not divide its channels.

    >>> import torch
    >>> from sfr_ext import group_channels
    >>> group_channels(torch.zeros(2, 64, 7, 7), 16).shape
    torch.Size([2, 4, 16, 7, 7])
    """
    where = "group_channels"
    checks.a_tensor(where, "deep", deep)
    num_channels = checks.an_int(where, "num_channels", num_channels)
    if deep.dim() != 4:
        hint = "; for one map, give deep[None]" if deep.dim() == 3 else ""
        checks.refuse(ValueError, where, "deep", "of shape [B, C, H, W]", checks.shape_of(deep) + hint)
    channels = deep.shape[1]
    if num_channels < 1 or channels < num_channels or channels % num_channels != 0:
        came = f"num_channels = {num_channels} and deep of shape {checks.shape_of(deep)}"
        checks.refuse(ValueError, where, "num_channels", "to divide the channels of deep", came)
    return deep.unflatten(1, (channels // num_channels, num_channels))
