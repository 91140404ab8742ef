"""The public calls: scaled dot-product attention of padded batches and of packed sequences, their backward passes, and their plans.

Here are signatures and what they mean; each body sorts its arguments into operands and options, and `calls.py` runs them.
"""

from __future__ import annotations

import functools
from typing import Any

from cuflash.arrays.borrowing import AnyArray
from cuflash.errors import CompilationForbiddenError
from cuflash.planning.plan import Plan
from cuflash.problem.features import Seed
from cuflash.problem.layout import CANONICAL
from cuflash.problem.operands import Operands
from cuflash.problem.options import Options, Window
from cuflash.problem.other_names import explains_keywords
from cuflash.problem.tile import Tiles
from cuflash.runtime import calls, warm_calls
from cuflash.runtime.prepared import Gradients
from cuflash.tuning import with_warmup


@warm_calls.remembers(functools.partial(warm_calls.recall, "forward"))
@explains_keywords
def scaled_dot_product_attention(
    query: AnyArray,
    key: AnyArray,
    value: AnyArray,
    attn_mask: AnyArray | None = None,
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
    out: AnyArray | None = None,
    tile: Tiles = None,
    deterministic: bool = False,
    allow_tf32: bool = False,
    seqlens_q: AnyArray | None = None,
    seqlens_kv: AnyArray | None = None,
    dropout_seed: Seed = None,
    window: Window = None,
    softcap: float | None = None,
    alibi_slopes: AnyArray | None = None,
    sinks: AnyArray | None = None,
    segment_ids_q: AnyArray | None = None,
    segment_ids_kv: AnyArray | None = None,
    prefix_lengths: AnyArray | None = None,
) -> Any:
    """Compute exact attention in O(seqlen) memory.

    out = softmax(scale · Q Kᵀ) V, with masked scores left out; lse = log Σ exp(scale · Q Kᵀ) of each row. What the optional score features and masks change is
    in docs/features.md; those that a call does not use cost nothing.

    Args:
        query: `(batch, seqlen_q, num_heads_q, head_dim)` in the order that `layout` says; float16, bfloat16 or float32; any strides. NumPy arrays and CPU
            tensors run on the simulator; CuPy arrays, CUDA tensors and other arrays with `__dlpack__` on their GPU and current stream. Three dimensions
            `(batch, seqlen, heads * head_dim)` are taken with `num_heads`; packed sequences, `(tokens, heads, head_dim)`, by `varlen_attention`.
        key: `(batch, seqlen_kv, num_heads_kv, head_dim)`; batch and heads may be 1 and are then broadcast.
        value: `(batch, seqlen_kv, num_heads_kv, head_dim_v)`, like key; head_dim_v may differ from head_dim.
        attn_mask: bool (True: attend), or float16, bfloat16 or float32 that is added to the scores, -inf allowed, whatever the dtype of query; any shape of one
            to four dimensions that broadcasts to `(batch, num_heads_q, seqlen_q, seqlen_kv)` in this order whatever the layout; any strides, never copied.
        dropout_p: how likely each probability is dropped; the kept ones are divided by 1 - dropout_p. Pass 0.0 in evaluation: there is no
            training mode that would switch it off. lse is that of all probabilities.
        is_causal: query i sees keys up to i (see `causal_alignment`).
        scale: multiplies Q Kᵀ; default `head_dim ** -0.5`.
        enable_gqa: num_heads_q may be a multiple of num_heads_kv; consecutive query heads share a key head.
        layout: the letters b, s, h, d in the order of the dimensions; "bhsd" is torch's.
        batch_first: False means the layout "hbsd", or `(seqlen, batch, heads * head_dim)` with three dimensions.
        num_heads: query heads in an array of three dimensions, required there: 1 for `(batch, seqlen, head_dim)`.
        causal_alignment: "top_left": query i sees keys j <= i, as torch; "bottom_right": j <= i + shift with shift = seqlen_kv - seqlen_q, as flash-attn. The
            shift moves windows and ALiBi too.
        return_lse: return `(out, lse)`.
        out: array for the result; shape, dtype and kind of the result, any strides.
        tile: a `cuflash.Tile` instead of the default one, which is not for the kernel of few queries, or a mapping from the name of the kernel to it, which also
            says which one runs: "forward" or, on sm_90, "forward_wgmma", "forward_wgmma_float32" or "forward_wgmma_wide", or "forward_split", which calls of at most 16 queries take by themselves.
            `print(cuflash.plan(...))` says which one would, and why not the other.
        deterministic: accepted for symmetry with the backward pass: every kernel gives the same bits on every run.
        allow_tf32: float32 products in TF32: faster, with 10 bits of mantissa.
        seqlens_q: int32 `(batch,)`, on the device of query, where it is read: row b has its first `seqlens_q[b]` queries only. Whatever query, grad_out and their
            like hold behind them, NaN too, changes nothing; there out and the gradient of query are 0, and lse is -inf. "bottom_right" is the corner of these
            queries. Numbers out of range are clamped.
        seqlens_kv: int32 `(batch,)`, on the device of query, where it is read: row b sees its first `seqlens_kv[b]` keys only, and whatever key and value
            hold behind them, NaN too, changes nothing. "bottom_right" is the corner of these keys. Numbers out of range are clamped.
        dropout_seed: with dropout_p, and not looked at where that is 0.0, an int of 64 bits, a pair `(seed, offset)`, or an array of two (u)int64 on the device, which the kernels read when they run,
            so that a replayed CUDA graph draws afresh. The same seed, offset and position give the same mask, see `cuflash.dropout_mask`.
        window: `(left, right)`: query i sees keys j with -left <= j - i - shift <= right; None or -1 is no limit.
        softcap: scores become softcap · tanh(score / softcap), before masks and biases; None or 0.0 for none.
        alibi_slopes: float32 `(num_heads_q,)` or `(batch, num_heads_q)`, where batch may be 1: slope · |i + shift - j| is subtracted from the scores.
        sinks: float32 `(num_heads_q,)`: a logit for each head that takes part in the softmax and has no value; it is part of lse.
        segment_ids_q, segment_ids_kv: int32 `(batch, seqlen_q)` and `(batch, seqlen_kv)`, where batch may be 1: a query sees the keys of its own id, as with
            packed documents.
        prefix_lengths: int32 `(batch,)`, with is_causal: keys before it are visible to all queries of the sequence, the others causally. Numbers out of range
            are clamped.

    Returns:
        out: `(batch, seqlen_q, num_heads_q, head_dim_v)` in the layout of query, its dtype and kind of array.
        lse: with `return_lse`, float32 `(batch, num_heads_q, seqlen_q)` in this order whatever the layout; natural logarithm; where a query sees no key
            -inf, or the sink (out is 0 there).

    Raises:
        ShapeError, DTypeError, DeviceError, OptionError, KeywordError, TileError, UnsupportedError: an argument that cannot be used; each is an
            `ArgumentError` and a `ValueError` and names the argument, what came, what was expected and what to do.
        CompileError: the compiler refused a kernel, or `CUFLASH_COMPILE=forbid` and it is not in the cache.
        SetupError: a package is missing.

    Notes:
        Asynchronous on a GPU: nothing waits for the device. The first call of a kind compiles (about a second for each kernel). Lengths, batch size and number of
        heads are no constants of a kernel; they may decide which of two kernels is faster, and `cuflash.warmup` compiles both.

    Source: Dao 2023, FlashAttention-2, arXiv 2307.08691, algorithm 1.
    """
    operands = Operands(
        query, key, value, attn_mask, alibi_slopes, sinks, prefix_lengths, dropout_seed, out, seqlens_kv, segment_ids_q,
        segment_ids_kv, seqlens_q=seqlens_q,
    )  # fmt: skip
    options = Options(
        is_causal, scale, enable_gqa, causal_alignment, return_lse, tile, deterministic, allow_tf32, dropout_p, window,
        softcap, layout, batch_first, num_heads,
    )  # fmt: skip
    try:
        return calls.forward(operands, options)
    except CompilationForbiddenError as error:
        raise with_warmup(error, calls.plan(operands, options), tile) from None


@warm_calls.remembers(functools.partial(warm_calls.recall, "backward"))
@explains_keywords
def scaled_dot_product_attention_backward(
    grad_out: AnyArray,
    query: AnyArray,
    key: AnyArray,
    value: AnyArray,
    out: AnyArray,
    lse: AnyArray,
    attn_mask: AnyArray | None = None,
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
    grad_lse: AnyArray | None = None,
    seqlens_q: AnyArray | None = None,
    seqlens_kv: AnyArray | None = None,
    dropout_seed: Seed = None,
    window: Window = None,
    softcap: float | None = None,
    alibi_slopes: AnyArray | None = None,
    sinks: AnyArray | None = None,
    segment_ids_q: AnyArray | None = None,
    segment_ids_kv: AnyArray | None = None,
    prefix_lengths: AnyArray | None = None,
    need_attn_mask_grad: bool = False,
) -> Gradients:
    """Compute the gradients of attention in O(seqlen) memory, recomputing the probabilities from `lse`.

    With P = exp(scale · Q Kᵀ - lse), dP = dO Vᵀ and delta = rowsum(dO ∘ O) - dlse:
    dS = P ∘ (dP - delta);  dQ = scale · dS K,  dK = scale · dSᵀ Q,  dV = Pᵀ dO.

    Args:
        grad_out: gradient of `out`; its shape, dtype and kind; any strides.
        query, key, value: as in the forward call.
        out, lse: what the forward call returned with `return_lse=True`; or those of more keys than this call sees, merged by `merge_attention`, with sinks or
            without: the gradients then are this call's share, and those of all chunks of keys add up to the gradients of one call (docs/context_parallelism.md). lse
            is float32 and P = exp(S - lse) as exact as that is: off by |lse| · 2⁻²² at most. Rows that see nothing here have no gradient.
        grad_lse: gradient of that `lse`, float32 `(batch, num_heads_q, seqlen_q)`, or None for zero.
        tile: a `cuflash.Tile` as the kernel of dK and dV sees it (that of dQ takes it with tile_q and tile_kv exchanged), or a mapping from the
            names of kernels to tiles. Without it the faster of two ways is taken, by prediction. Names also say which kernels run: {"backward_fused": …} or on sm_90 {"backward_wgmma": …} one for all gradients, {"backward_dq": …} one for dQ, {"backward_dq_mask": …} that of dQ for a mask's gradient too, {"backward_mask": …} one for that alone.
        deterministic: nothing changes: every kernel adds in a fixed order and gives the same bits on every run.
        need_attn_mask_grad: also give the gradient of an additive attn_mask, summed over the axes along which it is broadcast, by a kernel of its own; where nothing is summed the kernel of dQ
            may make it on its way, which takes less.

    Other arguments have to be those of the forward call, or of the chunk's.

    Returns:
        Gradients(query, key, value), each like its input; summed over what was broadcast with extent 1 and over the query heads of a group. Its attribute
        `attn_mask` is the mask's gradient if asked for, `sinks` that of the sinks if there are any. Slopes of ALiBi have no gradient.

    Raises:
        CuflashError: as the forward call.

    Source: Dao 2023, FlashAttention-2, arXiv 2307.08691, algorithm 2, with a kernel of its own for dQ.
    """
    operands = Operands(
        query, key, value, attn_mask, alibi_slopes, sinks, prefix_lengths, dropout_seed, out, seqlens_kv, segment_ids_q,
        segment_ids_kv, None, None, grad_out, lse, grad_lse, seqlens_q=seqlens_q,
    )  # fmt: skip
    options = Options(
        is_causal, scale, enable_gqa, causal_alignment, False, tile, deterministic, allow_tf32, dropout_p, window, softcap,
        layout, batch_first, num_heads, need_attn_mask_grad,
    )  # fmt: skip
    try:
        return calls.backward(operands, options)
    except CompilationForbiddenError as error:
        raise with_warmup(error, calls.plan(operands, options, backward=True), tile) from None


@explains_keywords
def plan(
    query: AnyArray,
    key: AnyArray,
    value: AnyArray,
    attn_mask: AnyArray | None = None,
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
    seqlens_q: AnyArray | None = None,
    seqlens_kv: AnyArray | None = None,
    backward: bool = False,
    jvp: bool = False,
    dropout_seed: Seed = None,
    window: Window = None,
    softcap: float | None = None,
    alibi_slopes: AnyArray | None = None,
    sinks: AnyArray | None = None,
    segment_ids_q: AnyArray | None = None,
    segment_ids_kv: AnyArray | None = None,
    prefix_lengths: AnyArray | None = None,
    need_attn_mask_grad: bool = False,
) -> Plan:
    """Say what `scaled_dot_product_attention` (or with `backward` its gradient, with `jvp` its tangent) would run with these arguments; `print` it.

    Nothing is compiled or launched. Arguments and errors are those of the call.
    """
    operands = Operands(
        query, key, value, attn_mask, alibi_slopes, sinks, prefix_lengths, dropout_seed, None, seqlens_kv, segment_ids_q,
        segment_ids_kv, seqlens_q=seqlens_q,
    )  # fmt: skip
    options = Options(
        is_causal, scale, enable_gqa, causal_alignment, return_lse, tile, deterministic, allow_tf32, dropout_p, window,
        softcap, layout, batch_first, num_heads, need_attn_mask_grad,
    )  # fmt: skip
    return calls.plan(operands, options, backward, jvp)


@warm_calls.remembers(functools.partial(warm_calls.recall, "forward", varlen=True))
@explains_keywords
def varlen_attention(
    query: AnyArray,
    key: AnyArray,
    value: AnyArray,
    cu_seqlens_q: AnyArray,
    cu_seqlens_kv: AnyArray,
    max_seqlen_q: int | None = None,
    max_seqlen_kv: int | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    causal_alignment: str = "bottom_right",
    return_lse: bool = False,
    out: AnyArray | None = None,
    tile: Tiles = None,
    deterministic: bool = False,
    allow_tf32: bool = False,
    attn_mask: None = None,
    dropout_p: float = 0.0,
    dropout_seed: Seed = None,
    window: Window = None,
    softcap: float | None = None,
    alibi_slopes: AnyArray | None = None,
    sinks: AnyArray | None = None,
    prefix_lengths: AnyArray | None = None,
    seqused_q: AnyArray | None = None,
    seqused_kv: AnyArray | None = None,
) -> Any:
    """Compute exact attention of sequences of different lengths, packed one behind the other without padding.

    Args:
        query: `(tokens_q, num_heads_q, head_dim)`; element types, strides and kinds of arrays as in `scaled_dot_product_attention`.
        key: `(tokens_kv, num_heads_kv, head_dim)`; heads may be 1 and are then broadcast.
        value: `(tokens_kv, num_heads_kv, head_dim_v)`, like key.
        cu_seqlens_q: int32 `(sequences + 1,)`, contiguous, on the device of query: sequence i has the queries from `cu_seqlens_q[i]` up to, but not including,
            `cu_seqlens_q[i + 1]`. The first is 0, and none is smaller than the one before. Equal ones are an empty sequence. On a GPU it is read there, never
            on the host, so that a captured graph replays with other lengths; numbers that make no sense are clamped to the tokens that there are, and what
            out holds then is not specified. On the CPU they raise.
        cu_seqlens_kv: the same for keys and values.
        max_seqlen_q: no sequence has more queries; None stands for all tokens, for which more blocks are started. If one has, a GPU may give zeros for those
            beyond it, as if they saw no key; the CPU raises.
        max_seqlen_kv: the same for the gradients of keys and values; the forward pass does not depend on it.
        is_causal: query i of a sequence sees its keys up to i (see `causal_alignment`).
        causal_alignment: "bottom_right" (the default, as flash-attn): the last query of each sequence sees all of its keys; "top_left": its first query sees
            its first key.
        scale, enable_gqa, return_lse, out, tile, deterministic, allow_tf32: as in `scaled_dot_product_attention`.
        attn_mask: raises: scores of packed sequences have different shapes.
        dropout_p, dropout_seed, window, softcap, alibi_slopes, sinks, prefix_lengths: as in `scaled_dot_product_attention`, with sequences in the place of the
            batch: positions, also those that dropout counts, are those in the sequence.
        seqused_q, seqused_kv: int32 `(sequences,)`, on the device of query: sequence i consists of the first `seqused_q[i]` queries and `seqused_kv[i]` keys of its
            place only, so that padding between sequences needs no detour. What lies behind them may hold anything, NaN too: out is 0 and lse -inf there, and
            so is every gradient 0. Numbers out of range are clamped. `max_seqlen_q` and `max_seqlen_kv` bound what is used.

    Returns:
        out: `(tokens_q, num_heads_q, head_dim_v)`; 0 for queries that see no key and for tokens behind the last sequence.
        lse: with `return_lse`, float32 `(num_heads_q, tokens_q)`; -inf there.

    Raises:
        CuflashError: as `scaled_dot_product_attention`.

    Source: Dao 2023, FlashAttention-2, arXiv 2307.08691, algorithm 1.
    """
    operands = Operands(
        query, key, value, attn_mask, alibi_slopes, sinks, prefix_lengths, dropout_seed, out, None, None, None, cu_seqlens_q,
        cu_seqlens_kv, None, None, None, seqused_q, seqused_kv,
    )  # fmt: skip
    options = Options(
        is_causal, scale, enable_gqa, causal_alignment, return_lse, tile, deterministic, allow_tf32, dropout_p, window,
        softcap, CANONICAL, True, None, False, max_seqlen_q, max_seqlen_kv, True,
    )  # fmt: skip
    try:
        return calls.forward(operands, options)
    except CompilationForbiddenError as error:
        raise with_warmup(error, calls.plan(operands, options), tile) from None


@warm_calls.remembers(functools.partial(warm_calls.recall, "backward", varlen=True))
@explains_keywords
def varlen_attention_backward(
    grad_out: AnyArray,
    query: AnyArray,
    key: AnyArray,
    value: AnyArray,
    out: AnyArray,
    lse: AnyArray,
    cu_seqlens_q: AnyArray,
    cu_seqlens_kv: AnyArray,
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
    grad_lse: AnyArray | None = None,
    attn_mask: None = None,
    dropout_p: float = 0.0,
    dropout_seed: Seed = None,
    window: Window = None,
    softcap: float | None = None,
    alibi_slopes: AnyArray | None = None,
    sinks: AnyArray | None = None,
    prefix_lengths: AnyArray | None = None,
    seqused_q: AnyArray | None = None,
    seqused_kv: AnyArray | None = None,
) -> Gradients:
    """Compute the gradients of `varlen_attention`.

    Args:
        grad_out: gradient of `out`; its shape, dtype and kind; any strides.
        out, lse: what the forward call returned with `return_lse=True`, or those of more keys, as in `scaled_dot_product_attention_backward`.
        grad_lse: gradient of that `lse`, float32 `(num_heads_q, tokens_q)`, or None for zero.
        tile: as in `scaled_dot_product_attention_backward`.

    Other arguments have to be those of the forward call, or of the chunk's.

    Returns:
        Gradients(query, key, value), each like its input; 0 for tokens behind the last sequence.

    Raises:
        CuflashError: as the forward call.

    Source: Dao 2023, FlashAttention-2, arXiv 2307.08691, algorithm 2, with a kernel of its own for dQ.
    """
    operands = Operands(
        query, key, value, attn_mask, alibi_slopes, sinks, prefix_lengths, dropout_seed, out, None, None, None, cu_seqlens_q,
        cu_seqlens_kv, grad_out, lse, grad_lse, seqused_q, seqused_kv,
    )  # fmt: skip
    options = Options(
        is_causal, scale, enable_gqa, causal_alignment, False, tile, deterministic, allow_tf32, dropout_p, window, softcap,
        CANONICAL, True, None, False, max_seqlen_q, max_seqlen_kv, True,
    )  # fmt: skip
    try:
        return calls.backward(operands, options)
    except CompilationForbiddenError as error:
        raise with_warmup(error, calls.plan(operands, options, backward=True), tile) from None


@explains_keywords
def varlen_plan(
    query: AnyArray,
    key: AnyArray,
    value: AnyArray,
    cu_seqlens_q: AnyArray,
    cu_seqlens_kv: AnyArray,
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
    jvp: bool = False,
    attn_mask: None = None,
    dropout_p: float = 0.0,
    dropout_seed: Seed = None,
    window: Window = None,
    softcap: float | None = None,
    alibi_slopes: AnyArray | None = None,
    sinks: AnyArray | None = None,
    prefix_lengths: AnyArray | None = None,
    seqused_q: AnyArray | None = None,
    seqused_kv: AnyArray | None = None,
) -> Plan:
    """Say what `varlen_attention` (or with `backward` its gradient, with `jvp` its tangent) would run with these arguments, as `plan` does."""
    operands = Operands(
        query, key, value, attn_mask, alibi_slopes, sinks, prefix_lengths, dropout_seed, None, None, None, None, cu_seqlens_q,
        cu_seqlens_kv, None, None, None, seqused_q, seqused_kv,
    )  # fmt: skip
    options = Options(
        is_causal, scale, enable_gqa, causal_alignment, return_lse, tile, deterministic, allow_tf32, dropout_p, window,
        softcap, CANONICAL, True, None, False, max_seqlen_q, max_seqlen_kv, True,
    )  # fmt: skip
    return calls.plan(operands, options, backward, jvp)
