"""Matrix products: every element type of the tensor cores, both majors of both operands, tiles whose rows span 32, 64 and 128 bytes.

Operands are small integers, so that every partial sum is exact and the result has to be exactly theirs: one element in a wrong place shows.
"""

from __future__ import annotations

import itertools

import numpy
import triton
import triton.language as tl
from cases import ELEMENTS, Array, Case, Output, assert_equal, assert_within, integers, normals


@triton.jit
def product(
    a, b, c, m, n, k,
    A_IS_TRANSPOSED: tl.constexpr, B_IS_TRANSPOSED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    SUM: tl.constexpr,
):  # fmt: skip
    """c = a @ b, tile by tile; a transposed operand lies in memory as (k, m) or (n, k)."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_M, BLOCK_N), SUM)
    for start in range(0, k, BLOCK_K):
        inner = start + tl.arange(0, BLOCK_K)
        left = tl.load(a + (inner[None, :] * m + rows[:, None] if A_IS_TRANSPOSED else rows[:, None] * k + inner[None, :]))
        right = tl.load(b + (columns[None, :] * k + inner[:, None] if B_IS_TRANSPOSED else inner[:, None] * n + columns[None, :]))
        total = tl.dot(left, right, total, out_dtype=SUM)
    tl.store(c + rows[:, None] * n + columns[None, :], total)


def product_case(
    dtype: str, arch: str, transposed: tuple[bool, bool] = (False, False), blocks: tuple[int, int, int] = (64, 64, 64), warps: int = 4, stages: int = 3,
    sum_dtype: str = "float32", exhaustive: bool = False,
) -> Case:  # fmt: skip
    """A product of integers that is 2 tiles high, 1 wide and 3 deep."""
    m, n, k = 2 * blocks[0], blocks[1], 3 * blocks[2]
    largest = 4 if sum_dtype == "float16" else 8
    left, right = integers((m, k), dtype, 0, largest), integers((k, n), dtype, 1, largest)

    def arguments() -> list:
        stored = [numpy.ascontiguousarray(x.T) if is_transposed else x for x, is_transposed in zip((left, right), transposed, strict=True)]
        return [*stored, Output((m, n), sum_dtype), m, n, k]

    def check(outputs: list[Array]) -> None:
        assert_equal(outputs[0], left.astype(numpy.float64) @ right.astype(numpy.float64))

    layout = "".join("nt"[is_transposed] for is_transposed in transposed)
    shape = "x".join(map(str, blocks))
    constants = {
        "A_IS_TRANSPOSED": transposed[0],
        "B_IS_TRANSPOSED": transposed[1],
        "BLOCK_M": blocks[0],
        "BLOCK_N": blocks[1],
        "BLOCK_K": blocks[2],
        "SUM": getattr(tl, sum_dtype),
    }
    name = f"product-{dtype}-{sum_dtype}-{layout}-{shape}-{warps}w{stages}s"
    return Case(name, product, arch, (2, 1), arguments, check, constants, warps, stages, exhaustive=exhaustive, exact=True)


def columns_of_spans(dtype: str) -> list[int]:
    """How many elements of a row span 32, 64 and 128 bytes, unless these are too few for a product."""
    size = ELEMENTS[dtype].itemsize
    return [span // size for span in (32, 64, 128) if span // size >= (32 if size == 1 else 16)]


def rounded_product_case(dtype: str, arch: str) -> Case:
    """A product of reals, judged by the bound of a sum in float32: one rounding for each of the k terms."""
    m, n, k = 64, 64, 128
    left, right = normals((m, k), dtype, 2), normals((k, n), dtype, 3)
    if dtype == "float32":  # TF32 keeps 10 bits of the fraction: values that it does not round
        left, right = ((x.view(numpy.uint32) & numpy.uint32(0xFFFFE000)).view(numpy.float32) for x in (left, right))

    def check(outputs: list[Array]) -> None:
        wide = [x.astype(numpy.float64) for x in (left, right)]
        assert_within(outputs[0], wide[0] @ wide[1], k * 2.0**-24 * (numpy.abs(wide[0]) @ numpy.abs(wide[1])))

    constants = {"A_IS_TRANSPOSED": False, "B_IS_TRANSPOSED": False, "BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32, "SUM": tl.float32}
    arguments = lambda: [left, right, Output((m, n), "float32"), m, n, k]  # noqa: E731
    return Case(f"rounded-product-{dtype}", product, arch, (1, 1), arguments, check, constants)


def product_cases() -> list[Case]:
    """A few of each kind, and the whole table for --exhaustive."""
    layouts = list(itertools.product((False, True), repeat=2))
    cases = []
    for arch, dtypes in (
        ("sm_80", ("float16", "bfloat16", "float32")),
        ("sm_90", ("float16", "bfloat16", "float32", "float8_e4m3fn", "float8_e5m2")),
    ):
        for i, dtype in enumerate(dtypes):
            for j, (layout, columns) in enumerate(itertools.product(layouts, columns_of_spans(dtype))):
                shape = (64, 64, columns)
                cases.append(product_case(dtype, arch, layout, shape, exhaustive=j % 5 != i % 5))
            cases.append(rounded_product_case(dtype, arch))
        cases.append(product_case("float16", arch, blocks=(32, 32, 32), sum_dtype="float16", warps=2))
        cases.append(product_case("bfloat16", arch, (False, True), (128, 128, 32), warps=8, stages=2))
        cases.append(product_case("float16", arch, (True, False), (64, 32, 32), warps=4, stages=1))
        cases.append(product_case("float16", arch, (True, False), (16, 16, 16), warps=1, stages=4))
        cases.append(product_case("float64", arch, blocks=(32, 32, 16), warps=2, sum_dtype="float64"))
        cases.append(product_case("int8", arch, (False, True), (32, 32, 64), warps=2, sum_dtype="int32"))
    for dtype in ("float8_e4m3fn", "float8_e5m2"):
        cases.append(product_case(dtype, "sm_89", (False, True), (64, 64, 64), stages=2))
    cases.append(product_case("float8_e5m2", "sm_80", (False, True), (32, 32, 32), warps=2))  # converted to float16 first
    return cases


def early_read() -> Case:
    """Sums in float16 by wgmma: Triton's code unpacks the registers of D before the wait that it passes them through."""
    return product_case("float16", "sm_90", sum_dtype="float16")


def refused() -> Case:
    """A product that the simulator does not know."""
    return product_case("int8", "sm_90", (False, True), sum_dtype="int32")
