"""``sfr-ext --print-completion``: what a shell completes of ``sfr-ext``, its commands and their flags.

The real parser of ``train`` is jsonargparse's, which completes ``train`` alone; here all of it is one tree for shtab.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_type_hints

from .extras import how_to_install
from .train.config import TrainConfig, flag, options

SHELLS = ("bash", "zsh", "tcsh")


class PrintCompletion(argparse.Action):
    """Prints the script for a shell and ends the process."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, shell: Any, option_string: Any = None) -> None:
        if importlib.util.find_spec("shtab") is None:
            parser.exit(1, f"sfr-ext: {self.option_strings[0]} needs shtab: {how_to_install('train', 'shtab')}\n")
        import shtab

        (commands,) = (action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction))
        _complete(commands)
        print(shtab.complete(parser, shell))
        parser.exit()


def _complete(commands: Mapping[str, argparse.ArgumentParser]) -> None:
    """Give the parsers the flags that are read elsewhere, and files and folders to those that take some."""
    import shtab

    for name in ("train", "study"):
        _add_options_of_train(commands[name], name)
    for name in ("--suite", "--out", "--compare", "--help"):  # the usual ones, as its help has them
        commands["bench"].add_argument(name, choices=("quick", "full", "kernels") if name == "--suite" else None)
    for parser in commands.values():
        for action in parser._actions:
            if action.type is Path:
                action.complete = shtab.DIRECTORY if action.metavar == "DIR" else shtab.FILE  # type: ignore[attr-defined]


def _add_options_of_train(parser: argparse.ArgumentParser, command: str) -> None:
    from .cli import OF_THE_STUDY

    taken = {*OF_THE_STUDY} if command == "study" else set()
    hints = get_type_hints(TrainConfig)
    for name, declared in options().items():
        if name in taken or flag(name) in parser._option_string_actions:
            continue
        if hints[name] in (bool, bool | None):
            parser.add_argument(flag(name), f"--no-{flag(name)[2:]}", action="store_true", help=declared.help)
            continue
        path = Path in (hints[name], *getattr(hints[name], "__args__", ()))
        parser.add_argument(
            flag(name),
            choices=declared.choices,
            type=Path if path else str,
            metavar=None if declared.choices else "DIR" if path else declared.metavar,
            help=declared.help,
        )
    parser.add_argument("--config", type=Path, metavar="FILE")
    if command == "train":
        parser.add_argument("--help", action="store_true")
        parser.add_argument("--print_config", action="store_true")
