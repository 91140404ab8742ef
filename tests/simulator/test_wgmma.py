"""wgmma: operands laid out in shared memory as the PTX ISA says, products against NumPy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from simulated import Array, run_ptx

from cuflash.simulator import Counters, Options
from cuflash.simulator.options import SCHEDULES

DTYPES: dict[str, np.dtype[Any]] = {
    "f16": np.dtype(np.float16),
    "bf16": np.dtype(ml_dtypes.bfloat16),
    "tf32": np.dtype(np.float32),
    "e4m3": np.dtype(ml_dtypes.float8_e4m3fn),
    "e5m2": np.dtype(ml_dtypes.float8_e5m2),
}
SWIZZLE_MODE = {16: 0, 128: 1, 64: 2, 32: 3}  # bytes in a row of the pattern -> bits 62 and 63 of a descriptor; 16: no swizzle
STEP_BYTES = 32  # of k in one instruction


@dataclass(frozen=True)
class Operand:
    """A or B of several instructions along k, as bytes for shared memory and one descriptor per instruction.

    Attributes:
        image: the bytes, to be placed at a multiple of 1024.
        descriptors: without the start address, which is `starts` bytes from the image's.
    """

    image: Array
    descriptor: int
    starts: list[int]


def place(offset: Array, swizzle: int, pattern: int = 0) -> Array:
    """Where bytes end up whose place without swizzle is `offset`: bits 4 to 6 are XORed with bits 7 to 9, counted from the pattern's start."""
    return offset ^ ((((offset - pattern) >> 7) & (swizzle // 16 - 1)) << 4)


def operand(matrix: Array, swizzle: int, k_major: bool = True, shift: int = 0) -> Operand:
    """Lay out `matrix` (rows of A or columns of B, k), in the canonical layouts of the PTX ISA.

    Args:
        swizzle: 16, 32, 64 or 128 bytes.
        shift: bytes by which the pattern's start misses a multiple of 1024; becomes the base offset.
    """
    rows, depth = matrix.shape
    size = matrix.itemsize
    steps = depth * size // STEP_BYTES
    row, k = np.meshgrid(np.arange(rows), np.arange(depth), indexing="ij")
    if k_major:
        byte = k * size
        if swizzle == 16:  # core matrices of 8 rows and 16 bytes; those along k first
            leading, stride = 128, 128 * depth * size // 16
            offset = row // 8 * stride + byte // 16 * leading + row % 8 * 16 + byte % 16
            starts = [2 * leading * step for step in range(steps)]
        else:  # columns of `swizzle` bytes, each a stack of rows
            leading, stride = 16, 8 * swizzle
            offset = byte // swizzle * rows * swizzle + row * swizzle + byte % swizzle
            starts = [step * STEP_BYTES // swizzle * rows * swizzle + step * STEP_BYTES % swizzle for step in range(steps)]
    else:
        if swizzle == 16:  # core matrices of 8 values of k and 8 rows; those along the rows first
            stride, leading = 128, 128 * rows // 8
            offset = row // 8 * stride + k // 8 * leading + k % 8 * 16 + row % 8 * size
            starts = [2 * leading * step for step in range(steps)]
        else:
            stride, leading = 8 * swizzle, depth * swizzle
            byte = row * size
            offset = byte // swizzle * leading + k * swizzle + byte % swizzle
            starts = [16 * swizzle * step for step in range(steps)]
    where = place(shift + offset, swizzle, shift)
    image = np.full(int(where.max()) + 1024 & ~1023, 0xFF, np.uint8)
    raw = np.ascontiguousarray(matrix).view(np.uint8).reshape(rows, depth, size)
    for i in range(size):
        image[where + i] = raw[:, :, i]
    descriptor = leading >> 4 << 16 | stride >> 4 << 32 | (shift >> 7 & 7) << 49 | SWIZZLE_MODE[swizzle] << 62
    return Operand(image, descriptor, [shift + start for start in starts])


def a_registers(matrix: Array) -> Array:
    """A of one instruction as the registers of 128 threads: [register][thread]."""
    values = 4 // matrix.itemsize
    thread = np.arange(128)
    group, quad = thread % 32 // 4, thread % 4
    words = np.zeros((4, 128, values), matrix.dtype)
    for register in range(4):
        row = thread // 32 * 16 + group + 8 * (register % 2)
        for i in range(values):
            words[register, :, i] = matrix[row, values * quad + i + register // 2 * 4 * values]
    return words.view(np.uint32).reshape(4, 128)


def d_indices(n: int) -> tuple[Array, Array]:
    """Row and column of accumulator element i of each of 128 threads: [thread][i]."""
    thread, i = np.arange(128)[:, None], np.arange(n // 2)[None, :]
    return thread // 32 * 16 + thread % 32 // 4 + i // 2 % 2 * 8, i // 4 * 8 + thread % 4 * 2 + i % 2


def random_matrix(shape: tuple[int, int], kind: str, seed: int) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(DTYPES[kind])


def values_of(matrix: Array, kind: str) -> Array:
    """What a product makes of the elements, in f64."""
    if kind == "tf32":
        matrix = (matrix.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)
    return matrix.astype(np.float64)


def run_wgmma(
    a: Array | Operand,
    b: Operand,
    d: Array,
    kinds: str,
    *,
    scale_d: int = 1,
    immediate: bool = False,
    scales: str = "1, 1",
    transposed: tuple[int, int] = (0, 0),
    options: Options | None = None,
) -> tuple[Array, Counters]:
    """D = A B + D over all steps of k by one warpgroup; A is a matrix when it comes from registers. `immediate`: scale-d is written as a number."""
    n = d.shape[1]
    half = d.dtype == np.float16
    _, a_type, _ = kinds.split(".")
    count = n // 4 if half else n // 2
    start = d_indices(n)
    words = np.ascontiguousarray(d[start]).view(np.uint32).T.copy()  # [register][thread]
    in_registers = not isinstance(a, Operand)
    steps = len(b.starts)
    if in_registers:
        depth = a.shape[1] // steps
        registers = np.concatenate([a_registers(a[:, i * depth : (i + 1) * depth]) for i in range(steps)])
        image = b.image
        b_at = 0
    else:
        registers = np.zeros((1, 128), np.uint32)
        image = np.concatenate([a.image, b.image])
        b_at = a.image.size
    k = STEP_BYTES // DTYPES[a_type].itemsize
    trans = "" if a_type not in ("f16", "bf16") else f", {transposed[1]}" if in_registers else f", {transposed[0]}, {transposed[1]}"
    body = ""
    d_list = "{" + ",".join(f"%d{i}" for i in range(count)) + "}"
    for step in range(steps):
        a_text = "%da"
        predicate = str(scale_d if step == 0 else 1) if immediate else "%p"
        if in_registers:
            a_text = "{" + ",".join(f"%a{4 * step + i}" for i in range(4)) + "}"
        else:
            body += f"add.u32 %t, %s, {a.starts[step]}; shr.u32 %t, %t, 4; cvt.u64.u32 %da, %t; or.b64 %da, %da, {a.descriptor};\n"
        body += f"add.u32 %t, %s, {b_at + b.starts[step]}; shr.u32 %t, %t, 4; cvt.u64.u32 %db, %t; or.b64 %db, %db, {b.descriptor};\n"
        body += f"wgmma.mma_async.sync.aligned.m64n{n}k{k}.{kinds} {d_list}, {a_text}, %db, {predicate}, {scales}{trans};\n"
        body += "setp.eq.u32 %p, 0, 0;\n"
    a_loads = "".join(f"ld.global.b32 %a{i}, [%g+{512 * i}];\n" for i in range(len(registers))) if in_registers else ""
    ptx = f""".version 8.0
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 memory[];
.visible .entry k(.param .u64 p_image, .param .u64 p_a, .param .u64 p_d)
{{ .reg .b32 %d<{count}>, %a<{4 * steps}>, %t, %i, %s, %v; .reg .b64 %g, %o, %da, %db; .reg .pred %p, %q;
mov.u32 %s, memory; add.u32 %s, %s, 1023; and.b32 %s, %s, -1024;
mov.u32 %i, %tid.x; mul.lo.u32 %i, %i, 4;
COPY: setp.ge.u32 %q, %i, {image.size}; @%q bra COPIED;
ld.param.u64 %g, [p_image]; cvt.u64.u32 %o, %i; add.u64 %g, %g, %o; ld.global.b32 %v, [%g];
add.u32 %t, %s, %i; st.shared.b32 [%t], %v; add.u32 %i, %i, 512; bra COPY;
COPIED: fence.proxy.async.shared::cta; bar.sync 0;
mov.u32 %t, %tid.x; mul.wide.u32 %o, %t, 4; ld.param.u64 %g, [p_a]; add.u64 %g, %g, %o;
{a_loads}
ld.param.u64 %g, [p_d]; add.u64 %g, %g, %o;
{"".join(f"ld.global.b32 %d{i}, [%g+{512 * i}];" for i in range(count))}
setp.eq.u32 %p, {scale_d}, 1;
wgmma.fence.sync.aligned;
{body}
wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;
{"".join(f"st.global.b32 [%g+{512 * i}], %d{i};" for i in range(count))}
ret; }}"""
    counters = run_ptx(ptx, image, registers, words, block=128, shared=image.size + 1024, options=options)
    assert counters.matrix_instructions == 4 * steps
    assert counters.matrix_flops == 2 * 64 * n * k * steps
    result = np.zeros_like(d)
    result[start] = np.ascontiguousarray(words.T).view(d.dtype)
    return result, counters


def check(
    n: int,
    kinds: str = "f32.f16.f16",
    *,
    depth: int = 128,
    swizzle: int = 128,
    registers: bool = False,
    majors: tuple[int, int] = (0, 0),
    scale_d: int = 1,
    immediate: bool = False,
    scales: tuple[int, int] = (1, 1),
    shift: int = 0,
    schedule: str = "late",
) -> None:
    """One chain of products of `depth` bytes along k, against NumPy."""
    d_type, a_type, b_type = kinds.split(".")
    k = depth // DTYPES[a_type].itemsize
    a, b = random_matrix((64, k), a_type, n), random_matrix((n, k), b_type, n + 1)
    d = np.random.default_rng(n).standard_normal((64, n)).astype(np.float16 if d_type == "f16" else np.float32)
    got, _ = run_wgmma(
        a if registers else operand(a, swizzle, not majors[0], shift),
        operand(b, swizzle, not majors[1], shift),
        d,
        kinds,
        scale_d=scale_d,
        immediate=immediate,
        scales=f"{scales[0]}, {scales[1]}",
        transposed=majors,
        options=Options(threads=1, schedule=schedule, seed=n),
    )
    expected = scales[0] * scales[1] * values_of(a, a_type) @ values_of(b, b_type).T + scale_d * d.astype(np.float64)
    steps = depth // STEP_BYTES
    if d_type == "f16":  # rounded to 11 bits after each step
        magnitude = np.abs(values_of(a, a_type)) @ np.abs(values_of(b, b_type)).T + np.abs(d.astype(np.float64))
        assert (np.abs(got.astype(np.float64) - expected) <= steps * 2.0**-11 * magnitude).all()
    else:
        np.testing.assert_allclose(got, expected, rtol=1e-6, atol=k * 1e-6)


def test_layouts_written_out() -> None:
    """Places that follow from the figures of the PTX ISA, section "Shared Memory Matrix Layout" of wgmma, and "Register Fragments"."""
    matrix = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64).view(np.float16)
    image = operand(matrix, 128).image.view(np.uint16)
    assert image[:8].tolist() == list(range(8))  # row 0: not moved
    assert image[64 + 8 : 64 + 16].tolist() == list(range(64, 72))  # row 1: the first 16 bytes lie second
    assert image[9 * 64 : 9 * 64 + 8].tolist() == list(range(9 * 64 + 8, 9 * 64 + 16))  # row 9 as row 1
    image = operand(matrix[:, :16], 32).image.view(np.uint16)
    assert image[4 * 16 : 4 * 16 + 8].tolist() == list(range(4 * 64 + 8, 4 * 64 + 16))  # 32 bytes: swapped in rows 4 to 7
    image = operand(matrix, 16, k_major=False).image.view(np.uint16)
    assert image[:16].tolist() == [*range(0, 8 * 64, 64), *range(1, 8 * 64, 64)]  # k = 0, rows 0 to 7; then k = 1
    row, column = d_indices(16)
    assert (row[37, 0], column[37, 0]) == (17, 2)  # warp 1, lane 5, d0
    assert (row[37, 7], column[37, 7]) == (25, 11)  # d7
    registers = a_registers(matrix[:, :16])
    assert registers[1, 5] & 0xFFFF == 9 * 64 + 2  # lane 5, a2
    assert registers[2, 5] & 0xFFFF == 64 + 10  # lane 5, a4


@pytest.mark.parametrize("n", [8, 16, 24, 64, 96, 128, 192, 256])
@pytest.mark.parametrize("registers", [False, True])
def test_widths(n: int, registers: bool) -> None:
    check(n, registers=registers)


@pytest.mark.parametrize("kinds", ["f32.f16.f16", "f32.bf16.bf16", "f16.f16.f16"])
@pytest.mark.parametrize("swizzle", [16, 32, 64, 128])
@pytest.mark.parametrize("majors", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_layouts(kinds: str, swizzle: int, majors: tuple[int, int]) -> None:
    check(128, kinds, swizzle=swizzle, majors=majors)


@pytest.mark.parametrize("n", [8, 72, 256])
@pytest.mark.parametrize("majors", [(0, 1), (1, 1)])
def test_widths_that_are_no_whole_patterns(n: int, majors: tuple[int, int]) -> None:
    check(n, majors=majors)


@pytest.mark.parametrize(
    "kinds",
    ["f32.tf32.tf32", *(f"{d}.{a}.{b}" for d in ("f32", "f16") for a in ("e4m3", "e5m2") for b in ("e4m3", "e5m2"))],
)
@pytest.mark.parametrize("swizzle", [16, 32, 64, 128])
@pytest.mark.parametrize("registers", [False, True])
def test_types_that_are_k_major(kinds: str, swizzle: int, registers: bool) -> None:
    check(64, kinds, swizzle=swizzle, registers=registers)


@pytest.mark.parametrize("kinds", ["f32.bf16.bf16", "f16.f16.f16"])
@pytest.mark.parametrize("major", [0, 1])
def test_registers_and_both_majors_of_b(kinds: str, major: int) -> None:
    check(96, kinds, registers=True, majors=(0, major))


@pytest.mark.parametrize("registers", [False, True])
@pytest.mark.parametrize("scale_d", [0, 1])
def test_scale_d_as_a_number(scale_d: int, registers: bool) -> None:
    check(16, scale_d=scale_d, registers=registers, immediate=True)


@pytest.mark.parametrize("scales", [(1, 1), (-1, 1), (1, -1), (-1, -1)])
@pytest.mark.parametrize("scale_d", [0, 1])
@pytest.mark.parametrize("kinds", ["f32.f16.f16", "f32.tf32.tf32"])
def test_scales(kinds: str, scales: tuple[int, int], scale_d: int) -> None:
    check(16, kinds, scales=scales, scale_d=scale_d)


@pytest.mark.parametrize("depth", [32, 256, 512])
@pytest.mark.parametrize("majors", [(0, 0), (1, 1)])
def test_depths(depth: int, majors: tuple[int, int]) -> None:
    check(32, depth=depth, majors=majors)


@pytest.mark.parametrize(("swizzle", "shift"), [(128, 128), (128, 512), (128, 896), (64, 384), (32, 128)])
@pytest.mark.parametrize("majors", [(0, 0), (1, 1)])
def test_base_offset(swizzle: int, shift: int, majors: tuple[int, int]) -> None:
    check(64, swizzle=swizzle, shift=shift, majors=majors)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("registers", [False, True])
def test_schedules(schedule: str, registers: bool) -> None:
    check(64, depth=256, registers=registers, schedule=schedule)


@pytest.mark.parametrize("kind", ["f16", "tf32", "e5m2"])
def test_one_element_at_a_time(kind: str) -> None:
    """Each A[i][k] B[k][j] lands in D[i][j] and nowhere else."""
    rng = np.random.default_rng(0)
    depth = STEP_BYTES // DTYPES[kind].itemsize
    for _ in range(10):
        i, k, j = rng.integers(0, (64, depth, 40))
        a, b = np.zeros((64, depth), DTYPES[kind]), np.zeros((40, depth), DTYPES[kind])
        a[i, k], b[j, k] = 2, 3
        got, _ = run_wgmma(operand(a, 32), operand(b, 32), np.zeros((64, 40), np.float32), f"f32.{kind}.{kind}")
        expected = np.zeros((64, 40), np.float32)
        expected[i, j] = 6
        np.testing.assert_array_equal(got, expected)


def test_all_fp8_values() -> None:
    for kind in ("e4m3", "e5m2"):
        values = np.arange(256, dtype=np.uint8).view(DTYPES[kind])
        finite = np.isfinite(values.astype(np.float32))
        a = np.zeros((64, 32), DTYPES[kind])
        a[np.arange(256) // 4, np.arange(256) % 4] = np.where(finite, values, np.zeros((), DTYPES[kind]))
        b = np.zeros((8, 32), DTYPES[kind])
        b[np.arange(4), np.arange(4)] = 1
        got, _ = run_wgmma(operand(a, 32), operand(b, 32), np.zeros((64, 8), np.float32), f"f32.{kind}.{kind}")
        np.testing.assert_array_equal(got[:, :4], a[:, :4].astype(np.float32))
        a[3, 3] = np.nan
        got, _ = run_wgmma(operand(a, 32), operand(b, 32), np.zeros((64, 8), np.float32), f"f32.{kind}.{kind}")
        assert np.isnan(got[3]).all()
        assert not np.isnan(got[4]).any()


def test_half_accumulator_is_rounded_by_each_instruction() -> None:
    a, b = np.zeros((64, 32), np.float16), np.ones((8, 32), np.float16)
    a[:, 0] = a[:, 1] = a[:, 16] = 2.0**-12  # 1 + 2^-12 + 2^-12 is exact in f32; a tie of f16, to even; once more nothing
    got, _ = run_wgmma(operand(a, 64), operand(b, 64), np.ones((64, 8), np.float16), "f16.f16.f16")
    np.testing.assert_array_equal(got, np.ones((64, 8), np.float16))
    a[:, 2] = 2.0**-12  # above the tie
    got, _ = run_wgmma(operand(a, 64), operand(b, 64), np.ones((64, 8), np.float16), "f16.f16.f16")
    np.testing.assert_array_equal(got, np.full((64, 8), 1 + 2.0**-10, np.float16))
