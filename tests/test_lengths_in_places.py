"""Packed sequences that use the first rows only of their places (`seqused_q`, `seqused_kv`): all else may hold anything, and takes part in nothing."""

from __future__ import annotations

import itertools
from typing import Any

import numpy
import pytest
from conftest import Target

import cuflash
from cuflash import Tile
from cuflash.errors import DTypeError, OptionError, ShapeError
from cuflash.reference import compare, varlen_attention, varlen_attention_backward
from cuflash.simulator import configure as simulator_options

pytest.importorskip("cupy")

OFFSETS_Q, USED_Q = [0, 40, 40, 60, 90], [33, 0, 0, 30]
OFFSETS_KV, USED_KV = [0, 30, 70, 75, 150], [30, 17, 4, 70]
TOKENS_Q, TOKENS_KV = 95, 152
CALLS: dict[str, dict[str, Any]] = {
    "both": {"is_causal": True},
    "window": {"window": (20, 3), "sinks": numpy.linspace(-1, 1, 4, dtype="float32")},
    "queries": {"is_causal": True, "seqused_kv": None},
    "keys": {"is_causal": True, "seqused_q": None},
}  # fmt: skip


def int32(numbers: list[int]) -> Any:
    return numpy.array(numbers, "int32")


def rows_of(offsets: list[int], used: list[int] | None) -> list[int]:
    """Rows that sequences consist of."""
    used = used or [end - begin for begin, end in itertools.pairwise(offsets)]
    return [row for begin, length in zip(offsets, used, strict=False) for row in range(begin, begin + length)]


def given(name: str, dtype: str = "float16") -> tuple[list[Any], dict[str, Any], list[int], list[int]]:
    """grad_out, query, key and value with NaN and infinity where they are nobody's; the options; rows of queries and of keys that are somebody's."""
    options = {"seqused_q": int32(USED_Q), "seqused_kv": int32(USED_KV), "enable_gqa": True} | CALLS[name]
    options = {name: option for name, option in options.items() if option is not None}
    rows_q, rows_kv = (
        rows_of(OFFSETS_Q, USED_Q if "seqused_q" in options else None),
        rows_of(OFFSETS_KV, USED_KV if "seqused_kv" in options else None),
    )
    rng, arrays = numpy.random.default_rng(3), []
    for tokens, heads, rows in ((TOKENS_Q, 4, rows_q), (TOKENS_Q, 4, rows_q), (TOKENS_KV, 2, rows_kv), (TOKENS_KV, 2, rows_kv)):
        array = numpy.full((tokens, heads, 32), numpy.nan, dtype)
        array[::2] = numpy.inf
        array[rows] = rng.standard_normal((len(rows), heads, 32))
        arrays.append(array)
    return arrays, options, rows_q, rows_kv


@pytest.mark.parametrize(("name", "fused"), [*((name, False) for name in CALLS), ("both", True)])
def test_rows_of_nobody_take_part_in_nothing(name: str, fused: bool, simulator: Target) -> None:
    (grad_out, *inputs), options, rows_q, rows_kv = given(name)
    offsets = int32(OFFSETS_Q), int32(OFFSETS_KV)
    out, lse = cuflash.varlen_attention(*inputs, *offsets, 40, 80, return_lse=True, **options)
    tile = {"tile": {"backward_fused": Tile(32, 64, 4, 2)}} if fused else {}
    grads = cuflash.varlen_attention_backward(grad_out, *inputs, out, lse, *offsets, 40, 80, **options, **tile)
    clean = [
        numpy.where(numpy.isfinite(x), x, 0) for x in (grad_out, *inputs)
    ]  # the judge looks at no such row, but computes with whole arrays
    want, want_lse = varlen_attention(*clean[1:], *offsets, **options)
    naive, _ = varlen_attention(*clean[1:], *offsets, precision="float16", **options)
    _, naive_lse = varlen_attention(*clean[1:], *offsets, precision="float32", **options)
    compare(out, want, naive, name="out")
    compare(
        lse,
        want_lse,
        naive_lse,
        name="lse",
        dtype="float32",
        terms=lambda: varlen_attention(*clean[1:], *offsets, magnitudes=True, **options)[1],
    )
    truth = varlen_attention_backward(*clean, *offsets, **options)
    naive_grads = varlen_attention_backward(*clean, *offsets, precision="float16", out=out, lse=lse, **options)
    for which, grad, right, expected in zip(("query", "key", "value"), grads, truth, naive_grads, strict=True):
        compare(grad, right, expected, name=which)
    nobody_q, nobody_kv = (numpy.setdiff1d(numpy.arange(n), rows) for n, rows in ((TOKENS_Q, rows_q), (TOKENS_KV, rows_kv)))
    assert not out[nobody_q].any()
    assert numpy.isneginf(lse[:, nobody_q]).all()
    assert not any(grad[rows].any() for grad, rows in zip(grads, (nobody_q, nobody_kv, nobody_kv), strict=True))
    if truth.sinks is not None:
        numpy.testing.assert_allclose(grads.sinks, truth.sinks, atol=2e-2)


def test_the_same_bits_as_without_places(simulator: Target) -> None:
    """As sequences that lie one behind the other, whatever the numbers say beyond their places."""
    (_, *inputs), _, rows_q, rows_kv = given("both")
    packed = [inputs[0][rows_q], inputs[1][rows_kv], inputs[2][rows_kv]]
    offsets = [int32(numpy.cumsum([0, *used]).tolist()) for used in (USED_Q, USED_KV)]
    options = {"is_causal": True, "enable_gqa": True, "return_lse": True}
    out, lse = cuflash.varlen_attention(*packed, *offsets, **options)
    used = {"seqused_q": int32([33, -5, -(2**31), 2**31 - 1]), "seqused_kv": int32([99, 17, 4, 70])}
    got, got_lse = cuflash.varlen_attention(*inputs, int32(OFFSETS_Q), int32(OFFSETS_KV), **used, **options)
    assert Target.bits(got[rows_q]) == Target.bits(out)
    assert Target.bits(got_lse[:, rows_q]) == Target.bits(lse)


def test_bounds_are_those_of_what_is_used(simulator: Target) -> None:
    (_, *inputs), options, *_ = given("both")
    offsets = int32(OFFSETS_Q), int32(OFFSETS_KV)
    want = cuflash.varlen_attention(*inputs, *offsets, **options)
    assert Target.bits(cuflash.varlen_attention(*inputs, *offsets, 33, 70, **options)) == Target.bits(want)
    with pytest.raises(OptionError, match="max_seqlen_q: got 32; expected at least 33"):
        cuflash.varlen_attention(*inputs, *offsets, 32, 70, **options)
    assert "up to its seqused" in str(cuflash.varlen_plan(*inputs, *offsets, 33, 70, **options))


def test_no_block_fills_a_long_place_alone(simulator: Target) -> None:
    """Of three sequences that use little of their places one has nearly all: no warp has much more to do than for places of average length."""
    tokens, offsets, used = 9000, int32([0, 40, 80, 9000]), int32([20, 9, 30])
    query, grad_out = (numpy.full((tokens, 1, 16), numpy.nan, "float16") for _ in range(2))
    for x in (query, grad_out):
        for start, count in zip((0, 40, 80), used.tolist(), strict=True):
            x[start : start + count] = 1
    inputs, bounds = (query, query, query, offsets, offsets), (30, 30)
    lengths = {"seqused_q": used, "seqused_kv": used}
    with simulator_options(max_instructions=12_000):  # of a warp
        out, lse = cuflash.varlen_attention(*inputs, *bounds, **lengths, return_lse=True)
        grads = cuflash.varlen_attention_backward(grad_out, *inputs[:3], out, lse, *inputs[3:], *bounds, **lengths)
    nobody = numpy.isnan(query[:, 0, 0])
    assert not out[nobody].any()
    assert numpy.isneginf(lse[:, nobody]).all()
    for x in grads:
        assert not x[nobody].any()


def test_the_kernel_of_wgmma_leaves_them_to_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUFLASH_SIMULATOR_ARCH", "sm_90")
    monkeypatch.setenv("CUFLASH_FORWARD_WGMMA", "1")
    (_, *inputs), options, *_ = given("both")
    plan = cuflash.varlen_plan(*inputs, int32(OFFSETS_Q), int32(OFFSETS_KV), **options)
    assert [kernel.name for kernel in plan.kernels] == ["forward"]
    assert "it knows no packed sequences that use less than their offsets give them" in plan.choice


def test_what_cannot_be_used_is_named(simulator: Target) -> None:
    (_, *inputs), *_ = given("both")
    inputs[0], offsets = inputs[0][:, :2], (int32(OFFSETS_Q), int32(OFFSETS_KV))
    for name, counted in (("seqused_q", "queries"), ("seqused_kv", "keys")):
        message = rf"{name}: got shape \(3,\); expected \(4,\), a length for each packed sequence\. Pass the number of {counted} of each"
        with pytest.raises(ShapeError, match=message):
            cuflash.varlen_attention(*inputs, *offsets, **{name: int32([1, 2, 3])})
    with pytest.raises(OptionError, match=r"max_seqlen_q: got 2; expected at least 3, the longest sequence in seqused_q"):
        cuflash.varlen_attention(*inputs, *offsets, 2, 99, seqused_q=int32([3, 1, 1, 1]))
    with pytest.raises(DTypeError, match="seqused_kv: got int64; expected int32"):
        cuflash.varlen_attention(*inputs, *offsets, seqused_kv=numpy.array([1, 2, 3, 4]))
    with pytest.raises(DTypeError, match=r"seqused_q: .*Make an array of it first"):
        cuflash.varlen_attention(*inputs, *offsets, seqused_q=[1, 2, 3, 4])
