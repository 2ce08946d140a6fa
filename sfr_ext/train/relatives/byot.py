"""Be Your Own Teacher: classifiers on the stages, taught by the last one (BYOT)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...layouts import Transform
from ...sfr.features import features_of
from ...sfr.hooks import Hooks
from .base import Relative, tempered_kl

_WHERE = "--arm byot"


class OwnTeacher(Relative):
    """A head on each shallow stage ``i``; the network's own classifier ``C`` teaches them:

    .. code-block:: text

        loss = (1 - a) sum_i CE(p_i, y) + a T^2 sum_(i < C) KL( p_C || p_i ) + w sum_(i < C) |f_i - f_C|^2

    ``p_i``: predictions, tempered by T in KL, the last one's among the first sum; ``f_i``: pooled features before the
    classifier; no gradient to the last one but by its own cross-entropy. Zhang, Song, Gao, Chen, Bao, Ma: "Be Your Own
    Teacher", ICCV 2019; a = 0.1, T = 3 and w as in luanyunteng/pytorch-be-your-own-teacher, where it is 1e-6 on a sum
    over the 128 images of a batch: here, on the mean over images, 1.28e-4.

    A head averages its stage to the last one's size, then has a 3 x 3 convolution to as many channels, batch
    normalisation, the mean over places, and a linear layer. (Theirs have a chain of convolutions.) Heads are no part
    of the network that is tested.

    Args:
        model: the network.
        layers: the stages, shallow to deep, with what makes maps of their outputs.
        image: one ``[C, H, W]`` like those of the run.
        num_classes: of the labels.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: dict[str, Transform | None],
        image: Tensor,
        num_classes: int,
        share: float = 0.1,
        temperature: float = 3.0,
        hint: float = 1.28e-4,
    ) -> None:
        super().__init__()
        self.share, self.temperature, self.hint = share, temperature, hint
        self.layers = tuple(layers)
        self.transforms = layers
        self.hooks = Hooks(_WHERE, model, layers)
        *shallow, deep = self._shapes(model, image)
        self.heads = nn.ModuleList(Head(shape[1], deep, num_classes) for shape in shallow)

    def forward(self, images: Tensor, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        *shallow, deep = self._maps()
        last = deep.mean((2, 3)).detach()
        entropy = F.cross_entropy(logits, labels)
        divergence = hint = logits.new_zeros(())
        for head, x in zip(self.heads, shallow, strict=True):
            feature, found = head(x)
            entropy = entropy + F.cross_entropy(found, labels)
            divergence = divergence + tempered_kl(logits, found, self.temperature)
            hint = hint + (feature - last).square().sum(1).mean()
        return (1 - self.share) * entropy + self.share * divergence, self.hint * hint

    def remove(self) -> None:
        self.hooks.remove()

    def _maps(self) -> list[Tensor]:
        outputs, _ = self.hooks.take()
        features = features_of(_WHERE, outputs, self.transforms)
        for name, feature in features.items():
            if feature.dim() != 4:
                raise ValueError(
                    f"{_WHERE}: expected layer {name!r} to give maps [B, C, H, W], got {list(feature.shape)}"
                )
        return list(features.values())

    @torch.no_grad()
    def _shapes(self, model: nn.Module, image: Tensor) -> list[torch.Size]:
        """Of the maps, by a forward of nothing; the network is as it was."""
        like = next(model.parameters(), image)
        modes = {module: module.training for module in model.modules()}
        try:
            model.eval()(torch.zeros(2, *image.shape, device=like.device, dtype=like.dtype))
            return [x.shape for x in self._maps()]
        finally:
            for module, mode in modes.items():
                module.training = mode


class Head(nn.Module):
    """From a shallow map to features like the deep one's, and to logits."""

    def __init__(self, channels: int, deep: torch.Size, num_classes: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.AdaptiveAvgPool2d((deep[2], deep[3])),
            nn.Conv2d(channels, deep[1], 3, padding=1, bias=False),
            nn.BatchNorm2d(deep[1]),
            nn.ReLU(),
        )
        self.classifier = nn.Linear(deep[1], num_classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        feature = self.body(x).mean((2, 3))
        return feature, self.classifier(feature)
