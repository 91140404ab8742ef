"""From an instruction to what the model of an SM has to know of it: which unit it takes for how long, what it waits for and what it signals.

`operations(trace, machine)` translates a trace once, before it is run many times. `busy_clocks` adds up, for each resource, the clocks that one trip of one warp
occupies it: what would bind if nothing else did.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum

from cuflash.errors import UnsupportedError
from cuflash.timing.addresses import operands_of
from cuflash.timing.control_flow import is_matrix, is_wgmma, opcodes
from cuflash.timing.machine import SHARED_BYTES_PER_CLOCK, SUB_PARTITIONS, Multiprocessor
from cuflash.timing.roles import Act, Meeting, is_bulk_copy
from cuflash.timing.sass import Instruction


class Unit(Enum):
    """Units of a sub-partition, each with instructions of its own."""

    MATRIX = "matrix"
    FMA = "fma"
    ALU = "alu"
    MUFU = "mufu"
    HALF = "half"


class Kind(Enum):
    """What an instruction does besides taking a unit."""

    PLAIN = 0
    MEMORY = 1  # goes through the SM's memory pipe
    COPY = 2  # cp.async: likewise, and completes when L2 has delivered
    LOAD = 3  # from global memory: likewise, and releases its scoreboard
    STORE = 4  # to global memory: takes L2's bandwidth, nobody waits
    COMMIT = 5  # closes a group of copies
    WAIT = 6  # until all but some groups of copies are complete
    BARRIER = 7
    PRODUCT = 8  # wgmma: the tensor unit's, which computes it by itself
    PRODUCTS_WAIT = 9  # until all but some groups of products are complete
    PHASE = 10  # meets other warps and copies at an mbarrier
    FENCE = 11  # of the GPU, made by one thread of a block, whose warp it holds up
    BULK_STORE = 12  # from shared memory: the TMA unit reads it at L2's pace, and completes when it has


@dataclass(frozen=True)
class Operation:
    """One instruction of a trace.

    Attributes:
        kind: see there.
        unit: that it takes; None for none.
        clocks: for which the unit is taken.
        latency: clocks until its scoreboard is released, if it has one and nothing is in the way.
        wavefronts: clocks of the SM's memory pipe.
        l2_bytes: asked of L2.
        stall: clocks until the warp's next instruction.
        write_scoreboard, read_scoreboard, waits: as in `sass.Control`.
        pending: of `WAIT` and `PRODUCTS_WAIT`, how many groups may be incomplete.
        matrix: whether it is a matrix product.
        closes: of `PRODUCT`, whether it is the last one of its group.
        meeting: of `PHASE`, what it does at which mbarrier.
        threads: of `BARRIER`, that meet there; 0 for all of the block.
        numbered: of `BARRIER`, whether a register says which one it is.
    """

    kind: Kind
    unit: Unit | None
    clocks: float
    latency: float
    wavefronts: float
    l2_bytes: float
    stall: float
    write_scoreboard: int | None
    read_scoreboard: int | None
    waits: tuple[int, ...]
    pending: int = 0
    matrix: bool = False
    closes: bool = False
    meeting: Meeting | None = None
    threads: int = 0
    numbered: bool = False


_FMA = opcodes("FFMA FADD FMUL")
_IMAD = opcodes("IMAD IMUL IDP")
_HALF = opcodes("HADD2 HFMA2 HMUL2 HMNMX2 HSET2 HSETP2")
_CONVERT = opcodes("F2FP F2F F2I I2F I2FP F2IP I2IP FRND")
_ALU = opcodes(
    "FMNMX FMNMX3 FSEL FSETP FSET FCHK IADD3 IADD LEA LOP3 LOP SHF SHL SHR ISETP IABS PRMT SEL IMNMX VIADD VIMNMX VIMNMX3 VIADDMNMX PLOP3 POPC BMSK SGXT "
    "P2R R2P MOV CS2R ISCADD VABSDIFF FLO BREV"
)
_MEMORY_KINDS = {
    "LDGSTS": Kind.COPY, "LDG": Kind.LOAD, "LD": Kind.LOAD, "LDL": Kind.LOAD, "STG": Kind.STORE, "ST": Kind.STORE, "STL": Kind.STORE, "RED": Kind.STORE,
    "REDG": Kind.STORE, "ATOMG": Kind.LOAD, "LDS": Kind.MEMORY, "STS": Kind.MEMORY, "LDSM": Kind.MEMORY, "STSM": Kind.MEMORY, "SHFL": Kind.MEMORY,
    "ATOMS": Kind.MEMORY, "REDUX": Kind.MEMORY,
}  # fmt: skip
_VECTOR = re.compile(r"F32 ?x([24])\.")
_WGMMA_SHAPE = re.compile(r"\.(\d+)x(\d+)x(\d+)\b")
WARPGROUP_ROWS = 64
_NARROW = {"U8": 1, "S8": 1, "U16": 2, "S16": 2}
_LOCAL = frozenset(("LDL", "STL"))  # spills, which the first-level cache answers
_REDUCTIONS = frozenset(("RED", "REDG"))
_MEETINGS: Mapping[int, Meeting] = {}


def operations(trace: Iterable[Instruction], machine: Multiprocessor, meetings: Mapping[int, Meeting] = _MEETINGS) -> tuple[Operation, ...]:
    """Translate a trace; `meetings` says what its instructions do at mbarriers (`roles.meeting_points`).

    Raises:
        UnsupportedError: an instruction that this model has no place for.
    """
    instructions = tuple(trace)
    following = (*instructions[1:], None)
    stored = sum(SHARED_BYTES_PER_CLOCK * _wavefronts(instruction) for instruction in instructions if instruction.base == "STSM")
    box = stored / max(1, sum(map(_is_bulk_store, instructions)))  # all that is put into shared memory by matrix goes out so
    return tuple(
        _bulk_store(instruction, box, machine)
        if _is_bulk_store(instruction)
        else _operation(instruction, after, machine, meetings.get(position))
        for position, (instruction, after) in enumerate(zip(instructions, following, strict=True))
    )


def _operation(instruction: Instruction, after: Instruction | None, machine: Multiprocessor, meeting: Meeting | None) -> Operation:
    base, control = instruction.base, instruction.control
    unit, clocks, latency = _unit(instruction, machine)
    operation = Operation(
        Kind.PLAIN, unit, clocks, latency, 0.0, 0.0, float(max(1, control.stall)), control.write_scoreboard, control.read_scoreboard, control.waits,
        matrix=is_matrix(instruction),
    )  # fmt: skip
    if instruction.never_runs:
        return replace(operation, unit=None, clocks=0.0)
    if base in _MEMORY_KINDS:
        return _memory_operation(operation, instruction, machine)
    if is_wgmma(instruction):
        return replace(operation, kind=Kind.PRODUCT, wavefronts=_operand_wavefronts(instruction), closes="gsb0" in instruction.operands)
    if meeting is not None:
        return _phase_operation(operation, meeting, machine)
    if is_bulk_copy(instruction):
        hint = "Copies in bulk are modelled where one warp announces their bytes at an mbarrier and others wait for them."
        raise UnsupportedError("kernel", instruction.opcode, "a copy that ends the phase of a known mbarrier", hint)
    if base == "SYNCS":
        return replace(operation, latency=machine.constant_latency if machine.warpgroups is None else machine.warpgroups.phase_wait)
    if base == "MEMBAR" and "GPU" in instruction.opcode.split("."):
        return replace(operation, kind=Kind.FENCE, stall=max(operation.stall, machine.fence))
    if base == "ARRIVES":
        hint = "Such arrivals are modelled where other warps wait for them."
        raise UnsupportedError("kernel", instruction.opcode, "an arrival at a known mbarrier", hint)
    if base in ("LDGDEPBAR", "UTMACMDFLUSH"):
        return replace(operation, kind=Kind.COMMIT)
    if base == "DEPBAR" and (waited := re.match(r"SB0, 0x([0-9a-f]+)", instruction.operands)):
        return replace(operation, kind=Kind.WAIT, pending=int(waited[1], 16))
    if base == "WARPGROUP" and (waited := re.match(r"gsb0, 0x([0-9a-f]+)", instruction.operands)):
        return replace(operation, kind=Kind.PRODUCTS_WAIT, pending=int(waited[1], 16))
    if base == "BAR" and ".SYNC" in instruction.opcode:
        threads = re.search(r", 0x([0-9a-f]+)$", instruction.operands)
        return replace(
            operation, kind=Kind.BARRIER, threads=int(threads[1], 16) if threads else 0, numbered=instruction.operands.startswith("R")
        )
    if base in ("BRA", "BRX", "JMP") and (after is None or after.address != instruction.address + 16):
        return replace(operation, stall=operation.stall + machine.branch)
    return operation


def _is_bulk_store(instruction: Instruction) -> bool:
    return instruction.base == "UTMASTG"


def _bulk_store(instruction: Instruction, num_bytes: float, machine: Multiprocessor) -> Operation:
    """Each SM writes what no other does."""
    operation = _operation(instruction, None, machine, None)
    latency = 0.0 if machine.warpgroups is None else machine.warpgroups.bulk_store
    return replace(operation, kind=Kind.BULK_STORE, wavefronts=num_bytes / SHARED_BYTES_PER_CLOCK, l2_bytes=num_bytes, latency=latency)


def _memory_operation(operation: Operation, instruction: Instruction, machine: Multiprocessor) -> Operation:
    base = instruction.base
    kind = _MEMORY_KINDS[base]
    l2_bytes = 0.0 if kind is Kind.MEMORY or base in _LOCAL else 32.0 * _bytes_per_lane(instruction)
    if base in _REDUCTIONS:
        l2_bytes *= machine.l2_bytes / machine.reduction_bytes
    return replace(
        operation, kind=Kind.MEMORY if base in _LOCAL else kind, wavefronts=_wavefronts(instruction), latency=_latency(instruction, machine), l2_bytes=l2_bytes
    )  # fmt: skip


def _phase_operation(operation: Operation, meeting: Meeting, machine: Multiprocessor) -> Operation:
    """Of a copy the bytes count as what L2 delivers at the rate at which all SMs together read the same, since blocks of one head do."""
    if machine.warpgroups is None:
        raise UnsupportedError("kernel", "mbarriers", f"instructions that {machine.arch} has", "Predict it for an architecture with wgmma.")
    operation = replace(operation, kind=Kind.PHASE, meeting=meeting)
    if meeting.act is Act.COPY:
        l2_bytes = meeting.num_bytes * machine.l2_bytes / machine.warpgroups.shared_l2_bytes
        return replace(operation, l2_bytes=l2_bytes, wavefronts=meeting.num_bytes / SHARED_BYTES_PER_CLOCK)
    return replace(operation, latency=machine.warpgroups.phase_wait)


def _operand_wavefronts(instruction: Instruction) -> float:
    """Clocks of the memory pipe for a warp's quarter of a product: B, and A unless it is in registers, each read once for the warpgroup."""
    _, columns, depth = _shape(instruction)
    of_rows = 0 if operands_of(instruction)[1].startswith("R") else WARPGROUP_ROWS
    return (of_rows + columns) * depth * 2 / SHARED_BYTES_PER_CLOCK / SUB_PARTITIONS


def _shape(instruction: Instruction) -> tuple[int, int, int]:
    """M, N and K of a wgmma."""
    found = _WGMMA_SHAPE.search(instruction.opcode)
    if instruction.base != "HGMMA" or found is None or "TF32" in instruction.opcode:
        hint = "Kernels of wgmma with 16-bit operands are modelled."
        raise UnsupportedError("kernel", instruction.opcode, "HGMMA of a known shape", hint)
    rows, columns, depth = map(int, found.groups())
    return rows, columns, depth


def _unit(instruction: Instruction, machine: Multiprocessor) -> tuple[Unit | None, float, float]:
    """Unit, clocks for which it is taken, latency."""
    base = instruction.base
    if is_wgmma(instruction):
        rows, columns, depth = _shape(instruction)
        if machine.warpgroups is None:
            raise UnsupportedError(
                "kernel", instruction.opcode, f"instructions that {machine.arch} has", "Predict it for an architecture with wgmma."
            )
        return Unit.MATRIX, rows * columns * depth / SUB_PARTITIONS / machine.warpgroups.multiply_adds, 0.0
    if is_matrix(instruction):
        return Unit.MATRIX, _matrix_clocks(instruction.opcode, machine), 0.0
    if base == "MUFU":
        return Unit.MUFU, machine.mufu, machine.mufu_latency
    if base in _FMA:
        return Unit.FMA, machine.fma, 0.0
    if base in _IMAD:
        return Unit.FMA, machine.imad, 0.0
    if base in _HALF:
        return Unit.HALF, machine.half, 0.0
    if base in _CONVERT:
        return Unit.ALU, machine.convert, 0.0
    if base in _ALU:
        return Unit.ALU, machine.alu, 0.0
    if base in ("S2R", "LDC", "ULDC", "LDCU", "S2UR", "R2UR"):
        return None, 0.0, machine.constant_latency
    return None, 0.0, 0.0


MULTIPLY_ADDS = {"16816": 2048, "1688": 1024, "1684": 512, "16832": 4096, "8816": 1024, "16864": 8192, "884": 256}
"""Multiply-adds of a matrix instruction by the digits in its opcode, M N K."""


def _matrix_clocks(opcode: str, machine: Multiprocessor) -> float:
    parts = opcode.split(".")
    shape = next((part for part in parts if part in MULTIPLY_ADDS), None)
    rate = "int8" if parts[0] == "IMMA" else "tf32" if "TF32" in parts else "half" if "F32" in parts else "half16"
    if shape is None or parts[0] not in ("HMMA", "IMMA"):
        hint = "Kernels of mma.sync with 16-bit, TF32 and 8-bit integer operands are modelled."
        raise UnsupportedError("kernel", opcode, "HMMA or IMMA of a known shape", hint)
    return MULTIPLY_ADDS[shape] / machine.matrix_rates[rate]


def _bytes_per_lane(instruction: Instruction) -> int:
    parts = instruction.opcode.split(".")
    vector = _VECTOR.search(f"{instruction.opcode} {instruction.operands}")  # nvdisasm writes "REDG.E.ADD.F32x4.FTZ…", or a space before x4
    if instruction.base in ("LDG", "STG"):  # a sector that neighbours ask for too comes from the first-level cache the second time
        narrow = next((_NARROW[part] for part in parts if part in _NARROW), None)
        if narrow is not None:
            return narrow
    return 16 if "128" in parts else 8 if "64" in parts else 4 * int(vector[1]) if vector else 4


def _wavefronts(instruction: Instruction) -> float:
    """Clocks of a memory pipe of 128 bytes; as many as without bank conflicts."""
    if instruction.base in ("LDSM", "STSM"):
        return float(next((part for part in instruction.opcode.split(".") if part in ("1", "2", "4")), "1"))
    if instruction.base == "SHFL":
        return 1.0
    if instruction.base == "REDUX":
        return 2.0
    return max(1.0, _bytes_per_lane(instruction) / 4)


def _latency(instruction: Instruction, machine: Multiprocessor) -> float:
    return {
        "LDSM": machine.matrix_load_latency, "SHFL": machine.shuffle_latency, "LDG": machine.global_latency, "LD": machine.global_latency,
        "ATOMG": machine.global_latency, "LDGSTS": machine.copy_latency,
    }.get(instruction.base, machine.shared_latency)  # fmt: skip


RESOURCES = ("matrix", "issue", "fma", "alu", "mufu", "half", "shared memory", "l2")


@dataclass(frozen=True)
class Role:
    """Warps of a block that run the same code.

    Attributes:
        trace: one trip of one of them.
        warps: how many.
        first: the first one's place in the block.
    """

    trace: tuple[Operation, ...]
    warps: int
    first: int = 0


def busy_clocks_of_block(roles: Sequence[Role], machine: Multiprocessor) -> dict[str, float]:
    """`busy_clocks` of one trip of all warps of a block."""
    busy = dict.fromkeys(RESOURCES, 0.0)
    for role in roles:
        for name, clocks in busy_clocks(role.trace, machine).items():
            busy[name] += role.warps * clocks
    return busy


def busy_clocks(trace: Sequence[Operation], machine: Multiprocessor) -> dict[str, float]:
    """Clocks of an SM for which one trip of one warp occupies each resource; the units of its four sub-partitions work side by side."""
    busy = dict.fromkeys(RESOURCES, 0.0)
    busy["issue"] = len(trace) / SUB_PARTITIONS
    for operation in trace:
        if operation.unit is not None:
            busy[operation.unit.value] += operation.clocks / SUB_PARTITIONS
        busy["shared memory"] += operation.wavefronts
        busy["l2"] += operation.l2_bytes / machine.l2_bytes
    return busy
