"""What other libraries call the arguments of the public calls, and what a keyword that a call does not have is answered with.

`OTHER_NAMES` is the one table of names: the errors quote it, and docs/coming-from.md prints it. `explains_keywords` puts the errors before a call of attention, `explains_features` before what
takes the features of one.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, ParamSpec, TypeVar, cast

from cuflash.errors import KeywordError, shortened

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T", bound=Callable[..., Any])


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
        ("seqused_k", "key_value_seq_lengths"), "flash-attn, JAX", ("seqlens_kv", "cache_seqlens", "seqused_kv"),
        "int32 (batch,), all keys that a row has, those of this step too; of a cache, those before this call; of packed sequences, those of their places.",
    ),
    OtherName(
        ("query_seq_lengths",), "JAX", ("seqlens_q", "seqused_q"),
        "int32 (batch,), all queries that a row has; of packed sequences, those of their places.",
    ),
    OtherName(("k_cache", "v_cache"), "flash-attn", ("key_cache", "value_cache"), "(batch, room, heads, head_dim), or of pages (pages, page_size, heads, head_dim), as there."),
    OtherName(
        ("past_key_value", "past_key_values", "layer_past"), "transformers", ("key", "value"),
        "Pass the whole cache as key and value, with the keys of each row in seqlens_kv; or call attention_with_kvcache, which appends to it.",
    ),
    OtherName(("cache_batch_index",), "flash-attn", ("cache_batch_idx",), "int32 (batch,): which row of the cache is that of each sequence."),
    OtherName(("leftpad_k",), "flash-attn", ("cache_leftpad",), "int32 (batch,): how many keys at the beginning of each sequence are padding."),
    OtherName(
        ("qkv", "kv"), "flash-attn, others", ("query", "key", "value"),
        "Split it by strided views, which are not copied: qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2], of packed sequences qkv[:, 0] and so on.",
    ),
    OtherName(("dqkv", "dq", "dk", "dv"), "flash-attn", (), "Gradients are returned, in arrays of their own."),
    OtherName(
        ("rotary_seqlens", "rotary_emb"), "flash-attn, others", (),
        "attention_with_kvcache rotates by the places of keys in the cache, with rotary_cos and rotary_sin; for other positions rotate query and key before the call.",
    ),
    OtherName(
        ("pack_gqa", "sm_margin", "num_warps", "block_m", "block_n", "block_sizes", "block_q", "block_k"), "flash-attn, Pallas, others", ("tile",),
        "How work is cut is said by tile=cuflash.Tile(...) alone; cuflash.legal_tiles lists those that fit.",
    ),
    OtherName(
        ("descale_k", "descale_v", "k_descale", "v_descale"), "flash-attn", ("key_scale", "value_scale"),
        "float32 (heads,) or (batch, heads), of the caches of attention_with_kvcache in float8_e4m3fn; no other call takes FP8.",
    ),
    OtherName(("descale_q", "q_descale"), "flash-attn", (), "There is no FP8 query: pass float16 or bfloat16, to caches in FP8 too."),
    OtherName(("qv", "q_v"), "flash-attn", (), "Its products with value are scores of longer rows: concatenate qv to query, and value to key."),
    OtherName(("attention_chunk",), "flash-attn", ("segment_ids_q", "segment_ids_kv"), "Chunks are segments: ids numpy.arange(seqlen) // chunk, with is_causal=True."),
    OtherName(("block_table",), "flash-attn", ("page_table",), "int32 (batch, pages of a sequence), as there."),
    OtherName(("learnable_sink", "s_aux"), "flash-attn, transformers", ("sinks",), "float32 (num_heads_q,)."),
    OtherName(("logits_soft_cap", "attn_logits_soft_cap", "soft_cap"), "Pallas, Keras, others", ("softcap",), "The same number; None or 0.0 for none."),
    OtherName(
        ("attn_bias", "bias"), "xformers, JAX", ("attn_mask",),
        "An array is added to the scores as there. xformers' mask objects: LowerTriangularMask is is_causal=True, the BlockDiagonal ones are calls of varlen_attention.",
    ),
    OtherName(("mask",), "JAX", ("attn_mask",), "Boolean as in JAX, True: attend; or of floats, which are added to the scores."),
    OtherName(
        ("position_bias", "relative_position_bias", "rel_pos_bias"), "transformers, others", ("attn_mask",),
        "It is added to the scores: (1, heads, seqlen_q, seqlen_kv). T5 has scale=1.0; need_attn_mask_grad=True gives its gradient.",
    ),
    OtherName(
        ("head_mask", "layer_head_mask"), "transformers", (),
        "Multiply out by it, head by head: that is the same as a factor of the probabilities.",
    ),
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
        "Functions of scores are not compiled in: window, softcap, alibi_slopes, segment ids, prefix_lengths and attn_mask cover the usual ones, see docs/coming-from.md.",
    ),
    OtherName(
        ("need_weights", "return_weights", "output_attentions", "average_attn_weights"), "torch.nn.MultiheadAttention, others", (),
        "The probabilities are never formed; exp(scores - lse) gives those of a few rows, with return_lse=True.",
    ),
    OtherName(("op", "backend", "implementation"), "xformers, JAX, others", ("tile",), "There is one implementation; print(cuflash.plan(...)) says what runs."),
)  # fmt: skip

_ROWS = {name: row for row in OTHER_NAMES for name in row.names}

_ONLY_PADDED = {
    "attn_mask": "Packed sequences take no mask: cu_seqlens_q and cu_seqlens_kv leave padding out and keep sequences apart, is_causal, window and "
    "prefix_lengths say which keys each sees; for other masks pad, and call scaled_dot_product_attention.",
    "segment_ids_q": "Packed sequences do not see each other: give each segment offsets of its own.",
    "segment_ids_kv": "Packed sequences do not see each other: give each segment offsets of its own.",
    "seqlens_q": "cu_seqlens_q says how many queries each sequence has.",
    "seqlens_kv": "cu_seqlens_kv says how many keys each sequence has.",
    "layout": "Packed sequences are (tokens, heads, head_dim); other orders are strided views, which are not copied.",
    "batch_first": "Packed sequences are (tokens, heads, head_dim); other orders are strided views, which are not copied.",
    "num_heads": "Packed sequences are (tokens, heads, head_dim): reshape the last dimension, which copies nothing.",
    "need_attn_mask_grad": "Packed sequences take no attn_mask.",
}
"""What packed sequences have instead of some arguments of padded batches."""

_WHOLE_CACHE = (
    "Call attention_with_kvcache; or scaled_dot_product_attention with the whole cache as key and value, the keys of each row in seqlens_kv, and "
    'causal_alignment="bottom_right".'
)
_OF_CACHES = {
    "key_cache": _WHOLE_CACHE,
    "value_cache": _WHOLE_CACHE,
    "cache_seqlens": "attention_with_kvcache has it. All keys of a row, those of this step too, are in seqlens_kv of scaled_dot_product_attention, and between cu_seqlens_kv of packed sequences.",
    "page_table": "Caches of pages are those of attention_with_kvcache.",
    "cache_batch_idx": "Rows of a cache are picked by attention_with_kvcache; or pass cache[rows], a copy, as key and value.",
    "cache_leftpad": "attention_with_kvcache leaves padding before the keys out; in scaled_dot_product_attention hide it with a boolean attn_mask.",
    "rotary_cos": "attention_with_kvcache rotates queries and new keys; rotate them before other calls.",
    "rotary_sin": "attention_with_kvcache rotates queries and new keys; rotate them before other calls.",
    "rotary_interleaved": "attention_with_kvcache rotates queries and new keys; rotate them before other calls.",
    "num_splits": "Keys of a row are shared out among blocks by attention_with_kvcache.",
    "batch_invariant": 'Only attention_with_kvcache shares out keys in a way that depends on the batch; other calls have the same bits in any batch, unless another way to the same results is faster there (README, "Determinism", says which variables keep one).',
}
"""Arguments of calls with a cache, and what to write in other calls."""

_SIMILAR = 0.8
"""How alike a keyword and an argument have to be, of 1, for a slip of the pen: "is_casual" is one, "descale_q" for "scale" is not."""

_functions: dict[str, tuple[str, ...]] = {}
"""Public call of attention -> names of its arguments."""


def explains_keywords(function: Callable[P, R]) -> Callable[P, R]:
    """The same call of attention; keywords that it does not have raise one KeywordError, which says what to write, instead of a bare TypeError."""
    known = tuple(inspect.signature(function).parameters)
    _functions.setdefault(function.__name__, known)  # cuflash.torch has functions of the same names
    return _answering(function, function.__name__, known, {})


def explains_features(feature_of: Mapping[str, str]) -> Callable[[T], T]:
    """The same for a function or class that takes the features of a call, not its arguments: `warmup` and `FeatureSet`.

    Args:
        feature_of: argument of a call -> its feature.
    """

    def explained(target: T) -> T:
        name, known = target.__name__, tuple(inspect.signature(target).parameters)
        if not isinstance(target, type):
            return cast(T, _answering(target, name, known, feature_of))
        target.__init__ = _answering(target.__init__, name, known, feature_of)  # type: ignore[misc]
        return target

    return explained


def _answering(function: Callable[P, R], name: str, known: tuple[str, ...], feature_of: Mapping[str, str]) -> Callable[P, R]:
    taken = frozenset(known)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        unknown = [keyword for keyword in kwargs if keyword not in taken]  # which all versions of Dynamo trace
        if unknown:
            raise _unknown(name, known, unknown, feature_of)
        return function(*args, **kwargs)

    return call


def _unknown(function: str, known: tuple[str, ...], keywords: list[str], feature_of: Mapping[str, str]) -> KeywordError:
    """One error for all of them."""
    answers = {shortened(keyword): _answer(function, known, keyword, feature_of) for keyword in keywords}
    if len(answers) == 1:
        ((keyword, answer),) = answers.items()
        return KeywordError(keyword, f"a keyword argument that {function} does not have", *answer)
    expected = ", ".join(f"{keyword} → {expected}" for keyword, (expected, _) in answers.items())
    hint = " ".join(f"{keyword}: {hint}" for keyword, (_, hint) in answers.items())
    return KeywordError(", ".join(answers), f"keyword arguments that {function} does not have", expected, hint)


def _answer(function: str, known: tuple[str, ...], keyword: str, feature_of: Mapping[str, str]) -> tuple[str, str]:
    """What is expected instead of a keyword, and what to mind."""
    row = _ROWS.get(keyword)
    ours = (keyword,) if row is None else row.ours
    feature = next((feature_of[name] for name in ours if name in feature_of), keyword if keyword in feature_of.values() else None)
    if feature is not None:
        used = f'{feature}="bool"' if feature == "attn_mask" else f"{feature}=True"
        return (feature if feature in known else "features"), f"Write {'' if feature in known else 'features='}cuflash.FeatureSet({used})."
    of_caches = next((name for name in (keyword, *ours) if name in _OF_CACHES and name not in known), None)
    if of_caches is not None and not any(name in known for name in ours):
        return "no such argument here", _OF_CACHES[of_caches]
    only_padded = next((name for name in ours if name in _ONLY_PADDED), None)
    if only_padded is not None and "cu_seqlens_kv" in known and not any(name in known and name not in _ONLY_PADDED for name in ours):
        return "no such argument for packed sequences", _ONLY_PADDED[only_padded]
    if keyword == "need_attn_mask_grad" and "attn_bias" in known:
        return (
            "no such argument here",
            "Of cuflash.torch's functions a mask that requires grad has its gradient: attn_mask.requires_grad_().",
        )
    here = [name for name in ours if name in known]
    if row is not None and (here or not ours):
        of_padded = [name for name in _ONLY_PADDED if "cu_seqlens_kv" in known and re.search(rf"\b{name}\b", row.difference)]
        where = f" {' and '.join(of_padded)}: of scaled_dot_product_attention, not of packed sequences." if of_padded else ""
        return " and ".join(here) or "no such argument", row.difference + where
    elsewhere = ", ".join(other for other, names in _functions.items() if ours[0] in names)
    if elsewhere:
        return "no such argument here", f"{ours[0]} is an argument of {elsewhere}."
    close = difflib.get_close_matches(keyword, known, 1, _SIMILAR)
    return (close[0] if close else "one of its arguments"), f"help(cuflash.{function}) lists them."
