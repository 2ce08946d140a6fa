"""First whether results agree, then how long they take."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

import sfr_ext
from sfr_ext import reference

from ..data.workloads import Problem
from ..peers import Peer, Solved, Unsuited
from .device import Device
from .limits import Calibration

# Members of the batch that are also solved by the float64 reference; fewer where its differences of all pairs, kept for
# backward, would fill the memory.
CHECKED, LARGEST = 4, 1 << 27
# A result further from the reference than this is not timed.
WRONG = 0.01
# Runs that everybody gets, however long they take.
FEWEST = 3


@dataclass
class Row:
    """One way to do the work of a table."""

    name: str
    version: str | None = None
    objective: str = ""
    ours: bool = False
    base: str = ""  # the row that ratios are to
    setting: Any = None
    reached: bool = True  # the tolerance
    marginal_error: float | None = None  # largest of the batch
    value_error: float | None = None  # relative, largest of the checked problems
    gradient_error: float | None = None  # relative in norm, of the gradient of the features
    problem: str | None = None  # why there are no times
    floor: float | None = None  # milliseconds
    warm: float = 0.0  # milliseconds of a run before the timing
    milliseconds: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)  # milliseconds of all threads, for the same samples
    rounds: list[int] = field(default_factory=list)  # in which the samples were taken
    ratios: list[float] = field(default_factory=list)  # to the base's samples of the same rounds

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def take(self, round_: int, device: Device, run: Callable[[], Any]) -> None:
        """One sample."""
        begin = time.process_time()
        self.milliseconds.append(device.wall(run)[1])
        self.processor.append(1e3 * (time.process_time() - begin))
        self.rounds.append(round_)

    @property
    def of_floor(self) -> float | None:
        """The median as a multiple of the floor."""
        return quartiles(self.milliseconds)[1] / self.floor if self.floor and self.milliseconds else None


def adapted(peer: Peer, problem: Problem) -> Problem:
    """The problem as this peer is to solve it."""
    x, y = (problem.x, problem.y) if peer.dtype is None else (problem.x.to(peer.dtype), problem.y.to(peer.dtype))
    return Problem(x, y, problem.eps, problem.tol if peer.tol is None else peer.tol)


def leaves(peer: Peer, problem: Problem) -> tuple[Tensor, Tensor]:
    x, y = (problem.x, problem.y) if peer.takes_maps else problem.tokens()
    return x.clone().requires_grad_(), y.clone().requires_grad_()


def step(peer: Peer, x: Tensor, y: Tensor, problem: Problem, setting: Any) -> Solved:
    """What is timed: forward and backward of the mean."""
    solved = peer.solve(x, y, problem, setting)
    if solved.gradients is None:
        solved.values.mean().backward()
    else:
        x.grad, y.grad = solved.gradients
    return solved


def marginal_error(plan: Tensor) -> float:
    plan = plan.detach().double()
    rows = (plan.sum(2) - 1 / plan.shape[1]).abs().sum(1)
    columns = (plan.sum(1) - 1 / plan.shape[2]).abs().sum(1)
    return float((rows + columns).max())


class Reference:
    """Values and gradients of the first members of a batch, in float64, for every objective."""

    def __init__(self, problem: Problem) -> None:
        self._groups = groups = problem.sizes()[0] // len(problem.x)
        _, n, m, c = problem.sizes()
        checked = max(1, min(CHECKED, LARGEST // (groups * n * m * c)))
        x, y = (side[: checked * groups].double().requires_grad_() for side in problem.pairs())
        cost = reference.cost_matrix(x, y)
        # A cost less f_i + g_j has the same plan and the same gradient. So the reference may begin where another solver
        # ended; that this was the solution is shown by its own marginal error.
        options: dict[str, Any] = {"eps": problem.eps, "eps_scale": "absolute", "tol": 1e-3 * problem.tol}
        start = sfr_ext.solve(cost.detach(), **(options | {"tol": 1e-10}), max_iter=20_000)
        shift = start.f.detach()[:, :, None] + start.g.detach()[:, None]
        result = reference.sinkhorn(cost - shift, **options)
        assert bool((result.marginal_error <= options["tol"]).all()), "the reference did not converge"
        back = start.f.mean(1) + start.g.mean(1)
        values = {"transport": result.transport_cost + back, "entropic": result.entropic_cost + back}
        if _has_scipy():
            exact = sfr_ext.solve(cost, solver="exact").transport_cost
            true = reference.exact_emd(cost)
            # The gradient is the plan's, which an equal value proves optimal.
            assert bool(((exact - true).abs() <= 1e-9 * true.abs()).all()), "two exact solvers disagree"
            values["exact"] = exact
        self.values = {name: value.detach() for name, value in values.items()}
        self.gradients = {
            name: torch.autograd.grad(value.sum(), (x, y), retain_graph=True) for name, value in values.items()
        }

    def compare(self, peer: Peer, solved: Solved, x: Tensor, y: Tensor) -> tuple[float, float]:
        """Relative errors of values and of gradients."""
        want = self.values[peer.objective]
        count = len(want)
        value_error = float(((solved.values[:count].detach() - want) / want).abs().max())
        off, size = 0.0, 0.0
        for leaf, gradient in zip((x, y), self.gradients[peer.objective], strict=True):
            assert leaf.grad is not None
            expected = gradient if peer.takes_maps else gradient.flatten(2).transpose(1, 2)
            grouped = expected.unflatten(0, (-1, self._groups))
            if peer.takes_maps and self._groups > 1:
                expected = grouped if leaf.dim() == 5 else grouped.sum(1)
            # Of the mean over all problems, hence the factor.
            got = leaf.grad[: len(expected)].double() * len(solved.values)
            off, size = off + float((got - expected).square().sum()), size + float(expected.square().sum())
        return value_error, (off / size) ** 0.5


def _has_scipy() -> bool:
    try:
        import scipy  # noqa: F401
    except ImportError:
        return False
    return True


def check(peer: Peer, problem: Problem, truth: Reference) -> Row:
    """Finds the coarsest setting that reaches the tolerance, and compares its result with the reference."""
    row = Row(peer.name, peer.version(), peer.objective, peer.ours)
    row.problem = _unsuited(peer, problem)
    if row.problem:
        return row
    try:
        problem = adapted(peer, problem)
        for row.setting in peer.settings:
            x, y = leaves(peer, problem)
            solved = step(peer, x, y, problem, row.setting)
            row.marginal_error = marginal_error(solved.plan())
            # Measured on a plan in float32, whose own rounding must not fail a solver at its limit.
            row.reached = row.marginal_error <= 1.01 * problem.tol
            if row.reached:
                break
            if math.isnan(row.marginal_error):  # with finer settings too
                row.problem = "failed: NaN in the plan of at least one problem"
                return row
        row.value_error, row.gradient_error = truth.compare(peer, solved, x, y)
        begin = time.perf_counter()  # not of the first run, which may have compiled something
        step(peer, *leaves(peer, problem), problem, row.setting)
        row.warm = 1e3 * (time.perf_counter() - begin)
    except Unsuited as reason:
        row.problem = str(reason)
        return row
    except Exception as error:
        row.problem = f"failed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        return row
    if not row.value_error <= WRONG:
        row.problem = f"disagrees with the reference: values off by {row.value_error:.2g}"
    return row


def _unsuited(peer: Peer, problem: Problem) -> str | None:
    device = problem.x.device.type
    if peer.device and peer.device != device:
        return f"not run: needs {'a GPU' if peer.device == 'cuda' else 'the CPU'}"
    if peer.version() is None:
        return f"not installed (pip install {peer.distribution})"
    if not peer.ours and problem.x.dtype not in (torch.float32, torch.float64):
        return f"not run: others get no {str(problem.x.dtype).removeprefix('torch.')}"
    return None


def run_of(peer: Peer, row: Row, problem: Problem) -> Callable[[], Any]:
    problem = adapted(peer, problem)
    x, y = leaves(peer, problem)

    def run() -> None:
        x.grad = y.grad = None
        step(peer, x, y, problem, row.setting)

    return run


def set_bases(rows: list[Row]) -> None:
    """Ratios are to our first row of the same value, else to the first row."""
    for row in rows:
        own = [other.name for other in rows if other.ours and other.objective == row.objective]
        row.base = own[0] if own else rows[0].name


def time_rows(
    entries: list[tuple[Row, Callable[[], Any]]],
    device: Device,
    rounds: int,
    seconds: float = float("inf"),
    calibration: Calibration | None = None,
) -> list[dict[str, float]]:
    """A B C A B C ..., each until the device is done: what else the machine does meanwhile meets everybody alike.

    A row of another library whose runs would take longer than ``seconds`` together takes part in fewer rounds, evenly
    spread, but in no less than 3; unless they take four times as long.

    Returns:
        what the calibration took in each round.
    """
    running = [(row, run, _rounds_for(row, rounds, seconds)) for row, run in entries if not row.problem]
    calibrated = []
    for round_ in range(rounds):
        gc.collect()
        if calibration:
            calibrated.append(calibration.milliseconds())
        for row, run, wanted in running:
            spent = 0.0 if row.ours else sum(row.milliseconds) / 1e3
            if round_ in wanted and spent <= (4 * seconds if len(row.milliseconds) < FEWEST else seconds):
                device.flush()
                row.take(round_, device, run)
    set_ratios([row for row, _ in entries])
    return calibrated


def _rounds_for(row: Row, rounds: int, seconds: float) -> set[int]:
    count = rounds
    if not row.ours and row.warm > 0:
        count = int(min(rounds, max(FEWEST, 1e3 * seconds / row.warm)))
    return {index * rounds // count for index in range(count)}


def set_ratios(rows: list[Row]) -> None:
    by_name = {row.name: row for row in rows}
    for row in rows:
        row.ratios = ratios(row, by_name.get(row.base, rows[0]))


def ratios(row: Row, base: Row) -> list[float]:
    """Pair by pair, of the rounds in which both ran."""
    found = dict(zip(base.rounds, base.milliseconds, strict=True))
    samples = zip(row.rounds, row.milliseconds, strict=True)
    return [own / found[round_] for round_, own in samples if round_ in found]


def quartiles(samples: list[float]) -> tuple[float, float, float]:
    if len(samples) == 1:
        return samples[0], samples[0], samples[0]
    low, middle, high = statistics.quantiles(samples, n=4, method="inclusive")
    return low, middle, high
