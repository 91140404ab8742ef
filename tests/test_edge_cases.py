"""Named cases in which attention kernels of others gave wrong results, NaN or nothing at all.

Each test is one row of what users of such libraries reported; the comment or docstring says what goes wrong when it does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy
import pytest
from conftest import poison_new_memory

import cuflash
from cuflash import Tile
from cuflash.reference import attention, attention_backward

if TYPE_CHECKING:
    from conftest import Target

pytestmark = pytest.mark.small_tiles

ALIGNMENTS = pytest.mark.parametrize("alignment", ["top_left", "bottom_right"])


def three(target: Target, shape: tuple[int, ...], dtype: str | None = None) -> list[Any]:
    return [target.random(shape, dtype or target.half, seed) for seed in (1, 2, 3)]


# --- Rows that see nothing ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_rows_that_see_no_key_are_zero(target: Target, dtype: str) -> None:
    """Sq > Skv, bottom_right: the first rows see nothing. 0 / 0 makes them NaN, and NaN in one row of P ruins dK and dV."""
    query = target.random((1, 200, 2, 32), dtype, 1)
    key, value = (target.random((1, 70, 2, 32), dtype, seed) for seed in (2, 3))
    results = target.check(query, key, value, is_causal=True, causal_alignment="bottom_right")
    assert not target.host(results.out)[:, :130].any()
    assert numpy.isneginf(target.host(results.lse)[:, :, :130]).all()
    assert numpy.isfinite(target.host(results.lse)[:, :, 130:]).all()
    assert results.grads is not None
    assert not target.host(results.grads[0])[:, :130].any()


def test_gradient_of_lse_minus_infinity_is_no_gradient(target: Target) -> None:
    """Whatever flows into the LSE of a row that sees nothing, even NaN, goes nowhere."""
    query, key, value = target.random((1, 70, 1, 32), target.half, 1), *three(target, (1, 3, 1, 32))[1:]
    grad_lse = numpy.zeros((1, 1, 70), numpy.float32)
    quiet = target.run(query, key, value, is_causal=True, causal_alignment="bottom_right", grad_lse=target.place(grad_lse.copy()))
    grad_lse[..., :67] = numpy.nan
    loud = target.run(query, key, value, is_causal=True, causal_alignment="bottom_right", grad_lse=target.place(grad_lse))
    assert loud.bits() == quiet.bits()


@pytest.mark.parametrize("seqlen_kv", [1, 64, 257], ids="Skv{}".format)
def test_keys_that_no_query_sees_have_no_gradient(target: Target, seqlen_kv: int) -> None:
    """Skv > Sq, top_left: whole key tiles that no query visits."""
    query = target.random((1, 1, 2, 32), target.half, 1)
    key, value = (target.random((1, seqlen_kv, 2, 32), target.half, seed) for seed in (2, 3))
    results = target.check(query, key, value, is_causal=True)
    assert results.grads is not None
    for grad in results.grads[1:]:
        assert not target.host(grad)[:, 1:].any()


@pytest.mark.parametrize(
    ("query_shape", "key_shape"),
    [
        ((0, 5, 2, 32), (0, 5, 2, 32)),
        ((2, 0, 2, 32), (2, 5, 2, 32)),
        ((2, 5, 0, 32), (2, 5, 0, 32)),
        ((2, 5, 2, 32), (2, 0, 2, 32)),
        ((2, 0, 2, 32), (2, 0, 2, 32)),
        ((0, 5, 2, 32), (1, 5, 1, 32)),
    ],
    ids=["no_batch", "no_queries", "no_heads", "no_keys", "no_tokens", "no_batch_broadcast"],
)
@pytest.mark.parametrize("given_out", [False, True], ids=["new_out", "given_out"])
def test_zero_size_inputs(target: Target, query_shape: tuple[int, ...], key_shape: tuple[int, ...], given_out: bool) -> None:
    """Nothing to compute is an answer, not an error: zeros, -inf, and gradients of zero."""
    query = target.random(query_shape, target.half, 1)
    key, value = (target.random(key_shape, target.half, seed) for seed in (2, 3))
    for is_causal in (False, True):
        results = target.run(query, key, value, is_causal=is_causal, out=target.empty_like(query) if given_out else None)
        assert results.out.shape == query_shape
        assert results.lse.shape == (query_shape[0], query_shape[2], query_shape[1])
        assert (target.host(results.out) == 0).all()
        assert numpy.isneginf(target.host(results.lse)).all()
        assert results.grads is not None
        for grad, x in zip(results.grads, (query, key, value), strict=True):
            assert grad.shape == x.shape
            assert grad.dtype == x.dtype
            assert (target.host(grad) == 0).all()


def test_zero_keys_with_tagged_bfloat16(simulator: Target) -> None:
    """The tagged array is no NumPy array: it is filled another way."""
    query = cuflash.bfloat16(numpy.ones((1, 3, 1, 8), numpy.uint16))
    key = cuflash.bfloat16(numpy.ones((1, 0, 1, 8), numpy.uint16))
    out, lse = cuflash.scaled_dot_product_attention(query, key, key, return_lse=True)
    assert not out.bits.any()
    assert numpy.isneginf(lse).all()
    grads = cuflash.scaled_dot_product_attention_backward(out, query, key, key, out, lse)
    assert [grad.bits.shape for grad in grads] == [(1, 3, 1, 8), (1, 0, 1, 8), (1, 0, 1, 8)]
    assert not grads.query.bits.any()


# --- Lengths ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.sample(2)
@pytest.mark.parametrize("head_dim", [1, 16, 64], ids="D{}".format)
def test_backward_of_a_single_token(target: Target, head_dim: int) -> None:
    """P is 1, so dQ and dK are 0 and dV is dO; kernels of others divided by a tile of nothing here."""
    query, key, value = three(target, (2, 1, 3, head_dim))
    grad_out = target.random((2, 1, 3, head_dim), target.half, 4)
    for is_causal in (False, True):
        results = target.check(query, key, value, grad_out=grad_out, grad_lse=None, is_causal=is_causal)
        assert target.bits(results.out) == target.bits(value)
        assert results.grads is not None
        assert target.bits(results.grads[2]) == target.bits(grad_out)


@pytest.mark.parametrize(("seqlen_q", "seqlen_kv"), [(1, 3), (3, 1), (2, 3), (128, 3), (3, 128)])
@ALIGNMENTS
def test_tiny_lengths(target: Target, seqlen_q: int, seqlen_kv: int, alignment: str) -> None:
    query = target.random((1, seqlen_q, 2, 32), target.half, 1)
    key, value = (target.random((1, seqlen_kv, 2, 32), target.half, seed) for seed in (2, 3))
    target.check(query, key, value, is_causal=True, causal_alignment=alignment)


@pytest.mark.parametrize("seqlen", [64, 192, 320], ids="S{}".format)
def test_lse_below_minus_88_at_half_a_tile(target: Target, seqlen: int) -> None:
    """exp(-lse) overflows float32 for lse < -88.7; at S % 128 == 64 a padded row then met it as 0 * inf."""
    rng = numpy.random.default_rng(0)
    query = rng.standard_normal((1, seqlen, 1, 32)) + 3
    key = rng.standard_normal((1, seqlen, 1, 32)) - 3
    inputs = [target.place(x.astype(target.random((1,), target.half, 0).dtype)) for x in (query, key, rng.standard_normal(key.shape))]
    for is_causal in (False, True):
        results = target.check(*inputs, scale=0.5, is_causal=is_causal)
        assert (target.host(results.lse) < -88.7).all()


# --- Large and strange numbers ------------------------------------------------------------------------------------------------------------


@pytest.mark.sample(1)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_logits_below_minus_50000_are_not_taken_for_masked(target: Target, dtype: str) -> None:
    """With -5e4 or finfo.min as the sign of a masked score, rows of very negative scores come out as zeros or as the mean of V."""
    rng = numpy.random.default_rng(1)
    query, key = numpy.full((1, 70, 1, 64), 32.0), numpy.full((1, 90, 1, 64), -32.0)
    key[..., 0] = -rng.integers(24, 40, (1, 90, 1))  # scores near -65536, multiples of 32: differences decide which key wins
    value = rng.standard_normal((1, 90, 1, 64))
    dtype_of = target.random((1,), dtype, 0).dtype
    inputs = [target.place(x.astype(dtype_of)) for x in (query, key, value)]
    for options in ({}, {"is_causal": True}):
        results = target.check(*inputs, scale=1.0, backward=dtype != "float32", **options)
        assert (target.host(results.lse) < -5e4).all()
        assert target.host(results.out).any(axis=-1).all()


def test_gradients_at_logits_below_minus_50000_are_as_exact_as_lse(target: Target) -> None:
    """P = exp(S - lse), and a float32 near 65536 is a multiple of 1/256, half of which is the error of each probability."""
    rng = numpy.random.default_rng(1)
    query, key = numpy.full((1, 70, 1, 64), 32.0, numpy.float32), numpy.full((1, 90, 1, 64), -32.0, numpy.float32)
    key[..., 0] = -32 + rng.integers(-4, 5, (1, 90, 1)) / 32  # scores differ by up to 8
    value, grad_out = (target.random((1, n, 1, 64), "float32", seed) for seed, n in ((3, 90), (4, 70)))
    results = target.run(target.place(query), target.place(key), value, grad_out=grad_out, scale=1.0)
    assert results.grads is not None
    for got, want in zip(results.grads, attention_backward(grad_out, query, key, value, scale=1.0), strict=True):
        assert numpy.abs(target.host(got) - want).max() <= 2**-7 * numpy.abs(want).max()


def test_bfloat16_inputs_of_130000_stay_finite(target: Target) -> None:
    """Scores of 1e10 and exponents that differ by rounding alone: exp2 of a rounding error of 1024 is infinite unless clamped."""
    rng = numpy.random.default_rng(2)
    dtype = target.random((1,), "bfloat16", 0).dtype
    query, key = (
        target.place((rng.choice([-1.3e5, 1.3e5], (1, 65, 2, 32)) * rng.uniform(0.5, 1, (1, 65, 2, 32))).astype(dtype)) for _ in range(2)
    )
    value = target.random((1, 65, 2, 32), "bfloat16", 3)
    for options in ({}, {"is_causal": True}, {"scale": 1.0}):
        results = target.run(query, key, value, **options)
        for x in (results.out, results.lse, *(results.grads or ())):
            assert numpy.isfinite(target.host(x)).all()
        want, want_lse = attention(query, key, value, **options)
        numpy.testing.assert_allclose(target.host(results.lse), want_lse, rtol=1e-5)
        top = numpy.abs(want).max()
        assert numpy.median(numpy.abs(target.host(results.out) - want)) <= 2**-7 * top


def test_scale_that_underflows_is_zero(target: Target) -> None:
    """1e-46 is a number in float64 and 0 in the kernels' float32: the mean of the visible values, and no NaN from -inf * 0."""
    query, key, value = (target.random((1, 32, 1, 32), target.half, seed) for seed in range(3))
    results = target.run(query, key, value, scale=1e-46, is_causal=True)
    assert numpy.isfinite(target.host(results.out)).all()
    numpy.testing.assert_allclose(target.host(results.lse)[0, 0], numpy.log(numpy.arange(1, 33)), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("scale", [1e4, 1e10, 1e30, 2.0**127, -1e10], ids="scale={:.3g}".format)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_huge_scale_picks_the_largest_score(target: Target, dtype: str, scale: float) -> None:
    """Softmax becomes argmax: O is one row of V. scale * log2(e) must not overflow, nor must the score of a key that is far behind."""
    rng = numpy.random.default_rng(3)
    dtype_of = target.random((1,), dtype, 0).dtype
    winners = rng.integers(0, 40, 20)
    keys = numpy.eye(64)[:40] * 0.5
    queries = numpy.sign(scale) * numpy.eye(64)[winners] * 0.5
    query, key = (target.place(x[None, :, None].astype(dtype_of)) for x in (queries, keys))
    value = target.random((1, 40, 1, 64), dtype, 4)
    results = target.run(query, key, value, scale=scale)
    exact = 2.0**-21 if dtype == "float32" else 0.0  # a float32 passes through the tensor cores in two parts of 11 bits
    numpy.testing.assert_allclose(target.host(results.out)[0, :, 0], target.host(value)[0, winners, 0], rtol=exact)
    assert results.grads is not None
    for grad in results.grads:
        assert not numpy.isnan(target.host(grad)).any()


def test_equal_scores_give_the_mean(target: Target) -> None:
    value = target.random((1, 257, 1, 32), target.half, 1)
    zeros = target.place(numpy.zeros((1, 257, 1, 32), value.dtype))
    results = target.check(zeros, zeros, value)
    numpy.testing.assert_allclose(target.host(results.lse), numpy.log(257), rtol=1e-6)


@pytest.mark.parametrize("bad", [numpy.nan, numpy.inf, -numpy.inf], ids=["nan", "inf", "minus_inf"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_a_bad_query_poisons_its_own_row_only(target: Target, dtype: str, bad: float) -> None:
    """Rows share warps, tiles and shuffles, but nothing of each other; and the bad row must say that it is bad."""
    query, key, value = three(target, (1, 70, 2, 32), dtype)
    damaged = target.as_numpy(query).copy()
    damaged[0, 33, 1, 5] = bad
    clean = target.run(query, key, value, backward=False)
    dirty = target.run(target.place(damaged), key, value, backward=False)
    others = numpy.ones((70, 2), bool)
    others[33, 1] = False
    numpy.testing.assert_array_equal(target.host(dirty.out)[0][others], target.host(clean.out)[0][others])
    numpy.testing.assert_array_equal(target.host(dirty.lse)[0].T[others], target.host(clean.lse)[0].T[others])
    assert numpy.isnan(target.host(dirty.out)[0, 33, 1]).all()
    assert numpy.isnan(target.host(dirty.lse)[0, 1, 33])


@pytest.mark.parametrize("view", ["sliced", "padded_rows", "strided_elements", "unaligned_base"])
@pytest.mark.parametrize("head_dim", [pytest.param(8, marks=pytest.mark.exhaustive), 40, 72], ids="D{}".format)
def test_nan_beyond_the_array_never_leaks(target: Target, view: str, head_dim: int) -> None:
    """Tiles reach past the last row and the last column; what lies there times a probability of 0 would still be NaN."""
    shapes = [(1, 70, 2, head_dim), (1, 90, 2, head_dim), (1, 90, 2, head_dim)]
    results = target.run(*(target.random(shape, target.half, seed, view) for seed, shape in enumerate(shapes)), is_causal=True)
    for x in (results.out, results.lse, *(results.grads or ())):
        assert numpy.isfinite(target.host(x)).all()


def test_nan_in_keys_that_no_query_sees_never_leaks(target: Target) -> None:
    """A cache longer than what is filled: K and V hold anything behind the last visible key, in the same tile and in tiles of their own."""
    query = target.random((1, 70, 2, 32), target.half, 1)
    key, value = (target.as_numpy(target.random((1, 200, 2, 32), target.half, seed)) for seed in (2, 3))
    clean = target.run(query, target.place(key), target.place(value), is_causal=True)
    key, value = key.copy(), value.copy()
    key[:, 70:], value[:, 70:] = numpy.nan, numpy.inf
    dirty = target.run(query, target.place(key), target.place(value), is_causal=True)
    assert target.bits(dirty.out) == target.bits(clean.out)
    assert target.bits(dirty.lse) == target.bits(clean.lse)
    assert dirty.grads is not None
    assert target.bits(dirty.grads[0]) == target.bits(clean.grads[0] if clean.grads else None)
    for grad in dirty.grads[1:]:
        assert numpy.isfinite(target.host(grad)[:, :70]).all()
        assert not target.host(grad)[:, 70:].any()


def test_new_memory_may_hold_anything(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results and workspace come uninitialised. Padding of LSE or delta that was never written once made dK NaN."""
    inputs = three(target, (2, 70, 2, 32))
    want = target.run(*inputs, is_causal=True).bits()
    poison_new_memory(monkeypatch)
    assert target.run(*inputs, is_causal=True).bits() == want


# --- Memory and strides -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", ["bs3hd", "bsh3d", "3bshd"])
def test_query_key_and_value_out_of_one_buffer(target: Target, packing: str) -> None:
    """The usual result of one projection, taken apart without a copy."""
    axis = packing.index("3")
    shape = [2, 70, 2, 32]
    shape.insert(axis, 3)
    buffer = target.random(tuple(shape), target.half, 1)
    views = [buffer[(slice(None),) * axis + (i,)] for i in range(3)]
    assert all(view.base is not None for view in views)
    copies = [target.place(numpy.ascontiguousarray(target.as_numpy(view))) for view in views]
    assert target.check(*views, grad_lse=None, is_causal=True).bits() == target.run(*copies, is_causal=True).bits()


def test_query_key_and_value_are_one_array(target: Target) -> None:
    x = target.random((1, 130, 2, 32), target.half, 1)
    copies = [target.place(target.as_numpy(x).copy()) for _ in range(3)]
    assert target.check(x, x, x, grad_lse=None).bits() == target.run(*copies).bits()


def test_the_gradient_of_out_is_out(target: Target) -> None:
    """One array for both, as in tests of others that sum squares."""
    query, key, value = three(target, (1, 65, 1, 32))
    out, lse = cuflash.scaled_dot_product_attention(query, key, value, return_lse=True)
    once = cuflash.scaled_dot_product_attention_backward(out, query, key, value, out, lse)
    copied = cuflash.scaled_dot_product_attention_backward(target.place(target.as_numpy(out).copy()), query, key, value, out, lse)
    assert [target.bits(x) for x in once] == [target.bits(x) for x in copied]


def test_transposed_views_where_key_and_value_differ(target: Target) -> None:
    """K as (b, h, d, s) transposed, V as (s, b, h, d): strides of one must not be used for the other."""
    query = target.random((2, 70, 3, 32), target.half, 1)
    key = target.random((2, 3, 32, 90), target.half, 2).transpose(0, 3, 1, 2)
    value = target.random((90, 2, 3, 32), target.half, 3).transpose(1, 0, 2, 3)
    target.check(query, key, value, is_causal=True)


@pytest.mark.xdist_group("large_memory")  # on a GPU, where all of it exists: one after the other, under --dist loadgroup
@pytest.mark.parametrize("axis", [0, 1, 2, 3], ids=["batch", "seqlen", "heads", "head_dim"])
@pytest.mark.parametrize("sign", [1, -1], ids=["forwards", "backwards"])
def test_strides_beyond_32_bits(target: Target, axis: int, sign: int) -> None:
    """Offsets of more than 2**31 elements: index times stride in 32 bits reads elsewhere, silently. The memory between is never touched."""
    shape = [1, 1, 1, 16]
    shape[axis] = 16 if axis == 3 else 3
    far = 2**31 // (shape[axis] - 1) // 8 * 8 + 64
    strides = [64, 64, 64, 1]
    strides[axis] = sign * far
    reach = far * (shape[axis] - 1) + 64
    dtype = target.random((1,), target.half, 0).dtype
    small = [numpy.random.default_rng(seed).standard_normal(shape).astype(dtype) for seed in range(4)]
    inputs = [target.place_far(x, tuple(strides), reach) for x in small]
    assert abs(inputs[0].strides[axis]) * (shape[axis] - 1) > 2**31 * dtype.itemsize
    want = target.run(*(target.place(x) for x in small[:3]), grad_out=target.place(small[3]))
    out = target.place_far(numpy.zeros(shape, dtype), tuple(strides), reach)
    got = target.run(*inputs[:3], grad_out=inputs[3], out=out)
    assert got.bits() == want.bits()
    del inputs, out, got
    target.free_memory()


# --- Many blocks --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("batch", "heads"), [(66_000, 1), (1, 66_000)], ids=["batch", "heads"])
def test_more_batches_or_heads_than_65535(simulator: Target, batch: int, heads: int) -> None:
    """CUDA grids end at 65535 in y and z, so batch or heads there stop working, or wrap around."""
    query = simulator.random((batch, 1, heads, 8), "bfloat16", 1)
    key, value = (simulator.random((batch, 2, heads, 8), "bfloat16", seed) for seed in (2, 3))
    results = simulator.run(query, key, value, tile=Tile(16, 16, 1, 1), backward_tile=Tile(16, 16, 1, 1), backward=batch > 1)
    q, k, v = (simulator.host(x).transpose(0, 2, 1, 3).reshape(66_000, -1, 8) for x in (query, key, value))
    grad = simulator.host(simulator.random(query.shape, "bfloat16", 99)).reshape(66_000, 8)
    scores = (k @ q.transpose(0, 2, 1))[..., 0] / 8**0.5
    weights = numpy.exp(scores) / numpy.exp(scores).sum(axis=1, keepdims=True)
    want = (weights[:, :, None] * v).sum(axis=1)
    numpy.testing.assert_allclose(simulator.host(results.out).reshape(66_000, 8), want, atol=2**-7 * 4)
    if batch == 1:  # batches and heads are numbered alike, in both passes
        return
    assert results.grads is not None
    grad_value = simulator.host(results.grads[2]).transpose(0, 2, 1, 3).reshape(66_000, 2, 8)
    numpy.testing.assert_allclose(grad_value, weights[:, :, None] * grad[:, None], atol=2**-7 * 5)


def test_more_query_tiles_than_65535(simulator: Target) -> None:
    """And more key tiles: a million tokens of one head, with one key, so that O is its value."""
    seqlen = 65_537 * 16
    query, value = simulator.random((1, seqlen, 1, 8), "bfloat16", 1), simulator.random((1, 1, 1, 8), "bfloat16", 2)
    out = cuflash.scaled_dot_product_attention(query, value, value, tile=Tile(16, 16, 1, 1))
    assert (out == value).all()


def test_more_key_tiles_than_65535(simulator: Target) -> None:
    """dV of a million equal keys for one query: each gets the same part."""
    seqlen = 65_537 * 16
    key = numpy.zeros((1, seqlen, 1, 8), numpy.float16)
    query = simulator.random((1, 1, 1, 8), "float16", 1)
    lse = numpy.full((1, 1, 1), numpy.log(2.0), numpy.float32)  # as if there were two keys: P is 1/2
    grads = cuflash.scaled_dot_product_attention_backward(query, query, key, key, query, lse, tile=Tile(16, 16, 1, 1))
    numpy.testing.assert_allclose(grads.value.astype(numpy.float32), numpy.broadcast_to(query, key.shape) / 2, rtol=2e-3)
