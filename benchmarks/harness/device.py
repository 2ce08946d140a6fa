"""Times what runs on a CPU or on a GPU."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch


class Device:
    """``Device("cpu")`` or ``Device("cuda")``; on a CPU, launching and waiting are the same."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.on_gpu = name == "cuda"
        self._flush = torch.empty(1 << 28 if self.on_gpu else 1, dtype=torch.uint8, device=name)

    def synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def flush(self) -> None:
        """Empties a GPU's caches of what the next run reads."""
        if self.on_gpu:
            self._flush.zero_()

    def milliseconds(self, function: Callable[[], Any]) -> float:
        """Of the device. The host gets ahead while the device sleeps, so its own time is not in it; and caches
        start without the inputs."""
        if not self.on_gpu:
            return self.wall(function)[1]
        self.flush()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(4_000_000)
        start.record()
        function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    def wall(self, function: Callable[[], Any]) -> tuple[float, float]:
        """Milliseconds until the call returned, and until the device was done too."""
        self.synchronize()
        begin = time.perf_counter()
        function()
        returned = time.perf_counter()
        self.synchronize()
        return 1e3 * (returned - begin), 1e3 * (time.perf_counter() - begin)

    def graphed(self, function: Callable[[], Any]) -> tuple[Callable[[], Any], Any]:
        """What replays ``function``, and the results that a replay writes anew."""
        if not self.on_gpu:
            return function, function()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            function()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            written = function()
        return graph.replay, written
