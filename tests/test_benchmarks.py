"""The benchmarks themselves: what is measured, and what is said of a library that is missing or wrong."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import cuda, excess, measure, peers, report, workloads

RANDOM = torch.rand(2, 5, 3, 2, 3, generator=torch.Generator().manual_seed(0))
SMALL = workloads.Problem(RANDOM[0], RANDOM[1], eps=0.1, tol=1e-3)


def test_marginal_error_by_hand():
    plan = torch.tensor([[[0.5, 0.0], [0.0, 0.5]], [[0.5, 0.25], [0.0, 0.25]]])
    # The second: rows 0.75 and 0.25 instead of 0.5 each; columns are right.
    assert measure.marginal_error(plan) == pytest.approx(0.5)


def test_agreeing_peer_is_timed_and_compared():
    ours, plain = peers.PEERS[0], peers.PEERS[2]
    truth = measure.Reference(SMALL)
    rows = [measure.check(peer, SMALL, truth) for peer in (ours, plain)]
    for row in rows:
        assert row.problem is None
        assert row.marginal_error <= 1.01e-3 and row.value_error < 1e-3
    assert rows[0].gradient_error < 1e-2  # the other one holds the plan fixed
    measure.time_all([ours, plain], rows, SMALL, rounds=3)
    assert len(rows[0].milliseconds) == len(rows[1].ratios) == 3
    assert rows[0].ratios == [1.0, 1.0, 1.0]


def test_missing_failing_and_wrong_peers_are_named():
    ours = peers.PEERS[0]

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
    ]
    truth = measure.Reference(SMALL)
    rows = [measure.check(peer, SMALL, truth) for peer in cast]
    assert rows[1].problem == "not installed (pip install no-such-distribution)"
    assert rows[2].problem == "failed: RuntimeError: out of luck"
    assert rows[3].problem == "disagrees with the reference: values off by 1"
    measure.time_all(cast, rows, SMALL, rounds=1)
    text = report.table(rows)
    assert all(row.name in text and (row.problem or "1 (1 - 1)") in text for row in rows)


def test_command_writes_every_sample(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(command.WORKLOADS, "small", ("a small one", lambda: SMALL))
    threads = torch.get_num_threads()
    try:
        assert command.main(["--workload", "small", "--rounds", "2", "--threads", "1", "--out", str(tmp_path)]) == 0
    finally:
        torch.set_num_threads(threads)
    written = json.loads((tmp_path / "results.json").read_text())
    assert written["machine"]["threads"] == 1 and written["machine"]["sfr_ext"]["version"]
    (result,) = written["results"]
    assert [row["name"] for row in result["rows"]] == [peer.name for peer in peers.PEERS]
    assert all(len(row["milliseconds"]) == (0 if row["problem"] else 2) for row in result["rows"])
    assert "a small one" in (tmp_path / "results.md").read_text()
    assert "sfr_ext, transport" in capsys.readouterr().out


def test_saved_feature_maps():
    shallow, deep = workloads.load_feature_maps()
    assert shallow.shape == (16, 32, 7, 7) and deep.shape == (16, 2, 32, 7, 7)
    for lengths in (shallow.norm(dim=1), deep.norm(dim=2)):
        assert ((lengths - 1).abs() < 1e-5).all()
    problem = workloads.WORKLOADS["maps"][1]()
    assert problem.x.shape == problem.y.shape == (32, 32, 7, 7)
    torch.testing.assert_close(workloads.cost_std(problem.x, problem.y).float(), torch.ones(32))


def test_excess_over_the_exact_value_falls_with_eps():
    entries = excess.excess(tol=1e-4)
    above = torch.tensor([entry["excess"] for entry in entries])
    assert (above > 0).all() and (above[:-1] > above[1:]).all()
    assert all(max(entry["marginal_error"]) <= 1e-4 for entry in entries)
    assert all(str(eps) in excess.table(entries) for eps in excess.EPS)


def test_gpu_benchmark_without_a_gpu():
    """Every path of it on tiny problems, so that time on a GPU is not lost to a slip."""
    assert cuda.main(["--dry"]) == 0
