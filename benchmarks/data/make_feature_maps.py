"""Trains a tiny network on Fashion-MNIST and saves some of its feature maps for the benchmarks.

Random unit vectors all lie about equally far apart; maps of a trained network do not. The saved file is part
of the repository, so nothing has to be trained to run the benchmarks;
``python -m benchmarks.data.make_feature_maps`` makes it anew.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfr_ext import group_channels
from sfr_ext.train.config import TrainConfig
from sfr_ext.train.data import ImageData, load_data

from .workloads import FEATURE_MAPS

SHALLOW, DEEP = 32, 64


def block(channels_in: int, channels_out: int, stride: int) -> nn.Sequential:
    convolution = nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(channels_out), nn.ReLU())


class Net(nn.Module):
    """28 x 28 images; a shallow map of 14 x 14, a deep one of 7 x 7."""

    def __init__(self) -> None:
        super().__init__()
        self.shallow = nn.Sequential(block(1, SHALLOW, 2), block(SHALLOW, SHALLOW, 1))
        self.deep = nn.Sequential(block(SHALLOW, DEEP, 2), block(DEEP, DEEP, 1))
        self.head = nn.Linear(DEEP, 10)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        shallow = self.shallow(images)
        deep = self.deep(shallow)
        return self.head(deep.mean((2, 3))), shallow, deep


def train(images: Tensor, labels: Tensor, epochs: int) -> Net:
    net, batch = Net(), 128
    optimizer = torch.optim.AdamW(net.parameters(), 2e-3)
    steps = epochs * (len(images) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for epoch in range(epochs):
        for chosen in torch.randperm(len(images)).split(batch)[: steps // epochs]:
            loss = F.cross_entropy(net(images[chosen])[0], labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        print(f"epoch {epoch + 1}: loss of the last batch {loss.item():.3f}", flush=True)
    return net.eval()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data.make_feature_maps", description=__doc__)
    parser.add_argument("--data-dir", type=Path, help="where the data set lies")
    parser.add_argument("--pairs", type=int, default=16, help="images whose maps are saved (default: 16)")
    parser.add_argument("--epochs", type=int, default=3, help="default: 3")
    parser.add_argument("--out", type=Path, default=FEATURE_MAPS)
    options = parser.parse_args()

    torch.manual_seed(0)
    data = load_data(TrainConfig(data="fashion-mnist", data_dir=options.data_dir))
    assert isinstance(data, ImageData)
    train_images, test_images = (
        (images.float() / 255 - data.mean[0]) / data.std[0] for images in (data.train_images, data.test_images)
    )
    net = train(train_images, data.train_labels, options.epochs)
    with torch.no_grad():
        correct = [
            (net(images)[0].argmax(1) == labels).float()
            for images, labels in zip(test_images.split(1000), data.test_labels.split(1000), strict=True)
        ]
        print(f"test accuracy {100 * torch.cat(correct).mean().item():.2f} %")
        _, shallow, deep = net(test_images[: options.pairs])
    pooled, groups = F.avg_pool2d(shallow, 2).half().numpy(), group_channels(deep, SHALLOW).half().numpy()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(options.out, shallow=pooled, deep=groups)
    size = options.out.stat().st_size
    print(f"written: {options.out}, {size} bytes, shallow {pooled.shape}, deep {groups.shape}")


if __name__ == "__main__":
    main()
