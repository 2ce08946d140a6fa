"""Self-feature regularisation of features that are at hand, without hooks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import checks
from .sfr.comparison import Comparison
from .sfr.comparison import distance as distance_of
from .sfr.features import check_features, refuse_channels_last
from .sfr.options import Distance, Options
from .sfr.pairs import Pairs, shallow_to_deep

_NAME = "self_feature_loss"


def self_feature_loss(
    features: Mapping[str, Tensor] | Sequence[Tensor],
    *,
    pairs: Pairs = "all",
    weight: float = 1.0,
    channel_mode: str = "match",
    max_grid: int | None = 7,
    normalize: bool = True,
    weighting: str = "uniform",
    detach_teacher: bool = True,
    distance: Distance = "emd",
    **emd_options: Any,
) -> Tensor:
    """What `SelfFeatureRegularizer.loss` returns, for features that the loop has already.

    Args:
        features: from shallow to deep, maps ``[B, C, H, W]`` or tokens ``[B, N, C]``. A dict from names to these, or a
            list, whose names are "0", "1", ...
        pairs, weight, channel_mode, max_grid, normalize, weighting, detach_teacher, distance, emd_options: as
            `SelfFeatureRegularizer` has them; ``channel_mode`` without "project", which needs parameters.

    Returns:
        A scalar.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: an impossible pair or value, features of a wrong shape.

    >>> import torch
    >>> from sfr_ext import self_feature_loss
    >>> shallow, deep = torch.rand(2, 8, 14, 14, requires_grad=True), torch.rand(2, 32, 7, 7)
    >>> self_feature_loss([shallow, deep]).backward()
    >>> shallow.grad.shape
    torch.Size([2, 8, 14, 14])
    """
    where = f"sfr_ext.{_NAME}"
    if not isinstance(features, (Mapping, Sequence)):
        checks.refuse(TypeError, _NAME, "features", "to be a dict or a list", type(features).__name__)
    named = dict(features) if isinstance(features, Mapping) else {str(i): x for i, x in enumerate(features)}
    if channel_mode == "project":
        came = '"project", which has parameters: use sfr_ext.SelfFeatureRegularizer'
        checks.refuse(ValueError, _NAME, "channel_mode", '"match", "mean" or "crop"', came)
    options = Options(_NAME, channel_mode, max_grid, normalize, weighting, detach_teacher, distance, emd_options)
    weight = checks.number(_NAME, "weight", weight, positive=False)
    chosen = shallow_to_deep(where, pairs, list(named), "features")
    check_features(where, named)
    refuse_channels_last(where, list(named.values()), "give sfr_ext.layouts.nhwc(map) of each map")
    # The distance takes each dtype as it is; autocast would only add casts.
    with torch.autocast(next(iter(named.values())).device.type, enabled=False):
        comparison = Comparison(options, named)
        losses = [distance_of(options, *comparison.sides(shallow, deep)) for shallow, deep in chosen]
        return torch.stack(losses).mean() * weight
