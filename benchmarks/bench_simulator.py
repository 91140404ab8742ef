"""How fast the simulator is: GFLOP/s per core of the forward pass at S = 1024, D = 64, bfloat16.

    pytest benchmarks/bench_simulator.py --benchmark-enable

Operations are those of the two matrix products. One core means one thread; `extra_info` of the report holds the rate. The backward pass and
the other types are there to show what falls behind.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy
import pytest

import cuflash

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
