"""Clusters: special registers, distributed shared memory, the cluster's barrier."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from simulated import Array, compile_cuda, pack

from cuflash.errors import SimulatorError
from cuflash.simulator import Module, Options

SCHEDULES = [Options(threads=2, schedule=schedule, seed=1) for schedule in ("early", "late", "random")]

HELPERS = """
__device__ u32 rank() { u32 r; asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(r)); return r; }
__device__ u32 address(void* p) { return (u32)__cvta_generic_to_shared(p); }
__device__ u32 there(u32 a, u32 rank) { u32 d; asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(rank)); return d; }
__device__ int load(u32 a) { int v; asm volatile("ld.shared::cluster.s32 %0, [%1];" : "=r"(v) : "r"(a) : "memory"); return v; }
__device__ void arrive() { asm volatile("barrier.cluster.arrive.aligned;" ::: "memory"); }
__device__ void wait() { asm volatile("barrier.cluster.wait.aligned;" ::: "memory"); }
"""


def run(
    body: str, *arguments: Array, grid: tuple[int, int, int] = (4, 1, 1), cluster: Any = (2, 1, 1), block: int = 64, **launch: Any
) -> None:
    """Launch `k` on arrays, in clusters."""
    source = HELPERS.replace("\n", " ") + body
    module = Module(compile_cuda(source, "compute_90"), sources={"test.cu": source})
    buffers = [(a.ctypes.data, a.nbytes, f"array {i}") for i, a in enumerate(arguments)]
    options = launch.get("options") or Options(threads=2)
    module.launch(grid, (block, 1, 1), 0, pack(arguments), buffers, options, cluster=cluster)


def test_special_registers() -> None:
    body = """extern "C" __global__ void k(u32* out) {
        u32 v[9];
        asm volatile("mov.u32 %0, %%clusterid.x; mov.u32 %1, %%clusterid.y; mov.u32 %2, %%nclusterid.x;" : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]));
        asm volatile("mov.u32 %0, %%cluster_ctaid.x; mov.u32 %1, %%cluster_ctaid.y;" : "=r"(v[3]), "=r"(v[4]));
        asm volatile("mov.u32 %0, %%cluster_nctaid.x; mov.u32 %1, %%cluster_nctaid.y;" : "=r"(v[5]), "=r"(v[6]));
        asm volatile("mov.u32 %0, %%cluster_ctarank; mov.u32 %1, %%cluster_nctarank;" : "=r"(v[7]), "=r"(v[8]));
        for (int i = 0; i < 9; ++i) out[(blockIdx.y * gridDim.x + blockIdx.x) * 9 + i] = v[i];
    }"""
    out = np.zeros((4, 6, 9), np.uint32)
    run(body, out, grid=(6, 4, 1), cluster=(3, 2, 1), block=1)
    for y in range(4):
        for x in range(6):
            assert out[y, x].tolist() == [x // 3, y // 2, 2, x % 3, y % 2, 3, 2, y % 2 * 3 + x % 3, 6]


EXCHANGE = """extern "C" __global__ void k(int* out) {
    __shared__ int s[64];
    s[threadIdx.x] = blockIdx.x * 100 + threadIdx.x;
    FIRST
    out[blockIdx.x * 64 + threadIdx.x] = load(there(address(s + (threadIdx.x + 5) % 64), rank() ^ 1));
    SECOND
}"""
BARRIER = "arrive(); wait();"


@pytest.mark.parametrize("options", SCHEDULES)
def test_reading_the_other_block(options: Options) -> None:
    out = np.zeros((4, 64), np.int32)
    run(EXCHANGE.replace("FIRST", BARRIER).replace("SECOND", BARRIER), out, options=options)
    for block in range(4):
        np.testing.assert_array_equal(out[block], (block ^ 1) * 100 + (np.arange(64) + 5) % 64)


@pytest.mark.parametrize("options", SCHEDULES)
def test_missing_barriers(options: Options) -> None:
    with pytest.raises(SimulatorError, match=r"\[(race|uninitialized)\]"):
        run(EXCHANGE.replace("FIRST", "").replace("SECOND", BARRIER), np.zeros((4, 64), np.int32), options=options)
    with pytest.raises(SimulatorError, match=r"\[race\] 4-byte load .* an earlier write by warp . of block . of|\[(race|uninitialized)\]"):
        run(EXCHANGE.replace("FIRST", "__syncthreads();").replace("SECOND", BARRIER), np.zeros((4, 64), np.int32), options=options)
    relaxed = 'asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); wait();'
    with pytest.raises(SimulatorError, match=r"\[race\]"):
        run(EXCHANGE.replace("FIRST", relaxed).replace("SECOND", BARRIER), np.zeros((4, 64), np.int32), options=options)


def test_reading_a_block_that_has_exited() -> None:
    body = EXCHANGE.replace("FIRST", BARRIER + ' if (rank() == 0) return; for (int i = 0; i < 20000; ++i) asm volatile("" ::: "memory");')
    with pytest.raises(SimulatorError, match=r"\[cluster\] 4-byte load in the shared memory of block 0 of the cluster, which has exited"):
        run(body.replace("SECOND", ""), np.zeros((4, 64), np.int32))


def test_generic_addresses_of_other_blocks() -> None:
    body = """extern "C" __global__ void k(int* out) {
        __shared__ int s;
        if (threadIdx.x == 0) s = 0;
        arrive(); wait();
        int* other;
        asm volatile("mapa.u64 %0, %1, %2;" : "=l"(other) : "l"(&s), "r"(0));
        if (threadIdx.x == 0) atomicAdd(other, blockIdx.x + 1);
        arrive(); wait();
        u32 owner;
        asm volatile("getctarank.u64 %0, %1;" : "=r"(owner) : "l"(other));
        if (threadIdx.x == 0) out[blockIdx.x] = rank() == 0 ? s : -int(owner);
    }"""
    out = np.zeros(4, np.int32)
    run(body, out, cluster=(4, 1, 1))
    assert out.tolist() == [10, 0, 0, 0]


def test_arriving_twice_and_waiting_without_arriving() -> None:
    with pytest.raises(SimulatorError, match=r"\[barrier\] lanes arrive at the cluster's barrier again"):
        run('extern "C" __global__ void k(int* out) { arrive(); arrive(); }', np.zeros(1, np.int32))
    with pytest.raises(SimulatorError, match=r"\[barrier\] lanes wait at the cluster's barrier without having arrived"):
        run('extern "C" __global__ void k(int* out) { wait(); }', np.zeros(1, np.int32))


def test_deadlock_at_the_barrier() -> None:
    body = 'extern "C" __global__ void k(int* out) { if (blockIdx.x == 0) asm volatile("bar.sync 1, 128;"); arrive(); wait(); }'
    with pytest.raises(
        SimulatorError, match=r"(?s)\[deadlock\] nobody can go on; barrier 1 has 64 of 128 threads in block 0; the cluster's .*64 of 128"
    ):
        run(body, np.zeros(1, np.int32))


def test_exited_threads_are_not_waited_for() -> None:
    run(
        'extern "C" __global__ void k(int* out) { if (blockIdx.x % 2) return; arrive(); wait(); out[blockIdx.x] = 1; }',
        out := np.zeros(4, np.int32),
    )
    assert out.tolist() == [1, 0, 1, 0]


def test_no_such_block() -> None:
    body = 'extern "C" __global__ void k(int* out) { __shared__ int s; out[0] = there(address(&s), 2); }'
    with pytest.raises(SimulatorError, match=r"\[cluster\] block 2 of a cluster of 2 blocks"):
        run(body, np.zeros(1, np.int32))


def test_launch_that_does_not_fit() -> None:
    body = 'extern "C" __global__ void __cluster_dims__(2, 1, 1) k(int* out) { out[blockIdx.x] = rank(); }'
    run(body, out := np.zeros(4, np.int32), cluster=None, block=1)
    assert out.tolist() == [0, 1, 0, 1]
    with pytest.raises(SimulatorError, match=r"declares clusters of \(2, 1, 1\), the launch has \(4, 1, 1\)"):
        run(body, out, cluster=(4, 1, 1))
    with pytest.raises(SimulatorError, match="at most 16 that divide the grid"):
        run(body, out, grid=(3, 1, 1), cluster=None)
