"""The build: what it says when it cannot, what goes into a wheel, and what it reports about itself."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

import sfr_ext

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def native_build():
    spec = importlib.util.spec_from_file_location("native_build", ROOT / "tools" / "native_build.py")
    module = importlib.util.module_from_spec(spec)
    # Registered while it runs: dataclasses look their module up by name.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_build_info():
    info = sfr_ext.build_info()
    assert info["version"] == sfr_ext.__version__ == version("sfr_ext")
    assert "baseline" in info["cpu_isas"] and info["cpu_isa"] in info["cpu_isas"]
    assert info["cuda"] is False and info["cuda_archs"] == [] and info["why_no_cuda"]
    assert json.loads(json.dumps(info)) == info


def test_environment_picks_the_instruction_set():
    command = [sys.executable, "-c", "import sfr_ext; print(sfr_ext.build_info()['cpu_isa'])"]
    env = {**os.environ, "SFR_EXT_CPU_ISA": "baseline"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.stdout.strip() == "baseline", done.stderr


def test_no_torch_header_is_included():
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in {".h", ".cpp"}]
    assert sources
    for path in sources:
        assert not re.search(r'#include *[<"](torch|ATen|c10)/', path.read_text()), path


def test_missing_compiler(native_build, monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "no-such-compiler -O0")
    with pytest.raises(native_build.BuildError, match="that CXX names, 'no-such-compiler', is not on PATH"):
        native_build.find_toolchain()
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(native_build.BuildError, match=r"no C\+\+ compiler found: looked for c\+\+, g\+\+ and clang"):
        native_build.find_toolchain()


def test_compiler_that_fails(native_build, monkeypatch):
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(native_build.BuildError, match=r"the C\+\+ compiler false cannot build a C\+\+17 program"):
        native_build.find_toolchain()


def test_missing_python_headers(native_build, monkeypatch, tmp_path):
    monkeypatch.setattr(native_build.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(native_build.BuildError, match=r"no Python\.h in .*apt-get install python3-dev"):
        native_build.python_include()


def test_compiler_without_openmp_or_instruction_sets_still_builds(native_build, monkeypatch, tmp_path):
    monkeypatch.setattr(native_build, "OPENMP_FLAGS", [(["-fno-such-flag"], [])])
    monkeypatch.setattr(native_build, "ISA_VARIANTS", [("baseline", "", []), ("other", "__no_such_cpu__", [])])
    tools = native_build.find_toolchain()
    assert not tools.openmp and [name for name, _ in tools.variants] == ["baseline"]
    native_build.write_ninja(ROOT, tmp_path, tmp_path / "_C.so", tools)
    text = (tmp_path / "build.ninja").read_text()
    assert "SFR_ISA=baseline" in text and "SFR_ISA=other" not in text and "SFR_HAVE" not in text


def test_objects_are_linked_in_ascending_order_of_instruction_set(native_build, tmp_path):
    native_build.write_ninja(ROOT, tmp_path, tmp_path / "_C.so", native_build.find_toolchain())
    text = (tmp_path / "build.ninja").read_text()
    linked = re.search(r"build _C\.so: link (.*)", text).group(1).split()
    order = [name for name, _, _ in native_build.ISA_VARIANTS]
    ranks = [order.index(Path(name).parent.name) for name in linked if Path(name).parent.name in order]
    assert linked[:2] == ["bindings.o", "cpu/dispatch.o"] and ranks and ranks == sorted(ranks)


def test_wheel_holds_what_it_should(tmp_path):
    """Built by the same ninja as the installed module, so nothing is compiled again."""
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps"]
    done = subprocess.run([*command, "-w", tmp_path, ROOT], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(path) as wheel:
        names = set(wheel.namelist())
        metadata = wheel.read(f"sfr_ext-{sfr_ext.__version__}.dist-info/METADATA").decode()
    assert {"sfr_ext/__init__.py", "sfr_ext/py.typed", "sfr_ext/build_config.json"} <= names
    assert sum(name.startswith("sfr_ext/_C.") and name.endswith(".so") for name in names) == 1
    assert {name.split("/")[0].split("-")[0] for name in names} == {"sfr_ext"}
    assert "Requires-Dist: torch>=2.4\n" in metadata and "Requires-Python: >=3.10\n" in metadata
