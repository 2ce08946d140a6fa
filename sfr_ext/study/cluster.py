"""Runs as tasks of Ray, on this machine or on a cluster whose machines share the study's folder."""

from __future__ import annotations

import importlib.util
import logging
import os
import traceback
from collections.abc import Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from typing import Any

from ..extras import how_to_install
from ..train.errors import TrainError
from .local import LOG, TICK, Finished
from .plan import Run
from .work import from_json, reason, to_json, work

RETRIES = 3  # of a run whose worker was killed or whose machine has gone


def run_on_ray(runs: Sequence[Run], jobs: int, threads: int, gpus: float) -> Iterator[Finished | None]:
    """Execute the runs; yield each as it ends, and None now and then while none does.

    Ray places, counts and retries them. ``RAY_ADDRESS`` names a cluster; without it, Ray is started on this machine
    with room for ``jobs`` runs.

    Args:
        runs: to execute.
        jobs: how many at a time, of a Ray on this machine.
        threads: CPUs of each run.
        gpus: GPUs of each run; a part of 1 shares one.
    """
    if importlib.util.find_spec("ray") is None:
        raise TrainError(f"--executor ray needs ray, not installed here: {how_to_install('cluster', 'ray')}")
    import ray

    # Ray's workers wait asleep, as those of the local executor.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    here: dict[str, Any] = {"num_cpus": jobs * threads, "include_dashboard": False}
    try:
        ray.init(log_to_driver=False, logging_level=logging.WARNING, **({} if os.environ.get("RAY_ADDRESS") else here))
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise TrainError(f"--executor ray: {reason(error)}") from error
    try:
        # A process of its own for each run: what one leaves behind in its process is nothing to the next.
        task = ray.remote(num_cpus=threads, num_gpus=gpus, max_retries=RETRIES, max_calls=1)(train_run)
        waiting = {task.remote(to_json(run.config), threads): run for run in runs}
        while waiting:
            done, _ = ray.wait(list(waiting), timeout=TICK)
            for reference in done:
                run = waiting.pop(reference)
                try:
                    yield run, ray.get(reference)
                except ray.exceptions.RayError as error:
                    yield run, reason(error)
            yield None
    finally:
        ray.shutdown()


def train_run(named: dict[str, Any], threads: int) -> str | None:
    """The task: why the run failed, or None. A retry goes on from the run's checkpoint."""
    import torch

    torch.set_num_threads(threads)
    config = from_json(named)
    try:
        config.out.mkdir(parents=True, exist_ok=True)
        with (config.out / LOG).open("a", buffering=1) as said, redirect_stdout(said), redirect_stderr(said):
            try:
                work(config)
            except Exception as error:
                if not isinstance(error, TrainError):
                    traceback.print_exc()
                print(f"sfr-ext: {reason(error)}")
                return reason(error)
    except OSError as error:
        return f"{config.out / LOG} cannot be written: {error.strerror or error}"
    return None
