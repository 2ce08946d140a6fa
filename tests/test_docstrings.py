"""The examples of the public names run as they stand: a reader copies them into an empty session."""

from __future__ import annotations

import doctest
import importlib.util
import inspect
import re
from collections.abc import Iterator
from typing import Any

import pytest

import sfr_ext

pytestmark = pytest.mark.usefixtures("one_thread")
FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
FINDER = doctest.DocTestFinder()


def public() -> Iterator[tuple[str, Any]]:
    for name in sfr_ext.__all__:
        value = getattr(sfr_ext, name)
        if inspect.ismodule(value):
            names = getattr(value, "__all__", [each for each in vars(value) if not each.startswith("_")])
            owned = ((each, getattr(value, each)) for each in names)
            ours = (pair for pair in owned if getattr(pair[1], "__module__", "").startswith(f"sfr_ext.{name}"))
            yield from ((f"{name}.{each}", x) for each, x in ours)
        elif callable(value):
            yield name, value


EXAMPLES = [
    test for name, value in public() for test in FINDER.find(value, name, module=False, globs={}) if test.examples
]


@pytest.mark.parametrize("test", EXAMPLES, ids=lambda test: test.name)
def test_example(test: doctest.DocTest) -> None:
    needed = [("plot.", "matplotlib"), ("reference.", "scipy")]
    for beginning, package in needed:
        if test.name.startswith(beginning) and importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    said: list[str] = []
    result = doctest.DocTestRunner(optionflags=FLAGS, verbose=False).run(test, out=said.append)
    assert result.attempted > 0 and result.failed == 0, "".join(said)


def test_the_functions_that_are_met_first_have_one() -> None:
    found = {test.name for test in EXAMPLES}
    first = (
        "EMDL2Loss DynamicLabelSmoothing FeatureDistiller SelfFeatureRegularizer cost_matrix emd_l2 solve solve_sample"
    )
    assert {*first.split(), "linear_assignment", "self_feature_loss", "self_term", "group_channels"} <= found


def test_the_package_says_what_is_in_it() -> None:
    """`help(sfr_ext)` begins with it."""
    assert sfr_ext.__doc__ is not None
    for name in sfr_ext.__all__:
        assert name == "__version__" or re.search(rf"\b{name}\b", sfr_ext.__doc__), name
