"""The emulator finds what it is there to find: bugs planted in small kernels, which are sound without them."""

from __future__ import annotations

import ctypes
import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from simt import build

SEEDS = [None, *range(8)]
SIZE = 4096
Floats = ctypes.c_float * SIZE

DIFFERENT = "different"  # the bits are not those of the sound kernel
UNSEEN = "unseen"
UNKNOWN = "unknown"  # what lies where the kernel should not look

# name: (what a plain run shows, what a watched run shows)
PLANTED = {
    "missing_barrier": (DIFFERENT, r"byte \d+ of shared memory .*planted\.cu:\d+\)"),
    "missing_second_barrier": (DIFFERENT, r"writes byte \d+ of shared .* read .*: a race|reads .* wrote .*: a race"),
    "missing_warp_barrier": (DIFFERENT, r"byte \d+ of shared memory"),
    "shuffle_for_a_barrier": (UNSEEN, r"byte \d+ of shared memory .* lane \d+ of warp \d .*: a race"),
    "sum_in_any_order": (DIFFERENT, r"byte 0 of shared memory .* lane 0 of warp \d wrote .*: a race"),
    "index_behind_the_end": (
        "wrote outside of the shared memory, 256 bytes",
        r"thread 63 writes byte 256 of shared memory \(planted\.cu:\d+\), which has 256 bytes",
    ),
    "index_before_the_start": (
        "wrote outside of the shared memory, 256 bytes",
        r"thread 0 writes byte -4 of shared memory \(planted\.cu:\d+\), which has 256 bytes",
    ),
    "unwritten": (DIFFERENT, r"reads byte \d+ of shared memory \(planted\.cu:\d+\), which nobody has written"),
    "shuffle_under_divergence": (
        r"thread \d+ comes to (sync_block|shuffle_xor) \(planted\.cu:\d+\) while lanes .* at (sync_block|shuffle_xor)",
        r"thread \d+ comes to ",
    ),
    "shuffle_with_exited_lanes": (
        r"deadlock: warps 0-1: lanes 0-20 at shuffle_xor \(planted\.cu:\d+\), lanes 21-31 exited",
        "deadlock",
    ),
    "shuffle_from_nowhere": (r"thread \d+ shuffles from lane 32 \(planted\.cu:\d+\)", "shuffles from lane 32"),
    "barrier_in_half_a_warp": (
        r"deadlock: warps 0-1: lanes 0-15 at sync_block \(planted\.cu:\d+\), lanes 16-31 exited",
        "deadlock",
    ),
    "two_barriers_for_one": (
        r"warp [01] comes to sync_block \(planted\.cu:(\d+)\), warps [01] wait for 64 threads "
        r"at sync_block \(planted\.cu:(?!\1)",
        "comes to sync_block",
    ),
    "exited_thread": (
        r"deadlock: warp 0: at sync_block .*; warp 1: lanes 0-4, 6-31 at sync_block .*, lane 5 exited",
        "deadlock",
    ),
    "named_barrier_with_two_counts": (
        r"comes to sync_threads\(3, (64|128)\) .* wait for (64|128) threads",
        "comes to sync_threads",
    ),
    "named_barrier_too_many": (
        r"deadlock: warps? .*: exited; warp \d: at sync_threads\(1, 96\) \(planted\.cu:\d+\)|"
        r"deadlock: warp \d: at sync_threads\(1, 96\) \(planted\.cu:\d+\); warps .*: exited",
        "deadlock",
    ),
    "named_barrier_half_a_warp": (r"deadlock: .* lanes 16-31 exited", "deadlock"),
    "named_barrier_odd_count": (r"thread \d+ calls sync_threads\(1, 33\) .* whole warps", "calls sync_threads"),
    "named_barrier_16": (r"thread \d+ calls sync_threads\(16, 64\) .* from 1 to 15", "calls sync_threads"),
    "named_barrier_of_others": (DIFFERENT, r"byte \d+ of shared memory"),
    "blocks_that_do_not_wait": (DIFFERENT, r"of block \d (wrote|read) .*: a race"),
    "tells_too_early": (DIFFERENT, r"of block \d (wrote|read) .*: a race"),
    "waits_for_nobody": (
        r"deadlock of all blocks: warp 0: lanes 1-31 at sync_block .*, "
        r"lane 0 in arrive_and_wait \(planted\.cu:\d+\) for 5 where the counter stands at 4",
        "deadlock",
    ),
    "two_blocks_one_place": (DIFFERENT, r"thread \d+ writes memory at .* of block \d wrote .*: a race"),
    "misaligned": (UNKNOWN, UNSEEN),
    "behind_the_end_of_a_tensor": (DIFFERENT, UNSEEN),
    "behind_the_end_of_a_local_array": (UNKNOWN, UNSEEN),
    "null_pointer": (
        r"thread 7 reads or writes memory at 0, .* \(planted\.cu:\d+\)",
        "thread 7 reads or writes memory",
    ),
    "no_stack_left": (r"thread \d+ has no stack left \(planted\.cu:\d+", "has no stack left"),
    "copy_without_wait": (r"thread \d+ ends with copies on their way", "ends with copies on their way"),
    "wait_after_the_barrier": (DIFFERENT, r"byte \d+ of shared memory .*planted\.cu:\d+\).*: a race"),
    "copy_without_barrier": (DIFFERENT, r"byte \d+ of shared memory .*planted\.cu:\d+\)"),
    "copy_onto_what_is_read": (DIFFERENT, r"byte \d+ of shared memory .*planted\.cu:\d+.*: a race"),
    "copy_beyond_shared_memory": (
        r"outside of the shared memory|thread \d+ copies 16 bytes to byte 2048 of shared memory, which has 2048",
        r"writes byte 2048 of shared memory .*which has 2048 bytes",
    ),
}
SOUND_ONLY = ["halves", "everything"]
# tests/gpu_model/test_counters_by_line.py
COSTLY = ["bank_conflict", "wide_conflict", "uncoalesced_load", "idle_lanes"]
SLOW = ["never_ends"]

# name: what a sanitizer says.
SANITIZED = {
    "index_behind_the_end": "heap-buffer-overflow",
    "index_before_the_start": "heap-buffer-overflow",
    "misaligned": "misaligned address",
    "behind_the_end_of_a_tensor": "heap-buffer-overflow",
    "behind_the_end_of_a_local_array": "index 4 out of bounds|stack-buffer-overflow",
}


@functools.cache
def names(flavour: str = "plain") -> list[str]:
    calls = build.planted(flavour).calls
    found = []
    while name := calls.planted_name(len(found)):
        found.append(name.decode())
    return found


def run(name: str, broken: bool, seed: int | None = None, flavour: str = "plain") -> tuple[bytes, str]:
    """The bits of the result, and the error."""
    library = build.planted(flavour)
    library.seed(seed)
    x = np.random.default_rng(0).standard_normal(SIZE).astype(np.float32)
    # Zeros behind it: a kernel that reads there finds no memory of others. A sanitizer has to see where it ends.
    behind = 0 if flavour == "asan" else SIZE
    given = (ctypes.c_float * (SIZE + behind))(*x.tolist())
    out = Floats()
    error = library.calls.planted_run(names(flavour).index(name), broken, given, out)
    return bytes(out), (error or b"").decode()


def test_every_planted_bug_has_a_test() -> None:
    assert names() == [*PLANTED, *SLOW, *SOUND_ONLY, *COSTLY]


@pytest.mark.parametrize("flavour", ["plain", "race"])
@pytest.mark.parametrize("name", [*PLANTED, *SLOW, *SOUND_ONLY, *COSTLY])
def test_sound_kernels_have_the_same_bits_under_every_schedule(name: str, flavour: str) -> None:
    bits, error = run(name, False)
    assert error == "" and any(bits)
    for seed in SEEDS:
        assert run(name, False, seed, flavour) == (bits, "")


@pytest.mark.parametrize("name", PLANTED)
def test_planted_bug_is_seen(name: str) -> None:
    """An error under every schedule, or other bits under some."""
    expected, _ = PLANTED[name]
    sound, _ = run(name, False)
    seen = 0
    for seed in SEEDS:
        bits, error = run(name, True, seed)
        if expected in (DIFFERENT, UNSEEN, UNKNOWN):
            assert error == ""
            seen += bits != sound
        else:
            assert re.search(rf"kernel planted::{name}.*, block \d: .*(?:{expected})", error), error
    if expected in (DIFFERENT, UNSEEN):
        assert (seen > 0) == (expected == DIFFERENT)


@pytest.mark.parametrize("name", PLANTED)
def test_watch_names_the_planted_bug_under_every_schedule(name: str) -> None:
    _, expected = PLANTED[name]
    for seed in SEEDS:
        _, error = run(name, True, seed, "race")
        if expected == UNSEEN:
            assert error == ""
        else:
            assert re.search(rf"kernel planted::{name}.*, block \d: .*(?:{expected})", error), error


def apart(code: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Runs code in a process of its own."""
    code = f"import sys; sys.path[:0] = {[str(build.HERE.parent)]!r}\nfrom simt.test_emulator import *\n{code}"
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)


def test_sanitizers_find_nothing_in_sound_kernels(sanitized: dict[str, str]) -> None:
    build.build("asan/planted.so")
    code = "print([run(name, False, seed, 'asan')[1] for name in names('asan') for seed in (None, 1)])"
    done = apart(code, sanitized)
    assert (done.returncode, done.stdout.strip()) == (0, str([""] * 2 * len(names()))), done.stderr


@pytest.mark.parametrize("name", SANITIZED)
def test_sanitizers_find(name: str, sanitized: dict[str, str]) -> None:
    build.build("asan/planted.so")
    done = apart(f"run({name!r}, True, 1, 'asan')", sanitized)
    assert done.returncode != 0 and re.search(SANITIZED[name], done.stderr), done.stderr
    assert "planted.cu" in done.stderr


def test_kernel_that_never_ends() -> None:
    build.build("plain/planted.so")
    done = apart(
        "print(run('never_ends', True))\nprint(run('never_ends', False))", {**os.environ, "SFR_SIMT_SECONDS": "1"}
    )
    first, second = done.stdout.splitlines()
    assert re.search(r"thread \d+ was running when the launch had taken too long \(planted\.cu:\d+\)", first), (
        done.stderr
    )
    assert second.endswith(", '')")


def test_failed_launches_leave_nothing_behind() -> None:
    sound, _ = run("everything", False)
    for name in PLANTED:
        run(name, True, 3)
        assert run("everything", False, 3) == (sound, "")


def test_seeds_give_different_orders_and_each_the_same_one_again() -> None:
    results = [run("sum_in_any_order", True, seed)[0] for seed in range(8)]
    assert len(set(results)) > 2
    assert [run("sum_in_any_order", True, seed)[0] for seed in range(8)] == results


@pytest.mark.parametrize(
    ("launch", "expected"),
    [
        # blocks, threads, bytes of shared memory, together, shared memory was asked for
        ((1, 1024, 0, 0, 0), ""),
        ((1, 1025, 0, 0, 0), "cudaErrorInvalidConfiguration: kernel .*: a block has 1 to 1024 threads, got 1025"),
        ((1, 0, 0, 0, 0), "cudaErrorInvalidConfiguration"),
        ((0, 32, 0, 0, 0), "cudaErrorInvalidConfiguration: kernel .*: no such grid"),
        (
            (1, 32, 48 * 1024 + 1, 0, 0),
            "cudaErrorInvalidValue: kernel .*: 49153 bytes of shared memory .* 49152 allowed",
        ),
        ((1, 32, 99 * 1024, 0, 1), ""),
        ((1, 32, 99 * 1024 + 1, 0, 1), "cudaErrorInvalidValue"),
        # 4 multiprocessors with 2048 threads and 100 KiB each
        ((8, 1024, 0, 1, 0), ""),
        ((9, 1024, 0, 1, 0), "cudaErrorCooperativeLaunchTooLarge: kernel .*: 9 blocks cannot run .*, 8 can"),
        ((4, 32, 99 * 1024, 1, 1), ""),
        ((5, 32, 99 * 1024, 1, 1), "cudaErrorCooperativeLaunchTooLarge"),
    ],
)
def test_launches_that_a_device_refuses(launch: tuple[int, ...], expected: str) -> None:
    # In a process of its own: what a kernel was allowed stays allowed.
    build.build("plain/planted.so")
    done = apart(f"print((build.planted().calls.planted_launch(*{launch!r}) or b'').decode())")
    assert done.returncode == 0, done.stderr
    assert re.search(expected, done.stdout) if expected else done.stdout == "\n"


def test_devices_can_differ() -> None:
    library = build.planted()
    library.device(2, 7, 40)
    assert library.calls.planted_resident(0, 1024, 0) == 8
    assert library.calls.planted_resident(2, 1024, 0) == 14
    assert library.calls.planted_resident(2, 32, 40 * 1024) == 7


def test_halves() -> None:
    calls = build.planted().calls
    bits = np.arange(1 << 16, dtype=np.uint16)
    expected = bits.view(np.float16).astype(np.float32)
    floats = np.array([calls.planted_half_to_float(int(b)) for b in bits], np.float32)
    number = ~np.isnan(expected)
    assert np.array_equal(floats[number].view(np.uint32), expected[number].view(np.uint32))
    assert np.isnan(floats[~number]).all()


def test_rounding_to_halves() -> None:
    calls = build.planted().calls
    halves = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    middles = (halves[:-1] + halves[1:]) / 2
    rng = np.random.default_rng(0)
    anything = rng.integers(0, 1 << 32, 20000, dtype=np.uint32).view(np.float32)
    edges = np.array([65504, 65519.996, 65520, 1e30, np.inf, 2**-24, 2**-25, 2**-25 * 1.001, 0, 1e-30], np.float32)
    samples = np.concatenate([middles[::7], np.nextafter(middles[::7], np.float32(9e9)), anything, edges, -edges])
    with np.errstate(all="ignore"):
        expected = samples.astype(np.float16)
    rounded = np.array([calls.planted_float_to_half(ctypes.c_float(x)) for x in samples], np.uint16).view(np.float16)
    number = ~np.isnan(expected)
    assert np.array_equal(rounded[number].view(np.uint16), expected[number].view(np.uint16))
    assert np.isnan(rounded[~number]).all()


def test_switching_without_assembly(tmp_path: Path) -> None:
    """The way for other processors than x86-64, tried on this one."""
    objects = []
    includes = [f"-I{path}" for path in (build.HERE / "include", build.HERE, build.ROOT / "csrc")]
    for source in [*sorted(build.HERE.glob("*.cpp")), *sorted((build.HERE / "planted").glob("*.cu"))]:
        objects.append(str(tmp_path / f"{source.stem}.o"))
        flags = ["-O1", "-DSFR_SIMT_PORTABLE", "-x", "c++", "-c", str(source), "-o", objects[-1]]
        subprocess.run([*build.compiler(), *build.EVERY, *includes, *flags], check=True)
    path = tmp_path / "portable.so"
    subprocess.run([*build.compiler(), "-shared", *objects, "-o", str(path)], check=True)
    calls = ctypes.CDLL(str(path))
    calls.planted_run.restype = ctypes.c_char_p
    x = np.random.default_rng(0).standard_normal(SIZE).astype(np.float32)
    for name in ("everything", "exited_thread", "blocks_that_do_not_wait"):
        out = Floats()
        assert calls.planted_run(names().index(name), False, Floats(*x.tolist()), out) is None
        assert bytes(out) == run(name, False)[0]
    assert b"deadlock" in calls.planted_run(names().index("exited_thread"), True, Floats(), Floats())
