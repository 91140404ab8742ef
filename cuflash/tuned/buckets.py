"""Calls that share a tuned tile: a kernel with what it is compiled for, and lengths up to the next power of two."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import log2
from typing import Literal

SHORTEST, LONGEST = 1, 65536
"""Lengths beyond these are counted as these. A call with one query, as in decoding, shares no tile with one of many."""

MAX_DISTANCE = 4.0
"""Powers of two by which lengths, added up, may differ for a tile to be taken for a call."""

_SIXTEEN_BITS = ("float16", "bfloat16")
_OTHER_TYPE = 0.5  # what the other 16-bit type counts: the kernels are the same but for conversions


@dataclass(frozen=True)
class Bucket:
    """What decides which tile is fastest.

    Attributes:
        kernel: its name, as plans have it.
        dtype, head_dim, head_dim_v, allow_tf32, causal: as in the call.
        features: names of score features and masks, a mask with its element type, in alphabetical order.
        lengths: whether sequences are "padded" to one length, have "seqlens_kv", or are packed ("varlen").
        grid: "few" where the GPU is not filled: fewer than two tiles of 64 queries for each SM; else "full". A tile for the one is bad for the other.
        seqlen_q, seqlen_kv: of the longest sequence, rounded up to a power of two; where a block takes the queries of all heads that share a key head, these together.
        window: keys that a query sees through a sliding window, rounded up to a power of two; 0 without one.
    """

    kernel: str
    dtype: str
    head_dim: int
    head_dim_v: int
    allow_tf32: bool
    causal: bool
    features: tuple[str, ...]
    lengths: Literal["padded", "seqlens_kv", "varlen"]
    grid: Literal["few", "full"]
    seqlen_q: int
    seqlen_kv: int
    window: int = 0

    def distance(self, other: Bucket) -> float | None:
        """How far the other's lengths are, in powers of two; None where its tiles say nothing about this one."""
        if other.kernel != self.kernel:
            return None
        pairs = [(self.seqlen_q, other.seqlen_q), (self.seqlen_kv, other.seqlen_kv), (self.window, other.window)]
        if (self.window == 0) != (other.window == 0) or (self.seqlen_q == 1) != (other.seqlen_q == 1):
            return None
        same = replace(other, seqlen_q=self.seqlen_q, seqlen_kv=self.seqlen_kv, window=self.window)
        other_type = 0.0
        if same.dtype != self.dtype and {same.dtype, self.dtype} == set(_SIXTEEN_BITS):
            same, other_type = replace(same, dtype=self.dtype), _OTHER_TYPE
        if same != self:
            return None
        apart = sum(abs(log2(own / others)) for own, others in pairs if own) + other_type
        return apart if apart <= MAX_DISTANCE else None

    def ignoring_lengths(self) -> Bucket:
        """One bucket for all lengths, windows and grids: what a kernel is compiled for."""
        return replace(self, grid="full", seqlen_q=SHORTEST, seqlen_kv=SHORTEST, window=min(SHORTEST, self.window))

    def __str__(self) -> str:
        head_dims = str(self.head_dim) if self.head_dim == self.head_dim_v else f"{self.head_dim}/{self.head_dim_v}"
        lengths = str(self.seqlen_q) if self.seqlen_q == self.seqlen_kv else f"{self.seqlen_q} x {self.seqlen_kv}"
        words = [self.kernel, self.dtype, f"head_dim {head_dims}", f"seqlen up to {lengths}", "causal" if self.causal else "full"]
        words += [f"window up to {self.window}" if name == "window" else name for name in self.features]
        words += ["TF32" if self.allow_tf32 else "", self.lengths if self.lengths != "padded" else ""]
        return ", ".join([word for word in words if word] + (["few blocks"] if self.grid == "few" else []))


def length_bucket(length: int) -> int:
    """The next power of two."""
    return min(LONGEST, max(SHORTEST, 1 << max(0, length - 1).bit_length()))
