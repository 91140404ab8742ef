"""The forward kernel of wgmma for heads above 256 columns: exact, the same bits under every schedule, left alone by the assembler, and chosen as the plan says."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import numpy
import pytest
from caches import CacheCall, only_new_memory
from conftest import ELEMENTS, HAS_GPU, Target
from test_wgmma_machine_code import assert_as_meant

import cuflash
from cuflash import Tile, reference
from cuflash.cli.inspection import Report, inspect_kernels
from cuflash.errors import TileError, UnsupportedError
from cuflash.hardware import device
from cuflash.planning import compiler_versions, predicted_time, predicted_wgmma, wgmma_forward
from cuflash.planning.kernel_cases import KernelCase, case_of
from cuflash.planning.kernel_plan import KernelPlan
from cuflash.planning.kernel_specs import FORWARD_WGMMA_WIDE
from cuflash.planning.tile_choice import default_tile, legal_tiles_for
from cuflash.problem.features import NO_FEATURES, FeatureSet
from cuflash.reference.comparison import compare
from cuflash.simulator import check

pytest.importorskip("cupy")

NAME = FORWARD_WGMMA_WIDE.name
ON = device.of_arch("sm_90", "gpu")
SHORT = {NAME: Tile(64, 32, 8, 3)}


@pytest.fixture(autouse=True)
def asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel wherever it can run."""
    monkeypatch.setenv("CUFLASH_SIMULATOR_ARCH", "sm_90")
    monkeypatch.setenv(wgmma_forward.VARIABLE, "1")


@pytest.fixture(params=["sm_90", *([pytest.param("gpu", marks=pytest.mark.gpu)] if HAS_GPU else [])])
def hopper(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Target:
    """The simulator, and a GPU that has the instructions."""
    target = Target(request.param)
    if target.device.capability != 90:
        pytest.skip("the GPU is no sm_90")
    only_new_memory(monkeypatch)
    return target


def inputs_of(
    on: Target,
    lengths: tuple[int, int],
    heads: tuple[int, int],
    head_dims: tuple[int, int],
    dtype: str = "float16",
    *,
    shared: bool = False,
) -> list[Any]:
    head_dim, head_dim_v = head_dims
    query, key = on.random((2, lengths[0], heads[0], head_dim), dtype, 1), on.random((2, lengths[1], heads[1], head_dim), dtype, 2)
    value = key[..., :head_dim_v] if shared else on.random((2, lengths[1], heads[1], head_dim_v), dtype, 3)
    return [query, key, value]


def checked(on: Target, inputs: list[Any], **options: Any) -> None:
    plan = cuflash.plan(*inputs, enable_gqa=True, **options)
    assert NAME in names(plan)
    on.check(*inputs, backward=False, enable_gqa=True, **options)


def names(plan: cuflash.Plan) -> list[str]:
    return [kernel.name for kernel in plan.kernels]


# --- Right --------------------------------------------------------------------------------------------------------------------------------

LATENT = (576, 512)
"""head_dim of query and key, and of value, of multi-head latent attention."""


@pytest.mark.parametrize(("lengths", "heads"), [((1, 150), (70, 1)), ((20, 90), (4, 2)), ((1, 1), (1, 1))], ids=str)
def test_values_that_are_columns_of_their_keys(hopper: Target, lengths: tuple[int, int], heads: tuple[int, int]) -> None:
    """Rows of several heads in a tile, a tile of one row, ends that no tile divides."""
    inputs = inputs_of(hopper, lengths, heads, LATENT, shared=True)
    assert "VALUE_IN_KEY = true" in cuflash.plan(*inputs, enable_gqa=True).kernels[0].config
    checked(hopper, inputs)


@pytest.mark.parametrize("alignment", ["top_left", "bottom_right"])
def test_causal_with_queries_that_see_no_key(hopper: Target, alignment: Any) -> None:
    """Tiles of queries that begin within a query, whose blocks end at keys of their own."""
    checked(hopper, inputs_of(hopper, (70, 60), (3, 1), (512, 512)), is_causal=True, causal_alignment=alignment)


@pytest.mark.sample(1)
@pytest.mark.parametrize("head_dims", [(64, 512), (264, 264), (320, 72), (512, 200), (576, 512)], ids=str)
def test_head_dims_that_slabs_do_not_divide(hopper: Target, head_dims: tuple[int, int]) -> None:
    checked(hopper, inputs_of(hopper, (30, 100), (2, 1), head_dims, "bfloat16"), scale=-0.05)


def test_values_beside_their_keys_are_no_columns_of_them(hopper: Target) -> None:
    """The same shapes and strides at another address: the next call is planned anew."""
    query, key, value = inputs_of(hopper, (1, 70), (4, 1), LATENT, shared=True)
    checked(hopper, [query, key, value])
    checked(hopper, [query, key, key[..., 64:]])
    checked(hopper, [query, key, value])


@pytest.mark.sample(1)
def test_score_features(hopper: Target) -> None:
    inputs = inputs_of(hopper, (40, 200), (4, 2), LATENT, shared=True)
    sinks, slopes = (hopper.random((4,), "float32", seed) for seed in (4, 5))
    checked(
        hopper, inputs, is_causal=True, causal_alignment="bottom_right", window=(70, None), softcap=3.0, sinks=sinks, alibi_slopes=slopes, tile=SHORT
    )  # fmt: skip


def mask_of(on: Target, kind: str, shape: tuple[int, ...]) -> Any:
    """A boolean mask with rows and whole tiles that see nothing, or an additive one with -inf among its elements."""
    numbers = on.host(on.random(shape, "float32", 6))
    hidden = numbers > 0.5
    hidden[..., 40:75] = hidden[..., 2, :] = True
    return on.place(~hidden) if kind == "bool" else on.place(numpy.where(hidden, -numpy.inf, numbers).astype(ELEMENTS[kind]))


@pytest.mark.sample(1)
@pytest.mark.parametrize("heads", [(2, 1), (1, 1)], ids=str)
@pytest.mark.parametrize("kind", ["float16", "bool", "bfloat16", "float32"])
def test_masks(hopper: Target, kind: str, heads: tuple[int, int]) -> None:
    """Pairs of keys, keys that a row ends in, and rows of which no two elements are neighbours."""
    inputs = inputs_of(hopper, (50, 130), heads, (264, 264))
    mask = mask_of(hopper, kind, (2, 1, 50, 130))
    for given in (mask, mask[..., ::2].repeat(2, axis=-1)[..., ::-1]):
        checked(hopper, inputs, attn_mask=given, tile=SHORT)


@pytest.mark.sample(1)
@pytest.mark.parametrize("heads", [(4, 1), (2, 2)], ids=str)
def test_dropout(hopper: Target, heads: tuple[int, int]) -> None:
    """The same elements as of every other kernel, though rows of a lane are of other heads and queries."""
    inputs = inputs_of(hopper, (37, 150), heads, LATENT, shared=True)
    checked(hopper, inputs, dropout_p=0.3, dropout_seed=5, tile={NAME: Tile(64, 48, 8, 2)})


@pytest.mark.sample(1)
@pytest.mark.parametrize("kind", [None, "bool"])
def test_segments_and_prefixes(hopper: Target, kind: str | None) -> None:
    """Tiles of a list, of which blocks have ranges."""
    inputs = inputs_of(hopper, (60, 60), (2, 1), (264, 136))
    ids = hopper.place(numpy.sort(numpy.arange(120).reshape(2, 60) * 7 % 4, axis=1).astype("int32"))
    prefix = hopper.place(numpy.array([20, 0], "int32"))
    mask = None if kind is None else mask_of(hopper, kind, (60, 60))
    checked(
        hopper, inputs, segment_ids_q=ids, segment_ids_kv=ids, prefix_lengths=prefix, is_causal=True, attn_mask=mask, tile={NAME: Tile(64, 16, 8, 2)}
    )  # fmt: skip


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    "options", [{"is_causal": True, "causal_alignment": "bottom_right"}, {"softcap": 3.0, "dropout_p": 0.5, "dropout_seed": 2}], ids=str
)
def test_packed_sequences(hopper: Target, options: dict[str, Any]) -> None:
    """Among them such without queries or without keys; others' keys are not read, and NaN behind the last is nobody's."""
    cu_q, cu_kv = (hopper.place(numpy.array(cu, "int32")) for cu in ([0, 0, 40, 47, 49], [0, 38, 88, 88, 148]))
    query, key, value = (
        hopper.random((count, heads, 264), "bfloat16", seed) for count, heads, seed in ((60, 2, 1), (160, 1, 2), (160, 1, 3))
    )
    for rows, end in ((query, 49), (key, 148), (value, 148)):
        rows[end:] = numpy.nan
    options = {"enable_gqa": True, "max_seqlen_q": 40, "max_seqlen_kv": 60, **options}
    judged = {name: option for name, option in options.items() if not name.startswith("max_")}
    plan = cuflash.varlen_plan(query, key, value, cu_q, cu_kv, tile=SHORT, **options)
    assert names(plan)[0] == NAME
    out, lse = cuflash.varlen_attention(query, key, value, cu_q, cu_kv, return_lse=True, tile=SHORT, **options)
    attend = functools.partial(reference.varlen_attention, query, key, value, cu_q, cu_kv, **judged)
    want, want_lse = attend()
    compare(out, want, attend(precision="bfloat16")[0], name="out")
    compare(lse, want_lse, attend(precision="float32")[1], name="lse", dtype="float32", terms=lambda: attend(magnitudes=True)[1])


CACHES = {
    "contiguous, three splits": CacheCall((200, 0, 77), 2, 0, 40, options={"num_splits": 3, "is_causal": True}),
    "rows of others, padding": CacheCall((200, 100), 1, 0, 16, picks_rows=True, leftpad=(70, 3)),
    "pages of a tile": CacheCall((200, 77), 2, 0, 16, page_size=64, options={"is_causal": True}),
    "small pages": CacheCall((200, 77), 1, 0, 8, page_size=16, leftpad=(70, 3), dtype="bfloat16", options={"num_splits": 2}),
}


@pytest.mark.sample(2)
@pytest.mark.parametrize("case", CACHES)
def test_caches_whose_unused_bytes_are_nan(hopper: Target, case: str) -> None:
    call = replace(CACHES[case], head_dim=576, head_dim_v=512, shares_columns=True, room=320)
    call.check(hopper)


@pytest.mark.exhaustive
def test_a_cache_of_keys_and_values_that_appends(hopper: Target) -> None:
    CacheCall((200, 77), 3, 3, 4, page_size=32, head_dim=512, room=320, options={"is_causal": True}).check(hopper)


# --- The same bits ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    "case",
    [("latent", LATENT, True, 0.0, None), ("apart", (264, 264), False, 0.0, None), ("lists and dropout", (264, 264), False, 0.3, "bool")],
    ids=lambda case: case[0],
)
def test_every_schedule_gives_the_same_bits(
    case: tuple[str, tuple[int, int], bool, float, str | None], request: pytest.FixtureRequest
) -> None:
    """Only a schedule finds a wait that never ends."""
    _, head_dims, shared, dropout_p, kind = case
    seeds = range(100 if request.config.getoption("--exhaustive") else 12)
    inputs = inputs_of(Target("sm_90"), (3, 200), (3, 1) if kind is None else (2, 1), head_dims, shared=shared)
    mask = None if kind is None else mask_of(Target("sm_90"), kind, (3, 200))
    options = {
        "attn_mask": mask,
        "dropout_p": dropout_p,
        "dropout_seed": 1 if dropout_p else None,
        "enable_gqa": True,
        "return_lse": True,
        "tile": SHORT,
        "is_causal": True,
        "causal_alignment": "bottom_right",
    }
    report = check(functools.partial(cuflash.scaled_dot_product_attention, *inputs, **options), seeds=seeds)
    assert NAME in report.kernels[:2]
    assert len(report.runs) == 2 + len(seeds)


# --- Machine code -------------------------------------------------------------------------------------------------------------------------


def kernel_of(head_dim: int, head_dim_v: int, features: dict[str, Any], *, shared: bool, tile: Any = None) -> KernelPlan:
    """Of a causal call. Of a mask `features` has the type; slopes and segments are there where it says so."""
    on = Target("sm_90")
    inputs = inputs_of(on, (100, 100), (2, 1), (head_dim, head_dim_v), "bfloat16", shared=shared)
    options = {name: mask_of(on, option, (100, 100)) if name == "attn_mask" else option for name, option in features.items()}
    if options.pop("segments", False):
        options |= dict.fromkeys(("segment_ids_q", "segment_ids_kv"), numpy.zeros((2, 100), "int32"))
    if "alibi_slopes" in options:
        options["alibi_slopes"] = numpy.ones(2, "float32")
    plan = cuflash.plan(*inputs, enable_gqa=True, is_causal=True, tile=tile, **options)
    return next(kernel for kernel in plan.kernels if kernel.name == NAME)


def report_of(head_dim: int, head_dim_v: int, features: dict[str, Any], *, shared: bool, tile: Any = None) -> Report:
    (report,) = inspect_kernels([(ON, kernel_of(head_dim, head_dim_v, features, shared=shared, tile=tile))])
    return report


MACHINE_CODE: dict[str, dict[str, Any]] = {
    "plain": {},
    "features": {"window": (100, 0), "softcap": 3.0},
    "dropout": {"dropout_p": 0.5, "dropout_seed": 1},
    "16-bit mask": {"attn_mask": "bfloat16"},
    "float32 mask": {"attn_mask": "float32"},
    "lists": {"attn_mask": "bool", "segments": True},
    "mask and dropout": {"attn_mask": "bfloat16", "dropout_p": 0.5, "dropout_seed": 1},
}


@pytest.mark.sample(1)
@pytest.mark.parametrize("case", [(*LATENT, True), (512, 512, False), (64, 512, False), (576, 264, True), (264, 264, True)], ids=str)
@pytest.mark.parametrize("features", MACHINE_CODE)
def test_no_spills_and_no_serialised_products(case: tuple[int, int, bool], features: str) -> None:
    head_dim, head_dim_v, shared = case
    assert_as_meant(report_of(head_dim, head_dim_v, MACHINE_CODE[features], shared=shared))


# --- Chosen -------------------------------------------------------------------------------------------------------------------------------


def plan_of(head_dims: tuple[int, int] = LATENT, dtype: str = "float16", **options: Any) -> cuflash.Plan:
    return cuflash.plan(*inputs_of(Target("sm_90"), (1, 300), (16, 1), head_dims, dtype), enable_gqa=True, **options)


def test_it_is_asked_for() -> None:
    assert "forward_wgmma_wide.cu, as asked for; it has run on the simulator only" in str(plan_of())


def test_it_is_taken_where_it_is_predicted_to_gain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(wgmma_forward.VARIABLE)
    for options in ({}, {"softcap": 3.0}, {"head_dims": (264, 72)}):
        plan = plan_of(**options)
        assert names(plan)[0] == NAME
        assert "forward_wgmma_wide.cu, predicted to take 0." in plan.choice
    tile = Tile(32, 32, 4, 1)
    assert names(plan_of(tile={"forward": tile})) == names(plan_of(tile=tile)) == ["forward"]
    assert names(plan_of(tile={NAME: Tile(64, 16, 8, 2)}))[0] == NAME
    with monkeypatch.context() as patch:
        patch.setattr(predicted_wgmma, "LEAST_GAIN", 100.0)
        assert "is predicted to take 0." in plan_of().choice
        assert names(plan_of()) == ["forward"]
    monkeypatch.setenv(wgmma_forward.VARIABLE, "0")
    assert f"by {wgmma_forward.VARIABLE}=0" in plan_of().choice


def test_a_block_has_the_queries_of_all_heads_that_share_a_key_head() -> None:
    """128 heads of one query are two blocks; 16 heads of 9 queries are three, of which each has four queries."""
    blocks = []
    for lengths, heads in (((1, 300), (128, 1)), ((9, 300), (16, 1)), ((100, 300), (2, 2))):
        problem = cuflash.plan(*inputs_of(Target("sm_90"), lengths, heads, LATENT), enable_gqa=True).problem
        grid = predicted_time.grid_of(case_of(FORWARD_WGMMA_WIDE, problem), Tile(64, 32, 8, 2), problem)
        blocks.append((grid.heads, list(grid.trips)))
    assert blocks == [(4, [10]), (2, [10, 10, 10]), (4, [10, 10])]


OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "float32": ({"dtype": "float32"}, "it takes 16-bit types, and this is float32"),
    "head_dim": ({"head_dims": (300, 512)}, "it takes multiples of 8 up to 576 for head_dim, 512 for value's, and this is 300/512"),
    "wide values": ({"head_dims": (576, 576)}, "it takes multiples of 8 up to 576 for head_dim, 512 for value's, and this is 576"),
    "narrow values": ({"head_dims": (512, 64)}, "its warpgroups share out value's columns, more than 64, and these are 64"),
    "masks of heads": (
        {"attn_mask": numpy.ones((16, 1, 300), bool)},
        "it walks over tiles that some row sees, and rows are of 16 heads, each with a mask of its own",
    ),
}


@pytest.mark.parametrize("case", OTHERS)
def test_the_plan_says_why_it_is_not_taken(case: str) -> None:
    options, reason = OTHERS[case]
    plan = plan_of(**options)
    assert names(plan)[-1] == "forward"
    assert f"choice     forward_mma.cu, not forward_wgmma_wide.cu: {reason}" in str(plan)
    with pytest.raises(TileError, match=r"kernels that run: forward \(") as caught:
        plan_of(**options, tile=SHORT)
    assert reason in str(caught.value)


def test_a_query_off_16_bytes_is_named() -> None:
    """Though the kernel would take it: the others start on 16 bytes."""
    query, key, value = inputs_of(Target("sm_90"), (20, 40), (1, 1), (272, 72))
    unaligned = numpy.zeros((2, 20, 1, 280), "float16")[..., 1:273]
    assert "starts on 16 bytes, and one of query, key and value does not" in str(cuflash.plan(unaligned, key, value))
    assert names(cuflash.plan(query, key, value)) == [NAME]


@pytest.mark.parametrize(
    ("page_size", "reason"), [(0, "by CUFLASH_FORWARD_WGMMA=0"), (12, "8 rows of a page at a time, and pages have 12")]
)
def test_a_cache_that_no_kernel_takes_is_refused(page_size: int, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the error says why the kernel of wide heads does not run."""
    if not page_size:
        monkeypatch.setenv(wgmma_forward.VARIABLE, "0")
    given = CacheCall((200,), head_dim=576, head_dim_v=512, page_size=page_size).arrays()
    with pytest.raises(UnsupportedError, match=rf"not forward_wgmma_wide.*{reason}.*wider ones on sm_90 without CUFLASH_FORWARD_WGMMA=0"):
        cuflash.attention_with_kvcache(**given)


def test_a_cache_of_wide_heads_takes_it_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(wgmma_forward.VARIABLE)
    given = CacheCall((200,), head_dim=576, head_dim_v=512, page_size=8).arrays()
    plan = cuflash.kvcache_plan(**given)
    assert NAME in names(plan)
    assert "forward_wgmma_wide.cu, which alone takes caches of such heads; it has run on the simulator only" in str(plan)
    pinned = Tile(64, 16, 8, 2)
    assert [kernel.tile for kernel in cuflash.kvcache_plan(**given, tile=pinned).kernels if kernel.name == NAME] == [pinned]
    monkeypatch.setattr(compiler_versions, "READ", frozenset())
    monkeypatch.setattr(compiler_versions, "FIXED", (99, 0))
    with pytest.raises(
        UnsupportedError, match=r"NVRTC .* may reuse registers of a product .*CUFLASH_FORWARD_WGMMA=1 takes it all the same"
    ):
        cuflash.kvcache_plan(**given)


def test_default_tiles_hold_as_many_keys_as_fit_twice() -> None:
    def keys(head_dim: int, head_dim_v: int, *, shared: bool = False) -> int:
        tile = default_tile(KernelCase(FORWARD_WGMMA_WIDE, "float16", head_dim, head_dim_v=head_dim_v, value_in_key=shared), ON)
        assert (tile.tile_q, tile.num_warps, tile.num_stages) == (64, 8, 2)
        return tile.tile_kv

    assert (keys(*LATENT, shared=True), keys(*LATENT), keys(512, 512), keys(64, 512)) == (64, 32, 32, 64)


def test_registers_are_counted_for_the_warpgroup_that_has_most_columns() -> None:
    """Whole slabs: 192 of 264 columns of O are the first one's. The next longer tiles spilled."""
    softcap, alibi = FeatureSet(softcap=True, window=True), FeatureSet(alibi=True, window=True)
    boolean, dropout = FeatureSet(attn_mask="bool"), FeatureSet(dropout=True)
    most = {NO_FEATURES: 128, softcap: 128, alibi: 112, replace(alibi, softcap=True): 96, boolean: 96, dropout: 64}
    for features, tile_kv in most.items():
        case = KernelCase(FORWARD_WGMMA_WIDE, "float16", 264, head_dim_v=264, features=features, value_in_key=True)
        assert max(tile.tile_kv for tile in legal_tiles_for(case, ON)) == tile_kv


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "features",
    [{"softcap": 3.0}, {"alibi_slopes": True}, {"softcap": 3.0, "alibi_slopes": True}, {"attn_mask": "bool"}, MACHINE_CODE["dropout"],
     {"attn_mask": "float32"}, {"segments": True}, MACHINE_CODE["lists"]],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("case", [(264, 264, True), (64, 512, False)], ids=str)
def test_the_largest_tiles_do_not_spill(case: tuple[int, int, bool], features: dict[str, Any]) -> None:
    head_dim, head_dim_v, shared = case
    features = {"window": (100, 0), **features} if "softcap" in features or "alibi_slopes" in features else features
    of_any_tile = kernel_of(head_dim, head_dim_v, features, shared=shared)
    tile = max(legal_tiles_for(of_any_tile.case, ON), key=lambda tile: (tile.tile_kv, tile.num_stages))
    assert_as_meant(report_of(head_dim, head_dim_v, features, shared=shared, tile={NAME: tile}))


def test_splits_fill_the_sms() -> None:
    query, key = (numpy.zeros((1, length, heads, 576), "float16") for length, heads in ((1, 128), (4096, 1)))
    (kernel, _) = cuflash.plan(query, key, key[..., :512], enable_gqa=True).kernels
    assert kernel.num_blocks == 2 * kernel.splits.number
    assert 8 <= kernel.splits.number <= 66
