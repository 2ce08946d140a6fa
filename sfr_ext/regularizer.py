"""Self-feature regularisation: the deep feature maps of a network teach its shallow ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from . import checks
from .layouts import Transform
from .sfr.features import features_of
from .sfr.hooked import Features, HookedLoss
from .sfr.hooks import Hooks
from .sfr.options import Distance, Options
from .sfr.pairs import Pairs, named_layers, shallow_to_deep

_NAME = "SelfFeatureRegularizer"


class SelfFeatureRegularizer(HookedLoss):
    """Earth mover's distance between the shallow and the deep feature maps of one network, as a loss.

    Forward hooks on the named layers keep the feature maps of the last forward; :meth:`loss` compares them:

    .. code-block:: text

        loss = weight * ramp * mean over pairs (s, d), images and groups g of
                   emd_l2( unit(pool(s)), unit(stop_gradient(pool(d))[g]) )

    ``pool`` averages both maps to ``min(h_s, h_d, max_grid)`` by ``min(w_s, w_d, max_grid)``, ``[g]`` is a group of as
    many deep channels as the shallow map has (:func:`group_channels`), and ``unit`` scales each pixel's channel vector
    to length 1. It is SFR (arXiv 2103.07350) *as reconstructed*: the paper gives no formula; the page on SFR in the
    documentation lists each choice with its precedent.

    Args:
        model: the network; also one wrapped by ``torch.compile`` or ``DistributedDataParallel``.
        layers: names of modules of ``model`` (as in ``named_modules()``, without the prefix of a wrapper, be it of the
            model or of a part that is compiled), from shallow to deep. Each must return one tensor ``[B, C, H, W]``.
            Or a dict from such names to transforms (None: none), for layers that return something else:
            `sfr_ext.layouts`.
        pairs: "all" (every shallow layer with every deeper one) | "last" (every layer with the last one) |
            a list of ``(shallow, deep)`` names.
        weight: factor on the loss, >= 0.
        warmup_steps: the factor ``ramp`` is ``min(1, n / warmup_steps)`` at the n-th step, n = 1, 2, ...; 0:
            always 1. A step is one call of :meth:`loss` on a forward made in training mode (of the model or of a
            hooked layer), so validation does not count, nor do extra forwards; with gradient accumulation each
            micro-batch counts. The count is kept in ``state_dict``.
        channel_mode: "match" (every deep group teaches the shallow map; the mean over groups) | "mean" (the
            groups are averaged into one teacher) | "crop" (only the first group teaches; the rest need not
            divide) | "project" (a learned 1 x 1 convolution without bias, one for each pair, from the shallow to the
            deep channels, whatever their numbers).
        max_grid: maps are averaged to at most so many rows and columns; None: as many as the smaller map has. Tokens
            without a grid are not averaged, and refused if there are more than ``max_grid ** 2``.
        normalize: compare unit channel vectors. Vectors shorter than 1/1000 of their map's mean length are
            divided by that floor instead: a dead pixel gives finite gradients.
        weighting: "uniform" | "cross-reference": a pixel counts for as much as it has in common with the other map
            as a whole (:func:`cross_reference_weights`, as DeepEMD has it); not for windows.
        detach_teacher: no gradient into the deep side.
        distance: "emd" | "l2" (each patch against the one at its own place; the mean of the unsquared distances) | a
            function of a student ``[B, C, h, w]`` and a teacher ``[B, G, C, h, w]``, pooled and normalised (tokens
            without a grid: ``h = N``, ``w = 1``), that returns a scalar.
        attach: make this object a submodule of the model, called ``self_feature_regularizer``. The parameters of
            "project" are then initialised, reduced and saved with the model's.
        emd_options: passed on to :func:`emd_l2` (``metric``, ``patch_size``, ``eps``, ``tol``, ...); for
            ``distance="emd"``.

    The object is an ``nn.Module`` for its step counter and the parameters of "project". It does not hold the model, so
    that it may be an attribute of the model itself, or of a module that owns both. Its hooks live until
    :meth:`remove`, the end of a ``with`` block, or its own end, whichever comes first. Copies and pickles of
    the model carry hooks that do nothing; those of a module that owns both work like the original.

    The parameters of "project" are made by the first call of the model, since they need the channels: call it once
    before the optimiser is built, and hand that ``sfr.parameters()`` as well. One that is built before does not have
    them, and never trains them; a warning says so after 100 calls of :meth:`loss`. With DDP or FSDP: ``attach=True``,
    call the model, wrap it, build the optimiser.

    Of a layer that runs several times in one forward, the last output counts. If it is changed in place by the next
    layer, the changed values are what is compared. For ``torch.compile``, create this object before the first call of
    the compiled model: hooks are compiled into it.

    Raises:
        TypeError: an argument of the wrong kind, an option that ``emd_l2`` does not have.
        ValueError: an unknown layer (close names are listed), an impossible pair or value; from :meth:`loss`,
            features of a wrong shape, maps that look like ``[B, H, W, C]``, channel counts that do not divide or are
            others than projections were made for.
        RuntimeError: :meth:`loss` with no forward since the last one, after :meth:`remove`, after a forward in copies
            (``nn.DataParallel``), with projections that have not been made, or where gradients are on, the forward was
            in training mode and no shallow map requires a gradient, or one does not though one before it does, or a
            forward in evaluation mode has followed that in training mode.

    >>> import torch
    >>> from torch import Tensor, nn
    >>> from sfr_ext import DynamicLabelSmoothing, SelfFeatureRegularizer
    >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 8, 3, 2), nn.Flatten(), nn.LazyLinear(10))
    >>> images, labels = torch.rand(2, 1, 12, 12), torch.tensor([1, 2])
    >>> smooth = DynamicLabelSmoothing(0.1, total_steps=100)
    >>> with SelfFeatureRegularizer(model, ["0", "1"]) as sfr:
    ...     loss = smooth(model(images), labels) + sfr.loss()
    ...     loss.backward()     # then optimizer.step()
    ...     smooth.step()
    >>> sfr.pairs
    (('0', '1'),)
    >>> sfr.values()    # doctest: +ELLIPSIS
    {('0', '1'): tensor(...)}
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[str] | Mapping[str, Transform | None],
        *,
        pairs: Pairs = "all",
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
        transforms = named_layers(where, layers)
        options = Options(_NAME, channel_mode, max_grid, normalize, weighting, detach_teacher, distance, emd_options)
        super().__init__(options, shallow_to_deep(where, pairs, list(transforms)), weight, warmup_steps)
        self.layers = tuple(transforms)
        self._transforms = transforms
        hooks = Hooks(where, model, self.layers)
        self._watch(hooks)
        if attach:
            self._attach("self_feature_regularizer")

    def extra_repr(self) -> str:
        return f"layers={list(self.layers)}, pairs={len(self.pairs)}, weight={self.weight}"

    def _read(self, *caught: tuple[dict[str, Any], bool]) -> tuple[Features, Features | None, bool]:
        ((outputs, training),) = caught
        return features_of(f"sfr_ext.{_NAME}.loss", outputs, self._transforms), None, training

    def _compare(self, students: Features, teachers: Features | None) -> Tensor:
        return self._mean_over_pairs(students)

    def _mean_over_pairs(self, features: Features) -> Tensor:
        return super()._compare(features, None)
