"""What is to be reached besides being faster than other libraries, one table each."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import sfr_ext
from sfr_ext.ops import forced
from sfr_ext.train.models import build_model
from sfr_ext.train.stopwatch import Stopwatch, TimedRegularizer

from ..data.workloads import WORKLOADS, Problem, random_maps
from ..harness import limits
from ..harness.floors import floor_of, step_floor
from ..harness.machine import torch_threads, version_of
from ..harness.measure import Row, quartiles, set_ratios
from ..harness.results import Table, Verdict
from ..harness.run import Run
from .comparison import iterations_of

Entry = tuple[Row, Callable[[], Any]]


def _row(name: str, ours: bool = True, base: str = "", floor: float | None = None) -> Row:
    return Row(name, version_of("sfr_ext" if ours else "torch"), ours=ours, base=base, floor=floor)


def distances(run: Run) -> Table:
    """All costs of the batch, beside a matrix product of the same shape."""
    problem = WORKLOADS["w1"].make().to(run.device.name)
    x, y = problem.tokens()
    transposed = y.transpose(1, 2).contiguous()
    # Patches that lie close: there a product cancels, and differences do not.
    close = x + 1e-3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x)
    exact = (x.double() - close.double()).norm(dim=-1)
    count, n, m, c = problem.sizes()
    floor = floor_of(float(count * n * m * c), 4 * (x.numel() + y.numel()), run.limits).milliseconds
    ways: dict[str, tuple[bool, Callable[[Tensor, Tensor], Tensor]]] = {
        "sfr_ext.cost_matrix": (True, sfr_ext.cost_matrix),
        "torch.cdist": (False, torch.cdist),
        "torch.cdist, direct": (False, lambda p, q: torch.cdist(p, q, compute_mode="donot_use_mm_for_euclid_dist")),
    }
    entries: list[Entry] = [(_row("torch.bmm", False, floor=floor), lambda: torch.bmm(x, transposed))]
    for name, (ours, way) in ways.items():
        row = _row(name, ours, "torch.bmm", floor)
        found = way(x, close).diagonal(dim1=1, dim2=2).double()
        row.value_error = float(((found - exact) / exact).abs().max())
        entries.append((row, partial(way, x, y)))
    # The other layout that features come in.
    row = _row("sfr_ext.cost_matrix, maps", base="torch.bmm", floor=floor)
    entries.append((row, partial(sfr_ext.cost_matrix, problem.x, problem.y)))
    table = Table("distances", "all costs of w1, forward; errors: of patches 1e-3 apart, against float64")
    run.time(table, entries)
    for row in table.rows:
        if row.ours:
            low, middle, high = quartiles(row.ratios)
            measured = f"{middle:.2f} ({low:.2f} - {high:.2f}) of its time"
            target = f"{row.name} faster than a float32 batched matrix product"
            table.verdicts.append(Verdict(target, measured, middle < 1))
    return table


def iteration(run: Run) -> Table:
    """One plain Sinkhorn iteration on a cost that is given, cache-resident, one thread: the difference of a call with
    many iterations and one with few, over their number. So many that what a call costs besides, which wavers, is little
    beside their difference."""
    batch, few, many = 4, 100, 4100
    table = Table("iteration", f"one Sinkhorn iteration (difference of {many} and {few}), float32, one thread")
    with torch_threads(1):
        peak = limits.measure(run.device)
        calls: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {}
        for n in (49, 196):
            x, y = random_maps(batch, int(n**0.5), 64).tokens()
            cost = torch.cdist(x, y).to(run.device.name)

            def solve(iterations: int, cost: Tensor = cost) -> Any:
                return sfr_ext.solve(cost, eps=0.05, tol=0.0, max_iter=iterations)

            with forced(method="plain"):
                taken = [int(solve(iterations).n_iter.min()) for iterations in (few, many)]
            assert taken == [few, many], f"iterations were cut short: {taken}"
            row = _row(f"{n} x {n}", floor=floor_of(2.0 * n * n, 0, peak).milliseconds)
            table.rows.append(row)
            calls[row.name] = (partial(solve, few), partial(solve, many))
        with forced(method="plain"):
            for round_ in range(run.rounds):
                table.calibration.append(run.calibration.milliseconds())
                for row in table.rows:
                    calls[row.name][0]()  # the first after another row's finds the caches cold
                    short, long = (run.device.wall(call)[1] for call in calls[row.name])
                    row.milliseconds.append((long - short) / ((many - few) * batch))
                    row.rounds.append(round_)
    set_ratios(table.rows)
    for row in table.rows:
        times = row.of_floor
        assert times is not None
        target = f"an iteration of {row.name} within 2 times the multiply-add limit"
        table.verdicts.append(Verdict(target, f"{times:.2f} times", times <= 2))
    table.facts = {"multiply-adds a second, one thread": peak.multiply_adds}
    return table


def single(run: Run) -> Table:
    """All problems of a batch one after the other, beside the batch in one call; forward and backward, one thread."""
    sizes = {"49 x 49, C=512": (128, 7, 512), "16 x 16, C=64": (128, 4, 64), "196 x 196, C=256": (16, 14, 256)}
    table = Table("single", "milliseconds of one problem, alone and in a batch, forward and backward, one thread")
    with torch_threads(1):
        entries: list[Entry] = []
        peak = limits.measure(run.device)
        for name, (b, side, c) in sizes.items():
            batch = random_maps(b, side, c).to(run.device.name)
            floor = step_floor(batch, iterations_of(batch), peak).milliseconds / b
            alone = [
                _step(Problem(x[None], y[None], batch.eps, batch.tol)) for x, y in zip(batch.x, batch.y, strict=True)
            ]

            def each(alone: list[Callable[[], Any]] = alone) -> None:
                for step in alone:
                    step()

            entries.append((_row(f"{name}, B={b}", floor=floor), _step(batch)))
            entries.append((_row(f"{name}, B=1", base=f"{name}, B={b}", floor=floor), each))
        run.time(table, entries)
    for row, (b, _, _) in zip(table.rows, (size for size in sizes.values() for _ in range(2)), strict=True):
        row.milliseconds, row.processor = ([s / b for s in clock] for clock in (row.milliseconds, row.processor))
    for row in table.rows[1::2]:
        low, middle, high = quartiles(row.ratios)
        measured = f"{middle:.2f} ({low:.2f} - {high:.2f}) times"
        table.verdicts.append(Verdict(f"{row.name}: at most 1.3 times its share of a batch", measured, middle <= 1.3))
    return table


def _step(problem: Problem) -> Callable[[], Any]:
    x, y = (side.clone().requires_grad_() for side in (problem.x, problem.y))

    def step() -> None:
        x.grad = y.grad = None
        sfr_ext.emd_l2(x, y, eps=problem.eps, eps_scale="absolute", tol=problem.tol).backward()

    return step


# What a training step is timed with: as it comes, and cheaper.
SETTINGS: dict[str, dict[str, Any]] = {
    "": {},
    ", tol=1e-2": {"tol": 1e-2},
    ', pairs="last"': {"pairs": "last"},
    ', pairs="last", tol=1e-2': {"pairs": "last", "tol": 1e-2},
}


def training(run: Run) -> Table:
    """The EMD loss's share of a training step of the demo's network: forward, backward, SGD."""
    images, batch = 28, 128
    description = f"a step of SFR on resnet8, {batch} random images of {images} x {images}"
    table = Table("training", description)
    trainings = [Training(run.device.name, images, batch, options) for options in SETTINGS.values()]
    for name in SETTINGS:
        whole = _row(f"training step{name}")
        table.rows += [whole, _row(f"of it, EMD loss{name}", base=whole.name)]
    for each in trainings:
        each.step()
        each.step()
    for round_ in range(run.rounds):
        table.calibration.append(run.calibration.milliseconds())
        for each, whole, loss in zip(trainings, table.rows[::2], table.rows[1::2], strict=True):
            before = each.watch.seconds()
            whole.take(round_, run.device, each.step)
            loss.milliseconds.append(1e3 * (each.watch.seconds() - before))
            loss.rounds.append(round_)
    for each in trainings:
        each.sfr.remove()
    set_ratios(table.rows)
    share = 100 * statistics.median(table.rows[1].ratios)
    table.verdicts = [Verdict("the EMD loss takes under 15 % of a training step", f"{share:.1f} %", share < 15)]
    return table


class Training:
    """One network, and its step with SFR."""

    def __init__(self, device: str, images: int, batch: int, options: dict[str, Any]) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(batch, 1, images, images, generator=generator).to(device)
        self.target = torch.randint(10, (batch,), generator=generator).to(device)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model, stages = build_model("resnet8", channels=1, num_classes=10)
        self.model = model.to(device)
        assert stages is not None
        self.smooth = sfr_ext.DynamicLabelSmoothing(0.1, schedule="constant")
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, nesterov=True, weight_decay=5e-4)
        self.sfr = TimedRegularizer(model, stages, **options)
        self.watch: Stopwatch = self.sfr.stopwatch

    def step(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        (self.smooth(self.model(self.x), self.target) + self.sfr.loss()).backward()
        self.optimizer.step()


GOALS: dict[str, Callable[[Run], Table]] = {
    "distances": distances,
    "iteration": iteration,
    "single": single,
    "training": training,
}
