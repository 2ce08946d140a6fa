"""The options that every feature loss has, and how they are checked."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .. import checks
from ..emd import emd_l2

CHANNEL_MODES = ("match", "mean", "crop", "project")

# Options of `emd_l2` that the losses between maps do not have, and why.
_NOT_FOR_MAPS = {
    "student_weight": "one weight cannot fit maps of several sizes; weighting has those that follow from the maps",
    "teacher_weight": "one weight cannot fit maps of several sizes; weighting has those that follow from the maps",
    "reduction": "the loss is a mean by definition",
    "teacher_self": "the deep maps are others in every step, and none of their terms can be reused",
}

Distance = str | Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Options:
    """See `sfr_ext.SelfFeatureRegularizer`. ``name`` is the function or class that was called, for messages."""

    name: str
    channel_mode: str = "match"
    max_grid: int | None = 7
    normalize: bool = True
    weighting: str = "uniform"
    detach_teacher: bool = True
    distance: Distance = "emd"
    emd_options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def at_loss(self) -> str:
        """Where features are looked at, for messages."""
        return f"sfr_ext.{self.name}" + ("" if self.name == "self_feature_loss" else ".loss")

    def __post_init__(self) -> None:
        where = f"sfr_ext.{self.name}"
        if self.channel_mode not in CHANNEL_MODES:
            modes = ", ".join(f'"{mode}"' for mode in CHANNEL_MODES[:-1]) + f' or "{CHANNEL_MODES[-1]}"'
            raise ValueError(f"{where}: expected channel_mode {modes}, got {self.channel_mode!r}")
        if self.max_grid is not None:
            object.__setattr__(self, "max_grid", checks.whole(self.name, "max_grid", self.max_grid, 1))
        for name in ("normalize", "detach_teacher"):
            object.__setattr__(self, name, checks.a_bool(self.name, name, getattr(self, name)))
        if self.weighting not in ("uniform", "cross-reference"):
            raise ValueError(f'{where}: expected weighting "uniform" or "cross-reference", got {self.weighting!r}')
        if not callable(self.distance) and self.distance not in ("emd", "l2"):
            raise ValueError(f'{where}: expected distance "emd", "l2" or a function, got {self.distance!r}')
        self._check_emd_options(where)

    def _check_emd_options(self, where: str) -> None:
        parameters = inspect.signature(emd_l2).parameters.values()
        known = {p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}
        usable = known - set(_NOT_FOR_MAPS)
        for name in self.emd_options:
            if name in _NOT_FOR_MAPS:
                raise TypeError(f"{where}: expected options that fit feature maps, got {name!r}: {_NOT_FOR_MAPS[name]}")
            if name not in usable:
                raise TypeError(f"{where}: expected options among {', '.join(sorted(usable))}, got {name!r}")
        object.__setattr__(self, "emd_options", checks.emd_options(self.name, dict(self.emd_options)))
        if self.distance != "emd":
            if self.emd_options:
                raise TypeError(f'{where}: expected {next(iter(self.emd_options))!r} with distance="emd" only')
            if self.weighting != "uniform":
                raise ValueError(f'{where}: expected weighting {self.weighting!r} with distance="emd" only')
        elif self.weighting == "cross-reference" and self.emd_options.get("patch_size", 1) != 1:
            size = self.emd_options["patch_size"]
            raise ValueError(f"{where}: expected patch_size 1 for cross-reference weights, got {size!r}")
