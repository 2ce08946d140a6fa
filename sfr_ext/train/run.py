"""From a configuration to trained weights, result.json, metrics.csv and curves.png."""

from __future__ import annotations

import json
import platform
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

import sfr_ext

from .config import TrainConfig
from .data import ImageData, load_data
from .errors import TrainError
from .files import atomic_write
from .loader import ImageModule
from .models import build_model
from .module import Classifier
from .plots import plot_curves
from .records import Records

_PRECISION = {"32": "32-true", "64": "64-true", "bf16-mixed": "bf16-mixed", "16-mixed": "16-mixed"}


def run(config: TrainConfig) -> dict[str, Any]:
    """Train as ``config`` says; return what was written to ``OUT/result.json``.

    Raises:
        TrainError: an option that does not fit, a missing or corrupt file, a missing package.
    """
    if config.resume is not None:
        _check_resume(config)
    try:
        config.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrainError(f"--out: {config.out} cannot be made: {error.strerror}") from error
    data = load_data(config)
    L.seed_everything(config.seed, verbose=False)
    model, stages = build_model(config.arch, data.channels, data.num_classes)
    module = _IdentifiedClassifier(config, model, stages)
    progress = sys.stderr.isatty() if config.progress is None else config.progress
    records = Records(config.out / "metrics.csv", say=not progress)
    trainer = _build_trainer(config, records, progress)
    if trainer.is_global_zero:
        print(f"{config.arm} on {config.data} ({len(data.train_labels)} images from {data.source}), {config.arch}")
        # Of an earlier run into the same folder: result.json stands for a complete run.
        (config.out / "result.json").unlink(missing_ok=True)
    with warnings.catch_warnings():
        # Workers cannot help: the images are in memory, and a batch is one index operation.
        warnings.filterwarnings("ignore", ".*does not have many workers.*")
        warnings.filterwarnings("ignore", ".*Checkpoint directory .* exists and is not empty.*")
        warnings.filterwarnings("ignore", ".*smaller than the logging interval.*")
        warnings.filterwarnings("ignore", ".*isinstance.treespec, LeafSpec.*")
        datamodule = ImageModule(data, config.batch_size, config.seed, config.augment)
        _fit(trainer, module, datamodule, config.resume)
    result = _result(config, data, model, records, trainer)
    if trainer.is_global_zero:
        with atomic_write(config.out / "result.json") as path:
            path.write_text(json.dumps(result, indent=2) + "\n")
        plot_curves(config.out / "curves.png", {config.arm: records.rows})
        seconds, emd = result["seconds"], result["emd_seconds"]
        print(f"test accuracy {100 * result['test_accuracy']:.2f} %")
        print(f"{seconds:.1f} s, of which {emd:.1f} s ({100 * emd / seconds:.1f} %) in the feature loss")
        print(f"wrote {config.out / 'result.json'}, metrics.csv and curves.png")
    return result


class _IdentifiedClassifier(Classifier):
    """Leaves the options of the run in its checkpoints."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["sfr_ext"] = self.config.identity()


def _fit(trainer: L.Trainer, module: Classifier, datamodule: ImageModule, resume: Path | None) -> None:
    try:
        trainer.fit(module, datamodule=datamodule, ckpt_path=None if resume is None else str(resume))
    except SystemExit:
        # How newer releases of Lightning end after an interrupt; older ones return.
        if not trainer.interrupted:
            raise
    finally:
        if module.regularizer is not None:
            module.regularizer.remove()
    if trainer.interrupted:
        raise KeyboardInterrupt


def _build_trainer(config: TrainConfig, records: Records, progress: bool) -> L.Trainer:
    last = ModelCheckpoint(
        dirpath=config.out / "checkpoints",
        filename="last",
        save_on_train_epoch_end=True,
        enable_version_counter=False,
    )
    try:
        return L.Trainer(
            accelerator=config.accelerator,
            devices=config.devices if config.devices == "auto" else int(config.devices),
            num_nodes=config.nodes,
            precision=_PRECISION[config.precision],  # type: ignore[arg-type]
            max_epochs=config.epochs,
            callbacks=[records, last],
            logger=CSVLogger(config.out, name="steps"),
            log_every_n_steps=20,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            enable_progress_bar=progress,
            enable_model_summary=False,
        )
    except (MisconfigurationException, RuntimeError, ValueError) as error:  # devices that are not there
        raise TrainError(str(error).splitlines()[0]) from error


def _check_resume(config: TrainConfig) -> None:
    path = config.resume
    assert path is not None
    if not path.is_file():
        raise TrainError(f"--resume: {path} does not exist")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        before = checkpoint["sfr_ext"]
        done = int(checkpoint["epoch"]) + 1
    except Exception as error:  # torch.load raises whatever its parts raise
        raise TrainError(f"--resume: {path} is not a checkpoint of sfr-ext train") from error
    for name, value in config.identity().items():
        if before.get(name) != value:
            flag = "--" + name.replace("_", "-")
            raise TrainError(f"--resume: {path} was trained with {flag} {before.get(name)}, got {value}")
    if done >= config.epochs:
        raise TrainError(f"--resume: {path} has already run {done} epochs; give more with --epochs")


def _result(
    config: TrainConfig, data: ImageData, model: torch.nn.Module, records: Records, trainer: L.Trainer
) -> dict[str, Any]:
    rows = records.rows
    if not rows:
        raise TrainError("the run was interrupted before its first epoch ended")
    return {
        "arm": config.arm,
        "seed": config.seed,
        "data": config.data,
        "data_source": data.source,
        "train_images": len(data.train_labels),
        "test_images": len(data.test_labels),
        "arch": config.arch,
        "parameters": sum(p.numel() for p in model.parameters()),
        "epochs": int(rows[-1]["epoch"]),
        "test_accuracy": rows[-1]["test_accuracy"],
        "train_accuracy": rows[-1]["train_accuracy"],
        "seconds": sum(row["seconds"] for row in rows),
        "emd_seconds": sum(row["emd_seconds"] for row in rows),
        "devices": trainer.world_size,
        "options": _plain(config),
        "versions": {
            "sfr_ext": sfr_ext.__version__,
            "torch": torch.__version__,
            "lightning": L.__version__,
            "python": platform.python_version(),
        },
    }


def _plain(config: TrainConfig) -> dict[str, Any]:
    return {k: str(v) if isinstance(v, Path) else v for k, v in vars(config).items()}
