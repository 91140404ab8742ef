"""Matrix instructions, GPU against simulator: which lane holds what, descriptors of wgmma, ldmatrix and stmatrix bit by bit on small integers; and how sums are
rounded, by crafted inputs whose results are kept."""

from __future__ import annotations

from typing import Any

import numpy
import pytest
from calibration import Both

# --- mma.sync, ldmatrix, stmatrix ----------------------------------------------------------------------------------------------------------

SHAPES = {
    # name -> instruction, registers of A and of B, kind of elements, depth
    "f16": ("m16n8k16.row.col.f32.f16.f16.f32", 4, 2, "f16", 16),
    "bf16": ("m16n8k16.row.col.f32.bf16.bf16.f32", 4, 2, "bf16", 16),
    "f16_k8": ("m16n8k8.row.col.f32.f16.f16.f32", 2, 1, "f16", 8),
    "bf16_k8": ("m16n8k8.row.col.f32.bf16.bf16.f32", 2, 1, "bf16", 8),
    "tf32": ("m16n8k8.row.col.f32.tf32.tf32.f32", 4, 2, "tf32", 8),
    "tf32_k4": ("m16n8k4.row.col.f32.tf32.tf32.f32", 2, 1, "tf32", 4),
}


def _operands(first: int, count: int) -> str:
    return "{" + ", ".join(f"%{first + i}" for i in range(count)) + "}"


def _mma(name: str) -> str:
    instruction, a, b, _, _ = SHAPES[name]
    inputs = ", ".join([f'"r"(r[{32} * {i} + lane])' for i in range(a + b)])
    return f"""
extern "C" __global__ void mma_{name}(float* d, const u32* registers, const float* c) {{
  u32 lane = threadIdx.x;
  const u32* r = registers + blockIdx.x * {32 * (a + b)};
  float x[4];
  for (int i = 0; i < 4; ++i) x[i] = c[(blockIdx.x * 4 + i) * 32 + lane];
  asm volatile("mma.sync.aligned.{instruction} {_operands(0, 4)}, {_operands(4, a)}, {_operands(4 + a, b)}, {_operands(0, 4)};"
    : "+f"(x[0]), "+f"(x[1]), "+f"(x[2]), "+f"(x[3]) : {inputs});
  for (int i = 0; i < 4; ++i) d[(blockIdx.x * 4 + i) * 32 + lane] = x[i];
}}"""


MMA = "".join(map(_mma, SHAPES))


def bits_of(values: Any, kind: str) -> Any:
    """float64 as the bits of an element, truncated: inputs here are exact. 16 bits of f16 and bf16, 32 of tf32."""
    if kind == "f16":
        return values.astype(numpy.float16).view(numpy.uint16)
    words = values.astype(numpy.float32).view(numpy.uint32)
    return (words >> 16).astype(numpy.uint16) if kind == "bf16" else words & numpy.uint32(0xFFFFE000)


def fragments(a: Any, b: Any, kind: str) -> Any:
    """Matrices A (…, 16, k) and B (…, k, 8) as registers (…, A's then B's, 32 lanes), by the layouts of the PTX ISA."""
    lane = numpy.arange(32)
    group, quad = lane // 4, lane % 4
    a, b = bits_of(a, kind), bits_of(b, kind)
    depth = a.shape[-1]
    registers = []
    if kind == "tf32":
        for column in range(0, depth, 4):
            registers += [a[..., group + 8 * half, quad + column] for half in (0, 1)]
        registers += [b[..., quad + row, group] for row in range(0, depth, 4)]
        return numpy.stack(registers, -2)
    for column in range(0, depth, 8):
        for half in (0, 1):
            low, high = (a[..., group + 8 * half, 2 * quad + column + i].astype(numpy.uint32) for i in (0, 1))
            registers.append(low | high << 16)
    for row in range(0, depth, 8):
        low, high = (b[..., 2 * quad + row + i, group].astype(numpy.uint32) for i in (0, 1))
        registers.append(low | high << 16)
    return numpy.stack(registers, -2)


def accumulators(c: Any) -> Any:
    """Matrix (…, 16, 8) as registers (…, 4, 32)."""
    lane = numpy.arange(32)
    return numpy.stack([c[..., lane // 4 + 8 * (i // 2), 2 * (lane % 4) + i % 2] for i in range(4)], -2)


def run_mma(both: Both, name: str, case: str, a: Any, b: Any, c: Any, **options: Any) -> Any:
    registers, start = fragments(a, b, SHAPES[name][3]), accumulators(c).astype(numpy.float32)
    arguments = [("array", numpy.zeros(start.shape, numpy.float32)), ("array", registers), ("array", start)]
    return both(f"mma {name}: {case}", MMA, f"mma_{name}", arguments, grid=len(a), **options)


@pytest.mark.parametrize("name", SHAPES)
def test_lanes_of_mma(both: Both, name: str) -> None:
    rng = numpy.random.default_rng(0)
    depth = SHAPES[name][4]
    a, b = rng.integers(-8, 9, (8, 16, depth)).astype(float), rng.integers(-8, 9, (8, depth, 8)).astype(float)
    c = rng.integers(-100, 101, (8, 16, 8)).astype(float)
    run_mma(both, name, "integers", a, b, c, expected=accumulators(a @ b + c).astype(numpy.float32))


def test_tf32_ignores_low_bits(both: Both) -> None:
    """Operands with all 32 bits set to something: which of them count?"""
    rng = numpy.random.default_rng(1)
    registers = (rng.integers(0, 1 << 23, (16, 6, 32), dtype=numpy.uint32) | 0x3F800000).astype(numpy.uint32)
    registers[:, 4:] = 0
    registers[:, 4:, 0::5] = 0x3F800000  # lanes with quad = group: B[k, n] = 1 where they agree, so that sums have one term
    start = numpy.zeros((16, 4, 32), numpy.float32)
    both("mma tf32: low bits", MMA, "mma_tf32", [("array", start.copy()), ("array", registers), ("array", start)], grid=16, bound=2.0**-9)


MATRICES = """
extern "C" __global__ void matrices(u32* out, const u32* in) {
  __shared__ __align__(128) u32 s[512];
  u32 lane = threadIdx.x, x[4] = {0, 0, 0, 0};
  for (int i = lane; i < 512; i += 32) s[i] = in[i];
  __syncthreads();
  int k = 0;
  u32 row = address(s) + (lane * 5 % 32) * 16;
#define LOAD(TEXT, ...) asm volatile("ldmatrix.sync.aligned.m8n8." TEXT ", [%4];" : "+r"(x[0]), "+r"(x[1]), "+r"(x[2]), "+r"(x[3]) : "r"(row) : "memory"); \\
  for (int i = 0; i < 4; ++i) out[32 * k++ + lane] = x[i];
  LOAD("x4.shared.b16 {%0, %1, %2, %3}") LOAD("x4.trans.shared.b16 {%0, %1, %2, %3}") LOAD("x2.shared.b16 {%0, %1}")
  LOAD("x2.trans.shared.b16 {%2, %3}") LOAD("x1.shared.b16 {%0}") LOAD("x1.trans.shared.b16 {%1}")
  for (int i = 0; i < 4; ++i) x[i] = in[i * 32 + lane] * 3 + i;
#define STORE(TEXT) __syncthreads(); for (int i = lane; i < 512; i += 32) s[i] = i; __syncthreads(); \\
  asm volatile("stmatrix.sync.aligned.m8n8." TEXT ";" :: "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]), "r"(row) : "memory"); \\
  __syncthreads(); for (int i = lane; i < 512; i += 32) out[32 * 24 + 512 * (k - 24) + i] = s[i]; ++k;
  STORE("x4.shared.b16 [%4], {%0, %1, %2, %3}") STORE("x4.trans.shared.b16 [%4], {%0, %1, %2, %3}") STORE("x2.shared.b16 [%4], {%1, %2}")
  STORE("x2.trans.shared.b16 [%4], {%0, %1}") STORE("x1.shared.b16 [%4], {%3}") STORE("x1.trans.shared.b16 [%4], {%2}")
}
"""


def test_ldmatrix_and_stmatrix(both: Both) -> None:
    words = numpy.arange(1024, dtype=numpy.uint16).view(numpy.uint32)
    out = both("ldmatrix, stmatrix", MATRICES, "matrices", [("array", numpy.zeros(32 * 24 + 6 * 512, numpy.uint32)), ("array", words)])
    rows = words.view(numpy.uint16).reshape(-1, 8)[numpy.arange(32) * 5 % 32]
    lane = numpy.arange(32)
    for i in range(4):
        pair = (
            rows[8 * i + lane // 4, 2 * (lane % 4)].astype(numpy.uint32)
            | rows[8 * i + lane // 4, 2 * (lane % 4) + 1].astype(numpy.uint32) << 16
        )
        assert (out[32 * i : 32 * i + 32] == pair).all()


# --- wgmma --------------------------------------------------------------------------------------------------------------------------------

N, DEPTH = 64, 64
MODES = {16: 0, 128: 1, 64: 2, 32: 3}
"""Bytes in a row of the swizzle's pattern -> bits 62 and 63 of a descriptor; 16: no swizzle."""


def _wgmma(name: str, a_in_registers: bool, a_transposed: int, b_transposed: int, n: int = N, kind: str = "bf16", depth: int = 16) -> str:
    count = n // 2
    outputs = ", ".join(f'"+f"(d[{i}])' for i in range(count))
    majors = "" if kind == "tf32" else f", {b_transposed}" if a_in_registers else f", {a_transposed}, {b_transposed}"
    a_text = _operands(count, 4) if a_in_registers else f"%{count}"
    b_number = count + (4 if a_in_registers else 1)
    a_inputs = '"r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3])' if a_in_registers else '"l"(a_first + from_a)'
    return f"""
extern "C" __global__ void __launch_bounds__(128, 1) {name}(float* out, const float* start, const u32* image, const u32* registers, const u32* starts,
    u64 a_descriptor, u64 b_descriptor, int words, int b_at, int steps) {{
  extern __shared__ __align__(1024) u32 s[];
  u32 t = threadIdx.x;
  const u32* own = image + (u64)blockIdx.x * words;
  for (int i = t; i < words; i += 128) s[i] = own[i];
  asm volatile("fence.proxy.async;" ::: "memory");
  __syncthreads();
  float d[{count}];
  for (int i = 0; i < {count}; ++i) d[i] = start[((u64)blockIdx.x * 128 + t) * {count} + i];
  u64 a_first = a_descriptor | ((address(s) & 0x3ffff) >> 4), b_first = b_descriptor | (((address(s) + b_at) & 0x3ffff) >> 4);
  for (int step = 0; step < steps; ++step) {{
    u32 a[4];
    for (int i = 0; i < 4; ++i) a[i] = registers[(step * 4 + i) * 128 + t];
    u64 from_a = starts[2 * step] >> 4, from_b = starts[2 * step + 1] >> 4;
    for (int i = 0; i < 4; ++i) asm volatile("" : "+r"(a[i]) :: "memory");
    for (int i = 0; i < {count}; ++i) asm volatile("" : "+f"(d[i]) :: "memory");
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
    asm volatile("{{.reg .pred p; setp.eq.u32 p, 0, 0; wgmma.mma_async.sync.aligned.m64n{n}k{depth}.f32.{kind}.{kind} {_operands(0, count)}, {a_text}, %{b_number}, p, 1, 1{majors};}}"
      : {outputs} : {a_inputs}, "l"(b_first + from_b));
    asm volatile("wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;" ::: "memory");
    for (int i = 0; i < 4; ++i) asm volatile("" : "+r"(a[i]) :: "memory");
    for (int i = 0; i < {count}; ++i) asm volatile("" : "+f"(d[i]) :: "memory");
  }}
  for (int i = 0; i < {count}; ++i) out[((u64)blockIdx.x * 128 + t) * {count} + i] = d[i];
}}"""


WGMMA = "".join(
    [_wgmma(f"wgmma_ss_{i}{j}", False, i, j) for i in (0, 1) for j in (0, 1)] + [_wgmma(f"wgmma_rs_{j}", True, 0, j) for j in (0, 1)]
)


def layout(rows: int, swizzle: int, k_major: bool) -> tuple[Any, int, list[int]]:
    """A matrix (rows, DEPTH) of 2-byte elements in shared memory: (byte of each element, descriptor without address, start of each step of 16)."""
    row, k = numpy.meshgrid(numpy.arange(rows), numpy.arange(DEPTH), indexing="ij")
    steps = range(DEPTH // 16)
    if swizzle == 16 and k_major:
        leading, stride = 128, 16 * DEPTH
        offset = row // 8 * stride + k // 8 * leading + row % 8 * 16 + 2 * k % 16
        starts = [2 * leading * step for step in steps]
    elif swizzle == 16:
        stride, leading = 128, 16 * rows
        offset = row // 8 * stride + k // 8 * leading + k % 8 * 16 + 2 * row % 16
        starts = [2 * leading * step for step in steps]
    elif k_major:
        leading, stride = 16, 8 * swizzle
        offset = 2 * k // swizzle * rows * swizzle + row * swizzle + 2 * k % swizzle
        starts = [32 * step // swizzle * rows * swizzle + 32 * step % swizzle for step in steps]
    else:
        stride, leading = 8 * swizzle, DEPTH * swizzle
        offset = 2 * row // swizzle * leading + k * swizzle + 2 * row % swizzle
        starts = [16 * swizzle * step for step in steps]
    offset = offset ^ (((offset >> 7) & (swizzle // 16 - 1)) << 4)
    return offset, leading >> 4 << 16 | stride >> 4 << 32 | MODES[swizzle] << 62, starts


def a_registers(matrix: Any) -> Any:
    """A (64, 16) of 2-byte bits as registers [4][128]."""
    thread = numpy.arange(128)
    row, quad = thread // 32 * 16 + thread % 32 // 4, thread % 4
    words = []
    for register in range(4):
        low, high = (matrix[row + 8 * (register % 2), 2 * quad + 8 * (register // 2) + i].astype(numpy.uint32) for i in (0, 1))
        words.append(low | high << 16)
    return numpy.stack(words)


def d_layout(d: Any) -> Any:
    """A matrix (64, n) as accumulators [thread][i]."""
    thread, i = numpy.arange(128)[:, None], numpy.arange(d.shape[1] // 2)[None, :]
    return d[thread // 32 * 16 + thread % 32 // 4 + i // 2 % 2 * 8, i // 4 * 8 + thread % 4 * 2 + i % 2]


@pytest.mark.parametrize("b_k_major", [True, False])
@pytest.mark.parametrize("a_k_major", [True, False, None])
@pytest.mark.parametrize("swizzle", [16, 32, 64, 128])
def test_descriptors_of_wgmma(both: Both, swizzle: int, a_k_major: bool | None, b_k_major: bool) -> None:
    rng = numpy.random.default_rng(swizzle)
    a, b = rng.integers(-8, 9, (64, DEPTH)).astype(float), rng.integers(-8, 9, (N, DEPTH)).astype(float)
    c = rng.integers(-99, 100, (64, N)).astype(float)
    b_offset, b_descriptor, b_starts = layout(N, swizzle, b_k_major)
    a_offset, a_descriptor, a_starts = layout(64, swizzle, bool(a_k_major))
    image = numpy.zeros(2 * 64 * DEPTH, numpy.uint16)
    image[a_offset // 2] = bits_of(a, "bf16")
    image[64 * DEPTH + b_offset // 2] = bits_of(b, "bf16")
    registers = numpy.stack([a_registers(bits_of(a, "bf16")[:, 16 * i : 16 * i + 16]) for i in range(DEPTH // 16)])
    starts = numpy.array([a_starts, b_starts], numpy.uint32).T.copy()
    kernel = f"wgmma_rs_{int(not b_k_major)}" if a_k_major is None else f"wgmma_ss_{int(not a_k_major)}{int(not b_k_major)}"
    words = image.size // 2
    arguments = [
        ("array", numpy.zeros((128, N // 2), numpy.float32)), ("array", d_layout(c).astype(numpy.float32)), ("array", image.view(numpy.uint32)),
        ("array", registers), ("array", starts), ("Q", a_descriptor), ("Q", b_descriptor), ("i", words), ("i", 64 * DEPTH * 2), ("i", DEPTH // 16),
    ]  # fmt: skip
    name = f"{kernel}, swizzle {swizzle}"
    both(name, WGMMA, kernel, arguments, expected=d_layout(a @ b.T + c).astype(numpy.float32), block=128, shared=4 * words)


# --- How sums are rounded ------------------------------------------------------------------------------------------------------------------


def experiments(depth: int) -> tuple[list[str], Any, Any, Any]:
    """(name, factors a (count, depth), b (count, depth), c (count,)) whose products and sums show how many bits survive."""
    names: list[str] = []
    rows: list[tuple[Any, Any, float]] = []

    def add(name: str, products: dict[int, float], c: float) -> None:
        """Each product is a power of two with a sign; it is split so that both factors are normal in float16."""
        a, b = numpy.zeros(depth), numpy.zeros(depth)
        for k, value in products.items():
            exponent = int(numpy.log2(abs(value)))
            a[k], b[k] = numpy.sign(value) * 2.0 ** (exponent // 2), 2.0 ** (exponent - exponent // 2)
        names.append(name)
        rows.append((a, b, c))

    everywhere = range(depth)
    for t in range(18, 28):
        tiny = 2.0**-t
        for sign in (1, -1):
            for c in (1.0, -1.0):
                add(f"c={c}, one product of {sign}*2^-{t}", {0: sign * tiny}, c)
                add(f"c={c}, all products {sign}*2^-{t}", dict.fromkeys(everywhere, sign * tiny), c)
            add(f"c=0, first product 1, others {sign}*2^-{t}", {k: sign * tiny if k else 1.0 for k in everywhere}, 0)
            add(f"c=-1, first product 1, others {sign}*2^-{t}", {k: sign * tiny if k else 1.0 for k in everywhere}, -1)
            add(f"c=0, products 1, -1, others {sign}*2^-{t}", {k: sign * tiny if k > 1 else (1.0, -1.0)[k] for k in everywhere}, 0)
            add(f"c=0, first 1, last -1, others {sign}*2^-{t}", {k: {0: 1.0, depth - 1: -1.0}.get(k, sign * tiny) for k in everywhere}, 0)
            add(f"c={sign}*2^-{t}, all products 1", dict.fromkeys(everywhere, 1.0), sign * tiny)
            add(f"c={sign}*2^-{t}, products 1, -1", {0: 1.0, 1: -1.0}, sign * tiny)
            add(f"c={sign}*2^-{t}, products 1 and -1 in different halves", {0: 1.0, depth - 1: -1.0}, sign * tiny)
    for t in (22, 23, 24, 25, 26):  # which products are summed with which
        for big in (0, depth // 2, depth - 1):
            for k in everywhere:
                if k != big:
                    add(f"c=-1, product {big} is 1, product {k} is 2^-{t}", {big: 1.0, k: 2.0**-t}, -1.0)
    a, b, c = (numpy.array(column) for column in zip(*rows, strict=True))
    return names, a, b, c


def random_experiments(depth: int, kind: str) -> tuple[Any, Any, Any]:
    """Full significands, like and unlike magnitudes, with and without cancellation."""
    rng = numpy.random.default_rng(7)
    shape = (512, depth)
    spread = numpy.repeat([0, 2, 6, 9], 128)[:, None]
    a, b = (rng.standard_normal(shape) * numpy.exp2(rng.integers(-1, 2, shape) * spread // 2) for _ in range(2))
    c = rng.standard_normal(512) * numpy.exp2(rng.integers(-1, 2, 512) * spread[:, 0])
    if kind == "f16":
        return a.astype(numpy.float16).astype(float), b.astype(numpy.float16).astype(float), c.astype(numpy.float32).astype(float)
    mask = numpy.uint32(0xFFFF0000 if kind == "bf16" else 0xFFFFE000)
    a, b = ((x.astype(numpy.float32).view(numpy.uint32) & mask).view(numpy.float32).astype(float) for x in (a, b))
    return a, b, c.astype(numpy.float32).astype(float)


def _bound(a: Any, b: Any, c: Any) -> Any:
    """What hardware may lose: a unit of 2^-22 of the largest addend for each of them."""
    addends = numpy.concatenate([numpy.abs(a * b), numpy.abs(c)[:, None]], 1)
    return (a.shape[1] + 1) * addends.max(1) * 2.0**-22


def _both_kinds(depth: int, kind: str) -> dict[str, tuple[Any, Any, Any]]:
    return {"crafted": experiments(depth)[1:], "random": random_experiments(depth, kind)}


@pytest.mark.parametrize("name", ["f16", "bf16", "tf32", "f16_k8"])
def test_rounding_of_mma(both: Both, name: str) -> None:
    _, _, _, kind, depth = SHAPES[name]
    for case, (a, b, c) in _both_kinds(depth, kind).items():
        whole_a, whole_b, whole_c = numpy.zeros((len(a), 16, depth)), numpy.zeros((len(a), depth, 8)), numpy.zeros((len(a), 16, 8))
        whole_a[:, 0], whole_b[:, :, 0], whole_c[:, 0, 0] = a, b, c  # one sum per warp, in lane 0
        bound = numpy.zeros((len(a), 4, 32))
        bound[:, 0, 0] = _bound(a, b, c)
        run_mma(both, name, f"rounding, {case}", whole_a, whole_b, whole_c, bound=bound, keep=1 << 18)


ROUNDING = {kind: _wgmma(f"sums_{kind}", False, 0, 0, 8, kind, depth) for kind, depth in (("f16", 16), ("bf16", 16), ("tf32", 8))}


@pytest.mark.parametrize("kind", ROUNDING)
def test_rounding_of_wgmma(both: Both, kind: str) -> None:
    depth = 8 if kind == "tf32" else 16
    per_core = depth // 2
    for case, (a, b, c) in _both_kinds(depth, kind).items():
        # Without swizzle: cores of 8 rows of 16 bytes, two of them along k, 128 bytes apart. A's first row and B's first column hold the experiment.
        words = (64 * 32 + 8 * 32) // 4
        image = numpy.zeros((len(a), words * 4), numpy.uint8)
        for factors, at in ((a, 0), (b, 64 * 32)):
            raw = numpy.ascontiguousarray(bits_of(factors, kind)).view(numpy.uint8)
            image[:, at : at + 16], image[:, at + 128 : at + 144] = raw[:, :16], raw[:, 16:]
        assert raw.shape[1] == 2 * 16
        assert per_core * bits_of(a, kind).itemsize == 16
        start = numpy.zeros((len(a), 128, 4), numpy.float32)
        start[:, 0, 0] = c
        bound = numpy.zeros(start.shape)
        bound[:, 0, 0] = _bound(a, b, c)
        descriptor = 128 >> 4 << 16 | 256 >> 4 << 32
        arguments = [
            ("array", numpy.zeros_like(start)), ("array", start), ("array", image.view(numpy.uint32)), ("array", numpy.zeros((4, 128), numpy.uint32)),
            ("array", numpy.zeros(2, numpy.uint32)), ("Q", descriptor), ("Q", descriptor), ("i", words), ("i", 64 * 32), ("i", 1),
        ]  # fmt: skip
        both(
            f"wgmma {kind}: rounding, {case}",
            ROUNDING[kind],
            f"sums_{kind}",
            arguments,
            bound=bound,
            grid=len(a),
            block=128,
            shared=4 * words,
        )
