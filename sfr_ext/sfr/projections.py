"""Learned 1 x 1 convolutions from shallow to deep channels, one for each pair."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Projections(nn.Module):
    """Bias-free 1 x 1 convolutions ``[C_deep, C_shallow, 1, 1]``, made when the channels are known.

    Args:
        count: of pairs. The parameters are called ``pair0``, ``pair1``, ...
    """

    __jit_unused_properties__ = ("made",)

    def __init__(self, count: int) -> None:
        super().__init__()
        for i in range(count):
            self.register_parameter(f"pair{i}", None)

    @property
    def made(self) -> bool:
        return all(weight is not None for weight in self._parameters.values())

    def make(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """For the shallow and deep features of each pair, ``[B, C, H, W]`` or ``[B, N, C]``."""
        with torch.inference_mode(False):
            for i, (shallow, deep) in enumerate(pairs):
                dtype = torch.promote_types(shallow.dtype, torch.float32)
                weight = torch.empty(channels(deep), channels(shallow), 1, 1, device=shallow.device, dtype=dtype)
                nn.init.kaiming_normal_(weight, nonlinearity="linear")
                self.register_parameter(f"pair{i}", nn.Parameter(weight))

    def channels_of_pair(self, i: int) -> tuple[int, int]:
        """Shallow and deep."""
        deep, shallow, _, _ = getattr(self, f"pair{i}").shape
        return shallow, deep

    def of_pair(self, i: int) -> Callable[[Tensor], Tensor]:
        """From a student ``[B, C_shallow, h, w]`` to ``[B, C_deep, h, w]``."""
        return lambda x: self._project(x, getattr(self, f"pair{i}"))

    def _project(self, x: Tensor, weight: Tensor) -> Tensor:
        common = torch.promote_types(x.dtype, weight.dtype)
        return F.conv2d(x.to(common), weight.to(common))

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        # A new object takes them from a saved one, before any forward.
        for name, weight in self._parameters.items():
            saved = state_dict.get(prefix + name)
            if weight is None and isinstance(saved, Tensor):
                self.register_parameter(name, nn.Parameter(torch.empty_like(saved)))
        super()._load_from_state_dict(state_dict, prefix, *args)


def channels(x: Tensor) -> int:
    """Of a map ``[B, C, H, W]`` or tokens ``[B, N, C]``."""
    return x.shape[1 if x.dim() == 4 else 2]
