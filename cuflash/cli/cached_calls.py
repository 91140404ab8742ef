"""Calls with a cache that are given by numbers alone: their options, and what `explain` and `warmup` plan of them.

`CachedCall` says of a sample where its keys and values lie. No array is made: a plan looks at no element, and caches take gigabytes.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from math import prod
from typing import TYPE_CHECKING, Any

from cuflash.cli.option_types import DTYPES, positive
from cuflash.errors import OptionError

if TYPE_CHECKING:
    from cuflash.arrays.borrowing import Array
    from cuflash.cli.samples import Sample
    from cuflash.hardware.device import Device
    from cuflash.jit.compiler import CompileRequest
    from cuflash.problem.problem import Problem

E4M3 = "float8_e4m3fn"
_FAR = 2**44  # between addresses of arrays that there are none of
_STREAM_K = "stream-K"  # problem/cache_call.py has it too, which the parser of options does not import, since that takes NumPy
_TAKEN = ("is_causal", "scale", "window", "softcap", "alibi_slopes", "sinks")


@dataclass(frozen=True)
class CachedCall:
    """How the keys and values of a sample lie in a cache, which has room for its `seqlen_kv` keys of each sequence.

    Attributes:
        page_size: keys of a page; None for a row of each sequence.
        kv_dtype: of the cache; None for that of the query.
        num_splits: "stream-K" for equal shares of all keys; None for what is predicted to be fastest.
        rotary: element type of the tables of a rotary embedding over the whole head; None without.
    """

    page_size: int | None = None
    kv_dtype: str | None = None
    num_splits: int | str | None = None
    rotary: str | None = None

    def problem(self, sample: Sample) -> Problem:
        """The call that appends as many keys as there are queries, and attends to the cache.

        Raises:
            CuflashError: what the call itself raises.
        """
        from cuflash.problem.cache_call import CacheOptions, make_cache_problem

        given = sample.arguments()
        unknown = [name for name in given if name not in (*_TAKEN, "enable_gqa", "causal_alignment", "seqlens_kv")]
        if sample.is_packed or unknown:
            name = "--varlen" if sample.is_packed else f"--{unknown[0].removesuffix('_p').replace('_', '-')}"
            raise OptionError(name, "it with --cache", "no such option", "Leave it out; or plan the call itself: cuflash.kvcache_plan(…).")
        if sample.lengths_kv is not None and len(sample.lengths_kv) != sample.batch:
            raise OptionError(
                "--seqlens-kv",
                f"{len(sample.lengths_kv)} numbers",
                f"{sample.batch}, one for each sequence of the cache",
                "Correct --batch.",
            )
        options = CacheOptions(
            sample.is_causal, sample.scale, given.get("window"), given.get("softcap"), "bshd", None if self.rotary is None else False, self.num_splits,
            False, False, None, None,
        )  # fmt: skip
        return make_cache_problem(self._arrays(sample, given), options)

    def _arrays(self, sample: Sample, given: dict[str, Any]) -> dict[str, Array]:
        batch, room, kv_dtype = sample.batch, sample.seqlen_kv, self.kv_dtype or sample.dtype
        heads_kv, wide = sample.num_heads_kv, sample.head_dim_v or sample.head_dim
        rows = (batch, room)
        shapes: dict[str, tuple[tuple[int, ...], str]] = {
            "query": ((batch, sample.seqlen_q, sample.num_heads_q, sample.head_dim), sample.dtype),
            "key": ((batch, sample.seqlen_q, heads_kv, sample.head_dim), sample.dtype),
            "value": ((batch, sample.seqlen_q, heads_kv, wide), sample.dtype),
            "cache_seqlens": ((batch,), "int32"),
        }  # fmt: skip
        if self.page_size is not None:
            pages = -(-room // self.page_size)
            rows = (batch * pages, self.page_size)
            shapes["page_table"] = ((batch, pages), "int32")
        shapes |= {"key_cache": ((*rows, heads_kv, sample.head_dim), kv_dtype), "value_cache": ((*rows, heads_kv, wide), kv_dtype)}
        if kv_dtype != sample.dtype:
            shapes |= dict.fromkeys(("key_scale", "value_scale"), ((heads_kv,), "float32"))
        if self.rotary is not None:
            positions = room if self.page_size is None else -(-room // self.page_size) * self.page_size
            shapes |= dict.fromkeys(("rotary_cos", "rotary_sin"), ((positions, sample.head_dim // 2), self.rotary))
        shapes |= {name: (given[name].shape, "float32") for name in ("alibi_slopes", "sinks") if name in given}
        return {name: _nowhere(shape, dtype, number) for number, (name, (shape, dtype)) in enumerate(shapes.items(), 1)}


def _nowhere(shape: tuple[int, ...], dtype: str, number: int) -> Array:
    """A contiguous array of this shape, of which there is no memory."""
    from cuflash.arrays import frameworks
    from cuflash.arrays.borrowing import CPU, Array
    from cuflash.problem.problem import KV_DTYPES

    strides = tuple(prod(shape[axis + 1 :]) for axis in range(len(shape)))
    return Array(number * _FAR, shape, strides, dtype, KV_DTYPES.get(dtype, 4), CPU, frameworks.NUMPY, None)


def requests_of(sample: Sample, device: Device) -> Iterator[CompileRequest]:
    """What to compile for all calls like this one, of any number of queries, heads and splits: tiles of 16 and of 32 rows, no new keys, few and many, with and
    without merging, and stream-K."""
    from cuflash.planning.kernel_cases import WIDEST_NARROW_HEAD
    from cuflash.planning.planner import make_plan

    assert sample.cache is not None
    kinds = (1, 1), (1, 32), (32, 1)  # queries, heads that share a key head
    of_splits: tuple[int | str, ...] = (2,)
    if max(sample.head_dim, sample.head_dim_v or 0) <= WIDEST_NARROW_HEAD:
        of_splits += (_STREAM_K,)
    for splits, (queries, heads) in product(of_splits, kinds):
        cached = replace(sample.cache, num_splits=splits)
        like = replace(sample, batch=1, seqlen_q=queries, seqlen_kv=4096, num_heads_q=heads, num_heads_kv=1, cache=cached)
        problem = cached.problem(like)
        assert problem.cache is not None
        for cache in (problem.cache, replace(problem.cache, new=None, rotary=None)):
            for kernel in make_plan(replace(problem, cache=cache), device).kernels:
                yield kernel.request(device)


def warmup_caches(options: argparse.Namespace, cached: CachedCall) -> int:
    """Compile the kernels of calls with a cache, for the cases that the options of `warmup` name.

    Returns:
        How many kernels they need.
    """
    from cuflash.cli.command_options import features_of
    from cuflash.cli.samples import Sample
    from cuflash.jit import cache
    from cuflash.tuning import target

    on, features = target(options.arch), features_of(options, is_causal=True)
    requests: dict[CompileRequest, None] = {}
    for head_dim, dtype, causal in product(options.head_dim, options.dtype, (True,) if options.causal else (False, True)):
        sample = Sample(head_dim=head_dim, head_dim_v=options.head_dim_v, dtype=dtype, is_causal=causal, features=features, cache=cached)
        requests |= dict.fromkeys(requests_of(sample, on))
    cache.fetch_many(list(requests))
    return len(requests)


# --- Options ------------------------------------------------------------------------------------------------------------------------------


def add_cache(parser: argparse.ArgumentParser) -> None:
    """Add the options of a call with a cache."""
    group = parser.add_argument_group(
        "a cache of keys and values", "The call of cuflash.attention_with_kvcache that appends as many keys as there are queries."
    )
    group.add_argument(
        "--cache", action="store_true", help="keys and values lie in a cache, with room for --seqlen-kv keys of each sequence"
    )
    group.add_argument("--page-size", type=positive, metavar="N", help="keys of a page (default: no pages, a row for each sequence)")
    group.add_argument("--kv-dtype", choices=("float16", "bfloat16", E4M3), help="element type of the cache (default: that of the query)")
    group.add_argument(
        "--num-splits",
        type=_splits,
        metavar="N",
        help="blocks that share out keys of a sequence, or stream-K (default: what is predicted to be fastest)",
    )
    group.add_argument("--rotary", choices=DTYPES, help="rotary embedding, with tables of this type")


def _splits(text: str) -> int | str:
    return text if text == _STREAM_K else positive(text)


def cache_of(options: argparse.Namespace) -> CachedCall | None:
    """What the options say of a cache; None without one.

    Raises:
        OptionError: something about a cache without one.
    """
    if "cache" not in options:
        return None
    named = {name: getattr(options, name) for name in ("page_size", "kv_dtype", "num_splits", "rotary")}
    if options.cache:
        return CachedCall(**named)
    for name, value in named.items():
        if value is not None:
            raise OptionError(f"--{name.replace('_', '-')}", f"{value} without --cache", "--cache with it", "Add --cache.")
    return None
