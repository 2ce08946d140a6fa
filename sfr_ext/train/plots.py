"""OUT/curves.png: losses, accuracies and time by epoch."""

from __future__ import annotations

import math
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .files import atomic_write


def plot_curves(path: Path, runs: dict[str, list[dict[str, float]]]) -> None:
    """Draw the rows (see ``metrics.csv``) of one or more runs, by their names, into a PNG file."""
    # A Figure of its own, without pyplot: no window system, no global state.
    figure = Figure(figsize=(13, 4), layout="constrained")
    losses, accuracies, seconds = figure.subplots(1, 3)
    for i, (name, rows) in enumerate(runs.items()):
        epochs = [row["epoch"] for row in rows]
        colour = f"C{i}"

        def curve(key: str, rows: list[dict[str, float]] = rows, scale: float = 1.0) -> list[float]:
            return [scale * row[key] for row in rows]

        part, words = ("test", "test") if "test_loss" in rows[0] else ("val", "validation")
        looks = [row for row in rows if not math.isnan(row[f"{part}_loss"])]
        looked = [row["epoch"] for row in looks]

        losses.plot(epochs, curve("train_cross_entropy"), f"{colour}.-", label=f"{name}: training cross-entropy")
        if any(row["train_feature_loss"] for row in rows):
            losses.plot(epochs, curve("train_feature_loss"), f"{colour}.:", label=f"{name}: feature loss, weighted")
        losses.plot(looked, curve(f"{part}_loss", looks), f"{colour}.--", label=f"{name}: {words} cross-entropy")
        accuracies.plot(epochs, curve("train_accuracy", scale=100), f"{colour}.-", label=f"{name}: training")
        accuracies.plot(looked, curve(f"{part}_accuracy", looks, 100), f"{colour}.--", label=f"{name}: {words}")
        seconds.plot(epochs, curve("seconds"), f"{colour}.-", label=f"{name}: all")
        if any(row["emd_seconds"] for row in rows):
            seconds.plot(epochs, curve("emd_seconds"), f"{colour}.:", label=f"{name}: feature loss")
    for axes, title in ((losses, "loss"), (accuracies, "accuracy, %"), (seconds, "seconds per epoch")):
        axes.set_title(title)
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    seconds.set_ylim(bottom=0)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=110)
