"""Whether parameters are learned by all processes of a training together, as those of the model are."""

from __future__ import annotations

import gc

import torch
from torch import nn


def several() -> bool:
    """Whether this process is one of several that torch.distributed has joined."""
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def left_out(part: nn.Module, model: nn.Module) -> bool:
    """Whether something keeps the parameters of the model alike on all processes, and not those of the part."""
    around = [modules for wrapper in _wrappers() if model in (modules := set(wrapper.modules()))]
    return bool(around) and not any(part in modules for modules in around)


def _wrappers() -> list[nn.Module]:
    """All there are: a model does not know what wraps it."""
    from torch.distributed import fsdp  # takes a while, and a torch without distributed lacks it

    kinds: list[type] = [nn.parallel.DistributedDataParallel, fsdp.FullyShardedDataParallel]
    if hasattr(fsdp, "FSDPModule"):  # what fully_shard makes of a module; newer than the oldest torch that is supported
        kinds.append(fsdp.FSDPModule)
    # By type: isinstance may wake objects that load something when they are looked at.
    return [each for each in gc.get_objects() if issubclass(type(each), tuple(kinds))]
