"""The meeting of blocks under the memory model of the PTX ISA, as compiled, and with each part of it taken away."""

from __future__ import annotations

import pytest
from gpu_model.memory_model import Event, Thread, events_of, meeting_of_blocks, unordered, wanted, weakened, without

FENCE = Event("fence")
ADD = Event("add", "counter", strong=True)


def waits(target: int, **what: bool) -> Event:
    return Event("read", "counter", **{"strong": True, "acquire": True, **what}, until=target)


def broken(meeting: tuple[Event, ...], blocks: int = 2, **options: tuple[bool, bool]) -> list[tuple[str, str]]:
    return unordered(meeting_of_blocks(meeting, blocks, **options), wanted(blocks))


def message(read_acquires: bool, fence_before: bool, fence_after: bool) -> list[tuple[str, str]]:
    """Message passing by a flag: the textbook's program."""
    writer = [Event("write", "x", name="write"), *[FENCE] * fence_before, ADD]
    reader = [waits(1, acquire=read_acquires), *[FENCE] * fence_after, Event("read", "x", name="read")]
    return unordered([Thread(0, tuple(writer)), Thread(1, tuple(reader))], [("write", "read")])


@pytest.mark.parametrize(
    ("acquires", "before", "after", "ordered"),
    [(1, 1, 1, 1), (1, 1, 0, 1), (0, 1, 1, 1), (0, 1, 0, 0), (1, 0, 1, 0), (1, 0, 0, 0), (0, 0, 0, 0)],
)
def test_message_passing(acquires, before, after, ordered):
    assert (message(bool(acquires), bool(before), bool(after)) == []) == bool(ordered)


def test_chain_of_additions_carries_what_the_first_released():
    """The reader sees the last addition alone, and by it what was before the first."""
    threads = [
        Thread(0, (Event("write", "x", name="write"), FENCE, ADD)),
        Thread(1, (ADD,)),
        Thread(2, (waits(2), Event("read", "x", name="read"))),
    ]
    assert unordered(threads, [("write", "read")]) == []


def test_weak_flag_orders_nothing():
    threads = [
        Thread(0, (Event("write", "x", name="write"), FENCE, ADD)),
        Thread(1, (waits(1, strong=False, acquire=False), FENCE, Event("read", "x", name="read"))),
    ]
    assert unordered(threads, [("write", "read")]) == [("write", "read")]


def test_program_without_an_end():
    with pytest.raises(ValueError, match="no execution"):
        unordered([Thread(0, (ADD, waits(3), Event("read", "x", name="read")))], [("read", "read")])


@pytest.fixture(scope="module")
def meeting(intrinsics) -> tuple[Event, ...]:
    """arrive_and_wait as it is compiled, of two blocks."""
    return events_of(intrinsics["meeting"], "counter", 2)


def test_meeting_is_compiled_to_what_it_says(meeting):
    assert [event.kind for event in meeting] == ["fence", "add", "read", "fence"]
    assert meeting[2].acquire and all(event.wide for event in meeting)


@pytest.mark.parametrize("blocks", [2, 3])
def test_meeting_orders_all_before_it_before_all_after_it(intrinsics, blocks):
    assert broken(events_of(intrinsics["meeting"], "counter", blocks), blocks) == []


def test_without_the_fence_before_a_reader_may_miss_what_was_written(meeting):
    found = broken(without(meeting, 0))
    assert ("block 0 writes", "block 1 reads x0") in found and ("block 1 writes", "block 0 reads x1") in found


def test_the_fence_after_stands_beside_a_read_that_acquires(meeting):
    """Either would do; without both nothing is ordered."""
    assert broken(without(meeting, 3)) == []
    assert broken(weakened(meeting, 2, acquire=False)) == []
    assert broken(without(weakened(meeting, 2, acquire=False), 3)) != []


@pytest.mark.parametrize("index", [0, 2])
def test_scope_of_a_block_orders_nothing_between_blocks(meeting, index):
    alone = without(meeting, 3)  # where nothing stands in
    assert broken(weakened(alone, index, wide=False)) != []


def test_addition_that_is_not_atomic_is_no_meeting(meeting):
    assert broken(weakened(meeting, 1, strong=False)) != []


@pytest.mark.parametrize("barriers", [(False, True), (True, False), (False, False)])
def test_without_a_barrier_of_the_block_other_threads_are_left_out(meeting, barriers):
    """Team::grid_barrier has one before and one after the thread that meets the other blocks."""
    assert broken(meeting, barriers=barriers) != []


def test_two_meetings_in_a_row(intrinsics):
    """The counter goes on: the second meeting waits for twice as many."""
    first, second = (events_of(intrinsics["meeting"], "counter", count) for count in (2, 4))
    assert broken((*first, *second)) == []
    # The second's fence before is what the first's after it is, too.
    assert broken((*without(first, 0), *without(second, 0))) == []
    assert broken((*without(without(first, 3), 0), *without(second, 0))) != []
