"""The build: what it says when it cannot, what goes into a wheel, and what it reports about itself."""

from __future__ import annotations

import functools
import json
import os
import re
import shlex
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from importlib.metadata import version
from pathlib import Path

import build_backend
import cuda_toolchain
import native_build
import pytest
import torch
from cuda_toolchain import NoCuda
from native_build import BuildError

import sfr_ext
from sfr_ext import build, cli

ROOT = Path(__file__).resolve().parents[1]
SOURCES = {".py", ".h", ".cpp", ".cu", ".cuh", ".md", ".npz"}


def test_build_info():
    info = sfr_ext.build_info()
    assert info["version"] == sfr_ext.__version__ == version("sfr_ext")
    assert "baseline" in info["cpu_isas"] and info["cpu_isa"] in info["cpu_isas"]
    if info["cuda"]:
        assert re.fullmatch(r"\d+\.\d+", info["cuda_version"]) and info["why_no_cuda"] is None
        assert info["cuda_archs"][-1].startswith("compute_")
    else:
        assert info["cuda_version"] is None and info["cuda_archs"] == []
        assert info["why_no_cuda"].startswith("this build has no CUDA kernels: ")
    assert json.loads(json.dumps(info)) == info


@pytest.mark.parametrize("content", [None, "", '{"cuda": fal'], ids=["none", "empty", "cut off"])
def test_an_installation_without_its_configuration(content, tmp_path, monkeypatch, capsys):
    """As where the compiled part alone was copied: one sentence, no traceback, and the functions work."""
    monkeypatch.setattr(build, "__file__", str(tmp_path / "build.py"))
    if content is not None:
        (tmp_path / "build_config.json").write_text(content)
    message = f"sfr_ext.build_info: expected what the build has written in {tmp_path}/build_config.json, got no"
    with pytest.raises(FileNotFoundError, match=f"^{re.escape(message)}") as caught:
        sfr_ext.build_info()
    assert caught.value.__suppress_context__
    assert cli.main(["info"]) == 1
    said = capsys.readouterr()
    assert said.err.startswith(f"sfr-ext: {message}") and said.err.count("\n") == 1 and said.out == ""
    assert sfr_ext.emd_l2(torch.rand(1, 3, 2), torch.rand(1, 3, 2)).isfinite()


def test_environment_picks_the_instruction_set():
    command = [sys.executable, "-c", "import sfr_ext; print(sfr_ext.build_info()['cpu_isa'])"]
    env = {**os.environ, "SFR_EXT_CPU_ISA": "baseline"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.stdout.strip() == "baseline", done.stderr


def test_no_torch_header_is_included():
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in {".h", ".cpp", ".cu", ".cuh"}]
    assert sources
    for path in sources:
        assert not re.search(r'#include *[<"](torch|ATen|c10)/', path.read_text()), path


def test_missing_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "no-such-compiler -O0")
    with pytest.raises(BuildError, match="that CXX names, 'no-such-compiler', is not on PATH"):
        native_build.find_toolchain()
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BuildError, match=r"no C\+\+ compiler found: looked for c\+\+, g\+\+ and clang"):
        native_build.find_toolchain()


def test_compiler_that_fails(monkeypatch):
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(BuildError, match=r"the C\+\+ compiler false cannot build a C\+\+17 program"):
        native_build.find_toolchain()


def test_missing_python_headers(monkeypatch, tmp_path):
    monkeypatch.setattr(native_build.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(BuildError, match=r"no Python\.h in .*apt-get install python3-dev"):
        native_build.python_include()


def test_compiler_without_openmp_or_instruction_sets_still_builds(monkeypatch, tmp_path):
    monkeypatch.setattr(native_build, "OPENMP_FLAGS", [(["-fno-such-flag"], [])])
    monkeypatch.setattr(native_build, "ISA_VARIANTS", [("baseline", "", []), ("other", "__no_such_cpu__", [])])
    tools = native_build.find_toolchain()
    assert not tools.openmp and [name for name, _ in tools.variants] == ["baseline"]
    native_build.write_ninja(ROOT, tmp_path, "_C.so", tools)
    text = (tmp_path / "build.ninja").read_text()
    assert "SFR_ISA=baseline" in text and "SFR_ISA=other" not in text and "SFR_HAVE" not in text


def test_objects_are_linked_in_ascending_order_of_instruction_set(tmp_path):
    native_build.write_ninja(ROOT, tmp_path, "_C.so", native_build.find_toolchain())
    text = (tmp_path / "build.ninja").read_text()
    linked = re.search(r"build _C\.so: link (.*)", text).group(1).split()
    order = [name for name, _, _ in native_build.ISA_VARIANTS]
    ranks = [order.index(Path(name).parent.name) for name in linked if Path(name).parent.name in order]
    assert linked[:2] == ["bindings.o", "cpu/dispatch.o"] and ranks and ranks == sorted(ranks)


def test_pythons_with_and_without_the_gil_share_no_folder(monkeypatch):
    def folder(flags):
        monkeypatch.setattr(native_build.sysconfig, "get_config_var", {"ABIFLAGS": flags}.get)
        return native_build.build_folder(ROOT)

    assert folder("").name == f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
    assert folder("t") not in (folder(""), folder("d"))


def test_sdist_holds_all_that_a_build_needs(tmp_path):
    """Made by the backend as pip does; what it holds builds again, up to the compilers."""
    code = "import build_backend, sys; build_backend.build_sdist(sys.argv[1])"
    command = [sys.executable, "-c", code, tmp_path]
    env = {**os.environ, "PYTHONPATH": str(ROOT / "tools" / "backend"), "SFR_EXT_CUDA": "0"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    with tarfile.open(tmp_path / f"sfr_ext-{sfr_ext.__version__}.tar.gz") as archive:
        archive.extractall(tmp_path, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    unpacked = tmp_path / f"sfr_ext-{sfr_ext.__version__}"
    for folder in ("csrc", "tools", "tests", "benchmarks", "docs", "examples", "sfr_ext"):
        kept = {path.relative_to(ROOT) for path in (ROOT / folder).rglob("*") if path.suffix in SOURCES}
        assert kept and all((unpacked / path).is_file() for path in kept), folder
    assert not list(unpacked.rglob("*.so"))
    # pip takes the backend from there, and it finds its sources and writes the rules for ninja.
    project = (unpacked / "pyproject.toml").read_text()
    backend = re.search(r'build-backend = "(\w+)"', project)[1]
    code = f"import {backend}; print({backend}.get_requires_for_build_wheel())"
    env["PYTHONPATH"] = str(unpacked / re.search(r'backend-path = \["(.+)"\]', project)[1])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=unpacked)
    assert done.returncode == 0, done.stderr
    native_build.write_ninja(unpacked, tmp_path, "_C.so", native_build.find_toolchain())
    assert "bindings.cpp" in (tmp_path / "build.ninja").read_text()


def test_backend_folder_holds_the_backend_alone():
    """pip puts it before everything else: a module there must not stand in for another of that name."""
    names = {path.name for path in (ROOT / "tools" / "backend").iterdir() if path.suffix == ".py"}
    assert names == {"build_backend.py", "native_build.py", "cuda_toolchain.py"}


def test_wheel_holds_what_it_should(tmp_path):
    """Built by the same ninja as the installed module, so nothing is compiled again."""
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps"]
    info = sfr_ext.build_info()
    env = {**os.environ, "SFR_EXT_CUDA": "01"[info["cuda"]]}
    if info["cuda"]:
        env["SFR_EXT_CUDA_ARCHS"] = " ".join(name[3:] for name in info["cuda_archs"] if name.startswith("sm_"))
    done = subprocess.run([*command, "-w", tmp_path, ROOT], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(path) as wheel:
        names = set(wheel.namelist())
        metadata = wheel.read(f"sfr_ext-{sfr_ext.__version__}.dist-info/METADATA").decode()
    assert {"sfr_ext/__init__.py", "sfr_ext/py.typed", "sfr_ext/build_config.json"} <= names
    assert sum(name.startswith("sfr_ext/_C.") and name.endswith(".so") for name in names) == 1
    assert {name.split("/")[0].split("-")[0] for name in names} == {"sfr_ext"}
    assert "Requires-Dist: torch>=2.4\n" in metadata and "Requires-Python: >=3.10\n" in metadata


# CUDA

EVERY_ARCH = "75 80 86 87 88 89 90 100 103 110 120 121"


def fake_toolkit(folder, release="13.0", archs=EVERY_ARCH, compiles=True):
    """A toolkit whose nvcc answers questions and makes empty objects, which link with its empty runtime."""
    cxx = shlex.join(toolchain().cxx)
    nvcc = folder / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    make_object = f'for last; do :; done; {cxx} -fPIC -x c++ -c /dev/null -o "$last"'
    nvcc.write_text(
        f"""#!/bin/sh
case "$*" in
  *--version*) echo "Cuda compilation tools, release {release}, V{release}.88" ;;
  *--help*) echo "{"--Ofast-compile <level>" * (release >= "13")}" ;;
  *--list-gpu-arch*) printf 'compute_%s\\n' {archs} ;;
  *--dryrun*) echo "#$ TOP={folder}" ;;
  *) {make_object if compiles else "echo no thanks; echo error: unsupported GNU version; exit 1"} ;;
esac
"""
    )
    nvcc.chmod(0o755)
    (folder / "lib64").mkdir()
    (folder / "lib64" / "libcudart_static.a").write_text("!<arch>\n")
    return nvcc


@functools.cache
def toolchain():
    return native_build.find_toolchain()


def find_cuda():
    return cuda_toolchain.find_cuda(toolchain().cxx)


@pytest.fixture
def no_nvcc(monkeypatch, tmp_path):
    """A machine without nvcc, whatever there is on this one."""
    for name in ("CUDACXX", "CUDA_HOME", "CUDA_PATH", "NVCC_CCBIN", "SFR_EXT_CUDA", "SFR_EXT_CUDA_ARCHS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(cuda_toolchain, "_path", lambda: [])
    monkeypatch.setattr(cuda_toolchain, "USUAL_FOLDER", tmp_path / "usual")
    monkeypatch.setattr(cuda_toolchain, "_from_pypi", lambda: None)


def test_nvcc_is_looked_for_in_order(no_nvcc, monkeypatch, tmp_path):
    with pytest.raises(NoCuda, match=r"no nvcc was found \(looked at CUDACXX, CUDA_HOME, CUDA_PATH"):
        find_cuda()
    names = ["usual", "path", "cuda_path", "cuda_home", "cudacxx", "pypi"]
    nvcc = {name: str(fake_toolkit(tmp_path / name)) for name in names}
    monkeypatch.setattr(cuda_toolchain, "_from_pypi", lambda: nvcc["pypi"])
    found = find_cuda()
    assert found.nvcc == nvcc["usual"] and not found.from_pypi
    assert found.link == [f"-L{tmp_path / 'usual' / 'lib64'}", *cuda_toolchain.RUNTIME_LIBRARIES]
    monkeypatch.setattr(cuda_toolchain, "_path", lambda: [tmp_path, tmp_path / "path" / "bin"])
    assert find_cuda().nvcc == nvcc["path"]
    monkeypatch.setenv("CUDA_PATH", str(tmp_path / "cuda_path"))
    assert find_cuda().nvcc == nvcc["cuda_path"]
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda_home"))
    assert find_cuda().nvcc == nvcc["cuda_home"]
    monkeypatch.setenv("CUDACXX", nvcc["cudacxx"])
    assert find_cuda().nvcc == nvcc["cudacxx"]


def test_nvcc_that_does_not_do_is_passed_over(no_nvcc, monkeypatch, tmp_path):
    old = fake_toolkit(tmp_path / "old", release="12.0")
    broken = fake_toolkit(tmp_path / "broken", compiles=False)
    monkeypatch.setattr(cuda_toolchain, "_path", lambda: [old.parent, broken.parent])
    reasons = (
        f"{old} is of CUDA 12.0, and 12.4 or later is needed; {broken} cannot compile a kernel: error: unsupported"
    )
    with pytest.raises(NoCuda, match=re.escape(reasons)):
        find_cuda()
    good = str(fake_toolkit(tmp_path / "good"))
    monkeypatch.setattr(cuda_toolchain, "_from_pypi", lambda: good)
    assert find_cuda().nvcc == good and find_cuda().from_pypi
    # But not when it was asked for by name.
    monkeypatch.setenv("CUDACXX", str(old))
    with pytest.raises(NoCuda, match=r"is of CUDA 12\.0"):
        find_cuda()
    monkeypatch.setenv("CUDACXX", str(tmp_path / "none"))
    with pytest.raises(NoCuda, match="none does not work: No such file or directory"):
        find_cuda()


def test_host_compiler(monkeypatch):
    monkeypatch.delenv("NVCC_CCBIN", raising=False)
    assert cuda_toolchain._host_compiler(["ccache", "g++", "-m64"]) == ["-ccbin=g++", "-Xcompiler=-m64"]
    monkeypatch.setenv("NVCC_CCBIN", "g++-13")
    assert cuda_toolchain._host_compiler(["g++"]) == []


@pytest.mark.parametrize(
    "text, archs",
    [("", None), ("90", ["90"]), ("90;80", ["80", "90"]), ("8.0 12.0 sm_90", ["80", "90", "120"]), ("8.6,8.6", ["86"])],
)
def test_wanted_archs(monkeypatch, text, archs):
    monkeypatch.setenv("SFR_EXT_CUDA_ARCHS", text)
    assert cuda_toolchain.wanted_archs() == archs


def test_archs(no_nvcc, monkeypatch, tmp_path):
    monkeypatch.setenv("CUDACXX", str(fake_toolkit(tmp_path, release="12.4", archs="50 60 70 75 80 86 87 89 90")))
    found = find_cuda()
    assert found.code == ["sm_75", "sm_80", "sm_86", "sm_90", "compute_75", "compute_90"]
    # Those with matrix instructions have PTX of their own.
    assert found.target_flags("float") == [
        "-gencode=arch=compute_75,code=[sm_75,sm_86,compute_75]",
        "-gencode=arch=compute_80,code=[sm_80]",
        "-gencode=arch=compute_90,code=[sm_90,compute_90]",
    ]
    assert found.target_flags("double") == ["-gencode=arch=compute_75,code=[sm_75,sm_80,sm_90,compute_75]"]
    made = {arch: found.target_flag(arch) for arch in ("70", "80", "86", "90")}
    assert {arch: re.search(r"compute_\d+", flag)[0] for arch, flag in made.items()} == {
        "70": "compute_70",
        "80": "compute_80",
        "86": "compute_75",
        "90": "compute_90",
    }
    assert found.real_flags("double") == ["-DSFR_REAL=double", "-Xptxas=-O1"]
    assert found.target_flag("90", "double") == "-gencode=arch=compute_75,code=[sm_90]"
    assert "--compress-mode=size" not in found.compile_flags
    monkeypatch.setenv("SFR_EXT_CUDA_ARCHS", "8.0 8.6 8.9 9.0")
    assert find_cuda().target_flags() == [
        "-gencode=arch=compute_80,code=[sm_80,compute_80]",
        "-gencode=arch=compute_86,code=[sm_86,sm_89]",
        "-gencode=arch=compute_90,code=[sm_90,compute_90]",
    ]
    monkeypatch.setenv("SFR_EXT_CUDA_ARCHS", "7.0")
    assert find_cuda().code == ["sm_70", "compute_70"]
    for real in ("float", "double"):
        assert find_cuda().target_flags(real) == ["-gencode=arch=compute_70,code=[sm_70,compute_70]"]
    monkeypatch.setenv("SFR_EXT_CUDA_ARCHS", "90 120")
    with pytest.raises(NoCuda, match=r"does not know 120 \(from SFR_EXT_CUDA_ARCHS\), only 50, 60, .*, 90$"):
        find_cuda()
    monkeypatch.setenv("SFR_EXT_CUDA_ARCHS", "hopper")
    with pytest.raises(BuildError, match="expected SFR_EXT_CUDA_ARCHS to list .* got 'hopper'"):
        native_build.choose_cuda(toolchain())


def runs_on(flags, arch):
    """Whether a module made with these flags has code for a GPU: machine code of its major version that is no newer
    than it, or PTX that is no newer than it."""
    codes = [code for flag in flags for code in re.search(r"code=\[(.*)\]", flag)[1].split(",")]
    kinds = [(kind, int(number)) for kind, number in (code.split("_") for code in codes)]
    return any(number <= arch and (kind == "compute" or number // 10 == arch // 10) for kind, number in kinds)


@pytest.mark.parametrize("real", cuda_toolchain.REALS)
@pytest.mark.parametrize("archs", ["", "75 120", "80 90", "86", "70 75 80 100"])
def test_every_gpu_from_the_oldest_on_finds_code(no_nvcc, monkeypatch, tmp_path, real, archs):
    known = "70 75 80 86 87 88 89 90 100 103 110 120 121"
    monkeypatch.setenv("CUDACXX", str(fake_toolkit(tmp_path, archs=known)))
    monkeypatch.setenv("SFR_EXT_CUDA_ARCHS", archs)
    found = find_cuda()
    gpus = [int(arch) for arch in [*known.split(), "130"]]
    assert [arch for arch in gpus if runs_on(found.target_flags(real), arch)] == [
        arch for arch in gpus if arch >= int(found.archs[0])
    ]


def test_environment_says_whether_cuda_is_built(no_nvcc, monkeypatch, tmp_path):
    tools = toolchain()
    monkeypatch.setenv("SFR_EXT_CUDA", "1")
    with pytest.raises(BuildError, match=r"but no nvcc was found .*CUDACXX=.*pip install 'nvidia-cuda-nvcc=="):
        native_build.choose_cuda(tools)
    monkeypatch.setenv("SFR_EXT_CUDA", "")
    with pytest.raises(NoCuda, match="no nvcc was found"):
        native_build.choose_cuda(tools)
    monkeypatch.setenv("CUDACXX", str(fake_toolkit(tmp_path)))
    for value in ("", "1"):
        monkeypatch.setenv("SFR_EXT_CUDA", value)
        assert native_build.choose_cuda(tools).release == "13.0"
    monkeypatch.setenv("SFR_EXT_CUDA", "0")
    with pytest.raises(NoCuda, match="it was built with SFR_EXT_CUDA=0"):
        native_build.choose_cuda(tools)
    monkeypatch.setenv("SFR_EXT_CUDA", "yes")
    with pytest.raises(BuildError, match="expected SFR_EXT_CUDA to be 0 .* got 'yes'"):
        native_build.choose_cuda(tools)


def test_backend_asks_for_nvcc_where_there_is_none(no_nvcc, monkeypatch, tmp_path):
    monkeypatch.setattr(native_build, "find_toolchain", toolchain)
    monkeypatch.setattr(cuda_toolchain.sysconfig, "get_platform", lambda: "linux-x86_64")
    monkeypatch.setattr(cuda_toolchain.platform, "libc_ver", lambda: ("glibc", "2.36"))
    hooks = (build_backend.get_requires_for_build_wheel, build_backend.get_requires_for_build_editable)

    def asked():
        wheel, editable = (
            {name for name in hook() if name in cuda_toolchain.PYPI_PACKAGES and "==13.0." in name} for hook in hooks
        )
        assert wheel == editable
        return wheel

    assert asked() == set(cuda_toolchain.PYPI_PACKAGES)
    monkeypatch.setenv("SFR_EXT_CUDA", "0")
    assert not asked()
    monkeypatch.setenv("SFR_EXT_CUDA", "1")
    assert asked()
    monkeypatch.setattr(cuda_toolchain.platform, "libc_ver", lambda: ("", ""))
    assert not asked()
    monkeypatch.setattr(cuda_toolchain.platform, "libc_ver", lambda: ("glibc", "2.36"))
    monkeypatch.setattr(cuda_toolchain.sysconfig, "get_platform", lambda: "macosx-14.0-arm64")
    assert not asked()
    monkeypatch.setattr(cuda_toolchain.sysconfig, "get_platform", lambda: "linux-aarch64")
    assert asked()
    monkeypatch.setenv("CUDA_HOME", str(fake_toolkit(tmp_path).parents[1]))
    assert not asked()
    # Nor where there is no C++ compiler either.
    monkeypatch.undo()
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert not asked()


def test_constraints_hold_for_nvcc():
    pins = (ROOT / "constraints.txt").read_text()
    for package in cuda_toolchain.PYPI_PACKAGES:
        name, release = package.split("==")
        assert re.search(rf"^{name}=={re.escape(release[:-1])}\d+$", pins, re.MULTILINE), package


def test_ninja_with_cuda(no_nvcc, monkeypatch, tmp_path):
    monkeypatch.setenv("CUDACXX", str(fake_toolkit(tmp_path / "toolkit")))
    tools, cuda = toolchain(), find_cuda()
    native_build.write_ninja(ROOT, tmp_path, "cuda/_C.so", tools, cuda)
    text = (tmp_path / "build.ninja").read_text()
    assert "build cuda/runtime.o: nvcc " in text and "-DSFR_CUDA=1" in text and "-lcudart_static" in text
    for real in ("float", "double"):
        less = " --Ofast-compile=mid" * (real == "double")
        assert re.search(
            rf"build cuda/operations_{real}\.o: nvcc .*/operations\.cu\n  flags = -DSFR_REAL={real}{less} '?-gencode",
            text,
        )
    assert re.search(r"build cuda/_C\.so: link cuda/bindings\.o cpu/dispatch\.o (cuda/\w+\.o )+cpu/baseline/", text)
    native_build.write_ninja(ROOT, tmp_path, "cpu/_C.so", tools)
    text = (tmp_path / "build.ninja").read_text()
    assert "nvcc" not in text and "SFR_CUDA" not in text and "cudart" not in text


def test_nvcc_from_pypi_has_a_name_that_stays(no_nvcc, monkeypatch, tmp_path):
    texts = []
    for folder in ("one", "two"):
        nvcc = str(fake_toolkit(tmp_path / folder))
        monkeypatch.setattr(cuda_toolchain, "_from_pypi", lambda nvcc=nvcc: nvcc)
        native_build.write_ninja(ROOT, tmp_path, "cuda/_C.so", toolchain(), find_cuda())
        assert os.path.samefile(tmp_path / "nvcc-13.0.88" / "bin" / "nvcc", nvcc)
        rules = (tmp_path / "build.ninja").read_text().splitlines()
        texts.append([line for line in rules if "bin/nvcc" in line])
    assert texts[0] and texts[0] == texts[1]
