"""The backward pass as one kernel with five products: as exact as the others, the same bits whatever the order of blocks, and chosen as the plan says."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import numpy
import pytest
from conftest import Target
from kernel_mutations import BROADCAST_KEY
from problems import checked
from test_features import FEATURES
from test_sequences import offsets, packed

import cuflash
from cuflash import Tile
from cuflash.cli.samples import stand_in
from cuflash.errors import TileError
from cuflash.hardware import device
from cuflash.hardware.device import ARCHITECTURES, Device
from cuflash.planning import fused_backward, planner, predicted_backward, predicted_tiles, predicted_time, tile_choice, tile_rules
from cuflash.planning.kernel_cases import KernelCase
from cuflash.planning.kernel_specs import BACKWARD_DKDV, BACKWARD_DQ, BACKWARD_FUSED
from cuflash.simulator import SimulatorError, check
from cuflash.simulator.options import configure
from cuflash.timing.grid import grid_clocks
from cuflash.timing.machine import CARDS, multiprocessor

pytest.importorskip("cupy")

TILE = Tile(32, 32, 2, 2)
FUSED = {"backward_fused": TILE}
KERNELS = ("backward_delta", "backward_fused_mma", "backward_dq_convert")


def names(plan: cuflash.Plan) -> list[str]:
    return [kernel.name for kernel in plan.kernels]


def inputs_of(
    target: Target, lengths: tuple[int, int] = (100, 130), head_dim: int = 32, heads: tuple[int, int] = (2, 1), batches: tuple[int, int] = (2, 2),
    dtype: str = "bfloat16", view: str = "contiguous", head_dim_v: int = 0,
) -> list[Any]:  # fmt: skip
    shapes = (
        (batches[0], lengths[0], heads[0], head_dim),
        (batches[1], lengths[1], heads[1], head_dim),
        (batches[1], lengths[1], heads[1], head_dim_v or head_dim),
    )
    return [target.random(shape, dtype, seed, view) for seed, shape in enumerate(shapes)]


@pytest.fixture(params=["sm_80", "sm_90"])
def on(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Target:
    """Additions one by one, and four at a time."""
    monkeypatch.setenv("CUFLASH_SIMULATOR_ARCH", request.param)
    return Target(request.param)


# --- Right --------------------------------------------------------------------------------------------------------------------------------

MASKS: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"is_causal": True},
    "bottom_right": {"is_causal": True, "causal_alignment": "bottom_right"},
}


@pytest.mark.sample(4)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("batches", [(2, 2), (2, 1)], ids=str)
@pytest.mark.parametrize("lengths", [(100, 130), (130, 60), (1, 33)], ids=str)
def test_grouped_and_broadcast_heads(on: Target, lengths: tuple[int, int], batches: tuple[int, int], mask: str) -> None:
    """Odd lengths, keys that no query sees, queries that see no key."""
    on.check(*inputs_of(on, lengths, batches=batches), enable_gqa=True, tile=TILE, backward_tile=FUSED, **MASKS[mask])


TILES = {
    "1 stage": (32, Tile(32, 32, 2, 1)),
    "3 stages": (32, Tile(32, 32, 2, 3)),
    "warps share columns": (64, Tile(32, 64, 4, 2)),
    "16 rows for each warp": (48, Tile(64, 64, 4, 2)),
    "32 keys for each warp": (33, Tile(32, 64, 2, 2)),
    "8 warps": (128, Tile(64, 128, 8, 2)),
    "one column group for each warp": (64, Tile(16, 64, 4, 1)),
    "4 warps have the same keys": (64, Tile(64, 32, 4, 1)),
}


@pytest.mark.sample(4)
@pytest.mark.parametrize("case", TILES)
def test_tiles(on: Target, case: str) -> None:
    head_dim, tile = TILES[case]
    inputs = inputs_of(on, (100, 150), head_dim, heads=(1, 1), batches=(1, 1), dtype="float16")
    on.check(*inputs, is_causal=True, tile=TILE, backward_tile={"backward_fused": tile})


@pytest.mark.parametrize("tile", [Tile(32, 16, 1, 1), Tile(64, 16, 2, 1), Tile(96, 48, 3, 1)], ids=str)
def test_warps_that_share_keys_are_whole_groups(tile: Tile) -> None:
    """There were more of them than warps, or a rest; the planner and the kernel divided."""
    on = Target("sm_80")
    case = KernelCase(BACKWARD_FUSED, "float16", 64)
    assert tile.num_warps % case.sharing_warps(tile, on.device) == 0
    on.check(
        *inputs_of(on, (100, 70), 64, heads=(1, 1), batches=(1, 1), dtype="float16"), tile=TILE, backward_tile={"backward_fused": tile}
    )


def test_every_legal_tile_has_whole_groups() -> None:
    for arch, head_dim in itertools.product(("sm_80", "sm_86", "sm_90"), (16, 32, 64, 96, 128, 256)):
        case, on = KernelCase(BACKWARD_FUSED, "float16", head_dim), device.of_arch(arch, "gpu")
        for tile in tile_choice.legal_tiles_for(case, on):
            sharing = case.sharing_warps(tile, on)
            assert tile.num_warps % sharing == 0, tile
            assert tile.tile_kv % (tile.num_warps // sharing * 16) == 0 == tile.tile_q % (16 * sharing), tile


@pytest.mark.sample(2)
@pytest.mark.parametrize("head_dim", [1, 7, 72])
def test_head_dims(on: Target, head_dim: int) -> None:
    on.check(*inputs_of(on, (70, 60), head_dim, heads=(1, 1), dtype="float16"), tile=TILE, backward_tile=FUSED)


@pytest.mark.sample(1)
def test_value_with_a_head_dim_of_its_own(on: Target) -> None:
    on.check(*inputs_of(on, head_dim_v=72), enable_gqa=True, tile=TILE, backward_tile=FUSED)


def test_strides(simulator: Target, view: str) -> None:
    simulator.check(*inputs_of(simulator, head_dim=33, view=view, heads=(2, 2)), is_causal=True, tile=TILE, backward_tile=FUSED)


@pytest.mark.sample(4)
@pytest.mark.parametrize("feature", FEATURES)
def test_features(simulator: Target, feature: str) -> None:
    from test_features import inputs_of as featured

    inputs = featured(simulator, "bfloat16", 32)
    simulator.check(*inputs, enable_gqa=True, tile=TILE, backward_tile=FUSED, **FEATURES[feature])


@pytest.mark.sample(4)
@pytest.mark.parametrize("seed", range(12))
def test_windows(simulator: Target, seed: int) -> None:
    """Which blocks add to a tile of queries follows from the window: a wrong place among them is a wrong sum, or a wait without end."""
    rng = numpy.random.default_rng(seed)
    lengths = (int(rng.integers(1, 200)), int(rng.integers(1, 200)))
    window = tuple(None if rng.random() < 0.2 else int(rng.integers(0, 90)) for _ in range(2))
    alignment = "top_left" if seed % 2 else "bottom_right"
    options: dict[str, Any] = {"is_causal": seed % 4 < 2, "causal_alignment": alignment, "window": window}
    if window != (None, None):
        inputs = inputs_of(simulator, lengths, heads=(1, 1), batches=(1, 1))
        simulator.check(*inputs, tile=TILE, backward_tile={"backward_fused": Tile(16 * (1 + seed % 2), 32, 2, 2)}, **options)


def seen_here_and_there(lengths: tuple[int, int], *tiles: tuple[int, int]) -> numpy.ndarray[Any, Any]:
    """A boolean mask with a third of the pairs of a few tiles of 16 x 32, and of all others none."""
    seen = numpy.zeros(lengths, bool)
    for tile_q, tile_kv in tiles:
        seen[16 * tile_q : 16 * tile_q + 16, 32 * tile_kv : 32 * tile_kv + 32] = True
    return seen & (numpy.random.default_rng(5).random(lengths) < 1 / 3)


DOCUMENTS = {
    "segment_ids_q": numpy.arange(1300, dtype=numpy.int32)[None] // 100,
    "segment_ids_kv": numpy.arange(130, dtype=numpy.int32)[None] // 50 * 6,
}
HIDING: dict[str, tuple[tuple[int, int], dict[str, Any]]] = {
    "far apart": ((1300, 70), {"attn_mask": seen_here_and_there((1300, 70), (81, 0), (80, 1), (47, 0), (47, 1), (15, 1), (0, 0), (0, 2))}),
    "another mask of each head": ((130, 130), {"attn_mask": numpy.stack([seen_here_and_there((130, 130), (7, 0), (7, 3), (2, 1)), seen_here_and_there((130, 130), (0, 2))])}),
    "documents": ((1300, 130), DOCUMENTS),
    "causal documents": ((1300, 130), {**DOCUMENTS, "is_causal": True, "causal_alignment": "bottom_right"}),
    "mask with a window": ((130, 130), {"attn_mask": numpy.arange(130) % 3 > 0, "window": (40, 10)}),
    "nothing is visible": ((130, 130), {"attn_mask": numpy.zeros((130, 130), bool)}),
}  # fmt: skip
"""Tiles that data hide: more than a warp looks at together, of some heads alone, the first or the last ones."""


@pytest.mark.sample(3)
@pytest.mark.parametrize("stages", [1, 2, 3])
@pytest.mark.parametrize("case", HIDING)
def test_tiles_that_data_hide(on: Target, case: str, stages: int) -> None:
    """A wrong place among the blocks that add to a tile of queries is a wrong sum, or a wait without end."""
    lengths, options = HIDING[case]
    inputs = inputs_of(on, lengths, batches=(1, 1))
    on.check(*inputs, enable_gqa=True, tile=TILE, backward_tile={"backward_fused": Tile(16, 32, 2, stages)}, **options)


@pytest.mark.parametrize("mask", ["full", "causal"])
@pytest.mark.parametrize("batches", [(3, 3), (3, 1)], ids=str)
def test_key_lengths(simulator: Target, batches: tuple[int, int], mask: str) -> None:
    lengths = numpy.array([130, 0, 37], numpy.int32)
    inputs = inputs_of(simulator, batches=batches)
    options = {**MASKS[mask], "enable_gqa": True}
    key, value = (numpy.broadcast_to(x, (3, *x.shape[1:])) if batches[1] == 1 else x for x in inputs[1:])
    simulator.check(inputs[0], key, value, seqlens_kv=lengths, tile=TILE, backward_tile=FUSED, **options)


@pytest.mark.sample(2)
@pytest.mark.parametrize("mask", MASKS)
def test_packed_sequences(on: Target, mask: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some are empty, and the last tile of one is not the first of the next."""
    lengths_q, lengths_kv = [40, 0, 70, 33, 5], [60, 20, 37, 0, 100]
    inputs = packed(on, (sum(lengths_q), sum(lengths_kv)), "bfloat16", (32, 32), heads=(2, 1))
    backward = functools.partial(cuflash.varlen_attention_backward, tile=FUSED)
    monkeypatch.setattr(cuflash, "varlen_attention_backward", backward)  # the forward pass knows no such kernel
    on.check_packed(inputs, (offsets(on, lengths_q), offsets(on, lengths_kv)), enable_gqa=True, **MASKS[mask])


@pytest.mark.parametrize("senseless", [[0, 100, 50, 150], [0, 150, 0, 150], [0, 400, -3, 150], [150, 0, 20, 150]], ids=str)
def test_senseless_offsets_end(simulator: Target, senseless: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequences that lie upon each other share sums and turns: what they give is senseless, but nobody waits for ever."""
    from cuflash.runtime.prepared import PreparedCall

    monkeypatch.setattr(PreparedCall, "check_offsets", lambda *_: None)  # as on a GPU
    x = simulator.random((150, 1, 32), "bfloat16", 1)
    cu, lse = numpy.array(senseless, numpy.int32), simulator.random((1, 150), "float32", 2)
    run = functools.partial(cuflash.varlen_attention_backward, x, x, x, x, x, lse, cu, cu, 150, 150, tile=FUSED)
    fired = ""
    try:
        run()
    except SimulatorError as error:  # blocks of two sequences write the same rows of dK
        fired = error.check
    assert fired in ("", "race")
    for seed in range(4):
        with configure(schedule="random", seed=seed, checks=False, max_instructions=2**22):
            assert all(gradient.shape == x.shape for gradient in run())


# --- The same bits, whatever the order ------------------------------------------------------------------------------------------------------


@pytest.mark.sample(2)
@pytest.mark.parametrize("mask", ["full", "causal"])
def test_thirty_schedules_give_the_same_bits(on: Target, mask: str) -> None:
    """Blocks start in another order in each."""
    inputs = inputs_of(on, batches=(2, 1))
    options = {**MASKS[mask], "enable_gqa": True}
    out, lse = cuflash.scaled_dot_product_attention(*inputs, return_lse=True, **options)
    call = functools.partial(cuflash.scaled_dot_product_attention_backward, out, *inputs, out, lse, tile=FUSED, **options)
    report = check(call, seeds=range(30))
    assert report.kernels == KERNELS
    assert len(report.runs) == 32


@pytest.mark.sample(1)
@pytest.mark.parametrize("case", HIDING)
def test_every_schedule_gives_the_same_bits_where_data_hide_tiles(on: Target, case: str, request: pytest.FixtureRequest) -> None:
    seeds = range(100 if request.config.getoption("--exhaustive") else 6)
    lengths, options = HIDING[case]
    inputs = inputs_of(on, lengths, batches=(1, 1))
    out, lse = cuflash.scaled_dot_product_attention(*inputs, return_lse=True, enable_gqa=True, tile=TILE, **options)
    backward = cuflash.scaled_dot_product_attention_backward
    tile = {"backward_fused": Tile(16, 32, 2, 2)}
    report = check(functools.partial(backward, out, *inputs, out, lse, tile=tile, enable_gqa=True, **options), seeds=seeds)
    assert report.kernels == (KERNELS[0], "visible_tiles", *KERNELS[1:])
    assert len(report.runs) == 2 + len(seeds)


@pytest.mark.parametrize("schedule", ["late", "random"])
def test_blocks_that_run_side_by_side_wait_for_each_other(simulator: Target, schedule: Any) -> None:
    inputs = inputs_of(simulator, (64, 500), heads=(1, 1), batches=(1, 1))
    out, lse = cuflash.scaled_dot_product_attention(*inputs, return_lse=True)
    run = functools.partial(cuflash.scaled_dot_product_attention_backward, out, *inputs, out, lse, tile=FUSED)
    with configure(threads=1):
        alone = [Target.bits(grad) for grad in run()]
    for seed in range(3):
        with configure(threads=4, schedule=schedule, seed=seed):
            assert [Target.bits(grad) for grad in run()] == alone


# --- Chosen -------------------------------------------------------------------------------------------------------------------------------


def plan_of(
    arch: str = "sm_80", head_dim: int = 128, dtype: str = "float16", batch: int = 4, seqlen: int = 4000, heads: int = 16, heads_kv: int = 0,
    tile: Any = None, **options: Any,
) -> cuflash.Plan:  # fmt: skip
    """Of a call of any size, which needs no memory."""
    query, key = (stand_in((batch, seqlen, count, head_dim), dtype) for count in (heads, heads_kv or heads))
    arrays = {name: options.pop(name) for name in [*options] if isinstance(options[name], numpy.ndarray)}
    problem = checked(query, key, key, enable_gqa=True, **arrays, **options)
    return planner.make_plan(problem, device.of_arch(arch, "gpu"), backward=True, tile=tile)


FUSED_KERNELS = ["backward_delta", "backward_fused", "backward_dq_convert"]
TWO_KERNELS = ["backward_delta", "backward_dkdv", "backward_dq"]
WITH_SPLITS = ["backward_delta", "backward_dkdv", "backward_dkdv_merge", "backward_dq"]


@pytest.mark.parametrize(("arch", "head_dim"), list(predicted_tiles.FUSED_BACKWARD), ids=str)
def test_taken_where_it_is_predicted_to_be_faster(arch: str, head_dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(arch, head_dim)
    assert names(plan) == FUSED_KERNELS
    assert plan.kernels[1].tile == Tile(*predicted_tiles.FUSED_BACKWARD[arch, head_dim])
    monkeypatch.setenv(fused_backward.VARIABLE, "1")
    assert names(plan_of(arch, head_dim)) == FUSED_KERNELS
    monkeypatch.setenv(fused_backward.VARIABLE, "0")
    assert names(plan_of(arch, head_dim)) == (
        TWO_KERNELS if head_dim < 256 else ["backward_delta", "backward_dv", "backward_dk", "backward_dq"]
    )
    assert names(plan_of(arch, head_dim, tile={"backward_fused": plan.kernels[1].tile})) == FUSED_KERNELS


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ({"batch": 1, "seqlen": 512, "heads": 1}, TWO_KERNELS),  # four blocks, each a tile behind the one before
        ({"batch": 1, "seqlen": 4000, "heads": 1}, WITH_SPLITS),
        ({"batch": 32, "seqlen": 512, "heads": 16}, FUSED_KERNELS),
        ({"batch": 1, "seqlen": 4000, "heads": 32, "heads_kv": 1}, WITH_SPLITS),  # 32 blocks for 108 SMs
        ({"batch": 8, "seqlen": 4000, "heads": 32, "heads_kv": 8}, FUSED_KERNELS),
        ({"batch": 4096, "seqlen": 20, "heads": 16}, TWO_KERNELS),  # of a tile of 64 queries 20 would be sums
    ],
)
def test_the_grid_decides(shape: dict[str, Any], expected: list[str], is_causal: bool) -> None:
    assert names(plan_of(**shape, is_causal=is_causal)) == expected


def test_other_calls_keep_their_kernels() -> None:
    """No prediction, no change: another head_dim, an architecture of which nothing is known, a feature that spills, two features."""
    slopes = numpy.zeros(16, numpy.float32)
    for options in ({"head_dim": 96}, {"arch": "sm_100"}, {"softcap": 2.0}, {"window": (500, 0), "alibi_slopes": slopes}):
        plan = plan_of(**options)
        assert names(plan) == TWO_KERNELS, options
        assert "nothing is predicted of it here" in plan.choice


@pytest.mark.parametrize(("arch", "head_dim"), list(predicted_tiles.FUSED_WITH_FEATURE), ids=str)
def test_features_of_which_it_is_predicted(arch: str, head_dim: int) -> None:
    given = {
        "window": {"window": (3000, 0)}, "alibi": {"alibi_slopes": numpy.zeros(16, numpy.float32)},
        "dropout": {"dropout_p": 0.1, "dropout_seed": 1}, "softcap": {"softcap": 2.0},
        "float16": {"attn_mask": stand_in((4000, 4000), "float16")}, "float32": {"attn_mask": stand_in((4000, 4000), "float32")},
        "sinks": {"sinks": numpy.zeros(16, numpy.float32)}, "seqlens_kv": {"seqlens_kv": numpy.zeros(4, numpy.int32)},
        "bool": {"attn_mask": stand_in((4000, 4000), "bool")},
        "segments": {"segment_ids_q": stand_in((4, 4000), "int32"), "segment_ids_kv": stand_in((4, 4000), "int32")},
    }  # fmt: skip
    for feature in predicted_tiles.FUSED_WITH_FEATURE[arch, head_dim] & set(given):
        plan = plan_of(arch, head_dim, **given[feature])
        (fused,) = [kernel for kernel in plan.kernels if kernel.spec == BACKWARD_FUSED]
        assert fused.tile == Tile(*predicted_tiles.FUSED_BACKWARD[arch, head_dim]), feature


def test_predictions_are_those_of_the_model_of_grids() -> None:
    """Which hands out block by block; here are sums and maxima."""
    rng = numpy.random.default_rng(1)
    for case in range(60):
        arch = ("sm_80", "sm_86", "sm_90")[case % 3]
        on, spec = device.of_arch(arch, "gpu"), (BACKWARD_FUSED, BACKWARD_DKDV, BACKWARD_DQ)[case // 3 % 3]
        shape = (int(rng.integers(1, 9)), int(2 ** rng.uniform(6, 12)), int(rng.integers(1, 9)), 128)
        problem = checked(*3 * [stand_in(shape, "float16")], is_causal=bool(case % 2))
        of = KernelCase(spec, "float16", 128)
        tile = tile_choice.default_tile(of, on)
        grid, steady = predicted_time.grid_of(of, tile, problem), predicted_backward.STEADY[arch, spec.name, 128]
        last, pairs = steady.blocks * steady.full, tile.tile_q * tile.tile_kv
        trip = [pairs * (steady.alone + (last - steady.alone) * n / max(1, steady.blocks - 1)) for n in range(steady.blocks)]
        width = 2 * 2 * 128
        beside = 936 + (tile.tile_q + tile.tile_kv + of.stationary_rows(tile)) * width / predicted_time.TRAFFIC[arch].l2
        blocks = sorted(grid.heads * list(grid.trips), reverse=True)
        exact = grid_clocks(blocks, num_sms=on.num_sms, trip_clocks=trip, overhead=beside)
        assert predicted_time.clocks(steady, of, tile, grid, problem, on) == pytest.approx(exact, rel=0.25), (arch, spec, shape)


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"window": (5000, 0)}], ids=str)
def test_few_blocks_stand_for_those_of_a_million_tokens(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    on, shape = device.of_arch("sm_80", "gpu"), (1, 2**20 + 77, 2, 128)
    problem = checked(*3 * [stand_in(shape, "float16")], **options)
    for spec in (BACKWARD_FUSED, BACKWARD_DKDV, BACKWARD_DQ):
        of = KernelCase(spec, "float16", 128)
        tile = tile_choice.default_tile(of, on)
        grids = [predicted_time.grid_of(of, tile, problem)]
        with monkeypatch.context() as patched:
            patched.setattr(predicted_time, "_MOST_TRIPS", 2**20)
            grids.append(predicted_time.grid_of(of, tile, problem))
        steady = predicted_backward.STEADY["sm_80", spec.name, 128]
        few, every = (predicted_time.clocks(steady, of, tile, grid, problem, on) for grid in grids)
        assert few == pytest.approx(every, rel=0.002)
        assert len(grids[0].trips) <= 1024 < len(grids[1].trips)


def test_what_predictions_assume_is_what_the_timing_model_does() -> None:
    for arch, traffic in predicted_time.TRAFFIC.items():
        machine, card = multiprocessor(arch), CARDS[arch]
        assert traffic.l2 == machine.l2_bytes
        assert traffic.memory == pytest.approx(card.memory_bytes_per_second / card.clock_ghz / 1e9 / card.num_sms, rel=0.02)
        assert machine.copy_latency + card.block_start == predicted_time._BLOCK_CLOCKS


def test_a_mapping_pins_either_way() -> None:
    assert names(plan_of(head_dim=32, tile=FUSED)) == FUSED_KERNELS
    pinned = plan_of(tile={"backward_dq": Tile(64, 64, 4, 2)})
    assert names(pinned) == TWO_KERNELS
    assert pinned.choice == "backward_dkdv and backward_dq, which the tile is for"
    with pytest.raises(TileError, match="kernels that run: backward_fused"):
        plan_of(tile={**FUSED, "backward_dq": Tile(64, 64, 4, 2)})


def test_a_single_tile_is_for_kernels_of_their_own() -> None:
    assert names(plan_of(tile=Tile(32, 64, 4, 2))) == TWO_KERNELS


def test_without_keys_there_are_no_blocks_to_add_up() -> None:
    """With sinks such a call has something to do; dQ was left as the memory was."""
    query, key = numpy.ones((1, 40, 2, 64), numpy.float16), numpy.zeros((1, 0, 2, 64), numpy.float16)
    sinks = numpy.ones(2, numpy.float32)
    out, lse = cuflash.scaled_dot_product_attention(query, key, key, sinks=sinks, return_lse=True)
    gradients = cuflash.scaled_dot_product_attention_backward(query, query, key, key, out, lse, sinks=sinks)
    assert not gradients.query.any()
    with pytest.raises(TileError, match="kernels that run"):
        cuflash.plan(query, key, key, sinks=sinks, backward=True, tile=FUSED)


@pytest.mark.parametrize(
    "options",
    [
        {"arch": "sm_75"}, {"dtype": "float32"}, {"head_dim": 320},
    ],
    ids=lambda options: next(iter(options)),
)  # fmt: skip
def test_what_it_cannot_do_is_done_by_the_others(options: dict[str, Any]) -> None:
    plan = plan_of(**options)
    assert "backward_dq" in names(plan)
    assert not {"query_sums", "turns"} & {buffer.name for buffer in plan.workspace}
    with pytest.raises(TileError, match=r"kernels that run: .*backward_dq"):
        plan_of(**options, tile=FUSED)


def test_key_and_value_with_other_heads_take_kernels_of_their_own(simulator: Target) -> None:
    query, key, value, _ = BROADCAST_KEY.arrays("float16")
    assert "backward_dv" in names(cuflash.plan(query, key, value, enable_gqa=True, backward=True))
    with pytest.raises(TileError, match="backward_dv"):
        cuflash.plan(query, key, value, enable_gqa=True, backward=True, tile=FUSED)


def test_memory_grows_with_the_length() -> None:
    """Four bytes for each element of dQ, a turn for each tile, the row statistics."""
    plan = plan_of()
    tile_q = plan.kernels[1].tile.tile_q
    tiles = 4 * 16 * -(-4000 // tile_q)
    assert {buffer.name: buffer.nbytes for buffer in plan.workspace} == {
        "row_statistics": 8 * 4 * 16 * 4000, "query_sums": 4 * tiles * tile_q * 128, "turns": 4 * (1 + tiles),
    }  # fmt: skip
    assert plan.workspace_bytes == sum(buffer.nbytes for buffer in plan.workspace)
    assert "backward_fused: backward_fused_mma.cu" in str(plan)


@pytest.mark.parametrize("arch", [arch for arch in ARCHITECTURES if arch != "sm_75"])
def test_legal_tiles_are_those_that_warps_can_share_out(arch: str) -> None:
    """Queries of dQ, and what belongs to keys that several warps have."""
    on: Device = device.of_arch(arch)
    for head_dim in (16, 64, 80, 128, 256):
        case = KernelCase(BACKWARD_FUSED, "float16", head_dim)
        tiles = tile_choice.legal_tiles_for(case, on)
        assert tiles
        for tile in tiles:
            shared = [
                tile.num_warps // (tile.tile_q // rows) for rows in (16, 32) if tile.tile_q % rows == 0 and tile.num_warps % (tile.tile_q // rows) == 0
            ]  # fmt: skip
            assert any(groups in (1, 2, 4, 8) and -(-head_dim // 16) % groups == 0 for groups in shared), tile
            sharing = case.sharing_warps(tile, on)
            assert tile.tile_kv * sharing % (16 * tile.num_warps) == tile.tile_q % (16 * sharing) == -(-head_dim // 16) % sharing == 0, tile


@pytest.mark.parametrize(
    ("head_dim", "tile", "sharing"),
    [
        (128, Tile(64, 128, 8, 2), 2), (128, Tile(64, 256, 8, 1), 1), (256, Tile(64, 64, 8, 1), 4), (256, Tile(32, 32, 4, 1), 2),
        (48, Tile(64, 64, 4, 2), 1), (128, Tile(16, 64, 4, 2), 1), (64, Tile(64, 16, 8, 2), 1),
    ],
    ids=str,
)  # fmt: skip
def test_warps_share_keys_until_each_has_32(head_dim: int, tile: Tile, sharing: int) -> None:
    """As far as there are 16 queries and 16 columns for each of them; where there are too few keys even so, the tile is refused."""
    case, on = KernelCase(BACKWARD_FUSED, "float16", head_dim), device.of_arch("sm_90")
    assert case.sharing_warps(tile, on) == sharing
    refused = tile_rules.broken_rule(case, tile, on)
    assert (refused is not None and "tile_kv must be a multiple of 16 * num_warps = 128" in refused) == (tile.tile_kv == 16)
