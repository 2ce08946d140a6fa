"""Whether a row of fences and barriers orders memory, by the memory consistency model of the PTX ISA.

All executions of a small program are gone through: every order of the atomic additions to each counter, every write
that each read could return. Of one execution the model says which operations come before which in *causality order*:
along a thread's program order, across a barrier of a block, and from a release pattern to an acquire pattern that reads
from it, directly or by a chain of atomic operations. A program is ordered where that holds in every execution for all
pairs that are asked about; where it does not, a GPU may show the reader memory as it was before.

Simplified: one scope (a fence or an operation of a block's scope orders nothing between blocks), no mixed sizes, no
proxies. Fences of sc and acq_rel strength order the same here, since no operation is a race on two locations.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from .ptx import Entry


@dataclass(frozen=True)
class Event:
    """One operation of a thread."""

    kind: str  # read, write, add (atomic, 1), fence, barrier
    place: str = ""  # of memory, or a barrier's name
    strong: bool = False  # relaxed or stronger; else weak
    release: bool = False
    acquire: bool = False
    wide: bool = True  # of the GPU's scope; else of the block's
    until: int | None = None  # of a read that is repeated: the value that ends it
    name: str = ""  # to ask about


@dataclass(frozen=True)
class Thread:
    block: int
    events: tuple[Event, ...]


Node = tuple[int, int]  # thread, event


def events_of(entry: Entry, counter: str, target: int) -> tuple[Event, ...]:
    """What a kernel does to memory: fences, atomic additions, and the loop that reads until `target` is reached."""
    found = []
    for operation in entry.code:
        parts = operation.parts
        wide = "cta" not in parts
        if parts[0] == "membar":
            found.append(Event("fence", wide=operation.name != "membar.cta"))
        elif parts[0] == "fence":
            found.append(Event("fence", wide=wide))
        elif parts[0] == "atom" or parts[0] == "red":
            release, acquire = (bool({way, "acq_rel"} & set(parts)) for way in ("release", "acquire"))
            found.append(Event("add", counter, True, release, acquire, wide))
        elif parts[0] == "ld" and "param" not in parts:
            acquire = "acquire" in parts
            found.append(
                Event("read", counter, acquire or "relaxed" in parts, acquire=acquire, wide=wide, until=target)
            )
        elif parts[0] == "st":
            found.append(Event("write", re.sub(r"\W", "", operation.operands[0])))
        elif parts[0] in ("bar", "barrier"):
            found.append(Event("barrier", operation.operands[0]))
    return tuple(found)


def executions(threads: list[Thread]) -> Iterator[dict[Node, Node]]:
    """For every order of the additions: which addition each addition and each waiting read returns the result of."""
    additions: dict[str, list[Node]] = {}
    reads: list[tuple[Node, Event]] = []
    for t, thread in enumerate(threads):
        for k, event in enumerate(thread.events):
            if event.kind == "add":
                additions.setdefault(event.place, []).append((t, k))
            elif event.kind == "read" and event.until is not None:
                reads.append(((t, k), event))
    places = list(additions)
    for orders in itertools.product(*(itertools.permutations(additions[place]) for place in places)):
        # The additions of one thread to one place keep their order.
        if any(a[0] == b[0] and a[1] > b[1] for order in orders for a, b in itertools.combinations(order, 2)):
            continue
        of = dict(zip(places, orders, strict=True))
        before = {b: a for order in orders for a, b in itertools.pairwise(order)}
        # After n additions the counter stands at n.
        choices = [of[event.place][event.until - 1 :] for _, event in reads if event.until is not None]
        for chosen in itertools.product(*choices):
            from_ = dict(before)
            from_.update({node: source for (node, _), source in zip(reads, chosen, strict=True)})
            # A thread does not read from before what it has itself added.
            if all(_coherent(node, source, of, threads) for node, source in from_.items()):
                yield from_


def _coherent(node: Node, source: Node, of: dict[str, tuple[Node, ...]], threads: list[Thread]) -> bool:
    order = of[threads[node[0]].events[node[1]].place]
    own = [k for k, other in enumerate(order) if other[0] == node[0] and other[1] < node[1]]
    return not own or order.index(source) >= own[-1]


def _patterns(thread: Thread, release: bool) -> Iterator[tuple[int, int]]:
    """Release patterns (first, the write) or acquire patterns (the read, last), as indices of events."""
    events = thread.events
    for k, event in enumerate(events):
        touches = event.kind == "add" or event.kind == ("write" if release else "read")
        if not touches or not event.strong or not event.wide:
            continue
        if event.release if release else event.acquire:
            yield k, k
        for f, fence in enumerate(events):
            if fence.kind == "fence" and fence.wide and (f < k if release else f > k):
                yield (f, k) if release else (k, f)


def causality(threads: list[Thread], reads_from: dict[Node, Node]) -> dict[Node, set[Node]]:
    """All operations that come after each."""
    after: dict[Node, set[Node]] = {
        (t, k): set() for t, thread in enumerate(threads) for k in range(len(thread.events))
    }
    for t, thread in enumerate(threads):
        for k in range(len(thread.events) - 1):
            after[t, k].add((t, k + 1))
    # The n-th barrier of a name, of all threads of the block: what is before any of them is before what follows any.
    for (s, one), (t, other) in itertools.permutations(enumerate(threads), 2):
        if one.block != other.block:
            continue
        mine = [k for k, event in enumerate(one.events) if event.kind == "barrier"]
        theirs = [k for k, event in enumerate(other.events) if event.kind == "barrier"]
        for a, b in zip(mine, theirs, strict=True):
            if b + 1 < len(other.events):
                after[s, a].add((t, b + 1))
    # What each read sees by a chain of atomic operations.
    for t, thread in enumerate(threads):
        for read, last in _patterns(thread, release=False):
            seen, node = set(), reads_from.get((t, read))
            while node is not None:
                seen.add(node)
                node = reads_from.get(node)
            for s, other in enumerate(threads):
                for first, write in _patterns(other, release=True):
                    if (s, write) in seen and s != t:
                        after[s, first].add((t, last))
    for node in list(after):
        ahead = list(after[node])
        while ahead:
            for n in after[ahead.pop()]:
                if n not in after[node]:
                    after[node].add(n)
                    ahead.append(n)
    return after


def unordered(threads: list[Thread], pairs: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Pairs of names of which, in some execution, the first does not come before the second.

    Raises:
        ValueError: no execution comes to an end.
    """
    at = {event.name: (t, k) for t, thread in enumerate(threads) for k, event in enumerate(thread.events) if event.name}
    pairs, found, any_ = list(pairs), [], False
    for reads_from in executions(threads):
        any_ = True
        after = causality(threads, reads_from)
        found += [pair for pair in pairs if at[pair[1]] not in after[at[pair[0]]] and pair not in found]
    if not any_:
        raise ValueError("no execution of this program comes to an end")
    return found


def meeting_of_blocks(
    meeting: tuple[Event, ...], blocks: int, barriers: tuple[bool, bool] = (True, True)
) -> list[Thread]:
    """Blocks of two threads: one writes, the other goes through the meeting, then the one reads what others wrote.

    `barriers`: whether the block's threads meet before and after (Team::grid_barrier does).
    """
    threads = []
    for b in range(blocks):
        around = [(Event("barrier", "block"),) if there else () for there in barriers]
        others = [other for other in range(blocks) if other != b]
        # Read before, too: what is read before the meeting must not be what is written after it.
        work = (
            *(Event("read", f"z{other}", name=f"block {b} reads z{other} before") for other in others),
            Event("write", f"x{b}", name=f"block {b} writes"),
        )
        then = (
            *(Event("read", f"x{other}", name=f"block {b} reads x{other}") for other in others),
            Event("write", f"z{b}", name=f"block {b} writes z{b} after"),
        )
        threads.append(Thread(b, (*around[0], *meeting, *around[1])))
        threads.append(Thread(b, (*work, *around[0], *around[1], *then)))
    return threads


def wanted(blocks: int) -> list[tuple[str, str]]:
    pairs = []
    for b, other in itertools.permutations(range(blocks), 2):
        pairs.append((f"block {other} writes", f"block {b} reads x{other}"))
        pairs.append((f"block {b} reads z{other} before", f"block {other} writes z{other} after"))
    return pairs


def without(meeting: tuple[Event, ...], index: int) -> tuple[Event, ...]:
    return meeting[:index] + meeting[index + 1 :]


def weakened(meeting: tuple[Event, ...], index: int, **what: Any) -> tuple[Event, ...]:
    return (*meeting[:index], replace(meeting[index], **what), *meeting[index + 1 :])
