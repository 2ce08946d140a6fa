"""Basic blocks of a kernel, its loops, and the shortest way through a loop that does a given amount of work.

Which branches a warp takes depends on data that machine code does not show. But one knows what a pass of a hot loop
has to do: so many multiply-adds of this source line, so many barriers. The path is taken to be the one with the fewest
instructions that does exactly that: loops that the compiler unrolled, their remainders, and what is skipped when it
does not apply (slow paths of divisions, the other metric) then need no description. It flatters, if anything.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from .machine_code import Instruction, Kernel


class NoPath(Exception):
    """Nothing in this loop does the work."""


@dataclass(frozen=True)
class Block:
    begin: int  # instructions [begin, end) of the kernel
    end: int
    after: tuple[int, ...]  # blocks that may follow


@dataclass(frozen=True)
class Loop:
    head: int
    blocks: frozenset[int]


class Flow:
    """The control flow of one kernel."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.code = kernel.code
        self.index = {instruction.address: k for k, instruction in enumerate(self.code)}
        self.blocks = self._cut()
        self.at = {block.begin: k for k, block in enumerate(self.blocks)}
        self.loops = self._find_loops()

    def block_of(self, label: str) -> int:
        return self.at[self.index[self.kernel.labels[label]]]

    def instructions(self, blocks: Iterable[int]) -> Iterable[Instruction]:
        for k in blocks:
            yield from self.code[self.blocks[k].begin : self.blocks[k].end]

    def _goes_to(self, k: int) -> tuple[list[int], bool]:
        """Where instruction k may branch to, and whether the next one may follow."""
        instruction = self.code[k]
        name = instruction.name
        ends = name in ("EXIT", "RET", "BRX") and not instruction.guarded
        if name not in ("BRA", "BRX") or ".DIV" in instruction.opcode:  # DIV: where lanes have parted, and do not
            return [], not ends
        # A branch may have a second condition in its operands, as BRA !P0, `(.L_x_1).
        always = not instruction.guarded and instruction.text.split("`")[0].strip() in ("BRA", "BRA.U")
        return [self.index[self.kernel.labels[label]] for label in instruction.targets], not (always or ends)

    def _cut(self) -> list[Block]:
        starts = {0} | {self.index[a] for a in self.kernel.labels.values() if a in self.index}
        for k in range(len(self.code)):
            targets, follows = self._goes_to(k)
            if targets or not follows:
                starts.update([*targets, k + 1])
        order = sorted(start for start in starts if start < len(self.code))
        at = {start: n for n, start in enumerate(order)}
        blocks = []
        for begin, end in zip(order, [*order[1:], len(self.code)], strict=True):
            targets, follows = self._goes_to(end - 1)
            after = [at[t] for t in targets] + ([at[end]] if follows and end in at else [])
            blocks.append(Block(begin, end, tuple(dict.fromkeys(after))))
        return blocks

    def _find_loops(self) -> list[Loop]:
        """Natural loops: a back edge goes to a block that every way to its source leads through."""
        before: list[list[int]] = [[] for _ in self.blocks]
        for k, block in enumerate(self.blocks):
            for n in block.after:
                before[n].append(k)
        entries = {0} | {self.at[self.index[a]] for label, a in self.kernel.labels.items() if not label.startswith(".L")
                         and a in self.index}  # fmt: skip
        order = self._post_order(entries)
        rank = {k: n for n, k in enumerate(reversed(order))}
        parent: dict[int, int] = {}  # immediate dominators; -1 above the entries

        def common(a: int, b: int) -> int:
            while a != b:
                if a == -1 or b == -1:
                    return -1
                if rank[a] > rank[b]:
                    a = parent[a]
                else:
                    b = parent[b]
            return a

        changed = True
        while changed:
            changed = False
            for k in reversed(order):
                known = [p for p in before[k] if p in parent]
                new = -1
                if k not in entries and known:
                    new = known[0]
                    for p in known[1:]:
                        new = common(new, p)
                if parent.get(k) != new:
                    parent[k], changed = new, True

        def dominates(a: int, b: int) -> bool:
            while b != -1 and rank[b] > rank[a]:
                b = parent[b]
            return a == b

        bodies: dict[int, set[int]] = {}
        for k in order:
            for head in self.blocks[k].after:
                if head in rank and dominates(head, k):
                    body = bodies.setdefault(head, {head})
                    ahead = [k]
                    while ahead:
                        n = ahead.pop()
                        if n not in body:
                            body.add(n)
                            ahead += [p for p in before[n] if p in rank]
        return [Loop(head, frozenset(body)) for head, body in bodies.items()]

    def _post_order(self, entries: Iterable[int]) -> list[int]:
        seen: set[int] = set()
        order: list[int] = []
        for entry in sorted(entries):
            stack = [(entry, iter(self.blocks[entry].after))] if entry not in seen else []
            seen.add(entry)
            while stack:
                k, rest = stack[-1]
                n = next((n for n in rest if n not in seen), None)
                if n is None:
                    order.append(k)
                    stack.pop()
                else:
                    seen.add(n)
                    stack.append((n, iter(self.blocks[n].after)))
        return order

    def shortest(self, loop: Loop, matches: list[Callable[[Instruction], bool]], times: list[int]) -> list[int]:
        """Blocks of the shortest pass through the loop on which exactly times[d] instructions fit matches[d]."""
        work = {k: tuple(sum(map(match, self.instructions([k]))) for match in matches) for k in loop.blocks}
        ahead = {k: self._still_ahead(k, loop, work) for k in loop.blocks}
        goal, start = tuple(times), work[loop.head]
        heap = [(self._length(loop.head), loop.head, start)]
        came: dict[tuple[int, tuple[int, ...]], tuple[int, tuple[int, ...]] | None] = {(loop.head, start): None}
        done: set[tuple[int, tuple[int, ...]]] = set()
        while heap:
            length, k, so_far = heapq.heappop(heap)
            if (k, so_far) in done:
                continue
            done.add((k, so_far))
            for n in self.blocks[k].after:
                if n == loop.head:
                    if so_far == goal:
                        return self._trace(came, (k, so_far))
                    continue
                if n not in loop.blocks:
                    continue
                then = tuple(map(sum, zip(so_far, work[n], strict=True)))
                if any(
                    have > want or (have < want and not more)
                    for have, want, more in zip(then, goal, ahead[n], strict=True)
                ):
                    continue
                if (n, then) not in came:
                    came[n, then] = (k, so_far)
                    heapq.heappush(heap, (length + self._length(n), n, then))
        raise NoPath(f"no pass through the loop at {self.code[self.blocks[loop.head].begin].address:#x} does the work")

    def _length(self, k: int) -> int:
        # A call is a long way: whoever can go around one does.
        calls = sum(instruction.name == "CALL" for instruction in self.instructions([k]))
        return self.blocks[k].end - self.blocks[k].begin + 100 * calls

    def _still_ahead(self, k: int, loop: Loop, work: dict[int, tuple[int, ...]]) -> tuple[bool, ...]:
        """Which work can still be done after block k, in this pass."""
        seen, ahead = set(), [n for n in self.blocks[k].after if n in loop.blocks and n != loop.head]
        while ahead:
            n = ahead.pop()
            if n not in seen:
                seen.add(n)
                ahead += [m for m in self.blocks[n].after if m in loop.blocks and m != loop.head]
        return tuple(any(work[n][d] for n in seen) for d in range(len(work[k])))

    @staticmethod
    def _trace(came: dict, state: tuple | None) -> list[int]:
        path = []
        while state is not None:
            path.append(state[0])
            state = came[state]
        return path[::-1]
