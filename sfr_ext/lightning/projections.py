"""The projections of `SFRCallback`: made before the optimiser is, and a part of the module until ``fit`` ends."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Mapping
from typing import Any

import torch

from ..regularizer import SelfFeatureRegularizer
from ..sfr.unsaved import Unsaved
from ..train.engine import L
from .step import WHERE

NAME = "self_feature_regularizer"  # of the submodule that has them
# What spreads parameters over processes, where projections were never tried.
_SHARDED = ("FSDPStrategy", "ModelParallelStrategy")


class Lent:
    """A submodule, under the first name that is free, until it is taken back."""

    def __init__(self, module: L.LightningModule, part: Unsaved) -> None:
        names = (NAME if n == 1 else f"{NAME}_{n}" for n in range(1, 1000))
        self.name = next(name for name in names if not hasattr(module, name))
        self._module, self._part = weakref.ref(module), part
        module.add_module(self.name, part)

    def take_back(self) -> None:
        self._part.end()
        module = self._module()
        if module is not None and getattr(module, self.name, None) is self._part:
            delattr(module, self.name)


def check_trainer(trainer: L.Trainer, callback: L.Callback) -> None:
    """Refuses those by which projections would not train, or not be where they are looked for."""
    kind = type(trainer.strategy).__name__
    if kind in _SHARDED:
        raise ValueError(f'{WHERE}: expected one device or DDP for channel_mode="project", got {kind}')
    averaging = getattr(L.pytorch.callbacks, "WeightAveraging", ())  # newer than the oldest that is supported
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    for each in callbacks[: callbacks.index(callback) if callback in callbacks else 0]:
        if isinstance(each, averaging):
            name = type(each).__name__
            raise ValueError(
                f"{WHERE}: expected to come before {name} in callbacks, since that copies the module when fit "
                "begins and the copy would lack the projections, got it after"
            )


def make_projections(trainer: L.Trainer, module: L.LightningModule, regularizer: SelfFeatureRegularizer) -> None:
    example = module.example_input_array
    if example is None:
        raise ValueError(f'{WHERE}: expected the module to have example_input_array for channel_mode="project"')
    modes = {each: each.training for each in module.modules()}
    module.eval()  # running statistics stay
    try:
        with torch.no_grad():
            _forward(trainer, module, example)
    finally:
        for each, training in modes.items():  # parts that are frozen stay in evaluation
            each.training = training
    assert regularizer.projections is not None
    if not regularizer.projections.made:
        regularizer.remove()
        raise RuntimeError(
            f"{WHERE}: expected the module's forward of example_input_array, in evaluation mode, to pass through all "
            f'of {", ".join(map(repr, regularizer.layers))}, since it makes the projections of channel_mode="project"'
        )


def _forward(trainer: L.Trainer, module: L.LightningModule, example: Any) -> None:
    """As it is; and if it cannot be, as batches are: an earlier fit may have converted the module."""

    def call(example: Any) -> None:
        call = module._call_impl  # not compiled, as the module itself may be: no hook makes anything in a graph
        if isinstance(example, Mapping):
            call(**example)
        else:
            call(*example) if isinstance(example, (list, tuple)) else call(example)

    try:
        call(example)
    except Exception as error:
        precision: Any = trainer.precision_plugin
        with contextlib.suppress(Exception), precision.forward_context():
            batch = module._apply_batch_transfer_handler(module._on_before_batch_transfer(example))
            call(precision.convert_input(batch))
            return
        raise error
