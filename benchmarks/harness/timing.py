"""How long rows take, in turns."""

from __future__ import annotations

import gc
import random

from .device import Device
from .limits import Calibration
from .row import Clock, Entry, Row, set_ratios

# Runs that everybody gets, however long they take.
FEWEST = 3


def time_rows(
    entries: list[Entry],
    device: Device,
    rounds: int,
    seconds: float = float("inf"),
    calibration: Calibration | None = None,
    clock: Clock | None = None,
) -> list[dict[str, float]]:
    """A B C, B A C, ...: what else the machine does meanwhile meets everybody alike. The order is drawn for each round,
    as who follows a large run, or the collection of garbage, finds cold caches.

    A run counts until the device is done, or what another ``clock`` says of it.

    A row of another library whose runs would take longer than ``seconds`` together takes part in fewer rounds, evenly
    spread, but in no less than 3; unless they take four times as long.

    Returns:
        what the calibration took in each round.
    """
    clock = clock or device.until_done
    running = [(row, run, _rounds_for(row, rounds, seconds)) for row, run in entries if not row.problem]
    calibrated = []
    for round_ in range(rounds):
        gc.collect()
        if calibration:
            calibrated.append(calibration.milliseconds())
        for row, run, wanted in random.Random(round_).sample(running, len(running)):
            spent = 0.0 if row.ours else sum(row.milliseconds) / 1e3
            if round_ in wanted and spent <= (4 * seconds if len(row.milliseconds) < FEWEST else seconds):
                device.flush()
                row.take(round_, clock, run)
    set_ratios([row for row, _ in entries])
    return calibrated


def _rounds_for(row: Row, rounds: int, seconds: float) -> set[int]:
    count = rounds
    if not row.ours and row.warm > 0:
        count = int(min(rounds, max(FEWEST, 1e3 * seconds / row.warm)))
    return {index * rounds // count for index in range(count)}
