"""One training run as Lightning sees it: losses, optimiser, the sums behind each epoch's row."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ..smoothing import DynamicLabelSmoothing
from .arms import build_regularizer, build_relative, build_smoothing
from .config import TrainConfig
from .engine import L
from .errors import EveryProcessError
from .loader import IGNORED, Batch, ImageModule
from .mixing import cutmix, mixup
from .relatives.base import Relative
from .relatives.byot import OwnTeacher
from .stopwatch import TimedRegularizer
from .trained import images_of

WARMUP_SHARE = 0.1  # of all steps, over which the learning rate rises
LOOK_EVERY = 20  # steps after which the loss is looked at where looking makes devices wait


class Classifier(L.LightningModule):
    """A network with the losses of one arm; SGD or AdamW, warm-up and a cosine down to 0."""

    smoothing: DynamicLabelSmoothing
    train_sums: Tensor
    test_sums: Tensor

    def __init__(self, config: TrainConfig, model: nn.Module, stages: tuple[str, ...] | None) -> None:
        super().__init__()
        self.config = config
        self.model = model
        self.stages = stages
        self.plain_feature_loss = 0.0  # of the last epoch, without its factor, to be told
        self.fits = False  # whether a batch of these images has passed through the network
        self.regularizer: TimedRegularizer | None = None
        self.relative: Relative | None = None
        self.average: AveragedModel | None = None
        if config.ema is not None:
            self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.ema), use_buffers=True)
            self.average.requires_grad_(False)

    def on_fit_start(self) -> None:
        """Makes the sums over an epoch: loss, cross-entropy, feature loss, the same without its factor, hits, images.

        In float64, so that they hardly depend on how many processes share them; no buffers, which
        DistributedDataParallel would overwrite in each step with those of the first process.
        """
        self.train_sums = torch.zeros(6, dtype=torch.float64, device=self.device)
        self.test_sums = torch.zeros(3, dtype=torch.float64, device=self.device)

    def setup(self, stage: str) -> None:
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(data, ImageModule)
        self.data = data.data
        self.batches_per_epoch = data.batches_per_epoch(self.trainer.world_size)
        # The last batches of an epoch make a step also where they are fewer than --accumulate.
        self.steps_per_epoch = math.ceil(self.batches_per_epoch / self.config.accumulate)
        self.total_steps = self.steps_per_epoch * self.config.epochs
        self.smoothing = build_smoothing(self.config, self.total_steps)
        image = torch.empty(self.data.channels, *images_of(self.data)["size"])
        self.regularizer = build_regularizer(self.config, self.model, self.stages, image, self.batches_per_epoch)
        self.relative = build_relative(self.config, self.model, self.stages, image, self.data.num_classes)
        if self.compared is not None and self.trainer.is_global_zero:
            print(f"layers: {', '.join(self.compared)}", flush=True)
        if self.config.compile:
            self.model.compile()  # after the hooks are on, which become part of it

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leaves the options and the data of the run in its checkpoints."""
        checkpoint["sfr_ext"] = self.config.identity()
        checkpoint["sfr_ext_data"] = self.data.identity()
        checkpoint["sfr_ext_images"] = images_of(self.data)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Counts the finished epochs in steps of this run: another number of devices has other steps."""
        state, epochs = checkpoint["state_dict"], checkpoint["epoch"] + 1
        # The regulariser counts batches, the smoothing steps of the optimiser.
        for name, each in (("smoothing.steps", self.steps_per_epoch), ("regularizer.steps", self.batches_per_epoch)):
            if name in state:
                state[name] = torch.full_like(state[name], epochs * each)

    def on_train_start(self) -> None:
        """Sets the learning rate to its place in a schedule that may be longer than that of the checkpoint."""
        scheduler = self.lr_schedulers()
        assert isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR)
        scheduler.last_epoch = self.current_epoch * self.steps_per_epoch
        for group, rise in zip(scheduler.optimizer.param_groups, scheduler.lr_lambdas, strict=True):
            group["lr"] = group["initial_lr"] * rise(scheduler.last_epoch)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        if batch_idx == 0:
            # Every epoch begins from the seed, so that a resumed run draws what the uninterrupted one drew.
            seed_everything(self.config.seed, self.current_epoch, self.global_rank)
            if self.relative is not None:
                self.relative.begin_epoch(self.current_epoch, self.model)

    def configure_optimizers(self) -> Any:
        options: dict[str, Any] = {"lr": self.config.lr, "weight_decay": self.config.weight_decay}
        beside = [module for module in (self.regularizer, self.relative) if module is not None]
        learned = [x for module in beside for x in module.parameters()]  # of --channel-mode project, of heads
        parameters = [*self.model.parameters(), *learned]
        optimizer = (
            torch.optim.SGD(parameters, momentum=0.9, nesterov=True, **options)
            if self.config.optimizer == "sgd"
            else torch.optim.AdamW(parameters, **options)
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
        seed = (self.config.seed, self.current_epoch, batch_idx, self.global_rank)
        if self.config.mixup > 0:
            images, labels = mixup(images, labels, self.data.num_classes, self.config.mixup, seed)
        elif self.config.arm == "cutmix":
            images, labels = cutmix(images, labels, self.data.num_classes, seed)
        logits = self._logits(images)
        if self.relative is None:
            entropy: Tensor = self.smoothing(logits, labels)
            feature = entropy.new_zeros(())
        else:
            entropy, feature = self.relative(images, logits.float() if logits.element_size() < 4 else logits, labels)
        if self.regularizer is not None:
            feature = self._feature_loss(self.regularizer)
        # Without the factor, whose warm-up would look like a loss that grows.
        plain = feature if self.regularizer is None else torch.stack([*self.regularizer.values().values()]).mean()
        loss = entropy + feature if self.regularizer is not None or self.relative is not None else entropy
        with torch.no_grad():
            count = len(labels)
            found = logits.argmax(1)
            # Of mixed labels, the share that was found.
            hits = (found == labels).sum() if labels.dim() == 1 else labels.gather(1, found[:, None]).sum()
            means = torch.stack([x.double() for x in (loss, entropy, feature, plain)]) * count
            self.train_sums += torch.cat(
                (means, torch.stack((hits.double(), hits.new_tensor(count, dtype=torch.float64))))
            )
        self.log("train_loss", loss.detach())
        # Apart for who watches: their sum rises in a healthy run while smoothing and feature weight do.
        self.log("cross-entropy", entropy.detach(), prog_bar=True, logger=False)
        if self.regularizer is not None or self.relative is not None:
            self.log("feature loss", plain.detach(), prog_bar=True, logger=False)
        return loss

    def _logits(self, images: Tensor) -> Tensor:
        """The network's output; an error of its first batch says that it and the images do not fit."""
        try:
            logits = self.model(images)
        except (RuntimeError, ValueError) as error:
            if self.fits:
                raise
            raise EveryProcessError(self._misfit(images, error)) from error
        if not isinstance(logits, Tensor) or logits.shape != (len(images), self.data.num_classes):
            came = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            wanted = [len(images), self.data.num_classes]
            raise EveryProcessError(f"--arch {self.config.arch}: expected logits of shape {wanted}, got {came}")
        self.fits = True
        return logits

    def _misfit(self, images: Tensor, error: Exception) -> str:
        reason = str(error).strip().split("\n")[0]
        if "more than 1 value per channel" in reason:
            return (
                f"--arch {self.config.arch} normalises over a batch, which takes more than one value per channel, but "
                f"{len(images)} {_size(images)} leave it with one: raise --batch-size and --limit, or --image-size"
            )
        if isinstance(error, torch.cuda.OutOfMemoryError) or "allocate memory" in reason:
            return f"out of memory with batches of {len(images)} {_size(images)}: lower --batch-size ({reason})"
        return f"--arch {self.config.arch} cannot take batches of {len(images)} {_size(images)} ({reason})"

    def _feature_loss(self, regularizer: TimedRegularizer) -> Tensor:
        try:
            return regularizer.loss()
        except (TypeError, ValueError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not str(error).startswith("sfr_ext."):
                raise  # no word on the layers, but a fault in the arithmetic
            raise EveryProcessError(f"--layers {','.join(regularizer.layers)}: {error}") from error

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        if (batch_idx + 1) % self.config.accumulate == 0 or batch_idx + 1 == self.batches_per_epoch:
            self.smoothing.step()
            if self.average is not None:
                self.average.update_parameters(self.model)
        waits = self.device.type != "cpu" or self.trainer.world_size > 1
        if not waits or (batch_idx + 1) % LOOK_EVERY == 0:
            loss = self.trainer.strategy.reduce(self.train_sums[0].clone(), reduce_op="sum")
            self._require_finite("training loss", float(loss))

    def _require_finite(self, name: str, value: float) -> None:
        """A run that has lost its way ends before the next checkpoint. All processes see the same sums."""
        if math.isfinite(value):
            return
        epoch, kept = self.current_epoch + 1, self.current_epoch
        what = f"the checkpoint after epoch {kept} is kept" if kept else "there is no checkpoint yet"
        raise EveryProcessError(
            f"the {name} is not finite ({value}) in epoch {epoch}, at step {self.trainer.global_step}; {what}; "
            "a lower --lr or another --precision may help"
        )

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        images, labels = batch
        logits = self.tested()(images)
        loss = F.cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction="sum")
        real = labels != IGNORED
        hits = ((logits.argmax(1) == labels) & real).sum()
        self.test_sums += torch.stack((loss.double(), hits.double(), real.sum().double()))

    def tested(self) -> nn.Module:
        """The network whose accuracy counts: the averaged one, if there is one."""
        network: nn.Module = self.model if self.average is None else self.average.module
        return network

    def take_means(self) -> dict[str, float]:
        """The epoch's means over all devices; the sums start again at 0."""
        strategy = self.trainer.strategy
        loss, entropy, feature, plain, hits, count = strategy.reduce(self.train_sums, reduce_op="sum").tolist()
        test_loss, test_hits, test_count = strategy.reduce(self.test_sums, reduce_op="sum").tolist()
        self.train_sums.zero_()
        self.test_sums.zero_()
        self._require_finite("training loss", loss)
        part = "test" if self.data.held_out is None else "val"
        if test_count == 0:  # between two tests
            test_loss, test_hits, test_count = math.nan, math.nan, 1.0
        else:
            self._require_finite("test loss" if part == "test" else "validation loss", test_loss)
        self.plain_feature_loss = plain / count
        return {
            "train_loss": loss / count,
            "train_cross_entropy": entropy / count,
            "train_feature_loss": feature / count,
            "train_accuracy": hits / count,
            f"{part}_loss": test_loss / test_count,
            f"{part}_accuracy": test_hits / test_count,
        }

    @property
    def compared(self) -> list[str] | None:
        """The layers that the losses of the arm look at; None where there are none."""
        hooked = self.regularizer or (self.relative if isinstance(self.relative, OwnTeacher) else None)
        return None if hooked is None else list(hooked.layers)

    def emd_seconds(self) -> float:
        """Seconds in the feature loss, forward and backward, on this device, since this process began."""
        return 0.0 if self.regularizer is None else self.regularizer.stopwatch.seconds()


def seed_everything(seed: int, epoch: int, rank: int) -> None:
    """Set all generators, those of every device too, to a state of this epoch and process."""
    for_numpy, for_torch = np.random.SeedSequence((seed, epoch, rank)).generate_state(2, np.uint64).tolist()
    random.seed(for_torch)
    np.random.seed(for_numpy % 2**32)
    torch.manual_seed(for_torch)


def _size(images: Tensor) -> str:
    channels, height, width = images.shape[1:]
    return f"image{'s' if len(images) > 1 else ''} of {channels} x {height} x {width}"
