"""The tests of the CPU's kernels, collected again for those of the GPU, for every strategy; and tests of their own.

Without a usable GPU each file is skipped with the reason. With SFR_EXT_CUDA_EMULATE=1 the emulator of tests/simt
stands in for the GPU, which is slow: pick a few tests with -k.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gpu
import pytest
import test_errors
import torch

from sfr_ext import ops, reference

HERE = Path(__file__).resolve().parent

# name: why it says nothing about a GPU
LEFT_OUT = {
    "test_every_instruction_set": "about the CPU's instruction sets",
    "test_unknown_instruction_set_is_refused": "about the CPU's instruction sets",
    "test_nothing_is_cast_down_under_autocast": "autocast of the CPU; that of the GPU is in test_cuda_device.py",
    "test_padding_to_another_size_changes_no_bit": "padding stays where it is: within rounding",
    "test_weight_zero_removes_a_patch_to_the_bit": "it stays where it is, with no mass: within rounding, which is in "
    "test_cuda_against_cpu.py",
    "test_weights_are_only_refused_where_they_are": "contents of weights are not looked at: they give NaN",
    "test_bad_weights_are_refused": "contents of weights are not looked at: they give NaN",
}
# Cases of test_errors.test_message that are about the contents of weights.
CONTENTS = re.compile(r"only zeros|got -0\.5 at|got nan at|got -1 at")

# Run with every strategy; the others with the one that follows from the shape. Those that compare with the float64
# reference are not among them: its many small steps take long on a GPU, and the kernels of the CPU know the same.
EVERY_STRATEGY = {
    "test_two_points_by_hand",
    "test_weights_forms_and_normalisation",
    "test_masked_windows_ignore_nan_in_uncovered_pixels",
    "test_plan_potentials_and_costs_fit_together",
    "test_lower_precision_against_float64",
    "test_warm_start_needs_no_iteration",
    "test_every_problem_stops_by_itself",
    "test_hard_inputs_stay_finite",
    "test_all_costs_equal_takes_the_product_plan",
    "test_empty_batch",
    "test_gradcheck_windows",
    "test_gradcheck_solve",
    "test_upstream_gradients_scale_and_zero_ones_vanish",
    "test_bits_do_not_depend_on_run_threads_or_batch",
    "test_nan_and_inf_stay_in_their_own_problem",
    "test_nan_in_one_group_leaves_the_other_teachers_alone",
    "test_weights_of_a_broken_problem_get_nan",
    # tests of this folder
    "test_maps_agree",
    "test_costs_agree",
    "test_weight_zero_removes_a_patch",
    "test_bad_weights_give_nan_for_their_own_problem",
    "test_same_bits_on_a_side_stream",
    "test_graph_replay_has_the_bits_of_eager",
    "test_graph_of_given_costs",
    "test_threads_on_streams_of_their_own",
    "test_host_does_not_wait",
}
SLOW = {"test_compile_fullgraph", "test_compile_solve_and_cost_matrix_fullgraph"}


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: compiles with inductor")


class _Unusable(pytest.Module):
    def collect(self) -> Any:
        pytest.skip(gpu.why_not(), allow_module_level=True)


def pytest_pycollect_makemodule(module_path: Path, parent: Any) -> pytest.Module | None:
    """One skip for each file, not one for each test."""
    return _Unusable.from_parent(parent, path=module_path) if gpu.why_not() else None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "strategy" in metafunc.fixturenames:
        every = metafunc.function.__name__ in EVERY_STRATEGY
        metafunc.parametrize("strategy", list(ops.STRATEGIES) if every else ["automatic"], indirect=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE not in item.path.parents or not isinstance(item, pytest.Function):
            continue
        name = item.originalname
        if reason := LEFT_OUT.get(name):
            item.add_marker(pytest.mark.skip(reason=f"{name}: {reason}"))
        elif name == "test_message" and CONTENTS.search(item.callspec.params["message"]):
            item.add_marker(pytest.mark.skip(reason="contents of weights are not looked at: they give NaN"))
        if name in SLOW:
            item.add_marker(pytest.mark.slow)


@pytest.fixture
def strategy(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(autouse=True)
def _on_the_gpu(strategy: str, monkeypatch: pytest.MonkeyPatch, _seed: None) -> Iterator[None]:
    for name in ("x", "y", "tokens", "cost"):  # made when the module was imported
        monkeypatch.setattr(test_errors, name, getattr(test_errors, name).to(gpu.DEVICE))
    exact = reference.exact_emd  # SciPy wants its arrays on the CPU
    monkeypatch.setattr(reference, "exact_emd", lambda *costs: gpu.on_cpu(exact, *costs).to(gpu.DEVICE))
    torch.set_default_device(gpu.DEVICE)
    try:
        with gpu.running(strategy):
            yield
    finally:
        torch.set_default_device(None)


@pytest.fixture
def real_gpu() -> None:
    """For what the emulator does not have: streams, graphs, torch's memory."""
    if gpu.EMULATED:
        pytest.skip("needs a GPU, not the emulator")


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Iterator[None]:
    try:
        result = yield
        # A launch that failed belongs to the test that made it, not to the one after.
        gpu.synchronize()
        return result
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != "scipy":
            raise
        pytest.skip("scipy is not installed")
    except RuntimeError as error:
        if any(text in str(error) for text in gpu.STICKY):
            pytest.exit(f"{pyfuncitem.nodeid}: {error}; nothing after it would run", returncode=3)
        if "do not fit on this GPU with the strategy that was asked for" not in str(error):
            raise
        pytest.skip("too large for the strategy that was asked for")
