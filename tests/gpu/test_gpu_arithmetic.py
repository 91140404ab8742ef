"""Instructions that work lane by lane, GPU against simulator: exponentials and their like within ulps, conversions and float32 arithmetic bit by bit; shuffles
and reductions in global memory."""

from __future__ import annotations

from typing import Any

import numpy
import pytest
from calibration import Both, compile_ptx

APPROXIMATE = {
    # instruction -> how far the GPU may be from the (nearly exact) simulator: ulps, or (relative, absolute) error
    "ex2.approx.ftz.f32": 2,
    "ex2.approx.f32": 2,
    "rcp.approx.ftz.f32": 1,
    "rsqrt.approx.ftz.f32": 2,
    "lg2.approx.f32": (2.0**-21, 2.0**-21),
    "lg2.approx.ftz.f32": (2.0**-21, 2.0**-21),
    "tanh.approx.f32": (2.0**-10.9, 2.0**-126),
}
UNARY = {"cvt.rna.tf32.f32": "%0, %1", "cvt.rn.f16.f32": "h, %1", "cvt.rn.bf16.f32": "h, %1"}
BINARY = (
    "cvt.rn.f16x2.f32", "cvt.rn.bf16x2.f32", "cvt.rn.relu.bf16x2.f32", "cvt.rn.relu.f16x2.f32", "add.rn.f32", "add.rn.ftz.f32", "sub.rn.f32", "mul.rn.f32", "mul.rn.ftz.f32",
    "mul.rm.f32", "max.f32", "max.ftz.f32", "max.NaN.f32", "min.f32", "div.rn.f32", "fma.rn.bf16x2", "fma.rn.f16x2",
)  # fmt: skip
TERNARY = ("fma.rn.f32", "fma.rn.ftz.f32")


def _kernel(name: str, statement: str) -> str:
    return f"""
extern "C" __global__ void {name}(float* y, const float* a, const float* b, const float* c, int n) {{
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) {{
    float d;
    {statement}
    y[i] = d;
  }}
}}"""


def _name(instruction: str) -> str:
    return instruction.replace(".", "_")


def _source() -> str:
    text = ""
    for i in APPROXIMATE:
        text += _kernel(_name(i), f'asm volatile("{i} %0, %1;" : "=f"(d) : "f"(a[i]));')
    for i, operands in UNARY.items():
        if operands.startswith("h"):
            inner = f"{{.reg .b16 h, z; mov.b16 z, 0; {i} {operands}; mov.b32 %0, {{h, z}};}}"
        else:
            inner = f"{i} {operands};"
        text += _kernel(_name(i), f'u32 r; asm volatile("{inner}" : "=r"(r) : "f"(a[i])); d = __uint_as_float(r);')
    text += _kernel("cvt_f32_f16", 'asm volatile("{.reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, l;}" : "=f"(d) : "f"(a[i]));')
    for i in BINARY:
        if i.startswith("fma"):
            text += _kernel(
                _name(i),
                f'u32 r; asm volatile("{i} %0, %1, %2, %3;" : "=r"(r) : "r"(__float_as_uint(a[i])), "r"(__float_as_uint(b[i])), "r"(__float_as_uint(c[i]))); d = __uint_as_float(r);',
            )
        elif i.startswith("cvt"):
            text += _kernel(_name(i), f'u32 r; asm volatile("{i} %0, %1, %2;" : "=r"(r) : "f"(a[i]), "f"(b[i])); d = __uint_as_float(r);')
        else:
            text += _kernel(_name(i), f'asm volatile("{i} %0, %1, %2;" : "=f"(d) : "f"(a[i]), "f"(b[i]));')
    for i in TERNARY:
        text += _kernel(_name(i), f'asm volatile("{i} %0, %1, %2, %3;" : "=f"(d) : "f"(a[i]), "f"(b[i]), "f"(c[i]));')
    return text


SOURCE = _source()
SPECIAL = numpy.array(
    [0, -0.0, 1, -1, 0.5, 2, numpy.inf, -numpy.inf, numpy.nan, 1e-45, -1e-45, 1.1754942e-38, 1.17549435e-38, 3.4028235e38, -3.4028235e38,
     65504, 65519.996, 65520, 6.1e-5, 5.96e-8, 2.98e-8, 126, 127, 127.99999, 128, -126, -126.5, -127, -149, -149.5, -150, -151],
    numpy.float32,
)  # fmt: skip


def samples(seed: int, count: int = 60000) -> Any:
    """Special values, all bit patterns, and values near one."""
    rng = numpy.random.default_rng(seed)
    bits = rng.integers(0, 1 << 32, count // 2, dtype=numpy.uint32).view(numpy.float32)
    near = (rng.standard_normal(count // 2) * numpy.exp2(rng.integers(-12, 13, count // 2))).astype(numpy.float32)
    return numpy.concatenate([rng.permutation(numpy.resize(SPECIAL, 1024)), bits, near])


def elementwise(both: Both, instruction: str, a: Any, b: Any, c: Any, as_bits: bool = False, **options: Any) -> Any:
    y = numpy.zeros(a.size, numpy.uint32 if as_bits else numpy.float32)
    arguments = [("array", y), ("array", a), ("array", b), ("array", c), ("i", a.size)]
    return both(options.pop("name", instruction), SOURCE, _name(instruction), arguments, grid=16, block=256, **options)


@pytest.mark.parametrize("instruction", APPROXIMATE)
def test_approximations(both: Both, instruction: str) -> None:
    dense = (
        numpy.linspace(-151, 129, 60000, dtype=numpy.float32) if "ex2" in instruction else numpy.linspace(-4, 4, 20000, dtype=numpy.float32)
    )
    a = numpy.concatenate([samples(0, 40000), dense])
    far = APPROXIMATE[instruction]
    if isinstance(far, int):
        elementwise(both, instruction, a, a, a, max_ulps=far)
        return
    with numpy.errstate(all="ignore"):
        exact = numpy.tanh(a.astype(numpy.float64)) if "tanh" in instruction else numpy.log2(numpy.abs(a.astype(numpy.float64)))
    elementwise(both, instruction, a, a, a, bound=numpy.nan_to_num(numpy.maximum(far[0] * numpy.abs(exact), far[1]), posinf=0.0))


def test_every_exponential_of_a_fraction_is_kept(both: Both) -> None:
    """No test of its own: 8192 outputs in [0, 1], for whoever wants to model the hardware's table."""
    a = numpy.linspace(0, 1, 8192, endpoint=False, dtype=numpy.float32)
    elementwise(both, "ex2.approx.ftz.f32", a, a, a, max_ulps=2, name="ex2.approx.ftz.f32 in [0, 1)")


@pytest.mark.parametrize("instruction", [*UNARY, "cvt_f32_f16", *BINARY, *TERNARY])
def test_rounded_arithmetic(both: Both, instruction: str) -> None:
    a, b, c = samples(1), samples(2), samples(3)
    packed = "x2" in instruction or instruction in ("cvt.rn.f16.f32", "cvt.rn.bf16.f32")
    if instruction.startswith("fma.rn") and packed:  # pairs of normal numbers: no NaN to tell apart within a word
        rng = numpy.random.default_rng(4)
        a, b, c = ((rng.integers(0, 1 << 32, a.size, dtype=numpy.uint32) & 0xBFFFBFFF | 0x08000800).view(numpy.float32) for _ in range(3))
    expected = None
    with numpy.errstate(all="ignore"):
        if instruction in ("add.rn.f32", "sub.rn.f32", "mul.rn.f32", "div.rn.f32"):
            operation = {"add": numpy.add, "sub": numpy.subtract, "mul": numpy.multiply, "div": numpy.divide}[instruction[:3]]
            expected = operation(a, b)
    elementwise(both, instruction, a, b, c, as_bits=packed, expected=expected)


SHUFFLES = """
extern "C" __global__ void shuffles(u32* out, const u32* in) {
  u32 x = in[threadIdx.x], r;
  int k = 0;
#define ONE(MODE, B, C) asm volatile("shfl.sync." MODE ".b32 %0, %1, " #B ", " #C ", 0xffffffff;" : "=r"(r) : "r"(x)); out[32 * k++ + threadIdx.x] = r;
  ONE("bfly", 1, 0x1f) ONE("bfly", 2, 0x1f) ONE("bfly", 16, 0x1f) ONE("bfly", 8, 0x0f) ONE("idx", 5, 0x1f) ONE("idx", 5, 0x181f) ONE("idx", 0, 0x1c1f)
  ONE("up", 1, 0x00) ONE("up", 3, 0x1800) ONE("down", 1, 0x1f) ONE("down", 5, 0x181f) ONE("bfly", 3, 0x1c1f)
}
extern "C" __global__ void reductions(float* out, const float* in, int n) {
  for (int i = threadIdx.x; i < n; i += 32) {
    asm volatile("red.global.add.f32 [%0], %1;" :: "l"(out + i), "f"(in[i]) : "memory");
  }
}
extern "C" __global__ void reductions_v4(float* out, const float* in, int n) {
  for (int i = 4 * threadIdx.x; i < n; i += 128)
    asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" :: "l"(out + i), "f"(in[i]), "f"(in[i + 1]), "f"(in[i + 2]), "f"(in[i + 3]) : "memory");
}
"""


def test_shuffles(both: Both) -> None:
    lanes = numpy.arange(32, dtype=numpy.uint32) * 3 + 7
    out = both("shfl", SHUFFLES, "shuffles", [("array", numpy.zeros((12, 32), numpy.uint32)), ("array", lanes)])
    assert (out[0] == lanes[numpy.arange(32) ^ 1]).all()
    assert (out[4] == lanes[5]).all()
    assert (out[9] == lanes[numpy.minimum(numpy.arange(32) + 1, 31)]).all()


@pytest.mark.parametrize("kernel", ["reductions", "reductions_v4"])
def test_reductions_in_global_memory(both: Both, kernel: str) -> None:
    """One addition per element: also of infinities, NaN and subnormals."""
    start, added = samples(5, 8192), samples(6, 8192)
    normal = (numpy.abs(start) >= 2.0**-100) & (numpy.abs(added) >= 2.0**-100)
    with numpy.errstate(all="ignore"):
        expected = start[normal] + added[normal]
    arguments = [
        ("array", numpy.resize(start[normal], expected.size // 4 * 4)),
        ("array", numpy.resize(added[normal], expected.size // 4 * 4)),
    ]
    both(
        f"red.global.add, {kernel}",
        SHUFFLES,
        kernel,
        [*arguments, ("i", arguments[0][1].size)],
        expected=expected[: expected.size // 4 * 4],
    )
    tiny = numpy.resize(numpy.array([1e-45, 1e-39, -1e-39, 1.1754942e-38, 0, -0.0, 2e-38, -1.2e-38], numpy.float32), 64)
    other = numpy.repeat(numpy.array([1e-45, -1e-39, 1.1754944e-38, -0.0, 1.0, 0, 1e-40, -2e-38], numpy.float32), 8)
    both(f"red.global.add of subnormals, {kernel}", SHUFFLES, kernel, [("array", tiny), ("array", other), ("i", 64)])


def test_all_kernels_compile() -> None:
    assert compile_ptx(SOURCE).count(b".entry") == len(APPROXIMATE) + len(UNARY) + 1 + len(BINARY) + len(TERNARY)
