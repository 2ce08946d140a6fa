"""The command ``sfr-ext``."""

from __future__ import annotations

import argparse
import importlib.util
import logging
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from ._version import __version__
from .completion import SHELLS, PrintCompletion
from .extras import how_to_install
from .pipes import quietly
from .train.errors import EveryProcessError, TrainError, UsageError

# Those of ops.METRICS, as a test says: help is there without torch, and the compiled part is loaded after it.
METRICS = ("l2", "sqeuclidean", "cosine", "l1")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with these arguments (default: the process's); return its exit code.

    Exit codes: 0 success, 1 a run that could not be done (one sentence on stderr), 2 wrong usage (an option or value
    with which nothing could be done), 130 interrupted. Where nobody reads on what it prints: 1,
    and not a word.
    """
    return quietly(lambda: _run(argv))


def _run(argv: Sequence[str] | None) -> int:
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    if arguments.command in ("bench", "study", "train"):  # which read their options themselves
        arguments.options = rest
    elif rest:
        from .train.config import near_misses

        near = near_misses(rest[0].split("=")[0], _flags_of(arguments.parser))
        arguments.parser.error(f"unrecognized arguments: {' '.join(rest)}{near}")
    if arguments.command != "bench":  # which measures other libraries, too, as they come
        # Threads that wait asleep: on a machine that is busy otherwise, spinning ones hold each other up badly. OpenMP
        # reads this when torch is loaded.
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        code: int = arguments.function(arguments)
    except TrainError as error:
        if not isinstance(error, EveryProcessError) or error.told_here():
            print(f"sfr-ext: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except ImportError as error:
        if error.name != "sfr_ext._C":
            raise
        print(f"sfr-ext: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as error:
        print("; ".join(["sfr-ext: interrupted", *map(str, error.args)]), file=sys.stderr)
        return 130
    return code


def _info(arguments: argparse.Namespace) -> int:
    import torch

    from . import build_info

    try:
        built = build_info()
    except FileNotFoundError as error:
        raise TrainError(str(error)) from None
    for key, value in {**built, "torch": torch.__version__}.items():
        print(f"{key}: {', '.join(map(str, value)) if isinstance(value, (list, tuple)) else value}")
    return 0


# Modules of the extra [train] that commands import, those that read options first.
_OPTIONS = ("jsonargparse", "yaml")
_RUNS = (*_OPTIONS, "lightning", "matplotlib", "filelock")
NEEDED = {
    "train": (*_RUNS, "sklearn"),  # for digits, the default
    "study": (*_RUNS, "rich"),
    "report": (*_RUNS, "rich", "markdown_it", "scipy"),
}


def _train(arguments: argparse.Namespace) -> int:
    if not all(map(_is_installed, _OPTIONS)):  # whether digits are asked for cannot be known
        _require("train", *NEEDED["train"])
    from .train.parser import parse

    config = parse(arguments.options)
    _require("train", *(name for name in NEEDED["train"] if name != "sklearn" or config.data == "digits"))
    from .train.run import run

    for name in ("lightning.pytorch", "lightning.fabric"):  # after the import, which sets them to INFO
        logging.getLogger(name).setLevel(logging.WARNING)
    run(config)
    from .train.launched import leave

    leave()
    return 0


def _study(arguments: argparse.Namespace) -> int:
    _require("study", *NEEDED["study"])
    from .study.command import study
    from .train.config import flag
    from .train.parser import only_given

    given = only_given(arguments.options, not_known=map(flag, OF_THE_STUDY), also_known=_flags_of(arguments.parser))
    own = [name for name in OF_THE_STUDY if name in given]
    if own:
        raise UsageError(f"--{own[0]} of a run is set by the study itself")
    names = ("out", "executor", "jobs", "threads", "gpus", "settings", "seeds")
    return study(arguments.file, **{name: getattr(arguments, name) for name in names}, given=given)


def _report(arguments: argparse.Namespace) -> int:
    _require("report", *NEEDED["report"])
    from .study.report import report

    print(report(arguments.folder, arguments.out, arguments.seconds))
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    from .train.compare import compare

    print(compare(arguments.folders))
    return 0


def _layers(arguments: argparse.Namespace) -> int:
    from .train.layers import layers_table

    print(layers_table(arguments.model, arguments.size, arguments.channels, arguments.all))
    return 0


def _match(arguments: argparse.Namespace) -> int:
    from .train.match import match

    names = ("patches", "checkpoint", "layer", "eps", "metric", "reach")
    options = {name: getattr(arguments, name) for name in names}
    print(match(arguments.a, arguments.b, arguments.out, **options))
    return 0


def _is_installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def _require(command: str, *names: str) -> None:
    missing = [name for name in names if not _is_installed(name)]
    if missing:
        how = how_to_install("train", *missing)
        raise TrainError(f"{command} needs {' and '.join(missing)}, not installed here: {how}")


OF_THE_STUDY = ("out", "resume", "overwrite", "seed", "progress")  # options of train that a study sets itself

_BENCH_HELP = """usage: sfr-ext bench [options]

Speed beside other libraries. It runs in a clone of the repository, where `make bench` installs the libraries.

In a clone, `python -m benchmarks --help` says all options. The usual ones:
  --suite {quick,full,kernels}  how much
  --out DIR                     where tables and plots are written
  --compare OLD NEW             is the build of NEW.json slower than that of OLD.json
"""


def _bench(arguments: argparse.Namespace) -> int:
    if arguments.options in (["--help"], ["-h"]):  # of an installation without the benchmarks, too
        print(_BENCH_HELP, end="")
        return 0
    checkout = Path(__file__).resolve().parents[1]
    if not (checkout / "benchmarks" / "__main__.py").is_file():
        raise TrainError(
            "bench runs from a checkout, since the benchmarks are not installed: clone the repository, and there run "
            "`make bench`, or `pip install -e '.[bench]'` and this command again"
        )
    # A process of its own: the harness sets up threads before torch is loaded.
    command = [sys.executable, "-m", "benchmarks", *arguments.options]
    search = os.pathsep.join(filter(None, (str(checkout), os.environ.get("PYTHONPATH"))))
    return subprocess.run(command, env={**os.environ, "PYTHONPATH": search}).returncode


def _positive(text: str) -> int:
    number = int(text) if text.isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text!r}")
    return number


def _above_0(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a finite number above 0, got {text!r}")
    return number


def _from_0(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a finite number, 0 or above, got {text!r}")
    return number


def _flags_of(parser: argparse.ArgumentParser) -> list[str]:
    """All flags, in the order of the help."""
    return [flag for action in parser._actions for flag in action.option_strings]


class _Parser(argparse.ArgumentParser):
    """One that names commands like a word that is none, and a flag that is none before what lacks because of it."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        self._given = sys.argv[1:] if args is None else list(args)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        from .train.config import near_misses

        if match := re.search(r"argument command: invalid choice: '([^']*)' \(choose from (.*)\)", message):
            message += near_misses(match[1], re.findall(r"\w+", match[2]))
        elif "arguments are required" in message and (wrong := self._unknown_flag()):
            message = f"unrecognized arguments: {wrong}{near_misses(wrong, _flags_of(self))}"
        super().error(message)

    def _unknown_flag(self) -> str | None:
        """The first one, where this parser knows all that there are."""
        known = _flags_of(self)
        if not self.allow_abbrev:  # study, whose further flags are those of train
            from .train.config import flag, options

            known += [flag(name) for name in options()]
        for word in self._given:
            name = word.split("=")[0]
            if name.startswith("--") and len(name) > 2 and not any(one.startswith(name) for one in known):
                return name
        return None


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="sfr-ext", description="Optimal transport between feature maps.")
    parser.add_argument("--version", action="version", version=f"sfr-ext {__version__}")
    parser.add_argument(
        "--print-completion", action=PrintCompletion, choices=SHELLS, help="print a script that completes this command"
    )
    commands = parser.add_subparsers(dest="command", required=True)
    info = commands.add_parser("info", help="how this installation was built")
    info.set_defaults(function=_info)
    train = commands.add_parser("train", add_help=False, help="train an image classifier, with or without SFR")
    train.set_defaults(function=_train)
    study = commands.add_parser(
        "study",
        allow_abbrev=False,  # --seed is not --seeds
        help="many runs, as a YAML file asks for them: arms x seeds x settings",
        description="Execute the runs of a study that have not been finished. "
        "Further options are those of train, and win over the file's in every run.",
    )
    study.add_argument("file", metavar="STUDY.yaml", type=Path, help="arms, seeds, settings")
    study.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of its runs")
    study.add_argument("--executor", choices=("local", "ray"), default="local", help="what executes the runs (local)")
    study.add_argument("--jobs", type=_positive, metavar="N", help="runs at a time on this machine (one a core)")
    study.add_argument(
        "--threads", type=_positive, metavar="N", help="of each run (OMP_NUM_THREADS, else its share of the cores)"
    )
    study.add_argument(
        "--gpus", type=_from_0, default=0.0, metavar="X", help="of each run, for ray; 0.5 shares one (0)"
    )
    study.add_argument(
        "--settings", type=lambda text: text.split(","), metavar="A,B,...", help="execute the runs of these alone (all)"
    )
    study.add_argument("--seeds", type=_positive, metavar="N", help="execute the first N seeds alone (all)")
    study.set_defaults(function=_study)
    report = commands.add_parser("report", help="what a study has found, as report.md and report.html")
    report.add_argument("folder", metavar="DIR", type=Path, help="--out of the study, or of an earlier report")
    report.add_argument("--out", type=Path, metavar="DIR", help="where to write (beside the runs)")
    report.add_argument(
        "--seconds", type=Path, metavar="DIR", help="a study of the same arms on a quiet machine, whose seconds count"
    )
    report.set_defaults(function=_report)
    compare = commands.add_parser("compare", help="the results of finished runs, a row for each")
    compare.add_argument(
        "folders", nargs="+", type=Path, metavar="DIR", help="folders of runs, as train's --out wrote them: runs/*"
    )
    compare.set_defaults(function=_compare)
    layers = commands.add_parser("layers", help="which layers of a network SFR could compare, and how")
    layers.add_argument(
        "model", metavar="MODEL", help="what --arch of train takes, or module:function that returns the network"
    )
    layers.add_argument("--size", type=_positive, default=224, help="height and width of the images (224)")
    layers.add_argument("--channels", type=_positive, default=3, help="channels of the images (3)")
    layers.add_argument("--all", action="store_true", help="also single convolutions, normalisations, activations")
    layers.set_defaults(function=_layers)
    match = commands.add_parser("match", help="which patch of one image is matched to which of another, as a picture")
    match.add_argument("a", metavar="A.png", type=Path, help="an image")
    match.add_argument("b", metavar="B.png", type=Path, help="another one")
    match.add_argument("-o", "--out", type=Path, required=True, metavar="OUT.png", help="the picture")
    match.add_argument("--patches", type=_positive, default=10, metavar="N", help="along the longer side, at most (10)")
    match.add_argument(
        "--checkpoint", type=Path, metavar="DIR", help="--out of a run, or its checkpoint: compare features, not pixels"
    )
    match.add_argument("--layer", metavar="NAME", help="of the checkpoint's network (default: the last stage)")
    match.add_argument(
        "--eps", type=_above_0, metavar="X", help="of an entropic plan, in standard deviations of cost (default: exact)"
    )
    match.add_argument("--metric", choices=METRICS, default="l2", help="cost of two patches (l2)")
    match.add_argument(
        "--reach",
        type=_above_0,
        metavar="X",
        help="leave patches unmatched that have no counterpart within this cost (default: every patch is matched)",
    )
    match.set_defaults(function=_match)
    bench = commands.add_parser(
        "bench", add_help=False, help="speed beside other libraries (options: those of python -m benchmarks)"
    )
    bench.set_defaults(function=_bench)
    for command in commands.choices.values():
        command.set_defaults(parser=command)
    return parser
