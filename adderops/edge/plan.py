"""Where each value lies in the arena: offsets, values in place of others, scratch.

A value lives from the layer that writes it to the last that reads it; scratch during one layer. A layer may write its
output over a value that dies there:

    elementwise layers, depthwise layers, a residual   at no cost
    adder convolutions over their input                with a ring of input rows in scratch, if that shrinks the arena

Buffers are placed one after the other, the largest first, each as low as possible; then some orders are tried in which
one buffer comes first, until the arena reaches its lower bound, the most bytes that live at once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

ALIGNMENT = 4


@dataclass(frozen=True)
class Step:
    """One layer for the planner.

    Attributes:
        reads: names of the values that it reads.
        writes: name of the value that it writes; None for the result, which lies elsewhere.
        scratch: bytes.
        over: names of the values, if they die here, that it may overwrite from their first byte on at no cost.
        ring: bytes of scratch with which it may overwrite `input`; None if it may not.
        input: name of the value of the ring.
    """

    reads: tuple[str, ...]
    writes: str | None
    scratch: int = 0
    over: tuple[str, ...] = ()
    ring: int | None = None
    input: str = ""


@dataclass(frozen=True)
class Plan:
    """Offsets in bytes from an aligned start.

    Attributes:
        size: of the arena.
        bound: the most bytes that live during one step; no plan with the same values in place is smaller.
        offsets: by name of the value.
        scratch: offsets by step.
        rings: steps that overwrite their input with a ring.
        live: bytes that live during each step.
    """

    size: int
    bound: int
    offsets: Mapping[str, int]
    scratch: tuple[int, ...]
    rings: frozenset[int]
    live: tuple[int, ...]


@dataclass
class _Part:
    """A value, or the scratch of a step: its bytes, and the first and last step of its life."""

    name: str
    size: int
    first: int
    last: int


@dataclass
class _Buffer:
    """Parts that begin at one offset."""

    parts: list[_Part]

    @property
    def size(self) -> int:
        return max(part.size for part in self.parts)


def plan(sizes: Mapping[str, int], steps: Sequence[Step], first: str) -> Plan:
    """Returns the smallest arena that it finds.

    Args:
        sizes: of the values, in bytes.
        steps: in the order of computation.
        first: name of the value that exists before the first step.

    >>> steps = [Step(("a",), "b"), Step(("b",), "c", over=("b",)), Step(("c",), None)]
    >>> found = plan({"a": 8, "b": 16, "c": 8}, steps, "a")
    >>> found.size, found.bound, dict(found.offsets)
    (24, 24, {'b': 0, 'c': 0, 'a': 16})
    """
    possible = {i for i, step in enumerate(steps) if step.ring is not None}
    best = _placed(sizes, steps, first, frozenset())
    while True:  # rings where most bytes live, as long as the arena shrinks
        fullest = {i for i, live in enumerate(best.live) if live == best.bound}
        found = _placed(sizes, steps, first, best.rings | (fullest & possible))
        if found.size >= best.size:
            break
        best = found
    for i in sorted(best.rings):
        found = _placed(sizes, steps, first, best.rings - {i})
        if found.size <= best.size:
            best = found
    return best


def _placed(sizes: Mapping[str, int], steps: Sequence[Step], first: str, rings: frozenset[int]) -> Plan:
    lives = _lives(sizes, steps, first)
    buffers, used = _buffers(lives, steps, rings)
    scratch = [aligned(step.scratch + (step.ring or 0 if i in used else 0)) for i, step in enumerate(steps)]
    buffers += [_Buffer([_Part(f"{i} scratch", size, i, i)]) for i, size in enumerate(scratch) if size]
    live = _live(buffers, len(steps))
    bound = max(live, default=0)
    order = sorted(buffers, key=lambda b: (-b.size, b.parts[0].first))
    size, offsets = _offsets(order)
    for i in range(len(order)):
        if size == bound:
            break
        other = [order[i], *order[:i], *order[i + 1 :]]
        found = _offsets(other)
        if found[0] < size:
            size, offsets = found
    return Plan(
        size,
        bound,
        {name: offset for name, offset in offsets.items() if name in sizes},
        tuple(offsets.get(f"{i} scratch", 0) for i in range(len(steps))),
        frozenset(used),
        tuple(live),
    )


def aligned(size: int) -> int:
    """Returns a size rounded up to whole words."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def _lives(sizes: Mapping[str, int], steps: Sequence[Step], first: str) -> dict[str, _Part]:
    lives = {first: _Part(first, aligned(sizes[first]), 0, 0)}
    for i, step in enumerate(steps):
        for name in step.reads:
            lives[name].last = i
        if step.writes is not None:
            lives[step.writes] = _Part(step.writes, aligned(sizes[step.writes]), i, i)
    return lives


def _buffers(
    lives: Mapping[str, _Part], steps: Sequence[Step], rings: frozenset[int]
) -> tuple[list[_Buffer], set[int]]:
    """Returns the values that begin at one offset, and the steps whose ring is in use."""
    of = {name: _Buffer([part]) for name, part in lives.items()}
    used = set()
    for i, step in enumerate(steps):
        if step.writes is None:
            continue
        over = [step.input] if i in rings and step.ring is not None else list(step.over)
        for name in over:
            mine = of[name]
            # what shares the offset must have ended before, and a value is overwritten once
            if lives[name].last != i or any(part.last >= i for part in mine.parts if part.name != name):
                continue
            mine.parts.append(lives[step.writes])
            of[step.writes] = mine
            if i in rings:
                used.add(i)
            break
    return list({id(buffer): buffer for buffer in of.values()}.values()), used


def _live(buffers: Sequence[_Buffer], steps: int) -> list[int]:
    return [
        sum(max((p.size for p in b.parts if p.first <= i <= p.last), default=0) for b in buffers) for i in range(steps)
    ]


def _offsets(order: Sequence[_Buffer]) -> tuple[int, dict[str, int]]:
    """Places buffers as low as possible, one after the other; returns the size of the arena and the offsets."""
    placed: list[tuple[int, _Part]] = []
    for buffer in order:
        taken = sorted(
            {
                (offset - part.size + 1, offset + other.size)  # the buffer's offsets at which they would overlap
                for offset, other in placed
                for part in buffer.parts
                if part.first <= other.last and other.first <= part.last
            }
        )
        at = 0
        for low, high in taken:
            if low <= at < high:
                at = high
        placed += [(at, part) for part in buffer.parts]
    size = max((offset + part.size for offset, part in placed), default=0)
    return size, {part.name: offset for offset, part in placed}
