"""What the solver does next, from the last evaluation alone: csrc/solver/strategy.h on the host, without any kernel."""

from __future__ import annotations

import ctypes
import math
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import native_build
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
ACTIONS = "finish evaluate restart anneal retreat update iterate newton undo".split()
FROM = "columns halfway potentials scalings".split()
STOPS = "reached at_edge ended".split()
METHODS = "automatic relaxed plain".split()


class Step(NamedTuple):
    action: str
    error: float = 0.0
    gate: float = 0.0
    limit: int = 0
    plain: bool = False
    precision: float = 0.0
    longest: float = 0.0
    patience: int = 0


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    path = tmp_path_factory.mktemp("strategy") / "drive.so"
    source = ROOT / "tests" / "strategy" / "drive.cpp"
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", f"-I{ROOT / 'csrc'}"]
    subprocess.run([*native_build.find_toolchain().cxx, *flags, str(source), "-o", str(path)], check=True)
    calls = ctypes.CDLL(str(path))
    calls.strategy_new.restype = ctypes.c_void_p
    whole = ctypes.c_int
    number = ctypes.c_double
    numbers = number, number, number
    calls.strategy_new.argtypes = [number, ctypes.c_int64, whole, whole, *numbers, whole, whole, ctypes.c_int64]
    calls.strategy_annealed_eps.restype = calls.strategy_observe.restype = ctypes.c_double
    calls.strategy_held_eps.restype = ctypes.c_double
    calls.strategy_observe.argtypes = [ctypes.c_void_p, ctypes.c_double]
    calls.strategy_n_iter.restype = ctypes.POINTER(ctypes.c_int64)
    calls.strategy_iterated.argtypes = [ctypes.c_void_p, whole, number]
    calls.strategy_next.argtypes = [ctypes.c_void_p, number, number, whole, whole, number, ctypes.c_void_p]
    return calls


class Strategy:
    """One problem's; ``error`` of a plan that is ``exact`` unless it comes from scalings."""

    def __init__(
        self,
        library: ctypes.CDLL,
        tol: float,
        max_iter: int,
        method: str,
        symmetric: bool,
        spread: float,
        most: float,
        moved: float,
        warm: bool,
        fixed: bool,
        price: int,
    ) -> None:
        self.library = library
        ways = METHODS.index(method), int(symmetric)
        options = tol, max_iter, *ways, spread, most, moved, int(warm), int(fixed), price
        self.handle = ctypes.c_void_p(library.strategy_new(*options))

    def next(
        self,
        error: float,
        *,
        relative: float | None = None,
        underflow: bool = False,
        exact: bool = True,
        rounding: float = 0.0,
    ) -> Step:
        """``relative``: that of equal weights."""
        numbers = (ctypes.c_double * 7)()
        of_patches = error if relative is None else relative
        flags = int(underflow), int(exact)
        action = self.library.strategy_next(self.handle, error, of_patches, *flags, rounding, numbers)
        wanted, gate, limit, plain, precision, longest, patience = numbers
        return Step(ACTIONS[action], wanted, gate, int(limit), bool(plain), precision, longest, int(patience))

    @property
    def start(self) -> str:
        return FROM[self.library.strategy_start(self.handle)]

    @property
    def after(self) -> str:
        return FROM[self.library.strategy_after(self.handle)]

    def iterated(self, stop: str, n: int = 0, rounding: float = 0.0) -> str:
        self.n_iter += n
        return FROM[self.library.strategy_iterated(self.handle, STOPS.index(stop), rounding)]

    def stepped(self, cut: bool = False, n: int = 0, factorised: bool = False) -> str:
        self.n_iter += n
        return FROM[self.library.strategy_stepped(self.handle, int(cut), int(factorised))]

    @property
    def annealed_eps(self) -> float:
        return self.library.strategy_annealed_eps(self.handle)

    @property
    def held_eps(self) -> float:
        return self.library.strategy_held_eps(self.handle)

    @property
    def n_iter(self) -> int:
        return self.library.strategy_n_iter(self.handle)[0]

    @n_iter.setter
    def n_iter(self, value: int) -> None:
        self.library.strategy_n_iter(self.handle)[0] = value

    def observe(self, error: float) -> float:
        return self.library.strategy_observe(self.handle, error)


@pytest.fixture
def strategy(library: ctypes.CDLL) -> Iterator[object]:
    made = []

    def make(
        tol: float = 1e-6,
        max_iter: int = 1000,
        method: str = "automatic",
        symmetric: bool = False,
        spread: float = 0.0,
        most: float | None = None,
        moved: float = 1.0,
        warm: bool = False,
        fixed: bool = False,
        price: int = 0,
    ) -> Strategy:
        most = spread if most is None else most
        made.append(Strategy(library, tol, max_iter, method, symmetric, spread, most, moved, warm, fixed, price))
        return made[-1]

    yield make
    for one in made:
        library.strategy_free(one.handle)


@pytest.mark.parametrize(
    ("spread", "annealed_eps"), [(0.0, 1.0), (22.2, 1.0), (22.3, 2.0), (44.4, 2.0), (44.5, 4.0), (1e6, 2.0**16)]
)
def test_annealing_starts_at_22_deviations(strategy, spread: float, annealed_eps: float) -> None:
    assert strategy(spread=spread).annealed_eps == annealed_eps
    assert (
        strategy(spread=spread, method="relaxed").annealed_eps
        == strategy(spread=spread, symmetric=True).annealed_eps
        == 1.0
    )
    assert strategy(spread=spread, max_iter=0).annealed_eps == 1.0


def test_annealing(strategy) -> None:
    s = strategy(spread=48.0)
    assert s.start == "columns" and s.annealed_eps == 4
    first = Step("iterate", error=0.003, gate=1e-2, limit=1000)
    assert s.next(0.5) == first
    assert s.iterated("at_edge", 10) == "potentials" and s.annealed_eps == 4  # the same eps goes on
    assert s.next(0.4) == first
    assert s.iterated("ended", 10) == "scalings" and s.annealed_eps == 4  # below the gate
    assert s.next(0.009, exact=False).action == "newton"
    assert s.stepped(n=5) == "scalings"
    assert s.next(0.002, exact=False).action == "anneal" and s.after == "columns" and s.annealed_eps == 2
    assert s.next(0.4) == first._replace(limit=1000)
    assert s.iterated("reached", 10) == "columns" and s.annealed_eps == 1
    assert s.next(0.4) == Step("iterate", error=1e-6, gate=1e-2, limit=1000)


def test_annealing_takes_the_log_domain_where_it_underflows(strategy) -> None:
    s = strategy(spread=48.0)
    assert (
        s.next(0.5, underflow=True).action == "update"
        and s.after == "columns"
        and s.annealed_eps == 4
        and s.n_iter == 1
    )


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("why", ["rounding", "iterations"])
def test_the_last_eps(strategy, why: str, fixed: bool) -> None:
    """Where potentials of a smaller one would be rounded too far, or iterations are used up; unless it is fixed."""
    s = strategy(spread=48.0, fixed=fixed)
    s.n_iter = 1000 if why == "iterations" else 0
    rounding = 0.011 if why == "rounding" else 0.0
    assert s.next(0.002, rounding=rounding).action == (
        "anneal" if fixed else "newton" if why == "rounding" else "finish"
    )
    assert s.annealed_eps == (2 if fixed else 4)
    if why == "rounding" and not fixed:
        other = strategy(spread=48.0)
        other.next(0.5)
        assert other.iterated("reached", 8, rounding=rounding) == "potentials" and other.annealed_eps == 4


@pytest.mark.parametrize("why", ["error", "nan", "underflow", "rounding"])
def test_a_bad_start_is_forgotten(strategy, why: str) -> None:
    s = strategy(spread=48.0, warm=True)
    assert s.annealed_eps == 1
    error = {"error": 0.5, "nan": math.nan}.get(why, 0.1)
    assert s.next(error, underflow=why == "underflow", rounding=0.021 * (why == "rounding")).action == "restart"
    assert s.after == "columns" and s.annealed_eps == 4
    good = strategy(spread=48.0, warm=True)
    assert good.next(0.4) == Step("iterate", error=1e-6, gate=1e-2, limit=1000) and good.annealed_eps == 1


def updated(s: Strategy, error: float, **seen: object) -> Step:
    """What follows where an update leaves an error of a start as it was."""
    before = s.n_iter
    assert s.next(error, **seen).action == "update" and s.after == "columns" and s.n_iter == before + 1  # type: ignore[arg-type]
    return s.next(error, **seen)  # type: ignore[arg-type]


def test_at_a_small_eps_a_start_is_taken_where_its_error_is_small(strategy) -> None:
    s = strategy(spread=1000.0, warm=True)
    for eps in (2, 4):
        assert updated(s, 0.2).action == "anneal" and s.after == "columns" and s.annealed_eps == eps
    assert s.next(0.1) == Step("iterate", error=0.003, gate=1e-2, limit=2 + 100)
    assert s.iterated("reached", 20) == "columns" and s.annealed_eps == 2
    assert s.next(0.4) == Step("iterate", error=0.003, gate=1e-2, limit=22 + 978)  # as ever, from here on
    assert s.iterated("reached", 20) == "columns" and s.annealed_eps == 1
    assert s.next(0.4) == Step("iterate", error=1e-6, gate=1e-2, limit=1000)


def test_a_start_that_an_update_mends_is_taken_at_eps_itself(strategy) -> None:
    s = strategy(spread=1000.0, warm=True)
    assert s.next(0.6, underflow=True).action == "update"
    assert s.next(0.09) == Step("iterate", error=1e-6, gate=1e-2, limit=1 + 100) and s.annealed_eps == 1
    near = strategy(spread=1000.0, warm=True)
    assert near.next(1e-7).action == "finish" and near.n_iter == 0


@pytest.mark.parametrize("why", ["error", "underflow", "rounding"])
def test_at_a_small_eps_a_start_is_forgotten_that_an_update_leaves_bad(strategy, why: str) -> None:
    seen = {"underflow": why == "underflow", "rounding": 0.021 * (why == "rounding")}
    s = strategy(spread=1000.0, warm=True)
    assert updated(s, 0.5 if why == "error" else 0.09, **seen).action == "restart"
    assert s.after == "columns" and s.annealed_eps == 64
    assert s.next(0.4) == Step("iterate", error=0.003, gate=1e-2, limit=1000)
    nan = strategy(spread=1000.0, warm=True)
    assert nan.next(math.nan).action == "restart" and nan.n_iter == 0 and nan.annealed_eps == 64
    last = strategy(spread=1000.0, warm=True)
    last.n_iter = 1000
    assert last.next(0.5).action == "restart" and last.n_iter == 1000


def test_a_start_goes_no_further_than_to_where_annealing_would_begin(strategy) -> None:
    s = strategy(spread=1000.0, warm=True)
    for _ in range(6):
        assert updated(s, 0.4).action == "anneal"
    assert s.annealed_eps == 64
    assert updated(s, 0.4) == Step("iterate", error=0.003, gate=1e-2, limit=7 + 100)
    other = strategy(spread=1000.0, warm=True)
    updated(other, 0.4)
    assert updated(other, 0.6).action == "restart" and other.annealed_eps == 64


def test_a_start_that_does_not_lead_on_goes_back_to_a_larger_eps(strategy) -> None:
    s = strategy(spread=1000.0, warm=True)
    assert s.next(0.05).limit == 100
    assert s.iterated("ended", 90) == "scalings"
    step = s.next(5e-3, exact=False)
    assert step.action == "newton" and step.limit == 100
    s.stepped(n=10)
    assert s.next(4e-3, exact=False).action == "anneal" and s.after == "columns" and s.annealed_eps == 2
    assert s.next(0.05) == Step("iterate", error=0.003, gate=1e-2, limit=200)
    assert s.iterated("ended", 100) == "scalings" and s.annealed_eps == 2  # not on to the next
    assert s.next(0.01, exact=False).action == "anneal" and s.annealed_eps == 4
    assert s.next(0.05).limit == 300
    assert s.iterated("ended", 100) == "scalings"
    assert s.next(0.006, exact=False).action == "anneal" and s.annealed_eps == 2  # nearly there


def test_a_start_keeps_its_iterations_where_it_is_nearly_there(strategy) -> None:
    s = strategy(spread=1000.0, warm=True)
    s.next(0.05)
    s.iterated("ended", 100)
    assert s.next(2e-6).limit == 1000 and s.annealed_eps == 1
    s = strategy(spread=1000.0, warm=True)
    s.next(0.05)
    s.iterated("ended", 100)
    assert s.next(4e-3, rounding=1e-3).limit == 1000 and s.annealed_eps == 1  # rounding is what keeps it
    s = strategy(spread=1000.0, warm=True, max_iter=100)
    s.next(0.05)
    s.iterated("ended", 100)
    assert s.next(0.05).action == "finish"  # all iterations are used up, and it is what there is


def test_where_eps_is_not_small_a_start_is_taken_as_it_is(strategy) -> None:
    s = strategy(spread=128.0, warm=True)
    assert s.next(0.49) == Step("iterate", error=1e-6, gate=1e-2, limit=1000) and s.annealed_eps == 1
    assert s.iterated("ended", 500) == "scalings"
    assert s.next(0.49, exact=False).limit == 1000


@pytest.mark.parametrize("error", [0.5, 1e-2 + 1e-9])
def test_iterations_far_from_the_solution(strategy, error: float) -> None:
    s = strategy()
    assert s.next(error) == Step("iterate", error=1e-6, gate=1e-2, limit=1000)
    assert strategy(method="relaxed").next(error) == Step("iterate", error=1e-6, limit=1000)
    assert strategy(method="plain").next(1e-5) == Step("iterate", error=1e-6, limit=1000)


@pytest.mark.parametrize(
    ("stop", "follows"), [("reached", "potentials"), ("at_edge", "potentials"), ("ended", "scalings")]
)
def test_plan_after_iterations(strategy, stop: str, follows: str) -> None:
    s = strategy()
    s.next(0.5)
    assert s.iterated(stop, 12) == follows


def test_iterations_that_do_not_lead_on_are_given_up_where_systems_can_be_factorised(strategy) -> None:
    s = strategy(price=20)
    first = s.next(0.5)
    assert first == Step("iterate", error=1e-6, gate=1e-2, limit=128 + 2 * 21)
    assert s.iterated("ended", first.limit) == "scalings"
    step = s.next(0.4, exact=False)
    assert step.action == "newton" and step.patience == 0 and step.longest == 4
    other = strategy(price=0)
    assert other.next(0.5).limit == 1000


def test_each_eps_has_its_share_of_iterations(strategy) -> None:
    s = strategy(spread=1e6, price=20)  # 17 of them
    assert s.annealed_eps == 2.0**16 and s.next(0.5).limit == 1000 // 17
    assert strategy(spread=1e6, price=40).next(0.5).limit == 2 * 41  # at least as much as two steps


def test_conjugate_gradients_may_take_eight_times_as_long_as_factorising(strategy) -> None:
    s = strategy(price=20)
    s.next(0.5)
    s.iterated("ended", 40)
    assert s.next(5e-3, exact=False).patience == 8 * 20
    assert s.stepped(n=180, factorised=True) == "columns"
    assert s.next(1e-3).patience == 0  # from then on every step is factorised


def test_a_step_that_failed_is_followed_by_one_that_is_factorised(strategy) -> None:
    s = strategy(price=20)
    s.next(0.5)
    s.iterated("ended", 40)
    assert s.next(5e-3).patience == 160
    s.stepped(n=10)
    s.next(6e-3)  # a few iterations, which do not mend it
    s.iterated("ended", 8)
    assert s.next(6e-3).action == "undo"
    step = s.next(5e-3)
    assert step.action == "newton" and step.patience == 0
    rounded = strategy(price=20)
    rounded.next(0.5)
    rounded.iterated("ended", 40)
    rounded.next(5e-3)
    rounded.stepped(n=10)
    rounded.next(6e-3, rounding=1e-3)
    rounded.iterated("ended", 8)
    assert rounded.next(6e-3, rounding=1e-3).action == "undo"
    assert rounded.next(5e-3, rounding=1e-3).patience == 160  # rounding is what it failed of


def test_a_step_that_throws_mass_about_is_followed_by_one_that_is_factorised(strategy) -> None:
    for error, patience in ((1e40, 0), (0.5, 160)):
        s = strategy(price=20)
        s.next(0.5)
        s.iterated("ended", 40)
        assert s.next(5e-3).patience == 160
        s.stepped(cut=True, n=10)
        assert s.next(error).action == "iterate"
        s.iterated("ended", 8)
        assert s.next(4e-3).patience == patience


def hard(strategy, **options: Any) -> Strategy:
    """One whose next step is factorised, from an error of 0.4."""
    s = strategy(price=20, **options)
    s.iterated("ended", s.next(0.5).limit)
    assert s.next(0.4).patience == 0
    return s


def test_a_factorised_step_that_was_cut_leads_on_in_longer_ones_while_nothing_gets_worse(strategy) -> None:
    s = hard(strategy)
    for longest in (8, 16, 32, 64, 64):
        assert s.stepped(cut=True, n=21, factorised=True) == "columns"
        step = s.next(0.41)
        assert step.action == "newton" and step.longest == longest
    s.stepped(cut=True, n=21, factorised=True)
    assert s.next(0.6).action == "undo" and s.after == "potentials"
    assert s.next(0.41).longest == 4
    s.stepped(cut=True, n=21, factorised=True)
    assert s.next(0.6).longest == 4  # no shorter


def test_factorised_steps_that_lead_in_circles_get_shorter(strategy) -> None:
    s = hard(strategy)
    for _ in range(4):  # the error rises and falls; what leads there is kept
        s.stepped(cut=True, n=21, factorised=True)
        step = s.next(0.6)
        assert step.action == "newton" and step.longest == 4
        s.stepped(cut=True, n=21, factorised=True)
        assert s.next(0.4).longest == 8
        s.stepped(cut=True, n=21, factorised=True)
        assert s.next(0.6).action == "undo" and s.next(0.4).longest == 4
    s.stepped(cut=True, n=21, factorised=True)
    assert s.next(0.6).action == "undo"
    assert s.next(0.4).longest == 1


def test_a_factorised_step_that_failed_is_followed_by_shorter_ones(strategy) -> None:
    s = hard(strategy)
    for longest in (1, 0.25):
        s.stepped(n=21, factorised=True)
        assert s.next(0.5).action == "undo"
        step = s.next(0.4)
        assert step.action == "newton" and step.longest == longest
    s.stepped(n=21, factorised=True)
    assert s.next(0.5).action == "undo"
    assert s.next(0.4).action == "iterate"
    far = hard(strategy, spread=1e5)
    far.stepped(n=21, factorised=True)
    assert far.next(0.5).action == "undo"
    assert far.next(0.4).action == "iterate"


def test_the_last_factorised_step_is_judged_as_any_other(strategy) -> None:
    s = hard(strategy)
    s.n_iter = 985  # there is no room for another
    s.stepped(cut=True, n=10, factorised=True)
    assert s.next(0.6).action == "undo"


def test_no_smaller_eps_without_room_for_ten_factorised_steps(strategy) -> None:
    for n_iter, action in ((700, "anneal"), (800, "newton")):
        s = hard(strategy, spread=48.0)
        s.n_iter = n_iter - 21
        s.stepped(n=21, factorised=True)
        assert s.annealed_eps == 4 and s.next(0.002).action == action
        assert s.annealed_eps == (2 if action == "anneal" else 4)


def test_small_patches_are_brought_along_to_a_smaller_eps(strategy) -> None:
    """Updates in the log domain, four at most, where their error is large in units of their own weight."""
    s = strategy(spread=48.0)
    assert s.next(0.5, relative=3.0).action == "iterate"
    assert s.iterated("reached", 8) == "potentials" and s.annealed_eps == 4  # they are looked at first
    for k in range(4):
        assert s.next(0.002, relative=0.5).action == "update" and s.n_iter == 9 + k
    assert s.next(0.002, relative=0.5).action == "anneal" and s.annealed_eps == 2
    other = strategy(spread=48.0)
    other.next(0.5, relative=3.0)
    other.iterated("reached", 8)
    assert other.next(0.002, relative=0.02).action == "anneal"


def test_large_costs_that_were_left_out_are_taken_for_what_they_are_where_the_error_does_not_fall(strategy) -> None:
    s = strategy(spread=20.0, most=1e6)
    assert s.annealed_eps == 1 and s.next(0.5).limit == 64
    assert s.iterated("ended", 64) == "scalings"
    assert s.next(0.4, exact=False).limit == 128
    assert s.iterated("ended", 64) == "scalings"
    assert s.next(0.385, exact=False).action == "restart" and s.after == "columns" and s.annealed_eps == 2.0**16
    falling = strategy(spread=20.0, most=1e6)
    falling.iterated("ended", falling.next(0.5).limit)
    falling.next(0.4, exact=False)
    falling.iterated("ended", 64)
    assert falling.next(0.375, exact=False).limit == 192 and falling.annealed_eps == 1
    endless = strategy(spread=20.0, most=math.inf)
    assert endless.next(0.5).limit == 1000
    accepted = strategy(spread=48.0, most=1e6)
    accepted.next(0.5)
    assert accepted.iterated("reached", 20) == "columns" and accepted.annealed_eps == 2
    assert accepted.next(0.4).limit == 1000  # nothing is doubted any more


def at_the_last_eps(strategy, **options: Any) -> Strategy:
    """Annealing began at 4 eps, and both of the larger ones were solved for."""
    s = strategy(spread=48.0, max_iter=50, **options)
    for eps in (4, 2):
        assert s.annealed_eps == eps
        s.next(0.5)
        assert s.iterated("reached", 10) == "columns"
    assert s.annealed_eps == 1
    return s


def test_what_is_not_solved_goes_back_to_the_last_eps_that_was(strategy) -> None:
    s = at_the_last_eps(strategy)
    assert s.held_eps == 2
    s.next(0.5)
    s.iterated("ended", 30)
    assert s.next(0.1, exact=False).action == "retreat" and s.annealed_eps == 2 and s.after == "columns"
    assert s.next(0.002, exact=False).action == "evaluate" and s.next(0.002).action == "finish"


@pytest.mark.parametrize(
    ("error", "options", "rounding"),
    [(0.002, {}, 0.0), (0.1, {"fixed": True}, 0.0), (0.08, {}, 0.01), (0.1, {"tol": 0.02}, 0.0)],
)
def test_what_is_as_good_or_of_a_given_eps_stays(strategy, error: float, options: Any, rounding: float) -> None:
    s = at_the_last_eps(strategy, **options)
    s.next(0.5)
    s.iterated("ended", 30)
    assert s.next(error, exact=False, rounding=rounding).action == "evaluate"
    assert s.next(error, rounding=rounding).action == "finish" and s.annealed_eps == 1


@pytest.mark.parametrize(("error", "goes_back"), [(0.1, False), (0.3, True), (math.nan, True)])
def test_an_error_that_costs_more_than_a_larger_eps_goes_back_further(strategy, error: float, goes_back: bool) -> None:
    """Costs are 48 eps apart: mass that is off costs as much; the eps that was solved for is 4 times as large."""
    s = strategy(spread=48.0, max_iter=1500)
    s.next(0.5)
    assert s.iterated("reached", 10) == "columns" and s.held_eps == 4
    s.next(0.5)
    assert s.iterated("ended", 1000) == "columns" and s.annealed_eps == 1 and s.held_eps == 4
    s.next(0.5)
    s.iterated("ended", 490)
    step = s.next(error, exact=False, rounding=0.05)
    assert step.action == ("retreat" if goes_back else "evaluate") and s.annealed_eps == (4 if goes_back else 1)
    assert s.next(0.3 if goes_back else error, rounding=0.05).action == "finish"  # once


def test_nothing_is_held_where_an_eps_was_left_unsolved(strategy) -> None:
    s = strategy(spread=48.0, max_iter=5000)
    s.next(0.5)
    assert s.iterated("ended", 1000) == "columns" and s.annealed_eps == 2 and s.held_eps == 0


@pytest.mark.parametrize(("moved", "error"), [(1.0, 0.003), (0.25, 0.003), (0.05, 6e-4), (1e-9, 1e-6)])
def test_where_little_mass_may_move_errors_at_a_larger_eps_are_smaller(strategy, moved: float, error: float) -> None:
    step = strategy(spread=48.0, moved=moved).next(0.5)
    assert step.action == "iterate" and step.error == pytest.approx(error)


def test_finish_needs_the_potentials(strategy) -> None:
    s = strategy()
    assert s.next(1e-7, exact=False).action == "evaluate" and s.after == "potentials"
    assert s.next(1e-7).action == "finish"
    for error in (0.0, 1e-6, math.nan):
        assert strategy().next(error).action == "finish"


def test_finish_when_iterations_are_used_up(strategy) -> None:
    s = strategy(max_iter=20)
    s.next(0.5)
    assert s.iterated("ended", 20) == "scalings"
    assert s.next(0.3, exact=False).action == "evaluate"
    assert s.next(0.3).action == "finish"


def test_finish_where_rounding_is_met(strategy) -> None:
    """Scalings within tol twice, and potentials that are not, and no longer get better."""
    s = strategy()
    s.next(0.5)
    s.iterated("reached", 40)
    assert s.next(3e-6, rounding=1e-6).action == "newton"
    s.stepped(n=5)
    assert s.next(5e-7, exact=False, rounding=1e-6).action == "evaluate"
    assert s.next(2.9e-6, rounding=1e-6).action == "finish"
    better = strategy()
    better.next(0.5)
    better.iterated("reached", 40)
    better.next(3e-6, rounding=1e-6)
    better.stepped(n=5)
    better.next(5e-7, exact=False, rounding=1e-6)
    assert better.next(2e-6, rounding=1e-6).action == "newton"  # still getting better


def test_underflow_takes_the_log_domain(strategy) -> None:
    s = strategy()
    assert s.next(0.5, underflow=True).action == "update" and s.after == "columns" and s.n_iter == 1
    symmetric = strategy(symmetric=True)
    assert symmetric.next(0.5, underflow=True).action == "update" and symmetric.after == "halfway"


def test_newton_steps(strategy) -> None:
    s = strategy()
    s.n_iter = 30
    assert s.next(1e-2) == Step("newton", limit=1000, precision=1e-2, longest=4)
    assert s.stepped(n=7) == "scalings"
    assert s.next(4e-3, exact=False) == Step("newton", limit=1000, precision=1e-2, longest=4)  # halved: the next one
    s.stepped(n=7)
    # Not halved: a few plain iterations, to half of what it was.
    assert s.next(3e-3, exact=False) == Step("iterate", error=2e-3, limit=44 + 8, plain=True)
    assert s.iterated("ended", 8) == "scalings"
    assert s.next(2.7e-3, exact=False) == Step("newton", limit=1000, precision=1e-2, longest=4)  # below 0.7 of it


def failed(s: Strategy, error: float, cut: bool = False) -> None:
    """A step that leaves the error as it was, before and after the corrections, and is undone."""
    s.stepped(cut, n=1)
    assert s.next(2 * error, exact=False).action == "iterate"
    s.iterated("ended", 8)
    assert s.next(2 * error, exact=False).action == "undo"
    assert s.after == "potentials"


def test_failed_steps_get_more_precise_then_rest(strategy) -> None:
    s = strategy()
    # Until it is at most 1e-10: 1e-2, 1e-4, ..., in floating point once more where a power of ten is missed.
    precisions = []
    while (step := s.next(5e-3)).action == "newton":
        precisions.append(step.precision)
        failed(s, 5e-3)
    assert precisions[:5] == pytest.approx([1e-2, 1e-4, 1e-6, 1e-8, 1e-10]) and len(precisions) in (5, 6)
    assert step == Step("iterate", error=1e-6, limit=s.n_iter + 16)
    s.iterated("ended", 16)
    assert s.next(5e-3, exact=False).action == "newton"
    failed(s, 5e-3)
    assert s.next(5e-3).limit == s.n_iter + 32


def test_cut_steps(strategy) -> None:
    s = strategy()
    assert s.next(5e-3).longest == 4
    assert s.stepped(cut=True, n=1) == "potentials"  # what has underflowed may matter
    assert s.next(5.9e-3).action == "iterate"
    s.iterated("ended", 8)
    step = s.next(5.9e-3, exact=False)
    assert step.action == "newton" and step.longest == 8  # within 1.2: the error may wait, and the next goes further
    failed(s, 5.9e-3, cut=True)
    step = s.next(5.9e-3)
    assert step.action == "newton" and step.longest == 4  # not as far
    failed(s, 5.9e-3, cut=True)
    assert s.next(5.9e-3) == Step("iterate", error=1e-6, limit=s.n_iter + 16)  # no more precise one


def test_the_error_does_not_grow_step_by_step(strategy) -> None:
    s = strategy()
    error = 2e-3
    assert s.next(error).action == "newton"
    for _ in range(8):
        s.stepped(cut=True, n=1)
        assert s.next(1.15 * error).action == "iterate"
        s.iterated("ended", 8)
        step = s.next(1.15 * error, exact=False)
        if step.action == "undo":
            break
        error *= 1.15
    assert step.action == "undo" and error < 2e-3 * 1.15 * 1.5


def test_scaled_plans_are_looked_at_from_their_potentials_now_and_then(strategy) -> None:
    s = strategy(tol=1e-300)
    error, seen = 9e-3, []
    for _ in range(20):
        assert s.next(error).action == "newton"
        seen.append(s.stepped())
        error /= 2
    assert seen[:9] == ["scalings"] * 8 + ["potentials"] and seen[9:18] == seen[:9]


def test_symmetric(strategy) -> None:
    s = strategy(symmetric=True)
    assert s.start == "halfway"
    assert s.next(0.5) == Step("iterate", error=1e-6, limit=1000, plain=True)
    assert s.iterated("ended", 4) == "potentials"
    assert s.next(9e-4).action == "iterate"
    s.iterated("ended", 4)
    assert s.next(8.9e-4).action == "finish"  # stalls
    s = strategy(symmetric=True)
    s.next(9e-4)
    s.iterated("at_edge", 4)
    assert s.next(9e-4, underflow=True).action == "update"  # after which the last error means nothing
    assert s.next(8.9e-4).action == "iterate"


def test_relaxation_finds_the_factor(strategy) -> None:
    """An error that falls by lambda a step under plain iterations has the best factor 2 / (1 + sqrt(1 - lambda))."""
    s = strategy()
    assert s.observe(0.2) == 1
    assert s.observe(0.2 * 0.9**8) == pytest.approx(2 / (1 + math.sqrt(0.1)))
    before = s.observe(0.2 * 0.9**8 * 0.5)
    assert s.observe(0.2) == 1  # grew
    assert before > 1
    assert strategy(method="plain").observe(0.2) == 1
    slow = strategy()
    slow.observe(0.29)
    assert slow.observe(0.29 * 0.999999**8) == pytest.approx(1.95)  # its ceiling


def solve(strategy: Strategy, cost: np.ndarray, eps: float, max_rounds: int = 500) -> tuple[float, set[str], int]:
    """A solver in plain numpy that does what the strategy says: the error at the end, the actions, the iterations."""
    n, m = cost.shape
    f, g = np.zeros(n), np.zeros(m)
    u, v = np.ones(n), np.ones(m)
    plan = np.empty_like(cost)
    taken: set[str] = set()
    kept = f, g
    where, annealed_eps = strategy.start, 1.0
    for _ in range(max_rounds):
        if strategy.annealed_eps != annealed_eps:
            g *= annealed_eps / strategy.annealed_eps
            annealed_eps = strategy.annealed_eps
        scale = eps * annealed_eps
        if where == "columns":
            top = (g[None] - cost / scale).max(1)
            f = -top - np.log(np.exp(g[None] - cost / scale - top[:, None]).sum(1) / m)
        if where == "scalings":
            plan *= u[:, None] * v[None]
            f, g = f + np.log(u), g + np.log(v)
        else:
            plan = np.exp(f[:, None] + g[None] - cost / scale) / (n * m)
        u, v = np.ones(n), np.ones(m)
        rows, columns = plan.sum(1), plan.sum(0)
        error = abs(rows - 1 / n).sum() + abs(columns - 1 / m).sum()
        underflow = bool((rows < 1e-6 / n).any() or (columns < 1e-6 / m).any())
        step = strategy.next(error, underflow=underflow, exact=where != "scalings", rounding=1e-14)
        taken.add(step.action)
        where = strategy.after
        if step.action == "finish":
            return error, taken, strategy.n_iter
        if step.action == "update":
            top = (f[:, None] - cost / scale).max(0)
            g = -top - np.log(np.exp(f[:, None] - cost / scale - top[None]).sum(0) / n)
        elif step.action == "iterate":
            count = 0
            while True:
                count += 1
                strategy.n_iter += 1
                s = plan @ v
                left = abs(u * s - 1 / n).sum()
                u = 1 / (n * s)
                v = 1 / (m * (plan.T @ u))
                at_edge = max(abs(np.log(u)).max(), abs(np.log(v)).max()) > 160
                if left <= step.error or at_edge or strategy.n_iter >= step.limit or left < step.gate:
                    break
            where = strategy.iterated("at_edge" if at_edge else "reached" if left <= step.error else "ended")
            if where != "scalings":
                f, g, u, v = f + np.log(u), g + np.log(v), np.ones(n), np.ones(m)
        elif step.action == "newton":
            kept = f.copy(), g.copy()
            system = np.block([[np.diag(rows), plan], [plan.T, np.diag(columns)]])
            move = np.linalg.lstsq(system, np.concatenate([1 / n - rows, 1 / m - columns]), rcond=None)[0]
            cut = bool(abs(move).max() > step.longest)
            move = np.exp(move.clip(-step.longest, step.longest))
            u, v = move[:n], move[n:]
            where = strategy.stepped(cut, n=1)
            if where != "scalings":
                f, g, u, v = f + np.log(u), g + np.log(v), np.ones(n), np.ones(m)
        elif step.action == "undo":
            f, g = kept[0].copy(), kept[1].copy()
    raise AssertionError(f"not finished after {max_rounds} rounds")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("eps", [1.0, 0.1, 0.02])
def test_problems_are_solved_by_what_it_says(strategy, method: str, eps: float) -> None:
    """The same rules over passes that are nothing but numpy."""
    found: set[str] = set()
    for seed in range(4):
        generator = np.random.default_rng(seed)
        x, y = generator.normal(size=(12, 2)), generator.normal(size=(15, 2))
        cost = np.linalg.norm(x[:, None] - y[None], axis=-1)
        limit = 20000
        one = strategy(tol=1e-9, max_iter=limit, method=method, spread=cost.std() / eps)
        error, taken, n_iter = solve(one, cost - cost.mean(), eps)
        assert error <= 1e-9 or (method != "automatic" and n_iter >= limit), (seed, error, taken, n_iter)
        found |= taken
    assert "finish" in found and "iterate" in found
    assert ("newton" in found) == (method == "automatic")
    assert ("anneal" in found or eps == 1.0) or method != "automatic" or one.annealed_eps == 1
