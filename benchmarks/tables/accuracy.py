"""Time against the error that it buys, on the feature maps of a trained network."""

from __future__ import annotations

import dataclasses
from typing import Any

from ..data.workloads import WORKLOADS
from ..harness.check import check, run_of
from ..harness.results import Table
from ..harness.row import Entry
from ..harness.run import Run
from ..harness.truth import Truth
from ..peers import OURS, PEERS, Peer

TOLERANCES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
# Those that take a tolerance are given each of these; the others have settings of their own.
DRAWN = ("plain torch, log domain, eager", "POT solve_batch, log_sinkhorn", "OTT-JAX")
ANNEALED = ("GeomLoss tensorized",)


def accuracy(run: Run) -> Table:
    """At tight tolerances float32 may end above them: the error drawn is the one that was reached."""
    workload = WORKLOADS["maps"]
    problem = run.problem(workload.make())
    truth = Truth(problem)
    table = Table("accuracy", f"{workload.description}: time to several errors")
    entries: list[Entry] = []

    def add(peer: Peer, tol: float, setting: Any, label: str) -> None:
        asked = dataclasses.replace(problem, tol=tol)
        peer = dataclasses.replace(peer, name=f"{peer.name}, {label}", settings=(setting,))
        row = check(peer, asked, truth)
        row.base = f"{OURS[0].name}, tol {tol:.0e}"
        run.say(f"accuracy: {row.name}: {row.problem or f'marginal error {row.marginal_error:.1e}'}")
        entries.append((row, (lambda: None) if row.problem else run_of(peer, row, asked)))

    for peer in PEERS:
        if peer is OURS[0] or peer.name in DRAWN:
            for tol in TOLERANCES if peer.ours else TOLERANCES[:4]:
                add(peer, tol, peer.settings[0], f"tol {tol:.0e}")
        elif peer.name in ANNEALED:
            for setting in peer.settings:
                add(peer, problem.tol, setting, f"scaling {setting}")
    run.time(table, entries)
    return table
