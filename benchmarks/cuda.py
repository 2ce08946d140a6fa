"""Speed on a GPU: ``python -m benchmarks.cuda --help``.

First what the GPU can do at most: memory copied a second, multiply-adds a second. Then forward and backward of every
workload beside the least that they can take, and at last other libraries on the same problems, whose results are
compared before they are timed. Without a GPU, ``--dry`` goes through the same code on tiny CPU tensors.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib
import json
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import sfr_ext
from sfr_ext import ops

from .data.workloads import Problem, random_maps
from .harness import report
from .harness.device import Device
from .harness.graphs import compiled_torch
from .harness.machine import commit
from .harness.measure import WRONG, Reference, Row, check, marginal_error, quartiles, run_of, set_bases, time_rows
from .peers import MAX_ITER, PEERS

# name: batch, side of both maps, channels
SIZES = {
    "w1": (128, 7, 512),
    "small": (128, 4, 64),
    "large": (16, 14, 256),
    "huge": (2, 28, 256),
}
QUICK_SIZES = ("w1", "small")
DRY_SIZES = {"dry": (3, 3, 8)}
PEER_SIZES = ("w1", "large", "dry")
DTYPES = (torch.float32, torch.bfloat16)

# What the floors assume. Instructions for a pair and channel: difference and multiply-add; backward three times that.
FORWARD_INSTRUCTIONS, BACKWARD_INSTRUCTIONS = 2, 6
LANES = 128  # float32 instructions of a multiprocessor in a clock
ITERATION_CLOCKS = 150  # of one iteration of one problem: two passes over the plan, one after the other

SMI_FIELDS = (
    "name,driver_version,compute_cap,clocks.sm,clocks.max.sm,clocks.mem,clocks.max.mem,power.limit,ecc.mode.current"
)


def smi(fields: str = SMI_FIELDS) -> dict[str, str]:
    """What nvidia-smi says of the first GPU; empty where it says nothing."""
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"], capture_output=True, text=True, timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):
        return {}
    lines = done.stdout.strip().splitlines()
    if done.returncode != 0 or not lines:
        return {}
    return dict(zip(fields.split(","), map(str.strip, lines[0].split(",")), strict=False))


@dataclasses.dataclass
class Ceilings:
    copy_bytes: float  # read and written a second by a device-to-device copy
    matrix_fmas: float  # a second, float32 without TF32
    vector_fmas: float  # a second, processors x lanes x clock
    processors: int
    clock: float  # hertz, measured while busy


def ceilings(device: Device, rounds: int) -> Ceilings:
    def best(function: Callable[[], Any]) -> float:
        return 1e-3 * min(device.milliseconds(function) for _ in range(rounds + 2))

    size, edge, cycles = (1 << 16, 64, 0) if not device.on_gpu else (1 << 30, 8192, 20_000_000)
    source = torch.ones(size, dtype=torch.uint8, device=device.name)
    target = torch.empty_like(source)
    copy = 2 * size / best(lambda: target.copy_(source))
    torch.backends.cuda.matmul.allow_tf32 = False
    a, b = torch.randn(edge, edge, device=device.name), torch.randn(edge, edge, device=device.name)
    matrix = edge**3 / best(lambda: torch.mm(a, b))
    if not device.on_gpu:
        return Ceilings(copy, matrix, LANES * 1e9, 1, 1e9)
    clock = cycles / best(lambda: torch.cuda._sleep(cycles))  # whose unit is a clock of the multiprocessors
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    return Ceilings(copy, matrix, processors * LANES * clock, processors, clock)


def floors(problem: Problem, n_iter: int, most: Ceilings) -> dict[str, dict[str, float]]:
    """Milliseconds that bytes, arithmetic and iterations take at least; arithmetic and bytes can overlap."""
    size = sum(t.numel() * t.element_size() for t in (problem.x, problem.y))
    pairs = len(problem.x) * problem.x[0, 0].numel() * problem.y[0, 0].numel() * problem.x.shape[1]
    found = {}
    for name, volume, instructions, iterations in (
        ("forward", size, FORWARD_INSTRUCTIONS, n_iter),
        ("backward", 3 * size, BACKWARD_INSTRUCTIONS, 0),  # features twice, and their gradients
    ):
        floor = {
            "bytes": 1e3 * volume / most.copy_bytes,
            "arithmetic": 1e3 * instructions * pairs / most.vector_fmas,
            "iterations": 1e3 * iterations * ITERATION_CLOCKS / most.clock,
        }
        floor["all"] = max(floor["bytes"], floor["arithmetic"]) + floor["iterations"]
        found[name] = floor
    return found


def make(size: tuple[int, int, int], device: Device, dtype: torch.dtype) -> Problem:
    problem = random_maps(*size)
    x, y = (t.to(device.name, dtype) for t in (problem.x, problem.y))
    return Problem(x, y, problem.eps, problem.tol)


def own(problem: Problem, device: Device, most: Ceilings, rounds: int) -> dict[str, Any]:
    """Forward and backward apart, launched and replayed, and what a call costs the host."""
    x, y = problem.x, problem.y
    kind = (problem.eps, False, 0.0, 0.0)  # absolute, no reach

    def forward() -> tuple[Tensor, ...]:
        return ops.emd_forward(x, y, None, None, None, 0, 1, *kind, problem.tol, MAX_ITER, "benchmark")

    solved = forward()
    upstream = torch.full_like(solved[0], 1 / len(x))

    def backward() -> tuple[Tensor, ...]:
        return torch.ops.sfr_ext.emd_backward.default(
            upstream, None, x, y, None, None, *solved[2:6], 0, 1, *kind, True, True, False, False
        )

    runs = {"forward": forward, "backward": backward}
    replays: dict[str, Callable[[], Any]] = {}
    notes = []
    for name, function in runs.items():
        expected = [t.clone() for t in function()]
        try:
            replays[name], written = device.graphed(function)
        except RuntimeError as error:
            notes.append(f"no graph of {name}: {error}")
            continue
        replays[name]()
        device.synchronize()
        wrong = not all(torch.equal(a, b) for a, b in zip(written, expected, strict=True))
        if wrong:
            notes.append(f"a replay of {name} has other bits than the call")

    left, right = (t.clone().requires_grad_() for t in (x, y))
    options: dict[str, Any] = dict(eps=problem.eps, eps_scale="absolute", tol=problem.tol, max_iter=MAX_ITER)

    def public() -> None:
        left.grad = right.grad = None
        sfr_ext.emd_l2(left, right, **options).backward()

    samples: dict[str, list[float]] = {}
    for _ in range(3):
        public()
    for _ in range(rounds):
        for name, function in runs.items():
            samples.setdefault(f"{name}, launched", []).append(device.milliseconds(function))
            if name in replays:
                samples.setdefault(f"{name}, graph", []).append(device.milliseconds(replays[name]))
        returned, done = device.wall(public)
        samples.setdefault("eager call, host", []).append(returned)
        samples.setdefault("eager call, wall", []).append(done)
    n_iter = solved[6]
    return {
        "eps": problem.eps,
        "tol": problem.tol,
        "n_iter": {"median": int(n_iter.median()), "largest": int(n_iter.max())},
        "marginal_error": float(solved[7].max()),
        "floors": floors(problem, int(n_iter.max()), most),
        "milliseconds": samples,
        "notes": notes,
    }


# ----------------------------------------------------------------------------------------------------- peers


def against_peers(problem: Problem, device: Device, rounds: int) -> list[Row]:
    truth = Reference(problem)
    entries: list[tuple[Row, Callable[[], Any]]] = []
    for peer in PEERS:
        if peer.name.endswith("torch.compile") and not device.on_gpu:
            continue  # a dry run is not to wait for a compiler
        row = check(peer, problem, truth)
        entries.append((row, (lambda: None) if row.problem else run_of(peer, row, problem)))
    entries.append(compiled_torch(problem, truth, device))
    for row, _ in entries:
        print(f"  {row.name}: {row.problem or f'marginal error {row.marginal_error:.1e}'}", flush=True)
    set_bases([row for row, _ in entries])
    time_rows(entries, device, rounds)
    return [row for row, _ in entries]


def squared_entropic(x: Tensor, y: Tensor, eps: float, tol: float) -> Tensor:
    return sfr_ext.emd_l2(
        x,
        y,
        metric="sqeuclidean",
        objective="entropic",
        eps=eps,
        eps_scale="absolute",
        tol=tol,
        max_iter=MAX_ITER,
        reduction="none",
    )


def against_flash(problem: Problem, device: Device, rounds: int) -> list[Row]:
    """FlashSinkhorn has squared distances only: a table of its own."""
    x, y = (t.requires_grad_() for t in problem.tokens())
    squared = torch.cdist(x.detach().double(), y.detach().double()).square()
    eps = 0.05 * float(squared.flatten(1).std(1, correction=0).mean())
    exact_x, exact_y = (t.detach().double().requires_grad_() for t in (x, y))
    truth = squared_entropic(exact_x, exact_y, eps, 1e-9)
    true_gradients = torch.autograd.grad(truth.mean(), (exact_x, exact_y))
    ours = Row("sfr_ext, entropic, squared distances", sfr_ext.__version__, "entropic", ours=True)
    flash = Row("FlashSinkhorn, alternating", None, "entropic")

    def compare(row: Row, values: Tensor) -> None:
        row.value_error = float(((values.detach().double() - truth.detach()) / truth.detach()).abs().max())
        gradients = torch.cat([grad.flatten() for grad in torch.autograd.grad(values.mean(), (x, y))])
        expected = torch.cat([grad.flatten() for grad in true_gradients])
        row.gradient_error = float((gradients - expected).norm() / expected.norm())

    def run_ours() -> None:
        x.grad = y.grad = None
        squared_entropic(x, y, eps, problem.tol).mean().backward()

    solved = sfr_ext.solve_sample(
        x, y, metric="sqeuclidean", eps=eps, eps_scale="absolute", tol=problem.tol, max_iter=MAX_ITER
    )
    ours.marginal_error = marginal_error(solved.plan)
    compare(ours, solved.entropic_cost)
    entries: list[tuple[Row, Callable[[], Any]]] = [(ours, run_ours)]

    def loss(potentials: bool) -> Any:
        return importlib.import_module("flash_sinkhorn").SamplesLoss(
            "sinkhorn",
            backend="alternating",
            use_epsilon_scaling=False,
            eps=eps,
            n_iters=flash.setting,
            debias=False,
            allow_tf32=False,
            potentials=potentials,
        )

    def run_flash() -> None:
        x.grad = y.grad = None
        loss(False)(x, y).mean().backward()

    try:
        flash.version = str(getattr(importlib.import_module("flash_sinkhorn"), "__version__", "of unknown version"))
        for flash.setting in (20, 50, 100, 200, 500, 1000):
            with torch.no_grad():
                f, g = loss(True)(x, y)
                plan = ((f[:, :, None] + g[:, None] - squared) / eps).exp() / (f.shape[1] * g.shape[1])
            flash.marginal_error = marginal_error(plan)
            if flash.marginal_error <= 1.01 * problem.tol:
                break
        compare(flash, loss(False)(x, y))
        if flash.value_error is None or not flash.value_error <= WRONG:
            flash.problem = f"disagrees with the reference: values off by {flash.value_error:.2g}"
    except ImportError:
        flash.problem = "not installed (pip install flash-sinkhorn)"
    except Exception as error:
        flash.problem = f"failed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    entries.append((flash, run_flash))
    set_bases([ours, flash])
    time_rows(entries, device, rounds)
    return [row for row, _ in entries]


# ---------------------------------------------------------------------------------------------------- report


def _cell(samples: list[float] | None, unit: float = 1.0) -> str:
    if not samples:
        return "-"
    low, middle, high = (unit * value for value in quartiles(samples))
    return f"{middle:.3g} ({low:.3g} - {high:.3g})"


def own_table(results: list[dict[str, Any]]) -> str:
    lines = [
        "| workload | direction | device, ms | as a graph, ms | floor, ms: bytes / arithmetic / iterations "
        "| x of floor | iterations, median / largest |",
        "|---|---|---|---|---|---|---|",
    ]
    for result in results:
        for name in ("forward", "backward"):
            floor, samples = result["floors"][name], result["milliseconds"]
            parts = " / ".join(f"{floor[part]:.3g}" for part in ("bytes", "arithmetic", "iterations"))
            timed = samples.get(f"{name}, graph") or samples[f"{name}, launched"]
            times = f"{quartiles(timed)[1] / floor['all']:.2f}"
            count = f"{result['n_iter']['median']} / {result['n_iter']['largest']}" if name == "forward" else ""
            cells = [_cell(samples[f"{name}, launched"]), _cell(samples.get(f"{name}, graph"))]
            lines.append(f"| {result['workload']} | {name} | {' | '.join(cells)} | {parts} | {times} | {count} |")
    lines += ["", "| workload | eager forward + backward: host, us | until the device is done, us |", "|---|---|---|"]
    for result in results:
        host, wall = (_cell(result["milliseconds"][f"eager call, {which}"], 1e3) for which in ("host", "wall"))
        lines.append(f"| {result['workload']} | {host} | {wall} |")
    notes = [f"* {result['workload']}: {note}" for result in results for note in result["notes"]]
    return "\n".join([*lines, "", *notes] if notes else lines)


def page(content: dict[str, Any], tables: list[tuple[str, str]]) -> str:
    facts, most = content["machine"], content["ceilings"]
    gpu = ", ".join(f"{key} {value}" for key, value in facts["nvidia_smi"].items())
    built = facts["sfr_ext"]
    parts = [
        "# Forward and backward on a GPU",
        "",
        f"`{content['command']}` on {facts['gpu']} ({gpu or 'nvidia-smi says nothing'}), torch {facts['torch']} with "
        f"CUDA {facts['torch_cuda']}, kernels of CUDA {built['cuda_version']} for {', '.join(built['cuda_archs'])}, "
        f"source {facts['source']}, {facts['date']}.",
        "",
        f"Copy {most['copy_bytes'] / 1e9:.4g} GB/s (read and written); float32 matrix product without TF32 "
        f"{most['matrix_fmas'] / 1e12:.3g} and vector arithmetic {most['vector_fmas'] / 1e12:.3g} multiply-adds a "
        f"picosecond; {most['processors']} multiprocessors at {most['clock'] / 1e6:.0f} MHz, measured while busy.",
        "",
        "Medians (quartiles) of interleaved runs; the caches are emptied of the inputs before each. Device: CUDA "
        "events around one launched call, the host ahead. Floors: the features once over the copy's rate, for backward "
        f"twice and their gradients; {FORWARD_INSTRUCTIONS} instructions for a pair and channel, backward "
        f"{BACKWARD_INSTRUCTIONS}, over the vector rate; {ITERATION_CLOCKS} clocks for each iteration of the longest "
        "problem (none for backward). x of floor: over the larger of the first two, plus the third.",
    ]
    for title, text in tables:
        parts += ["", f"## {title}", "", text]
    return "\n".join(parts) + "\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cuda", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer workloads and rounds")
    parser.add_argument("--dry", action="store_true", help="tiny tensors on the CPU; writes nothing")
    parser.add_argument("--rounds", type=int, help="times that each is run (default: 25, with --quick 7, with --dry 2)")
    parser.add_argument("--limit", type=float, default=200, help="seconds after which no further table is begun")
    parser.add_argument("--source", help="what the tree is called in the report (default: git's commit)")
    parser.add_argument("--out", type=Path, help="folder for <gpu>.json and <gpu>.md")
    options = parser.parse_args(arguments)
    if not options.dry and not torch.cuda.is_available():
        parser.error("torch sees no GPU; --dry goes through the code without one")
    begun = time.perf_counter()
    rounds = options.rounds or (2 if options.dry else 7 if options.quick else 25)
    device = Device("cpu" if options.dry else "cuda")
    sizes = DRY_SIZES if options.dry else {k: v for k, v in SIZES.items() if not options.quick or k in QUICK_SIZES}

    most = ceilings(device, rounds)
    print(f"ceilings: {dataclasses.asdict(most)}", flush=True)
    results, tables, failed = [], [], False
    for name, size in sizes.items():
        batch, side, channels = size
        description = f"B={batch}, {side**2} x {side**2} patches, C={channels}, random unit vectors"
        for dtype in DTYPES:
            kind = str(dtype).removeprefix("torch.")
            try:
                result = own(make(size, device, dtype), device, most, rounds)
            except RuntimeError as error:  # the others are still worth having
                print(f"{name}, {kind}: failed: {error}", flush=True)
                failed = True
                continue
            results.append({"workload": f"{name}, {kind}", "description": description, **result})
            failed |= bool(result["notes"])
            print(own_table(results[-1:]), flush=True)
    if results:
        tables.append(("Own kernels", own_table(results)))
        tables[0] = (tables[0][0], tables[0][1] + "\n\n" + "\n".join(_names(results)))
    compared = []
    for name in [name for name in sizes if name in PEER_SIZES]:
        for title, function in (("Libraries", against_peers), ("Squared distances", against_flash)):
            if time.perf_counter() - begun > options.limit:
                print(f"{title}, {name}: not begun, {options.limit:.0f} s are over", flush=True)
                continue
            try:
                rows = function(make(sizes[name], device, torch.float32), device, min(rounds, 15))
            except RuntimeError as error:
                print(f"{title}, {name}: failed: {error}", flush=True)
                failed = True
                continue
            tables.append((f"{title}: {name}", report.table(rows)))
            print(f"{title}, {name}\n{tables[-1][1]}", flush=True)
            compared.append({"workload": name, "table": title, "rows": [row.as_dict() for row in rows]})
            failed |= any(row.problem for row in rows if row.name.startswith("sfr_ext"))

    gpu = "no GPU: figures of a dry run" if options.dry else torch.cuda.get_device_name()
    content: dict[str, Any] = {
        "command": shlex.join(["python", "-m", "benchmarks.cuda", *(arguments or sys.argv[1:])]),
        "machine": {
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "gpu": gpu,
            "nvidia_smi": smi(),
            "source": options.source or commit(),
            "torch": torch.__version__,
            "torch_cuda": torch.version.cuda,
            "sfr_ext": sfr_ext.build_info(),
        },
        "ceilings": dataclasses.asdict(most),
        "results": results,
        "compared": compared,
    }
    as_json, as_page = json.dumps(content, indent=1) + "\n", page(content, tables)
    if options.dry:
        print(f"dry run: {len(as_json)} + {len(as_page)} characters of report, not written")
    elif options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        stem = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
        for suffix, text in ((".json", as_json), (".md", as_page)):
            options.out.joinpath(stem + suffix).write_text(text)
            print(f"written: {options.out / (stem + suffix)}")
    return int(failed)


def _names(results: list[dict[str, Any]]) -> list[str]:
    described = {result["workload"].split(",")[0]: result["description"] for result in results}
    return [f"* {name}: {description}" for name, description in described.items()]


if __name__ == "__main__":
    sys.exit(main())
