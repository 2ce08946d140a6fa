"""From a configuration to trained weights, metrics.csv, curves.png and result.json."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import shutil
import signal
import sys
import warnings
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

import sfr_ext

from ..layouts import Transform
from .arms import check_layers, compared_layers
from .best import BEST_CHECKPOINT, Best
from .checkpoints import KeepingIO, find_checkpoint
from .config import KEPT_OPTIONS, LAST_CHECKPOINT, PREVIOUS_CHECKPOINT, TrainConfig, counted, flag, options
from .data import FolderData, ImageData, load_data
from .engine import (
    CSVLogger,
    L,
    MisconfigurationException,
    ModelCheckpoint,
    RichProgressBar,
    TensorBoardLogger,
    process_rank,
)
from .errors import EveryProcessError, EveryProcessUsageError, TrainError
from .figures import Evaluation, final_figures
from .files import alone_in, atomic_write, refuses_writing, remove_partial
from .launched import check_launched
from .loader import ImageModule
from .models import build_model
from .module import Classifier
from .monitor import FOLDER, STRIP, Monitor, first_test_image
from .plots import plot_curves
from .probe import probe
from .records import Records
from .sharding import Sharded, Shares, check_sharding
from .trained import images_of

_PRECISION = {"32": "32-true", "64": "64-true", "bf16-mixed": "bf16-mixed", "16-mixed": "16-mixed"}


def run(config: TrainConfig) -> dict[str, Any]:
    """Train as ``config`` says; return what was written to ``OUT/result.json``.

    Raises:
        TrainError: an option that does not fit, a missing or damaged file, a missing package, a folder that is in use,
            holds a run or cannot be written, a loss that is not finite.
        KeyboardInterrupt: interrupted; its argument says how to go on.
    """
    check_launched(config)
    gpu = torch.cuda.is_available() or torch.backends.mps.is_available()
    if config.precision == "16-mixed" and (config.accelerator == "cpu" or not gpu):
        raise EveryProcessUsageError("--precision 16-mixed is for GPUs, and this run is on a CPU: bf16-mixed or 32")
    if config.strategy == "fsdp2":
        check_sharding(config)
    first = process_rank() == 0
    with alone_in(config.out) if first else nullcontext():
        if first:
            _protect_earlier_run(config)
        checkpoint, content = (None, None) if config.resume is None else _resume_from(config, config.resume, first)
        if checkpoint is not None and first:
            _protect_another_run(config, checkpoint)
        data = load_data(config)
        if checkpoint is not None:
            _check_same_data(config, data, checkpoint, content)
        L.seed_everything(config.seed, verbose=False)
        model, stages = (
            build_model(config.arch, data.channels, data.num_classes, pretrained=True)
            if config.pretrained and checkpoint is None
            else build_model(config.arch, data.channels, data.num_classes)
        )
        check_layers(config, model, torch.empty(data.channels, *images_of(data)["size"]))
        module = Classifier(config, model, stages)
        progress = sys.stderr.isatty() if config.progress is None else config.progress
        best = Best() if config.validation > 0 else None
        records = Records(config.out / "metrics.csv", say=not progress, best=best)
        looks = [_monitor(config, data, model, stages)] if config.monitor else []
        probed = _probed_layers(config, data, model, stages) if config.probe else {}
        shares = Shares() if config.strategy == "fsdp2" else None
        optional = [callback for callback in (best, shares) if callback is not None]
        trainer = _build_trainer(config, [records, *looks, *optional], progress)
        if first:
            print(f"{config.arm} on {config.data} ({len(data.train_labels)} images from {data.source}), {config.arch}")
            _clear(config)
            with atomic_write(config.out / KEPT_OPTIONS) as path:
                path.write_text(json.dumps(config.to_keep(), indent=2) + "\n")
        datamodule = ImageModule(data, config.batch_size, config.seed, config.augment, _workers(config, data))
        datamodule.first_epoch = 0 if content is None else content["epoch"] + 1
        _fit(trainer, module, datamodule, checkpoint)
        result = _result(config, data, module, records, trainer)
        if best is not None and first:
            best.save(config.out, module)
            result["best_epoch"], result["val_accuracy"] = best.epoch, best.accuracy
            result["validation_images"] = data.identity()["validation images"]
        if first:
            network = module.tested()
            if shares is not None:  # the others have left, and what they held with them
                network = build_model(config.arch, data.channels, data.num_classes)[0]
                network.load_state_dict(shares.weights)
            if best is not None:
                network.load_state_dict(best.weights)
            evaluation = Evaluation(config, network, datamodule, trainer.strategy.root_device)
            at_end = final_figures(evaluation)
            if best is None:  # all devices have counted the hits of the last epoch
                at_end["test_accuracy"] = result["test_accuracy"]
            result.update(at_end)
            if probed:
                result["probe_accuracy"] = probe(evaluation, probed, data.num_classes)
            plot_curves(config.out / "curves.png", {config.arm: records.rows})
            # Last: it stands for a run that is complete.
            with atomic_write(config.out / "result.json") as path:
                path.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n")
            seconds, emd = result["seconds"], result["emd_seconds"]
            of_best = "" if best is None else f", of epoch {best.epoch}, the best by validation"
            print(f"test accuracy {100 * result['test_accuracy']:.2f} %{of_best}")
            print(f"{seconds:.1f} s, of which {emd:.1f} s ({100 * emd / seconds:.1f} %) in the feature loss")
            print(f"wrote {config.out / 'result.json'}, metrics.csv and curves.png")
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()  # its threads have to end before the process does
    return result


# The folder of the run


def _protect_earlier_run(config: TrainConfig) -> None:
    """A folder that holds a run is written to only by one that says what is to become of it."""
    if config.resume is not None or config.overwrite:
        return
    ways = "--resume goes on with it, --overwrite replaces it, another --out leaves it alone"
    if (config.out / "result.json").exists():
        raise TrainError(f"--out: {config.out} holds a finished run; {ways}")
    if any((config.out / name).exists() for name in (LAST_CHECKPOINT, PREVIOUS_CHECKPOINT)):
        raise TrainError(f"--out: {config.out} holds a run that has not finished; {ways}")


def _protect_another_run(config: TrainConfig, checkpoint: Path) -> None:
    """The folder of one run does not get the rest of another, of which it may be the only copy."""
    if not any((config.out / name).exists() for name in ("result.json", LAST_CHECKPOINT, PREVIOUS_CHECKPOINT)):
        return
    try:
        kept = json.loads((config.out / KEPT_OPTIONS).read_text())
        held = {name: kept[name] for name in config.identity() if name in kept}
    except (OSError, ValueError, TypeError):
        return  # of a version that left no options, or not to be read: nothing says that it is another one
    for name, value in json.loads(json.dumps(config.identity())).items():
        if held.get(name, value) != value:
            raise TrainError(
                f"--out: {config.out} holds another run than {checkpoint}, with {flag(name)} {held[name]} instead of "
                f"{value}; give this one a folder of its own"
            )


def _clear(config: TrainConfig) -> None:
    """Takes away what must not be mixed with this run: all of an earlier one, or its end and what was half written."""
    old: list[str | Path] = ["result.json"]
    if config.resume is None:
        old += ["metrics.csv", "curves.png", STRIP, BEST_CHECKPOINT, LAST_CHECKPOINT, PREVIOUS_CHECKPOINT]
        for folder in ("steps", "tensorboard", FOLDER):
            shutil.rmtree(config.out / folder, ignore_errors=True)
    try:
        for name in old:
            (config.out / name).unlink(missing_ok=True)
        for folder in (config.out, (config.out / LAST_CHECKPOINT).parent):
            remove_partial(folder)
    except OSError as error:
        raise TrainError(f"--out: {error.filename} cannot be removed: {error.strerror}") from error


# Going on with a run


def _resume_from(config: TrainConfig, path: Path, first: bool) -> tuple[Path, dict[str, Any]]:
    """The checkpoint to go on from; one that is damaged is said to be, and is set aside if it is the run's own."""
    found, content, note = find_checkpoint(path)
    before = content["sfr_ext"]
    if "loops" not in content:
        raise TrainError(f"--resume: {found} holds the weights of the best epoch alone; last.ckpt beside it goes on")
    for name, value in config.identity().items():
        older = options()[name].before
        then = before.get(name, TrainConfig.__dataclass_fields__[name].default if older is None else older)
        if then != value:
            raise TrainError(f"--resume: {found} was trained with {flag(name)} {then}, got {value}")
    done = content["epoch"] + 1
    finished = (config.out / "result.json").exists()
    if done > config.epochs or (done == config.epochs and finished):
        raise TrainError(f"--resume: {found} has already run {counted(done, 'epoch')}; give more with --epochs")
    if note is not None and first:
        print(f"sfr-ext: {note}", file=sys.stderr)
        if path.exists() and path.resolve() == (config.out / LAST_CHECKPOINT).resolve():
            # Not to be kept as the one before the next.
            path.replace(path.with_name("damaged.ckpt"))
    return found, content


def _check_same_data(
    config: TrainConfig, data: ImageData | FolderData, path: Path, content: dict[str, Any] | None
) -> None:
    assert content is not None
    for what, number in data.identity().items():
        then = content.get("sfr_ext_data", {}).get(what, number)
        if then != number:
            raise TrainError(f"--resume: {path} was trained on {then} {what}, --data {config.data} has {number} now")


# The run itself


def _fit(trainer: L.Trainer, module: Classifier, datamodule: ImageModule, checkpoint: Path | None) -> None:
    out = module.config.out
    try:
        with warnings.catch_warnings():
            # More workers than were asked for are the user's affair; for images in memory they cannot help.
            warnings.filterwarnings("ignore", ".*does not have many workers.*")
            warnings.filterwarnings("ignore", ".*Checkpoint directory .* exists and is not empty.*")
            warnings.filterwarnings("ignore", ".*The dirpath has changed from.*")
            # Of 1 x 1 convolutions, whose strides can be written in two ways.
            warnings.filterwarnings("ignore", ".*Grad strides do not match bucket view strides.*")
            warnings.filterwarnings("ignore", ".*smaller than the logging interval.*")
            # The steps are made here; with --accumulate they may be fewer than half of the batches.
            warnings.filterwarnings("ignore", ".*times in training without .step.*")
            warnings.filterwarnings("ignore", ".*isinstance.treespec, LeafSpec.*")
            trainer.fit(module, datamodule=datamodule, ckpt_path=None if checkpoint is None else str(checkpoint))
    except SystemExit:
        # How newer releases of Lightning end after an interrupt; older ones return.
        if not trainer.interrupted:
            raise
    except BaseException as error:
        # The processes that this one started would wait for it.
        if trainer.strategy.launcher is not None:
            trainer.strategy.launcher.kill(signal.SIGKILL)
        if isinstance(error, OSError) and (refuses_writing(error) or _lies_in(out, error.filename)):
            raise TrainError(f"--out: {error.filename or out} cannot be written: {error.strerror}") from error
        if isinstance(error, RuntimeError) and "loading state_dict" in str(error):
            lines = [line.strip() for line in str(error).strip().splitlines()]
            said = f"--resume: {checkpoint} does not fit {flag('arch')} {module.config.arch} ({' '.join(lines[1:2])})"
            raise EveryProcessError(said) from error
        raise
    finally:
        for hooked in (module.regularizer, module.relative):
            if hooked is not None:
                hooked.remove()
    if trainer.interrupted:
        saved = (out / LAST_CHECKPOINT).exists()
        how = "the same command with --resume goes on after the last whole epoch" if saved else "no epoch was finished"
        raise KeyboardInterrupt(how)


def _lies_in(folder: Path, name: Any) -> bool:
    """Whether this file that the system complains of is one of the folder's, which somebody may have removed."""
    return isinstance(name, (str, Path)) and Path(name).absolute().is_relative_to(folder.absolute())


def _workers(config: TrainConfig, data: ImageData | FolderData) -> int:
    if config.workers is not None:
        return config.workers
    return min(8, os.cpu_count() or 1) if isinstance(data, FolderData) else 0


def _monitor(
    config: TrainConfig, data: ImageData | FolderData, model: torch.nn.Module, stages: tuple[str, ...] | None
) -> Monitor:
    if config.channel_mode == "project":
        raise TrainError("--monitor does not show --channel-mode project, whose shallow maps are projected")
    image = first_test_image(data)
    layers = compared_layers(config, model, stages, image)
    if not layers:
        raise TrainError(f"--monitor with --arch {config.arch} needs --layers, shallow to deep")
    return Monitor(config, model, layers, image, data.mean, data.std)


def _probed_layers(
    config: TrainConfig, data: ImageData | FolderData, model: torch.nn.Module, stages: tuple[str, ...] | None
) -> dict[str, Transform | None]:
    layers = compared_layers(config, model, stages, torch.empty(data.channels, *images_of(data)["size"]))
    if not layers:
        raise TrainError(f"--probe with --arch {config.arch} needs --layers, shallow to deep")
    return layers


def _is_installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def _tensorboard(config: TrainConfig) -> TensorBoardLogger:
    try:
        return TensorBoardLogger(config.out, name="tensorboard", version="")
    except ModuleNotFoundError as error:
        raise TrainError("--tensorboard needs tensorboard, not installed here: pip install tensorboard") from error


def _build_trainer(config: TrainConfig, callbacks: list[L.Callback], progress: bool) -> L.Trainer:
    last = ModelCheckpoint(
        dirpath=config.out / LAST_CHECKPOINT.parent,
        filename=LAST_CHECKPOINT.stem,
        save_on_train_epoch_end=True,
        enable_version_counter=False,
    )
    loggers: list[Any] = [CSVLogger(config.out, name="steps")]
    if _is_installed("tensorboard") if config.tensorboard is None else config.tensorboard:
        loggers.append(_tensorboard(config))
    bar = [RichProgressBar(leave=True)] if progress and _is_installed("rich") else []
    try:
        return L.Trainer(
            accelerator=config.accelerator,
            devices=config.devices if config.devices == "auto" else int(config.devices),
            num_nodes=config.nodes,
            strategy=Sharded() if config.strategy == "fsdp2" else "auto",
            precision=_PRECISION[config.precision],  # type: ignore[arg-type]
            max_epochs=config.epochs,
            accumulate_grad_batches=config.accumulate,
            callbacks=[*callbacks, *bar, last],
            plugins=[KeepingIO()],
            logger=loggers,
            log_every_n_steps=20,
            num_sanity_val_steps=0,
            check_val_every_n_epoch=config.test_every,
            use_distributed_sampler=False,
            enable_progress_bar=progress,
            enable_model_summary=False,
        )
    except (MisconfigurationException, RuntimeError, ValueError) as error:  # devices that are not there
        asked = f"--accelerator {config.accelerator} --devices {config.devices}"
        raise TrainError(f"{asked}: {str(error).splitlines()[0]}") from error


def _result(
    config: TrainConfig, data: ImageData | FolderData, module: Classifier, records: Records, trainer: L.Trainer
) -> dict[str, Any]:
    rows = records.rows
    if not rows:
        raise TrainError("the run was interrupted before its first epoch ended")
    return {
        "arm": config.arm,
        "seed": config.seed,
        "data": config.data,
        "data_source": data.source,
        "class_names": list(data.class_names),
        "train_images": len(data.train_labels),
        "test_images": len(data.test_labels),
        "arch": config.arch,
        "parameters": sum(p.numel() for p in module.model.parameters()),
        "layers": module.compared,
        "epochs": int(rows[-1]["epoch"]),
        "test_accuracy": rows[-1].get("test_accuracy"),
        "train_accuracy": rows[-1]["train_accuracy"],
        "seconds": sum(row["seconds"] for row in rows),
        "emd_seconds": sum(row["emd_seconds"] for row in rows),
        "devices": trainer.world_size,
        "threads": torch.get_num_threads(),  # of each: sums are rounded by their number
        "options": _plain(config),
        "versions": {
            "sfr_ext": sfr_ext.__version__,
            "torch": torch.__version__,
            "lightning": L.__version__,
            "python": platform.python_version(),
        },
    }


def _plain(config: TrainConfig) -> dict[str, Any]:
    options = {f.name: getattr(config, f.name) for f in fields(config)}
    return {k: str(v) if isinstance(v, Path) else v for k, v in options.items()}
