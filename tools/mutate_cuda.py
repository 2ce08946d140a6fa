"""Deletes the barriers and the guards of the CUDA kernels one at a time, and asks the tests whether they notice.

`make mutate-cuda` runs tests on the emulator (tests/simt) on every mutant of csrc/cuda and csrc/solver and writes a
table: first the quick ones, then, on those that survive, all tests of the kernels. A mutant that survives is a barrier
that is not needed or a test that is missing. A line whose comment says `// mutant: reason` is known to survive for
that reason. What was judged is kept and not run again while csrc/ is the same; survivors are tried again when the
tests have changed.

The kernels are compiled once, in a copy of the tree where every deletion is behind a switch; the environment says which
one is on.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
KERNELS = Path("csrc")
# The kernels, and the rules that they share with the CPU.
PATTERNS = ["cuda/*.cuh", "cuda/*.cu", "solver/*.h"]
# Not kernels: the functions that the emulator stands in for, and the host's side.
LEFT_OUT = {"device.cuh", "runtime.cu"}

# Functions and methods that are called for the meeting alone, or to wait.
BARRIERS = ["sync_block", "sync_threads", "sync_warp", "arrive_and_wait", "sync", "sync_solvers", "grid_barrier"]
BARRIERS += ["wait_copies"]
# Names by which a comparison is taken for a bounds check: what stands left of < or >=.
INDICES = set("i j k e n p q r c s t o at row column pixel channel after item slice step".split())
# Comparisons that choose the thread that does something alone.
OWNER = re.compile(r"[\w.]*(?:lane|rank|warp|block)(?:\(\))? == \w+|[\w.]*solves\(\)")

CALL = re.compile(r"(?<![\w.>])(?:\w+(?:\.|->))*(?:" + "|".join(BARRIERS) + r")\(")
IF = re.compile(r"\bif \(")
CHOICE = re.compile(r"(?<=[=(,] )[\w.+*\- ]+ < (?!0 )[\w.]+(?= \? )")
REASON = re.compile(r"//.*?\bmutant: (.*)")

PYTEST = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
QUICK = [*PYTEST, "tests/simt", "-m", "quick"]
ALL = [*PYTEST, "tests/simt/test_kernels.py", "tests/simt/test_exact_kernels.py", "-m", "not quick"]
# In device.cuh, which all kernels include: whether deletion `number` is on. Not watched by the race flavour. On the
# CPU, which has the same rules, none is.
SWITCH = """
#include <cstdlib>
inline const int deletion = std::getenv("SFR_MUTANT") ? std::atoi(std::getenv("SFR_MUTANT")) : 0;
__attribute__((no_sanitize("thread"))) inline bool deleted(int number) { return number == deletion; }
"""
SWITCH_OF_THE_CPU = """
#if defined(SFR_ISA)
constexpr bool deleted(int) { return false; }
#endif
"""
COPIED = ["csrc", "sfr_ext", "tests", "tools", "pyproject.toml", "setup.py", "build/simt"]


@dataclass(frozen=True)
class Mutant:
    """Some characters of one line of one file, replaced."""

    file: str
    line: int
    kind: str  # barrier, bounds or owner
    begin: int
    deleted: str
    instead: str  # nothing, "true" or "false"
    reason: str

    @property
    def name(self) -> str:
        return f"{self.file}:{self.line}: {self.deleted}"

    def switched(self, number: int) -> str:
        """What stands in its place where `deleted` decides."""
        if not self.instead:
            return f"(deleted({number}) ? void() : {self.deleted})"
        return f"(deleted({number}) ? {self.instead} : ({self.deleted}))"


@dataclass
class Verdict:
    """What the tests made of it."""

    mutant: Mutant
    caught: bool
    by: str
    detail: str
    sources: str  # hashes of csrc and of the tests
    tests: str


def closing(text: str, start: int) -> int:
    """The index of the parenthesis that closes the one before `start`, or -1."""
    depth = 1
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i
    return -1


def conjuncts(condition: str) -> list[tuple[int, str]]:
    """The parts of a && b && c with their offsets; a condition with || is one part."""
    parts, depth, start = [], 0, 0
    for i, char in enumerate(condition):
        depth += (char == "(") - (char == ")")
        if depth == 0 and condition.startswith("||", i):
            return [(0, condition)]
        if depth == 0 and condition.startswith(" && ", i):
            parts.append((start, condition[start:i]))
            start = i + 4
    return [*parts, (start, condition[start:])]


def kind_of(condition: str) -> str | None:
    """Whether a condition checks bounds or chooses a thread."""
    if OWNER.fullmatch(condition):
        return "owner"
    match = re.fullmatch(r"([\w.+*/ -]+?) (<|<=|>=) ([\w.+*/ -]+)", condition)
    if not match:
        return None
    left = set(re.findall(r"[A-Za-z_]\w*", match[1]))
    if match[3] == "infinity":  # of a cost, which is no index
        return None
    return "bounds" if left & INDICES and (match[3] == "0" or not match[3][0].isdigit()) else None


def mutants_of_line(file: str, number: int, line: str) -> list[Mutant]:
    code = line.split("//")[0]
    found = REASON.search(line)
    reason = found[1].strip() if found else ""
    mutants = []

    def add(kind: str, begin: int, end: int, instead: str) -> None:
        mutants.append(Mutant(file, number, kind, begin, line[begin:end], instead, reason))

    for call in CALL.finditer(code):
        end = closing(code, call.end())
        if end >= 0 and code[end + 1 : end + 2] == ";":
            add("barrier", call.start(), end + 1, "")
    for check in IF.finditer(code):
        end = closing(code, check.end())
        if end < 0:
            continue
        leaves = re.match(r"\) (return|continue|break)\b", code[end:])
        for offset, part in conjuncts(code[check.end() : end]):
            if kind := kind_of(part):
                begin = check.end() + offset
                add(kind, begin, begin + len(part), "false" if leaves else "true")
            elif part.startswith("!") and leaves and OWNER.fullmatch(part[1:]):
                add("owner", check.end() + offset, check.end() + offset + len(part), "false")
    for choice in CHOICE.finditer(code):
        if kind_of(choice[0]) == "bounds":
            add("bounds", choice.start(), choice.end(), "true")
    return mutants


def find_mutants(root: Path) -> list[Mutant]:
    mutants = []
    for path in sorted(path for pattern in PATTERNS for path in (root / KERNELS).glob(pattern)):
        if path.name not in LEFT_OUT:
            for number, line in enumerate(path.read_text().splitlines(), 1):
                mutants += mutants_of_line(str(path.relative_to(root / KERNELS)), number, line)
    return mutants


def digest(*folders: Path) -> str:
    total = hashlib.sha256()
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            if path.is_file() and path.suffix in {".h", ".cuh", ".cu", ".cpp", ".py"}:
                total.update(f"{path.name} {path.stat().st_size}\n".encode() + path.read_bytes())
    return total.hexdigest()[:16]


def copy_tree(source: Path, target: Path) -> None:
    for name in COPIED:
        if (source / name).is_dir():
            skip = shutil.ignore_patterns("__pycache__", "*.egg-info", "lock")
            shutil.copytree(source / name, target / name, ignore=skip)
        elif (source / name).exists():
            shutil.copy2(source / name, target / name)


def switch_all(mutants: list[Mutant], root: Path) -> None:
    """Puts every mutant into the kernels of this tree, the first as number 1, each behind a switch that is off."""
    by_line: dict[tuple[str, int], list[tuple[int, Mutant]]] = {}
    for number, mutant in enumerate(mutants, 1):
        by_line.setdefault((mutant.file, mutant.line), []).append((number, mutant))
    for (file, line), here in by_line.items():
        path = root / KERNELS / file
        lines = path.read_text().splitlines(keepends=True)
        text, after = lines[line - 1], len(lines[line - 1])
        for number, m in sorted(here, key=lambda entry: -entry[1].begin):
            end = m.begin + len(m.deleted)
            if end > after or text[m.begin : end] != m.deleted:
                raise SystemExit(f"{file}:{line}: deletions overlap")
            text, after = text[: m.begin] + m.switched(number) + text[end:], m.begin
        lines[line - 1] = text
        path.write_text("".join(lines))
    for header, switch in (("cuda/device.cuh", SWITCH), ("solver/function.h", SWITCH_OF_THE_CPU)):
        path = root / KERNELS / header
        path.write_text(path.read_text().replace("#pragma once\n", f"#pragma once\n{switch}", 1))


class Judge:
    """Runs the tests in a copy of the tree, with one deletion on at a time."""

    def __init__(self, commands: list[list[str]], timeout: float, folder: Path) -> None:
        self.commands, self.timeout, self.folder = commands, timeout, folder
        self.sources = digest(ROOT / "csrc")
        self.tests = digest(ROOT / "tests") + "-" + hashlib.sha256(repr(commands).encode()).hexdigest()[:8]
        copy_tree(ROOT, folder)
        mutants = find_mutants(folder)
        switch_all(mutants, folder)
        self.numbers = {mutant: number for number, mutant in enumerate(mutants, 1)}
        code, output = self.run(0)
        if code != 0:
            raise SystemExit(f"the tests do not pass on the kernels as they are:\n{output[-4000:]}")

    def run(self, number: int) -> tuple[int | None, str]:
        """The exit status of the first command that fails, None for a timeout, and what was said."""
        output = ""
        for command in self.commands:
            process = subprocess.Popen(
                command,
                cwd=self.folder,
                env={**os.environ, "SFR_MUTANT": str(number)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,
            )
            try:
                # The first time it compiles.
                output, _ = process.communicate(timeout=self.timeout if number else None)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                return None, process.communicate()[0]
            if process.returncode != 0:
                return process.returncode, output
        return 0, output

    def judge(self, mutant: Mutant) -> Verdict:
        code, output = self.run(self.numbers[mutant])
        return Verdict(mutant, code != 0, *self.culprit(code, output), self.sources, self.tests)

    @staticmethod
    def culprit(code: int | None, output: str) -> tuple[str, str]:
        """Which test noticed, and what it saw."""
        if code is None:
            return "timeout", ""
        if code == 0:
            return "", ""
        if code == 5:
            raise SystemExit("no test was selected")
        if "BuildError" in output:
            raise SystemExit(f"the kernels do not compile:\n{output[-4000:]}")
        failed = re.search(r"^(?:FAILED|ERROR) \S*?(\w+\.py::\S+)", output, re.M)
        said = re.search(r"cudaErrorLaunchFailure: (?:kernel .*?, )?(block .*?)(?:\"|'|$)", output, re.M)
        assertion = re.search(r"^E +(.*)", output, re.M)
        detail = (
            said[1] if said else assertion[1] if assertion else output.strip().splitlines()[-1:][0] if output else ""
        )
        return failed[1] if failed else f"exit status {code}", detail


def report(verdicts: list[Verdict], folder: Path) -> str:
    """Writes mutants.json and mutants.md; returns a closing line."""
    verdicts = sorted(verdicts, key=lambda v: (v.mutant.file, v.mutant.line, v.mutant.deleted))
    (folder / "mutants.json").write_text(json.dumps([asdict(v) for v in verdicts], indent=1) + "\n")
    unexplained = [v for v in verdicts if not v.caught and not v.mutant.reason]
    explained = sum(not v.caught for v in verdicts) - len(unexplained)
    caught = len(verdicts) - explained - len(unexplained)
    closing_line = f"{len(verdicts)} mutants: {caught} caught, {explained} survive for a known reason, "
    closing_line += f"{len(unexplained)} survive"
    rows = ["| where | what | deleted | verdict |", "|---|---|---|---|"]
    for v in verdicts:
        verdict = v.by if v.caught else "SURVIVED"
        verdict += f": {v.detail[:160]}" if v.detail else ""
        verdict += f" (known: {v.mutant.reason})" if v.mutant.reason else ""
        cells = [f"{v.mutant.file}:{v.mutant.line}", v.mutant.kind, f"`{v.mutant.deleted}`", verdict]
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    (folder / "mutants.md").write_text("\n".join([closing_line, "", *rows, ""]))
    return closing_line


def known_verdicts(path: Path) -> list[Verdict]:
    if not path.exists():
        return []
    return [Verdict(**{**entry, "mutant": Mutant(**entry["mutant"])}) for entry in json.loads(path.read_text())]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "mutants", help="folder for the tables")
    parser.add_argument("--only", default="", help="regular expression: mutants whose file:line: text matches")
    parser.add_argument("--kind", choices=["barrier", "bounds", "owner"], help="mutants of one kind")
    parser.add_argument("--sample", type=int, help="that many mutants, drawn at random")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--timeout", type=float, default=900, help="seconds for one run of tests")
    parser.add_argument("--jobs", type=int, default=2, help="mutants at the same time")
    parser.add_argument("--list", action="store_true", help="only show the mutants")
    parser.add_argument("--quick", action="store_true", help="the quick tests alone")
    parser.add_argument("pytest", nargs="*", help="after --: other tests, as arguments of pytest")
    options = parser.parse_args()

    mutants = [m for m in find_mutants(ROOT) if re.search(options.only, m.name) and options.kind in (None, m.kind)]
    if options.sample is not None and options.sample < len(mutants):
        mutants = random.Random(options.seed).sample(mutants, options.sample)
    if options.list:
        print(*(f"{m.kind:8}{m.name}{'  // ' + m.reason if m.reason else ''}" for m in mutants), sep="\n")
        return 0

    options.out.mkdir(parents=True, exist_ok=True)
    commands = [[*PYTEST, *options.pytest]] if options.pytest else [QUICK] if options.quick else [QUICK, ALL]
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        print("running the tests on the kernels as they are", flush=True)
        judge = Judge(commands, options.timeout, Path(folder))
        done = {
            v.mutant: v
            for v in known_verdicts(options.out / "mutants.json")
            if v.sources == judge.sources and (v.caught or v.tests == judge.tests)
        }
        waiting = [m for m in mutants if m not in done]
        print(f"{len(mutants)} mutants, {len(mutants) - len(waiting)} judged before", flush=True)
        lock = threading.Lock()

        def one(mutant: Mutant) -> None:
            verdict = judge.judge(mutant)
            with lock:
                done[mutant] = verdict
                report(list(done.values()), options.out)
                print(f"{mutant.name}  {'caught by ' + verdict.by if verdict.caught else 'SURVIVED'}", flush=True)

        with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
            list(pool.map(one, waiting))
    judged = [done[m] for m in mutants]
    print(report(list(done.values()), options.out), f"({options.out / 'mutants.md'})")
    return int(any(not v.caught and not v.mutant.reason for v in judged))


if __name__ == "__main__":
    sys.exit(main())
