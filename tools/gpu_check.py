"""Everything that a machine with a GPU can say about this tree, by one command: ``python tools/gpu_check.py``.

Builds the kernels for this GPU in place, runs them once, runs the tests on it, times them, and runs them again under
compute-sanitizer. Every step runs even where one before it failed, and is PASS, FAIL or SKIPPED with the reason; the
exit status is 1 where one failed. Needs torch, a C++ compiler, nvcc, pybind11, ninja and pytest; what of these last
three is missing is taken from --wheels and put beside the build, not into the environment. Nothing is downloaded.

Without a GPU it does what can be done: facts, what would be built, and the benchmarks' code on tiny CPU tensors; with
--emulate also the workload and some of the tests, on the emulator of tests/simt.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import hashlib
import importlib
import importlib.util
import itertools
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools" / "backend"))  # for the processes that build
TESTS = ROOT / "tests" / "cuda"
LOGS = ROOT / "build" / "gpu_check"
PACKAGES = LOGS / "packages"

# Modules, named as on the package index. The last four are what pytest stands on.
WANTED = ("pybind11", "ninja", "pytest", "scipy", "pluggy", "iniconfig", "packaging", "pygments")
TOOLS = ("memcheck", "racecheck", "synccheck")
# A few tests for the emulator, of every kind.
EMULATED = "two_points or all_costs or bad_weights or test_empty_batch or (costs_agree and one)"


class Skipped(Exception):
    """Why a step was not done."""


class Failed(Exception):
    """What was wrong."""


@dataclass
class Outcome:
    name: str
    status: str  # PASS | FAIL | SKIPPED
    seconds: float
    said: str


def run(command: list[str], log: str, limit: float, **environment: str) -> tuple[int, str]:
    """Exit status, -1 when out of time, and output, which is also kept in a file."""
    LOGS.mkdir(parents=True, exist_ok=True)
    path = os.pathsep.join(filter(None, [str(ROOT), str(PACKAGES), os.environ.get("PYTHONPATH", "")]))
    env = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **environment}
    with open(LOGS / f"{log}.log", "w+", errors="replace") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=env, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status = process.wait(max(limit, 1))
        except subprocess.TimeoutExpired:
            status = -1
            file.write(f"\nstopped: not done after {limit:.0f} s\n")
        finally:
            # What it started goes with it.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        file.seek(0)
        return status, file.read()


def said(command: list[str]) -> str:
    """The output; empty where there is no such command or it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=180)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def tail(text: str, lines: int = 15) -> str:
    return "\n".join(text.strip().splitlines()[-lines:])


def tree() -> str:
    """Git's commit where there is one, and a hash of what is built and run."""
    digest = hashlib.sha256()
    for folder in ("csrc", "sfr_ext", "tools", "tests", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".cu", ".cuh", ".h", ".cpp", ".py"):
                digest.update(f"{path.relative_to(ROOT)}\0".encode())
                digest.update(path.read_bytes())
    commit = said(["git", "describe", "--always", "--dirty"])
    return f"{commit + ', ' if commit else ''}sha256 {digest.hexdigest()[:16]}"


def gpu_fields(fields: str) -> list[str]:
    """Of the first GPU, from nvidia-smi; empty where there is none."""
    lines = said(["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]).splitlines()
    return [word.strip() for word in lines[0].split(",")] if lines else []


class Check:
    """The steps, and what they hand on to each other."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.end = time.monotonic() + options.limit
        self.source = tree()
        self.torch: dict[str, Any] = {}
        self.built = False

    def left(self, most: float) -> float:
        """Seconds that a step may take."""
        return min(most, self.end - time.monotonic())

    @property
    def gpu(self) -> bool:
        return bool(self.torch.get("gpu"))

    def need_gpu(self) -> None:
        if not self.gpu:
            raise Skipped("no GPU that torch can use")
        if not self.built:
            raise Skipped("the kernels were not built")
        if self.left(1) < 1:
            raise Skipped(f"{self.options.limit:.0f} s are over")

    # ------------------------------------------------------------------------------------------------- steps

    def machine(self) -> str:
        script = (
            "import json, torch; gpu = torch.cuda.is_available(); print(json.dumps(dict(torch=torch.__version__, "
            "cuda=torch.version.cuda, gpu=torch.cuda.get_device_name() if gpu else None, "
            "capability=torch.cuda.get_device_capability() if gpu else None)))"
        )
        found = said([sys.executable, "-c", script])
        if not found:
            raise Failed(f"{sys.executable} cannot import torch")
        self.torch = json.loads(found.splitlines()[-1])
        fields = "name,driver_version,compute_cap,clocks.sm,clocks.max.sm,clocks.max.mem,power.limit,memory.total"
        smi = ", ".join(f"{a} {b}" for a, b in zip(fields.split(","), gpu_fields(fields), strict=False))
        nvcc = os.environ.get("CUDACXX") or shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
        release = re.search(r"release .*", said([nvcc, "--version"]))
        lines = [
            f"tree: {self.source}",
            f"GPU: {smi or 'nvidia-smi finds none'}",
            f"nvcc: {nvcc}, {release[0]}" if release else f"nvcc: {nvcc} does not run",
            f"torch {self.torch['torch']}, CUDA {self.torch['cuda']}, GPU {self.torch['gpu']}",
            f"Python {platform.python_version()}, {os.cpu_count()} processors, load {os.getloadavg()[0]:.1f}",
        ]
        if smi and not self.gpu:
            raise Failed("\n".join(["there is a GPU, but this torch cannot use it", *lines]))
        return "\n".join(lines)

    def packages(self) -> str:
        """What is missing of pybind11, ninja, pytest and scipy."""
        sys.path.insert(0, str(PACKAGES))
        missing = [name for name in WANTED if importlib.util.find_spec(name) is None]
        if "ninja" in missing and shutil.which("ninja"):
            missing.remove("ninja")
        if not missing:
            return "all are here"
        if self.options.wheels:
            for name in list(missing):
                command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
                command += ["--find-links", str(self.options.wheels), "--target", str(PACKAGES), name]
                status, output = run(command, f"pip_{name}", self.left(60))
                if status == 0:
                    missing.remove(name)
                else:
                    print(tail(output, 2), flush=True)
            importlib.invalidate_caches()
        hint = f"missing: {', '.join(missing)} (pip install them, or name a folder of wheels with --wheels)"
        if {"pybind11", "ninja", "pytest", "pluggy", "iniconfig", "packaging"} & set(missing):
            raise Failed(hint)
        return hint if missing else f"installed into {PACKAGES.relative_to(ROOT)}"

    def build(self) -> str:
        if not self.gpu:
            status, output = run([sys.executable, __file__, "--mode", "toolchain"], "toolchain", self.left(60))
            would = output.strip() if status == 0 else f"no nvcc: {tail(output, 1)}"
            raise Skipped(f"no GPU that torch can use; a build would take {would}")
        major, minor = self.torch["capability"]
        environment = {"SFR_EXT_CUDA": "1", "SFR_EXT_CUDA_ARCHS": f"{major}{minor}"}
        status, output = run([sys.executable, __file__, "--mode", "build"], "build", self.left(240), **environment)
        if status != 0:
            raise Failed(tail(output))
        self.built = True
        return tail(output, 3)

    def workload(self) -> str:
        command = [sys.executable, __file__, "--mode", "workload"]
        if not self.gpu and self.options.emulate:
            status, output = run([*command, "--emulate"], "workload", self.left(300))
        else:
            self.need_gpu()
            status, output = run(command, "workload", self.left(60))
        if status != 0:
            raise Failed(tail(output))
        return tail(output, 1)

    def tests(self) -> str:
        """A process for each file, so that a fault in one leaves the others alone; the longest first."""
        only: list[str] = []
        environment = {}
        if not self.gpu and self.options.emulate:
            only, environment = ["-k", EMULATED], {"SFR_EXT_CUDA_EMULATE": "1"}
        else:
            self.need_gpu()
            only = ["-m", "not slow"] if self.options.quick else []
        files = sorted(TESTS.glob("test_*.py"), key=lambda path: path.stem != "test_cuda_against_cpu")
        limit = self.left(400 if environment else 200)
        counts: dict[str, int] = {}
        wrong: list[str] = []

        def one(path: Path) -> None:
            junit = LOGS / f"{path.stem}.xml"
            junit.unlink(missing_ok=True)
            command = [sys.executable, "-m", "pytest", str(path), "-v", "--tb=short", f"--junitxml={junit}"]
            command += ["-p", "no:cacheprovider", "-o", "faulthandler_timeout=60", *only]
            status, output = run(command, path.stem, limit, OMP_NUM_THREADS="2", **environment)
            if junit.exists():
                suite = next(ElementTree.parse(junit).iter("testsuite"))
                for key in ("tests", "failures", "errors", "skipped"):
                    counts[key] = counts.get(key, 0) + int(suite.get(key, 0))
            if status not in (0, 5):  # 5: none was picked
                failed = re.findall(r"^(?:FAILED|ERROR) .*", output, re.M)
                wrong.append("\n".join(failed[:12]) or f"{path.name}: status {status}\n{tail(output)}")

        with concurrent.futures.ThreadPoolExecutor(1 if environment else 4) as pool:
            list(pool.map(one, files))
        summary = ", ".join(f"{number} {name}" for name, number in counts.items())
        if wrong or counts.get("tests", 0) <= counts.get("skipped", 0):
            raise Failed("\n".join([summary, *wrong] if wrong else ["no test ran", summary]))
        return summary

    def benchmarks(self) -> str:
        command = [sys.executable, "-m", "benchmarks", "--suite", "kernels", "--source", self.source]
        if not self.gpu:
            status, output = run([*command, "--dry-run"], "benchmarks", self.left(240))
            if status != 0:
                raise Failed(tail(output))
            return tail(output, 1)
        self.need_gpu()
        limit = self.left(80 if self.options.quick else 200)
        folder = self.options.out.resolve() / re.sub(r"[^a-z0-9]+", "-", self.torch["gpu"].lower()).strip("-")
        command += ["--device", "cuda", "--out", str(folder), "--limit", str(int(0.6 * limit))]
        command += ["--rounds", "7"] if self.options.quick else []
        status, output = run(command, "benchmarks", limit)
        if status != 0:
            raise Failed(tail(output, 40))
        return tail(output, 60)

    def sanitizers(self) -> str:
        found = _sanitizer()
        if not self.gpu:
            raise Skipped(f"no GPU that torch can use; compute-sanitizer: {found or 'not found'}")
        self.need_gpu()
        if found is None:
            raise Skipped("compute-sanitizer was not found: it comes with the CUDA toolkit")
        limit = self.left(150)

        def one(tool: str) -> tuple[int, str]:
            command = [found, "--tool", tool, "--error-exitcode", "9", "--kernel-regex", "kns=sfr"]
            command += [sys.executable, __file__, "--mode", "workload", "--short"]
            # So that the tool sees where each tensor ends.
            return run(command, tool, limit, PYTORCH_NO_CUDA_MEMORY_CACHING="1")

        with concurrent.futures.ThreadPoolExecutor(len(TOOLS)) as pool:
            outcomes = dict(zip(TOOLS, pool.map(one, TOOLS), strict=True))
        lines, wrong = [], False
        for tool, (status, output) in outcomes.items():
            summary = re.findall(r"=+ .*SUMMARY.*", output)
            lines.append(f"{tool}: status {status}; {'; '.join(summary) or tail(output, 5)}")
            wrong |= status != 0 or not summary
        if wrong:
            raise Failed("\n".join(lines))
        return "\n".join(lines)


def _sanitizer() -> str | None:
    nvcc = os.environ.get("CUDACXX") or shutil.which("nvcc")
    folders = [Path(nvcc).parent] if nvcc else []
    folders += [Path(os.environ[name], "bin") for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    folders.append(Path("/usr/local/cuda/bin"))
    return next(filter(None, (shutil.which("compute-sanitizer", path=str(f)) for f in folders)), None) or shutil.which(
        "compute-sanitizer"
    )


# --------------------------------------------------------------------------------- in processes of their own


def describe_toolchain() -> None:
    import native_build

    print(native_build.choose_cuda(native_build.find_toolchain()).description)


def build_in_place() -> None:
    """As an editable install does, but without setuptools."""
    import native_build

    try:
        module, config = native_build.build(ROOT)
    except native_build.BuildError as error:
        sys.exit(f"FAILED: {error}")
    target = ROOT / "sfr_ext" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    fresh = target.with_name(target.name + ".new")
    shutil.copy2(module, fresh)
    os.replace(fresh, target)
    (ROOT / "sfr_ext" / "build_config.json").write_text(json.dumps(config, indent=2) + "\n")
    print(f"built: {target.relative_to(ROOT)}, {target.stat().st_size} bytes, for {config['cuda_archs']}")


def workload(emulate: bool, short: bool) -> None:
    """Every strategy forward and backward on tiny shapes, compared with the CPU's kernels."""
    sys.path.insert(0, str(ROOT))
    import torch

    from sfr_ext import cost_matrix, ops, solve, solve_sample

    emulated: Any = None
    if emulate:
        sys.path.insert(0, str(ROOT / "tests"))
        emulated = importlib.import_module("simt.build").module("plain")
    device = "cpu" if emulate else "cuda"

    def calls(where: str, inputs: tuple[Any, ...], metric: str, patch: int) -> list[Any]:
        x, y, a = (t.detach().to(where).requires_grad_() for t in inputs)
        result = solve_sample(x, y, a, metric=metric, patch_size=patch, eps=0.2, tol=1e-4)
        cost = cost_matrix(x, y, metric=metric, patch_size=patch)
        given = solve(cost, eps=0.2, tol=1e-4)
        total = result.transport_cost.sum() + 0.5 * result.entropic_cost.sum() + given.transport_cost.sum()
        return [result.transport_cost.detach(), *torch.autograd.grad(total, (x, y, a))]

    shapes = [((2, 5, 3, 4), (2, 5, 4, 4), 1), ((2, 3, 4, 4), (2, 2, 3, 5, 4), 2), ((1, 12, 7, 7), (1, 12, 7, 6), 1)]
    metrics = ["l2", "cosine"] if short else list(ops.METRICS)
    types = [torch.float32] if short else [torch.float32, torch.bfloat16, torch.float64]
    done = 0
    for strategy, (x_shape, y_shape, patch), metric, dtype in itertools.product(ops.STRATEGIES, shapes, metrics, types):
        if strategy == "warp" and max(x_shape[-1] * x_shape[-2], y_shape[-1] * y_shape[-2]) > 32:
            continue
        torch.manual_seed(0)
        x, y = (torch.randn(shape, dtype=torch.float64).to(dtype) for shape in (x_shape, y_shape))
        a = torch.rand(x_shape[0], (x_shape[-2] - patch + 1) * (x_shape[-1] - patch + 1)) + 0.2
        a = a.to(torch.promote_types(dtype, torch.float32))
        a[0, 1] = 0
        expected = calls("cpu", (x, y, a), metric, patch)
        with ops.forced(strategy=strategy, emulated=emulated):
            found = [t.cpu() for t in calls(device, (x, y, a), metric, patch)]
        for index, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
            off = float((ours.double() - theirs.double()).norm() / theirs.double().norm().clamp_min(1e-30))
            if not off < 2e-2:
                sys.exit(f"{strategy}, {x_shape}, {y_shape}, {metric}, {dtype}, output {index}: off by {off:.2g}")
        done += 1
    print(f"{done} cases agree with the CPU's kernels")


# -------------------------------------------------------------------------------------------------------- all


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python tools/gpu_check.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer benchmarks, no test that compiles with inductor")
    parser.add_argument("--emulate", action="store_true", help="without a GPU: the emulator of tests/simt instead")
    parser.add_argument("--wheels", type=Path, help="a folder of wheels to take missing packages from")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="where figures go")
    parser.add_argument("--limit", type=float, default=480, help="seconds for everything (default: 480)")
    parser.add_argument("--only", action="append", help="these steps alone, with those that they need")
    parser.add_argument("--mode", choices=("build", "toolchain", "workload"), help=argparse.SUPPRESS)
    parser.add_argument("--short", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.mode:
        modes = {"build": build_in_place, "toolchain": describe_toolchain}
        modes.get(options.mode, lambda: workload(options.emulate, options.short))()
        return 0

    check = Check(options)
    steps: dict[str, Callable[[], str]] = {
        "machine": check.machine,
        "packages": check.packages,
        "build": check.build,
        "workload": check.workload,
        "tests": check.tests,
        "benchmarks": check.benchmarks,
        "sanitizers": check.sanitizers,
    }
    if unknown := set(options.only or ()) - set(steps):
        parser.error(f"--only: expected some of {', '.join(steps)}, got {', '.join(sorted(unknown))}")
    wanted = {"machine", "packages", "build", *options.only} if options.only else set(steps)
    outcomes = []
    for name, step in steps.items():
        if name not in wanted:
            continue
        print(f"== {name}", flush=True)
        begin = time.monotonic()
        try:
            status, text = "PASS", step()
        except Skipped as reason:
            status, text = "SKIPPED", str(reason)
        except Failed as reason:
            status, text = "FAIL", str(reason)
        except Exception as error:
            status, text = "FAIL", f"{type(error).__name__}: {error}"
        outcomes.append(Outcome(name, status, time.monotonic() - begin, text))
        print(f"{text}\n{status} {name}, {outcomes[-1].seconds:.1f} s", flush=True)
    print("\n== all")
    for outcome in outcomes:
        first = outcome.said.splitlines()[0] if outcome.said and outcome.status != "PASS" else ""
        print(f"{outcome.status:8}{outcome.name:12}{outcome.seconds:7.1f} s  {first}".rstrip())
    print(f"logs: {LOGS.relative_to(ROOT)}")
    LOGS.mkdir(parents=True, exist_ok=True)
    (LOGS / "summary.json").write_text(json.dumps([vars(outcome) for outcome in outcomes], indent=1) + "\n")
    return int(any(outcome.status == "FAIL" for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
