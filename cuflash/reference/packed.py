"""Judge attention of packed sequences: `formulas.py` for one sequence after the other."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy

from cuflash.reference.comparison import Float64, Precision, to_numpy
from cuflash.reference.formulas import Gradients, attention, attention_backward, attention_naive, attention_naive_backward


def varlen_attention(
    query: Any, key: Any, value: Any, cu_seqlens_q: Any, cu_seqlens_kv: Any, *, magnitudes: bool = False, precision: Precision | None = None,
    **options: Any,
) -> tuple[Float64, Float64]:  # fmt: skip
    """Attention of packed sequences, one at a time.

    Args:
        query: (tokens_q, heads, head_dim).
        key, value: (tokens_kv, heads, head_dim), as for `attention`.
        cu_seqlens_q, cu_seqlens_kv: (sequences + 1,): where each sequence starts, and where the last one ends.
        magnitudes: as for `attention`; in float64 only.
        precision: None for the truth in float64, else that of `attention_naive`.
        options: is_causal, scale, enable_gqa, causal_alignment and features as for `attention`, with sequences in the place of the batch; causal_alignment is
            "bottom_right" by default. seqused_q, seqused_kv: (sequences,), of how many rows each sequence consists; the others of its place are nobody's.

    Returns:
        out: (tokens_q, heads, head_dim of value); 0 behind the last sequence.
        lse: (heads, tokens_q); -inf there.
    """
    options = {"causal_alignment": "bottom_right", **options}
    out = numpy.zeros((*query.shape[:2], value.shape[2]))
    lse = numpy.full((query.shape[1], query.shape[0]), -numpy.inf)
    for i, (queries, keys) in enumerate(
        _sequences(cu_seqlens_q, cu_seqlens_kv, options.pop("seqused_q", None), options.pop("seqused_kv", None))
    ):
        inputs = query[None, queries], key[None, keys], value[None, keys]
        own = options_of_sequence(options, i)
        found = attention(*inputs, magnitudes=magnitudes, **own) if precision is None else attention_naive(*inputs, precision, **own)
        out[queries], lse[:, queries] = found[0][0], found[1][0]
    return out, lse


def varlen_attention_backward(
    grad_out: Any,
    query: Any,
    key: Any,
    value: Any,
    cu_seqlens_q: Any,
    cu_seqlens_kv: Any,
    *,
    out: Any = None,
    lse: Any = None,
    grad_lse: Any = None,
    magnitudes: bool = False,
    precision: Precision | None = None,
    **options: Any,
) -> Gradients:
    """Gradients of `varlen_attention`, in the shapes of query, key and value, 0 behind the last sequence; and of sinks.

    Args:
        grad_out: (tokens_q, heads, head_dim of value).
        out, lse: what the forward pass gave, or None, as for `attention_backward`.
        grad_lse: (heads, tokens_q), or None for 0.
        magnitudes: as for `attention_backward`; in float64 only.
        precision: None for the truth in float64, else that of `attention_naive_backward`.
        query, key, …: as for `varlen_attention`.
    """
    options = {"causal_alignment": "bottom_right", **options}
    grads = Gradients(*(numpy.zeros(x.shape) for x in (query, key, value)))
    grads.sinks = None if options.get("sinks") is None else numpy.zeros(query.shape[1])
    for i, (queries, keys) in enumerate(
        _sequences(cu_seqlens_q, cu_seqlens_kv, options.pop("seqused_q", None), options.pop("seqused_kv", None))
    ):
        inputs = grad_out[None, queries], query[None, queries], key[None, keys], value[None, keys]
        own = options_of_sequence(options, i)
        own |= {"out": None if out is None else out[None, queries]}
        own |= {name: None if rows is None else rows[None, :, queries] for name, rows in (("lse", lse), ("grad_lse", grad_lse))}
        found = (
            attention_backward(*inputs, magnitudes=magnitudes, **own)
            if precision is None
            else attention_naive_backward(*inputs, precision, **own)
        )
        for grad, rows, of_sequence in zip(grads, (queries, keys, keys), found, strict=True):
            grad[rows] = of_sequence[0]
        if grads.sinks is not None and found.sinks is not None:
            grads.sinks += found.sinks
    return grads


def options_of_sequence(options: Mapping[str, Any], i: int) -> dict[str, Any]:
    """The options of sequence i as those of a batch of one: `prefix_lengths`, and arrays of two axes, have sequences in the place of the batch."""
    own = {**options, "first_batch": i}
    for name, option in options.items():
        shape: tuple[int, ...] = getattr(option, "shape", ())
        if len(shape) == 2 or (shape and name == "prefix_lengths"):
            own[name] = option if shape[0] == 1 else option[i : i + 1]
    return own


def _sequences(cu_seqlens_q: Any, cu_seqlens_kv: Any, seqused_q: Any, seqused_kv: Any) -> Iterator[tuple[slice, slice]]:
    """Where each sequence lies among the queries and among the keys."""
    rows = [_rows(*given) for given in ((cu_seqlens_q, seqused_q), (cu_seqlens_kv, seqused_kv))]
    yield from zip(*rows, strict=True)


def _rows(offsets: Any, used: Any) -> list[slice]:
    starts = [int(n) for n in to_numpy(offsets)]
    places = list(itertools.pairwise(starts))
    lengths = [end - begin for begin, end in places]
    if used is not None:
        lengths = [min(length, max(int(n), 0)) for length, n in zip(lengths, to_numpy(used), strict=True)]
    return [slice(begin, begin + length) for (begin, _), length in zip(places, lengths, strict=True)]
