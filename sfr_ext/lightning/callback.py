"""The callback: what joins a fit, and when; what is saved and loaded."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from .. import checks
from ..layouts import Transform
from ..regularizer import SelfFeatureRegularizer
from ..sfr.hooks import named_parts, plain_name
from ..sfr.unsaved import Unsaved
from ..train.engine import L
from .projections import NAME, Lent, check_trainer, make_projections
from .step import STEP, WHERE, TrainingStep

_OF_LIGHTNING = ("log", "log_dict")  # methods of the module, which Lightning makes attributes of each callback


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
        options: of `SelfFeatureRegularizer`; ``attach`` changes nothing. With ``channel_mode="project"`` the parameters
            are those of a submodule for the time of ``fit``, ``self_feature_regularizer``. They are made before
            ``configure_optimizers``, by a forward of the module's ``example_input_array``. The state of the optimiser
            is of these parameters, too: without the callback, training goes on from the weights alone
            (``load_from_checkpoint``).

    A further ``fit`` of the same module goes on with the counter and the projections, one of another module begins
    anew, and one with ``ckpt_path`` goes on with what the checkpoint has. One that fails before it begins changes
    nothing. A copy of the module that is made during ``fit`` is one without the callback, and a copy of the callback
    has nothing of the module.

    Attributes:
        regularizer: the `SelfFeatureRegularizer`, during ``fit``; else None.

    Raises:
        TypeError, ValueError, RuntimeError: as `SelfFeatureRegularizer`, when ``fit`` begins.
        ValueError: the module optimises manually (add ``regularizer.loss()`` yourself); "project" without
            ``example_input_array``, for layers that ``setup`` or ``configure_model`` makes, or makes anew with other
            channels, after a callback that averages weights, with a strategy that shards parameters, or from a
            checkpoint without projections.
        RuntimeError: no optimiser has the parameters of "project", the forward of the example does not pass through
            all layers, or another Trainer is fitting the module.

    >>> from sfr_ext.lightning import SFRCallback
    >>> callback = SFRCallback(["model.layer1", "model.layer2"], weight=0.5)
    """

    def __init__(
        self, layers: Sequence[str] | Mapping[str, Transform | None], *, step_smoothing: bool = True, **options: Any
    ) -> None:
        self.layers = layers
        self.step_smoothing = step_smoothing
        self._attaches = checks.a_bool("SelfFeatureRegularizer", "attach", options.pop("attach", False))
        self.options = options
        self.regularizer: SelfFeatureRegularizer | None = None
        self._projects = options.get("channel_mode") == "project"
        self._state: dict[str, Any] = {}  # that of the regulariser while there is none: the last one
        self._for_any = True  # whether that is for any module; else for those that it was learned with
        self._states: weakref.WeakKeyDictionary[nn.Module, dict[str, Any]] = weakref.WeakKeyDictionary()  # these
        self._module: Callable[[], nn.Module | None] = _nobody  # of the fit
        self._trainer: Callable[[], L.Trainer | None] = _nobody
        self._hooked: list[nn.Module | None] = []  # the layers, as they were then
        self._lent: Lent | None = None
        self._step: TrainingStep | None = None

    @property
    def state_key(self) -> str:
        layers = (
            [plain_name(str(name)) for name in self.layers]
            if isinstance(self.layers, (Mapping, Sequence))
            else self.layers
        )
        distance, pairs = self.options.get("distance", "emd"), self.options.get("pairs", "all")
        return self._generate_state_key(
            layers=layers,
            pairs=_as_lists(pairs),
            channel_mode=self.options.get("channel_mode", "match"),
            distance=getattr(distance, "__qualname__", type(distance).__name__) if callable(distance) else distance,
        )

    @property
    def _legacy_state_key(self) -> Any:
        return type(self).__qualname__  # in version 0.2.0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit":
            if self._is_free(trainer):
                self._module = weakref.ref(pl_module)
                if self._lent is None and (self._projects or self._attaches):
                    self._lent = Lent(pl_module, Unsaved())  # takes what a checkpoint of version 0.2.0 has
            return
        if not pl_module.automatic_optimization:
            raise ValueError(f"{WHERE}: expected automatic optimisation; a manual one adds regularizer.loss() itself")
        if self._is_anothers(trainer):
            raise RuntimeError(f"{WHERE}: expected a callback of its own for a Trainer within the fit of another")
        _undo_left(trainer, pl_module)
        self._end()
        self._module, self._trainer = weakref.ref(pl_module), weakref.ref(trainer)
        if self._projects:  # as parameters that configure_optimizers finds
            check_trainer(trainer, self)
        late = _makes_layers(pl_module) if self._missing(pl_module) else None
        if late and self._projects:
            raise ValueError(
                f"{WHERE}: expected the layers {self._missing(pl_module)} to be there before {late}, since the "
                'parameters of channel_mode="project" come first'
            )
        if not late:
            self._begin(trainer, pl_module)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.regularizer is None:
            self._begin(trainer, pl_module)
        elif _layers(pl_module, self.regularizer) != self._hooked:
            self._hook_again(pl_module)  # the module's setup or configure_model, or the strategy, has made others
        assert self.regularizer is not None
        self.regularizer.to(pl_module.device)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert self.regularizer is not None and self._step is not None
        self._step.optimizer_steps = trainer.global_step
        known = {id(p) for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]}
        projections = self.regularizer.projections
        if projections is not None and (
            not projections.made or any(id(p) not in known for p in projections.parameters())
        ):
            raise RuntimeError(
                f"{WHERE}: expected configure_optimizers to take the parameters of the projections as well, as "
                "self.parameters() has them"
            )

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._step is not None and self._step.callbacks[0] is self:  # the first acts for all
            self._step.after_batch(trainer)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if self._trainer() is trainer or self._is_free(trainer):
            self._end()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "")  # Lightning tears no callback down then

    def state_dict(self) -> dict[str, Any]:
        regularizer = self.regularizer if self._step is not None else None  # not one that fails as it begins
        return self._state if regularizer is None else dict(regularizer.state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._keep(dict(state_dict), self._module())
        self._load(self._state)

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if self.regularizer is not None and self._trainer() is not trainer:  # of a Trainer within the fit
            checkpoint["callbacks"].pop(self.state_key, None)
            return
        prefix = f"{NAME}."
        weights = checkpoint.get("state_dict", {})  # a sharded checkpoint has them elsewhere
        older = {k.removeprefix(prefix): x for k, x in weights.items() if k.startswith(prefix)}
        if older and isinstance(getattr(pl_module, NAME, None), Unsaved):  # version 0.2.0 had it in the module's
            self.load_state_dict(older)
        elif self._projects and self.regularizer is not None and self.state_key not in checkpoint["callbacks"]:
            raise ValueError(
                f'{WHERE}: expected a checkpoint of a fit with these layers, pairs and channel_mode="project", got '
                "one without projections; load_from_checkpoint loads its weights alone, for a fit without ckpt_path"
            )

    def __getstate__(self) -> dict[str, Any]:
        """Of a copy: what a checkpoint has."""
        live: dict[str, Any] = dict.fromkeys(("regularizer", "_lent", "_step")) | {"_hooked": []}
        live |= dict.fromkeys(("_module", "_trainer"), _nobody)
        state = {**self.__dict__, **live, "_state": self.state_dict(), "_for_any": True}
        return {name: value for name, value in state.items() if name not in (*_OF_LIGHTNING, "_states")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _states=weakref.WeakKeyDictionary())

    def _is_anothers(self, trainer: L.Trainer) -> bool:
        """Whether a fit is going on, and this Trainer is one within it that has the same callback."""
        other = self._trainer()
        return other is not None and other is not trainer and other.state.status == "running"

    def _is_free(self, trainer: L.Trainer) -> bool:
        return self.regularizer is None and not self._is_anothers(trainer)

    def _keep(self, state: dict[str, Any], module: nn.Module | None) -> None:
        """For further fits of the module; without one, for the next fit of any."""
        self._state, self._for_any = state, module is None
        if module is not None:
            self._states[module] = state

    def _missing(self, module: L.LightningModule) -> list[str]:
        """Names of layers that the module does not have, or not yet."""
        named = named_parts(module)
        names = self.layers if isinstance(self.layers, (Mapping, Sequence)) else ()
        return [name for name in names if name not in named]

    def _begin(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._hook(module)
        assert self.regularizer is not None
        if self.regularizer.projections is not None:
            make_projections(trainer, module, self.regularizer)
            self._lent = Lent(module, Unsaved(self.regularizer.projections))
        try:
            self._load(self._states.get(module, self._state if self._for_any else {}))
        except RuntimeError as error:
            raise ValueError(
                f"{WHERE}: expected layers of the channels that this callback's projections were learned with; a new "
                "callback begins anew"
            ) from error
        self._step = TrainingStep.of(module)
        self._step.join(self)

    def _hook(self, module: L.LightningModule) -> None:
        self.regularizer = SelfFeatureRegularizer(module, self.layers, **self.options)
        self._hooked = _layers(module, self.regularizer)

    def _hook_again(self, module: L.LightningModule) -> None:
        """On the layers that there are now; the counter and the projections go on."""
        before = self.regularizer
        assert before is not None
        before.remove()
        self._hook(module)
        assert self.regularizer is not None
        self.regularizer.projections = before.projections
        self.regularizer.load_state_dict(before.state_dict())

    def _load(self, state: dict[str, Any]) -> None:
        if self.regularizer is not None and state:
            self.regularizer.load_state_dict(state)

    def _end(self) -> None:
        """The module as it was before. Calling it again does nothing."""
        if self._step is not None:  # the last thing that a fit begins with
            self._keep(self.state_dict(), self._module())
            self._step.leave(self)
        if self.regularizer is not None:
            self.regularizer.remove()
        if self._lent is not None:
            self._lent.take_back()
        self.regularizer = self._lent = self._step = None
        self._hooked = []
        self._module = self._trainer = _nobody


def _undo_left(trainer: L.Trainer, module: L.LightningModule) -> None:
    """Takes off what callbacks have left on a module after a fit whose end they were not told, or on the copied one."""
    step = vars(module).get(STEP)
    for callback in list(step.callbacks) if isinstance(step, TrainingStep) else []:
        other = callback._trainer()
        if other is trainer:
            continue
        if other is not None and other.state.status == "running":
            raise RuntimeError(f"{WHERE}: expected a module that no other Trainer is fitting; fit a deepcopy of it")
        callback._end()
    for name, part in list(module.named_children()):
        if isinstance(part, Unsaved) and part.ended:
            delattr(module, name)


def _layers(module: L.LightningModule, regularizer: SelfFeatureRegularizer) -> list[nn.Module | None]:
    """Those that there are now."""
    named = named_parts(module)
    return [named.get(name) for name in regularizer.layers]


def _makes_layers(module: L.LightningModule) -> str | None:
    """Which of the methods that may make layers after the callbacks' ``setup`` the module has."""
    for name in ("setup", "configure_model"):
        if getattr(type(module), name) is not getattr(L.LightningModule, name):
            return name
    return None


def _nobody() -> None:
    """What a weak reference returns whose object is gone."""


def _as_lists(pairs: Any) -> Any:
    """The same for tuples and lists."""
    return [_as_lists(each) for each in pairs] if isinstance(pairs, (list, tuple)) else pairs
