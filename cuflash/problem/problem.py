"""One attention problem, checked: everything that decides which kernels run, except addresses and the device."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from cuflash.problem.cache import Cache
from cuflash.problem.features import UNLIMITED, Features
from cuflash.problem.layout import Layout, Shape4, View
from cuflash.problem.options import CausalAlignment

DTYPES: dict[str, int] = {"float16": 2, "bfloat16": 2, "float32": 4}
"""Supported element types and their size in bytes."""

KV_DTYPES: dict[str, int] = {**DTYPES, "float8_e4m3fn": 1}
"""Those of keys and values; the last one in a cache only."""

MAX_HEAD_DIM = 576
MAX_EXTENT = 2**31 - 2**13
"""Kernels count rows in 32 bits and add up to a few tiles."""


Shape3 = tuple[int, int, int]


@dataclass(frozen=True)
class Problem:
    """One attention problem: everything that decides which kernels run, except addresses and the device.

    Attributes:
        dtype: "float16", "bfloat16" or "float32", of query, key, value and the output.
        batch: of the query.
        seqlen_q: queries per sequence.
        seqlen_kv: keys per sequence.
        num_heads_q: heads of the query.
        num_heads_kv: heads of key and value, the larger number if one is broadcast; divides num_heads_q, and may be 1.
        batch_kv: batch of key and value, the larger number if one is broadcast: `batch`, or 1.
        head_dim: 1 to 576, of query and key.
        scale: multiplies QKᵀ.
        is_causal: query i sees keys j <= i + causal_offset only.
        causal_alignment: which corner of the score matrix the causal diagonal goes through.
        deterministic: the backward pass adds in a fixed order.
        allow_tf32: float32 products may be computed in TF32.
        return_lse: the caller wants the log-sum-exp of each row.
        query: (batch, seqlen_q, num_heads_q, head_dim).
        key: (batch, seqlen_kv, num_heads_kv, head_dim); broadcast dimensions have stride 0.
        value: key's shape but for head_dim_v, own strides.
        key_shape: canonical shape of key before broadcasting, which is the shape of its gradient.
        value_shape: same for value.
        layout: the caller's form of arrays.
        head_dim_v: 1 to 576, of value and the output.
        max_seqlen_q, max_seqlen_kv: no sequence is longer: seqlen_q and seqlen_kv, but for packed sequences.
        seqlens_kv, seqlens_q: rows of the batch have numbers of keys, or of queries, of their own, at most seqlen_kv or seqlen_q, which are read on the device.
        num_sequences: packed sequences, whose offsets are read on the device; `batch` is 1 then and seqlen_q and seqlen_kv count all tokens.
            None for padded batches.
        in_places: packed sequences may use less than their offsets give them, which is read on the device too.
        features: score features and masks other than the causal one.
        aligned: query, key and value start on 16 bytes, each of them, and so does grad_out if it is given.
        vectorized: so do all rows of all arrays of this element type that kernels read and write, and the head_dim of each is contiguous.
        out: the array for the output, canonical, where a forward call is given one; None stands for a new one.
        grad_out: the gradient of the output, canonical, where a backward call is given it; None stands for one that lies as the output does.
        cache: where keys and values lie, if `key` and `value` are a cache: rows of it may belong to any sequence, or be pages. Lengths are in seqlens_kv then.
        num_splits: into how many ranges keys are cut; None leaves that to the plan.
        stream_k: all blocks get equal shares of all keys instead; False leaves that to the plan.
        batch_invariant: a sequence's results have the same bits whatever else is in the batch.
        value_in_key: value is the first columns of key, in the same memory.
        of_tangents: the results are the tangents of the output and of lse, not these.
    """

    dtype: str
    batch: int
    seqlen_q: int
    seqlen_kv: int
    num_heads_q: int
    num_heads_kv: int
    batch_kv: int
    head_dim: int
    scale: float
    is_causal: bool
    causal_alignment: CausalAlignment
    deterministic: bool
    allow_tf32: bool
    return_lse: bool
    query: View
    key: View
    value: View
    key_shape: Shape4
    value_shape: Shape4
    layout: Layout
    head_dim_v: int
    max_seqlen_q: int
    max_seqlen_kv: int
    seqlens_kv: bool = False
    num_sequences: int | None = None
    in_places: bool = False
    seqlens_q: bool = False
    features: Features = field(default_factory=Features)
    aligned: bool = True
    vectorized: bool = True
    out: View | None = None
    grad_out: View | None = None
    cache: Cache | None = None
    num_splits: int | None = None
    stream_k: bool = False
    batch_invariant: bool = False
    value_in_key: bool = False
    of_tangents: bool = False

    def beside(self, view: View, address: int) -> Problem:
        """The same problem with another array of its element type."""
        return replace(self, vectorized=self.vectorized and view.vectorized(self.itemsize, address))

    def of_gradients(self, views: BackwardViews, grad_out: int, out: int) -> Problem:
        """The same problem with what a backward call is given besides, at these addresses."""
        beside = self.beside(views.grad_out, grad_out).beside(views.out, out)
        return replace(beside, grad_out=views.grad_out, aligned=self.aligned and grad_out % 16 == 0)

    @property
    def itemsize(self) -> int:
        """Bytes per element of query, key, value and the output."""
        return DTYPES[self.dtype]

    @property
    def query_rows(self) -> int:
        """Rows of all query heads: of lse, and of what backward kernels know of each."""
        return self.batch * self.num_heads_q * self.seqlen_q

    @property
    def kv_dtype(self) -> str:
        """Element type of key and value."""
        return self.cache.dtype if self.cache is not None and self.cache.dtype else self.dtype

    @property
    def kv_itemsize(self) -> int:
        """Bytes per element of key and value."""
        return KV_DTYPES[self.kv_dtype]

    @property
    def owned_queries(self) -> int:
        """Queries of each sequence that there are blocks for."""
        return self._owned(self.seqlen_q, self.max_seqlen_q)

    @property
    def owned_keys(self) -> int:
        """Keys of each sequence that there are blocks for."""
        return self._owned(self.seqlen_kv, self.max_seqlen_kv)

    def _owned(self, tokens: int, longest: int) -> int:
        """As many as the longest sequence has; but as the average place, if that is longer than what sequences use of theirs: the rest has to be filled with zeros."""
        return max(longest, -(-tokens // self.num_sequences)) if self.in_places and self.num_sequences else longest

    @property
    def heads_per_kv(self) -> int:
        """How many consecutive query heads share a key head."""
        return self.num_heads_q // self.num_heads_kv if self.num_heads_kv else 1

    @property
    def same_groups(self) -> bool:
        """Gradients of key and value are summed over the same batches and heads."""
        return self.key_shape[:3] == self.value_shape[:3]

    @property
    def sequences(self) -> int:
        """How many there are, packed or not."""
        return self.batch if self.num_sequences is None else self.num_sequences

    @property
    def is_ragged(self) -> bool:
        """Sequences have numbers of keys or queries of their own: rows of a batch, or packed ones."""
        return self.seqlens_kv or self.seqlens_q or self.num_sequences is not None

    @property
    def uses_places(self) -> bool:
        """Sequences may have fewer queries than places for them, in rows of the batch or packed."""
        return self.seqlens_q or self.in_places

    @property
    def causal_offset(self) -> int:
        """Query i sees keys j <= i + causal_offset when causal: 0 for top_left, seqlen_kv - seqlen_q for bottom_right."""
        return self.seqlen_kv - self.seqlen_q if self.causal_alignment == "bottom_right" else 0

    @property
    def output_shape(self) -> Shape4:
        """Canonical shape of the output: the query's, with the head_dim of value."""
        return (*self.query.shape[:3], self.head_dim_v)

    @property
    def lse_shape(self) -> tuple[int, ...]:
        """(batch, num_heads_q, seqlen_q), whatever the layout; (num_heads_q, tokens) for packed sequences."""
        return (self.batch, self.num_heads_q, self.seqlen_q)[1 if self.layout.varlen else 0 :]

    @property
    def window(self) -> tuple[int, int]:
        """(low, high): query i sees keys j with low <= j - i <= high, where lengths are those of the arrays."""
        low, high = self.features.window_low, self.features.window_high
        return (low if low == -UNLIMITED else low + self.causal_offset), (high if high == UNLIMITED else high + self.causal_offset)

    @property
    def queries_advance(self) -> bool:
        """With rotary embedding queries stand one behind the other, since a causal mask or a window asks for their order; else all at the first place."""
        return self.is_causal or self.features.kinds.window

    @property
    def list_extents(self) -> tuple[int, int]:
        """For how many batches and heads the lists of visible tiles differ."""
        kinds, mask = self.features.kinds, self.features.attn_mask
        of_batch, of_heads = mask.extents[:2] if mask is not None and kinds.attn_mask == "bool" else (1, 1)
        per_batch = kinds.segments or kinds.prefix or self.seqlens_kv or self.seqlens_q or of_batch > 1
        return (self.batch if per_batch else 1), (self.num_heads_q if of_heads > 1 else 1)

    @property
    def is_empty(self) -> bool:
        """No score is to be computed: the output has no elements, or no key exists and it is all zeros.

        With sinks, lse is not -inf without keys, and the kernels have something to do.
        """
        return 0 in self.query.shape or (self.seqlen_kv == 0 and not self.features.kinds.sinks)

    @property
    def hides_by_data(self) -> bool:
        """Which pairs are visible depends on an array: a mask, ids, or lengths of prefixes, rows or packed sequences."""
        kinds = self.features.kinds
        return kinds.attn_mask is not None or kinds.segments or kinds.prefix or self.is_ragged

    @property
    def visible_pairs(self) -> int:
        """(query, key) pairs of one head that neither the causal mask nor the window hides; the most that there may be where it `hides_by_data`."""
        if self.num_sequences is not None:
            return min(self.num_sequences * self.max_seqlen_q, self.seqlen_q) * min(self.max_seqlen_kv, self.seqlen_kv)
        low, high = self.window
        if self.is_causal and not self.features.kinds.prefix:
            high = min(high, self.causal_offset)
        return max(0, self._pairs_up_to(high) - self._pairs_up_to(low - 1))

    def _pairs_up_to(self, offset: int) -> int:
        """Pairs of query i and key j with j <= i + offset."""
        # Row i has min(max(i + 1 + offset, 0), seqlen_kv) of them. A sum of max(x, 0) over consecutive x is a difference of triangles;
        # the lower bound gives one such sum, the upper bound takes another one off.
        last = self.seqlen_q + offset
        return _triangle(last) - _triangle(offset) - _triangle(last - self.seqlen_kv) + _triangle(offset - self.seqlen_kv)

    @property
    def flops_forward(self) -> int:
        """Floating-point operations of the two matrix products over visible pairs; a multiply-add counts as two."""
        return 2 * self.batch * self.num_heads_q * (self.head_dim + self.head_dim_v) * self.visible_pairs

    @property
    def flops_backward(self) -> int:
        """The same for the five products of the backward pass, which computes S again; and for those of tangents, which are as many."""
        return 2 * self.batch * self.num_heads_q * (3 * self.head_dim + 2 * self.head_dim_v) * self.visible_pairs


@dataclass(frozen=True)
class BackwardViews:
    """Where the backward pass finds its other inputs.

    Attributes:
        grad_out: (batch, seqlen_q, num_heads_q, head_dim_v).
        out: same shape.
        lse_strides: of (batch, num_heads_q, seqlen_q), in elements.
        grad_lse_strides: same, or None when there is no gradient of lse.
    """

    grad_out: View
    out: View
    lse_strides: Shape3
    grad_lse_strides: Shape3 | None


def _triangle(n: int) -> int:
    """1 + 2 + … + n, and 0 for negative n."""
    return n * (n + 1) // 2 if n > 0 else 0
