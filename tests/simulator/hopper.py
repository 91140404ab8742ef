"""CUDA C++ for tests of warpgroup kernels: wgmma and its fences as functions, operands of 64 bf16 columns in 128-byte swizzle."""

from __future__ import annotations


def _asm_list(first: int, count: int) -> str:
    return "{" + ",".join(f"%{i}" for i in range(first, first + count)) + "}"


def wgmma_functions(n: int, b_transposed: int = 0, suffix: str = "") -> str:
    """`wgmma_ss` and `wgmma_rs` for m64nNk16 of bf16 into f32, under the names with `suffix`."""
    count = n // 2
    outputs = ", ".join(f'"+f"(d[{i}])' for i in range(count))
    shape = f"wgmma.mma_async.sync.aligned.m64n{n}k16.f32.bf16.bf16"
    return f"""
__device__ __forceinline__ void wgmma_ss{suffix}(float (&d)[{count}], u64 a, u64 b, int scale_d) {{
    asm volatile("{{.reg .pred p; setp.ne.b32 p, %{count + 2}, 0; {shape} {_asm_list(0, count)}, %{count}, %{count + 1}, p, 1, 1, 0, {b_transposed};}}"
        : {outputs} : "l"(a), "l"(b), "r"(scale_d));
}}
__device__ __forceinline__ void wgmma_rs{suffix}(float (&d)[{count}], const u32 (&a)[4], u64 b, int scale_d) {{
    asm volatile("{{.reg .pred p; setp.ne.b32 p, %{count + 5}, 0; {shape} {_asm_list(0, count)}, {_asm_list(count, 4)}, %{count + 4}, p, 1, 1, {b_transposed};}}"
        : {outputs} : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(scale_d));
}}"""


FUNCTIONS = """
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N> __device__ __forceinline__ void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(N) : "memory"); }
__device__ __forceinline__ void proxy_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// The compiler computes these registers before this place and uses them after it.
template <int N> __device__ __forceinline__ void keep(float (&r)[N]) { for (int i = 0; i < N; ++i) asm volatile("" : "+f"(r[i]) :: "memory"); }
template <int N> __device__ __forceinline__ void keep(u32 (&r)[N]) { for (int i = 0; i < N; ++i) asm volatile("" : "+r"(r[i]) :: "memory"); }
// K-major, or with the rows as k: 128-byte swizzle, 8 rows are 1024 bytes.
__device__ __forceinline__ u64 descriptor(u32 address) { return u64(address >> 4) | u64(64) << 32 | u64(1) << 62; }
// 64 rows of 64 bf16, by 128 threads.
__device__ __forceinline__ void fill(u32 tile, const uint4* from) {
    for (u32 i = threadIdx.x % 128; i < 512; i += 128) {
        u32 address = tile + ((i * 16) ^ ((i >> 3 & 7) << 4));
        asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};"
            :: "r"(address), "r"(from[i].x), "r"(from[i].y), "r"(from[i].z), "r"(from[i].w) : "memory");
    }
}
"""
