"""The forward kernel of wgmma for float32: as exact as float32, the same bits under every schedule, without spills, and chosen as the plan says."""

from __future__ import annotations

import functools
from typing import Any

import numpy
import pytest
from conftest import Target
from test_dominant_keys import sink_inputs
from test_wgmma_forward import MASKS, asked_for, hopper, inputs_of, names, with_sms  # noqa: F401 (fixtures)
from test_wgmma_machine_code import assert_as_meant

import cuflash
from cuflash import Tile
from cuflash.cli.inspection import Report, inspect_kernels
from cuflash.hardware import device
from cuflash.planning import predicted_loops, tile_choice, wgmma_forward
from cuflash.planning.kernel_cases import KernelCase
from cuflash.planning.kernel_specs import FORWARD_WGMMA_FLOAT32
from cuflash.planning.offline import offline_kernels
from cuflash.simulator import check

pytest.importorskip("cupy")

NAME = FORWARD_WGMMA_FLOAT32.name
ON = device.of_arch("sm_90", "gpu")
HOST = Target("sm_90")


def checked(on: Target, *inputs: Any, **options: Any) -> Any:
    """The results, judged, of this kernel and no other."""
    assert names(cuflash.plan(*inputs, enable_gqa=True, **options)) == ["operand_terms", NAME]
    return on.check(*inputs, backward=False, enable_gqa=True, **options)


# --- Right --------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.sample(2)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("lengths", [(200, 300), (300, 130), (1, 1), (193, 65)], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_lengths_and_grouped_heads(hopper: Target, head_dim: int, lengths: tuple[int, int], mask: str) -> None:  # noqa: F811  # a fixture
    """Ends that no tile divides, warpgroups without queries, keys that no query sees, queries that see no key."""
    checked(hopper, *inputs_of(hopper, lengths, head_dim, heads=(2, 1), dtype="float32"), **MASKS[mask])


@pytest.mark.sample(1)
@pytest.mark.parametrize("dims", [(1, 1), (33, 72), (128, 24), (96, 128), (40, 100)], ids=str)
def test_head_dims(hopper: Target, dims: tuple[int, int]) -> None:  # noqa: F811  # a fixture
    """Any up to 128: terms are filled up with zeros. Of values above 64 columns the others take a product of their own, here of 16, 40 and 64."""
    shapes = (1, 150, 2, dims[0]), (1, 190, 2, dims[0]), (1, 190, 2, dims[1])
    checked(hopper, *(hopper.random(shape, "float32", seed) for seed, shape in enumerate(shapes)), is_causal=True)


@pytest.mark.sample(1)
@pytest.mark.parametrize("view", ["strided", "odd"])
def test_arrays_that_the_tma_unit_could_not_copy(view: str) -> None:
    """Terms are arrays of their own, whatever the strides of what they are made of."""
    whole = numpy.random.default_rng(0).standard_normal((3, 1, 70, 2, 131)).astype("float32")
    inputs = [x[..., 3:131:2] if view == "strided" else x[..., 1:65] for x in whole]
    checked(HOST, *inputs)


def test_lengths_of_rows_of_a_batch_with_nan_behind() -> None:
    query, key, value = inputs_of(HOST, (70, 200), batches=(3, 3), dtype="float32")
    lengths = numpy.array([200, 77, 0], "int32")
    key[1, 77:] = value[1, 77:] = key[2] = value[2] = numpy.nan
    checked(HOST, query, key, value, seqlens_kv=lengths, is_causal=True, causal_alignment="bottom_right")


@pytest.mark.sample(1)
@pytest.mark.parametrize("scale", [-0.3, 0.0, 1e-42, 30.0])
def test_scales(scale: float) -> None:
    checked(HOST, *inputs_of(HOST, (70, 100), dtype="float32"), scale=scale)


@pytest.mark.sample(2)
@pytest.mark.parametrize("gap", [14.0, 16.5, 17.5, 20.0])
def test_small_probabilities_beside_an_attention_sink(gap: float) -> None:
    """The sum of a row stands at 1, and O at the sink's value, while every tile adds a few last places."""
    checked(HOST, *sink_inputs(HOST, "float32", 4096, gap, head_dim=64), scale=1.0)


def test_small_probabilities_of_equal_values() -> None:
    """What each tile adds to an O of 0.75 is just under half of its last place, and was lost with every one."""
    query, key, value = sink_inputs(HOST, "float32", 4096, 21.23, head_dim=64)
    query[..., 1:], value[...], value[:, 0] = 0, 1, 0.75
    checked(HOST, query, key, value, scale=1.0)


@pytest.mark.sample(1)
@pytest.mark.parametrize("dims", [(64, 64), (40, 100)], ids=str)
@pytest.mark.parametrize("is_causal", [False, True])
def test_outputs_in_parts(is_causal: bool, dims: tuple[int, int]) -> None:
    """More than 2048 keys, so that O starts anew twice, with references that rise behind that; blocks have several tiles, warpgroups other numbers of parts."""
    query, key = (HOST.random((1, length, heads, dims[0]), "float32", heads) for length, heads in ((200, 2), (2300, 1)))
    value = HOST.random((1, 2300, 1, dims[1]), "float32", 9)
    key *= numpy.linspace(0.1, 3, 2300, dtype="float32")[:, None, None]
    assert "row_parts" in [buffer.name for buffer in cuflash.plan(query, key, value, enable_gqa=True).workspace]
    checked(HOST, query, key, value, is_causal=is_causal, causal_alignment="bottom_right")


def test_numbers_of_all_sizes() -> None:
    """Each element times 2 to the power of -20 to 0: a format of fewer bits, or one scale for a tile, would lose the small ones."""
    random = numpy.random.default_rng(3)
    inputs = [x * numpy.exp2(random.uniform(-20, 0, x.shape)).astype("float32") for x in inputs_of(HOST, (130, 300), dtype="float32")]
    query, key, value = (x[0, :, 0].astype(float) for x in inputs)
    weights = numpy.exp(query @ key.T)
    weights /= weights.sum(axis=1, keepdims=True)

    def errors(out: numpy.ndarray) -> numpy.ndarray:
        return abs(out - weights @ value) / (weights @ abs(value))

    single = numpy.exp(query.astype("float32") @ key.astype("float32").T)
    of_numpy = errors(single @ value.astype("float32") / single.sum(axis=1, keepdims=True))
    of_kernel = errors(HOST.host(cuflash.scaled_dot_product_attention(*inputs, scale=1.0))[0, :, 0])
    assert of_kernel.mean() < of_numpy.mean()
    assert of_kernel.max() < 1.5 * of_numpy.max()


def test_integers_give_exact_sums() -> None:
    """Of 15 bits, whose products take all terms, and probabilities that are powers of two: a term in the wrong place would show."""
    random = numpy.random.default_rng(7)
    query, key, value = (numpy.zeros((1, length, 1, 64), "float32") for length in (130, 200, 200))
    query[..., 0], query[..., 1] = 1.0, 4097.0
    key[..., 0], key[..., 1] = -4097.0 * 257, 257.0
    key[..., 2] = random.integers(0, 3, (1, 200, 1))
    query[..., 2] = -1.0
    value[:] = random.integers(-16383, 16384, value.shape)
    out = HOST.host(cuflash.scaled_dot_product_attention(query, key, value, scale=float(numpy.log(2.0))))[0, :, 0]
    weights = numpy.exp2(-key[0, :, 0, 2].astype(float))
    want = weights @ value[0, :, 0].astype(float) / weights.sum()
    assert abs(out - want).max() <= 2.0**-22 * 16384


@pytest.mark.parametrize("case", [(64, Tile(192, 16, 12, 2)), (128, Tile(128, 32, 8, 1))], ids=str)
def test_every_schedule_gives_the_same_bits(case: tuple[int, Tile], request: pytest.FixtureRequest) -> None:
    """With warpgroups that stop at different tiles. Only a schedule finds a wait that never ends."""
    head_dim, tile = case
    seeds = range(100 if request.config.getoption("--exhaustive") else 3)
    inputs = inputs_of(HOST, (200, 130), head_dim, heads=(2, 1), dtype="float32")
    options = {"enable_gqa": True, "return_lse": True, "is_causal": True, "tile": {NAME: tile}}
    report = check(functools.partial(cuflash.scaled_dot_product_attention, *inputs, **options), seeds=seeds)
    assert report.kernels == ("operand_terms", NAME)
    assert len(report.runs) == 2 + len(seeds)


# --- Machine code -------------------------------------------------------------------------------------------------------------------------


def report_of(dims: tuple[int, int], is_causal: bool, *, seqlens_kv: bool = False, tile: Tile | None = None) -> Report:
    pinned = {NAME: tile or tile_choice.default_tile(KernelCase(FORWARD_WGMMA_FLOAT32, "float32", dims[0], head_dim_v=dims[1]), ON)}
    kernels = offline_kernels(
        ON,
        dtype="float32",
        head_dim=dims[0],
        head_dim_v=dims[1],
        is_causal=is_causal,
        seqlens_kv=seqlens_kv,
        backward=False,
        tile=pinned,
    )
    (report,) = inspect_kernels((ON, kernel) for kernel in kernels if kernel.name == NAME)
    return report


@pytest.mark.sample(1)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("seqlens_kv", [False, True])
@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (96, 96), (24, 80), (128, 64), (64, 128)], ids=str)
def test_no_spills_and_no_serialised_products(dims: tuple[int, int], seqlens_kv: bool, is_causal: bool) -> None:
    assert_as_meant(report_of(dims, is_causal, seqlens_kv=seqlens_kv))


@pytest.mark.exhaustive
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("num_warps", [8, 12])
def test_the_longest_tiles_fit_the_registers(num_warps: int, head_dim: int) -> None:
    legal = [
        tile
        for tile in tile_choice.legal_tiles_for(KernelCase(FORWARD_WGMMA_FLOAT32, "float32", head_dim), ON)
        if tile.num_warps == num_warps
    ]
    if not legal:
        assert (num_warps, head_dim) == (12, 128)  # Q of 192 rows takes 144 KiB
        return
    tile = max(legal, key=lambda tile: (tile.tile_kv, tile.num_stages))
    assert_as_meant(report_of((head_dim, head_dim), True, tile=tile))


# --- Chosen -------------------------------------------------------------------------------------------------------------------------------


def test_what_it_leaves_to_the_other_kernel() -> None:
    query, key, value = inputs_of(HOST, dtype="float32")
    wide = inputs_of(HOST, head_dim=136, dtype="float32")
    offsets = numpy.array([0, 90, 150], "int32")
    packed = [x[0, :150] for x in (query, key, value)]
    plans = {
        "it knows no score features and masks but the causal one": cuflash.plan(query, key, value, softcap=20.0),
        "it is for float32 accuracy, and this is TF32": cuflash.plan(query, key, value, allow_tf32=True),
        "it takes a head_dim of at most 128, and this is 136": cuflash.plan(*wide),
        "it knows no packed sequences": cuflash.varlen_plan(*packed, offsets, offsets, 90, 90),
    }
    for reason, plan in plans.items():
        assert names(plan) == ["forward"]
        assert f"forward_mma.cu, not forward_wgmma_float32.cu: {reason}" in plan.choice


@pytest.mark.parametrize("head_dim", [64, 128])
def test_calls_take_it_where_it_is_predicted_to_be_faster(head_dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(wgmma_forward.VARIABLE)
    with_sms(monkeypatch, 132)
    long = inputs_of(HOST, (4096, 4096), head_dim, heads=(16, 16), dtype="float32")
    plan = cuflash.plan(*long)
    assert names(plan) == ["operand_terms", NAME]
    assert "predicted to take 0." in plan.choice
    assert "tensor cores, 6 x bfloat16 (float32 accuracy)" in str(plan)
    assert names(cuflash.plan(*inputs_of(HOST, (128, 128), head_dim, dtype="float32"))) == ["forward"]
    assert names(cuflash.plan(*long, tile={"forward": Tile(64, 32, 4, 1)})) == ["forward"]


def test_calls_that_return_lse_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their backward pass has three products of TF32 for each of scores: where these are in the thousands, dV was beyond its bound."""
    monkeypatch.delenv(wgmma_forward.VARIABLE)
    with_sms(monkeypatch, 132)
    long = inputs_of(HOST, (4096, 4096), heads=(16, 16), dtype="float32")
    assert names(cuflash.plan(*long)) == ["operand_terms", NAME]
    plan = cuflash.plan(*long, return_lse=True)
    assert names(plan) == ["forward"]
    assert "lse may be for a backward pass" in plan.choice


@pytest.mark.parametrize("every_way", [False, True])
def test_warmup_compiles_it_for_calls_without_lse(every_way: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(wgmma_forward.VARIABLE)
    kernels = {kernel.name for kernel in offline_kernels(ON, dtype="float32", head_dim=64, backward=False, every_way=every_way)}
    assert "forward" in kernels
    assert ({"operand_terms", NAME} <= kernels) == every_way


def test_lines_of_the_model() -> None:
    lines = {key.kernel for key in predicted_loops.table()}
    assert {"forward float32", NAME} <= lines
    assert predicted_loops.line_of("forward", "bfloat16") == "forward"


def test_workspace_is_terms_of_the_operands() -> None:
    inputs = inputs_of(HOST, (200, 150), 40, heads=(4, 2), dtype="float32")
    shapes = {buffer.name: buffer.shape for buffer in cuflash.plan(*inputs, enable_gqa=True).workspace}
    assert shapes == {"query_terms": (1, 200, 4, 192), "key_terms": (1, 150, 2, 192), "value_terms": (1, 150, 2, 192)}


def test_blocks_compute_whole_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the 16-bit kernel share out the keys of the last tiles of queries, with the same code around them."""
    with_sms(monkeypatch, 132)
    shapes = {dtype: inputs_of(HOST, (1000, 16384), heads=(16, 16), dtype=dtype) for dtype in ("float16", "float32")}
    plans = {dtype: cuflash.plan(*inputs) for dtype, inputs in shapes.items()}
    assert plans["float16"].kernels[-1].shares.tiles
    assert not plans["float32"].kernels[-1].shares.tiles
    assert plans["float32"].kernels[-1].num_work == plans["float32"].kernels[-1].num_blocks
