"""mma.sync on integers, 8-bit floats and f64: fragments as the PTX ISA writes them, results bit for bit as NumPy's."""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np
import pytest
from simulated import Array, run_ptx

from cuflash.errors import SimulatorError
from cuflash.simulator import Module

FP8 = {"e4m3": np.dtype(ml_dtypes.float8_e4m3fn), "e5m2": np.dtype(ml_dtypes.float8_e5m2)}
Place = Callable[[int, int, int], tuple[int, int]]  # (g, q, i) -> row, column of element i of the lane with these

# g is groupID and q threadID_in_group of the ISA; one entry for each figure of "Matrix Fragments for mma.…". 8-bit floats lie as 8-bit integers do.
A_PLACES: dict[tuple[str, int], Place] = {
    ("m8n8k16", 8): lambda g, q, i: (g, q * 4 + i),
    ("m16n8k16", 8): lambda g, q, i: (g if i < 4 else g + 8, q * 4 + (i & 3)),
    ("m16n8k32", 8): lambda g, q, i: (g if i < 4 or 8 <= i < 12 else g + 8, q * 4 + (i & 3) + (16 if i >= 8 else 0)),
    ("m8n8k32", 4): lambda g, q, i: (g, q * 8 + i),
    ("m16n8k32", 4): lambda g, q, i: (g if i < 8 else g + 8, q * 8 + (i & 7)),
    ("m16n8k64", 4): lambda g, q, i: (g if i < 8 or 16 <= i < 24 else g + 8, q * 8 + (i & 7) + (32 if i >= 16 else 0)),
    ("m8n8k4", 64): lambda g, q, i: (g, q),
    ("m16n8k4", 64): lambda g, q, i: (g + 8 * i, q),
    ("m16n8k8", 64): lambda g, q, i: (g if i in (0, 2) else g + 8, q if i < 2 else q + 4),
    ("m16n8k16", 64): lambda g, q, i: (g if i % 2 == 0 else g + 8, i // 2 * 4 + q),
}
B_PLACES: dict[tuple[str, int], Place] = {
    ("m8n8k16", 8): lambda g, q, i: (q * 4 + i, g),
    ("m16n8k16", 8): lambda g, q, i: (q * 4 + i, g),
    ("m16n8k32", 8): lambda g, q, i: (q * 4 + (i & 3) + (16 if i >= 4 else 0), g),
    ("m8n8k32", 4): lambda g, q, i: (q * 8 + i, g),
    ("m16n8k32", 4): lambda g, q, i: (q * 8 + i, g),
    ("m16n8k64", 4): lambda g, q, i: (q * 8 + (i & 7) + (32 if i >= 8 else 0), g),
    ("m8n8k4", 64): lambda g, q, i: (q, g),
    ("m16n8k4", 64): lambda g, q, i: (q, g),
    ("m16n8k8", 64): lambda g, q, i: (q + 4 * i, g),
    ("m16n8k16", 64): lambda g, q, i: (q + 4 * i, g),
}


def extents(shape: str) -> tuple[int, int]:
    """Rows of A, and k."""
    rows, depth = shape[1:].split("n8k")
    return int(rows), int(depth)


def fragment(matrix: Array, place: Place, bits: int) -> Array:
    """The registers of an operand: [register][lane], of 32 bits or of 64 for f64."""
    count = matrix.size // 32
    elements = np.array([[matrix[place(lane // 4, lane % 4, i)] for i in range(count)] for lane in range(32)])
    if bits == 64:
        return np.ascontiguousarray(elements.T.astype(np.float64))
    numbers = elements if elements.dtype.kind == "i" else elements.view(np.uint8)
    packed = numbers.astype(np.int64) & ((1 << bits) - 1)
    per_word = 32 // bits
    words = sum(packed[:, i::per_word] << (bits * i) for i in range(per_word))
    return np.ascontiguousarray(words.T.astype(np.uint32))


def accumulator_place(g: int, q: int, i: int) -> tuple[int, int]:
    return g if i < 2 else g + 8, q * 2 + (i & 1)


def accumulators(c: Array) -> Array:
    """The registers of C; two f16 share one."""
    count = c.size // 32
    elements = np.array([[c[accumulator_place(lane // 4, lane % 4, i)] for i in range(count)] for lane in range(32)], c.dtype)
    return np.ascontiguousarray((elements.view(np.uint32) if c.dtype == np.float16 else elements).T)


def mma(opcode: str, a_words: Array, b_words: Array, c: Array) -> Array:
    """Execute one mma and return D as a matrix."""
    c_words = accumulators(c)
    operands = {"a": a_words, "b": b_words, "c": c_words}
    size = {letter: words.itemsize for letter, words in operands.items()}
    lists = {letter: "{" + ",".join(f"%{letter}{i}" for i in range(len(words))) + "}" for letter, words in operands.items()}
    declared = "".join(f".reg .b{8 * size[letter]} %{letter}<{len(words)}>; " for letter, words in operands.items())
    loads = "".join(
        f"ld.param.u64 %p, [param_{letter}]; mad.wide.u32 %p, %t, {size[letter]}, %p;\n"
        + "".join(f"ld.global.b{8 * size[letter]} %{letter}{i}, [%p+{32 * size[letter] * i}];\n" for i in range(len(words)))
        for letter, words in operands.items()
    )
    ptx = f""".version 8.4
.target sm_90
.address_size 64
.visible .entry k(.param .u64 param_a, .param .u64 param_b, .param .u64 param_c)
{{ {declared} .reg .b32 %t; .reg .b64 %p;
mov.u32 %t, %tid.x;
{loads}
mma.sync.aligned.{opcode} {lists["c"]}, {lists["a"]}, {lists["b"]}, {lists["c"]};
{"".join(f"st.global.b{8 * size['c']} [%p+{32 * size['c'] * i}], %c{i};" for i in range(len(c_words)))}
ret; }}"""
    counters = run_ptx(ptx, a_words, b_words, c_words)
    rows, depth = extents(opcode.split(".")[0])
    assert (counters.matrix_instructions, counters.matrix_flops) == (1, 2 * rows * 8 * depth)
    result = np.zeros_like(c)
    elements = np.ascontiguousarray(c_words.T).view(c.dtype)
    for lane in range(32):
        for i in range(c.size // 32):
            result[accumulator_place(lane // 4, lane % 4, i)] = elements[lane, i]
    return result


def random_integers(shape: tuple[int, int], kind: str, seed: int) -> Array:
    bits = int(kind[1])
    low = -(1 << bits - 1) if kind[0] == "s" else 0
    return np.random.default_rng(seed).integers(low, low + (1 << bits), shape)


INTEGER_SHAPES = [(shape, bits) for shape, bits in A_PLACES if bits <= 8]


@pytest.mark.parametrize(("shape", "bits"), INTEGER_SHAPES)
@pytest.mark.parametrize("kinds", ["ss", "su", "us", "uu"])
@pytest.mark.parametrize("saturates", [False, True])
def test_integers(shape: str, bits: int, kinds: str, saturates: bool) -> None:
    rows, depth = extents(shape)
    a_kind, b_kind = f"{kinds[0]}{bits}", f"{kinds[1]}{bits}"
    a, b = random_integers((rows, depth), a_kind, 1), random_integers((depth, 8), b_kind, 2)
    c = np.random.default_rng(3).integers(-(2**31), 2**31, (rows, 8)).astype(np.int32)
    c.flat[:4] = [2**31 - 1, -(2**31), 2**31 - 100, -(2**31) + 100]
    opcode = f"{shape}.row.col{'.satfinite' if saturates else ''}.s32.{a_kind}.{b_kind}.s32"
    got = mma(opcode, fragment(a, A_PLACES[shape, bits], bits), fragment(b, B_PLACES[shape, bits], bits), c)
    exact = c.astype(np.int64) + a @ b
    want = np.clip(exact, -(2**31), 2**31 - 1) if saturates else exact
    np.testing.assert_array_equal(got, want.astype(np.int32))  # wraps around
    assert (exact != exact.astype(np.int32)).any()


@pytest.mark.parametrize("shape", ["m16n8k16", "m16n8k32"])
@pytest.mark.parametrize("accumulator", ["f32", "f16"])
@pytest.mark.parametrize("a_kind", FP8)
@pytest.mark.parametrize("b_kind", FP8)
def test_8_bit_floats(shape: str, accumulator: str, a_kind: str, b_kind: str) -> None:
    """All finite values and infinities; sums in f32 in the order of k, an accumulator of f16 is rounded once."""
    rows, depth = extents(shape)
    rng = np.random.default_rng(depth)

    def matrix(shape: tuple[int, int], kind: str) -> Array:
        values = rng.integers(0, 256, shape).astype(np.uint8).view(FP8[kind])
        return np.where(np.isfinite(values.astype(np.float32)), values, FP8[kind].type(1))

    a, b = matrix((rows, depth), a_kind), matrix((depth, 8), b_kind)
    c = rng.standard_normal((rows, 8)).astype(np.float32 if accumulator == "f32" else np.float16)
    opcode = f"{shape}.row.col.{accumulator}.{a_kind}.{b_kind}.{accumulator}"
    got = mma(opcode, fragment(a, A_PLACES[shape, 8], 8), fragment(b, B_PLACES[shape, 8], 8), c)
    want = c.astype(np.float32)
    for k in range(depth):  # a product of two is exact in f32
        want = want + a[:, k, None].astype(np.float32) * b[None, k].astype(np.float32)
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(got, want.astype(c.dtype))


def test_infinity_and_nan_of_8_bit_floats() -> None:
    a, b = np.ones((16, 32), FP8["e5m2"]), np.ones((32, 8), FP8["e4m3"])
    a[3, 5], a[4, 6], b[7, 2] = np.inf, -np.inf, np.nan
    got = mma(
        "m16n8k32.row.col.f32.e5m2.e4m3.f32",
        fragment(a, A_PLACES["m16n8k32", 8], 8),
        fragment(b, B_PLACES["m16n8k32", 8], 8),
        np.zeros((16, 8), np.float32),
    )
    np.testing.assert_array_equal(got, a.astype(np.float32) @ b.astype(np.float32))


@pytest.mark.parametrize("shape", [shape for shape, bits in A_PLACES if bits == 64])
def test_f64(shape: str) -> None:
    """Operands of 26 bits, so that NumPy's products are exact too and every sum is rounded as by a fused multiply-add."""
    rows, depth = extents(shape)
    rng = np.random.default_rng(depth)

    def matrix(shape: tuple[int, int]) -> Array:
        return np.ldexp(rng.integers(-(2**26), 2**26, shape).astype(np.float64), rng.integers(-40, 20, shape))

    a, b, c = matrix((rows, depth)), matrix((depth, 8)), rng.standard_normal((rows, 8))
    got = mma(f"{shape}.row.col.f64.f64.f64.f64", fragment(a, A_PLACES[shape, 64], 64), fragment(b, B_PLACES[shape, 64], 64), c)
    want = c
    for k in range(depth):
        want = want + a[:, k, None] * b[None, k]
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
    "opcode",
    [
        "m16n8k32.row.col.s32.s8.s4.s32",
        "m16n8k8.row.col.s32.s8.s8.s32",
        "m16n8k32.row.col.f32.s8.s8.f32",
        "m16n8k32.row.col.satfinite.f32.e4m3.e4m3.f32",
        "m16n8k32.row.col.kind::f8f6f4.f32.e4m3.e4m3.f32",
        "m16n8k32.row.col.f16.e4m3.e4m3.f32",
        "m8n8k4.row.col.f32.f64.f64.f32",
        "m16n8k16.row.row.s32.s8.s8.s32",
    ],
)
def test_unsupported_types(opcode: str) -> None:
    ptx = f".version 8.4\n.target sm_90\n.address_size 64\n.visible .entry k() {{ .reg .b32 r<4>; mma.sync.aligned.{opcode} {{r0, r1, r2, r3}}, {{r0, r1, r2, r3}}, {{r0, r1}}, {{r0, r1, r2, r3}}; ret; }}"
    with pytest.raises(SimulatorError, match="does not support"):
        Module(ptx)
