"""cp.async: sizes, zero filling, groups, and the schedules that decide when bytes move."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from simulated import run_cuda

from cuflash.errors import OptionError, SimulatorError
from cuflash.simulator import Options, configure, current_options

RANDOM = [Options(threads=1, schedule="random", seed=seed) for seed in range(4)]
ALL = [Options(threads=1, schedule="early"), Options(threads=1, schedule="late"), *RANDOM]


@pytest.mark.parametrize("nbytes", [4, 8, 16])
@pytest.mark.parametrize("options", ALL[:3])
def test_copy_with_zero_filling(nbytes: int, options: Options) -> None:
    kind = "cg" if nbytes == 16 else "ca"
    source = f"""extern "C" __global__ void k(const char* in, const int* sizes, char* out) {{
        __shared__ __align__(16) char s[32 * {nbytes}];
        int i = threadIdx.x;
        for (int j = 0; j < {nbytes}; ++j) s[i * {nbytes} + j] = 99;
        u32 d = (u32)__cvta_generic_to_shared(s + i * {nbytes});
        asm volatile("cp.async.{kind}.shared.global [%0], [%1], {nbytes}, %2;"
            :: "r"(d), "l"(in + i * {nbytes}), "r"(sizes[i]) : "memory");
        asm volatile("cp.async.commit_group;\\ncp.async.wait_group 0;" ::: "memory");
        for (int j = 0; j < {nbytes}; ++j) out[i * {nbytes} + j] = s[i * {nbytes} + j];
    }}"""
    data = np.random.default_rng(0).integers(1, 127, (32, nbytes)).astype(np.int8)
    sizes = np.resize(np.array([nbytes, 0, nbytes // 2, nbytes, 1], np.int32), 32)
    out = np.zeros_like(data)
    run_cuda(source, data, sizes, out, options=options)
    np.testing.assert_array_equal(out, np.where(np.arange(nbytes) < sizes[:, None], data, 0))


def test_ignored_source() -> None:
    source = """extern "C" __global__ void k(const int* in, int* out) {
        __shared__ int s[32];
        int i = threadIdx.x;
        asm volatile("{.reg .pred p; setp.ge.s32 p, %2, 5; cp.async.ca.shared.global [%0], [%1], 4, p;}"
            :: "r"((u32)__cvta_generic_to_shared(s + i)), "l"(in + i % 5), "r"(i) : "memory");
        asm volatile("cp.async.wait_all;" ::: "memory");
        out[i] = s[i];
    }"""
    data, out = np.arange(1, 6, dtype=np.int32), np.full(32, -1, np.int32)
    run_cuda(source, data, out)
    assert out.tolist() == [1, 2, 3, 4, 5, *[0] * 27]


PIPELINE = """
__device__ void copy(u32 d, const int* s) { asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" :: "r"(d), "l"(s) : "memory"); }
extern "C" __global__ void k(const int* in, int* out, int tiles) {
    __shared__ __align__(16) int s[3][256];
    int i = threadIdx.x;
    u32 base = (u32)__cvta_generic_to_shared(s) + i * 16;
    for (int t = 0; t < 2; ++t) {
        if (t < tiles) copy(base + t * 1024, in + t * 256 + i * 4);
        asm volatile("cp.async.commit_group;" ::: "memory");
    }
    int total = 0;
    for (int t = 0; t < tiles; ++t) {
        asm volatile("cp.async.wait_group WAIT;" ::: "memory");
        __syncthreads();
        if (t + 2 < tiles) copy(base + (t + 2) % 3 * 1024, in + (t + 2) * 256 + i * 4);
        asm volatile("cp.async.commit_group;" ::: "memory");
        for (int j = 0; j < 4; ++j) total += s[t % 3][(i * 4 + j + 77) % 256] * (t + 1);
    }
    asm volatile("cp.async.wait_group 0;" ::: "memory");
    out[i] = total;
}"""


def pipeline(wait: int, options: Options) -> bool:
    """Run a three-stage pipeline that waits until `wait` groups are left; True if the result is right."""
    data = np.random.default_rng(0).integers(0, 100, (7, 256)).astype(np.int32)
    out = np.zeros(64, np.int32)
    run_cuda(PIPELINE.replace("WAIT", str(wait)), data, out, 7, block=64, options=options)
    turned = np.roll(data, -77, axis=1).reshape(7, 64, 4).sum(2)
    return bool((out == (turned * np.arange(1, 8)[:, None]).sum(0)).all())


@pytest.mark.parametrize("options", ALL)
def test_pipeline(options: Options) -> None:
    assert pipeline(1, options)


def test_waiting_too_little_is_seen_when_copies_are_late() -> None:
    assert pipeline(2, Options(threads=1, schedule="early", checks=False))
    assert not pipeline(2, Options(threads=1, schedule="late", checks=False))
    assert not all(pipeline(2, replace(options, checks=False)) for options in RANDOM)


@pytest.mark.parametrize("schedule", ["early", "late", "random"])
def test_waiting_too_little_is_a_race_under_every_schedule(schedule: Any) -> None:
    with pytest.raises(SimulatorError, match=r"\[race\] 4-byte load .* and an earlier write by cp.async of warp \d"):
        pipeline(2, Options(threads=1, schedule=schedule))


def test_missing_barrier_is_seen_when_warps_run_at_random() -> None:
    source = """extern "C" __global__ void k(int* out) {
        __shared__ int s[128];
        s[threadIdx.x] = threadIdx.x;
        for (int i = 0; i < 3; ++i) {
            __syncthreads();
            int x = s[(threadIdx.x + 40) % 128];
            BARRIER
            s[threadIdx.x] = x;
        }
        out[threadIdx.x] = s[threadIdx.x];
    }"""
    expected = (np.arange(128) + 120) % 128
    right = {}
    for barrier in ("__syncthreads();", ""):
        results = []
        for options in RANDOM:
            out = np.zeros(128, np.int32)
            run_cuda(source.replace("BARRIER", barrier), out, block=128, options=replace(options, checks=False))
            results.append(bool((out == expected).all()))
        right[barrier] = results
    assert all(right["__syncthreads();"])
    assert not all(right[""])


def test_groups_are_per_thread() -> None:
    """Half of the lanes commit twice: for them, waiting until one group is left completes the first copy only."""
    source = """extern "C" __global__ void k(const int* in, int* out) {
        __shared__ int s[64];
        int i = threadIdx.x;
        s[i] = s[32 + i] = -1;
        u32 d = (u32)__cvta_generic_to_shared(s + i);
        asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" :: "r"(d), "l"(in + i) : "memory");
        if (i % 2) asm volatile("cp.async.commit_group;" ::: "memory");
        asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" :: "r"(d + 128), "l"(in + 32 + i) : "memory");
        asm volatile("cp.async.commit_group;\\ncp.async.wait_group 1;" ::: "memory");
        out[i] = s[i];
        if (PEEK) out[32 + i] = s[32 + i];
        asm volatile("cp.async.wait_group 0;" ::: "memory");
        out[64 + i] = s[i], out[96 + i] = s[32 + i];
    }"""
    data, out = np.arange(100, 164, dtype=np.int32), np.zeros(128, np.int32)
    with pytest.raises(SimulatorError, match=r"(?s)\[race\] 4-byte load at byte 0 .*lane 0.*cp.async of warp 0, lane 0"):
        run_cuda(source.replace("PEEK", "true"), data, out)
    run_cuda(source.replace("PEEK", "true"), data, out, options=Options(threads=1, checks=False))
    odd = np.arange(32) % 2 == 1
    np.testing.assert_array_equal(out[:32], np.where(odd, data[:32], -1))
    assert (out[32:64] == -1).all()
    np.testing.assert_array_equal(out[64:], data)


def test_source_is_read_when_the_copy_completes() -> None:
    source = """extern "C" __global__ void k(int* in, int* out) {
        __shared__ int s[1];
        asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" :: "r"((u32)__cvta_generic_to_shared(s)), "l"(in) : "memory");
        *(volatile int*)in = 2;
        asm volatile("cp.async.wait_all;" ::: "memory");
        *out = *(volatile int*)s;
    }"""
    seen = {}
    for schedule in ("early", "late"):
        data, out = np.ones(1, np.int32), np.zeros(1, np.int32)
        run_cuda(source, data, out, block=1, options=Options(threads=1, schedule=schedule))
        seen[schedule] = int(out[0])
    assert seen == {"early": 1, "late": 2}


def test_random_schedules_repeat_with_their_seed() -> None:
    source = """extern "C" __global__ void k(u32* order, u32* counter) {
        for (int i = 0; i < 8; ++i) if (threadIdx.x % 32 == 0) order[atomicAdd(counter, 1u)] = threadIdx.x / 32;
    }"""

    def order(seed: int) -> tuple[int, ...]:
        out, counter = np.zeros(32, np.uint32), np.zeros(1, np.uint32)
        run_cuda(source, out, counter, block=128, options=Options(threads=1, schedule="random", seed=seed))
        return tuple(out.tolist())

    assert order(1) == order(1)
    assert len({order(seed) for seed in range(6)}) > 1


def test_options_nest() -> None:
    assert current_options() == Options()
    with configure(schedule="random", seed=3) as outer:
        assert current_options() is outer
        with configure(threads=2):
            assert current_options() == Options(threads=2, schedule="random", seed=3)
        assert current_options() is outer
    assert current_options() == Options()


def test_options_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="schedule"):
        Options(schedule="sometimes")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="threads"):
        Options(threads=0)
    monkeypatch.setenv("CUFLASH_SIMULATOR_THREADS", "3")
    assert Options().num_threads() == 3
    assert Options(threads=2).num_threads() == 2
    for wrong in ("0", "-1", "two", "1.5", "²"):
        monkeypatch.setenv("CUFLASH_SIMULATOR_THREADS", wrong)
        with pytest.raises(OptionError, match=f"CUFLASH_SIMULATOR_THREADS: got '{wrong}'; expected a positive number"):
            Options().num_threads()
        assert Options(threads=2).num_threads() == 2
    monkeypatch.setenv("CUFLASH_SIMULATOR_THREADS", "")
    assert Options().num_threads() > 0


@pytest.mark.parametrize(("options", "committed"), list(itertools.product(ALL[:3], [True, False])))
def test_copy_open_at_exit(options: Options, committed: bool) -> None:
    source = """extern "C" __global__ void k(const int* in) {
        __shared__ int s[32];
        asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" :: "r"((u32)__cvta_generic_to_shared(s + threadIdx.x)), "l"(in) : "memory");
        COMMIT
    }""".replace("COMMIT", 'asm volatile("cp.async.commit_group;" ::: "memory");' if committed else "")
    with pytest.raises(SimulatorError, match=r"open-copy[\s\S]*test\.cu:3"):
        run_cuda(source, np.zeros(1, np.int32), options=options)
