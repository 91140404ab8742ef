"""Attention of sequences that begin with the same keys, such as a system prompt: these are read once for all of them, and the rest for each one."""

from __future__ import annotations

import ctypes
import numbers
import operator
from collections.abc import Hashable
from typing import Any

from cuflash.arrays.borrowing import CPU, AnyArray, Array, borrow
from cuflash.arrays.descriptions import describe
from cuflash.arrays.frameworks import BFloat16Bits
from cuflash.arrays.signatures import signature
from cuflash.decoding import attention_with_kvcache, kvcache_plan
from cuflash.errors import DTypeError, OptionError, ShapeError
from cuflash.merging import merge_attention
from cuflash.planning import split_cost, split_forward
from cuflash.problem.options import check_bool
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
    key_scale: AnyArray | None = None,
    value_scale: AnyArray | None = None,
    return_lse: bool = False,
) -> Any:
    """Compute `attention_with_kvcache` of sequences whose first keys are in the same pages, and read these once for many sequences.

    Args:
        query, key_cache, value_cache, key, value, cache_seqlens, page_table, scale, is_causal, softcap, sinks, return_lse: as in `attention_with_kvcache`. There is
            no rotary embedding (rotate before), no window, bias or mask.
        key_scale, value_scale: as there, `(num_heads_kv,)`: sequences that share pages share what their numbers mean.
        prefix_length: keys that all sequences have in common: `page_table` has the same pages for them in each row, of which the first row is read. A multiple of
            the page size. Every sequence has at least so many keys; on the CPU it raises if not.
        cascade: True: attention over the prefix for the queries of all sequences together, over its own keys for each, and `merge_attention`; False: one call; None:
            as is predicted to be faster. One call in any case where a causal mask may hide keys of the prefix: with is_causal and at least two queries more than
            new keys.

    Returns:
        What `attention_with_kvcache` returns.

    Source: Ye et al. 2024, Cascade Inference, flashinfer.ai/2024/02/02/cascade-inference.html.
    """
    operands: dict[str, tuple[Any, int]] = {
        "query": (query, 4), "key_cache": (key_cache, 4), "page_table": (page_table, 2), "cache_seqlens": (cache_seqlens, 1),
    }  # fmt: skip
    arrays = _borrowed(operands | ({} if key is None else {"key": (key, 4)}))
    scales = {"key_scale": key_scale, "value_scale": value_scale}
    for name, array in scales.items():
        if array is not None and len(shape := borrow(array, name).shape) != 1:
            hint = "Sequences that share pages share what their numbers mean: pass one scale for each key head."
            raise ShapeError(name, f"shape {shape}", "(num_heads_kv,)", hint)
    options: dict[str, Any] = {"scale": scale, "softcap": softcap, "return_lse": True, **scales}
    own = {"cache_seqlens": cache_seqlens, "page_table": page_table, "is_causal": is_causal, "sinks": sinks, **options}
    pages = _check_prefix(prefix_length, arrays["key_cache"], arrays["page_table"])
    _check_lengths(arrays["cache_seqlens"], prefix_length)
    batch, seqlen_q, heads, head_dim = arrays["query"].shape
    new = arrays["key"].shape[1] if key is not None else 0
    all_see_the_prefix = not (check_bool("is_causal", is_causal) and seqlen_q > new + 1)
    cut = {"query": query, "page_table": page_table, "cache_seqlens": cache_seqlens}
    wanted = _can_be_cut(cut) if cascade is None else check_bool("cascade", cascade) and _check_can_be_cut(cut)
    wanted = wanted and all_see_the_prefix and batch > 0 and prefix_length > 0
    if wanted and cascade is None:
        wanted = pays(query, key_cache, value_cache, cache_seqlens=cache_seqlens, page_table=page_table, prefix_length=prefix_length)
    if not wanted:
        return attention_with_kvcache(query, key_cache, value_cache, key, value, **own | {"return_lse": return_lse})
    prefix = _filled(arrays["page_table"], batch, prefix_length)
    out, lse = attention_with_kvcache(query, key_cache, value_cache, key, value, cache_leftpad=prefix, **own)
    together = _reshaped(query, (1, batch * seqlen_q, heads, head_dim))
    of_prefix, lse_of_prefix = attention_with_kvcache(
        together, key_cache, value_cache, cache_seqlens=prefix[:1], page_table=page_table[:1, :pages], **options
    )
    parts = [_reshaped(of_prefix, out.shape), out]
    lses = [lse_of_prefix.reshape(heads, batch, seqlen_q).swapaxes(0, 1), lse]
    merged, merged_lse = merge_attention(parts, lses)
    return (merged, merged_lse) if return_lse else merged


def pays(
    query: AnyArray, key_cache: AnyArray, value_cache: AnyArray, *, cache_seqlens: AnyArray, page_table: AnyArray, prefix_length: int
) -> bool:
    """Whether a cascade is predicted to be faster than one call, with sequences as long as they have room for: by the small model that also says how many splits
    are fastest (planning/split_cost.py), and three launches more. It is not measured."""
    pages = _check_prefix(prefix_length, borrow(key_cache, "key_cache"), borrow(page_table, "page_table"))
    arrays = (query, key_cache, value_cache, cache_seqlens, page_table)
    key = (prefix_length, *map(signature, arrays))
    if None in key:  # of another library, whose arrays nothing else tells apart
        return prefix_length > 0 and _costs_less(*arrays, prefix_length, pages)
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
    return costs[0] + costs[1] + _LAUNCHES * split_cost.LAUNCH_TILES < split_forward.predicted_cost(whole)


def _borrowed(operands: dict[str, tuple[Any, int]]) -> dict[str, Array]:
    """Arrays whose shapes are looked at before the calls that check all else, each of so many dimensions."""
    arrays = {name: borrow(operand, name) for name, (operand, _) in operands.items()}
    for name, (_, count) in operands.items():
        shape = arrays[name].shape
        if len(shape) != count:
            raise ShapeError(
                name, f"{len(shape)} dimensions, {shape}", f"{count} dimensions", "As in attention_with_kvcache, with a page_table."
            )
    return arrays


def _can_be_cut(operands: dict[str, Any]) -> bool:
    """A cascade takes parts of arrays, or puts them into another shape, which DLPack alone does not do."""
    return all(isinstance(x, BFloat16Bits) or (hasattr(x, "reshape") and hasattr(x, "__getitem__")) for x in operands.values())


def _check_can_be_cut(operands: dict[str, Any]) -> bool:
    for name, operand in operands.items():
        if not _can_be_cut({name: operand}):
            expected = "an array that can be reshaped and sliced, for a cascade"
            raise DTypeError(name, describe(operand), expected, f"Pass numpy.from_dlpack({name}) or its like, or leave cascade out.")
    return True


def _check_prefix(prefix_length: object, key_cache: Array, page_table: Array) -> int:
    """How many pages the prefix has."""
    page_size, pages = key_cache.shape[1], page_table.shape[-1]
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


def _filled(like: Array, count: int, number: int) -> Any:
    """An int32 array of one number, new for each call: it is filled in the order of the caller's stream, which a graph captures."""
    made = like.framework.empty((count,), "int32", like)
    made[...] = number
    return like.framework.finish(made)


def _reshaped(array: Any, shape: tuple[int, ...]) -> Any:
    return BFloat16Bits(array.bits.reshape(shape)) if isinstance(array, BFloat16Bits) else array.reshape(shape)
