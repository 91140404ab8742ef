"""Loops of a function, and the path that a warp takes through one of them most of the time.

`find_loops` lists all loops. `tile_loop` picks the one that a kernel's time goes into: the innermost that has both the matrix products and the exponentials.
`steady_trace` returns the instructions that one trip through a loop executes in the steady state.

A loop is an interval of addresses from the target of a backward branch to that branch, as compilers lay loops out. Which way branches go is not
known from the code. The steady state is taken to be the path with the most work (products, exponentials, copies, barriers, reads by matrix), and of
those the shortest; beside products of warpgroups, which read shared memory themselves, reads by matrix are of masks and no such work. Where a warp votes,
it is that of warps of which no lane asks for the other, and numbers are not stored to global memory one by one
where there is a way around, since that is what a kernel in float32 does with its outputs every thousand keys. So copies are made, masks are not applied, and
slow paths for rare cases are left aside. Of a tile that a mask cuts (`masked`) it is the path that selects most scores by what is no comparison of floats, and
loads most of a mask that was copied, among those with the most work.

Inner loops are run as often as their counter says, if it starts, steps and ends at constants. If it does not, the trips of the inner loops with matrix products are
whatever makes up the number of products that the caller expects.
"""

from __future__ import annotations

import re
import struct
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from cuflash.errors import UnsupportedError
from cuflash.timing.sass import Function, Instruction


def opcodes(text: str) -> frozenset[str]:
    """A set of opcodes, written with spaces between them."""
    return frozenset(text.split())


MATRIX = opcodes("HMMA IMMA DMMA BMMA HGMMA IGMMA QGMMA")
WGMMA = opcodes("HGMMA IGMMA QGMMA BGMMA")
_WORK = opcodes("LDGSTS LDSM BAR RED REDG ATOMG UTMALDG UBLKCP")
_ENDS = opcodes("BRA EXIT RET BRX JMP BREAK KILL")
_AVOIDED = 1000  # work that makes up for one instruction that is to be avoided
_COLD_LOOP = 500  # instructions that a loop without any work counts as, so that a path around it is taken


@dataclass(frozen=True)
class Loop:
    """The instructions from `head` to `last`, both included, as indices into the function.

    Attributes:
        head: what the backward branch goes to.
        last: the backward branch, the last one if there are several.
        trips: how often it runs each time it is entered; None where its counter has no constant bounds.
    """

    head: int
    last: int
    trips: int | None

    def holds(self, other: Loop) -> bool:
        """Whether the other loop lies within this one."""
        return self != other and self.head <= other.head and other.last <= self.last


@dataclass(frozen=True)
class Trace:
    """What one warp executes in one trip through a loop.

    Attributes:
        loop: which.
        indices: of the instructions, in order, into the function.
        instructions: the same instructions.
    """

    loop: Loop
    indices: tuple[int, ...]
    instructions: tuple[Instruction, ...]

    @property
    def num_matrix(self) -> int:
        """Matrix instructions in it."""
        return sum(is_matrix(instruction) for instruction in self.instructions)


def is_matrix(instruction: Instruction) -> bool:
    """Whether it is a matrix product."""
    return instruction.base in MATRIX


def is_wgmma(instruction: Instruction) -> bool:
    """Whether it is a product of a warpgroup."""
    return instruction.base in WGMMA


def hides_on_fma(instruction: Instruction) -> bool:
    """Whether it gives minus infinity to a score in the place of a selection: `hide_on_fma` in kernels/ptx/math.cuh."""
    return instruction.base == "IMAD" and bool(instruction.predicate) and instruction.operands.endswith("-0x800000")


def is_exponential(instruction: Instruction) -> bool:
    """Whether it is an exponential."""
    return instruction.opcode.startswith("MUFU.EX2")


def _is_work(instruction: Instruction) -> bool:
    return is_matrix(instruction) or is_exponential(instruction) or instruction.base in _WORK


def _is_store(instruction: Instruction) -> bool:
    parts = instruction.opcode.split(".")
    return parts[0] in ("STS", "STSM", "UTMASTG") or (parts[0] == "STG" and "128" in parts)


def _stores_single_numbers(instruction: Instruction) -> bool:
    return instruction.base == "STG" and not {"64", "128"} & set(instruction.opcode.split("."))


def _leaves(instruction: Instruction) -> bool:
    """Whether it is a jump that looks like a call, by which the assembler leaves some loops."""
    return instruction.opcode == "CALL.REL.NOINC" and bool(instruction.predicate) and instruction.target is not None


def _branches(instruction: Instruction) -> bool:
    return instruction.base == "BRA" or _leaves(instruction)


def _is_backward(function: Function, index: int) -> bool:
    instruction = function[index]
    return instruction.base == "BRA" and instruction.target is not None and instruction.target < index


def find_loops(function: Function) -> tuple[Loop, ...]:
    """All loops, outer ones before those that they hold."""
    last: dict[int, int] = {}
    ends = [index for index, instruction in enumerate(function) if instruction.base == "EXIT" and not instruction.predicate]
    for index in range(len(function)):
        if _is_backward(function, index):
            head = function[index].target
            assert head is not None
            if not any(
                head <= end < index for end in ends
            ):  # code behind the end, such as waits that were in vain, goes back into the middle of loops
                last[head] = max(index, last.get(head, 0))
    loops = [Loop(head, end, constant_trips(function, head, end)) for head, end in last.items()]
    return tuple(sorted(loops, key=lambda loop: (loop.head, -loop.last)))


def leading_to(function: Function, loop: Loop) -> Function:
    """The instructions before a loop from which it can be reached, in their order: not those of warps that went another way."""
    reaching = {loop.head}
    for index in reversed(range(loop.head)):
        instruction = function[index]
        falls_through = instruction.base not in _ENDS or bool(instruction.predicate)
        branches = instruction.base in _ENDS and instruction.target in reaching
        if branches or (falls_through and index + 1 in reaching):
            reaching.add(index)
    return tuple(function[index] for index in sorted(reaching - {loop.head}))


def tile_loop(function: Function, *, masked: bool = False) -> Loop:
    """The loop over tiles: the innermost that has the kinds of work that the function's loops have, products and exponentials. Of several, say one for masked
    tiles and one for the others, that with the fewest comparisons and selections, or with `masked` the most.

    Raises:
        UnsupportedError: the function has no loop.
    """
    loops = find_loops(function)
    for kinds in ((is_matrix, is_exponential), (is_matrix,), (is_exponential,), ()):
        able = [loop for loop in loops if all(any(map(kind, function[loop.head : loop.last + 1])) for kind in kinds)]
        inner = [loop for loop in able if not any(loop.holds(other) for other in able)]
        if inner:
            return (max if masked else min)(inner, key=lambda loop: _selections(function[loop.head : loop.last + 1]))
    raise UnsupportedError("kernel", "code without a loop", "a loop over tiles", "Only kernels that walk over tiles have a steady state.")


def _selections(code: Sequence[Instruction]) -> float:
    """Comparisons and selections for each product, or for each instruction."""
    return sum(i.base in ("ISETP", "FSEL", "SEL") or hides_on_fma(i) for i in code) / max(1, sum(map(is_matrix, code)))


# --- How often a loop runs ----------------------------------------------------------------------------------------------------------------

_COMPARE = re.compile(r"^(U?P\d), U?PT, (U?R\d+)(?:\.reuse)?, (-?0x[0-9a-f]+), U?PT$")
_PREDICATE = re.compile(r"!?U?P\d")
_CONDITIONS = {
    "NE": lambda a, b: a != b, "EQ": lambda a, b: a == b, "LT": lambda a, b: a < b, "GE": lambda a, b: a >= b, "GT": lambda a, b: a > b,
    "LE": lambda a, b: a <= b,
}  # fmt: skip
_MOST_TRIPS = 4096


def constant_trips(function: Function, head: int, last: int) -> int | None:
    """How often the loop from `head` to the conditional branch `last` runs, if one register counts it from a constant by a constant to a constant."""
    condition_of, body = _condition(function[last]), function[head:last]
    if not condition_of and _leaves(function[last - 1]):  # the way out is what has a condition
        out, body = function[last - 1].predicate, function[head : last - 1]
        condition_of = out.removeprefix("!") if out.startswith("!") else f"!{out}"
    predicate = condition_of.lstrip("!")
    compared = _writer(body, predicate)
    if compared is not None and body[compared].base == "PLOP3":  # a uniform predicate becomes an ordinary one
        source = re.search(r"\bUP\d\b", body[compared].operands)
        compared = _writer(body, source[0]) if source else None
    if compared is None or body[compared].base not in ("ISETP", "UISETP"):
        return None
    comparison = _COMPARE.match(body[compared].operands)
    condition = _CONDITIONS.get(body[compared].opcode.split(".")[1])
    if comparison is None or condition is None:
        return None
    register, bound = comparison[2], int(comparison[3], 16)
    stepped = _writer(body, register)
    step = None if stepped is None else _step(body[stepped], register)
    start = _start(function, head, register)
    if stepped is None or not step or start is None or sum(_writes(instruction, register) for instruction in body) != 1:
        return None
    value = start
    for trips in range(1, _MOST_TRIPS):
        compared_value = value + step if stepped < compared else value
        value += step
        if condition(compared_value, bound) == condition_of.startswith("!"):
            return trips
    return None


def _condition(branch: Instruction) -> str:
    """The predicate that decides about a branch: that of the instruction, or from sm_100 on of a uniform one its first operand, `BRA.U UP0, target`."""
    if branch.predicate or not branch.opcode.startswith("BRA.U"):
        return branch.predicate
    condition = _PREDICATE.match(branch.operands)
    return condition[0] if condition else ""


def _writes(instruction: Instruction, register: str) -> bool:
    first = instruction.operands.split(",", 1)[0].strip()
    wide = instruction.opcode.startswith("CS2R") and first[1:].isdigit() and not instruction.opcode.endswith(".32")
    return first == register or (wide and f"R{int(first[1:]) + 1}" == register)


def _writer(code: Sequence[Instruction], register: str) -> int | None:
    """The last instruction that has the register, or predicate, as its result."""
    return next((index for index in reversed(range(len(code))) if _writes(code[index], register)), None)


def _step(instruction: Instruction, register: str) -> int | None:
    """What an addition adds to its own result; None for any other instruction. From sm_100 on it names predicates for its carries, `PT` for none."""
    operands = [operand.strip().removesuffix(".reuse") for operand in instruction.operands.split(",")]
    operands = [operand for operand in operands if operand not in ("PT", "UPT")]
    if instruction.base.removeprefix("U") not in ("IADD3", "VIADD", "IADD") or operands[1] != register or instruction.predicate:
        return None
    if not re.fullmatch(r"-?0x[0-9a-f]+", operands[2]) or any(operand not in ("RZ", "URZ") for operand in operands[3:]):
        return None
    return int(operands[2], 16)


def _start(function: Function, head: int, register: str) -> int | None:
    """The constant that the register has when the loop is entered, by the nearest instruction before it."""
    found = _writer(function[:head], register)
    if found is None:
        return None
    opcode, operands = function[found].opcode, [operand.strip() for operand in function[found].operands.split(",")]
    if opcode.startswith("HFMA2"):  # makes constants as pairs of halves where it is idle
        return _of_halves(operands[3], operands[4]) if operands[1:3] == ["-RZ", "RZ"] and len(operands) == 5 else None
    if not opcode.startswith(("MOV", "UMOV", "CS2R", "IMAD.MOV")):
        return None
    value = operands[-1]
    if value in ("RZ", "URZ", "SRZ"):
        return 0
    return int(value, 16) if re.fullmatch(r"-?0x[0-9a-f]+", value) else None


def _of_halves(high: str, low: str) -> int | None:
    """The integer with the bits of two 16-bit floats, as nvdisasm prints them."""
    try:
        return int(struct.unpack("<i", struct.pack("<ee", float(low), float(high)))[0])
    except (ValueError, OverflowError, struct.error):
        return None


# --- The path through a loop --------------------------------------------------------------------------------------------------------------


def steady_trace(
    function: Function,
    loop: Loop,
    expected_matrix: int | None = None,
    *,
    masked: bool = False,
    avoided: frozenset[int] = frozenset(),
    stores: bool = False,
) -> Trace:
    """The instructions of one trip.

    Args:
        function: the code.
        loop: of `find_loops`.
        expected_matrix: matrix instructions of a warp in one trip; decides how often inner loops run whose counters say nothing.
        masked: of a tile in which some pair is hidden.
        avoided: instructions that do not belong to the steady state.
        stores: results are stored on the way, in large pieces where there is a choice.

    Raises:
        UnsupportedError: no path leads back to the head.
    """
    indices = _Paths(function, 1, masked, avoided, stores).through(loop)
    unknown = [inner for inner in find_loops(function) if loop.holds(inner) and inner.trips is None]
    inside = sum(is_matrix(function[i]) for i in indices if any(inner.head <= i <= inner.last for inner in unknown))
    if expected_matrix is not None and inside:
        outside = sum(is_matrix(function[i]) for i in indices) - inside
        indices = _Paths(function, max(1, round((expected_matrix - outside) / inside)), masked, avoided, stores).through(loop)
    return Trace(loop, tuple(indices), tuple(function[index] for index in indices))


@dataclass(frozen=True)
class _Node:
    """A basic block or a whole inner loop, the instructions `start` to `end` - 1.

    Attributes:
        path: what is executed of it.
        work: how many instructions of it do work.
        masks: how many select by whether a pair is visible, or load what says so from shared memory, where that path is wanted.
        cost: how long the path is, for the choice among paths with the same work.
    """

    start: int
    end: int
    path: tuple[int, ...]
    work: int
    masks: int
    cost: int


class _Paths:
    """Finds paths through the loops of one function; `unknown_trips` is how often loops run whose counters say nothing, the rest is that of `steady_trace`."""

    def __init__(self, function: Function, unknown_trips: int, masked: bool, avoided: frozenset[int], stores: bool) -> None:
        self.function = function
        self.unknown_trips = unknown_trips
        self.masked = masked
        self.avoided = avoided
        self.stores = stores
        self.reads_operands = not any(map(is_wgmma, function))  # by LDSM, which beside products of warpgroups reads masks
        self.loops = find_loops(function)

    def through(self, loop: Loop) -> list[int]:
        """The path from the loop's head back to it."""
        nodes = self._nodes(loop)
        at = {node.start: position for position, node in enumerate(nodes)}
        best: dict[int, tuple[int, int, int]] = {0: (nodes[0].work, nodes[0].masks, -nodes[0].cost)}
        before: dict[int, int] = {}
        for position, node in enumerate(nodes):
            for following in self._successors(node, at) if position in best else ():
                work, masks, cost = best[position]
                work -= _AVOIDED * self._is_rare(node, nodes[following])
                value = (work + nodes[following].work, masks + nodes[following].masks, cost - nodes[following].cost)
                if following > position and value > best.get(following, (-sys.maxsize, 0, 0)):
                    best[following], before[following] = value, position
        ends = [position for position in best if self._returns(loop, nodes[position])]
        if not ends:
            hint = "Only loops that are laid out as one piece are understood."
            raise UnsupportedError("kernel", f"a loop at {self.function[loop.head].address:#x}", "a path back to its head", hint)
        path = [max(ends, key=lambda position: best[position])]
        while path[-1] in before:
            path.append(before[path[-1]])
        return [index for position in reversed(path) for index in nodes[position].path]

    def _nodes(self, loop: Loop) -> list[_Node]:
        inside = [other for other in self.loops if loop.holds(other)]
        outermost = [other for other in inside if not any(more.holds(other) for more in inside)]
        starts = {loop.head}
        for index in range(loop.head, loop.last + 1):
            instruction = self.function[index]
            if instruction.base in _ENDS or _leaves(instruction):
                starts.add(index + 1)
            if instruction.target is not None:
                starts.add(instruction.target)
        for inner in outermost:
            starts |= {inner.head, inner.last + 1}
        kept = sorted(start for start in starts if loop.head <= start <= loop.last and not any(o.head < start <= o.last for o in outermost))
        heads = {inner.head: inner for inner in outermost}
        return [
            self._inner(heads[start]) if start in heads else self._block(start, end)
            for start, end in zip(kept, [*kept[1:], loop.last + 1], strict=True)
        ]

    def _block(self, start: int, end: int) -> _Node:
        work = self._work(range(start, end))
        bases = [self.function[index].base for index in range(start, end)]
        masks = bases.count("FSEL") if self.masked and "FSETP" not in bases else 0  # those by comparing floats are clamps
        masks += sum(map(hides_on_fma, self.function[start:end])) if self.masked else 0
        masks += bases.count("LDS") if self.masked else 0  # of a mask that was copied, as by LDSM beside products of warpgroups
        masks += bases.count("LDSM") if self.masked and not self.reads_operands else 0
        return _Node(start, end, tuple(range(start, end)), work, masks, end - start)

    def _inner(self, loop: Loop) -> _Node:
        path = self.through(loop)
        trips = loop.trips or (self.unknown_trips if any(is_matrix(self.function[index]) for index in path) else 1)
        work = self._work(path) * trips
        cost = len(path) * trips + (0 if work else _COLD_LOOP)
        return _Node(loop.head, loop.last + 1, tuple(path) * trips, work, 0, cost)

    def _work(self, indices: Sequence[int]) -> int:
        code = [self.function[index] for index in indices if self.reads_operands or self.function[index].base != "LDSM"]
        found = sum(_is_work(instruction) or (self.stores and _is_store(instruction)) for instruction in code)
        return found - _AVOIDED * any(index in self.avoided or _stores_single_numbers(self.function[index]) for index in indices)

    def _successors(self, node: _Node, at: dict[int, int]) -> list[int]:
        last = self.function[node.end - 1]
        targets = {branch.target for branch in self.function[node.start : node.end] if _branches(branch) and branch.target is not None}
        if not (last.base in _ENDS and _always(last)):
            targets.add(node.end)
        return [at[target] for target in sorted(targets) if target in at and target > node.start]

    def _is_rare(self, node: _Node, following: _Node) -> bool:
        """Whether a branch goes there where any lane of the warp asks for it, which is how kernels leave the straight code for rows that few tiles have."""
        code = self.function[node.start : node.end]
        branch = code[-1]
        if branch.base != "BRA" or not branch.predicate or branch.target == node.end:
            return False
        voted = _writer(code, branch.predicate.lstrip("!"))
        is_asked_for = (following.start == branch.target) != branch.predicate.startswith("!")
        return voted is not None and code[voted].opcode == "VOTE.ANY" and is_asked_for

    def _returns(self, loop: Loop, node: _Node) -> bool:
        last = self.function[node.end - 1]
        return last.base == "BRA" and last.target == loop.head


def _always(branch: Instruction) -> bool:
    """Whether a branch is taken whenever it is reached: it has neither a predicate nor a condition among its operands, as `BRA.DIV` and `BRA P1` have."""
    return not branch.predicate and ".DIV" not in branch.opcode and ".CONV" not in branch.opcode and not _PREDICATE.match(branch.operands)
