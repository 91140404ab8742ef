"""The public calls: scaled dot-product attention of padded batches and of packed sequences, their backward passes, and their plans.

A call is a straight line: borrow the arrays, check them into a `Problem`, plan, load the kernels, launch. All but the last step depends only on
what `arrays.signature` sees, so its result is kept as a `_Call`, and a warm call looks it up, allocates the result, writes addresses into a packed
struct and launches.
"""

from __future__ import annotations

import sys
from collections.abc import Hashable, Mapping
from math import prod
from typing import Any, NamedTuple

from cuflash import arrays, device, launch
from cuflash.arrays import Array, Framework, borrow, pointer, signature
from cuflash.device import Device
from cuflash.errors import DTypeError, SetupError, UnsupportedError
from cuflash.features import Features, grouped
from cuflash.launch import ArgumentTemplate, Executable, simulated_memory
from cuflash.layout import Shape4
from cuflash.planning import KernelPlan, Plan, Tiles, make_plan
from cuflash.problem import Problem, View, check_backward, check_out, make_problem

_MAX_CALLS = 4096
NOTHING = Features()


class _InputGradients(NamedTuple):
    query: Any
    key: Any
    value: Any


class Gradients(_InputGradients):
    """Gradients of the inputs, each with the shape, dtype and kind of its input: `query`, `key`, `value`, which it unpacks to.

    Attributes:
        attn_mask: gradient of the additive mask, in its shape and dtype, with `need_attn_mask_grad`; else None.
        sinks: gradient of the sinks, float32 `(num_heads_q,)`; None without sinks.
    """

    attn_mask: Any = None
    sinks: Any = None


def scaled_dot_product_attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    layout: str = "bshd",
    batch_first: bool = True,
    num_heads: int | None = None,
    causal_alignment: str = "top_left",
    return_lse: bool = False,
    out: Any = None,
    tile: Tiles = None,
    deterministic: bool = False,
    allow_tf32: bool = False,
    seqlens_kv: Any = None,
    dropout_seed: Any = None,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    alibi_slopes: Any = None,
    sinks: Any = None,
    segment_ids_q: Any = None,
    segment_ids_kv: Any = None,
    prefix_lengths: Any = None,
) -> Any:
    """Compute exact attention in O(seqlen) memory.

    out = softmax(scale · Q Kᵀ) V, with masked scores left out; lse = log Σ exp(scale · Q Kᵀ) of each row. What the optional score features and masks change is
    in docs/features.md; those that a call does not use cost nothing.

    Args:
        query: `(batch, seqlen_q, num_heads_q, head_dim)` in the order that `layout` says; float16, bfloat16 or float32; any strides. NumPy arrays and CPU
            tensors run on the simulator; CuPy arrays, CUDA tensors and other arrays with `__dlpack__` on their GPU and current stream. Three dimensions
            `(batch, seqlen, heads * head_dim)` are taken with `num_heads`.
        key: `(batch, seqlen_kv, num_heads_kv, head_dim)`; batch and heads may be 1 and are then broadcast.
        value: `(batch, seqlen_kv, num_heads_kv, head_dim_v)`, like key; head_dim_v may differ from head_dim.
        attn_mask: bool (True: attend), or float16, bfloat16 or float32 that is added to the scores, -inf allowed, whatever the dtype of query; any shape of one
            to four dimensions that broadcasts to `(batch, num_heads_q, seqlen_q, seqlen_kv)` in this order whatever the layout; any strides, never copied.
        dropout_p: probability with which each probability is dropped; the kept ones are divided by 1 - dropout_p. Pass 0.0 in evaluation: there is no
            training mode that would switch it off. lse is that of all probabilities.
        is_causal: query i sees keys up to i (see `causal_alignment`).
        scale: multiplies Q Kᵀ; default `head_dim ** -0.5`.
        enable_gqa: num_heads_q may be a multiple of num_heads_kv; consecutive query heads share a key head.
        layout: the letters b, s, h, d in the order of the dimensions; "bhsd" is torch's.
        batch_first: False means the layout "hbsd", or `(seqlen, batch, heads * head_dim)` with three dimensions.
        num_heads: query heads in an array of three dimensions; default one.
        causal_alignment: "top_left": query i sees keys j <= i, as torch; "bottom_right": j <= i + shift with shift = seqlen_kv - seqlen_q, as flash-attn. The
            shift moves windows and ALiBi too.
        return_lse: return `(out, lse)`.
        out: array for the result; shape, dtype and kind of the result, any strides.
        tile: a `cuflash.Tile` instead of the default one.
        deterministic: accepted for symmetry with the backward pass: every kernel gives the same bits on every run.
        allow_tf32: float32 products in TF32: faster, with 10 bits of mantissa.
        seqlens_kv: int32 `(batch,)`, on the device of query, where it is read: row b sees its first `seqlens_kv[b]` keys only, and whatever key and value
            hold behind them, NaN too, changes nothing. "bottom_right" is the corner of these keys. Numbers out of range are clamped.
        dropout_seed: with dropout_p, an int of 64 bits, a pair `(seed, offset)`, or an array of two (u)int64 on the device, which the kernels read when they run,
            so that a replayed CUDA graph draws afresh. The same seed, offset and position give the same mask, see `cuflash.dropout_mask`.
        window: `(left, right)`: query i sees keys j with -left <= j - i - shift <= right; None or -1 is no limit.
        softcap: scores become softcap · tanh(score / softcap), before masks and biases; None or 0.0 for none.
        alibi_slopes: float32 `(num_heads_q,)` or `(batch, num_heads_q)`: slope · |i + shift - j| is subtracted from the scores.
        sinks: float32 `(num_heads_q,)`: a logit for each head that takes part in the softmax and has no value; it is part of lse.
        segment_ids_q, segment_ids_kv: int32 `(batch, seqlen_q)` and `(batch, seqlen_kv)`: a query sees the keys of its own id, as with packed documents.
        prefix_lengths: int32 `(batch,)`, with is_causal: keys before it are visible to all queries of the sequence, the others causally.

    Returns:
        out: `(batch, seqlen_q, num_heads_q, head_dim_v)` in the layout of query, its dtype and kind of array.
        lse: with `return_lse`, float32 `(batch, num_heads_q, seqlen_q)` in this order whatever the layout; natural logarithm; where a query sees no key
            -inf, or the sink (out is 0 there).

    Raises:
        ShapeError, DTypeError, DeviceError, OptionError, TileError, UnsupportedError: an argument that cannot be used; each is an `ArgumentError` and a
            `ValueError` and names the argument, what came, what was expected and what to do.
        CompileError: the compiler refused a kernel, or `CUFLASH_COMPILE=forbid` and it is not in the cache.
        SetupError: a package is missing.

    Notes:
        Asynchronous on a GPU: nothing waits for the device. The first call of a kind compiles (about a second), never for another length, batch size, number
        of heads or stride.

    Source: Dao 2023, FlashAttention-2, arXiv 2307.08691, algorithm 1.
    """
    options = (is_causal, scale, enable_gqa, layout, batch_first, num_heads, causal_alignment, return_lse, deterministic, allow_tf32)
    given = {
        "attn_mask": attn_mask, "dropout_p": dropout_p, "dropout_seed": dropout_seed, "window": window, "softcap": softcap, "alibi_slopes": alibi_slopes,
        "sinks": sinks, "segment_ids_q": segment_ids_q, "segment_ids_kv": segment_ids_kv, "prefix_lengths": prefix_lengths,
    }  # fmt: skip
    operands = {"query": query, "key": key, "value": value}
    if seqlens_kv is not None:
        operands["seqlens_kv"] = seqlens_kv
    return _run_forward("padded", operands, given, options, out, tile)


def scaled_dot_product_attention_backward(
    grad_out: Any,
    query: Any,
    key: Any,
    value: Any,
    out: Any,
    lse: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    layout: str = "bshd",
    batch_first: bool = True,
    num_heads: int | None = None,
    causal_alignment: str = "top_left",
    tile: Tiles = None,
    deterministic: bool = False,
    allow_tf32: bool = False,
    grad_lse: Any = None,
    seqlens_kv: Any = None,
    dropout_seed: Any = None,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    alibi_slopes: Any = None,
    sinks: Any = None,
    segment_ids_q: Any = None,
    segment_ids_kv: Any = None,
    prefix_lengths: Any = None,
    need_attn_mask_grad: bool = False,
) -> Gradients:
    """Compute the gradients of attention in O(seqlen) memory, recomputing the probabilities from `lse`.

    With P = exp(scale · Q Kᵀ - lse), dP = dO Vᵀ and delta = rowsum(dO ∘ O) - dlse:
    dS = P ∘ (dP - delta);  dQ = scale · dS K,  dK = scale · dSᵀ Q,  dV = Pᵀ dO.

    Args:
        grad_out: gradient of `out`; its shape, dtype and kind; any strides.
        query, key, value: as in the forward call.
        out, lse: what the forward call returned with `return_lse=True`.
        grad_lse: gradient of `lse`, float32 `(batch, num_heads_q, seqlen_q)`, or None for zero.
        tile: a `cuflash.Tile` as the dK/dV kernel sees it (the dQ kernel takes it with tile_q and tile_kv exchanged), or a mapping from the names of
            kernels to tiles.
        deterministic: nothing changes: every kernel adds in a fixed order and gives the same bits on every run.
        need_attn_mask_grad: also give the gradient of an additive attn_mask, summed over the axes along which it is broadcast, by a kernel of its own.

    Other arguments have to be those of the forward call.

    Returns:
        Gradients(query, key, value), each like its input; summed over what was broadcast with extent 1 and over the query heads of a group. Its attribute
        `attn_mask` is the mask's gradient if asked for, `sinks` that of the sinks if there are any. Slopes of ALiBi have no gradient.

    Raises:
        As the forward call.

    Source: Dao 2023, FlashAttention-2, arXiv 2307.08691, algorithm 2, with a kernel of its own for dQ.
    """
    options = (is_causal, scale, enable_gqa, layout, batch_first, num_heads, causal_alignment, False, deterministic, allow_tf32)
    given = {
        "attn_mask": attn_mask, "dropout_p": dropout_p, "dropout_seed": dropout_seed, "window": window, "softcap": softcap, "alibi_slopes": alibi_slopes,
        "sinks": sinks, "segment_ids_q": segment_ids_q, "segment_ids_kv": segment_ids_kv, "prefix_lengths": prefix_lengths,
        "need_attn_mask_grad": need_attn_mask_grad,
    }  # fmt: skip
    operands = {"query": query, "key": key, "value": value, "out": out, "grad_out": grad_out, "lse": lse}
    if grad_lse is not None:
        operands["grad_lse"] = grad_lse
    if seqlens_kv is not None:
        operands["seqlens_kv"] = seqlens_kv
    return _run_backward("padded", operands, given, options, tile)


def plan(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    layout: str = "bshd",
    batch_first: bool = True,
    num_heads: int | None = None,
    causal_alignment: str = "top_left",
    return_lse: bool = False,
    tile: Tiles = None,
    deterministic: bool = False,
    allow_tf32: bool = False,
    seqlens_kv: Any = None,
    backward: bool = False,
    dropout_seed: Any = None,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    alibi_slopes: Any = None,
    sinks: Any = None,
    segment_ids_q: Any = None,
    segment_ids_kv: Any = None,
    prefix_lengths: Any = None,
    need_attn_mask_grad: bool = False,
) -> Plan:
    """Say what `scaled_dot_product_attention` (or with `backward` its gradient) would run with these arguments; `print` it.

    Nothing is compiled or launched. Arguments and errors are those of the call.
    """
    options = (is_causal, scale, enable_gqa, layout, batch_first, num_heads, causal_alignment, return_lse, deterministic, allow_tf32)
    given = {
        "attn_mask": attn_mask, "dropout_p": dropout_p, "dropout_seed": dropout_seed, "window": window, "softcap": softcap, "alibi_slopes": alibi_slopes,
        "sinks": sinks, "segment_ids_q": segment_ids_q, "segment_ids_kv": segment_ids_kv, "prefix_lengths": prefix_lengths,
        "need_attn_mask_grad": need_attn_mask_grad,
    }  # fmt: skip
    operands = {"query": query, "key": key, "value": value}
    if seqlens_kv is not None:
        operands["seqlens_kv"] = seqlens_kv
    inputs = {name: borrow(operand, name) for name, operand in operands.items()}
    return make_plan(_problem_of("padded", inputs, given, options), device_of(inputs["query"]), backward=backward, tile=tile)


def varlen_attention(
    query: Any,
    key: Any,
    value: Any,
    cu_seqlens_q: Any,
    cu_seqlens_kv: Any,
    max_seqlen_q: int | None = None,
    max_seqlen_kv: int | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    causal_alignment: str = "bottom_right",
    return_lse: bool = False,
    out: Any = None,
    tile: Tiles = None,
    deterministic: bool = False,
    allow_tf32: bool = False,
    attn_mask: None = None,
    dropout_p: float = 0.0,
    dropout_seed: Any = None,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    alibi_slopes: Any = None,
    sinks: Any = None,
    prefix_lengths: Any = None,
) -> Any:
    """Compute exact attention of sequences of different lengths, packed one behind the other without padding.

    Args:
        query: `(tokens_q, num_heads_q, head_dim)`; element types, strides and kinds of arrays as in `scaled_dot_product_attention`.
        key: `(tokens_kv, num_heads_kv, head_dim)`; heads may be 1 and are then broadcast.
        value: `(tokens_kv, num_heads_kv, head_dim_v)`, like key.
        cu_seqlens_q: int32 `(sequences + 1,)`, contiguous, on the device of query: sequence i has the queries from `cu_seqlens_q[i]` up to, but not including,
            `cu_seqlens_q[i + 1]`. The first is 0, and none is smaller than the one before. Equal ones are an empty sequence. It is read on the device, never
            on the host, so that a captured graph replays with other lengths; numbers that make no sense are clamped to the tokens that there are, and what
            out holds then is not specified.
        cu_seqlens_kv: the same for keys and values.
        max_seqlen_q: no sequence has more queries (those beyond it may get zeros, as if they saw no key); None stands for all tokens, for which more blocks are started.
        max_seqlen_kv: the same for the gradients of keys and values; the forward pass does not depend on it.
        is_causal: query i of a sequence sees its keys up to i (see `causal_alignment`).
        causal_alignment: "bottom_right" (the default, as flash-attn): the last query of each sequence sees all of its keys; "top_left": its first query sees
            its first key.
        scale, enable_gqa, return_lse, out, tile, deterministic, allow_tf32: as in `scaled_dot_product_attention`.
        attn_mask: raises: scores of packed sequences have different shapes.
        dropout_p, dropout_seed, window, softcap, alibi_slopes, sinks, prefix_lengths: as in `scaled_dot_product_attention`, with sequences in the place of the
            batch: positions, also those that dropout counts, are those in the sequence.

    Returns:
        out: `(tokens_q, num_heads_q, head_dim_v)`; 0 for queries that see no key and for tokens behind the last sequence.
        lse: with `return_lse`, float32 `(num_heads_q, tokens_q)`; -inf there.

    Raises:
        As `scaled_dot_product_attention`.

    Source: Dao 2023, FlashAttention-2, arXiv 2307.08691, algorithm 1.
    """
    options = (is_causal, scale, enable_gqa, causal_alignment, return_lse, deterministic, allow_tf32, max_seqlen_q, max_seqlen_kv)
    given = {
        "attn_mask": attn_mask, "dropout_p": dropout_p, "dropout_seed": dropout_seed, "window": window, "softcap": softcap, "alibi_slopes": alibi_slopes,
        "sinks": sinks, "prefix_lengths": prefix_lengths,
    }  # fmt: skip
    operands = {"query": query, "key": key, "value": value, "cu_seqlens_q": cu_seqlens_q, "cu_seqlens_kv": cu_seqlens_kv}
    return _run_forward("varlen", operands, given, options, out, tile)


def varlen_attention_backward(
    grad_out: Any,
    query: Any,
    key: Any,
    value: Any,
    out: Any,
    lse: Any,
    cu_seqlens_q: Any,
    cu_seqlens_kv: Any,
    max_seqlen_q: int | None = None,
    max_seqlen_kv: int | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    causal_alignment: str = "bottom_right",
    tile: Tiles = None,
    deterministic: bool = False,
    allow_tf32: bool = False,
    grad_lse: Any = None,
    attn_mask: None = None,
    dropout_p: float = 0.0,
    dropout_seed: Any = None,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    alibi_slopes: Any = None,
    sinks: Any = None,
    prefix_lengths: Any = None,
) -> Gradients:
    """Compute the gradients of `varlen_attention`.

    Args:
        grad_out: gradient of `out`; its shape, dtype and kind; any strides.
        out, lse: what the forward call returned with `return_lse=True`.
        grad_lse: gradient of `lse`, float32 `(num_heads_q, tokens_q)`, or None for zero.
        tile: as in `scaled_dot_product_attention_backward`.

    Other arguments have to be those of the forward call.

    Returns:
        Gradients(query, key, value), each like its input; 0 for tokens behind the last sequence.

    Raises:
        As the forward call.

    Source: Dao 2023, FlashAttention-2, arXiv 2307.08691, algorithm 2, with a kernel of its own for dQ.
    """
    options = (is_causal, scale, enable_gqa, causal_alignment, False, deterministic, allow_tf32, max_seqlen_q, max_seqlen_kv)
    given = {
        "attn_mask": attn_mask, "dropout_p": dropout_p, "dropout_seed": dropout_seed, "window": window, "softcap": softcap, "alibi_slopes": alibi_slopes,
        "sinks": sinks, "prefix_lengths": prefix_lengths,
    }  # fmt: skip
    operands = {
        "query": query, "key": key, "value": value, "out": out, "grad_out": grad_out, "lse": lse,
        "cu_seqlens_q": cu_seqlens_q, "cu_seqlens_kv": cu_seqlens_kv,
    }  # fmt: skip
    if grad_lse is not None:
        operands["grad_lse"] = grad_lse
    return _run_backward("varlen", operands, given, options, tile)


def varlen_plan(
    query: Any,
    key: Any,
    value: Any,
    cu_seqlens_q: Any,
    cu_seqlens_kv: Any,
    max_seqlen_q: int | None = None,
    max_seqlen_kv: int | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    causal_alignment: str = "bottom_right",
    return_lse: bool = False,
    tile: Tiles = None,
    deterministic: bool = False,
    allow_tf32: bool = False,
    backward: bool = False,
    attn_mask: None = None,
    dropout_p: float = 0.0,
    dropout_seed: Any = None,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    alibi_slopes: Any = None,
    sinks: Any = None,
    prefix_lengths: Any = None,
) -> Plan:
    """Say what `varlen_attention` (or with `backward` its gradient) would run with these arguments, as `plan` does."""
    options = (is_causal, scale, enable_gqa, causal_alignment, return_lse, deterministic, allow_tf32, max_seqlen_q, max_seqlen_kv)
    given = {
        "attn_mask": attn_mask, "dropout_p": dropout_p, "dropout_seed": dropout_seed, "window": window, "softcap": softcap, "alibi_slopes": alibi_slopes,
        "sinks": sinks, "prefix_lengths": prefix_lengths,
    }  # fmt: skip
    operands = {"query": query, "key": key, "value": value, "cu_seqlens_q": cu_seqlens_q, "cu_seqlens_kv": cu_seqlens_kv}
    inputs = {name: borrow(operand, name) for name, operand in operands.items()}
    return make_plan(_problem_of("varlen", inputs, given, options), device_of(inputs["query"]), backward=backward, tile=tile)


# --- Calls that are kept ------------------------------------------------------------------------------------------------------------------

_calls: dict[Hashable, _Call] = {}

_FORWARD_NAMES = {"padded": "scaled_dot_product_attention", "varlen": "varlen_attention"}
_OPTION_NAMES = {
    "padded": (
        "is_causal", "scale", "enable_gqa", "layout", "batch_first", "num_heads", "causal_alignment", "return_lse", "deterministic", "allow_tf32",
    ),
    "varlen": ("is_causal", "scale", "enable_gqa", "causal_alignment", "return_lse", "deterministic", "allow_tf32"),
}  # fmt: skip
"""Options in the order in which the public functions hand them on; two more are the bounds of packed lengths."""
_SCALARS = ("dropout_p", "window", "softcap", "need_attn_mask_grad")
"""Feature arguments that a kept call depends on by value."""


_ARGUMENT_OF = {"dropout_state": "dropout_seed"}
"""Names in the argument structs -> arguments of the calls, where they differ."""


def _borrowed(given: Mapping[str, Any], features: Mapping[str, Array]) -> dict[str, Any]:
    """The feature arguments with borrowed arrays."""
    return {**given, **{_ARGUMENT_OF.get(name, name): array for name, array in features.items()}}


def _problem_of(kind: str, inputs: Mapping[str, Array], given: Mapping[str, Any], options: tuple[Any, ...]) -> Problem:
    """Check a call; `given` are its feature arguments, borrowed or as the caller passed them."""
    named = dict(zip(_OPTION_NAMES[kind], options, strict=False))
    if kind == "varlen":
        named |= {"cu_seqlens": (inputs["cu_seqlens_q"], inputs["cu_seqlens_kv"]), "max_seqlens": options[-2:]}
    return make_problem(inputs["query"], inputs["key"], inputs["value"], seqlens_kv=inputs.get("seqlens_kv"), **named, **given)


def _run_forward(kind: str, operands: dict[str, Any], given: dict[str, Any], options: tuple[Any, ...], out: Any, tile: Tiles) -> Any:
    """A forward call, kept or new."""
    if out is not None:
        operands["out"] = out
    feature_arrays, seed = grouped(given)
    scalars = tuple(given.get(name) for name in _SCALARS)
    cache_key, pointers = _cache_key(kind, operands | feature_arrays, seed, scalars, options, tile)
    call = _calls.get(cache_key)
    if call is not None and (out is None or call.may_write(out, pointers)):
        return call.run(pointers, out)

    inputs = {name: borrow(operand, name) for name, operand in operands.items() if name != "out"}
    features = {name: borrow(array, _ARGUMENT_OF.get(name, name)) for name, array in feature_arrays.items()}
    _refuse_autograd(inputs | features)
    problem = _problem_of(kind, inputs, _borrowed(given, features), options)
    borrowed_out = None if out is None else borrow(out, "out")
    forward = _ForwardCall(problem, device_of(inputs["query"]), tile, inputs, features, borrowed_out)
    if cache_key is not None:
        _remember(cache_key, forward)
    pointers = _addresses(inputs | features, seed)
    if borrowed_out is not None:
        pointers["out"] = borrowed_out.pointer
    return forward.run(pointers, out)


def _run_backward(kind: str, operands: dict[str, Any], given: dict[str, Any], options: tuple[Any, ...], tile: Tiles) -> Gradients:
    """A backward call, kept or new."""
    feature_arrays, seed = grouped(given)
    scalars = tuple(given.get(name) for name in _SCALARS)
    cache_key, pointers = _cache_key(f"{kind} backward", operands | feature_arrays, seed, scalars, options, tile)
    call = _calls.get(cache_key)
    if call is not None:
        gradients: Gradients = call.run(pointers)
        return gradients

    for name in ("out", "lse"):  # the two that come from the forward call are easily mixed up
        if operands[name] is None or isinstance(operands[name], tuple):
            hint = f"Unpack it: out, lse = cuflash.{_FORWARD_NAMES[kind]}(..., return_lse=True)."
            raise DTypeError(name, arrays.describe(operands[name]), f"the {name} of the forward call", hint)
    inputs = {name: borrow(operand, name) for name, operand in operands.items()}
    features = {name: borrow(array, _ARGUMENT_OF.get(name, name)) for name, array in feature_arrays.items()}
    _refuse_autograd(inputs | features)
    problem = _problem_of(kind, inputs, _borrowed(given, features), options)
    backward = _BackwardCall(problem, device_of(inputs["query"]), tile, inputs, features)
    if cache_key is not None:
        _remember(cache_key, backward)
    return backward.run(_addresses(inputs | features, seed))


def _addresses(arrays: Mapping[str, Array], seed: tuple[int, int] | None) -> dict[str, int]:
    """What is written into the places of an argument struct: addresses, and the words of a seed."""
    words = {} if seed is None else {"dropout_seed": seed[0], "dropout_offset": seed[1]}
    return {name: array.pointer for name, array in arrays.items()} | words


def _cache_key(
    direction: str,
    operands: Mapping[str, Any],
    seed: tuple[int, int] | None,
    scalars: tuple[Any, ...],
    options: tuple[Any, ...],
    tile: Tiles,
) -> tuple[Hashable | None, dict[str, int]]:
    """What a call's preparation depends on, and the addresses, which it does not depend on but for their alignment; nor does it depend on seeds.

    The key is None where it cannot be had cheaply. Types are part of it: True and 1 are not the same option.
    """
    pointers: dict[str, int] = {} if seed is None else {"dropout_seed": seed[0], "dropout_offset": seed[1]}
    values = (*options, *scalars)
    seen: list[Hashable] = [direction, values, tuple(map(type, values)), tile, device.simulator_arch(), seed is None]
    for name, operand in operands.items():
        kind = signature(operand)
        if kind is None:
            return None, pointers
        address = pointers[name] = pointer(operand)
        seen += (name, kind, address & 15)
    key = tuple(seen)
    try:
        hash(key)
    except TypeError:
        return None, pointers
    return key, pointers


def _remember(cache_key: Hashable, call: _Call) -> None:
    if len(_calls) >= _MAX_CALLS:
        _calls.clear()
    _calls[cache_key] = call


class _Result(NamedTuple):
    """An output to allocate: name in the argument struct, shape in the caller's layout, dtype, canonical view."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    view: View | None
    num_bytes: int


class _Launch(NamedTuple):
    """One kernel of a call, ready but for the addresses."""

    kernel: KernelPlan
    executable: Executable
    tail: bytes  # what follows the addresses in its argument struct, up to the lengths of sequences


class _Call:
    """One call with everything but the addresses decided.

    Attributes:
        written: names of the memory whose contents only its kernels give.
    """

    written: frozenset[str]

    def __init__(self, problem: Problem, on: Device, like: Array) -> None:
        self.problem = problem
        self.device = on
        lengths = launch.lengths_template(problem)
        self.lengths = lengths if problem.seqlens_kv or problem.num_sequences is not None else None
        self.no_lengths = lengths.fill({})
        self.framework: Framework = like.framework
        self.like = Array(0, (), (), like.dtype, like.itemsize, like.device, like.framework, None)  # does not keep the caller's array alive
        self.extents: dict[str, tuple[int, int]] = {}  # name -> lowest byte relative to the pointer, size in bytes
        self.workspace: list[_Result] = []
        self.launches: list[_Launch] = []
        self.template: ArgumentTemplate
        self.features: ArgumentTemplate | None = None

    def add_extent(self, name: str, array: Array) -> None:
        low, high = array.byte_range
        self.extents[name] = (low - array.pointer, high - low)

    def allocate(self, result: _Result) -> tuple[Any, int]:
        """A new array of the caller's kind and its address."""
        made = self.framework.empty(result.shape, result.dtype, self.like)
        self.extents.setdefault(result.name, (0, result.num_bytes))
        return made, pointer(made)

    def launch_all(self, pointers: dict[str, int]) -> None:
        stream = self.framework.current_stream(self.device.index) if self.device.kind == "gpu" else 0
        buffers = () if self.device.kind == "gpu" else simulated_memory(self.extents, pointers, self.written)
        head = self.template.fill(pointers)
        features = launch.NO_FEATURE_BYTES if self.features is None else self.features.fill(pointers)
        end = (self.no_lengths if self.lengths is None else self.lengths.fill(pointers)) + features
        for kernel, executable, tail in self.launches:
            arguments = bytearray((head if kernel.reads_tensors else b"") + tail + end)
            executable.launch(kernel.num_blocks, kernel.num_threads, kernel.shared_bytes, arguments, stream, buffers)

    def launch_with_workspace(self, pointers: dict[str, int]) -> None:
        """`launch_all` with memory that is given back when the launches are in the stream."""
        held = []
        for result in self.workspace:
            memory, pointers[result.name] = self.allocate(result)
            held.append(memory)
        self.launch_all(pointers)

    def may_write(self, out: Any, pointers: dict[str, int]) -> bool:
        raise NotImplementedError

    def run(self, pointers: dict[str, int], given: Any = None) -> Any:
        raise NotImplementedError


class _ForwardCall(_Call):
    written = frozenset({"out", "lse", "visible_tiles"})

    def __init__(
        self, problem: Problem, on: Device, tile: Tiles, inputs: dict[str, Array], features: dict[str, Array], given: Array | None
    ) -> None:
        super().__init__(problem, on, inputs["query"])
        qkv = [inputs[name] for name in ("query", "key", "value")]
        given_view = None if given is None else check_out(problem, problem.layout, given, qkv, features)
        for name, array in (inputs | features).items():
            self.add_extent(name, array)
        self.plan = make_plan(problem, on, tile=tile)
        self.workspace = _workspace(self.plan)
        if problem.features != NOTHING:
            self.features = launch.features_template(problem)
        self.out = _result("out", problem, problem.output_shape, self.like)
        rows = problem.batch * problem.num_heads_q * problem.seqlen_q
        self.lse = _Result("lse", problem.lse_shape, "float32", None, 4 * rows)
        view = given_view or self.out.view
        assert view is not None
        if given is not None:
            self.add_extent("out", given)
        views = {"query": problem.query, "key": problem.key, "value": problem.value, "out": view}
        addresses = {name: array.pointer for name, array in inputs.items()} | {"out": given.pointer if given else 0}
        vectorized = {name: views[name].aligned16(problem.itemsize) and addresses[name] % 16 == 0 for name in views}
        stride_batch = 0 if problem.layout.varlen else problem.num_heads_q * problem.seqlen_q
        self.template = launch.forward_template(problem, view, (stride_batch, problem.seqlen_q, 1), vectorized)
        self.launches = [
            _Launch(kernel, launch.executable(kernel, on), launch.forward_tail(problem, kernel)) for kernel in self.plan.kernels
        ]

    def may_write(self, out: Any, pointers: dict[str, int]) -> bool:
        """Whether a given `out` of the same signature is surely as good as the one that was checked; if not, it has to be checked again."""
        flags = getattr(out, "flags", None)
        if not getattr(flags, "writeable", True):
            return False
        low, size = self.extents["out"]
        first = pointers["out"] + low
        for name, (low, other_size) in self.extents.items():
            if name == "out" or name not in pointers:
                continue
            other = pointers[name] + low
            if first < other + other_size and other < first + size:
                return False
        return True

    def run(self, pointers: dict[str, int], given: Any = None) -> Any:
        out = given
        if given is None:
            out, pointers["out"] = self.allocate(self.out)
        lse = None
        if self.problem.return_lse:
            lse, pointers["lse"] = self.allocate(self.lse)
        if self.launches:
            self.launch_with_workspace(pointers)
        else:
            _fill(out, 0.0)
            if lse is not None:
                _fill(lse, float("-inf"))
        if given is None:
            out = self.framework.finish(out)
        return (out, self.framework.finish(lse)) if self.problem.return_lse else out


class _BackwardCall(_Call):
    written = frozenset(
        {"grad_query", "grad_key", "grad_value", "grad_attn_mask", "grad_sinks", "row_statistics", "log2_sums", "visible_tiles"}
    )

    def __init__(self, problem: Problem, on: Device, tile: Tiles, inputs: dict[str, Array], features: dict[str, Array]) -> None:
        super().__init__(problem, on, inputs["query"])
        others = check_backward(problem, problem.layout, inputs["grad_out"], inputs["out"], inputs["lse"], inputs.get("grad_lse"))
        for name, array in (inputs | features).items():
            self.add_extent(name, array)
        self.plan = make_plan(problem, on, backward=True, tile=tile)
        self.results = [
            _result("grad_query", problem, problem.query.shape, self.like),
            _result("grad_key", problem, problem.key_shape, self.like),
            _result("grad_value", problem, problem.value_shape, self.like),
        ]
        rows = problem.batch * problem.num_heads_q * problem.seqlen_q
        self.workspace = [_Result("row_statistics", (2 * rows,), "float32", None, 8 * rows), *_workspace(self.plan)]
        if problem.features.kinds.additive_mask:
            self.workspace.append(_Result("log2_sums", (rows,), "float32", None, 4 * rows))
        self.feature_results = {}
        mask = problem.features.attn_mask
        mask_grad_strides: tuple[int, ...] = (0, 0, 0, 0)
        if problem.features.need_attn_mask_grad and mask is not None:
            mask_grad_strides = _contiguous_or_broadcast(mask.extents)
            size = prod(mask.shape)
            self.feature_results["attn_mask"] = _Result(
                "grad_attn_mask", mask.shape, mask.dtype, None, size * (4 if mask.dtype == "float32" else 2)
            )
        if problem.features.kinds.sinks:
            self.feature_results["sinks"] = _Result("grad_sinks", (problem.num_heads_q,), "float32", None, 4 * problem.num_heads_q)
        if problem.features != NOTHING:
            self.features = launch.features_template(problem, mask_grad_strides)
        views = {"query": problem.query, "key": problem.key, "value": problem.value, "out": others.out, "grad_out": others.grad_out}
        vectorized = {name: view.aligned16(problem.itemsize) and inputs[name].pointer % 16 == 0 for name, view in views.items()}
        for result in self.results:
            assert result.view is not None
            views[result.name] = result.view
            vectorized[result.name] = result.view.aligned16(problem.itemsize)
        self.template = launch.backward_template(views, others.lse_strides, others.grad_lse_strides, vectorized)
        self.launches = [
            _Launch(kernel, launch.executable(kernel, on), launch.backward_tail(problem, kernel)) for kernel in self.plan.kernels
        ]

    def run(self, pointers: dict[str, int], given: Any = None) -> Gradients:
        gradients = {}
        for name, result in (*zip(_InputGradients._fields, self.results, strict=True), *self.feature_results.items()):
            gradients[name], pointers[result.name] = self.allocate(result)
        if self.launches:
            self.launch_with_workspace(pointers)
        else:
            for gradient in gradients.values():
                _fill(gradient, 0.0)
        finished = {name: self.framework.finish(gradient) for name, gradient in gradients.items()}
        of_inputs = Gradients(*(finished[name] for name in _InputGradients._fields))
        for name in self.feature_results:
            setattr(of_inputs, name, finished[name])
        return of_inputs


def _contiguous_or_broadcast(extents: tuple[int, ...]) -> tuple[int, ...]:
    """C-contiguous strides, and 0 for an extent of 1."""
    strides, count = [], 1
    for extent in reversed(extents):
        strides.append(count if extent > 1 else 0)
        count *= extent
    return tuple(reversed(strides))


def _workspace(plan: Plan) -> list[_Result]:
    """Lists of visible tiles, where a kernel makes them."""
    return [_Result("visible_tiles", (plan.list_bytes // 4,), "int32", None, plan.list_bytes)] if plan.list_bytes else []


def _result(name: str, problem: Problem, canonical: Shape4, like: Array) -> _Result:
    """A C-contiguous output of a canonical shape, in the caller's layout."""
    shape = problem.layout.from_canonical(canonical)
    strides, count = [], 1
    for extent in reversed(shape):
        strides.append(count)
        count *= extent
    stand_in = Array(0, shape, tuple(reversed(strides)), like.dtype, like.itemsize, like.device, like.framework, None)
    return _Result(name, shape, problem.dtype, problem.layout.view(stand_in, canonical[3]), count * problem.itemsize)


def _fill(array: Any, number: float) -> None:
    if isinstance(array, arrays.BFloat16Bits):
        array.bits[...] = 0
    else:
        array[...] = number


def device_of(array: Array) -> Device:
    """The device that the array's memory is on."""
    kind, index = array.device
    if kind == "cpu":
        return device.of_arch(device.simulator_arch())
    try:
        return device.gpu(index)
    except ImportError as error:
        raise SetupError("Arrays on a GPU need CuPy: pip install 'cuflash[cuda12]' (or 'cuflash[cuda13]').") from error


def _refuse_autograd(inputs: dict[str, Array]) -> None:
    """A tensor that autograd records would silently lose its gradient here."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.is_grad_enabled():
        return
    for name, array in inputs.items():
        if getattr(array.owner, "requires_grad", False):
            hint = f"Pass {name}.detach() or call under torch.no_grad(), and compute gradients with scaled_dot_product_attention_backward."
            raise UnsupportedError(name, "a tensor that requires grad", "a tensor outside of autograd", hint)
