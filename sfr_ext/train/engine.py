"""Lightning, the engine. All that is used of it is imported here, where a broken torchvision cannot stop it."""

from __future__ import annotations

import os

from .optional import without_broken_torchvision

with without_broken_torchvision():
    import lightning as L
    from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar
    from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
    from lightning.pytorch.plugins.environments import (
        LSFEnvironment,
        MPIEnvironment,
        SLURMEnvironment,
        TorchElasticEnvironment,
    )
    from lightning.pytorch.plugins.io import TorchCheckpointIO
    from lightning.pytorch.strategies import DDPStrategy
    from lightning.pytorch.utilities import rank_zero_only
    from lightning.pytorch.utilities.exceptions import MisconfigurationException

__all__ = [
    "CSVLogger",
    "DDPStrategy",
    "L",
    "MisconfigurationException",
    "ModelCheckpoint",
    "RichProgressBar",
    "TensorBoardLogger",
    "TorchCheckpointIO",
    "is_launched",
    "process_rank",
]


def is_launched() -> bool:
    """Whether something has started this process as one of several, which Lightning is told about."""
    known = (LSFEnvironment, MPIEnvironment, SLURMEnvironment, TorchElasticEnvironment)
    # The address is Kubeflow's, or was set by hand.
    return "MASTER_ADDR" in os.environ or any(environment.detect() for environment in known)


def process_rank() -> int:
    """The number of this process among those of its run, as Lightning's launcher, torchrun or SLURM has set it."""
    return int(getattr(rank_zero_only, "rank", 0) or 0)
