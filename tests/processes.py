"""Two processes of gloo on this machine, each of which leaves one value."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch


def in_two_processes(target: Callable[..., None], folder: Path, *args: Any) -> list[Any]:
    """What ``target(rank, folder, *args)`` hands to `leave`, of both. It calls `join` first."""
    before = os.environ.get("GLOO_SOCKET_IFNAME")
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    try:
        spawn = torch.multiprocessing.get_context("spawn")
        ranks = [spawn.Process(target=target, args=(rank, folder, *args)) for rank in range(2)]
        for process in ranks:
            process.start()
    finally:
        os.environ.pop("GLOO_SOCKET_IFNAME")
        if before is not None:
            os.environ["GLOO_SOCKET_IFNAME"] = before
    for process in ranks:
        process.join(timeout=300)
        process.kill()
        assert process.exitcode == 0
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def join(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2, timeout=timedelta(seconds=120)
    )


def leave(value: Any, rank: int, folder: Path) -> NoReturn:
    """Saves it and leaves without tidying up: torch joins gloo's thread in the destructor of the process group, with
    the GIL held that this thread may be waiting for, which now and then is for ever."""
    torch.save(value, folder / f"{rank}.part")
    os.rename(folder / f"{rank}.part", folder / f"{rank}.pt")
    while len(list(folder.glob("*.pt"))) < 2:  # the connection lasts until both have what they need
        time.sleep(0.01)
    os._exit(0)
