"""`problem`, `layout`, `options`: what a call is reduced to, for every form of arrays. For bad calls see test_bad_input.py."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st
from problems import checked

from cuflash.arrays.borrowing import Array, borrow
from cuflash.problem.checks import check_backward, check_out
from cuflash.problem.layout import Layout, View, overlaps_itself, share_memory
from cuflash.problem.problem import Problem

LAYOUTS = ["bshd", "bhsd", "sbhd", "hbsd", "dhsb"]


def array(*shape: int, dtype: str = "float16") -> Array:
    return borrow(numpy.zeros(shape, dtype), "x")


def problem_of(q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...] | None = None, **options: Any) -> Problem:
    return checked(*(numpy.zeros(shape, numpy.float16) for shape in (q, k, v or k)), **options)


# --- make_problem -----------------------------------------------------------------------------------------------------------------------


def test_a_plain_call() -> None:
    p = problem_of((2, 7, 4, 64), (2, 9, 4, 64))
    assert (p.dtype, p.itemsize) == ("float16", 2)
    assert (p.batch, p.seqlen_q, p.seqlen_kv, p.num_heads_q, p.num_heads_kv, p.batch_kv, p.head_dim) == (2, 7, 9, 4, 4, 2, 64)
    assert (p.scale, p.is_causal, p.causal_offset, p.heads_per_kv) == (0.125, False, 0, 1)
    assert (p.deterministic, p.allow_tf32, p.return_lse, p.is_empty) == (False, False, False, False)
    assert p.query == View((2, 7, 4, 64), (7 * 256, 256, 64, 1))
    assert p.key == p.value == View((2, 9, 4, 64), (9 * 256, 256, 64, 1))
    assert p.key_shape == p.value_shape == (2, 9, 4, 64)
    assert (p.output_shape, p.lse_shape, p.layout) == ((2, 7, 4, 64), (2, 4, 7), Layout())


def test_equal_calls_are_equal_problems() -> None:
    first, second = problem_of((2, 7, 4, 64), (2, 9, 4, 64)), problem_of((2, 7, 4, 64), (2, 9, 4, 64))
    assert first == second
    assert hash(first) == hash(second)
    assert first != problem_of((2, 7, 4, 64), (2, 9, 4, 64), is_causal=True)


def test_options_are_carried_over() -> None:
    options: dict[str, Any] = {"is_causal": numpy.True_, "causal_alignment": "bottom_right", "scale": numpy.float32(0.5)}
    p = problem_of((1, 2, 1, 8), (1, 5, 1, 8), deterministic=True, allow_tf32=numpy.bool_(True), return_lse=True, **options)
    assert (p.is_causal, p.causal_alignment, p.causal_offset, p.scale) == (True, "bottom_right", 3, 0.5)
    assert p.deterministic is p.allow_tf32 is p.return_lse is True
    assert type(p.is_causal) is bool
    assert type(p.scale) is float


@pytest.mark.parametrize(
    ("scale", "want"), [(None, 8**-0.5), (0, 0.0), (-2, -2.0), (Fraction(1, 4), 0.25), (numpy.int32(3), 3.0), (2.0**127, 2.0**127)]
)
def test_scale(scale: Any, want: float) -> None:
    assert problem_of((1, 2, 1, 8), (1, 5, 1, 8), scale=scale).scale == want


@pytest.mark.parametrize("head_dim", [1, 3, 256, 576])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_head_dims_and_dtypes(head_dim: int, dtype: str) -> None:
    x = array(1, 2, 3, head_dim, dtype=dtype)
    p = checked(*[x.owner] * 3)
    assert (p.head_dim, p.dtype, p.itemsize) == (head_dim, dtype, int(dtype[-2:]) // 8)


@pytest.mark.parametrize(
    ("q", "k", "v", "gqa", "heads_kv", "batch_kv", "k_strides", "v_strides"),
    [
        ((2, 3, 4, 8), (1, 5, 4, 8), (2, 5, 4, 8), False, 4, 2, (0, 32, 8, 1), (160, 32, 8, 1)),
        ((2, 3, 4, 8), (2, 5, 1, 8), (2, 5, 4, 8), False, 4, 2, (40, 8, 0, 1), (160, 32, 8, 1)),
        ((2, 3, 4, 8), (1, 5, 1, 8), (1, 5, 1, 8), False, 1, 1, (0, 8, 0, 1), (0, 8, 0, 1)),
        ((2, 3, 4, 8), (2, 5, 2, 8), (2, 5, 1, 8), True, 2, 2, (80, 16, 8, 1), (40, 8, 0, 1)),
        ((2, 3, 4, 8), (2, 5, 1, 8), (2, 5, 2, 8), True, 2, 2, (40, 8, 0, 1), (80, 16, 8, 1)),
        ((1, 3, 4, 8), (1, 5, 4, 8), (1, 5, 4, 8), True, 4, 1, (0, 32, 8, 1), (0, 32, 8, 1)),
    ],
)
def test_broadcasts(q: Any, k: Any, v: Any, gqa: bool, heads_kv: int, batch_kv: int, k_strides: Any, v_strides: Any) -> None:
    p = problem_of(q, k, v, enable_gqa=gqa)
    assert (p.num_heads_kv, p.batch_kv, p.heads_per_kv) == (heads_kv, batch_kv, q[2] // heads_kv)
    assert p.key == View((q[0], 5, heads_kv, 8), k_strides)
    assert p.value == View((q[0], 5, heads_kv, 8), v_strides)
    assert (p.key_shape, p.value_shape) == (k, v)


@pytest.mark.parametrize("q", [(0, 3, 2, 8), (2, 0, 2, 8), (2, 3, 0, 8)])
def test_empty_queries(q: Any) -> None:
    p = problem_of(q, (q[0], 3, q[2], 8))
    assert p.is_empty
    assert (p.output_shape, p.heads_per_kv) == (q, 1)


def test_no_keys() -> None:
    p = problem_of((2, 3, 4, 8), (2, 0, 4, 8), is_causal=True)
    assert p.is_empty
    assert p.flops_forward == 0


def test_empty_and_broadcast() -> None:
    assert problem_of((0, 3, 0, 8), (1, 3, 1, 8)).key.shape == (0, 3, 1, 8)


@given(st.integers(0, 12), st.integers(0, 12), st.sampled_from(["top_left", "bottom_right"]), st.booleans())
def test_visible_pairs(seqlen_q: int, seqlen_kv: int, alignment: str, is_causal: bool) -> None:
    p = problem_of((2, seqlen_q, 3, 4), (2, seqlen_kv, 3, 4), is_causal=is_causal, causal_alignment=alignment)
    pairs = sum(not is_causal or j <= i + p.causal_offset for i in range(seqlen_q) for j in range(seqlen_kv))
    assert p.visible_pairs == pairs
    assert p.flops_forward == 2 * 2 * (2 * 3 * 4) * pairs
    assert p.flops_backward * 2 == p.flops_forward * 5


# --- Layouts ----------------------------------------------------------------------------------------------------------------------------


@st.composite
def arrays_in_any_layout(draw: st.DrawFn) -> tuple[str, Any, Any]:
    """A layout, a canonical array with any strides, and the same memory in that layout."""
    order = "".join(draw(st.permutations("bshd")))
    base = numpy.zeros([draw(st.integers(1, 4)) * 2 for _ in range(4)], numpy.float32)
    steps = tuple(slice(None, None, draw(st.sampled_from([1, 2, -1]))) for _ in range(4))
    canonical = base.transpose(draw(st.permutations(range(4))))[steps]
    return order, canonical, canonical.transpose(["bshd".index(letter) for letter in order])


@given(arrays_in_any_layout())
def test_every_layout_is_the_same_problem(case: tuple[str, Any, Any]) -> None:
    order, canonical, held = case
    p = checked(*[held] * 3, layout=order)
    assert p.query.shape == canonical.shape
    strides = [0 if extent == 1 else stride for extent, stride in zip(canonical.shape, canonical.strides, strict=True)]
    assert [4 * stride for stride in p.query.strides] == strides
    assert p.layout.from_canonical(p.output_shape) == held.shape
    assert p.layout.to_canonical(held.shape) == canonical.shape
    out = numpy.empty(held.shape, numpy.float32)
    view = check_out(p, borrow(out, "out"), {"query": borrow(held, "query")})
    assert view.shape == canonical.shape


def test_batch_first() -> None:
    p = problem_of((4, 2, 7, 8), (4, 2, 9, 8), batch_first=False)
    assert (p.num_heads_q, p.batch, p.seqlen_q, p.seqlen_kv) == (4, 2, 7, 9)
    assert p.layout == Layout("hbsd")


@pytest.mark.parametrize(
    ("options", "shape", "strides"),
    [
        ({"num_heads": 3}, (2, 5, 3, 4), (60, 12, 4, 1)),
        ({"num_heads": numpy.int64(1)}, (2, 5, 1, 12), (60, 12, 0, 1)),
        ({"num_heads": 3, "batch_first": False}, (5, 2, 3, 4), (12, 60, 4, 1)),
        ({"num_heads": 3, "layout": "sbhd"}, (5, 2, 3, 4), (12, 60, 4, 1)),
    ],
)
def test_three_dimensions(options: dict[str, Any], shape: Any, strides: Any) -> None:
    p = problem_of((2, 5, 12), (2, 5, 12), **options)
    assert p.query == View(shape, strides)
    assert p.layout.flat
    assert p.layout.ndim == 3
    assert p.layout.from_canonical(p.output_shape) == (2, 5, 12)


def test_three_dimensions_with_any_strides() -> None:
    x = borrow(numpy.zeros((5, 24, 2), numpy.float32)[:, ::-2].transpose(2, 0, 1), "x")
    p = checked(*[x.owner] * 3, num_heads=3)
    assert p.query == View((2, 5, 3, 4), (1, 48, -16, -4))


def test_three_dimensions_with_grouped_queries() -> None:
    p = problem_of((2, 5, 24), (2, 7, 8), num_heads=6, enable_gqa=True)
    assert (p.num_heads_q, p.num_heads_kv, p.head_dim, p.heads_per_kv) == (6, 2, 4, 3)
    assert problem_of((2, 5, 24), (1, 7, 4), num_heads=6).num_heads_kv == 1


def test_four_dimensions_with_their_own_num_heads() -> None:
    assert problem_of((2, 5, 3, 4), (2, 5, 3, 4), num_heads=3) == problem_of((2, 5, 3, 4), (2, 5, 3, 4))


# --- Views ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "strides", "itemsize", "aligned"),
    [
        ((2, 3, 4, 64), (768, 256, 64, 1), 2, True),
        ((2, 3, 4, 64), (768, 256, 64, 1), 4, True),
        ((2, 3, 4, 64), (768, 256, 64, 2), 2, False),
        ((2, 3, 4, 64), (768, 256, 64, -1), 2, False),
        ((2, 3, 4, 4), (48, 16, 4, 1), 2, False),
        ((2, 3, 4, 4), (48, 16, 4, 1), 4, True),
        ((2, 3, 1, 4), (24, 8, 3, 1), 2, True),
        ((2, 3, 4, 64), (0, -256, 64, 1), 2, True),
        ((2, 3, 4, 1), (96, 32, 8, 5), 2, True),
    ],
)
def test_aligned16(shape: Any, strides: Any, itemsize: int, aligned: bool) -> None:
    assert View(shape, strides).aligned16(itemsize) is aligned


@st.composite
def two_views_of_one_buffer(draw: st.DrawFn) -> tuple[Any, Any]:
    buffer = numpy.zeros((4, 6, 4), numpy.float32)
    pieces = []
    for _ in range(2):
        parts = []
        for extent in buffer.shape:
            start = draw(st.integers(0, extent - 1))
            parts.append(slice(start, draw(st.integers(start + 1, extent)), draw(st.integers(1, 3))))
        piece = buffer[tuple(parts)]
        pieces.append(piece[::-1] if draw(st.booleans()) else piece)
    return pieces[0], pieces[1]


@given(two_views_of_one_buffer())
def test_share_memory(pair: tuple[Any, Any]) -> None:
    left, right = pair
    assert share_memory(borrow(left, "x"), borrow(right, "x")) == numpy.shares_memory(left, right)


def test_addresses_are_never_read() -> None:
    left, right = array(4, 4), array(4, 4)
    left.pointer, right.pointer = 4096, 4096 + 16
    assert share_memory(left, right)
    right.device = ("cuda", 1)
    assert not share_memory(left, right)


def test_sharing_that_is_too_hard_to_tell_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    def too_hard(*_: Any) -> bool:
        raise numpy.exceptions.TooHardError

    x = array(4, 4)
    monkeypatch.setattr(numpy, "shares_memory", too_hard)
    assert share_memory(x, x)


@given(arrays_in_any_layout())
def test_ordinary_views_do_not_overlap_themselves(case: tuple[str, Any, Any]) -> None:
    assert not overlaps_itself(borrow(case[2], "x"))


def test_overlaps_itself() -> None:
    x = numpy.zeros(12)
    assert overlaps_itself(borrow(numpy.broadcast_to(x, (2, 12)), "x"))
    assert overlaps_itself(borrow(numpy.lib.stride_tricks.sliding_window_view(x, 3), "x"))
    assert not overlaps_itself(borrow(numpy.broadcast_to(x, (1, 12)), "x"))
    assert not overlaps_itself(borrow(numpy.broadcast_to(x, (0, 12)), "x"))


# --- Other arrays -----------------------------------------------------------------------------------------------------------------------


def test_out_beside_the_inputs_in_one_buffer() -> None:
    buffer = numpy.zeros((2, 5, 4, 3, 8), numpy.float16)
    inputs = [borrow(buffer[:, :, i], "x") for i in range(3)]
    p = checked(*(x.owner for x in inputs))
    view = check_out(p, borrow(buffer[:, :, 3], "out"), dict(zip(("query", "key", "value"), inputs, strict=True)))
    assert view == View((2, 5, 3, 8), (480, 96, 8, 1))


def test_out_in_three_dimensions_and_reversed() -> None:
    x = array(2, 5, 12)
    p = checked(*[x.owner] * 3, num_heads=3)
    assert check_out(p, borrow(numpy.zeros((2, 5, 12), numpy.float16)[:, ::-1], "out"), {"query": x}).strides == (60, -12, 4, 1)


def test_backward_views() -> None:
    q, k = array(2, 4, 5, 8), array(2, 4, 7, 8)
    p = checked(q.owner, k.owner, k.owner, layout="bhsd")
    lse = array(2, 4, 5, dtype="float32")
    grad_out = borrow(numpy.broadcast_to(numpy.float16(1), (2, 4, 5, 8)), "grad_out")
    views = check_backward(p, grad_out, q, lse, None)
    assert views.grad_out == View((2, 5, 4, 8), (0, 0, 0, 0))
    assert views.out == p.query
    assert views.lse_strides == (20, 5, 1)
    assert views.grad_lse_strides is None
    assert hash(views)
    grad_lse = borrow(numpy.zeros((5, 4, 2), numpy.float32).T, "grad_lse")
    assert check_backward(p, grad_out, q, lse, grad_lse).grad_lse_strides == (1, 2, 8)


def test_default_scale_of_every_head_dim() -> None:
    for head_dim in range(1, 577):
        assert problem_of((1, 1, 1, head_dim), (1, 1, 1, head_dim)).scale == pytest.approx(1 / math.sqrt(head_dim))


def test_an_extent_of_1_has_no_stride() -> None:
    """One query in a transposed view has neighbours one element apart, which kernels would go to for the rows behind it."""
    query = numpy.zeros((2, 3, 64, 1), "float16").transpose(0, 3, 1, 2)
    assert query.shape == (2, 1, 3, 64)
    problem = checked(query, numpy.zeros((2, 5, 3, 64), "float16"), numpy.zeros((2, 5, 3, 64), "float16"))
    assert problem.query.strides == (192, 0, 64, 1)
