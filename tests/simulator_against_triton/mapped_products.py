"""Matrix products through tensor maps (TMA), made on the host and by the kernel itself: loads, stores, gathers of several boxes, edges, a persistent loop."""

from __future__ import annotations

import itertools

import numpy
import triton
import triton.language as tl
from cases import ELEMENTS, Array, Case, Mapped, Output, assert_equal, integers
from products import columns_of_spans


@triton.jit
def mapped_product(
    a,
    b,
    c,
    k,
    A_IS_TRANSPOSED: tl.constexpr,
    B_IS_TRANSPOSED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """c = a @ b, all three by maps made on the host."""
    row, column = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_N
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, k, BLOCK_K):
        left = a.load([start, row]).T if A_IS_TRANSPOSED else a.load([row, start])
        right = b.load([column, start]).T if B_IS_TRANSPOSED else b.load([start, column])
        total = tl.dot(left, right, total)
    c.store([row, column], total.to(c.dtype))


@triton.jit
def self_mapped_product(
    a, b, c, m, n, k, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PROGRAMS: tl.constexpr, SPECIALIZE: tl.constexpr
):
    """c = a @ b.T by maps that the kernel makes; each program walks over every PROGRAMS-th tile."""
    a_map = tl.make_tensor_descriptor(a, [m, k], [k, 1], [BLOCK_M, BLOCK_K])
    b_map = tl.make_tensor_descriptor(b, [n, k], [k, 1], [BLOCK_N, BLOCK_K])
    c_map = tl.make_tensor_descriptor(c, [m, n], [n, 1], [BLOCK_M, BLOCK_N])
    tiles_n = tl.cdiv(n, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tl.cdiv(m, BLOCK_M) * tiles_n, PROGRAMS, flatten=not SPECIALIZE, warp_specialize=SPECIALIZE):
        row, column = tile // tiles_n * BLOCK_M, tile % tiles_n * BLOCK_N
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in range(0, k, BLOCK_K):
            total = tl.dot(a_map.load([row, start]), b_map.load([column, start]).T, total)
        c_map.store([row, column], total.to(c.dtype.element_ty))


@triton.jit
def mapped_sum(x, out, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """out += x, added where it lies by the copy unit."""
    row, column = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_N
    out.atomic_add([row % (2 * BLOCK_M), column], x.load([row, column]))


@triton.jit
def mapped_gather(x, rows, out, COUNT: tl.constexpr, WIDTH: tl.constexpr):
    """Boxes of a tensor of three dimensions, which is read beyond its edges."""
    index = tl.program_id(0)
    box = x.load([index, 1, 0]).reshape(COUNT, WIDTH)
    tl.store(out + (index * COUNT + tl.arange(0, COUNT)[:, None]) * WIDTH + tl.arange(0, WIDTH)[None, :], box)


def mapped_case(
    dtype: str, transposed: tuple[bool, bool], blocks: tuple[int, int, int], warps: int = 4, stages: int = 3, ctas: int = 1, out_dtype: str = "float32",
    exhaustive: bool = False,
) -> Case:  # fmt: skip
    """A product that is 2 tiles high, 2 wide and 3 deep; its edges are within the last tiles."""
    m, n, k = 2 * blocks[0] - 16, 2 * blocks[1] - 16, 3 * blocks[2] - 16
    left, right = integers((m, k), dtype, 4, 4), integers((k, n), dtype, 5, 4)

    def arguments() -> list:
        stored = [numpy.ascontiguousarray(x.T) if is_transposed else x for x, is_transposed in zip((left, right), transposed, strict=True)]
        boxes = [(blocks[0], blocks[2]), (blocks[2], blocks[1])]
        mapped = [Mapped(x, box[::-1] if is_transposed else box) for x, box, is_transposed in zip(stored, boxes, transposed, strict=True)]
        return [*mapped, Mapped(Output((m, n), out_dtype), (blocks[0], blocks[1])), k]

    def check(outputs: list[Array]) -> None:
        assert_equal(outputs[0], (left.astype(numpy.float64) @ right.astype(numpy.float64)).astype(ELEMENTS[out_dtype]))

    constants = dict(zip(("A_IS_TRANSPOSED", "B_IS_TRANSPOSED", "BLOCK_M", "BLOCK_N", "BLOCK_K"), (*transposed, *blocks), strict=True))
    layout = "".join("nt"[is_transposed] for is_transposed in transposed)
    name = f"mapped-product-{dtype}-{out_dtype}-{layout}-{'x'.join(map(str, blocks))}-{warps}w{stages}s{ctas}c"
    return Case(name, mapped_product, "sm_90", (2, 2), arguments, check, constants, warps, stages, ctas, exhaustive=exhaustive, exact=True)


def self_mapped_case(dtype: str, arch: str, specialize: bool = False, warps: int = 4) -> Case:
    """Six tiles over four programs."""
    m, n, k = 128 + 64, 128, 64 * 3
    left, right = integers((m, k), dtype, 6, 4), integers((n, k), dtype, 7, 4)

    def check(outputs: list[Array]) -> None:
        assert_equal(outputs[0], (left.astype(numpy.float64) @ right.astype(numpy.float64).T).astype(ELEMENTS["bfloat16"]))

    constants = {
        "BLOCK_M": 64 if not specialize else 64 * warps // 4,
        "BLOCK_N": 64,
        "BLOCK_K": 64,
        "PROGRAMS": 4,
        "SPECIALIZE": specialize,
    }
    arguments = lambda: [left, right, Output((m, n), "bfloat16"), m, n, k]  # noqa: E731
    name = f"self-mapped-product-{dtype}-{warps}w{'-specialized' if specialize else ''}"
    return Case(name, self_mapped_product, arch, (4,), arguments, check, constants, warps, exact=True)


def mapped_sum_case(dtype: str) -> Case:
    """Two tiles of x are added to each of out; float sums of integers, in any order."""
    x, start = integers((128, 64), dtype, 8), integers((64, 64), dtype, 9)

    def check(outputs: list[Array]) -> None:
        wide = x.astype(numpy.float64)
        assert_equal(outputs[0], start.astype(numpy.float64) + wide[:64] + wide[64:])

    arguments = lambda: [Mapped(x, (32, 32)), Mapped(Output(start.shape, dtype, start), (32, 32))]  # noqa: E731
    return Case(f"mapped-sum-{dtype}", mapped_sum, "sm_90", (4, 2), arguments, check, {"BLOCK_M": 32, "BLOCK_N": 32}, exact=True)


def mapped_gather_case(dtype: str) -> Case:
    """Rows 1 to 8 of planes that have 6, so the last three are zeros."""
    x = integers((3, 6, 32), dtype, 10)

    def check(outputs: list[Array]) -> None:
        want = numpy.zeros((3, 8, 32))
        want[:, :5] = x[:, 1:]
        assert_equal(outputs[0], want)

    arguments = lambda: [Mapped(x, (1, 8, 32)), 0, Output((3, 8, 32), dtype)]  # noqa: E731
    return Case(f"mapped-boxes-{dtype}", mapped_gather, "sm_90", (3,), arguments, check, {"COUNT": 8, "WIDTH": 32}, exact=True)


def mapped_product_cases() -> list[Case]:
    """A few of each kind, and the whole table for --exhaustive."""
    cases = []
    for i, dtype in enumerate(("float16", "bfloat16", "float32", "float8_e4m3fn")):
        layouts = itertools.product((False, True), repeat=2)
        for j, (layout, columns) in enumerate(itertools.product(layouts, columns_of_spans(dtype))):
            cases.append(mapped_case(dtype, layout, (64, 64, columns), exhaustive=j % 6 != i))
    cases.append(mapped_case("bfloat16", (False, True), (128, 128, 64), warps=8, stages=4, out_dtype="bfloat16"))
    cases.append(mapped_case("float16", (False, False), (128, 64, 64), warps=4, stages=2, ctas=2, out_dtype="float16"))
    cases += [self_mapped_case("float16", arch) for arch in ("sm_80", "sm_90")]
    cases.append(self_mapped_case("bfloat16", "sm_90", specialize=True))
    cases.append(self_mapped_case("float8_e5m2", "sm_90", specialize=True, warps=8))
    cases += [mapped_sum_case(dtype) for dtype in ("float32", "float16")]
    cases += [mapped_gather_case(dtype) for dtype in ("float32", "bfloat16")]
    return cases
