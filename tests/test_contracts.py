"""The lists that cross the seam: those of C++, those of Python, and what happens when they differ."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import METRICS

import sfr_ext
from sfr_ext import _C, formulas, ops
from sfr_ext.ops import contracts
from sfr_ext.ops.divergence import Divergence, DivergenceSaved
from sfr_ext.ops.emd import EmdSolved
from sfr_ext.ops.solved import Saved, again, room, saved

Members = list[tuple[str, str, Any]]


def test_every_list_has_its_counterpart() -> None:
    ours = {name for name, value in vars(contracts).items() if hasattr(value, "_fields") and name != "NamedTuple"}
    assert ours == set(_C.fields)
    assert list(ops.METRICS) == list(formulas.METRICS) == METRICS
    assert {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2, torch.float64: 3} == ops.DTYPES


def without(members: Members) -> Members:
    return members[:-1]


def swapped(members: Members) -> Members:
    return [members[1], members[0], *members[2:]]


def renamed(members: Members) -> Members:
    return [("epsilon", *members[0][1:]), *members[1:]]


def of_another_kind(members: Members) -> Members:
    return [(members[0][0], "int", members[0][2]), *members[1:]]


def with_another_default(members: Members) -> Members:
    return [(name, kind, 1e-3 if name == "tol" else value) for name, kind, value in members]


def with_one_more(members: Members) -> Members:
    return [*members, ("momentum", "float", 0.0)]


@pytest.mark.parametrize(
    "change",
    [without, swapped, renamed, of_another_kind, with_another_default, with_one_more],
    ids=lambda f: f.__name__,
)
def test_a_list_that_differs_is_refused(change: Callable[[Members], Members]) -> None:
    fields = dict(_C.fields)
    contracts.check(fields)
    fields["SolverOptions"] = tuple(change(list(fields["SolverOptions"])))
    with pytest.raises(ImportError, match=r"not of the same version; build it again. SolverOptions, as .*'reach_a'"):
        contracts.check(fields)


def test_a_list_that_python_does_not_have_is_refused() -> None:
    with pytest.raises(ImportError, match="Momentum, as .* and \\[\\] in sfr_ext/ops/contracts.py"):
        contracts.check({**_C.fields, "Momentum": (("value", "float", 0.0),)})


def test_the_module_refuses_what_is_no_such_tuple() -> None:
    x = torch.zeros(1, 1, 1, 1)
    view = contracts.FeatureView(x, ops.DTYPES[x.dtype], 1, 1, *x.stride()[:1], 0, *x.stride()[1:])
    problem = contracts.CostParams(1, 1, 1, 1, 0, ops.DTYPES[x.dtype], view, view, 1)
    assert _C.cost_forward(contracts.CostForwardParams(problem, torch.empty(1, 1, 1))) == 0
    wrong: list[tuple[Any, str]] = [
        ((problem,), "CostForwardParams: expected cost, got the end"),
        ((problem, x, x), "CostForwardParams: expected a tuple of 2, got 3"),
        ((list(problem), x), "expected a tuple for CostParams"),
        ((problem._replace(x=view[:-1]), x), "FeatureView: expected stride_w, got the end"),
    ]
    for params, message in wrong:
        with pytest.raises(TypeError, match=message):
            _C.cost_forward(params)
    with pytest.raises(AttributeError, match="data_ptr"):
        _C.cost_forward((problem, 17))
    with pytest.raises(TypeError):
        _C.cost_forward((problem._replace(B="1"), x))  # type: ignore[arg-type]


def test_the_stub_says_what_is_there() -> None:
    stub = Path(sfr_ext.__file__).with_name("_C.pyi").read_text()
    on_cpu, on_gpu = stub.split("class cuda")
    named = set(re.findall(r"^(?:def )?(\w+)[(:]", on_cpu, re.MULTILINE))
    assert named == {name for name in dir(_C) if not name.startswith("__")} - {"cuda"}
    operations = {name for name in named if name.endswith(("_forward", "_backward"))}
    listed = (Path(__file__).parents[1] / "csrc" / "contracts" / "operations.h").read_text()
    alone = set(re.findall(r"OPERATION\((\w+)", listed.split("SFR_CPU_OPERATIONS")[1]))
    assert alone < operations
    assert set(re.findall(r"def (\w+)", on_gpu)) == operations - alone | {"why_unusable", "why_unusable_on"}
    for name, params in re.findall(r"def (\w+)\(params: contracts\.(\w+)", stub):
        assert params == "".join(part.capitalize() for part in name.split("_")) + "Params" and params in _C.fields


def test_what_backward_reads_is_what_forward_returned() -> None:
    for some, every in (
        (Saved, contracts.Solved),
        (contracts.ExactSaved, contracts.ExactSolved),
        (DivergenceSaved, Divergence),
        (contracts.Solved, EmdSolved),
    ):
        assert set(some._fields) < set(every._fields)


@pytest.mark.parametrize("outputs", [contracts.Solved, contracts.ExactSolved], ids=lambda of: of.__name__)
def test_outputs_are_allocated_as_their_lists_say(outputs: Any) -> None:
    shapes = {
        "Value": (2, 5),
        "Count": (2, 5),
        "OfRows": (2, 5, 3),
        "OfColumns": (2, 5, 4),
        "Entries": (2, 5, 6),
        "EntryIndices": (2, 5, 6),
    }
    assert set(shapes) == set(contracts.OUTPUTS)
    made = room(outputs, torch.zeros(1), (2, 5), 3, 4, torch.float64)
    for name, kind in contracts.written(outputs).items():
        dtype = {"Count": torch.int64, "EntryIndices": torch.int32}.get(kind, torch.float64)
        assert getattr(made, name).shape == shapes[kind] and getattr(made, name).dtype == dtype
    assert len({tensor.data_ptr() for tensor in made}) == len(made)


def test_backward_is_given_what_was_saved_by_name() -> None:
    solved = room(contracts.Solved, torch.zeros(1), (2,), 3, 4, torch.float32)
    given = again(saved(solved))
    for name in contracts.Solved._fields:
        assert getattr(given, name) is (getattr(solved, name) if name in Saved._fields else None)


def test_schemas_are_made_of_the_lists() -> None:
    """Names and order; a member that two groups have is told apart."""
    schema = torch.ops.sfr_ext.emd_forward.default._schema
    names = [argument.name for argument in schema.arguments]
    assert names[-len(contracts.SolverOptions._fields) - 1 : -1] == list(contracts.SolverOptions._fields)
    assert [value.name for value in schema.returns] == [*contracts.Solved._fields, "cost"]
    backward = [argument.name for argument in torch.ops.sfr_ext.emd_backward.default._schema.arguments]
    assert backward.count("eps") == 1 and "options_eps" in backward and len(set(backward)) == len(backward)
