"""A call that attends to a cache of keys and values: what it was given, and every check of it, down to a `Problem`.

`make_cache_problem` is to these calls what `make_problem` is to the others. Lengths, page tables and indices stay on the device, and nothing waits for a
GPU: there, kernels clamp what makes no sense. In the host's memory reading them costs nothing, and `check_positions` does.
"""

from __future__ import annotations

import ctypes
import itertools
import numbers
import operator
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Final, Literal, NamedTuple

from cuflash.arrays.borrowing import AnyArray, Array, borrow
from cuflash.arrays.descriptions import describe
from cuflash.errors import ArgumentError, DTypeError, OptionError, ShapeError, UnsupportedError
from cuflash.problem import cache_scales, options
from cuflash.problem.cache import Cache, NewRows, Rotary
from cuflash.problem.checks import cast_to, check_same_kind
from cuflash.problem.features import Extents, check_features, check_window
from cuflash.problem.layout import Layout, View, is_first_columns, overlaps_itself, share_memory
from cuflash.problem.options import Options, Window
from cuflash.problem.problem import MAX_EXTENT, MAX_HEAD_DIM, Problem
from cuflash.problem.sequences import check_cu_seqlens, check_offsets
from cuflash.problem.tile import Tiles

MAX_SPLITS = 256
STREAM_K: Final = "stream-K"
"""In the place of a number of splits."""
PACKED = Layout(varlen=True)
"""Of queries and new keys with `cu_seqlens_q`."""


class CacheOperands(NamedTuple):
    """The arrays that `cuflash.attention_with_kvcache` was given, by the names of its arguments."""

    query: AnyArray
    key_cache: AnyArray
    value_cache: AnyArray
    key: AnyArray | None
    value: AnyArray | None
    cache_seqlens: AnyArray
    page_table: AnyArray | None
    cache_batch_idx: AnyArray | None
    cache_leftpad: AnyArray | None
    rotary_cos: AnyArray | None
    rotary_sin: AnyArray | None
    attn_mask: AnyArray | None
    alibi_slopes: AnyArray | None
    sinks: AnyArray | None
    out: AnyArray | None
    cu_seqlens_q: AnyArray | None
    key_scale: AnyArray | None
    value_scale: AnyArray | None


class CacheOptions(NamedTuple):
    """Its other arguments, unchecked, in the types that its signature promises."""

    is_causal: bool
    scale: float | None
    window: Window
    softcap: float | None
    layout: str
    rotary_interleaved: bool | None
    num_splits: int | str | None
    batch_invariant: bool
    return_lse: bool
    tile: Tiles
    max_seqlen_q: int | None


_REQUIRED = ("query", "key_cache", "value_cache", "cache_seqlens")


def borrowed_operands(operands: CacheOperands) -> dict[str, Array]:
    """The arrays that the kernels read, by name; all but `out`."""
    return {
        name: borrow(operand, name)
        for name, operand in zip(CacheOperands._fields, operands, strict=True)
        if name in _REQUIRED or (operand is not None and name != "out")
    }


def make_cache_problem(arrays: Mapping[str, Array], given: CacheOptions) -> Problem:
    """Check a call's arrays and options, all of them, and return what is left to compute.

    Args:
        arrays: what `borrowed_operands` gives.
        given: the options as they came from the caller.

    Raises:
        ArgumentError: in one of its kinds; an argument that cannot be used.
    """
    is_causal = options.check_bool("is_causal", given.is_causal)
    scale = options.check_scale(given.scale)
    form = Layout(options.check_layout(given.layout, True))
    batch_invariant = options.check_bool("batch_invariant", given.batch_invariant)
    num_splits = _check_num_splits(given.num_splits, batch_invariant)
    return_lse = options.check_bool("return_lse", given.return_lse)

    query = arrays["query"]
    check_same_kind(dict(arrays))
    kv_dtype = cache_scales.check_types(arrays)
    views = _views(arrays, form)
    batch, seqlen_q, num_heads_q, head_dim = views["query"].shape
    packed = _check_packed(arrays, given, seqlen_q)
    sequences, longest = (batch, seqlen_q) if packed is None else packed
    _check_caches(views, form)
    num_heads_kv, head_dim_v = views["key_cache"].shape[2], views["value_cache"].shape[3]

    _check_per_sequence("cache_seqlens", arrays["cache_seqlens"], sequences, "how many keys the cache has of each sequence")
    cache, capacity = _check_places(arrays, views, sequences)
    scales = cache_scales.check_scales(arrays, kv_dtype, sequences, num_heads_kv)
    new = _check_new(arrays, views, form, capacity)
    no_tokens = packed is not None and seqlen_q == 0
    rotary = _check_rotary(arrays, given.rotary_interleaved, head_dim, capacity, has_new=new is not None or (no_tokens and "key" in arrays))
    chosen_scale = head_dim**-0.5 if scale is None else scale
    features = check_features(
        Extents(sequences, num_heads_q, longest, capacity, query),
        arrays,
        Options(is_causal=is_causal, window=_window_that_hides(given.window, capacity, longest), softcap=given.softcap),
        is_causal=is_causal,
        scale=chosen_scale,
    )
    return Problem(
        dtype=query.dtype,
        batch=batch,
        seqlen_q=seqlen_q,
        seqlen_kv=capacity,
        num_heads_q=num_heads_q,
        num_heads_kv=num_heads_kv,
        batch_kv=sequences,
        head_dim=head_dim,
        scale=chosen_scale,
        is_causal=is_causal,
        causal_alignment="bottom_right",
        deterministic=False,
        allow_tf32=False,
        return_lse=return_lse,
        query=views["query"],
        key=views["key_cache"],
        value=views["value_cache"],
        key_shape=views["key_cache"].shape,
        value_shape=views["value_cache"].shape,
        layout=form if packed is None else PACKED,
        head_dim_v=head_dim_v,
        max_seqlen_q=longest,
        max_seqlen_kv=capacity,
        seqlens_kv=True,
        num_sequences=None if packed is None else sequences,
        features=features,
        aligned=all(arrays[name].pointer % 16 == 0 for name in ("key_cache", "value_cache")),
        value_in_key=is_first_columns(arrays["value_cache"], views["value_cache"], arrays["key_cache"], views["key_cache"]),
        vectorized=False,  # each array says so itself: one kernel is for all of them
        cache=replace(cache, new=new, rotary=rotary, dtype=kv_dtype, scales=scales),
        num_splits=None if num_splits == STREAM_K else num_splits,
        stream_k=num_splits == STREAM_K,
        batch_invariant=batch_invariant,
    )


# --- Shapes -------------------------------------------------------------------------------------------------------------------------------


def _views(arrays: Mapping[str, Array], form: Layout) -> dict[str, View]:
    """Query, caches and what is appended, in canonical order; packed queries and new keys are a batch of one."""
    views: dict[str, View] = {}
    for name in ("query", "key_cache", "value_cache", "key", "value"):
        if name not in arrays:
            continue
        shape = arrays[name].shape
        if "cu_seqlens_q" in arrays and name in ("query", "key", "value"):
            views[name] = _packed_view(name, arrays[name])
            continue
        if len(shape) != 4:
            hint = (
                "One query for each sequence is query[:, None], which copies nothing."
                if name == "query"
                else "Reshape it; strided views are not copied."
            )
            raise ShapeError(name, f"{len(shape)} dimensions, {shape}", f"4 dimensions {form.describe()}", hint)
        if max(shape) > MAX_EXTENT:
            raise UnsupportedError(name, f"shape {shape}", f"extents of at most {MAX_EXTENT}", "Split the call.")
        views[name] = form.view(arrays[name], form.to_canonical(shape)[3])
    _, seqlen_q, heads, head_dim = views["query"].shape
    packed = "cu_seqlens_q" in arrays
    got = f"shape {arrays['query'].shape}, read as {(PACKED if packed else form).describe()}"
    hint = "Packed queries have the dimensions (tokens, heads, head_dim)." if packed else "Say how dimensions are read with layout=."
    if not ((seqlen_q or packed) and heads and head_dim):
        raise ShapeError("query", got, f"at least one {'' if packed else 'query, '}head and column", hint)
    if head_dim > MAX_HEAD_DIM:
        raise UnsupportedError("query", got, f"a head_dim of at most {MAX_HEAD_DIM}", hint)
    return views


def _packed_view(name: str, array: Array) -> View:
    if len(array.shape) != 3:
        hint = f"Pack the sequences one behind the other, or leave cu_seqlens_q out for {Layout().describe()}."
        raise ShapeError(name, f"{len(array.shape)} dimensions, {array.shape}", f"3 dimensions {PACKED.describe()} with cu_seqlens_q", hint)
    if max(array.shape) > MAX_EXTENT:
        raise UnsupportedError(name, f"shape {array.shape}", f"extents of at most {MAX_EXTENT}", "Split the call.")
    return PACKED.view(array, array.shape[2])


def _check_packed(arrays: Mapping[str, Array], given: CacheOptions, tokens: int) -> tuple[int, int] | None:
    """How many packed sequences there are, and how many queries the longest has; None where queries are not packed."""
    if "cu_seqlens_q" not in arrays:
        if given.max_seqlen_q is not None:
            hint = "Leave it out: queries that are not packed are as many for each sequence."
            raise OptionError("max_seqlen_q", describe(given.max_seqlen_q), "None without cu_seqlens_q", hint)
        return None
    if "attn_mask" in arrays:
        hint = "Use is_causal, window or alibi_slopes; or leave cu_seqlens_q out, and pad."
        raise OptionError("attn_mask", "an array with cu_seqlens_q", "None: packed sequences have scores of different shapes", hint)
    offsets = arrays["cu_seqlens_q"]
    lengths = check_cu_seqlens((offsets, offsets), (given.max_seqlen_q, None), arrays["query"], (tokens, tokens))
    assert lengths.num_sequences is not None
    return lengths.num_sequences, lengths.max_seqlen_q


def _check_caches(views: Mapping[str, View], form: Layout) -> None:
    """Key and value caches fit each other and the query."""
    _, _, heads, head_dim = views["query"].shape
    rows, length, heads_kv, head_dim_k = views["key_cache"].shape
    hint = f"Dimensions are read as {form.describe()}, of a paged cache with pages in the place of the batch; say otherwise with layout=."
    shown = {name: form.from_canonical(view.shape) for name, view in views.items()}
    if head_dim_k != head_dim:
        raise ShapeError(
            "key_cache", f"head_dim {head_dim_k} in {shown['key_cache']}", f"head_dim {head_dim}, like query with {shown['query']}", hint
        )
    if heads_kv == 0 or heads % heads_kv:
        raise ShapeError(
            "key_cache",
            f"{heads_kv} heads in {shown['key_cache']}",
            f"a divisor of {heads}, the heads of query with {shown['query']}",
            hint,
        )
    if views["value_cache"].shape[:3] != (rows, length, heads_kv):
        expected = f"{form.from_canonical((rows, length, heads_kv, views['value_cache'].shape[3]))}, like key_cache but for head_dim"
        raise ShapeError("value_cache", f"shape {shown['value_cache']}", expected, "There has to be one value for each key.")
    if not 1 <= views["value_cache"].shape[3] <= MAX_HEAD_DIM:
        raise ShapeError("value_cache", f"head_dim {views['value_cache'].shape[3]}", f"a head_dim from 1 to {MAX_HEAD_DIM}", hint)


def _check_per_sequence(name: str, array: Array, batch: int, meaning: str) -> None:
    """int32, one for each sequence, contiguous."""
    _check_int32(name, array)
    if array.shape != (batch,):
        raise ShapeError(name, f"shape {array.shape}", f"({batch},), one for each sequence of query", f"Pass {meaning}.")
    if batch > 1 and array.strides != (1,):
        raise ShapeError(
            name, f"a stride of {array.strides[0]}", "contiguous elements", f"Copy it: {name}.copy(), or .contiguous() for a tensor."
        )


def _check_int32(name: str, array: Array) -> None:
    if array.dtype != "int32":
        cast = f"{name}.to(torch.int32)" if array.framework.library == "torch" else f"{name}.astype('int32')"
        raise DTypeError(name, array.dtype, "int32", f"Cast it: {cast}.")


def _check_places(arrays: Mapping[str, Array], views: Mapping[str, View], batch: int) -> tuple[Cache, int]:
    """Where the keys of each sequence lie, and how many there is room for."""
    rows, length, _, _ = views["key_cache"].shape
    shape = arrays["key_cache"].shape
    if "cache_leftpad" in arrays:
        _check_per_sequence("cache_leftpad", arrays["cache_leftpad"], batch, "how many keys at the beginning of each sequence are padding")
    if "page_table" in arrays:
        table = arrays["page_table"]
        if "cache_batch_idx" in arrays:
            hint = "Pass the rows of the table that are meant: page_table[cache_batch_idx]."
            raise OptionError("cache_batch_idx", "an array beside page_table", "one of the two", hint)
        _check_int32("page_table", table)
        if len(table.shape) != 2 or table.shape[0] != batch:
            hint = "Pass the pages of each sequence in their order; what lies behind its last key may be anything."
            raise ShapeError("page_table", f"shape {table.shape}", f"({batch}, pages of a sequence)", hint)
        if table.shape[0] and table.shape[1] > 1 and table.strides[1] != 1:
            hint = "Copy it: page_table.copy(), or .contiguous() for a tensor."
            raise ShapeError("page_table", f"a stride of {table.strides[1]} between pages", "contiguous rows", hint)
        if not (rows and length):
            raise ShapeError(
                "key_cache", f"shape {shape}", "at least one page of at least one key", "Pass (pages, page_size, heads, head_dim)."
            )
        capacity = table.shape[1] * length
        if capacity > MAX_EXTENT:
            got = f"{table.shape[1]} pages of {length} keys for a sequence"
            raise UnsupportedError("page_table", got, f"at most {MAX_EXTENT} keys", "Pass the columns that are in use.")
        return Cache(rows, length, table.strides[0]), capacity
    if "cache_batch_idx" in arrays:
        _check_per_sequence("cache_batch_idx", arrays["cache_batch_idx"], batch, "which row of the cache is that of each sequence")
        if batch and not rows:
            raise ShapeError("key_cache", f"shape {shape}", "at least one row", "Pass the cache that cache_batch_idx picks from.")
    elif rows < batch:
        hint = "Pass cache_batch_idx if sequences have other rows of the cache than their own, or page_table if it is paged."
        raise ShapeError("key_cache", f"{rows} rows in {shape}", f"at least {batch}, one for each sequence of query", hint)
    return Cache(rows), length


def _check_new(arrays: Mapping[str, Array], views: Mapping[str, View], form: Layout, capacity: int) -> NewRows | None:
    """What is appended: key and value together, shaped like the cache but for their own length, which packed is that of the query."""
    if ("key" in arrays) != ("value" in arrays):
        missing = "value" if "key" in arrays else "key"
        raise OptionError(missing, "None while the other one is given", "new keys and values together", f"Pass {missing} too, or neither.")
    if "key" not in arrays:
        return None
    packed = "cu_seqlens_q" in arrays
    form = PACKED if packed else form
    batch, seqlen_q, _, _ = views["query"].shape
    count = seqlen_q if packed else views["key"].shape[1]
    if share_memory(arrays["key_cache"], arrays["value_cache"]):
        hint = "Pass arrays of their own, or halves of one array, such as cache[:, :, 0] and cache[:, :, 1]."
        raise ArgumentError("value_cache", "an array that shares memory with key_cache", "memory that key_cache does not use", hint)
    for name in ("key", "value"):
        expected = (batch, count, *views[f"{name}_cache"].shape[2:])
        if views[name].shape != expected:
            hint = f"It is read as {form.describe()}; with the heads and head_dim of the cache, and as many keys as values."
            raise ShapeError(name, f"shape {arrays[name].shape}", f"{form.from_canonical(expected)}", hint)
        cache = arrays[f"{name}_cache"]
        if cache.read_only:
            hint = "Pass a writable array, for a tensor .detach()."
            raise ArgumentError(
                f"{name}_cache", "a read-only or immutable array, or a tensor that requires grad", "memory that may be written", hint
            )
        if overlaps_itself(cache):
            got = f"shape {cache.shape} with strides {cache.strides}, where elements share memory"
            raise ArgumentError(f"{name}_cache", got, "separate memory for each element that is written", "Pass a copy.")
        for other in ("query", "key", "value"):
            if share_memory(cache, arrays[other]):
                hint = "What is in the cache already is not appended: leave key and value out, and count it in cache_seqlens."
                raise ArgumentError(other, f"an array that shares memory with {name}_cache", "memory that the cache does not use", hint)
    if count > capacity and not packed:
        raise ShapeError(
            "key", f"{count} new keys of a sequence", f"at most {capacity}, for which the cache has room", "Make the cache larger."
        )
    return NewRows(views["key"], views["value"]) if count else None


def _check_rotary(arrays: Mapping[str, Array], interleaved: object, head_dim: int, capacity: int, *, has_new: bool) -> Rotary | None:
    """Tables of cos and sin: (positions, rotary_dim / 2), in the type of query or float32, with a position for each key that there is room for."""
    tables = {name: arrays[name] for name in ("rotary_cos", "rotary_sin") if name in arrays}
    if not tables:
        if interleaved is not None:
            raise OptionError(
                "rotary_interleaved", describe(interleaved), "None without rotary_cos", "Pass rotary_cos and rotary_sin, or leave it out."
            )
        return None
    if len(tables) == 1:
        missing = "rotary_sin" if "rotary_cos" in tables else "rotary_cos"
        raise OptionError(missing, "None while the other one is given", "tables of cos and sin together", f"Pass {missing} too.")
    if interleaved is None:
        hint = "True rotates neighbours, columns 2i and 2i + 1 (GPT-J, flash-attn's default); False columns i and i + rotary_dim / 2 (GPT-NeoX, Llama)."
        raise OptionError("rotary_interleaved", "None with rotary_cos", "True or False, which nothing else could tell", hint)
    if not has_new:
        hint = "Rotate query before the call; keys in the cache are taken as they are."
        raise OptionError("rotary_cos", "an array without new keys", "key and value to append beside it", hint)
    cos, sin = tables["rotary_cos"], tables["rotary_sin"]
    for name, table in tables.items():
        if table.dtype not in (arrays["query"].dtype, "float32"):
            hint = f"Cast it: {cast_to(name, table, 'float32')}."
            raise DTypeError(name, table.dtype, f"float32, or {arrays['query'].dtype} like query", hint)
        if len(table.shape) != 2 or not (table.shape[0] and 1 <= table.shape[1] <= head_dim // 2):
            expected = f"(positions, rotary_dim / 2), where rotary_dim is at most the head_dim of {head_dim}"
            raise ShapeError(name, f"shape {table.shape}", expected, "One row for each position of a sequence, one column for each pair.")
        if table.shape[1] > 1 and table.strides[1] != 1:
            raise ShapeError(
                name, f"a stride of {table.strides[1]} between pairs", "contiguous rows", f"Copy it: {name}.copy(), or .contiguous()."
            )
    if (cos.shape, cos.dtype) != (sin.shape, sin.dtype):
        raise ShapeError(
            "rotary_sin", f"{sin.dtype} {sin.shape}", f"{cos.dtype} {cos.shape}, like rotary_cos", "Pass tables of the same positions."
        )
    if cos.shape[0] < capacity:
        hint = "Make the tables longer" + ("; or pass fewer columns of page_table." if "page_table" in arrays else ".")
        raise ShapeError("rotary_cos", f"{cos.shape[0]} positions", f"at least {capacity}, the keys that a sequence has room for", hint)
    return Rotary(
        2 * cos.shape[1], cos.shape[0], cos.dtype, options.check_bool("rotary_interleaved", interleaved), (cos.strides[0], sin.strides[0])
    )


def _window_that_hides(window: Window, capacity: int, seqlen_q: int) -> Window:
    """The window, or None where neither limit hides anything in a cache of this room, as in flash-attn."""
    left, right = check_window(window)
    hides_none = (left is None or left >= capacity) and (right is None or right >= max(capacity, seqlen_q))
    return None if hides_none else window


def _check_num_splits(num_splits: object, batch_invariant: bool) -> int | Literal["stream-K"] | None:
    if num_splits is None:
        return None
    if batch_invariant:
        hint = (
            "Leave one of the two out: stream-K cuts keys by the lengths of the whole batch."
            if num_splits == STREAM_K
            else "Leave it out: splits have a fixed size then, and their number follows from the room that the cache has."
        )
        raise OptionError("num_splits", describe(num_splits), "None with batch_invariant=True", hint)
    if isinstance(num_splits, numbers.Integral) and not isinstance(num_splits, bool) and 1 <= operator.index(num_splits) <= MAX_SPLITS:
        return operator.index(num_splits)
    if isinstance(num_splits, str) and num_splits == STREAM_K:
        return STREAM_K
    hint = "Leave it out for as many as are predicted to be fastest, which flash-attn writes as 0."
    raise OptionError("num_splits", describe(num_splits), f"an int from 1 to {MAX_SPLITS}, {STREAM_K!r}, or None", hint)


# --- Positions in the host's memory -------------------------------------------------------------------------------------------------------


def check_positions(problem: Problem, addresses: Mapping[str, int]) -> None:
    """Check lengths, tables and indices that lie in the host's memory.

    Raises:
        OptionError: one that lies outside the cache, or a position without rotary embedding.
    """
    cache = problem.cache
    assert cache is not None
    cache_scales.check_values(problem, addresses)
    sequences, queries = problem.sequences, [problem.seqlen_q] * problem.sequences
    if problem.num_sequences is not None:
        check_offsets("q", addresses["cu_seqlens_q"], sequences, problem.seqlen_q, problem.max_seqlen_q)
        offsets = _numbers(addresses["cu_seqlens_q"], sequences + 1)
        queries = [end - begin for begin, end in itertools.pairwise(offsets)]
    lengths, appended = list(_numbers(addresses["cache_seqlens"], sequences)), []
    for i, (length, own) in enumerate(zip(lengths, queries, strict=True)):
        new = own if problem.num_sequences is not None and cache.new is not None else cache.new_keys
        positions = max(new, own if problem.queries_advance else 1)
        appended.append(length + new)
        if not 0 <= length <= problem.seqlen_kv - new:
            room = f"room for {problem.seqlen_kv} keys" + (f", {new} of them new" if new else "")
            raise OptionError("cache_seqlens", f"{length} at {i}", f"0 to {problem.seqlen_kv - new}", f"The cache has {room}.")
        if cache.rotary is not None and length + positions > cache.rotary.rows:
            got = f"{cache.rotary.rows} positions, while queries and new keys of sequence {i} stand at {length} to {length + positions - 1}"
            raise OptionError("rotary_cos", got, "a row for each position of a sequence", "Make the tables longer.")
    if "cache_batch_idx" in addresses:
        rows = list(_numbers(addresses["cache_batch_idx"], sequences))
        _check_range("cache_batch_idx", rows, cache.num_rows, "rows of the cache")
        if cache.new is not None:
            _check_alone("cache_batch_idx", [[row] if own else [] for row, own in zip(rows, queries, strict=True)], "row")
    if "cache_leftpad" in addresses:
        _check_range("cache_leftpad", _numbers(addresses["cache_leftpad"], sequences), problem.seqlen_kv + 1, "keys that there is room for")
    if "page_table" in addresses:
        of_new = []
        for i, (length, end) in enumerate(zip(lengths, appended, strict=True)):
            row = addresses["page_table"] + 4 * i * cache.stride_page_table
            pages = list(_numbers(row, -(-end // cache.page_size)))
            _check_range("page_table", pages, cache.num_rows, f"pages, in the part that sequence {i} uses")
            of_new.append(pages[length // cache.page_size :] if end > length else [])
        if cache.new is not None:
            _check_alone("page_table", of_new, "page")


def _numbers(address: int, count: int) -> Iterator[int]:
    return iter((ctypes.c_int32 * count).from_address(address))


def _check_range(name: str, indices: Iterable[int], end: int, meaning: str) -> None:
    for i, index in enumerate(indices):
        if not 0 <= index < end:
            raise OptionError(name, f"{index} at {i}", f"0 to {end - 1}", f"There are {end} {meaning}.")


def _check_alone(name: str, of_sequences: Iterable[Iterable[int]], what: str) -> None:
    """What gets new keys of a sequence gets none of another one."""
    owners: dict[int, int] = {}
    for i, places in enumerate(of_sequences):
        for place in places:
            if owners.setdefault(place, i) != i:
                expected = f"a {what} of its own for the new keys of each"
                raise OptionError(name, f"{place} for sequences {owners[place]} and {i}", expected, f"Copy the {what} for one of them.")
