"""Projections that are trained with a module, and are not part of what it saves."""

from __future__ import annotations

import copy
import weakref
from typing import Any

from torch import nn

from .projections import Projections


class Unsaved(nn.Module):
    """A submodule that lends its projections to a module for a while: to ``parameters()``, and not to ``state_dict()``.

    What is loaded may have them or not. Copies of the module (for an average of weights) have copies of them until
    `end`; pickles have none.
    """

    def __init__(self, projections: Projections | None = None) -> None:
        super().__init__()
        self.projections = projections
        self._copies: weakref.WeakSet[Unsaved] = weakref.WeakSet()

    def end(self) -> None:
        """Empties this one and its copies, wherever these are."""
        for each in [self, *self._copies]:
            each.projections = None

    @property
    def ended(self) -> bool:
        return self.projections is None

    def state_dict(self, *args: Any, destination: Any = None, **kwargs: Any) -> Any:
        return {} if destination is None else destination

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name, value in self.named_parameters():  # what is not there stays as it is
            state_dict.setdefault(prefix + name, value)

    def __deepcopy__(self, memo: dict[int, Any]) -> Unsaved:
        copied = Unsaved(copy.deepcopy(self.projections, memo))
        self._copies.add(copied)
        copied._copies = self._copies
        return copied

    def __reduce__(self) -> tuple[type[Unsaved], tuple[()]]:
        return (Unsaved, ())
