"""cvt: between all types, roundings, saturation, and registers wider than the type."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from simulated import Array, run_cuda, run_instruction, special_floats, special_integers

INTEGERS = {f"{sign}{bits}": np.dtype(f"{'i' if sign == 's' else 'u'}{bits // 8}") for sign in "su" for bits in (8, 16, 32, 64)}


@pytest.fixture(autouse=True)
def _quiet() -> object:
    with np.errstate(all="ignore"):
        yield


@pytest.mark.parametrize("target", INTEGERS)
@pytest.mark.parametrize("source", [name for name in INTEGERS if not name.endswith("8")])
def test_integer_to_integer(target: str, source: str) -> None:
    a = special_integers(INTEGERS[source])
    if target.endswith("8"):  # 8-bit types live in wider registers: the result is extended
        wide = np.int32 if target[0] == "s" else np.uint32
        got = run_instruction(f"cvt.{target}.{source} %d, %a;", wide, a)
        np.testing.assert_array_equal(got, a.astype(INTEGERS[target]).astype(wide))
        return
    got = run_instruction(f"cvt.{target}.{source} %d, %a;", INTEGERS[target], a)
    np.testing.assert_array_equal(got, a.astype(INTEGERS[target]))
    got = run_instruction(f"cvt.sat.{target}.{source} %d, %a;", INTEGERS[target], a)
    info = np.iinfo(INTEGERS[target])
    expected = np.array([min(max(int(x), info.min), info.max) for x in a], dtype=INTEGERS[target])
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("target", ["s16", "u16", "s32", "u32", "s64", "u64"])
@pytest.mark.parametrize("rounding", ["rni", "rzi", "rmi", "rpi"])
@pytest.mark.parametrize("source", ["f32", "f64"])
def test_float_to_integer(target: str, rounding: str, source: str) -> None:
    a = special_floats(np.float32 if source == "f32" else np.float64)
    got = run_instruction(f"cvt.{rounding}.{target}.{source} %d, %a;", INTEGERS[target], a)
    whole = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}[rounding](a.astype(np.float64))
    info = np.iinfo(INTEGERS[target])
    expected = [0 if np.isnan(x) else info.max if x >= info.max else info.min if x <= info.min else int(x) for x in whole]
    np.testing.assert_array_equal(got, np.array(expected, dtype=INTEGERS[target]))


@pytest.mark.parametrize("source", ["s16", "u16", "s32", "u32", "s64", "u64"])
def test_integer_to_float(source: str) -> None:
    a = special_integers(INTEGERS[source])
    np.testing.assert_array_equal(run_instruction(f"cvt.rn.f32.{source} %d, %a;", np.float32, a), a.astype(np.float32))
    np.testing.assert_array_equal(run_instruction(f"cvt.rn.f64.{source} %d, %a;", np.float64, a), a.astype(np.float64))
    down = run_instruction(f"cvt.rm.f32.{source} %d, %a;", np.float32, a)
    up = run_instruction(f"cvt.rp.f32.{source} %d, %a;", np.float32, a)
    for value, low, high in zip(a.tolist(), down.tolist(), up.tolist(), strict=True):
        assert int(low) <= value <= int(high)
        assert low == high or np.nextafter(np.float32(low), np.float32(np.inf)) == np.float32(high)


def bits_equal(got: Array, expected: Array) -> None:
    nan = np.isnan(expected.astype(np.float32))
    np.testing.assert_array_equal(np.isnan(got.astype(np.float32)), nan)
    np.testing.assert_array_equal(got.view(np.uint16)[~nan], expected.view(np.uint16)[~nan])


KINDS = {"f16": np.dtype(np.float16), "bf16": np.dtype(ml_dtypes.bfloat16)}


@pytest.mark.parametrize("kind", KINDS)
def test_narrowing(kind: str) -> None:
    a = special_floats(np.float32, 4000) * np.float32(2.0**-10)
    ties = (np.arange(-300, 300) / 256 + 2.0**-9).astype(np.float32)
    a = np.concatenate([a, ties, np.array([65504, 65519.996, 65520, 2.0**-24, 2.0**-25, 3 * 2.0**-25, 3.4e38], np.float32)])
    got = run_instruction(f"cvt.rn.{kind}.f32 %d, %a;", np.uint16, a).view(KINDS[kind])
    bits_equal(got, a.astype(KINDS[kind]))
    b = a[::-1].copy()
    packed = run_instruction(f"cvt.rn.{kind}x2.f32 %d, %a, %b;", np.uint32, a, b).view(KINDS[kind]).reshape(-1, 2)
    bits_equal(packed[:, 1].copy(), a.astype(KINDS[kind]))
    bits_equal(packed[:, 0].copy(), b.astype(KINDS[kind]))
    relu = run_instruction(f"cvt.rn.relu.{kind}.f32 %d, %a;", np.uint16, a).view(KINDS[kind])
    bits_equal(relu, np.where(a <= 0, np.float32(0), a).astype(KINDS[kind]))


@pytest.mark.parametrize("kind", KINDS)
def test_narrowing_toward_zero(kind: str) -> None:
    a = np.random.default_rng(0).standard_normal(3000).astype(np.float32)
    got = run_instruction(f"cvt.rz.{kind}.f32 %d, %a;", np.uint16, a).view(KINDS[kind]).astype(np.float32)
    assert (np.abs(got) <= np.abs(a)).all()
    away = (np.abs(got).astype(KINDS[kind]).view(np.uint16) + 1).view(KINDS[kind]).astype(np.float32)
    assert (away > np.abs(a)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_widening_is_exact(kind: str) -> None:
    every = np.arange(65536, dtype=np.uint32).astype(np.uint16)
    got = run_instruction(f"cvt.f32.{kind} %d, %a;", np.float32, every)
    np.testing.assert_array_equal(got, every.view(KINDS[kind]).astype(np.float32))


@pytest.mark.parametrize("rounding", ["", ".rn"])
def test_half_to_bfloat16(rounding: str) -> None:
    """Without a rounding, as compilers write it for numbers that need none, it is to nearest even too."""
    every = np.arange(65536, dtype=np.uint32).astype(np.uint16)
    got = run_instruction(f"cvt{rounding}.bf16.f16 %d, %a;", np.uint16, every).view(ml_dtypes.bfloat16)
    bits_equal(got, every.view(np.float16).astype(np.float32).astype(ml_dtypes.bfloat16))


@pytest.mark.parametrize("kind", KINDS)
def test_relu_of_negative_zero(kind: str) -> None:
    """A GPU gives +0, and 0x7fff for a NaN of either sign."""
    a = np.array([0x80000000, 0xC3170000, 0x80000001, 0xFF800000, 0xFFE2D928, 0x7FC00000], np.uint32).view(np.float32)
    b = np.array([0x32FFFAE5, 0x80000000, 0x80000000, 0x80000000, 0x80000000, 0x80000000], np.uint32).view(np.float32)
    got = run_instruction(f"cvt.rn.relu.{kind}x2.f32 %d, %a, %b;", np.uint32, a, b)
    assert got.tolist() == [int(b[:1].astype(KINDS[kind]).view(np.uint16)[0]), 0, 0, 0, 0x7FFF0000, 0x7FFF0000]


def test_every_half_survives_a_round_trip() -> None:
    every = np.arange(65536, dtype=np.uint32).astype(np.uint16)
    got = run_instruction("{.reg .f32 x; cvt.f32.f16 x, %a; cvt.rn.f16.f32 %d, x;}", np.uint16, every)
    bits_equal(got.view(np.float16), every.view(np.float16))


FP8 = {"e4m3": np.dtype(ml_dtypes.float8_e4m3fn), "e5m2": np.dtype(ml_dtypes.float8_e5m2)}


def narrowed(values: Array, kind: str) -> Array:
    """Round to nearest even, saturate, and make every NaN 0x7f; [bytes]."""
    limit = np.float32(448 if kind == "e4m3" else 57344)
    with_nan = np.clip(values.astype(np.float32), -limit, limit).astype(FP8[kind]).view(np.uint8)
    return np.where(np.isnan(values), np.uint8(0x7F), with_nan)


@pytest.mark.parametrize("kind", FP8)
def test_narrowing_to_8_bits(kind: str) -> None:
    every = np.arange(256, dtype=np.uint8).view(FP8[kind]).astype(np.float32)
    finite = np.sort(every[np.isfinite(every)])
    ties = (finite[1:] + finite[:-1]) / 2
    beside = np.concatenate([np.nextafter(ties, np.float32(np.inf)), np.nextafter(ties, np.float32(-np.inf))])
    large = np.array([448, 464, 479.9, 480, 500, 57344, 61439, 61440, 65536, 3e38, np.inf, -np.inf], np.float32)
    a = np.concatenate(
        [special_floats(np.float32), np.random.default_rng(0).standard_normal(500).astype(np.float32), finite, ties, beside, large]
    )
    b = a[::-1].copy()
    for relu in ("", ".relu"):
        got = run_instruction(f"cvt.rn.satfinite{relu}.{kind}x2.f32 %d, %a, %b;", np.uint16, a, b).view(np.uint8).reshape(-1, 2)
        low, high = (np.where(x <= 0, np.float32(0), x) if relu else x for x in (b, a))
        np.testing.assert_array_equal(got[:, 0], narrowed(low, kind))
        np.testing.assert_array_equal(got[:, 1], narrowed(high, kind))
    halves = np.arange(65536, dtype=np.uint32).astype(np.uint16).view(np.float16)
    pairs = np.stack([halves, np.roll(halves, 7)], 1)
    for relu in ("", ".relu"):
        got = run_instruction(f"cvt.rn.satfinite{relu}.{kind}x2.f16x2 %d, %a;", np.uint16, pairs.view(np.uint32).ravel()).view(np.uint8)
        np.testing.assert_array_equal(got.reshape(-1, 2), narrowed(np.where(pairs <= 0, np.float16(0), pairs) if relu else pairs, kind))


@pytest.mark.parametrize("kind", FP8)
def test_widening_of_8_bits_is_exact(kind: str) -> None:
    pairs = np.arange(65536, dtype=np.uint32).astype(np.uint16)
    expected = pairs.view(np.uint8).view(FP8[kind]).astype(np.float16).reshape(-1, 2)
    got = run_instruction(f"cvt.rn.f16x2.{kind}x2 %d, %a;", np.uint32, pairs).view(np.float16).reshape(-1, 2)
    bits_equal(got, expected)
    got = run_instruction(f"cvt.rn.relu.f16x2.{kind}x2 %d, %a;", np.uint32, pairs).view(np.float16).reshape(-1, 2)
    bits_equal(got, np.where(expected <= 0, np.float16(0), expected))


def test_tf32() -> None:
    a = np.random.default_rng(0).standard_normal(2000).astype(np.float32)
    a[:3] = [1 + 2.0**-11, -(1 + 2.0**-11), np.inf]
    got = run_instruction("cvt.rna.tf32.f32 %d, %a;", np.float32, a)
    word = a.view(np.uint32)
    expected = ((word + np.where(np.isinf(a), 0, 0x1000).astype(np.uint32)) & np.uint32(0xFFFFE000)).view(np.float32)
    np.testing.assert_array_equal(got, expected)
    assert got[0] == np.float32(1 + 2.0**-10)  # a tie goes away from zero


def test_doubles() -> None:
    a = special_floats(np.float64)
    np.testing.assert_array_equal(run_instruction("cvt.rn.f32.f64 %d, %a;", np.float32, a), a.astype(np.float32))
    b = special_floats(np.float32)
    np.testing.assert_array_equal(run_instruction("cvt.f64.f32 %d, %a;", np.float64, b), b.astype(np.float64))


@pytest.mark.parametrize(("rounding", "function"), [("rni", np.rint), ("rzi", np.trunc), ("rmi", np.floor), ("rpi", np.ceil)])
def test_integral(rounding: str, function: np.ufunc) -> None:
    a = special_floats(np.float32)
    np.testing.assert_array_equal(run_instruction(f"cvt.{rounding}.f32.f32 %d, %a;", np.float32, a), function(a))


def test_saturating_copy() -> None:
    a = special_floats(np.float32)
    got = run_instruction("cvt.sat.f32.f32 %d, %a;", np.float32, a)
    np.testing.assert_array_equal(got, np.where(np.isnan(a), 0, np.clip(a, 0, 1)))


def test_conversions_as_the_compiler_writes_them() -> None:
    source = """
    extern "C" __global__ void k(const float* x, const unsigned char* bytes, int* whole, float* parts, long long* wide) {
        int i = threadIdx.x;
        whole[i] = (int)x[i] + (signed char)bytes[i] + (short)(bytes[i] * 300);
        parts[i] = (float)bytes[i] + (float)(u64)x[i];
        wide[i] = (long long)x[i] - (u32)bytes[i] + (signed char)bytes[i];
    }"""
    x = (np.arange(32) * 1.75).astype(np.float32)
    raw = (np.arange(32) * 8).astype(np.uint8)
    whole, parts, wide = np.zeros(32, np.int32), np.zeros(32, np.float32), np.zeros(32, np.int64)
    run_cuda(source, x, raw, whole, parts, wide)
    short = (raw.astype(np.int32) * 300).astype(np.int16).astype(np.int32)
    np.testing.assert_array_equal(whole, x.astype(np.int32) + raw.view(np.int8) + short)
    np.testing.assert_array_equal(parts, raw.astype(np.float32) + np.floor(x))
    np.testing.assert_array_equal(wide, x.astype(np.int64) - raw.astype(np.int64) + raw.view(np.int8))
