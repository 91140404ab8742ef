"""A head dimension of value's own: against the reference, in every memory layout, with shapes of its own for out and gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy
import pytest

import cuflash
from cuflash import Tile, reference

if TYPE_CHECKING:
    from conftest import Target

DTYPES = ["float16", "bfloat16", "float32"]


def three(
    target: Target, dims: tuple[int, int], dtype: str, seqlens: tuple[int, int] = (70, 90), heads: tuple[int, int] = (2, 2)
) -> list[Any]:
    """query, key and value of head dimensions `dims`."""
    (head_dim, head_dim_v), (seqlen_q, seqlen_kv), (heads_q, heads_kv) = dims, seqlens, heads
    shapes = [(1, seqlen_q, heads_q, head_dim), (1, seqlen_kv, heads_kv, head_dim), (1, seqlen_kv, heads_kv, head_dim_v)]
    return [target.random(shape, dtype, seed) for seed, shape in enumerate(shapes)]


@pytest.mark.sample(4)
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dims", [(192, 128), (64, 256), (256, 8), (71, 33), (1, 64), (40, 1)], ids=lambda dims: f"D{dims[0]}_{dims[1]}")
def test_value_has_a_head_dim_of_its_own(target: Target, dims: tuple[int, int], dtype: str, is_causal: bool) -> None:
    query, key, value = three(target, dims, dtype)
    results = target.check(query, key, value, is_causal=is_causal)
    assert results.out.shape == (1, 70, 2, dims[1])
    assert results.grads is not None
    assert [grad.shape for grad in results.grads] == [query.shape, key.shape, value.shape]


def test_value_head_dim_equals_padding_with_zeros(target: Target) -> None:
    """The smaller head dimension padded by the caller gives the same bits: the kernels add the same numbers in the same order."""
    query, key, value = three(target, (96, 64), target.half)
    padded = target.place(numpy.concatenate([target.as_numpy(value), numpy.zeros((1, 90, 2, 32), value.dtype)], axis=-1))
    tile = Tile(64, 32, 4, 1)  # the default one depends on both head dimensions
    own, want = (target.run(query, key, x, backward=False, tile=tile) for x in (value, padded))
    assert target.bits(own.lse) == target.bits(want.lse)
    numpy.testing.assert_array_equal(target.host(own.out), target.host(want.out)[..., :64])


@pytest.mark.sample(3)
@pytest.mark.parametrize("dims", [(71, 33), (24, 40), (40, 8)], ids=str)
def test_strides_with_a_head_dim_of_its_own(target: Target, view: str, dims: tuple[int, int]) -> None:
    """Unaligned and strided views, NaN all around them: the same bits as contiguous arrays."""
    plain = three(target, dims, target.half)
    strided = [target.restride(x, view) for x in plain]
    grad_out = target.random((1, 70, 2, dims[1]), target.half, 9)
    want = target.run(*plain, grad_out=grad_out, is_causal=True)
    got = target.run(*strided, grad_out=target.restride(grad_out, view), is_causal=True)
    assert got.bits() == want.bits()


@pytest.mark.parametrize("layout", ["bhsd", "sbhd", "dhsb"])
def test_layouts_with_a_head_dim_of_its_own(target: Target, layout: str) -> None:
    order = ["bshd".index(letter) for letter in layout]
    plain = three(target, (24, 40), target.half, heads=(4, 2))
    grad_out = target.random((1, 70, 4, 40), target.half, 9)
    permuted = [target.place(numpy.ascontiguousarray(target.as_numpy(x).transpose(order))) for x in (*plain, grad_out)]
    want = target.run(*plain, grad_out=grad_out, enable_gqa=True)
    got = target.run(*permuted[:3], grad_out=permuted[3], enable_gqa=True, layout=layout)
    back = numpy.argsort(order)
    assert got.out.shape == tuple((1, 70, 4, 40)[i] for i in order)
    assert got.grads is not None
    assert want.grads is not None
    assert target.bits(got.out.transpose(back)) == target.bits(want.out)
    assert [target.bits(grad.transpose(back)) for grad in got.grads] == [target.bits(grad) for grad in want.grads]


def test_grouped_and_broadcast_values(target: Target) -> None:
    """Keys and values shared by other heads and batches than each other: one kernel for dK, another for dV."""
    query = target.random((2, 40, 4, 24), target.half, 1)
    key, value = target.random((2, 50, 2, 24), target.half, 2), target.random((1, 50, 1, 40), target.half, 3)
    results = target.check(query, key, value, enable_gqa=True, is_causal=True)
    assert results.grads is not None
    assert results.grads[2].shape == (1, 50, 1, 40)


def test_out_of_the_value_head_dim(target: Target) -> None:
    inputs = three(target, (32, 72), target.half)
    want = cuflash.scaled_dot_product_attention(*inputs)
    out = target.random((1, 70, 2, 72), target.half, 5, "padded_rows")
    assert cuflash.scaled_dot_product_attention(*inputs, out=out) is out
    assert target.bits(out) == target.bits(want)


def test_default_scale_is_that_of_the_query_head_dim(target: Target) -> None:
    inputs = three(target, (64, 16), target.half)
    default, named = (cuflash.scaled_dot_product_attention(*inputs, scale=scale) for scale in (None, 0.125))
    assert target.bits(default) == target.bits(named)


def test_reference_against_loops_with_two_head_dims() -> None:
    """The judge itself: softmax by hand, one element of out at a time."""
    rng = numpy.random.default_rng(0)
    q, k, v = rng.standard_normal((1, 3, 1, 4)), rng.standard_normal((1, 5, 1, 4)), rng.standard_normal((1, 5, 1, 7))
    out, _ = reference.attention(q, k, v)
    for i in range(3):
        weights = numpy.exp([q[0, i, 0] @ k[0, j, 0] / 2 for j in range(5)])
        for d in range(7):
            assert out[0, i, 0, d] == pytest.approx(sum(weights[j] * v[0, j, 0, d] for j in range(5)) / weights.sum())
    grads = reference.attention_backward(numpy.ones((1, 3, 1, 7)), q, k, v)
    assert [grad.shape for grad in grads] == [q.shape, k.shape, v.shape]


def test_plan_names_both_head_dims(simulator: Target) -> None:
    text = str(cuflash.plan(*three(simulator, (192, 128), "bfloat16")))
    assert "head_dim 192/128" in text
    assert "head_dim 64," in str(cuflash.plan(*three(simulator, (64, 64), "bfloat16")))


# --- Wide heads ---------------------------------------------------------------------------------------------------------------------------

WIDE = [(512, 512), (576, 512), (257, 257), (8, 512), (512, 8), (320, 71), (33, 515)]


@pytest.mark.sample(3)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dims", WIDE, ids=lambda dims: f"D{dims[0]}_{dims[1]}")
def test_wide_heads(target: Target, dims: tuple[int, int], dtype: str) -> None:
    """Groups of warps share out the columns, and on small devices pieces pass through shared memory."""
    target.check(*three(target, dims, dtype), is_causal=WIDE.index(dims) % 2 == 0)


@pytest.mark.sample(1)
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("dims", [(512, 512), (576, 64)], ids=str)
def test_wide_heads_give_the_same_bits_in_every_order_of_warps(target: Target, dims: tuple[int, int], dtype: str) -> None:
    """Groups of warps that run ahead of others must not overwrite what those still read: parts of scores, pieces of operands."""
    inputs = three(target, dims, dtype, (70, 70))
    runs = []
    for seed in range(6):
        with target.schedule(seed):
            runs.append(target.run(*inputs, is_causal=True).bits())
    assert runs.count(runs[0]) == 6


def test_scores_of_wide_heads_are_those_of_all_slices(target: Target) -> None:
    """Only one column of query and key is not 0, in each slice and piece in turn: the same LSE every time."""
    rng = numpy.random.default_rng(0)
    dtype = target.random((1,), target.half, 0).dtype
    q, k = rng.standard_normal((2, 1, 40, 1)).astype(dtype)
    value = target.random((1, 40, 1, 8), target.half, 3)
    found = set()
    for column in (0, 15, 16, 143, 144, 255, 256, 287, 288, 431, 432, 575):
        query, key = numpy.zeros((2, 1, 40, 1, 576), dtype)
        query[..., column], key[..., column] = q, k
        _, lse = cuflash.scaled_dot_product_attention(target.place(query), target.place(key), value, scale=1.0, return_lse=True)
        found.add(target.bits(lse))
    assert len(found) == 1
