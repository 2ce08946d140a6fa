"""Whether the processes that have been started are those that the options ask for."""

from __future__ import annotations

import os
import sys

import torch

from .config import TrainConfig
from .engine import is_launched
from .errors import EveryProcessUsageError, UsageError


def check_launched(config: TrainConfig) -> None:
    """Else each process would be a whole run of its own, all of them in one folder.

    Raises:
        UsageError: nothing has started the processes of the other machines, for which this one would wait.
        EveryProcessUsageError: torchrun has started other processes than ``--nodes`` times ``--devices``.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        if config.nodes > 1 and not is_launched():
            n, each = config.nodes, "DEVICES" if config.devices == "auto" else config.devices
            raise UsageError(
                f"--nodes {n}: nothing has started the processes of {n} machines; on each machine "
                f"`torchrun --nnodes {n} --nproc_per_node {each} --rdzv_backend c10d --rdzv_endpoint HOST:29500 "
                f"-m sfr_ext train --nodes {n} --devices {each} ...` does, or under SLURM once "
                f"`srun --nodes {n} --ntasks-per-node {each} sfr-ext train --nodes {n} --devices {each} ...`"
            )
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


def leave() -> None:
    """Ends a process that torchrun has started, where its run is complete; else does nothing.

    Without what happens at the end of an interpreter: now and then a thread of a process group outlives what it
    belongs to, and aborts the process ("terminate called without an active exception"): a failure, to torchrun.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
