"""`cuflash.timing`: reading control codes, loops and steady-state traces out of compiled kernels whose instructions can be counted by hand."""

from __future__ import annotations

import struct
from collections import Counter
from pathlib import Path

import pytest

from cuflash.cli import samples
from cuflash.errors import UnsupportedError
from cuflash.hardware import device
from cuflash.jit import cache, disassembly
from cuflash.jit.compiler import CompileRequest
from cuflash.planning import planner
from cuflash.problem.tile import Tile
from cuflash.timing import control_flow, machine, prediction, sass
from cuflash.timing.multiprocessor import STEADY_TRIPS, WARMING, steady_clocks_of_roles
from cuflash.timing.sass import Function

pytest.importorskip("cupy")
pytestmark = pytest.mark.skipif(disassembly.find_nvdisasm() is None, reason=disassembly.NVDISASM_HINT)

LOOPS = """
__device__ __forceinline__ void product(float (&c)[4], const unsigned (&a)[4], unsigned b) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b), "r"(b));
}
__device__ __forceinline__ float exponential(float x) {
    float y;
    asm volatile("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ void load(unsigned (&a)[4], unsigned address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
        : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3]) : "r"(address));
}

// In each trip of the loop over tiles: 1 barrier, 1 copy, 5 trips of an inner loop with 1 load and 2 products, 3 more products, 3 exponentials.
// Masks and the other way of copying are the exception.
extern "C" __global__ void __launch_bounds__(128) tiles(float* out, const float* in, int count, int masked, int copies) {
    extern __shared__ float staged[];
    const unsigned shared = (unsigned)__cvta_generic_to_shared(staged);
    float c[4] = {}, d[4] = {};
    unsigned a[4] = {1, 2, 3, 4};
    for (int j = 0; j < count; ++j) {
        __syncthreads();
        if (copies) {
            asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" : : "r"(shared + 16 * threadIdx.x), "l"(in + 4 * threadIdx.x + 512 * j));
        } else {
#pragma unroll 1
            for (int i = 0; i < copies + 7; ++i) staged[i * 128 + threadIdx.x] = in[i * 129 * j + threadIdx.x];
        }
        asm volatile("cp.async.commit_group;");
#pragma unroll 1
        for (int k = 0; k < 5; ++k) {
            load(a, shared + 512 * k);
            product(c, a, a[0] ^ k);
            product(d, a, a[1] ^ k);
        }
        if (j >= masked) {
            for (int i = 0; i < 4; ++i) c[i] = threadIdx.x + i > j ? -1e30f : c[i];
        }
        for (int i = 0; i < 3; ++i) d[i] += exponential(c[i]);
        for (int i = 0; i < 3; ++i) product(d, a, 17 + i);
    }
    for (int i = 0; i < 4; ++i) out[threadIdx.x * 4 + i] = c[i] + d[i];
}

// 4 products and an exponential in each trip, and 4 exponentials more where any lane asks for them.
extern "C" __global__ void rarely(float* out, int count, float limit) {
    float c[4] = {}, d[4] = {};
    unsigned a[4] = {1, 2, 3, 4};
#pragma unroll 1
    for (int j = 0; j < count; ++j) {
        __syncthreads();
        for (int i = 0; i < 4; ++i) product(c, a, j + i);
        if (__any_sync(0xffffffffu, c[0] > limit)) {
            for (int i = 0; i < 4; ++i) d[i] = exponential(c[i]) + d[i] * c[i];
        }
        d[0] += exponential(c[1]);
    }
    for (int i = 0; i < 4; ++i) out[threadIdx.x * 4 + i] = c[i] + d[i];
}

extern "C" __global__ void straight(float* out) { out[threadIdx.x] *= 2.0f; }

// 6 trips of an outer loop, each with 4 of an inner one that multiplies and adds once.
extern "C" __global__ void counted(float* out, float x) {
    float y = out[threadIdx.x];
#pragma unroll 1
    for (int i = 0; i < 6; ++i) {
#pragma unroll 1
        for (int j = 3; j < 15; j += 3) y = y * x + 1.0f;
        y = exponential(y);
    }
    out[threadIdx.x] = y;
}
"""


@pytest.fixture(scope="module", params=["sm_80", "sm_90a", "sm_120a"])
def cubin(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("kernels")
    (folder / "loops.cu").write_text(LOOPS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUFLASH_KERNELS_DIR", str(folder))
        patch.setenv("CUFLASH_CACHE_DIR", str(folder / "cache"))
        cache.reset_memory()
        data = cache.fetch(CompileRequest("loops.cu", "", str(request.param), "cubin")).data
    cache.reset_memory()
    return data


@pytest.fixture(scope="module")
def functions(cubin: bytes) -> dict[str, Function]:
    return sass.read_functions(cubin)


def section(cubin: bytes, name: str) -> bytes:
    """A section of an ELF file of 64 bits."""
    table, size, count, names_index = struct.unpack_from("<Q", cubin, 0x28)[0], *struct.unpack_from("<HHH", cubin, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", cubin, table + index * size) for index in range(count)]
    names = headers[names_index][4]
    for offset, _, _, _, start, length in headers:
        if cubin[names + offset : cubin.index(b"\0", names + offset)].decode() == name:
            return cubin[start : start + length]
    raise KeyError(name)


@pytest.mark.parametrize("name", ["tiles", "straight", "counted"])
def test_control_codes_are_those_in_the_file(cubin: bytes, functions: dict[str, Function], name: str) -> None:
    """What the listing says of every instruction is in the upper half of its 16 bytes in the cubin."""
    code = section(cubin, f".text.{name}")
    assert len(code) == sass.INSTRUCTION_BYTES * len(functions[name])
    for index, instruction in enumerate(functions[name]):
        assert instruction.address == 16 * index
        assert instruction.control == sass.decode_control(struct.unpack_from("<Q", code, 16 * index + 8)[0])


def test_reuse_is_where_the_listing_prints_it(functions: dict[str, Function]) -> None:
    """nvdisasm prints one bit field of the control code, `.reuse` behind operands; the field's place fixes that of the others."""
    assert any(instruction.control.reuse for function in functions.values() for instruction in function)
    for instruction in (instruction for function in functions.values() for instruction in function):
        assert bool(instruction.control.reuse) == (".reuse" in instruction.operands), instruction


def test_what_is_loaded_is_waited_for(functions: dict[str, Function]) -> None:
    """A load from shared memory signals a scoreboard, and the product that takes its result waits for the same."""
    tiles = functions["tiles"]
    load = next(index for index, instruction in enumerate(tiles) if instruction.base == "LDSM")
    product = next(index for index in range(load, len(tiles)) if tiles[index].base == "HMMA")
    assert tiles[load].control.write_scoreboard is not None
    assert any(tiles[load].control.write_scoreboard in tiles[index].control.waits for index in range(load + 1, product + 1))
    assert all(1 <= instruction.control.stall <= 15 for instruction in tiles if instruction.base in ("HMMA", "FADD", "FFMA"))


def test_fields_of_a_control_code() -> None:
    high = 5 << 41 | 1 << 45 | 2 << 46 | 7 << 49 | 0b100001 << 52 | 0b0010 << 58
    assert sass.decode_control(high) == sass.Control(5, False, 2, None, (0, 5), 2)


def test_branches_know_their_targets(functions: dict[str, Function]) -> None:
    for function in functions.values():
        for instruction in function:
            if instruction.base == "BRA":
                assert instruction.target is not None


def counts(trace: control_flow.Trace) -> Counter[str]:
    return Counter(instruction.base for instruction in trace.instructions)


def test_the_steady_state_of_a_loop_over_tiles(functions: dict[str, Function]) -> None:
    """Inner trips are counted, copies are made, masks and the other way of copying are left out."""
    function = functions["tiles"]
    loop = control_flow.tile_loop(function)
    assert loop.trips is None
    assert [inner.trips for inner in control_flow.find_loops(function) if loop.holds(inner) and control_flow.find_loops(function)].count(
        5
    ) == 1
    trace = control_flow.steady_trace(function, loop)
    found = counts(trace)
    assert trace.num_matrix == found["HMMA"] == 5 * 2 + 3
    assert found["MUFU"] == 3
    assert found["LDSM"] == 5
    assert found["LDGSTS"] == found["LDGDEPBAR"] == found["BAR"] == 1
    assert found["STS"] == found["FSEL"] == 0
    assert control_flow.steady_trace(function, loop, expected_matrix=999) == trace, "counters decide before expectations"
    assert function[trace.indices[-1]].target == loop.head


def test_a_masked_tile_takes_the_path_that_looks_at_pairs(functions: dict[str, Function]) -> None:
    """The same work, and four comparisons more, or what selects by them; copies are made all the same."""
    function = functions["tiles"]
    loop = control_flow.tile_loop(function)
    plain, masked = control_flow.steady_trace(function, loop), control_flow.steady_trace(function, loop, masked=True)
    assert counts(masked)["ISETP"] >= counts(plain)["ISETP"] + 4
    assert counts(masked)["FSEL"] >= 4
    for base in ("HMMA", "MUFU", "LDSM", "LDGSTS", "BAR"):
        assert counts(masked)[base] == counts(plain)[base], base


def test_what_any_lane_of_a_warp_may_ask_for_is_rare(functions: dict[str, Function]) -> None:
    """It has most exponentials, but stands behind a vote."""
    function = functions["rarely"]
    trace = control_flow.steady_trace(function, control_flow.tile_loop(function))
    assert sum(instruction.base == "MUFU" for instruction in function) == 5
    assert (counts(trace)["HMMA"], counts(trace)["MUFU"], counts(trace)["VOTE"]) == (4, 1, 1)


def test_loops_that_are_counted(functions: dict[str, Function]) -> None:
    outer, inner = control_flow.find_loops(functions["counted"])[:2]
    assert (outer.trips, inner.trips) == (6, 4)
    assert outer.holds(inner)
    assert not inner.holds(outer)
    found = counts(control_flow.steady_trace(functions["counted"], outer))
    assert (found["FFMA"], found["MUFU"]) == (4, 1)
    assert counts(control_flow.steady_trace(functions["counted"], inner))["FFMA"] == 1


def test_a_tile_that_raises_no_reference_shuffles_nothing() -> None:
    # All lanes vote with what they hold: the largest score of a row is found where a reference rises, behind a branch.
    problem = samples.plan_of(samples.Sample(seqlen_q=1024, seqlen_kv=1024, head_dim=64, dtype="float16")).problem
    plan = planner.make_plan(problem, device.of_arch("sm_80", "gpu"))
    (kernel,) = plan.kernels
    _, function = prediction.compiled(kernel, plan.device, causal=False)
    trace = control_flow.steady_trace(function, control_flow.tile_loop(function))
    kinds = Counter(of.opcode.split(".")[0] for of in trace.instructions)
    assert kinds["VOTE"] == 1
    assert kinds["HMMA"] == 2 * (64 // 16) * (kernel.tile.tile_kv // 8) * 2  # two products of 32 rows of a warp, its keys and 64 columns
    assert not kinds["SHFL"]
    assert any(of.opcode.startswith("SHFL") for of in function)


def of(opcode: str, target: int | None = None, operands: str = "R4, R5", predicate: str = "") -> sass.Instruction:
    """An instruction that waits for nothing; `target` is the index of another."""
    return sass.Instruction(0, predicate, opcode, operands, target, sass.decode_control(1 << 41 | 7 << 46 | 7 << 49))


def test_unknown_trips_follow_from_the_products() -> None:
    """A loop of one product and a bound in a register, within a loop with one more: six products are five trips."""
    code = (
        of("MOV"), of("HMMA.16816.F32"), of("ISETP.NE.AND", operands="P0, PT, R2, R3, PT"), of("BRA", 1, predicate="P0"), of("HMMA.16816.F32"),
        of("MUFU.EX2"), of("BRA", 0, predicate="P1"), of("EXIT"),
    )  # fmt: skip
    loop = control_flow.tile_loop(code)
    assert (loop.head, loop.last) == (0, 6)
    assert control_flow.steady_trace(code, loop).num_matrix == 2
    assert control_flow.steady_trace(code, loop, expected_matrix=6).num_matrix == 6


@pytest.mark.parametrize(("store", "is_taken"), [("STG.E", False), ("STG.E.64", True), ("STG.E.128", True)])
def test_outputs_are_moved_to_memory_in_few_tiles(store: str, is_taken: bool) -> None:
    """A way with an exponential and a store of single numbers is not the steady one, though it has more work; large stores say nothing of the kind."""
    code = (
        of("HMMA.16816.F32"), of("BRA", 4, predicate="P0"), of(store), of("MUFU.EX2"), of("MUFU.EX2"), of("BRA", 0, predicate="P1"), of("EXIT"),
    )  # fmt: skip
    found = counts(control_flow.steady_trace(code, control_flow.tile_loop(code)))
    assert (found["STG"], found["MUFU"]) == ((1, 2) if is_taken else (0, 1))


def test_results_that_every_tile_stores_are_counted() -> None:
    code = (of("HMMA.16816.F32"), of("STG.E"), of("MUFU.EX2"), of("BRA", 0, predicate="P1"), of("EXIT"))
    assert counts(control_flow.steady_trace(code, control_flow.tile_loop(code)))["STG"] == 1


@pytest.mark.parametrize(("comparison", "predicate"), [("EQ", "P0"), ("NE", "!P0")])
def test_a_loop_that_is_left_by_a_jump_like_a_call(comparison: str, predicate: str) -> None:
    """The condition stands at the way out, and the branch back has none: five trips with a product each, then an exponential."""
    code = (
        of("MOV", operands="R2, 0x0"), of("HMMA.16816.F32"), of("IADD3", operands="R2, R2, 0x1, RZ"),
        of(f"ISETP.{comparison}.AND", operands="P0, PT, R2, 0x5, PT"), of("CALL.REL.NOINC", 6, "`(.L_1)", predicate), of("BRA", 1),
        of("MUFU.EX2"), of("BRA", 0, predicate="P1"), of("EXIT"),
    )  # fmt: skip
    outer, inner = control_flow.find_loops(code)
    assert (outer.head, outer.last, inner.head, inner.last, inner.trips) == (0, 7, 1, 5, 5)
    found = counts(control_flow.steady_trace(code, outer))
    assert (found["HMMA"], found["MUFU"]) == (5, 1)


def test_a_loop_that_a_warp_counts_by_its_lanes() -> None:
    """From an unknown number below the step, which is copied on the way: the first lane has eight trips, all others as many or fewer."""
    for start, step, trips in (("R9", "0x20", 8), ("R9", "0x10", None), ("0xe0", "0x20", 1)):
        code = (
            of("MUFU.EX2"), of("MOV", operands=f"R4, {start}"),
            of("ISETP.GE.AND", operands="P1, PT, R4.reuse, 0xe0, PT"), of("VIADD", operands=f"R16, R4, {step}"),
            of("LOP3.LUT", operands="R4, R5.reuse, 0x7, R6, 0x78, !PT"), of("STG.E.128"), of("MOV", operands="R4, R16"), of("BRA", 2, predicate="!P1"),
            of("BRA", 0, predicate="P2"), of("EXIT"),
        )  # fmt: skip
        outer, inner = control_flow.find_loops(code)
        assert inner.trips == trips
        assert counts(control_flow.steady_trace(code, outer, stores=True))["STG"] == (trips or 1)


def test_a_jump_like_a_call_goes_around_what_is_behind_it() -> None:
    """What stands between the jump and its target is not on the way; a call without a condition is no jump."""
    behind = (of("BAR.SYNC"), of("MUFU.EX2"), of("STG.E"), of("MUFU.EX2"), of("BRA", 0, predicate="P1"), of("EXIT"))
    jump = (of("HMMA.16816.F32"), of("CALL.REL.NOINC", 5, "`(.L_1)", "P0"), *behind)
    found = counts(control_flow.steady_trace(jump, control_flow.tile_loop(jump)))
    assert (found["BAR"], found["STG"], found["MUFU"]) == (0, 0, 1)
    call = (of("HMMA.16816.F32"), of("CALL.REL.NOINC", 5, "`(.L_1)"), *behind)
    found = counts(control_flow.steady_trace(call, control_flow.tile_loop(call)))
    assert (found["BAR"], found["STG"], found["MUFU"]) == (1, 1, 2)


def test_long_runs_of_the_model_agree() -> None:
    """How the warps of two blocks stand to each other settles in some tens of trips: this loop looked 14 % faster than it is in three of them."""
    sample = samples.Sample(1, 1024, 1024, 1, 1, head_dim=64, dtype="float16", is_causal=True)
    problem = samples.plan_of(sample).problem
    plan = planner.make_plan(problem, device.of_arch("sm_90", "gpu"), tile={"forward": Tile(128, 112, 4, 1)})
    (kernel,) = plan.kernels
    described, function = prediction.compiled(kernel, plan.device, causal=True)
    long = prediction.predict_kernel(function, described, limits=False, trips=STEADY_TRIPS, warming=WARMING)
    shorter = steady_clocks_of_roles(
        long.roles, machine.multiprocessor("sm_90"), blocks=long.blocks, trips=STEADY_TRIPS - 32, warming=WARMING - 16
    )
    assert shorter == pytest.approx(long.clocks, rel=0.02)


def test_code_without_loops_is_refused(functions: dict[str, Function]) -> None:
    straight = tuple(
        instruction for instruction in functions["straight"] if instruction.base != "BRA"
    )  # behind the end stands a branch to itself
    with pytest.raises(UnsupportedError, match="a loop over tiles"):
        control_flow.tile_loop(straight)


def test_without_nvdisasm_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from cuflash.errors import SetupError

    monkeypatch.setattr(disassembly, "find_nvdisasm", lambda: None)
    with pytest.raises(SetupError, match=r"pip install 'cuflash\[inspect\]'"):
        sass.read_functions(b"")


def test_what_is_no_cubin_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="nvdisasm cannot read"):
        sass.read_functions(b"not an ELF file")
