"""A workload: every library's rows, compared with the reference, timed in turns, judged."""

from __future__ import annotations

import torch

import sfr_ext

from ..data.workloads import Problem, Target, Workload
from ..harness.check import check, run_of
from ..harness.floors import step_floor
from ..harness.results import Table, Verdict
from ..harness.row import Entry, Row, quartiles, ratios, set_bases
from ..harness.run import Run
from ..harness.truth import Truth
from ..peers import MAX_ITER, OURS, PEERS, TO_1E_6, Peer
from .graphs import compiled_torch, replayed


def compare_peers(name: str, workload: Workload, run: Run, peers: list[Peer] | None = None) -> Table:
    problem = run.problem(workload.make())
    table = Table(name, workload.description)
    truth = Truth(problem)
    if peers is None:
        peers = list(PEERS if workload.peers else OURS)
        if any(target.to_1e_6 for target in workload.targets):
            peers += TO_1E_6
    if run.dry:  # which is not to wait for a compiler
        peers = [peer for peer in peers if not peer.name.endswith("torch.compile")]
    torch.compiler.reset()  # what other shapes compiled does not count towards the recompilations allowed
    iterations = iterations_of(problem)
    rows = []
    for peer in peers:
        row = check(peer, problem, truth)
        run.say(f"{name}: {row.name}: {row.problem or f'marginal error {row.marginal_error:.1e}'}")
        # A row that does more has the floor of the workload as it is, float64 and all.
        row.floor = step_floor(problem, 0 if row.objective == "exact" else iterations, run.limits).milliseconds
        rows.append(row)
    entries: list[Entry] = [
        (row, (lambda: None) if row.problem else run_of(peer, row, problem))
        for peer, row in zip(peers, rows, strict=True)
    ]
    if run.device.on_gpu or run.dry:
        if not rows[0].problem:
            entries.insert(1, replayed(*entries[0], run.device))
        if workload.peers and problem.metric == "l2":
            entries.append(compiled_torch(problem, truth, run.device))
        rows = [row for row, _ in entries]
    set_bases(rows)
    run.time(table, entries)
    table.facts = {"eps": problem.eps, "tol": problem.tol, "iterations of a problem": iterations / problem.sizes()[0]}
    if not all(peer.ours for peer in peers):
        table.verdicts = [verdict(target, rows, workload.targets) for target in workload.targets]
    return table


def iterations_of(problem: Problem) -> int:
    """Ours, of all problems together."""
    return int(sfr_ext.solve_sample(problem.x, problem.y, **problem.options(), max_iter=MAX_ITER).n_iter.sum())


def verdict(target: Target, rows: list[Row], all_targets: tuple[Target, ...]) -> Verdict:
    """By the peer that comes nearest to us, of those that reach the tolerance."""
    to_1e_6 = [row for row in rows if row.ours and row.name.endswith("to 1e-6")]
    if target.to_1e_6:
        mine = [row for row in to_1e_6 if row.reached and not row.problem]
        text = f"to 1e-6 at least {target.times:g} times faster than every other library to 1e-3"
    else:
        mine = [row for row in rows if row.ours and row.objective == "transport" and row not in to_1e_6][:1]
        text = f"{target.times:g} times {' and '.join(target.peers) or 'every other library'}"
    named = {name for other in all_targets for name in other.peers}
    if not target.peers and not target.to_1e_6 and named:
        text = f"{target.times:g} times every library but these"
    theirs = [
        row
        for row in rows
        if not row.ours
        and row.objective != "exact"
        and row.milliseconds
        and row.reached
        and (row.name in target.peers if target.peers else target.to_1e_6 or row.name not in named)
    ]
    mine = [row for row in mine if row.milliseconds]
    if not mine:
        reached = ", ".join(f"{row.name}: {row.problem or f'{row.marginal_error:.1e}'}" for row in to_1e_6)
        return Verdict(text, f"no row of ours reached it ({reached})", False if target.to_1e_6 else None)
    if not theirs:
        return Verdict(text, "no other library ran and reached the tolerance", None)
    own = min(mine, key=lambda row: quartiles(row.milliseconds)[1])
    spread, nearest = min((quartiles(ratios(row, own)), row.name) for row in theirs)
    low, middle, high = spread
    with_what = f", {own.name.removeprefix('sfr_ext, transport, ')}" if target.to_1e_6 else ""
    return Verdict(text, f"{middle:.3g} ({low:.3g} - {high:.3g}) times {nearest}{with_what}", middle >= target.times)
