"""`make docs`: the site, in build/docs/html. Every example is run, a warning is an error, and every link is followed.

    python tools/build_docs.py

Pages are those of docs/, copied to build/docs/source together with the pages elsewhere that they link to (the README,
the results of benchmarks), whose links are bent accordingly.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

ROOT = Path(__file__).resolve().parents[1]
DOCS, BUILD = ROOT / "docs", ROOT / "build" / "docs"
SOURCE, HTML = BUILD / "source", BUILD / "html"
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")


def place(path: Path) -> Path:
    """Where a file of the repository is in the source of the site."""
    if path.is_relative_to(DOCS):
        return SOURCE / path.relative_to(DOCS)
    return SOURCE / "repo" / path.relative_to(ROOT)


def copy(page: Path, done: set[Path]) -> None:
    """A page, and what it links to; links to folders become their text."""
    if page in done:
        return
    done.add(page)
    target = place(page)
    target.parent.mkdir(parents=True, exist_ok=True)
    if page.suffix != ".md":
        shutil.copy(page, target)
        return

    def bend(match: re.Match[str]) -> str:
        image, text, link = match.groups()
        text = LINK.sub(bend, text)
        address, _, anchor = link.partition("#")
        if not address or "://" in address:
            return f"{image}[{text}]({link})"
        linked = (page.parent / address).resolve()
        if linked.is_dir():
            return text
        if linked == DOCS / "index.md":  # whose place the start page has
            return f"{image}[{text}]({os.path.relpath(SOURCE / 'index.rst', target.parent)})"
        copy(linked, done)
        path = os.path.relpath(place(linked), target.parent)
        return f"{image}[{text}]({path}{'#' + anchor if anchor else ''})"

    # Not in blocks of code, which may look as if they held links.
    text = page.read_text()
    if not text.startswith("# "):  # a page of results, which a menu needs a title for
        text = f"# {page.stem.capitalize()}\n\n{text}"
    parts = re.split(r"(^```.*?^```\n?)", text, flags=re.M | re.S)
    target.write_text("".join(part if part.startswith("```") else LINK.sub(bend, part) for part in parts))


class Page(HTMLParser):
    """The links of a page and its anchors."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if value and name == "id":
                self.anchors.add(value)
            elif value and name in ("href", "src"):
                self.links.append(value)


def broken_links() -> list[str]:
    """Links of the site to pages, files and anchors of its own that are not there."""
    pages = {path: Page(path.read_text()) for path in HTML.rglob("*.html")}
    broken = []
    for path, page in pages.items():
        for link in page.links:
            if re.match(r"[a-z]+:|//", link):
                continue
            address, _, anchor = link.partition("#")
            linked = (path.parent / unquote(address.partition("?")[0])).resolve() if address else path
            known = pages.get(linked)
            lost = not linked.exists() or (anchor and known is not None and unquote(anchor) not in known.anchors)
            # Pages of sources have no anchors that count; figures of a report carry their own.
            if lost and not (linked.exists() and "_modules" in linked.parts):
                broken.append(f"{path.relative_to(HTML)}: {link}")
    return broken


def main() -> int:
    shutil.rmtree(SOURCE, ignore_errors=True)
    done: set[Path] = set()
    for path in sorted(DOCS.rglob("*")):
        if path.is_file() and path.suffix in (".md", ".png", ".jpg", ".svg") and path != DOCS / "index.md":
            copy(path, done)
    for path in (DOCS / "site").iterdir():
        if path.is_file():
            shutil.copy(path, SOURCE / path.name)
    for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "examples/tour.ipynb"):
        copy(ROOT / name, done)
    environment = {
        **os.environ,
        "SFR_EXT_ROOT": str(ROOT),
        "OMP_NUM_THREADS": "1",  # what readers are promised: seconds on one core
        "OMP_WAIT_POLICY": "passive",
    }
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", str(SOURCE), str(HTML)]
    if code := subprocess.run(command, env=environment).returncode:
        return code
    if broken := broken_links():
        print("links that lead nowhere:", *broken, sep="\n  ", file=sys.stderr)
        return 1
    count = len(list(HTML.rglob("*.html")))
    print(f"{count} pages, no warning, no broken link: {HTML / 'index.html'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
