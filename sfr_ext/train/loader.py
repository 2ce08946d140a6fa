"""Batches for Lightning, on any number of devices, in an order fixed by seed and epoch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Sampler

from .augment import crop_and_flip
from .data import FolderData, ImageData
from .engine import L
from .errors import TrainError
from .folder import FileImages

IGNORED = -100  # label of the places that only fill up a device's share of the test images

Batch = tuple[Tensor, Tensor]


class TensorImages(Dataset[Batch]):
    """Images and labels in memory, fetched a batch at a time; place -1 gives a place filler."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images = images
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: list[tuple[int, int]]) -> Batch:
        index = torch.tensor([place for _, place in indices])
        filler = index < 0
        index = index.clamp(min=0)
        return self.images[index], self.labels[index].masked_fill(filler, IGNORED)


class EpochShuffle(DistributedSampler[Any]):
    """Shuffled by seed and epoch, not by a global state: a resumed run continues in the same order.

    Gives pairs of epoch and place, for whoever draws random numbers by them in another process.
    """

    # Of a resumed run. Lightning lets its workers begin to read before it has told the sampler of the epoch.
    first_epoch = 0

    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(max(epoch, self.first_epoch))

    def __iter__(self) -> Iterator[Any]:
        return ((self.epoch, place) for place in super().__iter__())


class Share(Sampler[Any]):
    """Every ``world``-th place from ``rank``, in epoch 0; all ranks get equally many, filled up with -1."""

    def __init__(self, length: int, world: int, rank: int) -> None:
        self.length, self.world, self.rank = length, world, rank

    def __len__(self) -> int:
        return math.ceil(self.length / self.world)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for i in range(len(self)):
            place = i * self.world + self.rank
            yield 0, place if place < self.length else -1


class ImageModule(L.LightningDataModule):
    """Serves a data set to a Lightning trainer, normalised on the device; images in memory are augmented there too."""

    def __init__(self, data: ImageData | FolderData, batch_size: int, seed: int, augment: bool, workers: int) -> None:
        super().__init__()
        self.data = data
        self.batch_size = batch_size
        self.seed = seed
        self.augment = augment
        self.workers = workers
        self.first_epoch = 0  # with which this run begins: as many as a resumed one has behind it
        self.mean = torch.tensor(data.mean).view(1, -1, 1, 1)
        self.std = torch.tensor(data.std).view(1, -1, 1, 1)

    def batches_per_epoch(self, world: int) -> int:
        """Training batches of one epoch on each of ``world`` devices."""
        share = math.ceil(len(self.data.train_labels) / world)
        return max(1, share // self.batch_size)

    def train_dataloader(self) -> DataLoader[Batch]:
        trainer = self._trainer()
        dataset: Dataset[Any]
        if isinstance(self.data, FolderData):
            dataset = FileImages(self.data.train, self.data.size, self.seed, self.augment, IGNORED)
        else:
            dataset = TensorImages(self.data.train_images, self.data.train_labels)
        sampler = EpochShuffle(dataset, trainer.world_size, trainer.global_rank, shuffle=True, seed=self.seed)
        sampler.first_epoch = self.first_epoch
        sampler.set_epoch(self.first_epoch)
        # An incomplete last batch is dropped: batch statistics of very few images are noise.
        return self._loader(dataset, sampler, drop_last=len(sampler) >= self.batch_size)

    def val_dataloader(self) -> DataLoader[Batch]:
        """What is looked at after each epoch: the images that are held out, or the test images where none are."""
        trainer = self._trainer()
        data = self.data
        if data.held_out is None:
            dataset = self._test_images()
        elif isinstance(data, FolderData):
            dataset = FileImages(data.held_out, data.size, self.seed, False, IGNORED)
        else:
            dataset = TensorImages(*data.held_out)
        share = Share(len(dataset), trainer.world_size, trainer.global_rank)  # type: ignore[arg-type]
        return self._loader(dataset, share, drop_last=False)

    def test_batches(self) -> DataLoader[Batch]:
        """All test images, for one process alone."""
        return self._loader(self._test_images(), Share(len(self.data.test_labels), 1, 0), drop_last=False)

    def plain_batches(self, most: int) -> DataLoader[Batch]:
        """Training images without augmentation, ``most`` at most, evenly from all, for one process alone."""
        data = self.data
        dataset: Dataset[Any]
        if isinstance(data, FolderData):
            dataset = FileImages(data.train, data.size, self.seed, False, IGNORED)
        else:
            dataset = TensorImages(data.train_images, data.train_labels)
        count = len(data.train_labels)
        chosen = torch.linspace(0, count - 1, min(most, count), dtype=torch.float64).round().long().tolist()
        return self._loader(dataset, [(0, place) for place in chosen], drop_last=False)

    def _test_images(self) -> Dataset[Any]:
        if isinstance(self.data, FolderData):
            return FileImages(self.data.test, self.data.size, self.seed, False, IGNORED)
        return TensorImages(self.data.test_images, self.data.test_labels)

    def _loader(self, dataset: Dataset[Any], sampler: Sampler[Any] | list[Any], drop_last: bool) -> DataLoader[Batch]:
        return DataLoader(
            dataset,
            self.batch_size,
            sampler=sampler,
            drop_last=drop_last,
            collate_fn=_whole_batch,
            num_workers=self.workers,
            pin_memory=self.workers > 0 and torch.cuda.is_available(),
        )

    def on_before_batch_transfer(self, batch: Batch | str, dataloader_idx: int) -> Batch:
        if isinstance(batch, str):  # a file that cannot be read
            raise TrainError(batch)
        return batch

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        images, labels = batch
        trainer = self._trainer()
        if trainer.training and self.augment and isinstance(self.data, ImageData):
            # A state of its own for each batch: a resumed run draws what an uninterrupted one would have drawn.
            batches = trainer.current_epoch * self.batches_per_epoch(trainer.world_size)
            place = batches + trainer.fit_loop.epoch_loop.batch_idx
            step = place * trainer.world_size + trainer.global_rank
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
            images = crop_and_flip(images, self.data.padding, self.data.flip, generator)
        return self.normalised(images, torch.float64 if trainer.precision == "64-true" else torch.float32), labels

    def normalised(self, images: Tensor, dtype: torch.dtype) -> Tensor:
        """What the network takes, of bytes ``[B, C, H, W]``."""
        mean, std = self.mean.to(images.device, dtype), self.std.to(images.device, dtype)
        return (images.to(dtype) / 255 - mean) / std

    def _trainer(self) -> L.Trainer:
        if self.trainer is None:
            raise RuntimeError("ImageModule serves batches to a trainer only")
        return self.trainer


def _whole_batch(batch: Any) -> Any:
    """Nothing to collate: ``__getitems__`` has fetched the batch in one piece."""
    return batch
