"""Jagged nested tensors, `(batch, heads, sequence, head_dim)` with sequences of their own lengths: views of packed sequences, which is what the kernels get."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nested._internal.nested_tensor import NestedTensor

from cuflash.errors import DTypeError, ShapeError, UnsupportedError

_NOT_PACKED = ("attn_mask", "attn_bias", "seqlens_q", "seqlens_kv", "segment_ids_q", "segment_ids_kv", "tile")
"""Arguments that packed sequences do not have, or that have another meaning for them."""


def attention(varlen_attention: Callable[..., Any], query: Any, key: Any, value: Any, given: dict[str, Any]) -> Any:
    """Attention of nested tensors by packed sequences.

    Args:
        varlen_attention: the call for packed sequences.
        query, key, value: one of them is nested, the others have to be.
        given: the other arguments of `scaled_dot_product_attention`, by name.

    Returns:
        out, nested as query, or with return_lse out and lse `(batch, heads, sequence)`.
    """
    for name in _NOT_PACKED:
        if given.pop(name) is not None:
            hint = (
                "Causal masks, windows, softcap, ALiBi, sinks and prefixes go with nested tensors; for others pad: to_padded_tensor(0.0)."
            )
            raise UnsupportedError(name, "an argument beside nested tensors", "None", hint)
    if given.pop("layout") != "bhsd":
        raise UnsupportedError(
            "layout", "another order beside nested tensors", "'bhsd'", "Transpose them: (batch, heads, sequence, head_dim)."
        )
    queries, keys, values = (_packed(name, x) for name, x in (("query", query), ("key", key), ("value", value)))
    return_lse = given["return_lse"]
    longest = [x._get_max_seqlen() for x in (queries, keys)]
    out = varlen_attention(queries.values(), keys.values(), values.values(), queries.offsets(), keys.offsets(), *longest, **given)
    if not return_lse:
        return _nested_like(queries, out)
    return _nested_like(queries, out[0]), _nested_like(queries, out[1].transpose(0, 1))


def _packed(name: str, x: Any) -> Any:
    """(batch, sequence, heads, head_dim), whose values are packed sequences."""
    if type(x) is not NestedTensor:
        hint = "Make all three of them nested, or none: torch.nested.nested_tensor(list_of_sequences, layout=torch.jagged)."
        raise DTypeError(name, "a tensor that is not nested beside nested ones", "a nested tensor of layout torch.jagged", hint)
    if x.dim() != 4 or x._ragged_idx != 2:
        got = f"a nested tensor of {x.dim()} dimensions that is jagged in dimension {x._ragged_idx}"
        hint = "Sequences (sequence, heads, head_dim) make one: torch.nested.nested_tensor(sequences, layout=torch.jagged).transpose(1, 2)."
        raise ShapeError(name, got, "(batch, heads, sequence, head_dim)", hint)
    packed = x.transpose(1, 2)
    if packed._lengths is not None:
        raise UnsupportedError(
            name, "a nested tensor with holes between its sequences", "sequences one behind the other", f"Pass {name}.contiguous()."
        )
    return packed


def _nested_like(queries: Any, x: Any) -> Any:
    """Packed rows as (batch, heads, sequence, …), with the sequences of the query."""
    nested = torch.nested.nested_tensor_from_jagged(
        x, queries.offsets(), min_seqlen=queries._maybe_min_seqlen, max_seqlen=queries._maybe_max_seqlen
    )
    return nested.transpose(1, 2)
