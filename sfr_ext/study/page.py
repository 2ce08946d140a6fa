"""A report's Markdown as one HTML file that needs no other."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping

from markdown_it import MarkdownIt

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 68rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.7rem; } h2 { font-size: 1.35rem; margin-top: 2.5rem; border-bottom: 1px solid #ddd; }
h3 { font-size: 1.1rem; margin-top: 1.6rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.9rem; font-variant-numeric: tabular-nums; margin: 0.7rem 0; }
th, td { padding: 0.25rem 0.7rem; border-bottom: 1px solid #e4e4e4; white-space: nowrap; text-align: left; }
th { white-space: normal; max-width: 9rem; border-bottom: 2px solid #bbb; vertical-align: bottom; }
tbody tr:hover { background: #f4f7fa; }
img { max-width: 100%; height: auto; }
code { background: #f2f2f2; padding: 0.1em 0.3em; border-radius: 3px; }
"""


def html_page(title: str, markdown: str, figures: Mapping[str, str]) -> str:
    """The page; ``figures``: SVG by the path under which the Markdown names it."""
    renderer = MarkdownIt("commonmark", {"html": False}).enable("table")
    body = renderer.render(markdown)
    for path, svg in figures.items():
        inside = "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()
        body = body.replace(f'src="{path}"', f'src="{inside}"')
    body = body.replace("<table>", '<div class="wide"><table>').replace("</table>", "</table></div>")
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n{body}</body>\n</html>\n"
    )
