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
            return self.until_done(function)
        self.flush()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(4_000_000)
        start.record()
        function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    def until_done(self, function: Callable[[], Any]) -> float:
        """Milliseconds of the host's clock, until the device is done."""
        return self.wall(function)[1]

    def wall(self, function: Callable[[], Any]) -> tuple[float, float]:
        """Milliseconds until the call returned, and until the device was done too."""
        self.synchronize()
        begin = time.perf_counter()
        function()
        returned = time.perf_counter()
        self.synchronize()
        return 1e3 * (returned - begin), 1e3 * (time.perf_counter() - begin)

    def captured(self, function: Callable[[], Any], stream: Any = None) -> tuple[Callable[[], Any], Any]:
        """As ``capture``; on a CPU, the function itself."""
        return capture(function, stream) if self.on_gpu else (function, function())

    def stream(self) -> Any:
        """A stream of its own, to be captured on; None on a CPU."""
        return torch.cuda.Stream() if self.on_gpu else None


def capture(function: Callable[[], Any], stream: torch.cuda.Stream | None = None) -> tuple[Callable[[], None], Any]:
    """A CUDA graph: what replays ``function``, and the results that a replay writes anew.

    The function runs once before, since libraries set themselves up at the first call. A backward runs on the stream of
    its forward: to capture it alone, that has to be ``stream``.
    """
    stream = stream or torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        written = function()
    return graph.replay, written
