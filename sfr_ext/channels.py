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
    >>> group_channels(torch.zeros(2, 64, 7, 7), 16).shape
    torch.Size([2, 4, 16, 7, 7])
    """
    if not isinstance(deep, Tensor):
        raise TypeError(f"sfr_ext.group_channels: expected deep to be a Tensor, got {type(deep).__name__}")
    checks.an_int("group_channels", "num_channels", num_channels)
    if deep.dim() != 4:
        raise ValueError(f"sfr_ext.group_channels: expected deep of shape [B, C, H, W], got {list(deep.shape)}")
    channels = deep.shape[1]
    if num_channels < 1 or channels < num_channels or channels % num_channels != 0:
        raise ValueError(
            "sfr_ext.group_channels: expected num_channels to divide the channels of deep, "
            f"got num_channels = {num_channels} and deep of shape {list(deep.shape)}"
        )
    return deep.unflatten(1, (channels // num_channels, num_channels))
