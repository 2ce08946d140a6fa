"""What the memory of a GPU would have to do for each line of the kernels, counted by the emulator of tests/simt.

An access of a warp takes *wavefronts* of shared memory: as many as the words that one bank has to give, for each group
of lanes with 128 bytes; or *sectors* of 32 bytes of global memory. `least` says how many the same bytes would take in
the best of orders: what is above it are bank conflicts, and loads that are not coalesced. Widths of accesses are those
that g++ compiles, which are the source's.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import importlib
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT / "tests") not in sys.path:
    sys.path.insert(0, str(ROOT / "tests"))
build: Any = importlib.import_module("simt.build")

LANES = 32
# Functions that only carry a load: what matters is who calls them.
CARRIERS = ("load4", "load16", "load_vector", "from_float", "to_float", "take", "nothing", "log_weight", "mass_at")
MODULE = "csrc"


@dataclass
class Line:
    """Accesses of warps from one line to one kind of memory."""

    place: str  # file:line
    shared: bool
    accesses: int = 0
    lanes: int = 0
    cost: int = 0  # wavefronts, or sectors
    least: int = 0

    @property
    def each(self) -> float:
        """Wavefronts or sectors of one access."""
        return self.cost / self.accesses

    @property
    def excess(self) -> float:
        """Times as many as the same bytes would take at best."""
        return self.cost / max(self.least, 1)

    @property
    def idle(self) -> float:
        """Share of lanes that take no part."""
        return 1 - self.lanes / (LANES * self.accesses)


@dataclass
class Counts:
    lines: dict[tuple[str, bool], Line]
    meetings: dict[str, int]  # warps that came to the meeting point of each line

    def at(self, text: str, shared: bool) -> Line:
        """The only line whose source has this text."""
        found = [line for (place, kind), line in self.lines.items() if kind == shared and text in source_of(place)]
        if len(found) != 1:
            raise KeyError(f"{len(found)} lines with accesses have '{text}' on them: {[f.place for f in found]}")
        return found[0]

    def less(self, other: Counts, by: int = 1) -> Counts:
        """What is more here than there, for each of `by` rounds."""

        def rest(key: tuple[str, bool]) -> Line:
            mine, none = self.lines[key], Line(*key)
            theirs = other.lines.get(key, none)
            parts = ("accesses", "lanes", "cost", "least")
            return Line(*key, *((getattr(mine, part) - getattr(theirs, part)) // by for part in parts))

        lines = {key: line for key in self.lines if (line := rest(key)).accesses > 0}
        meetings = {place: (n - other.meetings.get(place, 0)) // by for place, n in self.meetings.items()}
        return Counts(lines, {place: n for place, n in meetings.items() if n > 0})


@functools.cache
def _sources() -> dict[str, list[str]]:
    paths = [p for folder in ("csrc", "tests/simt/planted") for p in sorted((ROOT / folder).rglob("*")) if p.is_file()]
    found: dict[str, list[str]] = {}
    for path in paths:
        # Two devices have files of the same name: the kernels are those of csrc/cuda.
        if path.name not in found or path.parent.name == "cuda":
            found[path.name] = path.read_text().splitlines()
    return found


def source_of(place: str) -> str:
    name, number = place.rsplit(":", 1)
    lines = _sources().get(name, [])
    return lines[int(number) - 1] if 0 < int(number) <= len(lines) else ""


def _places(path: Path, codes: list[int]) -> dict[int, str]:
    """file:line of each address of code, that of the caller where a function only carries a load."""
    if not codes:
        return {}
    command = ["addr2line", "-a", "-f", "-C", "-i", "-e", str(path), *(f"{code - 1:#x}" for code in codes)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    frames: dict[int, list[tuple[str, str]]] = {}
    lines = iter(text.splitlines())
    code = 0
    for line in lines:
        if line.startswith("0x"):
            code = int(line, 16) + 1
            frames[code] = []
        else:
            where = next(lines).split(" ")[0].rsplit("/", 1)[-1]
            frames[code].append((line, where))
    return {code: _chosen(of) for code, of in frames.items()}


def _chosen(frames: list[tuple[str, str]]) -> str:
    usual = [where for name, where in frames if not any(f"::{c}" in name or name.startswith(c) for c in CARRIERS)]
    known = [where for where in usual or [where for _, where in frames] if where.split(":")[0] in _sources()]
    return known[0] if known else frames[0][1]


def counted(library: Any, call: Callable[[], Any]) -> Counts:
    """Counts of the launches that the call makes, on a library of the flavour that watches accesses."""
    library.calls.simt_count(1)
    try:
        call()
        number = library.calls.simt_counts(None, 0)
        raw = (ctypes.c_uint64 * (8 * number))()
        library.calls.simt_counts(raw, number)
        meetings = library.calls.simt_meetings().decode()
    finally:
        library.calls.simt_count(0)
    rows = [raw[8 * k : 8 * k + 8] for k in range(number)]
    places = _places(library.path, sorted({row[0] for row in rows}))
    lines: dict[tuple[str, bool], Line] = {}
    for code, shared, _, _, accesses, lanes, cost, least in rows:
        line = lines.setdefault((places[code], bool(shared)), Line(places[code], bool(shared)))
        line.accesses += accesses
        line.lanes += lanes
        line.cost += cost
        line.least += least
    met: dict[str, int] = {}
    for row in meetings.splitlines():
        place, n = row.rsplit(" ", 1)
        place = place.rsplit("/", 1)[-1]
        met[place] = met.get(place, 0) + int(n)
    return Counts(lines, met)


# Of the kernels.


@dataclass(frozen=True)
class Run:
    """A step of `emd_l2`, cut off after so many iterations, on the emulated kernels."""

    side: int
    channels: int
    backward: bool = False
    strategy: str = "automatic"
    iterations: int = 3

    def counts(self) -> Counts:
        import torch

        from sfr_ext import emd_l2
        from sfr_ext.ops import forced

        torch.manual_seed(0)
        x, y = (torch.randn(1, self.channels, self.side, self.side, requires_grad=self.backward) for _ in range(2))
        library = build.emulator("race")
        library.seed(None)

        def step() -> None:
            with forced(strategy=self.strategy, method="relaxed", emulated=build.module("race")):
                value = emd_l2(x, y, max_iter=self.iterations, tol=1e-12)
                if self.backward:
                    value.backward()

        return counted(library, step)

    def iteration(self, rounds: int = 8) -> Counts:
        """What one more iteration takes."""
        longer = dataclasses.replace(self, iterations=self.iterations + rounds)
        return longer.counts().less(self.counts(), rounds)


def _table(counts: Counts, most: int) -> list[str]:
    lines = ["| line | memory | accesses | each | at best | idle lanes |", "|---|---|---:|---:|---:|---:|"]
    for line in sorted(counts.lines.values(), key=lambda line: -line.cost)[:most]:
        kind = "shared" if line.shared else "global"
        source = source_of(line.place).strip().replace("|", "\\|")
        source = source if len(source) <= 60 else source[:57] + "..."
        at_best = line.least / line.accesses
        lines.append(
            f"| `{line.place.split(':')[0]}`: `{source}` | {kind} | {line.accesses} | {line.each:.2f} | {at_best:.2f} "
            f"| {line.idle:.0%} |"
        )
    return lines


def report() -> str:
    """Tables in Markdown: the dearest lines of a training step, and what an iteration takes."""
    lines = [
        "Wavefronts of shared memory and sectors of global memory for each access of a warp, counted by the emulator.",
        "",
        "A training step at 49 x 49, C = 16, float32, cut off after 3 iterations; the 12 dearest lines:",
        "",
        *_table(Run(7, 16, backward=True).counts(), 12),
        "",
        "One iteration more:",
        "",
        "| problem | strategy | barriers of a warp | global loads of a warp | wavefronts | idle lanes |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for side, strategy, warps in ((4, "warp", 1), (7, "block", 4), (7, "cooperative", 16), (7, "stream", 16)):
        one = Run(side, 4, strategy=strategy).iteration()
        shared = [line for line in one.lines.values() if line.shared]
        far = sum(line.accesses for line in one.lines.values() if not line.shared)
        wavefronts = sum(line.cost for line in shared)
        accesses = sum(line.accesses for line in one.lines.values())
        idle = sum(line.idle * line.accesses for line in one.lines.values()) / max(accesses, 1)
        pixels = side * side
        lines.append(
            f"| {pixels} x {pixels} | {strategy} | {sum(one.meetings.values()) / warps:.1f} | {far / warps:.1f} "
            f"| {wavefronts} | {idle:.0%} |"
        )
    return "\n".join(lines)
