"""Runs PTX: the instructions that csrc/cuda/device.cuh compiles to, one thread at a time.

Written from NVIDIA's PTX ISA reference, and from nothing else here: it shares no code with the emulator of tests/simt.
Threads of several blocks run in an order drawn from a seed, switching wherever they wait for each other. Memory is that
of one processor: who sees what without a fence is what memory_model.py is for. What is copied asynchronously comes
where its thread waits, and not before. Approximate instructions give the
rounded exact result, or what `Machine.approximate` makes of it.
"""

from __future__ import annotations

import math
import random
import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction

LANES = 32
MATRIX_PRODUCT = "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32"


class PtxError(Exception):
    """Something that is not known here, or that a GPU would not do."""


@dataclass(frozen=True)
class Operation:
    name: str  # with its types: shl.b32
    operands: tuple[str, ...]
    guard: str = ""  # "%p1", "!%p1" or none

    @property
    def parts(self) -> list[str]:
        return self.name.split(".")


@dataclass
class Entry:
    """A kernel."""

    name: str
    parameters: list[tuple[str, str]]  # type, name
    code: list[Operation] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)


def parse(text: str) -> dict[str, Entry]:
    entries: dict[str, Entry] = {}
    text = re.sub(r"//[^\n]*", "", text)
    for match in re.finditer(r"\.entry\s+(\w+)\s*\((.*?)\)[^{;]*\{(.*?)\n\}", text, re.DOTALL):
        parameters = re.findall(r"\.param\s+(?:\.align\s+\d+\s+)?\.(\w+)\s+(\w+)", match[2])
        entry = Entry(match[1], parameters)
        for piece in re.split(r";|(?<=:)\s", match[3]):
            line = " ".join(piece.split())
            if line.endswith(":"):
                entry.labels[line[:-1]] = len(entry.code)
            elif line and not line.startswith("."):
                entry.code.append(_operation(line))
        entries[entry.name] = entry
    return entries


def _operation(line: str) -> Operation:
    guard = ""
    if line.startswith("@"):
        guard, line = line[1:].split(" ", 1)
    name, _, rest = line.partition(" ")
    operands = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", rest)
    return Operation(name, tuple(operands), guard)


# Numbers. Registers hold bits.


def float_of(bits: int) -> float:
    return struct.unpack("<f", struct.pack("<I", bits & 0xFFFFFFFF))[0]


def bits_of(x: float) -> int:
    """The float32 nearest to a double, ties to even."""
    try:
        return struct.unpack("<I", struct.pack("<f", x))[0]
    except OverflowError:
        return 0xFF800000 if x < 0 else 0x7F800000


def half_of(bits: int) -> float:
    return struct.unpack("<e", struct.pack("<H", bits & 0xFFFF))[0]


def half_bits_of(x: float) -> int:
    if math.isnan(x):
        return 0x7FFF
    try:
        return struct.unpack("<H", struct.pack("<e", x))[0]
    except OverflowError:
        return 0xFC00 if x < 0 else 0x7C00


def _fused(a: float, b: float, c: float) -> int:
    """a b + c of float32s, rounded once: the double before is rounded to odd."""
    product = a * b  # exact in float64
    total = product + c
    if math.isfinite(total):
        high = total - product
        lost = (product - (total - high)) + (c - high)
        bits = struct.unpack("<q", struct.pack("<d", total))[0]
        if lost != 0 and bits & 1 == 0:
            bits += 1 if (lost > 0) == (total > 0) else -1
            total = struct.unpack("<d", struct.pack("<q", bits))[0]
    return bits_of(total)


def _flushed(bits: int) -> int:
    return bits if bits & 0x7F800000 else bits & 0x80000000


def _power_of_2(x: float) -> float:
    if x > 200:
        return math.inf
    return x if math.isnan(x) else 2.0 ** max(x, -2000.0) if x > -1000 else 0.0


def _tf32(bits: int) -> float:
    """Of a register: the last 13 bits do not count."""
    return float_of(bits & 0xFFFFE000)


def _cut_off(x: Fraction) -> int:
    """The float32 next to a finite number on the side of 0; of none below the normal range."""
    if x == 0:
        return 0
    exponent = x.numerator.bit_length() - x.denominator.bit_length()
    exponent -= abs(x) < Fraction(2) ** exponent
    unit = Fraction(2) ** (exponent - 23)
    return bits_of(float(int(x / unit) * unit))


def _signed(value: int, width: int) -> int:
    value &= (1 << width) - 1
    return value - (1 << width) if value >> (width - 1) else value


# What a thread waits for: kind, and what tells one meeting from another.
Wait = tuple[str, int, int]


class Thread:
    def __init__(self, machine: Machine, block: int, index: int, values: dict[str, int]) -> None:
        self.machine, self.block, self.index = machine, block, index
        self.registers: dict[str, int] = {
            "%tid.x": index, "%ntid.x": machine.threads, "%ctaid.x": block, "%nctaid.x": machine.blocks,
            "%laneid": index % LANES,
        }  # fmt: skip
        self.values = values  # of the parameters
        self.waits: Wait | None = None
        self.handed = (0, 0)  # bits, and the source's lane
        self.fragments: tuple[list[int], list[int], list[int]] = ([], [], [])  # a, b and c of a matrix product
        self.taken: Callable[..., None] | None = None  # where a shuffle's result goes, or a product's
        self.copies: list[tuple[int, int, int, int]] = []  # on their way: to, from, bytes, and how many are read
        self.steps = self.run()

    def value(self, operand: str) -> int:
        if operand.startswith("%"):
            return self.registers[operand]
        if operand.startswith(("0f", "0F")):
            return int(operand[2:], 16)
        if operand.startswith(("0d", "0D")):
            return int(operand[2:], 16)
        if re.match(r"-?(0x)?[0-9a-fA-F]+U?$", operand):
            return int(operand.rstrip("U"), 0)
        return 0  # a symbol: the shared memory, which begins at 0

    def run(self) -> Iterator[None]:
        entry, at = self.machine.entry, 0
        while at < len(entry.code):
            operation = entry.code[at]
            at += 1
            if operation.guard:
                negated = operation.guard.startswith("!")
                if bool(self.registers[operation.guard.lstrip("!")]) == negated:
                    continue
            kind = operation.parts[0]
            if kind == "bra":
                at = entry.labels[operation.operands[0]]
            elif kind == "ret":
                return
            elif kind in ("bar", "barrier", "shfl", "mma"):
                self.wait(operation, at)
                yield
            elif kind in ("membar", "fence"):
                pass
            else:
                self.step(operation)
                if kind == "atom" or "acquire" in operation.name:
                    yield  # others may come before the next step

    def wait(self, operation: Operation, at: int) -> None:
        if operation.parts[0] == "mma":
            if operation.name != MATRIX_PRODUCT:
                raise PtxError(operation.name)
            into, *given = (re.findall(r"[%\w]+", operand) for operand in operation.operands)
            a, b, c = ([self.value(register) for register in names] for names in given)
            self.fragments = a, b, c
            self.taken = lambda *bits: self.registers.update(zip(into, bits, strict=True))
            self.waits = ("mma", at, 0xFFFFFFFF)
        elif operation.name.startswith("bar.warp"):
            self.waits = ("warp", at, self.value(operation.operands[0]) & 0xFFFFFFFF)
        elif operation.parts[0] == "shfl":
            result, source = operation.operands[0].split("|")[0], operation.operands[1]
            lane, clamp, mask = (self.value(o) for o in operation.operands[2:5])
            if clamp != 31:
                raise PtxError(f"{operation.name} with a clamp of {clamp}")
            mode = operation.parts[2]
            if mode not in ("idx", "bfly"):
                raise PtxError(operation.name)
            own = self.index % LANES
            self.handed = (self.value(source), lane & 31 if mode == "idx" else own ^ (lane & 31))
            self.taken = lambda bits: self.registers.__setitem__(result, bits)
            self.waits = ("shfl", at, mask & 0xFFFFFFFF)
        else:
            count = self.value(operation.operands[1]) if len(operation.operands) > 1 else self.machine.threads
            number = self.value(operation.operands[0])
            if not 0 <= number < 16 or count <= 0 or count % LANES:
                raise PtxError(f"barrier {number} for {count} threads")
            self.waits = ("barrier", number, count)

    def address(self, operand: str) -> int:
        base, _, offset = operand.strip("[]").partition("+")
        return self.value(base) + (int(offset, 0) if offset else 0)

    def step(self, operation: Operation) -> None:
        name, operands, parts = operation.name, operation.operands, operation.parts
        if parts[0] == "ld" and parts[1] == "param":
            self.registers[operands[0]] = self.values[operands[1].strip("[]")]
            return
        if parts[0] in ("ld", "st"):
            self.move(operation)
            return
        if parts[:2] == ["cp", "async"]:
            self.copy(operation)
            return
        if name == "atom.global.add.u32":
            at = self.address(operands[1])
            before = self.machine.load("global", self.block, at, 4)
            self.machine.store("global", self.block, at, 4, before + self.value(operands[2]))
            self.registers[operands[0]] = before
            return
        if name == "mov.b64" and (operands[0].startswith("{") or operands[1].startswith("{")):
            if operands[0].startswith("{"):
                low, high = re.findall(r"%\w+", operands[0])
                whole = self.value(operands[1])
                self.registers[low], self.registers[high] = whole & 0xFFFFFFFF, whole >> 32
            else:
                low, high = re.findall(r"%\w+", operands[1])
                self.registers[operands[0]] = self.value(low) | self.value(high) << 32
            return
        self.registers[operands[0]] = self.result(operation, [self.value(o) for o in operands[1:]])

    def copy(self, operation: Operation) -> None:
        if operation.name == "cp.async.wait_all":
            for to, source, width, read in self.copies:
                value = self.machine.load("global", self.block, source, read) if read else 0
                self.machine.store("shared", self.block, to, width, value)
            self.copies.clear()
            return
        if operation.name not in ("cp.async.ca.shared.global", "cp.async.cg.shared.global"):
            raise PtxError(operation.name)
        to, source = (self.address(operand) for operand in operation.operands[:2])
        width = self.value(operation.operands[2])
        read = self.value(operation.operands[3]) if len(operation.operands) > 3 else width
        if width not in ((4, 8, 16) if ".ca." in operation.name else (16,)) or not 0 <= read <= width:
            raise PtxError(f"{operation.name} of {width} bytes, {read} of them read")
        for at in (to, source):
            if at % width:
                raise PtxError(f"{operation.name} at {at:#x}, which is not a multiple of {width}")
        self.copies.append((to, source, width, read))

    def move(self, operation: Operation) -> None:
        parts, operands = operation.parts, operation.operands
        space = next((part for part in parts if part in ("global", "shared")), None)
        if space is None:
            raise PtxError(f"{operation.name}: a generic address")
        width = int(parts[-1][1:]) // 8
        loads = parts[0] == "ld"
        target, place = (operands[0], operands[1]) if loads else (operands[1], operands[0])
        names = re.findall(r"%\w+", target) if target.startswith("{") else [target]
        at = self.address(place)
        if at % (width * len(names)):
            raise PtxError(f"{operation.name} at {at:#x}, which is not a multiple of {width * len(names)}")
        for k, register in enumerate(names):
            if loads:
                self.registers[register] = self.machine.load(space, self.block, at + k * width, width)
            else:
                self.machine.store(space, self.block, at + k * width, width, self.value(register))

    def result(self, operation: Operation, x: list[int]) -> int:
        name, parts = operation.name, operation.parts
        kind, of = parts[0], parts[-1]
        if kind in ("mov", "cvta"):
            return x[0]
        if kind == "cvt":
            return self.converted(name, x[0])
        if kind == "selp":
            return x[0] if x[2] else x[1]
        if of == "f32":
            return self.of_floats(name, parts, x)
        width = int(of[1:]) if of[0] in "usb" else 0
        if not width:
            raise PtxError(name)
        mask = (1 << width) - 1
        if kind == "setp":
            a, b = (_signed(v, width) if of[0] == "s" else v & mask for v in x)
            return int({"lt": a < b, "gt": a > b, "ne": a != b, "eq": a == b, "le": a <= b, "ge": a >= b}[parts[1]])
        if kind in ("mul", "mad"):
            a, b = (_signed(v, width) if of[0] == "s" else v & mask for v in x[:2])
            wide = parts[1] == "wide"
            value = a * b + (x[2] if kind == "mad" else 0)
            return value & ((1 << 2 * width) - 1 if wide else mask)
        if kind == "rem":
            a, b = (_signed(v, width) if of[0] == "s" else v & mask for v in x)
            return int(math.fmod(a, b)) & mask
        if kind == "shr":
            value = _signed(x[0], width) if of[0] == "s" else x[0] & mask
            return value >> min(x[1], width) & mask
        if kind == "shl":
            return x[0] << min(x[1], width) & mask
        simple = {"add": lambda a, b: a + b, "sub": lambda a, b: a - b, "and": lambda a, b: a & b,
                  "or": lambda a, b: a | b, "xor": lambda a, b: a ^ b}  # fmt: skip
        if kind not in simple:
            raise PtxError(name)
        return simple[kind](*x) & mask

    def converted(self, name: str, x: int) -> int:
        if name == "cvt.f32.f16":
            return bits_of(half_of(x))
        if name == "cvt.rn.f16.f32":
            return half_bits_of(float_of(x))
        if name == "cvt.rn.f32.s32":
            return bits_of(float(_signed(x, 32)))
        if name == "cvt.rni.f32.f32":
            value = float_of(x)
            return bits_of(math.copysign(float(round(value)), value)) if math.isfinite(value) else x
        match = re.match(r"cvt\.([us])(\d+)\.([us])(\d+)$", name)
        if not match:
            raise PtxError(name)
        value = _signed(x, int(match[4])) if match[3] == "s" else x & ((1 << int(match[4])) - 1)
        return value & ((1 << int(match[2])) - 1)

    def of_floats(self, name: str, parts: list[str], bits: list[int]) -> int:
        kind = parts[0]
        flush = "ftz" in parts
        if flush:
            bits = [_flushed(b) for b in bits]
        x = [float_of(b) for b in bits]
        if kind == "setp":
            a, b = x
            return int({"lt": a < b, "gt": a > b, "eq": a == b, "le": a <= b, "ge": a >= b,
                        "ne": a != b and a == a and b == b, "neu": a != b}[parts[1]])  # fmt: skip
        if kind in ("neg", "abs"):
            return bits[0] ^ 0x80000000 if kind == "neg" else bits[0] & 0x7FFFFFFF
        if name == "ex2.approx.ftz.f32":
            return _flushed(self.machine.approximate("ex2", bits_of(_power_of_2(x[0]))))
        if name == "ex2.approx.f32":
            return self.machine.approximate("ex2", bits_of(_power_of_2(x[0])))
        if name == "div.approx.f32":
            return self.quotient(*x)
        if name == "div.full.f32":
            return self.ratio(*x)
        if name in ("sqrt.rn.f32", "sqrt.approx.f32", "sqrt.approx.ftz.f32"):
            return bits_of(math.sqrt(x[0]) if x[0] >= 0 else math.nan)
        if kind == "fma":
            return _fused(*x)
        if kind not in ("add", "sub", "mul") or flush:
            raise PtxError(name)
        a, b = x
        return bits_of(a + b if kind == "add" else a - b if kind == "sub" else a * b)

    def quotient(self, x: float, y: float) -> int:
        if 2.0**126 < abs(y) < math.inf:
            return bits_of(math.nan if math.isinf(x) else math.copysign(0.0, x) * math.copysign(1.0, y))
        return self.ratio(x, y)

    def ratio(self, x: float, y: float) -> int:
        if y == 0:
            exact = math.nan if x == 0 or math.isnan(x) else math.copysign(math.inf, x) * math.copysign(1.0, y)
        else:
            exact = x / y
        return self.machine.approximate("div", bits_of(exact))


class Machine:
    """One launch of a kernel. Arguments: numbers, or bytearrays, which are global memory."""

    def __init__(
        self,
        entry: Entry,
        blocks: int,
        threads: int,
        arguments: list[int | bytearray],
        seed: int = 0,
        shared: int = 4096,
        approximate: Callable[[str, int], int] = lambda kind, bits: bits,
    ) -> None:
        self.entry, self.blocks, self.threads = entry, blocks, threads
        self.random, self.approximate = random.Random(seed), approximate
        self.arrays: list[bytearray] = []
        self.shared = [bytearray(b"\xff" * shared) for _ in range(blocks)]
        values = {}
        for (_, name), argument in zip(entry.parameters, arguments, strict=True):
            if isinstance(argument, bytearray):
                self.arrays.append(argument)
                argument = len(self.arrays) << 32
            values[name] = argument
        self.all = [Thread(self, b, t, values) for b in range(blocks) for t in range(threads)]

    def place(self, space: str, block: int, at: int, width: int) -> tuple[bytearray, int]:
        memory = self.shared[block] if space == "shared" else None
        if memory is None and 0 < at >> 32 <= len(self.arrays):
            memory, at = self.arrays[(at >> 32) - 1], at & 0xFFFFFFFF
        if memory is None or not 0 <= at <= len(memory) - width:
            raise PtxError(f"{space} memory at {at:#x} is not there")
        return memory, at

    def load(self, space: str, block: int, at: int, width: int) -> int:
        memory, at = self.place(space, block, at, width)
        return int.from_bytes(memory[at : at + width], "little")

    def store(self, space: str, block: int, at: int, width: int, value: int) -> None:
        memory, at = self.place(space, block, at, width)
        memory[at : at + width] = (value & ((1 << 8 * width) - 1)).to_bytes(width, "little")

    def run(self, most: int = 1_000_000) -> None:
        """To the end of all threads.

        Raises:
            PtxError: they wait for each other for ever, or do something else that is wrong.
        """
        live = list(self.all)
        for _ in range(most):
            ready = [thread for thread in live if thread.waits is None]
            if not live:
                return
            if not ready:
                kinds = sorted({str(thread.waits) for thread in live})
                raise PtxError(f"threads wait for ever: {', '.join(kinds)}")
            thread = self.random.choice(ready)
            try:
                next(thread.steps)
            except StopIteration:
                live.remove(thread)
            else:
                if thread.waits is not None:
                    self.meet(thread, live)
        raise PtxError("does not end")

    @staticmethod
    def multiply(lanes: dict[int, Thread]) -> None:
        """d = a b + c, as the reference lays m16n8k8 out over a warp; sums are exact, and then cut off."""
        a: dict[tuple[int, int], float] = {}
        b: dict[tuple[int, int], float] = {}
        for lane, thread in lanes.items():
            group, within = divmod(lane, 4)
            for i, bits in enumerate(thread.fragments[0]):
                a[group + (8 if i in (1, 3) else 0), within + (4 if i >= 2 else 0)] = _tf32(bits)
            for i, bits in enumerate(thread.fragments[1]):
                b[within + 4 * i, group] = _tf32(bits)
        for lane, thread in lanes.items():
            group, within = divmod(lane, 4)
            found = []
            for i, bits in enumerate(thread.fragments[2]):
                row, column = group + (8 if i >= 2 else 0), 2 * within + i % 2
                terms = [float_of(bits), *(a[row, k] * b[k, column] for k in range(8))]
                if all(map(math.isfinite, terms)):
                    found.append(_cut_off(sum(map(Fraction, terms), Fraction(0))))
                else:
                    found.append(bits_of(sum(terms)))
            assert thread.taken is not None
            thread.taken(*found)

    def meet(self, last: Thread, live: list[Thread]) -> None:
        """Lets those go on who wait for the same as this thread, if it was the last of them to come."""
        assert last.waits is not None
        kind, _, wanted = last.waits
        block = kind == "barrier"
        threads = [
            thread
            for thread in live
            if thread.waits == last.waits
            and thread.block == last.block
            and (block or thread.index // LANES == last.index // LANES)
        ]
        if (len(threads) if block else sum(1 << thread.index % LANES for thread in threads)) != wanted:
            return
        if kind == "shfl":
            handed = {thread.index % LANES: thread.handed[0] for thread in threads}
            for thread in threads:
                assert thread.taken is not None
                thread.taken(handed[thread.handed[1]])
        if kind == "mma":
            self.multiply({thread.index % LANES: thread for thread in threads})
        for thread in threads:
            thread.waits = None
