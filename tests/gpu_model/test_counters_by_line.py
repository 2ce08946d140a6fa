"""Counters of the emulator: planted faults show, and figures of the kernels that can be worked out by hand."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
from gpu_model import counters
from gpu_model.counters import Counts, counted
from simt import build
from simt.test_emulator import SIZE, Floats, names


def planted(name: str, broken: bool) -> Counts:
    library = build.planted("race")
    library.seed(None)
    # On a multiple of a sector.
    memory = (ctypes.c_float * (2 * SIZE + 64))()
    start = -ctypes.addressof(memory) % 128
    given, out = (Floats.from_buffer(memory, start + 4 * k * SIZE) for k in (0, 1))
    given[:] = np.random.default_rng(0).standard_normal(SIZE).astype(np.float32).tolist()
    return counted(library, lambda: library.calls.planted_run(names("race").index(name), broken, given, out))


@pytest.mark.parametrize(("broken", "wavefronts"), [(False, 1), (True, 32)])
def test_bank_conflict_is_seen(broken, wavefronts):
    line = planted("bank_conflict", broken).at("counted: column", shared=True)
    assert (line.accesses, line.each, line.idle) == (32, wavefronts, 0)
    assert line.excess == wavefronts


@pytest.mark.parametrize(("broken", "wavefronts"), [(False, 4), (True, 32)])
def test_16_bytes_a_lane_take_four_wavefronts(broken, wavefronts):
    line = planted("wide_conflict", broken).at("counted: wide", shared=True)
    assert (line.accesses, line.cost, line.excess) == (1, wavefronts, wavefronts / 4)


@pytest.mark.parametrize(("broken", "sectors"), [(False, 4), (True, 32)])
def test_uncoalesced_load_is_seen(broken, sectors):
    lines = planted("uncoalesced_load", broken)
    loads = [line for line in lines.lines.values() if "counted: load" in counters.source_of(line.place)]
    # The line writes as well, in order: 4 sectors.
    assert [(line.accesses, line.cost) for line in loads] == [(2, sectors + 4)]


def test_idle_lanes_are_seen():
    sound, broken = (planted("idle_lanes", b).at("counted: round", shared=False) for b in (False, True))
    assert (sound.accesses, sound.idle) == (32, 0)
    assert (broken.accesses, broken.idle) == (32, 1 - 33 / 64)


def test_barriers_are_counted_by_line():
    sound, broken = (planted("missing_second_barrier", b).meetings for b in (False, True))
    assert sorted(sound.values()) == [16, 16], "4 warps, 4 rounds"
    assert list(broken.values()) == [16]


def test_difference_of_two_runs_is_that_of_one_round():
    once, more = planted("bank_conflict", False), planted("bank_conflict", True)
    line = more.less(once).at("counted: column", shared=True) if more.less(once).lines else None
    assert line is None, "as many accesses: nothing is left"
    doubled = Counts({key: counters.Line(*key, 4 * v.accesses, 4 * v.lanes, 4 * v.cost, 4 * v.least)
                      for key, v in once.lines.items()}, {})  # fmt: skip
    assert doubled.less(once, 3).at("counted: column", shared=True).accesses == 32
