"""Kernels that use wgmma as they should are silent and right; one injected bug per check is reported at its line, under every schedule."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hopper import FUNCTIONS, wgmma_functions
from simulated import Array, run_cuda, run_ptx

from cuflash.errors import SimulatorError
from cuflash.simulator import Module, Options
from cuflash.simulator.options import SCHEDULES

BF16 = np.dtype(ml_dtypes.bfloat16)

ATTENTION = (
    wgmma_functions(64)
    + wgmma_functions(64, 1, "_v")
    + FUNCTIONS
    + """
__device__ __forceinline__ float ex2(float x) { float y; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
__device__ __forceinline__ u32 pack(float lo, float hi) { u32 r; asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo)); return r; }
__device__ __forceinline__ void softmax(float (&s)[32], u32 (&p)[16], float (&m)[2], float (&l)[2], float (&alpha)[2]) {
    for (int h = 0; h < 2; ++h) {
        float x = m[h];
        for (int j = 0; j < 16; ++j) x = fmaxf(x, s[j / 2 * 4 + h * 2 + j % 2]);
        x = fmaxf(x, __shfl_xor_sync(~0u, x, 1)); x = fmaxf(x, __shfl_xor_sync(~0u, x, 2));
        alpha[h] = ex2(m[h] - x); m[h] = x; l[h] *= alpha[h];
        for (int j = 0; j < 16; ++j) { float& e = s[j / 2 * 4 + h * 2 + j % 2]; e = ex2(e - x); l[h] += e; }
    }
    for (int i = 0; i < 16; ++i) p[i] = pack(s[2 * i], s[2 * i + 1]);
}
extern "C" __global__ void __launch_bounds__(128) k(const uint4* q, const uint4* key, const uint4* value, float* out, int tiles) {
    extern __shared__ __align__(1024) char memory[];
    u32 base = (u32)__cvta_generic_to_shared(memory);
    fill(base, q);
    for (int t = 0; t < tiles; ++t) fill(base + 8192 * (1 + t), key + 512 * t), fill(base + 8192 * (1 + tiles + t), value + 512 * t);
    proxy_fence(); __syncthreads();
    u64 dq = descriptor(base), dk = descriptor(base + 8192), dv = descriptor(base + 8192 * (1 + tiles));
    float o[32], m[2] = {-1e30f, -1e30f}, l[2] = {0, 0}, alpha[2];
    u32 p[16];
    BODY
    for (int h = 0; h < 2; ++h) { l[h] += __shfl_xor_sync(~0u, l[h], 1); l[h] += __shfl_xor_sync(~0u, l[h], 2); }
    int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4;
    for (int i = 0; i < 32; ++i) out[(row + i / 2 % 2 * 8) * 64 + i / 4 * 8 + threadIdx.x % 4 * 2 + i % 2] = o[i] / l[i / 2 % 2];
}"""
)

# Three ways through the tiles: one product after the other; the products with K and V of different tiles at the same time; two accumulators of
# S, taken in turn.
LOOPS = {
    "sequential": """
    for (int t = 0; t < tiles; ++t) {
        float s[32];
        wgmma_fence();
        for (int i = 0; i < 4; ++i) wgmma_ss(s, dq + 2 * i, dk + 512 * t + 2 * i, i != 0);
        wgmma_commit(); wgmma_wait<0>();
        softmax(s, p, m, l, alpha);
        for (int i = 0; i < 32; ++i) o[i] *= alpha[i / 2 % 2];
        keep(o), keep(p);
        wgmma_fence();
        for (int i = 0; i < 4; ++i) wgmma_rs_v(o, (const u32(&)[4])p[4 * i], dv + 512 * t + 128 * i, t != 0 || i != 0);
        wgmma_commit(); wgmma_wait<0>();
    }
""",
    "overlapped": """
    float s[32];
    wgmma_fence();
    for (int i = 0; i < 4; ++i) wgmma_ss(s, dq + 2 * i, dk + 2 * i, i != 0);
    wgmma_commit(); wgmma_wait<0>();
    softmax(s, p, m, l, alpha);
    for (int i = 0; i < 32; ++i) o[i] = 0;
    for (int t = 1; t < tiles; ++t) {
        float next[32];
        keep(o), keep(p);
        wgmma_fence();
        for (int i = 0; i < 4; ++i) wgmma_ss(next, dq + 2 * i, dk + 512 * t + 2 * i, i != 0);
        wgmma_commit();
        for (int i = 0; i < 4; ++i) wgmma_rs_v(o, (const u32(&)[4])p[4 * i], dv + 512 * (t - 1) + 128 * i, 1);
        wgmma_commit();
        wgmma_wait<1>();
        u32 p_next[16];
        softmax(next, p_next, m, l, alpha);
        wgmma_wait<0>(); keep(o); keep(p);
        for (int i = 0; i < 16; ++i) p[i] = p_next[i];
        for (int i = 0; i < 32; ++i) o[i] *= alpha[i / 2 % 2];
    }
    keep(o), keep(p);
    wgmma_fence();
    for (int i = 0; i < 4; ++i) wgmma_rs_v(o, (const u32(&)[4])p[4 * i], dv + 512 * (tiles - 1) + 128 * i, 1);
    wgmma_commit(); wgmma_wait<0>();
""",
    "two accumulators": """
    // Two accumulators, taken in turn.
    float s[2][32];
    for (int i = 0; i < 32; ++i) o[i] = 0;
    keep(o);
    wgmma_fence();
    for (int i = 0; i < 4; ++i) wgmma_ss(s[0], dq + 2 * i, dk + 2 * i, i != 0);
    wgmma_commit();
    for (int t = 0; t < tiles; t += 2) {
#pragma unroll
      for (int u = 0; u < 2; ++u) {
        if (t + u >= tiles) break;
        keep(s[1 - u]);
        wgmma_fence();
        if (t + u + 1 < tiles) for (int i = 0; i < 4; ++i) wgmma_ss(s[1 - u], dq + 2 * i, dk + 512 * (t + u + 1) + 2 * i, i != 0);
        wgmma_commit();
        wgmma_wait<1>(); keep(s[u]);
        softmax(s[u], p, m, l, alpha);
        for (int i = 0; i < 32; ++i) o[i] *= alpha[i / 2 % 2];
        keep(o), keep(p);
        wgmma_fence();
        for (int i = 0; i < 4; ++i) wgmma_rs_v(o, (const u32(&)[4])p[4 * i], dv + 512 * (t + u) + 128 * i, 1);
        wgmma_commit();
        wgmma_wait<0>(); keep(o); keep(p);
      }
    }
""",
}


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_attention(loop: str, schedule: str) -> None:
    tiles = 5
    rng = np.random.default_rng(0)
    query, key, value = (rng.standard_normal((rows, 64)).astype(BF16) for rows in (64, 64 * tiles, 64 * tiles))
    out = np.zeros((64, 64), np.float32)
    options = Options(threads=1, schedule=schedule, seed=3)
    source = ATTENTION.replace("BODY", LOOPS[loop])
    run_cuda(source, query, key, value, out, tiles, arch="compute_90a", block=128, shared=8192 * (1 + 2 * tiles) + 1024, options=options)
    scores = query.astype(np.float64) @ key.astype(np.float64).T
    weights = np.exp2(scores - scores.max(1, keepdims=True))
    expected = weights @ value.astype(np.float64) / weights.sum(1, keepdims=True)
    np.testing.assert_allclose(out, expected, atol=2.0**-8 * np.abs(value.astype(np.float64)).max())  # P is rounded to bfloat16


KERNEL = (
    wgmma_functions(64)
    + FUNCTIONS
    + """
extern "C" __global__ void __launch_bounds__(256) k(const uint4* in, float* out, int flag) {
    extern __shared__ __align__(1024) char memory[];
    u32 base = (u32)__cvta_generic_to_shared(memory), warp = threadIdx.x / 32;
    u64 a = descriptor(base), b = descriptor(base + 8192);
    u32 fragment[4];
    for (int i = 0; i < 4; ++i) fragment[i] = in[threadIdx.x].x + i;
    fill(base, in);
    fill(base + 8192, in + 512);
    proxy_fence();
    __syncthreads();
    float d[32];
    for (int i = 0; i < 32; ++i) d[i] = 1;
    keep(d);
    keep(fragment);
    wgmma_fence();
    wgmma_ss(d, a, b, 1);
    wgmma_rs(d, fragment, b, 1);
    wgmma_commit();
    // while it runs
    wgmma_wait<0>();
    keep(fragment);
    keep(d);
    for (int i = 0; i < 32; ++i) out[threadIdx.x * 32 + i] = d[i];
    for (int i = 0; i < 4; ++i) out[threadIdx.x * 4 + i] += __uint_as_float(fragment[i]);
}"""
)

# What is replaced by what, the check, and what the report says.
BUGS: dict[str, tuple[str, str, str, list[str]]] = {
    "no wait": (
        "wgmma_wait<0>();",
        "",
        "wgmma-register",
        ["reads a register of", "of a wgmma that no wgmma.wait_group has waited for", "wgmma.mma_async"],
    ),
    "no commit": ("wgmma_commit();", "", "wgmma-register", ["no wgmma.wait_group has waited for"]),
    "a wait that allows too much": ("wgmma_wait<0>();", "wgmma_wait<1>();", "wgmma-register", ["no wgmma.wait_group has waited for"]),
    "accumulator read": (
        "// while it runs",
        "out[threadIdx.x] = d[5] + 1;  // the bug",
        "wgmma-register",
        ["reads a register of the accumulator D", ": out[threadIdx.x] = d[5] + 1;  // the bug", "test.cu:"],
    ),
    "accumulator written": (
        "// while it runs",
        'asm volatile("mov.f32 %0, 0f00000000;" : "+f"(d[7]));  // the bug',
        "wgmma-register",
        ["writes a register of the accumulator D", "// the bug"],
    ),
    "register of A written": (
        "// while it runs",
        'asm volatile("add.u32 %0, %0, 1;" : "+r"(fragment[2]));  // the bug',
        "wgmma-register",
        ["a register of A of a wgmma", "// the bug"],
    ),
    "no fence": ("wgmma_fence();", "", "wgmma-fence", ["no wgmma.fence comes before the first wgmma"]),
    "accumulator set after the fence": (
        "wgmma_fence();",
        'wgmma_fence(); asm volatile("mov.f32 %0, 0f00000000;" : "=f"(d[9]));  // the bug',
        "wgmma-fence",
        ["a register of its accumulator D was written and no wgmma.fence came after", "// the bug"],
    ),
    "A set after the fence": (
        "wgmma_rs(d,",
        'asm volatile("add.u32 %0, %0, 1;" : "+r"(fragment[2]));  /* the bug */ wgmma_rs(d,',
        "wgmma-fence",
        ["a register of its A was written and no wgmma.fence came after", "/* the bug */"],
    ),
    "no proxy fence": ("proxy_fence();", "", "proxy-fence", ["B of wgmma", "without a fence.proxy.async", "fill(base + 8192, in + 512);"]),
    "no barrier": (
        "__syncthreads();",
        "__syncthreads(); fill(base, in); proxy_fence(); __syncwarp();",
        "race",
        ["wgmma", "fill(base, in); proxy_fence()"],
    ),
    "a buffer that is overwritten too soon": (
        "// while it runs",
        "__syncthreads(); fill(base, in);  // the bug",
        "race",
        ["16-byte store", "an earlier read by wgmma of warpgroup 0", "nothing waited for its completion", "// the bug"],
    ),
    "nothing waits": (
        "wgmma_wait<0>();",
        "return;",
        "open-wgmma",
        ["nothing waited for a wgmma that they issued", "wgmma.mma_async", "PTX: ret"],
    ),
    "a warp that leaves": ("wgmma_fence();", "if (warp == 2) return; wgmma_fence();", "partial-warp", ["all four"]),
    "a warp that waits elsewhere": (
        "wgmma_fence();",
        'if (warp == 2) asm volatile("bar.sync 3, 64;"); wgmma_fence();',
        "deadlock",
        ["a wgmma waits for warps 2 of its warpgroup", "bar.sync 3, 64"],
    ),
    "half a warp": ("wgmma_ss(d, a", "if (threadIdx.x % 32 < 16) wgmma_ss(d, a", "partial-warp", ["wgmma.mma_async"]),
    "descriptors of warps": ("wgmma_ss(d, a,", "wgmma_ss(d, a + (warp == 3 ? 2 : 0),", "wgmma", ["the descriptors of A differ"]),
    "descriptors of lanes": (
        "wgmma_ss(d, a, b,",
        "wgmma_ss(d, a, b + threadIdx.x % 2,",
        "wgmma",
        ["the descriptor of B differs between lanes"],
    ),
    "scale-d of warps": ("b, 1);\n    wgmma_rs", "b, warp != 1);\n    wgmma_rs", "wgmma", ["scale-d differs"]),
    "scale-d of lanes": ("b, 1);\n    wgmma_rs", "b, threadIdx.x % 32);\n    wgmma_rs", "wgmma", ["scale-d differs between lanes"]),
    "past shared memory": (
        "wgmma_ss(d, a, b,",
        "wgmma_ss(d, a, b + 512,",
        "shared-bounds",
        ["B of wgmma at offset"],
    ),
    "what nobody has written": ("fill(base + 8192, in + 512);", "", "uninitialized", ["B of wgmma reads byte"]),
}


def run_kernel(source: str, schedule: str, block: int = 128, flag: int = 0) -> Array:
    rng = np.random.default_rng(0)
    operands = rng.standard_normal((2, 64, 64)).astype(BF16)
    out = np.zeros((block, 32), np.float32)
    options = Options(threads=1, schedule=schedule, seed=5)
    run_cuda(source, operands, out, flag, arch="compute_90a", block=block, shared=16384, options=options)
    return out


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_kernel_without_a_bug(schedule: str) -> None:
    assert np.isfinite(run_kernel(KERNEL, schedule)).all()


@pytest.mark.parametrize("bug", BUGS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_bug(bug: str, schedule: str) -> None:
    good, bad, name, texts = BUGS[bug]
    assert KERNEL.count(good) == 1
    with pytest.raises(SimulatorError) as caught:
        run_kernel(KERNEL.replace(good, bad), schedule)
    report = str(caught.value)
    assert report.startswith(f"[{name}]"), report
    for text in texts:
        assert text in report


# One warpgroup fills two slots with tiles of B in turn, another multiplies them; named barriers 1 and 2 say that a slot is full, 3 and 4 that
# it is empty. The wait for one product is delayed until the next has been issued.
PIPELINE = (
    wgmma_functions(64)
    + FUNCTIONS
    + """
__device__ __forceinline__ void sync(int barrier) { asm volatile("bar.sync %0, 256;" :: "r"(barrier) : "memory"); }
__device__ __forceinline__ void arrive(int barrier) { asm volatile("bar.arrive %0, 256;" :: "r"(barrier) : "memory"); }
extern "C" __global__ void __launch_bounds__(256) k(const uint4* a, const uint4* b, float* out, int tiles) {
    extern __shared__ __align__(1024) char memory[];
    u32 base = (u32)__cvta_generic_to_shared(memory), slots = base + 8192;
    if (threadIdx.x < 128) {
        fill(base, a);
        for (int t = 0; t < tiles; ++t) {
            if (t >= 2) sync(3 + t % 2);
            fill(slots + t % 2 * 8192, b + t * 512);
            proxy_fence();
            arrive(1 + t % 2);
        }
        return;
    }
    float d[32];
    for (int t = 0; t < tiles; ++t) {
        sync(1 + t % 2);
        wgmma_fence();
        for (int i = 0; i < 4; ++i) wgmma_ss(d, descriptor(base) + 2 * i, descriptor(slots + t % 2 * 8192) + 2 * i, t != 0 || i != 0);
        wgmma_commit();
        wgmma_wait<1>();
        if (t > 0 && t + 1 < tiles) arrive(3 + (t - 1) % 2);
    }
    wgmma_wait<0>();
    keep(d);
    int thread = threadIdx.x - 128, row = thread / 32 * 16 + thread % 32 / 4;
    for (int i = 0; i < 32; ++i) out[(row + i / 2 % 2 * 8) * 64 + i / 4 * 8 + thread % 4 * 2 + i % 2] = d[i];
}"""
)


def run_pipeline(source: str, schedule: str, seed: int = 0) -> None:
    tiles = 6
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((64, 64)).astype(BF16), rng.standard_normal((tiles, 64, 64)).astype(BF16)
    out = np.zeros((64, 64), np.float32)
    options = Options(threads=1, schedule=schedule, seed=seed)
    run_cuda(source, a, b, out, tiles, arch="compute_90a", block=256, shared=3 * 8192, options=options)
    expected = sum(a.astype(np.float64) @ tile.astype(np.float64).T for tile in b)
    np.testing.assert_allclose(out, expected, atol=1e-3)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_pipeline(schedule: str) -> None:
    for seed in range(4 if schedule == "random" else 1):
        run_pipeline(PIPELINE, schedule, seed)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_one_warp_may_wait_for_its_warpgroup(schedule: str) -> None:
    """A group is the warpgroup's: when one warp has waited for it, all four have read their operands."""
    source = PIPELINE.replace('"bar.sync %0, 256;"', '"bar.sync %0, %1;"').replace('"bar.arrive %0, 256;"', '"bar.arrive %0, %1;"')
    source = source.replace(':: "r"(barrier)', ':: "r"(barrier), "r"(barrier < 3 ? 256 : 160)').replace(
        "if (t > 0", "if (threadIdx.x < 160 && t > 0"
    )
    run_pipeline(source, schedule)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    ("good", "bad"),
    [
        (
            "if (t > 0 && t + 1 < tiles) arrive(3 + (t - 1) % 2);",
            "if (t + 2 < tiles) arrive(3 + t % 2);",
            "nothing waited for its completion",
        ),
        ("wgmma_wait<1>();", ""),
    ],
)
def test_slots_that_are_given_back_too_soon(good: str, bad: str, schedule: str) -> None:
    assert PIPELINE.count(good) == 1
    with pytest.raises(SimulatorError) as caught:
        run_pipeline(PIPELINE.replace(good, bad), schedule)
    report = str(caught.value)
    assert report.startswith("[race] 16-byte store"), report
    assert "by wgmma of warpgroup 1: nothing waited for its completion" in report
    assert "fill(slots + t % 2 * 8192, b + t * 512);" in report


def test_a_block_without_whole_warpgroups() -> None:
    with pytest.raises(SimulatorError, match=r"\[partial-warp\] warps 4 to 7 must execute it together, but the block has only 192 threads"):
        run_kernel(KERNEL.replace("fill(base", "if (threadIdx.x < 128) fill(base"), "late", block=192)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_bugs_in_code_that_is_not_executed_are_not_reported(schedule: str) -> None:
    source = KERNEL.replace("// while it runs", "if (flag) out[threadIdx.x] = d[5] + 1;")
    assert np.isfinite(run_kernel(source, schedule)).all()
    with pytest.raises(SimulatorError, match="wgmma-register"):
        run_kernel(source, schedule, flag=1)


def test_without_checks_a_marked_instruction_does_what_it_says() -> None:
    source = KERNEL.replace("// while it runs", "out[threadIdx.x * 32 + 31] = d[31] + 1;")
    operands, out = np.zeros((2, 64, 64), BF16), np.zeros((128, 32), np.float32)
    run_cuda(source, operands, out, 0, arch="compute_90a", block=128, shared=16384, options=Options(threads=1, checks=False))
    np.testing.assert_array_equal(out[:, 4:], np.ones((128, 28), np.float32))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_registers_in_flight_keep_their_place(schedule: str) -> None:
    """Values computed between a wgmma and its wait live in other registers than its A and D, even if nobody needs these again."""
    count = 12
    ptx = f""".version 8.0
.target sm_90a
.address_size 64
.extern .shared .align 1024 .b8 memory[];
.visible .entry k(.param .u64 p_d, .param .u64 p_t)
{{ .reg .f32 %d<4>, %e<4>; .reg .b32 %a<4>, %t<{count}>, %s, %i; .reg .b64 %g, %o, %db; .reg .pred %p;
mov.u32 %i, %tid.x; shl.b32 %s, %i, 4; mov.u32 %a0, memory; add.u32 %s, %s, %a0; mov.b32 %a1, 0x3c003c00;
st.shared.v4.b32 [%s], {{%a1, %a1, %a1, %a1}}; fence.proxy.async; bar.sync 0;
mov.u32 %s, memory; shr.u32 %s, %s, 4; cvt.u64.u32 %db, %s; or.b64 %db, %db, {8 << 16};
mov.b32 %a0, 0x40004000; mov.b32 %a1, %a0; mov.b32 %a2, %a0; mov.b32 %a3, %a0; setp.ne.u32 %p, 0, 0;
mul.wide.u32 %o, %i, 4;
wgmma.fence.sync.aligned;
wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {{%d0, %d1, %d2, %d3}}, {{%a0, %a1, %a2, %a3}}, %db, %p, 1, 1, 0;
wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {{%e0, %e1, %e2, %e3}}, {{%a0, %a1, %a2, %a3}}, %db, %p, 1, 1, 0;
wgmma.commit_group.sync.aligned;
ld.param.u64 %g, [p_t]; add.u64 %g, %g, %o;
{"".join(f"add.u32 %t{i}, %i, {i};" for i in range(count))}
{"".join(f"st.global.b32 [%g+{512 * i}], %t{i};" for i in range(count // 2))}
wgmma.wait_group.sync.aligned 0;
{"".join(f"st.global.b32 [%g+{512 * i}], %t{i};" for i in range(count // 2, count))}
ld.param.u64 %g, [p_d]; add.u64 %g, %g, %o;
{"".join(f"st.global.f32 [%g+{512 * i}], %d{i};" for i in range(4))}
ret; }}"""
    d, t = np.zeros((4, 128), np.float32), np.zeros((count, 128), np.uint32)
    run_ptx(ptx, d, t, block=128, shared=2048, options=Options(threads=1, schedule=schedule))
    np.testing.assert_array_equal(d, np.full((4, 128), 32, np.float32))  # 16 times 2 times 1
    np.testing.assert_array_equal(t, np.arange(count)[:, None] + np.arange(128)[None, :])


@pytest.mark.parametrize(
    "instruction",
    [
        "wgmma.mma_async.sync.aligned.m64n8k32.s32.s8.s8 {%a0, %a1, %a2, %a3}, %d, %d, %p;",
        "wgmma.mma_async.sync.aligned.m64n8k32.s32.u8.s8 {%a0, %a1, %a2, %a3}, %d, %d, %p;",
        "wgmma.mma_async.sp.sync.aligned.m64n8k32.f32.f16.f16 {%a0, %a1, %a2, %a3}, %d, %d, %a0, 0, %p, 1, 1, 0, 0;",
        "wgmma.mma_async.sync.aligned.m64n12k16.f32.f16.f16 {%a0, %a1, %a2, %a3}, %d, %d, %p, 1, 1, 0, 0;",
        "wgmma.mma_async.sync.aligned.m64n16k16.f32.f16.f16 {%a0, %a1, %a2, %a3}, %d, %d, %p, 1, 1, 0, 0;",
        "wgmma.mma_async.sync.aligned.m64n8k8.f32.tf32.tf32 {%a0, %a1, %a2, %a3}, %d, %d, %p, 1, 1, 0, 0;",
    ],
)
def test_unsupported_forms(instruction: str) -> None:
    ptx = f".version 8.0\n.target sm_90a\n.address_size 64\n.visible .entry k() {{ .reg .b32 %a<4>; .reg .b64 %d; .reg .pred %p; {instruction} ret; }}"
    with pytest.raises(SimulatorError, match="does not support") as caught:
        Module(ptx)
    assert instruction.split()[0] in str(caught.value)
