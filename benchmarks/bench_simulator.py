"""How fast the simulator is: GFLOP/s per core of the forward pass at S = 1024, D = 64, bfloat16.

    pytest benchmarks/bench_simulator.py --benchmark-enable

Operations are those of the two matrix products. One core means one thread; `extra_info` of the report holds the rate. The backward pass and
the other types are there to show what falls behind, and a loop of nothing but `wgmma`, with and without checks.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy
import pytest

import cuflash
from cuflash.simulator import Module, Options

SEQLEN, HEADS, HEAD_DIM = 1024, 1, 64
DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": numpy.float16, "float32": numpy.float32}


@pytest.fixture(params=["sm_75", "sm_80", "sm_90"])
def arch(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    pytest.importorskip("cupy")
    monkeypatch.setenv("CUFLASH_SIMULATOR_ARCH", request.param)
    monkeypatch.setenv("CUFLASH_SIMULATOR_THREADS", "1")
    return str(request.param)


def inputs_of(dtype: str) -> list[Any]:
    rng = numpy.random.default_rng(0)
    return [rng.standard_normal((1, SEQLEN, HEADS, HEAD_DIM)).astype(DTYPES[dtype]) for _ in range(3)]


def time_rate(benchmark: Any, flops: int, call: Any) -> None:
    """Time a call after a first one that compiles, and report its rate."""
    call()
    benchmark.pedantic(call, rounds=3, iterations=1)
    if benchmark.stats is not None:  # None with --benchmark-disable
        benchmark.extra_info["GFLOP/s per core"] = round(flops / benchmark.stats.stats.min / 1e9, 3)


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_forward(benchmark: Any, arch: str, dtype: str) -> None:
    inputs = inputs_of(dtype)
    plan = cuflash.plan(*inputs)
    assert plan.device.arch == arch
    time_rate(benchmark, plan.problem.flops_forward, lambda: cuflash.scaled_dot_product_attention(*inputs))


def test_backward(benchmark: Any, arch: str) -> None:
    inputs = inputs_of("bfloat16")
    plan = cuflash.plan(*inputs, backward=True)
    assert plan.device.arch == arch
    out, lse = cuflash.scaled_dot_product_attention(*inputs, return_lse=True)
    time_rate(benchmark, plan.problem.flops_backward, lambda: cuflash.scaled_dot_product_attention_backward(out, *inputs, out, lse))


WGMMA_LOOPS, WGMMA_CHAIN = 100, 8


def wgmma_kernel(n: int, kind: str) -> str:
    """PTX of one warpgroup that multiplies the same 64 x k by k x n tiles in shared memory, which are zeros, again and again."""
    k, transposed = {"bf16": (16, ", 0, 0"), "tf32": (8, ""), "e4m3": (32, "")}[kind]
    accumulators = ", ".join(f"%d{i}" for i in range(n // 2))
    swizzle_128 = 1 << 62 | 1024 >> 4 << 32
    product = f"wgmma.mma_async.sync.aligned.m64n{n}k{k}.f32.{kind}.{kind} {{{accumulators}}}, %a, %b, %p, 1, 1{transposed};"
    return f""".version 8.0
.target sm_90a
.address_size 64
.extern .shared .align 1024 .b8 tiles[];
.visible .entry k() {{
.reg .f32 %d<{n // 2}>; .reg .b32 %s, %i, %zero; .reg .b64 %a, %b; .reg .pred %p, %q;
mov.u32 %zero, 0; mov.u32 %i, %tid.x; shl.b32 %i, %i, 4; mov.u32 %s, tiles; add.u32 %s, %s, %i; mov.u32 %i, 0;
FILL: st.shared.v4.b32 [%s], {{%zero, %zero, %zero, %zero}}; add.u32 %s, %s, 2048; add.u32 %i, %i, 1;
setp.lt.u32 %q, %i, {(64 + n) * 128 // 2048}; @%q bra FILL;
fence.proxy.async; bar.sync 0;
mov.u32 %s, tiles; shr.u32 %s, %s, 4; cvt.u64.u32 %a, %s; or.b64 %a, %a, {swizzle_128}; add.u64 %b, %a, {64 * 128 >> 4};
setp.ne.u32 %p, 0, 0; mov.u32 %i, 0;
LOOP: wgmma.fence.sync.aligned;
{f"{product} setp.eq.u32 %p, 0, 0; " * WGMMA_CHAIN}
wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;
add.u32 %i, %i, 1; setp.lt.u32 %q, %i, {WGMMA_LOOPS}; @%q bra LOOP;
ret; }}"""


@pytest.mark.parametrize("checks", [False, True])
@pytest.mark.parametrize(("n", "kind"), [(64, "bf16"), (128, "bf16"), (256, "bf16"), (128, "tf32"), (128, "e4m3")])
def test_wgmma(benchmark: Any, n: int, kind: str, checks: bool) -> None:
    module = Module(wgmma_kernel(n, kind))
    options = Options(threads=1, checks=checks)

    def launch() -> int:
        return module.launch((1, 1, 1), (128, 1, 1), (64 + n) * 128, b"", [], options).matrix_flops

    time_rate(benchmark, launch(), launch)
