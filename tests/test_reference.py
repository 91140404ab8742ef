"""`reference`: the judge is judged by loops, by finite differences, and by identities that hold for any attention."""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy
import pytest
from conftest import Target
from numpy.typing import NDArray

from cuflash.arrays.borrowing import bfloat16
from cuflash.reference import (
    attention,
    attention_backward,
    attention_naive,
    attention_naive_backward,
    compare,
    from_bfloat16_bits,
    round_to,
    to_bfloat16_bits,
    to_float64,
    varlen_attention,
)

Floats = NDArray[numpy.float64]


def random(*shape: int, seed: int = 0) -> Floats:
    return numpy.random.default_rng([seed, *shape]).standard_normal(shape)


def by_loops(q: Floats, k: Floats, v: Floats, scale: float, offset: int | None) -> tuple[Floats, Floats]:
    """Attention of one head, one query and one key at a time."""
    out, lse = numpy.zeros(q.shape), numpy.full(len(q), -math.inf)
    for i in range(len(q)):
        visible = [j for j in range(len(k)) if offset is None or j <= i + offset]
        weights = [math.exp(scale * float(q[i] @ k[j])) for j in visible]
        if visible:
            lse[i] = math.log(sum(weights))
            out[i] = sum(weight / sum(weights) * v[j] for weight, j in zip(weights, visible, strict=True))
    return out, lse


CASES: list[tuple[tuple[int, int, int, int], tuple[int, int, int, int], tuple[int, int, int, int], dict[str, Any]]] = [
    ((2, 5, 2, 4), (2, 5, 2, 4), (2, 5, 2, 4), {}),
    ((2, 5, 2, 4), (2, 5, 2, 4), (2, 5, 2, 4), {"is_causal": True}),
    ((1, 3, 2, 4), (1, 6, 2, 4), (1, 6, 2, 4), {"is_causal": True}),
    ((1, 3, 2, 4), (1, 6, 2, 4), (1, 6, 2, 4), {"is_causal": True, "causal_alignment": "bottom_right"}),
    ((1, 6, 2, 4), (1, 3, 2, 4), (1, 3, 2, 4), {"is_causal": True, "causal_alignment": "bottom_right"}),
    ((2, 4, 6, 3), (2, 5, 2, 3), (2, 5, 2, 3), {"enable_gqa": True, "scale": 0.3}),
    ((2, 4, 4, 3), (1, 5, 4, 3), (2, 5, 1, 3), {"scale": -0.5}),
    ((2, 4, 4, 3), (1, 5, 1, 3), (1, 5, 1, 3), {"scale": 0.0}),
    ((2, 4, 6, 3), (2, 5, 2, 3), (1, 5, 1, 3), {"enable_gqa": True}),
]


@pytest.mark.parametrize(("q_shape", "k_shape", "v_shape", "options"), CASES)
def test_against_loops(q_shape: Any, k_shape: Any, v_shape: Any, options: dict[str, Any]) -> None:
    q, k, v = random(*q_shape, seed=1), random(*k_shape, seed=2), random(*v_shape, seed=3)
    out, lse = attention(q, k, v, **options)
    assert out.dtype == lse.dtype == numpy.float64
    assert (out.shape, lse.shape) == (q_shape, (q_shape[0], q_shape[2], q_shape[1]))
    offset = None
    if options.get("is_causal"):
        offset = k_shape[1] - q_shape[1] if options.get("causal_alignment") == "bottom_right" else 0
    for b in range(q_shape[0]):
        for h in range(q_shape[2]):
            own_k = k[b % k_shape[0], :, h * k_shape[2] // q_shape[2]]
            own_v = v[b % v_shape[0], :, h * v_shape[2] // q_shape[2]]
            want, want_lse = by_loops(q[b, :, h], own_k, own_v, options.get("scale", q_shape[3] ** -0.5), offset)
            numpy.testing.assert_allclose(out[b, :, h], want, rtol=1e-12, atol=1e-14)
            numpy.testing.assert_allclose(lse[b, h], want_lse, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("q_shape", "k_shape", "v_shape", "options"), CASES)
def test_gradients_against_finite_differences(q_shape: Any, k_shape: Any, v_shape: Any, options: dict[str, Any]) -> None:
    inputs = [random(*q_shape, seed=1), random(*k_shape, seed=2), random(*v_shape, seed=3)]
    grad_out = random(*q_shape, seed=4)
    grad_lse = random(q_shape[0], q_shape[2], q_shape[1], seed=5)

    def loss(shifted: list[Floats]) -> float:
        out, lse = attention(*shifted, **options)
        return float((grad_out * out).sum() + (grad_lse * numpy.where(numpy.isfinite(lse), lse, 0)).sum())

    grads = attention_backward(grad_out, *inputs, grad_lse=grad_lse, **options)
    for which, grad in enumerate(grads):
        assert grad.shape == inputs[which].shape
        direction = random(*grad.shape, seed=6)
        step = 1e-5
        ahead, behind = list(inputs), list(inputs)
        ahead[which], behind[which] = inputs[which] + step * direction, inputs[which] - step * direction
        slope = (loss(ahead) - loss(behind)) / (2 * step)
        assert slope == pytest.approx(float((grad * direction).sum()), rel=1e-7, abs=1e-8)


def test_each_element_of_a_gradient() -> None:
    q, k, v, grad_out = (random(1, 3, 1, 2, seed=seed) for seed in range(4))
    grads = attention_backward(grad_out, q, k, v, is_causal=True)
    for x, grad in zip((q, k, v), grads, strict=True):
        for index in numpy.ndindex(x.shape):
            values = []
            for step in (1e-5, -2e-5):
                x[index] += step
                values.append(float((grad_out * attention(q, k, v, is_causal=True)[0]).sum()))
            x[index] += 1e-5
            assert (values[0] - values[1]) / 2e-5 == pytest.approx(grad[index], rel=1e-7, abs=1e-9)


@pytest.mark.parametrize("layout", ["bhsd", "sbhd", "dhsb"])
def test_layouts(layout: str) -> None:
    order = ["bshd".index(letter) for letter in layout]
    q, k, v, grad_out = random(2, 3, 4, 5, seed=1), random(2, 6, 4, 5, seed=2), random(2, 6, 4, 5, seed=3), random(2, 3, 4, 5, seed=4)
    turned = [x.transpose(order) for x in (grad_out, q, k, v)]
    out, lse = attention(q, k, v, is_causal=True)
    out_turned, lse_turned = attention(*turned[1:], is_causal=True, layout=layout)
    numpy.testing.assert_array_equal(out_turned, out.transpose(order))
    numpy.testing.assert_array_equal(lse_turned, lse)
    for grad, grad_turned in zip(attention_backward(grad_out, q, k, v), attention_backward(*turned, layout=layout), strict=True):
        numpy.testing.assert_array_equal(grad_turned, grad.transpose(order))


def test_rows_that_see_no_key() -> None:
    q, k, grad_out = random(1, 5, 1, 4, seed=1), random(1, 2, 1, 4, seed=2), random(1, 5, 1, 4, seed=3)
    options: dict[str, Any] = {"is_causal": True, "causal_alignment": "bottom_right"}
    out, lse = attention(q, k, k, **options)
    assert (out[:, :3] == 0).all()
    assert numpy.isneginf(lse[..., :3]).all()
    assert numpy.isfinite(lse[..., 3:]).all()
    grad_q, grad_k, grad_v = attention_backward(grad_out, q, k, k, grad_lse=numpy.ones(lse.shape), **options)
    assert (grad_q[:, :3] == 0).all()
    assert numpy.isfinite(grad_k).all()
    assert numpy.isfinite(grad_v).all()


@pytest.mark.parametrize(
    "shapes", [((0, 3, 2, 4), (0, 3, 2, 4)), ((1, 0, 2, 4), (1, 3, 2, 4)), ((1, 3, 2, 4), (1, 0, 2, 4)), ((1, 3, 0, 4),) * 2]
)
def test_nothing_to_compute(shapes: Any) -> None:
    q, k = numpy.zeros(shapes[0]), numpy.zeros(shapes[1])
    out, lse = attention(q, k, k)
    assert out.shape == q.shape
    assert (out == 0).all()
    assert numpy.isneginf(lse).all()
    assert [grad.shape for grad in attention_backward(q, q, k, k)] == [q.shape, k.shape, k.shape]


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_masked_keys_have_no_influence(poison: float) -> None:
    q, k, v, grad_out = (random(1, 6, 1, 4, seed=seed) for seed in range(4))
    options: dict[str, Any] = {"is_causal": True}
    want = (*attention(q, k, v, **options), *attention_backward(grad_out, q, k, v, **options))
    k[:, 4:] = v[:, 4:] = poison
    grad_out[:, 4:] = q[:, 4:] = poison
    got = (*attention(q, k, v, **options), *attention_backward(grad_out, q, k, v, **options))
    for name, x, y in zip(("out", "grad_query"), (got[0], got[2]), (want[0], want[2]), strict=True):
        numpy.testing.assert_array_equal(x[:, :4], y[:, :4], err_msg=name)
    assert not numpy.isfinite(got[0][:, 4:]).any()


def test_wrong_shapes() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        attention(random(1, 3, 4, 2), random(1, 3, 2, 2), random(1, 3, 2, 2))
    with pytest.raises(ValueError, match="not an order"):
        attention(random(1, 3, 4, 2), random(1, 3, 4, 2), random(1, 3, 4, 2), layout="bhsx")
    with pytest.raises(ValueError, match="precision"):
        attention_naive(random(1, 3, 4, 2), random(1, 3, 4, 2), random(1, 3, 4, 2), "float8")  # type: ignore[arg-type]


# --- Rounding ---------------------------------------------------------------------------------------------------------------------------


def test_bfloat16_rounding_is_to_nearest_even() -> None:
    ties = {0x3F808000: 0x3F80, 0x3F818000: 0x3F82, 0x3F808001: 0x3F81, 0x3F807FFF: 0x3F80, 0x7F7FFFFF: 0x7F80, 0x80000001: 0x8000}
    x = numpy.array(list(ties), numpy.uint32).view(numpy.float32)
    assert to_bfloat16_bits(x).tolist() == list(ties.values())
    assert numpy.isnan(from_bfloat16_bits(to_bfloat16_bits(numpy.array([math.nan, -math.nan], numpy.float32)))).all()
    assert from_bfloat16_bits(to_bfloat16_bits(numpy.array([math.inf, -math.inf]))).tolist() == [math.inf, -math.inf]


def test_bfloat16_rounding_as_ml_dtypes() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    bits = numpy.random.default_rng(0).integers(0, 2**32, 100_000, dtype=numpy.uint32)
    x = bits.view(numpy.float32)
    with numpy.errstate(invalid="ignore", over="ignore"):
        want = x.astype(ml_dtypes.bfloat16).astype(numpy.float32)
        numpy.testing.assert_array_equal(round_to(x, "bfloat16"), want)
    every = numpy.arange(2**16, dtype=numpy.uint16)
    numpy.testing.assert_array_equal(from_bfloat16_bits(every), every.view(ml_dtypes.bfloat16).astype(numpy.float32))


def test_kinds_of_arrays(monkeypatch: pytest.MonkeyPatch) -> None:
    x = numpy.arange(6, dtype=numpy.float32).reshape(2, 3)
    bits = to_bfloat16_bits(x)
    others: list[Any] = [x, x.astype("float16"), x.tolist(), bfloat16(bits), bfloat16(bits[::-1])]
    if "torch" in sys.modules:
        torch = sys.modules["torch"]
        others += [torch.tensor(x, requires_grad=True), torch.tensor(x).bfloat16()]
    for other in others:
        assert to_float64(other).dtype == numpy.float64
        assert sorted(to_float64(other).ravel()) == sorted(x.ravel())
    numpy.testing.assert_array_equal(to_float64(bfloat16(bits[::-1])), x[::-1])


# --- The yardstick ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("precision", "low", "high"), [("float16", 1e-5, 3e-3), ("bfloat16", 1e-4, 3e-2), ("float32", 0.0, 2e-6)])
@pytest.mark.parametrize("options", [{}, {"is_causal": True}])
def test_naive_error_is_that_of_its_precision(precision: Any, low: float, high: float, options: dict[str, Any]) -> None:
    q, k, v, grad_out = (round_to(random(1, 64, 2, 16, seed=seed), precision) for seed in range(4))
    got = (*attention_naive(q, k, v, precision, **options), *attention_naive_backward(grad_out, q, k, v, precision, **options))
    want = (*attention(q, k, v, **options), *attention_backward(grad_out, q, k, v, **options))
    for index, (naive, truth) in enumerate(zip(got, want, strict=True)):
        assert naive.dtype == numpy.float64
        error = numpy.abs(naive - truth).max() / numpy.abs(truth).max()
        assert low < error < high or precision == "float32"
        assert error < high
        if index != 1:  # all but lse, which is float32
            numpy.testing.assert_array_equal(round_to(naive, precision), naive)


def test_naive_overflows_as_float16_does() -> None:
    q = numpy.full((1, 2, 1, 4), 300.0)
    out, lse = attention_naive(q, q, q, "float16", scale=1.0)
    assert numpy.isnan(out).all()
    assert not numpy.isfinite(lse).all()


def test_compare_accepts_the_truth_and_the_naive_result() -> None:
    q, k, v = (random(1, 20, 2, 8, seed=seed).astype(numpy.float16) for seed in range(3))
    want, naive = attention(q, k, v)[0], attention_naive(q, k, v, "float16")[0]
    compare(want.astype(numpy.float16), want, naive, name="out")
    compare(naive.astype(numpy.float16), want, naive, name="out")
    compare(numpy.zeros((0, 3), numpy.float16), numpy.zeros((0, 3)), numpy.zeros((0, 3)), name="out")
    compare(bfloat16(to_bfloat16_bits(want)), want, attention_naive(q, k, v, "bfloat16")[0], name="out")


def test_compare_refuses() -> None:
    want = random(3, 4)
    naive = round_to(want, "float16")
    good = want.astype(numpy.float16)

    wrong = good.copy()
    wrong[1, 2] += 0.01
    with pytest.raises(AssertionError, match=r"out: error 9\.5\d*e-03 at \(1, 2\): got .* expected .* naive error .* 1 of 12 elements"):
        compare(wrong, want, naive, name="out")
    wrong[1, 2] = math.nan
    with pytest.raises(AssertionError, match=r"out: NaN in other places than expected, 1 of 12 elements; first at \(1, 2\)"):
        compare(wrong, want, naive, name="out")
    wrong[1, 2] = -math.inf
    with pytest.raises(AssertionError, match=r"lse: -inf in other places"):
        compare(wrong, want, naive, name="lse")
    with pytest.raises(AssertionError, match=r"out: shape \(4,\), expected \(3, 4\)"):
        compare(good[0], want, naive, name="out")


def test_compare_with_infinities_where_they_belong() -> None:
    want = numpy.array([-math.inf, 1.0, math.nan])
    compare(want.astype(numpy.float32), want, want, name="lse")
    compare(want[:1].astype(numpy.float32), want[:1], want[:1], name="lse")


def test_an_overflowing_yardstick_does_not_excuse_errors() -> None:
    want, naive = numpy.array([1.0, 2.0]), numpy.array([math.inf, math.nan])
    with pytest.raises(AssertionError, match="error"):
        compare(numpy.array([1.0, 2.1], numpy.float16), want, naive, name="out")
    compare(numpy.array([1.0, 2.0], numpy.float16), want, naive, name="out")


def test_sums_that_cancel_may_be_off_by_an_epsilon_of_their_terms() -> None:
    """In float32, whatever the type of the result, element by element, and only where the caller knows the terms."""
    want = naive = numpy.array([1e-9, 0.0])
    terms = numpy.array([0.5, 16.0])
    for errors, accepted in (((0.9, 0.9), True), ((0.9, 1.1), False), ((1.1, 0.9), False)):
        got = (want + numpy.array(errors) * terms * 2.0**-23).astype(numpy.float32)
        if accepted:
            compare(got, want, naive, name="grad_query", terms=lambda: terms)
        else:
            with pytest.raises(AssertionError, match="terms that cancel; 1 of 2"):
                compare(got, want, naive, name="grad_query", terms=lambda: terms)
        with pytest.raises(AssertionError, match=r"0\.000e\+00 for terms that cancel; 2 of 2"):
            compare(got, want, naive, name="grad_query")


@pytest.mark.parametrize("options", [{}, {"is_causal": True, "softcap": 2.0}, {"sinks": numpy.ones(2, numpy.float32)}], ids=str)
def test_magnitudes_bound_results_and_are_reached_where_nothing_cancels(options: dict[str, Any]) -> None:
    q, k, v, grad_out = (random(2, 9, 2, 4, seed=seed) for seed in range(4))
    grad_lse = random(2, 2, 9, seed=5)
    out, _ = attention(q, k, v, **options)
    of_out, _ = attention(q, k, v, magnitudes=True, **options)
    assert (of_out >= numpy.abs(out) - 1e-12).all()
    for given in ({}, {"out": out}):
        grads = attention_backward(grad_out, q, k, v, grad_lse=grad_lse, **given, **options)
        terms = attention_backward(grad_out, q, k, v, grad_lse=grad_lse, magnitudes=True, **given, **options)
        for grad, of_grad in zip((*grads, grads.sinks), (*terms, terms.sinks), strict=True):
            assert grad is None or (of_grad >= numpy.abs(grad) - 1e-12).all()
    positive = [numpy.abs(x) for x in (q, k, v, grad_out)]
    numpy.testing.assert_allclose(attention(*positive[:3], magnitudes=True)[0], attention(*positive[:3])[0])
    one_key = positive[1][:, :1]
    score = (positive[0] * one_key).sum(axis=3).transpose(0, 2, 1) / 2
    numpy.testing.assert_allclose(attention(positive[0], one_key, one_key, magnitudes=True)[1], score)
    no_scores = [0 * positive[0], *positive[1:3]]
    numpy.testing.assert_allclose(
        attention_backward(positive[3], *no_scores, magnitudes=True).value, attention_backward(positive[3], *no_scores).value
    )


def test_a_given_output_is_what_delta_comes_from() -> None:
    q, k, v, grad_out = (random(1, 7, 2, 4, seed=seed) for seed in range(4))
    out, _ = attention(q, k, v)
    exact, given = attention_backward(grad_out, q, k, v), attention_backward(grad_out, q, k, v, out=out)
    for x, y in zip(exact, given, strict=True):
        numpy.testing.assert_allclose(x, y, atol=1e-14)
    shift = numpy.ones((1, 7, 2, 1)) * grad_out / (grad_out**2).sum(axis=3, keepdims=True)  # delta grows by one in every row
    moved = attention_backward(grad_out, q, k, v, out=out + shift)
    as_lse = attention_backward(grad_out, q, k, v, grad_lse=-numpy.ones((1, 2, 7)))
    for x, y in zip(moved, as_lse, strict=True):
        numpy.testing.assert_allclose(x, y, atol=1e-14)


def test_unequal_bits_of_arrays_are_told_briefly() -> None:
    """pytest would explain unequal bytes by a diff, which before its version 9.2 takes hours with -v."""
    some, others = numpy.random.default_rng(1).standard_normal((2, 33280)).astype(numpy.float16)
    assert Target.bits(some) == Target.bits(some.copy())
    assert len({Target.bits(some), Target.bits(some.copy()), Target.bits(others)}) == 2
    with pytest.raises(AssertionError) as caught:
        assert Target.bits(some) == Target.bits(others)
    assert "66560 bytes, sha256" in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_slopes_of_packed_sequences_that_are_the_same_for_all() -> None:
    x = numpy.random.default_rng(3).standard_normal((9, 2, 4))
    offsets, slopes = numpy.array([0, 4, 9], numpy.int32), numpy.array([[0.1, 0.4]])
    same = varlen_attention(x, x, x, offsets, offsets, alibi_slopes=slopes)
    for others in (slopes[0], numpy.repeat(slopes, 2, axis=0)):
        assert all(map(numpy.array_equal, same, varlen_attention(x, x, x, offsets, offsets, alibi_slopes=others)))
    assert not numpy.array_equal(same[0], varlen_attention(x, x, x, offsets, offsets, alibi_slopes=slopes * [[1], [2]])[0])
