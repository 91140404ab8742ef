"""The backward pass of a call whose `out` and `lse` are those of more keys than it sees: chunks of keys whose gradients add up to those of all keys."""

from __future__ import annotations

import functools
from typing import Any

import numpy
import pytest
from conftest import Target
from test_features import FEATURES, SKV, SQ, B, H, additive_mask, inputs_of, placed

import cuflash
from cuflash.reference import EPSILON, attention, attention_backward, attention_naive_backward, compare

SHIFTS = [0.0, 200.0, -200.0, 1e4, -65504.0]
"""What is added to all scores: below 128 lse is taken as it is, above it the sums over a row's own keys are found too."""

Chunk = tuple[list[Any], dict[str, Any]]
"""Query, key and value of one call, and its options."""


def merged(outs: list[Any], lses: list[Any]) -> tuple[Any, Any]:
    """Out and lse of all chunks in float64, from those of each; layout "bshd"."""
    whole = functools.reduce(numpy.logaddexp, lses)
    shares = [numpy.where(numpy.isneginf(lse), 0, numpy.exp(lse - numpy.where(numpy.isneginf(whole), 0, whole))) for lse in lses]
    return sum(share.transpose(0, 2, 1)[..., None] * out for share, out in zip(shares, outs, strict=True)), whole


def check_chunks(target: Target, chunks: list[Chunk], seed: int = 99) -> list[Any]:
    """Forward of each chunk, `merge_attention`, backward of each with out and lse of all; every gradient judged by float64 with the exact lse of all keys.

    The naive formula gets the out and lse that the call gets, which are rounded.
    """
    dtype = str(chunks[0][0][0].dtype)
    found = [cuflash.scaled_dot_product_attention(*inputs, return_lse=True, **options) for inputs, options in chunks]
    given = dict(zip(("out", "lse"), cuflash.merge_attention(*zip(*found, strict=True)), strict=True))
    out, lse = merged(*map(list, zip(*(attention(*inputs, **options) for inputs, options in chunks), strict=True)))
    grad_out, grad_lse = target.random(out.shape, dtype, seed), target.random(lse.shape, "float32", seed + 1)
    every = []
    for inputs, options in chunks:
        mask = options.get("attn_mask")
        need = mask is not None and str(mask.dtype) != "bool"
        grads = cuflash.scaled_dot_product_attention_backward(
            grad_out, *inputs, given["out"], given["lse"], grad_lse=grad_lse, need_attn_mask_grad=need, **options
        )
        judged = functools.partial(attention_backward, grad_out, *inputs, grad_lse=grad_lse, **options)
        want, terms = judged(out=out, lse=lse), functools.partial(judged, out=out, lse=lse, magnitudes=True)
        naive = attention_naive_backward(grad_out, *inputs, dtype, grad_lse=grad_lse, **given, **options)  # type: ignore[arg-type]
        for name in ("query", "key", "value", *(["attn_mask"] if need else []), *(["sinks"] if grads.sinks is not None else [])):
            got = getattr(grads, name)
            rounding = max(dtype, str(got.dtype).rpartition(".")[2], key=EPSILON.__getitem__)
            compare(
                got, getattr(want, name), getattr(naive, name), name=f"grad_{name}", dtype=rounding,
                terms=lambda terms=terms, name=name: getattr(terms(), name),  # type: ignore[misc]
            )  # fmt: skip
        every.append(grads)
    return every


def halves(target: Target, dtype: str, first: dict[str, Any], second: dict[str, Any]) -> list[Chunk]:
    """The same queries with keys of two chunks."""
    query, key, value = inputs_of(target, dtype)
    others = [target.random(x.shape, dtype, seed) for seed, x in ((5, key), (6, value))]
    options = [placed(target, {"enable_gqa": True, **of_chunk}) for of_chunk in (first, second)]
    return [([query, key, value], options[0]), ([query, *others], options[1])]


@pytest.mark.sample(2)
@pytest.mark.parametrize("dtype", ["half", "float32"])
@pytest.mark.parametrize("shift", SHIFTS)
def test_chunks_of_keys_with_an_additive_mask(target: Target, shift: float, dtype: str) -> None:
    """Probabilities were 60 to 170 % too large wherever |lse| was 128 or more."""
    chunks = [{"attn_mask": additive_mask(SQ, SKV, seed=seed) + numpy.float32(shift)} for seed in (8, 21)]
    check_chunks(target, halves(target, target.half if dtype == "half" else dtype, *chunks))


@pytest.mark.sample(2)  # the others: test_random_configurations.py
@pytest.mark.parametrize("dtype", ["half", "float32"])
@pytest.mark.parametrize(
    "feature", [None, "window", "softcap", "alibi", "boolean_mask", "dropout", "segments", "prefix", "causal", "bottom_right"]
)
def test_chunks_of_keys(target: Target, feature: str | None, dtype: str) -> None:
    """Positions are those in the chunk."""
    options = {} if feature is None else FEATURES[feature]
    check_chunks(target, halves(target, target.half if dtype == "half" else dtype, options, options))


@pytest.mark.sample(2)
@pytest.mark.parametrize("dtype", ["half", "float32"])
@pytest.mark.parametrize("masked", [False, True])
def test_chunks_of_keys_with_large_products(target: Target, masked: bool, dtype: str) -> None:
    """Scores of some hundreds, of both signs, that no mask made."""
    chunks = [{"scale": 20.0, **({"attn_mask": additive_mask(SQ, SKV, seed=seed)} if masked else {})} for seed in (8, 21)]
    check_chunks(target, halves(target, target.half if dtype == "half" else dtype, *chunks))


@pytest.mark.sample(1)
@pytest.mark.parametrize("feature", ["window", "softcap", "alibi", "dropout", "segments", "prefix", "causal", "bottom_right"])
def test_chunks_with_an_additive_mask_and_another_feature(simulator: Target, feature: str) -> None:
    chunks = [{"attn_mask": additive_mask(B, H, SQ, SKV, seed=seed) + numpy.float32(300), **FEATURES[feature]} for seed in (8, 21)]
    check_chunks(simulator, halves(simulator, "bfloat16", *chunks))


@pytest.mark.sample(1)
@pytest.mark.parametrize("shift", [None, *SHIFTS])
def test_sinks_are_part_of_one_chunk(target: Target, shift: float | None) -> None:
    sinks = {"sinks": numpy.linspace(-1, 3, H).astype(numpy.float32) + numpy.float32(shift or 0)}
    masks = [{} if shift is None else {"attn_mask": additive_mask(SQ, SKV, seed=seed) + numpy.float32(shift)} for seed in (8, 21)]
    check_chunks(target, halves(target, target.half, masks[0] | sinks, masks[1]))


CHUNK, CHUNKS = 32, 3


def options_of_chunks(behind: int, is_causal: bool, window: tuple[int | None, int | None]) -> dict[str, Any] | None:
    """Of a chunk of keys that lies `behind` keys before the queries of a chunk as long, as docs/context_parallelism.md says; None where nothing is seen."""
    left, right = window
    if behind < 0 and is_causal:
        return None
    first, last = (None if left is None else behind - left, None if right is None else behind + right)  # keys that query 0 sees
    causal = {"is_causal": is_causal and behind == 0}
    if (first is None or first <= 0) and (last is None or last >= 0):
        return {**causal, "window": (None if first is None else -first, last)}
    distance = numpy.arange(CHUNK) - numpy.arange(CHUNK)[:, None]
    visible = (distance >= (-CHUNK if first is None else first)) & (distance <= (CHUNK if last is None else last))
    return {**causal, "attn_mask": visible} if visible.any() else None


@pytest.mark.parametrize("window", [(None, None), (40, 0), (5, 3), (None, 10), (33, None), (90, 80)], ids=str)
@pytest.mark.parametrize("is_causal", [True, False])
def test_a_sequence_in_chunks_of_queries_and_keys(simulator: Target, is_causal: bool, window: tuple[int | None, int | None]) -> None:
    """What context parallelism computes, device by device, against one call in float64."""
    query, key, value, grad_out = (simulator.random((1, CHUNK * CHUNKS, 2, 32), "float32", seed) for seed in range(4))
    pieces = [slice(i * CHUNK, (i + 1) * CHUNK) for i in range(CHUNKS)]
    out, lse, grads = [], [], [numpy.zeros(query.shape) for _ in range(3)]
    for i, queries in enumerate(pieces):
        options = [options_of_chunks((i - j) * CHUNK, is_causal, window) for j in range(CHUNKS)]
        seen = [(pieces[j], placed(simulator, own)) for j, own in enumerate(options) if own is not None]
        parts = [
            cuflash.scaled_dot_product_attention(query[:, queries], key[:, keys], value[:, keys], return_lse=True, **own)
            for keys, own in seen
        ]
        whole = cuflash.merge_attention(*zip(*parts, strict=True))
        out.append(whole[0])
        lse.append(whole[1])
        for keys, own in seen:
            found = cuflash.scaled_dot_product_attention_backward(
                grad_out[:, queries], query[:, queries], key[:, keys], value[:, keys], *whole, **own
            )
            for total, rows, part in zip(grads, (queries, keys, keys), found, strict=True):
                total[:, rows] += part
    want_out, want_lse = attention(query, key, value, is_causal=is_causal, window=window)
    want = attention_backward(grad_out, query, key, value, is_causal=is_causal, window=window)
    numpy.testing.assert_allclose(numpy.concatenate(out, 1), want_out, rtol=0, atol=2e-6)
    numpy.testing.assert_allclose(numpy.concatenate(lse, 2), want_lse, rtol=0, atol=2e-6)
    for got, name in zip(grads, ("query", "key", "value"), strict=True):
        numpy.testing.assert_allclose(got, getattr(want, name), rtol=0, atol=5e-6, err_msg=name)


@pytest.mark.parametrize("shift", [0.0, 200.0, -1e4])
def test_gradients_of_chunks_add_up_to_those_of_all_keys(target: Target, shift: float) -> None:
    """Three chunks of different lengths, one of which some rows see nothing of, against one call's gradients in float64."""
    query, key, value = inputs_of(target, "float32")
    mask = additive_mask(B, H, SQ, SKV) + numpy.float32(shift)
    mask[0, :, :9, 20:51] = mask[1, 0, 40:, 51:] = -numpy.inf
    edges = [slice(0, 20), slice(20, 51), slice(51, SKV)]
    parts = [([query, key[:, keys], value[:, keys]], {"enable_gqa": True, "attn_mask": target.place(mask[..., keys])}) for keys in edges]
    grads = check_chunks(target, parts)
    out_shape = (B, SQ, H, 32)
    grad_out, grad_lse = target.random(out_shape, "float32", 99), target.random((B, H, SQ), "float32", 100)
    want = attention_backward(grad_out, query, key, value, grad_lse=grad_lse, enable_gqa=True, attn_mask=mask)
    tolerance = {"rtol": 0.0, "atol": 1e-4 + 2.0**-23 * abs(shift) * 20}
    numpy.testing.assert_allclose(sum(target.host(of_chunk.query) for of_chunk in grads), want.query, **tolerance)
    for name, axis in (("key", 1), ("value", 1), ("attn_mask", 3)):
        got = numpy.concatenate([target.host(getattr(of_chunk, name)) for of_chunk in grads], axis)
        numpy.testing.assert_allclose(got, getattr(want, name), **tolerance, err_msg=name)


@pytest.mark.sample(1)
@pytest.mark.parametrize("head_dims", [(128, 128), (512, 40)], ids=str)
def test_other_head_dims(simulator: Target, head_dims: tuple[int, int]) -> None:
    """A kernel each for dK and dV, and slices."""
    query, key, value = inputs_of(simulator, "bfloat16", head_dims[0], (40, 50), head_dims[1])
    masks = [additive_mask(40, 50, seed=seed) + numpy.float32(300) for seed in (8, 21)]
    options = [{"enable_gqa": True, "attn_mask": mask} for mask in masks]
    check_chunks(simulator, [([query, key, value], options[0]), ([query, key[:, ::-1], value[:, ::-1]], options[1])])


# --- Rows that see nothing in a chunk -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [*SHIFTS, -3.4e38, 3e38])
def test_a_row_that_sees_nothing_in_the_chunk(target: Target, shift: float) -> None:
    """All gradients of its head were NaN where |lse| was 128 or more."""
    query, key, value = inputs_of(target, "float32")
    mask = additive_mask(SQ, SKV)
    mask[3:30] = mask[60] = -numpy.inf
    out, grad_out, lse = (target.random(shape, "float32", 3) for shape in ((B, SQ, H, 32), (B, SQ, H, 32), (B, H, SQ)))
    lse = lse + numpy.float32(shift)
    grads = cuflash.scaled_dot_product_attention_backward(
        grad_out, query, key, value, out, lse, enable_gqa=True, attn_mask=target.place(mask), need_attn_mask_grad=True
    )
    for grad in (*grads, grads.attn_mask):
        assert not numpy.isnan(target.host(grad)).any()
    rows = numpy.r_[3:30, 60]
    assert not target.host(grads.query)[:, rows].any()
    assert not target.host(grads.attn_mask)[rows].any()


# --- Whose lse it is ----------------------------------------------------------------------------------------------------------------------


def equal_keys(lse_difference: Any, score: float, keys: int = 64) -> float:
    """A probability of a row of equal scores, as the gradient of V shows it, where the given lse differs from the call's own."""
    x, mask = numpy.ones((1, keys, 1, 16), numpy.float32), numpy.full((1, keys), score, numpy.float32)
    out, lse = cuflash.scaled_dot_product_attention(x[:, :1], x, x, attn_mask=mask, return_lse=True)
    given = lse_difference(lse)
    grads = cuflash.scaled_dot_product_attention_backward(x[:, :1], x[:, :1], x, x, out, given, attn_mask=mask)
    return float(grads.value[0, 0, 0, 0])


@pytest.mark.parametrize("score", [200.0, -200.0, 1e4, -65504.0])
@pytest.mark.parametrize("parts", [2, 3, 1000])
def test_one_of_several_equal_chunks(simulator: Target, parts: int, score: float) -> None:
    """A probability is off by half a unit in the last place of lse at most, and of each score."""
    found = equal_keys(lambda lse: (lse.astype(float) + numpy.log(parts)).astype(numpy.float32), score) * 64 * parts
    assert abs(found - 1) < 2.0**-22 * abs(score)


@pytest.mark.parametrize("score", [-200.0, 1e4, -65504.0, -1e9, -3e38])
@pytest.mark.parametrize("towards", [-numpy.inf, numpy.inf])
def test_own_lse_that_was_rounded_otherwise(simulator: Target, towards: float, score: float) -> None:
    """One unit in the last place is the rounding of lse and not other keys: at 1e9 it is a factor of e^64."""
    exact = equal_keys(lambda lse: lse, score)
    assert abs(64 * exact - 1) < 1e-6
    assert equal_keys(lambda lse: numpy.nextafter(lse, numpy.float32(towards)), score) == exact


@pytest.mark.parametrize("score", [200.0, -65504.0, -1e9])
def test_lse_below_that_of_the_own_keys_is_rounding(simulator: Target, score: float) -> None:
    """A sum over more keys is not smaller; a row of equal scores never has probabilities of more than 1 in total."""
    assert equal_keys(lambda lse: lse - numpy.float32(2.0**-10 * abs(score)), score) == equal_keys(lambda lse: lse, score)


def test_other_keys_that_have_all_the_weight(simulator: Target) -> None:
    assert equal_keys(lambda lse: lse + numpy.float32(1e4), 200.0) == 0.0
    assert equal_keys(lambda lse: numpy.full_like(lse, 3e38), -3e38) == 0.0


def test_what_float32_cannot_say(simulator: Target) -> None:
    """At 1e9 the lse of two equal chunks is that of each: probabilities are those among the own keys. Finite, and twice what they should be."""
    doubled = equal_keys(lambda lse: (lse.astype(float) + numpy.log(2)).astype(numpy.float32), -1e9)
    assert abs(64 * doubled - 1) < 1e-6
