"""What the results of a run and its epochs may hold. What no run has written is refused, by the name of its field."""

from __future__ import annotations

import math
import reprlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from ..train.config import LARGEST_SEED, Check, share, whole

_LONGEST = 1e10  # seconds, three centuries: their sums and products stay numbers
_LONGEST_NAME = 255  # of a folder, in most file systems


def refuse_run(setting: Any, arm: Any, seed: Any) -> None:
    """Raises ValueError where this names no run."""
    _fields({"setting": setting, "arm": arm, "seed": seed}, _RUN)


def refuse_result(result: Any) -> None:
    """Raises ValueError where this is not what a run leaves as its result.json."""
    _fields(result, _RESULT, _FIGURES)
    _fields(result["options"], _OPTIONS, _MORE_OPTIONS, "options: ")
    for layer, accuracy in (result.get("probe_accuracy") or {}).items():
        _refuse("probe_accuracy: a layer", layer, _word)
        _refuse(f"probe_accuracy: {layer}", accuracy, _accuracy)
    if result["emd_seconds"] > result["seconds"]:
        raise ValueError(f"emd_seconds must be at most the seconds, {result['seconds']}, got {result['emd_seconds']}")
    for name, value in result.items():
        if name not in _FIGURES and not (type(value) is float and math.isnan(value)):
            _refuse_infinite(name, value)


def refuse_line(line: Any) -> None:
    """Raises ValueError where this is not what a report keeps of a run, whatever its result and its curves hold."""
    _fields(line, {**_RUN, "result": _mapping, "curves": _mapping})
    curves = line["curves"]
    for name, column in curves.items():
        _refuse(f"curves: {name}", column, _column)
    if len({len(column) for column in curves.values()}) != 1:
        raise ValueError("curves must be columns of one length")


def refuse_rows(rows: Sequence[Mapping[str, Any]], epochs: int) -> None:
    """Raises ValueError where these are not those of a run of so many epochs."""
    if len(rows) != epochs:
        raise ValueError(f"it does not have the {epochs} epochs of the result, one a row, but {len(rows)}")
    for number, row in enumerate(rows, 1):
        _fields(row, _ROW, where=f"epoch {number}: ")
        if row["epoch"] != number:
            raise ValueError(f"it does not have the {epochs} epochs of the result, one a row: {number} is not there")
        for name, value in row.items():
            check = _share_or_none if name.endswith("_accuracy") else _number
            _refuse(f"epoch {number}: {name}", value, check)


def name_of_folder(value: Any) -> str | None:
    """Of a setting or an arm, whose runs lie in a folder of that name."""
    long = isinstance(value, str) and len(value.encode(errors="replace")) > _LONGEST_NAME
    return "the name of a folder" if _word(value) or long or "/" in value or value in (".", "..") else None


def _fields(value: Any, needed: Mapping[str, Check], more: Mapping[str, Check] | None = None, where: str = "") -> None:
    """Fields that are needed, and some that may be missing or null."""
    if not isinstance(value, Mapping):
        raise ValueError(f"expected a mapping, got {reprlib.repr(value)}")
    for name, check in needed.items():
        if name not in value:
            raise ValueError(f"{where}{name} is missing")
        _refuse(where + name, value[name], check)
    for name, check in (more or {}).items():
        if value.get(name) is not None:
            _refuse(where + name, value[name], check)


def _refuse(where: str, value: Any, check: Check) -> None:
    if (wanted := check(value)) is not None:
        raise ValueError(f"{where} must be {wanted}, got {reprlib.repr(value)}")


def _refuse_infinite(where: str, value: Any) -> None:
    """JSON has no such numbers, and no run writes them."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where} must be finite, got {value}")
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, each in inner:
        _refuse_infinite(f"{where}: {name}", each)


# The kinds of fields: what is wrong with a value, as the words after "must be"; None when nothing is.


def _word(value: Any) -> str | None:
    return None if isinstance(value, str) and value and value.isprintable() else "a word"


def _mapping(value: Any) -> str | None:
    return None if isinstance(value, dict) else "a mapping"


def _column(value: Any) -> str | None:
    return None if isinstance(value, list) else "a list"


def _number(value: Any) -> str | None:
    """NaN and infinity are some, too: a run may have diverged."""
    good = type(value) is float or (type(value) is int and abs(value) <= sys.float_info.max)
    return None if good else "a number"


def _accuracy(value: Any) -> str | None:
    return _number(value) or share(value)


def _share_or_none(value: Any) -> str | None:
    """NaN stands for none: between two tests, or of a network that has diverged."""
    return _number(value) or (None if math.isnan(value) else share(value))


def _seconds(value: Any) -> str | None:
    return _number(value) or (None if 0 <= value <= _LONGEST else f"in [0, {_LONGEST:g}]")


_RUN: dict[str, Check] = {"setting": name_of_folder, "arm": name_of_folder, "seed": whole(0, LARGEST_SEED)}
_RESULT: dict[str, Check] = {
    "data": _word,
    "arch": _word,
    "train_images": whole(1),
    "epochs": whole(1),
    "test_accuracy": _accuracy,
    "seconds": _seconds,
    "emd_seconds": _seconds,
    "options": _mapping,
}
_FIGURES: dict[str, Check] = {
    "val_accuracy": _share_or_none,
    "train_accuracy": _share_or_none,
    "test_loss": _number,
    "test_calibration_error": _share_or_none,
    "probe_accuracy": _mapping,
    "threads": whole(1),
}
_OPTIONS: dict[str, Check] = {"epochs": whole(1), "batch_size": whole(1)}
_MORE_OPTIONS: dict[str, Check] = {"label_noise": _accuracy}
_ROW: dict[str, Check] = {"epoch": _number, "seconds": _seconds}
