"""A cache of keys and values for generation: pages that sequences take as they grow, and give back."""

from __future__ import annotations

import numbers
import operator
import sys
from types import ModuleType
from typing import Any

import numpy

from cuflash.arrays.borrowing import AnyArray, describe
from cuflash.decoding import attention_with_kvcache
from cuflash.errors import OptionError, ShapeError

_OWN_OPTIONS = ("layout", "page_table", "cache_seqlens", "cache_batch_idx", "cache_leftpad")
"""Arguments of `attention_with_kvcache` that `KVCache.attend` does not take."""


class KVCache:
    """Keys and values of one layer, for a batch of sequences of any lengths.

    `attend` appends a step's keys and values and attends to all that there are. Lengths are known here, so nothing waits for a device; the arrays that kernels read
    are `keys`, `values`, `seqlens` and `page_table`, as `cuflash.attention_with_kvcache` takes them.

    Attributes:
        lengths: keys of each sequence.
        keys, values: `(pages, page_size, num_heads, head_dim)`; twice as large when all pages are taken.
        seqlens: int32 `(batch,)`, `lengths` on the device.
        page_table: int32 `(batch, pages of a sequence)`.
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
        xp: Any = numpy,
    ) -> None:
        """Make an empty cache.

        Args:
            batch: sequences.
            num_heads: of keys and values.
            head_dim: of keys; of values too unless `head_dim_v` says otherwise.
            page_size: keys of a page.
            dtype: of the arrays, as `xp` knows it.
            xp: numpy or cupy, which makes the arrays.
        """
        _check_library(xp)
        batch, num_heads, head_dim, page_size = (
            _count(name, value)
            for name, value in (("batch", batch), ("num_heads", num_heads), ("head_dim", head_dim), ("page_size", page_size))
        )
        head_dim_v = head_dim if head_dim_v is None else _count("head_dim_v", head_dim_v)
        self.lengths = [0] * batch
        self.keys = xp.empty((batch, page_size, num_heads, head_dim), dtype)
        self.values = xp.empty((batch, page_size, num_heads, head_dim_v), dtype)
        self.seqlens = xp.zeros(batch, "int32")
        self.page_table = xp.zeros((batch, 1), "int32")
        self._xp = xp
        self._pages: list[list[int]] = [[] for _ in range(batch)]  # of each sequence, in order
        self._free = list(reversed(range(batch)))

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
        for name in _OWN_OPTIONS:
            if name in options:
                hint = "Leave it out, or keep the arrays yourself and call attention_with_kvcache."
                raise OptionError(name, describe(options[name]), "no such argument: the cache has its own", hint)
        if len(key.shape) != 4:
            raise ShapeError(
                "key",
                f"{len(key.shape)} dimensions, {tuple(key.shape)}",
                "4 dimensions (batch, seqlen, heads, head_dim)",
                "One key is key[:, None].",
            )
        new = int(key.shape[1])
        self._take_pages([length + new for length in self.lengths])
        result = attention_with_kvcache(
            query,
            self.keys,
            self.values,
            key,
            value,
            cache_seqlens=self.seqlens,
            page_table=self._table_up_to(options.get("rotary_cos")),
            is_causal=is_causal,
            **options,
        )
        self.seqlens += new  # behind the kernels in the stream
        self.lengths = [length + new for length in self.lengths]
        return result

    def truncate(self, sequence: int, length: int = 0) -> None:
        """Forget the keys of a sequence from `length` on, as of tokens that were speculated wrongly, or all of them; their pages are free for others."""
        if not 0 <= length <= self.lengths[sequence]:
            raise OptionError(
                "length", describe(length), f"0 to {self.lengths[sequence]}, what sequence {sequence} has", "A cache grows by attend."
            )
        kept = -(-length // self.keys.shape[1])
        self._free += reversed(self._pages[sequence][kept:])
        del self._pages[sequence][kept:]
        self.lengths[sequence] = length
        self.seqlens[sequence] = length

    def _take_pages(self, lengths: list[int]) -> None:
        """Pages for sequences of these lengths."""
        page_size = self.keys.shape[1]
        missing = [-(-length // page_size) - len(pages) for length, pages in zip(lengths, self._pages, strict=True)]
        wanted = sum(count for count in missing if count > 0)
        if not wanted:
            return
        while wanted > len(self._free):
            count = self.keys.shape[0]
            self.keys, self.values = (self._doubled(pages) for pages in (self.keys, self.values))
            self._free = list(reversed(range(count, 2 * count))) + self._free
        for pages, count in zip(self._pages, missing, strict=True):
            pages += [self._free.pop() for _ in range(count)]
        columns = self.page_table.shape[1]
        while columns < max(map(len, self._pages)):
            columns *= 2
        table = numpy.zeros((len(self._pages), columns), "int32")
        for row, pages in zip(table, self._pages, strict=True):
            row[: len(pages)] = pages
        self.page_table = self._xp.asarray(table)

    def _table_up_to(self, rotary_cos: Any) -> Any:
        """The table, without columns that are spare and for whose keys the rotary embedding has no rows."""
        shape = getattr(rotary_cos, "shape", ())
        return self.page_table[:, : max(shape[0] // self.keys.shape[1], *map(len, self._pages), 1)] if shape else self.page_table

    def _doubled(self, pages: Any) -> Any:
        larger = self._xp.empty((2 * pages.shape[0], *pages.shape[1:]), pages.dtype)
        larger[: pages.shape[0]] = pages
        return larger


def _count(name: str, value: object) -> int:
    """An int of at least 1."""
    if isinstance(value, numbers.Integral) and not isinstance(value, bool) and operator.index(value) >= 1:
        return operator.index(value)
    raise OptionError(name, describe(value), "an int of at least 1", "Pass how many there are.")


def _check_library(xp: object) -> None:
    """NumPy or CuPy, whose functions the cache calls."""
    if xp is numpy or xp is sys.modules.get("cupy"):
        return
    got = f"the module {xp.__name__}" if isinstance(xp, ModuleType) else describe(xp)
    hint = "For tensors of torch keep the arrays yourself, and call cuflash.flash_attn.flash_attn_with_kvcache."
    raise OptionError("xp", got, "numpy or cupy", hint)
