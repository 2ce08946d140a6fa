"""What only a GPU has: streams, graphs, devices, memory, and calls that do not wait."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from cases import features, value_and_gradients, weights
from torch import Tensor

import sfr_ext
from benchmarks.harness.device import capture
from sfr_ext import cost_matrix, emd_l2, solve, solve_sample

# Fits every strategy but the first; the smaller one fits that too.
SHAPES = {"7 x 7": (4, 40, 7, 7), "4 x 4": (6, 24, 4, 4)}


def call(x: Tensor, y: Tensor, a: Tensor | None = None) -> list[Tensor]:
    """Values, iterations and gradients."""
    result = solve_sample(x, y, a)
    value = result.transport_cost + 0.5 * result.entropic_cost
    wanted = [t for t in (x, y, a) if t is not None and t.requires_grad]
    return [value.detach(), result.n_iter, *torch.autograd.grad(value.sum(), wanted)]


def same(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.every_strategy
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_bad_weights_give_nan_for_their_own_problem(shape: tuple[int, ...]) -> None:
    x, y = features(*shape, grad=True), features(*shape, grad=True)
    n = shape[2] * shape[3]
    clean = weights(shape[0], n)
    expected = call(x, y, clean.clone().requires_grad_())
    bad_weights: list[Callable[[Tensor], object]] = [
        lambda w: w.zero_(),
        lambda w: w[3].fill_(-0.5),
        lambda w: w[3].fill_(torch.nan),
        lambda w: w[3].fill_(torch.inf),
    ]
    for spoil in bad_weights:
        a = clean.clone()
        spoil(a[1])
        found = call(x, y, a.requires_grad_())
        others = [i for i in range(shape[0]) if i != 1]
        assert found[0][1].isnan() and all(grad[1].isnan().any() for grad in found[2:])
        assert same([t[others] for t in found], [t[others] for t in expected])


def test_empty_batches() -> None:
    x, y = features(0, 5, 3, 3, grad=True), features(0, 2, 5, 3, 3, grad=True)
    value, grads = value_and_gradients(lambda x, y: emd_l2(x, y, reduction="none"), x, y)
    assert value.shape == (0, 2) and [g.shape for g in grads] == [x.shape, y.shape]
    cost, grads = value_and_gradients(cost_matrix, x, y)
    assert cost.shape == (0, 2, 9, 9) and [g.shape for g in grads] == [x.shape, y.shape]
    assert solve(torch.empty(0, 3, 4)).transport_cost.shape == (0,)


def test_in_any_batch_the_same_bits(real_gpu: None) -> None:
    """More problems than the device runs at once, and one alone."""
    x, y = features(700, 16, 7, 7, grad=True), features(700, 16, 7, 7, grad=True)
    whole = call(x, y)
    for first, last in ((0, 1), (333, 334), (600, 700)):
        part = call(*(t[first:last].detach().requires_grad_() for t in (x, y)))
        assert same(part, [t[first:last] for t in whole])


@pytest.mark.every_strategy
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_same_bits_on_a_side_stream(shape: tuple[int, ...], real_gpu: None) -> None:
    x, y = features(*shape, grad=True), features(*shape, grad=True)
    expected = call(x, y)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    for _ in range(3):
        with torch.cuda.stream(side):
            found = call(x, y)
        side.synchronize()
        assert same(found, expected)


def test_a_side_stream_is_waited_for_by_nobody_else(real_gpu: None) -> None:
    """Work is put on the stream that is current: one that waits holds up only its own."""
    x, y = features(4, 40, 7, 7, grad=True), features(4, 40, 7, 7)
    expected = call(x, y)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        call(x, y)  # memory of this stream
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(2_000_000_000)
        asleep = side.record_event()
        late = call(x, y)
    now = call(x, y)
    torch.cuda.current_stream().synchronize()
    assert not asleep.query()
    side.synchronize()
    assert same(late, expected) and same(now, expected)


@pytest.mark.every_strategy
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_graph_replay_has_the_bits_of_eager(shape: tuple[int, ...], real_gpu: None) -> None:
    x, y = features(*shape, grad=True), features(*shape, grad=True)
    a = weights(shape[0], shape[2] * shape[3], grad=True)
    replay, written = capture(lambda: call(x, y, a))
    for _ in range(3):
        with torch.no_grad():
            x.copy_(features(*shape))
            y.copy_(features(*shape))
        replay()
        found = [t.clone() for t in written]
        assert same(found, call(x, y, a))


@pytest.mark.every_strategy
def test_graph_of_given_costs(real_gpu: None) -> None:
    cost = torch.rand(3, 30, 31, requires_grad=True)

    def both() -> list[Tensor]:
        result = solve(cost)
        return [result.transport_cost.detach(), *torch.autograd.grad(result.transport_cost.sum(), cost)]

    replay, written = capture(both)
    with torch.no_grad():
        cost.copy_(torch.rand(3, 30, 31))
    replay()
    found = [t.clone() for t in written]
    assert same(found, both())


def test_graph_of_cost_matrices(real_gpu: None) -> None:
    x, y = features(2, 9, 6, 6, grad=True), features(2, 9, 5, 6, grad=True)

    def both() -> list[Tensor]:
        cost = cost_matrix(x, y, patch_size=2, metric="cosine")
        return [cost.detach(), *torch.autograd.grad(cost.square().sum(), (x, y))]

    replay, written = capture(both)
    with torch.no_grad():
        x.copy_(features(2, 9, 6, 6))
    replay()
    found = [t.clone() for t in written]
    assert same(found, both())


@pytest.mark.every_strategy
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_threads_on_streams_of_their_own(shape: tuple[int, ...], real_gpu: None) -> None:
    problems = [(features(*shape, grad=True), features(*shape)) for _ in range(2)]
    expected = [call(*pair) for pair in problems]
    torch.cuda.synchronize()
    wrong: list[str] = []

    def work(index: int) -> None:
        try:
            stream = torch.cuda.Stream()
            for _ in range(20):
                with torch.cuda.stream(stream):
                    found = call(*problems[index])
                stream.synchronize()
                if not same(found, expected[index]):
                    wrong.append(f"thread {index}: other bits")
        except Exception as error:
            wrong.append(f"thread {index}: {error}")

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_fullgraph(backend: str) -> None:
    torch.compiler.reset()
    x, y, a = features(2, 5, 3, 3, grad=True), features(2, 3, 5, 4, 4), weights(2, 3, 3, grad=True)

    def loss(x: Tensor, y: Tensor, a: Tensor) -> Tensor:
        return emd_l2(2 * x, y, student_weight=a)

    eager = value_and_gradients(loss, x, y, a)
    compiled = value_and_gradients(torch.compile(loss, fullgraph=True, backend=backend), x, y, a)
    torch.testing.assert_close(compiled, eager, rtol=1e-6, atol=1e-8)


def test_second_device(real_gpu: None) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    x, y = features(4, 40, 7, 7, grad=True), features(4, 40, 7, 7, grad=True)
    expected = call(x, y)
    found = call(*(t.detach().to("cuda:1").requires_grad_() for t in (x, y)))
    assert torch.cuda.current_device() == 0
    assert all(t.device.index == 1 for t in found)
    if torch.cuda.get_device_name(0) == torch.cuda.get_device_name(1):
        assert same([t.to("cuda:0") for t in found], expected)
    with pytest.raises(ValueError, match="cuda:"):
        emd_l2(x, y.detach().to("cuda:1"))


def test_tensors_on_different_devices_are_refused(real_gpu: None) -> None:
    x, y = features(2, 4, 3, 3), features(2, 4, 3, 3)
    for ours, theirs in ((x, y.cpu()), (x.cpu(), y)):
        for function in (emd_l2, cost_matrix, solve_sample):
            with pytest.raises(ValueError, match=f"on {ours.device}, where the others are, got a tensor on"):
                function(ours, theirs)
    with pytest.raises(ValueError, match="expected student_weight on cuda:0"):
        emd_l2(x, y, student_weight=torch.ones(2, 9, device="cpu"))
    with pytest.raises(ValueError, match="expected a on cuda:0"):
        solve(torch.rand(2, 3, 4), torch.ones(3, device="cpu"))


@pytest.mark.every_strategy
def test_host_does_not_wait(real_gpu: None) -> None:
    """Neither where torch can see it nor in a launch: the call returns while the stream still sleeps."""
    for shape in SHAPES.values():
        x, y, a = features(*shape, grad=True), features(*shape, grad=True), weights(shape[0], shape[2] * shape[3])
        call(x, y, a.requires_grad_())  # memory and what is asked for once
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            torch.cuda._sleep(1_000_000_000)
            asleep = torch.cuda.current_stream().record_event()
            call(x, y, a)
            returned_first = not asleep.query()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
        assert returned_first


def test_nothing_is_cast_down_under_autocast_of_the_gpu(real_gpu: None) -> None:
    x, y = features(2, 8, 3, 3), features(2, 8, 3, 3)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        inside = emd_l2(x, y)
    assert torch.equal(inside, emd_l2(x, y))


def test_memory_beside_inputs_and_gradients_is_that_of_the_potentials(real_gpu: None) -> None:
    batch, side, channels = 128, 7, 512
    x, y = features(batch, channels, side, side, grad=True), features(batch, channels, side, side, grad=True)
    call(x, y)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = torch.autograd.grad(emd_l2(x, y), (x, y))
    gradients = sum(t.numel() * t.element_size() for t in found)
    extra = torch.cuda.max_memory_allocated() - before - gradients
    vectors = 4 * batch * 2 * side * side  # bytes of one pair of potentials
    matrices = 4 * batch * side**4
    # Potentials, a few scalars a problem, and what the allocator rounds up.
    assert extra <= 2 * vectors + 64 * 512 < matrices


def test_build_info_names_the_release(real_gpu: None) -> None:
    info = sfr_ext.build_info()
    assert info["cuda"] and info["cuda_version"] and info["why_no_cuda"] is None
    assert any(code.startswith(("sm_", "compute_")) for code in info["cuda_archs"])
