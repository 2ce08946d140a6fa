"""Seconds spent in a part of the training step, forward and backward, without stopping a GPU to look."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..regularizer import SelfFeatureRegularizer


class Stopwatch:
    """Adds up spans. By the clock; on a GPU by events in the stream, read when they have long passed."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._open: list[tuple[Any, Any]] = []

    def now(self, device: torch.device) -> Any:
        """A moment on the device: a number of seconds, or an event."""
        if device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(device))
        return event

    def add(self, begin: Any, end: Any) -> None:
        """Add the span between two moments of one device."""
        if isinstance(begin, float):
            self._seconds += end - begin
        else:
            self._open.append((begin, end))
            if len(self._open) >= 256:
                # The oldest half ended many steps ago: no waiting.
                self._read(128)

    def seconds(self) -> float:
        """The sum so far; waits for a GPU to finish the spans."""
        self._read(len(self._open))
        return self._seconds

    def _read(self, count: int) -> None:
        for begin, end in self._open[:count]:
            end.synchronize()
            self._seconds += begin.elapsed_time(end) / 1000
        del self._open[:count]


class TimedRegularizer(SelfFeatureRegularizer):
    """A regulariser that measures its own forward and backward.

    Forward: from the features to the loss. Backward: from the moment autograd has the gradient of the loss to the
    moment it has the last gradient that the loss sends to a feature map. Autograd runs the youngest operations first,
    and the operations of the loss are created together, so nothing else runs in between. Pooling, grouping and scaling
    belong to the loss and are included; the network's own backward is not.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.stopwatch = Stopwatch()

    def _mean_over_pairs(self, features: Mapping[str, Tensor]) -> Tensor:
        device = next(iter(features.values())).device
        begin = self.stopwatch.now(device)
        # Views give the gradients that come from this loss alone a place of their own in the graph.
        views = {name: feature.view_as(feature) for name, feature in features.items()}
        loss = super()._mean_over_pairs(views)
        self.stopwatch.add(begin, self.stopwatch.now(device))
        if loss.requires_grad:
            self._time_backward(loss, views, device)
        return loss

    def _time_backward(self, loss: Tensor, views: Mapping[str, Tensor], device: torch.device) -> None:
        reached = {shallow for shallow, _ in self.pairs}
        if not self.detach_teacher:
            reached |= {deep for _, deep in self.pairs}
        waiting = {name for name in reached if views[name].requires_grad}
        begin: list[Any] = []

        def at_loss(_: Tensor) -> None:
            begin.append(self.stopwatch.now(device))

        def at_feature(name: str) -> Callable[[Tensor], None]:
            def hook(_: Tensor) -> None:
                waiting.discard(name)
                if begin and not waiting:
                    self.stopwatch.add(begin.pop(), self.stopwatch.now(device))

            return hook

        loss.register_hook(at_loss)
        for name in sorted(waiting):
            views[name].register_hook(at_feature(name))
