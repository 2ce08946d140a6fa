"""What a tolerance buys and costs: ``python -m benchmarks.studies.tolerance``.

For the feature maps of a trained network and for random ones (unit vectors; rectified with a common part), 49 x 49
patches: the largest relative error over the problems of the gradients in features and in weights, against float64
converged to 1e-13, and the time of a forward as a multiple of that at 1e-3 (medians of interleaved runs, float32).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import sfr_ext

from ..data.workloads import load_feature_maps
from ..harness.device import Device
from ..harness.report import markdown
from ..harness.row import Entry, own_row, quartiles
from ..harness.timing import time_rows

EPS = (0.3, 0.1, 0.05, 0.02)
STEPS = ((torch.float32, 1e-3), (torch.float32, 1e-4), (torch.float32, 1e-5), (torch.float64, 1e-9))
EXACT = (torch.float64, 1e-13)


def problems() -> dict[str, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    shallow, deep = load_feature_maps()
    unit = [F.normalize(torch.randn(8, 64, 7, 7), dim=1) for _ in range(2)]
    common = 0.5 * torch.randn(8, 64, 1, 1)
    return {
        "real maps": (shallow, deep[:, 0]),
        "unit": (unit[0], unit[1]),
        "rectified": (torch.relu(torch.randn(8, 64, 7, 7) + common), torch.relu(torch.randn(8, 64, 7, 7))),
    }


def gradients(x: Tensor, y: Tensor, eps: float, dtype: torch.dtype, tol: float) -> tuple[Tensor, Tensor, bool]:
    """Of the student's features and weights; and whether every problem converged."""
    grads: list[Tensor] = []
    converged = True
    for weights in (False, True):  # which are solved to more than tol where they want a gradient
        x = x.detach().to(dtype).clone().requires_grad_()
        a = torch.ones(len(x), 49, dtype=dtype, requires_grad=weights)
        result = sfr_ext.solve_sample(x, y.to(dtype), a, eps=eps, tol=tol, max_iter=20_000)
        grads += torch.autograd.grad(result.transport_cost.sum(), a if weights else x)
        converged = converged and bool(result.converged.all())
    return grads[0].double(), grads[1].double(), converged


def largest_error(ours: Tensor, exact: Tensor) -> float:
    ours, exact = ours.flatten(1), exact.flatten(1)
    return ((ours - exact).norm(dim=1) / exact.norm(dim=1)).max().item()


def relative_times(x: Tensor, y: Tensor, eps: float, rounds: int) -> list[float]:
    """Of the float32 steps, over the first."""
    tols = [tol for dtype, tol in STEPS if dtype == torch.float32]
    entries: list[Entry] = [
        (own_row(f"{tol:.0e}"), partial(sfr_ext.solve_sample, x, y, eps=eps, tol=tol)) for tol in tols
    ]
    time_rows(entries, Device("cpu"), rounds)
    medians = [quartiles(row.milliseconds)[1] for row, _ in entries]
    return [median / medians[0] for median in medians]


def rows(rounds: int) -> Iterator[list[str]]:
    for name, (x, y) in problems().items():
        for eps in EPS:
            exact = gradients(x, y, eps, *EXACT)
            times = relative_times(x, y, eps, rounds)
            for which, (dtype, tol) in enumerate(STEPS):
                ours = gradients(x, y, eps, dtype, tol)
                errors = [f"{largest_error(ours[k], exact[k]):.0e}" for k in (0, 1)]  # type: ignore[arg-type]
                spent = f"{times[which]:.1f}" if which < len(times) else ""
                kind = str(dtype).removeprefix("torch.")
                converged = "yes" if ours[2] and exact[2] else "no"
                yield [name, str(eps), f"{kind}, {tol:.0e}", *errors, converged, spent]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.studies.tolerance", description=__doc__)
    parser.add_argument("--rounds", type=int, default=15, help="times that each forward is timed (default: 15)")
    options = parser.parse_args()
    header = ("maps", "eps / std", "type, tol", "features", "weights", "all converged", "time")
    print(markdown(header, rows(options.rounds)))


if __name__ == "__main__":
    main()
