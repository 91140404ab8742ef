"""The mutation engine: which instructions it changes and how, and that the simulator's checks notice every mutant of small kernels."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from simulated import PRELUDE, Array, compile_cuda, pack

from cuflash.errors import SimulatorError
from cuflash.simulator import Module, Options
from cuflash.simulator.mutation import Mutant, mutants

# A hand-written kernel that executes nothing sensible: every synchronising instruction in every form, on sm_90a.
EVERYTHING = """.version 8.3
.target sm_90a
.address_size 64
.visible .entry everything(.param .u64 unused)
{
.reg .b32 %count; .reg .b64 %state; .reg .pred %p, %q;
.shared .align 8 .b8 bar[8];
mov.u32 %count, 1; setp.eq.u32 %q, %count, 1; // bar.sync 0;
/* mbarrier.inval.shared.b64 [bar]; */
"""

FORMS: list[tuple[str, list[tuple[str, str]]]] = [
    ("bar.sync 0;", [("deleted", ""), ("of the warp only", "bar.warp.sync -1;")]),
    ("@!%q barrier.sync.aligned 1, 64;", [
        ("deleted", ""), ("of the warp only", "@!%q bar.warp.sync -1;"),
        ("-32 threads", "@!%q barrier.sync.aligned 1, 32;"), ("+32 threads", "@!%q barrier.sync.aligned 1, 96;"),
    ]),
    ("bar.arrive 2, 32;", [("deleted", ""), ("+32 threads", "bar.arrive 2, 64;")]),
    ("bar.arrive 2, %count;", [
        ("deleted", ""),
        ("-32 threads", "{ .reg .b32 %mutated; add.s32 %mutated, %count, -32; bar.arrive 2, %mutated; }"),
        ("+32 threads", "{ .reg .b32 %mutated; add.s32 %mutated, %count, 32; bar.arrive 2, %mutated; }"),
    ]),
    ("bar.warp.sync 0xffffffff;", [("deleted", "")]),
    ("cp.async.commit_group;", [("deleted", "")]),
    ("cp.async.wait_all;", [("deleted", "")]),
    ("cp.async.wait_group 1;", [("deleted", ""), ("+1 groups in flight", "cp.async.wait_group 2;")]),
    ("cp.async.bulk.commit_group;", [("deleted", "")]),
    ("cp.async.bulk.wait_group 0;", [
        ("deleted", ""), ("+1 groups in flight", "cp.async.bulk.wait_group 1;"),
        ("waits until sources are read only", "cp.async.bulk.wait_group.read 0;"),
    ]),
    ("cp.async.bulk.wait_group.read 0;", [("deleted", ""), ("+1 groups in flight", "cp.async.bulk.wait_group.read 1;")]),
    ("wgmma.fence.sync.aligned;", [("deleted", "")]),
    ("wgmma.commit_group.sync.aligned;", [("deleted", "")]),
    ("wgmma.wait_group.sync.aligned 0;", [("deleted", ""), ("+1 groups in flight", "wgmma.wait_group.sync.aligned 1;")]),
    ("fence.proxy.async.shared::cta;", [("deleted", "")]),
    ("fence.mbarrier_init.release.cluster;", [("deleted", "")]),
    ("membar.cta;", [("deleted", "")]),
    ("mbarrier.init.shared.b64 [bar], 1;", [("deleted", ""), ("+1 arrivals", "mbarrier.init.shared.b64 [bar], 2;")]),
    ("mbarrier.inval.shared.b64 [bar];", [("deleted", "")]),
    ("mbarrier.arrive.shared.b64 %state, [bar];", [("deleted", "mov.b64 %state, 0;")]),
    ("@%q mbarrier.arrive.expect_tx.shared.b64 _, [bar], 64;", [
        ("deleted", ""),
        ("-16 bytes", "@%q mbarrier.arrive.expect_tx.shared.b64 _, [bar], 48;"),
        ("+16 bytes", "@%q mbarrier.arrive.expect_tx.shared.b64 _, [bar], 80;"),
    ]),
    ("mbarrier.arrive.shared::cluster.b64 _, [bar], 2;", [
        ("deleted", ""),
        ("-1 arrivals", "mbarrier.arrive.shared::cluster.b64 _, [bar], 1;"),
        ("+1 arrivals", "mbarrier.arrive.shared::cluster.b64 _, [bar], 3;"),
    ]),
    ("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [bar], %count;", [
        ("deleted", ""),
        ("-16 bytes", "{ .reg .b32 %mutated; add.s32 %mutated, %count, -16; mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [bar], %mutated; }"),
        ("+16 bytes", "{ .reg .b32 %mutated; add.s32 %mutated, %count, 16; mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [bar], %mutated; }"),
    ]),
    ("mbarrier.test_wait.shared.b64 %p, [bar], %state;", [("deleted", "setp.eq.u32 %p, 0, 0;")]),
    ("mbarrier.try_wait.parity.shared.b64 %p, [bar], 1, 1000;", [
        ("deleted", "setp.eq.u32 %p, 0, 0;"), ("other parity", "mbarrier.try_wait.parity.shared.b64 %p, [bar], 0, 1000;"),
    ]),
    ("mbarrier.try_wait.parity.shared.b64 %p, [bar], %count;", [
        ("deleted", "setp.eq.u32 %p, 0, 0;"),
        ("other parity", "{ .reg .b32 %mutated; xor.b32 %mutated, %count, 1; mbarrier.try_wait.parity.shared.b64 %p, [bar], %mutated; }"),
    ]),
    ("cp.async.mbarrier.arrive.noinc.shared.b64 [bar];", [("deleted", ""), ("without .noinc", "cp.async.mbarrier.arrive.shared.b64 [bar];")]),
    ("cp.async.mbarrier.arrive.shared.b64 [bar];", [("deleted", ""), ("with .noinc", "cp.async.mbarrier.arrive.noinc.shared.b64 [bar];")]),
    ("barrier.cluster.arrive.release.aligned;", [("deleted", ""), ("without release", "barrier.cluster.arrive.relaxed.aligned;")]),
    ("barrier.cluster.arrive;", [("deleted", ""), ("without release", "barrier.cluster.arrive.relaxed;")]),
    ("barrier.cluster.wait.acquire.aligned;", [("deleted", "")]),
]  # fmt: skip

OTHERS = [
    "shfl.sync.bfly.b32 %count, %count, 1, 31, -1;", "vote.sync.any.pred %p, %q, -1;", "bar.red.or.pred %p, 0, %q;", "setmaxnreg.inc.sync.aligned.u32 240;",
    "cp.async.ca.shared.global [bar], [%state], 8;", "mbarrier.pending_count.b64 %count, %state;",
]  # fmt: skip


@pytest.mark.parametrize(("form", "changes"), FORMS, ids=[form for form, _ in FORMS])
def test_every_form(form: str, changes: list[tuple[str, str]]) -> None:
    found = list(mutants(EVERYTHING + form + " ret; }"))
    assert [mutant.change for mutant in found] == [change for change, _ in changes]
    for mutant, (change, replacement) in zip(found, changes, strict=True):
        assert mutant.instruction == form
        assert mutant.ptx == f"{EVERYTHING}/* {form} {change} */ {replacement} ret; }}"
        assert mutant.source == ()


@pytest.mark.parametrize("instruction", OTHERS)
def test_what_is_no_synchronisation(instruction: str) -> None:
    assert list(mutants(EVERYTHING + instruction + " ret; }")) == []


def test_mutants_are_valid_ptx(tmp_path: Path) -> None:
    ptxas = shutil.which("ptxas")
    if ptxas is None:
        pytest.skip("needs ptxas")
    text = EVERYTHING + "\n".join(form for form, _ in FORMS) + "\nret; }\n"
    modules = [text, *(mutant.ptx for mutant in mutants(text))]
    for number, module in enumerate(modules):  # one file each would take a process each: all in one, under different names
        modules[number] = module[module.index(".visible") :].replace("everything", f"everything{number}")
    header = EVERYTHING[: EVERYTHING.index(".visible")]
    file = tmp_path / "mutants.ptx"
    file.write_text(header + "\n".join(modules))
    done = subprocess.run([ptxas, "-arch=sm_90a", str(file), "-o", str(tmp_path / "mutants.cubin")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# --- Small kernels, and what catches their mutants ----------------------------------------------------------------------------------------


def caught(mutant: Mutant, *inputs: Array, want: Array, block: int, source: str) -> str:
    """The check that stops a mutant, "result" when it writes something else than `want`, or "" when it survives."""
    module, out = Module(mutant.ptx, sources={"test.cu": PRELUDE + source}, keep=False), np.empty_like(want)
    buffers = [(array.ctypes.data, array.nbytes, "array") for array in (*inputs, out)]
    for options in (Options(1, "late"), *(Options(1, "random", seed) for seed in range(5)), Options(1, "early")):
        out[...] = 0
        try:
            module.launch((1, 1, 1), (block, 1, 1), 0, pack((*inputs, out)), buffers, options)
        except SimulatorError as error:
            return error.check or str(error)
        if not (out == want).all():
            return "result"
    return ""


def table(source: str, *inputs: Array, want: Array, block: int, arch: str = "compute_80") -> dict[tuple[str, str, int], set[str]]:
    """(instruction, change, line) -> what caught its mutants."""
    found: dict[tuple[str, str, int], set[str]] = {}
    for mutant in mutants(compile_cuda(source, arch)):
        key = mutant.instruction.rstrip(";"), mutant.change, mutant.source[-1][1]
        found.setdefault(key, set()).add(caught(mutant, *inputs, want=want, block=block, source=source))
    return found


def test_a_pipeline_of_copies() -> None:
    """Each of the instructions of a correct two-stage pipeline is necessary, and each loss is a race whatever the schedule."""
    source = """extern "C" __global__ void k(const u32* in, u32* out) {
        __shared__ __align__(16) u32 tile[2][64];
        u32 to = (u32)__cvta_generic_to_shared(tile[0]) + threadIdx.x % 16 * 16, sum = 0;
        if (threadIdx.x < 16) asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" :: "r"(to), "l"(in + 4 * threadIdx.x) : "memory");
        asm volatile("cp.async.commit_group;" ::: "memory");
        #pragma unroll 1
        for (int i = 0; i < 4; ++i) {
            if (i < 3 && threadIdx.x < 16)
                asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" :: "r"(to + (i + 1) % 2 * 256), "l"(in + 64 * (i + 1) + 4 * threadIdx.x) : "memory");
            asm volatile("cp.async.commit_group;" ::: "memory");
            asm volatile("cp.async.wait_group 1;" ::: "memory");
            __syncthreads();
            sum += tile[i % 2][63 - threadIdx.x];
            __syncthreads();
        }
        out[threadIdx.x] = sum;
    }"""
    inputs = np.arange(256, dtype=np.uint32) ** 2
    want = inputs.reshape(4, 64)[:, ::-1].sum(axis=0, dtype=np.uint32)
    assert table(source, inputs, want=want, block=64) == {
        ("cp.async.commit_group", "deleted", 5): {"race"},  # nobody waits for the first tile
        ("cp.async.commit_group", "deleted", 10): {"race"},
        ("cp.async.wait_group 1", "deleted", 11): {"race"},
        ("cp.async.wait_group 1", "+1 groups in flight", 11): {"race"},
        ("bar.sync 0", "deleted", 12): {"race"},
        ("bar.sync 0", "of the warp only", 12): {"race"},
        ("bar.sync 0", "deleted", 14): {"race"},
        ("bar.sync 0", "of the warp only", 14): {"race"},
    }  # fmt: skip


def test_a_copy_that_nothing_waits_for() -> None:
    source = """extern "C" __global__ void k(const u32* in, u32* out) {
        __shared__ __align__(16) u32 tile[128];
        u32 to = (u32)__cvta_generic_to_shared(tile) + threadIdx.x * 16;
        asm volatile("cp.async.ca.shared.global [%0], [%1], 16;" :: "r"(to), "l"(in + 4 * threadIdx.x) : "memory");
        asm volatile("cp.async.wait_all;" ::: "memory");
        out[threadIdx.x] = threadIdx.x;
    }"""
    want = np.arange(32, dtype=np.uint32)
    assert table(source, np.zeros(128, np.uint32), want=want, block=32) == {("cp.async.wait_all", "deleted", 5): {"open-copy"}}


def test_named_barriers_of_a_producer_and_a_consumer() -> None:
    """A count or an arrival that is wrong is a deadlock or a barrier that cannot be; one that is missing is a race."""
    source = """extern "C" __global__ void k(u32* out) {
        __shared__ u32 slot[32];
        u32 lane = threadIdx.x % 32;
        for (u32 i = 0; i < 3; ++i) {
            if (threadIdx.x < 32) {
                asm volatile("bar.sync 1, 64;" ::: "memory");
                slot[lane] = lane * i;
                asm volatile("bar.arrive 2, 64;" ::: "memory");
            } else {
                asm volatile("bar.arrive 1, 64;" ::: "memory");
                asm volatile("bar.sync 2, 64;" ::: "memory");
                out[lane] += slot[31 - lane];
            }
        }
    }"""
    want = 3 * np.arange(32, dtype=np.uint32)[::-1].copy()
    early_read = {"uninitialized", "race"}  # of the first slot, and of the others
    assert table(source, want=want, block=64) == {
        ("bar.sync 1, 64", "deleted", 6): {"race"},
        ("bar.sync 1, 64", "of the warp only", 6): {"race"},
        ("bar.sync 1, 64", "-32 threads", 6): {"race"},
        ("bar.sync 1, 64", "+32 threads", 6): {"barrier"},
        ("bar.arrive 2, 64", "deleted", 8): {"deadlock"},
        ("bar.arrive 2, 64", "-32 threads", 8): {"barrier"},
        ("bar.arrive 2, 64", "+32 threads", 8): {"barrier"},
        ("bar.arrive 1, 64", "deleted", 10): {"deadlock"},
        ("bar.arrive 1, 64", "-32 threads", 10): {"barrier"},
        ("bar.arrive 1, 64", "+32 threads", 10): {"barrier"},
        ("bar.sync 2, 64", "deleted", 11): early_read,
        ("bar.sync 2, 64", "of the warp only", 11): early_read,
        ("bar.sync 2, 64", "-32 threads", 11): early_read,
        ("bar.sync 2, 64", "+32 threads", 11): {"barrier"},
    }


def test_lanes_that_exchange_through_shared_memory() -> None:
    source = """extern "C" __global__ void k(u32* out) {
        __shared__ u32 s[64];
        s[threadIdx.x] = threadIdx.x;
        __syncwarp();
        u32 other = s[threadIdx.x ^ 1];
        __syncwarp();
        s[threadIdx.x] = other + 1;
        __syncwarp();
        out[threadIdx.x] = s[threadIdx.x];
    }"""
    want = (np.arange(64, dtype=np.uint32) ^ 1) + 1
    assert table(source, want=want.astype(np.uint32), block=64) == {
        ("bar.warp.sync -1", "deleted", 4): {"race"},
        ("bar.warp.sync -1", "deleted", 6): {"race"},
        ("bar.warp.sync -1", "deleted", 8): {""},  # every lane reads what it wrote itself: redundant
    }


def test_unrolled_copies_of_an_instruction_are_changed_one_at_a_time() -> None:
    source = """__device__ __forceinline__ void wait() {
        asm volatile("bar.sync 0;" ::: "memory");
    }
    extern "C" __global__ void k(u32* out) {
        __shared__ u32 s[64];
        #pragma unroll
        for (int i = 0; i < 3; ++i) {
            s[threadIdx.x] = i;
            wait();
            out[threadIdx.x] += s[63 - threadIdx.x];
            wait();
        }
    }"""
    found = [mutant for mutant in mutants(compile_cuda(source)) if mutant.change == "deleted"]
    assert len(found) == 6
    assert len({mutant.statement for mutant in found}) == 6
    lines = [[(Path(path).name, line) for path, line in mutant.source] for mutant in found]
    assert lines == [[("test.cu", 2), ("test.cu", 9)], [("test.cu", 2), ("test.cu", 11)]] * 3
    results = [caught(mutant, want=np.full(64, 3, np.uint32), block=64, source=source) for mutant in found]
    assert results == ["uninitialized", "race", "race", "race", "race", ""]  # nothing follows the last
