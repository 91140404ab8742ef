"""Warp-specialised kernels: which loops the warps of a block run, and which mbarriers each instruction of theirs means.

`role_traces(function, computing)` finds beside the loop that computes the one of warps that compute something else, the one that copies, and those that say at mbarriers when others may go on. `meeting_points(function, traces)` says of each instruction of the traces
at which mbarriers its warp waits or arrives, and which bytes it has copied where. Rules:

- A barrier is known by the constant part of its address (`addresses.py`); those that the kernel makes in the beginning (SYNCS.EXCH) are all that there are. An instruction
  that may mean several means one that another role waits for.
- Copies belong to the barrier to which their bytes were announced last. They have arrived when all of them have landed; of copies by threads (ARRIVES) when the warp's have.
- A phase ends when all warps whose traces arrive have arrived, and its copies. Of those that a role waits for before it lets the warps that compute go on, as many as the ring has stages are over in the beginning.
- Where a role waits for what nobody says, and says what nobody waits for, its warpgroups hand something on in turn.
- Whatever else nobody says has been said before the loop.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum

from cuflash.errors import UnsupportedError
from cuflash.timing.addresses import Constants, constants, operands_of, result_of
from cuflash.timing.control_flow import Loop, Trace, find_loops, is_exponential, is_matrix, leading_to, opcodes, steady_trace
from cuflash.timing.sass import Function, Instruction

BULK_COPIES = opcodes("UTMALDG UBLKCP")
_EXCLUSIVE_OR = "0x3c"  # among the operands of LOP3: the table of its function


class Act(Enum):
    """What an instruction does at an mbarrier."""

    WAIT = "wait"
    ARRIVE = "arrive"
    ARRIVE_BEHIND_COPIES = "arrive behind copies"  # when all that the warp has copied is there
    EXPECT = "expect"  # arrives, and announces bytes
    COPY = "copy"  # lands bytes


@dataclass(frozen=True)
class Meeting:
    """What one instruction has to do with an mbarrier.

    Attributes:
        act: see there.
        barrier: the first one of a ring, by its place.
        initial: of a wait, phases that are over in the beginning.
        turns: whether it is handed on from one warpgroup to the next.
        num_bytes: of a copy.
        completes: whether it is the last copy of its phase.
    """

    act: Act
    barrier: int
    initial: int = 0
    turns: bool = False
    num_bytes: float = 0.0
    completes: bool = False


def is_bulk_copy(instruction: Instruction) -> bool:
    """Whether it asks for a copy in bulk."""
    return instruction.base in BULK_COPIES


def role_traces(function: Function, computing: Trace) -> tuple[Trace, ...]:
    """The traces of the warps that compute, of the warp that copies for them, if there is one, and of those that do nothing else than to let them go on."""
    inner = _innermost(function, _copies)
    awaited = _awaited(function, computing)
    if not inner or not awaited:
        return (computing,)
    helping = [steady_trace(function, loop) for loop in _innermost(function, _helps)]
    awaited = awaited.union(*(_awaited(function, trace) for trace in helping))
    chosen = max(inner, key=lambda loop: sum(map(is_bulk_copy, function[loop.head : loop.last])))
    once = frozenset(
        index
        for index in range(chosen.head, chosen.last)
        if _is(function[index], Act.EXPECT) and not awaited & _barriers(function, chosen, index)
    )
    return computing, steady_trace(function, chosen, avoided=once), *_letting_go(function, awaited), *helping


def helps(trace: Trace) -> bool:
    """Whether warps of a trace compute what others make them the operands of: products, but no exponentials."""
    return _helps(trace.instructions)


def _helps(body: Sequence[Instruction]) -> bool:
    return any(map(is_matrix, body)) and not any(map(is_exponential, body)) and Act.WAIT in set(map(_act, body))


def _letting_go(function: Function, awaited: Constants) -> list[Trace]:
    """The traces of those that arrive where others wait, in the order of their code: where the warps that compute do, or those that let them go on."""
    traces: list[Trace] = []
    open_loops = {loop: steady_trace(function, loop) for loop in _innermost(function, _waits_and_arrives)}
    while found := [loop for loop, trace in open_loops.items() if awaited & _met(function, trace, Act.ARRIVE)]:
        traces += [open_loops.pop(loop) for loop in found]
        awaited |= frozenset(of for trace in traces for of in _awaited(function, trace))
    return sorted(traces, key=lambda trace: trace.loop.head)


def _met(function: Function, trace: Trace, act: Act) -> Constants:
    """Barriers at which a trace's instructions act so."""
    code = _in_context(function, trace)
    first = len(code) - len(trace.instructions)
    return frozenset(barrier for of, i in enumerate(trace.instructions) if _act(i) is act for barrier in _address(code, first + of, first))


def _innermost(function: Function, kind: Callable[[Sequence[Instruction]], bool]) -> list[Loop]:
    """Loops of a kind that hold no others of it."""
    loops = [loop for loop in find_loops(function) if kind(function[loop.head : loop.last + 1])]
    return [loop for loop in loops if not any(loop.holds(other) for other in loops)]


def _copies(body: Sequence[Instruction]) -> bool:
    return any(map(is_bulk_copy, body)) and any(_is(i, Act.EXPECT) for i in body) and not any(map(is_matrix, body))


def _waits_and_arrives(body: Sequence[Instruction]) -> bool:
    acts = set(map(_act, body))
    return {Act.WAIT, Act.ARRIVE} <= acts and Act.EXPECT not in acts and not any(map(is_matrix, body))


def _barriers(function: Function, loop: Loop, index: int) -> Constants:
    """The barriers that an instruction in a loop may mean."""
    before = leading_to(function, loop)
    return _address((*before, *function[loop.head : loop.last + 1]), len(before) + index - loop.head)


def _awaited(function: Function, trace: Trace) -> frozenset[int]:
    """Barriers of which a trace waits for one phase after the other."""
    code = _in_context(function, trace)
    first = len(code) - len(trace.instructions)
    waits = [first + of for of, i in enumerate(trace.instructions) if _act(i) is Act.WAIT and _changes(trace.instructions, of)]
    return frozenset(barrier for wait in waits for barrier in _address(code, wait, first))


def announcements(function: Function, trace: Trace) -> list[tuple[int, Constants]]:
    """The instructions of a trace that announce bytes, by their place in the function, and for which barriers they may."""
    code = _in_context(function, trace)
    first = len(code) - len(trace.instructions)
    return [(trace.indices[of], _address(code, first + of, first)) for of, i in enumerate(trace.instructions) if _act(i) is Act.EXPECT]


def _changes(code: Sequence[Instruction], position: int) -> bool:
    """Whether a wait is for another phase in each trip: its parity is turned over by the trip. Else its phase is over before the loop."""
    left, seen = [(position, operands_of(code[position])[-1])], set()
    while left:
        at, register = left.pop()
        if not re.fullmatch(r"-?U?R\d+", register):  # a number, or RZ, to which instructions write what they do not keep
            continue
        register = register.removeprefix("-")
        writer = next((of for of in (*range(at - 1, -1, -1), *range(len(code) - 1, at - 1, -1)) if result_of(code[of]) == register), None)
        if writer is None or writer in seen:
            continue
        seen.add(writer)
        if code[writer].base in ("LOP3", "ULOP3") and _EXCLUSIVE_OR in operands_of(code[writer]):
            return True
        left += [(writer, part) for part in operands_of(code[writer])[1:]]
    return False


def _in_context(function: Function, trace: Trace) -> tuple[Instruction, ...]:
    """The code that a trace's registers come from: what leads to its loop, and the trace."""
    return (*leading_to(function, trace.loop), *trace.instructions)


def _address(code: Sequence[Instruction], position: int, first: int = 0) -> Constants:
    """The barriers that an instruction may mean, by the constant parts of its address."""
    text = code[position].operands
    return constants(code, position, text[text.index("[") : text.index("]")], first)


def is_arrival(instruction: Instruction) -> bool:
    """Whether it arrives at an mbarrier."""
    return _is(instruction, Act.ARRIVE)


def _is(instruction: Instruction, act: Act) -> bool:
    return _act(instruction) is act


def _act(instruction: Instruction) -> Act | None:
    parts = instruction.opcode.split(".")
    if instruction.never_runs:
        return None
    if parts[0] == "ARRIVES":
        return Act.ARRIVE_BEHIND_COPIES
    if parts[0] != "SYNCS":
        return None
    if "PHASECHK" in parts:
        return Act.WAIT
    if "ARRIVE" in parts:
        return Act.ARRIVE if "A1T0" in parts else Act.EXPECT
    return None


def meeting_points(function: Function, traces: Sequence[Trace]) -> tuple[dict[int, Meeting], ...]:
    """For each trace, what the instruction at a position has to do with which mbarrier.

    Raises:
        UnsupportedError: it is not clear which barrier is meant, or how many bytes are copied.
    """
    return _Barriers(function, traces).meetings()


@dataclass(frozen=True)
class _Use:
    """One instruction of a trace that waits or arrives."""

    role: int
    position: int
    act: Act
    barrier: int
    num_bytes: int = 0


class _Barriers:
    """All barriers of a kernel, and who uses them."""

    def __init__(self, function: Function, traces: Sequence[Trace]) -> None:
        self.function, self.traces = function, traces
        made = (index for index, instruction in enumerate(function) if instruction.opcode.startswith("SYNCS.EXCH"))
        self.known = sorted({of for index in made for of in _address(function, index)})
        self.uses = self._uses()
        self.turns = self._handed_on()
        rings = sorted({use.barrier for use in self.uses if use.barrier not in self.turns})
        ends = [*rings[1:], float("inf")]
        self.stages = {ring: max(1, sum(ring <= of < end for of in self.known)) for ring, end in zip(rings, ends, strict=True)}

    def meetings(self) -> tuple[dict[int, Meeting], ...]:
        found: tuple[dict[int, Meeting], ...] = tuple({} for _ in self.traces)
        for use in self.uses:
            if use.barrier in self.turns:
                found[use.role][use.position] = Meeting(use.act, self.turns[use.barrier], turns=True)
            elif use.act is not Act.WAIT or self._is_said(use.barrier):
                found[use.role][use.position] = Meeting(use.act, use.barrier, self._initial(use) if use.act is Act.WAIT else 0)
            if use.act is Act.EXPECT:
                self._add_copies(use, found[use.role])
        return found

    def _uses(self) -> list[_Use]:
        open_uses: list[tuple[int, int, Act, Constants, int]] = []
        for role, trace in enumerate(self.traces):
            code = _in_context(self.function, trace)
            first = len(code) - len(trace.instructions)
            for position, instruction in enumerate(trace.instructions):
                act = _act(instruction)
                if act is not None and (act is not Act.WAIT or _changes(trace.instructions, position)):
                    at = first + position
                    possible = _address(code, at, first) & frozenset(self.known)
                    if not possible:
                        raise _unclear(instruction, "an mbarrier whose place the code does not say")
                    num_bytes = self._bytes(code, at) if act is Act.EXPECT else 0
                    open_uses.append((role, position, act, possible, num_bytes))
        awaited = {of for _, _, act, possible, _ in open_uses if act is Act.WAIT and len(possible) == 1 for of in possible}
        return [
            _Use(role, position, act, min(possible & awaited or possible), num_bytes)
            for role, position, act, possible, num_bytes in open_uses
        ]

    @staticmethod
    def _bytes(code: Sequence[Instruction], position: int) -> int:
        last = max(
            constants(code, position, code[position].operands.split(",")[-1].strip()), default=0
        )  # of tiles that are cut, all at once
        if last <= 0:
            raise _unclear(code[position], "bytes whose number the code does not say")
        return last

    def _is_said(self, barrier: int) -> bool:
        return any(use.barrier == barrier and use.act is not Act.WAIT for use in self.uses)

    def _initial(self, wait: _Use) -> int:
        """Phases that are over in the beginning: of what a role waits for that lets the first one go on, as many as there are stages for what it announces or says next."""
        if wait.role == 0 and any(
            use.barrier == wait.barrier and helps(self.traces[use.role]) for use in self.uses if use.act is Act.ARRIVE
        ):
            return self.stages[wait.barrier]  # what a warpgroup that helps has taken, of which there was none at first
        of_role = [use for use in self.uses if use.role == wait.role and use.act is Act.EXPECT and use.barrier in self.stages]
        following = sorted(of_role, key=lambda use: (use.position < wait.position, use.position)) or self._lets_go(wait)
        return min(self.stages[wait.barrier], self.stages[following[0].barrier]) if following else 0

    def _lets_go(self, wait: _Use) -> list[_Use]:
        """Arrivals behind a wait of another role at what the first one waits for."""
        awaited = {use.barrier for use in self.uses if use.role == 0 and use.act is Act.WAIT}
        behind = (use for use in self.uses if 0 < use.role == wait.role and use.position > wait.position)
        return [use for use in behind if use.act is Act.ARRIVE and use.barrier in awaited and use.barrier in self.stages]

    def _handed_on(self) -> dict[int, int]:
        """Barriers that a role's warpgroups hand something on by: under the name of the first."""
        found: dict[int, int] = {}
        for role in range(len(self.traces)):
            awaited = {use.barrier for use in self.uses if use.role == role and use.act is Act.WAIT}
            said = {use.barrier for use in self.uses if use.role == role and use.act is Act.ARRIVE}
            others = {use.barrier for use in self.uses if use.role != role}
            only_awaited, only_said = awaited - said - others, said - awaited - others
            turned = awaited & said or (only_awaited | only_said if only_awaited and only_said else set())
            found |= dict.fromkeys(turned, min(turned, default=0))
        return found

    def _add_copies(self, use: _Use, found: dict[int, Meeting]) -> None:
        """The copies between this announcement and the next one share its bytes."""
        instructions = self.traces[use.role].instructions
        copies = []
        for position in range(use.position + 1, len(instructions)):
            if _act(instructions[position]) is Act.EXPECT:
                break
            if is_bulk_copy(instructions[position]):
                copies.append(position)
        for position in copies:
            found[position] = Meeting(Act.COPY, use.barrier, num_bytes=use.num_bytes / len(copies), completes=position == copies[-1])


def _unclear(instruction: Instruction, what: str) -> UnsupportedError:
    hint = "Kernels whose mbarriers lie at constant places, and whose copies have constant sizes, are modelled."
    return UnsupportedError("kernel", f"{instruction.opcode} at {instruction.address:#x}: {what}", "barriers that can be told apart", hint)
