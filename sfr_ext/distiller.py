"""Feature distillation: the maps of one network teach those of another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from . import checks
from .layouts import Transform
from .sfr.features import features_of
from .sfr.hooked import Features, HookedLoss
from .sfr.hooks import Hooks
from .sfr.options import Distance, Options
from .sfr.pairs import check_transforms

_NAME = "FeatureDistiller"


class FeatureDistiller(HookedLoss):
    """Earth mover's distance between feature maps of a student and of a teacher network, as a loss.

    .. code-block:: text

        loss = weight * ramp * mean over pairs (s, t), images and groups g of
                   emd_l2( unit(pool(s)), unit(stop_gradient(pool(t))[g]) )

    as `SelfFeatureRegularizer` has it, with the teacher's layers in place of the deep ones. Call both networks on the
    same images, in whichever order, then :meth:`loss`.

    Args:
        student: the network that is trained.
        teacher: the network that teaches. Freeze it yourself: ``teacher.eval().requires_grad_(False)``, and call it
            under ``torch.no_grad()``. It is neither a submodule nor in ``state_dict``.
        pairs: ``{student layer: teacher layer}``, names as in ``named_modules()``.
        student_transforms: ``{student layer: transform}`` for layers that do not return one tensor ``[B, C, H, W]``:
            `sfr_ext.layouts`.
        teacher_transforms: the same for the teacher's.
        attach: make this object a submodule of the student, under the name ``feature_distiller``.
        weight, warmup_steps, channel_mode, max_grid, normalize, weighting, detach_teacher, distance, emd_options: as
            `SelfFeatureRegularizer` has them. ``channel_mode="project"`` learns a 1 x 1 convolution from the student's
            to the teacher's channels; "match" needs a teacher with a multiple of the student's channels.

    A step counts towards ``warmup_steps`` if the student's forward was made in training mode. Hooks, copies, the
    parameters of "project" and ``torch.compile``: as `SelfFeatureRegularizer`. One call of each network makes the
    parameters: an optimiser that is built before it does not have them, and never trains them. A warning says so after
    100 calls of :meth:`loss`.

    Raises:
        TypeError, ValueError, RuntimeError: as `SelfFeatureRegularizer`.

    >>> import torch
    >>> from torch import nn
    >>> from sfr_ext import FeatureDistiller
    >>> student = nn.Sequential(nn.Conv2d(1, 4, 3, 2), nn.Flatten(), nn.LazyLinear(10))
    >>> teacher = nn.Sequential(nn.Conv2d(1, 6, 3), nn.Conv2d(6, 6, 3)).eval().requires_grad_(False)
    >>> distiller = FeatureDistiller(student, teacher, {"0": "1"}, channel_mode="project")
    >>> images = torch.rand(2, 1, 12, 12)
    >>> _ = student(images), teacher(images)    # makes the parameters of "project"
    >>> optimizer = torch.optim.SGD([*student.parameters(), *distiller.parameters()], lr=0.1)
    >>> with torch.no_grad():
    ...     _ = teacher(images)
    >>> loss = nn.functional.cross_entropy(student(images), torch.tensor([1, 2])) + distiller.loss()
    >>> loss.backward()
    >>> list(distiller.state_dict())
    ['steps', 'projections.pair0']
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        pairs: Mapping[str, str],
        *,
        student_transforms: Mapping[str, Transform | None] | None = None,
        teacher_transforms: Mapping[str, Transform | None] | None = None,
        weight: float = 1.0,
        warmup_steps: int = 0,
        channel_mode: str = "match",
        max_grid: int | None = 7,
        normalize: bool = True,
        weighting: str = "uniform",
        detach_teacher: bool = True,
        distance: Distance = "emd",
        attach: bool = False,
        **emd_options: Any,
    ) -> None:
        where = f"sfr_ext.{_NAME}"
        attach = checks.a_bool(_NAME, "attach", attach)
        _check_pairs(pairs)
        self_transforms = _transforms("student_transforms", student_transforms, list(pairs))
        their_transforms = _transforms("teacher_transforms", teacher_transforms, list(pairs.values()))
        options = Options(_NAME, channel_mode, max_grid, normalize, weighting, detach_teacher, distance, emd_options)
        super().__init__(options, tuple(pairs.items()), weight, warmup_steps)
        self._student_transforms, self._teacher_transforms = self_transforms, their_transforms
        ours = Hooks(where, student, pairs, "student", "pairs")
        try:
            theirs = Hooks(where, teacher, dict.fromkeys(pairs.values()), "teacher", "pairs")
        except (TypeError, ValueError):
            ours.remove()
            raise
        self._watch(ours, theirs)
        if attach:
            self._attach("feature_distiller")

    def extra_repr(self) -> str:
        return f"pairs={dict(self.pairs)}, weight={self.weight}"

    def _read(self, *caught: tuple[dict[str, Any], bool]) -> tuple[Features, Features | None, bool]:
        (ours, training), (theirs, _) = caught
        where = f"sfr_ext.{_NAME}.loss"
        students = features_of(f"{where} (student)", ours, self._student_transforms)
        return students, features_of(f"{where} (teacher)", theirs, self._teacher_transforms), training


def _check_pairs(pairs: Mapping[str, str]) -> None:
    if not isinstance(pairs, Mapping):
        checks.refuse(TypeError, _NAME, "pairs", "to be a dict {student layer: teacher layer}", type(pairs).__name__)
    if not pairs:
        checks.refuse(ValueError, _NAME, "pairs", "to hold at least one pair", "an empty dict")
    for name in (*pairs, *pairs.values()):
        if not isinstance(name, str):
            checks.refuse(TypeError, _NAME, "pairs", "to hold names (str)", type(name).__name__)


def _transforms(
    argument: str, transforms: Mapping[str, Transform | None] | None, layers: list[str]
) -> dict[str, Transform | None]:
    if transforms is None:
        return {}
    if not isinstance(transforms, Mapping):
        checks.refuse(TypeError, _NAME, argument, "to be a dict", type(transforms).__name__)
    for name in transforms:
        if name not in layers:
            checks.refuse(ValueError, _NAME, argument, f"for layers of pairs {layers}", repr(name))
    check_transforms(f"sfr_ext.{_NAME}", argument, transforms)
    return dict(transforms)
