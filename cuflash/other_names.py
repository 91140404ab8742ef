"""What other libraries call the arguments of the public calls, and what a keyword that a call does not have is answered with.

`OTHER_NAMES` is the one table of names: the errors quote it, and docs/coming-from.md prints it. `explains_keywords` puts the errors before a function.
"""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable
from typing import NamedTuple, ParamSpec, TypeVar

from cuflash.errors import KeywordError

P = ParamSpec("P")
R = TypeVar("R")


class OtherName(NamedTuple):
    """A row of the table.

    Attributes:
        names: what the argument is called elsewhere.
        libraries: where.
        ours: our arguments; empty where there is none.
        difference: what to mind, one or two sentences.
    """

    names: tuple[str, ...]
    libraries: str
    ours: tuple[str, ...]
    difference: str


OTHER_NAMES = (
    OtherName(("q",), "flash-attn", ("query",), "(batch, seqlen, heads, head_dim), as there."),
    OtherName(("k",), "flash-attn", ("key",), "(batch, seqlen, heads, head_dim), as there; fewer heads need enable_gqa=True."),
    OtherName(("v",), "flash-attn", ("value",), "(batch, seqlen, heads, head_dim), as there; fewer heads need enable_gqa=True."),
    OtherName(("softmax_scale", "sm_scale"), "flash-attn, Pallas", ("scale",), "The same number; None is head_dim ** -0.5."),
    OtherName(
        ("causal",), "flash-attn, Pallas", ("is_causal", "causal_alignment"),
        'flash-attn aligns the diagonal at the last query and key: pass causal_alignment="bottom_right" where lengths differ; varlen_attention does so by itself.',
    ),
    OtherName(
        ("window_size",), "flash-attn", ("window",),
        'The same pair (left, right), -1 for no limit; flash-attn counts from the "bottom_right" diagonal, see causal_alignment.',
    ),
    OtherName(
        ("local_window_size", "sliding_window"), "JAX, transformers", ("window",),
        "Always a pair: JAX's number w is window=(w, w); w keys with the query's own, causally, are window=(w - 1, 0).",
    ),
    OtherName(
        ("return_attn_probs", "return_softmax_lse", "return_residual"), "flash-attn, JAX", ("return_lse",),
        "Gives (out, lse) with lse (batch, heads, seqlen_q), or (heads, tokens) of packed sequences; the probabilities are never formed.",
    ),
    OtherName(("softmax_lse",), "flash-attn", ("lse",), "(batch, heads, seqlen_q), or (heads, tokens) of packed sequences, as there."),
    OtherName(("dout",), "flash-attn", ("grad_out",), "The first argument of the backward calls."),
    OtherName(("cu_seqlens_k",), "flash-attn", ("cu_seqlens_kv",), "The same int32 offsets."),
    OtherName(("cu_seqlens",), "flash-attn", ("cu_seqlens_q", "cu_seqlens_kv"), "For self-attention pass the same array twice."),
    OtherName(("max_seqlen_k",), "flash-attn", ("max_seqlen_kv",), "The same int."),
    OtherName(("max_seqlen",), "flash-attn", ("max_seqlen_q", "max_seqlen_kv"), "For self-attention pass the same int twice."),
    OtherName(
        ("cache_seqlens", "seqused_k", "key_value_seq_lengths"), "flash-attn, JAX", ("seqlens_kv",),
        "int32 (batch,), all keys that a row has, those of this step too.",
    ),
    OtherName(
        ("query_seq_lengths",), "JAX", (),
        "A query beyond its sequence gets a row of out that is not used: leave it out, or pack the sequences for varlen_attention.",
    ),
    OtherName(("block_table",), "flash-attn", (), "A paged cache is not supported: keys and values of a sequence lie in one array."),
    OtherName(("learnable_sink", "s_aux"), "flash-attn, transformers", ("sinks",), "float32 (num_heads_q,)."),
    OtherName(("logits_soft_cap", "attn_logits_soft_cap", "soft_cap"), "Pallas, Keras, others", ("softcap",), "The same number; None or 0.0 for none."),
    OtherName(
        ("attn_bias", "bias"), "xformers, JAX", ("attn_mask",),
        "An array is added to the scores as there. xformers' mask objects: LowerTriangularMask is is_causal=True, BlockDiagonalMask is varlen_attention.",
    ),
    OtherName(("mask",), "JAX", ("attn_mask",), "Boolean, True: attend, as there."),
    OtherName(
        ("attention_mask",), "transformers", ("attn_mask",),
        "Padding (batch, seqlen_kv) of 0 and 1 is passed as a boolean mask[:, None, None, :], or as lengths in seqlens_kv.",
    ),
    OtherName(
        ("key_padding_mask",), "torch.nn.MultiheadAttention", ("attn_mask",),
        "There True means: leave out. Pass attn_mask=~key_padding_mask[:, None, None, :], since here True means: attend; or lengths in seqlens_kv.",
    ),
    OtherName(
        ("segment_ids", "q_segment_ids", "kv_segment_ids"), "Pallas, others", ("segment_ids_q", "segment_ids_kv"),
        "int32 (batch, seqlen) for queries and for keys; for self-attention the same array twice.",
    ),
    OtherName(
        ("p", "dropout", "dropout_rate"), "xformers, others", ("dropout_p", "dropout_seed"),
        "The same probability; it needs a dropout_seed, the same one in the backward call.",
    ),
    OtherName(
        ("dropout_rng", "rng_state", "generator"), "JAX, flash-attn, torch", ("dropout_seed",),
        "An int, a pair (seed, offset), or two (u)int64 on the device.",
    ),
    OtherName(("training",), "torch", ("dropout_p",), "There is no training mode: pass dropout_p=0.0 in evaluation."),
    OtherName(
        ("score_mod", "block_mask"), "torch flex_attention", (),
        "Functions of scores are not compiled in: window, softcap, alibi_slopes, segment ids, prefix_lengths and attn_mask cover the usual ones.",
    ),
    OtherName(
        ("need_weights", "return_weights"), "torch.nn.MultiheadAttention, others", (),
        "The probabilities are never formed; exp(scores - lse) gives those of a few rows, with return_lse=True.",
    ),
    OtherName(("op", "backend", "implementation"), "xformers, JAX, others", ("tile",), "There is one implementation; print(cuflash.plan(...)) says what runs."),
)  # fmt: skip

_ROWS = {name: row for row in OTHER_NAMES for name in row.names}

_ONLY_PADDED = {
    "segment_ids_q": "Packed sequences do not see each other: give each segment offsets of its own.",
    "segment_ids_kv": "Packed sequences do not see each other: give each segment offsets of its own.",
    "seqlens_kv": "cu_seqlens_kv says how many keys each sequence has.",
    "layout": "Packed sequences are (tokens, heads, head_dim); other orders are strided views, which are not copied.",
    "batch_first": "Packed sequences are (tokens, heads, head_dim); other orders are strided views, which are not copied.",
    "num_heads": "Packed sequences are (tokens, heads, head_dim): reshape the last dimension, which copies nothing.",
    "need_attn_mask_grad": "Packed sequences take no attn_mask.",
}
"""What packed sequences have instead of some arguments of padded batches."""

_functions: dict[str, tuple[str, ...]] = {}
"""Public function -> names of its arguments."""


def explains_keywords(function: Callable[P, R]) -> Callable[P, R]:
    """The same function; a keyword that it does not have raises a KeywordError, which says what to write, instead of a bare TypeError."""
    name = function.__name__
    known = _functions[name] = tuple(inspect.signature(function).parameters)
    taken = frozenset(known)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if not taken.issuperset(kwargs):
            raise _unknown(name, next(keyword for keyword in kwargs if keyword not in taken))
        return function(*args, **kwargs)

    return call


def _unknown(function: str, keyword: str) -> KeywordError:
    known = _functions[function]
    got = f"a keyword argument that {function} does not have"
    row = _ROWS.get(keyword)
    if row is not None:
        ours = [name for name in row.ours if name in known]
        if ours or not row.ours:
            return KeywordError(keyword, got, " and ".join(ours) or "no such argument", row.difference)
    name = row.ours[0] if row is not None else keyword
    if name in _ONLY_PADDED and "cu_seqlens_q" in known:
        return KeywordError(keyword, got, "no such argument for packed sequences", _ONLY_PADDED[name])
    elsewhere = ", ".join(other for other, names in _functions.items() if name in names)
    if elsewhere:
        return KeywordError(keyword, got, "no such argument here", f"{name} is an argument of {elsewhere}.")
    close = difflib.get_close_matches(keyword, known, 1)
    return KeywordError(keyword, got, close[0] if close else "one of its arguments", f"help(cuflash.{function}) lists them.")
