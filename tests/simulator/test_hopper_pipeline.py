"""A small matrix product as Hopper kernels are written: one thread fetches tiles by TMA into a ring of two slots, two warpgroups multiply them with
wgmma, and the results leave by TMA. Right and silent under all schedules; and no synchronising instruction can be left out unnoticed.
"""

from __future__ import annotations

import functools
from collections import Counter

import ml_dtypes
import numpy as np
import pytest
from hopper import FUNCTIONS, wgmma_functions
from mbarriers import HEADER
from simulated import PRELUDE, Array, compile_cuda

from cuflash.errors import SimulatorError
from cuflash.simulator import Module, Options
from cuflash.simulator.mutation import Mutant, mutants
from cuflash.simulator.tensor_map import encode_tiled

ROWS, COLUMNS, DEPTH = 128, 64, 256
SHARED = 2 * 24576 + 2 * 16384

SOURCE = (
    HEADER
    + FUNCTIONS
    + wgmma_functions(64)
    + """
template <int COUNT> __device__ void reduce_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" :: "n"(COUNT)); }
template <int COUNT> __device__ void increase_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" :: "n"(COUNT)); }
__device__ void load_tile(u32 to, const Map& map, int column, u64* full) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, 0}], [%3];"
        :: "r"(to), "l"(&map), "r"(column), "r"(address(full)) : "memory");
}
extern "C" __global__ void __launch_bounds__(384, 1)
k(const __grid_constant__ Map a_map, const __grid_constant__ Map b_map, const __grid_constant__ Map c_map) {
    extern __shared__ __align__(1024) char tiles[];
    __shared__ u64 full[2], empty[2];
    int t = threadIdx.x;
    if (t == 0) {
        for (int s = 0; s < 2; ++s) init(full + s, 1), init(empty + s, 2);
        fence_init();
    }
    __syncthreads();
    if (t < 128) {
        reduce_registers<40>();
        if (t == 0) {
            #pragma unroll 1  // so that every instruction is needed in some round
            for (int i = 0; i < 4; ++i) {
                int s = i % 2;
                wait(empty + s, i / 2 % 2 ^ 1);
                arrive_expect(full + s, 24576);
                load_tile(address(tiles) + s * 24576, a_map, i * 64, full + s);
                load_tile(address(tiles) + s * 24576 + 16384, b_map, i * 64, full + s);
            }
        }
    } else {
        increase_registers<232>();
        int group = t / 128 - 1, warp = t / 32 % 4, lane = t % 32;
        float d[32] = {};
        keep(d);
        #pragma unroll 1
        for (int i = 0; i < 4; ++i) {
            int s = i % 2;
            u64 a = descriptor(address(tiles) + s * 24576 + group * 8192), b = descriptor(address(tiles) + s * 24576 + 16384);
            wait(full + s, i / 2 % 2);
            wgmma_fence();
            for (int step = 0; step < 4; ++step) wgmma_ss(d, a + 2 * step, b + 2 * step, 1);
            wgmma_commit();
            wgmma_wait<0>();
            keep(d);
            if (t % 128 == 0) arrive(empty + s);
        }
        char* mine = tiles + 2 * 24576 + group * 16384;
        for (int i = 0; i < 32; i += 2) {
            int row = 16 * warp + lane / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + lane % 4 * 2;
            *(float2*)(mine + row * 256 + column * 4) = float2{d[i], d[i + 1]};
        }
        fence_async();
        asm volatile("bar.sync %0, 128;" :: "r"(group + 1) : "memory");
        if (t % 128 == 0) {
            asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {0, %1}], [%2];"
                :: "l"(&c_map), "r"(group * 64), "r"(address(mine)) : "memory");
            commit();
            wait_read<0>();
        }
    }
}
"""
)

SCHEDULES = [Options(1, "late"), *(Options(1, "random", seed) for seed in range(20)), Options(1, "early")]


@functools.cache
def ptx() -> str:
    return compile_cuda(SOURCE, "compute_90a")


@functools.cache
def operands() -> tuple[Array, Array, Array]:
    """A, B and A Bᵀ: small integers, so that every order of sums gives the same."""
    rng = np.random.default_rng(0)
    a, b = (rng.integers(-4, 5, (n, DEPTH)).astype(ml_dtypes.bfloat16) for n in (ROWS, COLUMNS))
    return a, b, a.astype(np.float32) @ b.astype(np.float32).T


def run(module: Module, options: Options) -> bool:
    """Whether the result is right."""
    a, b, want = operands()
    out = np.full((ROWS, COLUMNS), np.nan, np.float32)
    maps = b"".join(
        encode_tiled(x.ctypes.data, dtype, (x.shape[1], x.shape[0]), (x.strides[0],), box, swizzle=swizzle)
        for x, dtype, box, swizzle in (
            (a, "bfloat16", (64, ROWS), "128B"),
            (b, "bfloat16", (64, COLUMNS), "128B"),
            (out, "float32", (64, 64), "none"),
        )
    )
    buffers = [(x.ctypes.data, x.nbytes, name) for x, name in ((a, "a"), (b, "b"), (out, "out"))]
    module.launch((1, 1, 1), (384, 1, 1), SHARED, maps, buffers, options)
    return bool((out == want).all())


@pytest.mark.parametrize("options", SCHEDULES, ids=lambda options: f"{options.schedule}{options.seed}")
def test_right_and_silent(options: Options) -> None:
    assert run(Module(ptx()), options)


def caught_by(mutant: Mutant) -> str:
    """The check that stops a mutant, "result" when it computes something else, "" when it survives."""
    module = Module(mutant.ptx, sources={"test.cu": PRELUDE + SOURCE})
    for options in (*SCHEDULES[:6], SCHEDULES[-1]):
        try:
            if not run(module, options):
                return "result"
        except SimulatorError as error:
            return error.check or str(error)
    return ""


def test_no_synchronisation_can_be_left_out() -> None:
    caught: Counter[str] = Counter()
    survivors = []
    for mutant in mutants(ptx()):
        check = caught_by(mutant)
        caught[check] += 1
        if not check:
            survivors.append(f"{mutant.instruction} {mutant.change} at line {mutant.source[-1][1] if mutant.source else '?'}")
    assert survivors == []
    assert {"race", "deadlock", "mbarrier", "wgmma-fence", "proxy-fence", "open-copy"} <= set(caught)
