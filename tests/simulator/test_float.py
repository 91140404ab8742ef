"""Floating-point instructions against NumPy, on numbers of all magnitudes and the special values."""

from __future__ import annotations

from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from simulated import Array, run_instruction, special_floats

TINY = np.finfo(np.float32).tiny


def floats(count: int, dtype: type = np.float32) -> list[Array]:
    return [special_floats(dtype, seed=i) for i in range(count)]


def same(got: Array, expected: Array) -> None:
    """Equal bits, except that all NaNs are the same."""
    expected = expected.astype(got.dtype)
    np.testing.assert_array_equal(np.isnan(got), np.isnan(expected))
    unsigned = f"u{got.itemsize}"
    number = ~np.isnan(got)
    np.testing.assert_array_equal(got.view(unsigned)[number], expected.view(unsigned)[number])


def flushed(values: Array) -> Array:
    return np.where(np.abs(values) < TINY, np.copysign(np.float32(0), values), values)


@pytest.fixture(autouse=True)
def _quiet() -> object:
    with np.errstate(all="ignore"):
        yield


BINARY = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide}


@pytest.mark.parametrize("operation", BINARY)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_arithmetic(operation: str, dtype: type) -> None:
    a, b = floats(2, dtype)
    got = run_instruction(f"{operation}.rn.f{8 * a.itemsize} %d, %a, %b;", dtype, a, b)
    same(got, BINARY[operation](a, b))


@pytest.mark.parametrize("operation", ["add", "sub", "mul"])
def test_flushing(operation: str) -> None:
    a, b = (x * np.float32(1e-20) for x in floats(2))
    a, b = np.sort(a), b
    got = run_instruction(f"{operation}.ftz.f32 %d, %a, %b;", np.float32, a, b)
    same(got, flushed(BINARY[operation](flushed(a), flushed(b))))


def test_fused_multiply_add() -> None:
    a, b, c = floats(3)
    got = run_instruction("fma.rn.f32 %d, %a, %b, %c;", np.float32, a, b, c)
    exact = a.astype(np.longdouble) * b + c  # 64 bits of fraction: wrong only for halfway cases beyond them
    expected = exact.astype(np.float32)
    bad = (got != expected) & ~(np.isnan(got) & np.isnan(expected))
    assert bad.mean() < 0.02
    np.testing.assert_allclose(got[bad], expected[bad], rtol=2e-7)


def test_fused_means_rounded_once() -> None:
    a = np.array([1 + 2**-12], dtype=np.float32)
    c = np.array([-(1 + 2**-11)], dtype=np.float32)
    got = run_instruction("fma.rn.f32 %d, %a, %a, %b;", np.float32, a, c)
    assert got[0] == np.float32(2**-24)


def test_saturation() -> None:
    a, b = floats(2)
    got = run_instruction("add.sat.f32 %d, %a, %b;", np.float32, a, b)
    total = a + b
    np.testing.assert_array_equal(got, np.where(np.isnan(total), 0, np.clip(total, 0, 1)))


@pytest.mark.parametrize("operation", ["min", "max"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_extremes(operation: str, dtype: type) -> None:
    a, b = floats(2, dtype)
    b[::5] = -a[::5]
    got = run_instruction(f"{operation}.f{8 * a.itemsize} %d, %a, %b;", dtype, a, b)
    pick = np.fmin if operation == "min" else np.fmax
    expected = pick(a, b)
    both_zero = (a == 0) & (b == 0)
    negative = np.signbit(a) | np.signbit(b) if operation == "min" else np.signbit(a) & np.signbit(b)
    same(got, np.where(both_zero, np.where(negative, -0.0, 0.0), expected))


@pytest.mark.parametrize("operation", ["min", "max"])
def test_extremes_that_keep_nan(operation: str) -> None:
    a, b = floats(2)
    got = run_instruction(f"{operation}.NaN.f32 %d, %a, %b;", np.float32, a, b)
    np.testing.assert_array_equal(got, (np.minimum if operation == "min" else np.maximum)(a, b))


@pytest.mark.parametrize("operation", ["min", "max"])
@pytest.mark.parametrize("modifier", ["", ".ftz", ".NaN"])
def test_extreme_magnitudes_with_the_sign_of_a_product(operation: str, modifier: str) -> None:
    a, b = floats(2)
    got = run_instruction(f"{operation}{modifier}.xorsign.abs.f32 %d, %a, %b;", np.float32, a, b)
    magnitudes = [np.abs(flushed(x) if modifier == ".ftz" else x) for x in (a, b)]
    pick = {"min": np.fmin, "max": np.fmax} if modifier != ".NaN" else {"min": np.minimum, "max": np.maximum}
    same(got, np.copysign(pick[operation](*magnitudes), np.where(np.signbit(a) ^ np.signbit(b), -1, 1).astype(np.float32)))


def test_sign() -> None:
    a, b = floats(2)
    same(run_instruction("neg.f32 %d, %a;", np.float32, a), -a)
    same(run_instruction("abs.f32 %d, %a;", np.float32, a), np.abs(a))
    same(run_instruction("copysign.f32 %d, %a, %b;", np.float32, a, b), np.copysign(b, a))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_roots(dtype: type) -> None:
    (a,) = floats(1, dtype)
    bits = 8 * a.itemsize
    same(run_instruction(f"sqrt.rn.f{bits} %d, %a;", dtype, a), np.sqrt(a))
    same(run_instruction(f"rcp.rn.f{bits} %d, %a;", dtype, a), dtype(1) / a)


def ulps(got: Array, exact: Array) -> Array:
    """Distance from the exact result in units of the last place of a float."""
    finite = np.isfinite(got) & np.isfinite(exact.astype(np.float32))
    np.testing.assert_array_equal(got[~finite], exact.astype(np.float32)[~finite])
    unit = np.spacing(np.maximum(np.abs(exact[finite]).astype(np.float32), TINY)).astype(np.float64)
    return np.abs(got[finite].astype(np.float64) - exact[finite]) / unit


def test_ex2() -> None:
    a = np.concatenate([np.linspace(-160, 135, 5000), np.linspace(-1, 1, 2000), [0, -0.0, np.inf, -np.inf, np.nan, 1e30, -1e30]])
    a = a.astype(np.float32)
    got = run_instruction("ex2.approx.f32 %d, %a;", np.float32, a)
    exact = np.exp2(a.astype(np.float64))
    assert ulps(got, exact).max() < 1.5
    assert run_instruction("ex2.approx.f32 %d, %a;", np.float32, np.array([-np.inf, 3, 200], np.float32)).tolist() == [0, 8, np.inf]
    same(run_instruction("ex2.approx.ftz.f32 %d, %a;", np.float32, a), flushed(got))


@pytest.mark.parametrize(("name", "function"), [("lg2", np.log2), ("rsqrt", lambda x: 1 / np.sqrt(x)), ("tanh", np.tanh), ("sin", np.sin)])
def test_approximations(name: str, function: np.ufunc) -> None:
    (a,) = floats(1)
    if name == "sin":
        a = np.clip(a, -1000, 1000)
    got = run_instruction(f"{name}.approx.f32 %d, %a;", np.float32, a)
    assert ulps(got, function(a.astype(np.float64))).max() < 4


@pytest.mark.parametrize(("rounding", "toward"), [("rz", 0.0), ("rm", -np.inf), ("rp", np.inf)])
@pytest.mark.parametrize("operation", ["add", "mul"])
def test_directed_rounding(operation: str, rounding: str, toward: float) -> None:
    a, b = (np.random.default_rng(i).standard_normal(500).astype(np.float32) for i in range(2))
    got = run_instruction(f"{operation}.{rounding}.f32 %d, %a, %b;", np.float32, a, b)
    exact = BINARY[operation](a.astype(np.longdouble), b.astype(np.longdouble))
    nearest = exact.astype(np.float32)
    lower = np.where(nearest > exact, np.nextafter(nearest, np.float32(-np.inf)), nearest)
    upper = np.where(nearest < exact, np.nextafter(nearest, np.float32(np.inf)), nearest)
    expected = {"rm": lower, "rp": upper, "rz": np.where(exact > 0, lower, upper)}[rounding]
    np.testing.assert_array_equal(got, expected)


COMPARISONS = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal}


@pytest.mark.parametrize("operation", [*COMPARISONS, *(name + "u" for name in COMPARISONS), "num", "nan"])
@pytest.mark.parametrize("kind", ["f32", "f64", "f16", "bf16"])
def test_comparison(operation: str, kind: str) -> None:
    dtype = {"f32": np.float32, "f64": np.float64, "f16": np.float16, "bf16": ml_dtypes.bfloat16}[kind]
    a, b = (special_floats(np.float32 if dtype is ml_dtypes.bfloat16 else dtype, seed=i).astype(dtype) for i in range(2))
    b[::3] = a[::3]
    views = [x.view(np.uint16) if x.itemsize == 2 else x for x in (a, b)]
    got = run_instruction(f"setp.{operation}.{kind} %q, %a, %b; selp.u32 %d, 1, 0, %q;", np.uint32, *views)
    unordered = np.isnan(a.astype(np.float64)) | np.isnan(b.astype(np.float64))
    if operation in ("num", "nan"):
        expected = unordered == (operation == "nan")
    elif operation.endswith("u") and operation not in COMPARISONS:
        expected = COMPARISONS[operation[:-1]](a, b) | unordered
    else:
        expected = COMPARISONS[operation](a, b) & ~unordered
    np.testing.assert_array_equal(got.astype(bool), expected)


@pytest.mark.parametrize("kind", ["f16", "bf16"])
@pytest.mark.parametrize("operation", ["nan", "lt", "equ"])
def test_set_of_packed_halves(operation: str, kind: str) -> None:
    a, b = (special_floats(np.float32, 400, seed=i).astype(HALVES[kind])[:400] for i in range(2))
    b[::3] = a[::3]
    packed = [x.view(np.uint32) for x in (a, b)]
    got = run_instruction(f"set.{operation}.{kind}x2.{kind}x2 %d, %a, %b;", np.uint32, *packed).view(HALVES[kind])
    unordered = np.isnan(a) | np.isnan(b)
    expected = {"nan": unordered, "lt": (a < b) & ~unordered, "equ": (a == b) | unordered}[operation]
    np.testing.assert_array_equal(got.astype(np.float32), expected.astype(np.float32))
    mask = run_instruction(f"set.{operation}.u32.{kind}x2 %d, %a, %b;", np.uint32, *packed).view(np.uint16)
    np.testing.assert_array_equal(mask, np.where(expected, 0xFFFF, 0))


def test_testp() -> None:
    (a,) = floats(1)
    got = run_instruction("testp.subnormal.f32 %q, %a; selp.u32 %d, 1, 0, %q;", np.uint32, a)
    np.testing.assert_array_equal(got.astype(bool), (np.abs(a) < TINY) & (a != 0))


# ---- 16-bit floats

HALVES = {"f16": np.dtype(np.float16), "bf16": np.dtype(ml_dtypes.bfloat16)}


def halves(kind: str, count: int) -> list[Array]:
    return [special_floats(np.float32, seed=i).astype(HALVES[kind]) for i in range(count)]


@pytest.mark.parametrize("kind", HALVES)
@pytest.mark.parametrize("operation", ["add", "sub", "mul", "min", "max"])
def test_half_arithmetic(operation: str, kind: str) -> None:
    a, b = halves(kind, 2)
    if operation in ("min", "max"):
        expected = (np.fmin if operation == "min" else np.fmax)(a.astype(np.float32), b.astype(np.float32)).astype(HALVES[kind])
        keep = ~((a == 0) & (b == 0))
        a, b, expected = a[keep], b[keep], expected[keep]
    else:
        expected = BINARY[operation](a.astype(np.float64), b.astype(np.float64)).astype(HALVES[kind])
    got = run_instruction(f"{operation}.{kind} %d, %a, %b;", np.uint16, a.view(np.uint16), b.view(np.uint16)).view(HALVES[kind])
    same_halves(got, expected)
    packed = [np.resize(x, x.size // 2 * 2).view(np.uint32) for x in (a, b)]
    got = run_instruction(f"{operation}.{kind}x2 %d, %a, %b;", np.uint32, *packed).view(HALVES[kind])
    same_halves(got, expected[: got.size])


def same_halves(got: Array, expected: Array) -> None:
    nan = np.isnan(expected.astype(np.float32))
    np.testing.assert_array_equal(np.isnan(got.astype(np.float32)), nan)
    np.testing.assert_array_equal(got.view(np.uint16)[~nan], expected.view(np.uint16)[~nan])


@pytest.mark.parametrize("kind", HALVES)
def test_half_fma(kind: str) -> None:
    a, b, c = (x[np.isfinite(x.astype(np.float32))][:300] for x in halves(kind, 3))
    got = run_instruction(f"fma.rn.{kind} %d, %a, %b, %c;", np.uint16, *(x.view(np.uint16) for x in (a, b, c))).view(HALVES[kind])
    if kind == "f16":
        expected = (a.astype(np.float64) * b.astype(np.float64) + c.astype(np.float64)).astype(np.float16)
    else:  # exact sums: a double has too few bits for some
        x, y, z = ([Fraction(float(value)) for value in operand] for operand in (a, b, c))
        expected = round_bf16([i * j + k for i, j, k in zip(x, y, z, strict=True)])
    same_halves(got, expected)


def test_bf16_fma_of_ties() -> None:
    """The product lies halfway between two results, and an addend too small for 53 bits decides. The results are those of an H100."""
    a = np.array([0x3D30, 0xB858, 0x3A24, 0x3DC0, 0x3C2A], np.uint16)
    b = np.array([0x3E58, 0xBC88, 0x3F90, 0xBE99, 0x3D20], np.uint16)
    c = np.array([0x1DC8, 0x8B0E, 0x0984, 0x0E45, 0x0F37], np.uint16)
    expected = np.array([0x3C15, 0x3565, 0x3A39, 0xBCE5, 0x39D5], np.uint16)
    np.testing.assert_array_equal(run_instruction("fma.rn.bf16 %d, %a, %b, %c;", np.uint16, a, b, c), expected)
    pairs = [np.resize(x, 10).view(np.uint32) for x in (a, b, c)]
    np.testing.assert_array_equal(
        run_instruction("fma.rn.bf16x2 %d, %a, %b, %c;", np.uint32, *pairs).view(np.uint16), np.resize(expected, 10)
    )


def round_bf16(exact: list[Fraction]) -> Array:
    """Rounded once, ties to even."""
    rounded = []
    for value in exact:
        near = int(np.array(float(value)).astype(np.float32).astype(ml_dtypes.bfloat16).view(np.uint16))
        words = np.array([near, near - 1, near + 1], np.int64).astype(np.uint16)
        choices = [word for word in words if np.isfinite(word.view(ml_dtypes.bfloat16).astype(np.float32))]
        if choices and choices[0] == near:
            near = min(choices, key=lambda word: (abs(Fraction(float(word.view(ml_dtypes.bfloat16))) - value), word & 1))
        rounded.append(near)
    return np.array(rounded, np.uint16).view(ml_dtypes.bfloat16)


@pytest.mark.parametrize("kind", HALVES)
def test_half_sign(kind: str) -> None:
    (a,) = halves(kind, 1)
    word = a.view(np.uint16)
    np.testing.assert_array_equal(run_instruction(f"neg.{kind} %d, %a;", np.uint16, word), word ^ 0x8000)
    np.testing.assert_array_equal(run_instruction(f"abs.{kind} %d, %a;", np.uint16, word), word & 0x7FFF)
