"""The forward kernel of wgmma and TMA: as exact as the other one, the same bits under every schedule, and chosen as the plan says."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from typing import Any

import numpy
import pytest
from conftest import ELEMENTS, HAS_GPU, Target

import cuflash
from cuflash import Tile
from cuflash.errors import TileError
from cuflash.hardware import device
from cuflash.planning import measured_tiles, planner, predicted_tiles, tile_choice, wgmma_forward
from cuflash.planning.kernel_cases import KernelCase
from cuflash.planning.kernel_specs import FORWARD_WGMMA
from cuflash.problem.features import MASK_KINDS
from cuflash.runtime import calls
from cuflash.simulator import check

pytest.importorskip("cupy")

NAME = "forward_wgmma"
HOST = Target("sm_90")
SHORT = Tile(128, 32, 8, 2)
"""Many tiles of few keys."""


NUM_SMS = 2
"""That plans are made for, on a GPU too, so that blocks have several tiles of queries."""


@pytest.fixture(autouse=True)
def asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel wherever it can run, on a small sm_90."""
    monkeypatch.setenv("CUFLASH_SIMULATOR_ARCH", "sm_90")
    monkeypatch.setenv(wgmma_forward.VARIABLE, "1")
    with_sms(monkeypatch, NUM_SMS)


def with_sms(monkeypatch: pytest.MonkeyPatch, num_sms: int) -> None:
    """Plans and calls are made for so many from here on."""
    found = device.of_memory
    monkeypatch.setattr(device, "of_memory", lambda kind, index: dataclasses.replace(found(kind, index), num_sms=num_sms))
    monkeypatch.setattr(calls, "_calls", {})  # those that were made for others


@pytest.fixture(params=["sm_90", *([pytest.param("gpu", marks=pytest.mark.gpu)] if HAS_GPU else [])])
def hopper(request: pytest.FixtureRequest) -> Target:
    """The simulator, and a GPU that has the instructions."""
    target = Target(request.param)
    if target.device.capability != 90:
        pytest.skip("the GPU is no sm_90")
    return target


def inputs_of(
    on: Target, lengths: tuple[int, int] = (200, 150), head_dim: int = 64, heads: tuple[int, int] = (1, 1), batches: tuple[int, int] = (1, 1),
    dtype: str = "bfloat16", view: str = "contiguous",
) -> list[Any]:  # fmt: skip
    query = (batches[0], lengths[0], heads[0], head_dim)
    key = (batches[1], lengths[1], heads[1], head_dim)
    return [on.random(shape, dtype, seed, view) for seed, shape in enumerate((query, key, key))]


def checked(on: Target, *inputs: Any, **options: Any) -> Any:
    """The results, judged, of this kernel and no other."""
    planned = {name: option for name, option in options.items() if name != "out"}
    assert names(cuflash.plan(*inputs, enable_gqa=True, **planned)) == [NAME]
    return on.check(*inputs, backward=False, enable_gqa=True, **options)


def names(plan: cuflash.Plan) -> list[str]:
    return [kernel.name for kernel in plan.kernels]


# --- Right --------------------------------------------------------------------------------------------------------------------------------

MASKS: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"is_causal": True},
    "bottom_right": {"is_causal": True, "causal_alignment": "bottom_right"},
}


@pytest.mark.sample(12)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("lengths", [(200, 300), (300, 130), (1, 1), (193, 65)], ids=str)
@pytest.mark.parametrize("case", [("bfloat16", 64), ("float16", 128)], ids=str)
def test_lengths_and_grouped_heads(hopper: Target, case: tuple[str, int], lengths: tuple[int, int], mask: str) -> None:
    """Ends that no tile divides, warpgroups without queries, keys that no query sees, queries that see no key."""
    dtype, head_dim = case
    checked(hopper, *inputs_of(hopper, lengths, head_dim, heads=(2, 1), dtype=dtype), **MASKS[mask])


def test_probabilities_that_are_powers_of_two_give_exact_sums(hopper: Target) -> None:
    """Of integers. One wrong probability in a register that a product still reads, which some assemblers put something else into, would show."""
    query, key, value = (numpy.zeros((1, length, 1, 64), "float32") for length in (384, 300, 300))
    random = numpy.random.default_rng(7)
    query[..., 0] = numpy.arange(384)[None, :, None] % 4
    key[..., 0] = -random.integers(0, 4, (1, 300, 1))
    value[:] = random.integers(-8, 9, value.shape)
    inputs = [hopper.place(x.astype(ELEMENTS["bfloat16"])) for x in (query, key, value)]
    assert names(cuflash.plan(*inputs, scale=math.log(2.0))) == [NAME]
    out = hopper.host(cuflash.scaled_dot_product_attention(*inputs, scale=math.log(2.0)))
    weights = numpy.exp2(query[0, :, 0].astype(float) @ key[0, :, 0].T.astype(float))
    want = weights @ value[0, :, 0].astype(float) / weights.sum(axis=1, keepdims=True)
    last_place = 2.0 ** (numpy.frexp(want)[1] - 8)
    assert (abs(out[0, :, 0] - want) <= 0.501 * last_place).all()


@pytest.mark.parametrize("case", [("bfloat16", 64), ("float16", 128)], ids=str)
def test_batches_that_share_keys(hopper: Target, case: tuple[str, int]) -> None:
    """Batch and heads of keys have one place in the map."""
    dtype, head_dim = case
    checked(hopper, *inputs_of(hopper, (70, 90), head_dim, heads=(4, 1), batches=(2, 1), dtype=dtype), is_causal=True)


def test_keys_and_values_that_are_broadcast_by_stride(hopper: Target) -> None:
    query, key, value = inputs_of(hopper, (70, 90), heads=(2, 1), batches=(2, 1))
    if not hopper.is_gpu:
        key, value = (numpy.broadcast_to(x, (2, 90, 2, 64)) for x in (key, value))
    checked(hopper, query, key, value)


@pytest.mark.sample(2)
@pytest.mark.parametrize("case", [("bfloat16", 8), ("float16", 40), ("bfloat16", 96), ("float16", 192), ("bfloat16", 256)], ids=str)
def test_head_dims(hopper: Target, case: tuple[str, int]) -> None:
    """Of which slabs of 64 columns hold more than there is, and of which registers allow two warpgroups only."""
    dtype, head_dim = case
    checked(hopper, *inputs_of(hopper, (70, 190), head_dim, dtype=dtype), is_causal=True, causal_alignment="bottom_right")


@pytest.mark.sample(1)
@pytest.mark.parametrize("dims", [(192, 128), (24, 200)], ids=str)
def test_value_with_a_head_dim_of_its_own(hopper: Target, dims: tuple[int, int]) -> None:
    """Also a wider one, which passes through the memory of Q in pieces."""
    query, key, _ = inputs_of(hopper, (70, 90), dims[0])
    checked(hopper, query, key, inputs_of(hopper, (70, 90), dims[1])[2])


SLOPES, SINKS = numpy.array([0.3, 0.02], "float32"), numpy.array([1.5, -3.0], "float32")
FEATURES: dict[str, dict[str, Any]] = {
    "window": {"window": (40, 20)},
    "narrow window": {"window": (9, 0), "tile": {NAME: Tile(192, 16, 12, 2)}},
    "causal window": {"window": (70, None), "is_causal": True, "causal_alignment": "bottom_right"},
    "softcap": {"softcap": 3.0, "is_causal": True},
    "softcap that few scores reach half of": {"softcap": 6.0},
    "softcap far above the scores": {"softcap": 80.0, "scale": -0.25},
    "alibi": {"alibi_slopes": SLOPES, "is_causal": True, "causal_alignment": "bottom_right"},
    "sinks": {"sinks": SINKS, "is_causal": True, "causal_alignment": "bottom_right"},
    "all": {"window": (60, 30), "softcap": 9.0, "alibi_slopes": SLOPES, "sinks": SINKS},
}


@pytest.mark.sample(4)
@pytest.mark.parametrize("lengths", [(300, 250), (100, 333)], ids=str)
@pytest.mark.parametrize("feature", FEATURES)
def test_features(hopper: Target, feature: str, lengths: tuple[int, int]) -> None:
    options = {name: hopper.place(x) if isinstance(x, numpy.ndarray) else x for name, x in FEATURES[feature].items()}
    head_dim, dtype = (128, "float16") if len(feature) % 2 else (64, "bfloat16")
    checked(hopper, *inputs_of(hopper, lengths, head_dim, heads=(2, 1), dtype=dtype), **options)


def test_a_nan_stays_in_its_row_and_one_that_is_hidden_does_not_matter(hopper: Target) -> None:
    """With a softcap four keys of a row share a division."""
    query, key, value = inputs_of(HOST, (300, 300), dtype="float16")
    query[:, 290], key[:, 295:] = math.nan, math.nan
    inputs = map(hopper.place, (query, key, value))
    out = hopper.host(cuflash.scaled_dot_product_attention(*inputs, softcap=3.0, is_causal=True, tile={NAME: SHORT}))
    assert [*numpy.flatnonzero(numpy.isnan(out).any(axis=(0, 2, 3)))] == [290, 295, 296, 297, 298, 299]


def test_small_capped_scores_raise_the_references_of_their_rows(hopper: Target) -> None:
    """The largest one without its sign says whether to look for the largest: of half of the queries it is negative."""
    query, key, value = inputs_of(HOST, (200, 300))
    query[:, :100], query[:, 100:], key[:] = 1, -1, numpy.linspace(0, 4, 300).reshape(1, 300, 1, 1)
    checked(hopper, *map(hopper.place, (query, key, value)), softcap=80.0)


TILES = {
    "1 stage": (128, "float16", Tile(128, 48, 8, 1)),
    "3 stages": (64, "bfloat16", Tile(192, 16, 12, 3)),
    "many keys": (64, "float16", Tile(128, 224, 8, 2)),
    "as many as registers hold": (128, "bfloat16", Tile(128, 176, 8, 2)),
}


@pytest.mark.sample(2)
@pytest.mark.parametrize("case", TILES)
def test_tiles(hopper: Target, case: str) -> None:
    head_dim, dtype, tile = TILES[case]
    checked(
        hopper, *inputs_of(hopper, (150, 500), head_dim, dtype=dtype), is_causal=True, causal_alignment="bottom_right", tile={NAME: tile}
    )


@pytest.mark.parametrize("view", ["contiguous", "transposed", "sliced"])
def test_strides(hopper: Target, view: str) -> None:
    """Those that the TMA unit can take; `transposed` and others it cannot go to the other kernel."""
    inputs = inputs_of(hopper, (70, 90), heads=(2, 2), batches=(2, 2), view=view)
    assert names(cuflash.plan(*inputs)) == ["forward" if view == "transposed" else NAME]
    hopper.check(*inputs, backward=False)


@pytest.mark.parametrize("view", ["sliced", "reversed_rows", "padded_rows", "strided_elements", "reversed_everywhere"])
def test_any_array_takes_the_output(hopper: Target, view: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unaligned rows, elements apart, rows in reverse: those are stored without the TMA unit."""
    planned: list[cuflash.Plan] = []
    monkeypatch.setattr(calls, "make_plan", lambda *given, **named: planned.append(planner.make_plan(*given, **named)) or planned[-1])
    inputs = inputs_of(hopper, (70, 90), heads=(2, 2), batches=(2, 2))
    out = hopper.restride(hopper.empty_like(inputs[0]), view)
    assert Target.bits(checked(hopper, *inputs, out=out).out) == Target.bits(checked(hopper, *inputs).out)
    assert hopper.surroundings_are_nan(out)
    assert [plan.kernels[0].maps_out for plan in planned[1::2]] == [view == "sliced", True]  # of the calls, each planned before by itself


STORED_BY_MAP = {(64, 64): True, (128, 128): True, (64, 128): True, (128, 40): True, (192, 192): False, (256, 256): False}
"""By head_dim of query and of value: where shared memory has room for O."""


@pytest.mark.parametrize(("dims", "is_stored"), STORED_BY_MAP.items(), ids=str)
def test_the_output_is_stored_by_a_map_where_there_is_room(hopper: Target, dims: tuple[int, int], is_stored: bool) -> None:
    """Of columns that fill no slab, and of rows that fill no warp, those that there are; packed sequences end within tiles, and others go on there."""
    query, key, _ = inputs_of(hopper, (200, 40), dims[0], heads=(2, 1))
    inputs = [query, key, hopper.random((1, 40, 1, dims[1]), "bfloat16", 9)]
    for options in ({}, {"is_causal": True}):
        (kernel,) = cuflash.plan(*inputs, enable_gqa=True, **options).kernels
        assert (kernel.maps_out, f"MAPS_OUT = {str(is_stored).lower()};" in kernel.config) == (is_stored, True)
        assert kernel.shared_bytes <= 227 * 1024
    if dims[0] != dims[1]:
        checked(hopper, *inputs, is_causal=True)
    offsets, keys = (hopper.place(numpy.array(x, "int32")) for x in ([0, 30, 200], [0, 20, 40]))
    packed = cuflash.varlen_plan(*(x[0] for x in inputs), offsets, keys, 170, 20, enable_gqa=True)
    assert [kernel.maps_out for kernel in packed.kernels if kernel.spec.is_tiled] == [False]


def test_other_orders_of_dimensions(hopper: Target) -> None:
    inputs = inputs_of(hopper, (70, 90), heads=(2, 2), batches=(2, 2))
    want, want_lse = cuflash.scaled_dot_product_attention(*inputs, return_lse=True)
    for layout, axes in (("bhsd", (0, 2, 1, 3)), ("sbhd", (1, 0, 2, 3))):
        moved = [x.transpose(axes).copy() for x in inputs]
        out, lse = cuflash.scaled_dot_product_attention(*moved, layout=layout, return_lse=True)
        assert Target.bits(out.transpose(numpy.argsort(axes).tolist())) == Target.bits(want)
        assert Target.bits(lse) == Target.bits(want_lse)


@pytest.mark.parametrize("case", [("bfloat16", 64, 1e6), ("float16", 128, 200.0), ("bfloat16", 64, 1e-6)], ids=str)
def test_extreme_scores(hopper: Target, case: tuple[str, int, float]) -> None:
    """Up to 10^13, where the last place of a maximum matters in an exponent; rows of one warp next to rows of ordinary scores."""
    dtype, head_dim, size = case
    query, key, value = inputs_of(HOST, (100, 150), head_dim, dtype=dtype)
    query[:, ::3] *= numpy.asarray(size, query.dtype)
    key *= numpy.asarray(size, key.dtype)
    inputs = map(hopper.place, (query, key, value))
    assert numpy.isfinite(hopper.host(checked(hopper, *inputs, is_causal=True).lse)).all()


def test_one_key_outweighs_all_others(hopper: Target) -> None:
    """What many small probabilities add up to is not lost beside it."""
    query, key, value = inputs_of(HOST, (64, 1000))
    query[...], key[:, 1:], key[:, 0] = 1, 0, 2
    checked(hopper, *map(hopper.place, (query, key, value)))


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"seqlens_kv": 997}], ids=str)
@pytest.mark.parametrize("case", [("bfloat16", 64), ("float16", 128)], ids=str)
def test_probabilities_that_are_powers_of_two_add_up_exactly(hopper: Target, case: tuple[str, int], options: dict[str, Any]) -> None:
    """A compiler that puts something else into registers of P while a product still reads them loses some of them."""
    query, key, value = inputs_of(HOST, (200, 1000), case[1], dtype=case[0])
    query[...], key[...], value[...] = 0, 0, 1
    query[..., 0] = 1
    key[..., 0] = -(numpy.arange(1000) * 7 % 9)[None, :, None]
    options = {name: hopper.place(numpy.array([x], "int32")) if name == "seqlens_kv" else x for name, x in options.items()}
    out = cuflash.scaled_dot_product_attention(*map(hopper.place, (query, key, value)), scale=math.log(2), **options)
    assert (hopper.host(out) == 1).all()


def test_scales(hopper: Target) -> None:
    inputs = inputs_of(hopper, (70, 90))
    for scale in (1.0, 1e-30, -0.5, 0.0, 1e-45):
        checked(hopper, *inputs, scale=scale)
    checked(hopper, *inputs, scale=-0.5, softcap=3.0)


def test_lse_is_left_out(hopper: Target) -> None:
    inputs = inputs_of(hopper, (70, 90))
    out = cuflash.scaled_dot_product_attention(*inputs)
    assert Target.bits(out) == Target.bits(cuflash.scaled_dot_product_attention(*inputs, return_lse=True)[0])


def test_keys_beyond_the_end_are_not_read(hopper: Target) -> None:
    """NaN behind the last key, and behind the last query."""
    inputs = inputs_of(hopper, (70, 90), view="sliced")
    assert numpy.isfinite(hopper.host(checked(hopper, *inputs).out)).all()


# --- The same bits ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case",
    [("bfloat16", 64, 2, "causal"), ("float16", 128, 1, "bottom_right"), ("float16", 64, 3, "full"), ("bfloat16", 136, 2, "causal")],
    ids=str,
)
def test_every_schedule_gives_the_same_bits(case: tuple[str, int, int, str], request: pytest.FixtureRequest) -> None:
    """With warpgroups that stop at different tiles, and with Q in registers. Only a schedule finds a wait that never ends."""
    dtype, head_dim, stages, mask = case
    seeds = range(100 if request.config.getoption("--exhaustive") else 12)
    inputs = inputs_of(Target("sm_90"), (200, 230), head_dim, heads=(2, 1), dtype=dtype)
    tile = {NAME: Tile(192, 16, 12, stages) if head_dim <= 128 else Tile(128, 16, 8, stages)}
    options = {"enable_gqa": True, "return_lse": True, "tile": tile, **MASKS[mask]}
    report = check(functools.partial(cuflash.scaled_dot_product_attention, *inputs, **options), seeds=seeds)
    assert report.kernels == (NAME,)
    assert len(report.runs) == 2 + len(seeds)


# --- Chosen -------------------------------------------------------------------------------------------------------------------------------


def plan_of(head_dim: int = 64, dtype: str = "float16", head_dim_v: int = 0, view: str = "contiguous", **options: Any) -> cuflash.Plan:
    on = Target("sm_90")
    x = on.random((2, 500, 4, head_dim), dtype, 1, view)
    value = on.random((2, 500, 4, head_dim_v), dtype, 1) if head_dim_v else x
    return cuflash.plan(x, x, value, **options)


def test_it_is_asked_for() -> None:
    plan = plan_of()
    assert names(plan) == [NAME]
    assert "choice     forward_wgmma.cu, as asked for; it has run on the simulator only" in str(plan)
    assert str(plan).isascii()


def test_a_mapping_pins_either_kernel() -> None:
    assert names(plan_of(tile={"forward": Tile(64, 64, 4, 2)})) == ["forward"]
    assert names(plan_of(tile={NAME: SHORT})) == [NAME]
    with pytest.raises(TileError, match="kernels that run: forward_wgmma"):
        plan_of(tile={NAME: SHORT, "forward": Tile(64, 64, 4, 2)})
    with pytest.raises(TileError, match="num_warps must be 8 or 12"):
        plan_of(tile={NAME: Tile(64, 64, 4, 2)})
    with pytest.raises(TileError, match="tile_kv must be at most 256"):
        plan_of(16, tile={NAME: Tile(128, 272, 8, 3)})
    with pytest.raises(TileError, match="registers: at least 164 per thread needed, 160 available with 12 warps"):
        plan_of(128, tile={NAME: Tile(192, 96, 12, 2)})
    for head_dim, tile in ((64, Tile(128, 240, 8, 2)), (128, Tile(128, 192, 8, 2)), (256, Tile(128, 96, 8, 1))):  # which spill if causal
        with pytest.raises(TileError, match=r"registers: .* 240 available with 8 warps"):
            plan_of(head_dim, tile={NAME: tile})


@pytest.mark.parametrize(
    ("head_dim", "options", "steps"),
    [(128, {}, 0), (136, {}, 9), (192, {}, 12), (192, {"is_causal": True}, 11), (256, {}, 5), (256, {"is_causal": True}, 3), (256, {"window": (99, 0)}, 0),
     (192, {"scale": -0.1}, 0)],
)  # fmt: skip
def test_q_stays_in_registers_as_far_as_they_have_room(head_dim: int, options: dict[str, Any], steps: int) -> None:
    """Of wide heads, whose products keep shared memory busy, with a positive scale and without features."""
    (kernel,) = plan_of(head_dim, **options).kernels
    assert f" Q_REGISTER_STEPS = {steps};" in kernel.config


def test_a_single_tile_is_for_whichever_takes_it() -> None:
    assert names(plan_of(tile=SHORT)) == [NAME]
    assert names(plan_of(tile=Tile(64, 64, 4, 2))) == ["forward"]


def test_the_plan_says_that_the_tile_is_for_the_other_kernel() -> None:
    assert plan_of(tile={"forward": Tile(64, 64, 4, 2)}).choice == "forward_mma.cu, which the tile is for"
    single = "forward_mma.cu, which a single tile is for; a mapping may name forward_wgmma"
    assert plan_of(tile=Tile(64, 64, 4, 2)).choice == single


def test_features_that_leave_no_room_for_a_tile_go_to_the_other_kernel() -> None:
    options = {"softcap": 5.0, "dropout_p": 0.5, "dropout_seed": 1, "attn_mask": numpy.ones((500, 500), bool)}
    assert "no tile leaves room in the registers" in plan_of(256, **options).choice
    assert names(plan_of(256, **options))[-1] == "forward"
    assert names(plan_of(192, **options))[-1] == NAME


OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "head_dim": ({"head_dim": 100}, "it takes multiples of 8 up to 256 for head_dim, and this is 100"),
    "elements apart": ({"view": "strided_elements"}, "the TMA unit cannot copy query, whose head_dim has a stride of 3"),
    "rows apart": ({"view": "padded_rows"}, "the TMA unit cannot copy query, whose rows lie 520 bytes apart, no multiple of 16 from 0 to 2^40"),
    "backwards": ({"view": "reversed_rows"}, "the TMA unit cannot copy query, whose rows lie -512 bytes apart, no multiple of 16 from 0 to 2^40"),
    "unaligned": ({"view": "unaligned_base"}, "the TMA unit copies what starts on 16 bytes, and one of query, key and value does not"),
}  # fmt: skip


@pytest.mark.parametrize("case", OTHERS)
def test_the_plan_says_why_it_is_not_taken(case: str) -> None:
    options, reason = OTHERS[case]
    plan = plan_of(**options)
    assert names(plan)[-1] == "forward"
    assert f"choice     forward_mma.cu, not forward_wgmma.cu: {reason}" in str(plan)
    with pytest.raises(TileError, match=r"kernels that run: forward \(") as caught:
        plan_of(**options, tile={NAME: SHORT})
    assert reason in str(caught.value)


def test_rows_that_are_all_one_have_no_map() -> None:
    x = numpy.broadcast_to(Target("sm_90").random((2, 1, 4, 64), "float16", 1), (2, 500, 4, 64))
    assert "query, whose rows are all one" in cuflash.plan(x, x, x).choice


def test_rows_that_overlap_have_no_map() -> None:
    x = Target("sm_90").random((2, 500, 4, 64), "float16", 1)
    rows = numpy.lib.stride_tricks.as_strided(x, (2, 500, 1, 64), (x.strides[0], 64, 128, 2))
    assert "query, whose rows overlap" in cuflash.plan(rows, rows, rows).choice


@pytest.mark.parametrize("arch", ["sm_80", "sm_100"])
def test_other_architectures_say_so_if_it_is_asked_for(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUFLASH_SIMULATOR_ARCH", arch)
    plan = plan_of()
    reason = f"its instructions are those of sm_90, and this is {arch}"
    assert (names(plan), plan.choice) == (["forward"], f"forward_mma.cu, not forward_wgmma.cu: {reason}")
    assert cuflash.legal_tiles(64, kernel=NAME, arch=arch) == ()
    with pytest.raises(TileError, match=reason):
        plan_of(tile={NAME: SHORT})
    monkeypatch.delenv(wgmma_forward.VARIABLE)
    assert plan_of().choice == ""


@pytest.mark.parametrize("value", ["yes", "2", " 1"])
def test_a_value_of_the_variable_that_means_nothing_is_named(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(wgmma_forward.VARIABLE, value)
    with pytest.raises(cuflash.OptionError, match=rf"CUFLASH_FORWARD_WGMMA: got '{value}'; expected '0' or '1'"):
        plan_of()


def test_without_keys_there_is_nothing_to_copy() -> None:
    query, key = numpy.zeros((1, 20, 2, 64), "float16"), numpy.zeros((1, 0, 2, 64), "float16")
    plan = cuflash.plan(query, key, key, sinks=SINKS)
    assert (names(plan), plan.choice.rpartition(": ")[2]) == (["forward"], "there are no keys to copy")


@pytest.mark.parametrize(("head_dim", "tile"), [(8, (192, 128, 12, 2)), (72, (192, 80, 12, 2)), (136, (128, 80, 8, 2))])
def test_other_head_dims_take_the_tile_of_a_larger_one(head_dim: int, tile: tuple[int, int, int, int]) -> None:
    on = device.of_arch("sm_90", "gpu")
    assert tile_choice.default_tile(KernelCase(FORWARD_WGMMA, "float16", head_dim), on) == Tile(*tile)
    softcap = KernelCase(FORWARD_WGMMA, "float16", 56, features=cuflash.FeatureSet(softcap=True))
    assert tile_choice.default_tile(softcap, on) == Tile(192, 112, 12, 2)
    dropout = KernelCase(FORWARD_WGMMA, "float16", 128, features=cuflash.FeatureSet(dropout=True))
    assert tile_choice.default_tile(dropout, on) == Tile(*predicted_tiles.WGMMA_WITH_FEATURE[NAME, 128, "dropout"])


def test_the_tile_of_a_feature_may_depend_on_the_causal_mask() -> None:
    """`legal_tiles` begins with it, too."""
    for (name, head_dim, feature), numbers in predicted_tiles.WGMMA_WITH_FEATURE_FULL.items():
        features = cuflash.FeatureSet(attn_mask=feature) if feature in MASK_KINDS else cuflash.FeatureSet(**{feature: True})
        listed = [
            cuflash.legal_tiles(head_dim, kernel=name, arch="sm_90", is_causal=is_causal, features=features)[0]
            for is_causal in (False, True)
        ]
        assert listed == [Tile(*numbers), Tile(*predicted_tiles.WGMMA_WITH_FEATURE[name, head_dim, feature])]
        assert listed[0] != listed[1]


@pytest.mark.parametrize("head_dim", [64, 128])
def test_legal_tiles_fit_the_registers_that_warps_hand_each_other(head_dim: int) -> None:
    on = device.of_arch("sm_90", "gpu")
    legal = tile_choice.legal_tiles_for(KernelCase(FORWARD_WGMMA, "float16", head_dim), on)
    assert legal[0] == Tile(*measured_tiles.TILES["sm_90", NAME, head_dim])
    assert {tile.num_warps for tile in legal} == {8, 12}
    for tile in legal:
        assert tile.tile_q == 16 * tile.num_warps
        assert head_dim // 2 + 3 * tile.tile_kv // 4 + 28 <= (240 if tile.num_warps == 8 else 160)
    (kernel,) = plan_of(head_dim).kernels
    assert (kernel.num_threads, kernel.num_blocks, kernel.num_work) == (512, NUM_SMS, 2 * 4 * 3)
    assert re.search(
        r"forward_wgmma: forward_wgmma.cu, .* 2 blocks of 512 threads, which stay for 24 tiles of queries", str(plan_of(head_dim))
    )


# --- Blocks that stay ---------------------------------------------------------------------------------------------------------------------


def test_blocks_take_tiles_from_a_counter_where_these_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    """And where there are more of them than blocks."""

    def counts(**options: Any) -> bool:
        plan = plan_of(**options)
        assert [buffer.name for buffer in plan.workspace if buffer.is_zeroed] == ["next_work"] * plan.kernels[-1].counts_work
        return plan.kernels[-1].counts_work

    assert not counts()
    assert counts(is_causal=True)
    assert counts(window=(30, 0))
    with_sms(monkeypatch, 23)
    assert counts(is_causal=True)
    with_sms(monkeypatch, 24)
    assert not counts(is_causal=True)
    with_sms(monkeypatch, 1)
    assert "1 block of 512 threads, which stays for 24 tiles of queries" in str(plan_of())


@pytest.mark.parametrize("mask", ["full", "causal"])
def test_how_many_blocks_there_are_changes_no_bit(hopper: Target, mask: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = inputs_of(hopper, (300, 200), heads=(4, 2), batches=(2, 2))
    options = {"enable_gqa": True, "return_lse": True, "tile": {NAME: SHORT}, **MASKS[mask]}
    results = []
    for num_sms in (1, 2, 5, 100):
        with_sms(monkeypatch, num_sms)
        results.append([Target.bits(x) for x in cuflash.scaled_dot_product_attention(*inputs, **options)])
    assert results == results[:1] * 4


def test_a_remembered_call_counts_from_the_beginning_each_time(hopper: Target) -> None:
    inputs = inputs_of(hopper, (500, 50))
    first = Target.bits(cuflash.scaled_dot_product_attention(*inputs, is_causal=True))
    for _ in range(2):
        assert Target.bits(cuflash.scaled_dot_product_attention(*inputs, is_causal=True)) == first


@pytest.mark.parametrize("head_dim", [64, 256])
def test_a_second_tile_of_queries_where_shared_memory_has_room(hopper: Target, head_dim: int) -> None:
    (kernel,) = plan_of(head_dim).kernels
    assert ("Q_STAGES = 2" in kernel.config) == (head_dim == 64)
    checked(hopper, *inputs_of(hopper, (270, 40), head_dim, heads=(2, 1)), is_causal=True)


MANY = {"two tiles of Q": 64, "one tile of Q": 256, "lists": 128}
"""head_dim of each."""


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="the simulator would take hours")
@pytest.mark.parametrize("case", MANY)
def test_many_tiles_for_each_block_of_a_whole_gpu(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_many_tiles(Target("gpu"), case, 12, 2000, monkeypatch)


def check_many_tiles(on: Target, case: str, heads: int, seqlen: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that race for the counter: the same bits each time, and those of a call with fewer heads, which float64 judges."""
    if on.device.capability != 90:
        pytest.skip("the GPU is no sm_90")
    with_sms(monkeypatch, on.device.num_sms)
    inputs = inputs_of(on, (seqlen, seqlen - 300), MANY[case], heads=(heads, heads), batches=(8, 8), dtype="float16")
    options: dict[str, Any] = {"is_causal": True, "causal_alignment": "bottom_right"}
    if case == "lists":
        ids = numpy.tile((numpy.arange(seqlen) // 70).astype("int32"), (8, 1))
        options |= {"segment_ids_q": on.place(ids), "segment_ids_kv": on.place(ids[:, : seqlen - 300].copy())}
    kernel = cuflash.plan(*inputs, **options).kernels[-1]
    assert (kernel.name, kernel.counts_work) == (NAME, True)
    attend = functools.partial(cuflash.scaled_dot_product_attention, *inputs, return_lse=True, **options)
    first = attend()
    bits = [Target.bits(x) for x in first]
    for _ in range(5):
        assert [Target.bits(x) for x in attend()] == bits
    few = [x[-1:, :, -1:].copy() for x in inputs]
    options |= {name: ids[-1:].copy() for name, ids in options.items() if name.startswith("segment")}
    judged = on.check(*few, backward=False, **options)
    assert Target.bits(judged.out) == Target.bits(first[0][-1:, :, -1:])
    assert Target.bits(judged.lse) == Target.bits(first[1][-1:, -1:])
