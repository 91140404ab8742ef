"""Loads, stores and atomics in all spaces and sizes, and kernel parameters."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from simulated import Array, compile_cuda, run_cuda, run_ptx

from cuflash.simulator import Module, Options

COPY = """
template <class T> __device__ void copy(const T* in, T* out) { out[threadIdx.x] = in[threadIdx.x]; }
struct __align__(8) Two { u32 a, b; };
struct __align__(16) Four { u32 a, b, c, d; };
struct __align__(16) Long { u64 a, b; };
struct __align__(4) Shorts { u16 a, b; };
struct __align__(4) Bytes { unsigned char a, b, c, d; };
extern "C" __global__ void k(const TYPE* in, TYPE* out) {
    __shared__ TYPE staged[32];
    staged[31 - threadIdx.x] = in[threadIdx.x];
    __syncthreads();
    out[threadIdx.x] = staged[threadIdx.x];
}"""
SIZES = {"unsigned char": 1, "u16": 2, "u32": 4, "u64": 8, "Two": 8, "Four": 16, "Long": 16, "Shorts": 4, "Bytes": 4}


@pytest.mark.parametrize("name", SIZES)
def test_copy_through_shared_memory(name: str) -> None:
    data = np.random.default_rng(0).integers(0, 256, (32, SIZES[name])).astype(np.uint8)
    out = np.zeros_like(data)
    run_cuda(COPY.replace("TYPE", name), data, out)
    np.testing.assert_array_equal(out, data[::-1])


def test_small_signed_loads() -> None:
    source = """extern "C" __global__ void k(const signed char* a, const short* b, int* out, long long* wide) {
        int i = threadIdx.x;
        out[i] = a[i] * b[i];
        wide[i] = a[i];
        wide[i] += (long long)b[i] << 20;
    }"""
    a = np.arange(-16, 16, dtype=np.int8)
    b = (np.arange(32) * 999 - 16000).astype(np.int16)
    out, wide = np.zeros(32, np.int32), np.zeros(32, np.int64)
    run_cuda(source, a, b, out, wide)
    np.testing.assert_array_equal(out, a.astype(np.int32) * b)
    np.testing.assert_array_equal(wide, a + (b.astype(np.int64) << 20))


def test_generic_addresses() -> None:
    source = """
    __device__ __noinline__ int sum(const int* p) { return p[0] + p[1]; }
    extern "C" __global__ void k(const int* in, int* out, int which) {
        __shared__ int shared[64];
        int local[64];
        int i = threadIdx.x;
        for (int j = 0; j < 64; ++j) local[j] = in[j] * 3;
        shared[2 * i] = in[2 * i] * 2, shared[2 * i + 1] = in[2 * i + 1] * 2;
        __syncthreads();
        const int* p = (i + which) % 3 == 0 ? in : (i + which) % 3 == 1 ? (const int*)shared : (const int*)local;
        out[i] = p[2 * i] + p[2 * i + 1];
    }""".replace("__device__ __noinline__ int sum(const int* p) { return p[0] + p[1]; }", "")
    data = np.random.default_rng(0).integers(0, 1000, 64).astype(np.int32)
    out = np.zeros(32, np.int32)
    for which in range(3):
        run_cuda(source, data, out, which)
        factor = np.array([1, 2, 3])[(np.arange(32) + which) % 3]
        np.testing.assert_array_equal(out, data.reshape(32, 2).sum(1) * factor)


def test_struct_parameter_with_computed_index() -> None:
    source = """
    struct Arguments { int count; u64 numbers[8]; float scale; u16 last; };
    extern "C" __global__ void k(const __grid_constant__ Arguments a, float* out) {
        int i = threadIdx.x;
        out[i] = a.scale * (float)a.numbers[i % a.count] + a.last;
    }"""
    numbers = np.arange(10, 18)
    out = np.zeros(32, np.float32)
    packed = struct.pack("<i4x8QfH2x", 5, *numbers.tolist(), 0.5, 7) + struct.pack("<Q", out.ctypes.data)
    module = Module(compile_cuda(source))
    assert module.param_bytes == len(packed) == 88
    module.launch((1, 1, 1), (32, 1, 1), 0, packed, [(out.ctypes.data, out.nbytes, "out")], Options(threads=1))
    np.testing.assert_array_equal(out, numbers[np.arange(32) % 5] * 0.5 + 7)


def test_module_variables() -> None:
    source = """
    __constant__ int table[4] = {10, -20, 30, 40};
    __device__ float factor = 2.5f;
    extern "C" __global__ void k(float* out) { out[threadIdx.x] = table[threadIdx.x % 4] * factor; }"""
    out = np.zeros(32, np.float32)
    run_cuda(source, out)
    np.testing.assert_array_equal(out, np.resize([25.0, -50.0, 75.0, 100.0], 32))


def test_static_and_dynamic_shared_memory() -> None:
    source = """
    extern "C" __global__ void k(u32* out) {
        extern __shared__ __align__(128) u32 dynamic[];
        __shared__ u32 fixed[40];
        fixed[threadIdx.x] = threadIdx.x, dynamic[threadIdx.x] = 100 + threadIdx.x;
        u32 size; asm("mov.u32 %0, %dynamic_smem_size;" : "=r"(size));
        out[threadIdx.x] = fixed[threadIdx.x] * 1000 + dynamic[threadIdx.x];
        out[32 + threadIdx.x] = (u32)__cvta_generic_to_shared(dynamic) % 128 + size;
    }"""
    out = np.zeros(64, np.uint32)
    run_cuda(source, out, shared=128)
    np.testing.assert_array_equal(out[:32], np.arange(32) * 1001 + 100)
    assert (out[32:] == 128).all()


ATOMICS = {
    "atomicAdd(p, v)": lambda old, v: old + v.sum(),
    "atomicMin(p, v)": lambda old, v: min(old, v.min()),
    "atomicMax(p, v)": lambda old, v: max(old, v.max()),
    "atomicOr(p, v)": lambda old, v: old | np.bitwise_or.reduce(v),
    "atomicAnd(p, v)": lambda old, v: old & np.bitwise_and.reduce(v),
    "atomicXor(p, v)": lambda old, v: old ^ np.bitwise_xor.reduce(v),
}


@pytest.mark.parametrize("call", ATOMICS)
@pytest.mark.parametrize("ctype", ["int", "u32", "u64"])
def test_atomics(call: str, ctype: str) -> None:
    dtype = {"int": np.int32, "u32": np.uint32, "u64": np.uint64}[ctype]
    source = f"""extern "C" __global__ void k(const {ctype}* in, {ctype}* out) {{
        __shared__ {ctype} cell;
        {ctype} v = in[blockIdx.x * blockDim.x + threadIdx.x], *p = out;
        {call};
        if (threadIdx.x == 0) cell = 5;
        __syncthreads();
        p = &cell;
        {call};
        __syncthreads();
        if (threadIdx.x == 0) out[1 + blockIdx.x] = cell;
    }}"""
    values = np.random.default_rng(0).integers(0, 2**23, 128).astype(dtype)
    out = np.zeros(3, dtype)
    out[0] = 12345
    run_cuda(source, values, out, grid=2, block=64)
    assert out[0] == ATOMICS[call](dtype(12345), values)
    assert out[1] == ATOMICS[call](dtype(5), values[:64])
    assert out[2] == ATOMICS[call](dtype(5), values[64:])


def test_atomic_results() -> None:
    source = """extern "C" __global__ void k(u32* counter, u32* tickets, float* total, u32* cas) {
        tickets[threadIdx.x] = atomicAdd(counter, 2u);
        atomicAdd(total, 0.5f);
        tickets[32 + threadIdx.x] = atomicInc(counter + 1, 9u);
        tickets[64 + threadIdx.x] = atomicExch(counter + 2, threadIdx.x);
        if (threadIdx.x == 3) tickets[96] = atomicCAS(cas, 7u, 70u), tickets[97] = atomicCAS(cas, 7u, 700u);
    }"""
    counter, tickets, total, cas = np.zeros(3, np.uint32), np.zeros(98, np.uint32), np.ones(1, np.float32), np.array([7], np.uint32)
    run_cuda(source, counter, tickets, total, cas)
    assert sorted(tickets[:32]) == list(range(0, 64, 2))
    assert tickets[32:64].tolist() == [i % 10 for i in range(32)]
    assert tickets[64:96].tolist() == [0, *range(31)]
    assert total[0] == 17
    assert (tickets[96], tickets[97], cas[0]) == (7, 70, 70)


@pytest.mark.parametrize("generic", [False, True])
def test_subnormals_of_float_atomics(generic: bool) -> None:
    """Global memory flushes operands and results, as measured on an H100; shared memory keeps them."""
    tiny = np.array([1e-45, 1e-39, -1e-39, 1.1754942e-38, 0, -0.0, 2e-38, -1.2e-38], np.float32)
    other = np.repeat(np.array([1e-45, -1e-39, 1.1754944e-38, -0.0, 1.0, 0, 1e-40, -2e-38], np.float32), 8)
    tiny = np.resize(tiny, 64)

    def flush(x: Array) -> Array:
        return np.where(np.abs(x) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), x), x)

    add = "atomicAdd(p, v);" if generic else 'asm volatile("red.SPACE.add.f32 [%0], %1;" :: "l"(a), "f"(v) : "memory");'
    source = f"""extern "C" __global__ void k(float* out, float* kept, const float* in) {{
        __shared__ float s[64];
        int i = threadIdx.x;
        float v = in[i], *p = out + i;
        u64 a = __cvta_generic_to_global(p);
        {add.replace("SPACE", "global")}
        s[i] = kept[i];
        p = s + i;
        a = __cvta_generic_to_shared(p);
        {add.replace("SPACE", "shared")}
        kept[i] = s[i];
    }}"""
    out, kept = tiny.copy(), tiny.copy()
    run_cuda(source, out, kept, other, block=64)
    expected = flush(flush(tiny) + flush(other))
    assert (expected.view(np.uint32) != (tiny + other).view(np.uint32)).sum() == 40
    np.testing.assert_array_equal(out.view(np.uint32), expected.view(np.uint32))
    np.testing.assert_array_equal(kept.view(np.uint32), (tiny + other).view(np.uint32))


def test_packed_atomics() -> None:
    source = """extern "C" __global__ void k(u32* out) {
        asm volatile("red.global.add.noftz.f16x2 [%0], %1;" :: "l"(out), "r"(0x3c004000) : "memory");
        asm volatile("red.global.add.noftz.bf16x2 [%0], %1;" :: "l"(out + 1), "r"(0x3f804000) : "memory");
    }"""
    out = np.zeros(2, np.uint32)
    run_cuda(source, out, arch="compute_90")
    assert out[:1].view(np.float16).tolist() == [64, 32]
    assert out[1] == 0x42004280  # 32 and 64


def test_atomics_of_many_threads() -> None:
    source = 'extern "C" __global__ void k(u64* out) { atomicAdd(out, (u64)blockIdx.x); atomicAdd((u32*)(out + 1), 1u); }'
    out = np.zeros(2, np.uint64)
    run_cuda(source, out, grid=500, block=64, options=Options(threads=4))
    assert out.tolist() == [64 * 500 * 499 // 2, 500 * 64]


def test_eight_byte_offsets() -> None:
    """Addresses and offsets have 64 bits."""
    ptx = """.version 8.0
.target sm_80
.address_size 64
.visible .entry k(.param .u64 a, .param .u64 all) { .reg .b64 %p; .reg .b32 %x;
ld.param.u64 %p, [a]; add.u64 %p, %p, 0x700000000; mov.b32 %x, 5; sub.u64 %p, %p, 0x700000000;
st.global.b32 [%p+-0x4], %x; ret; }"""
    data = np.zeros(4, np.uint32)
    run_ptx(ptx, data[1:], data, block=1)
    assert data.tolist() == [5, 0, 0, 0]
