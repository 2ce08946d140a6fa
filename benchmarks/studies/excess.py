"""How far the entropic transport cost lies above the exact EMD: ``python -m benchmarks.studies.excess``.

It solves the pairs of benchmarks/data/feature_maps.npz, which are of a trained network, at several eps, and points that
are uniform in a square, a cube and more dimensions; and the same problems exactly by SciPy's assignment solver.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

import sfr_ext
from sfr_ext import reference

from ..data.workloads import load_feature_maps
from ..harness.machine import machine
from ..harness.report import markdown

EPS = (0.3, 0.1, 0.05, 0.03)
DIMENSIONS, SIZES, METRICS, EPS_OF_POINTS = (2, 3, 8, 64), (49, 400), ("l2", "sqeuclidean"), (0.05, 0.01)
MAX_ITER = 20_000


def excess(tol: float) -> list[dict[str, Any]]:
    """One entry per eps, with every pair's relative excess, iterations and marginal error."""
    shallow, deep = load_feature_maps()
    exact = reference.exact_emd(reference.cost_matrix(shallow, deep))
    entries = []
    for eps in EPS:
        result = sfr_ext.solve_sample(shallow, deep, eps=eps, tol=tol, max_iter=MAX_ITER)
        entries.append(
            {
                "eps": eps,
                "excess": (result.transport_cost.double() / exact - 1).flatten().tolist(),
                "iterations": result.n_iter.flatten().tolist(),
                "marginal_error": result.marginal_error.flatten().tolist(),
            }
        )
    return entries


def of_points(dimensions: int, size: int, tol: float) -> list[float]:
    """The median of eight clouds' relative excess, by metric and eps."""
    x, y = torch.rand(2, 8, size, dimensions, generator=torch.Generator().manual_seed(0))
    found = []
    for metric in METRICS:
        exact = reference.exact_emd(reference.cost_matrix(x, y, metric=metric))
        for eps in EPS_OF_POINTS:
            result = sfr_ext.solve_sample(x, y, metric=metric, eps=eps, tol=tol, max_iter=MAX_ITER)
            assert result.converged.all()
            found.append(float((result.transport_cost.double() / exact - 1).median()))
    return found


def table_of_points(tol: float) -> str:
    header = ("dimensions", "points", *(f"{metric}, eps {eps}" for metric in METRICS for eps in EPS_OF_POINTS))
    rows = (
        [str(d), str(n), *(f"{float(f'{100 * value:.2g}'):g} %" for value in of_points(d, n, tol))]
        for d in DIMENSIONS
        for n in SIZES
    )
    return markdown(header, rows)


def table(entries: list[dict[str, Any]]) -> str:
    rows = []
    for entry in entries:
        above, iterations = torch.tensor(entry["excess"]), torch.tensor(entry["iterations"])
        percent = [f"{100 * value:.2f} %" for value in (above.median(), above.min(), above.max())]
        rows.append([str(entry["eps"]), *percent, str(int(iterations.median())), str(int(iterations.max()))])
    header = ("eps / std", "excess over exact, median", "smallest", "largest", "iterations, median", "largest")
    return markdown(header, rows)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.studies.excess", description=__doc__)
    parser.add_argument("--tol", type=float, default=1e-3, help="L1 marginal error to stop at (default: 1e-3)")
    parser.add_argument("--out", type=Path, help="folder for excess.json and excess.md")
    options = parser.parse_args()
    entries = excess(options.tol)
    text = f"{table(entries)}\n\n{table_of_points(options.tol)}"
    print(text)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        content = {"tol": options.tol, "machine": machine(torch.get_num_threads()), "entries": entries}
        (options.out / "excess.json").write_text(json.dumps(content, indent=1) + "\n")
        (options.out / "excess.md").write_text(text + "\n")
        print(f"written: {options.out / 'excess.md'}, {options.out / 'excess.json'}")


if __name__ == "__main__":
    main()
