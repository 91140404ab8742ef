"""Rows of a batch with fewer queries than there is room for (`seqlens_q`): what lies behind them may hold anything, and takes part in nothing."""

from __future__ import annotations

from typing import Any

import numpy
import pytest
from conftest import Target, poison_new_memory

import cuflash
from cuflash import Tile
from cuflash.errors import DTypeError, ShapeError
from cuflash.jit.compiler import CompileRequest
from cuflash.planning import fused_backward, predicted_backward
from cuflash.planning.kernel_plan import Splits
from cuflash.reference import attention, attention_backward, attention_naive, attention_naive_backward, compare, to_float64

pytest.importorskip("cupy")

BATCH, QUERIES, KEYS, HEADS, HEADS_KV, DIM = 4, 90, 70, 4, 2, 32
USED_Q, USED_KV = [33, 90, 0, 64], [70, 17, 40, 0]
TILES = {"backward_fused": Tile(32, 64, 4, 2)}
CALLS: dict[str, dict[str, Any]] = {
    "causal": {"is_causal": True},
    "both": {"is_causal": True, "causal_alignment": "bottom_right", "seqlens_kv": USED_KV},
    "window": {"window": (20, 3), "sinks": numpy.linspace(-1, 1, HEADS, dtype="float32")},
    "mask": {"attn_mask": numpy.random.default_rng(1).random((BATCH, 1, QUERIES, KEYS)) > 0.5, "is_causal": True, "causal_alignment": "bottom_right"},
    "bias": {"attn_mask": numpy.where(numpy.arange(KEYS) < 50, 0.5, -1e9).astype("float32"), "sinks": numpy.linspace(-1, 1, HEADS, dtype="float32")},
    "pair_bias": {"attn_mask": numpy.random.default_rng(2).standard_normal((BATCH, HEADS, QUERIES, KEYS), numpy.float32), "seqlens_kv": USED_KV},
    "documents": {"segment_ids_q": numpy.arange(QUERIES)[None] // 40, "segment_ids_kv": numpy.arange(KEYS)[None] // 30},
}  # fmt: skip


def int32(numbers: Any) -> Any:
    return numpy.array(numbers, "int32")


def given(on: Target, name: str, dtype: str) -> tuple[list[Any], dict[str, Any]]:
    """grad_out, query, key and value with NaN and infinity in padded queries and keys, and the options."""
    options = {"enable_gqa": True, "seqlens_q": int32(USED_Q), **CALLS[name]}
    options |= {key: int32(value) for key, value in options.items() if key.startswith("segment") or key == "seqlens_kv"}
    shapes = (BATCH, QUERIES, HEADS, DIM), (BATCH, KEYS, HEADS_KV, DIM)
    arrays = [on.random(shapes[of], dtype, seed) for seed, of in enumerate((0, 0, 1, 1))]
    for array, lengths in zip(arrays, (USED_Q, USED_Q, options.get("seqlens_kv"), options.get("seqlens_kv")), strict=True):
        for row, length in zip(array, lengths if lengths is not None else (), strict=False):
            row[length:] = numpy.nan
            row[length::2] = numpy.inf
    return arrays, options


def of_row(row: int, options: dict[str, Any]) -> tuple[slice, slice, dict[str, Any]]:
    """The queries and keys of a row of the batch, and the options of a call of these alone."""
    queries = slice(0, USED_Q[row])
    keys = slice(0, int(options["seqlens_kv"][row]) if "seqlens_kv" in options else KEYS)
    own = {name: option for name, option in options.items() if name not in ("seqlens_q", "seqlens_kv")}
    if (mask := own.get("attn_mask")) is not None:
        own["attn_mask"] = mask[row : row + 1, :, queries, keys] if mask.ndim == 4 else mask[keys]
    for name, rows in (("segment_ids_q", queries), ("segment_ids_kv", keys)):
        if name in own:
            own[name] = own[name][:, rows]
    return queries, keys, own


def check(on: Target, name: str, dtype: str, tile: Any) -> None:
    (grad_out, *inputs), options = given(on, name, dtype)
    out, lse = cuflash.scaled_dot_product_attention(*inputs, return_lse=True, **options)
    wants = {"need_attn_mask_grad": True} if name.endswith("bias") else {}
    grads = cuflash.scaled_dot_product_attention_backward(grad_out, *inputs, out, lse, tile=tile, **options, **wants)
    summed, of_bias = numpy.zeros(HEADS), numpy.zeros(options["attn_mask"].shape if wants else ())
    for row in range(BATCH):
        queries, keys, own = of_row(row, options)
        for got in (out, grads.query):
            assert not on.host(got)[row, queries.stop :].any()
        assert numpy.isneginf(on.host(lse)[row, :, queries.stop :]).all()
        cut = [array[row : row + 1, rows] for array, rows in zip((grad_out, *inputs), (queries, queries, keys, keys), strict=True)]
        if queries.stop == 0 or keys.stop == 0:
            assert not any(on.host(grad)[row].any() for grad in grads)
            continue
        want, want_lse = attention(*cut[1:], **own)
        naive, _ = attention_naive(*cut[1:], dtype, **own)
        _, naive_lse = attention_naive(*cut[1:], "float32", **own)
        compare(out[row : row + 1, queries], want, naive, name="out")
        compare(lse[row : row + 1, :, queries], want_lse, naive_lse, name="lse", dtype="float32")
        exact = attention_backward(*cut, **own)
        rounded = attention_naive_backward(*cut, dtype, **own)
        for which, rows in (("query", queries), ("key", keys), ("value", keys)):
            compare(getattr(grads, which)[row : row + 1, rows], getattr(exact, which), getattr(rounded, which), name=which)
        summed += 0 if exact.sinks is None else exact.sinks
        if wants:
            part = of_bias[row : row + 1, :, queries, keys] if of_bias.ndim == 4 else of_bias[keys]
            part += exact.attn_mask
    if wants:
        numpy.testing.assert_allclose(on.host(grads.attn_mask), of_bias, rtol=1e-2, atol=1e-2)
    if "sinks" in options:
        numpy.testing.assert_allclose(on.host(grads.sinks), summed, rtol=1e-2, atol=1e-2)


@pytest.mark.sample(2)
@pytest.mark.parametrize(("dtype", "way"), [("float16", "own"), ("float16", "fused"), ("float32", "own")])
@pytest.mark.parametrize("name", CALLS)
def test_padded_queries_take_part_in_nothing(name: str, dtype: str, way: str, simulator: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(fused_backward.VARIABLE, "0" if way == "own" else "1")
    poison_new_memory(monkeypatch)
    check(simulator, name, dtype, TILES if way == "fused" else None)


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", ["causal", "both", "window"])
def test_padded_queries_on_hoppers_own_instructions(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of tiles of queries that a row fills in part, or not at all."""
    for variable, value in {"SIMULATOR_ARCH": "sm_90", "FORWARD_WGMMA": "1", "BACKWARD_WGMMA": "1"}.items():
        monkeypatch.setenv(f"CUFLASH_{variable}", value)
    on = Target("sm_90")
    (_, *inputs), options = given(on, name, "bfloat16")
    for backward in (False, True):
        assert any("wgmma" in kernel.name for kernel in cuflash.plan(*inputs, backward=backward, **options).kernels)
    check(on, name, "bfloat16", None)


def test_rows_of_several_tiles_on_hoppers_own_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the forward kernel, which has at least 128 queries in a tile: tiles that a row fills, fills in part and does not reach."""
    monkeypatch.setenv("CUFLASH_SIMULATOR_ARCH", "sm_90")
    on, used, tile = Target("sm_90"), [300, 193, 128, 1], {"forward_wgmma": Tile(128, 32, 8, 2)}
    query, key, value = (on.random((4, rows, 1, 64), "bfloat16", seed) for seed, rows in enumerate((300, 90, 90)))
    for row, length in zip(query, used, strict=True):
        row[length:] = numpy.nan
    options: dict[str, Any] = {"is_causal": True, "return_lse": True, "tile": tile}
    out, lse = cuflash.scaled_dot_product_attention(query, key, value, seqlens_q=int32(used), **options)
    for row, length in enumerate(used):
        cut = query[row : row + 1, :length], key[row : row + 1], value[row : row + 1]
        alone, lse_alone = cuflash.scaled_dot_product_attention(*cut, **options)
        assert on.bits(out[row, :length]) == on.bits(alone[0])
        assert on.bits(lse[row, :, :length]) == on.bits(lse_alone[0])
        assert not out[row, length:].any()
        assert numpy.isneginf(lse[row, :, length:]).all()


@pytest.mark.exhaustive
def test_tiles_of_keys_that_are_shared_out(simulator: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """Among blocks, each of which has some tiles of queries of rows of different lengths."""
    monkeypatch.setattr(predicted_backward, "splits_of", lambda *_: Splits(3, chains=1))
    monkeypatch.setenv(fused_backward.VARIABLE, "0")
    check(simulator, "both", "float16", None)


@pytest.mark.parametrize("way", ["own", *(pytest.param(way, marks=pytest.mark.exhaustive) for way in ("fused", "wgmma", "two of wgmma"))])
def test_what_lies_behind_changes_no_bit(way: str, simulator: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """With dropout, keys that all rows of the batch share, rows that do not start on 16 bytes where kernels take them, and lengths that are out of range."""
    of_wgmma, head_dim = "wgmma" in way, 200 if "two" in way else DIM
    for variable, value in {"SIMULATOR_ARCH": "sm_90", "FORWARD_WGMMA": "1", "BACKWARD_WGMMA": "1"}.items() if of_wgmma else ():
        monkeypatch.setenv(f"CUFLASH_{variable}", value)
    view = "contiguous" if of_wgmma else "unaligned_base"
    query, grad_out = (simulator.restride(simulator.random((BATCH, QUERIES, HEADS, head_dim), "float16", seed), view) for seed in (0, 1))
    key, value = (simulator.random((1, KEYS, 1, head_dim), "float16", seed) for seed in (2, 3))
    options = {"enable_gqa": True, "dropout_p": 0.3, "dropout_seed": 5, "seqlens_q": int32([33, 2**31 - 1, -7, 64])}
    pinned = TILES if way == "fused" else {"backward_dkdv": Tile(32, 32, 2, 2)}
    tile = {} if of_wgmma else {"tile": pinned}
    if of_wgmma:
        assert any("wgmma" in kernel.name for kernel in cuflash.plan(query, key, value, backward=True, **options).kernels)
    found = []
    for filled in (0, numpy.nan):
        for array in (query, grad_out):
            for row, length in enumerate(USED_Q):
                array[row, length:] = filled
        out, lse = cuflash.scaled_dot_product_attention(query, key, value, return_lse=True, **options)
        grads = cuflash.scaled_dot_product_attention_backward(grad_out, query, key, value, out, lse, **options, **tile)
        found.append([simulator.bits(x) for x in (out, lse, *grads)])
    assert found[0] == found[1]
    assert grads.key.any()


def test_tangents_of_padded_queries(simulator: Target) -> None:
    (query_dot, *inputs), options = given(simulator, "both", "float16")
    results = cuflash.scaled_dot_product_attention(*inputs, return_lse=True, **options)
    out_dot, lse_dot = cuflash.scaled_dot_product_attention_jvp(query_dot, None, None, *inputs, *results, **options)
    for row, length in enumerate(USED_Q):
        assert not out_dot[row, length:].any()
        assert not lse_dot[row, :, length:].any()
        if USED_KV[row] and length:
            queries, keys, own = of_row(row, options)
            cut = [array[row : row + 1, rows] for array, rows in zip(inputs, (queries, keys, keys), strict=True)]
            own_results = [results[0][row : row + 1, queries], results[1][row : row + 1, :, queries]]
            want = cuflash.scaled_dot_product_attention_jvp(query_dot[row : row + 1, queries], None, None, *cut, *own_results, **own)
            numpy.testing.assert_allclose(to_float64(out_dot[row, :length]), to_float64(want[0][0]), rtol=2e-3, atol=2e-3)
            numpy.testing.assert_allclose(lse_dot[row, :, :length], want[1][0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["bool", "float32"])
def test_no_mask_is_read_of_a_row_without_queries(kind: str, simulator: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor before its memory; the gradient of a mask with all axes is 0 behind the lengths."""
    poison_new_memory(monkeypatch)
    inputs = [simulator.random((2, 24, 1, 16), "float16", seed) for seed in range(3)]
    mask = numpy.random.default_rng(3).random((2, 1, 24, 24)) > 0.5
    mask = mask if kind == "bool" else numpy.where(mask, 0.5, -1).astype(kind)
    lengths = int32([0, 7])
    results = cuflash.scaled_dot_product_attention(*inputs, return_lse=True, seqlens_q=lengths, attn_mask=mask)
    need = {"need_attn_mask_grad": True} if kind != "bool" else {}
    grads = cuflash.scaled_dot_product_attention_backward(inputs[0], *inputs, *results, seqlens_q=lengths, attn_mask=mask, **need)
    assert not grads.key[0].any()
    if need:
        cut = [inputs[0][1:, :7], inputs[0][1:, :7], inputs[1][1:], inputs[2][1:]]
        exact = attention_backward(*cut, attn_mask=mask[1:, :, :7]).attn_mask
        numpy.testing.assert_allclose(grads.attn_mask[1:, :, :7], exact, rtol=1e-2, atol=1e-2)
        assert not grads.attn_mask[0].any()
        assert not grads.attn_mask[1, :, 7:].any()


@pytest.mark.parametrize("biased", [False, True], ids=["sinks", "sinks and bias"])
def test_padded_queries_give_sinks_nothing(biased: bool, simulator: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever lse says of them, and whatever memory that the kernels share held before."""
    poison_new_memory(monkeypatch)
    inputs = [simulator.random((2, 24, 1, 16), "float16", seed) for seed in range(3)]
    options: dict[str, Any] = {"sinks": numpy.array([0.5], "float32")} | ({"attn_mask": numpy.ones(24, "float32")} if biased else {})
    out, lse = cuflash.scaled_dot_product_attention(*inputs, return_lse=True, seqlens_q=int32([0, 7]), **options)
    exact = attention_backward(*(array[1:, :rows] for array, rows in zip((inputs[0], *inputs), (7, 7, 24, 24), strict=True)), **options)
    grad_out = inputs[0].copy()
    grad_out[0], grad_out[1, 7:] = numpy.nan, numpy.nan
    for behind in (-numpy.inf, numpy.nan, 3.0):
        lse[0], lse[1, :, 7:] = behind, behind
        grads = cuflash.scaled_dot_product_attention_backward(grad_out, *inputs, out, lse, seqlens_q=int32([0, 7]), **options)
        numpy.testing.assert_allclose(grads.sinks, exact.sinks, rtol=1e-2, atol=1e-2)


def test_other_lengths_are_no_other_call(simulator: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = [simulator.random((2, 40, 1, 32), "float16", seed) for seed in range(3)]
    lengths = int32([40, 7])
    first = cuflash.scaled_dot_product_attention(*inputs, seqlens_q=lengths)
    monkeypatch.setattr("cuflash.runtime.calls.make_plan", None)
    lengths[:] = 20, 30
    second = cuflash.scaled_dot_product_attention(*inputs, seqlens_q=lengths)
    assert simulator.bits(second[0, :20]) == simulator.bits(first[0, :20])
    assert not second[0, 20:].any()
    assert second[1, 7:30].any()


def test_what_a_call_refuses() -> None:
    inputs = [numpy.zeros((2, 8, 1, 16), "float16")] * 3
    for lengths, error in ((numpy.zeros(2, "int64"), DTypeError), (int32([1, 2, 3]), ShapeError), (int32([1, 2, 3, 4])[::2], ShapeError)):
        with pytest.raises(error, match=r"^seqlens_q: "):
            cuflash.scaled_dot_product_attention(*inputs, seqlens_q=lengths)


@pytest.mark.parametrize(("head_dim", "seqlen"), [(64, 64), (64, 8), (512, 64)])
def test_plans_and_warmup(head_dim: int, seqlen: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On Hopper wide heads take kernels of mma.sync, also where others are asked for, and few queries those for many; `warmup` compiles them."""
    inputs = [numpy.zeros((2, seqlen, 1, head_dim), "float16")] * 3
    monkeypatch.setenv("CUFLASH_FORWARD_WGMMA", "1")
    monkeypatch.setenv("CUFLASH_BACKWARD_WGMMA", "1")
    compiled: list[CompileRequest] = []
    monkeypatch.setattr("cuflash.tuning.cache.fetch_many", lambda requests, **_: compiled.extend(requests))
    monkeypatch.setenv("CUFLASH_SIMULATOR_ARCH", "sm_90")
    cuflash.warmup(head_dim, "float16", is_causal=False, seqlens_q=True)
    for backward in (False, True):
        plan = cuflash.plan(*inputs, seqlens_q=int32([3, 64]), backward=backward)
        assert "queries of each row up to its seqlens_q" in str(plan)
        assert not any(kernel.spec.splits_keys for kernel in plan.kernels)
        assert any(kernel.spec.maps_tensors for kernel in plan.kernels) == (head_dim == 64)
        assert {kernel.request(plan.device) for kernel in plan.kernels} <= set(compiled)


def test_masks_beside_lengths_stay_on_mma(monkeypatch: pytest.MonkeyPatch) -> None:
    """On Hopper, and the plan says why and what the call is predicted to take."""
    monkeypatch.setenv("CUFLASH_SIMULATOR_ARCH", "sm_90")
    inputs = [numpy.zeros((2, 1024, 8, 128), "float16")] * 3
    for features in (
        {"attn_mask": numpy.ones((1024, 1024), bool)},
        {name: numpy.zeros((2, 1024), "int32") for name in ("segment_ids_q", "segment_ids_kv")},
    ):
        for backward in (False, True):
            choice = cuflash.plan(*inputs, seqlens_q=int32([3, 64]), backward=backward, **features).choice
            assert "with seqlens_q and a mask or segments the warps that copy would have too few registers" in choice
            assert "predicted to take" in choice
