"""Whether the processes that torchrun has started are those that the options ask for."""

from __future__ import annotations

import os

import torch

from .config import TrainConfig
from .errors import EveryProcessUsageError


def check_launched(config: TrainConfig) -> None:
    """Each process would be a whole run of its own, all of them in one folder.

    Raises:
        EveryProcessUsageError: torchrun has started other processes than ``--nodes`` times ``--devices``.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    gpus = torch.cuda.device_count() if config.accelerator != "cpu" else 0
    devices = max(gpus, 1) if config.devices == "auto" else int(config.devices)
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != devices * config.nodes:
        nodes = f", --nodes is {config.nodes}" if config.nodes > 1 else ""
        plural = "process" if started == 1 else "processes"
        raise EveryProcessUsageError(
            f"torchrun started {started} {plural}, --devices is {devices}{nodes}: --devices must be the number of "
            "processes of each machine, and --nodes that of machines"
        )
