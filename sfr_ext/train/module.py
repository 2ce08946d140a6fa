"""One training run as Lightning sees it: losses, optimiser, the sums behind each epoch's row."""

from __future__ import annotations

import math
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..smoothing import DynamicLabelSmoothing
from .arms import build_regularizer, build_smoothing
from .config import TrainConfig
from .errors import TrainError
from .loader import IGNORED, Batch, ImageModule
from .stopwatch import TimedRegularizer

WARMUP_SHARE = 0.1  # of all steps, over which the learning rate rises


class Classifier(L.LightningModule):
    """A network with the losses of one arm; SGD with Nesterov momentum, warm-up and a cosine down to 0."""

    smoothing: DynamicLabelSmoothing
    train_sums: Tensor
    test_sums: Tensor

    def __init__(self, config: TrainConfig, model: nn.Module, stages: tuple[str, ...] | None) -> None:
        super().__init__()
        self.config = config
        self.model = model
        self.stages = stages
        self.regularizer: TimedRegularizer | None = None
        # Sums over the epoch: loss, cross-entropy, feature loss, hits, images.
        self.register_buffer("train_sums", torch.zeros(5, dtype=torch.float32), persistent=False)
        self.register_buffer("test_sums", torch.zeros(3, dtype=torch.float32), persistent=False)

    def setup(self, stage: str) -> None:
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(data, ImageModule)
        per_epoch = data.steps_per_epoch(self.trainer.world_size)
        self.total_steps = per_epoch * self.config.epochs
        self.smoothing = build_smoothing(self.config, self.total_steps)
        self.regularizer = build_regularizer(self.config, self.model, self.stages, per_epoch)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(
            self.parameters(),
            lr=self.config.lr,
            momentum=0.9,
            nesterov=True,
            weight_decay=self.config.weight_decay,
        )
        rise = max(1, round(WARMUP_SHARE * self.total_steps))

        def factor(step: int) -> float:
            if step < rise:
                return (step + 1) / rise
            return 0.5 + 0.5 * math.cos(math.pi * min(1.0, (step - rise) / max(1, self.total_steps - rise)))

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, labels = batch
        logits = self.model(images)
        entropy: Tensor = self.smoothing(logits, labels)
        loss, feature = entropy, entropy.new_zeros(())
        if self.regularizer is not None:
            try:
                feature = self.regularizer.loss()
            except (TypeError, ValueError) as error:  # layers or options that do not fit
                raise TrainError(str(error)) from error
            loss = entropy + feature
        with torch.no_grad():
            count = len(labels)
            hits = (logits.argmax(1) == labels).sum()
            means = torch.stack((loss.float(), entropy.float(), feature.float())) * count
            self.train_sums += torch.cat((means, torch.stack((hits, hits.new_tensor(count))).float()))
        self.log("train_loss", loss.detach(), prog_bar=True)
        return loss

    def on_train_batch_end(self, *args: Any) -> None:
        self.smoothing.step()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        images, labels = batch
        logits = self.model(images)
        loss = F.cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction="sum")
        real = labels != IGNORED
        hits = ((logits.argmax(1) == labels) & real).sum()
        self.test_sums += torch.stack((loss, hits.float(), real.sum().float()))

    def take_means(self) -> dict[str, float]:
        """The epoch's means over all devices; the sums start again at 0."""
        strategy = self.trainer.strategy
        loss, entropy, feature, hits, count = strategy.reduce(self.train_sums, reduce_op="sum").tolist()
        test_loss, test_hits, test_count = strategy.reduce(self.test_sums, reduce_op="sum").tolist()
        self.train_sums.zero_()
        self.test_sums.zero_()
        return {
            "train_loss": loss / count,
            "train_cross_entropy": entropy / count,
            "train_feature_loss": feature / count,
            "train_accuracy": hits / count,
            "test_loss": test_loss / test_count,
            "test_accuracy": test_hits / test_count,
        }

    def emd_seconds(self) -> float:
        """Seconds in the feature loss, forward and backward, on this device, since this process began."""
        return 0.0 if self.regularizer is None else self.regularizer.stopwatch.seconds()
