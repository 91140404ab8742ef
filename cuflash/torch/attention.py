"""The public calls of attention, with torch's signature, order of dimensions and generator, differentiable by autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch.nested._internal.nested_tensor import NestedTensor
from torch.nn.attention.bias import CausalBias

from cuflash import attention as core
from cuflash.planning.plan import Plan
from cuflash.problem.operands import Operands
from cuflash.problem.options import Options
from cuflash.problem.other_names import explains_keywords
from cuflash.runtime import calls
from cuflash.torch import functions, inputs, nested, operators, warm_calls
from cuflash.torch.functions import Call
from cuflash.torch.inputs import number
from cuflash.torch.warm_calls import Asked

assert core  # imported first: a wrong keyword is answered with what cuflash's own calls have too


def _attend(asked: Any) -> Any:
    """Carry out what one of the functions below makes of its arguments; a result that it has already is handed on."""
    if type(asked) is not Asked:
        return asked
    result = _attend_in_four_dimensions(asked)
    if asked.restore is None:
        return result
    return tuple(map(asked.restore, result)) if asked.return_lse else asked.restore(result)


def _attend_in_four_dimensions(asked: Asked) -> Any:
    call, tensors, plain, return_lse, _ = asked
    if operators.looked_at(tensors, plain):
        is_compiling = torch.compiler.is_compiling()
        if is_compiling and operators.breaks_graph():  # the graph ends here, and the call runs as outside of it
            return torch._disable_dynamo(functions.attend)(call, tensors, return_lse)
        if is_compiling or not functions.is_transformed():
            return operators.attend(call, tensors, return_lse)
    return functions.attend(call, tensors, return_lse)


@warm_calls.remembers(_attend)
@explains_keywords
def scaled_dot_product_attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    layout: str = "bhsd",
    attn_bias: Any = None,
    causal_alignment: str = "top_left",
    return_lse: bool = False,
    tile: Any = None,
    deterministic: bool = False,
    allow_tf32: bool = False,
    seqlens_q: Any = None,
    seqlens_kv: Any = None,
    dropout_seed: Any = None,
    window: Any = None,
    softcap: float | None = None,
    alibi_slopes: Any = None,
    sinks: Any = None,
    segment_ids_q: Any = None,
    segment_ids_kv: Any = None,
    prefix_lengths: Any = None,
) -> Any:
    """`torch.nn.functional.scaled_dot_product_attention` with cuflash's kernels and options.

    What arguments mean that are not below is said in `cuflash.scaled_dot_product_attention`.

    Args:
        query: `(batch, num_heads_q, seqlen_q, head_dim)`; float16, bfloat16 or float32; any strides, nothing is copied. As in torch's function, two dimensions
            are one sequence, of three the first are heads, and of more than four the first ones are batches that are broadcast. A batch or heads of 1 are
            broadcast to those of key and value. Jagged nested tensors are taken too, all three then.
        key, value: `(batch, num_heads_kv, seqlen_kv, head_dim)`; value may have a head_dim of its own. A batch or heads of 1 are broadcast.
        attn_mask: boolean (True: attend) or additive, broadcast; or a `torch.nn.attention.bias.CausalBias`, which stands for is_causal and causal_alignment.
        attn_bias: additive, beside a boolean attn_mask: each is broadcast for itself and none is copied. Alone it is an additive attn_mask.
        dropout_p: applied whenever it is passed, as in torch's function: pass 0.0 in evaluation.
        layout: the order of dimensions where it is not torch's, of which there are four then.
        return_lse: return `(out, lse)`; lse is float32 `(batch, num_heads_q, seqlen_q)`, differentiable like out.
        dropout_seed: None draws seed and offset from torch's generator of the query's device, on the device: `torch.manual_seed` reproduces them, and so do
            checkpointing and CUDA graphs. A tensor of one element is a seed whose offset is 0.
        seqlens_q, seqlens_kv, prefix_lengths: int32, or int64, which is converted on the device.
        sinks, alibi_slopes: float32, or a 16-bit type, which is converted. Slopes have no gradient, and raise where they require one.
        tile: of the forward kernel; gradients are computed with their default tiles.
        scale, softcap, dropout_p, window: numbers, or tensors of one element, for which a GPU is waited for.

    Returns:
        out, with autograd's record of query, key, value, an additive attn_mask and sinks; with `return_lse` `(out, lse)`.

    Raises:
        CuflashError: as `cuflash.scaled_dot_product_attention`; a second derivative raises UnsupportedError.
    """
    if type(query) is NestedTensor:
        return nested.attention(varlen_attention, query, key, value, {
            "attn_mask": attn_mask, "dropout_p": dropout_p, "is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa, "layout": layout,
            "attn_bias": attn_bias, "causal_alignment": causal_alignment, "return_lse": return_lse, "tile": tile, "deterministic": deterministic,
            "allow_tf32": allow_tf32, "seqlens_q": seqlens_q, "seqlens_kv": seqlens_kv, "dropout_seed": dropout_seed, "window": window, "softcap": softcap,
            "alibi_slopes": alibi_slopes, "sinks": sinks, "segment_ids_q": segment_ids_q, "segment_ids_kv": segment_ids_kv, "prefix_lengths": prefix_lengths,
        })  # fmt: skip
    if type(attn_mask) is CausalBias:
        attn_mask, is_causal, causal_alignment = inputs.from_causal_bias(attn_mask, is_causal, query, key, layout)
    given = (
        query, key, value, attn_mask, sinks, alibi_slopes, seqlens_q, seqlens_kv, segment_ids_q, segment_ids_kv, prefix_lengths, None, None, None,
        dropout_seed if isinstance(dropout_seed, torch.Tensor) else None,
    )  # fmt: skip
    plain = inputs.check_tensors(given)
    if attn_bias is not None:
        inputs.check_tensor("attn_bias", attn_bias)
    restore = pair_mask = None
    if layout == "bhsd":
        query, key, value, (attn_mask, attn_bias), restore = inputs.four_dimensions(query, key, value, attn_mask, attn_bias)
    if attn_bias is not None:
        attn_mask, pair_mask, segment_ids_q, segment_ids_kv = _beside_bias(
            query, key, value, attn_mask, attn_bias, segment_ids_q, segment_ids_kv, layout
        )
    query, key, value = inputs.autocast(query, key, value)
    options = {
        "dropout_p": inputs.probability(dropout_p), "is_causal": is_causal, "scale": number(scale), "enable_gqa": enable_gqa, "layout": layout, "batch_first": True,
        "num_heads": None, "causal_alignment": causal_alignment, "tile": tile, "deterministic": deterministic, "allow_tf32": allow_tf32,
        "window": inputs.pair(window), "softcap": number(softcap),
    }  # fmt: skip
    state, seed = inputs.dropout_source(options["dropout_p"], dropout_seed, query.device)
    sinks, alibi_slopes = inputs.sinks_and_slopes(sinks, alibi_slopes)
    tensors = (
        query, key, value, attn_mask, sinks, alibi_slopes, inputs.lengths(seqlens_q), inputs.lengths(seqlens_kv), segment_ids_q, segment_ids_kv,
        inputs.lengths(prefix_lengths), None, None, pair_mask, state,
    )  # fmt: skip
    return Asked(Call(False, options, seed), tensors, plain, return_lse, restore)


@warm_calls.remembers(_attend)
@explains_keywords
def varlen_attention(
    query: Any,
    key: Any,
    value: Any,
    cu_seqlens_q: Any,
    cu_seqlens_kv: Any,
    max_seqlen_q: int | None = None,
    max_seqlen_kv: int | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    causal_alignment: str = "bottom_right",
    return_lse: bool = False,
    tile: Any = None,
    deterministic: bool = False,
    allow_tf32: bool = False,
    attn_mask: None = None,
    dropout_p: float = 0.0,
    dropout_seed: Any = None,
    window: Any = None,
    softcap: float | None = None,
    alibi_slopes: Any = None,
    sinks: Any = None,
    prefix_lengths: Any = None,
) -> Any:
    """`cuflash.varlen_attention` of tensors, recorded by autograd.

    Args:
        query, key, value: `(tokens, heads, head_dim)`.
        cu_seqlens_q, cu_seqlens_kv: int32 `(sequences + 1,)`, or int64 as `cumsum` gives them, which is converted on the device.
        max_seqlen_q, max_seqlen_kv: ints, or tensors of one element, for which a GPU is waited for.

    Others are those of `cuflash.varlen_attention` and of `scaled_dot_product_attention` here.

    Returns:
        out `(tokens, heads, head_dim_v)`, or with `return_lse` out and lse `(heads, tokens)`, both differentiable.
    """
    state = dropout_seed if isinstance(dropout_seed, torch.Tensor) else None
    given = (
        query, key, value, attn_mask, sinks, alibi_slopes, None, None, None, None, prefix_lengths, cu_seqlens_q, cu_seqlens_kv, None, state,
    )  # fmt: skip
    plain = inputs.check_tensors(given)
    query, key, value = inputs.autocast(query, key, value)
    options = {
        "max_seqlen_q": number(max_seqlen_q), "max_seqlen_kv": number(max_seqlen_kv), "dropout_p": inputs.probability(dropout_p), "is_causal": is_causal,
        "scale": number(scale), "enable_gqa": enable_gqa, "causal_alignment": causal_alignment, "tile": tile, "deterministic": deterministic,
        "allow_tf32": allow_tf32, "window": inputs.pair(window), "softcap": number(softcap),
    }  # fmt: skip
    state, seed = inputs.dropout_source(options["dropout_p"], dropout_seed, query.device)
    sinks, alibi_slopes = inputs.sinks_and_slopes(sinks, alibi_slopes)
    tensors = (
        query, key, value, attn_mask, sinks, alibi_slopes, None, None, None, None, inputs.lengths(prefix_lengths), inputs.lengths(cu_seqlens_q),
        inputs.lengths(cu_seqlens_kv), None, state,
    )  # fmt: skip
    return Asked(Call(True, options, seed), tensors, plain, return_lse)


@explains_keywords
def plan(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    layout: str = "bhsd",
    attn_bias: Any = None,
    causal_alignment: str = "top_left",
    return_lse: bool = False,
    tile: Any = None,
    deterministic: bool = False,
    allow_tf32: bool = False,
    seqlens_q: Any = None,
    seqlens_kv: Any = None,
    backward: bool = False,
    jvp: bool = False,
    dropout_seed: Any = None,
    window: Any = None,
    softcap: float | None = None,
    alibi_slopes: Any = None,
    sinks: Any = None,
    segment_ids_q: Any = None,
    segment_ids_kv: Any = None,
    prefix_lengths: Any = None,
) -> Plan:
    """Say what `scaled_dot_product_attention` would run with these arguments, or with `backward` what its gradients would, with `jvp` its tangents; `print` it.

    Nothing is compiled, launched or recorded; tensors are dense. Where autograd records the call, the forward pass has `return_lse=True`.
    """
    if type(attn_mask) is CausalBias:
        attn_mask, is_causal, causal_alignment = inputs.from_causal_bias(attn_mask, is_causal, query, key, layout)
    state = dropout_seed if isinstance(dropout_seed, torch.Tensor) else None
    given = (query, key, value, attn_mask, sinks, alibi_slopes, seqlens_q, seqlens_kv, segment_ids_q, segment_ids_kv, prefix_lengths)
    inputs.check_tensors((*given, None, None, None, state))
    pair_mask = None
    if layout == "bhsd":
        query, key, value, (attn_mask, attn_bias), _ = inputs.four_dimensions(query, key, value, attn_mask, attn_bias)
    if attn_bias is not None:
        inputs.check_tensor("attn_bias", attn_bias)
        attn_mask, pair_mask, segment_ids_q, segment_ids_kv = _beside_bias(
            query, key, value, attn_mask, attn_bias, segment_ids_q, segment_ids_kv, layout
        )
    query, key, value = inputs.autocast(query, key, value)
    dropout_p = inputs.probability(dropout_p)
    with torch.no_grad():  # so that slopes may require grad
        sinks, alibi_slopes = inputs.sinks_and_slopes(sinks, alibi_slopes)
    if dropout_p and dropout_seed is None:
        dropout_seed = 0  # a plan says nothing of it, and the generator stays where it is
    seed = inputs.seed_and_offset(dropout_seed)
    operands = Operands(
        query, key, value, attn_mask, alibi_slopes, sinks, inputs.lengths(prefix_lengths), seed, None, inputs.lengths(seqlens_kv), segment_ids_q,
        segment_ids_kv, pair_mask=pair_mask, seqlens_q=inputs.lengths(seqlens_q),
    )  # fmt: skip
    options = Options(
        is_causal, number(scale), enable_gqa, causal_alignment, return_lse, tile, deterministic, allow_tf32, dropout_p, inputs.pair(window),
        number(softcap), layout, need_attn_mask_grad=bool(backward and attn_mask is not None and attn_mask.requires_grad),
    )  # fmt: skip
    return calls.plan(operands, options, backward, jvp)


def _beside_bias(
    query: Any, key: Any, value: Any, attn_mask: Any, attn_bias: Any, ids_q: Any, ids_kv: Any, layout: str
) -> tuple[Any, Any, Any, Any]:
    """attn_mask, pair_mask, segment_ids_q and segment_ids_kv of a call that has an attn_bias."""
    b, h, s = (layout.index(axis) for axis in "bhs")
    extents = max(x.shape[b] for x in (query, key, value)), query.shape[h], query.shape[s], key.shape[s]
    return inputs.mask_beside_bias(attn_mask, attn_bias, extents, ids_q, ids_kv)
