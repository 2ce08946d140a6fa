"""The half of csrc/cuda/device.cuh that the emulator replaces: its PTX, run by an interpreter. Needs nvcc."""

from __future__ import annotations

import numpy as np
import pytest
from gpu_model import ptx
from gpu_model.ptx import Machine, PtxError


def run(entry: ptx.Entry, *arguments, threads: int = 32, blocks: int = 1, seed: int = 0, **options) -> list[np.ndarray]:
    """The arrays among the arguments, as the kernel left them."""
    given = [bytearray(a.tobytes()) if isinstance(a, np.ndarray) else a for a in arguments]
    Machine(entry, blocks, threads, given, seed, **options).run()
    return [np.frombuffer(g, a.dtype) for g, a in zip(given, arguments, strict=True) if isinstance(a, np.ndarray)]


def samples(count: int = 32 * 32) -> np.ndarray:
    """Floats of all magnitudes, and the special ones."""
    bits = np.random.default_rng(0).integers(0, 1 << 32, count - 12, dtype=np.uint32)
    special = [0, -0.0, np.inf, -np.inf, np.nan, 1, -1, 2**-149, 2**-126, 65504, 65520, 2**-24]
    return np.concatenate([bits.view(np.float32), np.array(special, np.float32)])


def each(entry: ptx.Entry, x: np.ndarray, out: np.dtype | type, *more: np.ndarray, **options) -> np.ndarray:
    """A kernel of one value a thread, over blocks of 32 of them."""
    found = [
        run(entry, x[k : k + 32], *(m[k : k + 32] for m in more), np.zeros(32, out), **options)[-1]
        for k in range(0, len(x), 32)
    ]
    return np.concatenate(found)


def equal(ours: np.ndarray, expected: np.ndarray) -> bool:
    """To the bit; a NaN is a NaN."""
    number = ~np.isnan(expected)
    return (
        np.array_equal(ours[number].view(np.uint8), expected[number].view(np.uint8)) and np.isnan(ours[~number]).all()
    )


def ulps(ours: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Distances of float32s from numbers in float64, in the last place of what is expected."""
    return np.abs(ours - expected) / np.spacing(np.abs(expected).astype(np.float32))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_shuffles(intrinsics, dtype):
    x = np.random.default_rng(0).standard_normal(64).astype(dtype)
    kind = "float" if dtype == np.float32 else "double"
    for lane in (0, 7, 31):
        (found,) = run(intrinsics[f"shuffle_{kind}"], x, lane, threads=64, seed=lane)
        assert np.array_equal(found, np.repeat(x[[lane, 32 + lane]], 32))
    for mask in (1, 2, 4, 8, 16, 31):
        (found,) = run(intrinsics[f"shuffle_xor_{kind}"], x, mask, threads=64, seed=mask)
        assert np.array_equal(found, x[np.arange(64) ^ mask])


def test_shuffles_of_integers(intrinsics):
    x = np.arange(-16, 16, dtype=np.int32)
    (found,) = run(intrinsics["shuffle_xor_int"], x, 16)
    assert np.array_equal(found, x[np.arange(32) ^ 16])


@pytest.mark.parametrize("seed", range(4))
def test_barriers(intrinsics, seed):
    t = np.arange(128)
    (found,) = run(intrinsics["meet_block"], np.zeros(128, np.int32), threads=128, seed=seed)
    assert np.array_equal(found, (t + 33) % 128 * 3)
    (found,) = run(intrinsics["meet_warp"], np.zeros(64, np.int32), threads=64, seed=seed)
    assert np.array_equal(found, (np.arange(64) ^ 9) * 5)
    (found,) = run(intrinsics["meet_some"], np.zeros(160, np.int32), 96, threads=160, seed=seed)
    read = np.concatenate([(t[:96] + 33) % 96, 96 + (np.arange(64) + 33) % 64])
    assert np.array_equal(found, read**2)


@pytest.mark.parametrize("seed", range(6))
def test_meeting_of_blocks(intrinsics, seed):
    blocks = 5
    arguments = (np.zeros(1, np.uint32), np.zeros(blocks, np.int32), np.zeros(2 * blocks, np.int32))
    counter, _, out = run(intrinsics["meet_blocks"], *arguments, threads=32, blocks=blocks, seed=seed)
    neighbour = (np.arange(blocks) + 1) % blocks
    assert counter[0] == 4 * blocks
    assert np.array_equal(out, np.concatenate([100 + neighbour, 200 + neighbour]))


def test_counter_that_wraps_around(intrinsics):
    """The wait compares differences: a counter at the end of its range goes on from 0."""
    (counter,) = run(intrinsics["meeting"], np.array([2**32 - 1], np.uint32), 0, threads=1)
    assert counter[0] == 0


def test_blocks_that_are_too_few_wait_for_ever(intrinsics):
    entry = intrinsics["meeting"]
    machine = Machine(entry, 2, 1, [bytearray(4), 3])
    with pytest.raises(PtxError, match="does not end"):
        machine.run(1000)


def test_halves(intrinsics):
    bits = np.arange(1 << 16, dtype=np.uint16)[::61][:1024]
    assert equal(each(intrinsics["from_half"], bits, np.float32), bits.view(np.float16).astype(np.float32))
    x = samples()
    x[:200] = np.random.default_rng(1).uniform(-3e-5, 3e-5, 200)  # below half's normal range
    x[200:400] = (np.arange(200) + 0.5) * 2  # ties
    with np.errstate(all="ignore"):
        expected = x.astype(np.float16)
    assert equal(each(intrinsics["to_half"], x, np.uint16).view(np.float16), expected)


def test_bfloats(intrinsics):
    torch = pytest.importorskip("torch")
    x = samples()
    x[:100] = (0x3F800000 + (np.arange(100, dtype=np.uint32) << 15)).view(np.float32)  # ties
    found = torch.from_numpy(each(intrinsics["to_bfloat"], x, np.uint16).view(np.int16)).view(torch.bfloat16)
    expected = torch.from_numpy(x).bfloat16()
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found[~found.isnan()].view(torch.int16), expected[~expected.isnan()].view(torch.int16))


def test_bits(intrinsics):
    x = samples()
    assert np.array_equal(
        each(intrinsics["bits_of_float"], x, np.float32).view(np.uint32), x.view(np.uint32) ^ (1 << 31)
    )
    x = np.random.default_rng(0).standard_normal(32)
    (_, found) = run(intrinsics["bits_of_double"], x, np.zeros(32))
    assert np.array_equal(found.view(np.uint64), x.view(np.uint64) ^ np.uint64(0x8000000000000001))


def test_16_bytes(intrinsics):
    x = np.random.default_rng(0).integers(0, 1 << 32, 128, dtype=np.uint32)
    (_, found) = run(intrinsics["load_16"], x, np.zeros(128, np.uint32))
    assert np.array_equal(found.reshape(32, 4), x.reshape(32, 4)[:, ::-1])


def test_exponential(intrinsics):
    """Within 2 ulp, which is what the hardware's approximation is promised to be; below the normal range 0."""
    x = np.concatenate([np.linspace(-160, 130, 1016), [0, -0.0, np.inf, -np.inf, np.nan, 1, -126, -127]])
    x = x.astype(np.float32)
    with np.errstate(all="ignore"):
        exact = np.exp2(x.astype(np.float64)).astype(np.float32)
    exact[exact < np.float32(2**-126)] = 0
    assert equal(each(intrinsics["exponential"], x, np.float32), exact)
    off = each(intrinsics["exponential"], x, np.float32, approximate=lambda kind, bits: bits + 2 * (kind == "ex2"))
    assert (off[exact == 0] == 0).all() and (off != exact).sum() > 800


def test_quotient(intrinsics):
    x, y = samples(), samples()[::-1].copy()
    usual = (np.abs(y) >= 2.0**-126) & (np.abs(y) <= 2.0**126)
    found = each(intrinsics["divide"], x, np.float32, y)
    with np.errstate(all="ignore"):
        assert equal(found[usual], (x[usual] / y[usual]))
    beyond = (np.abs(y) > 2.0**126) & np.isfinite(y) & np.isfinite(x)
    assert beyond.any() and (found[beyond] == 0).all(), "what the declaration's bound is for"


def test_root(intrinsics):
    x = samples()
    with np.errstate(all="ignore"):
        assert equal(each(intrinsics["root"], x, np.float32), np.sqrt(x))


@pytest.mark.parametrize(
    ("name", "function", "low", "high", "bound"),
    [("logarithm", np.log2, 1e-37, 1e37, 2), ("exponential_less_1", np.expm1, -20, 80, 3)],
)
def test_functions_of_the_library(intrinsics, name, function, low, high, bound):
    rng = np.random.default_rng(0)
    if low > 0:
        x = np.exp(rng.uniform(np.log(low), np.log(high), 512)).astype(np.float32)
    else:
        x = np.concatenate([rng.uniform(low, high, 256), rng.uniform(-1, 1, 256) ** 5]).astype(np.float32)
    found = each(intrinsics[name], x, np.float32)
    assert ulps(found, function(x.astype(np.float64))).max() <= bound


def test_matrix_products(intrinsics):
    """Of numbers whose last 13 bits do not count, onto what is there; on GPUs that have them."""
    entry = intrinsics["matrix_product"]
    if not any(operation.name.startswith("mma") for operation in entry.code):
        assert intrinsics.arch == "75"
        return
    rng = np.random.default_rng(0)
    for _ in range(4):
        x, y, before = (rng.standard_normal(shape).astype(np.float32) for shape in ((16, 8), (8, 8), (16, 8)))
        *_, found = run(entry, x.ravel(), y.ravel(), before.ravel())
        found = found.reshape(16, 8)
        a, b = ((z.view(np.uint32) & 0xFFFFE000).view(np.float32).astype(np.float64) for z in (x, y))
        exact = a @ b + before
        apart = found.astype(np.float64) - exact
        assert (np.abs(apart) <= np.spacing(np.abs(exact).astype(np.float32))).all()
        assert (np.abs(found) <= np.abs(exact)).all() and not np.array_equal(found, exact.astype(np.float32))


def copied(entry: ptx.Entry, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """What `copy_4_and_16` left, and what it should have left."""
    threads = 64
    x = np.random.default_rng(seed).integers(0, 1 << 32, 5 * threads, dtype=np.uint32)
    *_, found = run(entry, x, np.zeros(5 * threads, np.uint32), threads=threads, seed=seed)
    t = np.arange(threads)
    order = (t + 33) % threads
    words = np.where(t % 3 == 0, 0, x[:threads])[order]
    return found, np.concatenate([words, x[threads:].reshape(threads, 4)[order].ravel()]).astype(np.uint32)


def asynchronous(intrinsics) -> ptx.Entry | None:
    entry = intrinsics["copy_4_and_16"]
    if any(operation.name.startswith("cp.async") for operation in entry.code):
        return entry
    assert intrinsics.arch == "75"
    return None


@pytest.mark.parametrize("seed", range(3))
def test_asynchronous_copies(intrinsics, seed):
    if entry := asynchronous(intrinsics):
        found, expected = copied(entry, seed)
        assert np.array_equal(found, expected)


@pytest.mark.parametrize("missing", ["cp.async.wait_all", "bar.sync"])
def test_copies_that_nobody_waits_for_do_not_come(intrinsics, missing):
    if not (entry := asynchronous(intrinsics)):
        return
    kept = [k for k, operation in enumerate(entry.code) if not operation.name.startswith(missing)]
    assert len(kept) == len(entry.code) - 1
    labels = {name: sum(k < at for k in kept) for name, at in entry.labels.items()}
    without = ptx.Entry(entry.name, entry.parameters, [entry.code[k] for k in kept], labels)
    assert any(not np.array_equal(*copied(without, seed)) for seed in range(8))


def test_faults_of_a_kernel_are_named():
    entry = ptx.parse(
        """
.visible .entry bad(
 .param .u64 bad_param_0
)
{
 ld.param.u64 %rd1, [bad_param_0];
 cvta.to.global.u64 %rd2, %rd1;
 ld.global.u32 %r1, [%rd2+2];
 ret;
}
"""
    )["bad"]
    with pytest.raises(PtxError, match="ld.global.u32 at 0x100000002, which is not a multiple of 4"):
        Machine(entry, 1, 1, [bytearray(8)]).run()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("barrier.sync.aligned 1, 96;", "threads wait for ever: .*'barrier', 1, 96"),
        ("barrier.sync.aligned 1, 33;", "barrier 1 for 33 threads"),
        ("shfl.sync.idx.b32 %r4|%p1, %r1, 0, 31, 65535;", "wait for ever"),
        ("sin.approx.f32 %f1, 0f00000000;", "sin.approx.f32"),
    ],
)
def test_barriers_that_never_fill(line, message):
    text = f".entry bad(\n .param .u32 bad_param_0\n)\n{{\n mov.u32 %r1, %tid.x;\n {line}\n ret;\n}}\n"
    with pytest.raises(PtxError, match=message):
        Machine(ptx.parse(text)["bad"], 1, 64, [0]).run()
