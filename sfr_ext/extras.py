"""What to say where an optional package is missing: a command that works, also where sfr_ext is not on PyPI."""

from __future__ import annotations

# Where the distribution has another name than the module.
_DISTRIBUTIONS = {
    "PIL": "pillow",
    "markdown_it": "markdown-it-py",
    "sklearn": "scikit-learn",
    "yaml": "pyyaml",
}


def how_to_install(extra: str, *modules: str) -> str:
    """The command for these modules alone, and the one for all of an extra.

    >>> how_to_install("plot", "matplotlib", "PIL")
    "pip install matplotlib pillow (or all of the extra, in a clone of sfr_ext: pip install '.[plot]')"
    """
    names = " ".join(_DISTRIBUTIONS.get(module, module) for module in modules)
    return f"pip install {names} (or all of the extra, in a clone of sfr_ext: pip install '.[{extra}]')"
