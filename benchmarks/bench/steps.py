"""`--cache`: steps of generation, each with a full cache from memory: the new key and value are appended, and a few queries attend to all."""

from __future__ import annotations

import argparse
import re
import time
from dataclasses import dataclass
from typing import Any

import numpy

import cuflash
from bench.machine import Machine, fill_queue, heat
from bench.report import STEP_COLUMNS, Table, one_line
from bench.timing import time_call
from cuflash import reference
from cuflash.cli.cached_calls import E4M3

ROOMS = (1024, 32768, 262144)
PAIRS = (1, 4, 8, 32, 64, 128, 256)
HEAD_DIM, GROUP = 128, 4
ALLOWED_ERROR = 1e-2
_BLOCK_KEYS = 4096
"""That are random; a longer cache has them again and again."""


@dataclass(frozen=True)
class Step:
    """A step of `batch` sequences that have `keys` keys with the new ones, in bfloat16.

    Attributes:
        batch, keys, seqlen_q, heads, heads_kv, head_dim: extents.
        page_size: 0 for a row of each sequence.
        kv_dtype: of the cache.
    """

    batch: int
    keys: int
    seqlen_q: int = 1
    heads: int = GROUP
    heads_kv: int = 1
    head_dim: int = HEAD_DIM
    page_size: int = 64
    kv_dtype: str = "bfloat16"

    def __str__(self) -> str:
        lies = f"pages of {self.page_size}" if self.page_size else "rows"
        return f"{self.kv_dtype} d{self.head_dim} b{self.batch} h{self.heads}/{self.heads_kv} {self.seqlen_q} queries {self.keys} keys in {lies}"

    @property
    def key_bytes(self) -> int:
        """Of all keys and values."""
        return 2 * self.batch * self.keys * self.heads_kv * self.head_dim * (1 if self.kv_dtype == E4M3 else 2)

    def arguments(self, machine: Machine) -> dict[str, Any]:
        """Of `attention_with_kvcache`, on the device."""
        rng, xp = numpy.random.default_rng(0), numpy if machine.dry else machine.cupy
        pages = -(-self.keys // self.page_size) if self.page_size else 1
        rows = (self.batch * pages, self.page_size or self.keys)

        def array(shape: tuple[int, ...], dtype: str = "bfloat16") -> Any:
            count = int(numpy.prod(shape))
            block = stored(rng.standard_normal(min(count, _BLOCK_KEYS * self.heads_kv * self.head_dim)), dtype)
            bits, block = xp.empty(count, block.dtype), xp.asarray(block)
            for first in range(0, count, len(block)):
                bits[first : first + len(block)] = block[: count - first]
            bits = bits.reshape(shape)
            return cuflash.bfloat16(bits) if dtype == "bfloat16" else bits

        new = (self.batch, self.seqlen_q, self.heads_kv, self.head_dim)
        given = {
            "query": array((self.batch, self.seqlen_q, self.heads, self.head_dim)), "key": array(new), "value": array(new),
            "key_cache": array((*rows, self.heads_kv, self.head_dim), self.kv_dtype), "value_cache": array((*rows, self.heads_kv, self.head_dim), self.kv_dtype),
            "cache_seqlens": xp.full(self.batch, self.keys - self.seqlen_q, "int32"), "is_causal": True,
        }  # fmt: skip
        if self.page_size:
            given["page_table"] = xp.asarray(rng.permutation(rows[0]).astype("int32").reshape(self.batch, pages))
        return given

    def error(self, given: dict[str, Any], out: Any) -> float:
        """Relative, of the last sequence against float64, after the step."""
        last = self.batch - 1
        pages = reference.to_numpy(given["page_table"])[last] if self.page_size else [last]
        of_cache = (given[name] for name in ("key_cache", "value_cache"))
        keys, values = (
            as_float64(numpy.concatenate([reference.to_numpy(bits_of(cache)[page]) for page in pages])[None, : self.keys])
            for cache in of_cache
        )
        query, got = (as_float64(reference.to_numpy(bits_of(x)[last:])) for x in (given["query"], out))
        want, _ = reference.attention(query, keys, values, is_causal=True, causal_alignment="bottom_right", enable_gqa=True)
        return float(numpy.abs(got - want).max() / numpy.abs(want).max())


def steps(machine: Machine) -> list[Step]:
    """What is timed: pairs of sequence and key head times keys; then pages, caches in 8 bits, heads and numbers of queries."""
    if machine.small:
        return [Step(2, 200, page_size=16, head_dim=32), Step(1, 150, page_size=0, head_dim=32, kv_dtype=E4M3)]
    plain = [Step(pairs, keys) for keys in ROOMS for pairs in PAIRS]
    return [
        *plain,
        *(Step(8, 32768, page_size=size) for size in (0, 1, 16)),
        *(Step(pairs, 32768, kv_dtype=E4M3) for pairs in (8, 64)),
        *(Step(8, 32768, seqlen_q=queries) for queries in (4, 16)),
        Step(4, 32768, heads=32, heads_kv=8),
    ]


def time_steps(machine: Machine, arguments: argparse.Namespace) -> int:
    """`--cache`: microseconds of a step by events, with nothing of the cache in L2 before, and bytes of keys and values in a second."""
    deadline = time.monotonic() + arguments.seconds
    chosen = [step for step in steps(machine) if re.search(arguments.cases, str(step))]
    table = Table(arguments.output and arguments.output / "cache.csv", STEP_COLUMNS)
    timed = wrong = 0
    heat(machine)
    for step in chosen:
        if time.monotonic() > deadline:
            print(f"out of time after {timed} of {len(chosen)} steps")
            break
        row: dict[str, Any] = {
            **machine.head(), "dtype": "bfloat16", "kv_dtype": step.kv_dtype, "batch": step.batch, "heads": step.heads, "heads_kv": step.heads_kv,
            "head_dim": step.head_dim, "seqlen_q": step.seqlen_q, "keys": step.keys, "page_size": step.page_size,
        }  # fmt: skip
        try:
            given = step.arguments(machine)
            plan = cuflash.kvcache_plan(**given)
            row["splits"] = next(str(kernel.splits) for kernel in plan.kernels if kernel.spec.splits_keys)
            out = cuflash.attention_with_kvcache(**given)
            row["relative_error"] = step.error(given, out)
            if not row["relative_error"] <= ALLOWED_ERROR:
                raise ValueError(f"wrong: relative error {row['relative_error']:.1e}")
            row |= time_call(
                machine, lambda given=given, out=out: cuflash.attention_with_kvcache(**given, out=out), 0.03,
                before=lambda: fill_queue(machine),
            )  # fmt: skip
            row["gigabytes_per_second"] = step.key_bytes / row["milliseconds"] / 1e6
            timed += 1
            print(
                f"{step!s:64} {1000 * row['milliseconds']:8.1f} µs {row['gigabytes_per_second']:7.0f} GB/s, splits: {row['splits']}",
                flush=True,
            )
        except Exception as error:
            wrong += 1
            row["note"] = one_line(error)
            print(f"{step!s:64} {row['note']}", flush=True)
        table.add(row)
    where = "on the simulator: times mean nothing" if machine.dry else f"on {machine.gpu}"
    print(f"SUMMARY: {timed} of {len(chosen)} steps timed {where}, {wrong} failed")
    return int(wrong > 0)


# --- Numbers that NumPy has no type for ---------------------------------------------------------------------------------------------------


def stored(values: Any, dtype: str) -> Any:
    """Their bits as bfloat16 or e4m3."""
    if dtype == "bfloat16":
        return reference.to_bfloat16_bits(values.astype(numpy.float32))
    import ml_dtypes

    return values.astype(ml_dtypes.float8_e4m3fn).view(numpy.uint8)


def bits_of(x: Any) -> Any:
    return getattr(x, "bits", x)


def as_float64(bits: Any) -> Any:
    """What 16 bits of bfloat16, or 8 of e4m3, stand for."""
    if bits.dtype == numpy.uint16:
        return reference.from_bfloat16_bits(bits).astype(numpy.float64)
    import ml_dtypes

    return bits.view(ml_dtypes.float8_e4m3fn).astype(numpy.float64)
