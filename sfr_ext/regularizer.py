"""Self-feature regularisation: the deep feature maps of a network teach its shallow ones."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from . import checks
from .channels import group_channels
from .emd import emd_l2
from .weights import cross_reference_weights

_WHERE = "sfr_ext.SelfFeatureRegularizer"


class SelfFeatureRegularizer(nn.Module):
    """Earth mover's distance between the shallow and the deep feature maps of one network, as a loss.

    Forward hooks on the named layers keep the feature maps of the last forward; :meth:`loss` compares them:

    .. code-block:: text

        loss = weight * ramp * mean over pairs (s, d), images and groups g of
                   emd_l2( unit(pool(s)), unit(stop_gradient(d)[g]) )

    ``pool`` averages the shallow map down to the deep map's size (``adaptive_avg_pool2d``), ``[g]`` is a
    group of as many deep channels as the shallow map has (:func:`group_channels`), and ``unit`` scales each
    pixel's channel vector to length 1. It is SFR (arXiv 2103.07350) *as reconstructed*: the paper gives no
    formula; the page on SFR in the documentation lists each choice with its precedent.

    Args:
        model: the network; also one wrapped by ``torch.compile`` or ``DistributedDataParallel``.
        layers: names of modules of ``model`` (as in ``named_modules()``, without the prefix of a wrapper),
            from shallow to deep. Each must return one tensor ``[B, C, H, W]``; sizes must not grow with
            depth.
        pairs: "all" (every shallow layer with every deeper one) | "last" (every layer with the last one) |
            a list of ``(shallow, deep)`` names.
        weight: factor on the loss, >= 0.
        warmup_steps: the factor ``ramp`` is ``min(1, n / warmup_steps)`` at the n-th step, n = 1, 2, ...; 0:
            always 1. A step is one call of :meth:`loss` on a forward made in training mode, so validation
            does not count, nor do extra forwards; with gradient accumulation each micro-batch counts. The
            count is kept in ``state_dict``.
        channel_mode: "match" (every deep group teaches the shallow map; the mean over groups) | "mean" (the
            groups are averaged into one teacher) | "crop" (only the first group teaches; the rest need not
            divide).
        normalize: compare unit channel vectors. Vectors shorter than 1/1000 of their map's mean length are
            divided by that floor instead: a dead pixel gives finite gradients.
        weighting: "uniform" | "cross-reference": a pixel counts for as much as it has in common with the other map
            as a whole (:func:`cross_reference_weights`, as DeepEMD has it); not for windows.
        detach_teacher: no gradient into the deep side.
        emd_options: passed on to :func:`emd_l2` (``metric``, ``patch_size``, ``eps``, ``tol``, ...).

    The object is an ``nn.Module`` for its step counter only: it holds neither the model nor any parameter, so
    that it may be an attribute of the model itself, or of a module that owns both. Its hooks live until
    :meth:`remove`, the end of a ``with`` block, or its own end, whichever comes first. Copies and pickles of
    the model carry hooks that do nothing.

    If a layer's output is changed in place by the next layer, the changed values are what is compared. For
    ``torch.compile``, create this object before the first call of the compiled model: hooks are compiled into
    it.

    Raises:
        TypeError: an argument of the wrong kind, an option that ``emd_l2`` does not have.
        ValueError: an unknown layer (close names are listed), an impossible pair or value; from :meth:`loss`,
            maps of a wrong shape and channel counts that do not divide.
        RuntimeError: :meth:`loss` with no forward since the last one, or after :meth:`remove`.

    >>> import torch
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 8, 3, 2), nn.Flatten(), nn.LazyLinear(10))
    >>> images, labels = torch.rand(2, 1, 12, 12), torch.tensor([1, 2])
    >>> with SelfFeatureRegularizer(model, ["0", "1"]) as sfr:
    ...     loss = nn.functional.cross_entropy(model(images), labels) + sfr.loss()
    ...     loss.backward()
    >>> sfr.pairs
    (('0', '1'),)
    """

    steps: Tensor

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[str],
        *,
        pairs: str | Sequence[tuple[str, str]] = "all",
        weight: float = 1.0,
        warmup_steps: int = 0,
        channel_mode: str = "match",
        normalize: bool = True,
        weighting: str = "uniform",
        detach_teacher: bool = True,
        **emd_options: Any,
    ) -> None:
        super().__init__()
        self._handles: list[RemovableHandle] = []  # first, for __del__ after an error below
        self.layers = _check_layers(layers)
        self.pairs = _check_pairs(pairs, self.layers)
        _check_values(weight, warmup_steps, channel_mode)
        _check_emd_options(emd_options)
        _check_weighting(weighting, emd_options)
        self.weight = float(weight)
        self.warmup_steps = warmup_steps
        self.channel_mode = channel_mode
        self.normalize = normalize
        self.weighting = weighting
        self.detach_teacher = detach_teacher
        self.emd_options = emd_options
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

        self._capture = _Capture(active=True)
        root, modules = _find_modules(model, self.layers)
        self._handles.append(root.register_forward_pre_hook(_ForwardStart(self._capture)))
        for name, module in zip(self.layers, modules, strict=True):
            self._handles.append(module.register_forward_hook(_LayerEnd(self._capture, name)))

    def loss(self) -> Tensor:
        """The loss of the last forward, a scalar; the features are dropped afterwards."""
        features, training = self._take_features()
        # The distance takes each dtype as it is; autocast would only add casts.
        with torch.autocast(next(iter(features.values())).device.type, enabled=False):
            value = self._mean_over_pairs(features)
        if training:
            self.steps += 1
        if self.warmup_steps == 0:
            return value * self.weight
        return value * (self.weight * self._ramp())

    @property
    def current_weight(self) -> float:
        """``weight * ramp`` of the last step. On a GPU, reading it may wait for the device."""
        return self.weight * float(self._ramp()) if self.warmup_steps else self.weight

    def remove(self) -> None:
        """Take the hooks off the model and drop the features. Calling it again does nothing."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if hasattr(self, "_capture"):
            self._capture.active = False
            self._capture.features.clear()

    def __enter__(self) -> SelfFeatureRegularizer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def __del__(self) -> None:
        self.remove()

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A deep copy of an object that owns both the model and this regulariser works like the original.
        super().__setstate__(state)
        self._capture.active = bool(self._handles)

    def extra_repr(self) -> str:
        return f"layers={list(self.layers)}, pairs={len(self.pairs)}, weight={self.weight}"

    # What follows is the computation itself; each step may be replaced by a subclass.

    def _mean_over_pairs(self, features: Mapping[str, Tensor]) -> Tensor:
        losses = [self._pair(features, shallow, deep) for shallow, deep in self.pairs]
        return torch.stack(losses).mean()

    def _pair(self, features: Mapping[str, Tensor], shallow: str, deep: str) -> Tensor:
        student, teacher = features[shallow], features[deep]
        _check_pair_shapes(student, teacher, shallow, deep, self.channel_mode)
        if self.detach_teacher:
            teacher = teacher.detach()
        if student.shape[2:] != teacher.shape[2:]:
            student = _pool(student, teacher.shape[2], teacher.shape[3])
        if self.channel_mode == "crop":
            teacher = teacher[:, : student.shape[1]]
        else:
            teacher = group_channels(teacher, student.shape[1])
            if self.channel_mode == "mean":
                teacher = teacher.mean(1)
        if self.normalize:
            student, teacher = _unit(student), _unit(teacher)
        if student.dtype != teacher.dtype:
            common = torch.promote_types(student.dtype, teacher.dtype)
            student, teacher = student.to(common), teacher.to(common)
        return self._distance(student, teacher)

    def _distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        if self.weighting == "uniform":
            return emd_l2(student, teacher, **self.emd_options)
        a, b = cross_reference_weights(student, teacher)
        return emd_l2(student, teacher, student_weight=a, teacher_weight=b, **self.emd_options)

    def _ramp(self) -> Tensor:
        return (self.steps / self.warmup_steps).clamp(max=1.0)

    def _take_features(self) -> tuple[dict[str, Tensor], bool]:
        if not self._capture.active:
            raise RuntimeError(f"{_WHERE}.loss: the hooks were removed; create a new regulariser")
        captured = dict(self._capture.features)
        self._capture.features.clear()
        missing = [name for name in self.layers if name not in captured]
        if missing:
            raise RuntimeError(
                f"{_WHERE}.loss: expected a forward of the model since the last call, but none has "
                f"passed through {', '.join(map(repr, missing))} (a model compiled and called before this "
                "object was created does not see its hooks)"
            )
        for name, feature in captured.items():
            _check_feature(name, feature)
        return captured, self._capture.training


class _Capture:
    """Outputs of the hooked layers in the last forward. Shared by the hooks and their owner, who alone
    empties it.

    Copies and pickles come out empty and inactive: features belong to a graph that cannot be copied, and a
    copied model has no one to take them.
    """

    def __init__(self, active: bool = False) -> None:
        self.active = active
        self.training = False
        self.features: dict[str, Any] = {}

    def __reduce__(self) -> tuple[type[_Capture], tuple[()]]:
        return (_Capture, ())


class _ForwardStart:
    """Pre-hook of the whole model: a new forward drops what an earlier one left."""

    def __init__(self, capture: _Capture) -> None:
        self.capture = capture

    def __call__(self, module: nn.Module, args: Any) -> None:
        if self.capture.active:
            self.capture.features.clear()


class _LayerEnd:
    """Hook of one layer: keeps its output."""

    def __init__(self, capture: _Capture, name: str) -> None:
        self.capture = capture
        self.name = name

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.capture.active:
            self.capture.features[self.name] = output
            self.capture.training = module.training


def _pool(x: Tensor, height: int, width: int) -> Tensor:
    """``adaptive_avg_pool2d``; where the sizes divide by its twin that is deterministic on a GPU, too."""
    if x.shape[2] % height == 0 and x.shape[3] % width == 0:
        return F.avg_pool2d(x, (x.shape[2] // height, x.shape[3] // width))
    return F.adaptive_avg_pool2d(x, (height, width))


def _unit(x: Tensor) -> Tensor:
    """Channel vectors (third axis from the end) scaled to length 1, in float32 at least."""
    if x.dtype in (torch.float16, torch.bfloat16):
        x = x.float()
    # Squares and a sum: a norm along an axis that is not the last is over ten times slower on a CPU.
    squared = x.square().sum(dim=-3, keepdim=True)
    # After a ReLU some pixels are all but zero, where the gradient of the direction, 1 / length, explodes.
    floor = 1e-3 * squared.detach().sqrt().mean(dim=(-2, -1), keepdim=True)
    return x / torch.maximum(squared, floor.square().clamp_min(torch.finfo(x.dtype).tiny)).sqrt()


def _find_modules(model: nn.Module, layers: tuple[str, ...]) -> tuple[nn.Module, list[nn.Module]]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{_WHERE}: expected model to be an nn.Module, got {type(model).__name__}")
    while True:
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):  # what torch.compile returns
            model = model._orig_mod  # type: ignore[assignment]
        else:
            break
    modules = dict(model.named_modules())
    modules.pop("")
    for name in layers:
        if name not in modules:
            near = difflib.get_close_matches(name, modules, n=5, cutoff=0.5) or list(modules)[:5]
            raise ValueError(
                f"{_WHERE}: expected layers to name modules of {type(model).__name__}, got {name!r}; "
                f"near to it: {', '.join(map(repr, near)) or 'none, the model has no submodules'}"
            )
    return model, [modules[name] for name in layers]


def _check_layers(layers: Sequence[str]) -> tuple[str, ...]:
    if isinstance(layers, str) or not isinstance(layers, Sequence):
        raise TypeError(f"{_WHERE}: expected layers to be a list of names, got {type(layers).__name__}")
    for name in layers:
        if not isinstance(name, str):
            raise TypeError(f"{_WHERE}: expected layers to hold names (str), got {type(name).__name__}")
    if len(layers) < 2:
        raise ValueError(f"{_WHERE}: expected layers to name at least 2 layers, got {list(layers)}")
    if len(set(layers)) != len(layers):
        raise ValueError(f"{_WHERE}: expected layers without repetition, got {list(layers)}")
    return tuple(layers)


def _check_pairs(pairs: str | Sequence[tuple[str, str]], layers: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    if isinstance(pairs, str):
        if pairs == "all":
            return tuple((s, d) for i, s in enumerate(layers) for d in layers[i + 1 :])
        if pairs == "last":
            return tuple((s, layers[-1]) for s in layers[:-1])
        raise ValueError(f'{_WHERE}: expected pairs "all", "last" or a list of names, got {pairs!r}')
    if not isinstance(pairs, Sequence):
        raise TypeError(f"{_WHERE}: expected pairs to be a str or a list, got {type(pairs).__name__}")
    if not pairs:
        raise ValueError(f"{_WHERE}: expected pairs to hold at least one pair, got an empty list")
    named = []
    for pair in pairs:
        if isinstance(pair, str) or not isinstance(pair, Sequence) or len(pair) != 2:
            raise TypeError(f"{_WHERE}: expected pairs to hold (shallow, deep) names, got {pair!r}")
        shallow, deep = pair[0], pair[1]
        if shallow not in layers or deep not in layers:
            raise ValueError(f"{_WHERE}: expected pairs to use names from layers {list(layers)}, got {pair!r}")
        if layers.index(shallow) >= layers.index(deep):
            raise ValueError(f"{_WHERE}: expected pairs (shallow, deep) in the order of layers, got {pair!r}")
        named.append((shallow, deep))
    return tuple(named)


def _check_values(weight: float, warmup_steps: int, channel_mode: str) -> None:
    checks.a_number("SelfFeatureRegularizer", "weight", weight)
    if not 0.0 <= weight < float("inf"):
        raise ValueError(f"{_WHERE}: expected a finite weight >= 0, got {weight}")
    checks.an_int("SelfFeatureRegularizer", "warmup_steps", warmup_steps)
    if warmup_steps < 0:
        raise ValueError(f"{_WHERE}: expected warmup_steps >= 0, got {warmup_steps}")
    if channel_mode not in ("match", "mean", "crop"):
        raise ValueError(f'{_WHERE}: expected channel_mode "match", "mean" or "crop", got {channel_mode!r}')


def _check_emd_options(options: Mapping[str, Any]) -> None:
    parameters = inspect.signature(emd_l2).parameters.values()
    known = {p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}
    # One weight cannot fit maps of several sizes, and the loss is a mean by definition.
    usable = known - {"student_weight", "teacher_weight", "reduction"}
    for name in options:
        if name not in usable:
            raise TypeError(f"{_WHERE}: expected options among {', '.join(sorted(usable))}, got {name!r}")


def _check_weighting(weighting: object, options: Mapping[str, Any]) -> None:
    if weighting not in ("uniform", "cross-reference"):
        raise ValueError(f'{_WHERE}: expected weighting "uniform" or "cross-reference", got {weighting!r}')
    if weighting == "cross-reference" and options.get("patch_size", 1) != 1:
        raise ValueError(f"{_WHERE}: expected patch_size 1 for cross-reference weights, got {options['patch_size']!r}")


def _check_feature(name: str, feature: object) -> None:
    if not isinstance(feature, Tensor):
        raise TypeError(f"{_WHERE}.loss: expected layer {name!r} to return a Tensor, got {type(feature).__name__}")
    if not feature.is_floating_point():
        raise TypeError(f"{_WHERE}.loss: expected layer {name!r} to return floating point, got {feature.dtype}")
    if feature.dim() != 4:
        raise ValueError(
            f"{_WHERE}.loss: expected layer {name!r} to return shape [B, C, H, W], got {list(feature.shape)}"
        )


def _check_pair_shapes(student: Tensor, teacher: Tensor, shallow: str, deep: str, channel_mode: str) -> None:
    what = f"{shallow!r} of shape {list(student.shape)} and {deep!r} of shape {list(teacher.shape)}"
    if student.shape[0] != teacher.shape[0]:
        raise ValueError(f"{_WHERE}.loss: expected one batch size for both layers of a pair, got {what}")
    if student.shape[2] < teacher.shape[2] or student.shape[3] < teacher.shape[3]:
        raise ValueError(f"{_WHERE}.loss: expected layers from shallow (large) to deep (small), got {what}")
    if channel_mode == "crop":
        if teacher.shape[1] < student.shape[1]:
            raise ValueError(f"{_WHERE}.loss: expected the deep layer to have no fewer channels, got {what}")
    elif student.shape[1] == 0 or teacher.shape[1] == 0 or teacher.shape[1] % student.shape[1] != 0:
        raise ValueError(
            f"{_WHERE}.loss: expected the deep layer's channels to be a multiple of the shallow layer's "
            f'(or channel_mode="crop"), got {what}'
        )
