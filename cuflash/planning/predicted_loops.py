"""Loops of kernels on an H100, of mma.sync and of wgmma, with each feature, as the timing model finds them (docs/timing.md): what loops_sm_90.csv has.

`benchmarks/predicted_loops.py --write` makes the file. A line is of one kernel with one head_dim and at most one feature. A call between the lines takes those of the next larger
head_dim, and of several features the sum of what each costs.
"""

from __future__ import annotations

import csv
import functools
from collections.abc import Collection, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from cuflash.planning.predicted_time import Steady
from cuflash.problem.problem import Problem

ARCH = "sm_90"
PATH = Path(__file__).with_name(f"loops_{ARCH}.csv")

BY_DATA = frozenset(("bool", "segments"))
"""Features whose data decide which tiles have hidden pairs."""


class Key(NamedTuple):
    """What a line is of.

    Attributes:
        kernel: its name, and of one of mma.sync with numbers of float32 that word behind it.
        head_dim, head_dim_v: of query and key, and of value.
        feature: a score feature, a mask by its element type (float16 stands for bfloat16, too), or lengths that only the device knows, "varlen" or "seqlens_kv"; empty for none.
        is_causal: with a causal mask.
    """

    kernel: str
    head_dim: int
    head_dim_v: int
    feature: str = ""
    is_causal: bool = False


def read() -> dict[Key, Steady]:
    """The file as it is."""
    with PATH.open(encoding="utf-8", newline="") as file:
        _, *rows = csv.reader(file)
    found = {}
    for kernel, head_dim, head_dim_v, feature, causal, blocks, *clocks in rows:
        found[Key(kernel, int(head_dim), int(head_dim_v), feature, causal == "1")] = Steady(int(blocks), *map(float, clocks))
    return found


table = functools.cache(read)


def features_of(problem: Problem) -> frozenset[str]:
    """The names that lines have for what a call uses; one that no line has for what was never asked of the model."""
    used = {str(value) if name == "attn_mask" else name for name, value in asdict(problem.features.kinds).items() if value}
    used |= {"varlen"} if problem.num_sequences is not None else {"seqlens_kv"} if problem.seqlens_kv or problem.seqlens_q else set()
    return frozenset("float16" if name == "bfloat16" else name for name in used)


def loops_of(kernels: Sequence[str], problem: Problem) -> list[Steady] | None:
    """The loops of kernels in a call, those of one head_dim; None where nothing is known of one of them."""
    kernels = [line_of(name, problem.dtype) for name in kernels]
    dims = sorted((sum(dims), dims) for dims in _head_dims(kernels) if dims[0] >= problem.head_dim and dims[1] >= problem.head_dim_v)
    if not dims or problem.allow_tf32:
        return None
    features = features_of(problem)
    found = [_with_features(Key(name, *dims[0][1], "", problem.is_causal), features) for name in kernels]
    known = [loop for loop in found if loop is not None]
    return known if len(known) == len(kernels) else None


def line_of(kernel: str, dtype: str) -> str:
    """What lines call a kernel: of 16-bit types it has one for both, and a kernel of float32 alone has its name."""
    return f"{kernel} {dtype}" if dtype == "float32" and dtype not in kernel else kernel


def _head_dims(kernels: Sequence[str]) -> set[tuple[int, int]]:
    """Those of which all have lines with and without a causal mask."""
    of_kernels = [{key[1:3] for key in table() if key.kernel == name and not key.feature} for name in kernels]
    return set.intersection(*of_kernels) if of_kernels else set()


def _with_features(plain: Key, features: Collection[str]) -> Steady | None:
    loop = table().get(plain)
    costs = [_cost(plain, feature) for feature in features]
    if loop is None or None in costs:
        return None
    found = [of for of in costs if of is not None]
    times = 1.0 + sum(of.times - 1.0 for of in found)
    by_data = [of.masked for feature, of in zip(features, found, strict=True) if feature in BY_DATA]
    masked = max(by_data, default=loop.masked)
    return Steady(min([loop.blocks, *(of.blocks for of in found)]), loop.alone * times, loop.full * times, masked, loop.between * times)


class _Cost(NamedTuple):
    """Of a feature: how many times as long a tile takes with it, blocks of an SM, and `Steady.masked`."""

    times: float
    blocks: int
    masked: float


def _cost(plain: Key, feature: str) -> _Cost | None:
    """At the head_dim and causal mask that are nearest; None where there is no line of the feature."""
    lines = [key for key in table() if (key.kernel, key.feature) == (plain.kernel, feature)]

    def distance(key: Key) -> tuple[bool, int, bool]:
        smaller = key.head_dim < plain.head_dim or key.head_dim_v < plain.head_dim_v
        return smaller, abs(key.head_dim + key.head_dim_v - plain.head_dim - plain.head_dim_v), key.is_causal != plain.is_causal

    for key in sorted(lines, key=distance):
        without = table().get(key._replace(feature=""))
        if without is not None:
            loop = table()[key]
            return _Cost(loop.full / without.full, loop.blocks, loop.masked)
    return None
