"""The two calls against the reference: every element type, head dimension and mask; lengths, heads, layouts and strides; random mixtures.

Each check covers out, LSE and all gradients, with a gradient of LSE flowing in, and asks for at most twice the error of the naive formula in
the same precision. What users ran into elsewhere is in test_edge_cases.py.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy
import pytest

import cuflash
from cuflash.reference import attention

if TYPE_CHECKING:
    from conftest import Target

DTYPES = ["float16", "bfloat16", "float32"]
HEAD_DIMS = [1, 8, 32, 40, 64, 72, 80, 96, 128, 160, 192, 256]
LENGTHS = [1, 7, 63, 64, 65, 127, 128, 200, 257]
CAUSAL = pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])

_PAIRS = list(itertools.product(LENGTHS, LENGTHS))
random.Random(0).shuffle(_PAIRS)
_CASES = list(itertools.product(DTYPES, HEAD_DIMS, [False, True]))


def lengths_of(dtype: str, head_dim: int, is_causal: bool) -> list[tuple[int, int]]:
    """Two pairs of lengths, other ones for every case; `test_pairs_of_lengths_around_tile_edges` takes all."""
    first = 2 * _CASES.index((dtype, head_dim, is_causal))
    return [_PAIRS[(first + i) % len(_PAIRS)] for i in range(2)]


# --- Element types, head dimensions, lengths ----------------------------------------------------------------------------------------------


@pytest.mark.sample(9)
@CAUSAL
@pytest.mark.parametrize("head_dim", HEAD_DIMS, ids="D{}".format)
@pytest.mark.parametrize("dtype", DTYPES)
def test_element_type_head_dim_and_mask(target: Target, dtype: str, head_dim: int, is_causal: bool, request: pytest.FixtureRequest) -> None:
    of_case = lengths_of(dtype, head_dim, is_causal)
    for seqlen_q, seqlen_kv in of_case if request.config.getoption("--exhaustive") else of_case[:1]:  # others may take other kernels
        query = target.random((1, seqlen_q, 1, head_dim), dtype, seed=1)
        key, value = (target.random((1, seqlen_kv, 1, head_dim), dtype, seed) for seed in (2, 3))
        target.check(query, key, value, is_causal=is_causal)


@pytest.mark.sample(10)
@pytest.mark.parametrize(
    "options", [{}, {"is_causal": True}, {"is_causal": True, "causal_alignment": "bottom_right"}], ids=["full", "top_left", "bottom_right"]
)
@pytest.mark.parametrize("seqlen_q", LENGTHS, ids="Sq{}".format)
def test_pairs_of_lengths_around_tile_edges(target: Target, seqlen_q: int, options: dict[str, Any]) -> None:
    query = target.random((1, seqlen_q, 1, 64), target.half, seed=1)
    for seqlen_kv in LENGTHS:
        key, value = (target.random((1, seqlen_kv, 1, 64), target.half, seed) for seed in (2, 3))
        target.check(query, key, value, **options)


@pytest.mark.sample(2)
@pytest.mark.parametrize("head_dim", [2, 3, 5, 15, 17, 33, 63, 100, 129, 255], ids="D{}".format)
def test_head_dims_that_are_no_multiple_of_anything(target: Target, head_dim: int) -> None:
    query, key, value = (target.random((1, 70, 2, head_dim), target.half, seed) for seed in (1, 2, 3))
    target.check(query, key, value, is_causal=True)


@pytest.mark.parametrize("head_dim", [40, 64], ids="D{}".format)
def test_tf32_errs_by_its_mantissa_only(target: Target, head_dim: int) -> None:
    """Ten bits of mantissa: as exact as float16, whose naive error is the yardstick, and not as exact as float32."""
    query, key, value = (target.random((1, 100, 2, head_dim), "float32", seed) for seed in (1, 2, 3))
    want, _ = attention(query, key, value)
    exact, quick = (cuflash.scaled_dot_product_attention(query, key, value, allow_tf32=allow) for allow in (False, True))
    error_exact, error_quick = (float(numpy.abs(target.host(got) - want).max()) for got in (exact, quick))
    largest = float(numpy.abs(want).max())
    assert error_exact <= 2e-6 * largest
    assert error_quick <= 2e-3 * largest
    if target.device.capability >= 80:
        assert error_quick > error_exact
    else:
        assert error_quick == error_exact, "sm_75 has no TF32: nothing may get worse"


# --- Heads --------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("heads_q", "heads_kv"), [(2, 1), (4, 2), (6, 2), (8, 1), (5, 1), (7, 7)], ids=lambda heads: f"H{heads}")
def test_grouped_queries(target: Target, heads_q: int, heads_kv: int) -> None:
    query = target.random((2, 70, heads_q, 40), target.half, seed=1)
    key, value = (target.random((2, 90, heads_kv, 40), target.half, seed) for seed in (2, 3))
    target.check(query, key, value, enable_gqa=True, is_causal=True)


@pytest.mark.parametrize("head_dim", [64, 256], ids="D{}".format)
def test_grouped_queries_equal_repeated_heads(target: Target, head_dim: int) -> None:
    """Consecutive query heads share a key head, as in `repeat_interleave`, and their gradients add up."""
    query = target.random((1, 65, 6, head_dim), target.half, seed=1)
    key, value = (target.random((1, 65, 2, head_dim), target.half, seed) for seed in (2, 3))
    grouped = target.run(query, key, value, enable_gqa=True)
    repeated = target.run(query, *(x.repeat(3, axis=2) for x in (key, value)))
    assert grouped.bits()[:3] == repeated.bits()[:3]
    assert grouped.grads is not None
    assert repeated.grads is not None
    for got, each in zip(grouped.grads[1:], repeated.grads[1:], strict=True):
        summed = target.host(each).reshape(1, 65, 2, 3, head_dim).sum(axis=3)
        numpy.testing.assert_allclose(target.host(got), summed, atol=0.03 * numpy.abs(summed).max())


_BROADCASTS = {
    "heads": ((2, 50, 1, 40), (2, 50, 1, 40)),
    "batch": ((1, 50, 4, 40), (1, 50, 4, 40)),
    "both": ((1, 50, 1, 40), (1, 50, 1, 40)),
    "key_heads_value_full": ((2, 50, 1, 40), (2, 50, 4, 40)),
    "key_batch_value_heads": ((1, 50, 4, 40), (2, 50, 1, 40)),
    "key_full_value_both": ((2, 50, 4, 40), (1, 50, 1, 40)),
    "key_grouped_value_heads": ((2, 50, 2, 40), (1, 50, 1, 40)),
    "key_heads_value_grouped": ((1, 50, 1, 40), (2, 50, 2, 40)),
}


@pytest.mark.parametrize("shapes", list(_BROADCASTS.values()), ids=list(_BROADCASTS))
def test_broadcast_keys_and_values_sum_their_gradients(target: Target, shapes: tuple[Any, Any]) -> None:
    query = target.random((2, 40, 4, 40), target.half, seed=1)
    key, value = (target.random(shape, target.half, seed) for seed, shape in zip((2, 3), shapes, strict=True))
    results = target.check(query, key, value, enable_gqa=True)
    assert results.grads is not None
    assert (results.grads[1].shape, results.grads[2].shape) == shapes


@pytest.mark.parametrize("axis", [0, 2], ids=["batch", "heads"])
def test_stride_0_is_read_as_it_stands(target: Target, axis: int) -> None:
    """`expand`ed K and V have full extents: their gradients do too, one for each element of the view."""
    shape = [2, 65, 2, 40]
    query, grad_out = (target.random((2, 65, 2, 40), target.half, seed) for seed in (1, 4))
    shape[axis] = 1
    small = [target.random(tuple(shape), target.half, seed) for seed in (2, 3)]
    strides = [tuple(0 if i == axis else stride for i, stride in enumerate(x.strides)) for x in small]
    views = [
        numpy.lib.stride_tricks.as_strided(target.as_numpy(x), (2, 65, 2, 40), stride) for x, stride in zip(small, strides, strict=True)
    ]
    key, value = (target.place(x) for x in views)
    assert key.strides[axis] == 0
    results = target.check(query, key, value, grad_out=grad_out)
    copies = target.run(
        query,
        *(target.place(numpy.ascontiguousarray(x)) for x in views),
        grad_out=grad_out,
        grad_lse=target.random((2, 2, 65), "float32", 98),
    )
    assert results.bits() == copies.bits()


# --- Layouts and strides ------------------------------------------------------------------------------------------------------------------


@pytest.mark.sample(5)
@pytest.mark.parametrize("layout", ["bshd", "bhsd", "sbhd", "hbsd", "dhsb"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts(target: Target, dtype: str, layout: str) -> None:
    """A layout changes where elements are and nothing else: the same bits come out."""
    order = ["bshd".index(letter) for letter in layout]
    inputs = [target.random((2, length, heads, 40), dtype, seed) for seed, (length, heads) in enumerate([(70, 4), (50, 2), (50, 2)])]
    grad_out = target.random((2, 70, 4, 40), dtype, seed=9)
    permuted = [target.place(numpy.ascontiguousarray(target.as_numpy(x).transpose(order))) for x in (*inputs, grad_out)]
    want = target.check(*inputs, grad_out=grad_out, enable_gqa=True)
    grad_lse = target.random((2, 4, 70), "float32", seed=98)
    got = target.run(*permuted[:3], grad_out=permuted[3], grad_lse=grad_lse, enable_gqa=True, layout=layout)
    assert got.out.shape == permuted[0].shape
    assert got.out.flags.c_contiguous
    assert got.lse.shape == (2, 4, 70)
    assert got.grads is not None
    back = numpy.argsort(order)
    gradients = tuple(grad.transpose(back) for grad in got.grads)
    assert replace(got, out=got.out.transpose(back), grads=gradients).bits() == want.bits()


def test_batch_first_false_is_hbsd(target: Target) -> None:
    inputs = [target.random((3, 2, 20, 40), target.half, seed) for seed in (1, 2, 3)]
    assert target.run(*inputs, batch_first=False).bits() == target.run(*inputs, layout="hbsd").bits()


@pytest.mark.parametrize("options", [{}, {"layout": "sbhd"}, {"batch_first": False}], ids=["bs", "sb", "batch_first_false"])
def test_packed_heads(target: Target, options: dict[str, Any]) -> None:
    """(batch, seqlen, heads * head_dim) and its transposition are views of four dimensions."""
    batch_second = bool(options)
    lead = (50, 2) if batch_second else (2, 50)
    query = target.random((*lead, 4 * 40), target.half, seed=1)
    key, value = (target.random((*lead, 2 * 40), target.half, seed) for seed in (2, 3))
    got = target.run(query, key, value, num_heads=4, enable_gqa=True, **options)
    unpacked = [x.reshape(*lead, -1, 40) for x in (query, key, value)]
    grad_out = target.random(query.shape, target.half, seed=99).reshape(*lead, 4, 40)
    want = target.check(*unpacked, grad_out=grad_out, grad_lse=None, enable_gqa=True, layout="sbhd" if batch_second else "bshd")
    assert got.out.shape == query.shape
    assert got.grads is not None
    assert [grad.shape for grad in got.grads] == [query.shape, key.shape, value.shape]
    assert got.bits() == want.bits()


@pytest.mark.sample(6)
@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_of_inputs(target: Target, view: str, dtype: str) -> None:
    """The same values in any strides give the same bits, and NaN between the rows is never read."""
    shapes = [(2, 70, 4, 40), (2, 50, 2, 40), (2, 50, 2, 40)]
    plain = [target.random(shape, dtype, seed) for seed, shape in enumerate(shapes)]
    strided = [target.random(shape, dtype, seed, view) for seed, shape in enumerate(shapes)]
    grad_out, grad_out_strided = (target.random(shapes[0], dtype, 99, name) for name in ("contiguous", view))
    want = target.run(*plain, grad_out=grad_out, enable_gqa=True)
    got = target.run(*strided, grad_out=grad_out_strided, enable_gqa=True)
    assert got.bits() == want.bits()


def test_strides_of_one_input_at_a_time(target: Target, view: str) -> None:
    """Key and value in different strides, and one operand vectorized while another is not."""
    shape = (1, 65, 2, 40)
    plain = [target.random(shape, target.half, seed) for seed in (1, 2, 3)]
    want = target.run(*plain, is_causal=True).bits()
    for which in range(3):
        inputs = list(plain)
        inputs[which] = target.random(shape, target.half, which + 1, view)
        assert target.run(*inputs, is_causal=True).bits() == want, ("query", "key", "value")[which]


def test_strides_of_out_lse_and_their_gradients(target: Target, view: str) -> None:
    """What the backward pass gets from the forward pass may have been copied or sliced in between."""
    inputs = [target.random((2, 65, 2, 40), target.half, seed) for seed in (1, 2, 3)]
    grad_out, grad_lse = target.random((2, 65, 2, 40), target.half, 4), target.random((2, 2, 65), "float32", 5)
    out, lse = cuflash.scaled_dot_product_attention(*inputs, return_lse=True)
    want = cuflash.scaled_dot_product_attention_backward(grad_out, *inputs, out, lse, grad_lse=grad_lse)
    moved = [target.restride(x, view) for x in (grad_out, out, lse, grad_lse)]
    got = cuflash.scaled_dot_product_attention_backward(moved[0], *inputs, moved[1], moved[2], grad_lse=moved[3])
    assert [target.bits(x) for x in got] == [target.bits(x) for x in want]


@pytest.mark.sample(6)
@pytest.mark.parametrize("dtype", DTYPES)
def test_out_in_any_strides(target: Target, view: str, dtype: str) -> None:
    """`out=` is filled where it is and returned itself; nothing between its elements is written."""
    inputs = [target.random((2, 65, 2, 40), dtype, seed) for seed in (1, 2, 3)]
    want = cuflash.scaled_dot_product_attention(*inputs, is_causal=True)
    out = target.restride(target.place(numpy.zeros_like(target.as_numpy(want))), view)
    got = cuflash.scaled_dot_product_attention(*inputs, is_causal=True, out=out)
    assert got is out
    assert target.bits(out) == target.bits(want)
    assert target.surroundings_are_nan(out)


def test_out_is_returned_beside_lse(target: Target) -> None:
    inputs = [target.random((1, 20, 1, 40), target.half, seed) for seed in (1, 2, 3)]
    out = target.empty_like(inputs[0])
    got = cuflash.scaled_dot_product_attention(*inputs, return_lse=True, out=out)
    want = cuflash.scaled_dot_product_attention(*inputs, return_lse=True)
    assert got[0] is out
    assert [target.bits(x) for x in got] == [target.bits(x) for x in want]


# --- Options ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alignment", ["top_left", "bottom_right"])
@pytest.mark.parametrize(("seqlen_q", "seqlen_kv"), [(1, 130), (50, 200), (200, 50), (130, 1), (129, 128)])
def test_causal_alignment(target: Target, seqlen_q: int, seqlen_kv: int, alignment: str) -> None:
    query = target.random((1, seqlen_q, 2, 40), target.half, seed=1)
    key, value = (target.random((1, seqlen_kv, 2, 40), target.half, seed) for seed in (2, 3))
    results = target.check(query, key, value, is_causal=True, causal_alignment=alignment)
    empty = max(0, seqlen_q - seqlen_kv) if alignment == "bottom_right" else 0
    assert numpy.isneginf(target.host(results.lse)).sum() == 2 * empty


@pytest.mark.sample(5)
@pytest.mark.parametrize("scale", [None, 0.0, -0.3, 1, 0.01, 3.0], ids="scale={}".format)
@pytest.mark.parametrize("dtype", DTYPES)
def test_scale(target: Target, dtype: str, scale: float | None) -> None:
    query, key, value = (target.random((1, 70, 2, 40), dtype, seed) for seed in (1, 2, 3))
    target.check(query, key, value, scale=scale, is_causal=True)


def test_without_return_lse_the_output_alone_comes_back(target: Target) -> None:
    inputs = [target.random((1, 70, 2, 40), target.half, seed) for seed in (1, 2, 3)]
    out, _ = cuflash.scaled_dot_product_attention(*inputs, return_lse=True)
    alone = cuflash.scaled_dot_product_attention(*inputs)
    assert type(alone) is type(inputs[0])
    assert target.bits(alone) == target.bits(out)


def test_grad_lse_none_is_zero(target: Target) -> None:
    inputs = [target.random((1, 70, 2, 40), target.half, seed) for seed in (1, 2, 3)]
    zeros = target.place(numpy.zeros((1, 2, 70), numpy.float32))
    assert target.run(*inputs).bits() == target.run(*inputs, grad_lse=zeros).bits()


def test_gradient_of_lse_alone(target: Target) -> None:
    """dlse/dS = P, without any gradient of the output."""
    inputs = [target.random((1, 70, 2, 40), target.half, seed) for seed in (1, 2, 3)]
    results = target.check(*inputs, grad_out=target.place(numpy.zeros((1, 70, 2, 40), inputs[0].dtype)))
    assert results.grads is not None
    assert not target.host(results.grads[2]).any()
    assert target.host(results.grads[0]).any()


# --- Repetition, remembered calls ---------------------------------------------------------------------------------------------------------


@CAUSAL
def test_the_same_bits_on_every_run(target: Target, is_causal: bool) -> None:
    """Thirty runs, on the simulator each with another interleaving of warps and another moment at which copies arrive."""
    query = target.random((1, 200, 4, 64), target.half, seed=1)
    key, value = (target.random((1, 200, 2, 64), target.half, seed) for seed in (2, 3))
    runs = set()
    for seed in range(30):
        with target.schedule(seed):
            runs.add(target.run(query, key, value, enable_gqa=True, is_causal=is_causal, deterministic=True).bits())
    assert len(runs) == 1


def test_a_kept_call_sees_new_values_at_new_addresses(target: Target) -> None:
    """The second call of a kind goes another way through the code than the first."""
    for seed in (1, 4, 7):
        target.check(
            *(target.random((1, 33, 2, 40), target.half, seed + i) for i in range(3)),
            grad_out=target.random((1, 33, 2, 40), target.half, seed),
        )


def test_a_kept_call_is_not_taken_for_other_options_strides_or_alignment(target: Target) -> None:
    """One after the other in one process, each different from the one before in one thing only."""
    inputs = [target.random((2, 40, 2, 40), target.half, seed) for seed in (1, 2, 3)]
    other_strides = [target.random((2, 40, 2, 40), target.half, seed, "padded_rows") for seed in (1, 2, 3)]
    unaligned = [target.random((2, 40, 2, 40), target.half, seed, "unaligned_base") for seed in (1, 2, 3)]
    for _ in range(2):
        target.check(*inputs)
        target.check(*other_strides)
        target.check(*unaligned)
        target.check(*inputs, is_causal=True)
        target.check(*inputs, scale=0.5)
        target.check(*inputs, scale=1)
        target.check(*inputs, layout="bhsd")
        with pytest.raises(cuflash.OptionError):
            cuflash.scaled_dot_product_attention(*inputs, is_causal=1)  # type: ignore[arg-type]


# --- Random mixtures ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.exhaustive  # test_random_configurations.py has more, with features, under all checks
@pytest.mark.parametrize("seed", range(48), ids="seed{}".format)
def test_random_configuration(target: Target, seed: int) -> None:
    """Everything that varies without a compilation, at once."""
    draw = random.Random(seed)
    dtype, head_dim = draw.choice([("float16", 64), ("bfloat16", 40), ("bfloat16", 128), ("float32", 32), ("float16", 1)])
    seqlen_q, seqlen_kv = (draw.choice([draw.randint(1, 300), draw.choice(LENGTHS)]) for _ in range(2))
    heads_kv, group, batch = draw.choice([1, 1, 2, 3]), draw.choice([1, 1, 2, 3]), draw.choice([1, 1, 2])
    batch_k, batch_v = (draw.choice([1, batch, batch]) for _ in range(2))
    heads_k, heads_v = (draw.choice([1, heads_kv, heads_kv, heads_kv]) for _ in range(2))
    shapes = [
        (batch, seqlen_q, heads_kv * group, head_dim),
        (batch_k, seqlen_kv, heads_k, head_dim),
        (batch_v, seqlen_kv, heads_v, head_dim),
    ]
    views = draw.choices(target.views, k=5)
    query, key, value = (target.random(shape, dtype, seed + i, view) for i, (shape, view) in enumerate(zip(shapes, views, strict=False)))
    out = target.random(shapes[0], dtype, seed + 5, views[4]) if draw.random() < 0.5 else None
    target.check(
        query, key, value,
        grad_out=target.random(shapes[0], dtype, seed + 4, views[3]),
        grad_lse=draw.choice([None, "random"]),
        out=out,
        is_causal=draw.random() < 0.6,
        causal_alignment=draw.choice(["top_left", "bottom_right"]),
        scale=draw.choice([None, None, 0.2, -0.1]),
        enable_gqa=True,
    )  # fmt: skip
