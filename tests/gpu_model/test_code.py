"""The hot loops in machine code: within their budgets, and faults that were planted show. Needs nvcc and nvdisasm."""

from __future__ import annotations

import subprocess
from pathlib import Path

import cuda_toolchain
import native_build
import pytest
from gpu_model import code, hot_loops, machine_code, markers
from gpu_model.flow import Flow, NoPath
from gpu_model.hot_loops import Figures, HotLoop, Work, exceeded
from gpu_model.timing import Latencies, clocks

HERE = Path(__file__).resolve().parent
ARCH = hot_loops.table()["arch"]


@pytest.fixture(scope="module")
def cuda() -> cuda_toolchain.CudaToolchain:
    try:
        machine_code.nvdisasm()
        return cuda_toolchain.find_cuda(native_build.find_toolchain().cxx)
    except (cuda_toolchain.NoCuda, machine_code.NoDisassembler) as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="module")
def planted(cuda, tmp_path_factory) -> list[machine_code.Kernel]:
    cubin = tmp_path_factory.mktemp("planted") / "planted.cubin"
    command = [cuda.nvcc, *cuda.host, "-O3", "-lineinfo", "-cubin", f"-arch=sm_{ARCH}"]
    subprocess.run([*command, str(HERE / "planted.cu"), "-o", str(cubin)], check=True)
    return machine_code.disassemble(cubin)


def loop(kernel: str, multiply_adds: int = 1) -> HotLoop:
    return HotLoop("planted", kernel, "", (Work("FFMA", multiply_adds),), {})


def figures(planted: list[machine_code.Kernel], kernel: str, multiply_adds: int = 1) -> Figures:
    path = loop(kernel, multiply_adds).path(Flow(hot_loops.named(planted, kernel)))
    return Figures.of(path, Latencies())


def test_hot_loops_are_within_their_budgets(cuda):
    over = [line for measured in code.of_loops(ARCH) for line in measured.over]
    assert not over, "\n".join(over)


def test_kernels_are_within_their_budgets(cuda):
    over = [line for measured in code.of_kernels(ARCH) for line in measured.over]
    assert not over, "\n".join(over)


def test_budgets_are_no_looser_than_they_have_to_be(cuda):
    """A budget far above what the code takes would let it get worse unseen."""
    for measured in [*code.of_loops(ARCH), *code.of_kernels(ARCH)]:
        entry = next(
            (e["budget"] for e in hot_loops.table()["loop"] if e["name"] == measured.name),
            hot_loops.table()["kernel"].get(measured.name),
        )
        for key, limit in entry.items():
            assert getattr(measured.figures, key) >= 0.9 * limit, f"{measured.name}: lower the budget of {key}"


def test_sound_loop(planted):
    found = figures(planted, "sound_kernel")
    assert (found.multiply_adds, found.shared, found.generic, found.local, found.calls) == (1, 1, 0, 0, 0)
    assert found.instructions < 10 and 30 <= found.clocks < 100


def test_generic_access_is_seen(planted):
    found = figures(planted, "generic_kernel")
    assert (found.generic, found.shared) == (1, 0)
    assert exceeded("planted", found, {"generic": 0}) == ["planted: 1 generic, budget 0"]


def test_loads_that_never_happen_are_not_counted():
    def instruction(text: str) -> machine_code.Instruction:
        return machine_code.Instruction(0, text, machine_code.Control(1, 7, 7, 0), ())

    found = Figures.of([instruction("@!PT LDS RZ, [RZ]"), instruction("@!P1 LDS R2, [R3]")])
    assert (found.instructions, found.shared) == (2, 1)


def test_unrolled_division_is_seen(planted):
    """Four divisions in a pass, each with a check and a call that is seldom taken."""
    kernel = hot_loops.named(planted, "division_kernel")
    assert sum(instruction.name == "FCHK" for instruction in kernel.code) >= 4
    assert Figures.of(kernel.code).calls >= 4
    sound, divides = figures(planted, "sound_kernel"), figures(planted, "division_kernel", 4 * 6)
    assert divides.calls == 0, "the shortest way does not need the slow path"
    assert divides.instructions > 5 * sound.instructions and divides.clocks > 3 * sound.clocks


def test_local_memory_is_seen(planted):
    assert figures(planted, "local_kernel").local == 2


def test_table_of_branches_is_followed(planted):
    kernel = hot_loops.named(planted, "switch_kernel")
    assert any(instruction.name == "BRX" for instruction in kernel.code), "the compiler no longer makes one"
    assert figures(planted, "switch_kernel").multiply_adds == 1


def test_work_that_no_pass_does(planted):
    with pytest.raises(NoPath, match="no loop of .*sound_kernel.* does the work"):
        figures(planted, "sound_kernel", 2)


def test_places_name_the_source(planted):
    kernel = hot_loops.named(planted, "sound_kernel")
    line = 1 + (HERE / "planted.cu").read_text().splitlines().index(
        "  for (int i = 0; i < n; ++i) sum += shared[i] * x;"
    )
    assert any(("planted.cu", line) in instruction.places for instruction in kernel.code if instruction.name == "FFMA")


def test_clocks_by_hand():
    def instruction(text: str, stall: int, result: int = 7, wait: int = 0) -> machine_code.Instruction:
        return machine_code.Instruction(0, text, machine_code.Control(stall, result, 7, wait), ())

    load = instruction("LDS R0, [R1]", 2, result=0)
    add = instruction("FADD R2, R0, R0", 4, wait=1)
    assert clocks([load]) == 2
    assert clocks([load, add]) == 30 + 4
    assert clocks([load, load, add]) == 2 + 30 + 4, "the later of two on one scoreboard"
    assert clocks([add, add]) == 8, "nobody has set the scoreboard"
    assert clocks([instruction("@P0 BAR.SYNC 0x0", 5)]) == 35
    copy = instruction("LDGSTS.E [R1], desc[UR4][R2.64]", 2)
    until = [instruction("LDGDEPBAR", 1, result=0), instruction("DEPBAR.LE SB0, 0x0", 6)]
    assert clocks([copy, add]) == 2 + 4, "nobody waits for it"
    assert clocks([copy, copy, *until]) == 2 + 500 + 6, "for the later of two"
    assert clocks([*until, copy]) == 1 + 6 + 2, "on its way before it only"


def test_control_bits():
    # LDC R1, c[0x0][0x28] of some kernel: result on scoreboard 0, one clock.
    assert machine_code.Control.of(0x000E220000000800) == machine_code.Control(stall=1, result=0, read=7, wait=0)


def test_marker_must_be_on_one_line():
    assert markers.place("hot: pair")[0] == "pairwise.cuh"
    with pytest.raises(markers.NoLine, match="0 lines of csrc fit 'hot: nowhere'"):
        markers.place("hot: nowhere")
    with pytest.raises(markers.NoLine, match="lines of csrc fit 'team.cuh: team', expected one"):
        markers.place("team.cuh: team")


def test_loops_of_the_solver_for_any_place_spill_next_to_nothing(cuda) -> None:
    """What tools/cuda_report.py allows its phases lies beside them, but for two words a pass: what systems are
    factorised by is called, and what is needed after a call has fewer registers."""
    flow, found = code.flow_of(ARCH, "emd_forward_kernel.any"), {}
    for one in hot_loops.hot_loops(hot_loops.table()):
        if one.name in ("iteration", "sampled iteration", "evaluation", "row update", "conjugate gradients"):
            found[one.name] = Figures.of(one.path(flow)).local
    assert len(found) == 5 and max(found.values()) <= 2, found
