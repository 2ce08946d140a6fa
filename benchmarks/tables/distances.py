"""All costs of a batch, beside a matrix product of the same shape."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

import sfr_ext

from ..data.workloads import WORKLOADS
from ..harness.floors import floor_of
from ..harness.results import Table, Verdict
from ..harness.row import Entry, Row, own_row, quartiles
from ..harness.run import Run


def distances(run: Run) -> Table:
    problem = run.problem(WORKLOADS["w1"].make())
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
    entries: list[Entry] = [(Row("torch.bmm", torch.__version__, floor=floor), lambda: torch.bmm(x, transposed))]
    for name, (ours, way) in ways.items():
        row = own_row(name) if ours else Row(name, torch.__version__)
        row.base, row.floor = "torch.bmm", floor
        found = way(x, close).diagonal(dim1=1, dim2=2).double()
        row.value_error = float(((found - exact) / exact).abs().max())
        entries.append((row, partial(way, x, y)))
    # The other layout that features come in.
    row = own_row("sfr_ext.cost_matrix, maps", base="torch.bmm", floor=floor)
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
