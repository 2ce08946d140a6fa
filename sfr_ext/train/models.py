"""Small ResNets for small images, and the names of torchvision and timm when those are installed.

He, Zhang, Ren, Sun: "Deep Residual Learning for Image Recognition", CVPR 2016; the CIFAR variants are its
section 4.2.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable

import torch.nn.functional as F
from torch import Tensor, nn

from .config import near_misses
from .errors import TrainError, UsageError
from .optional import import_optional


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions and a shortcut, a 1 x 1 convolution where the shape changes."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """A 3 x 3 stem and stages ``layer1``, ``layer2``, ...: each halves the size (but the first) and widens.

    Args:
        widths: channels of each stage.
        blocks: blocks of each stage.
        channels: channels of the images.
        num_classes: outputs.
    """

    def __init__(self, widths: tuple[int, ...], blocks: int, channels: int, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, widths[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.stages = tuple(f"layer{i + 1}" for i in range(len(widths)))
        width_in = widths[0]
        for i, (name, width) in enumerate(zip(self.stages, widths, strict=True)):
            strides = [1 if i == 0 else 2] + [1] * (blocks - 1)
            stage = nn.Sequential()
            for stride in strides:
                stage.append(BasicBlock(width_in, width, stride))
                width_in = width
            self.add_module(name, stage)
        self.fc = nn.Linear(width_in, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[B, num_classes]`` of images ``[B, channels, H, W]``."""
        x = F.relu(self.bn1(self.conv1(x)))
        for name in self.stages:
            x = getattr(self, name)(x)
        return self.fc(x.mean((2, 3)))


# Stage widths and blocks per stage. CIFAR variants have 6 n + 2 layers, n blocks in each of three stages.
RESNETS: dict[str, tuple[tuple[int, ...], int]] = {f"resnet{6 * n + 2}": ((16, 32, 64), n) for n in (1, 2, 3, 4, 5)}
RESNETS["resnet18"] = ((64, 128, 256, 512), 2)


def build_model(
    arch: str, channels: int, num_classes: int, pretrained: bool = False
) -> tuple[nn.Module, tuple[str, ...] | None]:
    """The network by name, and the names of its stages from shallow to deep (None when unknown).

    Names of this module come first, then torchvision's classifiers, then timm's models, as far as those are installed.
    Weights are random and nothing is downloaded, but with ``pretrained``, which is for timm's models alone. A
    torchvision network gets grey images repeated to three channels.

    Raises:
        TrainError: no one knows the name, or has weights for it.
    """
    refuse_unknown(arch, pretrained)
    if pretrained:
        found = _timm_model(arch, channels, num_classes, pretrained=True)
        if not isinstance(found, nn.Module):
            raise TrainError(f"--pretrained is for timm's models, and --arch {arch!r} is none here: {found}")
        return found, _stages(found)
    if arch in RESNETS:
        widths, blocks = RESNETS[arch]
        model = ResNet(widths, blocks, channels, num_classes)
        return model, model.stages
    factory = _torchvision_model if _not_in_torchvision(arch) is None else _timm_model
    found = factory(arch, channels, num_classes)
    assert isinstance(found, nn.Module)
    return found, _stages(found)


def refuse_unknown(arch: str, pretrained: bool = False) -> None:
    """Nothing to say of a name that `build_model` takes; nothing is built.

    Raises:
        TrainError: no one knows the name.
    """
    if pretrained:
        if arch in RESNETS:
            raise UsageError(f"--pretrained is for timm's models, and --arch {arch!r} is none here: it is our own")
        if (reason := _not_in_timm(arch)) is not None:
            near = near_misses(arch, _known("timm"))
            raise TrainError(f"--pretrained is for timm's models, and --arch {arch!r} is none here: {reason}{near}")
        return
    refusals = [] if arch in RESNETS else [_not_in_torchvision(arch), _not_in_timm(arch)]
    if refusals and None not in refusals:
        raise TrainError(
            f"--arch {arch!r} is neither one of {', '.join(RESNETS)} nor a name known to an installed torchvision or "
            f"timm ({'; '.join(map(str, refusals))}){near_misses(arch, _known())}"
        )


def refuse_unknown_layers(layers: Iterable[str], model: nn.Module) -> None:
    """Raises:
    TrainError: the network has no layer of one of these names.
    """
    known = [name for name, _ in model.named_modules() if name]
    for layer in layers:
        if layer not in known:
            raise UsageError(f"--layers: the network has no layer {layer!r}{near_misses(layer, known)}")


def _known(*packages: str) -> list[str]:
    """The names of networks: our own and those of what is installed, or those of one package."""
    names = [] if packages else list(RESNETS)
    for package in packages or ("torchvision.models", "timm"):
        library, _ = import_optional(package)
        names += [] if library is None else library.list_models()
    return names


def _not_in_torchvision(arch: str) -> str | None:
    models, reason = import_optional("torchvision.models")
    if models is None:
        return str(reason)
    if arch not in models.list_models():
        return "torchvision has none of that name"
    # Its packages hold detectors, segmenters, networks for video, ...; some of them load weights unasked.
    packages = [part for part in vars(models).values() if inspect.ismodule(part) and hasattr(part, "__path__")]
    if any(arch in models.list_models(module=package) for package in packages):
        return f"torchvision's {arch} is no classifier of images that can be trained here"
    return None


def _torchvision_model(arch: str, channels: int, num_classes: int) -> nn.Module:
    """The classifier of that name, which torchvision has."""
    models, _ = import_optional("torchvision.models")
    assert models is not None
    # These two give more outputs in training than the logits, unless told not to.
    more = {"aux_logits": False, "init_weights": True} if arch in ("googlenet", "inception_v3") else {}
    model: nn.Module = models.get_model(arch, weights=None, num_classes=num_classes, **more)
    if channels == 1:
        model.register_forward_pre_hook(_grey_to_rgb)
    return model


def _grey_to_rgb(module: nn.Module, args: tuple[Tensor]) -> Tensor:
    return args[0].expand(-1, 3, -1, -1)


def _stages(model: nn.Module) -> tuple[str, ...] | None:
    """The usual names of a ResNet's stages, if the network has them."""
    stages = tuple(f"layer{i}" for i in (1, 2, 3, 4))
    return stages if all(hasattr(model, stage) for stage in stages) else None


def _not_in_timm(arch: str) -> str | None:
    timm, reason = import_optional("timm")
    if timm is None:
        return str(reason)
    return None if timm.is_model(arch) else "timm has none of that name"


def _timm_model(arch: str, channels: int, num_classes: int, pretrained: bool = False) -> nn.Module | str:
    """The model of that name, which timm has; or why its weights cannot be had."""
    timm, _ = import_optional("timm")
    assert timm is not None
    try:
        model: nn.Module = timm.create_model(arch, pretrained=pretrained, num_classes=num_classes, in_chans=channels)
    except (OSError, RuntimeError) as error:
        if not pretrained:
            raise
        return f"its weights cannot be had ({str(error).splitlines()[0]})"
    return model
