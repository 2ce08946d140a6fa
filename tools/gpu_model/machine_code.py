"""Machine code of a cubin: instructions with their control bits and the source lines that they come from."""

from __future__ import annotations

import importlib.util
import re
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

WORDS = 16  # bytes of an instruction, Volta and later

_LINE = re.compile(r'//## File "([^"]+)", line (\d+)')
_CODE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;")
_LABEL = re.compile(r"^(\S+):$")
_TARGET = re.compile(r"`\((.+)\)")
_TARGETS = re.compile(r'\s*\(\*"BRANCH_TARGETS (.*?)"\*\)')  # of a jump table
_GUARD = re.compile(r"^@!?U?P\w+\s+")

Place = tuple[str, int]  # file's name, line


class NoDisassembler(Exception):
    """nvdisasm is not installed."""


@dataclass(frozen=True)
class Control:
    """Bits 105 to 121 of an instruction: when the next may issue, and which of six scoreboards it sets and awaits."""

    stall: int
    result: int  # scoreboard released when the result is there; 7: none
    read: int  # ... when the operands have been read
    wait: int  # a mask

    @classmethod
    def of(cls, high: int) -> Control:
        bits = high >> 41 & 0x1FFFFF
        return cls(bits & 15, bits >> 5 & 7, bits >> 8 & 7, bits >> 11 & 63)


@dataclass(frozen=True)
class Instruction:
    address: int
    text: str
    control: Control
    places: tuple[Place, ...]  # the line, the line that it was inlined at, and so on
    targets: tuple[str, ...] = ()  # of a branch or call: labels

    @property
    def guarded(self) -> bool:
        return self.text.startswith("@")

    @property
    def opcode(self) -> str:
        """With all its modifiers, as LD.E.128."""
        return _GUARD.sub("", self.text).split()[0]

    @property
    def name(self) -> str:
        """Without them, as LD; MUFU keeps its function."""
        parts = self.opcode.split(".")
        return ".".join(parts[:2]) if parts[0] == "MUFU" else parts[0]


@dataclass
class Kernel:
    """A section of code: the kernel and the functions that were compiled for it alone."""

    name: str  # mangled
    arch: str
    code: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)  # address

    @property
    def bytes(self) -> int:
        return len(self.code) * WORDS


def nvdisasm() -> str:
    """The one on PATH or in CUDA's usual folder, else that of the package from PyPI."""
    for path in (None, "/usr/local/cuda/bin"):
        if found := shutil.which("nvdisasm", path=path):
            return found
    nvidia = importlib.util.find_spec("nvidia")
    for folder in nvidia.submodule_search_locations or [] if nvidia else []:
        for wheel in sorted(Path(folder).glob("*/bin/nvdisasm")):
            return str(wheel)
    raise NoDisassembler("nvdisasm was not found (pip install nvidia-cuda-nvdisasm)")


def disassemble(cubin: Path) -> list[Kernel]:
    """The kernels of a cubin. Compiled with -lineinfo, instructions know their places."""
    content = cubin.read_bytes()
    with tempfile.TemporaryDirectory() as folder:  # read once: another process may compile it anew meanwhile
        copy = Path(folder) / cubin.name
        copy.write_bytes(content)
        done = subprocess.run([nvdisasm(), "-c", "-gi", str(copy)], capture_output=True, text=True)
    if done.returncode != 0:
        raise NoDisassembler(f"nvdisasm cannot read {cubin.name}: {done.stderr.strip()[:300]}")
    return list(parse(done.stdout, dict(_sections(content))))


def parse(listing: str, sections: dict[str, bytes]) -> Iterator[Kernel]:
    """The kernels of a listing by `nvdisasm -c -gi`; control bits come from the sections' bytes."""
    arch, kernel, raw = "", None, b""
    places: list[Place] = []
    complete = True  # the chain of places is
    for line in listing.splitlines():
        if match := _CODE.search(line):
            if kernel is None:
                continue
            address = int(match[1], 16)
            (high,) = struct.unpack_from("<Q", raw, address + 8)
            text = match[2]
            if several := _TARGETS.search(text):
                text, targets = text[: several.start()], tuple(several[1].split(","))
            else:
                targets = tuple(_TARGET.findall(text))
            kernel.code.append(Instruction(address, text, Control.of(high), tuple(places), targets))
            complete = True
        elif match := _LINE.search(line):
            if complete:
                places = []
            places.append((match[1].rsplit("/", 1)[-1], int(match[2])))
            complete = "inlined at" not in line
        elif line.startswith("\t.section\t.text."):
            if kernel is not None:
                yield _trimmed(kernel)
            section = line.split()[1].split(",")[0]
            kernel, raw, places = Kernel(section.removeprefix(".text."), arch), sections[section], []
        elif match := re.match(r"\s*\.target\s+(sm_\w+)", line):
            arch = match[1]
        elif kernel is not None and (match := _LABEL.match(line)):
            kernel.labels[match[1]] = kernel.code[-1].address + WORDS if kernel.code else 0
    if kernel is not None:
        yield _trimmed(kernel)


def _trimmed(kernel: Kernel) -> Kernel:
    """Without what fills the section's end."""
    while kernel.code and kernel.code[-1].name in ("NOP", "BRA") and not kernel.code[-1].guarded:
        last = kernel.code[-1]
        if last.name == "BRA" and kernel.labels.get(last.targets[0]) != last.address:
            break
        kernel.code.pop()
    return kernel


def _sections(elf: bytes) -> Iterator[tuple[str, bytes]]:
    """Names and contents of the code of a 64-bit ELF file."""
    (table,) = struct.unpack_from("<Q", elf, 0x28)
    size, count, names_at = struct.unpack_from("<HHH", elf, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", elf, table + size * k) for k in range(count)]
    names = headers[names_at][4]
    for name, _, _, _, offset, length in headers:
        text = elf[names + name : elf.index(b"\0", names + name)].decode()
        if text.startswith(".text."):
            yield text, elf[offset : offset + length]
