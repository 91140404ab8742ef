"""Which calls on sm_90 take the kernels of wgmma by themselves, and what plans say of it."""

from __future__ import annotations

import itertools
from typing import Any

import numpy
import pytest
from conftest import Target
from problems import checked
from test_wgmma_forward import with_sms

import cuflash
from cuflash import FeatureSet, Tile
from cuflash.cli.sample_features import SampleFeatures
from cuflash.cli.samples import Sample, plan_of, stand_in
from cuflash.hardware import device
from cuflash.jit import compiler
from cuflash.planning import (
    compiler_versions,
    offline,
    planner,
    predicted_loops,
    predicted_time,
    predicted_wgmma,
    query_splits,
    tile_choice,
    tuned_tiles,
    wgmma_backward,
    wgmma_forward,
)
from cuflash.planning.kernel_cases import case_of
from cuflash.planning.kernel_specs import BACKWARD_WGMMA, FORWARD_WGMMA, TILED_KERNELS
from cuflash.planning.plan import Plan
from cuflash.simulator import check
from cuflash.timing import machine, prediction
from cuflash.tuned.store import Found

pytest.importorskip("cupy")

import predicted_loops as benchmark

pytestmark = pytest.mark.skipif(compiler_versions.why_not() is not None, reason="calls do not trust this version of NVRTC")

ON = device.of_arch("sm_90", "gpu")
WGMMA = "forward_wgmma", "backward_wgmma"
LINES = sorted(key for key in predicted_loops.read() if "wgmma" in key.kernel)[::13]
VARIABLES = wgmma_forward.VARIABLE, wgmma_backward.VARIABLE


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither asked for nor ruled out."""
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)


def planned(
    backward: bool, seqlen: int = 4096, heads: int = 16, batch: int = 4, head_dim: int = 128, tile: Any = None, **more: Any
) -> Plan:
    options = {"dtype": "bfloat16", **more}
    sample = Sample(batch, seqlen, seqlen, heads, heads, head_dim, **options)
    return planner.make_plan(plan_of(sample, backward=backward).problem, ON, backward=backward, tile=tile)


def takes_wgmma(plan: Plan) -> bool:
    return any(kernel.name in WGMMA for kernel in plan.kernels)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("head_dim", [64, 72, 96, 128])
def test_calls_that_fill_the_card_take_them(head_dim: int, is_causal: bool, backward: bool) -> None:
    plan = planned(backward, head_dim=head_dim, is_causal=is_causal)
    assert takes_wgmma(plan)
    assert f"choice     {WGMMA[backward]}.cu, predicted to take 0." in str(plan)
    assert "it has run on the simulator only" in plan.choice


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_short_sequences_and_few_heads_stay(backward: bool) -> None:
    for shape in ({"seqlen": 128}, {"seqlen": 256, "heads": 2, "batch": 1}):
        plan = planned(backward, **shape)
        assert not takes_wgmma(plan), shape
        assert f"{WGMMA[backward]}.cu" in plan.choice
        assert "is predicted to take 1." in plan.choice


def test_a_fixed_order_of_one_wave_costs() -> None:
    """Blocks of one head that start together wait for each other, unless they are cut into chains; of many heads, few of a head start together."""

    def cost(heads: int, chains: int = 1) -> float:
        problem = plan_of(Sample(1, 2048, 2048, heads, heads, 128, dtype="bfloat16"), backward=True).problem
        case = case_of(BACKWARD_WGMMA, problem)
        tile, (loop,) = tile_choice.default_tile(case, ON), predicted_loops.loops_of([case.kernel.name], problem) or [None]
        assert loop is not None
        section = wgmma_backward.fused_backward.heads_together(problem, ON)
        ordered = predicted_time.grid_of(case, tile, problem, section)._replace(chains=chains)
        clocks = [predicted_time.clocks(loop, case, tile, grid, problem, ON) for grid in (ordered, ordered._replace(section=0))]
        return clocks[0] / clocks[1]

    assert cost(1) > 1.5
    assert cost(1, chains=8) < 1.05
    assert cost(128) < 1.05


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_the_variable_rules_out_or_asks(backward: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLES[backward], "0")
    plan = planned(backward)
    assert not takes_wgmma(plan)
    assert f"not {WGMMA[backward]}.cu, by {VARIABLES[backward]}=0" in plan.choice
    monkeypatch.setenv(VARIABLES[backward], "1")
    assert takes_wgmma(planned(backward, seqlen=128))
    monkeypatch.setenv(VARIABLES[backward], "no")
    with pytest.raises(cuflash.OptionError, match=f"{VARIABLES[backward]}: got 'no'; expected '0' or '1'"):
        planned(backward)


def test_a_tile_pins_either_way() -> None:
    assert takes_wgmma(planned(False, seqlen=128, tile={WGMMA[0]: Tile(128, 64, 8, 2)}))
    assert takes_wgmma(planned(True, seqlen=128, tile={WGMMA[1]: Tile(64, 128, 8, 2)}))
    for tile in ({"forward": Tile(64, 64, 4, 2)}, Tile(128, 64, 8, 2)):
        assert not takes_wgmma(planned(False, tile=tile))
    for tile in ({"backward_dq": Tile(64, 64, 4, 2)}, {"backward_fused": Tile(64, 64, 4, 2)}, Tile(64, 64, 4, 2)):
        assert not takes_wgmma(planned(True, tile=tile))


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_tables_of_tuned_tiles_decide_where_both_were_timed(backward: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    times = dict.fromkeys(TILED_KERNELS, 1.0) | {WGMMA[backward]: 4.0}
    call = {"call": "one", "timer": "events"}

    def tuned(case: Any, *_: Any) -> Found:
        return Found(milliseconds=times[case.kernel.name], **call) if case.kernel.name in times else Found()

    monkeypatch.setattr(tuned_tiles, "tuned_tile", tuned)
    plan = planned(backward)
    assert not takes_wgmma(plan)
    assert "timed to take 0." in plan.choice
    times[WGMMA[backward]] = 0.5
    assert takes_wgmma(planned(backward, seqlen=128))
    del times[WGMMA[backward]]
    assert takes_wgmma(planned(backward)), "a table of the other kernels alone says nothing of which is faster"


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize(
    ("version", "trusted"),
    [((12, 7), False), ((12, 8), True), ((13, 0), True), ((13, 1), True), ((13, 2), True), ((13, 3), True), ((14, 0), True)],
)
def test_versions_of_the_compiler(version: tuple[int, int], trusted: bool, backward: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "nvrtc_version", lambda: version)
    plan = planned(backward)
    assert takes_wgmma(plan) == trusted
    words = "NVRTC {}.{} may reuse registers of a product that is under way".format(*version)
    assert (words in plan.choice) != trusted
    monkeypatch.setenv(VARIABLES[backward], "1")
    assert takes_wgmma(planned(backward))


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_what_stays_says_why_and_how_long_it_takes(backward: bool) -> None:
    plan = planned(backward, dtype="float32", head_dim=192)
    reason = (
        "backward_wgmma.cu: it takes 16-bit types, and this is float32"
        if backward
        else "forward_wgmma_float32.cu: it takes a head_dim of at most 128"
    )
    assert f"not {reason}" in plan.choice
    plan = planned(backward, head_dim=100)
    assert f"not {WGMMA[backward]}.cu: it takes multiples of 8" in plan.choice
    assert "predicted to take" in plan.choice
    assert " ms" in plan.choice


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_what_was_not_predicted_stays(backward: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    without = {key: loop for key, loop in predicted_loops.table().items() if key.feature != "alibi"}
    monkeypatch.setattr(predicted_loops, "table", lambda: without)
    plan = planned(backward, features=SampleFeatures(alibi=True))
    assert not takes_wgmma(plan)
    assert "nothing is predicted of it here" in plan.choice


def test_warmup_compiles_all_ways() -> None:
    kernels = {kernel.name for kernel in offline.offline_kernels(ON, dtype="float16", head_dim=128, every_way=True)}
    assert {"forward", "forward_wgmma", "backward_wgmma", "backward_fused", "backward_dkdv", "backward_dq"} <= kernels
    ways = [set(way) for backward in (False, True) for way in planner.other_ways(planned(backward).problem, ON, backward=backward)]
    assert ways == [{"forward"}, {"backward_fused"}, {"backward_dq"}]


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_warmup_compiles_causal_calls_of_more_queries_than_keys(softcap: float | None) -> None:
    """In which blocks do not make dQ of their sums."""
    sample = Sample(4, 4096, 2048, 32, 32, 64, is_causal=True, features=SampleFeatures(softcap=softcap))
    problem = plan_of(sample, backward=True).problem
    options = {"dtype": "float16", "head_dim": 64, "is_causal": True, "features": problem.features.kinds}
    known = {kernel.request(ON) for kernel in offline.offline_kernels(ON, **options, every_way=True)}
    plan = planner.make_plan(problem, ON, backward=True)
    assert {"backward_wgmma", "backward_dq_convert"} <= {kernel.name for kernel in plan.kernels}
    assert {kernel.request(ON) for kernel in plan.kernels} <= known


@pytest.mark.parametrize("mask", [None, "bool"])
def test_warmup_compiles_every_dropout_and_alignment_of_masks(mask: str | None) -> None:
    """Kernels of wgmma that drop more than they keep are others, and so are kernels of mma.sync that copy masks whose rows start on 16 bytes."""
    kinds = FeatureSet(dropout=True, attn_mask=mask)
    known = {kernel.request(ON) for kernel in offline.offline_kernels(ON, dtype="float16", head_dim=128, features=kinds, every_way=True)}
    query = stand_in((1, 4096, 8, 128), "float16")
    for seqlen_kv, dropout_p, backward in itertools.product((8, 4096), (0.1, 0.6), (False, True)):
        key = stand_in((1, seqlen_kv, 8, 128), "float16")
        masks = {} if mask is None else {"attn_mask": numpy.ones((1, 1, 4096, seqlen_kv), mask)}
        plan = planner.make_plan(checked(query, key, key, dropout_p=dropout_p, dropout_seed=1, **masks), ON, backward=backward)
        assert {kernel.request(ON) for kernel in plan.kernels} <= known


@pytest.mark.parametrize("predicted", [True, False], ids=["predicted", "not predicted"])
def test_warmup_compiles_what_tables_have_for_other_lengths(predicted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a kernel that the call without a table does not take, too."""
    tiles = {WGMMA[0]: Tile(128, 64, 8, 2), WGMMA[1]: Tile(64, 128, 8, 2), "backward_fused": Tile(32, 64, 4, 2)}
    monkeypatch.setattr(tuned_tiles, "of_all_lengths", lambda case, *_: (tiles[case.kernel.name],) if case.kernel.name in tiles else ())
    if not predicted:
        monkeypatch.setattr(predicted_loops, "table", dict)
    kernels = offline.offline_kernels(ON, dtype="float16", head_dim=128, every_way=True)
    assert tiles.items() <= {(kernel.name, kernel.tile) for kernel in kernels}


def test_a_call_runs_what_its_plan_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a card of two SMs, which little fills."""
    monkeypatch.setenv("CUFLASH_SIMULATOR_ARCH", "sm_90")
    with_sms(monkeypatch, 2)
    host = Target("sm_90")
    query, key, value = (host.random((1, 512, 2, 96), "bfloat16", seed) for seed in range(3))
    assert cuflash.plan(query, key, value).kernels[0].name == FORWARD_WGMMA.name
    report = check(lambda: cuflash.scaled_dot_product_attention(query, key, value), seeds=())
    assert report.kernels == (FORWARD_WGMMA.name,)


def test_other_architectures_are_not_asked() -> None:
    for arch, backward in itertools.product(("sm_80", "sm_100"), (False, True)):
        on = device.of_arch(arch, "gpu")
        assert "wgmma" not in planner.make_plan(planned(backward).problem, on, backward=backward).choice


# --- The table ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.sample(1)
@pytest.mark.parametrize("key", LINES, ids=lambda key: "-".join(map(str, key)))
def test_the_model_finds_what_the_table_has(key: predicted_loops.Key) -> None:
    """Nearly: machine code of another version of the compiler may differ."""
    found, line = benchmark.loop_of(key), predicted_loops.table()[key]
    assert found is not None
    assert found.blocks == line.blocks
    assert found.full == pytest.approx(line.full, rel=0.1)
    assert found.alone == pytest.approx(line.alone, rel=0.1)


def test_both_kernels_have_lines_of_what_matters_most() -> None:
    known = predicted_loops.table()
    for name, head_dim, is_causal in itertools.product(WGMMA, (64, 96, 128), (False, True)):
        assert predicted_loops.Key(name, head_dim, head_dim, "", is_causal) in known
    for name, head_dim, feature in itertools.product(
        WGMMA, (64, 128), ("window", "softcap", "dropout", "alibi", "sinks", "varlen", "seqlens_kv")
    ):
        assert predicted_loops.Key(name, head_dim, head_dim, feature, False) in known


def test_two_features_cost_what_each_of_them_does() -> None:
    def loop(**features: Any) -> float:
        problem = planned(False, features=SampleFeatures(**features)).problem
        found = predicted_loops.loops_of([FORWARD_WGMMA.name], problem)
        assert found is not None
        return found[0].full

    both, plain = loop(softcap=30.0, alibi=True), loop()
    assert both == pytest.approx(loop(softcap=30.0) + loop(alibi=True) - plain)


def test_the_clock_is_that_of_the_timing_model() -> None:
    card = machine.CARDS["sm_90"]
    for share in (0.0, 0.1, 0.4, 0.8, 1.0):
        assert predicted_wgmma.clock_ghz(share) == pytest.approx(card.clock_under(share))
    units = machine.MULTIPROCESSORS["sm_90"].warpgroups
    assert units is not None
    assert 4 * units.multiply_adds == predicted_wgmma._PEAK


def test_times_are_those_of_the_model_of_grids(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which lays out block by block."""
    for variable in (wgmma_forward.VARIABLE, wgmma_backward.VARIABLE):
        monkeypatch.setenv(variable, "1")
    for backward, seqlen, is_causal in itertools.product((False, True), (1024, 4096), (False, True)):
        plan = planned(backward, seqlen, is_causal=is_causal, tile=None)
        kernel = next(kernel for kernel in plan.kernels if kernel.name == WGMMA[backward])
        line = predicted_loops.table()[predicted_loops.Key(kernel.name, 128, 128, "", is_causal)]
        steady = _stand_in(line, kernel)
        masked = _stand_in(line._replace(full=line.full * line.masked), kernel)
        laid_out = prediction.lay_out(steady, kernel, plan.problem, machine.CARDS["sm_90"], masked=masked)
        section = min(kernel.section_heads, 64)
        found = predicted_wgmma.milliseconds(kernel.case, line, plan.problem, ON, section)
        convert = [prediction.predict_traffic(of, plan.problem, machine.CARDS["sm_90"]) for of in plan.kernels if "convert" in of.name]
        assert found == pytest.approx(laid_out.milliseconds + sum(of.milliseconds for of in convert), rel=0.12), (seqlen, is_causal)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("is_split", [False, True])
def test_times_of_one_head_are_those_of_the_model_of_grids(is_split: bool, is_causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where all blocks start together, and each waits for those before it, for those of its chain only, or, with less to do itself, in vain."""
    monkeypatch.setenv(wgmma_backward.VARIABLE, "1")
    monkeypatch.setattr(query_splits, "fastest", query_splits.fastest.__wrapped__)  # keeps nothing
    if not is_split:
        monkeypatch.setattr(query_splits, "_candidates", lambda *_: ())
    plan, card = planned(True, 4096, heads=1, batch=1, is_causal=is_causal), machine.CARDS["sm_90"]
    kernel = next(kernel for kernel in plan.kernels if kernel.name == WGMMA[True])
    assert (kernel.splits.number > 1) == is_split
    line = predicted_loops.table()[predicted_loops.Key(kernel.name, 128, 128, "", is_causal)]
    masked = _stand_in(line._replace(full=line.full * line.masked), kernel)
    laid_out = prediction.lay_out(_stand_in(line, kernel), kernel, plan.problem, card, masked=masked)
    behind = [prediction.predict_without_tiles(of, plan, card) for of in plan.kernels[plan.kernels.index(kernel) + 1 :]]
    found = predicted_wgmma.milliseconds(kernel.case, line, plan.problem, ON, 1)
    assert found == pytest.approx(laid_out.milliseconds + sum(of.milliseconds for of in behind), rel=0.2)


def _stand_in(line: Any, kernel: Any) -> prediction.KernelPrediction:
    described = prediction.Description(
        kernel.name, "sm_90", "bfloat16", 128, 128, False, kernel.tile, 0, 0, kernel.shared_bytes, 0
    )  # fmt: skip
    pairs = kernel.tile.tile_q * kernel.tile.tile_kv
    share = predicted_wgmma.multiply_adds(kernel.case, kernel.tile, ON) / (line.full * pairs * predicted_wgmma._PEAK)
    between = line.between if kernel.spec.stays else None
    return prediction.KernelPrediction(described, 1, 0, 0, line.full * pairs, {"matrix": share}, {}, (None, None), 0.0, between)  # type: ignore[arg-type]
