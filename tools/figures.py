"""Pictures of README and docs: matched photographs, speed beside other libraries, what eps does, how it works.

    python tools/figures.py [FOLDER]

The first shows two parts of one photograph (scikit-learn's china.jpg, by danielbuechele, CC BY 2.0); the second draws
the table `w1` of benchmarks/results/cpu/results.json, as `make bench` wrote it. Needs scikit-learn and matplotlib
(`pip install '.[train]'`).
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import sfr_ext

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "cpu" / "results.json"
SIDE = 40  # pixels of a patch
OURS, OTHERS = "#d1495b", "#8d99ae"


def photographs() -> tuple[Tensor, Tensor]:
    """Two parts `[3, H, W]` of a photograph: the second further to the right and down, darker, and noisy."""
    from sklearn.datasets import load_sample_image

    pixels = torch.from_numpy(np.array(load_sample_image("china.jpg"))).permute(2, 0, 1).float() / 255
    height, width, right, down = 8 * SIDE, 9 * SIDE, 3 * SIDE, SIDE
    a = pixels[:, :height, 20 : 20 + width]
    b = pixels[:, down : down + height, 20 + right : 20 + right + width]
    noise = 0.03 * torch.randn(b.shape, generator=torch.Generator().manual_seed(0))
    return a, (0.85 * b + noise).clamp(0, 1)


def features(image: Tensor) -> Tensor:
    """What each patch looks like, without its mean brightness: `[1, 3 * 8 * 8, rows, columns]`."""
    small = F.interpolate(image[None], scale_factor=8 / SIDE, mode="area")
    patches = F.pixel_unshuffle(small, 8)
    return F.normalize(patches - patches.mean(1, keepdim=True), dim=1)


def matching() -> Any:
    a, b = photographs()
    # A patch without a counterpart costs more than the reach, and stays unmatched.
    result = sfr_ext.solve_sample(features(a), features(b), solver="exact", reach=0.6)
    return sfr_ext.plot.matches(a, b, result)


def command(out: Path) -> None:
    """What `sfr-ext match` draws of the two photographs."""
    from sfr_ext.cli import main as sfr_ext_command

    with tempfile.TemporaryDirectory() as folder:
        names = [str(Path(folder) / name) for name in ("china-a.png", "china-b.png")]
        for name, image in zip(names, photographs(), strict=True):
            Image.fromarray((255 * image.permute(1, 2, 0)).byte().numpy()).save(name)
        sfr_ext_command(["match", *names, "-o", str(out), "--patches", "9", "--reach", "0.6"])


def speed() -> Any:
    """Milliseconds of forward and backward, a bar for each library."""
    from matplotlib.figure import Figure

    (table,) = (table for table in json.loads(RESULTS.read_text())["tables"] if table["name"] == "w1")
    # Rows that failed, or that solve another problem (to 1e-6), have no bar.
    rows = [
        (_label(row), statistics.median(row["milliseconds"]), row["ours"])
        for row in table["rows"]
        if row["problem"] is None and "1e-6" not in row["name"]
    ]
    rows.sort(key=lambda row: row[1], reverse=True)
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots()
    names, milliseconds, ours = zip(*rows, strict=True)
    bars = axes.barh(names, milliseconds, color=[OURS if mine else OTHERS for mine in ours])
    axes.bar_label(bars, [f"{value:.0f} ms" for value in milliseconds], padding=3, fontsize=9)
    axes.set_xlim(0, 1.1 * max(milliseconds))
    axes.set_xlabel("forward + backward, milliseconds, median (less is better)")
    figure.suptitle(f"{table['description']}; to a marginal error of 1e-3; CPU, 2 threads", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    for label, mine in zip(axes.get_yticklabels(), ours, strict=True):
        label.set_fontweight("bold" if mine else "normal")
    return figure


def _label(row: dict[str, Any]) -> str:
    """A library with the value that it computes, and a note where it does not get to the tolerance."""
    value = "" if row["objective"] in row["name"] else f", {row['objective']}"
    return row["name"] + value + ("" if row["reached"] else " (1e-3 not reached)")


def blur() -> Any:
    """The unit of eps, and plans between two sets of numbers, each in its order, for several eps."""
    from matplotlib.figure import Figure

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 1, generator=generator).sort(0)[0]
    y = (0.5 * torch.randn(60, 1, generator=generator) + torch.tensor([-1.2, 1.2]).repeat(30)[:, None]).sort(0)[0]
    cost = sfr_ext.cost_matrix(x[None], y[None], metric="sqeuclidean")
    std, mean = cost.std().item(), cost.mean().item()
    figure = Figure(figsize=(11, 2.7), layout="constrained")
    first, *others = figure.subplots(1, 5, width_ratios=(1.5, 1, 1, 1, 1))
    first.hist(cost.flatten().numpy(), bins=40, color=OTHERS)
    low, high = first.get_ylim()
    first.annotate("", (mean + std, 0.8 * high), (mean, 0.8 * high), arrowprops={"arrowstyle": "<->", "color": OURS})
    first.text(mean + std / 2, 0.84 * high, "1 std", ha="center", color=OURS)
    first.axvline(mean, color=OURS, linewidth=0.8)
    first.text(mean, 0.6 * high, " mean", color=OURS)
    first.set(title="costs of all pairs", xlabel="cost", ylabel="number of pairs", yticks=[], ylim=(low, high))
    for axes, eps in zip(others, (1.0, 0.3, 0.05, None), strict=True):
        plan = (sfr_ext.solve(cost, solver="exact") if eps is None else sfr_ext.solve(cost, eps=eps)).plan[0]
        axes.imshow(plan.numpy(), cmap="magma_r")
        axes.set(
            title="plan, exact" if eps is None else f"plan, eps = {eps} std",
            xlabel="y, in its order",
            xticks=[],
            yticks=[],
        )
    others[0].set_ylabel("x, in its order")
    return figure


def problem() -> Any:
    """Two sets of points with their plan as lines, their costs, and the plan as a matrix."""
    from matplotlib.figure import Figure

    generator = torch.Generator().manual_seed(3)
    x = torch.randn(7, 2, generator=generator)
    y = torch.randn(9, 2, generator=generator) + torch.tensor([2.5, 0.5])
    cost = sfr_ext.cost_matrix(x[None], y[None])
    plan = sfr_ext.solve(cost, solver="exact").plan[0]
    figure = Figure(figsize=(10, 3), layout="constrained")
    points, costs, matrix = figure.subplots(1, 3, width_ratios=(1.6, 1, 1))
    for i, j in plan.nonzero().tolist():
        width = 25 * float(plan[i, j])
        points.plot(*zip(x[i].tolist(), y[j].tolist(), strict=True), color="#c9a227", linewidth=width, zorder=1)
    points.scatter(*x.T.numpy(), color=OURS, s=60, label="one side, 7 patches")
    points.scatter(*y.T.numpy(), color="#30638e", s=60, marker="s", label="other side, 9 patches")
    points.legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, -0.2), ncols=2)
    points.set(xticks=[], yticks=[], title="matched by the plan")
    costs.imshow(cost[0].numpy(), cmap="Blues")
    costs.set(xticks=[], yticks=[], title="costs C", xlabel="j", ylabel="i")
    matrix.imshow(plan.numpy(), cmap="Oranges")
    matrix.set(xticks=[], yticks=[], title="exact plan P", xlabel="j", ylabel="i")
    return figure


def iterations() -> Any:
    """The marginal error by iterations, of Sinkhorn's own ones and of `solve`."""
    from matplotlib.figure import Figure

    generator = torch.Generator().manual_seed(0)
    cost = sfr_ext.cost_matrix(*torch.rand(2, 1, 49, 2, generator=generator).double())
    eps = float(sfr_ext.solve(cost, eps=0.03).eps)
    f, g, plain = torch.zeros(49).double(), torch.zeros(49).double(), []
    for _ in range(600):
        f = -eps * ((g - cost[0]) / eps - np.log(49)).logsumexp(1)
        plan = ((f[:, None] + g - cost[0]) / eps - 2 * np.log(49)).exp()
        plain.append(float((plan.sum(0) - 1 / 49).abs().sum()))
        g = -eps * ((f[:, None] - cost[0]) / eps - np.log(49)).logsumexp(0)
    steps, errors = [], []
    for tol in 10.0 ** -np.arange(0.5, 12.1, 0.5):
        result = sfr_ext.solve(cost, eps=0.03, tol=float(tol))
        steps.append(int(result.n_iter))
        errors.append(float(result.marginal_error))
    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.subplots()
    axes.semilogy(plain, color=OTHERS, label="Sinkhorn's iterations alone")
    axes.semilogy(steps, errors, "o-", color=OURS, markersize=4, label="sfr_ext.solve, stopped at several tolerances")
    axes.set(xlabel="iterations", ylabel="marginal error", title="49 x 49 points in a square, eps = 0.03 std, float64")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs" / "figures"
    matching().savefig(folder / "matched.jpg", dpi=90, pil_kwargs={"quality": 85})
    command(folder / "matching.jpg")
    speed().savefig(folder / "speed.png", dpi=110)
    blur().savefig(folder / "eps.png", dpi=100)
    problem().savefig(folder / "problem.png", dpi=90)
    iterations().savefig(folder / "iterations.png", dpi=90)


if __name__ == "__main__":
    main()
