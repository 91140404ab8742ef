"""The race detector: every kernel here computes the right result under the schedule it is run with, and is wrong all the same."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from simulated import Array, compile_cuda, pack, run_cuda

from cuflash.errors import SimulatorError
from cuflash.simulator import Buffer, Module, Options

SCHEDULES = [Options(threads=1, schedule=schedule) for schedule in ("early", "late", "random")]


@pytest.fixture(params=SCHEDULES, ids=lambda options: options.schedule)
def options(request: pytest.FixtureRequest) -> Options:
    """Each schedule: what is wrong is found under all of them."""
    return request.param  # type: ignore[no-any-return]


def report(source: str, *arguments: Any, **launch: Any) -> str:
    """The message of the check that stops this kernel."""
    with pytest.raises(SimulatorError) as caught:
        run_cuda(source, *arguments, **launch)
    return str(caught.value)


def run(source: str, block: int, **launch: Any) -> Array:
    """The output of a kernel `k(int* out)` that has no race."""
    out = np.zeros(block, np.int32)
    run_cuda(source, out, block=block, **launch)
    return out


EXCHANGE = """extern "C" __global__ void k(int* out) {
    __shared__ int s[128];
    s[threadIdx.x] = 0; __syncthreads();
    s[threadIdx.x] = threadIdx.x;
    BARRIER
    out[threadIdx.x] = s[threadIdx.x ^ PARTNER];
}"""


def exchange(barrier: str, partner: int) -> str:
    return EXCHANGE.replace("BARRIER", barrier).replace("PARTNER", str(partner))


def test_read_after_write(options: Options) -> None:
    text = report(exchange("", 32), np.zeros(128, np.int32), block=128, options=options)
    assert re.match(r"\[race\] 4-byte (load at .* earlier write|store at .* earlier read) by warp", text)  # whichever came first
    assert "no barrier orders them" in text
    assert "test.cu:6: out[threadIdx.x] = s[threadIdx.x ^ 32];" in text
    assert "test.cu:4: s[threadIdx.x] = threadIdx.x;" in text
    np.testing.assert_array_equal(run(exchange("__syncthreads();", 32), 128, options=options), np.arange(128) ^ 32)


def test_lanes_of_a_warp(options: Options) -> None:
    text = report(exchange("", 1), np.zeros(128, np.int32), block=128, options=options)
    assert re.match(r"\[race\] 4-byte load at byte \d+ of shared memory \(lane 0\) and an earlier write by warp \d, lane 1", text)
    assert "lanes of one warp, with no __syncwarp between" in text
    np.testing.assert_array_equal(run(exchange("__syncwarp();", 1), 128, options=options), np.arange(128) ^ 1)
    np.testing.assert_array_equal(
        run(exchange("__syncwarp(0x3u << (threadIdx.x % 32 & ~1));", 1), 128, options=options), np.arange(128) ^ 1
    )
    assert "[race]" in report(
        exchange("__syncwarp(0x3u << (threadIdx.x % 32 & ~1));", 2), np.zeros(128, np.int32), block=128, options=options
    )


def test_own_bytes_need_no_barrier(options: Options) -> None:
    np.testing.assert_array_equal(run(exchange("", 0), 128, options=options), np.arange(128))


def test_syncwarp_is_no_barrier_between_warps(options: Options) -> None:
    assert "no barrier orders them" in report(exchange("__syncwarp();", 32), np.zeros(128, np.int32), block=128, options=options)


def test_write_after_read(options: Options) -> None:
    source = """extern "C" __global__ void k(int* out) {
        __shared__ int s[64];
        s[threadIdx.x] = threadIdx.x;
        __syncthreads();
        int x = s[threadIdx.x ^ 32];
        BARRIER
        s[threadIdx.x] = x;
        out[threadIdx.x] = s[threadIdx.x];
    }"""
    text = report(source.replace("BARRIER", ""), np.zeros(64, np.int32), block=64, options=options)
    assert re.match(r"\[race\] 4-byte (load at .* earlier write|store at .* earlier read) by warp", text)
    assert "test.cu:7" in text
    assert "test.cu:5" in text
    np.testing.assert_array_equal(run(source.replace("BARRIER", "__syncthreads();"), 64, options=options), np.arange(64) ^ 32)


def test_write_after_write(options: Options) -> None:
    source = """extern "C" __global__ void k(int* out) {
        __shared__ int s[32];
        s[threadIdx.x % 32] = 7;
        __syncthreads();
        out[threadIdx.x] = s[threadIdx.x % 32];
    }"""
    text = report(source, np.zeros(64, np.int32), block=64, options=options)
    assert "[race] 4-byte store" in text
    assert "and an earlier write by warp" in text


def test_bytes_of_one_word_are_apart(options: Options) -> None:
    source = """extern "C" __global__ void k(int* out) {
        __shared__ unsigned char s[128];
        s[threadIdx.x % 4 * 32 + threadIdx.x / 4] = threadIdx.x;
        out[threadIdx.x] = s[threadIdx.x % 4 * 32 + threadIdx.x / 4];
        __syncthreads();
        out[threadIdx.x] += ((u32*)s)[threadIdx.x / 4] & 1;
    }"""
    assert run(source, 128, options=options)[0] == 0
    shared_halves = source.replace("s[threadIdx.x % 4 * 32 + threadIdx.x / 4] = threadIdx.x;", "((u16*)s)[threadIdx.x / 2] = 1;", 1)
    assert "[race]" in report(shared_halves, np.zeros(128, np.int32), block=128, options=options)


def test_named_barriers_order_those_who_take_part(options: Options) -> None:
    source = """extern "C" __global__ void k(int* out) {
        __shared__ int s[32];
        if (threadIdx.x < 32) {
            s[threadIdx.x] = threadIdx.x;
            asm volatile("bar.arrive 1, 64;" ::: "memory");
        } else if (threadIdx.x < 64) {
            asm volatile("bar.sync 1, 64;" ::: "memory");
            out[threadIdx.x] = s[threadIdx.x - 32];
        } else {
            LATE
        }
    }"""
    assert run(source.replace("LATE", ""), 96, options=options)[63] == 31
    assert "[race]" in report(
        source.replace("LATE", "out[threadIdx.x] = s[threadIdx.x - 64];"), np.zeros(96, np.int32), block=96, options=options
    )


def test_arriving_orders_only_what_came_before(options: Options) -> None:
    source = """extern "C" __global__ void k(int* out) {
        __shared__ int s[32];
        if (threadIdx.x < 32) {
            asm volatile("bar.arrive 1, 64;" ::: "memory");
            s[threadIdx.x] = threadIdx.x;
        } else {
            asm volatile("bar.sync 1, 64;" ::: "memory");
            for (int i = 0; i < 1000; ++i) asm volatile("" ::: "memory");
            out[threadIdx.x] = s[threadIdx.x - 32];
        }
    }"""
    text = report(source, np.zeros(64, np.int32), block=64, options=options)
    assert "[race]" in text or "[uninitialized]" in text


def test_atomics_do_not_race_with_each_other(options: Options) -> None:
    source = """extern "C" __global__ void k(int* out) {
        __shared__ int sum;
        if (threadIdx.x == 0) sum = 0;
        __syncthreads();
        if (threadIdx.x == 0) sum = 0;
        FIRST
        atomicAdd(&sum, 1);
        SECOND
        out[threadIdx.x] = sum;
    }"""
    barrier = "__syncthreads();"
    assert (run(source.replace("FIRST", barrier).replace("SECOND", barrier), 128, options=options) == 128).all()
    assert "[race]" in report(
        source.replace("FIRST", "__syncwarp();").replace("SECOND", barrier), np.zeros(128, np.int32), block=128, options=options
    )


def test_a_flag_orders_what_was_written_before_it(options: Options) -> None:
    source = """extern "C" __global__ void k(int* out) {
        __shared__ int s[1];
        __shared__ int flag;
        if (threadIdx.x == 0) flag = 0;
        __syncthreads();
        if (threadIdx.x == 32) {
            s[0] = 5;
            __threadfence_block();
            *(volatile int*)&flag = 1;
        } else if (threadIdx.x == 0) {
            while (*(volatile int*)&flag == 0);
            __threadfence_block();
            out[0] = s[0];
        }
    }"""
    assert run(source, 64, options=options)[0] == 5


def test_copies_are_known_to_the_lane_that_waited(options: Options) -> None:
    """cp.async.wait_group tells a lane about its own copies only; other lanes of the warp need a __syncwarp, other warps a barrier."""
    source = """extern "C" __global__ void k(int* out, const int* in) {
        __shared__ int s[128];
        s[threadIdx.x] = 0; __syncthreads();
        u32 d = (u32)__cvta_generic_to_shared(s + threadIdx.x);
        asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" :: "r"(d), "l"(in + threadIdx.x) : "memory");
        asm volatile("cp.async.wait_all;" ::: "memory");
        BARRIER
        out[threadIdx.x] = s[threadIdx.x ^ PARTNER];
    }"""
    data = np.arange(128, dtype=np.int32)
    for barrier, partner, right in (
        ("", 0, True),
        ("", 1, False),
        ("__syncwarp();", 1, True),
        ("__syncwarp();", 32, False),
        ("__syncthreads();", 32, True),
    ):
        text, out = source.replace("BARRIER", barrier).replace("PARTNER", str(partner)), np.zeros(128, np.int32)
        if right:
            run_cuda(text, out, data, block=128, options=options)
            np.testing.assert_array_equal(out, data ^ partner)
        else:
            message = report(text, out, data, block=128, options=options)
            assert re.match(r"\[race\] (4-byte load at .* by cp.async of warp|cp.async at .* earlier read by warp)", message)


def test_copy_into_a_buffer_that_is_still_read(options: Options) -> None:
    source = """extern "C" __global__ void k(int* out, const int* in) {
        __shared__ int s[64];
        s[threadIdx.x] = 1;
        __syncthreads();
        if (threadIdx.x < 32) asm volatile("bar.sync 1, 32;" ::: "memory");  // lets the other warp go first
        out[threadIdx.x] = s[threadIdx.x ^ 32];
        BARRIER
        u32 d = (u32)__cvta_generic_to_shared(s + threadIdx.x);
        asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" :: "r"(d), "l"(in + threadIdx.x) : "memory");
        asm volatile("cp.async.wait_all;" ::: "memory");
    }"""
    data, out = np.arange(64, dtype=np.int32), np.zeros(64, np.int32)
    text = report(source.replace("BARRIER", ""), out, data, block=64, options=options)
    assert re.match(r"\[race\] (cp.async at .* earlier read by warp|4-byte load at .* earlier write by cp.async of warp)", text)
    run_cuda(source.replace("BARRIER", "__syncthreads();"), out, data, block=64, options=options)


TURN = """extern "C" __global__ void k(int* data, int* turn, int* seen) {
    if (threadIdx.x != 0) return;
    if (blockIdx.x == 0) { data[0] = 7; __threadfence(); PASS; }
    else { TAKE; __threadfence(); seen[blockIdx.x] = data[0]; }
}"""
PASSES = {
    "red": 'asm volatile("red.relaxed.gpu.global.add.s32 [%0], 1;" :: "l"(turn) : "memory")',
    "atom": "atomicAdd(turn, 1)",
    "store": "*(volatile int*)turn = 1",
}


@pytest.mark.parametrize("schedule", ["early", "late"])
@pytest.mark.parametrize("passes", PASSES)
def test_who_sees_a_flag_and_fences_is_ordered(passes: str, schedule: Any) -> None:
    """However the flag was set. Blocks wait for earlier ones, so they start in order."""
    options = Options(threads=1, schedule=schedule)
    seen = np.zeros(3, np.int32)
    source = TURN.replace("PASS", PASSES[passes]).replace("TAKE", "while (*(volatile int*)turn == 0)")
    run_cuda(source, np.zeros(1, np.int32), np.zeros(1, np.int32), seen, grid=3, options=options)
    assert list(seen) == [0, 7, 7]


@pytest.mark.parametrize("schedule", ["early", "late"])
def test_a_reduction_sees_nothing(schedule: Any) -> None:
    """red has no result: a fence behind it orders nothing, while atom, whose result is the flag, is seen. One block after the other."""
    take = 'int old; asm volatile("atom.relaxed.gpu.global.add.s32 %0, [%1], 1;" : "=r"(old) : "l"(turn) : "memory")'
    options = Options(threads=1, schedule=schedule)
    arrays = [np.zeros(n, np.int32) for n in (1, 1, 2)]
    run_cuda(TURN.replace("PASS", PASSES["red"]).replace("TAKE", take), *arrays, grid=2, options=options)
    assert list(arrays[2]) == [0, 7]
    arrays = [np.zeros(n, np.int32) for n in (1, 1, 2)]
    text = report(TURN.replace("PASS", PASSES["red"]).replace("TAKE", PASSES["red"]), *arrays, grid=2, options=options)
    assert "nothing orders the two blocks" in text


def test_blocks_that_write_and_read_the_same_memory(options: Options) -> None:
    source = """extern "C" __global__ void k(int* out) {
        out[blockIdx.x * 32 + threadIdx.x] = out[(blockIdx.x * 32 + threadIdx.x + 4) % 128] + 1;
    }"""
    text = report(source, np.zeros(128, np.int32), grid=4, options=options)
    assert "[race] 4-byte " in text
    assert "nothing orders the two blocks" in text
    assert "of 'array 0'" in text
    assert "test.cu:2" in text


def test_blocks_may_share_what_they_only_read_and_write_their_own_bytes(options: Options) -> None:
    source = """extern "C" __global__ void k(const u16* in, unsigned char* out) {
        int i = threadIdx.x * gridDim.x + blockIdx.x;  // neighbouring bytes belong to different blocks
        out[i] = in[threadIdx.x] + in[i] + out[i];
    }"""
    data, out = np.arange(96, dtype=np.uint16), np.zeros(96, np.uint8)
    run_cuda(source, data, out, grid=3, options=Options(threads=4, schedule=options.schedule))
    np.testing.assert_array_equal(out, np.arange(96) // 3 + np.arange(96))


def test_two_blocks_write_the_same_byte() -> None:
    source = """extern "C" __global__ void k(unsigned char* out) { out[threadIdx.x * 3 + blockIdx.x * BYTES] = 1; }"""
    run_cuda(source.replace("BYTES", "1"), np.zeros(256, np.uint8), grid=3)
    assert "[race] 1-byte store" in report(source.replace("BYTES", "3"), np.zeros(256, np.uint8), grid=3)


def test_atomics_of_blocks_do_not_race() -> None:
    source = 'extern "C" __global__ void k(int* out) { atomicAdd(out + threadIdx.x % 2, 1); OTHER }'
    out = np.zeros(2, np.int32)
    run_cuda(source.replace("OTHER", ""), out, grid=64, options=Options(threads=4))
    assert (out == 64 * 16).all()
    assert "[race]" in report(source.replace("OTHER", "if (blockIdx.x == 9) out[0] = 1;"), np.zeros(2, np.int32), grid=64)


def test_the_last_block_adds_up_what_others_wrote() -> None:
    """A ticket: who draws the last number knows what all others wrote before they drew theirs."""
    source = """extern "C" __global__ void k(int* parts, int* ticket, int* out) {
        parts[blockIdx.x] = blockIdx.x;
        __threadfence();
        DRAW
        if (last) { __threadfence(); int sum = 0; for (int i = 0; i < gridDim.x; ++i) sum += parts[i]; out[0] = sum; }
    }"""
    parts, ticket, out = np.zeros(40, np.int32), np.zeros(1, np.int32), np.zeros(1, np.int32)
    drawn = source.replace("DRAW", "bool last = atomicAdd(ticket, 1) == gridDim.x - 1;")
    run_cuda(drawn, parts, ticket, out, grid=40, block=1, options=Options(threads=3))
    assert out[0] == sum(range(40))
    guessed = source.replace("DRAW", "bool last = blockIdx.x == gridDim.x - 1;")
    for wrong in (guessed, drawn.replace("__threadfence();\n", "\n"), drawn.replace("{ __threadfence();", "{")):
        ticket[:] = 0
        assert "[race] 4-byte load" in report(wrong, np.zeros(40, np.int32), ticket, out, grid=40, block=1)


def launch_with_written(source: str, data: Array, written: Array) -> None:
    module = Module(compile_cuda(source), sources={"test.cu": source})
    out = np.zeros(32, np.int32)
    buffers = [Buffer(data.ctypes.data, data.nbytes, "workspace", written), Buffer(out.ctypes.data, out.nbytes, "out")]
    module.launch((1, 1, 1), (32, 1, 1), 0, pack((data, out)), buffers, Options(threads=1))


def test_global_memory_that_nobody_has_written() -> None:
    write = 'extern "C" __global__ void k(int* data, int* out) { if (threadIdx.x < 31) data[threadIdx.x] = 1; }'
    read = 'extern "C" __global__ void k(int* data, int* out) { out[threadIdx.x] = data[threadIdx.x]; }'
    data, written = np.zeros(32, np.int32), np.zeros(128, np.uint8)
    launch_with_written(write, data, written)
    assert written.tolist() == [1] * 124 + [0] * 4
    with pytest.raises(SimulatorError, match=r"\[uninitialized\] 4-byte load \(lane 31\) of memory .*at byte 124 of 'workspace'"):
        launch_with_written(read, data, written)
    written[124:] = 1
    launch_with_written(read, data, written)


def test_an_atomic_does_not_hide_what_its_lane_wrote_before(options: Options) -> None:
    source = """extern "C" __global__ void k(int* out) {
        __shared__ int count;
        __shared__ int ready[64];
        ready[threadIdx.x] = 0;
        if (threadIdx.x == 0) count = 0;
        BARRIER
        atomicAdd(&count, 1);
        __syncthreads();
        out[threadIdx.x] = count + ready[threadIdx.x];
    }"""
    assert (run(source.replace("BARRIER", "__syncthreads();"), 64, options=options) == 64).all()
    for block in (32, 64):
        text = report(source.replace("BARRIER", ""), np.zeros(64, np.int32), block=block, options=options)
        assert re.match(r"\[(race|uninitialized)\] 4-byte", text)


def test_an_atomic_does_not_hide_what_its_block_wrote_before() -> None:
    source = 'extern "C" __global__ void k(int* y) { if (blockIdx.x == 0 && threadIdx.x == 0) y[0] = 0; atomicAdd(y, 1); }'
    for threads in (1, 4):
        assert "[race] 4-byte" in report(source, np.zeros(1, np.int32), grid=8, options=Options(threads))


SAME_PLACE = """extern "C" __global__ void k(int* out) {
    __shared__ __align__(16) int s[64];
    int t = threadIdx.x;
    s[t] = t;
    BARRIER
    STORE
    __syncthreads();
    out[t] = s[t % 4];
}"""
STORES = {
    "one word": "s[0] = VALUE;",
    "several places": "s[t / 8] = t / 8 + VALUE;",
    "vectors": "*(int4*)s = make_int4(VALUE, 1, 2, 3);",
    "bytes": "((char*)s)[3] = VALUE;",
    "64 bits": "((long long*)s)[1] = VALUE;",
    "generic": 'int* p = s; asm volatile("st.b32 [%0], %1;" :: "l"(p), "r"(VALUE) : "memory");',
}


@pytest.mark.parametrize("store", STORES)
def test_lanes_that_store_the_same_value_at_the_same_place(store: str, options: Options) -> None:
    source = SAME_PLACE.replace("BARRIER", "__syncthreads();").replace("STORE", STORES[store])
    run(source.replace("VALUE", "7"), 32, options=options)
    text = report(source.replace("VALUE", "int(t == 29)"), np.zeros(32, np.int32), options=options)
    assert re.match(r"\[race\] \d+-byte store .*lanes of one warp, with no __syncwarp between", text)


def test_the_same_value_in_another_instruction_races(options: Options) -> None:
    """Only lanes of one instruction are at the same place at the same time; so neither may another warp store what this one does."""
    assert "[race]" in report(SAME_PLACE.replace("BARRIER", "").replace("STORE", "s[5] = 5;"), np.zeros(32, np.int32), options=options)
    for place in ("t + i", "31 - t + i"):
        loop = SAME_PLACE.replace("BARRIER", "__syncthreads();").replace(
            "STORE", f"\n#pragma unroll 1\nfor (int i = 0; i < 2; ++i) s[{place}] = 7;"
        )
        assert "[race]" in report(loop, np.zeros(32, np.int32), options=options)
    source = SAME_PLACE.replace("BARRIER", "__syncthreads();").replace("STORE", "s[0] = 7;")
    assert "[race]" in report(source, np.zeros(64, np.int32), block=64, options=options)
