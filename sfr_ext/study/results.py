"""The results of a study: from the folders of its runs, or from the lines that an earlier report has kept of them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..train.config import SAME, flag, options
from ..train.errors import TrainError
from ..train.files import atomic_write
from ..train.records import read_rows
from .names import LINES, OUTLINE
from .plan import JUDGES
from .work import RESULT

_SECONDS = ("seconds", "emd_seconds")
_FIGURES = ("val_accuracy", "test_loss", "test_calibration_error")
# What JSON that is not ours ends in.
_DAMAGE = (ValueError, KeyError, TypeError, AttributeError, RecursionError)
_CURVES = ("epoch", "test_accuracy", "val_accuracy", "train_accuracy", "train_feature_loss", "seconds")


@dataclass(frozen=True)
class Outcome:
    """One finished run."""

    setting: str
    arm: str
    seed: int
    result: dict[str, Any]  # of its result.json
    epochs: list[dict[str, float]]  # of its metrics.csv

    def __post_init__(self) -> None:
        """Raises ValueError, TypeError or KeyError where the result is not that of a run."""
        counts = self.result["epochs"], self.result["options"]["epochs"], self.result["train_images"]
        if not all(type(count) is int and count > 0 for count in counts) or type(self.seed) is not int:
            raise TypeError
        probes = self.result.get("probe_accuracy") or {}
        shares = [self.result["test_accuracy"], *probes.values()]
        if not all(type(x) in (int, float) and 0 <= x <= 1 for x in shares):
            raise ValueError
        if not all(type(self.result[name]) in (int, float) and self.result[name] >= 0 for name in _SECONDS):
            raise ValueError
        if not all(type(self.result.get(name)) in (int, float, type(None)) for name in _FIGURES):
            raise TypeError

    def figure(self, name: str) -> float | None:
        """None where there is none, or no number: a run may have diverged."""
        value = self.result.get(name)
        return None if value is None or math.isnan(value) else float(value)


@dataclass(frozen=True)
class Results:
    """All finished runs of a study, by setting and arm in the study's order."""

    outline: dict[str, Any]
    outcomes: list[Outcome] = field(default_factory=list)
    # Kept runs that the study does not ask for, or that are being done again: not lost, not told.
    others: list[Outcome] = field(default_factory=list)
    kept: int = 0  # of the outcomes, those of which there is a line alone

    @property
    def settings(self) -> dict[str, Any]:
        found: dict[str, Any] = self.outline["settings"]
        return found

    @property
    def judged_by(self) -> str:
        return str(self.outline["judged_by"])

    @property
    def accuracy(self) -> str:
        """The figure that counts: of a sweep, that of the held-out images."""
        return "val_accuracy" if self.judged_by == "validation" else "test_accuracy"

    def of(self, setting: str, arm: str) -> dict[int, Outcome]:
        """The runs of an arm, by seed."""
        return {o.seed: o for o in self.outcomes if (o.setting, o.arm) == (setting, arm)}

    def arms(self, setting: str) -> list[str]:
        """Those of which there is a run."""
        return [arm for arm in self.settings[setting]["arms"] if self.of(setting, arm)]

    def missing(self, setting: str) -> int:
        """Runs that have not been finished."""
        asked = self.settings[setting]
        return len(asked["arms"]) * len(asked["seeds"]) - sum(o.setting == setting for o in self.outcomes)

    def save(self, folder: Path) -> None:
        """Write what `read_results` reads."""
        with atomic_write(folder / OUTLINE) as path:
            path.write_text(json.dumps(self.outline, indent=2) + "\n")
        with atomic_write(folder / LINES) as path, path.open("w") as file:
            for o in self.outcomes + self.others:
                result = {name: value for name, value in o.result.items() if name != "class_names"}
                result |= {name: _number(x) for name, x in result.items() if isinstance(x, float)}
                result["options"] = {name: x for name, x in result["options"].items() if name not in ("out", "resume")}
                curves = {
                    name: [_number(row[name]) for row in o.epochs] for name in _CURVES if name in (o.epochs or [{}])[0]
                }
                line = {"setting": o.setting, "arm": o.arm, "seed": o.seed, "result": result, "curves": curves}
                file.write(json.dumps(line, allow_nan=False) + "\n")


def read_results(folder: Path) -> Results:
    """The finished runs of the study in this folder, and those that a report has kept and that are not there.

    Raises:
        TrainError: it holds no study, a damaged one, or one without a finished run; what was kept is of other options.
    """
    outline = _read_outline(folder)
    runs, lines = list(_from_runs(folder, outline)), list(_from_lines(folder / LINES))
    results = _merged(outline, runs, lines, folder)
    if not results.outcomes:
        raise TrainError(f"{folder} holds no finished run yet")
    return results


def _read_outline(folder: Path) -> dict[str, Any]:
    path = folder / OUTLINE
    try:
        outline: dict[str, Any] = json.loads(path.read_text())
        words = [outline["name"], outline["about"]]
        lists = [outline["references"]]
        for setting, asked in outline["settings"].items():
            words += [setting, asked["about"], *asked["arms"]]
            lists += [asked["arms"], asked["seeds"]]
            sum(asked["seeds"])
        if not all(isinstance(word, str) for word in words) or not set(outline["references"]) <= set(words):
            raise ValueError
        if not all(isinstance(each, list) and len(set(each)) == len(each) for each in lists):
            raise ValueError
        if not outline["settings"] or outline["judged_by"] not in JUDGES:
            raise ValueError
    except OSError as error:
        raise TrainError(
            f"{path} cannot be read: {error.strerror or error}; is {folder} the --out of a study?"
        ) from error
    except _DAMAGE as error:
        raise TrainError(f"{path} is not what sfr-ext study writes") from error
    return outline


def _merged(outline: dict[str, Any], runs: list[Outcome], lines: list[Outcome], folder: Path) -> Results:
    """In the study's order; a run's folder wins over its line."""
    of_arm = {(o.setting, o.arm): o for o in reversed(runs)}
    there = {(o.setting, o.arm, o.seed) for o in runs}
    lines = [o for o in lines if (o.setting, o.arm, o.seed) not in there]
    # A folder without a result is of a run that has begun again: its line is of the earlier one.
    begun: list[Outcome] = []
    kept: list[Outcome] = []
    for o in lines:
        (begun if _folder(folder, o.setting, o.arm, o.seed).is_dir() else kept).append(o)
    for o in [*runs, *kept]:
        if (run := of_arm.get((o.setting, o.arm))) is not None:
            _same_options(run, o, folder)
    places = {
        (setting, arm, seed): (i, j, k)
        for i, (setting, asked) in enumerate(outline["settings"].items())
        for j, arm in enumerate(asked["arms"])
        for k, seed in enumerate(asked["seeds"])
    }
    found = {(o.setting, o.arm, o.seed): o for o in [*kept, *runs]}
    ordered = [found[key] for key in sorted(found.keys() & places.keys(), key=places.__getitem__)]
    others = [o for key, o in found.items() if key not in places] + begun
    return Results(outline, ordered, others, len(ordered) - len(runs))


def _same_options(run: Outcome, kept: Outcome, folder: Path) -> None:
    """Runs of two kinds make no arm."""
    for name, declared in options().items():
        if name == "seed" or (declared.on_resume != SAME and name != "epochs"):
            continue
        there, then = (o.result["options"].get(name) for o in (run, kept))
        if name in run.result["options"] and name in kept.result["options"] and there != then:
            where = f"{kept.setting}/{kept.arm}"
            raise TrainError(
                f"{folder}: expected the runs of {where} to have the same options, got {flag(name)} {there} for "
                f"seed {run.seed} and {then} for seed {kept.seed}; take away the folder, or the line in {LINES}, that "
                "is not meant"
            )


def _from_runs(folder: Path, outline: dict[str, Any]) -> Iterator[Outcome]:
    for setting, asked in outline["settings"].items():
        for arm in asked["arms"]:
            for seed in asked["seeds"]:
                run = _folder(folder, setting, arm, seed)
                if not (run / RESULT).is_file():
                    continue
                try:
                    result = json.loads((run / RESULT).read_text())
                    outcome = Outcome(setting, arm, seed, result, [])
                except (OSError, *_DAMAGE) as error:
                    raise TrainError(f"{run / RESULT} does not hold the result of a run of sfr-ext train") from error
                yield replace(outcome, epochs=_rows(run / "metrics.csv", result["epochs"]))


def _folder(study: Path, setting: str, arm: str, seed: int) -> Path:
    return study / setting / arm / f"seed-{seed}"


def _rows(path: Path, epochs: int) -> list[dict[str, float]]:
    try:
        rows = read_rows(path)
    except OSError as error:
        raise TrainError(
            f"{path} cannot be read: {error.strerror or error}; it belongs to the result beside it"
        ) from error
    except (ValueError, TypeError) as error:
        raise TrainError(f"{path} is damaged: it is not what sfr-ext train writes") from error
    if not rows or not {"epoch", "seconds"} <= rows[0].keys():
        raise TrainError(f"{path} is damaged: it lacks epochs or seconds")
    if [row["epoch"] for row in rows] != list(range(1, epochs + 1)):
        raise TrainError(f"{path} is damaged: it does not have the {epochs} epochs of the result beside it, one a row")
    return rows


def _from_lines(path: Path) -> Iterator[Outcome]:
    if not path.is_file():
        return
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            kept = json.loads(line)
            curves = kept["curves"]
            columns = [[math.nan if x is None else x for x in values] for values in curves.values()]
            rows = [dict(zip(curves, values, strict=True)) for values in zip(*columns, strict=True)]
            yield Outcome(kept["setting"], kept["arm"], kept["seed"], kept["result"], rows)
        except _DAMAGE as error:
            raise TrainError(f"{path}: line {number} is not what sfr-ext report writes") from error


def _number(value: float) -> float | None:
    """As JSON has it, without NaN."""
    return None if math.isnan(value) else value
