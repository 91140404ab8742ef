"""Mutants of a kernel: its PTX with one synchronising instruction left out or weakened.

Contract: `mutants(ptx)` finds every instruction that orders memory accesses or waits for something, and yields PTX texts that are valid, decode and
differ from the original in that one instruction. What a mutant leaves out is exactly what a careless edit of the kernel could, so a test that runs
mutants shows whether the simulator's checks would notice. Instructions that exchange values (shfl, vote, bar.red, atomics) are not synchronisation here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from cuflash.simulator.encoder import split_operands
from cuflash.simulator.parser import Statement, parse_kernel
from cuflash.simulator.source_map import SourceMap

_TX_BYTES = 16  # by which the bytes that a barrier expects are changed: the smallest copy of a bulk transfer
_WARP = 32
_SCRATCH = "%mutated"  # a register of its own scope


@dataclass(frozen=True)
class Mutant:
    """A kernel with one instruction changed.

    Attributes:
        statement: number of the instruction among the kernel's statements.
        instruction: its PTX.
        change: what was done to it, such as "deleted" or "+1 groups in flight".
        source: file and line that it comes from, then those of the calls around it, innermost first; empty without line information.
        ptx: the module.
    """

    statement: int
    instruction: str
    change: str
    source: tuple[tuple[str, int], ...]
    ptx: str = field(repr=False)


@dataclass(frozen=True)
class _Instruction:
    """A statement with its operands apart."""

    statement: Statement
    operands: tuple[str, ...]

    @property
    def opcode(self) -> str:
        return self.statement.opcode

    def text(self, opcode: str | None = None, *operands: str) -> str:
        """The instruction with another opcode or other operands, under the same guard."""
        statement = self.statement
        guard = f"@{'!' if statement.negated else ''}{statement.guard} " if statement.guard else ""
        return f"{guard}{opcode or self.opcode} {', '.join(operands or self.operands)}".rstrip() + ";"

    def with_operand(self, number: int, text: str) -> str:
        """The instruction with one operand replaced."""
        operands = list(self.operands)
        operands[number] = text
        return self.text(None, *operands)

    def with_computed(self, number: int, operation: str, constant: int) -> str:
        """The instruction with one operand `x` replaced by `operation(x, constant)`, which needs a register when x is one."""
        computed = self.with_operand(number, _SCRATCH)
        return f"{{ .reg .b32 {_SCRATCH}; {operation} {_SCRATCH}, {self.operands[number]}, {constant}; {computed} }}"


Change = tuple[str, str]  # what was done, and the PTX in place of the instruction
_Changer = Callable[[_Instruction], Iterator[Change]]


def _literal(text: str) -> int | None:
    """The value of an immediate operand."""
    match = re.fullmatch(r"(0[xX][0-9a-fA-F]+|\d+)U?", text)
    return int(match[1], 0) if match else None


def _more_or_less(instruction: _Instruction, number: int, step: int, smallest: int, what: str) -> Iterator[Change]:
    """An operand that counts something, `step` lower and higher, but not below `smallest`."""
    value = _literal(instruction.operands[number])
    for difference in (-step, step):
        if value is None:
            yield f"{difference:+d} {what}", instruction.with_computed(number, "add.s32", difference)
        elif value + difference >= smallest:
            yield f"{difference:+d} {what}", instruction.with_operand(number, str(value + difference))


def _delete(instruction: _Instruction) -> Iterator[Change]:
    """Without the instruction. What it would have returned gets a value, so that the registers stay defined."""
    del instruction
    yield "deleted", ""


def _change_barrier(instruction: _Instruction) -> Iterator[Change]:
    """bar.sync a{, threads} and bar.arrive a, threads, also spelled barrier.…"""
    yield from _delete(instruction)
    if ".sync" in instruction.opcode:
        yield "of the warp only", instruction.text("bar.warp.sync", "-1")
    if len(instruction.operands) > 1:
        yield from _more_or_less(instruction, 1, _WARP, _WARP, "threads")


def _change_wait_group(instruction: _Instruction) -> Iterator[Change]:
    """cp.async.wait_group n, cp.async.bulk.wait_group{.read} n, wgmma.wait_group n: one group more may stay in flight."""
    yield from _delete(instruction)
    allowed = int(instruction.operands[0], 0)
    yield "+1 groups in flight", instruction.text(None, str(allowed + 1))
    if instruction.opcode == "cp.async.bulk.wait_group":
        yield "waits until sources are read only", instruction.text("cp.async.bulk.wait_group.read")


def _change_mbarrier_init(instruction: _Instruction) -> Iterator[Change]:
    """mbarrier.init [a], arrivals."""
    yield from _delete(instruction)
    yield from _more_or_less(instruction, 1, 1, 1, "arrivals")


def _change_mbarrier_arrive(instruction: _Instruction) -> Iterator[Change]:
    """mbarrier.arrive{.expect_tx}{.release…} {state,} [a]{, bytes or count}, and mbarrier.arrive_drop."""
    operands = instruction.operands
    has_state = not operands[0].startswith("[")
    if has_state and operands[0] != "_":
        yield "deleted", instruction.text("mov.b64", operands[0], "0")
    else:
        yield from _delete(instruction)
    if len(operands) > 1 + has_state:
        expects = ".expect_tx" in instruction.opcode
        step, smallest, what = (_TX_BYTES, 0, "bytes") if expects else (1, 1, "arrivals")
        yield from _more_or_less(instruction, 1 + has_state, step, smallest, what)


def _change_mbarrier_bytes(instruction: _Instruction) -> Iterator[Change]:
    """mbarrier.expect_tx [a], bytes and mbarrier.complete_tx [a], bytes."""
    yield from _delete(instruction)
    yield from _more_or_less(instruction, 1, _TX_BYTES, 0, "bytes")


def _change_mbarrier_wait(instruction: _Instruction) -> Iterator[Change]:
    """mbarrier.test_wait and mbarrier.try_wait{.parity}: p, [a], state or parity{, time}. Left out, the answer is always true."""
    yield "deleted", instruction.text("setp.eq.u32", instruction.operands[0], "0", "0")
    if ".parity" in instruction.opcode:
        parity = _literal(instruction.operands[2])
        if parity is None:
            yield "other parity", instruction.with_computed(2, "xor.b32", 1)
        else:
            yield "other parity", instruction.with_operand(2, str(parity ^ 1))


def _change_copy_arrive(instruction: _Instruction) -> Iterator[Change]:
    """cp.async.mbarrier.arrive{.noinc} [a]: without .noinc the arrival is not one of those that are expected."""
    yield from _delete(instruction)
    opcode = instruction.opcode
    if ".noinc" in opcode:
        yield "without .noinc", instruction.text(opcode.replace(".noinc", ""))
    else:
        yield "with .noinc", instruction.text(opcode.replace(".arrive", ".arrive.noinc"))


def _change_cluster_arrive(instruction: _Instruction) -> Iterator[Change]:
    """barrier.cluster.arrive{.release, .relaxed}{.aligned}."""
    yield from _delete(instruction)
    if ".relaxed" not in instruction.opcode:
        yield "without release", instruction.text(instruction.opcode.replace(".release", "").replace(".arrive", ".arrive.relaxed"))


_CHANGES: tuple[tuple[re.Pattern[str], _Changer], ...] = tuple(
    (re.compile(pattern), change)
    for pattern, change in (
        (r"bar\.warp\.sync", _delete),
        (r"(bar|barrier)(\.cta)?\.(sync|arrive)(\.aligned)?", _change_barrier),
        (r"cp\.async\.(bulk\.)?commit_group", _delete),
        (r"cp\.async\.wait_all", _delete),
        (r"cp\.async\.(bulk\.)?wait_group(\.read)?", _change_wait_group),
        (r"wgmma\.(fence|commit_group)\.sync\.aligned", _delete),
        (r"wgmma\.wait_group\.sync\.aligned", _change_wait_group),
        (r"(fence|membar)\..*", _delete),
        (r"mbarrier\.init\b.*", _change_mbarrier_init),
        (r"mbarrier\.inval\b.*", _delete),
        (r"mbarrier\.arrive(_drop)?\b.*", _change_mbarrier_arrive),
        (r"mbarrier\.(expect|complete)_tx\b.*", _change_mbarrier_bytes),
        (r"mbarrier\.(test|try)_wait\b.*", _change_mbarrier_wait),
        (r"cp\.async\.mbarrier\.arrive\b.*", _change_copy_arrive),
        (r"barrier\.cluster\.arrive\b.*", _change_cluster_arrive),
        (r"barrier\.cluster\.wait\b.*", _delete),
    )
)


def _changes_of(opcode: str) -> _Changer | None:
    return next((change for pattern, change in _CHANGES if pattern.fullmatch(opcode)), None)


def mutants(ptx: str | bytes, entry: str | None = None) -> Iterator[Mutant]:
    """All mutants of a kernel, in the order of its text.

    An instruction that was unrolled or inlined several times is changed one copy at a time; the copies have the same `source`.

    Args:
        ptx: the text of a PTX module.
        entry: the kernel's name; may be left out when there is only one.

    Raises:
        SimulatorError: no such kernel, or text that cannot be read.
    """
    text = ptx.decode().rstrip("\0") if isinstance(ptx, bytes) else ptx
    kernel = parse_kernel(text, entry)
    source_map = SourceMap(kernel)
    for number, statement in enumerate(kernel.statements):
        changer = _changes_of(statement.opcode)
        if changer is None:
            continue
        source = tuple(source_map.chain(statement.loc))
        instruction = _Instruction(statement, tuple(split_operands(statement.operands)))
        for change, replacement in changer(instruction):
            note = f"/* {statement.text()} {change} */ "
            yield Mutant(number, statement.text(), change, source, text[: statement.begin] + note + replacement + text[statement.end :])
