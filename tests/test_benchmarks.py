"""The benchmarks themselves: what is measured, and what is said of a library that is missing or wrong."""

from __future__ import annotations

import dataclasses
import functools
import json
import math

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks.data import workloads
from benchmarks.harness import check, compare, floors, limits, plots, report, timing, truth
from benchmarks.harness.device import Device
from benchmarks.harness.results import Results, Table
from benchmarks.harness.row import Row, set_bases
from benchmarks.harness.run import Run
from benchmarks.peers import OURS, PEERS
from benchmarks.studies import excess
from benchmarks.tables import growth
from benchmarks.tables.comparison import compare_peers, verdict

RANDOM = torch.rand(2, 5, 3, 2, 3, generator=torch.Generator().manual_seed(0))
SMALL = workloads.Problem(RANDOM[0], RANDOM[1], eps=0.1, tol=1e-3)
CPU = Device("cpu")

pytestmark = pytest.mark.usefixtures("one_thread")


def peer(name):
    return next(peer for peer in PEERS if peer.name == name)


def no_run():
    raise AssertionError("not to be run")


def entry(peer, problem=SMALL, true=None):
    row = check.check(peer, problem, true or truth.Truth(problem))
    return row, no_run if row.problem else check.run_of(peer, row, problem)


def test_marginal_error_by_hand():
    plan = torch.tensor([[[0.5, 0.0], [0.0, 0.5]], [[0.5, 0.25], [0.0, 0.25]]])
    # The second: rows 0.75 and 0.25 instead of 0.5 each; columns are right.
    assert truth.marginal_error(plan) == pytest.approx(0.5)


@pytest.mark.parametrize(
    "name",
    [peer.name for peer in PEERS if peer.device != "cuda" and "compile" not in peer.name],
)
def test_peers_agree_with_the_reference(name):
    one = peer(name)
    if one.version() is None:
        pytest.skip(f"{one.distribution} is not installed")
    row, run = entry(one)
    assert row.problem is None, row.problem
    assert row.value_error < 1e-3
    # The plan held fixed is a part of the gradient; everybody else has all of it.
    assert row.gradient_error < (1.0 if row.objective == "transport" and not row.ours else 1e-2)
    assert row.reached == (row.marginal_error <= 1.01e-3) and (row.reached or "GeomLoss" in name)
    run()


def test_reference_of_groups_and_unequal_sides():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(2, 3, 2, 3, generator=generator), torch.rand(2, 4, 3, 2, 2, generator=generator)
    problem = workloads.Problem(x, y, eps=0.1, tol=1e-4)
    assert problem.sizes() == (8, 6, 4, 3)
    true = truth.Truth(problem)
    for name in ("sfr_ext, transport", "sfr_ext, exact", "plain torch, log domain, eager"):
        row, _ = entry(peer(name), problem, true)
        assert row.problem is None and row.value_error < 1e-3
        assert not row.ours or row.gradient_error < 1e-2
    row, _ = entry(peer("SciPy linear_sum_assignment, one by one"), problem, true)
    assert row.problem == "assignments only, needs N = M"


NAMES = ("sfr_ext, transport", "plain torch, log domain, eager")


def test_rows_take_turns_and_slow_ones_fewer():
    rows = [entry(peer(name)) for name in NAMES]
    rows[1][0].warm = 1e3  # milliseconds, of 5 seconds
    set_bases([row for row, _ in rows])
    calibration = timing.time_rows(rows, CPU, 10, seconds=5, calibration=limits.Calibration(CPU))
    ours, plain = (row for row, _ in rows)
    assert ours.rounds == list(range(10)) and plain.rounds == [0, 2, 4, 6, 8]
    assert ours.ratios == [1.0] * 10 and plain.base == ours.name
    assert plain.ratios == [plain.milliseconds[i] / ours.milliseconds[2 * i] for i in range(5)]
    assert len(calibration) == 10 and set(calibration[0]) == {
        loop for loops in compare.CLOCKS.values() for loop in loops
    }


def test_each_row_comes_first_at_times():
    order = []
    rows = [(row, functools.partial(order.append, row.name)) for row, _ in (entry(peer(name)) for name in NAMES)]
    timing.time_rows(rows, CPU, 10)
    rounds = [tuple(order[i : i + 2]) for i in range(0, 20, 2)]
    assert set(rounds) == {NAMES, NAMES[::-1]}


def test_missing_failing_unsuited_and_wrong_peers_are_named():
    ours = OURS[0]

    def fail(*_):
        raise RuntimeError("out of luck")

    def double(x, y, problem, setting):
        solved = ours.solve(x, y, problem, setting)
        return dataclasses.replace(solved, values=2 * solved.values)

    cast = [
        ours,
        dataclasses.replace(ours, name="absent", distribution="no-such-distribution"),
        dataclasses.replace(ours, name="failing", solve=fail),
        dataclasses.replace(ours, name="wrong", solve=double),
        dataclasses.replace(ours, name="elsewhere", device="cuda"),
    ]
    entries = [entry(one) for one in cast]
    rows = [row for row, _ in entries]
    assert [row.problem for row in rows] == [
        None,
        "not installed (pip install no-such-distribution)",
        "failed: RuntimeError: out of luck",
        "disagrees with the reference: values off by 1",
        "not run: needs a GPU",
    ]
    set_bases(rows)
    timing.time_rows(entries, CPU, rounds=1)
    text = report.table(rows)
    assert all(row.name in text and (row.problem or "1 (1 - 1)") in text for row in rows)


def rows_for_verdict(*others):
    ours = Row("sfr_ext, transport", objective="transport", ours=True, milliseconds=[1.0, 2.0], rounds=[0, 1])
    found = [ours]
    for name, milliseconds, reached in others:
        row = Row(name, objective="entropic", reached=reached, milliseconds=milliseconds, rounds=[0, 1])
        found.append(row)
    return found


def test_verdicts():
    slow, fast, rough = ("slow", [50.0, 100.0], True), ("fast", [10.0, 20.0], True), ("rough", [2.0, 2.0], False)
    rows = rows_for_verdict(slow, fast, rough)
    named, rest, all_ = workloads.Target(40, ("slow",)), workloads.Target(20), workloads.Target(5)
    assert verdict(named, rows, (named, rest)).met
    assert "50" in verdict(named, rows, (named, rest)).measured
    missed = verdict(rest, rows, (named, rest))
    assert missed.met is False and missed.measured.endswith("times fast") and missed.word == "MISSED"
    assert verdict(all_, rows, (all_,)).met
    assert verdict(all_, rows_for_verdict(rough), (all_,)).met is None


def test_floor_by_hand():
    most = limits.Limits(copy_bytes=1e9, multiply_adds=1e9)
    b, c, n = 5, 3, 6
    floor = floors.step_floor(SMALL, iterations=7, limits=most)
    assert floor.multiply_adds == 4 * b * c * n * n + 7 * 2 * n * n + 3 * 10 * b * n * n
    assert floor.bytes == 3 * 2 * b * c * n * 4
    assert floor.milliseconds == pytest.approx(1e3 * floor.multiply_adds / 1e9)
    copying = floors.step_floor(SMALL, 0, dataclasses.replace(most, copy_bytes=1e3))
    assert copying.milliseconds == pytest.approx(1e3 * copying.bytes / 1e3)


def test_exponent():
    x = [1.0, 2.0, 8.0, 100.0]
    assert growth.exponent(x, [3 * value**1.5 for value in x]) == pytest.approx(1.5)


def synthetic(scale=1.0, machine=1.0, seed=0, rounds=21):
    """Samples that waver by a fifth, as those of a shared machine do."""
    generator = torch.Generator().manual_seed(seed)

    def waver():
        return math.exp(0.2 * torch.randn((), generator=generator).item())

    rows, calibration = [], []
    for name in ("w1", "small"):
        row = Row(name, ours=True)
        row.milliseconds = [10 * scale * machine * waver() for _ in range(rounds)]
        row.processor = [2 * sample for sample in row.milliseconds]
        row.rounds = list(range(rounds))
        rows.append(row)
    other = Row("another library", milliseconds=[100.0 * scale], rounds=[0])
    for _ in range(rounds):
        calibration.append({name: machine * waver() for loops in compare.CLOCKS.values() for name in loops})
    return Results("", {}, {}, [Table("t", "", [*rows, other], calibration=calibration)])


@pytest.mark.parametrize("seed", range(3))
def test_compare_notices_a_slower_build_alone(seed):
    old = synthetic(seed=seed)
    slower = compare.changes(old, synthetic(scale=1.8, seed=100 + seed))
    # The other library is no row of ours.
    assert [change.name for change in slower] == ["t: w1", "t: small", compare.TOGETHER]
    assert all(change.slower for change in slower)
    assert not any(change.slower for change in compare.changes(old, synthetic(seed=100 + seed)))
    assert not any(change.slower for change in compare.changes(old, synthetic(machine=1.8, seed=100 + seed)))
    hidden = compare.changes(old, synthetic(scale=1.8, machine=1 / 1.8, seed=100 + seed))
    assert all(change.slower for change in hidden)
    assert all(change.faster for change in compare.changes(synthetic(scale=2.0, seed=seed), old))


def test_compare_sees_threads_that_wait_and_a_small_loss_of_all_rows():
    old, waiting, all_rows = synthetic(rounds=201), synthetic(rounds=201, seed=1), synthetic(1.25, rounds=201, seed=2)
    for row in waiting.tables[0].rows:
        row.milliseconds = [2 * sample for sample in row.milliseconds]
    assert all(change.slower for change in compare.changes(old, waiting))
    assert compare.changes(old, all_rows)[-1].slower


def test_compare_as_a_command(tmp_path, capsys):
    for name, results in (("old", synthetic()), ("new", synthetic(scale=2.0, seed=1))):
        results.save(tmp_path / f"{name}.json")
    old, new = (str(tmp_path / f"{name}.json") for name in ("old", "new"))
    assert command.main(["--compare", old, old]) == 0
    printed = capsys.readouterr().out
    assert "None of 2 rows got slower" in printed and "too busy" not in printed
    synthetic(machine=2.0, seed=1).save(tmp_path / "busy.json")
    assert command.main(["--compare", old, str(tmp_path / "busy.json")]) == 0
    assert "too busy" in capsys.readouterr().out
    assert command.main(["--compare", old, new]) == 1
    assert "SLOWER beyond noise: t: w1; t: small" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        command.main(["--compare", old, str(tmp_path / "none.json")])


def test_command(tmp_path, monkeypatch, capsys):
    tiny = workloads.Workload("a small one", lambda: SMALL, (workloads.Target(1e9),))
    monkeypatch.setitem(command.WORKLOADS, "small", tiny)
    monkeypatch.setattr("benchmarks.tables.comparison.PEERS", [*OURS, peer("plain torch, log domain, eager")])
    monkeypatch.setattr(command.limits, "measure", lambda device: limits.Limits(1e10, 1e10))
    monkeypatch.setattr(command, "pin_threads", lambda threads: None)
    assert command.main(["--workload", "small", "--rounds", "2", "--threads", "1", "--out", str(tmp_path)]) == 0
    written = json.loads((tmp_path / "results.json").read_text())
    assert written["machine"]["threads"] == 1 and written["machine"]["sfr_ext"]["version"]
    assert written["command"].startswith("python -m benchmarks --workload small")
    loaded = Results.load(tmp_path / "results.json")
    (table,) = loaded.tables
    assert [len(row.milliseconds) for row in table.rows] == [2, 2, 2, 2] and len(table.calibration) == 2
    assert dataclasses.asdict(loaded) == written
    page = (tmp_path / "results.md").read_text()
    assert "a small one" in page and "MISSED" in page
    assert "plain torch, log domain, eager" in capsys.readouterr().out


def test_plots(tmp_path):
    pytest.importorskip("matplotlib")
    run = Run(CPU, 1, 1, 1.0, limits.Limits(1e10, 1e10), limits.Calibration(CPU), lambda _: None)
    tables = []
    for axis in ("N", "B", "C"):
        sizes = {"N": (4, 9), "B": (1, 2), "C": (2, 4)}[axis]
        make = {
            "N": lambda n: workloads.random_maps(2, math.isqrt(n), 2),
            "B": lambda b: workloads.random_maps(b, 2, 2),
            "C": lambda c: workloads.random_maps(2, 2, c),
        }[axis]
        tables.append(growth.grow(growth.Sweep(axis, "tiny", sizes, make, peers=False), run))
        assert set(tables[-1].facts["exponents"]) == {OURS[0].name}
    accuracy = Table("accuracy", "", [Row("a, tol 1", marginal_error=0.1, milliseconds=[1.0], rounds=[0])])
    memory = Table("memory", "", facts={"MiB by N": {"ours": {"4": 0.0, "16": 1.0}}})
    results = Results("", {}, {}, [*tables, accuracy, memory])
    drawn = plots.draw(results, tmp_path)
    names = {"time_by_n", "time_by_b", "time_by_c", "accuracy", "memory_by_n"}
    assert {path.stem for path in drawn} == names
    assert all(path.stat().st_size > 5000 for path in drawn)


def test_comparison_of_a_workload():
    run = Run(CPU, 1, 1, 1.0, limits.Limits(1e10, 1e10), limits.Calibration(CPU), lambda _: None)
    table = compare_peers("tiny", workloads.Workload("tiny", lambda: SMALL), run, OURS)
    assert [row.name for row in table.rows] == [one.name for one in OURS]
    assert all(row.of_floor > 0 and row.base == row.name for row in table.rows)
    assert table.facts["iterations of a problem"] > 0


def test_every_workload_has_a_name_and_what_suites_name_exists():
    assert all(set(names) <= set(workloads.WORKLOADS) for names in workloads.SUITES.values())
    for name in ("49 x 16", "bfloat16", "side 4"):
        problem = workloads.WORKLOADS[name].make()
        assert problem.x.dtype == (torch.bfloat16 if name == "bfloat16" else torch.float32)
        assert 0 < problem.eps < 1


def test_saved_feature_maps():
    shallow, deep = workloads.load_feature_maps()
    assert shallow.shape == (16, 32, 7, 7) and deep.shape == (16, 2, 32, 7, 7)
    for lengths in (shallow.norm(dim=1), deep.norm(dim=2)):
        assert ((lengths - 1).abs() < 1e-5).all()
    problem = workloads.WORKLOADS["maps"].make()
    assert problem.x.shape == problem.y.shape == (32, 32, 7, 7)
    torch.testing.assert_close(workloads.cost_std(problem.x, problem.y).float(), torch.ones(32))


def test_excess_over_the_exact_value_falls_with_eps():
    entries = excess.excess(tol=1e-4)
    above = torch.tensor([entry["excess"] for entry in entries])
    assert (above > 0).all() and (above[:-1] > above[1:]).all()
    assert all(max(entry["marginal_error"]) <= 1e-4 for entry in entries)
    assert all(str(eps) in excess.table(entries) for eps in excess.EPS)


def test_excess_of_points_is_large_in_few_dimensions():
    """What the guide tells users of point clouds."""
    few, many = (excess.of_points(dimensions, 49, tol=1e-4) for dimensions in (2, 64))
    assert all(a > 10 * b > 0 for a, b in zip(few, many, strict=True))
    assert few[0] > few[1] and few[2] > few[3]  # of eps
    assert few[2] > few[0]  # of the metric


@pytest.mark.parametrize("suite", ["quick", "kernels"])
def test_dry_run(suite, tmp_path, monkeypatch, capsys):
    """Every path on tiny problems, so that no hour, and no time on a GPU, is lost to a slip."""
    monkeypatch.setattr(command.limits, "measure", lambda device: limits.Limits(1e10, 1e10))
    monkeypatch.setattr(command, "pin_threads", lambda threads: None)
    assert command.main(["--suite", suite, "--dry-run", "--threads", "1", "--out", str(tmp_path)]) == 0
    assert not list(tmp_path.iterdir())
    printed = capsys.readouterr().out
    for table in {"quick": ("training", "memory", "growth in N"), "kernels": ("kernels, huge", "calls, w1")}[suite]:
        assert table in printed


def test_squared_distances_are_for_those_that_have_them():
    squared = dataclasses.replace(SMALL, metric="sqeuclidean")
    true = truth.Truth(squared)
    ours, others = entry(OURS[0], squared, true)[0], entry(peer("plain torch, log domain, eager"), squared, true)[0]
    assert ours.problem is None and ours.value_error < 1e-3 and ours.gradient_error < 1e-2
    assert others.problem == "not run: no sqeuclidean cost"


def test_floors_of_kernels_by_hand():
    most = limits.Limits(copy_bytes=1e9, multiply_adds=1e9, vector_multiply_adds=2e9, clock=1e6)
    found = floors.kernel_floors(SMALL, 7, most)
    pairs, size = 5 * 3 * 6 * 6, 2 * 5 * 3 * 6 * 4
    assert found["forward"].milliseconds == pytest.approx(1e3 * (max(2 * pairs / 2e9, size / 1e9) + 7 * 150 / 1e6))
    assert found["backward"].milliseconds == pytest.approx(1e3 * max(6 * pairs / 2e9, 3 * size / 1e9))


def test_the_feature_loss_is_drawn(tmp_path, capsys, one_thread):
    """After two epochs, a loss that is in the training is lower than the same one beside it."""
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    from benchmarks.studies import feature_loss

    feature_loss.main(["--epochs", "2", "--seeds", "1", "--out", str(tmp_path)])
    assert (tmp_path / "feature_loss.png").read_bytes().startswith(b"\x89PNG")
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[2:6]]
    last = {(mode, taught): float(loss) for mode, taught, _, loss, _ in rows}
    for mode in ("match", "project"):
        assert last[mode, "yes"] < last[mode, "no"]
