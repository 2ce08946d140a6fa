"""From what layers return to maps ``[B, C, H, W]`` and tokens ``[B, N, C]``; nothing is guessed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .. import checks
from ..layouts import Transform


def features_of(
    where: str, outputs: Mapping[str, Any], transforms: Mapping[str, Transform | None]
) -> dict[str, Tensor]:
    """The features of each layer, by its transform."""
    features = {}
    for name, output in outputs.items():
        transform = transforms.get(name)
        if transform is None:
            _check_plain(where, name, output)
        features[name] = output if transform is None else transform(output)
    check_features(where, features)
    plain = [features[name] for name in features if transforms.get(name) is None]
    way = "give these layers the transform sfr_ext.layouts.nhwc, or sfr_ext.layouts.nchw if the shape is meant"
    refuse_channels_last(where, plain, way)
    return features


def check_features(where: str, features: Mapping[str, Any]) -> None:
    """Maps or tokens, by name."""
    for name, feature in features.items():
        checks.a_tensor(where.removeprefix("sfr_ext."), f"layer {name!r}", feature)
        if not feature.is_floating_point():
            raise TypeError(f"{where}: expected layer {name!r} to give floating point, got {feature.dtype}")
        if feature.dim() not in (3, 4):
            shape = list(feature.shape)
            raise ValueError(f"{where}: expected layer {name!r} to give shape [B, C, H, W] or [B, N, C], got {shape}")
        if 0 in feature.shape[1:]:
            shape = list(feature.shape)
            raise ValueError(f"{where}: expected layer {name!r} to give no empty axis but the batch, got {shape}")


def refuse_channels_last(where: str, maps: list[Tensor], way: str) -> None:
    """Maps ``[B, p, p, q]`` with ``q > p``, all of them: channels are last, and rows would be taken for channels."""
    shapes = [tuple(x.shape) for x in maps if x.dim() == 4]
    if len(shapes) == len(maps) > 0 and all(shape[1] == shape[2] < shape[3] for shape in shapes):
        came = ", ".join(str(list(shape)) for shape in shapes)
        raise ValueError(
            f"{where}: expected maps of shape [B, C, H, W], got {came}, which look like [B, H, W, C]; {way}"
        )


def _check_plain(where: str, name: str, output: object) -> None:
    """Without a transform, one map."""
    if not isinstance(output, Tensor):
        raise TypeError(
            f"{where}: expected layer {name!r} to return a Tensor, got {type(output).__name__} "
            "(sfr_ext.layouts.item takes one of several)"
        )
    checks.a_tensor(where.removeprefix("sfr_ext."), f"layer {name!r}", output)
    if output.dim() != 4:
        raise ValueError(
            f"{where}: expected layer {name!r} to return shape [B, C, H, W], got {list(output.shape)} "
            "(sfr_ext.layouts has transforms for other shapes: tokens for [B, N, C])"
        )
