"""What the judge knows of score features and masks: float64 NumPy, one batch and head at a time, each feature as its definition says.

    score = [softcap · tanh](scale · q·k [/ softcap]) + attn_mask - alibi_slope · |i + shift - j|
    i sees j  ⇔  causal or j < prefix_length,  and -left <= j - i - shift <= right,  and equal segment ids,  and attn_mask is True or above -inf

`shift` is 0, or for causal_alignment="bottom_right" the row's number of keys - seqlen_q. Dropout keeps an element where its half of a word of Philox 4x32-7 (Salmon et al. 2011,
doi 10.1145/2063384.2063405) is at least ceil(dropout_p · 2¹⁶); how elements are counted is said in kernels/tile/dropout.cuh, and written out again here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy
from numpy.typing import NDArray

Floats = NDArray[Any]
Booleans = NDArray[numpy.bool_]

_MASK_32 = 0xFFFFFFFF


@dataclass(frozen=True)
class Rules:
    """The features of one call, for all batches and heads.

    Attributes:
        shape: (batch, heads, seqlen_q, seqlen_kv).
        lengths: (batch,), keys that each row of the batch has.
        is_causal, bottom_right, window, softcap, dropout_p: as above.
        attn_mask: boolean or float64, broadcast to `shape`; None without.
        alibi_slopes: (batch, heads); sinks: (heads,); segment ids: (batch, seqlen); prefix_lengths: (batch,). None without.
        dropout_seed: seed and offset.
        first_batch: as which the first row of the batch counts for dropout.
    """

    shape: tuple[int, int, int, int]
    lengths: NDArray[Any]
    is_causal: bool
    bottom_right: bool
    window: tuple[int | None, int | None]
    softcap: float | None
    attn_mask: NDArray[Any] | None
    mask_shape: tuple[int, ...]
    alibi_slopes: Floats | None
    sinks: Floats | None
    segment_ids_q: NDArray[Any] | None
    segment_ids_kv: NDArray[Any] | None
    prefix_lengths: NDArray[Any] | None
    dropout_p: float
    dropout_seed: tuple[int, int]
    first_batch: int

    def shift(self, b: int) -> int:
        """How far the diagonal of causal masks, windows and ALiBi is moved to the right."""
        return int(self.lengths[b]) - self.shape[2] if self.bottom_right else 0

    def visible(self, b: int, h: int) -> Booleans:
        """(seqlen_q, seqlen_kv): True where a query sees a key."""
        _, _, seqlen_q, seqlen_kv = self.shape
        difference = numpy.arange(seqlen_kv)[None, :] - numpy.arange(seqlen_q)[:, None] - self.shift(b)
        seen = numpy.ones((seqlen_q, seqlen_kv), numpy.bool_)
        if self.is_causal:
            seen &= difference <= 0
        if self.prefix_lengths is not None:
            seen |= (numpy.arange(seqlen_kv) < self.prefix_lengths[b])[None, :]
        seen &= (numpy.arange(seqlen_kv) < self.lengths[b])[None, :]
        left, right = self.window
        if left is not None and left >= 0:
            seen &= difference >= -left
        if right is not None and right >= 0:
            seen &= difference <= right
        if self.segment_ids_q is not None and self.segment_ids_kv is not None:
            seen &= self.segment_ids_q[b][:, None] == self.segment_ids_kv[b][None, :]
        if self.attn_mask is not None:
            mask = self.attn_mask[b, h]
            seen &= mask if mask.dtype == numpy.bool_ else ~numpy.isneginf(mask)
        return seen

    def bias(self, b: int, h: int) -> Floats | None:
        """(seqlen_q, seqlen_kv): what is added to the scores, 0 where that is -inf; None for nothing."""
        total = None
        if self.attn_mask is not None and self.attn_mask.dtype != numpy.bool_:
            mask = self.attn_mask[b, h]
            total = numpy.where(numpy.isneginf(mask), 0.0, mask)
        if self.alibi_slopes is not None:
            _, _, seqlen_q, seqlen_kv = self.shape
            distance = abs(numpy.arange(seqlen_q)[:, None] + self.shift(b) - numpy.arange(seqlen_kv)[None, :])
            slopes = -self.alibi_slopes[b, h] * distance
            total = slopes if total is None else total + slopes
        return total

    def kept(self, b: int, h: int) -> Booleans | None:
        """(seqlen_q, seqlen_kv): True where dropout keeps a probability; None without dropout."""
        if self.dropout_p == 0.0:
            return None
        return dropout_mask((self.first_batch + b, h), self.shape[2:], self.dropout_p, self.dropout_seed)

    @property
    def kept_factor(self) -> float:
        """1 / (1 - dropout_p); 0 where everything is dropped."""
        return 0.0 if self.dropout_p == 1.0 else 1.0 / (1.0 - self.dropout_p)

    def reduce_mask_grad(self, of_scores: Floats) -> Floats:
        """(batch, heads, seqlen_q, seqlen_kv), summed over the axes along which the mask is broadcast, in the mask's shape."""
        shape = (1,) * (4 - len(self.mask_shape)) + self.mask_shape
        axes = tuple(axis for axis in range(4) if shape[axis] == 1)
        return numpy.asarray(of_scores.sum(axis=axes, keepdims=True).reshape(self.mask_shape))


def rules_of(
    shape: tuple[int, int, int, int],
    to_numpy: Callable[[Any], NDArray[Any]],
    to_float64: Callable[[Any], NDArray[Any]],
    *,
    is_causal: bool,
    causal_alignment: str,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    dropout_seed: Any = (0, 0),
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    alibi_slopes: Any = None,
    sinks: Any = None,
    segment_ids_q: Any = None,
    segment_ids_kv: Any = None,
    prefix_lengths: Any = None,
    seqlens_kv: Any = None,
    first_batch: int = 0,
) -> Rules:
    """The features of a call with scores of `shape`; arguments as in `cuflash.scaled_dot_product_attention`."""
    if causal_alignment not in ("top_left", "bottom_right"):
        raise ValueError(f"unknown causal alignment {causal_alignment!r}")
    mask = None
    if attn_mask is not None:
        raw = attn_mask if hasattr(attn_mask, "bits") else to_numpy(attn_mask)
        mask = numpy.broadcast_to(raw if getattr(raw, "dtype", None) == numpy.bool_ else to_float64(attn_mask), shape)
    seed = dropout_seed
    if not isinstance(seed, (int, tuple)):
        first, second = (int(word) for word in to_numpy(seed))
        seed = (first, second)
    lengths = numpy.full(shape[0], shape[3]) if seqlens_kv is None else numpy.clip(to_numpy(seqlens_kv), 0, shape[3])
    return Rules(
        shape=shape,
        lengths=lengths,
        is_causal=is_causal,
        bottom_right=causal_alignment == "bottom_right",
        window=window or (None, None),
        softcap=softcap or None,
        attn_mask=mask,
        mask_shape=() if attn_mask is None else tuple(attn_mask.shape),
        alibi_slopes=None if alibi_slopes is None else numpy.broadcast_to(to_float64(alibi_slopes), shape[:2]),
        sinks=None if sinks is None else to_float64(sinks),
        segment_ids_q=None if segment_ids_q is None else to_numpy(segment_ids_q),
        segment_ids_kv=None if segment_ids_kv is None else to_numpy(segment_ids_kv),
        prefix_lengths=None if prefix_lengths is None else to_numpy(prefix_lengths),
        dropout_p=dropout_p,
        dropout_seed=(seed, 0) if isinstance(seed, int) else seed,
        first_batch=first_batch,
    )


# --- Dropout ------------------------------------------------------------------------------------------------------------------------------


def philox(counter: tuple[Any, Any, Any, Any], key: tuple[int, int]) -> tuple[NDArray[numpy.uint64], ...]:
    """Philox 4x32-7: four words for each counter; counters are arrays or numbers below 2**32, and broadcast."""
    words = [numpy.asarray(word, numpy.uint64) for word in counter]
    low, high = key
    for _ in range(7):
        first, second = words[0] * numpy.uint64(0xD2511F53), words[2] * numpy.uint64(0xCD9E8D57)
        words = [
            (second >> numpy.uint64(32)) ^ words[1] ^ numpy.uint64(low),
            second & numpy.uint64(_MASK_32),
            (first >> numpy.uint64(32)) ^ words[3] ^ numpy.uint64(high),
            first & numpy.uint64(_MASK_32),
        ]
        low, high = (low + 0x9E3779B9) & _MASK_32, (high + 0xBB67AE85) & _MASK_32
    return tuple(words)


def dropout_mask(at: tuple[int, int], lengths: tuple[int, int], dropout_p: float, seed_and_offset: tuple[int, int]) -> Booleans:
    """(seqlen_q, seqlen_kv) of one (batch, head): True where a probability is kept."""
    seed, offset = (number % 2**64 for number in seed_and_offset)
    words = philox((offset & _MASK_32, offset >> 32, _MASK_32, _MASK_32), (seed & _MASK_32, seed >> 32))
    key = (int(words[0]), int(words[1]))
    query, position = numpy.arange(lengths[0])[:, None], numpy.arange(lengths[1])[None, :]
    of_group = philox((position & ~9, query & ~8, at[1], at[0]), key)
    which = (query >> 3 & 1) * 2 + (position >> 3 & 1)
    word = numpy.choose(which, [numpy.broadcast_to(one, which.shape) for one in of_group])
    half = word >> (position & 1).astype(numpy.uint64) * numpy.uint64(16) & numpy.uint64(0xFFFF)
    return numpy.asarray(half >= math.ceil(dropout_p * 2.0**16))
