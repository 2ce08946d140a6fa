"""What `make docs` does besides calling Sphinx: pages are copied with their links bent, and links are followed."""

from __future__ import annotations

from pathlib import Path

import build_docs
import pytest


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(build_docs, "ROOT", tmp_path)
    monkeypatch.setattr(build_docs, "DOCS", tmp_path / "docs")
    monkeypatch.setattr(build_docs, "SOURCE", tmp_path / "source")
    monkeypatch.setattr(build_docs, "HTML", tmp_path / "html")
    (tmp_path / "docs" / "figures").mkdir(parents=True)
    (tmp_path / "examples").mkdir()
    (tmp_path / "html").mkdir()
    return tmp_path


def test_links_are_bent(repository: Path) -> None:
    (repository / "docs" / "index.md").write_text("# All\n")
    (repository / "docs" / "figures" / "a.png").write_bytes(b"a")
    (repository / "README.md").write_text(
        "# Readme\n![a](docs/figures/a.png) [page](docs/page.md#part) [all](docs/index.md)\n"
    )
    page = repository / "docs" / "page.md"
    page.write_text(
        "# Page\n[readme](../README.md) [examples](../examples) [far](https://example.org/x) [here](#part)\n"
        "```python\nx[i](j)\n```\n"
    )
    build_docs.copy(page, set())
    assert (repository / "source" / "page.md").read_text() == (
        "# Page\n[readme](repo/README.md) examples [far](https://example.org/x) [here](#part)\n"
        "```python\nx[i](j)\n```\n"
    )
    assert (repository / "source" / "repo" / "README.md").read_text() == (
        "# Readme\n![a](../figures/a.png) [page](../page.md#part) [all](../index.rst)\n"
    )
    assert (repository / "source" / "figures" / "a.png").read_bytes() == b"a"


def test_broken_links_are_found(repository: Path) -> None:
    (repository / "html" / "a.html").write_text(
        '<p id="top"><a href="b.html#there">x</a><a href="https://x.org">y</a></p>'
    )
    (repository / "html" / "b.html").write_text('<h1 id="there">b</h1><a href="a.html">a</a>')
    assert build_docs.broken_links() == []
    (repository / "html" / "b.html").write_text(
        '<h1 id="else">b</h1><a href="lost.html">a</a><img src="lost.png"><a href="a.html#top">t</a>'
    )
    assert sorted(build_docs.broken_links()) == ["a.html: b.html#there", "b.html: lost.html", "b.html: lost.png"]
