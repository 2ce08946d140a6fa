"""The weights of the best epoch by held-out images, and their one test on the test images."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import LAST_CHECKPOINT, TrainConfig
from .engine import L, TorchCheckpointIO
from .files import atomic_write
from .loader import IGNORED, ImageModule
from .module import Classifier
from .sharding import whole
from .trained import WEIGHTS

BEST_CHECKPOINT = LAST_CHECKPOINT.with_name("best.ckpt")  # of OUT: weights alone


class Best(L.Callback):
    """Keeps the weights of the epoch with the highest accuracy on held-out images, the first one of several.

    They are part of every checkpoint, so that a resumed run knows the same best epoch, whichever checkpoint it begins
    from.
    """

    def __init__(self) -> None:
        self.epoch = 0
        self.accuracy = -1.0
        self.weights: dict[str, Tensor] = {}

    def look(self, module: Classifier, epoch: int, accuracy: float) -> None:
        """Keep a copy of the weights after this epoch if it is the best so far."""
        if accuracy > self.accuracy:
            self.epoch, self.accuracy = epoch, accuracy
            weights = whole(module.tested().state_dict())
            self.weights = {name: x.detach().to("cpu", copy=True) for name, x in weights.items()}

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "accuracy": self.accuracy, "weights": self.weights}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.epoch, self.accuracy = state_dict["epoch"], state_dict["accuracy"]
        self.weights = dict(state_dict["weights"])

    def save(self, out: Path, module: Classifier) -> None:
        """Write OUT/checkpoints/best.ckpt, which `load_trained` reads."""
        # Without loops and with no state of an optimiser it is no checkpoint to go on from.
        content: dict[str, Any] = {"epoch": self.epoch - 1, "optimizer_states": []}
        content["state_dict"] = {WEIGHTS + name: x for name, x in self.weights.items()}
        module.on_save_checkpoint(content)
        with atomic_write(out / BEST_CHECKPOINT) as path:
            TorchCheckpointIO().save_checkpoint(content, path)


@torch.no_grad()
def evaluate(
    config: TrainConfig, model: nn.Module, weights: dict[str, Tensor], data: ImageModule, device: torch.device
) -> tuple[float, float]:
    """Cross-entropy and accuracy of the network with these weights over all test images, in this process alone."""
    model.load_state_dict(weights)
    model.to(device).eval()
    dtype = next(model.parameters()).dtype
    mixed = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(config.precision)
    sums = torch.zeros(3, dtype=torch.float64)
    with torch.autocast(device.type, mixed) if mixed else contextlib.nullcontext():
        for batch in data.test_batches():
            images, labels = data.on_before_batch_transfer(batch, 0)
            logits = model(data.normalised(images.to(device), dtype)).float().cpu()
            loss = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
            real = labels != IGNORED
            hits = (logits.argmax(1) == labels) & real
            sums += torch.stack((loss.double(), hits.sum().double(), real.sum().double()))
    loss, hits, count = sums.tolist()
    return loss / count, hits / count
