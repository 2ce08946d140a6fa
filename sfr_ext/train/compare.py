"""Finished runs side by side, from their ``result.json``."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .config import counted
from .errors import TrainError

_COLUMNS = ("run", "arm", "data", "arch", "seed", "epochs", "test accuracy", "seconds", "feature loss")


def compare(folders: Sequence[Path]) -> str:
    """A table with a row for each run; below it, where an arm has several seeds, their mean and standard deviation.

    Folders without a ``result.json`` are named at the end, so that ``runs/*`` may be given while some still run.

    Raises:
        TrainError: no folder has a ``result.json``, or one cannot be read.
    """
    unfinished = [folder for folder in folders if not (folder / "result.json").exists()]
    if len(unfinished) < len(folders):  # else the first one is told below
        folders = [folder for folder in folders if folder not in unfinished]
    results = [_read(folder) for folder in folders]
    rows = [_COLUMNS, *(_row(folder, result) for folder, result in zip(folders, results, strict=True))]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    left = [f"without a result yet: {', '.join(map(str, unfinished))}"] if unfinished else []
    return "\n".join(lines + _over_seeds(results) + left)


def _read(folder: Path) -> dict[str, Any]:
    path = folder / "result.json"
    try:
        result: dict[str, Any] = json.loads(path.read_text())
        _row(folder, result)
    except OSError as error:
        raise TrainError(f"{path} cannot be read: {error.strerror} (a run that has not finished has none)") from error
    except (ValueError, KeyError, TypeError) as error:
        raise TrainError(f"{path} is not the result of a run of sfr-ext train") from error
    return result


def _row(folder: Path, result: dict[str, Any]) -> tuple[str, ...]:
    share = result["emd_seconds"] / result["seconds"] if result["seconds"] else 0.0
    return (
        str(folder),
        *(str(result[key]) for key in ("arm", "data", "arch", "seed", "epochs")),
        f"{100 * result['test_accuracy']:.2f} %",
        f"{result['seconds']:.1f}",
        f"{100 * share:.0f} % of them",
    )


def _over_seeds(results: list[dict[str, Any]]) -> list[str]:
    """One line for each arm, data set, network and length of which there are several seeds."""
    groups: dict[tuple[Any, ...], dict[int, float]] = {}
    for result in results:
        key = tuple(result[name] for name in ("arm", "data", "arch", "epochs"))
        groups.setdefault(key, {})[result["seed"]] = 100 * result["test_accuracy"]
    lines = []
    for (arm, data, arch, epochs), by_seed in groups.items():
        if len(by_seed) > 1:
            mean, deviation = statistics.mean(by_seed.values()), statistics.stdev(by_seed.values())
            length = counted(epochs, "epoch")
            lines.append(
                f"{arm} on {data}, {arch}, {length}: {mean:.2f} % +- {deviation:.2f} over {len(by_seed)} seeds"
            )
    return ["", *lines] if lines else []
