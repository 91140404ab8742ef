"""Attention with a cache of keys and values, as in generation: signatures and what they mean; `cache_calls.py` runs them."""

from __future__ import annotations

from typing import Any, Literal

from cuflash.arrays.borrowing import AnyArray
from cuflash.errors import CompilationForbiddenError
from cuflash.planning.plan import Plan
from cuflash.problem.cache_call import CacheOperands, CacheOptions
from cuflash.problem.options import Window
from cuflash.problem.other_names import explains_keywords
from cuflash.problem.tile import Tiles
from cuflash.runtime import cache_calls, warm_calls
from cuflash.tuning import with_warmup


@warm_calls.remembers(cache_calls.recall)
@explains_keywords
def attention_with_kvcache(
    query: AnyArray,
    key_cache: AnyArray,
    value_cache: AnyArray,
    key: AnyArray | None = None,
    value: AnyArray | None = None,
    *,
    cache_seqlens: AnyArray,
    page_table: AnyArray | None = None,
    cache_batch_idx: AnyArray | None = None,
    cache_leftpad: AnyArray | None = None,
    rotary_cos: AnyArray | None = None,
    rotary_sin: AnyArray | None = None,
    rotary_interleaved: bool | None = None,
    key_scale: AnyArray | None = None,
    value_scale: AnyArray | None = None,
    cu_seqlens_q: AnyArray | None = None,
    max_seqlen_q: int | None = None,
    layout: str = "bshd",
    scale: float | None = None,
    is_causal: bool = False,
    window: Window = None,
    softcap: float | None = None,
    alibi_slopes: AnyArray | None = None,
    sinks: AnyArray | None = None,
    attn_mask: AnyArray | None = None,
    num_splits: int | Literal["stream-K"] | None = None,
    batch_invariant: bool = False,
    return_lse: bool = False,
    out: AnyArray | None = None,
    tile: Tiles = None,
) -> Any:
    """Append new keys and values to a cache, and compute exact attention of a few queries to all that each sequence has there.

    Args:
        query: `(batch, seqlen_q, num_heads_q, head_dim)` in the order that `layout` says, float16 or bfloat16; any strides; kinds of arrays as in
            `scaled_dot_product_attention`. One query for each sequence, several of speculative decoding, or a chunk of a prompt.
        key_cache: `(batch, room, num_heads_kv, head_dim)`; num_heads_kv divides num_heads_q, and consecutive query heads share a key head. With
            `cache_batch_idx` it may have any number of rows. With `page_table` it is `(pages, page_size, num_heads_kv, head_dim)`, any page size from 1. Its
            element type is that of query, or float8_e4m3fn, of `ml_dtypes` or torch; uint8 is taken for the bits of that.
        value_cache: like key_cache, with a head_dim of its own if need be.
        key, value: `(batch, seqlen_new, num_heads_kv, head_dim)`: written into the cache behind the keys that are there, before queries look at it.
        cache_seqlens: int32 `(batch,)`: keys that the cache has of each sequence, without those of this call. It stays on the device, as the tables below do: a
            captured graph replays with other numbers. On a GPU, what makes no sense is clamped to the room that there is, and new keys without a place are
            left out; on the CPU it raises. What lies behind a sequence's last key may hold anything, NaN too.
        page_table: int32 `(batch, pages of a sequence)`: key p of a sequence is in row p % page_size of page `page_table[b, p // page_size]`. Entries behind a
            sequence's last key may hold anything. A page that gets new keys is one sequence's alone.
        cache_batch_idx: int32 `(batch,)`: which row of the cache is that of each sequence. With new keys, no two the same.
        cache_leftpad: int32 `(batch,)`: keys of each sequence before this one are padding, and are not seen. cache_seqlens counts them.
        rotary_cos, rotary_sin: `(positions, rotary_dim / 2)`, float32 or the type of query: the first rotary_dim columns of new keys and of queries are rotated by
            their positions, which are their places in the cache. Queries stand where the new keys do; if neither is_causal nor window asks for their order, all
            of them at `cache_seqlens`, as in flash-attn. Keys in the cache are taken as they are. There is a position for each key that a sequence has room for;
            where more queries come than new keys, those that stand behind the last position take it on a GPU, and raise on the CPU.
        rotary_interleaved: True: pairs are columns 2i and 2i + 1 (GPT-J; flash-attn's default); False: i and i + rotary_dim / 2 (GPT-NeoX, Llama). Required with
            rotary_cos.
        key_scale, value_scale: float32 `(num_heads_kv,)` or `(batch, num_heads_kv)`, of caches in float8_e4m3fn: a key is `key_scale` times what the cache has, and new
            ones are divided by it, and rounded, the largest number standing for larger ones. What is stored enters products exactly. None stands for 1.
        cu_seqlens_q: int32 `(batch + 1,)`: queries are packed, `(tokens, num_heads_q, head_dim)`, and sequence i has those from `cu_seqlens_q[i]` up to, but not
            including, `cu_seqlens_q[i + 1]`, as in `varlen_attention`: chunks of prompts beside steps of generation. New keys and values are packed likewise,
            `(tokens, num_heads_kv, head_dim)`, one for each query. batch is then the number of sequences.
        max_seqlen_q: with it, no sequence has more queries; None stands for all tokens, for which more blocks are started.
        layout: as in `scaled_dot_product_attention`, for caches and new keys too; of a paged cache "b" is the page and "s" the place in it.
        scale: multiplies Q Kᵀ; default `head_dim ** -0.5`.
        is_causal: the last query sees all keys of its sequence, the one before it one less, and so on.
        window, softcap, alibi_slopes, sinks: as in `scaled_dot_product_attention`; distances count from the last query and key. A window that is wider than the
            cache to both sides is none.
        attn_mask: as there, `(batch, num_heads_q, seqlen_q, keys)` or what broadcasts to it, where `keys` is the room that a sequence has; of a tree of
            speculated tokens, the last ones of these.
        num_splits: blocks that share out the keys of a sequence; "stream-K": all blocks get equal shares of the keys of all sequences, whatever their lengths;
            None: what is predicted to be fastest, with a full cache and with lengths that differ.
        batch_invariant: the keys of a sequence are cut at fixed places, so that its results have the same bits whatever else is in the batch. For each 1024 keys
            that a sequence has room for, a call then needs `batch * num_heads_q * seqlen_q * (head_dim_v + 2)` float32 of workspace: 1 GiB for a chunk of 512
            queries of 32 heads of 128 in a cache of 131072 keys. Pass long prompts in short chunks.
        return_lse: return `(out, lse)`.
        out: array for the result; shape, dtype and kind of the result, any strides.
        tile: a `cuflash.Tile`, or a mapping from the kernel's name to it: {"forward_split": …}.

    Returns:
        out: `(batch, seqlen_q, num_heads_q, head_dim_v)` in the layout of query; 0 for queries that see no key.
            Packed, `(tokens, num_heads_q, head_dim_v)`.
        lse: with `return_lse`, float32 `(batch, num_heads_q, seqlen_q)`, packed `(num_heads_q, tokens)`; natural logarithm; -inf there, or the sink.

    Raises:
        CuflashError: as `scaled_dot_product_attention`; UnsupportedError for float32, sm_75, or a head_dim above 256, but on sm_90 up to 576 and 512 of
            value without CUFLASH_FORWARD_WGMMA=0 (and pages of multiples of 8).

    Notes:
        Up to three launches: attention; where keys are split, merging; and before both, more than 16 new keys of a sequence, packed ones, or those of heads above
        256. A warm call allocates its result, and nothing else where workspace of up to 32 MiB is kept for the next call of the thread: for NumPy arrays, and on
        a GPU for CuPy arrays in a default stream. `cuflash.clear_workspace()` gives it back.

    Source: Dao et al. 2023, Flash-Decoding, crfm.stanford.edu/2023/10/12/flashdecoding.html.
    """
    operands = CacheOperands(
        query, key_cache, value_cache, key, value, cache_seqlens, page_table, cache_batch_idx, cache_leftpad, rotary_cos, rotary_sin,
        attn_mask, alibi_slopes, sinks, out, cu_seqlens_q, key_scale, value_scale,
    )  # fmt: skip
    options = CacheOptions(
        is_causal, scale, window, softcap, layout, rotary_interleaved, num_splits, batch_invariant, return_lse, tile, max_seqlen_q,
    )  # fmt: skip
    try:
        return cache_calls.attend(operands, options)
    except CompilationForbiddenError as error:
        raise with_warmup(error, cache_calls.plan(operands, options), tile) from None


@explains_keywords
def kvcache_plan(
    query: AnyArray,
    key_cache: AnyArray,
    value_cache: AnyArray,
    key: AnyArray | None = None,
    value: AnyArray | None = None,
    *,
    cache_seqlens: AnyArray,
    page_table: AnyArray | None = None,
    cache_batch_idx: AnyArray | None = None,
    cache_leftpad: AnyArray | None = None,
    rotary_cos: AnyArray | None = None,
    rotary_sin: AnyArray | None = None,
    rotary_interleaved: bool | None = None,
    key_scale: AnyArray | None = None,
    value_scale: AnyArray | None = None,
    cu_seqlens_q: AnyArray | None = None,
    max_seqlen_q: int | None = None,
    layout: str = "bshd",
    scale: float | None = None,
    is_causal: bool = False,
    window: Window = None,
    softcap: float | None = None,
    alibi_slopes: AnyArray | None = None,
    sinks: AnyArray | None = None,
    attn_mask: AnyArray | None = None,
    num_splits: int | Literal["stream-K"] | None = None,
    batch_invariant: bool = False,
    return_lse: bool = False,
    tile: Tiles = None,
) -> Plan:
    """Say what `attention_with_kvcache` would run with these arguments, as `plan` does."""
    operands = CacheOperands(
        query, key_cache, value_cache, key, value, cache_seqlens, page_table, cache_batch_idx, cache_leftpad, rotary_cos, rotary_sin,
        attn_mask, alibi_slopes, sinks, None, cu_seqlens_q, key_scale, value_scale,
    )  # fmt: skip
    options = CacheOptions(
        is_causal, scale, window, softcap, layout, rotary_interleaved, num_splits, batch_invariant, return_lse, tile, max_seqlen_q,
    )  # fmt: skip
    return cache_calls.plan(operands, options)
