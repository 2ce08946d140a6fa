"""The results of a study: from the folders of its runs, or from the lines that an earlier report has kept of them."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..train.config import LARGEST_SEED, SAME, flag, options, whole
from ..train.errors import TrainError
from ..train.files import atomic_write
from ..train.records import read_rows
from .checks import name_of_folder, refuse_line, refuse_result, refuse_rows, refuse_run
from .names import LINES, OUTLINE
from .plan import JUDGES
from .work import RESULT

_METRICS = "metrics.csv"
# What a file that is not ours ends in.
_DAMAGE = (ValueError, KeyError, TypeError, AttributeError, RecursionError, csv.Error)
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
        """Raises ValueError where this is not a run that has finished; it names the field."""
        refuse_run(self.setting, self.arm, self.seed)
        refuse_result(self.result)
        refuse_rows(self.epochs, self.result["epochs"])

    def figure(self, name: str) -> float | None:
        """None where there is none, or no number: a run may have diverged."""
        value = self.result.get(name)
        return float(value) if value is not None and math.isfinite(value) else None


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
                curves = {name: [_number(row[name]) for row in o.epochs] for name in _CURVES if name in o.epochs[0]}
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
            if any(map(name_of_folder, (setting, *asked["arms"]))) or any(map(whole(0, LARGEST_SEED), asked["seeds"])):
                raise ValueError
        "".join(words).encode()
        if not set(outline["references"]) <= set(words):
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
    there = {(o.setting, o.arm, o.seed) for o in runs}
    lines = [o for o in lines if (o.setting, o.arm, o.seed) not in there]
    # A folder without a result is of a run that has begun again: its line is of the earlier one.
    begun: list[Outcome] = []
    kept: list[Outcome] = []
    for o in lines:
        (begun if _folder(folder, o.setting, o.arm, o.seed).is_dir() else kept).append(o)
    first: dict[tuple[str, str], Outcome] = {}
    for o in [*runs, *kept]:
        if o.arm in outline["settings"].get(o.setting, {"arms": ()})["arms"]:
            _same_options(first.setdefault((o.setting, o.arm), o), o, folder)
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


def _same_options(run: Outcome, other: Outcome, folder: Path) -> None:
    """Runs of two kinds make no arm."""
    for name, declared in options().items():
        if name == "seed" or (declared.on_resume != SAME and name != "epochs"):
            continue
        there, then = (o.result["options"].get(name) for o in (run, other))
        if name in run.result["options"] and name in other.result["options"] and there != then:
            where = f"{other.setting}/{other.arm}"
            raise TrainError(
                f"{folder}: expected the runs of {where} to have the same options, got {flag(name)} {there} for "
                f"seed {run.seed} and {then} for seed {other.seed}; take away the folder, or the line in {LINES}, that "
                "is not meant"
            )


def _from_runs(folder: Path, outline: dict[str, Any]) -> Iterator[Outcome]:
    for setting, asked in outline["settings"].items():
        for arm in asked["arms"]:
            for seed in asked["seeds"]:
                run = _folder(folder, setting, arm, seed)
                if not (run / RESULT).is_file():
                    continue
                result, rows = _result(run / RESULT), _rows(run / _METRICS)
                try:
                    outcome = Outcome(setting, arm, seed, result, rows)
                except ValueError as error:  # the result has been looked at
                    raise TrainError(f"{run / _METRICS} is damaged: {error}") from error
                yield outcome


def _folder(study: Path, setting: str, arm: str, seed: int) -> Path:
    return study / setting / arm / f"seed-{seed}"


def _result(path: Path) -> dict[str, Any]:
    try:
        result: dict[str, Any] = json.loads(path.read_text())
        refuse_result(result)
    except OSError as error:
        raise TrainError(f"{path} cannot be read: {error.strerror or error}") from error
    except _DAMAGE as error:
        raise TrainError(f"{path} does not hold the result of a run of sfr-ext train: {error}") from error
    return result


def _rows(path: Path) -> list[dict[str, float]]:
    try:
        return read_rows(path)
    except OSError as error:
        raise TrainError(
            f"{path} cannot be read: {error.strerror or error}; it belongs to the result beside it"
        ) from error
    except _DAMAGE as error:
        raise TrainError(f"{path} is damaged: {error}") from error


def _from_lines(path: Path) -> Iterator[Outcome]:
    if not path.is_file():
        return
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise TrainError(f"{path} cannot be read: {error.strerror or error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            kept = json.loads(line)
            refuse_line(kept)
            curves = kept["curves"]
            columns = [[math.nan if x is None else x for x in values] for values in curves.values()]
            rows = [dict(zip(curves, values, strict=True)) for values in zip(*columns, strict=True)]
            outcome = Outcome(kept["setting"], kept["arm"], kept["seed"], kept["result"], rows)
        except _DAMAGE as error:
            raise TrainError(f"{path}: line {number} is not what sfr-ext report writes: {error}") from error
        yield outcome


def _number(value: float) -> float | None:
    """As JSON has it, which has neither NaN nor infinity."""
    return value if math.isfinite(value) else None
