"""One injected bug per check: the report names the check, the place in the launch, the line of source and how lanes got there."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from simulated import compile_cuda, pack, run_cuda, run_ptx

import cuflash
from cuflash.errors import OptionError, SimulatorError
from cuflash.simulator import Module, Options


def report(source: str, *arguments: Any, **launch: Any) -> str:
    """The message of the check that stops this kernel."""
    with pytest.raises(SimulatorError) as caught:
        run_cuda(source, *arguments, **launch)
    return str(caught.value)


def test_load_past_the_end() -> None:
    source = """extern "C" __global__ void k(const float* in, float* out) {
        int i = blockIdx.x * 64 + threadIdx.x;
        float x = in[i + 8];  // the bug
        out[i] = x;
    }"""
    text = report(source, np.zeros(128, np.float32), np.zeros(128, np.float32), grid=2, block=64)
    assert "[global-bounds] 4-byte load" in text
    assert "starts at the end of 'array 0' (512 bytes" in text
    assert "kernel k, block (1, 0, 0), warp 1, lanes 24-31" in text
    assert "ld.global.f32" in text
    assert "test.cu:3: float x = in[i + 8];  // the bug" in text


def test_store_before_the_beginning() -> None:
    source = """extern "C" __global__ void k(float* out) {
        out[(int)threadIdx.x - 2] = 1;
    }"""
    memory = np.zeros(64, np.float32)
    text = report(source, memory[16:48])
    assert "4-byte store" in text
    assert "starts 8 bytes before the beginning of 'array 0'" in text
    assert "lanes 0-1" in text
    assert (memory == 0).all()


def test_vector_that_straddles_the_end() -> None:
    source = 'struct __align__(16) Four { float x[4]; }; extern "C" __global__ void k(Four* out) { out[threadIdx.x] = Four{}; }'
    memory = np.zeros(64, np.float32)
    start = -memory.ctypes.data // 4 % 4
    text = report(source, memory[start : start + 22], block=8)
    assert "16-byte store" in text
    assert "ends 8 bytes past the end of 'array 0'" in text


def test_null_pointer() -> None:
    text = report('extern "C" __global__ void k(float* p) { p[threadIdx.x] = 1; }', ("Q", 0))
    assert "[global-bounds]" in text
    assert "(lane 0), the launch has no buffers" in text


def test_shared_bounds() -> None:
    source = """extern "C" __global__ void k(float* out) {
        extern __shared__ float s[];
        s[threadIdx.x] = threadIdx.x;
        __syncthreads();
        out[threadIdx.x] = s[threadIdx.x + 4];
    }"""
    text = report(source, np.zeros(32, np.float32), shared=128)
    assert "[shared-bounds] 4-byte load at offset 128 (lane 28) of 128 bytes of shared memory ends 4 bytes past its end" in text
    assert "lanes 28-31" in text
    assert "test.cu:5" in text


def test_shared_null_pointer() -> None:
    source = 'extern "C" __global__ void k(float* out) { asm volatile("st.shared.f32 [%0], %1;" :: "r"(threadIdx.x * 4), "f"(1.f)); }'
    text = report(source, np.zeros(1, np.float32), shared=128)
    assert "[shared-bounds] 4-byte store at 0x0 (lane 0) is below shared memory" in text


def test_ldmatrix_bounds() -> None:
    source = """extern "C" __global__ void k(u32* out) {
        extern __shared__ __align__(16) u32 s[];
        u32 r;
        asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(r) : "r"((u32)__cvta_generic_to_shared(s) + threadIdx.x * 16));
        out[threadIdx.x] = r;
    }"""
    text = report(source, np.zeros(32, np.uint32), shared=120)
    assert "[shared-bounds] row of ldmatrix at offset 112 (lane 7)" in text
    text = report(source.replace("* 16", "* 8"), np.zeros(32, np.uint32), shared=1024)
    assert "[misaligned] row of ldmatrix" in text


def test_local_bounds() -> None:
    source = """extern "C" __global__ void k(int* out, int n) {
        int a[8];
        for (int i = 0; i < 8; ++i) a[i] = out[i];
        for (int i = 0; i < 8; ++i) out[i] = a[(i * n) % 16];
    }"""
    assert "[local-bounds] 4-byte load" in report(source, np.zeros(8, np.int32), 3, block=1)


def test_misaligned() -> None:
    source = 'extern "C" __global__ void k(const char* p, int* out) { out[threadIdx.x] = *(const int*)(p + threadIdx.x * 5); }'
    text = report(source, np.zeros(256, np.int8), np.zeros(32, np.int32))
    assert "[misaligned] 4-byte load" in text
    assert "(lane 1) needs an alignment of 4 bytes" in text


ADDRESS_OF_DYNAMIC_MEMORY = """extern "C" __global__ void k(int* out) {
    STATIC
    extern __shared__ __align__(16) char s[];
    out[0] = (u32)__cvta_generic_to_shared(s);
}"""


def address_of_dynamic_memory(static: str, **options: Any) -> int:
    out = np.zeros(1, np.int32)
    module = Module(compile_cuda(ADDRESS_OF_DYNAMIC_MEMORY.replace("STATIC", static)), **options)
    module.launch((1, 1, 1), (1, 1, 1), 64, pack([out]), [(out.ctypes.data, 4, "out")])
    return int(out[0])


STATIC = "__shared__ int fixed[9]; fixed[0] = 1; out[0] = *(volatile int*)fixed;"  # 36 bytes


def test_dynamic_shared_memory_starts_where_it_does_on_a_gpu() -> None:
    assert address_of_dynamic_memory("") == 1024
    assert address_of_dynamic_memory(STATIC) == 1024 + 48


@pytest.mark.parametrize("static", ["", STATIC])
def test_dynamic_shared_memory_that_is_no_better_aligned_than_declared(static: str) -> None:
    assert address_of_dynamic_memory(static, aligned_as_declared=True) % 32 == 16


def test_our_kernels_get_no_better_alignment_than_they_declare() -> None:
    """What calls of the library run on the simulator counts on nothing that it does not declare."""
    from cuflash.runtime.launch import executable

    plan = cuflash.plan(*(np.zeros((1, 64, 1, 64), np.float16) for _ in range(3)))
    module = executable(plan.kernels[0], plan.device)._module  # type: ignore[attr-defined]
    declared = max(v.align for v in module.kernel.variables.values() if v.space == "shared" and not v.nbytes)
    assert declared == 128
    assert module.program.dynamic_shared_begin % (2 * declared) == declared


def test_copy_bounds() -> None:
    source = """
    __device__ void copy(void* s, const void* g) {
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" :: "r"((u32)__cvta_generic_to_shared(s)), "l"(g) : "memory");
    }
    extern "C" __global__ void k(const char* in) {
        extern __shared__ __align__(16) char s[];
        copy(s + threadIdx.x * 16, in + threadIdx.x * 16);
        asm volatile("cp.async.wait_all;");
    }"""
    data = np.zeros(1024, np.uint8)
    start = -data.ctypes.data % 16
    text = report(source, data[start : start + 496], shared=512)
    assert "source of cp.async" in text
    assert "starts at the end of 'array 0'" in text
    assert "at " in text
    assert "test.cu:3: asm volatile" in text
    assert "test.cu:7: copy(s + threadIdx.x * 16" in text  # the call that was inlined
    assert "inlined at" in text
    text = report(source, data[start : start + 512], shared=496)
    assert "[shared-bounds] destination of cp.async at offset 496 (lane 31)" in text


def test_deadlock_of_named_barriers() -> None:
    source = """extern "C" __global__ void k(int* out) {
        if (threadIdx.x < 32) asm volatile("bar.sync 1, 64;");
        else asm volatile("bar.sync 2, 64;");
        out[threadIdx.x] = 1;
    }"""
    text = report(source, np.zeros(64, np.int32), block=64)
    assert "[deadlock] nobody can go on; barrier 1 has 32 of 64 threads; barrier 2 has 32 of 64 threads" in text
    assert "warp 0 (all lanes):" in text
    assert "test.cu:2" in text
    assert "warp 1 (all lanes):" in text
    assert "test.cu:3" in text


def test_exit_while_others_wait() -> None:
    source = """extern "C" __global__ void k(int* out) {
        if (threadIdx.x >= 64) return;
        __syncthreads();
        out[threadIdx.x] = 1;
    }"""
    text = report(source, np.zeros(128, np.int32), block=128)
    assert "[deadlock]" in text
    assert "barrier 0 has 64 of 128 threads; warps that have exited: 2, 3" in text
    assert "test.cu:3" in text


def test_barrier_in_divergent_code() -> None:
    source = """extern "C" __global__ void k(int* out) {
        if (threadIdx.x % 2) asm volatile("bar.sync 0;");
        else asm volatile("bar.sync 1;");
        out[threadIdx.x] = 1;
    }"""
    text = report(source, np.zeros(34, np.int32))
    assert "[partial-warp]" in text
    assert "wait here for the other lanes of their warp" in text
    assert "test.cu:2" in text
    assert "test.cu:3" in text


def test_shuffle_with_absent_lanes() -> None:
    source = """extern "C" __global__ void k(int* out) {
        if (threadIdx.x < 16) out[threadIdx.x] = __shfl_xor_sync(0xffffffff, out[threadIdx.x], 1);
        else if (out[0] == 5) out[threadIdx.x] = 0;
    }"""
    text = report(source, np.zeros(32, np.int32))
    assert "[partial-warp] lanes 0x0000ffff take part, lanes 0xffff0000 must too but have exited" in text
    assert "lanes 0-15" in text
    assert "test.cu:2" in text


def test_shuffle_by_a_lane_that_is_not_named() -> None:
    source = 'extern "C" __global__ void k(int* out) { out[threadIdx.x] = __shfl_xor_sync(0x7fffffff, out[threadIdx.x], 1); }'
    assert "lane 31 executes it but is not in its member mask 0x7fffffff" in report(source, np.zeros(32, np.int32))


def test_mma_in_divergent_code() -> None:
    source = """extern "C" __global__ void k(float* out) {
        float c[4] = {0, 0, 0, 0};
        if (threadIdx.x < out[0])
            asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%4,%4,%4}, {%4,%4}, {%0,%1,%2,%3};"
                : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(0));
        out[threadIdx.x] = c[0];
    }"""
    out = np.full(32, 20, np.float32)
    text = report(source, out)
    assert "[partial-warp]" in text
    assert "mma.sync.aligned.m16n8k16" in text
    assert "test.cu:5" in text
    run_cuda(source, np.full(32, 40, np.float32))


def test_block_that_is_not_whole_warps() -> None:
    source = """extern "C" __global__ void k(u32* out) {
        extern __shared__ __align__(16) u32 s[];
        u32 r;
        asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(r) : "r"((u32)__cvta_generic_to_shared(s)));
        out[threadIdx.x] = r;
    }"""
    text = report(source, np.zeros(32, np.uint32), block=20, shared=128)
    assert "[partial-warp]" in text
    assert "do not exist (the block's size is not a multiple of 32)" in text


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ('asm volatile("bar.sync %0, 32;" :: "r"(n));', "barrier 16: there are only barriers 0 to 15"),
        ('asm volatile("bar.sync 1, %0;" :: "r"(n + 17));', "a count of 33 threads is not a positive multiple of 32"),
        ('if (threadIdx.x < 32) asm volatile("bar.sync 1, 64;"); else asm volatile("bar.sync 1, 96;");', "expects 96 threads here"),
    ],
)
def test_barrier_misuse(body: str, message: str) -> None:
    text = report(f'extern "C" __global__ void k(int n) {{ {body} }}', 16, block=96)
    assert "[barrier]" in text
    assert message in text


def test_trap_and_assert() -> None:
    source = """extern "C" __global__ void k(int n) {
        if (threadIdx.x == n) __trap();
    }"""
    text = report(source, 7)
    assert "[trap] the kernel executed a trap" in text
    assert "lane 7\n" in text
    assert "test.cu:2" in text
    ptx = """.version 8.0
.target sm_80
.address_size 64
.extern .func __assertfail (.param .b64 p0, .param .b64 p1) ;
.visible .entry k() { .reg .b64 %d; mov.u64 %d, 0;
{ .reg .b32 temp_param_reg; .param .b64 param0; st.param.b64 [param0+0], %d; .param .b64 param1; st.param.b64 [param1+0], %d;
call.uni __assertfail, (param0, param1); } ret; }"""
    with pytest.raises(SimulatorError, match=r"\[assert\] a device-side assertion failed"):
        run_ptx(ptx)


def test_uninitialized_shared_memory() -> None:
    source = """extern "C" __global__ void k(float* out) {
        __shared__ float s[33];
        s[threadIdx.x] = 1;
        __syncthreads();
        out[threadIdx.x] = s[threadIdx.x + 1];
    }"""
    text = report(source, np.zeros(32, np.float32))
    assert "[uninitialized] 4-byte load reads byte 128 of shared memory (lane 31), which nobody has written" in text
    assert "test.cu:5" in text


def test_uninitialized_local_memory() -> None:
    source = """extern "C" __global__ void k(int* out, int n) {
        int a[8];
        for (int i = 0; i < n; ++i) a[i] = out[i];
        for (int i = 0; i < 8; ++i) out[i] = a[(i * n) % 8];
    }"""
    text = report(source, np.zeros(8, np.int32), 7, block=1)
    assert "[uninitialized] 4-byte load at offset 28 of local memory (lane 0)" in text


def test_uninitialized_memory_is_nan_without_checks() -> None:
    source = """extern "C" __global__ void k(float* out, u32* words) {
        __shared__ float s[32];
        float unset;
        asm volatile("{.reg .f32 never; mov.f32 %0, never;}" : "=f"(unset));
        out[threadIdx.x] = s[threadIdx.x] + 1;
        out[32 + threadIdx.x] = unset;
        words[threadIdx.x] = ((volatile u32*)s)[threadIdx.x];
    }"""
    for grid in (1, 3):
        out, words = np.zeros(64, np.float32), np.zeros(32, np.uint32)
        run_cuda(source, out, words, grid=grid, options=Options(threads=1, checks=False))
        assert np.isnan(out).all()
        assert (words == 0xFFFFFFFF).all()


def test_unknown_instruction() -> None:
    source = """extern "C" __global__ void k(int* out) {
        int r;
        asm volatile("dp4a.s32.s32 %0, %1, %1, %1;" : "=r"(r) : "r"(out[0]));
        out[0] = r;
    }"""
    with pytest.raises(SimulatorError) as caught:
        Module(compile_cuda(source), sources={"test.cu": source})
    text = str(caught.value)
    assert "does not support this instruction in kernel k" in text
    assert "dp4a.s32.s32" in text
    assert "test.cu:3" in text


@pytest.mark.parametrize("instruction", ["tcgen05.wait::ld.sync.aligned;", "add.q32 r, r, r;", "mov.u32 r, %nosuch;", "add.u32 r, r;"])
def test_unsupported_forms(instruction: str) -> None:
    ptx = f".version 8.0\n.target sm_80\n.address_size 64\n.visible .entry k() {{ .reg .u32 r; {instruction} ret; }}"
    with pytest.raises(SimulatorError, match="does not support"):
        Module(ptx)


def test_the_first_failing_block_is_reported() -> None:
    source = 'extern "C" __global__ void k(int* out) { if (blockIdx.x >= 5) out[-1000] = 1; }'
    for _ in range(5):
        assert "block (5, 0, 0)" in report(source, np.zeros(1, np.int32), grid=100, options=Options(threads=4))


def test_checks_can_be_switched_off() -> None:
    source = 'extern "C" __global__ void k(int* out) { out[threadIdx.x + 32] = threadIdx.x; }'
    memory = np.zeros(64, np.int32)
    run_ptx(compile_cuda(source), memory[:32], options=Options(threads=1, checks=False))
    assert memory[32:].tolist() == list(range(32))


def test_launch_arguments_are_checked() -> None:
    module = Module(compile_cuda('extern "C" __global__ void k(int* out) { out[0] = 1; }'))
    with pytest.raises(SimulatorError, match="8 bytes of parameters, got 4"):
        module.launch((1, 1, 1), (32, 1, 1), 0, bytes(4), [])
    with pytest.raises(SimulatorError, match="8 bytes of parameters, got 12"):
        module.launch((1, 1, 1), (32, 1, 1), 0, bytes(12), [])
    with pytest.raises(SimulatorError, match="not possible"):
        module.launch((1, 1, 1), (2048, 1, 1), 0, bytes(8), [])


def test_modules_for_newer_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """As little as the driver of the GPU that the variable names would load them; without the variable, the module says what is simulated."""
    source = 'extern "C" __global__ void k() {}'
    modules = {arch: compile_cuda(source, arch=arch) for arch in ("compute_80", "compute_90", "compute_90a")}
    monkeypatch.delenv("CUFLASH_SIMULATOR_ARCH", raising=False)
    for ptx in modules.values():
        Module(ptx)
    monkeypatch.setenv("CUFLASH_SIMULATOR_ARCH", "sm_80")
    Module(modules["compute_80"])
    for arch in ("90", "90a"):
        with pytest.raises(SimulatorError, match=rf"PTX for sm_{arch} does not run on sm_80, which CUFLASH_SIMULATOR_ARCH names"):
            Module(modules[f"compute_{arch}"])
    monkeypatch.setenv("CUFLASH_SIMULATOR_ARCH", "sm_90")
    for ptx in modules.values():
        Module(ptx)


def test_entry_points() -> None:
    source = 'extern "C" __global__ void first(int* p) { *p = 1; } extern "C" __global__ void second(int* p) { *p = 2; }'
    ptx = compile_cuda(source)
    out = np.zeros(1, np.int32)
    buffers = [(out.ctypes.data, 4, "out")]
    module = Module(ptx.encode() + b"\0", "second")
    module.launch((1, 1, 1), (1, 1, 1), 0, out.ctypes.data.to_bytes(8, "little"), buffers)
    assert out[0] == 2
    with pytest.raises(SimulatorError, match="it has: "):
        Module(ptx)
    with pytest.raises(SimulatorError, match="named third"):
        Module(ptx, "third")


@pytest.mark.parametrize("shared", [-1, -4096, 300_000, 2**31 - 1, 2**32, 1.5])
def test_impossible_amounts_of_shared_memory(shared: Any) -> None:
    with pytest.raises(SimulatorError, match=r"shared_bytes: got .*; expected an int from 0 to 233472"):
        run_cuda('extern "C" __global__ void k(int* out) { out[threadIdx.x] = 1; }', np.zeros(32, np.int32), shared=shared)


@pytest.mark.parametrize("grid", [(2, 2), (1.0, 1, 1), "abc"])
def test_extents_that_are_not_three_ints(grid: Any) -> None:
    with pytest.raises(SimulatorError, match=r"grid: got .*; expected three ints"):
        run_cuda('extern "C" __global__ void k(int* out) { out[threadIdx.x] = 1; }', np.zeros(32, np.int32), grid=grid)


@pytest.mark.parametrize(
    "fields",
    [{"seed": 1.5}, {"seed": -1}, {"checks": "no"}, {"threads": "4"}, {"max_instructions": 1e9}, {"profile": True}, {"threads": True}],
)
def test_options_of_a_wrong_type(fields: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=next(iter(fields))):
        Options(**fields)
