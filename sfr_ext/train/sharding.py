"""``--strategy fsdp2``: each process keeps its share of every parameter, gradient and state of the optimiser."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from .config import TrainConfig
from .engine import DDPStrategy, L
from .errors import EveryProcessUsageError, TrainError

try:
    from torch.distributed.fsdp import fully_shard
except ImportError:  # before torch 2.6
    fully_shard = None  # type: ignore[assignment]


class Sharded(DDPStrategy):
    """Processes as DistributedDataParallel has them, around a network that ``fully_shard`` cuts up.

    Checkpoints hold whole tensors: those of one strategy go on with another, and on another number of devices.
    """

    strategy_name = "fsdp2"

    def _setup_model(self, model: nn.Module) -> Any:
        network = model.model
        assert isinstance(network, nn.Module)
        mesh = init_device_mesh(self.root_device.type, (self.world_size,))
        # What a child holds is gathered when it runs, and let go afterwards; the last call takes what is left.
        for part in [*network.children(), network]:
            if any(True for _ in part.parameters()):
                fully_shard(part, mesh=mesh)
        return model

    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.lightning_module is not None
        return whole(self.lightning_module.state_dict())

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        return whole(super().optimizer_state(optimizer))

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        # Parameters were loaded before they were cut up; what goes with them is cut up likewise.
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            state = {
                number: {name: _cut_like(parameters[number], value) for name, value in of_one.items()}
                for number, of_one in saved["state"].items()
            }
            optimizer.load_state_dict({**saved, "state": state})


class Shares(L.Callback):
    """What the processes do together for what one of them does alone later."""

    weights: dict[str, Tensor]  # of the network, whole, at the end

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # All have the buffers of the first process, as DistributedDataParallel sees to.
        for buffer in pl_module.model.buffers():  # type: ignore[union-attr]
            torch.distributed.broadcast(buffer, 0)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module.model, nn.Module)
        self.weights = whole(pl_module.model.state_dict())


def check_sharding(config: TrainConfig) -> None:
    """Raises TrainError where the strategy cannot be had, or does not go with another option."""
    if fully_shard is None:
        raise TrainError(f"--strategy fsdp2 needs torch 2.6 or newer, this is {torch.__version__}")
    others = {
        "--ema, whose average is of whole parameters": config.ema is not None,
        "--monitor, for which one process runs the network alone": config.monitor,
        "--compile": config.compile,
        "--channel-mode project, whose projections lie outside of the network": config.channel_mode == "project",
        "--precision 16-mixed, whose gradients one process scales": config.precision == "16-mixed",
    }
    for name, given in others.items():
        if given:
            raise EveryProcessUsageError(f"--strategy fsdp2 does not go with {name}; --strategy ddp does")


def whole(state: Any) -> Any:
    """The same with whole tensors in place of shares. All processes call it together."""
    if isinstance(state, dict):
        return {name: whole(value) for name, value in state.items()}
    return state.full_tensor() if hasattr(state, "full_tensor") else state


def _cut_like(parameter: Tensor, value: Any) -> Any:
    if not hasattr(parameter, "full_tensor") or not isinstance(value, Tensor) or value.shape != parameter.shape:
        return value
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(parameter, DTensor)
    value = value.to(parameter.device)
    return distribute_tensor(value, parameter.device_mesh, parameter.placements)
