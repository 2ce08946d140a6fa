"""`linear_assignment` beside SciPy, and where SciPy refuses beside a linear program's least cost."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

import sfr_ext
from sfr_ext import linear_assignment

SHAPES = [(1, 1), (1, 5), (5, 1), (6, 6), (20, 40), (40, 20), (65, 64), (7, 130)]


def total(cost: Tensor, columns: Tensor) -> float:
    rows = columns >= 0
    taken = columns[rows].tolist()
    assert len(set(taken)) == len(taken)
    return float(cost[rows, columns[rows]].double().sum())


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64, torch.int64, torch.int8, torch.bool])
@pytest.mark.parametrize("shape", SHAPES)
def test_sums_are_scipys(shape: tuple[int, int], dtype: torch.dtype, maximize: bool) -> None:
    cost = (100 * torch.rand(3, 2, *shape) - 50).to(dtype)
    columns = linear_assignment(cost, maximize=maximize)
    assert columns.shape == (3, 2, shape[0]) and columns.dtype == torch.int64
    for one, mine in zip(cost.flatten(0, 1), columns.flatten(0, 1), strict=True):
        rows, best = linear_sum_assignment(one.double().numpy(), maximize)
        assert int((mine >= 0).sum()) == min(shape)
        assert total(one, mine) == pytest.approx(one.double().numpy()[rows, best].sum(), rel=1e-13, abs=1e-9)


# SciPy's own cases: cost, least sum.
SCIPY = [
    ([[400, 150, 400], [400, 450, 600], [300, 225, 300]], [150, 400, 300]),
    ([[400, 150, 400, 1], [400, 450, 600, 2], [300, 225, 300, 3]], [150, 2, 300]),
    ([[10, 10, 8], [9, 8, 1], [9, 7, 4]], [10, 1, 7]),
    ([[10, 10, 8, 11], [9, 8, 1, 1], [9, 7, 4, 10]], [10, 1, 4]),
    ([[10, math.inf, math.inf], [math.inf, math.inf, 1], [math.inf, 7, math.inf]], [10, 1, 7]),
]


@pytest.mark.parametrize(("cost", "expected"), SCIPY)
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("turned", [False, True])
def test_cases_of_scipy(cost: list[list[float]], expected: list[float], maximize: bool, turned: bool) -> None:
    matrix = torch.tensor(cost, dtype=torch.float64) * (-1 if maximize else 1)
    matrix = matrix.mT if turned else matrix
    columns = linear_assignment(matrix, maximize=maximize)
    assert int((columns >= 0).sum()) == 3
    assert abs(total(matrix, columns)) == sum(expected)


def test_nothing_to_match() -> None:
    assert linear_assignment(torch.zeros(2, 3, 0)).tolist() == [[-1] * 3] * 2
    assert linear_assignment(torch.zeros(2, 0, 3)).shape == (2, 0)
    assert linear_assignment(torch.zeros(0, 4, 3)).shape == (0, 4)


@pytest.mark.parametrize("maximize", [False, True])
def test_bad_numbers_match_nothing_and_stay_alone(maximize: bool) -> None:
    cost = torch.rand(4, 5, 6)
    expected = linear_assignment(cost, maximize=maximize)
    cost[1, 2, 3] = math.nan
    cost[2, 0, 0] = math.inf if maximize else -math.inf
    columns = linear_assignment(cost, maximize=maximize)
    assert (columns[1:3] == -1).all() and torch.equal(columns[::3], expected[::3])


def most_and_least(cost: np.ndarray) -> tuple[int, float]:
    """By a penalty that no sum of the others reaches."""
    penalty = 1e6
    rows, columns = linear_sum_assignment(np.where(np.isfinite(cost), cost, penalty))
    allowed = np.isfinite(cost[rows, columns])
    return int(allowed.sum()), float(cost[rows, columns][allowed].sum())


@pytest.mark.parametrize("shape", [(1, 1), (3, 3), (6, 6), (5, 9), (9, 5), (30, 30), (30, 45)])
@pytest.mark.parametrize("by_gate", [False, True])
def test_as_many_as_possible_then_the_least(shape: tuple[int, int], by_gate: bool) -> None:
    torch.manual_seed(0)
    for allowed in (0.02, 0.1, 0.2, 0.4, 0.7):
        cost = torch.rand(20, *shape, dtype=torch.float64)
        open_pairs = torch.rand(20, *shape) < allowed
        gated = torch.where(open_pairs, cost, 2 + cost)
        forbidden = torch.where(open_pairs, cost, math.inf)
        columns = linear_assignment(gated, max_cost=1.5) if by_gate else linear_assignment(forbidden)
        mirrored = linear_assignment(-forbidden, maximize=True)
        for one, mine, mirror in zip(forbidden, columns, mirrored, strict=True):
            count, least = most_and_least(one.numpy())
            for found in (mine, mirror):
                assert int((found >= 0).sum()) == count
                assert total(one, found) == pytest.approx(least, abs=1e-9)


def test_rows_that_compete_take_the_cheapest_columns() -> None:
    """Three rows for two columns, of any scale; the gate itself is allowed."""
    inf = math.inf
    cost = torch.tensor([[1e-30, 5e-30, inf, inf], [2e-30, 1e-30, inf, inf], [3e-30, 1e-29, inf, inf], [inf, 7, 8, 9]])
    assert linear_assignment(cost).tolist() == [0, 1, -1, 2]
    assert linear_assignment(cost, max_cost=8).tolist() == [0, 1, -1, 2]
    assert linear_assignment(cost, max_cost=7.5).tolist() == [0, 1, -1, -1]
    assert linear_assignment(cost, max_cost=10**400).tolist() == linear_assignment(cost).tolist()
    assert linear_assignment(cost, max_cost=-(10**400)).tolist() == [-1, -1, -1, -1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("limit", [0.1, 0.2, 0.3, 0.6, 0.7, 1 / 3, 6e-8, 65_519.0])
def test_gate_is_of_the_type_of_the_costs(dtype: torch.dtype, limit: float) -> None:
    """A cost of 0.1 is not above 0.1."""
    at = torch.tensor([[limit]], dtype=dtype)
    above = at.nextafter(torch.full_like(at, math.inf))
    for cost, column in ((at, 0), (above, -1)):
        assert linear_assignment(cost, max_cost=limit).tolist() == [column]
        assert linear_assignment(-cost, max_cost=-limit, maximize=True).tolist() == [column]


@pytest.mark.parametrize("shape", [(70, 70), (200, 200), (150, 151), (90, 260), (260, 90)])
@pytest.mark.parametrize("zeros", [0.3, 1.0, 3.0, 10.0])
def test_equal_costs(shape: tuple[int, int], zeros: float) -> None:
    """Tight pairs by the dozen for each row, or next to none; forbidden pairs among them."""
    torch.manual_seed(0)
    allowed = torch.rand(3, *shape) < zeros / max(shape)
    for cost in ((~allowed).double(), torch.where(allowed, torch.randint(0, 3, (3, *shape)), 3).double()):
        for one, mine in zip(cost, linear_assignment(cost), strict=True):
            assert int((mine >= 0).sum()) == min(shape)
            assert total(one, mine) == one.numpy()[linear_sum_assignment(one.numpy())].sum()
    forbidden = torch.where(allowed, 0.0, math.inf)
    for one, mine in zip(forbidden, linear_assignment(forbidden), strict=True):
        assert (int((mine >= 0).sum()), total(one, mine)) == most_and_least(one.numpy())


def test_large_integers_are_exact() -> None:
    cost = torch.tensor([[2**52, 2**52 + 1], [2**52 + 1, 2**52 + 3]])
    assert linear_assignment(cost).tolist() == [1, 0]
    assert linear_assignment(cost, maximize=True).tolist() == [0, 1]


def test_any_strides_and_no_graph() -> None:
    cost = torch.rand(5, 4, 3, 7, requires_grad=True)
    same = cost.detach().permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    assert torch.equal(linear_assignment(cost), linear_assignment(same))
    assert not linear_assignment(cost).requires_grad


def test_operator() -> None:
    for cost in (torch.rand(2, 3, 4, 5), torch.rand(2, 1, 6, 6).double()):
        torch.library.opcheck(torch.ops.sfr_ext.assignment_forward.default, (cost, False, math.inf))


def test_bad_arguments() -> None:
    for error, message, arguments in (
        (TypeError, "expected cost to be a Tensor, got list", {"cost": [[1.0]]}),
        (TypeError, "expected cost to be float16", {"cost": torch.zeros(2, 2, dtype=torch.complex64)}),
        (ValueError, r"expected cost of shape \[..., N, M\], got \[3\]", {"cost": torch.zeros(3)}),
        (TypeError, "expected maximize to be a bool, got int", {"cost": torch.zeros(2, 2), "maximize": 1}),
        (TypeError, "expected max_cost to be a number, got str", {"cost": torch.zeros(2, 2), "max_cost": "1"}),
        (ValueError, "expected max_cost to be a number, got nan", {"cost": torch.zeros(2, 2), "max_cost": math.nan}),
    ):
        with pytest.raises(error, match=f"sfr_ext.linear_assignment: {message}"):
            linear_assignment(**arguments)


def test_in_the_list_of_names() -> None:
    assert "linear_assignment" in sfr_ext.__all__


@pytest.mark.filterwarnings("error")
@pytest.mark.skipif(not hasattr(torch.library, "register_vmap"), reason="torch 2.5 has rules for vmap")
def test_vmap() -> None:
    cost = torch.rand(3, 2, 4, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.vmap(linear_assignment)(cost), linear_assignment(cost))
    assert torch.equal(torch.vmap(torch.vmap(linear_assignment))(cost), linear_assignment(cost))
    assert torch.equal(torch.vmap(linear_assignment, in_dims=2)(cost), linear_assignment(cost.movedim(2, 0)))
    assert torch.vmap(linear_assignment)(cost[:0]).shape == (0, 2, 4)
