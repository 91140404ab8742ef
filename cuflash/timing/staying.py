"""Blocks that stay: what a block does for a tile of queries beside the trips of its loop over tiles of keys.

`single_tile_traces(function, traces)` returns, for each role, one trip through the loop around its loop: begin, the one tile of keys that no tile of queries can do without, end; with
`shared` of a tile whose keys blocks share out, with the storing of a part and the merging of one; None where there is
no such thing.
On the model of an SM this takes, less a trip of the steady state, what a tile of queries costs beside its trips, with whatever the warps of one tile overlap with those of the next.
"""

from __future__ import annotations

from collections.abc import Sequence

from cuflash.timing.control_flow import Loop, Trace, find_loops, is_matrix, steady_trace
from cuflash.timing.roles import announcements, is_arrival
from cuflash.timing.sass import Function, Instruction


def single_tile_traces(function: Function, traces: Sequence[Trace], *, shared: bool = False) -> tuple[Trace, ...] | None:
    """The traces of a tile of queries with one tile of keys; None where blocks do not stay."""
    around = [_around(function, trace.loop) for trace in traces]
    found = []
    for role, (trace, loop) in enumerate(zip(traces, around, strict=True)):
        if loop is None:
            return None
        if role:
            avoided = _announced_twice(function, trace.loop, loop)
        else:
            parts = _parts(function, loop)
            if shared and not parts:
                return None
            avoided = _other_tiles(function, loop) | (frozenset() if shared else parts)
        found.append(steady_trace(function, loop, avoided=avoided, stores=not role))
    return tuple(found)


def _around(function: Function, inner: Loop) -> Loop | None:
    """The outermost loop around another one."""
    return next((loop for loop in find_loops(function) if loop.holds(inner)), None)


def _other_tiles(function: Function, around: Loop) -> frozenset[int]:
    """Loops over tiles of keys: those with products, of whole and of masked tiles, and those that say of tiles that they are done with them."""
    loops = [loop for loop in find_loops(function) if around.holds(loop)]
    bodies = [(loop, function[loop.head : loop.last + 1]) for loop in loops]
    return frozenset(
        index
        for loop, body in bodies
        if any(map(is_matrix, body)) or any(map(is_arrival, body))
        for index in range(loop.head, loop.last + 1)
    )


def _parts(function: Function, around: Loop) -> frozenset[int]:
    """What blocks hand on to each other in global memory: parts of tiles whose keys they share out."""
    return frozenset(index for index in range(around.head, around.last + 1) if _is_of_part(function[index]))


def _is_of_part(instruction: Instruction) -> bool:
    return instruction.base in ("LDG", "STG") and ".128" in instruction.opcode and ".STRONG.GPU" in instruction.opcode


def _announced_twice(function: Function, inner: Loop, around: Loop) -> frozenset[int]:
    """Copies in the loop that stand before it, too: those for its next trip."""
    path = steady_trace(function, around)
    before: set[int] = set()
    twice: set[int] = set()
    for index, barriers in announcements(function, path):
        if not inner.head <= index <= inner.last:
            before |= barriers
        elif barriers & before:
            twice.add(index)
    return frozenset(twice)
