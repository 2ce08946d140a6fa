"""The command ``sfr-ext``."""

from __future__ import annotations

import argparse
import importlib.util
import logging
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from .train.config import ARMS, DATA, PRECISIONS, TrainConfig
from .train.errors import TrainError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with these arguments (default: the process's); return its exit code.

    Exit codes: 0 success, 1 a run that could not be done (one sentence on stderr), 2 wrong usage, 130
    interrupted.
    """
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    if arguments.command == "bench":  # whose options are those of `python -m benchmarks`
        arguments.options = rest
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        code: int = arguments.function(arguments)
    except TrainError as error:
        print(f"sfr-ext: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(
            "sfr-ext: interrupted; the same command with --resume goes on after the last whole epoch",
            file=sys.stderr,
        )
        return 130
    return code


def _info(arguments: argparse.Namespace) -> int:
    import torch

    from . import build_info

    for key, value in {**build_info(), "torch": torch.__version__}.items():
        print(f"{key}: {', '.join(map(str, value)) if isinstance(value, (list, tuple)) else value}")
    return 0


def _train(arguments: argparse.Namespace) -> int:
    config = _config(arguments)
    needed = ["lightning", "matplotlib"] + (["sklearn"] if config.data == "digits" else [])
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise TrainError(f"train needs {' and '.join(missing)}, not installed here: pip install 'sfr_ext[train]'")
    from .train.run import run

    for name in ("lightning.pytorch", "lightning.fabric"):  # after the import, which sets them to INFO
        logging.getLogger(name).setLevel(logging.WARNING)
    run(config)
    return 0


def _bench(arguments: argparse.Namespace) -> int:
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


def _config(arguments: argparse.Namespace) -> TrainConfig:
    options = {k: v for k, v in vars(arguments).items() if k not in ("function", "command")}
    if options["layers"] is not None:
        options["layers"] = tuple(name.strip() for name in options["layers"].split(","))
    if options["resume"] == "":
        options["resume"] = options["out"] / "checkpoints" / "last.ckpt"
    elif options["resume"] is not None:
        options["resume"] = Path(options["resume"])
    return TrainConfig(**options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sfr-ext", description="Optimal transport between feature maps.")
    commands = parser.add_subparsers(dest="command", required=True)
    info = commands.add_parser("info", help="how this installation was built")
    info.set_defaults(function=_info)
    bench = commands.add_parser(
        "bench", add_help=False, help="speed beside other libraries (options: those of python -m benchmarks)"
    )
    bench.set_defaults(function=_bench)
    train = commands.add_parser(
        "train",
        help="train an image classifier, with or without SFR",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    train.set_defaults(function=_train)
    _add_train_options(train)
    return parser


def _add_train_options(parser: argparse.ArgumentParser) -> None:
    default = TrainConfig()
    arms = "; ".join(f"{name}: {text}" for name, text in ARMS.items())

    data = parser.add_argument_group("data")
    data.add_argument("--data", choices=DATA, default=default.data, help="data set")
    data.add_argument("--data-dir", type=Path, help="folder that holds it, or into which it is downloaded")
    data.add_argument("--limit", type=int, metavar="N", help="train on N images only")
    data.add_argument("--image-size", type=int, default=default.image_size, help="of imagefolder, in pixels")
    data.add_argument(
        "--augment",
        action=argparse.BooleanOptionalAction,
        default=default.augment,
        help="random crops and mirroring",
    )

    method = parser.add_argument_group("model and method")
    method.add_argument("--arch", default=default.arch, help="resnet8, 14, 20, 26, 32, 18; torchvision's, timm's")
    method.add_argument("--arm", choices=tuple(ARMS), default=default.arm, help=arms)
    method.add_argument("--emd-weight", type=float, default=default.emd_weight, help="factor on the feature loss")
    method.add_argument(
        "--emd-warmup",
        type=float,
        default=default.emd_warmup,
        metavar="EPOCHS",
        help="over which that factor rises",
    )
    method.add_argument("--layers", metavar="A,B,...", help="layers to compare, shallow to deep (default: all stages)")
    method.add_argument("--pairs", choices=("all", "last"), default=default.pairs, help="which layers teach which")
    method.add_argument(
        "--channel-mode",
        choices=("match", "mean", "crop"),
        default=default.channel_mode,
        help="how many deep channels face few shallow ones",
    )
    method.add_argument("--eps", type=float, default=default.eps, help="of the EMD, in standard deviations of cost")
    method.add_argument("--smoothing", type=float, default=default.smoothing, help="largest label smoothing")
    method.add_argument(
        "--schedule",
        choices=("linear", "cosine", "constant"),
        default=default.schedule,
        help="of dynamic smoothing",
    )
    method.add_argument(
        "--prior", choices=("uniform", "online"), default=default.prior, help="where the smoothed mass goes"
    )

    training = parser.add_argument_group("training")
    training.add_argument("--epochs", type=int, default=default.epochs)
    training.add_argument("--batch-size", type=int, default=default.batch_size, help="per device")
    training.add_argument("--lr", type=float, default=default.lr, help="largest learning rate")
    training.add_argument("--weight-decay", type=float, default=default.weight_decay)
    training.add_argument("--seed", type=int, default=default.seed)
    training.add_argument("--out", type=Path, default=default.out, help="folder for everything written")
    training.add_argument(
        "--resume",
        nargs="?",
        const="",
        metavar="CHECKPOINT",
        help="continue from this checkpoint; without a name, from OUT/checkpoints/last.ckpt",
    )
    training.add_argument("--devices", default=default.devices, help="how many, or auto")
    training.add_argument("--accelerator", choices=("auto", "cpu", "gpu"), default=default.accelerator)
    training.add_argument("--nodes", type=int, default=default.nodes)
    training.add_argument("--precision", choices=PRECISIONS, default=default.precision)
    training.add_argument(
        "--progress",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="a bar (default: on a terminal)",
    )
