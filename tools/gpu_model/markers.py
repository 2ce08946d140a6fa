"""Lines of the sources by what stands on them, so that code may move.

"hot: pair" is the line that ends with the comment `// hot: pair`; "newton.h: store(q + j" the one of that file with
this text on it."""

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
    """The one line that is meant.

    A file is named with as much of its path as tells it apart: cuda/plan.cuh, or plan.cuh.
    """
    name, _, rest = text.partition(": ")
    found = [
        (file.rsplit("/", 1)[-1], number)
        for file, lines in _lines().items()
        for number, line in enumerate(lines, 1)
        if (line.endswith(f"// {text}") if name == "hot" else f"/{file}".endswith(f"/{name}") and rest in line)
    ]
    if len(found) != 1:
        raise NoLine(f"{len(found)} lines of csrc fit '{text}', expected one: {found}")
    return found[0]
