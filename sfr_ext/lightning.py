"""SFR in the training of any LightningModule: ``Trainer(callbacks=[SFRCallback([...])])``."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .layouts import Transform
from .regularizer import SelfFeatureRegularizer
from .smoothing import DynamicLabelSmoothing
from .train.engine import L

__all__ = ["SFRCallback"]

_WHERE = "sfr_ext.lightning.SFRCallback"
# Attributes of a training step that a callback has put on a module: the callback, and the module's own one before.
_ADDED_BY, _REPLACED = "_sfr_callback", "_sfr_replaced"


class SFRCallback(L.Callback):
    """Adds a `SelfFeatureRegularizer` to what ``training_step`` returns.

    * The loss is added inside of ``training_step``, so that precision, accumulation and strategy treat it as any other.
    * Every `DynamicLabelSmoothing` in the module is stepped after each step of the optimiser.
    * ``sfr/loss`` and ``sfr/SHALLOW-DEEP`` for each pair are logged.
    * The ramp's counter is saved in checkpoints, as part of the callback's state. The smoothing's is in the module's.

    Args:
        layers: as `SelfFeatureRegularizer` has them, names within the LightningModule (``"model.layer1"``).
        step_smoothing: whether to step the smoothings of the module; False if the module does it itself.
        options: of `SelfFeatureRegularizer`. With ``channel_mode="project"`` the regulariser becomes a submodule,
            ``self_feature_regularizer``, and its parameters are made before ``configure_optimizers``, by a forward of
            the module's ``example_input_array``; they are in checkpoints, and the module alone loads these by
            ``strict=False``.

    Attributes:
        regularizer: the `SelfFeatureRegularizer`, during ``fit``; else None.

    Raises:
        TypeError, ValueError, RuntimeError: as `SelfFeatureRegularizer`, when ``fit`` begins.
        ValueError: the module optimises manually (add ``regularizer.loss()`` yourself), or "project" without
            ``example_input_array``.
        RuntimeError: no optimiser has the parameters of "project".

    >>> from sfr_ext.lightning import SFRCallback
    >>> callback = SFRCallback(["model.layer1", "model.layer2"], weight=0.5)
    """

    def __init__(
        self, layers: Sequence[str] | Mapping[str, Transform | None], *, step_smoothing: bool = True, **options: Any
    ) -> None:
        self.layers = layers
        self.step_smoothing = step_smoothing
        self.options = options
        self.regularizer: SelfFeatureRegularizer | None = None
        self._projects = options.get("channel_mode") == "project"
        self._state: dict[str, Any] = {}
        self._logged: dict[str, Tensor] = {}
        self._optimizer_steps = 0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        _undo_left(pl_module)
        if not pl_module.automatic_optimization:
            raise ValueError(f"{_WHERE}: expected automatic optimisation; a manual one adds regularizer.loss() itself")
        self.regularizer = SelfFeatureRegularizer(pl_module, self.layers, **{"attach": self._projects, **self.options})
        if self._projects:
            _make_projections(pl_module)
        pl_module.training_step = self._with_loss(pl_module)  # type: ignore[method-assign]

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert self.regularizer is not None
        self.regularizer.to(pl_module.device)
        if self._state:  # of a checkpoint
            self.regularizer.load_state_dict(self._state)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert self.regularizer is not None
        self._optimizer_steps = trainer.global_step
        known = {id(p) for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]}
        if any(id(p) not in known for p in self.regularizer.parameters()):
            raise RuntimeError(
                f"{_WHERE}: expected configure_optimizers to take the parameters of the projections as well, as "
                "self.parameters() has them"
            )

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        pl_module.log_dict(self._logged)
        if trainer.global_step > self._optimizer_steps:  # not after a batch that was only accumulated
            self._optimizer_steps = trainer.global_step
            for module in pl_module.modules():
                if self.step_smoothing and isinstance(module, DynamicLabelSmoothing):
                    module.step()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._end(pl_module)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._end(pl_module)  # Lightning tears no callback down then

    def _end(self, module: L.LightningModule) -> None:
        """The module as it was before. Calling it again does nothing."""
        if self.regularizer is not None:
            self._state = self.state_dict()
            self.regularizer.remove()
            self.regularizer = None
        if getattr(step := module.training_step, _ADDED_BY, None) is self:
            replaced = getattr(step, _REPLACED)
            if replaced is None:
                del module.training_step
            else:
                module.training_step = replaced  # type: ignore[method-assign]

    def state_dict(self) -> dict[str, Any]:
        if self._projects:
            return {}  # it is in the module's
        return self._state if self.regularizer is None else dict(self.regularizer.state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._state = dict(state_dict)
        if self.regularizer is not None and self._state:
            self.regularizer.load_state_dict(self._state)

    def _with_loss(self, module: L.LightningModule) -> Callable[..., Any]:
        training_step = module.training_step

        @functools.wraps(training_step)
        def step(*args: Any, **kwargs: Any) -> Any:
            output = training_step(*args, **kwargs)
            if output is None or self.regularizer is None:  # a batch that is left out
                return output
            extra = self.regularizer.loss()
            values = self.regularizer.values()
            self._logged = {f"sfr/{shallow}-{deep}": value for (shallow, deep), value in values.items()}
            self._logged["sfr/loss"] = extra.detach()
            if isinstance(output, Mapping):
                return {**output, "loss": output["loss"] + extra}
            return output + extra

        setattr(step, _ADDED_BY, self)
        setattr(step, _REPLACED, vars(module).get("training_step"))
        return step


def _undo_left(module: L.LightningModule) -> None:
    """Takes off what a callback has left on a module after a fit whose end it was not told. (Lightning allows one.)"""
    left = getattr(module.training_step, _ADDED_BY, None)
    if left is not None:
        left._end(module)


def _make_projections(module: L.LightningModule) -> None:
    example = module.example_input_array
    if example is None:
        raise ValueError(f'{_WHERE}: expected the module to have example_input_array for channel_mode="project"')
    training = module.training
    module.eval()  # running statistics stay
    with torch.no_grad():
        if isinstance(example, Mapping):
            module(**example)
        else:
            module(*example) if isinstance(example, tuple) else module(example)
    module.train(training)
