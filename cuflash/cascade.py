"""Attention of sequences that begin with the same keys, such as a system prompt: these are read once for all of them, and the rest for each one."""

from __future__ import annotations

import ctypes
import functools
import numbers
import operator
from collections.abc import Hashable
from typing import Any

from cuflash.arrays.borrowing import CPU, AnyArray, Array, BFloat16Bits, borrow, describe, signature
from cuflash.decoding import attention_with_kvcache, kvcache_plan
from cuflash.errors import OptionError, ShapeError
from cuflash.merging import merge_attention
from cuflash.planning import split_forward
from cuflash.problem.other_names import explains_keywords

_LAUNCHES = 3
"""That two calls and their merging have more than one call."""


@explains_keywords
def cascade_attention(
    query: AnyArray,
    key_cache: AnyArray,
    value_cache: AnyArray,
    key: AnyArray | None = None,
    value: AnyArray | None = None,
    *,
    cache_seqlens: AnyArray,
    page_table: AnyArray,
    prefix_length: int,
    cascade: bool | None = None,
    scale: float | None = None,
    is_causal: bool = False,
    softcap: float | None = None,
    sinks: AnyArray | None = None,
    return_lse: bool = False,
) -> Any:
    """Compute `attention_with_kvcache` of sequences whose first keys are in the same pages, and read these once for many sequences.

    Args:
        query, key_cache, value_cache, key, value, cache_seqlens, page_table, scale, is_causal, softcap, sinks, return_lse: as in `attention_with_kvcache`. There is
            no rotary embedding (rotate before), no window, bias or mask.
        prefix_length: keys that all sequences have in common: `page_table` has the same pages for them in each row, of which the first row is read. A multiple of
            the page size. Every sequence has at least so many keys; on the CPU it raises if not.
        cascade: True: attention over the prefix for the queries of all sequences together, over its own keys for each, and `merge_attention`; False: one call; None:
            as is predicted to be faster (`pays`).

    Returns:
        What `attention_with_kvcache` returns.

    Source: Ye et al. 2024, Cascade Inference, flashinfer.ai/2024/02/02/cascade-inference.html.
    """
    _check_dimensions(query=(query, 4), key_cache=(key_cache, 4), page_table=(page_table, 2), cache_seqlens=(cache_seqlens, 1))
    options: dict[str, Any] = {"scale": scale, "softcap": softcap, "return_lse": True}
    own = {"cache_seqlens": cache_seqlens, "page_table": page_table, "is_causal": is_causal, "sinks": sinks, **options}
    pages = _check_prefix(prefix_length, key_cache, page_table)
    table, lengths = borrow(page_table, "page_table"), borrow(cache_seqlens, "cache_seqlens")
    _check_lengths(lengths, prefix_length)
    if cascade is None:
        cascade = pays(query, key_cache, value_cache, cache_seqlens=cache_seqlens, page_table=page_table, prefix_length=prefix_length)
    if not (cascade and prefix_length):
        return attention_with_kvcache(query, key_cache, value_cache, key, value, **own | {"return_lse": return_lse})
    batch, seqlen_q, heads, head_dim = query.shape
    padding = _filled(table, batch, prefix_length)
    out, lse = attention_with_kvcache(query, key_cache, value_cache, key, value, cache_leftpad=padding, **own)
    together = _reshaped(query, (1, batch * seqlen_q, heads, head_dim))
    of_prefix, lse_of_prefix = attention_with_kvcache(
        together, key_cache, value_cache, cache_seqlens=_filled(table, 1, prefix_length), page_table=page_table[:1, :pages], **options
    )
    parts = [_reshaped(of_prefix, out.shape), out]
    lses = [lse_of_prefix.reshape(heads, batch, seqlen_q).swapaxes(0, 1), lse]
    merged, merged_lse = merge_attention(parts, lses)
    return (merged, merged_lse) if return_lse else merged


def pays(
    query: AnyArray, key_cache: AnyArray, value_cache: AnyArray, *, cache_seqlens: AnyArray, page_table: AnyArray, prefix_length: int
) -> bool:
    """Whether a cascade is predicted to be faster than one call, with sequences as long as they have room for: by the small model that also says how many splits
    are fastest (planning/split_forward.py), and three launches more. It is not measured."""
    pages = _check_prefix(prefix_length, key_cache, page_table)
    arrays = (query, key_cache, value_cache, cache_seqlens, page_table)
    key = (prefix_length, *map(signature, arrays))
    if key not in _known:
        if len(_known) >= _MAX_KNOWN:
            _known.clear()
        _known[key] = prefix_length > 0 and _costs_less(*arrays, prefix_length, pages)
    return _known[key]


_known: dict[tuple[Hashable, ...], bool] = {}
_MAX_KNOWN = 1024


def _costs_less(query: Any, key_cache: Any, value_cache: Any, cache_seqlens: Any, page_table: Any, prefix_length: int, pages: int) -> bool:
    batch, seqlen_q, heads, head_dim = query.shape
    one_table = page_table[:1, :pages]
    together = _reshaped(query, (1, batch * seqlen_q, heads, head_dim))
    whole = kvcache_plan(query, key_cache, value_cache, cache_seqlens=cache_seqlens, page_table=page_table)
    of_prefix = kvcache_plan(together, key_cache, value_cache, cache_seqlens=cache_seqlens[:1], page_table=one_table)
    costs = split_forward.predicted_cost(whole, prefix_length), split_forward.predicted_cost(of_prefix)
    return costs[0] + costs[1] + _LAUNCHES * split_forward.LAUNCH_TILES < split_forward.predicted_cost(whole)


def _check_dimensions(**given: tuple[Any, int]) -> None:
    """Those of arrays whose shapes are looked at before the calls that check all else."""
    for name, (operand, count) in given.items():
        shape = borrow(operand, name).shape
        if len(shape) != count:
            raise ShapeError(
                name, f"{len(shape)} dimensions, {shape}", f"{count} dimensions", "As in attention_with_kvcache, with a page_table."
            )


def _check_prefix(prefix_length: object, key_cache: Any, page_table: Any) -> int:
    """How many pages the prefix has."""
    page_size, pages = int(key_cache.shape[1]), int(page_table.shape[-1])
    hint = "Keys behind the last whole page that all sequences share are keys of each sequence's own."
    if isinstance(prefix_length, numbers.Integral) and not isinstance(prefix_length, bool):
        count, rest = divmod(operator.index(prefix_length), page_size or 1)
        if not rest and 0 <= count <= pages:
            return count
    raise OptionError(
        "prefix_length", describe(prefix_length), f"a multiple of the page size of {page_size}, up to {pages * page_size}", hint
    )


def _check_lengths(lengths: Array, prefix_length: int) -> None:
    """That each sequence has the prefix, where looking costs nothing."""
    if lengths.device != CPU or lengths.dtype != "int32" or not lengths.shape[0]:
        return
    shortest = min((ctypes.c_int32 * lengths.shape[0]).from_address(lengths.pointer))
    if shortest < prefix_length:
        hint = "Sequences that share fewer keys take another call, or a shorter prefix for all."
        raise OptionError("cache_seqlens", f"{shortest} keys", f"at least {prefix_length}, the prefix_length", hint)


@functools.lru_cache(maxsize=64)
def _made(framework: Any, device: tuple[str, int], count: int, number: int) -> Any:
    stand_in = Array(0, (), (), "int32", 4, device, framework, None)
    made = framework.empty((count,), "int32", stand_in)
    made[...] = number
    return framework.finish(made)


def _filled(like: Array, count: int, number: int) -> Any:
    """An int32 array of one number, made once."""
    return _made(like.framework, like.device, count, number)


def _reshaped(array: Any, shape: tuple[int, ...]) -> Any:
    return BFloat16Bits(array.bits.reshape(shape)) if isinstance(array, BFloat16Bits) else array.reshape(shape)
