"""A training step of the demo's network, and the EMD loss's share of it."""

from __future__ import annotations

import statistics
from typing import Any

import torch

import sfr_ext
from sfr_ext.train.models import build_model
from sfr_ext.train.stopwatch import Stopwatch, TimedRegularizer

from ..harness.results import Table, Verdict
from ..harness.row import own_row, set_ratios
from ..harness.run import Run

# What a training step is timed with: as `sfr-ext train` has it, as the class comes, and cheaper.
SETTINGS: dict[str, dict[str, Any]] = {
    ', solver="exact"': {"solver": "exact"},
    "": {},
    ", tol=1e-2": {"tol": 1e-2},
    ', pairs="last"': {"pairs": "last"},
    ', pairs="last", tol=1e-2': {"pairs": "last", "tol": 1e-2},
}


def training(run: Run) -> Table:
    """The EMD loss's share of a training step of the demo's network: forward, backward, SGD."""
    images, batch = 28, 4 if run.dry else 128
    description = f"a step of SFR on resnet8, {batch} random images of {images} x {images}"
    table = Table("training", description)
    trainings = [Training(run.device.name, images, batch, options) for options in SETTINGS.values()]
    for name in SETTINGS:
        whole = own_row(f"training step{name}")
        table.rows += [whole, own_row(f"of it, EMD loss{name}", base=whole.name)]
    for each in trainings:
        each.step()
        each.step()
    for round_ in range(run.rounds):
        table.calibration.append(run.calibration.milliseconds())
        for each, whole, loss in zip(trainings, table.rows[::2], table.rows[1::2], strict=True):
            before = each.watch.seconds()
            whole.take(round_, run.device.until_done, each.step)
            loss.milliseconds.append(1e3 * (each.watch.seconds() - before))
            loss.rounds.append(round_)
    for each in trainings:
        each.sfr.remove()
    set_ratios(table.rows)
    share = 100 * statistics.median(table.rows[1].ratios)
    table.verdicts = [Verdict("the exact EMD loss takes under 15 % of a training step", f"{share:.1f} %", share < 15)]
    return table


class Training:
    """One network, and its step with SFR."""

    def __init__(self, device: str, images: int, batch: int, options: dict[str, Any]) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(batch, 1, images, images, generator=generator).to(device)
        self.target = torch.randint(10, (batch,), generator=generator).to(device)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model, stages = build_model("resnet8", channels=1, num_classes=10)
        self.model = model.to(device)
        assert stages is not None
        self.smooth = sfr_ext.DynamicLabelSmoothing(0.1, schedule="constant")
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, nesterov=True, weight_decay=5e-4)
        self.sfr = TimedRegularizer(model, stages, **options)
        self.watch: Stopwatch = self.sfr.stopwatch

    def step(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        (self.smooth(self.model(self.x), self.target) + self.sfr.loss()).backward()
        self.optimizer.step()
