"""The forward kernel that shares out the keys of few queries, in ordinary calls: where it runs, its tiles and splits, and what it computes."""

from __future__ import annotations

from typing import Any

import numpy
import pytest
from caches import CacheCall, only_new_memory
from conftest import Target

import cuflash
from cuflash import Tile
from cuflash.errors import OptionError, TileError
from cuflash.hardware import device
from cuflash.planning import kernel_specs, tile_choice, tile_rules
from cuflash.planning.kernel_cases import KernelCase
from cuflash.planning.split_cost import cost_of_splits, fastest_number
from cuflash.planning.split_forward import VARIABLE
from cuflash.problem.cache_call import MAX_SPLITS

pytest.importorskip("cupy")

SPLIT = {"forward_split": Tile(16, 64, 4, 2)}
ODD_GROUP = {
    "query": (1, 7, 10, 32),
    "key": (1, 200, 2, 32),
    "value": (1, 200, 2, 32),
}  # five query heads to a key head: tiles end within a query


def operands(target: Target, shapes: dict[str, tuple[int, ...]], dtype: str = "float16", view: str = "contiguous") -> tuple[Any, ...]:
    return tuple(target.random(shape, dtype, seed, view) for seed, shape in enumerate(shapes.values()))


def features() -> dict[str, dict[str, Any]]:
    rng = numpy.random.default_rng(3)
    bias = rng.standard_normal((10, 7, 200)).astype(numpy.float32)
    return {
        "nothing": {},
        "causal": {"is_causal": True, "causal_alignment": "bottom_right"},
        "top_left": {"is_causal": True},
        "window": {"window": (50, 3), "causal_alignment": "bottom_right"},
        "softcap_alibi_sinks": {
            "softcap": 2.0, "alibi_slopes": numpy.linspace(0.1, 0.5, 10, dtype=numpy.float32), "sinks": numpy.linspace(-2, 5, 10, dtype=numpy.float32),
        },
        "boolean_mask": {"attn_mask": bias > 0.3},
        "additive_mask_and_sinks": {"attn_mask": bias[:1], "sinks": numpy.linspace(-2, 5, 10, dtype=numpy.float32)},
        "negative_scale": {"scale": -0.3},
    }  # fmt: skip


@pytest.mark.parametrize("name", list(features()))
def test_features_with_heads_that_share_keys(name: str, decoder: Target) -> None:
    options = {key: decoder.place(x) if isinstance(x, numpy.ndarray) else x for key, x in features()[name].items()}
    query, key, value = operands(decoder, ODD_GROUP)
    decoder.check(query, key, value, backward=False, tile=SPLIT, enable_gqa=True, **options)


@pytest.mark.sample(4)
@pytest.mark.parametrize("tile", [Tile(16, 16, 1, 2), Tile(32, 64, 2, 3), Tile(48, 64, 4, 2), Tile(16, 256, 8, 2)], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 3), (2, 20, 1), (1, 5, 8)], ids=str)
@pytest.mark.parametrize("dims", [(32, 32), (16, 72), (40, 24), (13, 13)], ids=str)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_tiles_and_head_dims(tile: Tile, shape: tuple[int, int, int], dims: tuple[int, int], dtype: str, decoder: Target) -> None:
    batch, seqlen_q, heads = shape
    shapes = {"query": (batch, seqlen_q, heads, dims[0]), "key": (batch, 150, 1, dims[0]), "value": (batch, 150, 1, dims[1])}
    decoder.check(*operands(decoder, shapes, dtype), backward=False, tile={"forward_split": tile}, enable_gqa=True)


def test_any_strides(view: str, decoder: Target) -> None:
    decoder.check(*operands(decoder, ODD_GROUP, view=view), backward=False, tile=SPLIT, enable_gqa=True)


def test_lengths_of_rows(decoder: Target) -> None:
    shapes = {"query": (5, 2, 2, 32), "key": (5, 200, 2, 32), "value": (5, 200, 2, 32)}
    lengths = decoder.place(numpy.array([0, 1, 63, 64, 200], numpy.int32))
    results = decoder.check(*operands(decoder, shapes), backward=False, tile=SPLIT, seqlens_kv=lengths)
    assert numpy.isneginf(decoder.as_numpy(results.lse)[0]).all()


@pytest.mark.parametrize("tile", [Tile(48, 16, 1, 2), Tile(96, 32, 2, 2)], ids=str)
def test_a_tile_may_have_more_rows_than_threads(tile: Tile, simulator: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """Splits without keys say so for all of them."""
    only_new_memory(monkeypatch)
    call = CacheCall((tile.tile_kv,), seqlen_q=tile.tile_q, heads_q=1, options={"num_splits": 4, "tile": {"forward_split": tile}})
    call.check(simulator)


@pytest.mark.parametrize("lowest", [-1e9, float(numpy.finfo("float32").min)])
def test_masks_so_large_that_an_lse_swallows_the_sum(lowest: float, decoder: Target) -> None:
    """Scores are one number for float32, and keys are split unequally: each counts as much as any other."""
    shapes = {"query": (1, 2, 1, 32), "key": (1, 129, 1, 32), "value": (1, 129, 1, 32)}
    mask = decoder.place(numpy.full((2, 129), lowest, numpy.float32))
    query, key, value = operands(decoder, shapes)
    assert kernels(query, key, value, attn_mask=mask) == ["forward_split", "merge_attention"]
    out = decoder.host(cuflash.scaled_dot_product_attention(query, key, value, attn_mask=mask))
    numpy.testing.assert_allclose(out[0, :, 0], numpy.broadcast_to(decoder.host(value)[0, :, 0].mean(axis=0), (2, 32)), atol=1e-3)


# --- Where it runs ------------------------------------------------------------------------------------------------------------------------


def kernels(query: Any, key: Any, value: Any, **options: Any) -> list[str]:
    return [kernel.name for kernel in cuflash.plan(query, key, value, **options).kernels]


def test_few_queries_take_it_by_themselves(simulator: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value = operands(simulator, {"query": (1, 16, 1, 32), "key": (1, 4096, 1, 32), "value": (1, 4096, 1, 32)})
    assert kernels(query, key, value) == ["forward_split", "merge_attention"]
    assert "since a tile of the others has rows for more than 16 queries; it has run on the simulator only" in str(
        cuflash.plan(query, key, value)
    )
    assert kernels(query[:, :1], key[:, :64], value[:, :64]) == ["forward_split"]  # one split is merged with nothing
    assert kernels(query, key, value, tile={"forward": Tile(16, 32, 1, 2)}) == ["forward"]
    assert kernels(query, key, value, tile=Tile(16, 64, 1, 2)) == ["forward"]  # as before there were two
    longer = simulator.random((1, 17, 1, 32), "float16", 0)
    assert kernels(longer, key, value) == ["forward"]
    assert kernels(longer, key, value, tile=SPLIT) == ["forward_split", "merge_attention"]
    monkeypatch.setenv(VARIABLE, "0")
    assert kernels(query, key, value) == ["forward"]
    assert cuflash.plan(query, key, value).choice == "not forward_split_mma.cu, by CUFLASH_DECODE=0"
    assert kernels(query, key, value, tile=SPLIT) == ["forward_split", "merge_attention"]
    monkeypatch.setenv(VARIABLE, "yes")
    with pytest.raises(OptionError, match="expected '0' or '1'"):
        cuflash.plan(query, key, value)


def test_what_it_cannot_do_stays_where_it_was(simulator: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = {"query": (1, 4, 1, 32), "key": (1, 300, 1, 32), "value": (1, 300, 1, 32)}
    arrays = operands(simulator, shapes)
    for options, reason in (
        ({"dropout_p": 0.1, "dropout_seed": 1}, "knows no dropout"),
        ({"segment_ids_q": numpy.zeros((1, 4), "int32"), "segment_ids_kv": numpy.zeros((1, 300), "int32")}, "no segments"),
    ):
        planned = cuflash.plan(*arrays, **options)
        assert "forward" in [kernel.name for kernel in planned.kernels]
        assert reason in planned.choice
    planned = cuflash.plan(*operands(simulator, shapes, "float32"))
    assert [kernel.name for kernel in planned.kernels] == ["forward"]
    assert "it takes 16-bit types, and this is float32" in planned.choice
    monkeypatch.setenv("CUFLASH_SIMULATOR_ARCH", "sm_75")
    assert "sm_80 and later" in cuflash.plan(*arrays).choice


@pytest.mark.parametrize(
    ("tile", "rule"),
    [
        (Tile(16, 48, 2, 2), "tile_kv must be 16 or 32 rows for each warp, 32 or 64"),
        (Tile(24, 32, 2, 2), "tile_q must be a multiple of 16"),
        (Tile(16, 32, 2, 1), "num_stages must be at least 2"),
        (Tile(128, 32, 2, 2), "registers"),
        (Tile(16, 512, 16, 4), "shared memory"),
    ],
    ids=str,
)
def test_rules_of_tiles(tile: Tile, rule: str, simulator: Target) -> None:
    query, key, value = operands(simulator, {"query": (1, 1, 1, 128), "key": (1, 64, 1, 128), "value": (1, 64, 1, 128)})
    with pytest.raises(TileError, match=rule):
        cuflash.plan(query, key, value, tile={"forward_split": tile})


@pytest.mark.parametrize("arch", [arch for arch in device.ARCHITECTURES if arch != "sm_75"])
@pytest.mark.parametrize("head_dim", [16, 64, 128, 192, 256])
def test_every_case_has_a_tile(head_dim: int, arch: str) -> None:
    on, case = device.of_arch(arch, "gpu"), KernelCase(kernel_specs.FORWARD_SPLIT, "bfloat16", head_dim)
    tile = tile_choice.default_tile(case, on)
    assert tile_rules.broken_rule(case, tile, on) is None
    in_flight = (tile.num_stages - 1) * tile.tile_kv * 4 * head_dim
    assert in_flight >= 16 * 1024 or head_dim < 64, tile  # of one block, while it works on a stage


# --- How many splits ----------------------------------------------------------------------------------------------------------------------


def test_splits_fill_the_device_and_no_more() -> None:
    assert fastest_number(blocks=1000, tiles=64, resident=216) == 1
    assert fastest_number(blocks=8, tiles=2, resident=216) <= 2
    assert fastest_number(blocks=8, tiles=1, resident=216) == 1
    for blocks in (1, 2, 5, 8, 40, 100, 216):
        for tiles in (64, 1000, 4096):
            count = fastest_number(blocks, tiles, 216)
            assert 1 <= count <= MAX_SPLITS
            waves = -(-blocks * count // 216)
            assert waves <= 8, (blocks, tiles, count)
            if blocks >= 40 and tiles >= 1000:
                assert blocks * count >= 0.5 * 216, (blocks, tiles, count)  # with fewer some of memory would lie idle
    assert 100 < fastest_number(blocks=1, tiles=4096, resident=216) < 216  # more would take longer to merge than they save
    assert fastest_number(blocks=40, tiles=1000, resident=216) == 3
    assert fastest_number(blocks=1, tiles=16, resident=216) == 16  # each block waits for memory once


def test_devices_with_odd_numbers_of_sms() -> None:
    """A split has a tile at least, and no other number of them is faster by the model."""
    for resident in (1, 13, 76, 133, 2 * 71, 3 * 47):
        for blocks in (1, 3, 7, 64, 129):
            for tiles in (1, 2, 5, 63, 1001):
                count = fastest_number(blocks, tiles, resident)
                assert 1 <= count <= min(tiles, MAX_SPLITS)
                costs = [cost_of_splits(blocks, tiles, resident, other) for other in range(1, min(tiles, 256) + 1)]
                assert cost_of_splits(blocks, tiles, resident, count) == min(costs)


def test_a_plan_says_what_it_asks_of_memory() -> None:
    """4 sequences of 8 heads of 4096 keys and values of 256 bytes; of a window of 128 keys what its queries see."""
    caches, query = numpy.zeros((2, 1, 64, 8, 128), "float16"), numpy.zeros((4, 1, 32, 128), "float16")
    given = {"cache_seqlens": numpy.zeros(4, "int32"), "page_table": numpy.zeros((4, 64), "int32")}
    text = str(cuflash.kvcache_plan(query, *caches, **given))
    assert (
        "  keys       at most 64 MiB of keys and values to read, by 2 blocks of an SM at a time, in 1 wave, with 64 KiB in flight per SM"
        in text
    )
    assert "at most 2 MiB of keys" in str(cuflash.kvcache_plan(query, *caches, **given, window=(127, 0)))
    many = numpy.zeros((4, 17, 32, 128), "float16")
    assert "  keys  " not in str(cuflash.plan(many, many, many))


def test_a_window_needs_fewer_splits(simulator: Target) -> None:
    query, key, value = operands(simulator, {"query": (1, 1, 1, 32), "key": (1, 60_000, 1, 32), "value": (1, 60_000, 1, 32)})
    options = {"tile": SPLIT, "causal_alignment": "bottom_right"}
    wide, narrow = (cuflash.plan(query, key, value, window=window, **options).kernels[0] for window in (None, (127, 0)))
    assert wide.splits.number > 20
    assert narrow.splits.number <= 2
