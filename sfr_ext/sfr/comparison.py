"""The distance between a shallow and a deep feature: on one grid, with the same channels, as directions."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ..emd import emd_l2
from ..weights import cross_reference_weights
from . import maps
from .options import Options

Grid = tuple[int, int]
Project = Callable[[Tensor], Tensor]
What = Callable[[], str]  # came, for messages


class Comparison:
    """Compares the features of one forward, pair by pair; what several pairs need is computed once.

    Args:
        options: of the loss.
        students: features by name, maps ``[B, C, H, W]`` or tokens ``[B, N, C]``.
        teachers: the same of another network; None: the students teach each other.
    """

    def __init__(
        self, options: Options, students: Mapping[str, Tensor], teachers: Mapping[str, Tensor] | None = None
    ) -> None:
        self.options = options
        self.where = options.at_loss
        self.features = {"student": students, "teacher": students if teachers is None else teachers}
        self.shared = teachers is None
        self._done: dict[tuple[object, ...], Tensor] = {}

    def sides(self, shallow: str, deep: str, project: Project | None = None) -> tuple[Tensor, Tensor]:
        """Student ``[B, C, h, w]`` and teacher ``[B, G, C, h, w]``: pooled, grouped, normalised, of one type.

        Tokens without a grid are maps with ``h = N`` and ``w = 1``.
        """
        student, teacher = self.features["student"][shallow], self.features["teacher"][deep]

        def what() -> str:
            return self._what(shallow, deep)

        if student.shape[0] != teacher.shape[0]:
            raise ValueError(f"{self.where}: expected one batch size for both layers of a pair, got {what()}")
        ours, theirs = self._grids(student, teacher, what)
        student = self._student(shallow, ours, project)
        teacher = self._teacher(deep, theirs, student.shape[1], what)
        if student.dtype != teacher.dtype:
            common = torch.promote_types(student.dtype, teacher.dtype)
            student, teacher = student.to(common), teacher.to(common)
        return student, teacher

    def _grids(self, student: Tensor, teacher: Tensor, what: What) -> tuple[Grid, Grid]:
        cap = self.options.max_grid
        for side in (student, teacher):
            if side.dim() == 3:
                self._check_tokens(side, what)
        # Spelled out, since torch.compile of torch 2.4 does not know map(min, ...).
        sizes = [(side.shape[2], side.shape[3]) if side.dim() == 4 else None for side in (student, teacher)]
        if sizes[0] is not None and sizes[1] is not None:  # both have a grid: one for both
            both = (min(sizes[0][0], sizes[1][0]), min(sizes[0][1], sizes[1][1]))
            sizes = [both, both]
        grids = []
        for side, size in zip((student, teacher), sizes, strict=True):
            if size is None:
                grids.append((side.shape[1], 1))
            else:
                grids.append((min(size[0], cap or size[0]), min(size[1], cap or size[1])))
        if self.options.distance == "l2" and grids[0] != grids[1]:
            raise ValueError(f'{self.where}: expected the same places on both sides for distance="l2", got {what()}')
        return grids[0], grids[1]

    def _check_tokens(self, tokens: Tensor, what: What) -> None:
        cap = self.options.max_grid
        if cap is not None and tokens.shape[1] > cap * cap:
            raise ValueError(
                f"{self.where}: expected at most {cap} x {cap} tokens (max_grid = {cap}), since tokens without a "
                f"grid cannot be averaged, got {what()}; sfr_ext.layouts.tokens(grid=...) gives them one, "
                "max_grid=None takes them as they are"
            )
        if self.options.emd_options.get("patch_size", 1) != 1:
            raise ValueError(f"{self.where}: expected patch_size 1 for tokens without a grid, got {what()}")

    def _student(self, name: str, grid: Grid, project: Project | None) -> Tensor:
        if project is not None:
            return self._unit(project(self._pooled("student", name, grid)))

        def make() -> Tensor:
            x = self.features["student"][name]
            if self._in_one_pass(x, grid):
                return maps.directions(x, 1, *grid).squeeze(1)
            return self._unit(self._pooled("student", name, grid))

        return self._once(("student", name, grid), make)

    def _teacher(self, name: str, grid: Grid, channels: int, what: What) -> Tensor:
        def make() -> Tensor:
            x = self.features["teacher"][name]
            mode = self.options.channel_mode
            if mode in ("match", "project") and self._in_one_pass(x, grid):
                groups = self._count(x, channels, what) if mode == "match" else 1
                return maps.directions(x.detach() if self.options.detach_teacher else x, groups, *grid)
            x = self._pooled("teacher", name, grid)
            if self.options.detach_teacher:
                x = x.detach()
            return self._unit(self._groups(x, channels, what))

        return self._once(("teacher", name, grid, channels), make)

    def _groups(self, teacher: Tensor, channels: int, what: What) -> Tensor:
        mode = self.options.channel_mode
        if mode == "project":
            return teacher.unsqueeze(1)
        if mode == "crop":
            if teacher.shape[1] < channels:
                raise ValueError(
                    f"{self.where}: expected {self._side(1)} to have no fewer channels than {self._side(0)} "
                    f"({self._other_modes(False)}), got {what()}{self._order(teacher, channels)}"
                )
            return teacher[:, :channels].unsqueeze(1)
        groups = teacher.unflatten(1, (self._count(teacher, channels, what), channels))
        return groups.mean(1, keepdim=True) if mode == "mean" else groups

    def _count(self, teacher: Tensor, channels: int, what: What) -> int:
        """How many groups the channels are cut into, as `sfr_ext.group_channels` does."""
        if channels == 0 or teacher.shape[1] == 0 or teacher.shape[1] % channels != 0:
            raise ValueError(
                f"{self.where}: expected the channels of {self._side(1)} to be a multiple of {self._side(0)}'s "
                f"({self._other_modes(teacher.shape[1] > channels)}), got {what()}{self._order(teacher, channels)}"
            )
        return int(teacher.shape[1] // channels)

    def _what(self, shallow: str, deep: str) -> str:
        student, teacher = self.features["student"][shallow], self.features["teacher"][deep]
        whose = ("", "") if self.shared else ("the student's ", "the teacher's ")
        sides = (whose[0], shallow, student), (whose[1], deep, teacher)
        return " and ".join(f"{of}{name!r} of shape {list(x.shape)}" for of, name, x in sides)

    def _side(self, which: int) -> str:
        return ("the shallow layer", "the deep layer")[which] if self.shared else ("the student", "the teacher")[which]

    def _other_modes(self, crop: bool) -> str:
        """Those that take any channels, or with ``crop`` no fewer for the teacher."""
        learned = '"project"' if self.options.name != "self_feature_loss" else ""
        modes = " or ".join(filter(None, (learned, '"crop"' if crop else "")))
        return f"or channel_mode={modes}" if modes else "or channels of one number, by a convolution of yours"

    def _order(self, teacher: Tensor, channels: int) -> str:
        """Networks get wider."""
        wrong = self.shared and teacher.shape[1] < channels
        return "; are the layers given from shallow to deep?" if wrong else ""

    def _in_one_pass(self, x: Tensor, grid: Grid) -> bool:
        return self.options.normalize and maps.in_one_pass(x, *grid)

    def _unit(self, x: Tensor) -> Tensor:
        return maps.unit(x) if self.options.normalize else x

    def _pooled(self, side: str, name: str, grid: Grid) -> Tensor:
        # A layer that is taught and teaches is pooled once.
        owner = "both" if self.shared else side
        return self._once(("pooled", owner, name, grid), lambda: _pool(self.features[side][name], grid))

    def _once(self, key: tuple[object, ...], make: Callable[[], Tensor]) -> Tensor:
        if key not in self._done:
            self._done[key] = make()
        return self._done[key]


def _pool(x: Tensor, grid: Grid) -> Tensor:
    if x.dim() == 3:
        return x.transpose(1, 2).unsqueeze(-1)
    return maps.pool(x, *grid)


def distance(options: Options, student: Tensor, teacher: Tensor) -> Tensor:
    """Of a student ``[B, C, h, w]`` and a teacher ``[B, G, C, h, w]``, a scalar."""
    if callable(options.distance):
        value = options.distance(student, teacher)
        if not isinstance(value, Tensor) or value.dim() != 0:
            came = f"shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"sfr_ext.{options.name}: expected distance to return a scalar Tensor, got {came}")
        return value
    if options.distance == "l2":
        return torch.linalg.vector_norm(student.unsqueeze(1) - teacher, dim=-3).mean()
    if options.weighting == "uniform":
        return emd_l2(student, teacher, **options.emd_options)
    a, b = cross_reference_weights(student, teacher)
    return emd_l2(student, teacher, student_weight=a, teacher_weight=b, **options.emd_options)
