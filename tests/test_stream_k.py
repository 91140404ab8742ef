"""Stream-K: blocks with equal shares of the keys of a ragged batch. What it computes, which block has what, when it is taken, and what it is predicted to gain."""

from __future__ import annotations

import functools
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy
import pytest
from caches import CacheCall, PackedCall, only_new_memory
from conftest import Target
from problems import num_prepared

import cuflash
from cuflash import Tile
from cuflash.cli.cached_calls import CachedCall
from cuflash.cli.samples import Sample
from cuflash.errors import OptionError, SimulatorError
from cuflash.hardware import device
from cuflash.planning import kernel_specs, split_cost, split_forward, stream_k
from cuflash.planning.kernel_plan import KernelPlan
from cuflash.planning.plan import Plan
from cuflash.planning.planner import make_plan
from cuflash.runtime import cache_calls, calls
from cuflash.runtime.prepared import PreparedCall
from cuflash.simulator import check
from cuflash.timing import splits
from cuflash.timing.grid import clocks_of_memory_grid

pytest.importorskip("cupy")

OPTIONS: dict[str, Any] = {"num_splits": "stream-K", "tile": {"forward_split": Tile(16, 64, 4, 2)}}
RAGGED = (0, 1, 1500, 64, 65, 3)


def with_blocks(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """From here on plans are made for a device that holds so many blocks at a time, and calls that were prepared for another one are not known."""
    monkeypatch.setattr(split_forward, "resident_blocks", lambda *_: count)
    monkeypatch.setattr(calls, "_calls", {})


def launched_blocks() -> int:
    """Of the only call that was prepared since."""
    (prepared,) = {id(call): call for call in calls._calls.values() if isinstance(call, PreparedCall)}.values()
    return kernel_of(prepared.plan).num_blocks


# --- What it computes ---------------------------------------------------------------------------------------------------------------------


def test_any_number_of_blocks(decoder: Target, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Of one block, odd ones, and more than there are key tiles. Results and workspace come full of NaN."""
    only_new_memory(monkeypatch)
    for count in range(1, 140) if request.config.getoption("--exhaustive") else (1, 2, 7, 13, 133):
        with_blocks(monkeypatch, count)
        call = CacheCall(RAGGED, room=1600, heads_q=6, heads_kv=2, options=OPTIONS)
        _, lse = call.check(decoder)
        assert numpy.isneginf(decoder.as_numpy(lse)[0]).all()
        assert launched_blocks() == count


def test_tiles_of_rows_that_end_within_a_query(decoder: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven queries of five heads are three tiles of 16 rows, which see different keys by a causal mask and a window."""
    only_new_memory(monkeypatch)
    with_blocks(monkeypatch, 11)
    options = OPTIONS | {"is_causal": True, "window": (200, 0)}
    CacheCall((900, 7, 0, 64), 7, 7, heads_q=10, heads_kv=2, room=1024, page_size=16, options=options).check(decoder)


def test_tiles_of_rows_that_see_no_key(decoder: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """More queries than keys, padding behind the last key, and windows that leave padding alone: beside tiles that see some, for any share."""
    only_new_memory(monkeypatch)
    options = OPTIONS | {"is_causal": True, "window": (5, 0)}
    call = CacheCall(
        (2, 0, 300, 64, 70, 128), 7, heads_q=10, heads_kv=2, room=320, page_size=16, leftpad=(0, 0, 299, 64, 100, 3), options=options
    )
    for count in (1, 5, 40):
        with_blocks(monkeypatch, count)
        call.check(decoder)
        assert launched_blocks() == count


@pytest.mark.parametrize("name", ["cache_seqlens", "cache_leftpad", "page_table"])
def test_numbers_that_make_no_sense_never_leave_the_arrays(name: str, simulator: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU nothing reads them before the kernel, whose every block clamps them alike: all results are there."""
    only_new_memory(monkeypatch)
    monkeypatch.setattr(cache_calls, "check_positions", lambda *_: None)
    with_blocks(monkeypatch, 7)
    options = OPTIONS | {"is_causal": True, "window": (200, 0)}
    given = CacheCall(
        (0, 5, 130, 250), 7, 0, heads_q=10, heads_kv=2, room=288, page_size=16, leftpad=(0, 1, 70, 10), options=options
    ).arrays()
    given[name] = numpy.resize(numpy.array([[2**31 - 1], [-(2**31)], [-1], [279]], "int32"), given[name].shape[::-1]).T.copy()
    for cache in ("key_cache", "value_cache"):
        given[cache] = numpy.zeros_like(given[cache])
    out, lse = cuflash.attention_with_kvcache(**given, return_lse=True)
    assert not out.any()
    assert not numpy.isnan(lse).any()


def test_sinks_count_once(decoder: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    only_new_memory(monkeypatch)
    with_blocks(monkeypatch, 5)
    sinks = numpy.array([0.5, 2.0], "float32")
    options = OPTIONS | {"sinks": sinks, "alibi_slopes": sinks / 8}
    _, lse = CacheCall((0, 700, 3), room=800, leftpad=(0, 70, 2), options=options).check(decoder)
    numpy.testing.assert_allclose(decoder.as_numpy(lse)[0, :, 0], sinks, rtol=1e-6)


PACKED = ((1, 0, 13, 5, 1, 0), (250, 9, 0, 77, 0, 3))
"""Queries and keys of sequences, of which some have none; in one cache, beside three tokens of nobody."""


def test_packed_queries(simulator: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequences of no query, of one, and of several tiles of rows; results of nobody's tokens are zeros."""
    only_new_memory(monkeypatch)
    options = OPTIONS | {"is_causal": True}
    call = PackedCall(*PACKED, new=True, heads_q=6, heads_kv=2, page_size=16, options=options)
    for count in (1, 4, 21):
        with_blocks(monkeypatch, count)
        call.check(simulator, max_seqlen_q=13)
        assert launched_blocks() == count
    plan = cuflash.kvcache_plan(**call.arrays(), max_seqlen_q=13)
    data = {"cu_seqlens_q": call.offsets, "seqlens_kv": numpy.add(*PACKED)}
    assert sum(map(sum, splits.walks_of_blocks(kernel_of(plan), plan.problem, data))) == 2 * (4 + 3 * 1 + 2 + 1)  # of two key heads


def test_packed_offsets_that_make_no_sense_never_leave_the_arrays(simulator: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries beyond `max_seqlen_q` have zeros, and so have tokens of nobody."""
    monkeypatch.setattr(cache_calls, "check_positions", lambda *_: None)
    with_blocks(monkeypatch, 5)
    given = PackedCall((4, 2, 9), (5, 60, 0), heads_q=6, heads_kv=2, page_size=16, options=OPTIONS | {"is_causal": True}).arrays()
    for name in ("key_cache", "value_cache"):
        given[name] = numpy.zeros_like(given[name])

    def called(*offsets: int) -> tuple[Any, Any]:
        cu_seqlens_q = numpy.array(offsets, "int32")
        return cuflash.attention_with_kvcache(**given | {"cu_seqlens_q": cu_seqlens_q}, max_seqlen_q=9, return_lse=True)  # type: ignore[no-any-return]

    tokens = len(given["query"])
    for offsets in ((0, tokens, tokens, tokens), (0, 0, 0, 0), (-5, 3, 3, 2**31 - 1)):
        out, lse = called(*offsets)
        assert not out.any()
        assert not numpy.isnan(lse).any()
        assert offsets[0] < 0 or numpy.isneginf(lse[:, 11:]).all()  # of one sequence two tiles have rows of 11 queries and no more
    called(5, 4, 3, 2)  # of some rows nobody writes the results
    with pytest.raises(SimulatorError, match=r"\[race\]"):  # of some all blocks write them
        called(2**31 - 1, -(2**31), 3, 2)


@pytest.mark.exhaustive
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("features", ["mask", "tree", "e4m3", "values of their own", "picked rows", "two tiles in one row of warps"])
def test_other_features(features: str, dtype: str, decoder: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    only_new_memory(monkeypatch)
    rng = numpy.random.default_rng(5)
    call = CacheCall((0, 5, 130, 250), 4, 4, 6, 2, dtype=dtype, options=OPTIONS)
    call = {
        "mask": replace(call, options=OPTIONS | {"attn_mask": rng.standard_normal((1, 6, 4, 300)).astype("float32"), "is_causal": True}),
        "tree": replace(call, options=OPTIONS | {"attn_mask": rng.random((4, 1, 4, 300)) > 0.3}),
        "e4m3": replace(call, scales="sequences", page_size=16),
        "values of their own": replace(call, head_dim=24, head_dim_v=40),
        "picked rows": replace(call, picks_rows=True, rotary_dim=16),
        "two tiles in one row of warps": replace(call, options=OPTIONS | {"tile": {"forward_split": Tile(32, 32, 2, 3)}}),
    }[features]
    for count in (1, 3, 10, 57):
        with_blocks(monkeypatch, count)
        call.check(decoder)


def test_a_warm_call_reads_other_lengths(simulator: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """The launch is the same: what was split is whole then, and the other way round, in the same workspace."""
    with_blocks(monkeypatch, 13)
    call = CacheCall((1500, 3, 700, 0), room=1600, heads_q=6, heads_kv=2, options=OPTIONS)
    given = call.arrays()
    cuflash.attention_with_kvcache(**given, return_lse=True)
    known = num_prepared()
    for lengths in ((2, 3, 1, 0), (1500, 3, 700, 0), (0, 0, 0, 0), (9, 2, 650, 0)):
        given["cache_seqlens"][:] = lengths
        now = replace(call, lengths=lengths)
        now.plain.update(call.plain)
        for name in ("keys", "values"):
            now.plain[name] = [rows[:length] for rows, length in zip(call.plain[name], lengths, strict=True)]
        now.check_results(*cuflash.attention_with_kvcache(**given, return_lse=True))
    assert num_prepared() == known


def test_no_schedule_changes_a_bit(simulator: Target, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    with_blocks(monkeypatch, 13)
    options = OPTIONS | {"is_causal": True}
    padded = CacheCall(RAGGED, room=1600, heads_q=6, heads_kv=2, options=OPTIONS).arrays()
    packed = PackedCall(*PACKED, heads_q=6, heads_kv=2, page_size=16, options=options).arrays() | {"max_seqlen_q": 13}
    seeds = range(20 if request.config.getoption("--exhaustive") else 2)
    for given in (padded, packed):
        report = check(functools.partial(cuflash.attention_with_kvcache, **given, return_lse=True), seeds=seeds)
        assert report.kernels == ("forward_split_mma", "merge_attention")
        assert len(report.compared) == 2


# --- Which block has what -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", [1, 3, 47, 264])
def test_shares_are_equal_and_leave_nothing_out(blocks: int) -> None:
    tiles = [0, 1, 512, 16, 0, 3, 100, 1]
    shares = stream_k.shares(tiles, blocks)
    assert len(shares) == blocks
    assert sum(map(sum, shares)) == sum(tiles)
    positions = sum(max(1, count) + split_cost.BEGIN_TILES for count in tiles)
    share = split_cost.share_of_block(positions, max(tiles), blocks)
    assert all(sum(own) <= share for own in shares)
    assert sum(map(len, shares)) <= len(tiles) + positions / share  # more parts than output tiles only where a share ends


def test_the_kernel_has_the_shares_that_are_predicted(simulator: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """The table of parts says which blocks have any of an output tile."""
    with_blocks(monkeypatch, 13)
    call = CacheCall(RAGGED, room=1600, heads_q=6, heads_kv=2, options=OPTIONS)
    given = {**dict.fromkeys(cache_calls.CacheOperands._fields), **call.arrays(), "return_lse": False}
    out = cuflash.attention_with_kvcache(**call.arrays())
    defaults = {"is_causal": False, "scale": None, "window": None, "softcap": None, "layout": "bshd", "rotary_interleaved": None}
    prepared: Any = cache_calls.recall({**defaults, **given, "batch_invariant": False, "max_seqlen_q": None})
    memory = {buffer.name: numpy.zeros(buffer.shape, buffer.dtype) for buffer in prepared.plan.workspace}
    places = {name: array.ctypes.data for name, array in (given | memory | {"out": out}).items() if isinstance(array, numpy.ndarray)}
    prepared.launch_all(places)
    split = kernel_of(prepared.plan)
    walks = splits.walks_of_blocks(split, prepared.problem, {"seqlens_kv": RAGGED})
    table = memory["part_table"].reshape(-1, 2)
    blocks = [list(range(first, first + count)) for first, count in table]
    assert [sum(block in of for of in blocks) for block in range(split.num_blocks)] == [len(walk) for walk in walks]
    assert len({count for _, count in table}) > 1
    assert all(first <= second for (first, _), (second, _) in pairwise(table.tolist()))


# --- When it is taken ---------------------------------------------------------------------------------------------------------------------


def plan_of(batch: int, room: int, num_splits: int | str | None = None) -> Plan:
    cached = CachedCall(64, num_splits=num_splits)
    extents: dict[str, Any] = {"seqlen_q": 1, "num_heads_q": 32, "num_heads_kv": 8, "head_dim": 128}
    sample = Sample(batch=batch, seqlen_kv=room, dtype="bfloat16", cache=cached, **extents)
    return make_plan(cached.problem(sample), device.of_arch("sm_90", "gpu"))


def kernel_of(plan: Plan) -> KernelPlan:
    return next(kernel for kernel in plan.kernels if kernel.spec.splits_keys)


def test_it_is_taken_where_lengths_may_differ_by_much() -> None:
    """Plans look at no length: these are of caches that do not exist."""
    taken = plan_of(16, 32768)
    assert kernel_of(taken).splits.stream_k
    assert "stream-K: equal shares of all keys" in str(taken)
    assert kernel_of(taken).num_blocks == split_forward.resident_blocks(kernel_of(taken).case, kernel_of(taken).tile, taken.device)
    assert [kernel.name for kernel in taken.kernels] == ["forward_split", "merge_attention"]
    invariant = make_plan(replace(taken.problem, batch_invariant=True), taken.device)
    assert kernel_of(invariant).splits[:3] == (32, 1024 // kernel_of(invariant).tile.tile_kv, False)  # of 1024 keys each
    assert not kernel_of(plan_of(1, 32768)).splits.stream_k  # one sequence is cut into equal parts anyhow
    assert not kernel_of(plan_of(16, 256)).splits.stream_k
    assert kernel_of(plan_of(16, 32768, 4)).splits[:3] == (4, 0, False)
    assert kernel_of(plan_of(2, 256, "stream-K")).splits.stream_k


def test_workspace_grows_with_the_device_and_not_with_keys() -> None:
    short, long = (plan_of(64, room, "stream-K").workspace_bytes for room in (8192, 1 << 20))
    assert short == long < 8 << 20


def test_what_cannot_have_it(simulator: Target) -> None:
    call = CacheCall((5, 3), heads_kv=2)
    given = call.arrays() | {"num_splits": "stream-K"}
    with pytest.raises(OptionError, match=r"'stream-K'; expected None with batch_invariant=True. .*lengths of the whole batch"):
        cuflash.attention_with_kvcache(**given, batch_invariant=True)
    with pytest.raises(OptionError, match="from 1 to 256, 'stream-K', or None"):
        cuflash.attention_with_kvcache(**given | {"num_splits": "stream_k"})
    wide = stream_k.why_not(kernel_specs.FORWARD_WGMMA_WIDE, plan_of(4, 4096).problem, 1, 64)
    assert wide == "forward_wgmma_wide knows no stream-K"
    with pytest.raises(OptionError, match="at most 1024 sequences times tiles of rows"):
        plan_of(1025, 64, "stream-K")


# --- What it is predicted to take ---------------------------------------------------------------------------------------------------------


def test_blocks_that_are_left_have_all_of_memory() -> None:
    grid = functools.partial(clocks_of_memory_grid, num_sms=2, trip_clocks=(4.0, 5.0), memory_clocks=3.0, overhead=0.0, empty=1.0)
    assert grid([[10.0]]) == pytest.approx(40)  # alone, by the SM
    assert grid([[10.0]] * 4) == pytest.approx(120)  # four at a time, by memory
    assert grid([[10.0]] * 3 + [[20.0]]) == pytest.approx(120 + 10 * 4)
    assert grid([[]] * 4) == pytest.approx(1)
    assert grid([[10.0]] * 5) == pytest.approx(120 + 40)
    assert clocks_of_memory_grid([[2.0, 3.0]], num_sms=1, trip_clocks=(1.0,), memory_clocks=1.0, overhead=10.0, empty=0.0) == pytest.approx(
        25
    )


def test_a_long_sequence_among_short_ones_is_predicted_to_gain() -> None:
    on, lengths = kernel_of(plan_of(16, 32768)), [32768] + [1024] * 15
    cut = kernel_of(plan_of(16, 32768, 2))
    walks = [splits.walks_of_blocks(kernel, plan_of(16, 32768).problem, {"seqlens_kv": lengths}) for kernel in (on, cut)]
    longest = [max(map(sum, of)) for of in walks]
    assert sum(map(sum, walks[0])) == sum(map(sum, walks[1]))
    assert 5 * longest[0] < longest[1]
