"""Label smoothing whose strength follows a schedule and whose off-target mass may follow the classes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import checks

# Weight that a class's running mean keeps per further sample: a window of about 500 samples of that class.
# Counted in samples, not in batches, so that it means the same for 10 classes and for 1000.
_KEEP_PER_SAMPLE = 1.0 - 1.0 / 500.0


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
    ============  ====================================  =======================================

    ``prior="uniform"`` spreads the mass as ``1 / K``: with the constant schedule this is exactly
    ``F.cross_entropy(..., label_smoothing=smoothing)``. ``prior="online"`` uses, per class, the running mean
    of the predictions of the correctly classified training samples of that class, as Online Label Smoothing
    does (Zhang et al., 2021; there per epoch, here over a sliding window of about 500 samples of the class).
    It starts uniform, is updated by forwards in training mode, and a batch is scored before it is learnt
    from. Each process of a distributed run keeps its own.

    Args:
        smoothing: largest mass taken from the true class, in [0, 1].
        total_steps: calls of :meth:`step` after which ``eps_t`` has reached ``smoothing``. Required unless
            the schedule is "constant".
        schedule: "linear" | "cosine" | "constant".
        prior: "uniform" | "online".

    Call it with logits ``[B, K]`` (floating point) and targets ``[B]`` (int64 class indices); it returns a
    scalar, float32 for half-precision logits. The step count and the running means are buffers, hence in
    ``state_dict``.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: a value or shape that cannot be used; a schedule that changes without ``total_steps``.

    >>> import torch
    >>> smooth = DynamicLabelSmoothing(0.1, total_steps=4)
    >>> for _ in range(6):
    ...     loss = smooth(torch.zeros(2, 10), torch.tensor([3, 7]))
    ...     print(round(smooth.current, 4), end=" ")
    ...     smooth.step()
    0.0 0.025 0.05 0.075 0.1 0.1
    """

    steps: Tensor
    class_prior: Tensor

    def __init__(
        self,
        smoothing: float = 0.1,
        total_steps: int | None = None,
        schedule: str = "linear",
        prior: str = "uniform",
    ) -> None:
        super().__init__()
        _check_arguments(smoothing, total_steps, schedule, prior)
        self.smoothing = float(smoothing)
        self.total_steps = total_steps
        self.schedule = schedule
        self.prior = prior
        # A tensor, not an int: a compiled loss would be compiled anew for every value of a Python number.
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        if prior == "online":
            # [K, K], row y the prior of class y; the first forward tells K.
            self.register_buffer("class_prior", torch.empty(0, 0))

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Loss of logits ``[B, K]`` against class indices ``[B]``, a scalar (mean over the batch)."""
        _check_batch(logits, target)
        num_classes = logits.shape[1]
        if logits.dtype in (torch.float16, torch.bfloat16):
            logits = logits.float()
        log_p = F.log_softmax(logits, dim=1)
        hit = F.nll_loss(log_p, target)
        eps = self._eps(log_p.dtype)
        if self.prior == "uniform":
            return hit * (1 - eps) + -log_p.sum(1).mean() * (eps / num_classes)
        self._shape_prior(num_classes)
        prior = self.class_prior.to(log_p.dtype)[target]
        loss = hit * (1 - eps) + -(prior * log_p).sum(1).mean() * eps
        if self.training:
            self._learn_prior(log_p.detach(), target)
        return loss

    def step(self) -> None:
        """Advance the schedule by one optimiser step."""
        self.steps += 1

    @property
    def current(self) -> float:
        """``eps_t``, the mass taken from the true class now. On a GPU, reading it waits for the device."""
        return float(self._eps(torch.float64))

    def extra_repr(self) -> str:
        return (
            f"smoothing={self.smoothing}, total_steps={self.total_steps}, "
            f"schedule={self.schedule!r}, prior={self.prior!r}"
        )

    def _eps(self, dtype: torch.dtype) -> Tensor | float:
        if self.schedule == "constant" or self.total_steps is None:
            return self.smoothing
        progress = (self.steps.to(dtype) / self.total_steps).clamp(max=1.0)
        if self.schedule == "cosine":
            progress = (1 - torch.cos(math.pi * progress)) / 2
        return self.smoothing * progress

    def _shape_prior(self, num_classes: int) -> None:
        if self.class_prior.numel() == 0:
            self.class_prior = self.class_prior.new_full((num_classes, num_classes), 1.0 / num_classes)
        elif self.class_prior.shape[0] != num_classes:
            raise ValueError(
                "sfr_ext.DynamicLabelSmoothing: expected logits of shape [B, K] with "
                f"K = {self.class_prior.shape[0]} (from earlier batches), got K = {num_classes}"
            )

    @torch.no_grad()
    def _learn_prior(self, log_p: Tensor, target: Tensor) -> None:
        # A matrix product instead of index_add_, which is not deterministic on a GPU.
        member = F.one_hot(target, log_p.shape[1]).to(log_p.dtype)
        member *= (log_p.argmax(1) == target).to(log_p.dtype).unsqueeze(1)
        count = member.sum(0).unsqueeze(1)
        mean = member.t() @ log_p.exp() / count.clamp(min=1)
        keep = _KEEP_PER_SAMPLE**count
        self.class_prior.mul_(keep).add_(mean * (1 - keep))

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        # The saved table may be larger than the empty one of a module that has not yet seen a batch.
        saved = state_dict.get(prefix + "class_prior")
        if self.prior == "online" and isinstance(saved, Tensor) and saved.shape != self.class_prior.shape:
            self.class_prior = self.class_prior.new_empty(saved.shape)
        super()._load_from_state_dict(state_dict, prefix, *args)


def _check_arguments(smoothing: float, total_steps: int | None, schedule: str, prior: str) -> None:
    where = "sfr_ext.DynamicLabelSmoothing"
    checks.a_number("DynamicLabelSmoothing", "smoothing", smoothing)
    if not 0.0 <= smoothing <= 1.0:
        raise ValueError(f"{where}: expected smoothing in [0, 1], got {smoothing}")
    if total_steps is not None:
        checks.an_int("DynamicLabelSmoothing", "total_steps", total_steps)
        if total_steps < 1:
            raise ValueError(f"{where}: expected total_steps >= 1, got {total_steps}")
    if schedule not in ("linear", "cosine", "constant"):
        raise ValueError(f'{where}: expected schedule "linear", "cosine" or "constant", got {schedule!r}')
    if prior not in ("uniform", "online"):
        raise ValueError(f'{where}: expected prior "uniform" or "online", got {prior!r}')
    if schedule != "constant" and total_steps is None:
        raise ValueError(f"{where}: schedule {schedule!r} needs total_steps, the number of steps it rises over")


def _check_batch(logits: Tensor, target: Tensor) -> None:
    where = "sfr_ext.DynamicLabelSmoothing"
    if not isinstance(logits, Tensor) or not isinstance(target, Tensor):
        raise TypeError(f"{where}: expected two Tensors, got {type(logits).__name__} and {type(target).__name__}")
    if not logits.is_floating_point():
        raise TypeError(f"{where}: expected floating point logits, got {logits.dtype}")
    if target.dtype != torch.int64:
        raise TypeError(f"{where}: expected target of int64 class indices, got {target.dtype}")
    if logits.dim() != 2 or logits.shape[1] < 1:
        raise ValueError(f"{where}: expected logits of shape [B, K], got {list(logits.shape)}")
    if target.shape != logits.shape[:1]:
        raise ValueError(
            f"{where}: expected target of shape [B] with B = {logits.shape[0]} (from logits), got {list(target.shape)}"
        )
