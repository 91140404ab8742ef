"""wgmma: matrix products of a warpgroup."""

from __future__ import annotations

import functools
import re

from cuflash.simulator.encoder import C, Encoder, Unsupported, parse_integer, vector
from cuflash.simulator.instructions.registry import decodes
from cuflash.simulator.parser import Statement

# The layout of `extra` in core/wgmma.h.
_A_SLOTS = 4
_A_IN_REGISTERS, _A_TRANSPOSED, _B_TRANSPOSED, _NEGATED = 1, 2, 4, 8

_DEPTHS = {"f16": 16, "bf16": 16, "tf32": 8, "e4m3": 32, "e5m2": 32}
_OPCODE = re.compile(r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k(\d+)\.(\w+)\.(\w+)\.(\w+)$")


@functools.lru_cache(maxsize=4096)
def _product(opcode: str) -> tuple[str, int, bool]:
    """Name in the core's table of a wgmma.mma_async, its N, and whether its operands may be transposed."""
    match = _OPCODE.match(opcode)
    if match is None or not 8 <= int(match[1]) <= 256 or int(match[1]) % 8 or _DEPTHS.get(match[4]) != int(match[2]):
        raise Unsupported("this matrix multiplication")
    return f"wgmma.{match[3]}.{match[4]}.{match[5]}", int(match[1]), match[4] in ("f16", "bf16")


def _scale_d(encoder: Encoder, text: str) -> str:
    """The predicate scale-d, which may be written as the number 0 or 1."""
    if text not in ("0", "1"):
        return text
    predicate = encoder.new_register(1)
    encoder.emit("constant.pred", predicate, text)
    return predicate


def _factor(text: str) -> bool:
    """Whether an imm-scale is -1."""
    if text not in ("1", "-1"):
        raise Unsupported(f"the scale {text}")
    return text == "-1"


@decodes("wgmma")
def decode_wgmma(encoder: Encoder, statement: Statement, operands: list[str]) -> None:
    """wgmma.mma_async.sync.aligned.shape.dtype.atype.btype d, a, b-desc, scale-d, imm-scale-a, imm-scale-b{, imm-trans-a}{, imm-trans-b}."""
    part = statement.opcode.split(".")[1]
    if part in ("fence", "commit_group", "wait_group"):
        encoder.emit(f"wgmma.{part}", *operands)
        return
    name, n, transposable = _product(statement.opcode)
    if name not in encoder.table:
        raise Unsupported("this matrix multiplication")
    d, a, b, scale_d, scale_a, scale_b, *transposed = operands
    in_registers = a.startswith("{")
    if len(transposed) != (0 if not transposable else 1 if in_registers else 2):
        raise Unsupported(f"{len(operands)} operands")
    flags = _A_IN_REGISTERS if in_registers else 0
    flags |= _NEGATED if _factor(scale_a) != _factor(scale_b) else 0
    if transposed and parse_integer(transposed[-1]):
        flags |= _B_TRANSPOSED
    if len(transposed) == 2 and parse_integer(transposed[0]):
        flags |= _A_TRANSPOSED
    accumulators = vector(d)
    if len(accumulators) != (n // 4 if name.startswith("wgmma.f16") else n // 2) or (in_registers and len(vector(a)) != _A_SLOTS):
        raise Unsupported("this number of registers")
    scale_d = _scale_d(encoder, scale_d)
    start = encoder.begin(name)
    encoder.put(start + C, scale_d, 1, False)
    encoder.add_extra(start, n, flags)
    for register in vector(a):
        encoder.put_extra(register, 32 if in_registers else 64, False)
    if not in_registers:
        for _ in range(_A_SLOTS - 1):
            encoder.add_extra_value(0)
    encoder.put_extra(b, 64, False)
    for register in accumulators:
        encoder.put_extra_in_place(register, 32)
