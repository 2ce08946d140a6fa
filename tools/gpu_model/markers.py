"""Lines of the sources by what stands on them, so that code may move: "plan.cuh: sums[n] += p.at[n]" or a marker
comment such as "hot: row products"."""

from __future__ import annotations

import functools
from pathlib import Path

from .machine_code import Place

SOURCES = Path(__file__).resolve().parents[2] / "csrc"


class NoLine(Exception):
    """No line, or more than one, carries this text."""


@functools.cache
def _lines() -> dict[str, list[str]]:
    paths = [path for path in SOURCES.rglob("*") if path.suffix in (".h", ".cuh", ".cu")]
    return {str(path.relative_to(SOURCES)): path.read_text().splitlines() for path in sorted(paths)}


def place(text: str) -> Place:
    """The one line that carries `text`, or in `file: text` the one of that file.

    A file is named with as much of its path as tells it apart: cuda/plan.cuh, or plan.cuh.
    """
    name, _, rest = text.partition(": ")
    named = {file: lines for file, lines in _lines().items() if f"/{file}".endswith(f"/{name}")}
    if named:
        text = rest
    found = [
        (file.rsplit("/", 1)[-1], number)
        for file, lines in (named or _lines()).items()
        for number, line in enumerate(lines, 1)
        if text in line
    ]
    if len(found) != 1:
        raise NoLine(f"{len(found)} lines of csrc carry '{text}'{f' in {name}' if named else ''}, expected one: {found}")
    return found[0]
