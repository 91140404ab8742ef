"""mma.sync, ldmatrix and stmatrix."""

from __future__ import annotations

import functools
import re
from typing import NamedTuple

from cuflash.simulator.encoder import ADDRESS_64, A, C, Encoder, Unsupported, vector
from cuflash.simulator.instructions.registry import decodes
from cuflash.simulator.parser import Statement

_SHARED, _GENERIC = 1, 4  # spaces in core/access.h

_BITS = {"f16": 16, "bf16": 16, "tf32": 32, "e4m3": 8, "e5m2": 8, "s8": 8, "u8": 8, "s4": 4, "u4": 4, "f64": 64}
_FP8 = ("e4m3", "e5m2")
_SHAPE = re.compile(r"m(8|16)n8k(\d+)$")
_A_SIGNED, _B_SIGNED, _SATURATES = 1, 2, 4  # in field c of a record, see core/scalar_matrix.cpp


class _Product(NamedTuple):
    """An mma: its name in the core's table, flags of field c, the numbers of registers of D, A, B and C, and their bits."""

    name: str
    flags: int
    counts: tuple[int, int, int, int]
    bits: int


@functools.lru_cache(maxsize=4096)
def _mma(opcode: str) -> _Product:
    """Read mma.sync.aligned.shape.row.col{.satfinite}.dtype.atype.btype.ctype."""
    parts = opcode.split(".")
    saturates = parts[6:7] == ["satfinite"]
    if saturates:
        del parts[6]
    shape = _SHAPE.match(parts[3]) if len(parts) == 10 and parts[1:3] == ["sync", "aligned"] and parts[4:6] == ["row", "col"] else None
    d_type, a_type, b_type, c_type = parts[-4:]
    bits = _BITS.get(a_type, 0)
    integers = a_type[0] in "su" and b_type[0] in "su" and d_type == "s32"
    if shape is None or not bits or bits != _BITS.get(b_type) or c_type != d_type or (saturates and not integers):
        raise Unsupported("this matrix multiplication")
    rows, depth = int(shape[1]), int(shape[2])
    if integers:
        name = f"mma.{shape[0]}.{bits}bit"
    elif a_type == b_type == d_type == "f64":
        name = f"mma.{shape[0]}.f64"
    elif a_type in _FP8 and b_type in _FP8:
        name = f"mma.{shape[0]}.{d_type}.{a_type}.{b_type}"
    elif a_type == b_type:
        name = f"mma.{shape[0]}.{d_type}.{a_type}"
    else:
        raise Unsupported("this matrix multiplication")
    flags = (a_type[0] == "s") * _A_SIGNED | (b_type[0] == "s") * _B_SIGNED | saturates * _SATURATES
    size = max(bits, 32)  # of a register
    accumulators = rows * 8 // 32 // (2 if d_type == "f16" else 1)
    counts = (accumulators, rows * depth * bits // 32 // size, depth * 8 * bits // 32 // size, accumulators)
    return _Product(name, flags, counts, size if a_type == "f64" else 32)


@decodes("mma")
def decode_mma(encoder: Encoder, statement: Statement, operands: list[str]) -> None:
    """mma.sync.aligned.shape.row.col{.satfinite}.dtype.atype.btype.ctype d, a, b, c."""
    product = _mma(statement.opcode)
    if product.name not in encoder.table:
        raise Unsupported("this matrix multiplication")
    start = encoder.begin(product.name)
    encoder.set_field(start, C, product.flags)
    encoder.add_extra(start)
    for operand, count, defines in zip(operands, product.counts, (True, False, False, False), strict=True):
        registers = vector(operand)
        if len(registers) != count:
            raise Unsupported(f"{len(registers)} registers where {count} are expected")
        for register in registers:
            encoder.put_extra(register, product.bits, defines)


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
