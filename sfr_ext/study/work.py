"""One run of a study, begun or gone on with, wherever it is executed."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..train.config import KEPT_OPTIONS, LAST_CHECKPOINT, PREVIOUS_CHECKPOINT, TrainConfig, flag, options
from ..train.errors import TrainError

RESULT = "result.json"


def is_finished(config: TrainConfig) -> bool:
    """Whether its folder holds the result of this very run.

    Raises:
        TrainError: it holds the result of a run with other options, or one that cannot be read.
    """
    path = config.out / RESULT
    if not path.is_file():
        return False
    try:
        before = json.loads(path.read_text())["options"]
        _same_options(config, {name: before[name] for name in options() if name in before}, "a finished run")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TrainError(f"{path} is not the result of a run of sfr-ext train") from error
    return True


def may_go_on(config: TrainConfig) -> None:
    """Nothing to say where its folder holds no checkpoint, or one of this very run.

    Raises:
        TrainError: it holds an unfinished run with other options; one trained under both would be neither.
    """
    path = config.out / KEPT_OPTIONS
    if not _begun(config) or not path.is_file():  # without it, the checkpoint itself is looked into, when it is read
        return
    try:
        before = json.loads(path.read_text())
        _same_options(config, {name: before[name] for name in options() if name in before}, "an unfinished run")
    except (OSError, ValueError, TypeError) as error:
        raise TrainError(f"{path} is damaged; remove {config.out}, and the run begins anew") from error


def _same_options(config: TrainConfig, held: Mapping[str, Any], what: str) -> None:
    asked = {**config.identity(), "epochs": config.epochs}
    for name, value in json.loads(json.dumps(asked)).items():
        if held.get(name, value) != value:
            raise TrainError(
                f"{config.out} holds {what} with {flag(name)} {held[name]}, and the study asks for {value}; "
                "give the study another --out, or remove that folder"
            )


def _begun(config: TrainConfig) -> bool:
    return any((config.out / name).is_file() for name in (LAST_CHECKPOINT, PREVIOUS_CHECKPOINT))


def to_start(config: TrainConfig) -> TrainConfig:
    """The configuration that goes on where the run was, from the start where there is no checkpoint."""
    return replace(config, resume=config.out / LAST_CHECKPOINT) if _begun(config) else config


def to_json(config: TrainConfig) -> dict[str, Any]:
    """The options as values of JSON, for another process."""
    named = {name: getattr(config, name) for name in options()}
    return {name: str(value) if isinstance(value, Path) else value for name, value in named.items()}


def from_json(named: Mapping[str, Any]) -> TrainConfig:
    """What `to_json` was given."""
    values = dict(named)
    for name in ("out", "data_dir", "resume"):
        values[name] = None if values[name] is None else Path(values[name])
    if values["layers"] is not None:
        values["layers"] = tuple(values["layers"])
    return TrainConfig(**values)


def work(config: TrainConfig) -> None:
    """Execute the run in this process, unless it has been finished meanwhile.

    Raises:
        TrainError: as `sfr_ext.train.run.run`.
    """
    from ..train.run import run

    for name in ("lightning.pytorch", "lightning.fabric"):  # after the import, which sets them to INFO
        logging.getLogger(name).setLevel(logging.WARNING)
    if not is_finished(config):
        may_go_on(config)
        run(to_start(config))


def reason(error: BaseException) -> str:
    """Why a run failed, in one line."""
    lines = str(error).strip().splitlines()
    told = lines[0] if lines else "no message"
    return told if isinstance(error, TrainError) else f"{type(error).__name__}: {told}"
