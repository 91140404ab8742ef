"""A cache of keys and values for generation: pages that sequences take as they grow, and give back."""

from __future__ import annotations

import math
import numbers
import operator
from typing import Any

import numpy

from cuflash.arrays.borrowing import AnyArray, borrow
from cuflash.arrays.descriptions import describe
from cuflash.arrays.signatures import Pinned, signature
from cuflash.cache_arrays import ArrayLibrary
from cuflash.decoding import attention_with_kvcache
from cuflash.errors import DTypeError, OptionError, ShapeError
from cuflash.problem import cache_scales
from cuflash.problem.cache_scales import E4M3, TYPES
from cuflash.problem.checks import check_same_kind

_OWN_OPTIONS = frozenset((
    "layout", "page_table", "cache_seqlens", "cache_batch_idx", "cache_leftpad", "cu_seqlens_q", "max_seqlen_q", "key_scale", "value_scale",
))  # fmt: skip
"""Arguments of `attention_with_kvcache` that `KVCache.attend` does not take."""


class KVCache:
    """Keys and values of one layer, for a batch of sequences of any lengths.

    `attend` appends a step's keys and values and attends to all that there are. Lengths are known here, so nothing waits for a device; the arrays that kernels read
    are `keys`, `values`, `seqlens` and `page_table`, as `cuflash.attention_with_kvcache` takes them. They are of NumPy, CuPy or torch.
    """

    def __init__(
        self,
        batch: int,
        num_heads: int,
        head_dim: int,
        *,
        page_size: int = 64,
        dtype: Any = "float16",
        head_dim_v: int | None = None,
        key_scale: AnyArray | None = None,
        value_scale: AnyArray | None = None,
        xp: Any = numpy,
        device: Any = None,
    ) -> None:
        """Make an empty cache.

        Args:
            batch: sequences.
            num_heads: of keys and values.
            head_dim: of keys; of values too unless `head_dim_v` says otherwise.
            page_size: keys of a page. Where a page has as many as a sequence ever gets, the cache is contiguous: each sequence has one row of `keys` and `values`.
            dtype: of the arrays, as `xp` knows it, or its name. "float8_e4m3fn" takes half the memory of 16 bits; arrays of CuPy, and of NumPy without `ml_dtypes`, are
                uint8 then.
            key_scale, value_scale: of keys and values in float8_e4m3fn, as in `attention_with_kvcache`: largest magnitude divided by 448.
            xp: numpy, cupy or torch, which makes the arrays.
            device: of torch's tensors, as torch knows it; CuPy's current one has its arrays.
        """
        self._library = ArrayLibrary(xp, device)
        batch, num_heads, head_dim, page_size = (
            _count(name, value)
            for name, value in (("batch", batch), ("num_heads", num_heads), ("head_dim", head_dim), ("page_size", page_size))
        )
        head_dim_v = head_dim if head_dim_v is None else _count("head_dim_v", head_dim_v)
        self._keys, self._values = (
            Pinned(self._library.empty((batch, page_size, num_heads, width), dtype)) for width in (head_dim, head_dim_v)
        )
        given = {name: scale for name, scale in (("key_scale", key_scale), ("value_scale", value_scale)) if scale is not None}
        arrays = {name: borrow(x, name) for name, x in {"key_cache": self.keys, "value_cache": self.values, **given}.items()}
        check_same_kind(arrays)
        if not (cache_scales.is_in_8_bits(arrays["key_cache"]) or arrays["key_cache"].dtype in ("float16", "bfloat16")):
            raise DTypeError("dtype", arrays["key_cache"].dtype, TYPES, "Calls with a cache take no other types.")
        cache_scales.check_scales(arrays, E4M3 if cache_scales.is_in_8_bits(arrays["key_cache"]) else "", batch, num_heads)
        self._scales: dict[str, Any] = {name: scale if signature(scale) is None else Pinned(scale) for name, scale in given.items()}
        self._seqlens = Pinned(self._library.int32(numpy.zeros(batch, "int32")))
        self._page_table = Pinned(self._library.int32(numpy.zeros((batch, 1), "int32")))
        self._shorter_table: tuple[int, Pinned] | None = None  # for rotary tables of so many rows: the columns that they reach
        self._lengths = [0] * batch  # of each sequence, less _of_steps
        self._of_steps = 0  # keys that all steps have appended to each sequence: a step changes this number, and not a list
        self._one = self._library.int32(numpy.ones(1, "int32"))  # on the device: to add a number of the host's takes torch longer
        self._spare = 0  # keys that every sequence can take before any of them needs a page
        self._pages: list[list[int]] = [[] for _ in range(batch)]  # of each sequence, in order
        self._free = list(reversed(range(batch)))

    @property
    def lengths(self) -> list[int]:
        """Keys of each sequence."""
        return [length + self._of_steps for length in self._lengths]

    @property
    def keys(self) -> Any:
        """`(pages, page_size, num_heads, head_dim)`; twice as large when all pages are taken."""
        return self._keys.array

    @property
    def values(self) -> Any:
        """Like `keys`."""
        return self._values.array

    @property
    def seqlens(self) -> Any:
        """int32 `(batch,)`, `lengths` on the device."""
        return self._seqlens.array

    @property
    def page_table(self) -> Any:
        """int32 `(batch, pages of a sequence)`."""
        return self._page_table.array

    def attend(self, query: AnyArray, key: AnyArray, value: AnyArray, *, is_causal: bool = True, **options: Any) -> Any:
        """Append keys and values of all sequences and attend to what is there then.

        Args:
            query: `(batch, seqlen_q, num_heads_q, head_dim)`.
            key, value: `(batch, seqlen_new, num_heads, head_dim)`.
            is_causal: as in `attention_with_kvcache`, but True unless said otherwise.
            options: its other arguments, such as `window` or `rotary_cos`; but not those that say where keys are, which the cache knows. Tables of the rotary
                embedding have a row for each key of the pages that a sequence has.

        Returns:
            What it returns.
        """
        if not _OWN_OPTIONS.isdisjoint(options):
            name = next(name for name in options if name in _OWN_OPTIONS)
            hint = "Leave it out, or keep the arrays yourself and call attention_with_kvcache."
            raise OptionError(name, describe(options[name]), "no such argument: the cache has its own", hint)
        shape = key.shape if hasattr(key, "shape") else borrow(key, "key").shape
        if len(shape) != 4:
            raise ShapeError(
                "key",
                f"{len(shape)} dimensions, {tuple(shape)}",
                "4 dimensions (batch, seqlen, heads, head_dim)",
                "One key is key[:, None].",
            )
        new = int(shape[1])
        self.reserve(new)
        result = attention_with_kvcache(
            query,
            self._keys,
            self._values,
            key,
            value,
            cache_seqlens=self._seqlens,
            page_table=self._table_up_to(options["rotary_cos"]) if "rotary_cos" in options else self._page_table,
            is_causal=is_causal,
            **self._scales,
            **options,
        )
        seqlens = self._seqlens.array
        seqlens += self._one if new == 1 else new  # behind the kernels in the stream, in place
        self._of_steps += new
        self._spare -= new
        return result

    @property
    def room(self) -> int:
        """Keys that a row of `page_table` has places for: the last extent of an `attn_mask`."""
        return int(self.page_table.shape[1] * self.keys.shape[1])

    def reserve(self, new: int) -> None:
        """Take pages now for `new` more keys of each sequence, as `attend` does when they come."""
        if new > self._spare:
            self._take_pages([length + new for length in self.lengths])

    def truncate(self, sequence: int, length: int = 0) -> None:
        """Forget the keys of a sequence from `length` on, as of tokens that were speculated wrongly, or all of them; their pages are free for others."""
        last = len(self._lengths) - 1
        sequence = _int("sequence", sequence, 0, last, f"an int from 0 to {last}", "Sequences are counted as rows of the batch.")
        there = self._lengths[sequence] + self._of_steps
        length = _int("length", length, 0, there, f"an int from 0 to {there}, what sequence {sequence} has", "A cache grows by attend.")
        page_size = self.keys.shape[1]
        kept = -(-length // page_size)
        self._free += reversed(self._pages[sequence][kept:])
        del self._pages[sequence][kept:]
        self._lengths[sequence] = length - self._of_steps
        self._spare, self._shorter_table = min(self._spare, kept * page_size - length), None
        self.seqlens[sequence] = length

    def _take_pages(self, lengths: list[int]) -> None:
        """Pages for sequences of these lengths."""
        page_size = self.keys.shape[1]
        missing = [-(-length // page_size) - len(pages) for length, pages in zip(lengths, self._pages, strict=True)]
        wanted = sum(count for count in missing if count > 0)
        while wanted > len(self._free):
            count = self.keys.shape[0]
            self._keys, self._values = (Pinned(self._doubled(pages)) for pages in (self.keys, self.values))
            self._free = list(reversed(range(count, 2 * count))) + self._free
        for pages, count in zip(self._pages, missing, strict=True):
            pages += [self._free.pop() for _ in range(count)]
        self._spare = min(len(pages) * page_size - length for length, pages in zip(self.lengths, self._pages, strict=True))
        if not wanted:
            return
        columns = self.page_table.shape[1]
        while columns < max(map(len, self._pages)):
            columns *= 2
        table = numpy.zeros((len(self._pages), columns), "int32")
        for row, pages in zip(table, self._pages, strict=True):
            row[: len(pages)] = pages
        self._page_table, self._shorter_table = Pinned(self._library.int32(table)), None

    def _table_up_to(self, rotary_cos: Any) -> Pinned:
        """The table, without columns that are spare and for whose keys the rotary embedding has no rows."""
        shape = tuple(getattr(rotary_cos, "shape", ()))
        if not shape:
            return self._page_table
        rows = int(shape[0])
        if self._shorter_table is None or self._shorter_table[0] != rows:
            columns = max([rows // self.keys.shape[1], 1, *map(len, self._pages)])
            self._shorter_table = rows, Pinned(self.page_table[:, :columns])
        return self._shorter_table[1]

    def _doubled(self, pages: Any) -> Any:
        larger = self._library.empty((2 * pages.shape[0], *pages.shape[1:]), pages.dtype)
        larger[: pages.shape[0]] = pages
        return larger


def _int(name: str, value: object, least: int, most: float, expected: str, hint: str) -> int:
    """An int from the least one to the most."""
    if isinstance(value, numbers.Integral) and not isinstance(value, bool) and least <= operator.index(value) <= most:
        return operator.index(value)
    raise OptionError(name, describe(value), expected, hint)


def _count(name: str, value: object) -> int:
    return _int(name, value, 1, math.inf, "an int of at least 1", "Pass how many there are.")
