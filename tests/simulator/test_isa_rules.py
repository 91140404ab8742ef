"""What the PTX ISA demands but NVIDIA's own kernels leave out: reported under a name of its own, and silent when the option says so."""

from __future__ import annotations

import dataclasses

import ml_dtypes
import numpy as np
import pytest
from hopper import FUNCTIONS, wgmma_functions
from mbarriers import SCHEDULES, launch, report
from simulated import run_cuda

from cuflash.errors import OptionError, SimulatorError
from cuflash.simulator import Options

BF16 = np.dtype(ml_dtypes.bfloat16)

KERNEL = (
    wgmma_functions(64)
    + FUNCTIONS
    + """
__device__ __forceinline__ void copy_async(u32 tile, const uint4* from) {
    for (u32 i = threadIdx.x; i < 512; i += 128) {
        u32 address = tile + ((i * 16) ^ ((i >> 3 & 7) << 4));
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" :: "r"(address), "l"(from + i) : "memory");
    }
    asm volatile("cp.async.wait_all;" ::: "memory");
}
// Every warp the 16 rows that are its own in a product.
__device__ __forceinline__ void fill_own_rows(u32 tile, const uint4* from) {
    for (u32 i = threadIdx.x / 32 * 128 + threadIdx.x % 32; i < threadIdx.x / 32 * 128 + 128; i += 32) {
        u32 address = tile + ((i * 16) ^ ((i >> 3 & 7) << 4));
        asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};"
            :: "r"(address), "r"(from[i].x), "r"(from[i].y), "r"(from[i].z), "r"(from[i].w) : "memory");
    }
}
__device__ __forceinline__ void barrier() { asm volatile("bar.sync 1, 128;" ::: "memory"); }
extern "C" __global__ void __launch_bounds__(128) k(const uint4* in, float* out) {
    extern __shared__ __align__(1024) char memory[];
    u32 base = (u32)__cvta_generic_to_shared(memory);
    fill(base + 8192, in + 512);
    proxy_fence();
    __syncthreads();
    BEFORE
    float d[32];
    wgmma_fence();
    for (int i = 0; i < 4; ++i) wgmma_ss(d, descriptor(base) + 2 * i, descriptor(base + 8192) + 2 * i, i != 0);
    wgmma_commit();
    wgmma_wait<0>();
    keep(d);
    AFTER
    int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4;
    for (int i = 0; i < 32; ++i) out[(row + i / 2 % 2 * 8) * 64 + i / 4 * 8 + threadIdx.x % 4 * 2 + i % 2] = d[i];
}"""
)
# How A comes to shared memory, and what happens to it after the product.
COPIED = "copy_async(base, in); FENCE __syncthreads();"
STORED = "fill(base, in); FENCE __syncthreads();"
OWN_ROWS = "fill_own_rows(base, in); proxy_fence(); WAIT"


def run(before: str, after: str, options: Options) -> None:
    """Launches the kernel and compares its product."""
    a, b = np.random.default_rng(0).integers(-3, 4, (2, 64, 64)).astype(BF16)
    out = np.zeros((64, 64), np.float32)
    operands = np.ascontiguousarray(np.stack([a, b]))
    source = KERNEL.replace("BEFORE", before).replace("AFTER", after)
    run_cuda(source, operands, out, arch="compute_90a", block=128, shared=16384, options=options)
    np.testing.assert_array_equal(out, a.astype(np.float32) @ b.astype(np.float32).T)


def failure(before: str, after: str, options: Options) -> str:
    with pytest.raises(SimulatorError) as caught:
        run(before, after, options)
    return str(caught.value)


def allowed(options: Options) -> Options:
    return dataclasses.replace(options, isa_rules=False)


@pytest.mark.parametrize("options", SCHEDULES)
def test_a_fence_between_cp_async_and_wgmma(options: Options) -> None:
    run(COPIED.replace("FENCE", "proxy_fence();"), "", options)
    text = failure(COPIED.replace("FENCE", ""), "", options)
    assert text.startswith("[isa-rules] A of wgmma")
    assert "an earlier write by cp.async of warp 0" in text
    assert "the PTX ISA demands a fence.proxy.async between cp.async and wgmma; kernels of NVIDIA's leave that out" in text
    assert "Options(isa_rules=False) allows it" in text
    run(COPIED.replace("FENCE", ""), "", allowed(options))
    assert failure(STORED.replace("FENCE", ""), "", allowed(options)).startswith("[proxy-fence]")  # a store needs it everywhere


@pytest.mark.parametrize("options", SCHEDULES)
def test_a_fence_between_the_initialisation_of_an_mbarrier_and_a_copy(options: Options) -> None:
    body = """__shared__ u64 m; __shared__ __align__(16) int row[32];
if (t == 0) {
    init(&m, 1);
    FENCE
    arrive_expect(&m, 128);
    load(row, a, 128, &m);
}
__syncthreads();
wait(&m, 0);
b[t] = row[t];"""
    source, out = np.arange(32, dtype=np.int32), np.zeros(32, np.int32)
    for fence in ("fence_init();", "fence_async();"):
        launch(body.replace("FENCE", fence), source, out, options=options)
    text = report(body.replace("FENCE", ""), source, out, options=options)
    assert text.startswith("[isa-rules] mbarrier of a copy")
    assert "the PTX ISA demands a fence.mbarrier_init or fence.proxy.async between mbarrier.init and a copy that completes on it" in text
    assert "Options(isa_rules=False) allows it" in text
    out[:] = 0
    launch(body.replace("FENCE", ""), source, out, options=allowed(options))
    assert (out == source).all()


@pytest.mark.parametrize("options", SCHEDULES)
def test_rows_of_a_that_another_warp_wrote(options: Options) -> None:
    """Each warp writes its own 16 rows of A: those of the others must be there too."""
    run(OWN_ROWS.replace("WAIT", "barrier();"), "", options)
    unordered = OWN_ROWS.replace("WAIT", "__syncwarp();")
    text = failure(unordered, "", options)
    if not text.startswith("[uninitialized]"):  # the other warp has not even written yet
        assert text.startswith("[isa-rules] A of wgmma")
        assert "the PTX ISA demands a barrier here, because it does not promise that a warp reads only its own 16 rows of A" in text
    run(unordered, "", allowed(options))
    assert failure(OWN_ROWS.replace("WAIT", ""), "", allowed(options)).startswith("[race]")  # lanes of the warp itself


@pytest.mark.parametrize("options", SCHEDULES)
def test_rows_of_a_that_another_warp_may_still_read(options: Options) -> None:
    """As a kernel does that puts its output where the query was."""
    before = STORED.replace("FENCE", "proxy_fence();")
    run(before, "barrier(); fill_own_rows(base, in + 512);", options)
    text = failure(before, "fill_own_rows(base, in + 512);", options)
    assert text.startswith("[isa-rules] 16-byte store")
    assert "an earlier read by wgmma of warp" in text
    assert "the PTX ISA demands a wgmma.wait_group by that warp and then a barrier" in text
    run(before, "fill_own_rows(base, in + 512);", allowed(options))
    unwaited = (
        KERNEL.replace("wgmma_wait<0>();", "fill_own_rows(base, in + 512); wgmma_wait<0>();").replace("BEFORE", before).replace("AFTER", "")
    )
    operands, out = np.zeros((2, 64, 64), BF16), np.zeros((64, 64), np.float32)
    with pytest.raises(SimulatorError, match=r"^\[race\] 16-byte store"):  # its own product
        run_cuda(unwaited, operands, out, arch="compute_90a", block=128, shared=16384, options=allowed(options))


def test_one_wait_is_enough_for_tma() -> None:
    """One thread hands A back to TMA for all four warps, as CUTLASS does: test_hopper_pipeline.py runs such a kernel with all checks."""
    import test_hopper_pipeline as pipeline

    from cuflash.simulator import Module

    assert "if (t % 128 == 0) arrive(empty + s);" in pipeline.SOURCE
    assert pipeline.run(Module(pipeline.ptx()), Options(threads=1))


def test_the_option_is_a_bool() -> None:
    with pytest.raises(OptionError, match="isa_rules"):
        Options(isa_rules="no")  # type: ignore[arg-type]
