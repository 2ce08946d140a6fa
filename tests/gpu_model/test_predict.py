"""Predicted times: they follow from counts as they say they do, and are called predictions wherever they stand."""

from __future__ import annotations

import re
from pathlib import Path

import cuda_toolchain
import pytest
from gpu_model import __main__ as command
from gpu_model import code, counters, machine_code, predict
from gpu_model.devices import DEVICES
from gpu_model.predict import WORKLOADS, Phase, Workload, pull_wavefronts, wavefronts

H100 = DEVICES["H100"]


@pytest.fixture(scope="module", autouse=True)
def kernels() -> None:
    try:
        code.of_loops("90")
    except (cuda_toolchain.NoCuda, machine_code.NoDisassembler) as reason:
        pytest.skip(str(reason))


@pytest.mark.parametrize("device", DEVICES.values(), ids=lambda device: device.name)
@pytest.mark.parametrize("workload", WORKLOADS, ids=str)
def test_every_workload_has_a_prediction(workload, device):
    for backward in (False, True):
        found = predict.predict(workload, device, backward)
        assert found.seconds >= found.memory > 0
        assert all(phase.clocks > 0 for phase in found.phases) and found.waves >= 1
        total = found.waves * sum(phase.clocks for phase in found.phases) / device.clock
        assert found.seconds == pytest.approx(max(total, found.memory))


def test_busiest_resource_is_what_a_phase_takes():
    phase = Phase("some", latency=100, issue=300, shared=200, l2=50)
    assert (phase.clocks, phase.bound) == (300, "issue")


def test_more_work_takes_longer():
    usual = predict.predict(Workload(128, 7, 512), H100, False)
    assert predict.predict(Workload(128, 7, 1024), H100, False).seconds > usual.seconds
    assert predict.predict(Workload(133, 7, 512), H100, False).waves == 2 * usual.waves
    assert predict.predict(Workload(128, 7, 512), DEVICES["T4"], False).seconds > usual.seconds


def test_iterations_are_those_of_the_machine_code():
    """At the size that the budgets count, nothing is extrapolated."""
    found = predict.predict(Workload(128, 7, 512), H100, False)
    clocks = {m.name: m.figures.clocks for m in code.of_loops("90")}
    expected = 21 * clocks["tile: iteration"] + 7 * clocks["tile: sampled iteration"]
    assert found.share("iterations") * H100.clock == pytest.approx(expected)


def test_wavefronts_by_hand():
    assert wavefronts([4 * k for k in range(32)], 4) == 1
    assert wavefronts([128 * k for k in range(32)], 4) == 32
    assert wavefronts([0] * 32, 4) == 1, "one word for all"
    assert wavefronts([16 * k for k in range(32)], 16) == 4
    assert wavefronts([128 * k for k in range(32)], 16) == 32
    assert wavefronts([None] * 31 + [0], 8) == 1


@pytest.mark.parametrize(("side", "channels"), [(7, 16), (4, 16)])
def test_wavefronts_of_weights_are_those_that_the_emulator_counts(side, channels):
    run = counters.Run(side, channels, backward=True)
    line = run.counts().at("w[k] = load4(pull == Pull::to_x", shared=True)
    layout = predict.Model(Workload(1, side, channels), H100, True).layout
    to_x, to_y = pull_wavefronts(side * side, layout.ld, min(layout.pull_channels, channels))
    assert line.each == pytest.approx((to_x + to_y) / 2, rel=0.25)
    assert to_x <= 2 * to_y, "neighbouring rows of weights lie in different banks, or at most two in the same"


def test_predictions_are_called_so():
    page = command.PAGE.read_text()
    report = predict.report(["H100"])
    assert report.startswith("**Predictions, not measurements**")
    for section in (page, report):
        assert "redict" in section and not re.search(r"\bis measured|was measured in", section)


def test_without_a_gpu_nothing_is_measured():
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert predict.measured(WORKLOADS[0], False) is None
    assert predict.report(["H100"], measure=True).endswith("nothing was measured.")


def test_page_has_every_section():
    page = command.PAGE.read_text()
    for name in ("code", "counters", "predictions", "share", "assumptions"):
        content = page.split(f"<!-- gpu_model: {name} -->")[1].split(f"<!-- end of {name} -->")[0]
        assert len(content.strip().splitlines()) > 3, name


def test_page_is_written_between_its_markers(tmp_path: Path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- gpu_model: code -->\nold\n<!-- end of code -->\nafter\n")
    monkeypatch.setattr(command, "PAGE", page)
    command.write_page({"code": "new"})
    assert page.read_text() == "before\n<!-- gpu_model: code -->\n\nnew\n\n<!-- end of code -->\nafter\n"
    with pytest.raises(SystemExit, match="has no section <!-- gpu_model: other -->"):
        command.write_page({"other": "x"})


@pytest.mark.parametrize("planted", [{"instructions": 1}, {"clocks": 10}])
def test_command_fails_when_a_budget_is_exceeded(planted, monkeypatch, capsys):
    loops = [code.Measured("iteration", "", m.figures, code.exceeded("iteration", m.figures, planted))
             for m in code.of_loops("90")[:1]]  # fmt: skip
    monkeypatch.setattr(code, "of_loops", lambda arch: loops)
    monkeypatch.setattr("sys.argv", ["gpu_model", "code"])
    assert command.main() == 1
    assert f"over budget: iteration: {getattr(loops[0].figures, next(iter(planted))):.4g}" in capsys.readouterr().err
