"""mov, setp, set, cvt and cvta: scalar instructions whose operands come in several forms."""

from __future__ import annotations

import functools

from cuflash.simulator.encoder import Encoder, Unsupported, X, vector
from cuflash.simulator.instructions.registry import decodes
from cuflash.simulator.parser import Statement, type_bits

_CLOCKS = {"%clock": "read.clock", "%clock64": "read.clock64", "%globaltimer": "read.clock64", "%clock_hi": "read.clock"}
_WINDOWS = {"global": 0, "const": 0, "shared": 1, "shared::cta": 1, "shared::cluster": 1, "local": 2, "param": 3, "param::entry": 3}
WINDOW_SHIFT = 60

_BOOLEAN = frozenset({"and", "or", "xor"})
_INTEGER_TYPES = frozenset({"u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64"})


@decodes("mov")
def decode_mov(encoder: Encoder, statement: Statement, operands: list[str]) -> None:
    """mov between registers, from symbols and special registers, and packing and unpacking of `{…}`."""
    target, source = operands
    kind = statement.opcode.rsplit(".", 1)[1]
    if source in _CLOCKS:
        encoder.emit(_CLOCKS[source], target)
    elif source.startswith("{"):
        parts = vector(source)
        bits = type_bits(kind)
        encoder.emit(f"pack.b{bits}.b{bits // len(parts)}", target, *parts)
    elif target.startswith("{"):
        parts = vector(target)
        bits = type_bits(kind)
        part_bits = bits // len(parts)
        for i, part in enumerate(parts):
            if part != "_":
                encoder.emit(f"unpack.b{bits}.b{part_bits}", part, source, str(i * part_bits))
    elif kind == "pred" and encoder.width(source) is None:
        encoder.emit("constant.pred", target, source)
    else:
        encoder.emit(f"mov.{kind}", target, source)


def _predicate(encoder: Encoder, text: str) -> str:
    """A predicate operand, which may be written `!p`, or be a constant."""
    if encoder.width(text) is None and text.lstrip("-").isdigit():
        constant = encoder.new_register(1)
        encoder.emit("constant.pred", constant, "1" if int(text) else "0")
        return constant
    if not text.startswith("!"):
        return text
    negated = encoder.new_register(1)
    encoder.emit("not.pred", negated, text[1:].strip())
    return negated


@decodes("and.pred", "or.pred", "xor.pred")
def decode_boolean(encoder: Encoder, statement: Statement, operands: list[str]) -> None:
    """Of two predicates: `xor.pred p, q, -1` is how a compiler writes that p is not q."""
    target, a, b = operands
    encoder.emit(statement.opcode, target, _predicate(encoder, a), _predicate(encoder, b))


def _emit_comparison(encoder: Encoder, name: str, target: str, complement: str | None, a: str, b: str) -> None:
    start = encoder.emit(name, target, a, b)
    if complement is not None:
        encoder.put(start + X, complement, 1, True)


_PACKED_ONES = {"f16x2": 0x3C00, "bf16x2": 0x3F80}
"""The number 1 in one half of a packed type."""
_ALL_BITS = 0xFFFF
"""What such a comparison gives in a half of an integer."""


@functools.lru_cache(maxsize=4096)
def _comparison(opcode: str) -> tuple[str, str]:
    """The name in the core's table of the comparison in a setp or set, and the Boolean operation or ""."""
    parts = opcode.split(".")[1:]
    boolean = parts[1] if len(parts) > 1 and parts[1] in _BOOLEAN else ""
    if boolean:
        del parts[1]
    if "ftz" in parts and parts[-1] != "f32":
        parts.remove("ftz")
    return "setp." + ".".join(parts), boolean


@decodes("setp")
def decode_setp(encoder: Encoder, statement: Statement, operands: list[str]) -> None:
    """setp.op{.bool}.type p{|q}, a, b{, c}: with a Boolean operation the comparison goes to predicates of our own first."""
    name, boolean = _comparison(statement.opcode)
    if name not in encoder.table:
        raise Unsupported("this comparison")
    target, _, other = operands[0].partition("|")
    complement = other.strip() or None
    target = target.strip()
    if not boolean:
        _emit_comparison(encoder, name, target, complement if complement != "_" else None, operands[1], operands[2])
        return
    third = _predicate(encoder, operands[3])
    result, inverse = encoder.new_register(1), encoder.new_register(1)
    _emit_comparison(encoder, name, result, inverse, operands[1], operands[2])
    combined = encoder.new_register(1)  # the third operand may be the target
    encoder.emit(f"{boolean}.pred", combined, result, third)
    if complement is not None and complement != "_":
        encoder.emit(f"{boolean}.pred", complement, inverse, third)
    if target != "_":
        encoder.emit("mov.pred", target, combined)


def _emit_packed_set(encoder: Encoder, name: str, holding: int, operands: list[str]) -> None:
    """Each half of the result is `holding` where the comparison of these halves holds, else 0."""
    if name not in encoder.table:
        raise Unsupported("this comparison")
    halves = []
    for shift in (0, 16):
        parts = [encoder.new_register(32) for _ in range(2)]
        for part, operand in zip(parts, operands[1:], strict=True):
            encoder.emit("shr.u32", part, operand, str(shift))
        holds, half = encoder.new_register(1), encoder.new_register(32)
        encoder.emit(name, holds, *parts)
        encoder.emit("selp.b32", half, str(holding << shift), "0", holds)
        halves.append(half)
    encoder.emit("or.b32", operands[0], *halves)


@decodes("set")
def decode_set(encoder: Encoder, statement: Statement, operands: list[str]) -> None:
    """set.op{.bool}.dtype.stype d, a, b{, c}: a comparison whose result is a number."""
    parts = statement.opcode.split(".")
    kind = parts.pop(-2)
    name, boolean = _comparison(".".join(parts))
    if parts[-1] in _PACKED_ONES and kind in (parts[-1], "u32", "s32") and not boolean:
        _emit_packed_set(encoder, name.removesuffix("x2"), _PACKED_ONES.get(kind, _ALL_BITS), operands)
        return
    if name not in encoder.table or kind not in ("u32", "s32", "f32"):
        raise Unsupported("this comparison")
    result = encoder.new_register(1)
    encoder.emit(name, result, operands[1], operands[2])
    if boolean:
        combined = encoder.new_register(1)
        encoder.emit(f"{boolean}.pred", combined, result, _predicate(encoder, operands[3]))
        result = combined
    encoder.emit("number.f32.pred" if kind == "f32" else "number.u32.pred", operands[0], result)


@decodes(*(f"{operation}{modifier}.xorsign.abs.f32" for operation in ("min", "max") for modifier in ("", ".ftz", ".NaN", ".ftz.NaN")))
def decode_extreme_magnitude(encoder: Encoder, statement: Statement, operands: list[str]) -> None:
    """min.xorsign.abs d, a, b: the smaller magnitude with the sign that a product has."""
    target, *sources = operands
    magnitudes = [encoder.new_register(32) for _ in sources]
    for magnitude, source in zip(magnitudes, sources, strict=True):
        encoder.emit("abs.f32", magnitude, source)
    chosen, sign = encoder.new_register(32), encoder.new_register(32)
    encoder.emit(statement.opcode.replace(".xorsign.abs", ""), chosen, *magnitudes)
    encoder.emit("xor.b32", sign, *sources)
    encoder.emit("and.b32", sign, sign, str(0x80000000))
    encoder.emit("or.b32", target, chosen, sign)


@decodes("min.u16x2", "max.u16x2")
def decode_packed_extreme(encoder: Encoder, statement: Statement, operands: list[str]) -> None:
    """min.u16x2 d, a, b: of the lower halves and of the upper ones."""
    halves = []
    for shift in (0, 16):
        parts = [encoder.new_register(32) for _ in range(2)]
        for part, operand in zip(parts, operands[1:], strict=True):
            encoder.emit("shl.b32", part, operand, str(16 - shift))
            encoder.emit("shr.u32", part, part, "16")
        half = encoder.new_register(32)
        encoder.emit(statement.opcode.replace("u16x2", "u32"), half, *parts)
        encoder.emit("shl.b32", half, half, str(shift))
        halves.append(half)
    encoder.emit("or.b32", operands[0], *halves)


@functools.lru_cache(maxsize=4096)
def _conversion(opcode: str) -> str:
    """The name of a cvt in the core's table."""
    parts = opcode.split(".")
    target, source = parts[-2:]
    modifiers = parts[1:-2]
    if target in _INTEGER_TYPES or source in _INTEGER_TYPES or target in ("f16", "bf16", "f16x2", "bf16x2", "tf32"):
        modifiers = [m for m in modifiers if m != "ftz"]
    if target in ("f16", "bf16") and source == target and not modifiers:
        return "mov.b16"
    if (target, source) == ("bf16", "f16") and not modifiers:
        modifiers = ["rn"]  # compilers leave it out for numbers that need no rounding
    if target in _INTEGER_TYPES and source in ("f16", "bf16"):
        source = "f32"
    if target in _INTEGER_TYPES and source in _INTEGER_TYPES:
        same_sign = target[0] == source[0]
        if same_sign and type_bits(target) >= type_bits(source):
            modifiers = []  # nothing to saturate
    return ".".join(["cvt", *modifiers, target, source])


def _narrow_source(encoder: Encoder, text: str, bits: int) -> str:
    """The low half of a 64-bit register that a conversion reads as a smaller type."""
    if bits == 64 or encoder.width(text) != 64:
        return text
    low = encoder.new_register(32)
    encoder.emit("unpack.b64.b32", low, text, "0")
    return low


@decodes("cvt")
def decode_cvt(encoder: Encoder, statement: Statement, operands: list[str]) -> None:
    """cvt: registers may be wider than the types; the result is extended by its own sign."""
    name = _conversion(statement.opcode)
    if name not in encoder.table:
        raise Unsupported("this conversion")
    target_type, source_type = statement.opcode.split(".")[-2:]
    if source_type in ("f16", "bf16") and target_type in _INTEGER_TYPES:  # by way of f32, which is exact
        wide = encoder.new_register(32)
        encoder.emit(f"cvt.f32.{source_type}", wide, operands[1])
        operands, source_type = [operands[0], wide], "f32"
    sources = [_narrow_source(encoder, text, type_bits(source_type)) for text in operands[1:]]
    if encoder.width(operands[0]) == 64 and type_bits(target_type) < 64:
        narrow = encoder.new_register(32)
        encoder.emit(name, narrow, *sources)
        encoder.emit("cvt.s64.s32" if target_type[0] == "s" else "cvt.u64.u32", operands[0], narrow)
    else:
        encoder.emit(name, operands[0], *sources)


@decodes("cvta")
def decode_cvta(encoder: Encoder, statement: Statement, operands: list[str]) -> None:
    """cvta: a generic address carries the number of its window in the top bits; global addresses are the same in both."""
    parts = statement.opcode.split(".")
    to_space = parts[1] == "to"
    space = parts[2] if to_space else parts[1]
    window = _WINDOWS.get(space)
    if window is None or parts[-1] != "u64":
        raise Unsupported("this conversion of addresses")
    if window == 0:
        encoder.emit("mov.u64", *operands)
    elif to_space:
        encoder.emit("leave.window", *operands)
    else:
        encoder.emit("enter.window", *operands, str(window << WINDOW_SHIFT))


@decodes("isspacep")
def decode_isspacep(encoder: Encoder, statement: Statement, operands: list[str]) -> None:
    """isspacep.space p, a."""
    window = _WINDOWS.get(statement.opcode.split(".", 1)[1])
    if window is None:
        raise Unsupported("this space")
    encoder.emit("isspacep", *operands, str(window))
