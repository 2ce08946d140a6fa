"""The hot loops of budgets.toml in the machine code of the kernels, and what a pass through each takes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from . import markers
from .flow import Flow, Loop, NoPath
from .machine_code import WORDS, Instruction, Kernel
from .timing import Latencies, clocks

TABLE = Path(__file__).with_name("budgets.toml")

# What is counted, by opcode. Generic: the compiler did not know that the address is of shared memory.
GENERIC = ("LD", "ST", "ATOM")
LOCAL = ("LDL", "STL")
MULTIPLY_ADDS = ("FFMA", "DFMA", "HFMA2.MMA", "HMMA", "FFMA2")


@dataclass(frozen=True)
class Figures:
    """What a pass through a loop, or a whole kernel, has of each."""

    instructions: int
    multiply_adds: int
    generic: int
    local: int
    shared: int
    r2ur: int
    calls: int
    barriers: int
    clocks: int = 0

    @classmethod
    def of(cls, code: Iterable[Instruction], latencies: Latencies | None = None) -> Figures:
        code = list(code)

        def count(*names: str) -> int:
            return sum(instruction.name in names and not is_never(instruction) for instruction in code)

        return cls(
            len(code),
            count(*MULTIPLY_ADDS),
            count(*GENERIC),
            count(*LOCAL),
            count("LDS", "STS"),
            count("R2UR"),
            count("CALL"),
            sum(map(is_barrier, code)),
            clocks(code, latencies) if latencies else 0,
        )

    @property
    def bytes(self) -> int:
        return self.instructions * WORDS

    @property
    def per_multiply_add(self) -> float:
        return self.instructions / self.multiply_adds if self.multiply_adds else float("nan")


def is_never(instruction: Instruction) -> bool:
    """The assembler puts three loads that never happen before each asynchronous copy."""
    return instruction.text.startswith("@!PT")


def is_barrier(instruction: Instruction) -> bool:
    # One of two barriers under opposite guards counts as one.
    return instruction.name in ("BAR", "BARRIER") and not instruction.text.startswith("@!")


def is_store(instruction: Instruction) -> bool:
    return instruction.name in ("ST", "STS", "STG")


def is_load(instruction: Instruction) -> bool:
    return instruction.name in ("LD", "LDS", "LDG")


# Names of work in the table that are not opcodes.
KINDS: dict[str, Callable[[Instruction], bool]] = {
    "barrier": is_barrier,
    "store": is_store,
    "load": is_load,
    "store of 16 bytes": lambda instruction: is_store(instruction) and ".128" in instruction.text,
    "load of 16 bytes": lambda instruction: is_load(instruction) and ".128" in instruction.text,
}


@dataclass(frozen=True)
class Work:
    """So many instructions of a kind from a line."""

    op: str
    times: int
    at: tuple[str, ...] = ()

    def matcher(self) -> Callable[[Instruction], bool]:
        places = [markers.place(text) for text in self.at]
        kind = KINDS.get(self.op, lambda instruction: instruction.name == self.op)
        return lambda instruction: kind(instruction) and all(place in instruction.places for place in places)


@dataclass(frozen=True)
class HotLoop:
    name: str
    kernel: str  # a part of its name
    what: str
    work: tuple[Work, ...]
    budget: dict[str, float]

    def path(self, flow: Flow, times: dict[int, int] | None = None) -> list[Instruction]:
        """The instructions of one pass that does the work; `times` replaces the table's by the work's number."""
        matches = [work.matcher() for work in self.work]
        wanted = [(times or {}).get(k, work.times) for k, work in enumerate(self.work)]
        best: list[Instruction] | None = None
        for loop in self._loops(flow, matches):
            try:
                path = list(flow.instructions(flow.shortest(loop, matches, wanted)))
            except NoPath:
                continue
            if best is None or len(path) < len(best):
                best = path
        if best is None:
            raise NoPath(f"{self.name}: no loop of {flow.kernel.name} does the work that budgets.toml says it does")
        return best

    @staticmethod
    def _loops(flow: Flow, matches: list[Callable[[Instruction], bool]]) -> list[Loop]:
        """The innermost loops that have some of each kind of work in them."""
        fit = [loop for loop in flow.loops if all(any(map(match, flow.instructions(loop.blocks))) for match in matches)]
        return [loop for loop in fit if not any(other.blocks < loop.blocks for other in fit)]


def table(path: Path = TABLE) -> dict[str, Any]:
    with path.open("rb") as file:
        return tomllib.load(file)


def hot_loops(content: dict[str, Any]) -> list[HotLoop]:
    return [
        HotLoop(
            entry["name"],
            entry["kernel"],
            entry["what"],
            tuple(Work(w["op"], w["times"], tuple(w.get("at", ()))) for w in entry["work"]),
            entry["budget"],
        )
        for entry in content["loop"]
    ]


# csrc/cuda/layout.h: what a kernel knows of where its problems lie.
PLACES = ("any", "near")


def named(kernels: Iterable[Kernel], part: str) -> Kernel:
    """The kernel with `part` in its name; of one compiled for several places, "emd_forward_kernel.near" is one."""
    name, _, place = part.partition(".")
    mangled = f"{name}IfLNS0_5PlaceE{PLACES.index(place)}E" if place else name
    found = [kernel for kernel in kernels if mangled in kernel.name]
    if len(found) != 1:
        raise NoPath(f"{len(found)} kernels have '{part}' in their names, expected one")
    return found[0]


def exceeded(name: str, figures: Figures, budget: dict[str, float]) -> list[str]:
    """What is over its budget, in words."""
    return [
        f"{name}: {getattr(figures, key):.4g} {key.replace('_', ' ')}, budget {limit:g}"
        for key, limit in budget.items()
        if not getattr(figures, key) <= limit
    ]
