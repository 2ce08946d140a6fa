"""Builds the extension module from csrc/: finds out what the compiler can do, writes build.ninja, runs ninja.

Kept apart from setup.py so that what is compiled, and how, can be read without setuptools around it. No torch
here: nothing under csrc/ includes a torch header, so nothing here has to match an installed torch.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cuda_toolchain
from cuda_toolchain import CudaToolchain, NoCuda

# No -march=native: a wheel must run on machines other than the one that built it. No -ffast-math: what
# becomes of a NaN is part of the public contract.
COMPILE_FLAGS = (
    "-std=c++17 -O3 -DNDEBUG -fPIC -fvisibility=hidden -fno-math-errno -fno-trapping-math -ffp-contract=fast "
    "-Wall -Wextra"
).split()

# Instruction sets that CPU kernels are compiled for, each a superset of the one before; the choice among them
# is made at run time. The second entry is a macro that only compilers for a fitting processor predefine.
ISA_VARIANTS: list[tuple[str, str, list[str]]] = [
    ("baseline", "", []),
    ("avx2", "__x86_64__", "-mavx2 -mfma -mf16c -mbmi2".split()),
    (
        "avx512",
        "__x86_64__",
        "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c -mbmi2 -mprefer-vector-width=512".split(),
    ),
]

# (compile flags, link flags): GCC and clang with its own runtime, then Apple's clang with Homebrew's libomp.
OPENMP_FLAGS = [(["-fopenmp"], ["-fopenmp"]), (["-Xpreprocessor", "-fopenmp"], ["-lomp"])]


class BuildError(Exception):
    """Something a user can put right; the message says what."""


@dataclass(frozen=True)
class Toolchain:
    """A C++ compiler and what it was found to be able to do."""

    cxx: list[str]
    description: str
    openmp_compile: list[str]
    openmp_link: list[str]
    variants: list[tuple[str, list[str]]]

    @property
    def openmp(self) -> bool:
        return bool(self.openmp_link)


def _extra_flags(*names: str) -> list[str]:
    return [flag for name in names for flag in shlex.split(os.environ.get(name, ""))]


def _compiles(cxx: list[str], source: str, flags: list[str], link: list[str] | None = None) -> str | None:
    """None when `source` compiles (and links, with `link`), else what the compiler said."""
    # ARCHFLAGS is how macOS's Python asks for a processor other than its own.
    flags = [*flags, *_extra_flags("ARCHFLAGS")]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "probe.cpp"
        path.write_text(source)
        command = [*cxx, "-std=c++17", "-Werror", *flags, str(path), "-o", str(path.with_suffix(".out"))]
        command += ["-c"] if link is None else link
        done = subprocess.run(command, capture_output=True, text=True)
    return None if done.returncode == 0 else done.stderr.strip()


def find_toolchain() -> Toolchain:
    """The compiler named by CXX, else the first of c++, g++ and clang++ on PATH, and what it can do."""
    if sys.platform == "win32":
        raise BuildError("Windows is not supported; Linux is (on Windows, use WSL)")
    if named := os.environ.get("CXX"):
        cxx = shlex.split(named)
        if shutil.which(cxx[0]) is None:
            raise BuildError(f"the compiler that CXX names, {cxx[0]!r}, is not on PATH")
    else:
        found = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
        if found is None:
            raise BuildError(
                "no C++ compiler found: looked for c++, g++ and clang++ on PATH. Install one (Debian and "
                "Ubuntu: apt-get install g++), or name one with CXX=..."
            )
        cxx = [found]
    cxx17_source = "#include <utility>\nint main() { auto [a, b] = std::pair{0, 0}; return a + b; }"
    said = _compiles(cxx, cxx17_source, [], [])
    if said is not None:
        raise BuildError(f"the C++ compiler {shlex.join(cxx)} cannot build a C++17 program:\n{said}")

    openmp_source = "#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }"
    openmp: tuple[list[str], list[str]] = ([], [])
    for candidate in OPENMP_FLAGS:
        if _compiles(cxx, openmp_source, candidate[0], candidate[1]) is None:
            openmp = candidate
            break

    variants = []
    for name, macro, flags in ISA_VARIANTS:
        guard = f"#ifndef {macro}\n#error another processor\n#endif\n" if macro else ""
        if _compiles(cxx, guard + "int main() {}", flags) is None:
            variants.append((name, flags))

    version = subprocess.run([*cxx, "--version"], capture_output=True, text=True).stdout.splitlines()
    return Toolchain(cxx, version[0] if version else shlex.join(cxx), *openmp, variants)


def choose_cuda(tools: Toolchain) -> CudaToolchain:
    """The nvcc to build with; NoCuda where there is none or SFR_EXT_CUDA=0, BuildError where SFR_EXT_CUDA=1."""
    wanted = os.environ.get("SFR_EXT_CUDA", "")
    if wanted not in ("", "0", "1"):
        raise BuildError(
            "expected SFR_EXT_CUDA to be 0 (no CUDA kernels), 1 (CUDA kernels or an error) or unset (CUDA kernels "
            f"where an nvcc works), got {wanted!r}"
        )
    if wanted == "0":
        raise NoCuda("it was built with SFR_EXT_CUDA=0")
    try:
        return cuda_toolchain.find_cuda(tools.cxx)
    except ValueError as error:
        raise BuildError(str(error)) from None
    except NoCuda as reason:
        if wanted == "1":
            raise BuildError(
                f"SFR_EXT_CUDA=1 asks for CUDA kernels, but {reason}. Install a CUDA toolkit, name its compiler with "
                f"CUDACXX=.../bin/nvcc, or: pip install {shlex.join(cuda_toolchain.PYPI_PACKAGES)}"
            ) from None
        raise


def extra_requirements() -> list[str]:
    """What pip must install for this build besides what pyproject.toml names: nvcc, where it is wanted and missing."""
    try:
        wanted = os.environ.get("SFR_EXT_CUDA", "") != "0"
        return cuda_toolchain.pypi_requirements(find_toolchain().cxx) if wanted else []
    except (BuildError, ValueError):
        return []  # the build will say it


def python_include() -> str:
    include = sysconfig.get_path("include")
    if not (Path(include) / "Python.h").exists():
        raise BuildError(
            f"Python's headers are missing: no Python.h in {include}. "
            "Install them (Debian and Ubuntu: apt-get install python3-dev; Fedora: dnf install python3-devel)"
        )
    return include


def _ninja() -> str:
    """The ninja of the PyPI package when there is one (its folder need not be on PATH), else the system's."""
    try:
        import ninja

        return str(Path(ninja.BIN_DIR) / "ninja")
    except ImportError:
        found = shutil.which("ninja")
        if found is None:
            raise BuildError("ninja is missing: pip install ninja") from None
        return found


def _escape(path: Path | str) -> str:
    """A path as build.ninja wants it."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def _words(arguments: list[str]) -> str:
    """Arguments quoted for the shell inside build.ninja, where a dollar is doubled."""
    return shlex.join(arguments).replace("$", "$$")


def write_ninja(root: Path, build_dir: Path, module: str, tools: Toolchain, cuda: CudaToolchain | None = None) -> None:
    """Writes build_dir/build.ninja, whose one target is build_dir/module."""
    import pybind11

    csrc = root / "csrc"
    have = [f"-DSFR_HAVE_{name.upper()}=1" for name, _ in tools.variants if name != "baseline"]
    flags = [*COMPILE_FLAGS, *tools.openmp_compile, *have, f"-I{csrc}"]
    if not tools.openmp:
        flags.append("-Wno-unknown-pragmas")
    werror = os.environ.get("SFR_EXT_WERROR") == "1"
    if werror:
        flags.append("-Werror")
    # As system headers, out of the depfiles: under build isolation pybind11's folder is new every time.
    python = ["-isystem", python_include(), "-isystem", pybind11.get_include()]

    # (source, object, flags of its own). The order matters to the linker: where several objects hold a copy
    # of the same inline function (any std:: template), it keeps the first. With the objects in ascending
    # order of instruction set, no code is ever handed a copy that needs more than its own variant does.
    # bindings.cpp has an object for either kind of build, so that going from one to the other compiles little.
    bindings = (Path("cuda/bindings.o"), [*python, "-DSFR_CUDA=1"]) if cuda else (Path("bindings.o"), python)
    objects: list[tuple[Path, Path, list[str]]] = [
        (csrc / "bindings.cpp", *bindings),
        (csrc / "cpu" / "dispatch.cpp", Path("cpu/dispatch.o"), []),
    ]
    if cuda:
        objects += [
            (source, Path(f"cuda/{name}.o"), [*cuda.real_flags(real), *cuda.target_flags(real)])
            for source, name, real in cuda_units(csrc / "cuda")
        ]
    kernels = sorted(path for path in (csrc / "cpu").glob("*.cpp") if path.name != "dispatch.cpp")
    for name, isa_flags in tools.variants:
        for source in kernels:
            objects.append((source, Path(f"cpu/{name}/{source.stem}.o"), [f"-DSFR_ISA={name}", *isa_flags]))

    user = _words(_extra_flags("ARCHFLAGS", "CPPFLAGS", "CXXFLAGS"))
    shared = ["-bundle", "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-shared"]
    link_flags = [*tools.openmp_link, *(cuda.link if cuda else []), *_extra_flags("ARCHFLAGS", "LDFLAGS")]
    lines = [
        "ninja_required_version = 1.7",
        "builddir = .",
        "",
        "rule compile",
        f"  command = {_words([*tools.cxx, *flags])} $flags {user} -MMD -MF $out.d -c $in -o $out",
        "  description = compile $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "",
        "rule link",
        f"  command = {_words([*tools.cxx, *shared])} $in -o $out {_words(link_flags)}",
        "  description = link $out",
        "",
    ]
    if cuda:
        nvcc = [*_nvcc(build_dir, cuda), *cuda.compile_flags, f"-I{csrc}"]
        nvcc += cuda_toolchain.WERROR_FLAGS if werror else []
        # nvcc goes over the architectures at once by itself, and each takes up to 1 GB of memory; a second one makes
        # PTX, which is one thread's work, while the first assembles.
        jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
        lines += [
            "pool nvcc",
            f"  depth = {max(2, jobs // len(cuda.archs))}",
            "",
            "rule nvcc",
            f"  command = {_words(nvcc)} $flags --threads $${{MAX_JOBS:-0}} -MMD -MF $out.d -c $in -o $out",
            "  description = compile $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "  pool = nvcc",
            "",
        ]
    for source, output, own in objects:
        lines.append(f"build {_escape(output)}: {'nvcc' if source.suffix == '.cu' else 'compile'} {_escape(source)}")
        if own:
            lines.append(f"  flags = {_words(own)}")
    linked = " ".join(_escape(output) for _, output, _ in objects)
    lines += ["", f"build {_escape(module)}: link {linked}", "", f"default {_escape(module)}", ""]
    (build_dir / "build.ninja").write_text("\n".join(lines))


def cuda_units(folder: Path) -> list[tuple[Path, str, str]]:
    """What is compiled of csrc/cuda: source, name of the object, and what the kernels in it compute in, if any."""
    units = [(folder / "runtime.cu", "runtime", "")]
    for name in ("operations", "exact"):
        units += [(folder / f"{name}.cu", f"{name}_{real}", real) for real in cuda_toolchain.REALS]
    return units


def _nvcc(build_dir: Path, cuda: CudaToolchain) -> list[str]:
    """The compiler by a name that stays: under build isolation that of PyPI is in a new folder every time."""
    if not cuda.from_pypi:
        return [cuda.nvcc]
    link = build_dir / f"nvcc-{'.'.join(map(str, cuda.version))}"
    link.unlink(missing_ok=True)
    link.symlink_to(Path(cuda.nvcc).parents[1])
    # Its headers as system headers, out of the depfiles.
    return [str(link / "bin" / "nvcc"), "-isystem", str(link / "include")]


@contextlib.contextmanager
def _locked(build_dir: Path) -> Iterator[None]:
    """Two builds at once in one checkout take turns."""
    import fcntl

    with open(build_dir / "lock", "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def build_folder(root: Path) -> Path:
    """One for each Python that a module is built for: `cache_tag` is the same with and without the GIL."""
    flags = sysconfig.get_config_var("ABIFLAGS") or ""
    return root / "build" / "native" / f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}{flags}"


def build(root: Path) -> tuple[Path, dict[str, object]]:
    """Builds the module; returns where it lies and what `build_info()` should know about how it was made."""
    tools = find_toolchain()
    cuda, why_no_cuda = None, None
    try:
        cuda = choose_cuda(tools)
    except NoCuda as reason:
        why_no_cuda = f"this build has no CUDA kernels: {reason}"
    build_dir = build_folder(root)
    build_dir.mkdir(parents=True, exist_ok=True)
    module = f"{'cuda' if cuda else 'cpu'}/_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    isa = [name for name, _ in tools.variants]
    openmp = "OpenMP" if tools.openmp else "no OpenMP, so one thread only"
    summary = [tools.description, openmp, f"CPU code for {', '.join(isa)}", cuda.description if cuda else why_no_cuda]
    print(f"sfr_ext: {'; '.join(map(str, summary))}", flush=True)

    command = [_ninja(), "-C", str(build_dir)]
    if jobs := os.environ.get("MAX_JOBS"):
        command += ["-j", jobs]
    with _locked(build_dir):
        write_ninja(root, build_dir, module, tools, cuda)
        if subprocess.run(command).returncode != 0:
            raise BuildError(
                "compiling csrc/ failed; what the compiler said stands above. "
                f"Compiler: {tools.description}. Another one can be named with CXX=..."
                + ("; without CUDA kernels: SFR_EXT_CUDA=0" if cuda else "")
            )
    config: dict[str, object] = {
        "compiler": tools.description,
        "openmp": tools.openmp,
        "cpu_isas": isa,
        "cuda": cuda is not None,
        "cuda_version": cuda.release if cuda else None,
        "cuda_archs": cuda.code if cuda else [],
        "why_no_cuda": why_no_cuda,
    }
    return build_dir / module, config


if __name__ == "__main__":
    print(*extra_requirements())
