"""What `SelfFeatureRegularizer` and `FeatureDistiller` have in common: hooks, a step counter, the mean over pairs."""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from .. import checks, counters
from . import processes
from .comparison import Comparison, distance
from .hooks import Hook, Hooks
from .options import Options
from .pairs import Pair
from .projections import Projections, channels

Self = TypeVar("Self", bound="HookedLoss")
_PATIENCE = 100  # calls of loss() until projections that nothing changes are noticed: more than one step accumulates
Features = Mapping[str, Tensor]


class HookedLoss(nn.Module):
    """``weight * ramp * mean over pairs`` of what hooks caught in the last forward.

    A subclass hands its hooks to `_watch` and says in `_read` what they have caught.
    """

    if TYPE_CHECKING:  # torch.jit.script, of a module that this one is part of, reads annotations and not strings
        steps: Tensor
    __jit_ignored_attributes__ = ("_values",)
    __jit_unused_properties__ = ("current_weight", "detach_teacher")

    def __init__(self, options: Options, pairs: tuple[Pair, ...], weight: float, warmup_steps: int) -> None:
        super().__init__()
        self._hooks: list[Hooks] = []  # first, for __del__ after an error below
        weight, warmup_steps = _check_values(options.name, weight, warmup_steps)
        self.options = options
        self.pairs = pairs
        self.weight = float(weight)
        self.warmup_steps = warmup_steps
        self._values: dict[Pair, Tensor] = {}
        self._trained = 0  # calls of loss() by which the projections may have learned
        self._changes = 0  # that they had seen at the first of them
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.projections = Projections(len(pairs)) if options.channel_mode == "project" else None

    def _watch(self, *hooks: Hooks) -> None:
        """The last step of construction."""
        self._hooks += hooks
        self._own()
        if self.projections is not None:
            for each in hooks:
                each.at_end(_MakesProjections(self))

    def _attach(self, name: str) -> None:
        """Makes this object a submodule of the model (the student), until `remove`."""
        self._hooks[0].attach(self, name)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._own()
        for hooks in self._hooks:  # of a model that was copied along with this object
            for hook in hooks.put_on():
                if isinstance(hook, _MakesProjections):
                    hook.owner = weakref.ref(self)

    def _own(self) -> None:
        """Hooks end with their owner, and not with a shallow copy of it."""
        for hooks in self._hooks:
            if hooks.owner() is None:
                hooks.owner = weakref.ref(self)

    def forward(self, x: Any) -> Any:
        """What it is given: attached to an ``nn.Sequential``, it is called among the layers."""
        return x

    def loss(self) -> Tensor:
        """The loss of the last forward, a scalar; the features are dropped afterwards."""
        if counters.recomputing():
            raise RuntimeError(
                f"sfr_ext.{self.options.name}.loss: called in backward, by a torch.utils.checkpoint that computes its "
                "part again; checkpoint the model or its layers, and call loss() outside"
            )
        overtaken = self._hooks[0].overtaken if self._hooks else False  # of the students
        students, teachers, training = self._read(*(hooks.take() for hooks in self._hooks))
        self._check_gradient(students, training, overtaken)
        if self.projections is not None and not self.projections.made:
            raise RuntimeError(
                f"sfr_ext.{self.options.name}.loss: the projections have not been made; call the model once (not "
                "compiled, not wrapped) before the optimiser is built, whose parameters they are to be"
            )
        # The distance takes each dtype as it is; autocast would only add casts.
        with torch.autocast(next(iter(students.values())).device.type, enabled=False):
            value = self._compare(students, teachers)
        if training:
            counters.advance(self.steps)
            self._watch_projections()
        if self.warmup_steps == 0:
            return value * self.weight
        return value * (self.weight * self._ramp())

    def values(self) -> dict[Pair, Tensor]:
        """The distance of each pair in the last `loss`, detached and without weight and ramp: for logging.

        Empty before the first one, and after one under ``torch.func.vmap``.
        """
        return dict(self._values)

    @property
    def detach_teacher(self) -> bool:
        return self.options.detach_teacher

    @property
    def current_weight(self) -> float:
        """``weight * ramp`` of the last step. On a GPU, reading it may wait for the device."""
        return self.weight * float(self._ramp()) if self.warmup_steps else self.weight

    def remove(self) -> None:
        """Take the hooks off and drop the features. Calling it again does nothing."""
        for hooks in self._hooks:
            hooks.remove()

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def __del__(self) -> None:
        for hooks in self.__dict__.get("_hooks", []):
            if hooks.owner() in (None, self):
                hooks.remove()

    # What follows is the computation itself; each step may be replaced by a subclass.

    def _read(self, *caught: tuple[dict[str, Any], bool]) -> tuple[Features, Features | None, bool]:
        """Students and teachers (None: the same) by name, and whether the students' forward was a training step's."""
        raise NotImplementedError

    def _compare(self, students: Features, teachers: Features | None) -> Tensor:
        """The mean over the pairs."""
        comparison = Comparison(self.options, students, teachers)
        if self.projections is not None:
            self._check_channels(students, students if teachers is None else teachers)
        losses = []
        for i, (shallow, deep) in enumerate(self.pairs):
            project = None if self.projections is None else self.projections.of_pair(i)
            losses.append(self._distance(*comparison.sides(shallow, deep, project)))
        self._values = _seen(self.pairs, losses)
        return torch.stack(losses).mean()

    def _distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        return distance(self.options, student, teacher)

    def _watch_projections(self) -> None:
        """Warns where an optimiser was built before they were made: their gradients pile up, and they stay random."""
        if self.projections is None or torch.compiler.is_compiling() or counters.transformed():
            return
        weights = list(self.projections.parameters())
        changes = sum(weight._version for weight in weights)
        self._trained += 1
        if self._trained == 1:
            self._changes = changes
            self._watch_processes()
        unchanged = self._trained == _PATIENCE and changes == self._changes
        if unchanged and all(weight.grad is not None for weight in weights):
            warnings.warn(
                f"sfr_ext.{self.options.name}: the projections have gradients, but in {_PATIENCE} calls of loss() no "
                "optimizer has changed them. The first call of the model makes them: build the optimizer after it, "
                "with the .parameters() of this object as well as the model's",
                stacklevel=3,
            )

    def _watch_processes(self) -> None:
        """Warns where each process would learn projections of its own, from other random numbers."""
        model = self._hooks[0].model if self._hooks else None
        if model is None or self.projections is None or not processes.several():
            return
        if processes.left_out(self.projections, model):
            warnings.warn(
                f"sfr_ext.{self.options.name}: the model is trained by several processes, and each has projections of "
                "its own, which nothing keeps alike. Give attach=True, and call the model before it is wrapped",
                stacklevel=4,
            )

    def _check_channels(self, students: Features, teachers: Features) -> None:
        """The projections are made once; layers may be replaced later."""
        assert self.projections is not None
        for i, (shallow, deep) in enumerate(self.pairs):
            came = channels(students[shallow]), channels(teachers[deep])
            if came != (wanted := self.projections.channels_of_pair(i)):
                raise ValueError(
                    f"{self.options.at_loss}: expected {shallow!r} with the {wanted[0]} channels and {deep!r} with the "
                    f"{wanted[1]} that their projection was made for, got {came[0]} and {came[1]}; layers that are "
                    "replaced (as by a LightningModule's setup or configure_model) are to keep their channels"
                )

    def _ramp(self) -> Tensor:
        return (counters.read(self.steps) / self.warmup_steps).clamp(max=1.0)

    def _check_gradient(self, students: Features, training: bool, overtaken: bool) -> None:
        # What torch.func.vmap shows does not say whether it requires a gradient.
        if not torch.is_grad_enabled() or counters.transformed():
            return
        if not training:
            if overtaken:
                raise RuntimeError(
                    f"sfr_ext.{self.options.name}.loss: expected the last forward to be that in training mode, but one "
                    "in evaluation mode has followed it, whose maps are not those to train by; call loss() before it. "
                    "For the value alone, call loss() under torch.no_grad"
                )
            return
        taught = list(dict.fromkeys(shallow for shallow, _ in self.pairs))
        without = [name for name in taught if not students[name].requires_grad]
        # As they ran: what comes before the first gradient is frozen, what comes after it is cut off.
        begun = False
        cut = []
        for name, feature in students.items():
            begun = begun or feature.requires_grad
            if begun and name in without:
                cut.append(name)
        if cut or len(without) == len(taught):
            came = (
                f"the map of {cut[0]!r} requires none, and one before it does"
                if cut
                else f"none of the maps of {', '.join(map(repr, taught))} requires one"
            )
            raise RuntimeError(
                f"sfr_ext.{self.options.name}.loss: expected a gradient to flow, since gradients are on and the "
                f"forward was in training mode, but {came}. "
                "Usual causes: a later forward of the model under torch.no_grad; torch.utils.checkpoint with "
                "use_reentrant=True, whose forward records nothing; parameters that are frozen up to there. For the "
                "value alone, call loss() under torch.no_grad"
            )


class _MakesProjections(Hook):
    """At the end of a forward, makes the projections of its owner, whose shapes are known now.

    A copy has no owner, and does nothing, but where that was copied as well.
    """

    def __init__(self, owner: HookedLoss | None = None) -> None:
        self.owner = (lambda: None) if owner is None else weakref.ref(owner)

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_compiling() or counters.transformed() or (owner := self.owner()) is None:
            return
        assert owner.projections is not None
        if owner.projections.made or not all(hooks.complete for hooks in owner._hooks):
            return
        students, teachers, _ = owner._read(*(hooks.look() for hooks in owner._hooks))
        deep = students if teachers is None else teachers
        owner.projections.make([(students[name], deep[other]) for name, other in owner.pairs])

    def __reduce__(self) -> tuple[type[_MakesProjections], tuple[()]]:
        return (_MakesProjections, ())


def _seen(pairs: tuple[Pair, ...], losses: list[Tensor]) -> dict[Pair, Tensor]:
    plain = [counters.plain(loss) for loss in losses]
    with counters.writable():  # so that torch.func wraps nothing that outlives it
        return {pair: loss.detach() for pair, loss in zip(pairs, plain, strict=True) if loss is not None}


def _check_values(name: str, weight: float, warmup_steps: int) -> tuple[float, int]:
    where = f"sfr_ext.{name}"
    weight, warmup_steps = checks.a_number(name, "weight", weight), checks.an_int(name, "warmup_steps", warmup_steps)
    if not 0.0 <= weight < math.inf:
        raise ValueError(f"{where}: expected a finite weight >= 0, got {weight}")
    if warmup_steps < 0:
        raise ValueError(f"{where}: expected warmup_steps >= 0, got {warmup_steps}")
    if warmup_steps > counters.MOST:
        raise ValueError(f"{where}: expected warmup_steps < 2**63, got {warmup_steps}")
    return weight, warmup_steps
