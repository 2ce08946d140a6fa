"""How long one warp takes along a path of machine code, by the code's own stall counts and scoreboards.

A model: instructions issue in order, one warp alone, latencies as below. Left out: misses of the instruction cache,
other warps that want the same unit, bank conflicts. Against hardware it has not been measured.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from .machine_code import Instruction

# Clocks from issue to result of what a scoreboard waits for. Shared memory 30 and generic loads from it 36, the
# constant bank 40: as published microbenchmarks of Volta to Hopper have them, to about a third.
LATENCY = {
    "LDS": 30, "LDL": 40, "LDC": 40, "SHFL": 24, "FCHK": 20, "F2I": 22, "I2F": 22, "I2FP": 6, "ST": 12,
    "STS": 12, "S2R": 30, "S2UR": 30, "R2UR": 10,
}  # fmt: skip
SPECIAL = 22  # MUFU
OTHER = 20
OPERANDS_READ = 12
BARRIER = 30  # all warps of the block arriving, when none is late


@dataclass(frozen=True)
class Latencies:
    """What depends on the device and on where data lie."""

    global_load: int = 500  # clocks; the L2 cache or memory
    generic_load: int = 36  # of shared memory, unless it is known to be of the L2 cache

    def of(self, instruction: Instruction) -> int:
        if instruction.name.startswith("MUFU"):
            return SPECIAL
        if instruction.name in ("LDG", "ATOMG", "ATOM", "RED"):
            return self.global_load
        if instruction.name == "LD":
            return self.generic_load
        return LATENCY.get(instruction.name, OTHER)


def clocks(path: Iterable[Instruction], latencies: Latencies = Latencies()) -> int:
    """Clocks that one warp takes to issue the instructions of a path, one after the other."""
    ready, now = [0] * 8, 0
    copied = 0  # when all that is on its way to shared memory has come
    for instruction in path:
        control = instruction.control
        now = max([now] + [ready[k] for k in range(6) if control.wait >> k & 1])
        if control.result < 6:
            ready[control.result] = max(ready[control.result], now + latencies.of(instruction))
        if control.read < 6:
            ready[control.read] = max(ready[control.read], now + OPERANDS_READ)
        if instruction.name == "LDGSTS":
            copied = now + latencies.global_load
        elif instruction.name == "LDGDEPBAR":
            ready[control.result] = max(now, copied)
        elif found := re.search(r"DEPBAR\.LE SB(\d), 0x0", instruction.text):
            now = max(now, ready[int(found[1])])
        now += max(control.stall, 1) + (BARRIER if instruction.name in ("BAR", "BARRIER") else 0)
    return now
