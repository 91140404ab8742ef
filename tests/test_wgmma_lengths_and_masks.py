"""The forward kernel of wgmma where data decide what a query sees: lengths of rows and of packed sequences, prefixes, segments, masks."""

from __future__ import annotations

import functools
from typing import Any

import numpy
import pytest
from conftest import HAS_GPU, Target, poison_new_memory
from test_sequences import LENGTHS_KV, LENGTHS_Q, int32, offsets, packed, padded
from test_wgmma_forward import HOST, MASKS, NAME, SHORT, asked_for, checked, hopper, inputs_of, names, with_sms  # noqa: F401 (fixtures)

import cuflash
from cuflash import Tile, reference
from cuflash.hardware import device
from cuflash.jit import cache
from cuflash.reference.comparison import compare
from cuflash.simulator import check

pytest.importorskip("cupy")

SINGLE = Tile(128, 48, 8, 1)
THREE = Tile(192, 32, 12, 2)


# --- Numbers of keys ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.sample(2)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("case", [("bfloat16", 64, SHORT), ("float16", 128, THREE)], ids=str)
def test_rows_have_their_own_numbers_of_keys(hopper: Target, case: tuple[str, int, Tile], mask: str) -> None:  # noqa: F811
    """NaN and infinity behind the last key of a row are of no consequence, in the middle of a tile too."""
    dtype, head_dim, tile = case
    lengths = [90, 33, 0, 64, 1]
    inputs = padded(hopper, lengths, dtype, (head_dim, head_dim), heads=(1, 1))
    checked(hopper, *inputs, seqlens_kv=int32(hopper, lengths), tile={NAME: tile}, **MASKS[mask])


def checked_packed(on: Target, inputs: list[Any], cu: tuple[Any, Any], maxima: tuple[int, int], **options: Any) -> tuple[Any, Any]:
    """The results, judged, of this kernel and no other."""
    query, key, value, _ = inputs
    out, lse = cuflash.varlen_attention(query, key, value, *cu, *maxima, return_lse=True, **options)
    judged = {name: option for name, option in options.items() if name != "tile"}
    attend = functools.partial(reference.varlen_attention, query, key, value, *cu, **judged)
    want_out, want_lse = attend()
    compare(out, want_out, attend(precision=str(query.dtype))[0], name="out")
    compare(lse, want_lse, attend(precision="float32")[1], name="lse", dtype="float32", terms=lambda: attend(magnitudes=True)[1])
    return out, lse


@pytest.mark.sample(2)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("case", [("bfloat16", 64, SINGLE), ("float16", 96, THREE)], ids=str)
def test_packed_sequences(hopper: Target, case: tuple[str, int, Tile], mask: str) -> None:  # noqa: F811
    """Among them such without queries or without keys, and such of several tiles of queries."""
    dtype, head_dim, tile = case
    lengths_q = [*LENGTHS_Q, 300]
    lengths_kv = [*LENGTHS_KV, 40]
    inputs = packed(hopper, (sum(lengths_q), sum(lengths_kv)), dtype, (head_dim, head_dim), heads=(2, 1))
    cu = offsets(hopper, lengths_q), offsets(hopper, lengths_kv)
    checked_packed(hopper, inputs, cu, (300, 130), enable_gqa=True, tile={NAME: tile}, **MASKS[mask])


def test_neighbours_never_leak(hopper: Target) -> None:  # noqa: F811
    """NaN in one sequence stays there, though tiles that reach past its ends are copied."""
    lengths_q, lengths_kv = [30, 45, 200], [50, 17, 40]
    cu = offsets(hopper, lengths_q), offsets(hopper, lengths_kv)
    inputs = packed(hopper, (sum(lengths_q), sum(lengths_kv)), "float16", (64, 128))
    attend = functools.partial(cuflash.varlen_attention, is_causal=True, return_lse=True, tile={NAME: SHORT})
    clean = attend(*inputs[:3], *cu)
    for sequence in range(3):
        dirty_inputs = [hopper.as_numpy(x).copy() for x in inputs[:3]]
        for x, starts in zip(dirty_inputs, (cu[0], cu[1], cu[1]), strict=True):
            x[int(starts[sequence]) : int(starts[sequence + 1])] = numpy.nan
        dirty = attend(*map(hopper.place, dirty_inputs), *cu)
        outside = [*range(int(cu[0][sequence])), *range(int(cu[0][sequence + 1]), sum(lengths_q))]
        numpy.testing.assert_array_equal(hopper.host(dirty[0])[outside], hopper.host(clean[0])[outside])
        numpy.testing.assert_array_equal(hopper.host(dirty[1])[:, outside], hopper.host(clean[1])[:, outside])
        assert numpy.isnan(hopper.host(dirty[0])[int(cu[0][sequence + 1]) - 1]).all()


def test_rows_that_no_sequence_computes_are_cleared(hopper: Target, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """Tokens behind the last offset, and those beyond a max_seqlen that is too small, which only a device's offsets may be."""
    poison_new_memory(monkeypatch)
    query, key, value, _ = packed(hopper, (700, 100), "bfloat16", (64, 64), heads=(2, 1))
    cu = offsets(hopper, [400, 30]), offsets(hopper, [60, 40])
    monkeypatch.setattr("cuflash.problem.sequences.check_offsets", lambda *_: None)
    out, lse = cuflash.varlen_attention(query, key, value, *cu, 200, 60, return_lse=True, enable_gqa=True, tile={NAME: SHORT})
    computed = [*range(256), *range(400, 430)]  # of whole tiles
    cleared = [*range(256, 400), *range(430, 700)]
    assert numpy.isfinite(hopper.host(lse)[:, computed]).all()
    assert numpy.isneginf(hopper.host(lse)[:, cleared]).all()
    assert hopper.host(out)[computed].any(axis=(1, 2)).all()
    assert (hopper.host(out)[cleared] == 0).all()


def test_rows_behind_the_last_sequence_look_nothing_up(hopper: Target) -> None:  # noqa: F811
    """They have no prefix and no slopes: both arrays end with the last sequence."""
    query, key, value, _ = packed(hopper, (230, 80), "bfloat16", (64, 64), heads=(2, 1))
    cu = offsets(hopper, [100, 30]), offsets(hopper, [50, 30])
    options = {"prefix_lengths": numpy.array([7, 12], numpy.int32), "alibi_slopes": numpy.array([[0.1, 0.2], [0.3, 0.0]], numpy.float32)}
    attend = functools.partial(cuflash.varlen_attention, return_lse=True, enable_gqa=True, is_causal=True, tile={NAME: SHORT}, **options)
    out, lse = attend(query, key, value, *cu)
    assert (hopper.host(out)[130:] == 0).all()
    assert numpy.isneginf(hopper.host(lse)[:, 130:]).all()
    alone = attend(query[:130], key, value, *cu)
    assert (hopper.host(out)[:130] == hopper.host(alone[0])).all()


@pytest.mark.parametrize("options", [{"is_causal": True}, {"window": (20, 5)}], ids=str)
def test_keys_that_no_query_sees_may_hold_anything(hopper: Target, options: dict[str, Any]) -> None:  # noqa: F811
    """Behind the last visible key, in the same tile."""
    query, key, value = inputs_of(HOST, (70, 200))
    attend = functools.partial(cuflash.scaled_dot_product_attention, return_lse=True, tile={NAME: SHORT}, **options)
    clean = attend(*map(hopper.place, (query, key, value)))
    key[:, 75:], value[:, 75:] = numpy.nan, numpy.inf
    dirty = attend(*map(hopper.place, (query, key, value)))
    assert [Target.bits(x) for x in dirty] == [Target.bits(x) for x in clean]


UNSEEN: dict[str, dict[str, Any]] = {
    "causal": {"is_causal": True},
    "window": {"window": (70, 4)},
    "lengths": {"seqlens_kv": numpy.array([75], "int32")},
    "segments": {"segment_ids_q": numpy.zeros((1, 70), "int32"), "segment_ids_kv": (numpy.arange(208)[None] >= 75).astype("int32")},
    "copied mask": {"attn_mask": numpy.broadcast_to(numpy.arange(208) < 75, (70, 208)).copy()},
}
"""What hides all keys from 75 on."""


@pytest.mark.sample(2)
@pytest.mark.parametrize("case", UNSEEN)
def test_hidden_keys_do_not_decide_how_scores_are_capped(case: str) -> None:
    """Small ones take a polynomial, whose last bits are other ones, where a warp has no others that somebody sees."""
    query, key, value = inputs_of(HOST, (70, 208))
    attend = functools.partial(cuflash.scaled_dot_product_attention, softcap=30.0, return_lse=True, tile={NAME: SHORT}, **UNSEEN[case])
    clean = attend(query, key, value)
    key[:, 75:] = 100
    assert [Target.bits(x) for x in attend(query, key, value)] == [Target.bits(x) for x in clean]


def test_keys_of_other_segments_may_hold_anything(hopper: Target) -> None:  # noqa: F811
    """A score that is hidden in integers, without a selection, is minus infinity whatever it was."""
    query, key, value = inputs_of(HOST, (70, 208))
    attend = functools.partial(
        cuflash.scaled_dot_product_attention, softcap=30.0, return_lse=True, tile={NAME: SHORT}, **UNSEEN["segments"]
    )
    clean = attend(*map(hopper.place, (query, key, value)))
    key[:, 75:140], key[:, 140:] = numpy.nan, numpy.inf
    dirty = attend(*map(hopper.place, (query, key, value)))
    assert [Target.bits(x) for x in dirty] == [Target.bits(x) for x in clean]


def test_queries_of_others_do_not_decide_how_scores_are_capped() -> None:
    """Of the next sequence, whose rows are in the same warp."""
    query, key, value, _ = packed(HOST, (100, 100), "bfloat16", (64, 64))
    cu = offsets(HOST, [40, 60]), offsets(HOST, [40, 60])
    attend = functools.partial(cuflash.varlen_attention, softcap=30.0, return_lse=True, tile={NAME: SHORT})
    out, lse = attend(query, key, value, *cu)
    query[40:] = 100
    got, got_lse = attend(query, key, value, *cu)
    assert (got[:40] == out[:40]).all()
    assert (got_lse[:, :40] == lse[:, :40]).all()


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="the simulator would take hours")
def test_many_packed_tiles_for_each_block_of_a_whole_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    check_many_packed_tiles(Target("gpu"), 100, monkeypatch)


def check_many_packed_tiles(on: Target, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that race for the counter, which also counts tiles that most sequences do not have: the same bits each time."""
    if on.device.capability != 90:
        pytest.skip("the GPU is no sm_90")
    with_sms(monkeypatch, on.device.num_sms)
    lengths_q, lengths_kv = (numpy.random.default_rng(seed).integers(0, 500, count).tolist() for seed in (1, 2))
    inputs = packed(on, (sum(lengths_q), sum(lengths_kv)), "bfloat16", (64, 64), heads=(6, 2))
    cu = offsets(on, lengths_q), offsets(on, lengths_kv)
    options = {"is_causal": True, "enable_gqa": True, "tile": {NAME: SHORT}}
    first = [Target.bits(x) for x in checked_packed(on, inputs, cu, (500, 500), **options)]
    for _ in range(5):
        again = cuflash.varlen_attention(*inputs[:3], *cu, 500, 500, return_lse=True, **options)
        assert [Target.bits(x) for x in again] == first


# --- Prefixes, segments, masks ------------------------------------------------------------------------------------------------------------


def segments(rows: int, count: int, length: int) -> Any:
    """Ids of segments of this length, the same in each of so many rows."""
    return numpy.tile((numpy.arange(count) // length).astype("int32"), (rows, 1))


RANDOM = numpy.random.default_rng(3)
IN_BLOCKS = numpy.kron(RANDOM.random((7, 9)) > 0.6, numpy.ones((32, 32))).astype(bool)[:200, :270]
DATA: dict[str, dict[str, Any]] = {
    "prefix": {"prefix_lengths": numpy.array([40, 270], "int32"), "is_causal": True},
    "prefix and window": {"prefix_lengths": numpy.array([150, 0], "int32"), "is_causal": True, "window": (100, None)},
    "segments": {"segment_ids_q": segments(2, 200, 45), "segment_ids_kv": segments(2, 270, 60)},
    "segments, causal": {"segment_ids_q": segments(2, 200, 70), "segment_ids_kv": segments(2, 270, 70), "is_causal": True},
    "boolean mask": {"attn_mask": RANDOM.random((2, 1, 200, 270)) > 0.5},
    "boolean mask in blocks": {"attn_mask": IN_BLOCKS, "is_causal": True, "causal_alignment": "bottom_right"},
    "boolean mask of each head": {"attn_mask": RANDOM.random((2, 2, 200, 1)) > 0.3, "softcap": 5.0},
    "boolean mask and lengths": {"attn_mask": IN_BLOCKS, "seqlens_kv": numpy.array([270, 100], "int32")},
    "additive mask": {"attn_mask": RANDOM.standard_normal((200, 270)).astype("float32"), "is_causal": True},
    "additive mask, 16 bits": {"attn_mask": RANDOM.standard_normal((2, 1, 1, 270)).astype("float16")},
    "additive mask that hides": {"attn_mask": numpy.where(IN_BLOCKS, 0, -numpy.inf).astype("float32")},
    "dropout": {"dropout_p": 0.3, "dropout_seed": 5, "is_causal": True},
    "dropout and a boolean mask": {"dropout_p": 0.6, "dropout_seed": 1, "attn_mask": IN_BLOCKS},
    "additive mask of huge scores": {"attn_mask": numpy.where(IN_BLOCKS, 0, -1e9).astype("float32"), "sinks": numpy.array([0.5, -1.0], "float32")},
    "segments of single rows": {"segment_ids_q": RANDOM.integers(-2, 3, (2, 200), "int32"), "segment_ids_kv": RANDOM.integers(-2, 3, (2, 270), "int32")},
}  # fmt: skip


@pytest.mark.sample(4)
@pytest.mark.parametrize("tile", [SHORT, Tile(192, 48, 12, 2)], ids=str)
@pytest.mark.parametrize("case", DATA)
def test_what_data_hide(hopper: Target, case: str, tile: Tile) -> None:  # noqa: F811
    options = {name: hopper.place(x) if isinstance(x, numpy.ndarray) else x for name, x in DATA[case].items()}
    inputs = inputs_of(hopper, (200, 270), 64, heads=(2, 1), batches=(2, 2), dtype="float16" if len(case) % 2 else "bfloat16")
    plan = cuflash.plan(*inputs, enable_gqa=True, tile={NAME: tile}, **options)
    assert names(plan)[-1] == NAME
    hopper.check(*inputs, backward=False, enable_gqa=True, tile={NAME: tile}, **options)


@pytest.mark.parametrize("dropout_p", [1e-9, 0.1, 0x7F80 / 2**16, 0x7F81 / 2**16, 0.5, 1 - 2**-16, 1.0])
def test_dropout_keeps_what_its_mask_says(dropout_p: float) -> None:
    """With equal scores and the unit matrix as values, every output tells whether its pair was kept. Up to half of all pairs and above it are two kernels."""
    query, key, value = numpy.zeros((3, 2, 64, 2, 64), "float16")
    value[:] = numpy.eye(64, dtype="float16")[:, None]
    options = {"dropout_p": dropout_p, "dropout_seed": (7, 2**33 + 1)}
    out = cuflash.scaled_dot_product_attention(query, key, value, tile={NAME: Tile(192, 64, 12, 2)}, **options)
    kept = cuflash.dropout_mask((2, 2, 64, 64), like=query, **options)
    numpy.testing.assert_array_equal(out.transpose(0, 2, 1, 3) != 0, kept)


HIDING = numpy.where(
    RANDOM.random((200, 272)) > 0.7, RANDOM.choice([-numpy.inf, -6e4], (200, 272)), RANDOM.standard_normal((200, 272))
).astype("float16")
COPIED: dict[str, dict[str, Any]] = {
    "rows of a wider array": {"attn_mask": HIDING[:, :270]},
    "of each head, causal": {
        "attn_mask": numpy.stack((HIDING, HIDING + 1))[:, :, :270],
        "is_causal": True,
        "causal_alignment": "bottom_right",
    },
    "of each batch, fewer keys": {
        "attn_mask": numpy.stack((HIDING - 1, HIDING))[:, None, :, :270],
        "seqlens_kv": numpy.array([270, 33], "int32"),
    },
    "boolean": {"attn_mask": (RANDOM.random((200, 272)) > 0.5)[:, :270]},
    "boolean, bytes beside 0 and 1": {
        "attn_mask": RANDOM.choice(numpy.array([0, 1, 2, 128], "uint8"), (200, 272)).view(bool)[:, :270],
        "is_causal": True,
    },
}
"""Masks that the TMA unit copies."""


@pytest.mark.sample(1)
@pytest.mark.parametrize("case", COPIED)
def test_masks_that_are_copied(hopper: Target, case: str) -> None:  # noqa: F811
    """With elements of -inf, and of numbers that stand for it."""
    inputs = inputs_of(hopper, (200, 270), 64, heads=(2, 1), batches=(2, 2), dtype="bfloat16")
    options = {name: hopper.place(x) if isinstance(x, numpy.ndarray) else x for name, x in COPIED[case].items()}
    assert "MAPS_MASK = true" in cuflash.plan(*inputs, enable_gqa=True, tile={NAME: THREE}, **options).kernels[-1].config
    hopper.check(*inputs, backward=False, enable_gqa=True, tile={NAME: THREE}, **options)


UNMAPPED: dict[str, Any] = {
    "rows not on 16 bytes": numpy.zeros((200, 270), "float16"),
    "not on 16 bytes": numpy.zeros((200, 280), "float16")[:, 4:274],
    "one row for all": numpy.zeros((2, 1, 1, 270), "float16"),
    "keys apart": numpy.zeros((270, 208), "float16").T[:200],
    "float32": numpy.zeros((200, 272), "float32")[:, :270],
}


@pytest.mark.parametrize("case", UNMAPPED)
def test_masks_that_are_read_where_they_lie(case: str) -> None:
    """What no tensor map describes."""
    inputs = inputs_of(HOST, (200, 270), 64, batches=(2, 2))
    plan = cuflash.plan(*inputs, attn_mask=UNMAPPED[case])
    assert names(plan) == [NAME]
    assert "MAPS_MASK = false" in plan.kernels[0].config


def test_a_boolean_mask_that_is_copied_is_not_read_as_numbers_too() -> None:
    """With a softcap its tile, which has one byte for each key, was read like one of 16 bits, beyond its end where it has many keys. A boolean one is read by
    one instruction in two places, one of 16 bits by two in three."""
    inputs, mask = inputs_of(HOST, (200, 272), 64), numpy.ones((200, 272), bool)
    on = device.of_memory("cpu", 0)
    for attn_mask, reads in ((mask, 2), (mask.astype("float16"), 6)):
        kernel = cuflash.plan(*inputs, attn_mask=attn_mask, softcap=3.0, tile={NAME: SHORT}).kernels[-1]
        assert "MAPS_MASK = true" in kernel.config
        assert cache.fetch(kernel.request(on)).data.decode().count("ldmatrix") == reads


@pytest.mark.parametrize("case", ["packed", "lengths", "segments, causal", "boolean mask", "copied mask"])
def test_every_schedule_gives_the_same_bits(case: str, request: pytest.FixtureRequest) -> None:
    """With warpgroups without rows, lists that end early, and tiles of V of which rows are cleared."""
    seeds = range(100 if request.config.getoption("--exhaustive") else 6)
    call: Any
    if case == "packed":
        inputs = packed(HOST, (350, 180), "float16", (64, 64))
        cu = offsets(HOST, [210, 10, 130]), offsets(HOST, [50, 90, 40])
        call = functools.partial(cuflash.varlen_attention, *inputs[:3], *cu, is_causal=True, return_lse=True, tile={NAME: THREE})
    else:
        options = (
            {"seqlens_kv": numpy.array([70, 250], "int32"), "is_causal": True}
            if case == "lengths"
            else {**DATA, "copied mask": COPIED["of each head, causal"]}[case]
        )
        inputs = inputs_of(HOST, (200, 270), 64, heads=(2, 2) if case == "copied mask" else (1, 1), batches=(2, 2), dtype="float16")
        call = functools.partial(cuflash.scaled_dot_product_attention, *inputs, return_lse=True, tile={NAME: SHORT}, **options)
    report = check(call, seeds=seeds)
    assert report.kernels[-1] == NAME
    assert len(report.runs) == 2 + len(seeds)
