"""What a profile counts: against numbers that follow from the addresses and from the text of small kernels."""

from __future__ import annotations

import json
from collections import Counter
from math import ceil, gcd
from typing import Any

import numpy as np
import pytest
from simulated import PRELUDE, compile_cuda, pack

from cuflash import simulator
from cuflash.errors import OptionError, SimulatorError
from cuflash.simulator import Counters, KernelProfile, Module, OperandProfile, Options, Profile, Traffic

HEADER = ".version 8.0\n.target sm_90\n.address_size 64\n"


def aligned(count: int, dtype: Any = np.float32) -> Any:
    """Zeros that start on 256 bytes, as device memory does."""
    size = count * np.dtype(dtype).itemsize
    memory = np.zeros(size + 256, np.uint8)
    begin = -memory.ctypes.data % 256
    return memory[begin : begin + size].view(dtype)


def run(ptx: str, *arguments: Any, block: int = 32, grid: int = 1, source: str = "", **options: Any) -> tuple[KernelProfile, Counters]:
    """Launch a kernel once and return its profile and counters; array i is the buffer "array i"."""
    profile = Profile()
    buffers = [(a.ctypes.data, a.nbytes, f"array {i}") for i, a in enumerate(arguments) if isinstance(a, np.ndarray)]
    chosen = Options(**{"threads": 1, "profile": profile, **options})
    counters = Module(ptx, sources={"test.cu": PRELUDE + source}).launch((grid, 1, 1), (block, 1, 1), 0, pack(arguments), buffers, chosen)
    (kernel,) = profile.kernels
    return kernel, counters


def profile_ptx(body: str, *arguments: Any, params: str = "", **launch: Any) -> KernelProfile:
    """Profile a kernel written in PTX; %lane, %addr (32 bits) and %p, %q (64 bits) are there to be used."""
    registers = ".reg .b32 %lane, %addr, %x<8>; .reg .f32 %f<8>; .reg .b64 %p, %q; .reg .pred %go;"
    ptx = f"{HEADER}.visible .entry k({params})\n{{\n.shared .align 128 .b8 s[16384];\n{registers}\nmov.u32 %lane, %laneid;\n{body}\nret;\n}}\n"
    return run(ptx, *arguments, **launch)[0]


# --- Shared memory ------------------------------------------------------------------------------------------------------------------------


def strided_accesses(nbytes: int, stride: int, guard: str = "") -> str:
    """Every lane stores and loads `nbytes` bytes at lane * stride."""
    registers = {1: "%x0", 2: "%h", 4: "%x0", 8: "{%x0, %x1}", 16: "{%x0, %x1, %x2, %x3}"}[nbytes]
    kind = {1: "u8", 2: "u16", 4: "b32", 8: "v2.b32", 16: "v4.b32"}[nbytes]
    return f"""
.reg .b16 %h; mov.u16 %h, 7; mov.u32 %x0, 1; mov.u32 %x1, 2; mov.u32 %x2, 3; mov.u32 %x3, 4;
setp.lt.u32 %go, %lane, 8;
mov.u32 %addr, s;
mad.lo.u32 %addr, %lane, {stride}, %addr;
{guard} st.volatile.shared.{kind} [%addr], {registers};
{guard} ld.volatile.shared.{kind} {registers}, [%addr];
"""


@pytest.mark.parametrize("stride_words", [1, 2, 3, 4, 6, 8, 16, 17, 31, 32, 33, 48, 64])
def test_words_at_a_stride_share_banks_as_often_as_the_greatest_common_divisor(stride_words: int) -> None:
    total = profile_ptx(strided_accesses(4, 4 * stride_words)).total
    assert total.shared_writes == total.shared_reads == Traffic(1, gcd(stride_words, 32), 1)


@pytest.mark.parametrize(
    ("nbytes", "stride", "used", "ideal"),
    [
        (4, 0, 1, 1),  # one word for all
        (1, 1, 1, 1),  # four lanes per word
        (2, 2, 1, 1),
        (2, 4, 1, 1),
        (2, 128, 32, 1),
        (8, 8, 2, 2),  # half a warp at a time
        (8, 0, 2, 2),
        (8, 16, 4, 2),
        (8, 128, 32, 2),
        (16, 16, 4, 4),  # a quarter at a time
        (16, 32, 8, 4),
        (16, 48, 4, 4),
        (16, 128, 32, 4),
        (16, 144, 4, 4),
    ],
)
def test_wide_accesses_are_served_in_parts_of_a_warp(nbytes: int, stride: int, used: int, ideal: int) -> None:
    total = profile_ptx(strided_accesses(nbytes, stride)).total
    assert total.shared_writes == total.shared_reads == Traffic(1, used, ideal)
    assert total.shared_memory == Traffic(2, 2 * used, 2 * ideal)
    assert total.shared_memory.excess == 2 * (used - ideal)


def test_only_active_lanes_count() -> None:
    assert profile_ptx(strided_accesses(16, 128, "@%go")).total.shared_reads == Traffic(1, 8, 1)  # one quarter of a warp
    assert profile_ptx("setp.lt.u32 %go, %lane, 0;\nmov.u32 %addr, s; @%go st.shared.b32 [%addr], %lane;").total.shared_writes == Traffic()


@pytest.mark.parametrize(("pitch", "used"), [(16, 4), (32, 8), (64, 16), (128, 32), (144, 4), (80, 4), (96, 8)])
def test_ldmatrix_takes_eight_rows_at_a_time(pitch: int, used: int) -> None:
    """Rows that are `pitch` bytes apart; eight of them collide as often as the greatest common divisor of pitch and 128 says."""
    assert used == 4 * gcd(pitch, 128) // 16
    fill = "mov.u32 %addr, s; mad.lo.u32 %addr, %lane, 16, %addr;\n" + "\n".join(
        f"st.shared.v4.b32 [%addr+{offset}], {{%lane, %lane, %lane, %lane}};" for offset in range(0, 5120, 512)
    )
    load = (
        f"bar.warp.sync 0xffffffff; mov.u32 %addr, s; mad.lo.u32 %addr, %lane, {pitch}, %addr;\n"
        "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%x0, %x1, %x2, %x3}, [%addr];\nldmatrix.sync.aligned.m8n8.x1.shared.b16 {%x0}, [%addr];"
    )
    total = profile_ptx(fill + load).total
    assert total.shared_reads == Traffic(2, used + used // 4, 5)
    assert total.shared_writes == Traffic(10, 40, 40)


# --- Global memory ------------------------------------------------------------------------------------------------------------------------

POINTER = "ld.param.u64 %p, [a]; cvta.to.global.u64 %p, %p;"


@pytest.mark.parametrize(
    ("stride", "offset", "sectors", "ideal"),
    [(1, 0, 4, 4), (2, 0, 8, 4), (8, 0, 32, 4), (100, 0, 32, 4), (1, 1, 5, 4), (1, 8, 4, 4), (0, 0, 1, 1), (0, 3, 1, 1)],
)
def test_a_request_moves_every_sector_that_it_touches_once(stride: int, offset: int, sectors: int, ideal: int) -> None:
    array = aligned(4096)
    body = (
        f"{POINTER} mad.wide.u32 %p, %lane, {4 * stride}, %p; ld.global.f32 %f0, [%p+{4 * offset}]; st.global.f32 [%p+{4 * offset}], %f0;"
    )
    profile = profile_ptx(body, array, params=".param .u64 a")
    assert profile.total.global_reads == profile.total.global_writes == Traffic(1, sectors, ideal)
    asked = 4 * len({stride * lane for lane in range(32)})
    assert profile.operands == (OperandProfile("array 0", array.nbytes, asked, 32 * sectors, asked, 32 * sectors),)
    assert ideal == ceil(asked / 32)


def test_wide_accesses_and_halves_of_sectors() -> None:
    array = aligned(4096)
    wide = f"{POINTER} mad.wide.u32 %p, %lane, 16, %p; ld.global.v4.f32 {{%f0, %f1, %f2, %f3}}, [%p];"
    assert profile_ptx(wide, array, params=".param .u64 a").total.global_reads == Traffic(1, 16, 16)
    pairs = f"{POINTER} shr.u32 %x0, %lane, 1; mad.wide.u32 %p, %x0, 32, %p; ld.global.v4.f32 {{%f0, %f1, %f2, %f3}}, [%p];"
    assert profile_ptx(pairs, array, params=".param .u64 a").total.global_reads == Traffic(1, 16, 8)


def test_traffic_by_operand() -> None:
    """One request may reach several buffers; each block counts."""
    a, b = aligned(1024), aligned(64)
    body = """
ld.param.u64 %p, [a]; ld.param.u64 %q, [b]; setp.lt.u32 %go, %lane, 8; selp.b64 %p, %q, %p, %go;
mad.wide.u32 %p, %lane, 4, %p; ld.global.f32 %f0, [%p]; ld.param.u64 %q, [b]; mov.u32 %x0, %ctaid.x; mad.wide.u32 %q, %x0, 32, %q; st.global.f32 [%q+64], %f0;"""
    profile = profile_ptx(body, a, b, params=".param .u64 a, .param .u64 b", grid=3)
    assert profile.operands == (
        OperandProfile("array 0", 4096, 3 * 96, 3 * 96, 0, 0),
        OperandProfile("array 1", 256, 3 * 32, 3 * 32, 3 * 4, 3 * 32),
    )
    assert (profile.launches, profile.ctas) == (1, 3)


@pytest.mark.parametrize("checks", [True, False])
def test_asynchronous_copies(checks: bool) -> None:
    """16 bytes per lane at 32 bytes' distance in shared memory; lanes below 8 read all of them, lanes below 16 eight bytes, the others none."""
    body = f"""{POINTER}
mov.u32 %addr, s; mad.lo.u32 %addr, %lane, 32, %addr; mad.wide.u32 %p, %lane, 16, %p;
mov.u32 %x0, 0; setp.lt.u32 %go, %lane, 16; selp.b32 %x0, 8, 0, %go; setp.lt.u32 %go, %lane, 8; selp.b32 %x0, 16, %x0, %go;
cp.async.cg.shared.global [%addr], [%p], 16, %x0;
cp.async.wait_all;"""
    total = profile_ptx(body, aligned(1024), params=".param .u64 a", checks=checks).total
    assert total.shared_writes == Traffic(1, 8, 4)
    assert total.global_reads == Traffic(1, 4 + 4, 4 + 2)
    assert total.shared_reads == total.global_writes == Traffic()


def test_atomics_are_writes() -> None:
    array = aligned(32, np.int32)
    total = profile_ptx(f"{POINTER} red.global.add.s32 [%p], 1;", array, params=".param .u64 a").total
    assert (total.global_writes, total.global_reads) == (Traffic(1, 1, 1), Traffic())
    assert array[0] == 32


# --- Instructions -------------------------------------------------------------------------------------------------------------------------

CLASSES = {
    "matrix": ["mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%f0, %f1, %f2, %f3}, {%x0, %x1}, {%x2}, {%f0, %f1, %f2, %f3};"],
    "mufu": ["ex2.approx.ftz.f32 %f0, %f1;", "rcp.approx.f32 %f0, %f1;", "rsqrt.approx.f32 %f0, %f1;", "tanh.approx.f32 %f0, %f1;"],
    "float": ["fma.rn.f32 %f0, %f1, %f2, %f3;", "max.f32 %f0, %f1, %f2;", "add.rn.f16x2 %x0, %x1, %x2;"],
    "integer": ["add.s32 %x0, %x1, %x2;", "shl.b32 %x0, %x1, 2;", "setp.lt.u32 %go, %x1, 2;", "mul.wide.u32 %p, %x0, 4;"],
    "convert": ["cvt.rn.f16x2.f32 %x0, %f1, %f2;", "cvt.rn.f32.s32 %f0, %x0;", "cvt.u64.u32 %q, %x0;"],
    "shared": ["st.shared.b32 [s], %x0;", "ld.shared.b32 %x0, [s];", "atom.shared.add.u32 %x0, [s], 1;"],
    "local": ["st.local.b32 [l], %x0;", "ld.local.b32 %x0, [l];"],
    "global": [
        "ld.global.b32 %x0, [%a];",
        "st.global.b32 [%a], %x0;",
        "red.global.add.u32 [%a], 1;",
        "cp.async.ca.shared.global [s], [%a], 4;",
    ],
    "move": ["mov.u32 %x0, 1;", "shfl.sync.bfly.b32 %x0, %x1, 1, 31, 0xffffffff;", "ld.param.u64 %a, [a];", "mov.b64 %q, {%x0, %x1};"],
    "control": ["bar.sync 0;", "bar.warp.sync 0xffffffff;", "membar.gl;", "cp.async.wait_all;", "bra NEXT;\nNEXT:", "nop;"],
}  # fmt: skip


def test_classes_of_instructions() -> None:
    """All lanes of one warp do the same, unchecked, for they race in shared memory."""
    setup = ".reg .b64 %a; .local .align 4 .b8 l[4]; ld.param.u64 %a, [a];"
    body = "\n".join([setup, *(instruction for instructions in CLASSES.values() for instruction in instructions)])
    profile = profile_ptx(body, aligned(32, np.int32), params=".param .u64 a", checks=False)
    expected = Counter({name: len(instructions) for name, instructions in CLASSES.items()})
    expected += Counter({"move": 2, "control": 1})  # %laneid and %a; ret
    assert {name: count for name, count in profile.total.instructions.items() if count} == expected
    assert profile.total.issued == expected.total()


def test_matrix_operations() -> None:
    body = (
        "mov.f32 %f0, 0f00000000; mov.f32 %f1, %f0; mov.f32 %f2, %f0; mov.f32 %f3, %f0; mov.b32 %x0, 0; mov.b32 %x1, 0; mov.b32 %x2, 0;\n"
    )
    profile = profile_ptx(body + 5 * (CLASSES["matrix"][0] + "\n"), block=96, grid=2)
    assert profile.total.instructions["matrix"] == 5 * 3 * 2
    assert profile.total.matrix_flops == 5 * 3 * 2 * 2 * 16 * 8 * 8


# --- Lines --------------------------------------------------------------------------------------------------------------------------------

LINES = """
__device__ __forceinline__ float twice(const float* p, int i) {
  float x = p[i];
  return x + x;
}
__device__ __forceinline__ float outer(const float* p, int i) {
  return twice(p, i);
}
extern "C" __global__ void kernel(float* out, const float* in, int count) {
  float sum = 0.0f;
#pragma unroll 1
  for (int i = 0; i < count; ++i)
    sum += outer(in, threadIdx.x + 32 * i);
  __syncthreads();
  out[blockIdx.x * blockDim.x + threadIdx.x] = sum;
}
"""


def line_of(text: str) -> int:
    return next(number for number, line in enumerate(LINES.split("\n"), 1) if text in line)


def test_lines_of_inlined_functions() -> None:
    out, values = aligned(64), aligned(64 * 32)
    profile, counters = run(compile_cuda(LINES), out, values, 7, block=64, source=LINES)
    own = {line.line: line.counts for line in profile.lines}
    kernel = {line.line: line.counts for line in profile.kernel_lines}
    assert {line.path.rpartition("/")[2] for line in profile.lines} == {"test.cu"}
    assert own[line_of("p[i]")].global_reads == Traffic(2 * 7, 2 * 7 * 4, 2 * 7 * 4)
    assert own[line_of("x + x")].instructions["float"] == 2 * 7
    assert own[line_of("sum += outer")].instructions["float"] == 2 * 7
    assert line_of("p[i]") not in kernel
    assert line_of("return twice") not in kernel
    assert kernel[line_of("sum += outer")].global_reads == own[line_of("p[i]")].global_reads
    assert kernel[line_of("sum += outer")].instructions["float"] == 2 * 7 * 2
    assert kernel[line_of("] = sum;")].global_writes == own[line_of("] = sum;")].global_writes == Traffic(2, 8, 8)
    for lines in (profile.lines, profile.kernel_lines):
        assert sum(line.counts.issued for line in lines) == profile.total.issued == counters.warp_instructions
    assert profile.lines_by("innermost") == profile.lines
    assert profile.lines_by("kernel") == profile.kernel_lines


def test_instructions_without_a_line() -> None:
    profile = profile_ptx("nop;")
    assert [(line.path, line.line, line.counts.issued) for line in profile.lines] == [("", 0, 3)]


# --- Waits --------------------------------------------------------------------------------------------------------------------------------

BARRIERS = """
extern "C" __global__ void kernel(int* out, int count) {
#pragma unroll 1
  for (int i = 0; i < count; ++i)
    __syncthreads();
  out[blockIdx.x * blockDim.x + threadIdx.x] = 1;
}
"""


@pytest.mark.parametrize("schedule", ["late", "random"])
@pytest.mark.parametrize("warps", [1, 2, 5])
def test_all_but_the_last_warp_wait_at_a_barrier(warps: int, schedule: str) -> None:
    out = aligned(32 * warps, np.int32)
    profile, counters = run(compile_cuda(BARRIERS), out, 6, block=32 * warps, schedule=schedule, seed=3)
    assert profile.total.waits == 6 * (warps - 1)
    assert counters.barriers == 6
    assert {line.line for line in profile.lines if line.counts.waits} == ({5} if warps > 1 else set())


# --- Collecting ---------------------------------------------------------------------------------------------------------------------------


def test_launches_and_kernels_add_up() -> None:
    out = aligned(128, np.int32)
    buffers = [(out.ctypes.data, out.nbytes, "out")]
    module, other = Module(compile_cuda(BARRIERS)), Module(compile_cuda(BARRIERS.replace("= 1", "= 2")))
    with simulator.profile() as profile:
        for launched in (module, other, module):
            launched.launch((2, 1, 1), (64, 1, 1), 0, pack([out, 4]), buffers)
    module.launch((2, 1, 1), (64, 1, 1), 0, pack([out, 4]), buffers)  # not within
    first, second = profile.kernels
    assert (first.launches, first.ctas, second.launches, second.ctas) == (2, 4, 1, 2)
    assert first.total.issued == 2 * second.total.issued
    assert first.total.waits == 2 * second.total.waits == 2 * 2 * 4
    assert first.operands[0].bytes_written == 2 * 2 * 256
    assert json.loads(json.dumps(profile.to_json()))[1]["total"]["instructions"] == second.total.instructions


def test_counts_depend_neither_on_threads_nor_on_checks() -> None:
    def counted(**options: Any) -> tuple[KernelProfile, Counters]:
        return run(compile_cuda(LINES), aligned(9 * 64), aligned(64 * 32), 7, block=64, grid=9, **options)

    expected = counted()
    assert counted(threads=3) == counted(checks=False) == expected
    assert counted(schedule="early") == expected


def test_a_launch_that_fails_is_not_counted() -> None:
    profile = Profile()
    with pytest.raises(SimulatorError, match="global-bounds"):
        Module(compile_cuda(BARRIERS)).launch((1, 1, 1), (32, 1, 1), 0, pack([aligned(4), 1]), [], Options(profile=profile))
    assert profile.kernels == ()


# --- Endless loops ------------------------------------------------------------------------------------------------------------------------

ENDLESS = """
extern "C" __global__ void kernel(volatile int* flag) {
  while (*flag == 0)
    ;
}
"""


@pytest.mark.parametrize("schedule", ["late", "random"])
def test_an_endless_loop_is_reported(schedule: Any) -> None:
    flag = aligned(1, np.int32)
    module = Module(compile_cuda(ENDLESS), sources={"test.cu": PRELUDE + ENDLESS})
    buffers = [(flag.ctypes.data, 4, "flag")]
    with pytest.raises(SimulatorError, match=r"\[endless-loop\] a warp has executed 100000 instructions[\s\S]*while \(\*flag == 0\)"):
        module.launch((1, 1, 1), (64, 1, 1), 0, pack([flag]), buffers, Options(max_instructions=100_000, schedule=schedule))
    flag[0] = 1
    module.launch((1, 1, 1), (64, 1, 1), 0, pack([flag]), buffers, Options(max_instructions=100, schedule=schedule))


def test_max_instructions_is_positive() -> None:
    with pytest.raises(OptionError, match="max_instructions"):
        Options(max_instructions=0)
