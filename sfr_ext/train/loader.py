"""Batches for Lightning, on any number of devices, in an order fixed by seed and epoch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Sampler

from .augment import crop_and_flip
from .data import ImageData
from .engine import L

IGNORED = -100  # label of the places that only fill up a device's share of the test images

Batch = tuple[Tensor, Tensor]


class TensorImages(Dataset[Batch]):
    """Images and labels in memory, fetched a batch at a time; index -1 gives a place filler."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images = images
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: list[int]) -> Batch:
        index = torch.tensor(indices)
        filler = index < 0
        index = index.clamp(min=0)
        return self.images[index], self.labels[index].masked_fill(filler, IGNORED)


class Share(Sampler[int]):
    """Every ``world``-th index from ``rank``; all ranks get equally many, filled up with -1."""

    def __init__(self, length: int, world: int, rank: int) -> None:
        self.length, self.world, self.rank = length, world, rank

    def __len__(self) -> int:
        return math.ceil(self.length / self.world)

    def __iter__(self) -> Iterator[int]:
        for i in range(len(self)):
            index = i * self.world + self.rank
            yield index if index < self.length else -1


class ImageModule(L.LightningDataModule):
    """Serves an :class:`ImageData` to a Lightning trainer, normalised and augmented on the device."""

    def __init__(self, data: ImageData, batch_size: int, seed: int, augment: bool) -> None:
        super().__init__()
        self.data = data
        self.batch_size = batch_size
        self.seed = seed
        self.augment = augment
        self.mean = torch.tensor(data.mean).view(1, -1, 1, 1)
        self.std = torch.tensor(data.std).view(1, -1, 1, 1)

    def steps_per_epoch(self, world: int) -> int:
        """Optimiser steps of one epoch on ``world`` devices."""
        share = math.ceil(len(self.data.train_labels) / world)
        return max(1, share // self.batch_size)

    def train_dataloader(self) -> DataLoader[Batch]:
        trainer = self._trainer()
        dataset = TensorImages(self.data.train_images, self.data.train_labels)
        # Shuffled by seed + epoch, not by a global state, so that a resumed run continues in the same order.
        sampler: DistributedSampler[Batch] = DistributedSampler(
            dataset, trainer.world_size, trainer.global_rank, shuffle=True, seed=self.seed
        )
        # An incomplete last batch is dropped: batch statistics of very few images are noise.
        return DataLoader(
            dataset,
            self.batch_size,
            sampler=sampler,
            drop_last=len(sampler) >= self.batch_size,
            collate_fn=_whole_batch,
        )

    def val_dataloader(self) -> DataLoader[Batch]:
        trainer = self._trainer()
        dataset = TensorImages(self.data.test_images, self.data.test_labels)
        sampler = Share(len(dataset), trainer.world_size, trainer.global_rank)
        return DataLoader(dataset, self.batch_size, sampler=sampler, collate_fn=_whole_batch)

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        images, labels = batch
        trainer = self._trainer()
        if trainer.training and self.augment:
            # A state of its own for each step: a resumed run draws what an uninterrupted one would have
            # drawn.
            step = trainer.global_step * trainer.world_size + trainer.global_rank
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
            images = crop_and_flip(images, self.data.padding, self.data.flip, generator)
        dtype = torch.float64 if trainer.precision == "64-true" else torch.float32
        mean, std = self.mean.to(images.device, dtype), self.std.to(images.device, dtype)
        return (images.to(dtype) / 255 - mean) / std, labels

    def _trainer(self) -> L.Trainer:
        if self.trainer is None:
            raise RuntimeError("ImageModule serves batches to a trainer only")
        return self.trainer


def _whole_batch(batch: Any) -> Any:
    """Nothing to collate: ``__getitems__`` has fetched the batch in one piece."""
    return batch
