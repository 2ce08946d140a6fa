"""One row per epoch, kept in the checkpoint and written as OUT/metrics.csv."""

from __future__ import annotations

import csv
import math
import reprlib
import time
from pathlib import Path
from typing import Any

from .best import Best
from .engine import L
from .files import atomic_write
from .module import Classifier


class Records(L.Callback):
    """Collects, prints and writes the rows; a resumed run continues the list."""

    def __init__(self, path: Path, say: bool, best: Best | None = None) -> None:
        self.path = path
        self.say = say
        self.best = best
        self.rows: list[dict[str, float]] = []
        self._begin = 0.0
        self._emd_before = 0.0

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._begin = time.perf_counter()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, Classifier)
        means = pl_module.take_means()
        emd = pl_module.emd_seconds()
        regularizer = pl_module.regularizer
        row = {
            "epoch": trainer.current_epoch + 1,
            "step": trainer.global_step,
            **means,
            "smoothing": pl_module.smoothing.current,
            "feature_weight": 0.0 if regularizer is None else regularizer.current_weight,
            "learning_rate": trainer.optimizers[0].param_groups[0]["lr"],
            "seconds": time.perf_counter() - self._begin,
            "emd_seconds": emd - self._emd_before,
        }
        self._emd_before = emd
        self.rows.append(row)
        part, words = ("test", "test") if "test_accuracy" in row else ("val", "validation")
        if self.best is not None:
            self.best.look(pl_module, int(row["epoch"]), row[f"{part}_accuracy"])
        if trainer.is_global_zero:
            write_rows(self.path, self.rows)
            told = {name: value for name, value in row.items() if name != "step" and not math.isnan(value)}
            for board in trainer.loggers[1:]:  # the first one logs steps
                board.log_metrics(told, int(row["step"]))
            if self.say:
                # Apart, and the second without its factor: what rises while the factor does would look like a fault.
                tested = (
                    ""
                    if math.isnan(row[f"{part}_accuracy"])
                    else f"{words} accuracy {100 * row[f'{part}_accuracy']:.2f} %  "
                )
                feature = "" if regularizer is None else f"feature loss {pl_module.plain_feature_loss:.3f}  "
                print(
                    f"epoch {row['epoch']}/{trainer.max_epochs}  cross-entropy {row['train_cross_entropy']:.3f}  "
                    f"{feature}"
                    f"{tested}{row['seconds']:.1f} s",
                    flush=True,
                )

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows = list(state_dict["rows"])

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # A run that was killed before it wrote the last row has it in its checkpoint.
        if trainer.is_global_zero and self.rows:
            write_rows(self.path, self.rows)


def write_rows(path: Path, rows: list[dict[str, float]]) -> None:
    """All rows as CSV, the keys of the first as header."""
    with atomic_write(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows({k: f"{v:.6g}" for k, v in row.items()} for row in rows)


def read_rows(path: Path) -> list[dict[str, float]]:
    """The rows of a ``metrics.csv``.

    Raises:
        ValueError, csv.Error: it is none; where a field is no number, that is named.
    """
    with path.open(newline="") as file:
        return [
            {name: _number(number, name, text) for name, text in row.items()}
            for number, row in enumerate(csv.DictReader(file), 1)
        ]


def _number(row: int, name: str | None, text: str | None) -> float:
    if name is None or text is None:
        raise ValueError(f"row {row} has {'more' if name is None else 'fewer'} fields than the head")
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"row {row}: {name} must be a number, got {reprlib.repr(text)}") from None
