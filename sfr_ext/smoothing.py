"""Label smoothing whose strength follows a schedule and whose off-target mass may follow the classes."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import checks, counters

_NAME = "DynamicLabelSmoothing"

# Weight that a class's running mean keeps per further sample: a window of about 500 samples of that class.
# Counted in samples, not in batches, so that it means the same for 10 classes and for 1000.
_KEEP_PER_SAMPLE = 1.0 - 1.0 / 500.0

_LABELS = (torch.int64, torch.uint8)

Schedule = str | Callable[[Tensor], Tensor | float]


class DynamicLabelSmoothing(nn.Module):
    """Cross-entropy against smoothed labels, with a smoothing that changes over training.

    The label of a sample of class ``y`` is ``(1 - eps_t) onehot(y) + eps_t prior(y)``, and the loss

    .. code-block:: text

        mean_b [ -(1 - eps_t) log p_b[y_b] - eps_t sum_k prior(y_b)[k] log p_b[k] ],    p = softmax(logits)

    With ``t`` the number of calls of :meth:`step` so far, ``T = total_steps`` and ``x = min(1, t / T)``:

    ============  ====================================  =======================================
    schedule      ``eps_t``                             source
    ============  ====================================  =======================================
    "linear"      ``smoothing * x``                     shape of PS-KD's schedule (ICCV 2021)
    "cosine"      ``smoothing * (1 - cos(pi x)) / 2``   the same ends, flat at both
    "constant"    ``smoothing``                         Szegedy et al. (CVPR 2016)
    a function    ``smoothing * schedule(x)``
    ============  ====================================  =======================================

    ``prior="uniform"`` spreads the mass as ``1 / K``. Value and gradient are then those of
    ``F.cross_entropy(logits, target, weight, ignore_index=..., reduction=..., label_smoothing=smooth.current)``,
    infinities and NaN included: a masked logit (-inf) costs nothing while ``current`` is 0 and makes the loss infinite
    above it; a batch whose labels are all ignored has the mean NaN.

    ``prior="online"`` uses, per class, the running mean of the predictions of the correctly classified training samples
    of that class, as Online Label Smoothing does (Zhang et al., 2021; there per epoch, here over a sliding window of
    about 500 samples of the class). It starts uniform, is updated by forwards in training mode, and a batch is scored
    before it is learnt from. A sample whose label is ignored, or with a logit that is not finite, teaches nothing. Each
    process of a distributed run keeps its own.

    Args:
        smoothing: largest mass taken from the true class, in [0, 1].
        total_steps: calls of :meth:`step` after which ``eps_t`` has reached ``smoothing``. Required unless
            the schedule is "constant".
        schedule: "linear" | "cosine" | "constant" | a function of ``x``, a float64 tensor without axes, that returns
            the fraction of ``smoothing`` in [0, 1], as a tensor or a number. For ``torch.compile``: of torch's
            operations.
        prior: "uniform" | "online".
        weight: class weights ``[K]``, as ``F.cross_entropy`` has them. Moves with the module; not in ``state_dict``.
        ignore_index: samples with this target count for nothing.
        reduction: "mean" (weighted by the class weights) | "sum" | "none".

    Call it with logits ``[B, K]`` or ``[B, K, ...]`` (floating point) and the targets: class numbers ``[B]`` or
    ``[B, ...]`` (int64 or uint8), or probabilities of the logits' shape. Half precision is taken as float32. It
    returns a scalar, for "none" the targets' shape without classes. The step count and the running means are in
    ``state_dict``; the running means are there from the first batch on and are no buffer, so that a copy made earlier
    (for weight averaging) may be used.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: a value or shape that cannot be used; a schedule that changes without ``total_steps``; probabilities
            for ``prior="online"``.

    Warns once if the schedule changes with steps and training has called it more than ``max(1, total_steps / 2)`` times
    without one.

    >>> import torch
    >>> from sfr_ext import DynamicLabelSmoothing
    >>> smooth = DynamicLabelSmoothing(0.1, total_steps=4)
    >>> for _ in range(6):
    ...     loss = smooth(torch.zeros(2, 10), torch.tensor([3, 7]))
    ...     print(round(smooth.current, 4), end=" ")
    ...     smooth.step()    # after optimizer.step()
    0.0 0.025 0.05 0.075 0.1 0.1
    """

    if TYPE_CHECKING:  # torch.jit.script, of a module that this one is part of, reads annotations and not strings
        steps: Tensor
        weight: Tensor | None
        class_prior: Tensor
    __jit_unused_properties__ = ("current",)

    def __init__(
        self,
        smoothing: float = 0.1,
        total_steps: int | None = None,
        schedule: Schedule = "linear",
        prior: str = "uniform",
        *,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        smoothing, total_steps = _check_arguments(smoothing, total_steps, schedule, prior)
        ignore_index = _check_cross_entropy(weight, ignore_index, reduction)
        self.smoothing = float(smoothing)
        self.total_steps = total_steps
        self.schedule = schedule
        self.prior = prior
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.register_buffer("weight", weight, persistent=False)
        # A tensor, not an int: a compiled loss would be compiled anew for every value of a Python number.
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        # [K, K], row y the prior of class y; the first forward tells K. No buffer: whoever averages models copies
        # buffers from one to the other, and this one's shape changes.
        self.class_prior = torch.empty(0, 0)
        self._calls_without_step = 0

    @torch.jit.unused  # a loss is for training: the rest of the module is compiled
    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """The loss of logits ``[B, K, ...]`` against class numbers ``[B, ...]`` or probabilities ``[B, K, ...]``."""
        soft = _check_batch(logits, target, self.weight, self.ignore_index)
        if soft and self.prior == "online":
            checks.refuse(
                ValueError,
                _NAME,
                "target",
                'to hold class numbers for prior="online"',
                "probabilities; of one-hot ones, give target.argmax(1)",
            )
        if counters.recomputing():
            self._refuse_to_relearn()
        else:
            self._watch_for_steps()
        if logits.dtype in (torch.float16, torch.bfloat16):
            logits = logits.float()
        if not soft:
            target = target.long()
        elif target.dtype in (torch.float16, torch.bfloat16):
            target = target.float()  # smoothed in its own type, they would be rounded to it
        weight = None if self.weight is None else self.weight.to(logits.dtype)
        if torch.compiler.is_compiling():
            return self._loss(logits, target, weight, soft)
        try:
            return self._loss(logits, target, weight, soft)
        except IndexError:  # torch's, which does not say of what argument (a GPU does not look)
            _refuse_labels(target, logits.shape[1], self.ignore_index)
            raise

    def _loss(self, logits: Tensor, target: Tensor, weight: Tensor | None, soft: bool) -> Tensor:
        eps = self._eps()
        if self.prior == "uniform" and isinstance(eps, float):
            return F.cross_entropy(
                logits,
                target,
                weight,
                ignore_index=self.ignore_index,
                reduction=self.reduction,
                label_smoothing=eps,
            )
        log_p = F.log_softmax(logits, dim=1)
        if soft:
            return self._against_probabilities(log_p, target, weight, eps)
        loss = self._against_classes(log_p, target, weight, eps)
        if self.prior == "online" and self.training:
            self._learn_prior(log_p, target)
        return loss

    def step(self) -> None:
        """Advance the schedule by one optimiser step."""
        counters.advance(self.steps)
        if not torch.compiler.is_compiling():
            self._calls_without_step = 0

    @property
    def current(self) -> float:
        """``eps_t``, the mass taken from the true class now. On a GPU, reading it waits for the device."""
        return float(self._eps())

    def extra_repr(self) -> str:
        return (
            f"smoothing={self.smoothing}, total_steps={self.total_steps}, "
            f"schedule={self.schedule!r}, prior={self.prior!r}"
        )

    def _eps(self) -> Tensor | float:
        """A number where it never changes, else float64."""
        if self.schedule == "constant" or self.total_steps is None:
            return self.smoothing
        progress = (counters.read(self.steps).double() / self.total_steps).clamp(max=1.0)
        if self.schedule == "linear":
            return self.smoothing * progress
        if self.schedule == "cosine":
            return self.smoothing * ((1 - torch.cos(math.pi * progress)) / 2)
        assert callable(self.schedule)
        fraction = torch.as_tensor(self.schedule(progress), dtype=torch.float64, device=progress.device)
        _check_fraction(fraction)
        return self.smoothing * fraction

    def _against_probabilities(
        self, log_p: Tensor, target: Tensor, weight: Tensor | None, eps: Tensor | float
    ) -> Tensor:
        eps = torch.as_tensor(eps).to(log_p)
        classes = log_p.shape[1]
        terms = log_p * (target * (1 - eps) + eps / classes)
        if weight is not None:
            terms = terms * _per_class(weight, log_p)
        if self.reduction == "none":
            return -terms.sum(1)
        return -terms.sum() / (log_p.numel() / classes if self.reduction == "mean" else 1)

    def _against_classes(self, log_p: Tensor, target: Tensor, weight: Tensor | None, eps: Tensor | float) -> Tensor:
        hit = F.nll_loss(log_p, target, weight, ignore_index=self.ignore_index, reduction=self.reduction)
        ignored = target == self.ignore_index
        known = target.masked_fill(ignored, 0)
        terms, share = log_p, eps / log_p.shape[1]
        if self.prior == "online":
            terms, share = log_p * self._prior_of(known, log_p), eps
        if weight is not None:
            # Where there is no smoothing, no weight may make the gradient of nothing NaN.
            terms = terms * _per_class(weight.where(torch.as_tensor(share, device=weight.device) != 0, 0.0), log_p)
        spread = -terms.sum(1).masked_fill(ignored, 0.0)
        if self.reduction == "mean":
            counted = ~ignored if weight is None else weight[known].masked_fill(ignored, 0.0)
            spread = spread.sum() / counted.sum()
        elif self.reduction == "sum":
            spread = spread.sum()
        # The parts of eps in its own precision, then in that of the loss, as for a Python number.
        most, share = (torch.as_tensor(part).to(log_p) for part in (1 - eps, share))
        # Where there is no smoothing, infinite terms (a masked class) count for nothing.
        return most * hit + torch.where(share == 0, 0.0, share * spread)

    def _prior_of(self, classes: Tensor, log_p: Tensor) -> Tensor:
        """``[B, K, ...]``: the rows of the table for classes ``[B, ...]``."""
        count = log_p.shape[1]
        if self.class_prior.numel() == 0:
            with counters.writable(), counters.lasting():
                self.class_prior = torch.full((count, count), 1.0 / count, device=log_p.device)
        elif self.class_prior.shape[0] != count:
            wanted = f"of shape [B, K] with K = {self.class_prior.shape[0]} (from earlier batches)"
            checks.refuse(ValueError, _NAME, "logits", wanted, f"K = {count}")
        return counters.read(self.class_prior[classes].to(log_p.dtype)).movedim(-1, 1)

    @torch.no_grad()
    def _learn_prior(self, log_p: Tensor, target: Tensor) -> None:
        own = counters.plain(log_p), counters.plain(target)
        if own[0] is None or own[1] is None:
            raise RuntimeError(
                f'sfr_ext.{_NAME}: prior="online" learns from a batch as a whole; under torch.func.vmap put it into '
                "evaluation mode, and call it for the batch to let it learn"
            )
        with counters.writable():
            log_p, target = own[0].detach().movedim(1, -1).flatten(0, -2), own[1].flatten()
            classes = log_p.shape[1]
            # A logit that is not finite shows as such in log_p: as -inf or as NaN.
            usable = (target != self.ignore_index) & log_p.isfinite().all(1)
            correct = usable & (log_p.argmax(1) == target)
            # A matrix product instead of index_add_, which is not deterministic on a GPU.
            member = F.one_hot(target.where(usable, 0), classes) * correct.unsqueeze(1)
            member = member.to(log_p.dtype)
            count = member.sum(0).unsqueeze(1)
            mean = member.t() @ log_p.exp().where(usable.unsqueeze(1), 0.0) / count.clamp(min=1)
            keep = _KEEP_PER_SAMPLE**count
            self.class_prior.mul_(keep).add_(mean * (1 - keep))

    def _refuse_to_relearn(self) -> None:
        if self.prior == "online" and self.training:
            raise RuntimeError(
                f'sfr_ext.{_NAME}: prior="online" has learnt from this batch, so that a checkpoint that computes the '
                "loss again in backward would find another prior; keep the loss out of torch.utils.checkpoint"
            )

    def _watch_for_steps(self) -> None:
        """Warns where nobody advances the schedule: the smoothing would stay what it is for ever."""
        if torch.compiler.is_compiling() or not self.training or self.schedule == "constant":
            return
        self._calls_without_step += 1
        assert self.total_steps is not None
        if self._calls_without_step == 1 + max(1, self.total_steps // 2):
            warnings.warn(
                f"sfr_ext.{_NAME}: called {self._calls_without_step} times in training without .step(), with "
                f"total_steps = {self.total_steps}; the smoothing follows the calls of .step(), one after each "
                "optimizer.step()",
                stacklevel=5,
            )

    # The table of running means is in state_dict, though no buffer, and moves with the module.

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DynamicLabelSmoothing:
        super()._apply(fn, recurse)
        table, moved = self.class_prior, fn(self.class_prior)
        # In half precision a mean that moves by thousandths would stand still.
        self.class_prior = table.to(moved.device) if moved.dtype in (torch.float16, torch.bfloat16) else moved
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.class_prior.numel() > 0:
            destination[prefix + "class_prior"] = self.class_prior

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        rest = dict(state_dict)
        saved = rest.pop(prefix + "class_prior", None) if self.prior == "online" else None
        super()._load_from_state_dict(rest, prefix, *args)
        # Without a table it was saved before the first batch.
        like = self.class_prior
        self.class_prior = like.new_empty(0, 0) if saved is None else saved.to(like, copy=True)


def _per_class(weight: Tensor, log_p: Tensor) -> Tensor:
    return weight.view(1, -1, *[1] * (log_p.dim() - 2))


def _check_arguments(
    smoothing: float, total_steps: int | None, schedule: Schedule, prior: str
) -> tuple[float, int | None]:
    smoothing = checks.a_number(_NAME, "smoothing", smoothing)
    if not 0.0 <= smoothing <= 1.0:
        checks.refuse(ValueError, _NAME, "smoothing", "in [0, 1]", smoothing)
    if total_steps is not None:
        total_steps = checks.an_int(_NAME, "total_steps", total_steps)
        if total_steps < 1:
            checks.refuse(ValueError, _NAME, "total_steps", ">= 1", total_steps)
        if total_steps > counters.MOST:
            checks.refuse(ValueError, _NAME, "total_steps", "< 2**63", total_steps)
    if not callable(schedule) and schedule not in ("linear", "cosine", "constant"):
        checks.refuse(ValueError, _NAME, "schedule", '"linear", "cosine", "constant" or a function', repr(schedule))
    if prior not in ("uniform", "online"):
        checks.refuse(ValueError, _NAME, "prior", '"uniform" or "online"', repr(prior))
    if schedule != "constant" and total_steps is None:
        raise ValueError(f"sfr_ext.{_NAME}: schedule {schedule!r} needs total_steps, the number of steps it rises over")
    return smoothing, total_steps


def _check_cross_entropy(weight: Tensor | None, ignore_index: int, reduction: str) -> int:
    if weight is not None:
        checks.a_tensor(_NAME, "weight", weight)
        if not weight.is_floating_point():
            checks.refuse(TypeError, _NAME, "weight", "to be floating point", weight.dtype)
        if weight.dim() != 1:
            checks.refuse(ValueError, _NAME, "weight", "of shape [K]", checks.shape_of(weight))
    checks.choice(_NAME, "reduction", reduction, checks.REDUCTIONS)
    return checks.an_int(_NAME, "ignore_index", ignore_index)


def _check_fraction(fraction: Tensor) -> None:
    if fraction.dim() != 0:
        checks.refuse(ValueError, _NAME, "schedule", "to return one number", f"shape {checks.shape_of(fraction)}")
    # Looking would break a compiled graph, and make a GPU wait.
    looks = not torch.compiler.is_compiling() and fraction.device.type == "cpu"
    if looks and not 0.0 <= float(fraction) <= 1.0:
        checks.refuse(ValueError, _NAME, "schedule", "to return a fraction in [0, 1]", float(fraction))


def _refuse_labels(target: Tensor, classes: int, ignore_index: int) -> None:
    """If some are of no class."""
    labels = counters.plain(target)
    if labels is None:
        return
    wrong = labels[((labels < 0) | (labels >= classes)) & (labels != ignore_index)]
    if wrong.numel() > 0:
        wanted = f"to be in 0 ... {classes - 1} for logits of {classes} classes, or ignore_index = {ignore_index}"
        checks.refuse(ValueError, _NAME, "target", wanted, int(wrong[0]))


def _check_batch(logits: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int) -> bool:
    """Whether the target holds probabilities."""
    checks.a_tensor(_NAME, "logits", logits)
    checks.a_tensor(_NAME, "target", target)
    if not logits.is_floating_point():
        checks.refuse(TypeError, _NAME, "logits", "to be floating point", logits.dtype)
    if logits.dim() < 2 or logits.shape[1] < 1:
        hint = "; for one sample, give logits[None] and target[None]" if logits.dim() == 1 and target.dim() == 0 else ""
        checks.refuse(ValueError, _NAME, "logits", "of shape [B, K] or [B, K, ...]", checks.shape_of(logits) + hint)
    if weight is not None and weight.shape[0] != logits.shape[1]:
        wanted = f"with K = {weight.shape[0]} (from weight)"
        checks.refuse(ValueError, _NAME, "logits", wanted, checks.shape_of(logits))
    if target.shape == logits.shape and target.is_floating_point():
        if ignore_index >= 0:
            wanted = f"to hold class numbers for ignore_index = {ignore_index}"
            checks.refuse(ValueError, _NAME, "target", wanted, "probabilities")
        return True
    if target.dtype not in _LABELS:
        wanted = f"of int64 class indices, or of floating-point probabilities of shape {checks.shape_of(logits)}"
        came = f"{target.dtype} of shape {checks.shape_of(target)}"
        checks.refuse(TypeError, _NAME, "target", wanted, came + _better_target(logits, target))
    if target.shape != logits.shape[:1] + logits.shape[2:]:
        wanted = f"of shape [B] with B = {logits.shape[0]} for logits of shape [B, K], or [B, ...] for [B, K, ...]"
        came = f"{checks.shape_of(target)} for logits of {checks.shape_of(logits)}"
        checks.refuse(ValueError, _NAME, "target", wanted, came + _better_target(logits, target))
    return False


def _better_target(logits: Tensor, target: Tensor) -> str:
    """What to give instead, where that is clear."""
    if target.shape == logits.shape:
        return "; for one-hot labels, give target.float() or target.argmax(1)"
    as_labels = "" if target.dtype in _LABELS else ".long()"
    if target.dim() == logits.dim() and target.shape[1] == 1:
        return f"; give target.squeeze(1){as_labels}"
    return f"; give target{as_labels}" if as_labels and target.dim() == logits.dim() - 1 else ""
