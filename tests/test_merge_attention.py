"""`merge_attention` and its gradient: exact for any number of parts, in all forms of arrays, at all magnitudes of lse."""

from __future__ import annotations

import re
from typing import Any

import numpy
import pytest
from conftest import ELEMENTS, Target, rounded

import cuflash
from cuflash import merging
from cuflash.cli import inspection
from cuflash.errors import ArgumentError, CompilationForbiddenError, DeviceError, DTypeError, OptionError, ShapeError, UnsupportedError
from cuflash.hardware.device import ARCHITECTURES, of_arch
from cuflash.planning.kernel_specs import MERGE_ATTENTION, MERGE_ATTENTION_BACKWARD, MERGE_TABLE
from cuflash.reference import EPSILON, attention, to_float64
from cuflash.runtime import calls

B, S, H, D = 2, 13, 3, 24


# --- The judge ----------------------------------------------------------------------------------------------------------------------------


def weights_of(lses: Any) -> tuple[Any, Any]:
    """exp(lses - lse) of parts along the first axis, and lse, in float64: from differences, since at 3e38 float64 has no bits for the sum either."""
    lses = numpy.stack([to_float64(x) for x in lses])
    largest = lses.max(axis=0)
    exponentials = numpy.exp(lses - numpy.where(numpy.isneginf(largest), 0, largest))
    total = exponentials.sum(axis=0)
    with numpy.errstate(divide="ignore"):
        return exponentials / numpy.where(total == 0, 1, total), largest + numpy.log(total)


def as_columns(rows: Any, order: str) -> Any:
    """(…, batch, heads, seqlen) to what multiplies an out; `order` may be "shd" for packed sequences."""
    axes = [{"b": 0, "h": 1, "s": 2}[letter] if "b" in order else {"h": 0, "s": 1}[letter] for letter in order.replace("d", "")]
    moved = numpy.moveaxis(rows, [axis + rows.ndim - len(axes) for axis in axes], range(rows.ndim - len(axes), rows.ndim))
    return numpy.expand_dims(moved, rows.ndim - len(axes) + order.index("d"))


def expected(outs: Any, lses: Any, order: str = "bshd") -> tuple[Any, Any]:
    weights, lse = weights_of(lses)
    values = [numpy.where(as_columns(w, order) > 0, to_float64(out), 0) for w, out in zip(weights, outs, strict=True)]
    return sum(as_columns(w, order) * x for w, x in zip(weights, values, strict=True)), lse


def expected_gradients(grad_out: Any, outs: Any, lses: Any, out: Any, grad_lse: Any, order: str = "bshd") -> tuple[Any, Any]:
    """Of the given `out`, as the backward passes of attention are judged too."""
    weights, _ = weights_of(lses)
    grad_out, rows = to_float64(grad_out), 0 if grad_lse is None else to_float64(grad_lse)
    along = order.index("d")

    def dot(x: Any) -> Any:
        summed = (grad_out * to_float64(x)).sum(axis=along)
        return summed.transpose([order.replace("d", "").index(letter) for letter in ("bhs" if "b" in order else "hs")])

    of_outs = numpy.stack([as_columns(w, order) * grad_out for w in weights])
    of_lses = numpy.stack([w * (numpy.where(w > 0, dot(x), 0) - dot(out) + rows) for w, x in zip(weights, outs, strict=True)])
    return of_outs, of_lses


def close(got: Any, want: Any, dtype: str, epsilons: float = 4) -> None:
    got, scale = to_float64(got), max(1.0, float(numpy.abs(want[numpy.isfinite(want)]).max(initial=0)))
    numpy.testing.assert_allclose(got, want, rtol=epsilons * EPSILON[dtype], atol=epsilons * EPSILON[dtype] * scale)


def parts_of(
    target: Target, dtype: str, count: int, shape: tuple[int, ...] = (B, S, H, D), order: str = "bshd", spread: float = 3.0, seed: int = 0
) -> Any:
    """Outs and lses; in one row all parts are empty, in others some."""
    rows = numpy.random.default_rng(seed)
    extents = dict(zip(order, shape, strict=True))
    lse_shape = tuple(extents[letter] for letter in ("bhs" if "b" in order else "hs"))
    outs, lses = [], []
    for i in range(count):
        outs.append(
            target.random(shape, dtype, seed + 10 * i + 1) if len(shape) == 4 else target.random((1, *shape), dtype, seed + 10 * i + 1)[0]
        )
        lse = (spread * rows.standard_normal(lse_shape)).astype(numpy.float32)
        lse[..., 3] = -numpy.inf
        if count > 1:
            lse[rows.random(lse_shape) < 0.2] = -numpy.inf
        lses.append(target.place(lse))
    return outs, lses


def check(target: Target, outs: Any, lses: Any, dtype: str, order: str = "bshd", layout: str = "bshd") -> Any:
    """Both calls on the parts, judged; lists of arrays that have four dimensions or are packed sequences."""
    out, lse = cuflash.merge_attention(outs, lses, layout=layout)
    want, want_lse = expected(outs, lses, order)
    close(out, want, dtype, 2)
    close(lse, want_lse, "float32")
    assert (numpy.isneginf(target.host(lse)) == numpy.isneginf(want_lse)).all()
    assert str(out.dtype) == dtype
    grad_out = target.place(rounded(numpy.random.default_rng(5).standard_normal(want.shape), dtype))
    grad_lse = target.place(numpy.random.default_rng(6).standard_normal(want_lse.shape).astype(numpy.float32))
    for given in (grad_lse, None):
        grads = cuflash.merge_attention_backward(grad_out, outs, lses, out, lse, given, layout=layout)
        of_outs, of_lses = expected_gradients(grad_out, outs, lses, out, given, order)
        close(numpy.stack([to_float64(x) for x in grads.outs]), of_outs, dtype, 2)
        close(numpy.stack([to_float64(x) for x in grads.lses]), of_lses, "float32", 4 * D**0.5)
    return grads


# --- Results ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 5, 16, 17, 40])
@pytest.mark.parametrize("dtype", list(ELEMENTS))
def test_parts_in_a_list(target: Target, dtype: str, count: int) -> None:
    """Above 16, parts are listed in a table on the device."""
    grads = check(target, *parts_of(target, dtype, count), dtype)
    assert isinstance(grads.outs, tuple)
    assert len(grads.outs) == len(grads.lses) == count


@pytest.mark.parametrize("dtype", list(ELEMENTS))
def test_one_part_comes_back_as_it_is(target: Target, dtype: str) -> None:
    outs, lses = parts_of(target, dtype, 1)
    out, lse = cuflash.merge_attention(outs, lses)
    rows = ~numpy.isneginf(target.host(lse)).transpose(0, 2, 1)
    assert (target.host(out)[rows] == target.host(outs[0])[rows]).all()
    assert not target.host(out)[~rows].any()
    assert target.bits(lse) == target.bits(lses[0])
    grad_out, grad_lse = target.random(outs[0].shape, dtype, 7), target.random(lses[0].shape, "float32", 8)
    grads = cuflash.merge_attention_backward(grad_out, outs, lses, out, lse, grad_lse)
    assert (target.host(grads.outs[0])[rows] == target.host(grad_out)[rows]).all()
    seen = ~numpy.isneginf(target.host(lse))
    numpy.testing.assert_allclose(target.host(grads.lses[0])[seen], target.host(grad_lse)[seen], rtol=1e-6, atol=1e-6)
    assert not target.host(grads.lses[0])[~seen].any()


@pytest.mark.parametrize("head_dim", [1, 7, 8, 40, 64, 100, 256, 264, 576])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_any_head_dim_without_another_kernel(simulator: Target, dtype: str, head_dim: int) -> None:
    check(simulator, *parts_of(simulator, dtype, 3, (1, 9, 2, head_dim)), dtype)


@pytest.mark.parametrize("order", ["bhsd", "sbhd", "dhsb"])
def test_layouts(target: Target, order: str) -> None:
    shape = tuple(dict(zip("bshd", (B, S, H, D), strict=True))[letter] for letter in order)
    check(target, *parts_of(target, target.half, 3, shape, order), target.half, order, order)


def test_heads_and_head_dim_in_one_dimension(simulator: Target) -> None:
    """The lses say how many heads there are."""
    outs, lses = parts_of(simulator, "float16", 2)
    out, lse = cuflash.merge_attention(outs, lses)
    flat = [x.reshape(B, S, H * D) for x in outs]
    got, got_lse = cuflash.merge_attention(flat, lses)
    assert got.shape == (B, S, H * D)
    assert simulator.bits(got) == simulator.bits(out)
    assert simulator.bits(got_lse) == simulator.bits(lse)
    recurrent = [numpy.ascontiguousarray(x.swapaxes(0, 1)) for x in flat]
    got, _ = cuflash.merge_attention(recurrent, lses, layout="sbhd")
    assert simulator.bits(got.swapaxes(0, 1)) == simulator.bits(out)


@pytest.mark.parametrize("dtype", ["half", "float32"])
def test_packed_sequences(target: Target, dtype: str) -> None:
    dtype = target.half if dtype == "half" else dtype
    check(target, *parts_of(target, dtype, 3, (S, H, D), "shd"), dtype, "shd")


@pytest.mark.parametrize("head_dim", [8, 72, 264])
def test_few_rows_share_out_their_parts_among_more_threads(target: Target, head_dim: int) -> None:
    rng = numpy.random.default_rng(head_dim)
    for seqlen, count in ((1, 2), (1, 33), (3, 33), (2, 150)):
        outs = rng.standard_normal((count, 2, seqlen, 3, head_dim), "f4")
        lses = 5 * rng.standard_normal((count, 2, 3, seqlen), "f4")
        empty = rng.random(lses.shape) < 0.3
        empty[:, 0, 0, 0] = True
        lses[empty] = -numpy.inf
        outs[numpy.moveaxis(empty, 2, 3)] = numpy.nan
        out, lse = (target.as_numpy(x) for x in cuflash.merge_attention(target.place(outs), target.place(lses)))
        wanted, wanted_lse = expected(outs, lses)
        numpy.testing.assert_allclose(out, wanted, rtol=1e-5, atol=1e-6)
        numpy.testing.assert_allclose(lse, wanted_lse, rtol=1e-6)


def test_any_strides(target: Target, view: str) -> None:
    outs, lses = parts_of(target, target.half, 3)
    check(target, [target.restride(x, view) for x in outs], [target.restride(x, view) for x in lses], target.half)


def test_each_part_with_strides_of_its_own(simulator: Target) -> None:
    outs, lses = parts_of(simulator, "bfloat16", 8)
    outs = [simulator.restride(x, view) for x, view in zip(outs, simulator.views, strict=True)]
    check(simulator, outs, lses, "bfloat16")


def test_one_array_or_a_list(target: Target) -> None:
    """The same bits, and gradients in the form of each argument; no limit of parts on either."""
    outs, lses = parts_of(target, target.half, 20)
    stacked = target.place(numpy.stack([target.as_numpy(x) for x in outs])), target.place(numpy.stack([target.as_numpy(x) for x in lses]))
    out, lse = cuflash.merge_attention(outs, lses)
    grad_out = target.random(out.shape, target.half, 3)
    want = cuflash.merge_attention_backward(grad_out, outs, lses, out, lse)
    for of_outs, of_lses in ((stacked[0], stacked[1]), (tuple(outs), stacked[1]), (stacked[0], lses)):
        got, got_lse = cuflash.merge_attention(of_outs, of_lses)
        assert target.bits(got) == target.bits(out)
        assert target.bits(got_lse) == target.bits(lse)
        grads = cuflash.merge_attention_backward(grad_out, of_outs, of_lses, out, lse)
        assert isinstance(grads.outs, tuple) == isinstance(of_outs, (list, tuple))
        assert isinstance(grads.lses, tuple) == isinstance(of_lses, (list, tuple))
        for name in ("outs", "lses"):
            assert [target.bits(x) for x in getattr(grads, name)] == [target.bits(x) for x in getattr(want, name)]


def test_the_same_part_again_and_again(simulator: Target) -> None:
    """Parts of one array may be the same memory, along an axis with stride 0 or as items of a list."""
    outs, lses = parts_of(simulator, "float32", 1)
    out, lse = cuflash.merge_attention(*(numpy.broadcast_to(x[0], (6, *x[0].shape)) for x in (outs, lses)))
    again, _ = cuflash.merge_attention(outs * 6, lses * 6)
    close(lse, to_float64(lses[0]) + numpy.log(6), "float32")
    assert simulator.bits(out) == simulator.bits(again)
    rows = ~numpy.isneginf(lse).transpose(0, 2, 1)
    close(out[rows], to_float64(outs[0])[rows], "float32")


def test_attention_over_chunks_is_attention_over_all_keys(target: Target) -> None:
    query, key, value = (target.random((B, n, H, D), "float32", seed) for seed, n in enumerate((S, 50, 50)))
    edges = [slice(0, 7), slice(7, 7), slice(7, 40), slice(40, 50)]
    parts = [cuflash.scaled_dot_product_attention(query, key[:, keys], value[:, keys], return_lse=True) for keys in edges]
    out, lse = cuflash.merge_attention(*zip(*parts, strict=True))
    want, want_lse = attention(query, key, value)
    close(out, want, "float32", 8)
    close(lse, want_lse, "float32", 8)


def test_merging_what_was_merged(simulator: Target) -> None:
    outs, lses = parts_of(simulator, "float32", 7)
    first, second = (cuflash.merge_attention(outs[part], lses[part]) for part in (slice(0, 3), slice(3, 7)))
    out, lse = cuflash.merge_attention([first[0], second[0]], [first[1], second[1]])
    want, want_lse = expected(outs, lses)
    close(out, want, "float32")
    close(lse, want_lse, "float32")


def test_no_rows(simulator: Target) -> None:
    out, lse = cuflash.merge_attention([numpy.zeros((2, 0, 3, 8), "f4")], [numpy.zeros((2, 3, 0), "f4")])
    assert out.shape == (2, 0, 3, 8)
    assert lse.shape == (2, 3, 0)


# --- Magnitudes ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [-3.4e38, -3e38, -1e9, -1e4, -300.0, 300.0, 1e4, 3e38])
def test_lses_of_any_size(target: Target, shift: float) -> None:
    """Weights come from differences, which are exact; lse itself is as exact as float32 can hold."""
    outs, lses = parts_of(target, "float32", 3, spread=0)
    lses = [target.place(target.as_numpy(x) + numpy.float32(shift)) for x in lses]
    check(target, outs, lses, "float32")


@pytest.mark.parametrize("difference", [50.0, 87.5, 103.0, 200.0, 1e4, 3e38])
def test_parts_that_differ_by_any_amount(simulator: Target, difference: float) -> None:
    outs, lses = parts_of(simulator, "float32", 2)
    lses[1] = lses[1] - numpy.float32(difference)
    check(simulator, outs, lses, "float32")


def test_largest_and_smallest_numbers(simulator: Target) -> None:
    """Differences that overflow are infinite, and their weight 0."""
    outs, lses = parts_of(simulator, "float32", 2)
    lses = [numpy.full_like(lses[0], 3.4e38), numpy.full_like(lses[0], -3.4e38)]
    out, lse = cuflash.merge_attention(outs, lses)
    assert (out == outs[0]).all()
    assert (lse == lses[0]).all()


# --- Empty parts, NaN and infinities ------------------------------------------------------------------------------------------------------


def test_whatever_an_empty_part_holds_changes_nothing(target: Target) -> None:
    outs, lses = parts_of(target, target.half, 3)
    out, lse = cuflash.merge_attention(outs, lses)
    grad_out = target.random(out.shape, target.half, 4)
    grads = cuflash.merge_attention_backward(grad_out, outs, lses, out, lse)
    spoilt = []
    for one, rows in zip(outs, lses, strict=True):
        values = target.as_numpy(one).copy()
        values[numpy.isneginf(target.as_numpy(rows)).transpose(0, 2, 1)] = numpy.nan
        spoilt.append(target.place(values))
    again, again_lse = cuflash.merge_attention(spoilt, lses)
    assert target.bits(again) == target.bits(out)
    assert target.bits(again_lse) == target.bits(lse)
    from_spoilt = cuflash.merge_attention_backward(grad_out, spoilt, lses, out, lse)
    for got, want in zip((*from_spoilt.outs, *from_spoilt.lses), (*grads.outs, *grads.lses), strict=True):
        assert target.bits(got) == target.bits(want)


def test_rows_without_keys_have_no_gradient(simulator: Target) -> None:
    outs, lses = parts_of(simulator, "float32", 2)
    out, lse = cuflash.merge_attention(outs, lses)
    assert not out[:, 3].any()
    assert numpy.isneginf(lse[..., 3]).all()
    grad_out, grad_lse = numpy.ones_like(out), numpy.ones_like(lse)
    grad_out[:, 3], grad_lse[..., 3] = numpy.nan, numpy.nan
    grads = cuflash.merge_attention_backward(grad_out, outs, lses, out, lse, grad_lse)
    assert not any(x[:, 3].any() for x in grads.outs)
    assert not any(x[..., 3].any() for x in grads.lses)
    assert not any(numpy.isnan(x).any() for x in (*grads.outs, *grads.lses))


@pytest.mark.parametrize("what", [numpy.nan, numpy.inf])
def test_lses_that_are_no_numbers_make_the_row_nan(simulator: Target, what: float) -> None:
    outs, lses = parts_of(simulator, "float32", 3)
    lses[1][1, 2, 5] = what
    out, lse = cuflash.merge_attention(outs, lses)
    assert numpy.isnan(out[1, 5, 2]).all()
    assert numpy.isnan(lse[1, 2, 5])
    assert numpy.isnan(out).sum() == D
    assert numpy.isnan(lse).sum() == 1


def test_nan_in_out_stays_where_it_is(simulator: Target) -> None:
    outs, lses = parts_of(simulator, "float32", 3)
    lses[1][0, 0, 0] = 0
    outs[1][0, 0, 0, 7] = numpy.nan
    out, lse = cuflash.merge_attention(outs, lses)
    assert numpy.argwhere(numpy.isnan(out)).tolist() == [[0, 0, 0, 7]]
    assert not numpy.isnan(lse).any()


# --- Gradients ----------------------------------------------------------------------------------------------------------------------------


def test_gradients_are_derivatives(simulator: Target) -> None:
    """Of the float64 formula, by central differences."""
    outs, lses = parts_of(simulator, "float32", 3, (1, 5, 1, 4), seed=3)
    lses = [numpy.where(numpy.isneginf(x), numpy.float32(0.5), x) for x in lses]
    out, lse = cuflash.merge_attention(outs, lses)
    grad_out, grad_lse = simulator.random(out.shape, "float32", 4), simulator.random(lse.shape, "float32", 5)
    grads = cuflash.merge_attention_backward(grad_out, outs, lses, out, lse, grad_lse)

    def loss(outs: Any, lses: Any) -> float:
        merged, whole = expected(outs, lses)
        return float((merged * to_float64(grad_out)).sum() + (whole * to_float64(grad_lse)).sum())

    exact = [[to_float64(x) for x in parts] for parts in (outs, lses)]
    for which, found in enumerate(grads):
        for i, one in enumerate(found):
            for index in numpy.ndindex(one.shape):
                values = []
                for step in (1e-5, -1e-5):
                    moved = [[x.copy() for x in parts] for parts in exact]
                    moved[which][i][index] += step
                    values.append(loss(*moved))
                assert abs((values[0] - values[1]) / 2e-5 - one[index]) < 1e-5


@pytest.mark.parametrize("shift", [0.0, 300.0, -1e4])
def test_gradients_of_some_of_the_parts(target: Target, shift: float) -> None:
    """With out and lse of all of them, a part's gradients do not depend on which others are given."""
    outs, lses = parts_of(target, "float32", 4)
    lses = [target.place(target.as_numpy(x) + numpy.float32(shift)) for x in lses]
    out, lse = cuflash.merge_attention(outs, lses)
    grad_out, grad_lse = target.random(out.shape, "float32", 4), target.random(lse.shape, "float32", 5)
    every = cuflash.merge_attention_backward(grad_out, outs, lses, out, lse, grad_lse)
    some = cuflash.merge_attention_backward(grad_out, outs[1:3], lses[1:3], out, lse, grad_lse)
    tolerance = 1e-5 + 2.0**-22 * abs(shift)
    for name in ("outs", "lses"):
        for got, want in zip(getattr(some, name), getattr(every, name)[1:3], strict=True):
            numpy.testing.assert_allclose(target.host(got), target.host(want), rtol=tolerance, atol=10 * tolerance)


def test_gradients_are_exact_where_lse_lost_its_sum(simulator: Target) -> None:
    """Four equal parts at -1e9: exp(lses - lse) is 1 for each, and the weight 1/4."""
    outs, lses = parts_of(simulator, "float32", 4)
    lses = [numpy.full_like(x, -1e9) for x in lses]
    out, lse = cuflash.merge_attention(outs, lses)
    grad_out = simulator.random(out.shape, "float32", 4)
    grads = cuflash.merge_attention_backward(grad_out, outs, lses, out, lse)
    for of_part in grads.outs:
        numpy.testing.assert_allclose(of_part, grad_out / 4, rtol=1e-6)


# --- Kinds of arrays ----------------------------------------------------------------------------------------------------------------------


def test_torch_tensors(simulator: Target) -> None:
    torch = pytest.importorskip("torch")
    outs, lses = parts_of(simulator, "float32", 18)
    want, want_lse = cuflash.merge_attention(outs, lses)
    tensors = [torch.from_numpy(x) for x in outs], [torch.from_numpy(x) for x in lses]
    out, lse = cuflash.merge_attention(*tensors)
    assert isinstance(out, torch.Tensor)
    assert simulator.bits(out.numpy()) == simulator.bits(want)
    assert simulator.bits(lse.numpy()) == simulator.bits(want_lse)
    grads = cuflash.merge_attention_backward(out, *tensors, out, lse)
    assert all(isinstance(x, torch.Tensor) for x in (*grads.outs, *grads.lses))
    tensors[0][4].requires_grad_()
    with pytest.raises(UnsupportedError, match=r"outs\[4\].*merge_attention_backward"):
        cuflash.merge_attention(*tensors)


def test_tagged_bfloat16(simulator: Target) -> None:
    outs, lses = parts_of(simulator, "bfloat16", 3)
    tagged = [cuflash.bfloat16(x.view(numpy.uint16)) for x in outs]
    want, _ = cuflash.merge_attention(outs, lses)
    for form in (tagged, cuflash.bfloat16(numpy.stack([x.bits for x in tagged]))):
        out, lse = cuflash.merge_attention(form, lses if form is tagged else numpy.stack(lses))
        assert simulator.bits(out) == simulator.bits(want)
        grads = cuflash.merge_attention_backward(out, form, lses, out, lse)
        assert all(isinstance(x, cuflash.BFloat16Bits) for x in (grads.outs if form is tagged else [grads.outs]))


def test_warm_calls_are_not_checked_again(simulator: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """But others are: another number of parts, strides, layout, or alignment of one part."""
    checked = []
    original = merging._check_parts
    monkeypatch.setattr(merging, "_check_parts", lambda *arguments: checked.append(1) or original(*arguments))
    calls._calls.clear()
    for count in (2, 2, 3, 3):
        cuflash.merge_attention(*parts_of(simulator, "float16", count, seed=len(checked)))
    assert len(checked) == 2
    outs, lses = parts_of(simulator, "float16", 2)
    outs[1] = simulator.restride(outs[1], "unaligned_base")
    out, _ = cuflash.merge_attention(outs, lses)
    close(out, expected(outs, lses)[0], "float16")
    assert len(checked) == 3


# --- Bad input ----------------------------------------------------------------------------------------------------------------------------


def zeros(*shape: int, dtype: str = "float16") -> Any:
    return numpy.zeros(shape, dtype)


OUT, LSE = zeros(B, S, H, D), zeros(B, H, S, dtype="float32")
BAD: dict[str, tuple[Any, Any, dict[str, Any], type[ArgumentError], str]] = {
    "no parts": ([], [], {}, ShapeError, "outs"),
    "no parts of one array": (OUT[None][:0], LSE[None][:0], {}, ShapeError, "outs"),
    "no list": (3.0, [LSE], {}, ShapeError, "outs"),
    "None": (None, [LSE], {}, ShapeError, "outs"),
    "a list of numbers": ([1.0], [LSE], {}, DTypeError, "outs[0]"),
    "a part left out": ([OUT, OUT], [LSE], {}, ShapeError, "lses"),
    "another shape": ([OUT, OUT[:, 1:]], [LSE, LSE], {}, ShapeError, "outs[1]"),
    "lse of another shape": ([OUT, OUT], [LSE, LSE[..., 1:]], {}, ShapeError, "lses[1]"),
    "another type": ([OUT, OUT.astype("float32")], [LSE, LSE], {}, DTypeError, "outs[1]"),
    "float64": ([OUT.astype("float64")], [LSE], {}, DTypeError, "outs[0]"),
    "lse of 16 bits": ([OUT], [LSE.astype("float16")], {}, DTypeError, "lses[0]"),
    "lse in the order of out": ([OUT], [LSE.swapaxes(1, 2)], {}, ShapeError, "lses"),
    "one part without a first axis": (OUT[0], LSE[0], {}, ShapeError, "lses"),
    "two dimensions": ([OUT[0, 0]], [LSE[0, 0]], {}, ShapeError, "outs"),
    "heads that do not divide": ([zeros(B, S, 70)], [LSE], {}, ShapeError, "outs"),
    "no head_dim": ([OUT[..., :0]], [LSE], {}, ShapeError, "outs"),
    "layout": ([OUT], [LSE], {"layout": "bsh"}, OptionError, "layout"),
    "layout that is a list": ([OUT], [LSE], {"layout": ["b"]}, OptionError, "layout"),
    "layout of three dimensions": ([zeros(B, S, H * D)], [LSE], {"layout": "bhsd"}, OptionError, "layout"),
    "layout of packed sequences": ([OUT[0]], [LSE[0]], {"layout": "bhsd"}, OptionError, "layout"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_parts(simulator: Target, case: str) -> None:
    outs, lses, options, error, argument = BAD[case]
    with pytest.raises(error) as caught:
        cuflash.merge_attention(outs, lses, **options)
    assert caught.value.argument == argument
    assert caught.value.hint
    with pytest.raises(error):
        cuflash.merge_attention_backward(OUT, outs, lses, OUT, LSE, **options)


def test_two_libraries(simulator: Target) -> None:
    torch = pytest.importorskip("torch")
    with pytest.raises(DeviceError) as caught:
        cuflash.merge_attention([OUT, torch.from_numpy(OUT)], [LSE, LSE])
    assert caught.value.argument == "outs[1]"


def test_what_was_exchanged_or_not_taken_apart_is_said(simulator: Target) -> None:
    outs, lses = parts_of(simulator, "float16", 16)
    with pytest.raises(ShapeError, match="exchanged: outs come first"):
        cuflash.merge_attention(lses, outs)
    with pytest.raises(ShapeError, match=re.escape("merge_attention(*zip(*pairs))")):
        cuflash.merge_attention(list(zip(outs, lses, strict=True)), None)


@pytest.mark.parametrize(
    ("name", "given", "error"),
    [
        ("out", OUT[:, 1:], ShapeError), ("grad_out", OUT.astype("float32"), DTypeError), ("lse", LSE[0], ShapeError),
        ("grad_lse", LSE.astype("float16"), DTypeError), ("out", None, DTypeError),
    ],
)  # fmt: skip
def test_bad_results(simulator: Target, name: str, given: Any, error: type[ArgumentError]) -> None:
    arguments = {"grad_out": OUT, "outs": [OUT], "lses": [LSE], "out": OUT, "lse": LSE, "grad_lse": LSE, name: given}
    with pytest.raises(error) as caught:
        cuflash.merge_attention_backward(**arguments)
    assert caught.value.argument == name


# --- Kernels -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_disassembly")
@pytest.mark.sample(3)
@pytest.mark.parametrize("dtype", list(ELEMENTS))
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_no_spills(arch: str, dtype: str) -> None:
    """Parts are indexed in the parameter, which no compiler has to copy to the stack for that."""
    pytest.importorskip("cupy")
    on = of_arch(arch, "gpu")
    kernels = (MERGE_ATTENTION, MERGE_ATTENTION_BACKWARD, MERGE_TABLE)
    for report in inspection.inspect_kernels((on, merging.merge_kernel(kernel, on, dtype, 1)) for kernel in kernels):
        assert report.spills == 0
        assert report.resources.stack_bytes == 0
        assert report.warnings == ()


# --- An array for the result --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("result", ["half", "float32"])
def test_into_an_array_of_the_caller(target: Target, view: str, result: str) -> None:
    """Of any strides; its dtype may have 16 bits where the parts have 32, which are rounded once, and whose gradients have 32."""
    dtype = target.half if result == "half" else result
    outs, lses = parts_of(target, "float32", 3)
    want, want_lse = cuflash.merge_attention(outs, lses)
    out = target.restride(target.random((B, S, H, D), dtype, 1), view)
    merged, lse = cuflash.merge_attention(outs, lses, out=out)
    assert merged is out
    assert target.bits(lse) == target.bits(want_lse)
    assert target.bits(out) == target.bits(target.place(rounded(target.as_numpy(want), dtype)))
    grad_out = target.random((B, S, H, D), dtype, 5)
    grads = cuflash.merge_attention_backward(grad_out, outs, lses, out, lse)
    of_outs, of_lses = expected_gradients(grad_out, outs, lses, out, None)
    assert {str(x.dtype).removeprefix("torch.") for x in grads.outs} == {"float32"}
    close(numpy.stack([to_float64(x) for x in grads.outs]), of_outs, "float32", 2)
    close(numpy.stack([to_float64(x) for x in grads.lses]), of_lses, "float32", 4 * D**0.5)


def test_more_parts_than_fit_a_parameter_into_an_array_of_the_caller(simulator: Target) -> None:
    outs, lses = parts_of(simulator, "float32", 17, (S, H, D), "shd")
    out = numpy.zeros((S, H, D), "float16")
    cuflash.merge_attention(outs, lses, out=out)
    assert simulator.bits(out) == simulator.bits(cuflash.merge_attention(outs, lses)[0].astype("float16"))


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda outs, out: outs[1], ArgumentError, r"out: got an array that shares memory with outs\[1\]"),
        (lambda outs, out: out[:, :5], ShapeError, r"out: got shape \(2, 5, 3, 24\)"),
        (lambda outs, out: out.astype("float64"), DTypeError, "out: got float64; expected float32"),
        (lambda outs, out: numpy.broadcast_to(out[:1], out.shape), ArgumentError, "out: got a read-only"),
        (lambda outs, out: 1.0, ArgumentError, "out: "),
    ],
)
def test_arrays_that_cannot_hold_the_result(simulator: Target, spoil: Any, error: type[Exception], message: str) -> None:
    """Also where a call like it has run before: memory that is shared and flags are no part of what such calls are known by."""
    outs, lses = parts_of(simulator, "float32", 2)
    out = numpy.zeros((B, S, H, D), "float32")
    cuflash.merge_attention(outs, lses, out=out)
    with pytest.raises(error, match=message):
        cuflash.merge_attention(outs, lses, out=spoil(outs, out))


def test_sixteen_bits_are_not_merged_into_others(simulator: Target) -> None:
    outs, lses = parts_of(simulator, "float16", 2)
    with pytest.raises(DTypeError, match="out: got float32; expected float16, like outs"):
        cuflash.merge_attention(outs, lses, out=numpy.zeros((B, S, H, D), "float32"))
    wide, _ = parts_of(simulator, "float32", 2)
    with pytest.raises(DTypeError, match="grad_out: got float32; expected float16, like out"):
        cuflash.merge_attention_backward(wide[0], wide, lses, outs[0], lses[0])


# --- Compiled ahead -----------------------------------------------------------------------------------------------------------------------


def test_after_warmup_nothing_is_compiled(simulator: Target, cold_cache: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    outs, lses = parts_of(simulator, "float32", 17)
    out = numpy.zeros((B, S, H, D), "float16")
    monkeypatch.setenv("CUFLASH_COMPILE", "forbid")
    with pytest.raises(CompilationForbiddenError, match=r'cuflash\.warmup\(\[\], "float16", merge=True\)'):
        cuflash.merge_attention(outs, lses, out=out)
    monkeypatch.delenv("CUFLASH_COMPILE")
    assert cuflash.warmup([], "float16", merge=True) == 5
    monkeypatch.setenv("CUFLASH_COMPILE", "forbid")
    _, lse = cuflash.merge_attention(outs, lses, out=out)
    cuflash.merge_attention_backward(out, outs, lses, out, lse)
    cuflash.merge_attention([out], [lse])
