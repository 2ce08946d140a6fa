"""The ``training_step`` of a module during ``fit`` with `SFRCallback`."""

from __future__ import annotations

import functools
import inspect
import operator
import types
import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..smoothing import DynamicLabelSmoothing
from ..train.engine import L

if TYPE_CHECKING:
    from ..regularizer import SelfFeatureRegularizer
    from .callback import SFRCallback

WHERE = "sfr_ext.lightning.SFRCallback"  # for messages
STEP = "training_step"
_Method = Callable[..., Any]


class TrainingStep:
    """The ``training_step`` of a module, with the losses of callbacks. A copy of the module has the plain one."""

    def __init__(self, module: L.LightningModule) -> None:
        self.module = module
        self.before: _Method | None = vars(module).get(STEP)
        self.plain: _Method = getattr(module, STEP)
        self.callbacks: list[SFRCallback] = []
        self.logged: dict[str, Tensor] = {}
        self.optimizer_steps = 0
        self.called = False  # in this batch
        functools.update_wrapper(self, self.plain, updated=())
        # Lightning reads the arguments of what one wrapper wraps: of the module's own one, where it has one.
        self.__wrapped__ = getattr(self.plain, "__wrapped__", self.plain)
        setattr(module, STEP, self)

    @property
    def __code__(self) -> types.CodeType:
        """Lightning asks a wrapper of this one whether it is LightningModule's own."""
        return inspect.unwrap(self.plain).__code__

    @staticmethod
    def of(module: L.LightningModule) -> TrainingStep:
        """The one that is there, or a new one."""
        present = vars(module).get(STEP)
        return present if isinstance(present, TrainingStep) else TrainingStep(module)

    def join(self, callback: SFRCallback) -> None:
        self.callbacks.append(callback)

    def leave(self, callback: SFRCallback) -> None:
        self.callbacks.remove(callback)
        if self.callbacks or vars(self.module).get(STEP) is not self:
            return
        if self.before is None:
            delattr(self.module, STEP)
        else:
            setattr(self.module, STEP, self.before)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = self.plain(*args, **kwargs)
        self.logged = {}
        trainer = self._caller()
        if not trainer.training:  # a validation by the step of training
            return output
        self.called = True
        if _skips_backward(trainer):
            return output
        # Not of a Trainer around this one, or before it.
        regularizers = [each for c in self.callbacks if (each := c.regularizer) is not None and c._trainer() is trainer]
        loss = output.get("loss") if isinstance(output, Mapping) else output
        # A batch that is left out, or what Lightning says more about.
        if not (isinstance(loss, Tensor) and loss.requires_grad and regularizers):
            return output
        extra = self._sum(regularizers)
        return {**output, "loss": loss + extra} if isinstance(output, Mapping) else loss + extra

    def _caller(self) -> L.Trainer:
        """The module's Trainer; where that is one within the fit that has ended and left itself there, the fit's."""
        trainer = self.module.trainer
        fitting = self.callbacks[0]._trainer() if self.callbacks else None
        return trainer if fitting is None or trainer.state.status == "running" else fitting

    def _sum(self, regularizers: list[SelfFeatureRegularizer]) -> Tensor:
        """Of their losses; what there is to log of them is kept until the batch ends."""
        total = functools.reduce(operator.add, [each.loss() for each in regularizers])
        for n, each in enumerate(regularizers, 1):
            for (shallow, deep), value in each.values().items():
                name = f"sfr/{shallow}-{deep}"
                self.logged[f"{name}-{n}" if name in self.logged else name] = value
        self.logged["sfr/loss"] = total.detach()
        return total

    def after_batch(self, trainer: L.Trainer) -> None:
        if not self.called:
            warnings.warn(
                f"{WHERE}: the module's training_step was replaced after fit had begun, and no loss of SFR is added; "
                "replace it before",
                stacklevel=2,
            )
        self.called = False
        if self.module.trainer is not trainer:  # see _caller; nothing can be logged to one that has ended
            self.module.trainer = trainer
        self.module.log_dict(self.logged, batch_size=1)
        if trainer.global_step == self.optimizer_steps or _skips_backward(trainer):
            return  # the batch was only accumulated, or nothing was trained by it
        self.optimizer_steps = trainer.global_step
        if any(callback.step_smoothing for callback in self.callbacks):
            for module in self.module.modules():
                if isinstance(module, DynamicLabelSmoothing):
                    module.step()

    def __reduce__(self) -> tuple[_Method, tuple[Any, ...]]:
        return (_plain_step, (self.module, self.before))


def _plain_step(module: L.LightningModule, before: _Method | None) -> _Method:
    return types.MethodType(type(module).training_step, module) if before is None else before


def _skips_backward(trainer: L.Trainer) -> bool:
    """Whether it runs an epoch for the statistics of BatchNorm alone, as StochasticWeightAveraging has it."""
    return bool(getattr(trainer.fit_loop, "_skip_backward", False))
