"""Compiles the CUDA kernels with warnings as errors and reports what each takes of a GPU; needs nvcc, but no GPU.

    python tools/cuda_report.py [--archs 75 90 120] [--out build/cuda_resources]

Writes OUT.md and OUT.json: registers of a thread, static shared memory, stack frame and spills of every kernel. Exit
code 1 where something does not compile, or uses a stack frame or spills registers and no line of ALLOWED says why.
Only what changed since the last run is compiled again; the machine code is kept in OUT.cache for tools/gpu_model.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import fnmatch
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools" / "backend"))

import native_build  # noqa: E402
from cuda_toolchain import WERROR_FLAGS, CudaToolchain, NoCuda, find_cuda  # noqa: E402

# "kernel<arguments> sm_75", with * for anything: why these may have a stack frame or spills.
ALLOWED: dict[str, str] = {
    "*_kernel<float, any> *": "a kernel that calls its phases (csrc/cuda/problem.cuh): what it keeps meanwhile",
    "*_backward_kernel<float, near> sm_75": "words of a panel on its way, once each",
    "*_kernel<float, near> *": "phases are inlined; beside the solver's loops (budgets.toml)",
    "*_kernel<float> *": "the exact solver's frames",
    "Cholesky<double>::* *": "float64 is for checks",
    "Problem<double, any>::* *": "float64 is for checks",
    "Cholesky<float>::* sm_75": "8 bytes that its caller keeps",
    "ground_again<float, any> sm_75": "8 bytes that its caller keeps",
    "ground_forward<float, any> sm_75": "8 bytes that its caller keeps",
    "read_cost<float, any> sm_75": "24 bytes that its caller keeps",
    "*<double*> *": "float64 is for checks, not for speed: compiled with less effort, and its tiles are twice as large",
    "quotient *": "float64's, compiled with less effort; float's is inlined",
    "solve_and_write<float, float> *": "the exact solver in one; its scans have no local access (budgets.toml)",
    "transport_forward<float, any> *": "beside the solver's loops, which have no local access (tests/gpu_model)",
    "transport_backward<float, any> *": "some bytes, once each",
    "read_weights<float, any> *": "a store of 4 bytes",
    "ground_forward<float, any> sm_120": "between tiles of a map; the assembler needs none on sm_75",
    "emd_gradients<float, any> *": "a panel on its way, once each",
}


class ReportError(Exception):
    """The kernels do not compile."""


@dataclass(frozen=True)
class Usage:
    """What the assembler says of one function on one architecture, in bytes but for registers and barriers."""

    file: str
    kernel: str
    arch: str
    registers: int | None  # None of a function that kernels call
    barriers: int
    shared: int
    stack: int
    spill_stores: int
    spill_loads: int

    @property
    def clean(self) -> bool:
        return not (self.stack or self.spill_stores or self.spill_loads)

    @property
    def reason(self) -> str | None:
        """The line of ALLOWED that lets it have a stack frame or spills."""
        name = f"{self.kernel} {self.arch}"
        return next((why for pattern, why in ALLOWED.items() if fnmatch.fnmatchcase(name, pattern)), None)


def parse(log: str, file: str, arch: str) -> list[Usage]:
    """What `nvcc -Xptxas -v` printed, compiling a file for one architecture."""
    found: dict[str, dict[str, int]] = {}
    registers: dict[str, int] = {}
    entry = function = ""
    for line in log.splitlines():
        if match := re.search(r"Compiling entry function '(\S+)'", line):
            entry = match[1]
        elif match := re.search(r"Function properties for (\S+)", line):
            function = match[1]
        elif match := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            stack, stores, loads = map(int, match.groups())
            found[function] = {"stack": stack, "spill_stores": stores, "spill_loads": loads, "shared": 0, "barriers": 0}
        elif match := re.search(r"Used (\d+) registers", line):
            registers[entry] = int(match[1])
            for key, pattern in (("shared", r"(\d+) bytes smem"), ("barriers", r"used (\d+) barriers")):
                value = re.search(pattern, line)
                found[entry][key] = int(value[1]) if value else 0
    names = short_names(found)
    return [Usage(file, names[name], arch, registers.get(name), **rest) for name, rest in found.items()]


def short_names(mangled: Iterable[str]) -> dict[str, str]:
    """Names as in the source, without namespaces, parameters and return types."""
    names = list(mangled)
    demangler = shutil.which("c++filt")
    if not names or demangler is None:
        return {name: name for name in names}
    done = subprocess.run([demangler], input="\n".join(names), capture_output=True, text=True, check=True)
    return dict(zip(names, map(_short, done.stdout.splitlines()), strict=True))


def _short(name: str) -> str:
    name = re.sub(r"\(anonymous namespace\)::|\b\w+::", "", name)
    name = re.sub(r"\(Place\)(\d)", lambda place: ("any", "near")[int(place[1])], name)
    if phase := re.match(r"(?:\w+ )*Phase<&\((?:\w+ )*(\w+<[^(]*>)\(", name):
        return phase[1]  # problem.cuh: a phase that is a function of its own
    begin = depth = 0
    for at, letter in enumerate(name):
        depth += (letter == "<") - (letter == ">")
        if letter == " " and depth == 0:
            begin = at + 1  # what came before is of the return type
        elif letter == "(" and depth == 0:
            return name[begin:at]
    return name[begin:]


def compile_all(units: list[tuple[Path, str, str]], archs: list[str] | None, cache: Path) -> list[Usage]:
    """Compiles every file for every architecture, as many at once as there are processors or MAX_JOBS says.

    `units` are as `native_build.cuda_units` returns them. Without `archs`: for the oldest and the newest that the build
    would compile for.
    """
    tools = native_build.find_toolchain()
    cuda = find_cuda(tools.cxx)
    archs = archs or list(dict.fromkeys((cuda.archs[0], cuda.archs[-1])))
    cache.mkdir(parents=True, exist_ok=True)
    sources = [path for path in sorted((ROOT / "csrc").rglob("*")) if path.suffix in (".h", ".cuh", ".cu")]
    included = b"".join(path.read_bytes() for path in sources)
    jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        tasks = [pool.submit(_compile, cuda, *unit, arch, included, cache) for unit in units for arch in archs]
        return [usage for task in tasks for usage in task.result()]


def _compile(
    cuda: CudaToolchain, source: Path, name: str, real: str, arch: str, included: bytes, cache: Path
) -> list[Usage]:
    flags = [*cuda.compile_flags, *WERROR_FLAGS, *cuda.real_flags(real), cuda.target_flag(arch, real)]
    # Line numbers change nothing in the code; tools/gpu_model finds the hot loops by them.
    flags += [f"-I{ROOT / 'csrc'}", "-Xptxas=-v", "-lineinfo"]
    stamp = hashlib.sha256(repr((cuda.version, flags)).encode() + source.read_bytes() + included).hexdigest()
    kept = cache / f"{name}.sm_{arch}.json"
    cubin = kept.with_suffix(".cubin")
    if kept.exists() and cubin.exists() and (known := json.loads(kept.read_text()))["stamp"] == stamp:
        return parse(known["log"], source.name, f"sm_{arch}")
    with tempfile.TemporaryDirectory() as folder:
        command = [cuda.nvcc, *flags, "-c", str(source), "-o", str(Path(folder, "kernels.o"))]
        command += ["--keep", f"--keep-dir={folder}"]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode != 0:
            raise ReportError(f"{source.name} does not compile for sm_{arch} without a warning:\n{done.stdout}")
        shutil.copyfile(next(Path(folder).glob("*.cubin")), cubin)
    kept.write_text(json.dumps({"stamp": stamp, "log": done.stdout}))
    return parse(done.stdout, source.name, f"sm_{arch}")


def table(usages: list[Usage]) -> str:
    """A table in Markdown, and the reasons that it needs."""
    columns = "kernel | file | architecture | registers | barriers | static shared | stack | spill stores | spill loads"
    lines = [f"| {columns} |", "|---|---|---|---:|---:|---:|---:|---:|---:|"]
    for u in usages:
        registers = "-" if u.registers is None else u.registers
        numbers = (registers, u.barriers, u.shared, u.stack, u.spill_stores, u.spill_loads)
        lines.append(f"| `{u.kernel}` | {u.file} | {u.arch} | {' | '.join(map(str, numbers))} |")
    lines += [f"\n`{u.kernel}` of {u.file} on {u.arch}: {u.reason}" for u in usages if not u.clean and u.reason]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description="Compile the CUDA kernels and report what each takes of a GPU.")
    parser.add_argument("sources", type=Path, nargs="*", help="default: csrc/cuda/*.cu")
    parser.add_argument("--archs", nargs="+", metavar="75", help="default: the oldest and newest of the build")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "cuda_resources", help="files, without the ending")
    arguments = parser.parse_args()
    named = [(source, source.stem, "") for source in arguments.sources]
    units = named or native_build.cuda_units(ROOT / "csrc" / "cuda")
    out: Path = arguments.out
    try:
        usages = compile_all(units, arguments.archs, out.parent / f"{out.name}.cache")
    except (NoCuda, ReportError, native_build.BuildError, ValueError) as error:
        print(f"cuda_report: {error}", file=sys.stderr)
        return 1
    usages.sort(key=lambda u: (u.kernel, u.file, int(u.arch.removeprefix("sm_"))))
    out.with_suffix(".md").write_text(table(usages))
    out.with_suffix(".json").write_text(json.dumps([asdict(u) for u in usages], indent=1) + "\n")
    print(table(usages), end="")
    bad = [u for u in usages if not u.clean and u.reason is None]
    for u in bad:
        numbers = f"a stack frame of {u.stack} bytes, spills of {u.spill_stores} (stores) and {u.spill_loads} (loads)"
        advice = "Make it use less, or say in ALLOWED of tools/cuda_report.py why it may"
        print(f"cuda_report: {u.kernel} of {u.file} on {u.arch} has {numbers}. {advice}.", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
