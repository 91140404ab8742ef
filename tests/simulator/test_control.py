"""Divergence, loops, scopes of inline assembly, barriers, and warps that wait for each other."""

from __future__ import annotations

import numpy as np
import pytest
from simulated import run_cuda, run_ptx

from cuflash.simulator import Options

SCHEDULES = [Options(threads=1), Options(threads=1, schedule="random", seed=1), Options(threads=1, schedule="random", seed=2)]


def test_nested_branches() -> None:
    source = """extern "C" __global__ void k(int* out) {
        int i = threadIdx.x, r = 0;
        if (i & 1) { if (i & 2) r = i * 3; else { r = i; if (i > 16) r += 100; } }
        else if (i % 3 == 0) { for (int j = 0; j < i; ++j) r += j * j % 7; }
        else r = -i;
        r += __popc(__ballot_sync(~0u, r > 10));
        out[i] = r;
    }"""
    out = np.zeros(32, np.int32)
    run_cuda(source, out)
    r = [(i * 3 if i & 2 else i + 100 * (i > 16)) if i & 1 else sum(j * j % 7 for j in range(i)) if i % 3 == 0 else -i for i in range(32)]
    np.testing.assert_array_equal(out, np.array(r) + sum(x > 10 for x in r))


@pytest.mark.parametrize("options", SCHEDULES)
def test_collatz(options: Options) -> None:
    """Every lane leaves the loop at another time, with break and continue inside."""
    source = """extern "C" __global__ void k(const int* in, int* out) {
        int i = blockIdx.x * blockDim.x + threadIdx.x, n = in[i], steps = 0;
        while (true) {
            if (n == 1) break;
            ++steps;
            if (n & 1) { n = 3 * n + 1; continue; }
            n /= 2;
            if (steps > 500) return;
        }
        out[i] = steps;
    }"""
    values = np.random.default_rng(0).integers(1, 5000, 256).astype(np.int32)
    out = np.zeros(256, np.int32)
    run_cuda(source, values, out, grid=2, block=128, options=options)

    def steps(n: int) -> int:
        count = 0
        while n != 1:
            n, count = (3 * n + 1 if n & 1 else n // 2), count + 1
        return count

    assert out.tolist() == [steps(int(n)) for n in values]


def test_switch() -> None:
    source = """extern "C" __global__ void k(int* out) {
        int i = threadIdx.x, r;
        switch (i % 11) {
            case 0: r = 5; break; case 1: r = i * i; break; case 2: r = i - 7; break; case 3: r = ~i; break; case 4: r = i << 3; break;
            case 5: r = 1000 / (i + 1); break; case 6: r = i ^ 85; break; case 7: r = -i; break; default: r = 77;
        }
        out[i] = r;
    }"""
    out = np.zeros(32, np.int32)
    run_cuda(source, out)
    cases = [
        lambda i: 5,
        lambda i: i * i,
        lambda i: i - 7,
        lambda i: ~i,
        lambda i: i << 3,
        lambda i: 1000 // (i + 1),
        lambda i: i ^ 85,
        lambda i: -i,
    ]
    assert out.tolist() == [cases[i % 11](i) if i % 11 < 8 else 77 for i in range(32)]


def test_indexed_branch() -> None:
    ptx = """.version 8.0
.target sm_80
.address_size 64
.visible .entry k(.param .u64 out) { .reg .b32 %i, %c, %r; .reg .b64 %p, %o;
mov.u32 %i, %tid.x; rem.u32 %c, %i, 3;
list: .branchtargets first, second, third;
brx.idx %c, list;
first: mov.u32 %r, 10; bra.uni done;
second: mov.u32 %r, 20; bra done;
third: mov.u32 %r, 30;
done: ld.param.u64 %p, [out]; mul.wide.u32 %o, %i, 4; add.u64 %p, %p, %o; st.global.u32 [%p], %r; ret; }"""
    out = np.zeros(32, np.uint32)
    run_ptx(ptx, out)
    assert out.tolist() == [10 * (i % 3 + 1) for i in range(32)]


def test_scopes_redeclare_registers_and_labels() -> None:
    source = """extern "C" __global__ void k(u32* out) {
        u32 r = threadIdx.x, s = 0;
        for (int i = 0; i < 3; ++i)
            asm volatile("{ .reg .u32 t<2>; .reg .pred p; add.u32 t0, %0, 1; mul.lo.u32 t1, t0, 2; setp.gt.u32 p, t1, 20; @p bra SKIP;"
                         "{ .reg .u32 t0; mov.u32 t0, 5; add.u32 t1, t1, t0; } SKIP: mov.u32 %0, t1; }" : "+r"(r));
        asm volatile("{ .reg .u32 t<2>; add.u32 t0, %1, 1; mov.u32 %0, t0; }" : "=r"(s) : "r"(r));
        out[threadIdx.x] = s;
    }"""
    out = np.zeros(32, np.uint32)
    run_cuda(source, out)

    def step(r: int) -> int:
        t = (r + 1) * 2
        return t if t > 20 else t + 5

    assert out.tolist() == [step(step(step(i))) + 1 for i in range(32)]


@pytest.mark.parametrize("threads", [1, 31, 33, 100, 256])
@pytest.mark.parametrize("options", SCHEDULES)
def test_blocks_of_any_size(threads: int, options: Options) -> None:
    source = """extern "C" __global__ void k(const int* in, int* out) {
        __shared__ int sum[256];
        sum[threadIdx.x] = in[threadIdx.x];
        for (int step = 1; step < blockDim.x; step *= 2) {
            __syncthreads();
            int add = threadIdx.x >= step ? sum[threadIdx.x - step] : 0;
            __syncthreads();
            sum[threadIdx.x] += add;
        }
        out[threadIdx.x] = sum[threadIdx.x];
    }"""
    values = np.random.default_rng(0).integers(0, 100, threads).astype(np.int32)
    out = np.zeros(threads, np.int32)
    run_cuda(source, values, out, block=threads, options=options)
    np.testing.assert_array_equal(out, np.cumsum(values))


@pytest.mark.parametrize("options", SCHEDULES)
def test_named_barriers(options: Options) -> None:
    """Producer warps fill a buffer that consumer warps empty; full and empty are named barriers of 64 + 64 threads."""
    source = """extern "C" __global__ void k(int* out, int count) {
        __shared__ int buffer[64];
        if (threadIdx.x < 64) {
            for (int i = 0; i < count; ++i) {
                if (i > 0) asm volatile("bar.sync 2, 128;" ::: "memory");
                buffer[threadIdx.x] = i * 1000 + threadIdx.x;
                asm volatile("bar.arrive 1, 128;" ::: "memory");
            }
        } else {
            for (int i = 0; i < count; ++i) {
                asm volatile("bar.sync 1, 128;" ::: "memory");
                out[i * 64 + threadIdx.x - 64] = buffer[127 - threadIdx.x];
                if (i + 1 < count) asm volatile("bar.arrive 2, 128;" ::: "memory");
            }
        }
    }"""
    out = np.zeros((20, 64), np.int32)
    counters = run_cuda(source, out, 20, block=128, options=options)
    np.testing.assert_array_equal(out, np.arange(20)[:, None] * 1000 + np.arange(63, -1, -1))
    assert counters.barriers == 39


def test_barrier_reductions() -> None:
    source = """extern "C" __global__ void k(int* out) {
        int odd = threadIdx.x & 1;
        out[threadIdx.x] = __syncthreads_count(odd) * 100 + __syncthreads_and(threadIdx.x < 96) * 10 + __syncthreads_or(threadIdx.x == 95);
    }"""
    out = np.zeros(96, np.int32)
    run_cuda(source, out, block=96)
    assert (out == 48 * 100 + 10 + 1).all()


def test_waiting_for_another_warp_through_memory() -> None:
    source = """extern "C" __global__ void k(int* out) {
        __shared__ volatile int flag;
        if (threadIdx.x == 0) flag = 0;
        __syncthreads();
        if (threadIdx.x / 32 == 0) { while (flag == 0); out[threadIdx.x] = flag; }
        else if (threadIdx.x == 63) { __threadfence_block(); flag = 7; }
    }"""
    out = np.zeros(32, np.int32)
    run_cuda(source, out, block=64)
    assert (out == 7).all()


def test_waiting_for_an_earlier_block() -> None:
    source = """extern "C" __global__ void k(volatile u32* turn, u32* out) {
        if (threadIdx.x == 0) {
            while (*turn != blockIdx.x);
            out[blockIdx.x] = *turn * 10;
            __threadfence();
            *turn = blockIdx.x + 1;
        }
    }"""
    turn, out = np.zeros(1, np.uint32), np.zeros(50, np.uint32)
    run_cuda(source, turn, out, grid=50, options=Options(threads=4))
    np.testing.assert_array_equal(out, np.arange(50) * 10)


def test_blocks_start_in_order_or_at_random() -> None:
    source = 'extern "C" __global__ void k(u32* next, u32* out) { out[atomicAdd(next, 1)] = blockIdx.x; }'

    def order(options: Options) -> list[int]:
        out = np.zeros(50, np.uint32)
        run_cuda(source, np.zeros(1, np.uint32), out, grid=50, block=1, options=options)
        return [int(block) for block in out]

    assert order(Options(threads=1)) == list(range(50))
    orders = [order(Options(threads=1, schedule="random", seed=seed)) for seed in range(5)]
    assert all(sorted(blocks) == list(range(50)) for blocks in orders)
    assert len({tuple(blocks) for blocks in orders}) == 5
    assert order(Options(threads=1, schedule="random", seed=3)) == orders[3]


def test_rare_path_at_the_end_of_the_code() -> None:
    """Lanes on a path that the compiler placed behind the rest come back to a shuffle that the others wait at."""
    ptx = """.version 8.0
.target sm_80
.address_size 64
.visible .entry k(.param .u64 out) { .reg .b32 %i, %r, %s; .reg .b64 %p, %o; .reg .pred %q;
mov.u32 %i, %tid.x; mov.u32 %r, %i; setp.gt.u32 %q, %i, 20; @%q bra rare;
back: shfl.sync.bfly.b32 %s, %r, 31, 31, -1; bar.sync 0;
ld.param.u64 %p, [out]; mul.wide.u32 %o, %i, 4; add.u64 %p, %p, %o; st.global.u32 [%p], %s; ret;
rare: mul.lo.u32 %r, %r, 100; bra back; }"""
    out = np.zeros(32, np.uint32)
    run_ptx(ptx, out)
    assert out.tolist() == [(31 - i) * (100 if 31 - i > 20 else 1) for i in range(32)]


def test_early_exit_of_some_lanes() -> None:
    source = """extern "C" __global__ void k(int* out, int n) {
        if (threadIdx.x >= n) return;
        __syncthreads();
        out[threadIdx.x] = threadIdx.x;
    }"""
    out = np.full(64, -1, np.int32)
    run_cuda(source, out, 40, block=64)
    assert out.tolist() == [*range(40), *[-1] * 24]


def test_printf_prints_nothing() -> None:
    source = """extern "C" { __device__ int printf(const char*, ...); }
    extern "C" __global__ void k(int* out) { printf("%d", out[0]); out[threadIdx.x] = 3; }"""
    out = np.zeros(32, np.int32)
    run_cuda(source, out)
    assert (out == 3).all()


def test_threads_do_not_change_results() -> None:
    source = """extern "C" __global__ void k(const float* in, float* out) {
        __shared__ float s[64];
        int i = blockIdx.x * 64 + threadIdx.x;
        s[threadIdx.x] = in[i];
        __syncthreads();
        float r = 0;
        for (int j = 0; j < 64; ++j) r = r * 0.9f + s[(threadIdx.x + j) % 64];
        out[i] = r;
    }"""
    values = np.random.default_rng(0).standard_normal(64 * 37).astype(np.float32)
    results = []
    for options in (Options(threads=1), Options(threads=4), Options(threads=3, schedule="random", seed=5)):
        out = np.zeros_like(values)
        counters = run_cuda(source, values, out, grid=37, block=64, options=options)
        assert counters.ctas == 37
        results.append((out.tobytes(), counters.warp_instructions))
    assert results[0] == results[1] == results[2]


def test_programmatic_launches_do_nothing() -> None:
    source = """extern "C" __global__ void k(int* out) {
        asm volatile("griddepcontrol.wait;" ::: "memory");
        out[threadIdx.x] = threadIdx.x;
        asm volatile("griddepcontrol.launch_dependents;");
    }"""
    out = np.zeros(32, np.int32)
    run_cuda(source, out, arch="compute_90")
    assert out.tolist() == list(range(32))
