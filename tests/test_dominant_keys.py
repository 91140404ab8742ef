"""Rows in which one key outweighs all others, and many small ones count together: an attention sink beside thousands of keys.

The float32 sum of a row stands at 1 then, and what a key adds is less than its last place. What is lost is 1e-4 of the sum, but dS = P (dP - delta) of the sink is of that
size too. And values and gradients at the ends of what a type holds.
"""

from __future__ import annotations

from typing import Any

import numpy
import pytest
from conftest import Target, rounded

from cuflash import Tile
from cuflash.reference import attention, attention_backward

QUERIES = 16


def sink_inputs(
    target: Target, dtype: str, seqlen_kv: int, gap: float, at: int = 0, head_dim: int = 16, seqlen_q: int = QUERIES, heads: int = 1
) -> list[Any]:
    """Query, key and value such that, with a scale of 1, the score of key `at` lies about `gap` above all others."""
    numbers = numpy.random.default_rng(0)
    query, key, value = (numbers.standard_normal((1, seqlen, heads, head_dim)) for seqlen in (seqlen_q, seqlen_kv, seqlen_kv))
    query *= 0.01
    query[..., 0] = 1
    key[..., 0] = 0
    key[:, at, :, 0] = gap
    return [target.place(rounded(x, dtype)) for x in (query, key, value)]


# --- Row sums -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [0, 1000, 4095])
def test_an_attention_sink(target: Target, at: int) -> None:
    """Gradients of query and key were a quarter off with the sink at the front."""
    target.check(*sink_inputs(target, "float32", 4096, 17.0, at), scale=1.0, grad_lse=None)


def test_a_causal_sink(simulator: Target) -> None:
    """Each query has a number of keys of its own behind the sink."""
    inputs = sink_inputs(simulator, "float32", 768, 17.0, head_dim=64, seqlen_q=768)
    simulator.check(*inputs, scale=1.0, is_causal=True, grad_lse=None)


@pytest.mark.parametrize("gap", [14.0, 16.5, 17.5, 20.0])
def test_small_probabilities_are_counted_wherever_rounding_would_drop_or_raise_them(simulator: Target, gap: float) -> None:
    """In the last place of 1, a tile's share of the sum is a fraction that rounding takes for 0 or 1."""
    simulator.check(*sink_inputs(simulator, "float32", 8192, gap), scale=1.0, backward=False, tile=Tile(16, 16, 1, 2))
    simulator.check(*sink_inputs(simulator, "bfloat16", 8192, gap), scale=1.0, backward=False, tile=Tile(16, 16, 1, 2))


@pytest.mark.parametrize("dtype", ["half", "float32"])
def test_lse_of_many_tiles(target: Target, dtype: str) -> None:
    """In 16 bits too lse is float32."""
    inputs = sink_inputs(target, target.half if dtype == "half" else dtype, 16384, 16.5)
    target.check(*inputs, scale=1.0, backward=False)


@pytest.mark.exhaustive
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_lse_of_half_a_million_keys(simulator: Target, dtype: str) -> None:
    simulator.check(*sink_inputs(simulator, dtype, 524_288, 16.5), scale=1.0, backward=False)


def test_sinks_at_both_ends_and_growing_maxima(target: Target) -> None:
    """Each of some keys outweighs all before it, so that sums are rescaled again and again."""
    query, key, value = sink_inputs(target, "float32", 2048, 17.0)
    growing = target.as_numpy(key).copy()
    growing[0, 1::500, 0, 0] = [3.0, 12.0, 17.5, 18.0, 30.0]
    target.check(query, target.place(growing), value, scale=1.0, grad_lse=None)
    falling = target.as_numpy(key).copy()
    falling[0, -1, 0, 0] = 17.0
    target.check(query, target.place(falling), value, scale=1.0, grad_lse=None)


FEATURES: dict[str, dict[str, Any]] = {
    "softcap": {"softcap": 200.0},
    "alibi": {"alibi_slopes": numpy.array([1e-4], numpy.float32)},
    "sinks": {"sinks": numpy.array([17.0], numpy.float32)},
    "additive_mask": {"attn_mask": numpy.zeros((1, 2048), numpy.float32)},
    "window": {"window": (None, None)},
    "dropout": {"dropout_p": 0.2, "dropout_seed": 5},
}


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", FEATURES)
def test_an_attention_sink_with_a_feature(simulator: Target, name: str) -> None:
    simulator.check(*sink_inputs(simulator, "float32", 2048, 17.0), scale=1.0, grad_lse=None, **FEATURES[name])


def test_a_logit_in_the_denominator_that_outweighs_all_keys(target: Target) -> None:
    """The option `sinks`, which joins the sum last."""
    inputs = sink_inputs(target, "float32", 2048, 0.0)
    sinks = target.place(numpy.array([17.0], numpy.float32))
    target.check(*inputs, scale=1.0, grad_lse=None, sinks=sinks)


def test_a_head_in_slices(simulator: Target) -> None:
    simulator.check(*sink_inputs(simulator, "float32", 1024, 17.0, head_dim=264), scale=1.0, grad_lse=None)


def test_the_same_bits_on_every_schedule(simulator: Target) -> None:
    inputs = sink_inputs(simulator, "float32", 512, 17.0)
    bits = set()
    for seed in range(3):
        with simulator.schedule(seed):
            bits.add(simulator.run(*inputs, scale=1.0).bits())
    assert len(bits) == 1


# --- float16 ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gap", [8.0, 17.0, 18.0, 20.0, 23.0, 26.0])
def test_small_probabilities_in_float16(target: Target, gap: float) -> None:
    """A sink whose value is 0: the output is what the other keys' probabilities add up to, in steps of 2^-31
    of the sink's probability. From 17.4 on it was 0."""
    query, key, value = (target.as_numpy(x).copy() for x in sink_inputs(target, "float16", 4096, gap))
    query[..., 1:] = 0
    value[...] = numpy.where(numpy.arange(4096) == 0, 0, 256)[:, None, None]
    inputs = [target.place(x) for x in (query, key, value)]
    results = target.run(*inputs, scale=1.0, backward=False)
    want, want_lse = attention(*inputs, scale=1.0)
    numpy.testing.assert_allclose(target.host(results.out), want, rtol=2**-9, atol=2**-25 + 4096 * 256 * 2**-32)
    numpy.testing.assert_allclose(target.host(results.lse), want_lse, rtol=1e-6)


@pytest.mark.parametrize("size", [0.01, 1.0, 200.0])
def test_lse_of_float16_is_as_exact_as_that_of_float32(target: Target, size: float) -> None:
    """The scaled probabilities of float16 have exponents around 7, which are rounded more coarsely than those around 0."""
    inputs = [
        target.place(rounded(size**0.5 * target.host(target.random((1, 200, 2, 32), "float16", seed)), "float16")) for seed in range(3)
    ]
    target.check(*inputs, backward=False)


def test_values_as_large_as_float16_holds(target: Target) -> None:
    """Scaled probabilities times the largest values stay far from overflow in the float32 sums."""
    query, key, value = (target.place(rounded(numpy.zeros((1, 300, 2, 16)), "float16")) for _ in range(3))
    value = target.place(rounded(numpy.full((1, 300, 2, 16), 65504.0), "float16"))
    results = target.run(query, key, value, backward=False)
    assert (target.host(results.out) == 65504.0).all()


@pytest.mark.parametrize("score", [3e6, 5e6, 2e7, 1e9, -3e6, -5e6, -1e9])
def test_huge_scores_in_float16(target: Target, score: float) -> None:
    """Around 2^22 in log2 units exponents are clamped; P must not pass 65504 on either side."""
    query = target.place(rounded(numpy.full((1, 32, 1, 16), 1.0), "float16"))
    key = target.place(
        rounded(numpy.where(numpy.arange(300) % 3 == 0, 1.0, 0.5)[None, :, None, None] * numpy.ones((1, 300, 1, 16)), "float16")
    )
    value = target.random((1, 300, 1, 16), "float16", 3)
    target.check(query, key, value, scale=score / 16, backward=False)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("largest", [1500.0, 3000.0])
def test_differences_of_huge_scores(target: Target, dtype: str, largest: float) -> None:
    """Where the last place of the reference is up to 1, the largest score may lie above it, and keeps its weight beside those below."""
    query, key = numpy.zeros((1, 16, 1, 16)), numpy.zeros((1, 64, 1, 16))
    query[..., :2] = 2048, 1
    key[..., 0] = largest
    key[0, :, 0, 1] = numpy.arange(64) * 5 % 64 / 2  # scores are float32 numbers
    inputs = [target.place(rounded(x, dtype)) for x in (query, key)]
    target.check(*inputs, target.random((1, 64, 1, 16), dtype, 3), scale=1.0, backward=False)


# --- Where it ends (docs/features.md, "What is promised") ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_values_up_to_the_largest_number_over_the_number_of_keys(simulator: Target, dtype: str) -> None:
    """O is a sum over keys until it is divided: 300 equal keys may have values of 1e36, and one key any value."""
    query, key = (simulator.place(rounded(numpy.zeros((1, 300, 1, 16)), dtype)) for _ in range(2))
    for value, keys in ((1e36, 300), (3e38, 1)):
        values = rounded(numpy.full((1, keys, 1, 16), value), dtype)
        results = simulator.run(query, key[:, :keys], values, backward=False)
        numpy.testing.assert_allclose(simulator.host(results.out), float(values[0, 0, 0, 0]), rtol=2**-20 if dtype == "float32" else 2**-8)


@pytest.mark.parametrize("size", [1e-3, 1.0, 100.0])
def test_gradients_in_float16_scale_with_grad_out(target: Target, size: float) -> None:
    inputs = [target.random((1, 96, 2, 32), "float16", seed) for seed in range(3)]
    grad_out = target.place(rounded(size * target.host(target.random((1, 96, 2, 32), "float16", 9)), "float16"))
    results = target.check(*inputs, grad_out=grad_out, grad_lse=None)
    assert results.grads is not None
    want = attention_backward(grad_out, *inputs)
    for got, exact in zip(results.grads, want, strict=True):
        assert numpy.abs(target.host(got) - exact).max() < 0.002 * numpy.abs(exact).max()
