"""Calls with a cache of keys and values, made at random, and what the judge says of them.

A `CacheCall` knows the keys of each sequence as plain arrays; `arrays` puts them into a cache of any form, whose other bytes are NaN and infinity and whose
other table entries are garbage.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy
import pytest
from conftest import ELEMENTS, Target, poison_new_memory, rounded

import cuflash
from cuflash import reference
from cuflash.reference import compare
from cuflash.runtime import kept_memory


def only_new_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Results and workspace of later calls come full of NaN, and nothing is kept from call to call."""
    poison_new_memory(monkeypatch)
    monkeypatch.setattr(kept_memory, "_kept", kept_memory._OfThread())
    monkeypatch.setattr(kept_memory, "give_back", lambda *_: None)


GARBAGE = numpy.array([-(2**31), -1, 2**31 - 1, 12345], numpy.int32)


@dataclass(frozen=True)
class CacheCall:
    """A call.

    Attributes:
        lengths: keys that the cache has of each sequence.
        seqlen_q, new: queries and new keys of each.
        heads_q, heads_kv, head_dim, head_dim_v: of the arrays; a head_dim_v of 0 stands for head_dim.
        room: keys that a sequence has room for.
        page_size: 0: not paged.
        picks_rows: sequences have rows of a larger cache.
        leftpad: keys of each sequence that are padding.
        rotary_dim: 0: no rotary embedding.
        interleaved: its pairs.
        dtype: of the arrays.
        scales: of a cache in e4m3: "heads" of each head, "sequences" of each sequence and head, "none" for a cache without; "": a cache like the other arrays.
        shares_columns: values are the first columns of their keys, in the same memory.
        options: further arguments.
    """

    lengths: tuple[int, ...]
    seqlen_q: int = 1
    new: int = 0
    heads_q: int = 2
    heads_kv: int = 1
    head_dim: int = 32
    head_dim_v: int = 0
    room: int = 300
    page_size: int = 0
    picks_rows: bool = False
    leftpad: tuple[int, ...] = ()
    rotary_dim: int = 0
    interleaved: bool = False
    dtype: str = "float16"
    scales: str = ""
    shares_columns: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def batch(self) -> int:
        return len(self.lengths)

    @functools.cached_property
    def _rng(self) -> numpy.random.Generator:
        return numpy.random.default_rng(len(self.lengths) + sum(self.lengths))

    def _random(self, *shape: int) -> Any:
        return rounded(self._rng.standard_normal(shape), self.dtype)

    @functools.cached_property
    def plain(self) -> dict[str, Any]:
        """Query, new keys and values, tables of the rotary embedding, and the keys and values of each sequence."""
        widths = {"keys": self.head_dim, "values": self.head_dim_v or self.head_dim}
        made = {"query": self._random(self.batch, self.seqlen_q, self.heads_q, self.head_dim)}
        for name, width in widths.items():
            made[name] = [self.stored(self._random(length, self.heads_kv, width)) for length in self.lengths]
        if self.shares_columns:
            made["values"] = [keys[..., : widths["values"]] for keys in made["keys"]]
        if self.new:
            made["key"] = self._random(self.batch, self.new, self.heads_kv, widths["keys"])
            made["value"] = self._random(self.batch, self.new, self.heads_kv, widths["values"])
        if self.scales in ("heads", "sequences"):
            shape = (self.heads_kv,) if self.scales == "heads" else (self.batch, self.heads_kv)
            made |= {name: self._rng.uniform(0.01, 2.0, shape).astype(numpy.float32) for name in ("key_scale", "value_scale")}
        if self.rotary_dim:
            positions = -(-self.room // self.page_size) * self.page_size if self.page_size else self.room
            angles = self._rng.uniform(0, 6, (positions, self.rotary_dim // 2)).astype(numpy.float32)
            made |= {"rotary_cos": numpy.cos(angles), "rotary_sin": numpy.sin(angles)}
        return made

    def arrays(self) -> dict[str, Any]:
        """All arguments of the call, as NumPy arrays."""
        plain = self.plain
        names = ("query", "key", "value", "rotary_cos", "rotary_sin", "key_scale", "value_scale")
        given = {name: plain[name] for name in names if name in plain}
        given["cache_seqlens"] = numpy.array(self.lengths, numpy.int32)
        if self.rotary_dim:
            given["rotary_interleaved"] = self.interleaved
        if self.leftpad:
            given["cache_leftpad"] = numpy.array(self.leftpad, numpy.int32)
        row_of = self._places(given)
        for name, of in (("key_cache", "keys"), ("value_cache", "values")):
            width = plain[of][0].shape[-1]
            element = ml_dtypes.float8_e4m3fn if self.scales else ELEMENTS[self.dtype]
            cache = numpy.full((*self._cache_shape(), self.heads_kv, width), numpy.nan, element)
            if not self.scales:
                cache[..., ::2] = numpy.inf
            for b, rows in enumerate(plain[of]):
                for position in range(self.leftpad[b] if self.leftpad else 0, len(rows)):
                    cache[row_of(b, position)] = rows[position]
            given[name] = cache
        return given | self.options

    def _cache_shape(self) -> tuple[int, int]:
        if self.page_size:
            return self.batch * -(-self.room // self.page_size) + 3, self.page_size
        return (2 * self.batch + 1 if self.picks_rows else self.batch), self.room

    def _places(self, given: dict[str, Any]) -> Any:
        """(row or page, place in it) of each position of each sequence; puts the tables that say so into `given`."""
        if self.page_size:
            columns = -(-self.room // self.page_size)
            pages = self._rng.permutation(self._cache_shape()[0])[: self.batch * columns].reshape(self.batch, columns).astype(numpy.int32)
            table = pages.copy()
            for b, length in enumerate(self.lengths):
                used = -(-(length + self.new) // self.page_size)
                table[b, used:] = numpy.resize(GARBAGE, columns - used)
            given["page_table"] = table
            return lambda b, position: (pages[b, position // self.page_size], position % self.page_size)
        if self.picks_rows:
            rows = self._rng.permutation(self._cache_shape()[0])[: self.batch].astype(numpy.int32)
            given["cache_batch_idx"] = rows
            return lambda b, position: (rows[b], position)
        return lambda b, position: (b, position)

    # --- The judge ------------------------------------------------------------------------------------------------------------------------

    def rotated(self, x: Any, first: int, advances: bool = True, dtype: Any = None) -> Any:
        """(rows, heads, head_dim) of which the first row has this position, to float32 and then to what is kept: a number halfway between two goes either way."""
        if not self.rotary_dim:
            return x
        positions = first + (numpy.arange(len(x)) if advances else numpy.zeros(len(x), int))
        cos, sin = (self.plain[name][positions][:, None].astype(numpy.float64) for name in ("rotary_cos", "rotary_sin"))
        y, half = x.astype(numpy.float64), self.rotary_dim // 2
        one = slice(0, self.rotary_dim, 2) if self.interleaved else slice(0, half)
        other = slice(1, self.rotary_dim, 2) if self.interleaved else slice(half, self.rotary_dim)
        result = y.copy()
        result[..., one] = y[..., one] * cos - (y[..., other] * sin).astype(numpy.float32)
        result[..., other] = y[..., other] * cos + (y[..., one] * sin).astype(numpy.float32)
        return result.astype(numpy.float32).astype(dtype or x.dtype)

    def stored(self, x: Any, name: str = "", b: int = 0) -> Any:
        """(rows, heads, head_dim) as a cache has it: in e4m3, the largest number for what is larger, divided by the scale of this name."""
        if not self.scales:
            return x
        divided = x.astype(numpy.float32) / self._scale(name, b)
        return numpy.clip(divided, -448, 448).astype(ml_dtypes.float8_e4m3fn)

    def _scale(self, name: str, b: int) -> Any:
        """Of each head of a sequence, to multiply (rows, heads, head_dim) by."""
        scale = self.plain[name] if name and self.scales != "none" else numpy.float32(1)
        return (scale[b] if scale.ndim == 2 else scale)[..., None]

    def appended(self, b: int) -> tuple[Any, Any]:
        """Keys and values of a sequence after the call as the cache has them, padding included."""
        plain = self.plain
        keys, values = plain["keys"][b], plain["values"][b]
        if self.new:
            new_keys = self.stored(
                self.rotated(plain["key"][b], self.lengths[b], dtype=numpy.float32 if self.scales else None), "key_scale", b
            )
            keys = numpy.concatenate([keys, new_keys])
            values = numpy.concatenate([values, self.stored(plain["value"][b], "value_scale", b)])
        return keys, values

    def truth(self, judge: Any, *precision: str, **more: Any) -> tuple[Any, Any]:
        """out and lse of all sequences by a function of `cuflash.reference`."""
        outs, lses = [], []
        options = {name: option for name, option in self.options.items() if name not in ("num_splits", "batch_invariant", "tile")}
        for b in range(self.batch):
            own = dict(options)
            if "attn_mask" in own:
                mask = own["attn_mask"]
                own["attn_mask"] = mask[min(b, len(mask) - 1)][
                    None, ..., self.leftpad[b] if self.leftpad else 0 : self.lengths[b] + self.new
                ]
            pad = self.leftpad[b] if self.leftpad else 0
            keys, values = self.appended(b)
            if self.scales:
                keys, values = keys.astype(float) * self._scale("key_scale", b), values.astype(float) * self._scale("value_scale", b)
            advances = bool(own.get("is_causal") or own.get("window"))
            query = self.rotated(self.plain["query"][b], self.lengths[b], advances)
            given = (query[None], keys[None, pad:], values[None, pad:])
            out, lse = judge(*given, *precision, enable_gqa=True, causal_alignment="bottom_right", **own, **more)
            outs.append(out)
            lses.append(lse)
        return numpy.concatenate(outs), numpy.concatenate(lses)

    def check(self, target: Target) -> tuple[Any, Any]:
        """Run the call, and assert that out, lse and what was appended are as exact as the naive formula."""
        given = {name: target.place(x) if isinstance(x, numpy.ndarray) else x for name, x in self.arrays().items()}
        if self.shares_columns:
            given["value_cache"] = given["key_cache"][..., : self.head_dim_v]
        before = {name: target.as_numpy(given[name]).copy() for name in ("key_cache", "value_cache")}
        out, lse = cuflash.attention_with_kvcache(**given, return_lse=True)
        self.check_results(out, lse)
        self._check_caches(target, given, before)
        return out, lse

    def check_results(self, out: Any, lse: Any) -> None:
        """Assert that both are as exact as the naive formula."""
        want, want_lse = self.truth(reference.attention)
        naive, _ = self.truth(reference.attention_naive, self.dtype)
        _, naive_lse = self.truth(reference.attention_naive, "float32")
        compare(out, want, naive, name="out")
        compare(lse, want_lse, naive_lse, name="lse", dtype="float32", terms=lambda: self.truth(reference.attention, magnitudes=True)[1])

    def _check_caches(self, target: Target, given: dict[str, Any], before: dict[str, Any]) -> None:
        """Assert that new keys and values are in their places, and that nothing else has changed."""
        tables = {name: target.as_numpy(given[name]) for name in ("page_table", "cache_batch_idx") if name in given}
        for name, at in (("key_cache", 0), ("value_cache", 1)):
            want, got = before[name], target.as_numpy(given[name])
            for b, length in enumerate(self.lengths):
                for i in range(self.new):
                    position = length + i
                    row = (b, position)
                    if self.page_size:
                        row = (tables["page_table"][b, position // self.page_size], position % self.page_size)
                    elif self.picks_rows:
                        row = (tables["cache_batch_idx"][b], position)
                    want[row] = self.appended(b)[at][position]
                    if self.rotary_dim and at == 0:  # one rounding to 16 bits, of a number that float32 gives
                        close = {"rtol": 2 * reference.EPSILON[self.dtype], "atol": 1e-6}
                        numpy.testing.assert_allclose(got[row].astype(float), want[row].astype(float), **close)
                        want[row] = got[row]
            assert Target.bits(got) == Target.bits(want)


BEHIND = 3
"""Tokens that belong to no sequence."""


class PackedCall:
    """Calls of one sequence each, put into one."""

    def __init__(self, queries: tuple[int, ...], lengths: tuple[int, ...], *, new: bool = False, **call: Any) -> None:
        own = [CacheCall((length,), max(count, 1), count if new else 0, **call) for count, length in zip(queries, lengths, strict=True)]
        for other in own[1:]:
            other.plain.update({name: table for name, table in own[0].plain.items() if name.startswith("rotary")})
        self.calls, self.offsets = own, numpy.cumsum([0, *queries]).astype("int32")
        self.given = [call.arrays() for call in own]

    def arrays(self) -> dict[str, Any]:
        """Of the whole call."""
        together = dict(self.given[0]) | {"cu_seqlens_q": self.offsets}
        for name in ("query", "key", "value"):
            if name in together:
                tokens = [given[name][0, : end - begin] for given, begin, end in self._each() if name in given]
                nobodys = numpy.ones((BEHIND, *tokens[0].shape[1:]), tokens[0].dtype)
                together[name] = numpy.concatenate([*tokens, nobodys])
        for name in ("key_cache", "value_cache", "cache_seqlens", "cache_leftpad"):
            if name in together:
                together[name] = numpy.concatenate([given[name] for given in self.given])
        for name in ("page_table", "cache_batch_idx"):
            if name in together:
                together[name] = numpy.concatenate(
                    [given[name] + numpy.int32(i * len(given["key_cache"])) for i, given in enumerate(self.given)]
                )
        return together

    def check(self, target: Target, **options: Any) -> Any:
        """Run it; assert that each sequence has what a call of its own would give, and the cache what was appended."""
        given = {name: target.place(x) if isinstance(x, numpy.ndarray) else x for name, x in self.arrays().items()}
        out, lse = cuflash.attention_with_kvcache(**given, return_lse=True, **options)
        out_there, lse_there = target.host(out), target.host(lse)
        assert (lse_there.shape, out_there.shape) == ((given["query"].shape[1], len(given["query"])), given["query"].shape)
        rows = 0
        for call, (own, begin, end) in zip(self.calls, self._each(), strict=True):
            if end > begin:
                call.check_results(out_there[None, begin:end], lse_there[None, :, begin:end])
            after = {name: given[name][rows : rows + len(own[name])] for name in ("key_cache", "value_cache")}
            before = {name: own[name].copy() for name in after}
            call._check_caches(target, own | after, before)
            rows += len(own["key_cache"])
        assert not out_there[self.offsets[-1] :].any()
        assert numpy.isneginf(lse_there[:, self.offsets[-1] :]).all()
        return out, lse

    def _each(self) -> list[tuple[dict[str, Any], int, int]]:
        return [(given, int(begin), int(end)) for given, begin, end in zip(self.given, self.offsets, self.offsets[1:], strict=False)]
