"""Does the feature loss fall in training, and is it the network that lowers it?

``python -m benchmarks.studies.feature_loss --out docs/figures`` trains a resnet8 on scikit-learn's digits and draws
feature_loss.png: the loss by epoch with ``channel_mode`` "match" and "project". Beside each stands the same loss of a
network that it does not reach, trained by cross-entropy alone; with "project" the projections learn all the same.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from sklearn.datasets import load_digits
from torch import Tensor

import sfr_ext
from sfr_ext.train.models import build_model

from ..harness.report import markdown

TRAINED, BATCH = 1500, 50
MODES = ("match", "project")
Curve = list[tuple[float, float]]  # feature loss and test accuracy of each epoch


def curve(mode: str, taught: bool, epochs: int, seed: int) -> Curve:
    """Of one run; ``taught``: whether the feature loss reaches the network."""
    torch.manual_seed(seed)
    digits = load_digits()
    images, labels = torch.from_numpy(digits.images).float().unsqueeze(1) / 16, torch.from_numpy(digits.target)
    model, stages = build_model("resnet8", channels=1, num_classes=10)
    assert stages is not None
    sfr = sfr_ext.SelfFeatureRegularizer(model, stages, channel_mode=mode)
    with torch.no_grad():
        model.eval()(images[:2])  # makes the projections
    network, learned = list(model.parameters()), list(sfr.parameters())
    optimizer = torch.optim.SGD([*network, *learned], lr=0.05, momentum=0.9, nesterov=True)
    rows = []
    for _ in range(epochs):
        model.train()
        losses: list[Tensor] = []
        for index in torch.randperm(TRAINED).split(BATCH):
            entropy = F.cross_entropy(model(images[index]), labels[index])
            feature = sfr.loss()
            optimizer.zero_grad()
            (entropy + feature if taught else entropy).backward(retain_graph=not taught)
            if not taught and learned:
                for parameter, gradient in zip(learned, torch.autograd.grad(feature, learned), strict=True):
                    parameter.grad = gradient
            optimizer.step()
            losses.append(feature.detach())
        model.eval()
        with torch.no_grad():
            hits = model(images[TRAINED:]).argmax(1) == labels[TRAINED:]
        rows.append((torch.stack(losses).mean().item(), hits.float().mean().item()))
    return rows


def draw(path: Path, runs: dict[tuple[str, bool], list[Curve]]) -> None:
    """The mean over the seeds, and each seed as a thin line."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for (mode, taught), curves in runs.items():
        style = f"C{MODES.index(mode)}{'-' if taught else '--'}"
        losses = torch.tensor(curves)[:, :, 0]
        epochs = range(1, losses.shape[1] + 1)
        for each in losses:
            axes.plot(epochs, each, style, alpha=0.25, linewidth=0.8)
        what = "in the loss" if taught else "cross-entropy alone"
        axes.plot(epochs, losses.mean(0), style, label=f'"{mode}", {what}')
    axes.set_title("feature loss, resnet8 on digits")
    axes.set_xlabel("epoch")
    axes.set_ylabel("mean over pairs and images")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def table(runs: dict[tuple[str, bool], list[Curve]]) -> str:
    """First and last epoch, means over the seeds."""
    rows = []
    for (mode, taught), curves in runs.items():
        mean = torch.tensor(curves).mean(0)
        cells = [f"{mean[0, 0]:.3f}", f"{mean[-1, 0]:.3f}", f"{100 * mean[-1, 1]:.1f} %"]
        rows.append([mode, "yes" if taught else "no", *cells])
    return markdown(("channel_mode", "taught", "loss, first epoch", "last epoch", "test accuracy"), rows)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.studies.feature_loss", description=__doc__)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="folder for feature_loss.png")
    options = parser.parse_args(argv)
    runs = {
        (mode, taught): [curve(mode, taught, options.epochs, seed) for seed in range(options.seeds)]
        for mode in MODES
        for taught in (True, False)
    }
    print(table(runs))
    if options.out is not None:
        draw(options.out / "feature_loss.png", runs)


if __name__ == "__main__":
    main()
