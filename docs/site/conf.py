"""Sphinx's settings; tools/build_docs.py calls it with the pages of docs/ copied beside this file."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
ROOT = Path(os.environ["SFR_EXT_ROOT"])
sys.path.insert(0, str(ROOT))

import sfr_ext  # noqa: E402

project = "sfr_ext"
author = "The sfr_ext authors"
copyright = "The sfr_ext authors, MIT licence"
version = release = sfr_ext.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_gallery.gen_gallery",
]
exclude_patterns = ["gallery/README.rst"]
myst_heading_anchors = 4
highlight_language = "none"  # of blocks that do not say theirs
default_role = "py:obj"  # as the docstrings have it: `emd_l2`
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # they are in the signatures
python_use_unqualified_type_names = True
napoleon_use_rtype = False
suppress_warnings = ["config.cache"]  # of the scraper below, which is a function
copybutton_exclude = ".linenos, .gp, .go"

html_theme = "furo"
html_title = f"sfr_ext {release}"

# Formulas without internet: MathJax comes with the site. (The package is its files alone and needs no Django.)
_mathjax = importlib.util.find_spec("mathjax")
assert _mathjax is not None and _mathjax.origin is not None, "pip install django-static-mathjax"
_MATHJAX, _STATIC = Path(_mathjax.origin).parent / "static" / "mathjax" / "es5", Path(__file__).parent / "static"
for name in ("tex-mml-chtml.js", "output/chtml/fonts/woff-v2"):
    target = _STATIC / "mathjax" / name
    target.parent.mkdir(parents=True, exist_ok=True)
    if (_MATHJAX / name).is_dir():
        shutil.copytree(_MATHJAX / name, target, dirs_exist_ok=True)
    else:
        shutil.copy(_MATHJAX / name, target)
html_static_path = ["static"]
# Code in a table breaks into lines, so that no column lies outside of a phone.
(_STATIC / "tables.css").write_text("table.docutils code { white-space: normal; overflow-wrap: anywhere; }\n")
html_css_files = ["tables.css"]
mathjax_path = "mathjax/tex-mml-chtml.js"
html_theme_options = {"navigation_with_keys": True}


def figures(block: Any, block_vars: Any, gallery_conf: Any) -> str:
    """A scraper for figures made without pyplot, as sfr_ext.plot makes them."""
    from sphinx_gallery.scrapers import figure_rst

    paths = []
    for value in list(block_vars["example_globals"].values()):
        made_by_pyplot = hasattr(value, "number")
        if isinstance(value, matplotlib.figure.Figure) and not made_by_pyplot and not hasattr(value, "is_in_the_page"):
            value.is_in_the_page = True
            path = next(block_vars["image_path_iterator"])
            value.savefig(path, dpi=90)
            paths.append(path)
    return figure_rst(paths, gallery_conf["src_dir"]) if paths else ""


sphinx_gallery_conf = {
    "examples_dirs": str(ROOT / "examples" / "gallery"),
    "gallery_dirs": "gallery",
    "image_scrapers": ("matplotlib", figures),
    "abort_on_example_error": True,
    "capture_repr": (),
    "min_reported_time": 0,
    "remove_config_comments": True,
    "show_memory": False,
    "within_subsection_order": "ExampleTitleSortKey",
}
warnings.filterwarnings("ignore", message=".*FigureCanvasAgg is non-interactive.*")
