"""shfl, vote, match, redux, special registers: what lanes of a warp do together."""

from __future__ import annotations

import numpy as np
import pytest
from simulated import run_cuda

LANES = np.arange(32)


@pytest.mark.parametrize("width", [32, 16, 8, 4])
@pytest.mark.parametrize("call", ["__shfl_sync(~0u, v, ARG, W)", "__shfl_up_sync(~0u, v, ARG, W)",
                                  "__shfl_down_sync(~0u, v, ARG, W)", "__shfl_xor_sync(~0u, v, ARG, W)"])  # fmt: skip
@pytest.mark.parametrize("argument", [0, 1, 3, 5, 31])
def test_shuffle(call: str, argument: int, width: int) -> None:
    source = f"""extern "C" __global__ void k(const int* in, int* out) {{
        int v = in[threadIdx.x];
        out[threadIdx.x] = {call.replace("ARG", str(argument)).replace("W", str(width))};
    }}"""
    values = np.random.default_rng(0).integers(0, 1000, 32).astype(np.int32)
    out = np.zeros(32, np.int32)
    run_cuda(source, values, out)
    inner, first = LANES % width, LANES // width * width
    if "up" in call:
        source_lane = np.where(inner >= argument, LANES - argument, LANES)
    elif "down" in call:
        source_lane = np.where(inner + argument < width, LANES + argument, LANES)
    elif "xor" in call:
        source_lane = np.where((LANES ^ argument) < first + width, LANES ^ argument, LANES)
    else:
        source_lane = first + argument % width
    np.testing.assert_array_equal(out, values[source_lane])


def test_shuffle_predicate() -> None:
    source = """extern "C" __global__ void k(u32* out) {
        u32 d, p;
        asm volatile("{.reg .pred q; shfl.sync.down.b32 %0|q, %2, 3, 31, -1; selp.u32 %1, 1, 0, q;}" : "=r"(d), "=r"(p) : "r"(threadIdx.x));
        out[threadIdx.x] = d * 2 + p;
    }"""
    out = np.zeros(32, np.uint32)
    run_cuda(source, out)
    assert out.tolist() == [(lane + 3) * 2 + 1 if lane < 29 else lane * 2 for lane in range(32)]


def test_votes() -> None:
    source = """extern "C" __global__ void k(const int* in, u32* out) {
        int v = in[threadIdx.x];
        out[threadIdx.x] = __ballot_sync(~0u, v > 50);
        out[32 + threadIdx.x] = __all_sync(~0u, v >= 0) * 2 + __all_sync(~0u, v > 50);
        out[64 + threadIdx.x] = __any_sync(~0u, v > 50) * 2 + __any_sync(~0u, v < 0);
        if (threadIdx.x % 3 == 0) out[96 + threadIdx.x] = __ballot_sync(0x49249249u, v > 50), out[128 + threadIdx.x] = __activemask();
    }"""
    values = np.random.default_rng(0).integers(0, 100, 32).astype(np.int32)
    out = np.zeros(160, np.uint32)
    run_cuda(source, values, out)
    ballot = sum(int(v > 50) << i for i, v in enumerate(values))
    assert (out[:32] == ballot).all()
    assert (out[32:96] == 2).all()
    assert (out[96:128:3] == (ballot & 0x49249249)).all()
    assert (out[128::3] == 0x49249249).all()


def test_match_and_redux() -> None:
    source = """extern "C" __global__ void k(const int* in, u32* out) {
        int v = in[threadIdx.x], same;
        out[threadIdx.x] = __match_any_sync(~0u, v);
        out[32 + threadIdx.x] = __match_all_sync(~0u, v, &same) + same;
        out[64 + threadIdx.x] = __reduce_add_sync(~0u, v);
        out[96 + threadIdx.x] = __reduce_max_sync(~0u, v);
        out[128 + threadIdx.x] = __reduce_xor_sync(~0u, (u32)v);
    }"""
    values = np.random.default_rng(0).integers(-4, 4, 32).astype(np.int32)
    out = np.zeros(160, np.uint32)
    run_cuda(source, values, out)
    assert out[:32].tolist() == [sum(int(values[j] == v) << j for j in range(32)) for v in values]
    assert (out[32:64] == 0).all()
    assert (out[64:96].view(np.int32) == values.sum()).all()
    assert (out[96:128].view(np.int32) == values.max()).all()
    assert (out[128:].view(np.int32) == np.bitwise_xor.reduce(values)).all()


def test_elect() -> None:
    source = """extern "C" __global__ void k(u32* out) {
        u32 d, p;
        if (threadIdx.x < 8) return;
        asm volatile("{.reg .pred q; elect.sync %0|q, 0xffffff00; selp.u32 %1, 1, 0, q;}" : "=r"(d), "=r"(p));
        out[threadIdx.x] = d * 2 + p;
    }"""
    out = np.zeros(32, np.uint32)
    run_cuda(source, out, arch="compute_90")
    assert out.tolist() == [0] * 8 + [17] + [16] * 23


def test_special_registers() -> None:
    names = [
        "tid.x",
        "tid.y",
        "tid.z",
        "ctaid.x",
        "ctaid.y",
        "ctaid.z",
        "ntid.x",
        "nctaid.z",
        "laneid",
        "warpid",
        "lanemask_lt",
        "lanemask_ge",
    ]
    reads = "".join(f'asm volatile("mov.u32 %0, %%{name};" : "=r"(v)); out[i * {len(names)} + {j}] = v;\n' for j, name in enumerate(names))
    source = f"""extern "C" __global__ void k(u32* out) {{
        u32 v, block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
        u32 i = block * 48 + threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
        {reads}
    }}"""
    out = np.zeros((2 * 3 * 2, 48, len(names)), np.uint32)
    run_cuda(source, out, grid=(2, 3, 2), block=(4, 6, 2))
    expected = []
    for block in range(12):
        for thread in range(48):
            lane = thread % 32
            expected.append([thread % 4, thread // 4 % 6, thread // 24, block % 2, block // 2 % 3, block // 6, 4, 2,
                             lane, thread // 32, (1 << lane) - 1, (0xFFFFFFFF << lane) & 0xFFFFFFFF])  # fmt: skip
    np.testing.assert_array_equal(out.reshape(-1, len(names)), np.array(expected, np.uint32))


def test_clock_goes_on() -> None:
    source = """extern "C" __global__ void k(long long* out) {
        long long a = clock64(), b = clock64();
        out[threadIdx.x] = b - a;
    }"""
    out = np.zeros(32, np.int64)
    run_cuda(source, out)
    assert (out > 0).all()
