"""What SFR adds to a training step, in time of the processor.

``python -m benchmarks.studies.step_share --rounds 31`` takes steps of a resnet8 on 128 random images of 28 x 28 in
turns, without SFR and with it in several settings, in one thread; ``--network resnet18`` takes the ResNet-18 of
ImageNet, on images of 112 x 112. Of each step the time of this thread is read, which other processes of the machine
disturb less than the clock; a share is ``1 - without / with`` of the two steps of one round, and the median of rounds
is printed, with the quarters beside it, and the share by the least times of all rounds, which others disturb least.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sfr_ext
from sfr_ext.train.models import ResNet, build_model

SETTINGS: dict[str, dict[str, Any] | None] = {
    "without": None,
    'solver="exact"': {"solver": "exact"},
    "as the class comes": {},
    'objective="entropic", tol=1e-2': {"objective": "entropic", "tol": 1e-2},
    'solver="exact", pairs="last"': {"solver": "exact", "pairs": "last"},
    'distance="l2"': {"distance": "l2"},
}


class ForPhotographs(ResNet):
    """ResNet-18 as for ImageNet: a stem that makes a quarter of either side, then the stages."""

    def __init__(self) -> None:
        super().__init__((64, 128, 256, 512), 2, 3, 1000)
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        for name in self.stages:
            x = getattr(self, name)(x)
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.studies.step_share", description=__doc__)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--batch", type=int, default=128, help="images in a step")
    parser.add_argument("--network", choices=("resnet8", "resnet18"), default="resnet8")
    parser.add_argument("--few", action="store_true", help="the exact solver alone")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    settings = dict(list(SETTINGS.items())[:2]) if options.few else SETTINGS
    steps = {name: step_of(setting, options.batch, options.network) for name, setting in settings.items()}
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for round_ in range(options.rounds + 2):
        for name, step in steps.items():
            begin = time.thread_time()
            step()
            if round_ >= 2:
                taken[name].append(time.thread_time() - begin)
    print("| SFR | step, ms | its share | quarters | by the least times |")
    print("|---|---|---|---|---|")
    for name, seconds in taken.items():
        shares = [100 * (1 - less / more) for less, more in zip(taken["without"], seconds, strict=True)]
        low, middle, high = statistics.quantiles(shares, n=4) if len(shares) > 1 else 3 * shares
        least = 100 * (1 - min(taken["without"]) / min(seconds))
        spread = f"{low:.0f} to {high:.0f} %"
        cells = (name, f"{1e3 * statistics.median(seconds):.0f}", f"{middle:.0f} %", spread, f"{least:.0f} %")
        print("| " + " | ".join(cells) + " |")
    return 0


def step_of(setting: dict[str, Any] | None, batch: int, network: str) -> Callable[[], None]:
    """A step of a network of its own: forward, backward, SGD."""
    generator = torch.Generator().manual_seed(0)
    shape = (1, 28, 28) if network == "resnet8" else (3, 112, 112)
    images, labels = torch.randn(batch, *shape, generator=generator), torch.arange(batch) % 10
    torch.manual_seed(0)
    model: nn.Module
    if network == "resnet8":
        model, stages = build_model(network, channels=1, num_classes=10)
    else:
        model = ForPhotographs()
        stages = model.stages
    assert stages is not None
    smooth = sfr_ext.DynamicLabelSmoothing(0.1, schedule="constant")
    sfr = None if setting is None else sfr_ext.SelfFeatureRegularizer(model, stages, **setting)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, nesterov=True, weight_decay=5e-4)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss = smooth(model(images), labels)
        if sfr is not None:
            loss = loss + sfr.loss()
        loss.backward()
        optimizer.step()

    return step


if __name__ == "__main__":
    raise SystemExit(main())
