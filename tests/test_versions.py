"""Results belong to the inputs as they were: later changes in place are noticed; copies carry the plan."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import features, weights
from torch import Tensor
from torch.func import grad, vmap

from sfr_ext import OTResult, solve, solve_sample

SOLVERS = ["sinkhorn", "exact"]
ASKS: dict[str, Callable[[OTResult, Tensor], Tensor]] = {
    "plan": lambda result, y: result.plan,
    "rounded_plan": lambda result, y: result.rounded_plan(),
    "barycentric": lambda result, y: result.barycentric(y),
}


def problem(of: str, solver: str, grad: bool = False) -> tuple[dict[str, Tensor], Callable[[], OTResult]]:
    a, b = weights(2, 6), weights(2, 5)
    if of == "solve":
        inputs = {"cost": torch.rand(2, 6, 5), "a": a, "b": b}
    else:
        inputs = {"x": features(2, 6, 3), "y": features(2, 5, 3), "a": a, "b": b}
    inputs = {name: t.requires_grad_(grad) for name, t in inputs.items()}
    function = solve if of == "solve" else solve_sample
    return inputs, lambda: function(*inputs.values(), solver=solver)


@pytest.mark.parametrize("ask", ASKS)
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(
    ("of", "changed"), [("solve", name) for name in ("cost", "a", "b")] + [("solve_sample", name) for name in "xyab"]
)
def test_a_plan_of_changed_inputs_is_refused(of: str, changed: str, solver: str, grad: bool, ask: str) -> None:
    inputs, make = problem(of, solver, grad)
    result, y = make(), torch.rand(2, 5, 3)
    with torch.no_grad():
        inputs[changed].mul_(2)
    message = rf"sfr_ext.OTResult.{ask}: expected {changed} as it was when .* at version 1; expected version 0"
    with pytest.raises(RuntimeError, match=message):
        ASKS[ask](result, y)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_plan_that_was_asked_for_before_stays(solver: str) -> None:
    """Also what is made of it: the weights as they were belong to it."""
    inputs, make = problem("solve_sample", solver)
    result, y = make(), torch.rand(2, 5, 3)
    expected = {name: ask(result, y) for name, ask in ASKS.items()}
    for value in inputs.values():
        value.zero_()
    for name, ask in ASKS.items():
        assert torch.equal(ask(result, y), expected[name])


def test_after_an_optimizers_step() -> None:
    x, y = features(2, 6, 3, grad=True), features(2, 5, 3)
    optimizer = torch.optim.SGD([x], lr=0.1)
    result = solve_sample(x, y)
    result.transport_cost.sum().backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match="expected x as it was"):
        _ = result.plan
    assert solve_sample(x, y).plan.sum().item() == pytest.approx(2, rel=1e-4)


def test_changes_through_views_and_of_other_types_are_seen() -> None:
    """The cost is broadcast, the weights are converted: both stand for what was given."""
    cost, mask = torch.rand(6, 5), torch.ones(2, 6, dtype=torch.bool)
    result = solve(cost, mask)
    cost[0, 0] = 3.0
    with pytest.raises(RuntimeError, match="expected cost"):
        _ = result.plan
    maps, weight = features(2, 3, 2, 3), torch.ones(2, 3)
    result = solve_sample(maps, maps.flip(0), weight)
    weight.view(-1)[2] = 0
    with pytest.raises(RuntimeError, match="expected a as it was"):
        _ = result.plan


def test_a_plan_without_a_graph_is_not_made_again_where_nothing_needs_one() -> None:
    inputs, make = problem("solve", "sinkhorn")
    result = make()
    with torch.no_grad():
        plan = result.plan
    inputs["cost"].zero_()
    assert result.plan is plan

    inputs, make = problem("solve", "sinkhorn", grad=True)
    result = make()
    with torch.no_grad():
        _ = result.plan
        inputs["cost"].zero_()
    with pytest.raises(RuntimeError, match="expected cost"):  # this one needs its graph
        _ = result.plan


@pytest.mark.parametrize("backend", ["aot_eager", "eager"])
def test_compiled(backend: str) -> None:
    """Within a graph, and where a result leaves it: the plan is that of the inputs as they were."""

    def changed_within(cost: Tensor) -> Tensor:
        cost = cost * 1
        result = solve(cost)
        cost.zero_()
        return result.plan

    cost = torch.rand(2, 4, 5)
    expected = solve(cost).plan
    compiled = torch.compile(changed_within, backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(cost), expected)

    leaf = cost.clone().requires_grad_()
    result = torch.compile(solve, backend=backend)(leaf)
    with torch.no_grad():
        leaf.zero_()
    torch.testing.assert_close(result.plan, expected)


def test_a_copy_that_a_graph_does_not_need_is_not_made() -> None:
    graphs = []

    def look(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        from torch._functorch.aot_autograd import aot_module_simplified

        def keep(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
            graphs.append(graph)
            return graph

        return aot_module_simplified(graph, inputs, fw_compiler=keep)

    torch.compile(lambda cost: solve(cost).transport_cost, backend=look)(torch.rand(2, 4, 5))
    assert len(graphs) == 1 and "clone" not in graphs[0].code and "sinkhorn_forward" in graphs[0].code


def test_under_transforms() -> None:
    """Wrapped tensors: those of vmap count nothing themselves."""
    cost = torch.rand(3, 4, 5)

    def changed(cost: Tensor) -> Tensor:
        cost = cost * 1
        result = solve(cost)
        cost.add_(1)
        return result.plan.sum()

    for transformed in (vmap(changed), lambda cost: vmap(vmap(changed))(cost[None]), grad(changed)):
        with pytest.raises(RuntimeError, match="expected cost as it was"):
            transformed(cost)
    assert vmap(lambda cost: solve(cost).plan)(cost).shape == (3, 4, 5)


@pytest.mark.parametrize("solver", ["sinkhorn", "exact"])
def test_what_is_made_under_inference_mode_is_as_it_would_have_been(solver: str) -> None:
    x = torch.rand(2, 5, 3, requires_grad=True)
    result = solve_sample(x, torch.rand(2, 4, 3), solver=solver)
    with torch.inference_mode():
        later = [result.f, result.g, result.eps, result.dual_gap, result.marginal_error, result.converged]
    assert not any(t.is_inference() or t.requires_grad for t in later)
    (result.f * x[..., 0]).sum().backward()
    assert torch.equal(x.grad[..., 0], result.f)


def test_inference_tensors_count_nothing_and_are_copied() -> None:
    with torch.inference_mode():
        cost, a = torch.rand(4, 5), torch.rand(4)
        expected = solve(cost, a).plan
        result = solve(cost, a)
        cost.zero_()
        a.zero_()
        assert torch.equal(result.plan, expected)


def _saved(result: OTResult) -> OTResult:
    file = io.BytesIO()
    torch.save(result, file)
    file.seek(0)
    return torch.load(file)


COPIES: dict[str, Callable[[OTResult], OTResult]] = {
    "pickle": lambda result: pickle.loads(pickle.dumps(result)),
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "save": _saved,
    "twice": lambda result: copy.deepcopy(pickle.loads(pickle.dumps(result))),
}
FIELDS = ("transport_cost", "entropic_cost", "f", "g", "eps", "n_iter", "marginal_error", "converged", "plan")


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("of", ["solve", "solve_sample"])
def test_copies(of: str, solver: str, grad: bool, how: str) -> None:
    inputs, make = problem(of, solver, grad)
    result = make()
    other = COPIES[how](result)
    assert isinstance(other, OTResult) and repr(other) == repr(result)
    y = torch.rand(2, 5, 3)
    with torch.no_grad():
        expected = {name: ask(result, y) for name, ask in ASKS.items()}
        for value in inputs.values():
            value.zero_()
    for name in FIELDS:
        ours, theirs = getattr(other, name), getattr(result, name) if name != "plan" else expected["plan"]
        assert torch.equal(ours, theirs) and not ours.requires_grad
    for name, ask in ASKS.items():
        assert torch.equal(ask(other, y), expected[name])


def test_copies_of_maps_and_of_unbalanced_problems() -> None:
    x, y = features(2, 3, 2, 3), features(2, 2, 3, 2, 2)
    result = solve_sample(x, y, torch.ones(6, dtype=torch.bool), reach=(0.5, None))
    other = copy.deepcopy(result)
    assert other.barycentric(y).shape == (2, 2, 3, 2, 3)
    assert torch.equal(other.barycentric(y), result.barycentric(y))
    with pytest.raises(ValueError, match="expected a balanced problem"):
        other.rounded_plan()


def test_a_copy_of_changed_inputs_is_refused_as_its_plan_is() -> None:
    inputs, make = problem("solve", "sinkhorn")
    result = make()
    inputs["b"].mul_(2)
    with pytest.raises(RuntimeError, match="expected b as it was"):
        copy.deepcopy(result)
