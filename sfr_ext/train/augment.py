"""Random crops and mirroring of a whole batch at once, on the batch's device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def crop_and_flip(images: Tensor, padding: int, flip: bool, generator: torch.Generator) -> Tensor:
    """Each image padded by ``padding`` zeros on every side, cropped at a random place, mirrored with chance
    1/2.

    Args:
        images: ``[B, C, H, W]``.
        padding: pixels on each side; 0: no crop.
        flip: whether to mirror at all.
        generator: on the CPU, so that every device draws the same numbers.
    """
    batch, _, height, width = images.shape
    device = images.device
    offset = torch.randint(0, 2 * padding + 1, (2, batch, 1), generator=generator)
    mirror = torch.rand(batch, 1, generator=generator) < (0.5 if flip else 0.0)
    across = torch.arange(width).expand(batch, width)
    rows = (offset[0] + torch.arange(height)).to(device)
    columns = (offset[1] + torch.where(mirror, across.flip(1), across)).to(device)
    padded = F.pad(images, (padding,) * 4) if padding else images
    index = torch.arange(batch, device=device)[:, None, None]
    # One gather for crop and mirror; indexing around the channel axis puts that axis last: [B, H, W, C].
    return padded[index, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
