"""The race detector: what orders accesses to shared memory and what does not, lane by lane, whatever the schedule."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from simulated import compile_cuda, run_ptx

from cuflash.errors import SimulatorError
from cuflash.simulator import Options

SCHEDULES = (Options(1, "early"), Options(1, "late"), *(Options(1, "random", seed) for seed in range(4)))

FLAGS = """
__device__ __forceinline__ void set(u32* flag) { asm volatile("st.release.cta.u32 [%0], 1;" :: "l"(flag) : "memory"); }
__device__ __forceinline__ void await(u32* flag) {
    u32 value;
    do asm volatile("ld.acquire.cta.u32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory"); while (value == 0);
}
"""


def checks(body: str, block: int = 64, before: str = "", arch: str = "compute_80") -> set[str]:
    """The checks that stop a kernel with this body, over all schedules; "" for none. `s` is 64 numbers of shared memory, written and ordered."""
    source = f"""{before}
    extern "C" __global__ void k(u32* out, const u32* in) {{
        __shared__ __align__(16) u32 s[256];
        __shared__ u32 flag[4];
        const u32 t = threadIdx.x, lane = t % 32, warp = t / 32;
        for (u32 i = t; i < 256; i += blockDim.x) s[i] = i;
        if (t < 4) flag[t] = 0;
        __syncthreads();
        {body}
    }}"""
    found = set()
    for options in SCHEDULES:
        try:
            run_ptx(compile_cuda(source, arch), np.zeros(256, np.uint32), np.zeros(256, np.uint32), block=block, options=options)
        except SimulatorError as error:
            found.add(error.check or str(error))
        else:
            found.add("")
    return found


QUIET: dict[str, Any] = {
    "a lane and what it wrote itself": "s[t] = 1; out[t] = s[t]; s[t] = 2;",
    "a lane and its own volatile accesses": "((volatile u32*)s)[t] = 1; out[t] = s[t]; s[t] = 2; out[t] += ((volatile u32*)s)[t];",
    "a lane and its own atomics": "atomicAdd(s + t, 1); out[t] = s[t]; s[t] = 2; atomicAdd(s + t, 1);",
    "atomics of many lanes": "out[t] = atomicAdd(s, 1);",
    "volatile accesses of many lanes": "((volatile u32*)s)[lane] = warp; out[t] = ((volatile u32*)s)[t % 7];",
    "reads of many lanes": "out[t] = s[0] + s[lane]; __syncthreads(); s[t] = 1;",
    "bytes next to each other": "((unsigned char*)s)[t] = t; __syncwarp(); if (lane == 0) out[t] = ((unsigned char*)s)[t + 31];",
    "a warp that synchronises": "s[t] = 1; __syncwarp(); out[t] = s[t ^ 1]; __syncwarp(); s[t] = 2;",
    "half a warp that synchronises": "if (lane < 16) { s[t] = 1; __syncwarp(0xffff); out[t] = s[t ^ 1]; }",
    "what one half knows, the other learns": """
        if (lane < 16) { s[t] = 1; __syncwarp(0xffff); }
        __syncwarp();
        out[t] = s[t ^ 17];""",
    "a flag that one lane sets after its own write": "if (t == 0) { s[5] = 1; set(flag); } if (t == 32) { await(flag); out[t] = s[5]; s[5] = 2; }",
    "a flag for a whole warp": """
        if (warp == 0) { s[lane] = 1; __syncwarp(); if (lane == 0) set(flag); }
        else { if (lane == 0) await(flag); __syncwarp(); out[t] = s[lane]; }""",
    "a flag and a flag back": """
        if (t == 0) { s[5] = 1; set(flag); await(flag + 1); s[5] = 3; }
        if (t == 32) { await(flag); out[t] = s[5]; set(flag + 1); }""",
    "a flag behind reads of the same word by a whole warp": """
        if (warp == 0) { out[t] = s[5]; __syncwarp(); if (lane == 0) set(flag); }
        else if (lane == 0) { await(flag); s[5] = 2; }""",
    "reads at different times by the lane that sets the flag": """
        if (t == 0) {
            uint4 x = *(uint4*)s; out[t] = x.y; set(flag + 1);
            uint4 y = *(uint4*)s; out[t] += y.z + s[9]; set(flag + 2);
            out[t] += s[9]; set(flag);
        } else if (t == 32) { await(flag); *(uint4*)s = uint4{}; s[9] = 1; }""",
    "copies, waited for and synchronised before the flag": """
        if (warp == 0) { COPY WAIT __syncwarp(); if (lane == 0) set(flag); }
        else { if (lane == 0) await(flag); __syncwarp(); out[t] = s[lane]; }""",
    "a volatile flag between fences": """
        volatile u32* f = flag;
        if (t == 0) { s[5] = 1; __threadfence_block(); f[0] = 1; }
        if (t == 32) { while (f[0] == 0); __threadfence_block(); out[t] = s[5]; }""",
    "a chain of flags": """
        if (t == 0) { s[5] = 1; set(flag); }
        if (t == 32) { await(flag); set(flag + 1); }
        if (t == 1) { await(flag + 1); out[t] = s[5]; }""",
    "a lock": """
        if (lane == 0) {
            while (atomicCAS(flag, 0, 1));
            __threadfence_block();
            s[5] += t;
            __threadfence_block();
            atomicExch(flag, 0);
        }""",
    "a flag of a block that is no whole warp": "if (t < 8) { s[t] = 1; __syncwarp(0xff); if (t == 0) set(flag); }",
}  # fmt: skip

RACES: dict[str, Any] = {
    "a write that another lane reads": "s[t] = 1; out[t] = s[t ^ 1];",
    "a read before another lane writes": "out[t] = s[t ^ 1]; s[t] = 1;",
    "the same word written by many lanes": "s[0] = t; __syncthreads(); out[t] = s[0];",
    "a volatile write and another lane's ordinary read": "((volatile u32*)s)[t] = 1; out[t] = s[t ^ 1];",
    "an atomic and another lane's ordinary write": "atomicAdd(s + t, 1); s[t ^ 1] = 2;",
    "a shuffle, which orders no memory": "s[t] = 1; u32 x = __shfl_xor_sync(~0u, t, 1); out[t] = s[x];",
    "half a warp that synchronises, and the other half": "s[t] = 1; if (lane < 16) __syncwarp(0xffff); out[t] = s[t ^ 16];",
    "a flag that another lane sets": """
        if (warp == 0) { s[lane] = 1; if (lane == 0) set(flag); }
        else { if (lane == 0) await(flag); __syncwarp(); out[t] = s[lane]; }""",
    "a flag that another lane has seen": """
        if (warp == 0) { s[lane] = 1; __syncwarp(); if (lane == 0) set(flag); }
        else { if (lane == 0) await(flag); out[t] = s[lane]; }""",
    "a flag behind one lane's read, while others read the same word": """
        if (warp == 0) { out[t] = s[5]; if (lane == 0) set(flag); }
        else if (lane == 0) { await(flag); s[5] = 2; }""",
    "a flag behind one lane's read, while others read the same 16 bytes": """
        if (warp == 0) { uint4 x = *(uint4*)s; out[t] = x.y; if (lane == 0) set(flag); }
        else if (lane == 0) { await(flag); *(uint4*)s = uint4{}; }""",
    "reads of a whole warp, and a later one of the lane that sets the flag": """
        if (warp == 0) {
            out[t] = s[5];
            if (lane == 0) { set(flag + 1); out[t] += s[5]; set(flag); }
        } else if (lane == 0) { await(flag); s[5] = 2; }""",
    "16-byte reads of a whole warp, and a later one of the lane that sets the flag": """
        if (warp == 0) {
            uint4 x = *(uint4*)s;
            out[t] = x.y;
            if (lane == 0) { set(flag + 1); uint4 y = *(uint4*)s; out[t] += y.z; set(flag); }
        } else if (lane == 0) { await(flag); *(uint4*)s = uint4{}; }""",
    "a flag with no fence before it": """
        volatile u32* f = flag;
        if (t == 0) { s[5] = 1; f[0] = 1; }
        if (t == 32) { while (f[0] == 0); __threadfence_block(); out[t] = s[5]; }""",
    "a flag with no fence behind it": """
        volatile u32* f = flag;
        if (t == 0) { s[5] = 1; __threadfence_block(); f[0] = 1; }
        if (t == 32) { while (f[0] == 0); out[t] = s[5]; }""",
    "a flag with a fence of another lane": """
        volatile u32* f = flag;
        if (t == 0) { s[5] = 1; __syncwarp(1); f[0] = 1; }
        if (t == 1) __threadfence_block();
        if (t == 32) { while (f[0] == 0); __threadfence_block(); out[t] = s[5]; }""",
    "a lock that is opened too soon": """
        if (lane == 0) {
            while (atomicCAS(flag, 0, 1));
            __threadfence_block();
            u32 x = s[5];
            atomicExch(flag, 0);
            s[5] = x + t;
        }""",
    "copies that other lanes wait for": """
        if (warp == 0) { COPY __syncwarp(); WAIT if (lane == 0) set(flag); }
        else { if (lane == 0) await(flag); __syncwarp(); out[t] = s[lane]; }""",
    "a copy that only another lane waits for": "if (warp == 0) { COPY WAIT out[t] = s[lane ^ 4]; }",
}  # fmt: skip


def expanded(body: str) -> str:
    copy = 'asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" :: "r"((u32)__cvta_generic_to_shared(s + lane)), "l"(in + lane) : "memory");'
    return body.replace("COPY", copy).replace("WAIT", 'asm volatile("cp.async.wait_all;" ::: "memory");')


@pytest.mark.parametrize("name", QUIET)
def test_no_race(name: str) -> None:
    assert checks(expanded(QUIET[name]), before=FLAGS) == {""}


def test_blocks_on_several_threads_that_draw_tickets() -> None:
    """Whoever draws the last ticket knows the others' writes, in whatever moment of the host's threads they drew theirs."""
    source = """extern "C" __global__ void k(u32* parts, u32* ticket, u32* out) {
        parts[blockIdx.x] = blockIdx.x;
        __threadfence();
        if (atomicAdd(ticket, 1) != gridDim.x - 1) return;
        __threadfence();
        for (u32 i = 0; i < gridDim.x; ++i) *out += parts[i];
    }"""
    for _ in range(600):
        parts, ticket, out = np.zeros(40, np.uint32), np.zeros(1, np.uint32), np.zeros(1, np.uint32)
        run_ptx(compile_cuda(source), parts, ticket, out, grid=40, block=1, options=Options(threads=3))
        assert out[0] == sum(range(40))


@pytest.mark.parametrize("name", RACES)
def test_race(name: str) -> None:
    assert checks(expanded(RACES[name]), before=FLAGS) == {"race"}
