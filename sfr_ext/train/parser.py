"""The options of ``sfr-ext train`` from the command line and from YAML files, as :mod:`.config` declares them."""

from __future__ import annotations

import json
import re
import sys
from argparse import ArgumentTypeError
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NoReturn, get_type_hints

import yaml
from jsonargparse import ActionYesNo, ArgumentError, ArgumentParser

from .config import KEPT_OPTIONS, LAST_CHECKPOINT, TrainConfig, flag, may_be_none, near_misses, options, wanted_of
from .errors import TrainError, UsageError
from .yaml_names import refuse_duplicates

_PROGRAM = "sfr-ext train"


class _Unfit(ArgumentTypeError, ValueError):
    """A value of the wrong kind: argparse tells the first by its own words, jsonargparse expects the second."""


def parse(arguments: Sequence[str]) -> TrainConfig:
    """The configuration that the arguments of ``sfr-ext train`` say.

    Raises:
        SystemExit: help was asked for (0), or the arguments cannot be understood (2); the reason is printed.
        UsageError: a value that is not allowed.
        TrainError: a run to go on with that cannot be.
    """
    parser = _parser()
    printed = [word for word in arguments if re.match(r"--print_config\b", word)]
    if printed:  # what is printed is a file that is taken
        parse([word for word in arguments if word not in printed])
    try:
        for file in _config_files(arguments):
            refuse_duplicates(file)
            if _holds_nothing(file, parser):
                arguments = _without_file(arguments, file)
        given = vars(parser.parse_args(list(arguments)))
        if given["resume"] is not None:
            checkpoint = _checkpoint(given)
            kept = checkpoint.with_name(KEPT_OPTIONS.name)
            if kept.is_file():  # flags win over what comes before them
                older = _older_defaults(_read_kept(kept))
                given = vars(parser.parse_args([*older, "--config", str(kept), *arguments]))
            given["resume"] = checkpoint
            if given["out"] is None and checkpoint.parent.name == LAST_CHECKPOINT.parent.name:
                given["out"] = checkpoint.parent.parent
    except ArgumentError as error:
        _refuse(str(error), parser)
    except UnicodeDecodeError as error:
        _refuse(f"--config: expected a text in UTF-8 ({error})", parser)
    for name in options():  # only a file can leave a value out
        if given[name] is None and not may_be_none(name):
            files = ", ".join(str(file) for file in given["config"] or ())
            _refuse(f"--config: {files}: {name}: expected {wanted_of(name)}, got nothing", parser)
    config = _config(given)
    if config.resume is None:  # a run that has begun goes on as it was
        config.refuse_idle(_named(arguments))
    return config


def from_options(named: Mapping[str, Any]) -> TrainConfig:
    """The configuration of options by name, as a YAML file has them.

    Raises:
        UsageError: an option that does not exist, or a value that is not allowed.
    """
    for name, value in named.items():
        if name not in options():
            raise UsageError(f"there is no option {name!r}{near_misses(name, list(options()))}")
        if value is None and not may_be_none(name):
            raise UsageError(f"{flag(name)}: expected {wanted_of(name)}, got nothing")
        if get_type_hints(TrainConfig)[name] is bool and not isinstance(value, bool):
            raise UsageError(f"{flag(name)}: expected true or false, got {value!r}")
    try:
        return _config(vars(_known_parser().parse_object(dict(named))))
    except ArgumentError as error:
        raise UsageError(_told(str(error))) from error


def only_given(
    arguments: Sequence[str], not_known: Iterable[str] = (), also_known: Iterable[str] = ()
) -> dict[str, Any]:
    """The options that these arguments of ``sfr-ext train`` set, by name; no defaults.

    Args:
        not_known: flags that are not suggested in place of a wrong one.
        also_known: flags of the command that these arguments are of, which are.

    Raises:
        UsageError: an option that does not exist, or a value of the wrong kind.
    """
    try:
        given = vars(_parser().parse_args(list(arguments), defaults=False))
    except ArgumentError as error:
        left_out = set(not_known)
        known = [*also_known, *(one for one in _flags() if one not in left_out)]
        raise UsageError(_told(str(error), known)) from error
    return {name: value for name, value in given.items() if name in options()}


@cache
def _known_parser() -> ArgumentParser:
    return _parser()


def _config(given: Mapping[str, Any]) -> TrainConfig:
    values = {name: given[name] for name in options()}
    for name in ("precision", "devices"):
        values[name] = str(values[name])
    if values["layers"] is not None:
        values["layers"] = tuple(values["layers"])
    for name in ("data_dir", "out", "resume"):
        if values[name] == "":
            raise UsageError(f"{flag(name)} must name a {'checkpoint' if name == 'resume' else 'folder'}, got ''")
        if values[name] is not None:
            values[name] = Path(values[name])
    return TrainConfig(**values)


def _config_files(arguments: Sequence[str]) -> list[Path]:
    named = [b for a, b in pairwise(arguments) if a == "--config"]
    named += [word.partition("=")[2] for word in arguments if word.startswith("--config=")]
    return [path for path in map(Path, named) if path.is_file()]


def _holds_nothing(file: Path, parser: ArgumentParser) -> bool:
    """Whether a file has no options, or none with a value, which jsonargparse would call no file of options."""
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return False  # for jsonargparse to say
    if content is not None and (not isinstance(content, dict) or any(x is not None for x in content.values())):
        return False
    for name in content or ():
        if name not in options():
            _refuse(f"--config: {file}: there is no option {name!r}{near_misses(str(name), list(options()))}", parser)
        if not may_be_none(name):
            _refuse(f"--config: {file}: {name}: expected {wanted_of(name)}, got nothing", parser)
    return True


def _without_file(arguments: Sequence[str], file: Path) -> list[str]:
    left: list[str] = []
    for word in arguments:
        if left and left[-1] == "--config" and Path(word) == file:
            left.pop()
        elif not (word.startswith("--config=") and Path(word.partition("=")[2]) == file):
            left.append(word)
    return left


def _named(arguments: Sequence[str]) -> set[str]:
    """The options that are given by flags, and not by a file."""
    flags = {word.partition("=")[0] for word in arguments}
    return {name for name in options() if flag(name) in flags}


def _checkpoint(given: dict[str, Any]) -> Path:
    """The checkpoint that ``--resume`` means: a file, that of a run's folder, or that of OUT."""
    if given["resume"] == "":
        out = given["out"] or TrainConfig(arm=given["arm"], data=given["data"], seed=given["seed"]).out
        return Path(out) / LAST_CHECKPOINT
    path = Path(given["resume"])
    if not path.exists() and not (path.name == LAST_CHECKPOINT.name and path.parent.exists()):
        raise UsageError(f"--resume: {path} does not exist")
    return path / LAST_CHECKPOINT if path.is_dir() else path


def _read_kept(path: Path) -> dict[str, Any]:
    """What a run has left of its options."""
    try:
        kept = json.loads(path.read_text())
    except (OSError, ValueError):
        kept = None
    if not isinstance(kept, dict):
        raise TrainError(f"--resume: {path} is damaged; remove it, and give the run's options beside --resume")
    return kept


def _older_defaults(kept: Mapping[str, Any]) -> list[str]:
    """Flags for the options that a run of an older version did not have, as it behaved."""
    missing = {name: declared.before for name, declared in options().items() if name not in kept}
    return [f"{flag(name)}={before}" for name, before in missing.items() if before is not None]


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog=_PROGRAM,
        usage=f"{_PROGRAM} [--config FILE] [options]",
        description="Train an image classifier, with or without SFR.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="config", metavar="FILE", help="YAML file with options, names as below")
    groups: dict[str, Any] = {}
    for name, declared in options().items():
        if declared.group not in groups:
            groups[declared.group] = parser.add_argument_group(declared.group)
        groups[declared.group].add_argument(flag(name), **_argument(name))
    return parser


def _argument(name: str) -> dict[str, Any]:
    """How jsonargparse is told of an option."""
    declared, hint = options()[name], get_type_hints(TrainConfig)[name]
    told = {"help": declared.help, "default": TrainConfig.__dataclass_fields__[name].default}
    if declared.choices is not None:
        # Numbers among the words, for YAML's sake: `precision: 32`.
        allowed = (*declared.choices, *(int(word) for word in declared.choices if word.isdecimal()))
        return {**told, "type": Literal[allowed], "metavar": "{" + ",".join(declared.choices) + "}"}
    if hint in (bool, bool | None):
        return {**told, "action": ActionYesNo(no_prefix="no-")}
    if name == "resume":  # the name of the checkpoint may be left out
        return {**told, "nargs": "?", "const": "", "type": str, "metavar": declared.metavar}
    kinds: dict[Any, Any] = {
        float: _Named("number", _number),
        float | None: _Named("number", _number_or_none),
        tuple[str, ...] | None: _Named("names", _names),
        int | None: _Named("int", _whole_or_none),
        Path: _Named("path", _path),
        Path | None: _Named("path", _path),
    }
    if name == "devices":
        kinds[str] = str | int
    metavar = declared.metavar or {float: "X", int: "N"}.get(hint, "NAME")
    return {**told, "type": kinds.get(hint, hint), "metavar": metavar}


class _Named:
    """A conversion that help shows by a word instead of by its address in memory."""

    def __init__(self, word: str, convert: Callable[[Any], Any]) -> None:
        self.__name__, self._convert = word, convert

    def __call__(self, value: Any) -> Any:
        return self._convert(value)

    def __repr__(self) -> str:
        return self.__name__


def _number(value: Any) -> float:
    """A float in any spelling of Python's; YAML's own reads "inf" and "1e-3" as words."""
    try:
        if isinstance(value, bool):
            raise TypeError("YAML's true")
        return float(value)
    except (TypeError, ValueError) as error:
        raise _Unfit(f"expected a number, got {value!r}") from error


def _number_or_none(value: Any) -> float | None:
    return None if value is None else _number(value)


def _whole_or_none(value: Any) -> int | None:
    whole = isinstance(value, str) and re.fullmatch(r"[+-]?[0-9]+", value.strip())
    if value is None or (isinstance(value, int) and not isinstance(value, bool)):
        return value
    if not whole:
        raise _Unfit(f"expected a whole number, got {value!r}")
    return int(value)


def _path(value: Any) -> str | None:
    if value is not None and not isinstance(value, (str, Path)):
        raise _Unfit(f"expected a path, got {value!r}")
    return None if value is None else str(value)


def _names(value: Any) -> list[str] | None:
    """``"a, b"`` or a list."""
    if value is None:
        return None
    names = value.split(",") if isinstance(value, str) else value
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise _Unfit(f"expected names, got {value!r}")
    return [name.strip() for name in names]


def _refuse(message: str, parser: ArgumentParser) -> NoReturn:
    """Tell wrong usage and exit."""
    print(f"{parser.format_usage().strip()}\n{_PROGRAM}: error: {_told(message)}", file=sys.stderr)
    raise SystemExit(2)


def _flags() -> list[str]:
    return [flag(name) for name in options()] + ["--config", "--help"]


def _told(message: str, known: list[str] | None = None) -> str:
    """What jsonargparse has to say, in one sentence that names the flag, and those of the known ones that are near."""
    known = known or _flags()
    if match := re.fullmatch(r'Parser key "(\w+)":\s*(.*)', message, re.DOTALL):
        message = f"{flag(match[1])}: {match[2]}"
    elif match := re.search(r"unrecognized arguments: (\S+)", message):
        message += near_misses(match[1].split("=")[0], known)
    elif match := re.fullmatch(r"Unexpected config: (.*)", message, re.DOTALL):
        message = f"--config: expected a file of options and their values, got {match[1].strip()!r}"
    elif match := re.search(r"Option '(\S+)' is not accepted", message):
        message += near_misses(flag(match[1]), known)
    message = re.sub(r"\s+", " ", message)
    message = re.sub(r"Expected a (?:<class '(\w+)'>|typing.Literal\[(.*?)\])\.", _expected, message)
    return message.replace(". Got value: ", ", got ")


def _expected(match: re.Match[str]) -> str:
    if match[1]:
        return f"expected {match[1]}."
    words = [word for word in match[2].split(", ") if not word.isdecimal()]  # which stand there as words, too
    return f"expected one of {', '.join(words)}."
