"""`attention_with_kvcache`: caches of every form, appending, rotary embedding, lengths, splits. What no sequence uses of a cache is NaN and infinity."""

from __future__ import annotations

import functools
import re
from dataclasses import replace
from typing import Any

import numpy
import pytest
from caches import CacheCall, only_new_memory
from conftest import Target
from problems import num_prepared

import cuflash
from cuflash import Tile
from cuflash.errors import ArgumentError, OptionError, UnsupportedError
from cuflash.planning import cache_append
from cuflash.runtime import cache_calls, calls
from cuflash.simulator import check

pytest.importorskip("cupy")

TILE = {"forward_split": Tile(16, 64, 4, 2)}
LENGTHS = (0, 5, 130, 250)

SHAPES = {  # queries, room: flash-attn's parametrisation, the longer ones shortened
    "1x128": (1, 128), "1x339": (1, 339), "3x320": (3, 320), "12x300": (12, 300), "16x400": (16, 400), "33x64": (33, 64),
}  # fmt: skip
FORMS: dict[str, dict[str, Any]] = {
    "rows": {}, "picked": {"picks_rows": True}, "page1": {"page_size": 1}, "page16": {"page_size": 16}, "page100": {"page_size": 100},
}  # fmt: skip
MASKS: dict[str, dict[str, Any]] = {
    "full": {}, "causal": {"is_causal": True}, "window": {"is_causal": True, "window": (60, 0)}, "local": {"window": (40, 7)},
    "softcap": {"is_causal": True, "softcap": 3.0},
}  # fmt: skip
ROTARY: dict[str, dict[str, Any]] = {
    "none": {}, "half": {"rotary_dim": 16, "interleaved": True}, "whole": {"rotary_dim": 32}, "odd": {"rotary_dim": 6},
}  # fmt: skip


@pytest.mark.sample(16)
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (5, 1)], ids=["mha", "gqa", "mqa"])
@pytest.mark.parametrize("rotary", list(ROTARY))
@pytest.mark.parametrize("mask", list(MASKS))
@pytest.mark.parametrize("has_new", [False, True], ids=["kept", "new"])
@pytest.mark.parametrize("has_leftpad", [False, True], ids=["", "leftpad"])
@pytest.mark.parametrize("form", list(FORMS))
@pytest.mark.parametrize("shape", list(SHAPES))
def test_calls_of_every_form(
    shape: str, form: str, has_leftpad: bool, has_new: bool, mask: str, rotary: str, heads: tuple[int, int], decoder: Target
) -> None:
    seqlen_q, room = SHAPES[shape]
    new = seqlen_q if has_new else 0
    rng = numpy.random.default_rng(len(shape + form + mask))
    lengths = tuple(int(length) for length in (*rng.integers(min(seqlen_q, room - new), room - new + 1, 2), room - new, 0))
    leftpad = tuple(int(rng.integers(0, length + 1)) for length in lengths) if has_leftpad else ()
    CacheCall(
        lengths, seqlen_q, new, *heads, room=room, leftpad=leftpad, options=MASKS[mask] | {"tile": TILE}, **FORMS[form],
        **(ROTARY[rotary] if has_new else {}),
    ).check(decoder)  # fmt: skip


@pytest.mark.exhaustive
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("page_size", [0, 4, 128])
@pytest.mark.parametrize(
    "shape", [(1, 128), (1, 339), (3, 1024), (64, 800), (3, 799), (64, 2048), (16, 20000), (128, 128), (256, 512), (2048, 3577)], ids=str
)
def test_flash_attns_lengths(shape: tuple[int, int], page_size: int, dtype: str, decoder: Target) -> None:
    seqlen_q, room = shape
    CacheCall(
        (room - seqlen_q, room // 3),
        seqlen_q,
        min(seqlen_q, room // 2),
        4,
        2,
        64,
        room=room,
        page_size=page_size,
        dtype=dtype,
        options={"is_causal": True},
    ).check(decoder)


@pytest.mark.parametrize("features", ["alibi_sinks", "tree", "bias"])
def test_features(features: str, decoder: Target) -> None:
    rng = numpy.random.default_rng(5)
    tree = numpy.tri(4, dtype=bool) & (rng.random((4, 4)) > 0.3) | numpy.eye(4, dtype=bool)
    mask = numpy.ones((len(LENGTHS), 1, 4, 300), bool)
    for b, length in enumerate(LENGTHS):
        mask[b, 0, :, length : length + 4] = tree
    options: dict[str, Any] = {
        "alibi_sinks": {"is_causal": True, "alibi_slopes": numpy.linspace(0.1, 1, 6, dtype="float32"), "sinks": numpy.linspace(-3, 3, 6, dtype="float32")},
        "tree": {"attn_mask": mask},
        "bias": {"attn_mask": rng.standard_normal((1, 6, 4, 300)).astype("float32"), "is_causal": True},
    }[features]  # fmt: skip
    CacheCall(LENGTHS, 4, 4, 6, 2, options=options | {"tile": TILE, "num_splits": 3}).check(decoder)


def test_value_with_a_head_dim_of_its_own(decoder: Target) -> None:
    CacheCall(LENGTHS, 2, 1, head_dim=24, head_dim_v=40, page_size=7, dtype="bfloat16", options={"num_splits": 2}).check(decoder)


def test_other_layouts_and_strides(simulator: Target) -> None:
    """Heads before positions, as pages of other libraries have them; views; rows that do not start on 16 bytes."""
    call = CacheCall(LENGTHS, 3, 2, 6, 2, page_size=16, options={"is_causal": True})
    given = call.arrays()
    turned = {name: x.transpose(0, 2, 1, 3) if getattr(x, "ndim", 0) == 4 else x for name, x in given.items()}
    out, lse = cuflash.attention_with_kvcache(**turned, layout="bhsd", return_lse=True)
    call.check_results(out.transpose(0, 2, 1, 3), lse)
    given = call.arrays()
    for name in ("query", "key_cache", "value_cache", "key", "value"):
        wide = numpy.zeros((*given[name].shape[:-1], 33), given[name].dtype)
        wide[..., :-1] = given[name]
        given[name] = wide[..., :-1]
    call.check_results(*cuflash.attention_with_kvcache(**given, return_lse=True))


@pytest.mark.parametrize("form", ["rows", "picked", "page16"])
def test_numbers_that_make_no_sense_never_leave_the_arrays(form: str, simulator: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU nothing reads them before the kernels, which clamp: what is computed is not specified, but nothing else is touched."""
    monkeypatch.setattr(cache_calls, "check_positions", lambda *_: None)
    call = CacheCall(
        LENGTHS, 2, 3, room=280, leftpad=(0, 1, 70, 10), rotary_dim=8, options={"is_causal": True, "tile": TILE}, **FORMS[form]
    )
    senseless = numpy.array([2**31 - 1, -(2**31), -1, 279], "int32")
    for name in ("cache_seqlens", "cache_leftpad", "cache_batch_idx", "page_table"):
        given = call.arrays()
        if name not in given:
            continue
        given[name] = numpy.ascontiguousarray(
            numpy.broadcast_to(senseless[:, None] if name == "page_table" else senseless, given[name].shape)
        )
        if (
            name != "page_table" and form == "page16"
        ):  # no page twice, behind lengths neither: a sequence would see what another one appends
            given["page_table"] = numpy.arange(given["page_table"].size, dtype="int32").reshape(given["page_table"].shape)
        if name in ("cache_batch_idx", "page_table"):  # sequences that share a row or a page write it in any order
            given = {key: x for key, x in given.items() if key not in ("key", "value") and not key.startswith("rotary")}
        surroundings = {}
        for cache in ("key_cache", "value_cache"):
            memory = numpy.full((given[cache].shape[0] + 2, *given[cache].shape[1:]), 7, given[cache].dtype)
            memory[1:-1] = 0
            surroundings[cache], given[cache] = memory, memory[1:-1]
        out = cuflash.attention_with_kvcache(**given)
        assert numpy.isfinite(out).all()
        for memory in surroundings.values():
            assert (memory[[0, -1]] == 7).all()


APPENDING = {
    "pages": CacheCall((0, 5, 130, 250), 3, 3, 6, 2, 24, page_size=16, leftpad=(0, 8, 7, 0), rotary_dim=14, interleaved=True, options={"is_causal": True, "num_splits": 3}),
    "e4m3": CacheCall((0, 130), 2, 2, 4, 2, 40, 24, rotary_dim=16, scales="sequences", options={"window": (40, 7), "num_splits": 2}),
    "stream": CacheCall((0, 64, 130), 1, 1, 4, 2, picks_rows=True, rotary_dim=32, dtype="bfloat16", options={"num_splits": "stream-K"}),
}  # fmt: skip


@pytest.mark.parametrize("odd_rows", [False, True], ids=["", "odd"])
@pytest.mark.parametrize("name", list(APPENDING))
def test_a_kernel_before_attention_appends_the_same_bits(
    name: str, odd_rows: bool, simulator: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys that padding hides are appended too; so are those of rows that do not start on 16 bytes."""
    given, results = APPENDING[name].arrays() | {"tile": TILE}, []
    for most in (cache_append.MAX_FUSED_KEYS, 0):
        monkeypatch.setattr(cache_append, "MAX_FUSED_KEYS", most)
        monkeypatch.setattr(calls, "_calls", {})
        own = {}
        for cache in ("key_cache", "value_cache"):
            memory = numpy.zeros((*given[cache].shape[:-1], given[cache].shape[-1] + odd_rows), given[cache].dtype)
            own[cache] = memory[..., : given[cache].shape[-1]]
            own[cache][...] = given[cache]
        out, lse = cuflash.attention_with_kvcache(**given | own, return_lse=True)
        results.append([Target.bits(x) for x in (out, lse, *own.values())])
        assert [kernel.name == "cache_append" for kernel in cuflash.kvcache_plan(**given | own).kernels].count(True) == (most == 0)
    assert results[0] == results[1]


# --- Splits -------------------------------------------------------------------------------------------------------------------------------


def test_every_number_of_splits(decoder: Target, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Most of them are empty; workspace comes full of NaN."""
    only_new_memory(monkeypatch)
    some, every = (1, 2, 3, 5, 7, 17, 32, 55, 97, 133, 256), (*range(1, 134), 256)
    for count in every if request.config.getoption("--exhaustive") else some:
        CacheCall((0, 1, 64, 65, 300), options={"num_splits": count, "tile": TILE}).check(decoder)


def test_an_empty_split_says_so_and_sinks_count_once(decoder: Target) -> None:
    sinks = numpy.array([0.5, 2.0], "float32")
    for count in (1, 4):
        _, lse = CacheCall((0, 3, 250), options={"num_splits": count, "tile": TILE, "sinks": sinks, "window": (70, 0)}).check(decoder)
        numpy.testing.assert_allclose(lse[0, :, 0], sinks, rtol=1e-6)


@pytest.mark.parametrize("lowest", [-1e9, float(numpy.finfo("float32").min)])
@pytest.mark.parametrize(
    ("length", "room", "options"), [(65, 70, {"num_splits": 2}), (1030, 1100, {"batch_invariant": True})], ids=["cut", "invariant"]
)
def test_parts_keep_what_a_huge_mask_would_swallow(
    length: int, room: int, options: dict[str, Any], lowest: float, decoder: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores are one number for float32, so that each key counts as much as any other; the first part has all but a few."""
    only_new_memory(monkeypatch)
    call = CacheCall((length, 3), room=room, options={"attn_mask": numpy.full((1, 1, 1, room), lowest, "float32"), "tile": TILE} | options)
    given = {name: decoder.place(x) if isinstance(x, numpy.ndarray) else x for name, x in call.arrays().items()}
    out, lse = cuflash.attention_with_kvcache(**given, return_lse=True)
    want = numpy.stack([values.astype(float).mean(axis=0) for values in call.plain["values"]])
    numpy.testing.assert_allclose(decoder.host(out)[:, 0], numpy.broadcast_to(want, (2, 2, 32)), atol=1e-3)
    assert (decoder.host(lse) == numpy.float32(lowest)).all()


@pytest.mark.parametrize("scale", [1e3, -1e3, 1e30], ids=str)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_parts_keep_what_a_huge_product_would_swallow(dtype: str, scale: float, decoder: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal products of 1e6 times a scale: each key counts as much as any other; the first part has all but one."""
    only_new_memory(monkeypatch)
    call = CacheCall((65, 3), room=70, dtype=dtype, options={"scale": scale, "num_splits": 2, "tile": TILE})
    call.plain["query"][...] = 180
    for keys in call.plain["keys"]:
        keys[...] = 180
    given = {name: decoder.place(x) if isinstance(x, numpy.ndarray) else x for name, x in call.arrays().items()}
    out, lse = cuflash.attention_with_kvcache(**given, return_lse=True)
    want = numpy.stack([values.astype(float).mean(axis=0) for values in call.plain["values"]])
    numpy.testing.assert_allclose(decoder.host(out)[:, 0].astype(float), numpy.broadcast_to(want, (2, 2, 32)), atol=5e-3)
    numpy.testing.assert_allclose(decoder.host(lse), 32 * 180.0**2 * scale, rtol=1e-6)


def test_an_additive_mask_leaves_bits_the_same_in_any_room(simulator: Target) -> None:
    """One part of two that has keys is the result."""
    mask = numpy.random.default_rng(1).standard_normal((1, 2, 1, 1100)).astype("float32")
    given = CacheCall((900,), room=1100, options={"batch_invariant": True, "tile": TILE, "attn_mask": mask}).arrays()
    less = {name: given[name][:, :1000] for name in ("key_cache", "value_cache")} | {"attn_mask": mask[..., :1000]}
    results = [cuflash.attention_with_kvcache(**given | changed, return_lse=True) for changed in ({}, less)]
    assert len({(Target.bits(out), Target.bits(lse)) for out, lse in results}) == 1


def test_a_sequence_has_the_same_bits_in_any_batch(simulator: Target) -> None:
    options = {"batch_invariant": True, "tile": {"forward_split": Tile(16, 64, 4, 2)}}
    call = CacheCall((2500, 40, 1024, 1025), room=3000, heads_q=6, heads_kv=2, options=options)
    given = call.arrays()
    out, lse = cuflash.attention_with_kvcache(**given, return_lse=True)
    call.check_results(out, lse)
    for chosen in ([0], [2, 0], [3, 3, 1, 0, 0]):
        rows = numpy.array(chosen, numpy.int32)
        some = given | {"query": given["query"][chosen], "cache_seqlens": given["cache_seqlens"][chosen], "cache_batch_idx": rows}
        for room in (3000, 2600):  # not even the room matters
            caches = {name: given[name][:, :room] for name in ("key_cache", "value_cache")}
            own, own_lse = cuflash.attention_with_kvcache(**some | caches, return_lse=True)
            assert Target.bits(own) == Target.bits(out[chosen])
            assert Target.bits(own_lse) == Target.bits(lse[chosen])


def test_a_sequence_has_the_same_bits_whatever_number_of_parts_its_room_makes(simulator: Target) -> None:
    """The values of its three parts cancel, so that the order in which they are added up is seen."""
    options = {"batch_invariant": True, "tile": {"forward_split": Tile(16, 64, 4, 2)}}
    call = CacheCall((3072,), room=4200, dtype="bfloat16", options=options)
    call.plain["query"][...] = 0
    values = call.plain["values"][0]
    values[:1024] = numpy.arange(32) % 7 + 1
    values[1024:2048] = numpy.arange(32) % 5 + 1
    values[2048:] = -(numpy.arange(32) % 7 + numpy.arange(32) % 5 + 2)
    given = call.arrays()
    less = {name: given[name][:, :3072] for name in ("key_cache", "value_cache")}
    results = [cuflash.attention_with_kvcache(**given | changed, return_lse=True) for changed in ({}, less)]
    assert len({(Target.bits(out), Target.bits(lse)) for out, lse in results}) == 1


@pytest.mark.parametrize("page_size", [0, 16])
def test_no_schedule_changes_a_bit(page_size: int, simulator: Target, request: pytest.FixtureRequest) -> None:
    seeds = range(20 if request.config.getoption("--exhaustive") else 2)
    for stages in (2, 3):
        tile = {"forward_split": Tile(16, 32, 2, stages)}
        call = CacheCall(
            LENGTHS, 3, 2, 6, 2, page_size=page_size, rotary_dim=16, options={"is_causal": True, "num_splits": 3, "tile": tile}
        )
        report = check(functools.partial(cuflash.attention_with_kvcache, **call.arrays(), return_lse=True), seeds=seeds)
        assert report.kernels == ("forward_split_mma", "merge_attention")
        assert len(report.compared) == 2


# --- Calls that are kept ------------------------------------------------------------------------------------------------------------------


def test_a_warm_call_reads_what_it_is_given_then(simulator: Target) -> None:
    call = CacheCall(LENGTHS, 1, 1, page_size=16, options={"is_causal": True, "tile": TILE})
    given = call.arrays()
    first = cuflash.attention_with_kvcache(**given)
    known = num_prepared()
    given["cache_seqlens"] = given["cache_seqlens"] + 1  # one more step, with the key of the first one in the cache
    longer = replace(call, lengths=tuple(length + 1 for length in LENGTHS))
    del longer.plain["keys"], longer.plain["values"]
    longer.plain.update(call.plain)
    for name, at in (("keys", 0), ("values", 1)):
        longer.plain[name] = [call.appended(b)[at] for b in range(call.batch)]
    out = numpy.empty_like(first)
    _, lse = cuflash.attention_with_kvcache(**given, out=out, return_lse=True)
    longer.check_results(out, lse)
    for _ in range(2):
        cuflash.attention_with_kvcache(**given)
    assert num_prepared() == known + 1  # that with `out` and lse


def test_generation_step_by_step_is_one_causal_call(simulator: Target) -> None:
    """Keys that come one by one, a chunk first, through pages in any order."""
    rng = numpy.random.default_rng(0)
    query, key, value = (rng.standard_normal((2, 40, heads, 32)).astype("float16") for heads in (4, 2, 2))
    want = cuflash.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    caches = [numpy.full((14, 8, 2, 32), numpy.nan, "float16") for _ in range(2)]
    table = rng.permutation(14)[:10].reshape(2, 5).astype("int32")
    for begin, end in ((0, 30), *((i, i + 1) for i in range(30, 40))):
        step = [x[:, begin:end] for x in (query, key, value)]
        lengths = numpy.full(2, begin, "int32")
        out = cuflash.attention_with_kvcache(
            step[0], *caches, *step[1:], cache_seqlens=lengths, page_table=table, is_causal=True, tile=TILE
        )
        numpy.testing.assert_allclose(out.astype("float32"), want[:, begin:end].astype("float32"), atol=2e-3)


@pytest.mark.parametrize("page_size", [0, 16])
def test_rows_and_pages_far_apart(page_size: int, simulator: Target) -> None:
    """A cache of more than 2^31 elements, of which next to nothing exists; new keys find their places there too."""
    call = CacheCall((150, 90), new=1, room=160, page_size=page_size, options={"tile": TILE})
    given = call.arrays()
    for name in ("key_cache", "value_cache"):
        rows, *_ = given[name].shape
        stride = 2**31 // (rows - 1) // 8 * 8 + 64
        inner = [x // given[name].itemsize for x in given[name].strides[1:]]
        given[name] = simulator.place_far(given[name], (stride, *inner), stride * (rows - 1) + given[name][0].size)
    call.check_results(*cuflash.attention_with_kvcache(**given, return_lse=True))


# --- What cannot be used ------------------------------------------------------------------------------------------------------------------

NEW = CacheCall((3, 4), 1, 1, room=32, rotary_dim=8)
NEW_PAGES = CacheCall((3, 20), 1, 1, room=32, page_size=8, rotary_dim=8)
PAGES = replace(NEW_PAGES, rotary_dim=0)
QUERIES = CacheCall((3, 30), 4, 1, room=32, rotary_dim=8, options={"is_causal": True})
_BAD: list[tuple[str, CacheCall, dict[str, Any], str]] = [
    ("no query", NEW, {"query": NEW.plain["query"][:, :0]}, "query"),
    ("three dimensions", NEW, {"query": NEW.plain["query"][:, 0]}, r"query: .*query\[:, None\]"),
    ("heads", NEW, {"query": numpy.zeros((2, 1, 3, 32), "float16"), "key_cache": numpy.zeros((2, 32, 2, 32), "float16")}, "key_cache: .*divisor of 3"),
    ("head_dim", NEW, {"key_cache": numpy.zeros((2, 32, 1, 16), "float16")}, "key_cache: .*head_dim 16"),
    ("value", NEW, {"value_cache": numpy.zeros((2, 31, 1, 32), "float16")}, "value_cache"),
    ("int64", NEW, {"cache_seqlens": numpy.zeros(2, "int64")}, r"cache_seqlens: .*astype\('int32'\)"),
    ("an int", NEW, {"cache_seqlens": 3}, "cache_seqlens"),
    ("lengths", NEW, {"cache_seqlens": numpy.zeros(3, "int32")}, r"cache_seqlens: .*\(2,\)"),
    ("too long", NEW, {"cache_seqlens": numpy.array([3, 32], "int32")}, "cache_seqlens: got 32 at 1; expected 0 to 31"),
    ("negative", NEW, {"cache_seqlens": numpy.array([-1, 3], "int32")}, "cache_seqlens: got -1 at 0"),
    ("value alone", NEW, {"key": None}, "key: got None while the other one is given"),
    ("new heads", NEW, {"key": numpy.zeros((2, 1, 2, 32), "float16")}, "key: "),
    ("new type", NEW, {"key": NEW.plain["key"].astype("float32")}, "key: got float32"),
    ("one table", NEW, {"rotary_sin": None}, "rotary_sin: got None"),
    ("which pairs", NEW, {"rotary_interleaved": None}, "rotary_interleaved: .*GPT-NeoX"),
    ("wide tables", NEW, {"rotary_cos": numpy.zeros((32, 17), "float32")}, "rotary_cos: "),
    ("short tables", NEW, {"rotary_cos": NEW.plain["rotary_cos"][:31], "rotary_sin": NEW.plain["rotary_sin"][:31]}, "rotary_cos: got 31 positions; expected at least 32"),
    ("short for pages", NEW_PAGES, {"rotary_cos": NEW.plain["rotary_cos"][:31], "rotary_sin": NEW.plain["rotary_sin"][:31]}, "rotary_cos: .* columns of page_table"),
    ("short for queries", QUERIES, {}, "rotary_cos: got 32 positions, while queries and new keys of sequence 1 stand at 30 to 33"),
    ("a list", NEW, {"cache_seqlens": [3, 4]}, r"cache_seqlens: .*dtype=numpy.int32"),
    ("a list of pages", PAGES, {"page_table": [[0], [1]]}, r"page_table: .*dtype=numpy.int32"),
    ("rotary without new", NEW, {"key": None, "value": None}, "rotary_cos: .*Rotate query"),
    ("table rows", PAGES, {"page_table": numpy.zeros((1, 4), "int32")}, "page_table: "),
    ("table type", PAGES, {"page_table": numpy.zeros((2, 4), "int64")}, "page_table: .*int32"),
    ("page", PAGES, {"page_table": numpy.full((2, 4), 99, "int32")}, "page_table: got 99 at 0; expected 0 to 10"),
    ("both", PAGES, {"cache_batch_idx": numpy.zeros(2, "int32")}, "cache_batch_idx: .*one of the two"),
    ("row", NEW, {"cache_batch_idx": numpy.array([0, 2], "int32")}, "cache_batch_idx: got 2 at 1"),
    ("row twice", NEW, {"cache_batch_idx": numpy.array([1, 1], "int32")}, "cache_batch_idx: got 1 for sequences 0 and 1; expected a row of its own"),
    ("page twice", NEW_PAGES, {"page_table": numpy.array([[5, 0, 0, 0], [0, 1, 5, 0]], "int32")}, "page_table: got 5 for sequences 0 and 1; expected a page of its own"),
    ("pad", NEW, {"cache_leftpad": numpy.array([0, 33], "int32")}, "cache_leftpad: got 33 at 1"),
    ("few rows", NEW, {name: numpy.zeros((1, 32, 1, 32), "float16") for name in ("key_cache", "value_cache")}, "key_cache: .*cache_batch_idx"),
    ("splits", NEW, {"num_splits": 0}, "num_splits: got 0; .*flash-attn writes as 0"),
    ("splits too", NEW, {"num_splits": 2, "batch_invariant": True}, "num_splits: "),
    ("keyword", NEW, {"block_table": None}, "page_table"),
    ("k_cache", NEW, {"k_cache": None}, "key_cache"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "changed", "message"), [pytest.param(*case, id=name) for name, *case in _BAD])
def test_what_cannot_be_used_is_named(call: CacheCall, changed: dict[str, Any], message: str, simulator: Target) -> None:
    given = call.arrays()
    before = {name: given[name].tobytes() for name in ("key_cache", "value_cache")}
    with pytest.raises(ArgumentError, match=message):
        cuflash.attention_with_kvcache(**given | changed)
    assert before == {name: given[name].tobytes() for name in before}


def test_memory_that_must_not_be_written(simulator: Target) -> None:
    given = NEW.arrays()
    given["key_cache"].flags.writeable = False
    with pytest.raises(ArgumentError, match=r"key_cache: .*read-only"):
        cuflash.attention_with_kvcache(**given)
    given = NEW.arrays()
    with pytest.raises(ArgumentError, match=r"key: .*shares memory with key_cache"):
        cuflash.attention_with_kvcache(**given | {"key": given["key_cache"][:, 3:4]})


def test_caches_that_share_memory(simulator: Target) -> None:
    """Halves of one array are caches, found in a warm call too; where new rows would fall on each other they are refused, in a warm call too."""
    given = replace(NEW, rotary_dim=0).arrays()
    memory = numpy.zeros((2, 40, 3, 1, 32), "float16")
    halves = {"key_cache": memory[:, :32, 0], "value_cache": memory[:, :32, 1]}
    for _ in range(2):
        cuflash.attention_with_kvcache(**given | halves)
    for value in (memory[:, :32, 0], memory[:, 8:, 0]):
        with pytest.raises(ArgumentError, match=r"value_cache: .*shares memory with key_cache"):
            cuflash.attention_with_kvcache(**given | halves | {"value_cache": value})
    cuflash.attention_with_kvcache(**given | halves | {"value_cache": memory[:, :32, 2]})
    cuflash.attention_with_kvcache(
        **{name: x for name, x in given.items() if name not in ("key", "value")} | halves | {"value_cache": memory[:, :32, 0]}
    )


@pytest.mark.parametrize("name", ["key_cache", "value_cache", "out"])
def test_read_only_bits_are_refused_in_a_warm_call_too(name: str, simulator: Target) -> None:
    given = replace(NEW, rotary_dim=0).arrays()
    tagged = {key: cuflash.bfloat16(x.view("uint16").copy()) if x.dtype == "float16" else x for key, x in given.items()}
    tagged["out"] = cuflash.bfloat16(numpy.zeros((2, 1, 2, 32), "uint16"))
    for operand in ("key_cache", "value_cache"):
        tagged[operand].bits[...] = 0
    cuflash.attention_with_kvcache(**tagged)
    tagged[name].bits.flags.writeable = False
    with pytest.raises(ArgumentError, match=f"{name}: .*read-only"):
        cuflash.attention_with_kvcache(**tagged)


def test_a_window_that_hides_nothing_is_none(simulator: Target) -> None:
    """As in flash-attn, where queries stand at one place then."""
    call = CacheCall((5, 9), 3, 3, room=40, rotary_dim=8, options={"tile": TILE})
    for window in ((40, 40), (-1, 40), (100, None)):
        given = call.arrays() | {"window": window}
        call.check_results(*cuflash.attention_with_kvcache(**given, return_lse=True))
    wide, narrow = (replace(call, options={"tile": TILE, "window": window}) for window in ((40, 39), (39, 40)))
    for one in (wide, narrow):
        one.check_results(*cuflash.attention_with_kvcache(**one.arrays(), return_lse=True))


def test_more_rows_than_32_bits_count_are_refused(simulator: Target) -> None:
    query = numpy.broadcast_to(numpy.float16(0), (1, 2**26, 32, 16))
    cache = numpy.zeros((1, 8, 1, 16), "float16")
    with pytest.raises(UnsupportedError, match="share a key head up to 2147482624, and these are 2147483648"):
        cuflash.kvcache_plan(query, cache, cache, cache_seqlens=numpy.zeros(1, "int32"))


@pytest.mark.parametrize(("dtype", "head_dim", "reason"), [("float32", 32, "this is float32"), ("float16", 264, "head_dim of at most 256")])
def test_what_there_is_no_kernel_for(dtype: str, head_dim: int, reason: str, simulator: Target) -> None:
    given = replace(PAGES, head_dim=head_dim, dtype=dtype).arrays()
    with pytest.raises(UnsupportedError, match=f"{reason}.*scaled_dot_product_attention"):
        cuflash.attention_with_kvcache(**given)


def test_turing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUFLASH_SIMULATOR_ARCH", "sm_75")
    with pytest.raises(UnsupportedError, match="this is sm_75"):
        cuflash.attention_with_kvcache(**NEW.arrays())


def test_the_plan_says_what_runs(simulator: Target) -> None:
    given = CacheCall((50,), 1, 1, room=100_000, rotary_dim=8, page_size=64).arrays()
    planned = cuflash.kvcache_plan(**given)
    assert [kernel.name for kernel in planned.kernels] == ["forward_split", "merge_attention"]
    assert [buffer.name for buffer in planned.workspace] == ["partial_out", "partial_lse"]
    many = cuflash.kvcache_plan(**CacheCall((50,), 17, 17, room=100_000, rotary_dim=8, page_size=64).arrays())
    assert [kernel.name for kernel in many.kernels] == ["cache_append", "forward_split", "merge_attention"]
    assert [buffer.name for buffer in many.workspace] == ["partial_out", "partial_lse", "rotated_query"]
    assert "seqlen 1 x 100032 in a cache, pages of 64, keys of each row up to its cache_seqlens and 1 new" in str(planned)
    assert re.search(r"forward_split: forward_split_mma.cu, tile_q=16, .*, keys of a sequence in \d+ splits", str(planned))
    with pytest.raises(OptionError, match="window"):
        cuflash.kvcache_plan(**given, window=3)


@pytest.mark.parametrize("order", ["C", "F"])
def test_a_table_of_no_sequences(order: Any, simulator: Target) -> None:
    """Its strides mean nothing."""
    given = PAGES.arrays()
    empty = {name: given[name][:0] for name in ("query", "cache_seqlens")} | {"page_table": numpy.zeros((0, 4), "int32", order)}
    for name in ("key", "value", "cache_leftpad", "attn_mask"):
        if name in given:
            empty[name] = given[name][:0]
    out = cuflash.attention_with_kvcache(**given | empty)
    assert out.shape == empty["query"].shape
