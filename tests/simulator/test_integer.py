"""Integer and logic instructions against Python integers, on random and extreme operands."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
from simulated import Array, run_instruction, special_integers

TYPES: dict[str, type[np.generic]] = {
    "u16": np.uint16, "s16": np.int16, "u32": np.uint32, "s32": np.int32, "u64": np.uint64, "s64": np.int64,
    "b16": np.uint16, "b32": np.uint32, "b64": np.uint64,
}  # fmt: skip


def operands(name: str, count: int) -> list[Array]:
    return [special_integers(TYPES[name], seed=i) for i in range(count)]


def expect(function: Callable[..., int], result: npt.DTypeLike, *arrays: Array) -> Array:
    """Apply a function of Python integers and wrap its results."""
    bits = np.dtype(result).itemsize * 8
    values = [function(*map(int, row)) & ((1 << bits) - 1) for row in zip(*arrays, strict=True)]
    return np.array(values, dtype=f"u{bits // 8}").view(result)


def bits_of(name: str) -> int:
    return int(name[1:])


def c_divide(a: int, b: int) -> int:
    quotient = abs(a) // abs(b)
    return quotient if (a < 0) == (b < 0) else -quotient


BINARY: dict[str, Callable[[int, int], int]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul.lo": lambda a, b: a * b,
    "min": min,
    "max": max,
}
BITWISE: dict[str, Callable[[int, int], int]] = {"and": lambda a, b: a & b, "or": lambda a, b: a | b, "xor": lambda a, b: a ^ b}


@pytest.mark.parametrize("name", ["u16", "s16", "u32", "s32", "u64", "s64"])
@pytest.mark.parametrize("operation", BINARY)
def test_arithmetic(operation: str, name: str) -> None:
    a, b = operands(name, 2)
    got = run_instruction(f"{operation}.{name} %d, %a, %b;", TYPES[name], a, b)
    np.testing.assert_array_equal(got, expect(BINARY[operation], TYPES[name], a, b))


@pytest.mark.parametrize("name", ["b16", "b32", "b64"])
@pytest.mark.parametrize("operation", BITWISE)
def test_bitwise(operation: str, name: str) -> None:
    a, b = operands(name, 2)
    got = run_instruction(f"{operation}.{name} %d, %a, %b;", TYPES[name], a, b)
    np.testing.assert_array_equal(got, expect(BITWISE[operation], TYPES[name], a, b))


@pytest.mark.parametrize("operation", ["min", "max"])
def test_extremes_of_halves(operation: str) -> None:
    a, b = (special_integers(np.uint16, seed=i)[:200] for i in range(2))
    got = run_instruction(f"{operation}.u16x2 %d, %a, %b;", np.uint32, a.view(np.uint32), b.view(np.uint32))
    np.testing.assert_array_equal(got.view(np.uint16), getattr(np, operation + "imum")(a, b))


@pytest.mark.parametrize("name", ["u16", "s16", "u32", "s32", "u64", "s64"])
def test_multiply_high(name: str) -> None:
    a, b = operands(name, 2)
    got = run_instruction(f"mul.hi.{name} %d, %a, %b;", TYPES[name], a, b)
    np.testing.assert_array_equal(got, expect(lambda x, y: x * y >> bits_of(name), TYPES[name], a, b))


@pytest.mark.parametrize("name", ["u16", "s16", "u32", "s32"])
def test_multiply_wide(name: str) -> None:
    a, b = operands(name, 2)
    wide = TYPES[f"{name[0]}{2 * bits_of(name)}"]
    got = run_instruction(f"mul.wide.{name} %d, %a, %b;", wide, a, b)
    np.testing.assert_array_equal(got, expect(lambda x, y: x * y, wide, a, b))
    c = special_integers(wide, seed=2)
    got = run_instruction(f"mad.wide.{name} %d, %a, %b, %c;", wide, a, b, c)
    np.testing.assert_array_equal(got, expect(lambda x, y, z: x * y + z, wide, a, b, c))


@pytest.mark.parametrize("name", ["u32", "s32", "u64", "s64"])
def test_multiply_add(name: str) -> None:
    a, b, c = operands(name, 3)
    got = run_instruction(f"mad.lo.{name} %d, %a, %b, %c;", TYPES[name], a, b, c)
    np.testing.assert_array_equal(got, expect(lambda x, y, z: x * y + z, TYPES[name], a, b, c))
    got = run_instruction(f"mad.hi.{name} %d, %a, %b, %c;", TYPES[name], a, b, c)
    np.testing.assert_array_equal(got, expect(lambda x, y, z: (x * y >> bits_of(name)) + z, TYPES[name], a, b, c))
    if bits_of(name) == 32:
        got = run_instruction(f"sad.{name} %d, %a, %b, %c;", TYPES[name], a, b, c)
        np.testing.assert_array_equal(got, expect(lambda x, y, z: abs(x - y) + z, TYPES[name], a, b, c))


@pytest.mark.parametrize("name", ["u16", "s16", "u32", "s32", "u64", "s64"])
def test_division(name: str) -> None:
    a, b = operands(name, 2)
    b[b == 0] = 3
    got = run_instruction(f"div.{name} %d, %a, %b;", TYPES[name], a, b)
    np.testing.assert_array_equal(got, expect(c_divide, TYPES[name], a, b))
    got = run_instruction(f"rem.{name} %d, %a, %b;", TYPES[name], a, b)
    np.testing.assert_array_equal(got, expect(lambda x, y: x - c_divide(x, y) * y, TYPES[name], a, b))


@pytest.mark.parametrize("name", ["s16", "s32", "s64"])
def test_negate_and_absolute(name: str) -> None:
    (a,) = operands(name, 1)
    np.testing.assert_array_equal(run_instruction(f"neg.{name} %d, %a;", TYPES[name], a), expect(lambda x: -x, TYPES[name], a))
    np.testing.assert_array_equal(run_instruction(f"abs.{name} %d, %a;", TYPES[name], a), expect(abs, TYPES[name], a))


@pytest.mark.parametrize("name", ["b16", "b32", "b64"])
def test_not(name: str) -> None:
    (a,) = operands(name, 1)
    np.testing.assert_array_equal(run_instruction(f"not.{name} %d, %a;", TYPES[name], a), expect(lambda x: ~x, TYPES[name], a))
    np.testing.assert_array_equal(run_instruction(f"cnot.{name} %d, %a;", TYPES[name], a), expect(lambda x: x == 0, TYPES[name], a))


@pytest.mark.parametrize("name", ["b16", "b32", "b64", "u16", "s16", "u32", "s32", "u64", "s64"])
def test_shifts(name: str) -> None:
    (a,) = operands(name, 1)
    shift = np.resize(np.array([0, 1, 5, 15, 16, 17, 31, 32, 33, 63, 64, 65, 0xFFFFFFFF], dtype=np.uint32), a.size)
    right = run_instruction(f"shr.{name} %d, %a, %b;", TYPES[name], a, shift)
    np.testing.assert_array_equal(right, expect(lambda x, s: x >> min(s, 64), TYPES[name], a, shift))
    if name[0] == "b":
        left = run_instruction(f"shl.{name} %d, %a, %b;", TYPES[name], a, shift)
        np.testing.assert_array_equal(left, expect(lambda x, s: x << s if s < 64 else 0, TYPES[name], a, shift))


@pytest.mark.parametrize("direction", ["l", "r"])
@pytest.mark.parametrize("mode", ["wrap", "clamp"])
def test_funnel_shift(direction: str, mode: str) -> None:
    a, b, c = operands("u32", 3)

    def shift(x: int, y: int, s: int) -> int:
        s = s & 31 if mode == "wrap" else min(s, 32)
        pair = y << 32 | x
        return pair << s >> 32 if direction == "l" else pair >> s

    got = run_instruction(f"shf.{direction}.{mode}.b32 %d, %a, %b, %c;", np.uint32, a, b, c)
    np.testing.assert_array_equal(got, expect(shift, np.uint32, a, b, c))


@pytest.mark.parametrize("table", [0x00, 0x80, 0xE8, 0x96, 0xCA, 0x1B, 0xFF])
def test_lop3(table: int) -> None:
    a, b, c = operands("u32", 3)

    def lookup(x: int, y: int, z: int) -> int:
        return sum((table >> ((x >> i & 1) << 2 | (y >> i & 1) << 1 | (z >> i & 1)) & 1) << i for i in range(32))

    got = run_instruction(f"lop3.b32 %d, %a, %b, %c, {table};", np.uint32, a, b, c)
    np.testing.assert_array_equal(got, expect(lookup, np.uint32, a, b, c))


def extract(bits: int, signed: bool) -> Callable[[int, int, int], int]:
    def field(x: int, position: int, length: int) -> int:
        position, length = position & 255, length & 255
        if length == 0:
            return 0
        top = min(position + length - 1, bits - 1)
        sign = (x >> top & 1) if signed else 0
        unsigned = x & ((1 << bits) - 1)
        result = 0
        for i in range(bits):
            inside = i < length and position + i < bits
            result |= ((unsigned >> (position + i) & 1) if inside else sign) << i
        return result

    return field


@pytest.mark.parametrize("name", ["u32", "s32", "u64", "s64"])
def test_bit_field_extract(name: str) -> None:
    (a,) = operands(name, 1)
    rng = np.random.default_rng(1)
    position, length = rng.integers(0, 80, (2, a.size), dtype=np.uint32)
    got = run_instruction(f"bfe.{name} %d, %a, %b, %c;", TYPES[name], a, position, length)
    np.testing.assert_array_equal(got, expect(extract(bits_of(name), name[0] == "s"), TYPES[name], a, position, length))


@pytest.mark.parametrize("name", ["b32", "b64"])
def test_bit_field_insert(name: str) -> None:
    a, b = operands(name, 2)
    rng = np.random.default_rng(1)
    position, length = rng.integers(0, 80, (2, a.size), dtype=np.uint32)

    def insert(x: int, y: int, p: int, n: int) -> int:
        mask = ((1 << n) - 1) << p
        return (y & ~mask) | (x << p & mask)

    got = run_instruction(f"bfi.{name} %d, %a, %b, %c, %e;", TYPES[name], a, b, position, length)
    np.testing.assert_array_equal(got, expect(insert, TYPES[name], a, b, position, length))


def permute(x: int, y: int, selector: int) -> int:
    pool = [(y << 32 | x) >> 8 * i & 255 for i in range(8)]
    result = 0
    for i in range(4):
        control = selector >> 4 * i & 15
        byte = pool[control & 7]
        result |= ((255 if byte & 128 else 0) if control & 8 else byte) << 8 * i
    return result


def test_permute() -> None:
    a, b, c = operands("u32", 3)
    got = run_instruction("prmt.b32 %d, %a, %b, %c;", np.uint32, a, b, c)
    np.testing.assert_array_equal(got, expect(permute, np.uint32, a, b, c))


@pytest.mark.parametrize("bits", [32, 64])
def test_counting_bits(bits: int) -> None:
    (a,) = operands(f"u{bits}", 1)
    got = run_instruction(f"popc.b{bits} %d, %a;", np.uint32, a)
    np.testing.assert_array_equal(got, expect(lambda x: x.bit_count(), np.uint32, a))
    got = run_instruction(f"clz.b{bits} %d, %a;", np.uint32, a)
    np.testing.assert_array_equal(got, expect(lambda x: bits - x.bit_length(), np.uint32, a))
    got = run_instruction(f"brev.b{bits} %d, %a;", TYPES[f"u{bits}"], a)
    np.testing.assert_array_equal(got, expect(lambda x: int(f"{x:0{bits}b}"[::-1], 2), TYPES[f"u{bits}"], a))
    got = run_instruction(f"bfind.u{bits} %d, %a;", np.uint32, a)
    np.testing.assert_array_equal(got, expect(lambda x: x.bit_length() - 1, np.uint32, a))
    signed = a.view(TYPES[f"s{bits}"])
    got = run_instruction(f"bfind.shiftamt.s{bits} %d, %a;", np.uint32, signed)
    reference = expect(lambda x: bits - (x if x >= 0 else ~x).bit_length() if x not in (0, -1) else -1, np.uint32, signed)
    np.testing.assert_array_equal(got, reference)


def test_carry_chain() -> None:
    a, b = operands("u64", 2)
    asm = "{.reg .b32 x,y,z,w; mov.b64 {x,y}, %a; mov.b64 {z,w}, %b; add.cc.u32 x, x, z; addc.u32 y, y, w; mov.b64 %d, {x,y};}"
    np.testing.assert_array_equal(run_instruction(asm, np.uint64, a, b), a + b)
    asm = "{.reg .b32 x,y,z,w; mov.b64 {x,y}, %a; mov.b64 {z,w}, %b; sub.cc.u32 x, x, z; subc.u32 y, y, w; mov.b64 %d, {x,y};}"
    np.testing.assert_array_equal(run_instruction(asm, np.uint64, a, b), a - b)


def test_packing() -> None:
    (a,) = operands("u64", 1)
    asm = "{.reg .b16 p,q,r,s; mov.b64 {p,q,r,s}, %a; mov.b64 %d, {s,r,q,p};}"
    expected = a.view(np.uint16).reshape(-1, 4)[:, ::-1].copy().view(np.uint64)[:, 0]
    np.testing.assert_array_equal(run_instruction(asm, np.uint64, a), expected)
    (b,) = operands("u32", 1)
    asm = "{.reg .b16 p; mov.b32 {_,p}, %a; mov.b32 %d, {p,p};}"
    np.testing.assert_array_equal(run_instruction(asm, np.uint32, b), (b >> np.uint32(16)) * np.uint32(0x10001))


@pytest.mark.parametrize("kind", ["s32", "u32", "s64", "u64", "s16", "u16"])
@pytest.mark.parametrize("operation", ["eq", "ne", "lt", "le", "gt", "ge"])
def test_comparison(kind: str, operation: str) -> None:
    a, b = operands(kind, 2)
    b[::3] = a[::3]
    got = run_instruction(f"setp.{operation}.{kind} %q|%w, %a, %b; selp.u32 %d, 1, 0, %q; @%w add.u32 %d, %d, 2;", np.uint32, a, b)
    yes = {"eq": a == b, "ne": a != b, "lt": a < b, "le": a <= b, "gt": a > b, "ge": a >= b}[operation]
    np.testing.assert_array_equal(got, np.where(yes, 1, 2))


@pytest.mark.parametrize("boolean", ["and", "or", "xor"])
def test_comparison_with_boolean(boolean: str) -> None:
    a, b = operands("s32", 2)
    combine = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}[boolean]
    asm = f"{{.reg .pred r; setp.gt.s32 r, %a, 5;setp.lt.{boolean}.s32 %q|%w, %a, %b, !r; selp.u32 %d, 1, 0, %q; @%w add.u32 %d, %d, 2;}}"
    got = run_instruction(asm, np.uint32, a, b)
    other = ~(a > 5)
    expected = combine(a < b, other) + 2 * combine(~(a < b), other).astype(np.uint32)
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("constant", ["-1", "0", "1"])
@pytest.mark.parametrize("boolean", ["and", "or", "xor"])
def test_boolean_with_a_constant(boolean: str, constant: str) -> None:
    a, b = operands("s32", 2)
    combine = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}[boolean]
    asm = f"setp.lt.s32 %q, %a, %b; {boolean}.pred %w, %q, {constant}; selp.u32 %d, 1, 0, %w;"
    np.testing.assert_array_equal(run_instruction(asm, np.uint32, a, b), combine(a < b, constant != "0"))


def test_set() -> None:
    a, b = operands("s32", 2)
    np.testing.assert_array_equal(run_instruction("set.lt.u32.s32 %d, %a, %b;", np.int32, a, b), -(a < b).astype(np.int32))
    np.testing.assert_array_equal(run_instruction("set.lt.f32.s32 %d, %a, %b;", np.float32, a, b), (a < b).astype(np.float32))


def test_slct() -> None:
    a, b, c = operands("s32", 3)
    np.testing.assert_array_equal(run_instruction("slct.s32.s32 %d, %a, %b, %c;", np.int32, a, b, c), np.where(c >= 0, a, b))


@pytest.mark.parametrize("bits", [32])
def test_saturating_addition(bits: int) -> None:
    a, b = operands(f"s{bits}", 2)
    got = run_instruction(f"add.sat.s{bits} %d, %a, %b;", np.int32, a, b)
    np.testing.assert_array_equal(got, np.clip(a.astype(np.int64) + b, -(2**31), 2**31 - 1))
