"""`varlen_attention` of sequences with few queries, which shares out the keys of each among blocks by itself: what it computes, and when it runs."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy
import pytest
from caches import only_new_memory
from conftest import Target

import cuflash
from cuflash import Tile, reference
from cuflash.errors import SimulatorError
from cuflash.runtime.prepared import PreparedCall
from cuflash.timing.visits import tiles_of_sequences

pytest.importorskip("cupy")

SPLIT = {"forward_split": Tile(16, 64, 4, 2)}
QUERIES, KEYS = [1, 0, 7, 3, 16], [300, 20, 0, 77, 5]
BEHIND = 3
"""Tokens that belong to no sequence; their keys and values are NaN and infinity."""
OF_PLACES = {"seqused_q": numpy.array([1, 0, 4, 0, 9], "int32"), "seqused_kv": numpy.array([250, 20, 0, 64, 0], "int32")}

FEATURES: dict[str, dict[str, Any]] = {
    "causal": {"is_causal": True},
    "top_left": {"is_causal": True, "causal_alignment": "top_left"},
    "window_and_sinks": {"window": (40, 7), "sinks": numpy.linspace(-1, 2, 6, dtype="float32")},
    "softcap_and_alibi": {"softcap": 2.0, "alibi_slopes": numpy.linspace(0.1, 1, 30, dtype="float32").reshape(5, 6)},
    "places": OF_PLACES,
    "places_causal": {"is_causal": True, "seqused_kv": OF_PLACES["seqused_kv"]},
}  # fmt: skip


def offsets(lengths: list[int]) -> Any:
    return numpy.cumsum([0, *lengths]).astype("int32")


CU = offsets(QUERIES), offsets(KEYS)


def given(dtype: str = "float16", used: Any = KEYS) -> list[Any]:
    """query, key, value and grad_out; what no sequence uses is NaN and infinity."""
    target = Target("sm_80")
    shapes = ((sum(QUERIES) + BEHIND, 6), (sum(KEYS) + BEHIND, 2), (sum(KEYS) + BEHIND, 2), (sum(QUERIES) + BEHIND, 6))
    arrays = [target.random((1, *shape, 32), dtype, seed)[0].copy() for seed, shape in enumerate(shapes)]
    rows = [row for begin, count in zip(CU[1][:-1], used, strict=True) for row in range(begin, begin + count)]
    nobodys = numpy.setdiff1d(numpy.arange(sum(KEYS) + BEHIND), rows)
    arrays[1][nobodys], arrays[2][nobodys] = numpy.nan, numpy.inf
    return arrays


@pytest.mark.parametrize("name", list(FEATURES))
def test_each_sequence_has_what_the_judge_says(name: str, simulator: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """Output, lse and the gradients that the backward pass makes of them."""
    only_new_memory(monkeypatch)
    options = {"enable_gqa": True, "tile": SPLIT} | FEATURES[name]
    inputs = given(used=options.get("seqused_kv", KEYS))
    out, lse = cuflash.varlen_attention(*inputs[:3], *CU, 16, 300, return_lse=True, **options)
    del options["tile"]
    query, key, value, grad_out = (numpy.where(numpy.isfinite(x), x, 0) for x in inputs)
    want, want_lse = reference.varlen_attention(query, key, value, *CU, **options)
    naive, _ = reference.varlen_attention(query, key, value, *CU, precision="float16", **options)
    _, naive_lse = reference.varlen_attention(query, key, value, *CU, precision="float32", **options)
    reference.compare(out, want, naive, name="out")

    def magnitudes() -> Any:
        return reference.varlen_attention(query, key, value, *CU, magnitudes=True, **options)[1]

    reference.compare(lse, want_lse, naive_lse, name="lse", dtype="float32", terms=magnitudes)
    assert not out[sum(QUERIES) :].any()
    assert numpy.isneginf(lse[:, sum(QUERIES) :]).all()
    if name == "places_causal":
        grads = cuflash.varlen_attention_backward(grad_out, *inputs[:3], out, lse, *CU, 16, 300, **options)
        truth = reference.varlen_attention_backward(grad_out, query, key, value, *CU, **options)
        expected = reference.varlen_attention_backward(grad_out, query, key, value, *CU, precision="float16", out=out, **options)
        for of in ("query", "key", "value"):
            reference.compare(getattr(grads, of), getattr(truth, of), getattr(expected, of), name=of)


@pytest.mark.sample(1)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("dims", [(32, 32), (64, 128), (13, 24)], ids=str)
@pytest.mark.parametrize("view", ["contiguous", "transposed", "unaligned_base", "strided_elements"])
def test_types_head_dims_and_strides(dtype: str, dims: tuple[int, int], view: str, simulator: Target) -> None:
    shapes = ((sum(QUERIES), 4, dims[0]), (sum(KEYS), 2, dims[0]), (sum(KEYS), 2, dims[1]), (sum(QUERIES), 4, dims[1]))
    inputs = [simulator.random((1, *shape), dtype, seed, view)[0] for seed, shape in enumerate(shapes)]
    simulator.check_packed(inputs, CU, (16, 300), enable_gqa=True, is_causal=True)


def test_packed_and_padded_calls_have_the_same_bits(simulator: Target) -> None:
    """Of sequences with equally many queries and keys, however many splits there are."""
    query, key, value = (simulator.random((3, length, heads, 32), "float16", heads) for length, heads in ((2, 4), (200, 2), (200, 2)))
    tokens = [x.reshape(-1, *x.shape[2:]) for x in (query, key, value)]
    options = {"is_causal": True, "enable_gqa": True, "return_lse": True, "tile": SPLIT}
    cu = offsets([2, 2, 2]), offsets([200, 200, 200])
    packed, packed_lse = cuflash.varlen_attention(*tokens, *cu, 2, 200, **options)
    out, lse = cuflash.scaled_dot_product_attention(query, key, value, causal_alignment="bottom_right", **options)
    assert Target.bits(packed) == Target.bits(out)
    assert Target.bits(packed_lse.reshape(4, 3, 2).transpose(1, 0, 2)) == Target.bits(lse)


def test_any_order_of_warps_and_copies(simulator: Target) -> None:
    results = set()
    for seed in range(3):
        with simulator.schedule(seed):
            out, lse = cuflash.varlen_attention(*given()[:3], *CU, 16, 300, enable_gqa=True, is_causal=True, return_lse=True, tile=SPLIT)
        results.add((Target.bits(out), Target.bits(lse)))
    assert len(results) == 1


def test_lengths_are_read_when_the_kernels_run(simulator: Target) -> None:
    inputs, cu = given()[:3], [of.copy() for of in CU]
    options = {"enable_gqa": True, "tile": SPLIT, "return_lse": True}
    cuflash.varlen_attention(*inputs, *cu, 16, 300, **options)
    cu[0][...], cu[1][...] = offsets([5, 5, 5, 5, 5]), offsets([0, 280, 0, 1, 9])
    again, again_lse = cuflash.varlen_attention(*inputs, *cu, 16, 300, **options)
    want, want_lse = reference.varlen_attention(*(numpy.where(numpy.isfinite(x), x, 0) for x in inputs), *cu, enable_gqa=True)
    numpy.testing.assert_allclose(again, want, atol=2e-3)
    numpy.testing.assert_allclose(again_lse, want_lse, atol=1e-5)


@pytest.mark.parametrize("places", [{}, OF_PLACES], ids=["packed", "places"])
def test_offsets_that_make_no_sense_never_leave_the_arrays(places: Any, simulator: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU does not look at them before; sequences longer than max_seqlen_q have zeros behind it."""
    monkeypatch.setattr(PreparedCall, "check_offsets", lambda *_: None)
    query, key, value = (simulator.random((1, length, heads, 32), "float16", heads)[0] for length, heads in ((30, 6), (405, 2), (405, 2)))
    for cu in ([0, 30, 30, 30, 30, 30], [2**31 - 1, -(2**31), 3, 2, 9, -7], [5, 4, 3, 2, 1, 0], [0] * 6):
        senseless = cu[0] > 30  # of which the simulator says that blocks write the same rows in no order
        for cu_kv in ([0, 405, 405, 405, 405, 405], [-9, 2**31 - 1, 7, -(2**31), 400, 404]):
            with pytest.raises(SimulatorError, match=r"\[race\]") if senseless else contextlib.nullcontext():
                out, lse = cuflash.varlen_attention(
                    query, key, value, numpy.array(cu, "int32"), numpy.array(cu_kv, "int32"), 7, 405, enable_gqa=True, return_lse=True, tile=SPLIT, **places,
                )  # fmt: skip
                if cu[-1] == 0:
                    assert not out.any()
                elif cu_kv[0] == 0:  # one sequence with all tokens, of which rows of three heads fill two tiles of 16
                    used = 1 if places else 10
                    assert numpy.isfinite(lse[:, :used]).all()
                    assert numpy.isneginf(lse[:, 11:]).all()
                    assert not out[11:].any()


# --- When it runs -------------------------------------------------------------------------------------------------------------------------


def plan(longest: int, tokens: int = 32, keys: int = 40_000, **options: Any) -> Any:
    """Of 2 sequences."""
    query, key = numpy.zeros((tokens, 4, 32), options.pop("dtype", "float16")), numpy.zeros((keys, 4, 32), "float16")
    key = key.astype(query.dtype)
    return cuflash.varlen_plan(query, key, key, offsets([longest, 0]), offsets([keys, 0]), longest, keys, **options)


def names(planned: Any) -> list[str]:
    return [kernel.name for kernel in planned.kernels]


def test_few_queries_take_it_by_themselves(simulator: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    assert names(plan(16)) == ["forward_split", "merge_attention"]
    assert "since a tile of the others has rows for more than 16 queries" in str(plan(16))
    assert names(plan(17)) == ["forward"]
    assert names(plan(17, tile=SPLIT)) == ["forward_split", "merge_attention"]
    assert names(plan(16, tile={"forward": Tile(32, 32, 2, 2)})) == ["forward"]
    assert "2 sequences of at most 16 queries have 32 of the 33 tokens at most" in plan(16, tokens=33).choice
    for options, reason in (
        ({"dropout_p": 0.1, "dropout_seed": 1}, "knows no dropout"),
        ({"is_causal": True, "prefix_lengths": numpy.zeros(2, "int32")}, "knows no prefix"),
        ({"dtype": "float32"}, "it takes 16-bit types"),
    ):
        planned = plan(16, **options)
        assert names(planned) == ["forward"]
        assert reason in planned.choice
    monkeypatch.setenv("CUFLASH_DECODE", "0")
    assert names(plan(16)) == ["forward"]


@pytest.mark.parametrize("causal", [False, True])
def test_predictions_know_the_lengths_of_sequences(causal: bool) -> None:
    """Key tiles of 64 that the queries of each tile of 16 rows see, of as many tiles as the sequence has queries for; without lengths each sequence has the most."""
    query, key = numpy.zeros((sum(QUERIES), 6, 32), "float16"), numpy.zeros((sum(KEYS), 2, 32), "float16")
    planned = cuflash.varlen_plan(query, key, key, *CU, 16, 300, is_causal=causal, enable_gqa=True, tile=SPLIT)
    data = {"cu_seqlens_q": CU[0], "cu_seqlens_kv": CU[1]}
    seen = tiles_of_sequences(planned.kernels[0], planned.problem, data)
    of_last = [0, 0, 1] if causal else [1, 1, 1]  # sixteen queries, of which the last five see a key
    assert seen == [[5], [], [0, 0], [2], of_last]
    assert tiles_of_sequences(planned.kernels[0], planned.problem, {}) == [[5] * 3] * 5


def test_places_have_blocks_that_clear_them(simulator: Target) -> None:
    """As many as for places of average length, though sequences use little of theirs; and keys are counted once."""
    used = {"seqused_q": numpy.array([1, 1], "int32")}
    of_places, packed = plan(1, tokens=32, tile=SPLIT, **used), plan(1, tokens=32, tile=SPLIT)
    assert [planned.kernels[0].num_tiles for planned in (of_places, packed)] == [1, 1]
    long = plan(1, tokens=3200, tile=SPLIT, **used)
    assert long.kernels[0].num_tiles == 100
    assert "at most 19.53 MiB of keys and values" in str(packed)
