"""Small networks of each family, with what their layers return; the transforms that make features of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sfr_ext import layouts


class ViT(nn.Module):
    """Tokens ``[B, prefix + 16, 12]`` of images of 16 x 16."""

    def __init__(self, prefix: int = 1) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 12, 4, 4)
        self.prefix = nn.Parameter(torch.randn(1, prefix, 12))
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(12, 2, 24, 0.0, batch_first=True) for _ in range(3))
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat((self.prefix.expand(len(x), -1, -1), x), 1)
        for block in self.blocks:
            x = block(x)
        return self.head(x[:, 0])


class Merging(nn.Module):
    """Swin's patch merging: ``[B, H, W, C]`` -> ``[B, H/2, W/2, 2C]``."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.reduction = nn.Linear(4 * channels, 2 * channels)

    def forward(self, x: Tensor) -> Tensor:
        parts = (x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2])
        return self.reduction(torch.cat(parts, -1))


class Swin(nn.Module):
    """Maps with channels last: 4 x 4 x 8, 2 x 2 x 16 and 1 x 1 x 32."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 8, 4, 4)
        self.layers = nn.ModuleList((nn.Linear(8, 8), Merging(8), Merging(16)))
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).permute(0, 2, 3, 1)
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean((1, 2)))


class ConvNeXtBlock(nn.Module):
    """Depthwise 7 x 7, then layers over channels that are last within the block alone."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels)
        self.mlp = nn.Sequential(nn.Linear(channels, 4 * channels), nn.GELU(), nn.Linear(4 * channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(self.depthwise(x).permute(0, 2, 3, 1))).permute(0, 3, 1, 2)


class Inverted(nn.Module):
    """MobileNet's inverted residual with squeeze and excitation, as in EfficientNet."""

    def __init__(self, fan_in: int, fan_out: int) -> None:
        super().__init__()
        wide = 2 * fan_in
        self.expand = nn.Sequential(nn.Conv2d(fan_in, wide, 1), nn.BatchNorm2d(wide), nn.SiLU(inplace=True))
        self.depthwise = nn.Sequential(nn.Conv2d(wide, wide, 3, 2, 1, groups=wide), nn.SiLU(inplace=True))
        self.squeeze = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(wide, wide, 1), nn.Sigmoid())
        self.project = nn.Conv2d(wide, fan_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(self.expand(x))
        return self.project(x * self.squeeze(x))


class DenseBlock(nn.Module):
    """Each layer sees all before it: channels grow by 4 a layer."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(channels + 4 * i, 4, 3, 1, 1) for i in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.cat((x, layer(x).relu()), 1)
        return x


class UNet(nn.Module):
    """An encoder whose maps a decoder takes again; the layers ahead of the middle teach and are taught."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList((nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 8, 3, 2, 1), nn.Conv2d(8, 16, 3, 2, 1)))
        self.up = nn.ModuleList((nn.ConvTranspose2d(16, 8, 2, 2), nn.ConvTranspose2d(16, 4, 2, 2)))
        self.head = nn.ConvTranspose2d(8, 5, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        one = self.down[0](x).relu()
        two = self.down[1](one).relu()
        y = self.up[0](self.down[2](two).relu())
        y = self.up[1](torch.cat((y, two), 1))
        return self.head(torch.cat((y, one), 1))


class Returns(nn.Module):
    """Two stages, whose outputs are wrapped as another library would."""

    def __init__(self, wrap: Callable[[Tensor], Any], unwrap: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.stages = nn.ModuleList((Wrapped(nn.Conv2d(3, 4, 3, 2, 1), wrap), Wrapped(nn.Conv2d(4, 8, 3, 2, 1), wrap)))
        self.unwrap = unwrap
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            x = self.unwrap(stage(x))
        return self.head(x.mean((2, 3)))


class Wrapped(nn.Module):
    def __init__(self, inner: nn.Module, wrap: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.inner, self.wrap = inner, wrap

    def forward(self, x: Tensor) -> Any:
        return self.wrap(self.inner(x))


@dataclass
class Output:
    """A model output: attributes, no keys."""

    hidden: Tensor
    attention: None = None


@dataclass
class Family:
    """How a network is made, which layers count, and how features come of what they return."""

    make: Callable[[], nn.Module]
    layers: dict[str, Any]
    shapes: list[tuple[int, ...]]  # of the features, without the batch
    options: dict[str, Any] = field(default_factory=dict)


def cnn() -> nn.Module:
    widths = (3, 4, 8, 16)
    stages = [
        nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), nn.BatchNorm2d(b), nn.ReLU(inplace=True))
        for a, b in zip(widths, widths[1:], strict=False)
    ]
    return nn.Sequential(*stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5))


def convnext() -> nn.Module:
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5))
    return nn.Sequential(nn.Conv2d(3, 8, 4, 4), ConvNeXtBlock(8), nn.Conv2d(8, 16, 2, 2), ConvNeXtBlock(16), head)


def mobilenet() -> nn.Module:
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(14, 5))
    return nn.Sequential(nn.Conv2d(3, 4, 3, 1, 1), Inverted(4, 6), Inverted(6, 14), head)


def densenet() -> nn.Module:
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(14, 5))
    return nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), DenseBlock(4), nn.Conv2d(12, 6, 2, 2), DenseBlock(6), head)


class Staged(nn.Module):
    """As timm has ConvNeXt and Swin: a stem, and one module that holds all the stages, each with its downsampling."""

    def __init__(self, stem: nn.Module, stages: list[nn.Module], width: int) -> None:
        super().__init__()
        self.stem = stem
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stages(self.stem(x))
        return self.head(x.mean((1, 2) if x.shape[1] == x.shape[2] else (2, 3)))


def staged_convnext() -> nn.Module:
    def stage(a: int, b: int) -> nn.Module:
        down = nn.Identity() if a == b else nn.Sequential(nn.BatchNorm2d(a), nn.Conv2d(a, b, 2, 2))
        return nn.Sequential(down, nn.Sequential(ConvNeXtBlock(b), ConvNeXtBlock(b)))

    stem = nn.Sequential(nn.Conv2d(3, 4, 2, 2), nn.BatchNorm2d(4))
    return Staged(stem, [stage(4, 4), stage(4, 8), stage(8, 16)], 16)


class ChannelsLast(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1)


def staged_swin() -> nn.Module:
    def stage(channels: int, merges: bool) -> nn.Module:
        begin = Merging(channels // 2) if merges else nn.Identity()
        return nn.Sequential(begin, nn.Sequential(nn.Linear(channels, channels), nn.LayerNorm(channels)))

    return Staged(
        nn.Sequential(nn.Conv2d(3, 12, 2, 2), ChannelsLast()), [stage(12, False), stage(24, True), stage(48, True)], 48
    )


def blocks_mobilenet() -> nn.Module:
    """timm's: stages of blocks in one module; the stem ahead of it has a resolution of its own."""
    stem = nn.Sequential(nn.Conv2d(3, 4, 3, 1, 1), nn.BatchNorm2d(4))
    stages = [nn.Sequential(Inverted(4, 8)), nn.Sequential(Inverted(8, 16)), nn.Sequential(Inverted(16, 16))]
    return Staged(stem, stages, 16)


def features_densenet() -> nn.Module:
    """torchvision's and timm's: all in `features`, of which the last map alone comes out."""

    def transition(a: int, b: int) -> nn.Module:
        return nn.Sequential(nn.BatchNorm2d(a), nn.Conv2d(a, b, 1), nn.AvgPool2d(2))

    stages = [DenseBlock(8), transition(16, 8), DenseBlock(8), transition(16, 8), DenseBlock(8), nn.BatchNorm2d(16)]
    return Staged(nn.Identity(), [nn.Conv2d(3, 8, 3, 2, 1), *stages], 16)


def returning(wrap: Callable[[Tensor], Any], unwrap: Callable[[Any], Tensor], transform: Any) -> Family:
    return Family(lambda: Returns(wrap, unwrap), dict.fromkeys(("stages.0", "stages.1"), transform), WRAPPED)


WRAPPED = [(4, 8, 8), (8, 4, 4)]
TOKENS = [(12, 4, 4)] * 3
BLOCKS = ["blocks.0", "blocks.1", "blocks.2"]
FAMILIES: dict[str, Family] = {
    "CNN": Family(cnn, dict.fromkeys("012"), [(4, 8, 8), (8, 4, 4), (16, 2, 2)]),
    "ViT": Family(ViT, dict.fromkeys(BLOCKS, layouts.tokens()), TOKENS),
    "DeiT": Family(lambda: ViT(2), dict.fromkeys(BLOCKS, layouts.tokens(prefix=2)), TOKENS),
    "Swin": Family(
        Swin,
        dict.fromkeys(("layers.0", "layers.1", "layers.2"), layouts.nhwc),
        [(8, 4, 4), (16, 2, 2), (32, 1, 1)],
    ),
    "ConvNeXt": Family(convnext, dict.fromkeys("13"), [(8, 4, 4), (16, 2, 2)]),
    "MobileNet": Family(
        mobilenet, dict.fromkeys("012"), [(4, 16, 16), (6, 8, 8), (14, 4, 4)], {"channel_mode": "project"}
    ),
    "DenseNet": Family(densenet, dict.fromkeys("13"), [(12, 8, 8), (14, 4, 4)], {"channel_mode": "project"}),
    "ConvNeXt, staged": Family(
        staged_convnext, dict.fromkeys(("stages.0", "stages.1", "stages.2")), [(4, 8, 8), (8, 4, 4), (16, 2, 2)]
    ),
    "Swin, staged": Family(
        staged_swin,
        dict.fromkeys(("stages.0", "stages.1", "stages.2"), layouts.nhwc),
        [(12, 8, 8), (24, 4, 4), (48, 2, 2)],
    ),
    "MobileNet, staged": Family(
        blocks_mobilenet, dict.fromkeys(("stages.0", "stages.1", "stages.2")), [(8, 8, 8), (16, 4, 4), (16, 2, 2)]
    ),
    "DenseNet, staged": Family(
        features_densenet, dict.fromkeys(("stages.1", "stages.3", "stages.5")), [(16, 8, 8), (16, 4, 4), (16, 2, 2)]
    ),
    "U-Net": Family(UNet, dict.fromkeys(("down.0", "down.1", "down.2")), [(4, 8, 8), (8, 4, 4), (16, 2, 2)]),
    "tuple": returning(lambda x: (x, None), lambda y: y[0], layouts.item(0)),
    "dict": returning(lambda x: {"hidden": x}, lambda y: y["hidden"], layouts.item("hidden")),
    "model output": returning(Output, lambda y: y.hidden, layouts.item("hidden")),
}
