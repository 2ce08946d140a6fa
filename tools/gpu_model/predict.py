"""How long `emd_l2` would take on a GPU: a prediction, from its machine code, its layout and what the device can do.

Of each phase of a problem it takes the resource that is busiest (issuing instructions, wavefronts of shared memory,
bytes from the L2 cache) or the latency along one warp's path, whichever is longer; of a launch, the waves of blocks
that follow each other, or the bytes that memory has to move. Nothing here was measured on a GPU: `ASSUMED` says what it
leans on. Where there is a GPU, `python -m gpu_model predict --measure` says how far off it is.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field

from sfr_ext.ops.emd import FEATURES_TO_COSTS

from . import code
from .devices import DEVICES, Device
from .hot_loops import Figures, HotLoop, NoPath, hot_loops, table
from .layout import Layout, Task, choose
from .timing import BARRIER, Latencies

ITERATIONS, SAMPLED, STEPS, EVALUATIONS = 28, 7, 22, 4.5
OTHER_PASSES = 4  # over the costs: two for their spread, two for an update of the rows
STORE, RESULT = 4, 120  # clocks of a store beside others, and to find out where a result belongs
COPY = 24  # instructions to write a cost for backward, or to read it
FETCHED = 8  # elements of a thread that are on their way at once, in registers
SCATTERED = 2  # elements in a pass of the loop that copies single ones
UNIT = 32, 56  # pairs that a warp compares by matrix instructions
TILES = 14  # of such a unit
PULLED = 16  # pixels of the other side in a pass of the loop that pulls by matrix instructions
PRODUCTS = 3  # of matrices in TF32 for one in float32
ROWS = 4  # of a plan in memory that a warp is at together ...
COLUMNS = 128  # ... of so many of its columns in a step
SPLIT = ("pair finished", "pair weighed")  # passes in which narrow rows share a warp
SUMMED = 32, 16  # columns and rows of weights in a pass of the loop that sums them
HELD_LOADS = 50  # of a lane, of the entries that it holds
BLOCKS = 8  # whose sums are on their way at once
LEAST_PRODUCT_CHANNELS = 32
SQUARED = 4  # channels in a pass of the loop that sums squares
STORED = 4  # elements of a gradient in a pass of the loop that stores them
REGISTERS = 256  # of a thread: one block of 8 warps fills a multiprocessor
SHARED_BANKS = 128  # bytes of shared memory in a clock

ASSUMED = f"""\
* In forward {ITERATIONS} iterations, {SAMPLED} of them with a sample of the error, and {EVALUATIONS:g} evaluations.
  In backward {STEPS} steps of conjugate gradients and one evaluation.
* {OTHER_PASSES} more passes over the costs: two for their spread, and an update of the rows in the log domain, which
  takes two. Their spread is counted in the near kernel, where loads of weights are told from loads of costs. Where the
  plan lies in registers, each of these takes as long as an evaluation. By all warps, one more makes costs of sums, one
  weights of pairs of gradients, and one sums these.
* Costs that have no room in shared memory are read from the L2 cache, {ROWS} rows at a time, of each
  {COLUMNS // 32} entries of a lane.
* Machine code of sm_90 for every device; bfloat16 takes float32's instructions.
* One warp's clocks are those of `timing.py`: latencies of Hopper, {BARRIER} clocks a barrier, no misses of the
  instruction cache. Other sizes than 49 x 49 take more products, by the slope between two counted sizes.
* Phases follow each other. Within one, warps hide each other's latencies as far as the longest path allows.
* A block of 8 warps takes {REGISTERS} registers a thread, so that one is on a multiprocessor; of one warp's
  problems, as many as fit.
* A panel comes while the one before is at work, which hides as much of its latency as it takes. By asynchronous copies,
  to compare on an A100, H100 or H200, all of it does, with its bytes from the L2 cache; else {FETCHED} elements of each
  side for each thread, and the others wait. Maps lie as panels do where their rows need no padding. What becomes of
  bfloat16 takes as long as {FETCHED} elements that are copied through registers.
* {COPY} instructions for each cost that is kept for backward, as long each as those of an update of the rows.
* Matrix instructions at the rate of `devices.toml`; two lanes of each load for them meet in a bank.
* A result takes {STORE} clocks to store, and where slices are added up {RESULT} more to find its place.
* Other blocks' sums are read {BLOCKS} at a time, a latency of the L2 cache each; a meeting takes three of them.
* Weights of pairs are read with the bank conflicts that their addresses have; from global memory, 32 bytes for 16.
* No pair of patches is so near that it is summed again by differences.
* A launch, reading marginals and writing outputs take no time."""


@dataclass(frozen=True)
class Workload:
    batch: int
    side: int  # of both maps
    channels: int
    element: int = 4  # bytes

    def __str__(self) -> str:
        kind = {4: "float32", 2: "bfloat16"}[self.element]
        pixels = self.side * self.side
        return f"B={self.batch}, {pixels} x {pixels}, C={self.channels}, {kind}"

    @property
    def pixels(self) -> int:
        return self.side * self.side

    def task(self, backward: bool) -> Task:
        return Task.of_maps(self.pixels, self.pixels, self.channels, backward=backward, products=self.products)

    @property
    def products(self) -> bool:
        """Squared distances by them: csrc/ground/products.h, `operation_of` in csrc/cuda/ground.cuh."""
        return self.channels >= LEAST_PRODUCT_CHANNELS and self.pixels > 32

    @property
    def maps(self) -> int:
        """Bytes of both."""
        return 2 * self.batch * self.pixels * self.channels * self.element

    @property
    def keeps_costs(self) -> bool:
        return FEATURES_TO_COSTS * self.batch * self.pixels**2 * 4 <= self.maps

    def bytes(self, backward: bool) -> int:
        """What memory has to move at least."""
        return self.maps * (2 if backward else 1)


WORKLOADS = [
    Workload(128, 7, 512),
    Workload(128, 7, 512, 2),
    Workload(128, 14, 256),
    Workload(128, 14, 1024),
    Workload(16, 28, 256),
    Workload(1024, 4, 64),
]


RESOURCES = ("latency", "issue", "shared", "l2", "matrix")


@dataclass
class Phase:
    """Clocks that a block spends, by what they are for."""

    name: str
    latency: float = 0  # along one warp's path
    issue: float = 0
    shared: float = 0
    l2: float = 0
    matrix: float = 0

    @property
    def clocks(self) -> float:
        return max(getattr(self, name) for name in RESOURCES)

    @property
    def bound(self) -> str:
        return max(RESOURCES, key=lambda name: getattr(self, name))


@dataclass
class Prediction:
    workload: Workload
    device: Device
    backward: bool
    layout: Layout
    phases: list[Phase] = field(default_factory=list)
    waves: int = 1

    @property
    def memory(self) -> float:
        """Seconds that memory takes at least."""
        return self.workload.bytes(self.backward) / self.device.memory

    @property
    def seconds(self) -> float:
        return max(self.waves * sum(phase.clocks for phase in self.phases) / self.device.clock, self.memory)

    def share(self, *names: str) -> float:
        """Seconds of phases."""
        return self.waves * sum(p.clocks for p in self.phases if p.name in names) / self.device.clock


# The hot loops of budgets.toml, at other sizes than those that they are counted at.


def _loop(name: str) -> HotLoop:
    return next(loop for loop in hot_loops(table()) if loop.name == name)


@functools.cache
def _figures(name: str, place: str, rows: int | None = None, columns: int | None = None) -> Figures:
    """Of a loop in the kernel for a place, whatever kernel the table counts it in."""
    loop = _loop(name)
    number = [k for k, work in enumerate(loop.work) if work.op == "FFMA"]
    times = {k: n for k, n in zip(number, (rows, columns), strict=False) if n is not None}
    kernel = f"{loop.kernel.partition('.')[0]}.{place}"
    return Figures.of(loop.path(code.flow_of(table()["arch"], kernel), times), Latencies())


@functools.cache
def _over_rows(name: str, place: str, steps: int, generic_load: int) -> tuple[float, float]:
    """Clocks and instructions of `ROWS` rows in so many steps: by the slope between one and two, or, where a pass of
    the loop is a step, so many times that."""
    loop = _loop(name)
    kernel = f"{loop.kernel.partition('.')[0]}.{place}"
    flow, latencies = code.flow_of(table()["arch"], kernel), Latencies(generic_load=generic_load)
    one = Figures.of(loop.path(flow), latencies)
    if loop.work[-1].op != "SHFL":
        return one.clocks * steps, one.instructions * steps
    two = Figures.of(loop.path(flow, {0: 2 * loop.work[0].times}), latencies)
    return tuple(getattr(one, what) + (getattr(two, what) - getattr(one, what)) * (steps - 1) for what in FIGURES[:2])


@functools.cache
def _sized(name: str, place: str, rows: int, columns: int) -> tuple[float, float, float]:
    """Clocks, instructions and multiply-adds of a pass with so many products by rows and by columns of a thread."""
    base = _figures(name, place)
    loop = _loop(name)
    counted = [work.times for work in loop.work if work.op == "FFMA"]

    def slope(which: int, have: int) -> tuple[float, float, float]:
        more = 64
        try:
            far = _figures(name, place, *(n + more if k == which else None for k, n in enumerate(counted)))
        except NoPath:
            return 0, 0, 0
        growth = (have - counted[which]) / more
        return tuple((getattr(far, what) - getattr(base, what)) * growth for what in FIGURES)

    by_rows, by_columns = slope(0, rows), slope(1, columns)
    found = [getattr(base, what) + r + c for what, r, c in zip(FIGURES, by_rows, by_columns, strict=True)]
    return tuple(max(value, 0.3 * getattr(base, what)) for value, what in zip(found, FIGURES, strict=True))


FIGURES = ("clocks", "instructions", "multiply_adds")


def wavefronts(addresses: list[int | None], width: int) -> int:
    """Of an access of a warp whose lanes have these addresses; None: not this lane. As counted by the emulator."""
    group = {4: 32, 8: 16, 16: 8}[width]
    total = 0
    for first in range(0, 32, group):
        words = {a // 4 + k for a in addresses[first : first + group] if a is not None for k in range(width // 4)}
        banks = [0] * 32
        for word in words:
            banks[word % 32] += 1
        total += max(banks)
    return total


def pull_wavefronts(pixels: int, ld: int, channels: int) -> tuple[float, float]:
    """Mean wavefronts of the loads of weights, 16 bytes a lane, by which the gradient of x, and of y, is pulled."""
    columns, rows = -(-pixels // 4), -(-channels // 4)
    units = columns * rows
    found: tuple[list[int], list[int]] = ([], [])
    for first in range(0, min(units, 256), 32):
        lanes = [unit // rows if unit < units else None for unit in range(first, first + 32)]
        for k in range(4):
            found[0].append(wavefronts([None if p is None else 4 * (p + k * columns) * ld for p in lanes], 16))
            found[1].append(wavefronts([None if p is None else 4 * (k * ld + 4 * p) for p in lanes], 16))
    return sum(found[0]) / len(found[0]), sum(found[1]) / len(found[1])


class Model:
    """One block of one problem."""

    def __init__(self, workload: Workload, device: Device, backward: bool) -> None:
        self.workload, self.device, self.backward = workload, device, backward
        self.layout = choose(workload.task(backward), device)
        self.n = workload.pixels
        self.rows = self.layout.slab
        self.solving = self.layout.solvers / 32  # warps of a team
        self.all = self.layout.threads / 32
        # Warps on a multiprocessor: a block of several small problems shares its schedulers.
        self.beside = self.layout.teams * self.resident()
        self.phases: list[Phase] = []

    def resident(self) -> int:
        """Blocks of a multiprocessor at the same time."""
        threads = self.layout.threads * self.layout.teams
        by_shared = (self.device.shared + 1024) // (self.layout.shared_bytes * self.layout.teams + 1024)
        return max(1, min(by_shared, 65536 // (REGISTERS * threads)))

    def add(self, name: str, times: float, clocks: float, instructions: float, multiply_adds: float, warps: float,
            shared: float = 0, l2: float = 0, matrix: float = 0) -> None:  # fmt: skip
        """A phase of so many passes. `instructions` are a warp's; bytes of `shared` and `l2`, and multiply-adds in TF32
        (`matrix`), those of the whole block."""
        slots = instructions + multiply_adds * (128 / self.device.lanes - 1)
        issue = slots * warps * self.beside / 4
        of_l2 = l2 / (self.device.l2_bytes / self.device.processors)
        self.phases.append(
            Phase(
                name,
                times * clocks,
                times * issue,
                times * shared * self.beside / SHARED_BANKS,
                times * of_l2,
                times * matrix * self.beside / self.device.matrix if matrix else 0,
            )
        )

    def figures(self, name: str) -> Figures:
        return _figures(name, self.layout.place)

    # Phases.

    def distances(self) -> None:
        s, C = self.layout, self.workload.channels
        if s.by_matrix:
            return self.distances_by_matrix()
        pair = self.figures("pair by products" if self.workload.products else "pair")
        slice_ = self.figures("slice of pairs")
        scale = (s.edge / 7) ** 2
        channels = C / s.tile_slices
        work = -(-self.rows // s.compare_x) * -(-self.n // s.compare_y) * s.passes
        busy = min(self.all, math.ceil(s.tiles * s.tile_slices / 32))
        # Tiles of 4 load 16 bytes at a time: as dear for each multiply-add.
        self.add("distances", work * channels, pair.clocks * scale, pair.instructions * scale,
                 pair.multiply_adds * scale, busy)  # fmt: skip
        # Each thread writes its results; of several slices, it then adds some up.
        clocks: float = s.edge**2 * STORE
        if s.tile_slices > 1:
            added = math.ceil(s.tiles * s.edge**2 / s.threads)
            clocks += added * (RESULT + (s.tile_slices - 1) / 4 * slice_.clocks) + 2 * BARRIER
        self.add("slices", work, clocks, 0, 0, self.all)
        sides = min(self.rows, s.compare_x), min(self.n, s.compare_y)
        if self.workload.products:
            self.squares(work / s.passes, sides)
        meanwhile = pair.clocks * scale * s.panel_channels / s.tile_slices
        panels = work * math.ceil(C / s.panel_channels)
        self.compared(panels, s.panel_channels, sides, self.n % s.edge == 0, meanwhile)
        self.entries("costs", 1, "pair finished", self.all)
        return None

    def squares(self, work: float, sides: tuple[int, int]) -> None:
        square, units = self.figures("square"), 2 * sum(sides)
        turns = math.ceil(units / self.layout.threads)
        self.add("squares", work * turns * self.workload.channels / 2 / SQUARED, square.clocks, square.instructions,
                 square.multiply_adds, min(self.all, math.ceil(units / 32)))  # fmt: skip

    def distances_by_matrix(self) -> None:
        """Of the warps that have a unit each pass; at the ends they skip tiles of rows, and the second half of their
        columns."""
        s, C = self.layout, self.workload.channels
        loop = self.figures("pair by matrix")
        sides = min(self.rows, s.compare_x), min(self.n, s.compare_y)
        work = math.ceil(self.rows / s.compare_x) * math.ceil(self.n / s.compare_y)
        whole, rest = divmod(sides[1], UNIT[1])
        columns = whole * 7 + (0 if rest == 0 else 4 if rest <= 32 else 7)
        tiles = math.ceil(sides[0] / 16) * columns
        share = tiles / (TILES * s.matrix_units)  # of a unit that is not left out
        # Slices take turns at the 8 channels of a panel, and meet after each.
        of_panel = math.ceil(s.panel_channels / 8 / s.matrix_slices)
        depths = C // s.panel_channels * of_panel + math.ceil(C % s.panel_channels / 8 / s.matrix_slices)
        busy = s.matrix_units * s.matrix_slices / s.passes
        largest = min(1.0, sides[0] / UNIT[0])
        # Each lane's loads: two in a bank, where rows of a panel are 49 or 196 long.
        loads = loop.shared * share * 2 * SHARED_BANKS * busy
        self.add("distances", work * s.passes * depths, loop.clocks * largest, loop.instructions * share, 0, busy,
                 shared=loads, matrix=share * busy * TILES * PRODUCTS * 1024)  # fmt: skip
        clocks: float = 4 * TILES * STORE
        if s.matrix_slices > 1:
            added = math.ceil(s.matrix_units * TILES * 128 / s.threads)
            clocks += added * (RESULT + (s.matrix_slices - 1) * STORE) / 4 + 6 * BARRIER
        self.add("slices", work * s.passes, clocks, 0, 0, self.all)
        self.squares(work, sides)
        meanwhile = loop.clocks * largest * of_panel
        panels = work * s.passes * math.ceil(C / s.panel_channels)
        self.compared(panels, s.panel_channels, sides, self.n % s.edge == 0, meanwhile)
        self.entries("costs", 1, "pair finished", self.all)

    def compared(self, count: float, channels: int, sides: tuple[int, int], copied: bool, meanwhile: float) -> None:
        """Panels of features that are compared."""
        if not self.device.copies_async:
            return self.panels(count, channels, sides, copied, meanwhile)
        elements = channels * sum(sides) / self.layout.threads
        halves = self.workload.element == 2
        work = []
        for side in sides:
            own = channels * side / self.layout.threads
            if side == self.n and (copied or halves):  # two times 16 bytes in a pass
                work.append((self.figures("panel sent"), own * self.workload.element / 32))
            elif side % 4 == 0:
                work.append((self.figures("panel sent by rows"), own * self.workload.element / 32))
            else:
                work.append((self.figures("panel scattered"), own / SCATTERED))
        # The bytes come while the panel before is at work, too.
        bytes_ = channels * sum(sides) * self.workload.element
        transfer = bytes_ * self.beside / (self.device.l2_bytes / self.device.processors)
        latency = max(0, Latencies().global_load + transfer - meanwhile) + BARRIER
        if halves:
            work.append((self.figures("panel copied" if copied else "panel cut"), elements / FETCHED))
            latency += 2 * BARRIER
        latency += sum(figures.clocks * passes for figures, passes in work)
        instructions = sum(figures.instructions * passes for figures, passes in work)
        self.add("panels", count, latency, instructions, 0, self.all)
        return None

    def panels(self, count: float, channels: int, sides: tuple[int, int], copied: bool, meanwhile: float) -> None:
        """So many of features, with so many pixels on either side, that lie as memory does or are cut into longer rows;
        what is done with each takes so many clocks."""
        figures = self.figures("panel copied" if copied else "panel cut")
        passes = [channels * pixels / self.layout.threads / FETCHED for pixels in sides]
        load = Latencies().global_load
        waits = max(0, load - meanwhile) + sum(math.ceil(each) - 1 for each in passes) * load + BARRIER
        latency = waits + sum(passes) * figures.clocks
        l2 = channels * sum(sides) * self.workload.element
        self.add("panels", count, latency, sum(passes) * figures.instructions, 0, self.all, l2=l2)

    def gradients(self, count: float, elements: float, copied: bool) -> None:
        """Panels of gradients that leave."""
        figures = self.figures("gradient copied" if copied else "gradient cut")
        passes = elements / self.layout.threads / STORED
        l2 = elements * self.workload.element
        self.add("gradients", count, passes * figures.clocks, passes * figures.instructions, 0, self.all, l2=l2)

    def copies(self, elements: float) -> None:
        """Of costs, which are kept for backward or come from there."""
        usual = self.figures("row update")
        of_thread = elements / self.layout.threads
        waits = math.ceil(of_thread / FETCHED) * (Latencies().global_load + BARRIER)
        latency = waits + of_thread * COPY * usual.clocks / usual.instructions
        self.add("costs", 1, latency, of_thread * COPY, 0, self.all, l2=elements * 4)

    def entries(self, name: str, times: float, loop: str, warps: float) -> None:
        """A pass over the costs, a warp to a few rows."""
        near = self.layout.cost_near
        quads = math.ceil(self.n / 4)
        lanes = min(32, 1 << (quads - 1).bit_length()) if loop in SPLIT else 32
        clocks, instructions = _over_rows(
            loop,
            "near" if loop == "spread" else self.layout.place,
            math.ceil(quads / lanes),
            Latencies().generic_load if near else self.device.l2_latency,
        )
        groups = math.ceil(self.rows / (ROWS * 32 // lanes) / warps)
        entries = self.rows * self.n * 4
        self.add(name, times, groups * clocks, groups * instructions, 0, warps,
                 shared=2 * entries, l2=0 if near else entries)  # fmt: skip

    def over_entries(self, name: str, times: float, loop: str) -> None:
        self.entries(name, times, loop, self.solving)

    def held(self, name: str, times: float, loop: str) -> None:
        """Sums by rows and by columns over a plan that the threads hold."""
        figures = self.figures(f"held: {loop}")
        self.add(name, times, figures.clocks, figures.instructions, figures.multiply_adds, self.solving,
                 shared=figures.shared * SHARED_BANKS * self.solving)  # fmt: skip

    def hold(self, times: float) -> None:
        """The plan from shared memory into registers."""
        if self.layout.held:
            self.add("plan held", times, HELD_LOADS * STORE, HELD_LOADS, 0, self.solving,
                     shared=self.rows * self.layout.ld * 4)  # fmt: skip

    def column_sums(self, name: str, times: float) -> None:
        """Of a plan in memory, for an evaluation."""
        s, loop = self.layout, self.figures("column sums")
        steps = math.ceil(s.width / 4 / s.solvers) * s.slice_rows / ROWS
        bytes_ = self.rows * s.ld * 4
        self.add(name, times, steps * loop.clocks + RESULT + 4 * BARRIER, steps * loop.instructions, 0, self.solving,
                 shared=bytes_ if s.resident else 0, l2=0 if s.resident else bytes_)  # fmt: skip
        self.meetings(times)

    def meetings(self, times: float) -> None:
        s = self.layout
        if s.blocks > 1:
            columns = math.ceil(self.n / s.solvers)
            reads = columns * math.ceil(s.blocks / BLOCKS) * self.device.l2_latency
            self.add("meetings", times, 3 * self.device.l2_latency + reads, 0, 0, 0)

    def products(self, name: str, times: float, loop: str) -> None:
        """Sums by rows and by columns over the plan."""
        s = self.layout
        if s.held:
            return self.held(name, times, loop)
        by_rows = math.ceil(self.rows / (s.solvers / s.lanes)) * math.ceil(self.n / 4 / s.lanes) * 4
        by_columns = math.ceil(s.width / 4 / s.solvers) * s.slice_rows * 4
        clocks, instructions, multiply_adds = _sized(loop, s.place, by_rows, by_columns)
        # The plan twice, and 16 bytes of a vector for each 16 of a row, and for 4 rows, that a lane reads.
        entries = self.rows * s.ld * 4
        vectors = (1 / 4 + 1 / 16) * entries
        self.add(name, times, clocks, instructions, multiply_adds, self.solving,
                 shared=vectors + (2 * entries if s.resident else 0), l2=0 if s.resident else 2 * entries)  # fmt: skip
        self.meetings(times)
        return None

    def pull(self) -> None:
        s, C = self.layout, self.workload.channels
        if s.pull_by_matrix:
            return self.pull_by_matrix()
        loop = self.figures("pull to x by products" if self.workload.products else "pull to x")
        panels = math.ceil(C / s.pull_channels / s.blocks)
        quads = math.ceil(self.n / 4)
        rows = math.ceil(s.pull_channels / 4)
        units = 2 * quads * rows
        rounds = math.ceil(units / s.threads)
        steps = panels * rounds * quads
        shared = l2 = 0.0
        if s.blocks == 1:
            to_x, to_y = pull_wavefronts(self.n, s.ld, s.pull_channels)
            # Four loads of weights each; those of the other side's features are the same for many lanes.
            of_warp = 4 * (to_x + to_y) / 2 + 4 * 2
            shared = of_warp * SHARED_BANKS * min(units, s.threads) / 32
        else:
            l2 = 4 * 32 * min(units, s.threads) / rows * (1 + 0.5) / 2
        self.add("pull", steps, loop.clocks, loop.instructions, loop.multiply_adds, self.all, shared=shared, l2=l2)
        copied = self.n % 4 == 0
        self.panels(panels, s.pull_channels, (self.n, self.n), copied, rounds * quads * loop.clocks)
        self.gradients(panels, s.pull_channels * self.n * 2, copied)
        self.weights()
        return None

    def weights(self) -> None:
        """Of pairs, from the plan's gradient and the costs, and, for products, their sums over the columns."""
        self.entries("weights", 1, "pair weighed", self.all)
        if not self.workload.products:
            return
        alone = self.layout.blocks == 1
        clocks, instructions = _over_rows(
            "weight summed", self.layout.place, 1, Latencies().generic_load if alone else self.device.l2_latency
        )
        columns, rows = SUMMED
        steps = math.ceil(self.n / columns / self.all) * math.ceil(self.rows / rows)
        entries = self.rows * self.n * 4
        self.add("weights", 1, steps * clocks, steps * instructions, 0, self.all,
                 shared=entries if alone else 0, l2=0 if alone else entries)  # fmt: skip
        if not alone:
            self.add("meetings", 1, 3 * self.device.l2_latency, 0, 0, 0)

    def pull_by_matrix(self) -> None:
        s, C = self.layout, self.workload.channels
        loop = self.figures("pull by matrix")
        panels = math.ceil(C / s.pull_channels)
        units = 2 * math.ceil(self.n / 32) * math.ceil(s.pull_channels / 16)
        rounds, depths = math.ceil(units / self.all), math.ceil(self.n / PULLED)
        busy = units / rounds
        products = busy * 4 * PULLED / 8 * PRODUCTS * 1024
        self.add("pull", panels * rounds * depths, loop.clocks, loop.instructions, 0, busy,
                 shared=loop.shared * 2 * SHARED_BANKS * busy, matrix=products)  # fmt: skip
        copied = self.n % 4 == 0
        self.panels(panels, s.pull_channels, (self.n, self.n), copied, rounds * depths * loop.clocks)
        self.gradients(panels, s.pull_channels * self.n * 2, copied)
        self.weights()

    def tile(self, name: str, times: float, loop: str) -> None:
        """A pass over a plan in registers."""
        figures = self.figures(f"tile: {loop}")
        self.add(name, times, figures.clocks, figures.instructions, figures.multiply_adds, self.solving)

    def solve_in_registers(self) -> None:
        if self.backward:
            self.tile("evaluations", 1, "evaluation")
            self.tile("conjugate gradients", STEPS, "conjugate gradients")
            self.tile("other passes", OTHER_PASSES, "evaluation")
        else:
            self.tile("other passes", OTHER_PASSES, "evaluation")
            self.tile("evaluations", EVALUATIONS, "evaluation")
            self.tile("iterations", ITERATIONS - SAMPLED, "iteration")
            self.tile("iterations", SAMPLED, "sampled iteration")

    def costs(self) -> None:
        if not self.workload.keeps_costs:
            return self.distances()
        if not self.backward:
            self.distances()
        self.copies(self.rows * self.n)
        return None

    def run(self) -> Prediction:
        self.costs()
        if self.layout.in_registers:
            self.solve_in_registers()
        else:
            self.over_entries("other passes", OTHER_PASSES / 2, "spread")
            self.over_entries("other passes", OTHER_PASSES / 2, "row update")
            evaluations = 1 if self.backward else EVALUATIONS
            self.over_entries("evaluations", evaluations, "evaluation")
            self.column_sums("evaluations", evaluations)
            self.hold(evaluations)
            if self.backward:
                self.products("conjugate gradients", STEPS, "conjugate gradients")
            else:
                self.products("iterations", ITERATIONS - SAMPLED, "iteration")
                self.products("iterations", SAMPLED, "sampled iteration")
        if self.backward:
            self.pull()
        out = Prediction(self.workload, self.device, self.backward, self.layout, self.phases)
        items = self.workload.batch / self.layout.teams * self.layout.blocks
        at_once = self.device.processors * self.resident() // self.layout.blocks * self.layout.blocks
        out.waves = math.ceil(items / max(at_once, 1))
        return out


def predict(workload: Workload, device: Device, backward: bool) -> Prediction:
    return Model(workload, device, backward).run()


def measured(workload: Workload, backward: bool) -> float | None:
    """Seconds on the GPU that is here, the median of 20; None: there is none."""
    import torch

    if not torch.cuda.is_available():
        return None
    from sfr_ext import emd_l2

    kind = torch.float32 if workload.element == 4 else torch.bfloat16
    shape = (workload.batch, workload.channels, workload.side, workload.side)
    x, y = (torch.randn(shape, device="cuda").to(kind).requires_grad_() for _ in range(2))
    times = []
    for _ in range(23):
        start, middle, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
        start.record()
        value = emd_l2(x, y)
        middle.record()
        value.backward()
        end.record()
        torch.cuda.synchronize()
        times.append((middle.elapsed_time(end) if backward else start.elapsed_time(middle)) / 1e3)
    return sorted(times[3:])[10]


def device_here() -> str | None:
    """The name in devices.toml of the GPU that is here."""
    import torch

    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    return next((known for known in DEVICES if known.split()[-1] in name), None)


def report(devices: list[str], measure: bool = False) -> str:
    here = device_here() if measure else None
    lines = ["**Predictions, not measurements**, in microseconds. Forward; backward.", ""]
    lines += ["| workload | " + " | ".join(devices) + " |", "|---|" + "---:|" * len(devices)]
    for workload in WORKLOADS:
        cells = []
        for name in devices:
            pair = [predict(workload, DEVICES[name], backward).seconds * 1e6 for backward in (False, True)]
            cells.append("; ".join(f"{_rounded(value):,}" for value in pair))
        lines.append(f"| {workload} | {' | '.join(cells)} |")
    if measure:
        lines += ["", *_comparison(here)]
    return "\n".join(lines)


def _rounded(value: float) -> int:
    digits = max(0, len(str(int(value))) - 2)
    return int(round(value / 10**digits) * 10**digits)


def _comparison(here: str | None) -> list[str]:
    if here is None:
        return ["There is no GPU here that devices.toml knows: nothing was measured."]
    lines = [f"Measured on {here}, and predicted, in microseconds:", ""]
    lines += ["| workload | direction | measured | predicted | ratio |", "|---|---|---:|---:|---:|"]
    for workload in WORKLOADS:
        for backward in (False, True):
            ours = predict(workload, DEVICES[here], backward).seconds
            theirs = measured(workload, backward)
            if theirs is not None:
                way = "backward" if backward else "forward"
                lines.append(f"| {workload} | {way} | {theirs * 1e6:.0f} | {ours * 1e6:.0f} | {theirs / ours:.2f} |")
    return lines


def breakdown(workload: Workload, device: Device) -> str:
    """Where the time of one workload is predicted to go."""
    lines = ["| direction | phase | predicted, us | bound by |", "|---|---|---:|---|"]
    for backward in (False, True):
        found = predict(workload, device, backward)
        for name in dict.fromkeys(phase.name for phase in found.phases):
            bounds = dict.fromkeys(phase.bound for phase in found.phases if phase.name == name)
            way = "backward" if backward else "forward"
            lines.append(f"| {way} | {name} | {found.share(name) * 1e6:.1f} | {', '.join(bounds)} |")
    return "\n".join(lines)
