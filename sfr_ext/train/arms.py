"""The arms of a comparison: which labels the cross-entropy sees, and which loss the feature maps get."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..smoothing import DynamicLabelSmoothing
from .config import TrainConfig
from .errors import TrainError
from .stopwatch import TimedRegularizer


class PointwiseL2(TimedRegularizer):
    """The same pairs, pooling, groups and scaling; each student pixel against the teacher pixel at its own
    place.

    Mean over pixels and groups of the unsquared l2 distance: what EMD becomes when no mass may move.
    """

    def _distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        if teacher.dim() == 5:
            student = student.unsqueeze(1)
        return torch.linalg.vector_norm(student - teacher, dim=-3).mean()


def build_smoothing(config: TrainConfig, total_steps: int) -> DynamicLabelSmoothing:
    """The cross-entropy of the arm."""
    if config.arm in ("sfr", "dls"):
        return DynamicLabelSmoothing(config.smoothing, total_steps, config.schedule, config.prior)
    return DynamicLabelSmoothing(config.smoothing if config.arm == "ls" else 0.0, schedule="constant")


def build_regularizer(
    config: TrainConfig, model: nn.Module, stages: tuple[str, ...] | None, steps_per_epoch: int
) -> TimedRegularizer | None:
    """The feature loss of the arm, None where it has none."""
    if config.arm not in ("sfr", "emd", "l2"):
        return None
    layers = config.layers or stages
    if layers is None:
        raise TrainError(f"--arm {config.arm} with --arch {config.arch} needs --layers, shallow to deep")
    options = {} if config.arm == "l2" else config.emd_options()
    kind = PointwiseL2 if config.arm == "l2" else TimedRegularizer
    try:
        return kind(
            model,
            layers,
            pairs=config.pairs,
            weight=config.emd_weight,
            # More steps than anyone runs stand for a warm-up without end.
            warmup_steps=round(min(config.emd_warmup * steps_per_epoch, 2.0**53)),
            channel_mode=config.channel_mode,
            **options,
        )
    except ValueError as error:
        raise TrainError(str(error)) from error
