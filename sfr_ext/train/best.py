"""The weights of the best epoch by held-out images, and their one test on the test images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from .config import LAST_CHECKPOINT
from .engine import L, TorchCheckpointIO
from .files import atomic_write
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
