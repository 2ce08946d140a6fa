"""The arms of a comparison: which labels the cross-entropy sees, and which loss the feature maps get."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ..layouts import Transform
from ..sfr.candidates import Candidate, candidates, suggestion
from ..smoothing import DynamicLabelSmoothing
from .config import DISTILL, FEATURE_ARMS, FOR_ARMS, TEMPERATURE, TrainConfig
from .errors import TrainError, UsageError
from .models import refuse_unknown_layers
from .relatives.base import Relative
from .relatives.byot import OwnTeacher
from .relatives.cskd import ClassWise
from .relatives.ols import OnlineSmoothing
from .relatives.pskd import PastPredictions
from .relatives.tfd import SquaredError
from .relatives.tfkd import TeacherFree
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
    config: TrainConfig, model: nn.Module, stages: tuple[str, ...] | None, image: Tensor, steps_per_epoch: int
) -> TimedRegularizer | None:
    """The feature loss of the arm, None where it has none.

    Args:
        config: of the run.
        model: the network.
        stages: its stages, where they are known.
        image: one ``[C, H, W]`` like those of the run.
        steps_per_epoch: batches, over which the factor rises.
    """
    if config.arm not in FEATURE_ARMS:
        return None
    layers = _needed_layers(config, model, stages, image)
    kinds = {"l2": PointwiseL2, "tfd": SquaredError}
    kind = kinds.get(config.arm, TimedRegularizer)
    options: dict[str, Any] = {} if config.arm in kinds else config.emd_options()
    if config.arm == "tfd":
        options = {"normalize": False}
    try:
        regularizer = kind(
            model,
            layers,
            pairs=config.pairs,
            weight=config.emd_weight,
            # More steps than anyone runs stand for a warm-up without end.
            warmup_steps=round(min(config.emd_warmup * steps_per_epoch, 2.0**53)),
            channel_mode="crop" if config.arm == "tfd" else config.channel_mode,
            **options,
        )
    except ValueError as error:
        raise TrainError(str(error)) from error
    if regularizer.projections is not None:
        try:
            _forward(model, image)  # makes the projections, which the optimiser is to have
        except (AssertionError, IndexError, RuntimeError, TypeError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise TrainError(f"--channel-mode project with --layers {','.join(layers)}: {reason}") from error
    return regularizer


def build_relative(
    config: TrainConfig, model: nn.Module, stages: tuple[str, ...] | None, image: Tensor, num_classes: int
) -> Relative | None:
    """The losses of an arm that has losses of its own, None for the others."""
    if config.arm not in DISTILL:
        return None
    share = DISTILL[config.arm] if config.distill is None else config.distill
    temperature = TEMPERATURE.get(config.arm, 1.0) if config.temperature is None else config.temperature
    if config.arm == "pskd":
        return PastPredictions(config.epochs, share)
    if config.arm == "cskd":
        return ClassWise(share, temperature)
    if config.arm == "tfkd":
        return TeacherFree(share, temperature)
    if config.arm == "ols":
        return OnlineSmoothing(num_classes, 1 - share)
    layers = _needed_layers(config, model, stages, image)
    try:
        return OwnTeacher(model, layers, image, num_classes, share, temperature, config.hint)
    except (TypeError, ValueError) as error:
        raise TrainError(str(error)) from error


def _needed_layers(
    config: TrainConfig, model: nn.Module, stages: tuple[str, ...] | None, image: Tensor
) -> dict[str, Transform | None]:
    layers = compared_layers(config, model, stages, image)
    if not layers:
        raise TrainError(f"--arm {config.arm} with --arch {config.arch} needs --layers, shallow to deep")
    return layers


def compared_layers(
    config: TrainConfig, model: nn.Module, stages: tuple[str, ...] | None, image: Tensor
) -> dict[str, Transform | None]:
    """The layers to compare, shallow to deep, each with the transform that makes a map of what it returns.

    Those of ``--layers``, else the stages, else what ``sfr-ext layers`` suggests; empty where nothing does. The stages
    of a ResNet return maps; what others return is found out by one forward of noise.
    """
    if config.layers is None and stages is not None:
        return dict.fromkeys(stages)
    if config.layers is not None:
        refuse_unknown_layers(config.layers, model)
    try:
        found = _forward(model, image)
    except (AssertionError, IndexError, RuntimeError, TypeError, ValueError) as error:
        size = " x ".join(map(str, image.shape))
        reason = str(error).strip().splitlines()[0]
        raise TrainError(f"--arch {config.arch} cannot take images of {size} ({reason})") from error
    if config.layers is not None:
        _refuse_other_order(config.layers, [candidate.name for candidate in found])
        transforms = {candidate.name: candidate.transform for candidate in found}
        return {name: transforms.get(name) for name in config.layers}
    chosen = suggestion(found)
    return {candidate.name: candidate.transform for candidate in chosen} if len(chosen) > 1 else {}


def check_layers(config: TrainConfig, model: nn.Module, image: Tensor) -> None:
    """Raises UsageError where ``--layers`` of an arm that compares layers names none or one of the network's, or deep
    ones before shallow ones. An image is ``[C, H, W]``."""
    if config.layers is None or config.arm not in FOR_ARMS["layers"]:
        return
    refuse_unknown_layers(config.layers, model)
    if len(set(config.layers)) < 2:
        named = ",".join(config.layers)
        raise UsageError(f"--layers must name at least two, shallow to deep, for --arm {config.arm}, got {named!r}")
    compared = compared_layers(config, model, None, image)
    _refuse_without_maps(config, [name for name, transform in compared.items() if transform is None], model, image)


def _refuse_without_maps(config: TrainConfig, layers: list[str], model: nn.Module, image: Tensor) -> None:
    """What no transform makes a map of has to be one."""
    returned: dict[str, Any] = {}
    modules = dict(model.named_modules())
    handles = [
        modules[name].register_forward_hook(lambda module, args, output, name=name: returned.update({name: output}))
        for name in layers
    ]
    try:
        _forward(model, image)
    finally:
        for handle in handles:
            handle.remove()
    for name in layers:
        output = returned.get(name)
        if not isinstance(output, Tensor) or output.dim() != 4:
            came = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
            came = "is not run" if name not in returned else f"returns {came}"
            raise UsageError(
                f"--layers: {name!r} {came}, and no features of places in an image; "
                f"`sfr-ext layers {config.arch}` lists the layers that do"
            )


def _refuse_other_order(layers: tuple[str, ...], ran: list[str]) -> None:
    known = [name for name in layers if name in ran]
    for shallow, deep in pairwise(known):
        if ran.index(deep) < ran.index(shallow):
            raise UsageError(f"--layers must be from shallow to deep, but {deep!r} runs before {shallow!r}")


def _forward(model: nn.Module, image: Tensor) -> list[Candidate]:
    """What layers return for a batch of noise; the network is as it was."""
    like = next(model.parameters(), torch.empty(0))
    noise = torch.rand(2, *image.shape, generator=torch.Generator().manual_seed(0)).to(like.device, like.dtype)
    modes = {module: module.training for module in model.modules()}
    try:
        return candidates(model, noise)
    finally:
        for module, mode in modes.items():
            module.training = mode
