"""Kernels without products: row-wise reductions, scans and sorts, layout changes through shared memory, arithmetic, conversions, atomics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy
import triton
import triton.language as tl
from cases import ELEMENTS, Array, Case, Output, assert_equal, assert_within, integers, normals

ARCHES = ("sm_80", "sm_90")


@triton.jit
def softmax(x, out, columns, COLUMNS: tl.constexpr):
    """A row per program, which may be shorter than the vector."""
    row, i = tl.program_id(0), tl.arange(0, COLUMNS)
    values = tl.load(x + row * columns + i, mask=i < columns, other=float("-inf"))
    weights = tl.exp(values - tl.max(values, 0))
    tl.store(out + row * columns + i, weights / tl.sum(weights, 0), mask=i < columns)


@triton.jit
def layer_norm(x, weight, out, columns, eps, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows of zero mean and unit variance, times weights."""
    i, j = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    values = tl.load(x + i[:, None] * columns + j[None, :]).to(tl.float32)
    centered = values - (tl.sum(values, 1) / columns)[:, None]
    scale = tl.rsqrt(tl.sum(centered * centered, 1) / columns + eps)
    tl.store(out + i[:, None] * columns + j[None, :], centered * scale[:, None] * tl.load(weight + j)[None, :])


@triton.jit
def reduce_all(x, sums, maxima, minima, where, parity, ROWS: tl.constexpr, COLUMNS: tl.constexpr, AXIS: tl.constexpr):
    """Every reduction, along either axis."""
    i, j = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    values = tl.load(x + i[:, None] * COLUMNS + j[None, :])
    k = j if AXIS == 0 else i
    tl.store(sums + k, tl.sum(values, AXIS))
    tl.store(maxima + k, tl.max(values, AXIS))
    tl.store(minima + k, tl.min(values, AXIS))
    tl.store(where + k, tl.argmax(values, AXIS))
    tl.store(parity + k, tl.xor_sum(values.to(tl.int32), AXIS))


@triton.jit
def transpose(x, out, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Both accesses along rows of memory, so the tile is turned within the block; edges are masked."""
    i, j = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    tile = tl.load(x + i[:, None] * columns + j[None, :], mask=(i[:, None] < rows) & (j[None, :] < columns))
    tl.store(out + j[:, None] * rows + i[None, :], tl.trans(tile), mask=(j[:, None] < columns) & (i[None, :] < rows))


@triton.jit
def _decay(scale_a, value_a, scale_b, value_b):
    return scale_a * scale_b, value_a * scale_b + value_b


@triton.jit
def scans(x, sums, maxima, decayed, COLUMNS: tl.constexpr):
    """Running sums, running maxima from behind, and a linear recurrence."""
    row, i = tl.program_id(0), tl.arange(0, COLUMNS)
    values = tl.load(x + row * COLUMNS + i)
    tl.store(sums + row * COLUMNS + i, tl.cumsum(values, 0))
    tl.store(maxima + row * COLUMNS + i, tl.associative_scan(values, 0, _larger, reverse=True))
    scales = tl.where(i % 3 == 0, 0.0, -1.0)
    _, result = tl.associative_scan((scales, values), 0, _decay)
    tl.store(decayed + row * COLUMNS + i, result)


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def sort_rows(x, out, picked, index, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows sorted, and elements picked by an index."""
    i, j = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    at = i[:, None] * COLUMNS + j[None, :]
    values = tl.load(x + at)
    tl.store(out + at, tl.sort(values, descending=True))
    tl.store(picked + at, tl.gather(values, tl.load(index + at), 1))


@triton.jit
def count_values(x, counts, BINS: tl.constexpr, COLUMNS: tl.constexpr):
    """A histogram of each program's numbers, added up by atomics."""
    values = tl.load(x + tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS))
    tl.atomic_add(counts + tl.arange(0, BINS), tl.histogram(values, BINS), sem="relaxed")


@triton.jit
def atomics(x, added, largest, smallest, bits, tickets, owner, locked, COLUMNS: tl.constexpr, TARGETS: tl.constexpr):
    """Several programs and threads on the same words."""
    i = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    values = tl.load(x + i)
    tl.atomic_add(added + i % TARGETS, values)
    whole = values.to(tl.int32)
    tl.atomic_max(largest + i % TARGETS, whole)
    tl.atomic_min(smallest + i % TARGETS, values.to(tl.float32))
    tl.atomic_or(bits + i % TARGETS, 1 << (whole & 15))
    tl.atomic_xor(bits + i % TARGETS, (whole & 3) << 16)
    tl.store(tickets + tl.atomic_add(owner, 1), tl.program_id(0))
    while tl.atomic_cas(locked, 0, 1, sem="acquire") == 1:
        pass
    tl.store(locked + 1, tl.load(locked + 1, volatile=True) * 2 + 1)
    tl.debug_barrier()
    tl.atomic_xchg(locked, 0, sem="release")


@triton.jit
def functions(x, y, out, N: tl.constexpr, COLUMNS: tl.constexpr):
    """Functions of floats; N results for each pair."""
    i = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    a, b = tl.load(x + i), tl.load(y + i)
    positive = tl.abs(a)
    results = (
        tl.exp(a), tl.exp2(a), tl.log(positive), tl.log2(positive), tl.sqrt(positive), tl.rsqrt(positive), tl.sin(a), tl.cos(a), tl.erf(a),
        tl.floor(a), tl.ceil(a), tl.sigmoid(a), tl.div_rn(a, b), tl.sqrt_rn(positive), tl.fma(a, b, a), tl.clamp(a, -0.5, 0.5), a / b,
    )  # fmt: skip
    for n in tl.static_range(N):
        tl.store(out + (tl.program_id(0) * N + n) * COLUMNS + tl.arange(0, COLUMNS), results[n])


@triton.jit
def integer_arithmetic(x, y, out, N: tl.constexpr, COLUMNS: tl.constexpr):
    """Arithmetic of integers, of whatever width and sign x and y have."""
    i = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    a, b = tl.load(x + i), tl.load(y + i)
    shift = (b & 7).to(a.dtype)
    results = (
        a + b,
        a - b,
        a * b,
        a // b,
        a % b,
        a & b,
        a | b,
        a ^ b,
        a << shift,
        a >> shift,
        tl.minimum(a, b),
        tl.maximum(a, b),
        tl.where(a < b, a, b),
    )
    for n in tl.static_range(N):
        tl.store(out + (tl.program_id(0) * N + n) * COLUMNS + tl.arange(0, COLUMNS), results[n].to(a.dtype))


@triton.jit
def high_products(x, y, out, COLUMNS: tl.constexpr):
    """The upper half of products, as Philox takes it."""
    i = tl.arange(0, COLUMNS)
    tl.store(out + i, tl.umulhi(tl.load(x + i), tl.load(y + i)))


@triton.jit
def philox(out, seed, COLUMNS: tl.constexpr):
    """Four random words for each counter."""
    i = tl.arange(0, COLUMNS)
    words = tl.randint4x(seed, i)
    for n in tl.static_range(4):
        tl.store(out + n * COLUMNS + i, words[n].to(tl.int32, bitcast=True))


@triton.jit
def convert(x, out, COLUMNS: tl.constexpr):
    """From the type of x to the type of out, rounded to nearest even or towards zero for integers."""
    i = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    tl.store(out + i, tl.load(x + i).to(out.dtype.element_ty))


# --- Cases --------------------------------------------------------------------------------------------------------------------------------


def softmax_case(arch: str, columns: int) -> Case:
    x = normals((5, columns), "float32", 20) * 4

    def check(outputs: list[Array]) -> None:
        weights = numpy.exp(x.astype(numpy.float64) - x.max(1, keepdims=True))
        want = weights / weights.sum(1, keepdims=True)
        # Rounding of the difference and its product with log2 e, up to 32 each, of ex2 (2 ulp), of the sum and the quotient.
        assert_within(outputs[0], want, want * (64 * 2 + 2 + columns / 8 + 4) * 2.0**-24)

    arguments = lambda: [x, Output(x.shape, "float32"), columns]  # noqa: E731
    return Case(f"softmax-{columns}", softmax, arch, (5,), arguments, check, {"COLUMNS": triton.next_power_of_2(columns)})


def layer_norm_case(arch: str, dtype: str) -> Case:
    x, weight = normals((16, 256), dtype, 21), normals((256,), "float32", 22)

    def check(outputs: list[Array]) -> None:
        wide = x.astype(numpy.float64)
        centered = wide - wide.mean(1, keepdims=True)
        want = centered / numpy.sqrt((centered**2).mean(1, keepdims=True) + 1e-5) * weight
        assert_within(outputs[0], want, (numpy.abs(want) + numpy.abs(weight)) * 32 * 2.0**-24)

    arguments = lambda: [x, weight, Output(x.shape, "float32"), 256, 1e-5]  # noqa: E731
    return Case(f"layer-norm-{dtype}", layer_norm, arch, (4,), arguments, check, {"ROWS": 4, "COLUMNS": 256})


def reduction_case(arch: str, dtype: str, axis: int) -> Case:
    x = integers((32, 64), dtype, 23, 60)
    length = x.shape[1 - axis]

    def check(outputs: list[Array]) -> None:
        wide = x.astype(numpy.int64)
        parities = numpy.bitwise_xor.reduce(wide, axis=axis)
        for got, want in zip(outputs, (wide.sum(axis), wide.max(axis), wide.min(axis), wide.argmax(axis), parities), strict=True):
            assert_equal(got, want)

    def arguments() -> list:
        same = Output((length,), dtype)
        return [
            x,
            Output((length,), "float32" if dtype != "int32" else dtype),
            same,
            same,
            Output((length,), "int32"),
            Output((length,), "int32"),
        ]

    constants = {"ROWS": 32, "COLUMNS": 64, "AXIS": axis}
    return Case(f"reductions-{dtype}-axis{axis}", reduce_all, arch, (1,), arguments, check, constants, exact=True)


def transpose_case(arch: str, dtype: str, tile: tuple[int, int] = (32, 64)) -> Case:
    x = integers((72, 100), dtype, 24, 100 if "float8" not in dtype else 8)
    arguments = lambda: [x, Output((100, 72), dtype), 72, 100]  # noqa: E731
    grid = (-(-72 // tile[0]), -(-100 // tile[1]))
    constants = {"ROWS": tile[0], "COLUMNS": tile[1]}
    return Case(
        f"transpose-{dtype}", transpose, arch, grid, arguments, lambda outputs: assert_equal(outputs[0], x.T), constants, exact=True
    )


def scan_case(arch: str) -> Case:
    x = integers((2, 512), "float32", 25)

    def check(outputs: list[Array]) -> None:
        assert_equal(outputs[0], numpy.cumsum(x, 1))
        assert_equal(outputs[1], numpy.maximum.accumulate(x[:, ::-1], 1)[:, ::-1])
        want = numpy.zeros_like(x)
        for i in range(512):
            want[:, i] = (0.0 if i % 3 == 0 else -1.0) * want[:, i - 1] + x[:, i]
        assert_equal(outputs[2], want)

    arguments = lambda: [x, *[Output(x.shape, "float32")] * 3]  # noqa: E731
    return Case("scans", scans, arch, (2,), arguments, check, {"COLUMNS": 512}, exact=True)


def sort_case(arch: str) -> Case:
    x = integers((16, 32), "float32", 26, 1000)
    index = numpy.random.default_rng(27).integers(0, 32, x.shape).astype(numpy.int32)

    def check(outputs: list[Array]) -> None:
        assert_equal(outputs[0], -numpy.sort(-x, axis=1))
        assert_equal(outputs[1], numpy.take_along_axis(x, index, 1))

    arguments = lambda: [x, Output(x.shape, "float32"), Output(x.shape, "float32"), index]  # noqa: E731
    return Case("sort-and-gather", sort_rows, arch, (1,), arguments, check, {"ROWS": 16, "COLUMNS": 32}, exact=True)


def histogram_case(arch: str) -> Case:
    x = numpy.random.default_rng(28).integers(0, 32, 3 * 512).astype(numpy.int32)
    check = lambda outputs: assert_equal(outputs[0], numpy.bincount(x, minlength=32))  # noqa: E731
    arguments = lambda: [x, Output((32,), "int32", numpy.zeros(32, numpy.int32))]  # noqa: E731
    return Case("histogram", count_values, arch, (3,), arguments, check, {"BINS": 32, "COLUMNS": 512}, exact=True)


def atomics_case(arch: str, dtype: str) -> Case:
    """Sums of integers in floating point; every order gives the same."""
    programs, columns, targets = 3, 256, 16
    x = integers((programs * columns,), dtype, 29)
    groups = x.reshape(-1, targets).astype(numpy.int64)

    def arguments() -> list:
        start = lambda name, value: numpy.full(targets, value, ELEMENTS[name])  # noqa: E731
        outputs = [(dtype, 1), ("int32", -100), ("float32", 100), ("int32", 0)]
        words = [numpy.zeros(1, numpy.int32), numpy.zeros(2, numpy.int32)]
        return [
            x, *(Output((targets,), name, start(name, value)) for name, value in outputs), Output((programs,), "int32"),
            *(Output(word.shape, "int32", word) for word in words),
        ]  # fmt: skip

    def check(outputs: list[Array]) -> None:
        added, largest, smallest, bits, tickets, owner, locked = outputs
        assert_equal(added, groups.sum(0) + 1)
        assert_equal(largest, groups.max(0))
        assert_equal(smallest, groups.min(0))
        want = numpy.bitwise_or.reduce(1 << (groups & 15), axis=0) | numpy.bitwise_xor.reduce((groups & 3) << 16, axis=0)
        assert_equal(bits, want)
        assert sorted(tickets) == list(range(programs))
        assert owner[0] == programs
        assert list(locked) == [0, 2**programs - 1]

    constants = {"COLUMNS": columns, "TARGETS": targets}
    return Case(f"atomics-{dtype}", atomics, arch, (programs,), arguments, check, constants, any_order=True)


def _sigmoid(x: Any) -> Any:
    return 1 / (1 + numpy.exp(-x))


_erf = numpy.vectorize(__import__("math").erf)
FUNCTIONS: tuple[tuple[Callable[..., Any], float], ...] = (
    (lambda a, b: numpy.exp(a), 16), (lambda a, b: numpy.exp2(a), 4), (lambda a, b: numpy.log(abs(a)), 4), (lambda a, b: numpy.log2(abs(a)), 4),
    (lambda a, b: numpy.sqrt(abs(a)), 4), (lambda a, b: 1 / numpy.sqrt(abs(a)), 4), (lambda a, b: numpy.sin(a), 4), (lambda a, b: numpy.cos(a), 4),
    (lambda a, b: _erf(a), 4), (lambda a, b: numpy.floor(a), 0), (lambda a, b: numpy.ceil(a), 0), (lambda a, b: _sigmoid(a), 16),
    (lambda a, b: a / b, 1), (lambda a, b: numpy.sqrt(abs(a)), 1), (lambda a, b: a * b + a, 1), (lambda a, b: numpy.clip(a, -0.5, 0.5), 0),
    (lambda a, b: a / b, 5),
)  # fmt: skip
"""What `functions` computes, with the error allowed in half units of the last place of the larger of the result and, near a zero, 2⁻³."""


def functions_case(arch: str) -> Case:
    x, y = normals((512,), "float32", 30) * 3, normals((512,), "float32", 31)

    def check(outputs: list[Array]) -> None:
        a, b = x.astype(numpy.float64), y.astype(numpy.float64)
        for n, (function, units) in enumerate(FUNCTIONS):
            want = function(a, b)
            floor = 2.0**-3 if units > 1 else 0.0
            if units == 1:  # rounded to nearest: no other float is closer
                assert_equal(outputs[0][0, n], want.astype(numpy.float32))
            else:
                assert_within(outputs[0][0, n], want, units * 2.0**-24 * numpy.maximum(numpy.abs(want), floor))

    arguments = lambda: [x, y, Output((1, len(FUNCTIONS), 512), "float32")]  # noqa: E731
    return Case("functions", functions, arch, (1,), arguments, check, {"N": len(FUNCTIONS), "COLUMNS": 512})


def integer_case(arch: str, dtype: str) -> Case:
    info = numpy.iinfo(dtype)
    rng = numpy.random.default_rng(32)
    x = rng.integers(info.min, info.max, 512, dtype, endpoint=True)
    y = rng.integers(info.min, info.max, 512, dtype, endpoint=True) >> rng.integers(0, info.bits - 2, 512).astype(dtype)
    y[y == 0] = 3
    y[y == -1 if info.min < 0 else False] = 5  # the lowest number has no negative

    def check(outputs: list[Array]) -> None:
        a, b = x.astype(object), y.astype(object)
        quotients = [abs(i) // abs(j) * (1 if (i < 0) == (j < 0) else -1) for i, j in zip(a, b, strict=True)]  # truncated, as C does
        remainders = [i - j * q for i, j, q in zip(a, b, quotients, strict=True)]
        shift = b & 7
        results = (a + b, a - b, a * b, quotients, remainders, a & b, a | b, a ^ b, [i << s for i, s in zip(a, shift, strict=True)],
                   [i >> s for i, s in zip(a, shift, strict=True)], numpy.minimum(a, b), numpy.maximum(a, b), numpy.minimum(a, b))  # fmt: skip
        for n, want in enumerate(results):
            wrapped = numpy.array([(int(i) - info.min) % 2**info.bits + info.min for i in want], dtype)
            numpy.testing.assert_array_equal(outputs[0][0, n], wrapped, f"result {n}")

    arguments = lambda: [x, y, Output((1, 13, 512), dtype)]  # noqa: E731
    return Case(f"integers-{dtype}", integer_arithmetic, arch, (1,), arguments, check, {"N": 13, "COLUMNS": 512}, exact=True)


def high_products_case(arch: str, dtype: str) -> Case:
    info = numpy.iinfo(dtype)
    x, y = numpy.random.default_rng(33).integers(0, info.max, (2, 256), dtype, endpoint=True)
    want = numpy.array([int(i) * int(j) >> info.bits for i, j in zip(x, y, strict=True)], dtype)
    arguments = lambda: [x, y, Output((256,), dtype)]  # noqa: E731
    check = lambda outputs: numpy.testing.assert_array_equal(outputs[0], want)  # noqa: E731
    return Case(f"high-products-{dtype}", high_products, arch, (1,), arguments, check, {"COLUMNS": 256}, exact=True)


def _philox_words(seed: int, counters: Array) -> Array:
    """Philox 4x32-10 of (counter, 0, 0, 0) under the key (seed, 0), as its authors define it."""
    words = [counters.astype(numpy.uint64), *(numpy.zeros(counters.size, numpy.uint64) for _ in range(3))]
    keys, mask = [seed, 0], numpy.uint64(0xFFFFFFFF)
    for _ in range(10):
        first, second = words[0] * numpy.uint64(0xD2511F53), words[2] * numpy.uint64(0xCD9E8D57)
        high = numpy.uint64(32)
        words = [
            second >> high ^ words[1] ^ numpy.uint64(keys[0]),
            second & mask,
            first >> high ^ words[3] ^ numpy.uint64(keys[1]),
            first & mask,
        ]
        keys = [(keys[0] + 0x9E3779B9) % 2**32, (keys[1] + 0xBB67AE85) % 2**32]
    return numpy.stack(words).astype(numpy.uint32)


def philox_case(arch: str) -> Case:
    want = _philox_words(1234567, numpy.arange(256))
    arguments = lambda: [Output((4, 256), "int32"), 1234567]  # noqa: E731
    check = lambda outputs: numpy.testing.assert_array_equal(outputs[0].view(numpy.uint32), want)  # noqa: E731
    return Case("philox", philox, arch, (1,), arguments, check, {"COLUMNS": 256}, exact=True)


def conversion_case(arch: str, source: str, target: str) -> Case:
    values = normals((1024,), "float32", 34) * 2.0 ** numpy.random.default_rng(35).integers(-6, 6, 1024)
    x = values.astype(ELEMENTS[source])
    want = x.astype(numpy.float32).astype(ELEMENTS[target])
    arguments = lambda: [x, Output((1024,), target)]  # noqa: E731
    check = lambda outputs: assert_equal(outputs[0], want)  # noqa: E731
    return Case(f"convert-{source}-{target}", convert, arch, (2,), arguments, check, {"COLUMNS": 512}, exact=True)


def row_cases() -> list[Case]:
    cases = []
    for arch in ARCHES:
        cases += [softmax_case(arch, columns) for columns in (256, 1000)]
        cases += [
            layer_norm_case(arch, "bfloat16"),
            scan_case(arch),
            sort_case(arch),
            histogram_case(arch),
            functions_case(arch),
            philox_case(arch),
        ]
        cases += [reduction_case(arch, dtype, axis) for dtype, axis in (("float32", 0), ("float32", 1), ("int32", 1))]
        cases += [transpose_case(arch, dtype) for dtype in ("float32", "float16", "float8_e5m2", "int64")]
        cases += [atomics_case(arch, dtype) for dtype in ("float32", "float16", "bfloat16", "float64")]
        cases += [integer_case(arch, dtype) for dtype in ("int32", "int64", "uint32", "int16", "uint8")]
        cases += [high_products_case(arch, dtype) for dtype in ("uint32", "uint64")]
        pairs = [("float32", "float16"), ("float32", "bfloat16"), ("bfloat16", "float32"), ("float32", "float8_e5m2"), ("float8_e5m2", "float16"), ("float16", "int32"),
                 ("int32", "float32"), ("float32", "int8"), ("int64", "float32"), ("float64", "float32")]  # fmt: skip
        pairs += [("float32", "float8_e4m3fn"), ("float8_e4m3fn", "bfloat16")] if arch == "sm_90" else []
        cases += [conversion_case(arch, *pair) for pair in pairs]
    return cases
