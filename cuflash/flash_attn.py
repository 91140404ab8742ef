"""flash-attn's functions for torch tensors on cuflash's kernels: `from cuflash.flash_attn import flash_attn_func`.

Signatures, defaults, the order `(batch, seqlen, heads, head_dim)`, the diagonal at the last query and key, grouped heads without asking, and what is returned are
those of flash-attn 2; float32 is taken too, and head_dim up to 576. Seeds of dropout come from torch's generator, gradients from autograd (docs/torch.md).
"""

from __future__ import annotations

import itertools
from typing import Any

from cuflash.attention import varlen_attention as varlen_attention_of_arrays
from cuflash.decoding import attention_with_kvcache
from cuflash.dropout import dropout_mask
from cuflash.errors import OptionError, UnsupportedError
from cuflash.torch import scaled_dot_product_attention, varlen_attention
from cuflash.torch.inputs import check_tensor, dropout_source, lengths, number, pair

import torch  # isort: skip  # after cuflash.torch, which says what to install

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]

Window = tuple[int, int]


def flash_attn_func(
    q: Any,
    k: Any,
    v: Any,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """Attention of a padded batch.

    Args:
        q: `(batch, seqlen, heads, head_dim)`.
        k, v: `(batch, seqlen_k, heads_k, head_dim)`; heads is a multiple of heads_k.
        dropout_p: pass 0.0 in evaluation.
        softmax_scale: None is `head_dim ** -0.5`.
        causal: the last query sees all keys, each earlier one a key less.
        window_size: (left, right) of that diagonal, -1 for no limit.
        softcap: 0.0 for none.
        alibi_slopes: `(heads,)` or `(batch, heads)`.
        deterministic: changes nothing, since all kernels are.
        return_attn_probs: return `(out, softmax_lse, S_dmask)`.

    Returns:
        out; with `return_attn_probs` also lse `(batch, heads, seqlen)`, and the probabilities `(batch, heads, seqlen, seqlen_k)`, negative where they were dropped,
        which torch computes apart in float32 for this; None without dropout.
    """
    options = _options(q, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic)
    result = scaled_dot_product_attention(q, k, v, layout="bshd", causal_alignment="bottom_right", return_lse=return_attn_probs, **options)
    if not return_attn_probs:
        return result
    probabilities = None
    if options["dropout_p"]:
        kept = dropout_mask((q.shape[0], q.shape[2], q.shape[1], k.shape[1]), options["dropout_p"], options["dropout_seed"], like=q)
        probabilities = _signed(_probabilities(q, k, result[1], options), kept)
    return (*result, probabilities)


def flash_attn_qkvpacked_func(
    qkv: Any,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_func` of `(batch, seqlen, 3, heads, head_dim)`, which is read where it is."""
    q, k, v = qkv.unbind(2)
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )  # fmt: skip


def flash_attn_kvpacked_func(
    q: Any,
    kv: Any,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_func` of q and `(batch, seqlen_k, 2, heads_k, head_dim)`, which is read where it is."""
    k, v = kv.unbind(2)
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )  # fmt: skip


def flash_attn_varlen_func(
    q: Any,
    k: Any,
    v: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Any = None,
    seqused_k: Any = None,
) -> Any:
    """Attention of packed sequences.

    Args:
        q: `(tokens, heads, head_dim)`.
        k, v: `(tokens_k, heads_k, head_dim)`.
        cu_seqlens_q, cu_seqlens_k: `(sequences + 1,)`, int32 or int64.
        max_seqlen_q, max_seqlen_k: no sequence is longer.
        block_table: int32 `(sequences, pages of a sequence)`: k and v are `(pages, page_size, heads_k, head_dim)`, and cu_seqlens_k says how many keys each sequence
            has there. Without dropout and gradients.
        seqused_k: int32 `(sequences,)`: how many these are, or of its place between two offsets of cu_seqlens_k; cu_seqlens_k may be None with block_table. Without
            dropout and gradients.

    Others are those of `flash_attn_func`.

    Returns:
        out; with `return_attn_probs` also lse `(heads, tokens)`, and with dropout the probabilities `(sequences, heads, max_seqlen_q, max_seqlen_k)`, 0 beyond the
        ends of a sequence, for which the offsets are read on the host.
    """
    options = _options(q, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic)
    if block_table is not None or seqused_k is not None:
        given = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k, "block_table": block_table, "seqused_k": seqused_k}
        for name, x in given.items():
            check_tensor(name, x)
        offsets = lengths(cu_seqlens_q), lengths(cu_seqlens_k)
        found = _read_only(q, k, v, *offsets, max_seqlen_q, max_seqlen_k, block_table, lengths(seqused_k), return_attn_probs, options)
        return (*found, None) if return_attn_probs else found
    result = varlen_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, return_lse=return_attn_probs, **options)
    if not return_attn_probs:
        return result
    probabilities = None
    if options["dropout_p"]:
        longest = int(max_seqlen_q), int(max_seqlen_k)
        starts = [itertools.pairwise(offsets.tolist()) for offsets in (cu_seqlens_q, cu_seqlens_k)]
        kept = dropout_mask((len(cu_seqlens_q) - 1, q.shape[1], *longest), options["dropout_p"], options["dropout_seed"], like=q)
        probabilities = torch.zeros(kept.shape, device=q.device)
        for i, ((begin_q, end_q), (begin_k, end_k)) in enumerate(zip(*starts, strict=True)):
            slopes = options["alibi_slopes"]
            own = {**options, "alibi_slopes": slopes[i] if slopes is not None and slopes.dim() == 2 else slopes}
            lse = result[1][None, :, begin_q:end_q]
            block = _probabilities(q[None, begin_q:end_q], k[None, begin_k:end_k], lse, own)
            probabilities[i, :, : end_q - begin_q, : end_k - begin_k] = block[0]
        probabilities = _signed(probabilities, kept)
    return (*result, probabilities)


def _read_only(
    q: Any, k: Any, v: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, max_seqlen_q: Any, max_seqlen_k: Any, block_table: Any, seqused_k: Any, return_lse: bool,
    options: dict[str, Any],
) -> Any:  # fmt: skip
    """Packed queries and keys of which each sequence has as many as `seqused_k` says, in pages or in its place."""
    if options["dropout_p"]:
        name = "block_table" if block_table is not None else "seqused_k"
        raise UnsupportedError("dropout_p", options["dropout_p"], f"0.0 with {name}", "Such a call has no gradients: pass dropout_p=0.0.")
    shared = {name: options[name] for name in ("is_causal", "scale", "window", "softcap", "alibi_slopes")} | {"return_lse": return_lse}
    if block_table is None:
        return varlen_attention_of_arrays(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, enable_gqa=True, seqused_kv=seqused_k, **shared
        )
    if seqused_k is None:
        if cu_seqlens_k is None:
            hint = "Pass how many keys each sequence has in its pages, or their offsets as cu_seqlens_k."
            raise OptionError("seqused_k", "None beside block_table and without cu_seqlens_k", "int32 (sequences,)", hint)
        seqused_k = cu_seqlens_k[1:] - cu_seqlens_k[:-1]
    return attention_with_kvcache(
        q, k, v, cache_seqlens=seqused_k, page_table=lengths(block_table), cu_seqlens_q=cu_seqlens_q, max_seqlen_q=max_seqlen_q, **shared
    )


def flash_attn_varlen_qkvpacked_func(
    qkv: Any,
    cu_seqlens: Any,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_varlen_func` of `(tokens, 3, heads, head_dim)`, which is read where it is."""
    q, k, v = qkv.unbind(1)
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
        return_attn_probs,
    )  # fmt: skip


def flash_attn_varlen_kvpacked_func(
    q: Any,
    kv: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_varlen_func` of q and `(tokens_k, 2, heads_k, head_dim)`, which is read where it is."""
    k, v = kv.unbind(1)
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
        return_attn_probs,
    )  # fmt: skip


def flash_attn_with_kvcache(
    q: Any,
    k_cache: Any,
    v_cache: Any,
    k: Any = None,
    v: Any = None,
    rotary_cos: Any = None,
    rotary_sin: Any = None,
    cache_seqlens: Any = None,
    cache_batch_idx: Any = None,
    cache_leftpad: Any = None,
    block_table: Any = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Any = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
    k_descale: Any = None,
    v_descale: Any = None,
) -> Any:
    """Append k and v to a cache, and attend to it, without gradients: `cuflash.attention_with_kvcache`, which says what is meant by each argument.

    Args:
        q: `(batch, seqlen, heads, head_dim)`, float16 or bfloat16.
        k_cache, v_cache: `(rows, seqlen_cache, heads_k, head_dim)`, or with block_table `(pages, page_size, heads_k, head_dim)`, any page size. Written in place.
        k, v: `(batch, seqlen_new, heads_k, head_dim)`, or None.
        rotary_cos, rotary_sin: `(positions, rotary_dim / 2)`, with a position for each key that a sequence has room for.
        cache_seqlens: an int, or int32 `(batch,)`; None without k: the whole cache.
        cache_batch_idx, cache_leftpad: int32 `(batch,)`.
        block_table: int32 `(batch, pages of a sequence)`.
        num_splits: 0 for what is predicted to be fastest.
        k_descale, v_descale: flash-attn 3's, of caches in float8_e4m3fn: float32 `(batch, heads_k)` or `(heads_k,)`. q, and k and v, have 16 bits there too.

    Returns:
        out; with `return_softmax_lse` also lse `(batch, heads, seqlen)`.
    """
    check_tensor("block_table", block_table)
    if cache_seqlens is None:
        if k is not None:
            raise OptionError("cache_seqlens", "None with k", "how many keys the cache has of each sequence", "Pass 0 for an empty cache.")
        cache_seqlens = k_cache.shape[1] * (1 if block_table is None else block_table.shape[1])
    if not isinstance(cache_seqlens, torch.Tensor):
        cache_seqlens = torch.full((q.shape[0],), cache_seqlens, dtype=torch.int32, device=q.device)
    window = pair(window_size)
    return attention_with_kvcache(
        q, k_cache, v_cache, k, v, cache_seqlens=cache_seqlens, page_table=block_table, cache_batch_idx=cache_batch_idx,
        cache_leftpad=cache_leftpad, rotary_cos=rotary_cos, rotary_sin=rotary_sin, rotary_interleaved=None if rotary_cos is None else rotary_interleaved,
        scale=number(softmax_scale), is_causal=causal, window=None if window == (-1, -1) else window, softcap=number(softcap) or None,
        alibi_slopes=alibi_slopes, num_splits=num_splits or None, return_lse=return_softmax_lse,
        key_scale=k_descale, value_scale=v_descale,
    )  # fmt: skip


def _options(
    q: Any, dropout_p: Any, softmax_scale: Any, causal: Any, window_size: Any, softcap: Any, alibi_slopes: Any, deterministic: Any
) -> dict[str, Any]:
    """flash-attn's options as cuflash's, with a seed of dropout, which the probabilities draw from too."""
    probability, window = number(dropout_p), pair(window_size)
    seed, _ = dropout_source(probability, None, q.device)
    return {
        "dropout_p": probability, "is_causal": causal, "scale": number(softmax_scale), "enable_gqa": True, "deterministic": deterministic,
        "dropout_seed": seed, "window": None if window == (-1, -1) else window, "softcap": number(softcap) or None, "alibi_slopes": alibi_slopes,
    }  # fmt: skip


@torch.no_grad()  # type: ignore[untyped-decorator]
def _probabilities(q: Any, k: Any, lse: Any, options: dict[str, Any]) -> Any:
    """exp(score - lse), written out: (batch, heads, seqlen, seqlen_k) in float32."""
    heads, scale = q.shape[2], options["scale"]
    keys = k.float().permute(0, 2, 3, 1).repeat_interleave(heads // k.shape[2], 1)
    scores = (q.shape[3] ** -0.5 if scale is None else scale) * (q.float().transpose(1, 2) @ keys)
    if options["softcap"]:
        scores = options["softcap"] * torch.tanh(scores / options["softcap"])
    seqlen_q, seqlen_k = scores.shape[2:]
    rows, columns = torch.arange(seqlen_q, device=q.device)[:, None], torch.arange(seqlen_k, device=q.device)
    distance = columns - rows - (seqlen_k - seqlen_q)
    if options["alibi_slopes"] is not None:
        scores = scores - options["alibi_slopes"].float().reshape(-1, heads, 1, 1) * distance.abs()
    left, right = options["window"] or (-1, -1)
    visible = torch.ones_like(distance, dtype=torch.bool)
    if options["is_causal"]:
        visible &= distance <= 0
    if left >= 0:
        visible &= distance >= -left
    if right >= 0:
        visible &= distance <= right
    return torch.where(visible & ~lse.isneginf()[..., None], torch.exp(scores - lse[..., None]), 0.0)


def _signed(probabilities: Any, kept: Any) -> Any:
    return torch.where(kept, probabilities, -probabilities)
