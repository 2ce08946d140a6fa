"""Builds the extension module with its CUDA kernels compiled for the emulator, and loads it.

Run as a command (`python tests/simt/build.py plain race`) it only builds. There are three flavours:

    plain   as fast as it gets
    asan    under AddressSanitizer and UndefinedBehaviorSanitizer; for a process started with `sanitized()`
    race    every access to memory is watched: races, and shared memory that nobody wrote
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.machinery
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
BUILD = ROOT / "build" / "simt"

sys.path.insert(0, str(ROOT / "tools" / "backend"))
import native_build  # noqa: E402

# (flags of the kernels, flags of the emulator, flags of the link)
SANITIZE = "-O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all".split()
FLAVOURS: dict[str, tuple[list[str], list[str], list[str]]] = {
    "plain": ("-O2 -g1".split(), "-O2 -g1".split(), []),
    "asan": (SANITIZE, SANITIZE, "-fsanitize=address,undefined".split()),
    # The calls that -fsanitize=thread puts into the kernels go to race.cpp; its own library is not linked.
    "race": ("-O1 -g1 -fsanitize=thread".split(), "-O2 -g1 -DSFR_SIMT_RACE".split(), []),
}
EVERY = "-std=c++17 -fPIC -fvisibility=hidden -DSFR_CUDA=1 -DSFR_SIMT -Wall -Wextra -Wno-unknown-pragmas".split()


def compiler() -> list[str]:
    """g++ if there is one, for its sanitizers, else the compiler named by CXX, else c++."""
    named = shlex.split(os.environ.get("CXX", ""))
    found = shutil.which("g++") or (named and shutil.which(named[0])) or shutil.which("c++")
    if not found:
        raise native_build.BuildError("the emulator needs a C++ compiler: g++")
    return [found]


def _relative(path: Path) -> str:
    """As seen from the build folder: a copy of the tree with its build folder has nothing to compile again."""
    return os.path.relpath(path, BUILD)


def write_ninja() -> None:
    """Writes build.ninja, with a module and the planted bugs for each flavour."""
    import pybind11

    cxx = compiler()
    includes = [f"-I{_relative(path)}" for path in (HERE / "include", ROOT / "csrc", HERE)]
    python = ["-isystem", native_build.python_include(), "-isystem", pybind11.get_include()]
    lines = [
        "ninja_required_version = 1.7",
        "builddir = .",
        "rule compile",
        f"  command = {shlex.join([*cxx, *EVERY, *includes])} $flags -MMD -MF $out.d -x c++ -c $in -o $out",
        "  description = simt: compile $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {shlex.join([*cxx, '-shared'])} $in -o $out $flags",
        "  description = simt: link $out",
    ]

    def compiled(source: Path, output: str, flags: list[str]) -> str:
        lines.append(f"build {output}: compile {_relative(source)}")
        lines.append(f"  flags = {shlex.join(flags)}")
        return output

    # The bindings and the CPU's kernels are not what is tested here: once for all flavours, for one instruction set.
    common = [compiled(ROOT / "csrc" / "bindings.cpp", "common/bindings.o", ["-O1", *python])]
    for source in sorted((ROOT / "csrc" / "cpu").glob("*.cpp")):
        isa = [] if source.name == "dispatch.cpp" else ["-DSFR_ISA=baseline"]
        common.append(compiled(source, f"common/cpu_{source.stem}.o", ["-O2", *isa]))
    for flavour, (kernel_flags, emulator_flags, link_flags) in FLAVOURS.items():
        emulator = [
            compiled(source, f"{flavour}/simt_{source.stem}.o", emulator_flags) for source in sorted(HERE.glob("*.cpp"))
        ]
        kernels = [
            compiled(source, f"{flavour}/{name}.o", [*kernel_flags, f"-DSFR_REAL={real}"])
            for source, name, real in native_build.cuda_units(ROOT / "csrc" / "cuda")
        ]
        planted = [
            compiled(source, f"{flavour}/planted_{source.stem}.o", kernel_flags)
            for source in sorted((HERE / "planted").glob("*.cu"))
        ]
        for name, objects in (("_C.so", common + kernels), ("planted.so", planted)):
            lines.append(f"build {flavour}/{name}: link {' '.join(objects + emulator)}")
            lines.append(f"  flags = {shlex.join([*link_flags, '-ldl', '-lrt'])}")
    text = "\n".join([*lines, ""])
    path = BUILD / "build.ninja"
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


@functools.cache
def build(target: str) -> Path:
    """Brings a target such as plain/_C.so up to date."""
    BUILD.mkdir(parents=True, exist_ok=True)
    with native_build._locked(BUILD):
        write_ninja()
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        command = [native_build._ninja(), "-C", str(BUILD), *jobs, target]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise native_build.BuildError(f"building {target} for the emulator failed:\n{done.stdout}{done.stderr}")
    return BUILD / target


@functools.cache
def module(flavour: str = "plain") -> ModuleType:
    """The extension module of this flavour; those of several flavours can be loaded side by side."""
    # A name of its own: pybind11 makes a module of one name once, whatever file it comes from.
    name, path = f"simt_{flavour}._C", str(build(f"{flavour}/_C.so"))
    loader = importlib.machinery.ExtensionFileLoader(name, path)
    spec = importlib.util.spec_from_file_location(name, path, loader=loader)
    assert spec is not None
    loaded = importlib.util.module_from_spec(spec)
    loader.exec_module(loaded)
    return loaded


class Library:
    """A shared library with an emulator of its own in it."""

    def __init__(self, path: Path) -> None:
        self.calls: Any = ctypes.CDLL(str(path))
        self.path = path
        self.calls.simt_calls.restype = self.calls.simt_meetings.restype = ctypes.c_char_p
        self.made: dict[tuple[int, int], int] = {}

    def seed(self, seed: int | None) -> None:
        """The order in which blocks, warps and lanes run; None is the natural one."""
        self.calls.simt_set_seed(ctypes.c_longlong(-1 if seed is None else seed))

    def device(self, index: int, processors: int, shared_kib: int, arch: int = 90) -> None:
        """What a device (0 to 63) has; to be called before it is first used, for limits are asked for once."""
        self.calls.simt_set_device(index, processors, shared_kib, arch)

    def device_with(self, shared_kib: int, arch: int = 90) -> int:
        """A device on which a block can have so much shared memory, one of 8 to 63."""
        if (shared_kib, arch) not in self.made:
            self.made[shared_kib, arch] = index = 8 + len(self.made)
            assert index < 64
            self.device(index, 4, shared_kib, arch)
        return self.made[shared_kib, arch]

    @contextlib.contextmanager
    def counting_calls(self) -> Iterator[dict[str, int]]:
        """What comes to be called of the CUDA runtime within it: filled in at its end."""
        found: dict[str, int] = {}
        self.calls.simt_count_calls()
        yield found
        for line in self.calls.simt_calls().decode().splitlines():
            name, number = line.split()
            found[name] = int(number)

    @contextlib.contextmanager
    def approximate(self, ulps: int = 2, flush: bool = True, seed: int = 0) -> Iterator[None]:
        """Within it exp2 and quotients of float32 are off by up to so many units in the last place.

        ``flush``: and 0 below float's normal range, and where a divisor is above 2^126, as CUDA documents them."""
        self.calls.simt_approximate(ulps, flush, seed)
        try:
            yield
        finally:
            self.calls.simt_approximate(0, False, 0)

    def has_context(self, index: int) -> bool:
        """Whether something made a context on the device since `device` was called."""
        return bool(self.calls.simt_has_context(index))

    def current_device(self) -> int:
        """That of this thread."""
        return self.calls.simt_current_device()


@functools.cache
def emulator(flavour: str = "plain") -> Library:
    """The emulator within `module(flavour)`."""
    return Library(build(f"{flavour}/_C.so"))


@functools.cache
def planted(flavour: str = "plain") -> Library:
    """The kernels with planted bugs, and an emulator of their own."""
    library = Library(build(f"{flavour}/planted.so"))
    for name in ("planted_name", "planted_run", "planted_launch"):
        getattr(library.calls, name).restype = ctypes.c_char_p
    for name in ("planted_half_to_float", "planted_exp2", "planted_quotient", "planted_ratio", "planted_root"):
        getattr(library.calls, name).restype = ctypes.c_float
    library.calls.planted_float_to_half.restype = ctypes.c_uint16
    return library


def sanitized() -> dict[str, str] | None:
    """The environment for a Python that loads the asan flavour, or None where g++ has no sanitizers.

    They must be there from the start of the process."""
    cxx = compiler()
    found = [
        subprocess.run([*cxx, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so", "libstdc++.so")
    ]
    if not all(Path(path).is_absolute() for path in found):
        return None
    # Python itself never frees everything; a fiber's frames do not outlive it.
    options = "detect_leaks=0:detect_stack_use_after_return=0"
    return {**os.environ, "LD_PRELOAD": " ".join(found), "ASAN_OPTIONS": options, "UBSAN_OPTIONS": "print_stacktrace=1"}


if __name__ == "__main__":
    for name in sys.argv[1:] or FLAVOURS:
        print(build(f"{name}/_C.so"))
        print(build(f"{name}/planted.so"))
