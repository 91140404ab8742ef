"""Calls that are given by numbers alone, on random arrays: what `python -m cuflash profile`, the benchmarks and the sanitizers' cases run.

`Sample` says everything about a call but its arrays; `operands` and `arguments` make these, always the same for the same seed. Arrays are NumPy's, and
those of a float type hold float32 values that their own type can represent, so that a caller can place them on any device: `element_type` makes them NumPy
arrays that cuflash takes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import numpy
from numpy.typing import NDArray

import cuflash
from cuflash import reference
from cuflash.cli.cached_calls import CachedCall
from cuflash.cli.sample_features import SampleFeatures
from cuflash.errors import OptionError
from cuflash.planning.plan import Plan
from cuflash.problem.layout import CANONICAL
from cuflash.problem.options import check_layout
from cuflash.problem.problem import Problem
from cuflash.problem.tile import Tiles


@dataclass(frozen=True)
class Sample:
    """A call on random arrays.

    Attributes:
        batch, seqlen_q, seqlen_kv, num_heads_q, num_heads_kv: extents of a padded batch; packed sequences have the heads only.
        head_dim, head_dim_v: of query and key, and of value; None for the same.
        dtype: "float16", "bfloat16" or "float32".
        is_causal, causal_alignment, scale, layout, allow_tf32: as in `cuflash.scaled_dot_product_attention`; None for the call's default.
        lengths_q: numbers of queries of packed sequences; None for a padded batch.
        lengths_kv: numbers of keys: of packed sequences, None for those of queries; or those of `seqlens_kv` of a padded batch, None without; or of a cache, None if it is full.
        seqlens_q: numbers of queries of the rows of a padded batch; None for all.
        features: see there.
        cache: where keys and values lie in a cache; None for arrays of their own. Of such a sample there are plans alone.
    """

    batch: int = 1
    seqlen_q: int = 256
    seqlen_kv: int = 256
    num_heads_q: int = 1
    num_heads_kv: int = 1
    head_dim: int = 64
    head_dim_v: int | None = None
    dtype: str = "float16"
    is_causal: bool = False
    causal_alignment: str | None = None
    scale: float | None = None
    layout: str = CANONICAL
    allow_tf32: bool = False
    lengths_q: tuple[int, ...] | None = None
    lengths_kv: tuple[int, ...] | None = None
    features: SampleFeatures = field(default_factory=SampleFeatures)
    cache: CachedCall | None = None
    seqlens_q: tuple[int, ...] | None = None

    @property
    def is_packed(self) -> bool:
        """A call of `cuflash.varlen_attention`."""
        return self.lengths_q is not None

    @property
    def packed_lengths(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Numbers of queries and of keys of packed sequences."""
        queries = self.lengths_q or ()
        return queries, queries if self.lengths_kv is None else self.lengths_kv

    @property
    def forward(self) -> Callable[..., Any]:
        """The public function of the forward pass."""
        return cuflash.varlen_attention if self.is_packed else cuflash.scaled_dot_product_attention

    @property
    def backward(self) -> Callable[..., Any]:
        """The public function of the backward pass."""
        return cuflash.varlen_attention_backward if self.is_packed else cuflash.scaled_dot_product_attention_backward

    @property
    def plan(self) -> Callable[..., Any]:
        """The public function that says what both would run."""
        return cuflash.varlen_plan if self.is_packed else cuflash.plan

    @property
    def backward_options(self) -> dict[str, bool]:
        """Keyword arguments that the backward pass has besides `arguments`."""
        return {"need_attn_mask_grad": True} if self.features.need_attn_mask_grad else {}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of query, key, value and grad_out, in the layout.

        Raises:
            OptionError: a layout that is none.
        """
        order, wide = check_layout(self.layout, True), self.head_dim if self.head_dim_v is None else self.head_dim_v
        batch, (rows, columns) = self.batch, (self.seqlen_q, self.seqlen_kv)
        if self.is_packed:
            if order != CANONICAL:
                raise OptionError(
                    "layout", f"{order!r} with packed sequences", "none", "They are (tokens, heads, head_dim): leave layout out."
                )
            order, (rows, columns) = "shd", (sum(lengths) for lengths in self.packed_lengths)
        queries, keys = {"b": batch, "s": rows, "h": self.num_heads_q}, {"b": batch, "s": columns, "h": self.num_heads_kv}
        extents = {"query": (queries, self.head_dim), "key": (keys, self.head_dim), "value": (keys, wide), "grad_out": (queries, wide)}
        return {name: tuple((of | {"d": dim})[letter] for letter in order) for name, (of, dim) in extents.items()}

    def operands(self, seed: int = 0) -> dict[str, NDArray[Any]]:
        """query, key, value and grad_out, normally distributed: float32 values of `dtype`."""
        rng = numpy.random.default_rng(seed)
        return {name: reference.round_to(rng.standard_normal(shape, numpy.float32), self.dtype) for name, shape in self.shapes().items()}

    def arguments(self, seed: int = 0) -> dict[str, Any]:
        """The keyword arguments of both passes, those that have their default left out; lengths and masks are NumPy arrays, an additive mask in float32.

        Raises:
            OptionError: documents of packed sequences, or none.
        """
        named: dict[str, Any] = {"scale": self.scale, "causal_alignment": self.causal_alignment}
        named |= {name: getattr(self, name) or None for name in ("is_causal", "allow_tf32")}
        if self.num_heads_q != self.num_heads_kv:
            named["enable_gqa"] = True
        if self.layout != CANONICAL and not self.is_packed:
            named["layout"] = self.layout
        if self.is_packed:
            for name, lengths in zip(("q", "kv"), self.packed_lengths, strict=True):
                named[f"cu_seqlens_{name}"] = numpy.array([0, *accumulate(lengths)], numpy.int32)
                named[f"max_seqlen_{name}"] = max(lengths, default=0)
        elif self.lengths_kv is not None:
            named["seqlens_kv"] = numpy.array(self.lengths_kv, numpy.int32)
        if self.seqlens_q is not None:
            named["seqlens_q"] = numpy.array(self.seqlens_q, numpy.int32)
        return {name: value for name, value in (named | self.features.arguments(self, seed)).items() if value is not None}


def element_type(values: NDArray[Any], dtype: str) -> Any:
    """The values as an array of the named element type that cuflash takes, without any package for bfloat16."""
    return cuflash.bfloat16(reference.to_bfloat16_bits(values)) if dtype == "bfloat16" else values.astype(dtype)


def numpy_call(sample: Sample, seed: int = 0) -> tuple[dict[str, Any], dict[str, Any]]:
    """The operands and the keyword arguments of both passes as NumPy arrays of their element types."""
    operands = {name: element_type(values, sample.dtype) for name, values in sample.operands(seed).items()}
    return operands, numpy_arguments(sample, seed)


def plan_of(sample: Sample, *, backward: bool = False, tile: Tiles = None) -> Plan:
    """The plan of a pass, made before the operands, which take gigabytes for long sequences.

    Raises:
        CuflashError: what the call itself raises for these arguments.
    """
    operands = {name: stand_in(sample.shapes()[name], sample.dtype) for name in ("query", "key", "value")}
    options = sample.backward_options if backward else {}
    planned: Plan = sample.plan(**operands, **numpy_arguments(sample, 0), **options, backward=backward, tile=tile)
    return planned


def problem_of(sample: Sample, *, backward: bool) -> Problem:
    """What a pass is planned from, with a cache or without.

    Raises:
        CuflashError: what the call itself raises for these arguments; of the gradients of a call with a cache.
    """
    if sample.cache is None:
        return plan_of(sample, backward=backward).problem
    if backward:
        raise OptionError("--cache", "it with the backward pass", "the forward pass", "Caches have no gradients: leave one of both out.")
    return sample.cache.problem(sample)


def stand_in(shape: tuple[int, ...], dtype: str) -> Any:
    """A contiguous array that says it is as large as that, without its memory: for plans, which look at no element."""
    aligned = numpy.zeros(1, numpy.uint16 if dtype == "bfloat16" else dtype)
    strides = numpy.cumprod((aligned.itemsize, *shape[:0:-1]))[::-1]
    large = numpy.lib.stride_tricks.as_strided(aligned, shape, strides.tolist(), writeable=False)
    return cuflash.bfloat16(large) if dtype == "bfloat16" else large


def numpy_arguments(sample: Sample, seed: int = 0) -> dict[str, Any]:
    """`Sample.arguments` with a mask in its own element type."""
    arguments = sample.arguments(seed)
    if sample.features.attn_mask is not None:
        arguments["attn_mask"] = element_type(arguments["attn_mask"], sample.features.attn_mask)
    return arguments
