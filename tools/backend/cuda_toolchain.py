"""Finds nvcc, the compiler of the CUDA kernels, and what it can do together with the C++ compiler at hand.

Whether the machine has a GPU is never asked: what is built must not depend on where it is built.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sysconfig
import tempfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

OLDEST = (12, 4)

# Where NVIDIA's installers put the toolkit, or a link to the one in use.
USUAL_FOLDER = Path("/usr/local/cuda")

# Machine code for each of these that the nvcc at hand knows, and PTX of the newest, which the driver compiles for GPUs
# that are newer still. Code for 8.0 also runs on 8.7, for 10.0 on 10.3, for 12.0 on 12.1, and so on; 8.9 runs 8.6's,
# since its own would be the same to the bit. PTX of the oldest is for what lies between them, such as 11.0.
DEFAULT_ARCHS = ["75", "80", "86", "90", "100", "120"]

# nvcc without a toolkit; all parts must be of one release. There are wheels for these two platforms.
PYPI_PACKAGES = [f"nvidia-{part}==13.0.*" for part in ("cuda-nvcc", "nvvm", "cuda-crt", "cuda-runtime")]
PYPI_PLATFORMS = ("linux-x86_64", "linux-aarch64")

# No --use_fast_math: what becomes of a NaN, of infinity and of small numbers is part of the public contract.
COMPILE_FLAGS = ["-std=c++17", "-O3", "-DNDEBUG", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra"]
WERROR_FLAGS = ["-Werror=all-warnings", "-Xcompiler=-Werror"]

# What the kernels compute in; they are compiled for each by itself. float64 is for checks, not for speed: it is
# compiled with less effort, and for fewer architectures.
REALS = ("float", "double")

# The runtime is linked in statically, so that the module loads where there is no CUDA at all, and finds the driver by
# itself where there is one.
RUNTIME_LIBRARIES = ["-lcudart_static", "-ldl", "-lrt", "-lpthread"]

PROBE = """
#include <cuda_runtime.h>
#include <string>
#include <vector>
__global__ void probe_kernel(float* x) { *x = exp2f(*x); }
extern "C" int probe() {
  probe_kernel<<<1, 1>>>(nullptr);
  return int(std::vector<std::string>(1, cudaGetErrorString(cudaGetLastError())).size());
}
"""


class NoCuda(Exception):
    """Why CUDA kernels cannot be compiled here, in words that go on from 'this build has no CUDA kernels: '."""


# Those whose float32 kernels have matrix instructions: csrc/cuda/device.cuh.
MATRIX_ARCHS = ("80", "90", "100")


@dataclass(frozen=True)
class CudaToolchain:
    """An nvcc that works with the C++ compiler at hand."""

    nvcc: str
    host: list[str]  # flags that name the C++ compiler
    version: tuple[int, ...]  # (13, 0, 88)
    archs: list[str]  # ascending
    link: list[str]
    from_pypi: bool
    fast_compile: bool  # knows --Ofast-compile

    @property
    def release(self) -> str:
        return ".".join(map(str, self.version[:2]))

    @property
    def description(self) -> str:
        return f"CUDA {self.release} ({self.nvcc}) for {', '.join(self.code)}"

    @property
    def code(self) -> list[str]:
        """What a module is compiled to: machine code of each architecture, PTX of the oldest and of the newest."""
        ptx = dict.fromkeys([self.archs[0], self.archs[-1]])
        return [*(f"sm_{arch}" for arch in self.archs), *(f"compute_{arch}" for arch in ptx)]

    @property
    def compile_flags(self) -> list[str]:
        # The smallest form wants a driver of CUDA 12.4 or later. Drivers for 13 all are; those for 12 are not.
        return [
            *self.host,
            *COMPILE_FLAGS,
            "--compress-mode=size" if self.version >= (13, 0) else "-Xfatbin=-compress-all",
        ]

    def real_flags(self, real: str) -> list[str]:
        """For kernels that compute in `real`; nothing where it is empty."""
        less = ["--Ofast-compile=mid" if self.fast_compile else "-Xptxas=-O1"] if real == "double" else []
        return [f"-DSFR_REAL={real}", *less] if real else []

    def target_flags(self, real: str = "float") -> list[str]:
        """Every architecture's machine code, and PTX of the oldest and newest; for float64 what serves for them all.

        A GPU of the oldest architecture or of any later one then finds something that runs on it.
        """
        oldest, newest = self.archs[0], self.archs[-1]
        if real == "double":  # machine code runs on all later architectures of its major version, PTX on all later ones
            majors = {arch[:-1]: arch for arch in reversed(self.archs)}
            return [_gencode(oldest, [f"sm_{arch}" for arch in reversed(majors.values())] + [f"compute_{oldest}"])]
        code: dict[str, list[str]] = {}
        for arch in self.archs:
            code.setdefault(self._ptx_for(arch), []).append(f"sm_{arch}")
        for arch in dict.fromkeys([oldest, newest]):
            code[arch].append(f"compute_{arch}")
        return [_gencode(ptx, assembled) for ptx, assembled in code.items()]

    def target_flag(self, arch: str, real: str = "float") -> str:
        """Machine code of one architecture, made as `target_flags` has it made."""
        ptx = self.archs[0] if real == "double" else self._ptx_for(arch)
        return _gencode(arch if int(arch) < int(ptx) else ptx, [f"sm_{arch}"])

    def _ptx_for(self, arch: str) -> str:
        """Whose PTX is assembled for an architecture.

        The compiler's first half, which makes it, takes long. So one serves for all, but where matrix instructions are
        taken, and where it goes into the module itself.
        """
        usual = [known for known in self.archs if known not in MATRIX_ARCHS]
        if arch in MATRIX_ARCHS or arch in (self.archs[0], self.archs[-1]) or not usual or int(arch) < int(usual[0]):
            return arch
        return usual[0]


def _gencode(ptx: str, code: list[str]) -> str:
    return f"-gencode=arch=compute_{ptx},code=[{','.join(code)}]"


def find_cuda(cxx: list[str]) -> CudaToolchain:
    """The first nvcc that works with this C++ compiler.

    Looked at are CUDACXX and, where that is not set, CUDA_HOME, CUDA_PATH, PATH, /usr/local/cuda and the package from
    PyPI.

    Raises:
        NoCuda: none works; the message says why.
        ValueError: SFR_EXT_CUDA_ARCHS cannot be read.
    """
    wanted = wanted_archs()
    reasons = []
    for nvcc, from_pypi in _candidates().items():
        try:
            return _examine(nvcc, from_pypi, cxx, wanted)
        except NoCuda as reason:
            reasons.append(str(reason))
    looked_at = f"CUDACXX, CUDA_HOME, CUDA_PATH, PATH, {USUAL_FOLDER} and the Python package nvidia-cuda-nvcc"
    raise NoCuda("; ".join(reasons) or f"no nvcc was found (looked at {looked_at})")


def pypi_requirements(cxx: list[str]) -> list[str]:
    """The packages to install so that `find_cuda` finds an nvcc; none where it does, or they do not exist."""
    # CUDACXX names the one compiler that is wanted. The wheels are for glibc.
    exist = sysconfig.get_platform() in PYPI_PLATFORMS and platform.libc_ver()[0] == "glibc"
    if not exist or os.environ.get("CUDACXX"):
        return []
    try:
        find_cuda(cxx)
    except NoCuda:
        return PYPI_PACKAGES
    return []


def wanted_archs() -> list[str] | None:
    """What SFR_EXT_CUDA_ARCHS names, as ["80", "90"]; None where it is not set."""
    text = os.environ.get("SFR_EXT_CUDA_ARCHS", "")
    archs = set()
    for word in filter(None, re.split(r"[;,\s]+", text)):
        match = re.fullmatch(r"(?:sm_)?(\d+)\.?(\d)", word)
        if match is None:
            raise ValueError(
                f"expected SFR_EXT_CUDA_ARCHS to list compute capabilities, as '80;90' or '8.0 9.0', got {text!r}"
            )
        archs.add(match[1] + match[2])
    return sorted(archs, key=int) or None


def _candidates() -> dict[str, bool]:
    """Files to look at, in this order, and whether they come from PyPI."""
    if named := os.environ.get("CUDACXX"):
        return {named: False}
    folders = [Path(os.environ[name], "bin") for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    folders += [*_path(), USUAL_FOLDER / "bin"]
    found = {str(folder / "nvcc"): False for folder in folders if shutil.which(folder / "nvcc")}
    packaged = _from_pypi()
    return {**found, str(packaged): True} if packaged else found


def _path() -> list[Path]:
    return [Path(folder) for folder in os.get_exec_path() if folder]


def _from_pypi() -> Path | None:
    try:
        files = metadata.files("nvidia-cuda-nvcc") or []
    except metadata.PackageNotFoundError:
        return None
    return next((Path(str(file.locate())) for file in files if file.parts[-2:] == ("bin", "nvcc")), None)


def _examine(nvcc: str, from_pypi: bool, cxx: list[str], wanted: list[str] | None) -> CudaToolchain:
    said = _say([nvcc, "--version"])
    found = re.search(r"release (\d+)\.(\d+), V\d+\.\d+\.(\d+)", said)
    if found is None:
        raise NoCuda(f"{nvcc} --version names no release: {_short(said)}")
    version = tuple(map(int, found.groups()))
    if version < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise NoCuda(f"{nvcc} is of CUDA {version[0]}.{version[1]}, and {oldest} or later is needed")

    known = re.findall(r"compute_(\d+)", _say([nvcc, "--list-gpu-arch"]))
    unknown = [arch for arch in wanted or [] if arch not in known]
    if unknown:
        names = ", ".join(sorted(known, key=int))
        raise NoCuda(f"{nvcc} does not know {', '.join(unknown)} (from SFR_EXT_CUDA_ARCHS), only {names}")
    archs = wanted or [arch for arch in DEFAULT_ARCHS if arch in known]
    if not archs:
        raise NoCuda(f"{nvcc} knows none of {', '.join(DEFAULT_ARCHS)}")

    link = [*_library_folder(nvcc), *RUNTIME_LIBRARIES]
    fast_compile = "--Ofast-compile" in _say([nvcc, "--help"])
    tools = CudaToolchain(nvcc, _host_compiler(cxx), version, archs, link, from_pypi, fast_compile)
    _probe(tools, cxx)
    return tools


def _host_compiler(cxx: list[str]) -> list[str]:
    """nvcc must use the compiler that the rest is built with, unless its own variable names another one."""
    if os.environ.get("NVCC_CCBIN"):
        return []
    launched = len(cxx) > 1 and Path(cxx[0]).name in ("ccache", "sccache", "distcc")
    compiler, *flags = cxx[1:] if launched else cxx
    return [f"-ccbin={compiler}", *(f"-Xcompiler={flag}" for flag in flags)]


def _library_folder(nvcc: str) -> list[str]:
    """-L with the folder that holds the static runtime; nothing where the linker knows it (Debian's package)."""
    # The file need not exist. nvcc may be a script or a link elsewhere; what it prints is where the toolkit lies.
    said = _say([nvcc, "--dryrun", "-c", "none.cu"])
    folders = [Path(found) for found in re.findall(r'"-L([^"]*)"', said)]
    if top := re.search(r"TOP=(.*)", said):
        folders += [Path(top[1].strip(), name) for name in ("lib64", "lib")]
    holds = next((folder for folder in folders if (folder / "libcudart_static.a").exists()), None)
    return [f"-L{holds.resolve()}"] if holds else []


def _probe(tools: CudaToolchain, cxx: list[str]) -> None:
    """Compiles and links a kernel as the build will, for one architecture."""
    with tempfile.TemporaryDirectory() as folder:
        source, output = Path(folder, "probe.cu"), Path(folder, "probe.o")
        source.write_text(PROBE)
        flags = [*tools.compile_flags, tools.target_flag(tools.archs[0]), "-c", str(source), "-o", str(output)]
        _say([tools.nvcc, *flags], "cannot compile a kernel")
        link = [*cxx, "-shared", str(output), "-o", str(Path(folder, "probe.so")), *tools.link]
        _say(link, f"cannot link what {tools.nvcc} compiled")


def _say(command: list[str], failed: str = "does not work") -> str:
    """What the command prints; NoCuda where it fails."""
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    except OSError as error:
        raise NoCuda(f"{command[0]} {failed}: {error.strerror}") from None
    if done.returncode != 0:
        raise NoCuda(f"{command[0]} {failed}: {_short(done.stdout) or f'exit status {done.returncode}'}")
    return done.stdout


def _short(text: str) -> str:
    """The lines that name an error, or all, on one line of a readable length."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    line = " ".join([line for line in lines if "error" in line.lower()] or lines)
    return line if len(line) <= 400 else line[:397] + "..."
