"""Time and work to each tolerance, of the solver's three methods: ``python -m benchmarks.studies.convergence``.

On the feature maps of a trained network (32 problems of 49 x 49 patches, benchmarks/data), one thread, costs given:
Sinkhorn's own iterations (plain), over-relaxed ones (relaxed), and what users get (automatic: a start from larger eps,
over-relaxed iterations, Newton steps). Every problem is timed by itself, as a batch of copies of it, the methods in
turn; the smallest of several CPU times of the thread counts. A problem that a method has not solved after `MAX_ITER`
iterations counts with the time until then.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import sfr_ext
from sfr_ext import ops

from ..data.workloads import load_feature_maps
from ..harness.machine import machine
from ..harness.report import markdown

METHODS = ("plain", "relaxed", "automatic")
EPS = (0.3, 0.1, 0.05, 0.03, 0.01)
# float32 has a floor of 1e-6 to 1e-5 (of the potentials' rounding), so what is tighter is solved in float64.
STEPS = ((torch.float32, (1e-3, 1e-4)), (torch.float64, (1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-9, 1e-12)))
MAX_ITER = 20_000
TITLE = f"""# Time to each tolerance

32 pairs of feature maps of a trained network, 49 x 49, costs given, one thread, each problem by itself
(`python -m benchmarks.studies.convergence`): Sinkhorn's own iterations (plain), over-relaxed ones (relaxed), and what
`solve` does (automatic). What was not solved in {MAX_ITER:,} iterations counts with the time until then.
"""
HEADER = (
    "eps / std",
    "type",
    "tol",
    "us a problem, median: plain",
    "relaxed",
    "automatic",
    "iterations, median: plain",
    "relaxed",
    "automatic",
    "automatic over the best of both, median (largest)",
    "slowest decile, best of both over automatic",
    "not converged: plain, relaxed, automatic",
)


@dataclass
class Step:
    """All problems by all methods at one eps, to one tolerance; lists by method, then by problem."""

    eps: float
    dtype: str
    tol: float
    microseconds: dict[str, list[float]]
    iterations: dict[str, list[int]]
    converged: dict[str, list[bool]]

    def best(self) -> np.ndarray[Any, Any]:
        """Of the two methods without Newton steps, problem by problem."""
        return np.minimum(self.microseconds["plain"], self.microseconds["relaxed"])

    def decile(self, times: Any) -> float:
        """Mean of the slowest tenth."""
        return float(np.sort(times)[-max(1, len(times) // 10) :].mean())


def costs() -> Tensor:
    shallow, deep = load_feature_maps()
    return sfr_ext.cost_matrix(shallow, deep).flatten(0, 1)


def timed(cost: Tensor, copies: int, **options: Any) -> tuple[float, sfr_ext.OTResult]:
    """Microseconds a problem."""
    batch = cost.expand(copies, *cost.shape)
    begin = time.thread_time()
    result = sfr_ext.solve(batch, max_iter=MAX_ITER, **options)
    return 1e6 * (time.thread_time() - begin) / copies, result


def measure(cost: Tensor, eps: float, tol: float, rounds: int) -> Step:
    name = str(cost.dtype).removeprefix("torch.")
    step = Step(eps, name, tol, {m: [] for m in METHODS}, {m: [] for m in METHODS}, {m: [] for m in METHODS})
    for problem in cost:
        # So many copies that a call's overhead is spread and the clock's grain does not show.
        copies, smallest = dict.fromkeys(METHODS, 1), dict.fromkeys(METHODS, float("inf"))
        for turn in range(rounds + 1):
            for method in METHODS:
                with ops.forced(method=method):
                    microseconds, result = timed(problem, copies[method], eps=eps, tol=tol)
                if turn == 0:
                    copies[method] = max(1, min(32, round(2000 / microseconds)))
                    step.iterations[method].append(int(result.n_iter[0]))
                    step.converged[method].append(bool(result.converged[0]))
                else:
                    smallest[method] = min(smallest[method], microseconds)
        for method in METHODS:
            step.microseconds[method].append(smallest[method])
    return step


def table(steps: list[Step]) -> str:
    rows = []
    for step in steps:
        times = [f"{np.median(step.microseconds[method]):.0f}" for method in METHODS]
        iterations = [f"{np.median(step.iterations[method]):.0f}" for method in METHODS]
        ratio = np.array(step.microseconds["automatic"]) / step.best()
        slow = step.decile(step.best()) / step.decile(step.microseconds["automatic"])
        missed = ", ".join(str(step.converged[method].count(False)) for method in METHODS)
        cells = [str(step.eps), step.dtype, f"{step.tol:.0e}", *times, *iterations]
        cells += [f"{np.median(ratio):.2f} ({ratio.max():.2f})", f"{slow:.1f}", missed]
        rows.append(cells)
    return markdown(HEADER, rows)


def plot(path: Path, steps: list[Step]) -> None:
    """Time against tolerance in float64: medians, and dotted the slowest decile."""
    from matplotlib.figure import Figure

    scales = sorted({step.eps for step in steps}, reverse=True)
    figure = Figure(figsize=(3 * len(scales), 3.4), layout="constrained")
    for axes, eps in zip(figure.subplots(1, len(scales), sharey=True, squeeze=False)[0], scales, strict=True):
        chosen = [step for step in steps if step.eps == eps and step.dtype == "float64"]
        tols = [step.tol for step in chosen]
        for colour, method in zip(("C7", "C1", "C0"), METHODS, strict=True):
            times = [step.microseconds[method] for step in chosen]
            axes.loglog(tols, [np.median(each) for each in times], f"{colour}.-", label=method)
            axes.loglog(tols, [step.decile(step.microseconds[method]) for step in chosen], f"{colour}.:")
        axes.invert_xaxis()
        axes.set_title(f"eps = {eps} std")
        axes.set_xlabel("L1 marginal error")
        axes.grid(alpha=0.3)
    axes.legend(title="dotted: slowest decile", fontsize="small")
    figure.axes[0].set_ylabel("us a problem")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.studies.convergence", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="times that each problem is timed (default: 5)")
    parser.add_argument("--eps", type=float, nargs="+", default=EPS, help="in units of the costs' deviation")
    parser.add_argument("--out", type=Path, help="folder for convergence.json, convergence.md and convergence.png")
    options = parser.parse_args()
    torch.set_num_threads(1)
    given, steps = costs(), []
    for dtype, tols in STEPS:
        for eps in options.eps:
            for tol in tols:
                steps.append(measure(given.to(dtype), eps, tol, options.rounds))
                print(table(steps[-1:]).splitlines()[-1], flush=True)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        content = {"machine": machine(1), "rounds": options.rounds, "steps": [asdict(step) for step in steps]}
        (options.out / "convergence.json").write_text(json.dumps(content) + "\n")
        (options.out / "convergence.md").write_text(f"{TITLE}\n{table(steps)}\n")
        plot(options.out / "convergence.png", steps)
        print(f"written: {options.out / 'convergence.md'} and beside it .json and .png")


if __name__ == "__main__":
    main()
