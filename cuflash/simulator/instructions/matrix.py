"""mma.sync, ldmatrix and stmatrix."""

from __future__ import annotations

import functools

from cuflash.simulator.encoder import ADDRESS_64, A, C, Encoder, Unsupported, vector
from cuflash.simulator.instructions.registry import decodes
from cuflash.simulator.parser import Statement

_SHARED, _GENERIC = 1, 4  # spaces in core/access.h

# Input type -> elements in a register.
_VALUES_PER_REGISTER = {"f16": 2, "bf16": 2, "tf32": 1}


@functools.lru_cache(maxsize=4096)
def _mma(opcode: str) -> tuple[str, tuple[int, int, int, int]]:
    """Name in the core's table of an mma, and the numbers of registers of D, A, B and C."""
    parts = opcode.split(".")
    shape = next((part for part in parts if part.startswith(("m16n8k", "m8n8k"))), "")
    d_type, a_type, b_type, c_type = parts[-4:]
    values = _VALUES_PER_REGISTER.get(a_type, 0)
    if parts[1:3] != ["sync", "aligned"] or not values or a_type != b_type or c_type != d_type or parts[4:6] != ["row", "col"]:
        raise Unsupported("this matrix multiplication")
    depth = int(shape.rpartition("k")[2])
    accumulators = 4 if d_type == "f32" else 2
    return f"mma.{shape}.{d_type}.{a_type}", (accumulators, depth // 2 // values, depth // 4 // values, accumulators)


@decodes("mma")
def decode_mma(encoder: Encoder, statement: Statement, operands: list[str]) -> None:
    """mma.sync.aligned.shape.row.col.dtype.atype.btype.ctype d, a, b, c."""
    name, counts = _mma(statement.opcode)
    if name not in encoder.table:
        raise Unsupported("this matrix multiplication")
    start = encoder.begin(name)
    encoder.add_extra(start)
    for operand, count, defines in zip(operands, counts, (True, False, False, False), strict=True):
        registers = vector(operand)
        if len(registers) != count:
            raise Unsupported(f"{len(registers)} registers where {count} are expected")
        for register in registers:
            encoder.put_extra(register, 32, defines)


def _emit_matrix_move(encoder: Encoder, opcode: str, registers: list[str], address: str, defines: bool) -> None:
    parts = opcode.split(".")
    count = next((part for part in parts if part in ("x1", "x2", "x4")), "")
    if "m8n8" not in parts or not count or parts[-1] != "b16" or len(registers) != int(count[1]):
        raise Unsupported("this shape")
    start = encoder.begin(f"{parts[0]}.{count}" + (".trans" if "trans" in parts else ""))
    shared = any(part.startswith("shared") for part in parts)
    offset, wide = encoder.put_address(start, A, address, 32 if shared else 64)
    encoder.set_field(start, C, (_SHARED if shared else _GENERIC) | (ADDRESS_64 if wide else 0))
    encoder.add_extra(start, offset & 0xFFFF, offset >> 16 & 0xFFFF)
    for register in registers:
        encoder.put_extra(register, 32, defines)


@decodes("ldmatrix")
def decode_ldmatrix(encoder: Encoder, statement: Statement, operands: list[str]) -> None:
    """ldmatrix.sync.aligned.m8n8.num{.trans}{.shared}.b16 r, [p]."""
    _emit_matrix_move(encoder, statement.opcode, vector(operands[0]), operands[1], True)


@decodes("stmatrix")
def decode_stmatrix(encoder: Encoder, statement: Statement, operands: list[str]) -> None:
    """stmatrix.sync.aligned.m8n8.num{.trans}{.shared}.b16 [p], r."""
    _emit_matrix_move(encoder, statement.opcode, vector(operands[1]), operands[0], False)
