"""`cuflash.timing`: the model of an SM on traces whose clocks can be told by hand, the grid, descriptions in files. Needs no compiler."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cuflash.errors import OptionError, UnsupportedError
from cuflash.problem.tile import Tile
from cuflash.timing import description, grid, machine, operations, sass
from cuflash.timing.limits import LIMITS, without
from cuflash.timing.machine import CARDS, MULTIPROCESSORS
from cuflash.timing.multiprocessor import record, steady_clocks
from cuflash.timing.operations import Kind, Operation, Unit

A100 = MULTIPROCESSORS["sm_80"]
PLAIN = Operation(
    Kind.PLAIN,
    None,
    clocks=0.0,
    latency=0.0,
    wavefronts=0.0,
    l2_bytes=0.0,
    stall=1.0,
    write_scoreboard=None,
    read_scoreboard=None,
    waits=(),
)
PRODUCT = replace(PLAIN, unit=Unit.MATRIX, clocks=8.0, matrix=True)
LOAD = replace(PLAIN, kind=Kind.MEMORY, wavefronts=4.0, latency=29.0, write_scoreboard=0)
COPY = replace(PLAIN, kind=Kind.COPY, wavefronts=4.0, l2_bytes=512.0, latency=300.0)
BARRIER = replace(PLAIN, kind=Kind.BARRIER)


def clocks(trace: list[Operation], warps: int = 4, blocks: int = 1) -> float:
    return steady_clocks(trace, A100, warps=warps, blocks=blocks)


def test_products_take_their_unit() -> None:
    """Each sub-partition has a unit of its own: 8 clocks for each product of a warp, whatever shares the SM."""
    assert clocks([PRODUCT] * 20) == pytest.approx(160, rel=0.01)
    assert clocks([PRODUCT] * 20, warps=8) == pytest.approx(320, rel=0.01)
    assert clocks([PRODUCT] * 20, warps=4, blocks=2) == pytest.approx(320, rel=0.01)
    assert clocks([PRODUCT] * 20, warps=1) == pytest.approx(160, rel=0.01)


def test_a_rate_that_is_no_whole_number_is_kept() -> None:
    assert clocks([replace(PRODUCT, clocks=6.11)] * 100) == pytest.approx(611, rel=0.01)


def test_a_sub_partition_issues_one_instruction_per_clock() -> None:
    assert clocks([PLAIN] * 100) == pytest.approx(100, rel=0.02)
    assert clocks([PLAIN] * 100, warps=12) == pytest.approx(300, rel=0.02)


def test_stall_counts_leave_clocks_to_others() -> None:
    """One warp alone takes its stall counts; two fill each other's gaps."""
    trace = [replace(PLAIN, stall=4.0)] * 50
    assert clocks(trace) == pytest.approx(200, rel=0.02)
    assert clocks(trace, warps=8) == pytest.approx(200, rel=0.03)
    assert clocks(trace, warps=20) == pytest.approx(250, rel=0.03)


def test_a_scoreboard_waits_for_the_latency() -> None:
    """A load and its use: 29 clocks and the issue of the load, which a second warp hides behind its own."""
    chain = [replace(LOAD, wavefronts=1.0), replace(PLAIN, waits=(0,))] * 10
    assert clocks(chain, warps=1) == pytest.approx(10 * 30, rel=0.02)
    assert clocks(chain, warps=8) == pytest.approx(10 * 30, rel=0.1)


def test_shared_memory_serves_the_whole_sm() -> None:
    """Sixteen loads of 4 wavefronts by each of 8 warps: 512 clocks of one pipe."""
    trace = [LOAD] * 16
    assert clocks(trace, warps=8) == pytest.approx(512, rel=0.02)
    assert clocks(trace, warps=4, blocks=2) == pytest.approx(512, rel=0.02)


@pytest.mark.parametrize("warps", [1, 4, 8, 16])
def test_a_barrier_takes_what_was_measured(warps: int) -> None:
    """Barriers in a row, as they were timed on an H100: 13.3 clocks and two for each warp."""
    expected = A100.barrier_latency + A100.barrier_arrival * warps
    assert clocks([BARRIER] * 20, warps=warps) == pytest.approx(20 * expected, rel=0.12)


def test_warps_wait_for_the_slowest_at_a_barrier() -> None:
    """A barrier after every product makes all take the product's turn together."""
    trace = [PRODUCT] * 8 + [BARRIER]
    alone = clocks(trace)
    assert alone == pytest.approx(64 + A100.barrier_latency + 4 * A100.barrier_arrival, rel=0.15)
    assert clocks(trace, blocks=2) < 2 * alone, "another block's products fill the wait"


def test_a_fence_holds_up_the_one_warp_that_makes_it() -> None:
    """What others of its sub-partition multiply meanwhile costs nothing; with nothing to do, they wait for it at the next barrier."""
    fence = replace(PLAIN, kind=Kind.FENCE, stall=A100.fence)
    barrier = A100.barrier_latency + 8 * A100.barrier_arrival
    assert clocks([fence, *[PRODUCT] * 160, BARRIER], warps=8) == pytest.approx(2 * 160 * 8, rel=0.02)
    assert clocks([BARRIER, fence] * 20, warps=8) == pytest.approx(20 * (A100.fence + barrier), rel=0.03)


def test_copies_take_the_bandwidth_of_l2() -> None:
    trace = [COPY] * 8 + [replace(PLAIN, kind=Kind.COMMIT), replace(PLAIN, kind=Kind.WAIT, pending=1)]
    assert clocks(trace, warps=8) == pytest.approx(8 * 8 * 512 / A100.l2_bytes, rel=0.05)


def test_a_wait_for_copies_takes_their_latency() -> None:
    """With no group pending each trip waits for its own copy; with one pending, for the copy of the trip before, so that two trips share a latency."""
    copy = replace(COPY, l2_bytes=A100.l2_bytes, wavefronts=1.0)
    pad = [PLAIN] * 200
    waiting = [copy, replace(PLAIN, kind=Kind.COMMIT), replace(PLAIN, kind=Kind.WAIT, pending=0), *pad]
    ahead = [copy, replace(PLAIN, kind=Kind.COMMIT), replace(PLAIN, kind=Kind.WAIT, pending=1), *pad]
    assert clocks(waiting, warps=1) == pytest.approx(1 + 300 + 1 + 200, rel=0.02)
    assert clocks(ahead, warps=1) == pytest.approx((1 + 300 + 1 + 200) / 2, rel=0.02)


def test_limits_are_lifted_one_at_a_time() -> None:
    trace = [PRODUCT, *[LOAD] * 4, BARRIER]
    assert [operation.clocks for operation in without(trace, "matrix")] == [0.0] * 6
    assert clocks(list(without(trace, "shared memory"))) < clocks(trace)
    assert all(operation.kind is not Kind.BARRIER for operation in without(trace, "barriers"))
    assert without([PLAIN], "l2") == (PLAIN,)
    chain = [replace(LOAD, wavefronts=1.0), replace(PLAIN, waits=(0,), stall=9.0)]
    assert clocks(list(without(chain, "dependencies")), warps=1) == pytest.approx(2, rel=0.3)
    assert set(LIMITS) >= {"matrix", "shared memory", "l2", "barriers", "dependencies"}


def instruction(opcode: str, operands: str = "R0, R1", predicate: str = "", address: int = 0, **control: object) -> sass.Instruction:
    given = {"stall": 1, "yields": False, "write_scoreboard": None, "read_scoreboard": None, "waits": (), "reuse": 0} | control
    return sass.Instruction(address, predicate, opcode, operands, None, sass.Control(**given))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("opcode", "arch", "unit", "expected"),
    [
        ("HMMA.16816.F32.BF16", "sm_80", Unit.MATRIX, 8.0),
        ("HMMA.1688.F32.TF32", "sm_80", Unit.MATRIX, 8.0),
        ("HMMA.16816.F32", "sm_86", Unit.MATRIX, 32.0),
        ("HMMA.16816.F16", "sm_89", Unit.MATRIX, 16.0),
        ("HMMA.16816.F32", "sm_90", Unit.MATRIX, 6.11),
        ("IMMA.16832.S8.S8", "sm_80", Unit.MATRIX, 8.0),
        ("FFMA.FTZ", "sm_80", Unit.FMA, 2.0),
        ("FFMA", "sm_90", Unit.FMA, 1.0),
        ("MUFU.EX2", "sm_80", Unit.MUFU, 8.0),
        ("IMAD.WIDE.U32", "sm_80", Unit.FMA, 2.0),
        ("LOP3.LUT", "sm_80", Unit.ALU, 2.0),
        ("UIADD3", "sm_90", None, 0.0),
    ],
)
def test_units(opcode: str, arch: str, unit: Unit | None, expected: float) -> None:
    (operation,) = operations.operations([instruction(opcode)], MULTIPROCESSORS[arch])
    assert (operation.unit, operation.clocks) == (unit, pytest.approx(expected))


@pytest.mark.parametrize(
    ("opcode", "wavefronts", "l2_bytes"),
    [("LDSM.16.M88.4", 4, 0), ("LDSM.16.MT88.2", 2, 0), ("LDS.128", 4, 0), ("STS", 1, 0), ("LDGSTS.E.BYPASS.LTC128B.128", 4, 512), ("LDL.64", 2, 0), ("LDG.E", 1, 128),
     ("LDG.E.U16", 1, 64), ("LDG.E.U8.CONSTANT", 1, 32), ("STG.E.128", 4, 512)],
)  # fmt: skip
def test_memory(opcode: str, wavefronts: int, l2_bytes: int) -> None:
    (operation,) = operations.operations([instruction(opcode)], A100)
    assert (operation.wavefronts, operation.l2_bytes) == (wavefronts, l2_bytes)


def test_what_never_runs_costs_an_issue_only() -> None:
    (operation,) = operations.operations([instruction("LDS", predicate="!PT")], A100)
    assert (operation.wavefronts, operation.kind) == (0.0, Kind.PLAIN)


def test_groups_of_copies_and_taken_branches() -> None:
    trace = [instruction("LDGDEPBAR"), instruction("DEPBAR.LE", "SB0, 0x2", address=16), instruction("BRA", "`(.L_x_1)", address=32)]
    commit, wait, branch = operations.operations(trace, A100)
    assert (commit.kind, wait.kind, wait.pending) == (Kind.COMMIT, Kind.WAIT, 2)
    assert branch.stall == 1 + A100.branch


@pytest.mark.parametrize("opcode", ["QGMMA.64x128x32.F32", "HGMMA.64x128x8.F32.TF32", "UTMALDG.4D", "HMMA.999.F32"])
def test_what_is_not_modelled_is_refused(opcode: str) -> None:
    with pytest.raises(UnsupportedError, match=opcode.split(".")[0]):
        operations.operations([instruction(opcode)], MULTIPROCESSORS["sm_90"])


def test_every_card_has_an_sm() -> None:
    assert set(CARDS) == set(MULTIPROCESSORS)
    for arch, card in CARDS.items():
        assert card.arch == MULTIPROCESSORS[arch].arch == arch
    with pytest.raises(OptionError, match="sm_75"):
        machine.multiprocessor("sm_75")


def test_peak_rates_are_the_published_ones() -> None:
    """Dense TFLOP/s of 16-bit products with float32 sums by the whitepapers; H100's is what `mma.sync` reaches, two thirds of the published."""
    published = {"sm_80": 312, "sm_86": 71, "sm_89": 165.2, "sm_120": 209.5, "sm_90": 989.4 * 4 / 6.11 * 1.965 / 1.83}
    for arch, card in CARDS.items():
        rate = 2 * MULTIPROCESSORS[arch].matrix_rates["half"] * machine.SUB_PARTITIONS * card.num_sms * card.clock_ghz / 1e3
        assert rate == pytest.approx(published[arch], rel=0.01), arch


# --- Grids --------------------------------------------------------------------------------------------------------------------------------


def test_equal_blocks_come_in_waves() -> None:
    assert grid.grid_clocks([10] * 8, num_sms=4, trip_clocks=(5.0,), overhead=0.0) == pytest.approx(100)
    assert grid.grid_clocks([10] * 9, num_sms=4, trip_clocks=(5.0,), overhead=0.0) == pytest.approx(150)
    assert grid.grid_clocks([10] * 8, num_sms=4, trip_clocks=(5.0,), overhead=7.0) == pytest.approx(114)


def test_blocks_of_one_sm_share_it() -> None:
    """Two blocks take 8 clocks for a trip of both, one alone 5: after the short one has ended, the long one goes on at its own rate."""
    assert grid.grid_clocks([10, 10], num_sms=1, trip_clocks=(5.0, 8.0), overhead=0.0) == pytest.approx(80)
    assert grid.grid_clocks([10, 4], num_sms=1, trip_clocks=(5.0, 8.0), overhead=0.0) == pytest.approx(4 * 8 + 6 * 5)
    assert grid.grid_clocks([10, 10], num_sms=2, trip_clocks=(5.0, 8.0), overhead=0.0) == pytest.approx(50), "each SM first gets one"


def test_long_blocks_last_leave_a_tail() -> None:
    rising = list(range(1, 17))
    first, last = (grid.grid_clocks(order, num_sms=4, trip_clocks=(1.0,), overhead=0.0) for order in (rising[::-1], rising))
    assert first < last
    assert first >= sum(rising) / 4


def test_blocks_without_trips_end_at_once() -> None:
    assert grid.grid_clocks([10, 0, 0], num_sms=1, trip_clocks=(5.0,), overhead=7.0) == pytest.approx(50 + 3 * 7)
    assert grid.grid_clocks([10, 0, 0], num_sms=1, trip_clocks=(5.0,), overhead=7.0, empty=2.0) == pytest.approx(50 + 7 + 2 * 2)


def test_an_empty_grid_takes_no_time() -> None:
    assert grid.grid_clocks([], num_sms=4, trip_clocks=(1.0,), overhead=5.0) == 0.0


# --- Kernels in files ---------------------------------------------------------------------------------------------------------------------

KERNEL = description.Description("forward", "sm_80", "float16", 64, 64, True, Tile(128, 64, 4, 2), 200, 8, 49152)


def test_kernels_are_kept_in_files(tmp_path: Path) -> None:
    path = description.save(tmp_path / "new", KERNEL, b"ELF")
    assert path.name == "forward_sm_80_float16_d64_causal_128x64_w4_s2.cubin"
    assert description.load(path) == (KERNEL, b"ELF")
    fields = json.loads(path.with_suffix(".json").read_text())
    assert fields["tile"] == {"tile_q": 128, "tile_kv": 64, "num_warps": 4, "num_stages": 2}
    assert {"kernel", "arch", "dtype", "head_dim", "causal", "registers", "spill_bytes", "shared_bytes"} <= set(fields)


def test_a_damaged_description_is_named(tmp_path: Path) -> None:
    path = description.save(tmp_path, KERNEL, b"ELF")
    for content in (
        "{",
        "[]",
        '{"kernel": "forward"}',
        json.dumps(KERNEL.to_json() | {"tile": 3}),
        json.dumps(KERNEL.to_json() | {"more": 1}),
    ):
        path.with_suffix(".json").write_text(content)
        with pytest.raises(OptionError, match="a JSON object that describes a kernel"):
            description.load(path)
    with pytest.raises(OptionError, match="No such file"):
        description.load(tmp_path / "other.cubin")


FORGED: list[tuple[str, Any]] = [
    ("kernel", "nope"), ("kernel", 5), ("arch", 80), ("dtype", "int8"), ("dtype", ["float16"]), ("head_dim", "x"), ("head_dim", -1), ("head_dim", 0),
    ("head_dim_v", 1.5), ("head_dim", 10**30), ("causal", "yes"), ("registers", -3), ("shared_bytes", None), ("barriers", True), ("spill_bytes", "many"),
    ("tile", 5), ("tile", {"tile_q": 0, "tile_kv": 0, "num_warps": 0, "num_stages": 0}), ("tile", {"tile_q": "a", "tile_kv": 64, "num_warps": 4, "num_stages": 2}),
    ("unknown", 1),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), FORGED, ids=lambda x: str(x)[:20])
def test_a_forged_description_is_refused(tmp_path: Path, name: str, value: Any) -> None:
    path = description.save(tmp_path, KERNEL, b"ELF")
    record = path.with_suffix(".json")
    record.write_text(json.dumps(json.loads(record.read_text()) | {name: value}))
    with pytest.raises(OptionError, match=rf"{name}.*a JSON object that describes a kernel"):
        description.load(path)


def test_a_description_nested_too_deeply_is_refused(tmp_path: Path) -> None:
    path = description.save(tmp_path, KERNEL, b"ELF")
    path.with_suffix(".json").write_text("[" * 100_000)
    with pytest.raises(OptionError, match="a JSON object that describes a kernel"):
        description.load(path)


def test_a_recorded_run_has_every_instruction_once_and_in_order() -> None:
    copy = Operation(Kind.COPY, None, 0.0, 500.0, 4.0, 512.0, 2.0, None, None, ())
    product = Operation(Kind.PLAIN, Unit.MATRIX, 16.0, 0.0, 0.0, 0.0, 4.0, None, None, (), matrix=True)
    trace = [copy, product, product]
    issues = record(trace, A100, warps=4, blocks=1, trips=3)
    assert {issue.warp for issue in issues} == set(range(4))
    for warp in range(4):
        own = [issue for issue in issues if issue.warp == warp]
        assert [(issue.trip, issue.position) for issue in own] == [divmod(index, 3) for index in range(len(own))]
        assert all(earlier.clock < later.clock for earlier, later in itertools.pairwise(own))
    assert max(issue.trip for issue in issues) >= 2
    assert all(issue.done >= issue.clock + 500 if issue.position == 0 else issue.done == issue.clock for issue in issues)
