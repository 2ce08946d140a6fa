"""SFR in the training of any LightningModule: ``Trainer(callbacks=[SFRCallback([...])])``."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .layouts import Transform
from .regularizer import SelfFeatureRegularizer
from .smoothing import DynamicLabelSmoothing
from .train.engine import L

__all__ = ["SFRCallback"]

_WHERE = "sfr_ext.lightning.SFRCallback"
# Attributes of a method that callbacks have put on a module: the callbacks, and the module's own one before.
_ADDED_BY, _REPLACED = "_sfr_callback", "_sfr_replaced"
_METHODS = ("training_step", "on_save_checkpoint", "on_load_checkpoint")
_NAME = "self_feature_regularizer"
# Where a checkpoint has weights of the module. The second is that of Lightning's weight averaging.
_WEIGHTS = ("state_dict", "current_model_state")
_Method = Callable[..., Any]


class SFRCallback(L.Callback):
    """Adds a `SelfFeatureRegularizer` to what ``training_step`` returns.

    * The loss is added inside of ``training_step``, so that precision, accumulation and strategy treat it as any other.
    * Every `DynamicLabelSmoothing` in the module is stepped after each step of the optimiser.
    * ``sfr/loss`` and ``sfr/SHALLOW-DEEP`` for each pair are logged.
    * The ramp's counter and the parameters of "project" are saved in checkpoints, as part of the callback's state: the
      module's is what it is without the callback. The smoothing's is in the module's.

    A Trainer may have several, of other layers, pairs, ``channel_mode`` or ``distance``, by which their states are told
    apart. ``sfr/loss`` is then their sum; of a pair that two of them have, the second is logged as
    ``sfr/SHALLOW-DEEP-2``.

    Args:
        layers: as `SelfFeatureRegularizer` has them, names within the LightningModule (``"model.layer1"``).
        step_smoothing: whether to step the smoothings of the module; False (in each callback) if the module does it
            itself.
        options: of `SelfFeatureRegularizer`. With ``channel_mode="project"`` the regulariser becomes a submodule for
            the time of ``fit``, ``self_feature_regularizer``, and its parameters are made before
            ``configure_optimizers``, by a forward of the module's ``example_input_array``. A further ``fit`` makes new
            ones, unless it is given a checkpoint. The state of the optimiser is of these parameters, too: without the
            callback, training goes on from the weights alone (``load_from_checkpoint``).

    Attributes:
        regularizer: the `SelfFeatureRegularizer`, during ``fit``; else None.

    Raises:
        TypeError, ValueError, RuntimeError: as `SelfFeatureRegularizer`, when ``fit`` begins.
        ValueError: the module optimises manually (add ``regularizer.loss()`` yourself); "project" without
            ``example_input_array``, after a callback that averages weights, or from a checkpoint without projections.
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
        self._attached: str | None = None  # the name of the submodule that the regulariser is, during ``fit``
        self._state: dict[str, Any] = {}
        self._logged: dict[str, Tensor] = {}
        self._optimizer_steps = 0

    @property
    def state_key(self) -> str:
        layers = list(self.layers) if isinstance(self.layers, (Mapping, Sequence)) else self.layers
        distance, pairs = self.options.get("distance", "emd"), self.options.get("pairs", "all")
        return self._generate_state_key(
            layers=layers,
            pairs=_as_lists(pairs),
            channel_mode=self.options.get("channel_mode", "match"),
            distance=getattr(distance, "__qualname__", type(distance).__name__) if callable(distance) else distance,
        )

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        ours = _callbacks(trainer)
        if ours[0] is self:  # the first acts for all
            _undo_left(pl_module)
            _put(pl_module, "on_load_checkpoint", _loading(pl_module, ours), ours)
        if stage != "fit":
            return
        if not pl_module.automatic_optimization:
            raise ValueError(f"{_WHERE}: expected automatic optimisation; a manual one adds regularizer.loss() itself")
        attach = self.options.get("attach", self._projects)
        if attach:
            self._refuse_a_copy_without_projections(trainer)
        options = {name: value for name, value in self.options.items() if name != "attach"}
        self.regularizer = SelfFeatureRegularizer(pl_module, self.layers, **options)
        if attach:
            others = sum(callback._attached is not None for callback in ours)
            name = f"{_NAME}_{others + 1}" if others else _NAME
            self.regularizer._attach(name)
            self._attached = name
        if self._projects:
            _make_projections(pl_module)
        if ours[0] is self:
            _put(pl_module, "on_save_checkpoint", _saving(pl_module, ours), ours)
            _put(pl_module, "training_step", self._with_losses(pl_module, ours), ours)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert self.regularizer is not None
        self.regularizer.to(pl_module.device)
        if self._state and self._attached is None:  # of a checkpoint
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
        ours = _callbacks(trainer)
        if ours[0] is not self:
            return
        pl_module.log_dict(self._logged)
        if trainer.global_step > self._optimizer_steps:  # not after a batch that was only accumulated
            self._optimizer_steps = trainer.global_step
            for module in pl_module.modules():
                if isinstance(module, DynamicLabelSmoothing) and any(callback.step_smoothing for callback in ours):
                    module.step()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._end(pl_module)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._end(pl_module)  # Lightning tears no callback down then

    def _end(self, module: L.LightningModule) -> None:
        """The module as it was before. Calling it again does nothing."""
        if self.regularizer is not None:
            self._state = dict(self.regularizer.state_dict())
            self.regularizer.remove()
            self.regularizer = self._attached = None
        for name in _METHODS:
            method = getattr(module, name)
            if getattr(method, _ADDED_BY, [None])[0] is self:
                replaced = getattr(method, _REPLACED)
                if replaced is None:
                    delattr(module, name)
                else:
                    setattr(module, name, replaced)

    def state_dict(self) -> dict[str, Any]:
        if self._attached is not None:
            return {}  # it is in the module's, and `_saving` takes it from there
        return self._state if self.regularizer is None else dict(self.regularizer.state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._state = dict(state_dict)
        if self.regularizer is not None and self._attached is None and self._state:
            self.regularizer.load_state_dict(self._state)

    def _with_losses(self, module: L.LightningModule, ours: list[SFRCallback]) -> _Method:
        training_step = module.training_step

        def step(*args: Any, **kwargs: Any) -> Any:
            output = training_step(*args, **kwargs)
            live = [callback.regularizer for callback in ours if callback.regularizer is not None]
            if output is None or not live:  # a batch that is left out
                return output
            extra = functools.reduce(operator.add, [regularizer.loss() for regularizer in live])
            self._logged = {}
            for n, regularizer in enumerate(live, 1):
                for (shallow, deep), value in regularizer.values().items():
                    name = f"sfr/{shallow}-{deep}"
                    self._logged[f"{name}-{n}" if name in self._logged else name] = value
            self._logged["sfr/loss"] = extra.detach()
            if isinstance(output, Mapping):
                return {**output, "loss": output["loss"] + extra}
            return output + extra

        return step

    def _refuse_a_copy_without_projections(self, trainer: L.Trainer) -> None:
        averaging = getattr(L.pytorch.callbacks, "WeightAveraging", ())  # newer than the oldest that is supported
        callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        for callback in callbacks[: callbacks.index(self)]:
            if isinstance(callback, averaging):
                name = type(callback).__name__
                raise ValueError(
                    f"{_WHERE}: expected to come before {name} in callbacks, since that copies the module when fit "
                    "begins and the copy would lack the projections, got it after"
                )


def _as_lists(pairs: Any) -> Any:
    """The same for tuples and lists."""
    return [_as_lists(each) for each in pairs] if isinstance(pairs, (list, tuple)) else pairs


def _callbacks(trainer: L.Trainer) -> list[SFRCallback]:
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in callbacks if isinstance(callback, SFRCallback)]


def _put(module: L.LightningModule, name: str, method: _Method, ours: list[SFRCallback]) -> None:
    """A method that does more, until the first of the callbacks ends."""
    functools.update_wrapper(method, getattr(module, name))
    setattr(method, _ADDED_BY, ours)
    setattr(method, _REPLACED, vars(module).get(name))
    setattr(module, name, method)


def _undo_left(module: L.LightningModule) -> None:
    """Takes off what callbacks have left on a module after a fit whose end they were not told."""
    for name in _METHODS:
        for callback in getattr(getattr(module, name), _ADDED_BY, ()):
            callback._end(module)


def _saving(module: L.LightningModule, ours: list[SFRCallback]) -> _Method:
    """Moves the state of regularisers that are submodules out of the module's, which can be loaded without them."""
    on_save_checkpoint = module.on_save_checkpoint

    def save(checkpoint: dict[str, Any]) -> None:
        on_save_checkpoint(checkpoint)
        for callback in ours:
            if callback._attached is None:
                continue
            for key in _WEIGHTS:  # averages of projections are of no use: the module's own are the last
                own = _take(checkpoint.get(key, {}), callback._attached)
                if own and "callbacks" in checkpoint:
                    checkpoint["callbacks"][callback.state_key] = own

    return save


def _loading(module: L.LightningModule, ours: list[SFRCallback]) -> _Method:
    """The other way; and what checkpoints of version 0.2.0 have in other places."""
    on_load_checkpoint = module.on_load_checkpoint

    def load(checkpoint: dict[str, Any]) -> None:
        states = checkpoint.get("callbacks") or {}
        for old in {type(callback).__qualname__ for callback in ours} & states.keys():
            state = states.pop(old)
            for callback in ours:
                if type(callback).__qualname__ == old:
                    states.setdefault(callback.state_key, state)
        for weights in (checkpoint[key] for key in _WEIGHTS if key in checkpoint):
            if not hasattr(module, _NAME):
                _take(weights, _NAME)
            for callback in ours:
                if callback._attached is not None:
                    own = _take(weights, callback._attached) or states.get(callback.state_key)
                    if not own:
                        raise ValueError(
                            f"{_WHERE}: expected a checkpoint of a fit with these layers, pairs and "
                            f'channel_mode="project", got one without projections; load_from_checkpoint loads its '
                            "weights alone, for a fit without ckpt_path"
                        )
                    weights.update({f"{callback._attached}.{name}": x for name, x in own.items()})
        on_load_checkpoint(checkpoint)

    return load


def _take(weights: dict[str, Any], name: str) -> dict[str, Any]:
    """Takes what a submodule has out of a state. Not what is spread over processes, which is saved otherwise."""
    keys = [key for key in weights if key.startswith(f"{name}.")]
    if any(type(weights[key]) not in (Tensor, nn.Parameter) for key in keys):
        return {}
    return {key.removeprefix(f"{name}."): weights.pop(key) for key in keys}


def _make_projections(module: L.LightningModule) -> None:
    example = module.example_input_array
    if example is None:
        raise ValueError(f'{_WHERE}: expected the module to have example_input_array for channel_mode="project"')
    modes = {each: each.training for each in module.modules()}
    module.eval()  # running statistics stay
    try:
        with torch.no_grad():
            if isinstance(example, Mapping):
                module(**example)
            else:
                module(*example) if isinstance(example, tuple) else module(example)
    finally:
        for each, training in modes.items():  # parts that are frozen stay in evaluation
            each.training = training
