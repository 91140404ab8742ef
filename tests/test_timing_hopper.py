"""`cuflash.timing` on Hopper's own instructions: warps of several roles, the tensor unit's queue, bulk copies, mbarriers, and what is read of them out of a kernel."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cuflash.cli.samples import Sample, plan_of
from cuflash.errors import UnsupportedError
from cuflash.hardware import device
from cuflash.jit import disassembly
from cuflash.planning import planner
from cuflash.planning.kernel_plan import UNSHARED, KernelPlan
from cuflash.planning.plan import Plan
from cuflash.problem.tile import Tile
from cuflash.timing import control_flow, prediction, roles, sass
from cuflash.timing.addresses import constants
from cuflash.timing.limits import without
from cuflash.timing.machine import CARDS, MULTIPROCESSORS
from cuflash.timing.multiprocessor import steady_clocks_of_roles
from cuflash.timing.operations import Kind, Operation, Role, Unit, busy_clocks_of_block, operations
from cuflash.timing.roles import Act, Meeting, meeting_points, role_traces
from cuflash.timing.staying import single_tile_traces
from cuflash.timing.tensor_unit import Group, TensorUnit

H100 = MULTIPROCESSORS["sm_90"]
UNITS = H100.warpgroups
assert UNITS is not None
PLAIN = Operation(
    Kind.PLAIN, None, clocks=0.0, latency=0.0, wavefronts=0.0, l2_bytes=0.0, stall=1.0, write_scoreboard=None, read_scoreboard=None, waits=()
)  # fmt: skip
PRODUCT = replace(PLAIN, kind=Kind.PRODUCT, unit=Unit.MATRIX, clocks=64.0, matrix=True)
LAST = replace(PRODUCT, closes=True)
PRODUCTS_WAIT = replace(PLAIN, kind=Kind.PRODUCTS_WAIT)
FULL, EMPTY = 16, 32


def wait(barrier: int, **of: object) -> list[Operation]:
    """A wait for a phase, and what goes on behind it."""
    meeting = Meeting(Act.WAIT, barrier, **of)  # type: ignore[arg-type]
    return [replace(PLAIN, kind=Kind.PHASE, meeting=meeting, latency=UNITS.phase_wait, write_scoreboard=0), replace(PLAIN, waits=(0,))]


def arrive(barrier: int, **of: object) -> Operation:
    return replace(PLAIN, kind=Kind.PHASE, meeting=Meeting(Act.ARRIVE, barrier, **of))  # type: ignore[arg-type]


def copier(num_bytes: int, stages: int) -> Role:
    """One warp that fills a ring."""
    meeting = Meeting(Act.COPY, FULL, num_bytes=num_bytes, completes=True)
    l2_bytes = num_bytes * H100.l2_bytes / UNITS.shared_l2_bytes
    copy = replace(PLAIN, kind=Kind.PHASE, meeting=meeting, l2_bytes=l2_bytes, wavefronts=num_bytes / 128)
    announce = replace(PLAIN, kind=Kind.PHASE, meeting=Meeting(Act.EXPECT, FULL))
    return Role((*wait(EMPTY, initial=stages), announce, copy), 1)


def computing(trace: list[Operation], warpgroups: int = 1) -> Role:
    return Role(tuple(trace), 4 * warpgroups, 4)


def clocks(*roles: Role, in_turn: bool = False) -> float:
    return steady_clocks_of_roles(roles, H100, blocks=1, in_turn=in_turn)


# --- The tensor unit ----------------------------------------------------------------------------------------------------------------------


def unit(*, in_turn: bool = False) -> TensorUnit:
    return TensorUnit(UNITS, lambda time, wavefronts: time + wavefronts, in_turn=in_turn)


def test_the_unit_holds_seven_products() -> None:
    tensor = unit()
    for _ in range(UNITS.queue):
        assert tensor.admits(0, 0)
        tensor.issue(0, 64, 0, Group(), 0)
    assert not tensor.admits(0, 0)
    tensor.advance(UNITS.product_start)
    assert not tensor.admits(0, UNITS.product_start + 63), "the one that it computes counts"
    tensor.advance(UNITS.product_start + 64)
    assert tensor.admits(0, UNITS.product_start + 64)
    assert tensor.free == UNITS.product_start + 128


def test_free_entries_go_to_those_that_wait_in_turn() -> None:
    tensor = unit()
    for _ in range(UNITS.queue):
        tensor.issue(0, 64, 0, Group(), 0)
    assert not tensor.admits(0, 0)
    assert not tensor.admits(1, 0)
    begin = UNITS.product_start
    tensor.advance(begin + 64)
    tensor.waiting.popleft()  # an entry is free
    assert not tensor.admits(1, begin + 65)
    assert tensor.admits(0, begin + 65), "who asked first is first"


@pytest.mark.parametrize(("in_turn", "served"), [(False, 4), (True, 2)])
def test_the_order_of_service(in_turn: bool, served: int) -> None:
    """One product of a second warp, issued behind three of the first: the fourth that is computed, or the second."""
    tensor, other = unit(in_turn=in_turn), Group(closed=True)
    for _ in range(3):
        tensor.issue(0, 64, 0, Group(), 0)
    tensor.issue(1, 64, 0, other, 0)
    tensor.advance(1000)
    assert other.known_end == UNITS.product_start + 64 * served + UNITS.product_end


def test_operands_in_shared_memory_take_its_pipe() -> None:
    """Products whose operands take longer than they do last as long as these."""
    slow = replace(PRODUCT, wavefronts=20.0)  # of each of four sub-partitions
    trace = [slow] * 7 + [replace(slow, closes=True), replace(PRODUCTS_WAIT, pending=1)]
    assert clocks(computing(trace, 2)) == pytest.approx(2 * 8 * 80, rel=0.05)
    assert clocks(computing(list(without(trace, "shared memory")), 2)) == pytest.approx(2 * 8 * 64, rel=0.05)


@pytest.mark.parametrize(("columns", "published"), [(8, 18.9), (16, 20.7), (32, 24.7), (64, 32.8), (96, 48.7), (128, 65.0), (256, 129.3)])
def test_products_of_few_columns_read_a_for_longer_than_they_compute(columns: int, published: float) -> None:
    """Clocks of m64nNk16 with A and B in shared memory, measured by others on an H100 (docs/timing.md)."""
    control = sass.Control(stall=1, yields=False, write_scoreboard=None, read_scoreboard=None, waits=(), reuse=0)
    (product,) = operations([sass.Instruction(0, "", f"HGMMA.64x{columns}x16.F32.BF16", "R24, gdesc[UR8], R24", None, control)], H100)
    trace = [product] * 15 + [replace(product, closes=True), replace(PRODUCTS_WAIT, pending=1)]
    assert clocks(computing(trace)) / 16 == pytest.approx(published, rel=0.06)


def test_products_run_while_threads_go_on() -> None:
    """Eight products and as much arithmetic take as long as either where the products of the trip before are waited for, and as both where their own are."""
    arithmetic = [replace(PLAIN, stall=8.0)] * 64
    products = [PRODUCT] * 7 + [LAST]
    apart = clocks(computing([*products, PRODUCTS_WAIT, *arithmetic]))
    together = clocks(computing([*products, replace(PRODUCTS_WAIT, pending=1), *arithmetic]))
    latency = UNITS.product_start + UNITS.product_end
    assert apart == pytest.approx(8 * 64 + latency + 512, rel=0.05)
    assert together == pytest.approx(8 * 64 + latency, rel=0.15)
    assert clocks(computing([*products, PRODUCTS_WAIT, *arithmetic], 3)) == pytest.approx(3 * 8 * 64, rel=0.12), (
        "warpgroups fill each other's gaps"
    )


# --- Copies and mbarriers -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stages", [1, 2])
def test_a_ring_hides_the_latency_of_copies(stages: int) -> None:
    """Small copies: a trip of the ring is a copy's latency and two hand-overs, in which as many tiles are computed as there are stages."""
    roles = computing([*wait(FULL), arrive(EMPTY)]), copier(128, stages)
    around = UNITS.bulk_copy + UNITS.phase_hand_over + 10
    assert clocks(*roles) == pytest.approx(around / stages, rel=0.1)


def test_large_copies_take_the_bandwidth_of_l2() -> None:
    num_bytes = 32768
    assert clocks(computing([*wait(FULL), arrive(EMPTY)], 2), copier(num_bytes, 4)) == pytest.approx(
        num_bytes / UNITS.shared_l2_bytes, rel=0.05
    )


def test_all_warpgroups_say_that_a_tile_is_done() -> None:
    """The slowest one decides, and the copying warp waits for it."""
    slow = [*wait(FULL), *[replace(PLAIN, stall=15.0)] * 100, arrive(EMPTY)]
    assert clocks(computing(slow, 3), copier(128, 1)) > 1500 + UNITS.bulk_copy


@pytest.mark.parametrize("waits", [False, True])
def test_a_bulk_store_takes_the_bandwidth_of_l2_and_whoever_waits_its_latency(waits: bool) -> None:
    """What goes out is what was put into shared memory by matrix. The next rows may be put there when these were read."""
    code = [("STSM.16.M88.4", "[R4], R8")] * 8 + [("UTMASTG.4D", "[UR8], [UR16]")] * 2 + [("UTMACMDFLUSH", "")]
    code += [("DEPBAR.LE", "SB0, 0x0")] * waits
    control = sass.decode_control(1 << 41 | 7 << 46 | 7 << 49)
    trace = operations([sass.Instruction(16 * i, "", *of, None, control) for i, of in enumerate(code)], H100)
    stores = [operation for operation in trace if operation.kind is Kind.BULK_STORE]
    assert [(store.l2_bytes, store.wavefronts) for store in stores] == [(8 * 512 / 2, 16)] * 2
    clocks = steady_clocks_of_roles([Role(trace, 1)], H100, blocks=1, trips=24)
    of_bytes = 8 * 512 / H100.l2_bytes
    assert of_bytes + UNITS.bulk_store < clocks < of_bytes + UNITS.bulk_store + 100 if waits else clocks < of_bytes


def test_a_stage_is_full_when_bulk_copies_and_those_of_a_warp_have_landed() -> None:
    """Whichever lands last: here those of the warp, which come one after the other."""
    copy = replace(PLAIN, kind=Kind.COPY, latency=H100.copy_latency, wavefronts=1.0, l2_bytes=4096.0)
    behind = replace(PLAIN, kind=Kind.PHASE, meeting=Meeting(Act.ARRIVE_BEHIND_COPIES, FULL))
    bulk = copier(128, 1)
    both = Role((*bulk.trace, *[copy] * 8, behind), 1)
    computes = computing([*wait(FULL), arrive(EMPTY)])
    slow = 8 * 4096 / H100.l2_bytes
    assert clocks(computes, both) == pytest.approx(slow + H100.copy_latency + 2 * UNITS.phase_hand_over, rel=0.1)
    assert clocks(computes, bulk) < clocks(computes, both) / 2


def test_others_wait_ahead_for_what_lets_warps_go_on() -> None:
    """A warp that takes longer than a trip to say so holds the others up; one that is so many stages ahead only where it is slower than them."""
    turn, added, passed = 64, 80, 96
    slow = [replace(PLAIN, stall=15.0)] * 40
    trip = [*wait(FULL), *[replace(PLAIN, stall=10.0)] * 80, *wait(turn), arrive(added), arrive(EMPTY)]
    keeps = Role((*slow, arrive(turn), *wait(added)), 1, 1)
    waits, passes = Role((*wait(passed, initial=2), *slow, arrive(turn)), 1, 1), Role((*wait(added), *slow, arrive(passed)), 1, 2)
    assert clocks(computing(trip), copier(128, 2), waits, passes) == pytest.approx(800 + 2 * UNITS.phase_wait, rel=0.1)
    assert clocks(computing(trip), copier(128, 2), keeps) == pytest.approx(800, rel=0.2)
    twice = replace(keeps, trace=(*slow, *keeps.trace))
    assert clocks(computing(trip), copier(128, 2), twice) > 1200


def test_a_barrier_of_several_warpgroups_is_theirs_wherever_they_stand_in_the_block() -> None:
    barrier = replace(PLAIN, kind=Kind.BARRIER, threads=256)
    assert clocks(computing([barrier] * 10, 2), copier(128, 2)) == pytest.approx(
        10 * (H100.barrier_latency + 8 * H100.barrier_arrival), rel=0.15
    )


def test_warpgroups_hand_on_their_turn() -> None:
    """What is done between a wait for the turn and its hand-over is done by one warpgroup at a time."""
    own = [*wait(64, turns=True), *[replace(PLAIN, stall=10.0)] * 30, arrive(64, turns=True)]
    assert clocks(computing(own, 3), copier(128, 2)) == pytest.approx(3 * (300 + UNITS.phase_hand_over), rel=0.05)


def test_a_barrier_of_so_many_threads_holds_only_these() -> None:
    """Warpgroups with a barrier each do not wait for each other."""
    barrier = replace(PLAIN, kind=Kind.BARRIER, threads=128, numbered=True)
    expected = UNITS.named_barrier + 4 * H100.barrier_arrival
    assert clocks(computing([barrier] * 10, 3), copier(128, 2)) == pytest.approx(10 * expected, rel=0.12)


# --- What is read out of code -------------------------------------------------------------------------------------------------------------


def line(opcode: str, operands: str, predicate: str = "") -> sass.Instruction:
    return sass.Instruction(0, predicate, opcode, operands, None, sass.Control(1, False, None, None, (), 0))


@pytest.mark.parametrize(("parity", "changes"), [("R2", True), ("RZ", False), ("0x1", False)])
def test_a_wait_whose_parity_is_a_constant_is_over_before_the_loop(parity: str, changes: bool) -> None:
    """Also where instructions write to RZ what they do not keep, as those that only set a predicate."""
    flip = "P1, {}, R2, 0x1, RZ, 0x3c, !PT"
    code = [line("LOP3.LUT", flip.format("RZ")), line("SYNCS.PHASECHK.TRANS64", f"P0, [UR8+0x10], {parity}"), line("LOP3.LUT", flip.format("R2"))]  # fmt: skip
    assert roles._changes(code, 1) is changes


def test_constant_parts_of_addresses() -> None:
    """A base, a stage of eight bytes each, and a place in the instruction; which of two barriers, a selection decides."""
    code = [
        line("UMOV", "UR5, 0x400"), line("S2UR", "UR4, SR_CgaCtaId"), line("ULEA", "UR5, UR4, UR5, 0x18"), line("ULEA", "UR6, UR11, UR5, 0x3"),
        line("UIADD3", "UR7, UR6, -0x8, URZ"), line("IMAD.U32", "R3, RZ, RZ, UR7"), line("VIADD", "R4, R3, 0x20"), line("SEL", "R8, R3, R4, P0"),
        line("IMAD", "R9, R2, 0x5000, R8"), line("SYNCS.ARRIVE.TRANS64", "RZ, [R9+URZ+0x50], R3"),
    ]  # fmt: skip
    assert constants(code, len(code), "[UR6+0x2c050]") == {0x400 + 0x2C050}
    assert constants(code, len(code), "[UR7]") == {0x3F8}
    assert constants(code, len(code) - 1, "[R9+URZ+0x50]") == {0x448, 0x468}
    assert constants(code, len(code), "[R77]") == {0}
    carried = [line("MOV", "R1, 0x30"), line("IADD3", "R2, R1, 0x8, RZ"), line("LOP3.LUT", "R1, R1, 0x1, RZ, 0x3c, !PT")]
    assert constants(carried, 1, "[R1]") == {0x30}
    assert constants(carried, 1, "[R1]", first=1) == {0}, "what goes from trip to trip is no constant"
    renewed = [line("MOV", "R1, 0x30"), line("IADD3", "R2, R1, 0x8, RZ"), line("MOV", "R1, 0x40")]
    assert constants(renewed, 1, "[R1]", first=1) == {0x40}, "what the end of a trip makes anew is"


@pytest.fixture(scope="module")
def plan() -> Plan:
    return planned(4096, is_causal=False)


def planned(seqlen: int, *, is_causal: bool, backward: bool = False, batch: int = 4) -> Plan:
    pytest.importorskip("cupy")
    if disassembly.find_nvdisasm() is None:
        pytest.skip(disassembly.NVDISASM_HINT)
    sample = Sample(
        batch=batch, seqlen_q=seqlen, seqlen_kv=seqlen, num_heads_q=16, num_heads_kv=16, head_dim=64, dtype="bfloat16", is_causal=is_causal
    )
    tile = {"backward_wgmma": Tile(128, 128, 8, 2)} if backward else {"forward_wgmma": Tile(192, 128, 12, 2)}
    return planner.make_plan(plan_of(sample).problem, device.of_arch("sm_90", "gpu"), backward=backward, tile=tile)


def wgmma_kernel(plan: Plan) -> KernelPlan:
    (kernel,) = (kernel for kernel in plan.kernels if kernel.spec.maps_tensors)
    return kernel


def test_roles_and_barriers_of_a_kernel(plan: Plan) -> None:
    """Of the wgmma forward kernel: 4 products for scores and 8 for outputs in a trip; K and V are waited for and given back once each, and copied once each."""
    described, function = prediction.compiled(wgmma_kernel(plan), plan.device, causal=False)
    traces = role_traces(function, control_flow.steady_trace(function, control_flow.tile_loop(function)))
    assert [trace.num_matrix for trace in traces] == [4 + 8, 0]
    computes, copies = meeting_points(function, traces)
    assert [of.act for of in computes.values()] == [Act.WAIT, Act.WAIT, Act.ARRIVE, Act.ARRIVE]
    assert [of.act for of in copies.values()] == [Act.WAIT, Act.EXPECT, Act.COPY] * 2
    assert {of.barrier for of in computes.values() if of.act is Act.WAIT} == {of.barrier for of in copies.values() if of.act is Act.COPY}
    assert {of.barrier for of in computes.values() if of.act is Act.ARRIVE} == {of.barrier for of in copies.values() if of.act is Act.WAIT}
    tile = described.tile
    assert {of.initial for of in copies.values() if of.act is Act.WAIT} == {tile.num_stages}
    assert {of.num_bytes for of in copies.values() if of.act is Act.COPY} == {tile.tile_kv * 64 * 2}
    single = single_tile_traces(function, traces)
    assert single is not None
    assert single[0].num_matrix == 4 + 8
    of_single = meeting_points(function, single)
    assert [of.act for of in of_single[0].values()].count(Act.WAIT) == 3, "Q too"
    assert sum(of.num_bytes for of in of_single[1].values()) == (tile.tile_q + 2 * tile.tile_kv) * 64 * 2


def test_a_kernel_of_wgmma_is_predicted(plan: Plan) -> None:
    """Shares add up, both orders of service are near each other, a causal call takes about half, and the clock is that of a card at its limit of power."""
    full = prediction.predict_plan(plan, CARDS["sm_90"], limits=False)
    in_turn = prediction.predict_plan(plan, CARDS["sm_90"], limits=False, in_turn=True)
    causal = prediction.predict_plan(planned(4096, is_causal=True), CARDS["sm_90"], limits=False)
    (launch,) = full.launches
    assert launch.kernel is not None
    assert launch.kernel.blocks == 1
    assert launch.kernel.busy["matrix"] == busy_clocks_of_block(launch.kernel.roles, H100)["matrix"] / launch.kernel.clocks
    assert 3 * (4 * 64 + 8 * 32) / launch.kernel.clocks == pytest.approx(launch.kernel.matrix_share)
    described, function = prediction.compiled(wgmma_kernel(plan), plan.device, causal=False)
    settled = prediction.predict_kernel(function, described, limits=False, trips=48, warming=24)
    of_settled = prediction.lay_out(settled, wgmma_kernel(plan), plan.problem, CARDS["sm_90"])
    settled_tflops = plan.problem.flops_forward / of_settled.milliseconds / 1e9
    assert 400 < settled_tflops < 660
    assert full.tflops < 1.1 * settled_tflops  # in few trips warpgroups happen to be better out of step than they stay (docs/timing.md)
    assert 0.8 < full.tflops / in_turn.tflops < 1.25
    assert 0.48 < causal.milliseconds / full.milliseconds < 0.7
    assert 1.4 < launch.clock_ghz < CARDS["sm_90"].clock_ghz


def test_blocks_that_share_out_keys_end_together(plan: Plan) -> None:
    """A share takes its trips, and begins and ends of tiles and parts besides; causal kernels know no parts."""
    few = planned(4096, is_causal=False, batch=1)
    kernel, whole = wgmma_kernel(few), prediction.predict_plan(few, CARDS["sm_90"], limits=False).launches[0]
    assert kernel.shares.tiles == 16 * 22 % 132
    of_kernel = whole.kernel
    assert of_kernel is not None
    assert of_kernel.between_tiles is not None
    assert of_kernel.between_parts is not None
    assert of_kernel.between_tiles < of_kernel.between_parts < of_kernel.between_tiles + 4 * of_kernel.clocks
    unshared = prediction.lay_out(of_kernel, replace(kernel, shares=UNSHARED), few.problem, CARDS["sm_90"])
    assert whole.milliseconds < unshared.milliseconds
    assert unshared.balance < whole.balance < 1
    described, function = prediction.compiled(wgmma_kernel(planned(4096, is_causal=True)), plan.device, causal=True)
    assert prediction.predict_kernel(function, described, limits=False).between_parts is None


def test_a_kernel_of_wgmma_needs_its_instructions(plan: Plan) -> None:
    described, function = prediction.compiled(wgmma_kernel(plan), plan.device, causal=False)
    with pytest.raises(UnsupportedError, match="sm_80"):
        prediction.predict_kernel(function, replace(described, arch="sm_80"), limits=False)


@pytest.fixture(scope="module")
def backward_plan() -> Plan:
    return planned(4096, is_causal=True, backward=True)


def test_roles_and_barriers_of_a_backward_kernel(backward_plan: Plan) -> None:
    """One warp copies, one waits for turns to add, and one passes them on. Tiles come by bulk copies and row statistics by those of the warp, at one barrier."""
    described, function = prediction.compiled(wgmma_kernel(backward_plan), backward_plan.device, causal=True)
    traces = role_traces(function, control_flow.steady_trace(function, control_flow.tile_loop(function)))
    assert [trace.num_matrix for trace in traces] == [4 + 4 + 8 + 8 + 8, 0, 0, 0]
    computes, copies, waits, passes = (list(of.values()) for of in meeting_points(function, traces))
    assert [of.act for of in computes] == [Act.WAIT, Act.WAIT, Act.ARRIVE, Act.ARRIVE]
    assert [of.act for of in copies] == [Act.WAIT, Act.EXPECT, Act.COPY, Act.COPY, Act.ARRIVE_BEHIND_COPIES]
    assert [of.act for of in waits] == [of.act for of in passes] == [Act.WAIT, Act.ARRIVE]
    full, turn, added, empty = (of.barrier for of in computes)
    assert [of.barrier for of in copies] == [empty, full, full, full, full]
    assert [of.barrier for of in (waits[1], passes[0])] == [turn, added]
    assert waits[0].barrier == passes[1].barrier
    assert [of.initial for of in (computes[0], computes[1], copies[0], waits[0], passes[0])] == [0, 0, described.tile.num_stages, 2, 0]
    assert sum(of.num_bytes for of in copies) == 2 * described.tile.tile_q * 64 * 2


def test_a_backward_kernel_of_wgmma_is_predicted(backward_plan: Plan) -> None:
    """A fixed order costs its loop nothing; tiles that the diagonal cuts are told from others."""
    found = prediction.predict_plan(backward_plan, CARDS["sm_90"], limits=False)
    main = next(launch for launch in found.launches if launch.kernel is not None)
    assert main.kernel is not None
    assert main.kernel.between_tiles is None
    assert 0.65 < main.kernel.matrix_share < 0.95
    assert main.tiles_partial == 4 * 16 * 32, "one of 128 queries for each 128 keys"
    assert main.tiles_visited == 4 * 16 * (32 * 33 // 2)
    free = [replace(o, stall=1.0) if o.kind is Kind.FENCE else o for role in main.kernel.roles[2:] for o in role.trace]
    lengths = [len(role.trace) for role in main.kernel.roles[2:]]
    instant = (
        *main.kernel.roles[:2],
        *(replace(role, trace=tuple(free[: lengths[0]] if i == 0 else free[lengths[0] :])) for i, role in enumerate(main.kernel.roles[2:])),
    )
    assert main.kernel.clocks / clocks(*instant) < 1.05
