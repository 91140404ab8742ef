"""The public calls of forward mode: tangents of attention's results along tangents of its inputs, of padded batches and of packed sequences.

Here are signatures and what they mean, as in `attention.py`.
"""

from __future__ import annotations

from typing import Any

from cuflash.arrays.borrowing import AnyArray
from cuflash.errors import CompilationForbiddenError
from cuflash.problem.features import Seed
from cuflash.problem.layout import CANONICAL
from cuflash.problem.operands import Operands
from cuflash.problem.options import Options, Window
from cuflash.problem.other_names import explains_keywords
from cuflash.problem.tangents import Tangents
from cuflash.problem.tile import Tiles
from cuflash.runtime import calls, jvp_calls
from cuflash.tuning import with_warmup


@explains_keywords
def scaled_dot_product_attention_jvp(
    query_dot: AnyArray | None,
    key_dot: AnyArray | None,
    value_dot: AnyArray | None,
    query: AnyArray,
    key: AnyArray,
    value: AnyArray,
    out: AnyArray,
    lse: AnyArray,
    attn_mask: AnyArray | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    layout: str = "bshd",
    batch_first: bool = True,
    num_heads: int | None = None,
    causal_alignment: str = "top_left",
    tile: Tiles = None,
    deterministic: bool = False,
    allow_tf32: bool = False,
    sinks_dot: AnyArray | None = None,
    seqlens_q: AnyArray | None = None,
    seqlens_kv: AnyArray | None = None,
    dropout_seed: Seed = None,
    window: Window = None,
    softcap: float | None = None,
    alibi_slopes: AnyArray | None = None,
    sinks: AnyArray | None = None,
    segment_ids_q: AnyArray | None = None,
    segment_ids_kv: AnyArray | None = None,
    prefix_lengths: AnyArray | None = None,
) -> tuple[Any, Any]:
    """Compute the derivative of attention along tangents of its inputs, in one pass over keys and values and in O(seqlen) memory.

    With P = exp(scale · Q Kᵀ - lse), Ṡ = scale · (Q̇ Kᵀ + Q K̇ᵀ) and μ = rowsum(P ∘ Ṡ):
    Ȯ = (P ∘ Ṡ) V + P V̇ - μ ∘ O;  lsė = μ.

    Args:
        query_dot, key_dot, value_dot: tangents of query, key and value, each with its shape, dtype and kind, any strides; None for zero, which costs nothing.
        query, key, value: as in the forward call.
        out, lse: what the forward call returned with `return_lse=True`.
        sinks_dot: tangent of the sinks, like them, or None for zero.
        tile: a `cuflash.Tile`, or a mapping from "forward_jvp" to it.
        deterministic: accepted for symmetry with the backward pass: the kernel gives the same bits on every run.

    Other arguments have to be those of the forward call; features of all kinds are taken. Dropout drops what V and V̇ are multiplied by, not what lse is made of.

    Returns:
        out_dot: like out. lse_dot: like lse. Both are 0 for queries that see no key.

    Raises:
        CuflashError: as the forward call.

    Source: derived from algorithm 1 of Dao 2023, FlashAttention-2, arXiv 2307.08691 (docs/kernels.md, "Tangents").
    """
    operands = Operands(
        query, key, value, attn_mask, alibi_slopes, sinks, prefix_lengths, dropout_seed, out, seqlens_kv, segment_ids_q,
        segment_ids_kv, lse=lse, seqlens_q=seqlens_q,
    )  # fmt: skip
    options = Options(
        is_causal, scale, enable_gqa, causal_alignment, False, tile, deterministic, allow_tf32, dropout_p, window, softcap,
        layout, batch_first, num_heads,
    )  # fmt: skip
    return _run(Tangents(query_dot, key_dot, value_dot, sinks_dot), operands, options)


@explains_keywords
def varlen_attention_jvp(
    query_dot: AnyArray | None,
    key_dot: AnyArray | None,
    value_dot: AnyArray | None,
    query: AnyArray,
    key: AnyArray,
    value: AnyArray,
    out: AnyArray,
    lse: AnyArray,
    cu_seqlens_q: AnyArray,
    cu_seqlens_kv: AnyArray,
    max_seqlen_q: int | None = None,
    max_seqlen_kv: int | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    causal_alignment: str = "bottom_right",
    tile: Tiles = None,
    deterministic: bool = False,
    allow_tf32: bool = False,
    sinks_dot: AnyArray | None = None,
    attn_mask: None = None,
    dropout_p: float = 0.0,
    dropout_seed: Seed = None,
    window: Window = None,
    softcap: float | None = None,
    alibi_slopes: AnyArray | None = None,
    sinks: AnyArray | None = None,
    prefix_lengths: AnyArray | None = None,
    seqused_q: AnyArray | None = None,
    seqused_kv: AnyArray | None = None,
) -> tuple[Any, Any]:
    """Compute the derivative of `varlen_attention` along tangents of its inputs, as `scaled_dot_product_attention_jvp` does of padded batches.

    Args:
        query_dot, key_dot, value_dot, sinks_dot, out, lse, tile: as there.

    Other arguments have to be those of the forward call.

    Returns:
        out_dot: like out. lse_dot: like lse. Both are 0 for tokens behind the last sequence.

    Raises:
        CuflashError: as the forward call.
    """
    operands = Operands(
        query, key, value, attn_mask, alibi_slopes, sinks, prefix_lengths, dropout_seed, out, None, None, None, cu_seqlens_q,
        cu_seqlens_kv, None, lse, None, seqused_q, seqused_kv,
    )  # fmt: skip
    options = Options(
        is_causal, scale, enable_gqa, causal_alignment, False, tile, deterministic, allow_tf32, dropout_p, window, softcap,
        CANONICAL, True, None, False, max_seqlen_q, max_seqlen_kv, True,
    )  # fmt: skip
    return _run(Tangents(query_dot, key_dot, value_dot, sinks_dot), operands, options)


def _run(tangents: Tangents, operands: Operands, options: Options) -> tuple[Any, Any]:
    try:
        return jvp_calls.jvp(tangents, operands, options)
    except CompilationForbiddenError as error:
        raise with_warmup(error, calls.plan(operands, options, jvp=True), options.tile) from None
