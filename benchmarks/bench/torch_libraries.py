"""Peers that take torch tensors: scaled_dot_product_attention and its backends, FlexAttention, flash-attn, FlashInfer, and attention written in Triton.

A peer that has no argument for a feature, but takes a mask, is given what a user would give it: a mask of the size of the scores. Backends of torch are
pinned, since it would choose another one without saying so; what torch says of a backend that it refuses is the reason that is reported.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from typing import Any

import numpy

from bench.calls import Calls, NotSupported, refuse, torch_calls
from bench.operands import Operands

SDPA_BACKENDS = {"flash": "FLASH_ATTENTION", "cudnn": "CUDNN_ATTENTION", "efficient": "EFFICIENT_ATTENTION", "math": "MATH"}
LONGEST_OF_MATH = 4096
"""torch's math backend keeps all scores in memory."""


def explicit_mask(operands: Operands) -> Any:
    """One mask for everything that hides keys or is added to the scores, (batch or 1, heads or 1, seqlen_q, seqlen_kv): boolean, or with ALiBi of query's type."""
    torch, sample, visible = operands.torch, operands.case.sample, operands.visible
    if not sample.features.alibi:
        return visible
    query, key = (torch.arange(length, device=visible.device) for length in (sample.seqlen_q, sample.seqlen_kv))
    distance = (query[:, None] - key[None, :]).abs().to(torch.float32)
    bias = (-operands.arguments["alibi_slopes"][:, None, None] * distance).to(getattr(torch, sample.dtype))
    return torch.where(visible, bias[None], -torch.inf)


def sdpa_calls(operands: Operands, backend: str) -> Calls:
    """torch.nn.functional.scaled_dot_product_attention with one backend."""
    torch, case, sample = operands.torch, operands.case, operands.case.sample
    from torch.nn.attention import SDPBackend, sdpa_kernel

    refuse(case, "scaled_dot_product_attention", "softcap", "sinks", "varlen")
    if backend == "MATH" and case.seqlen > LONGEST_OF_MATH:
        raise NotSupported(f"math would keep {case.seqlen} x {case.seqlen} scores of every head")
    kinds, options, note, gradient_of = sample.features.kinds(), {}, "", None
    if sample.num_heads_q != sample.num_heads_kv:
        options["enable_gqa"] = True
    if kinds.dropout:
        options["dropout_p"] = sample.features.dropout
        note = "not checked: draws another dropout mask"
    only_mask = kinds.attn_mask is not None and not (sample.is_causal or kinds.window or kinds.alibi or kinds.segments or kinds.prefix)
    if sample.features.need_attn_mask_grad:
        gradient_of = operands.arguments["attn_mask"]
    elif only_mask:
        options["attn_mask"] = operands.arguments["attn_mask"]
    elif kinds.hides_keys or kinds.alibi or sample.lengths_kv is not None:
        options["attn_mask"] = explicit_mask(operands)
        note = f"by a mask of {options['attn_mask'].nbytes / 2**20:.3g} MiB"
    else:
        options["is_causal"] = sample.is_causal

    def attention(query: Any, key: Any, value: Any, mask: Any = None) -> Any:
        given = options if mask is None else {**options, "attn_mask": mask}
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, **given)

    def pinned() -> Any:
        return sdpa_kernel(getattr(SDPBackend, backend))

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            return torch_calls(operands, attention, pinned, mask=gradient_of, note=note)
        except RuntimeError as error:
            own = [
                text for warning in said if (text := str(warning.message).partition(" (Triggered")[0]) and "not used because" not in text
            ]
            raise NotSupported(" ".join(dict.fromkeys(own)) or str(error)) from error


@functools.cache
def _compiled_flex() -> Any:
    import torch
    from torch.nn.attention.flex_attention import flex_attention

    for name in ("recompile_limit", "cache_size_limit"):
        with contextlib.suppress(Exception):
            setattr(torch._dynamo.config, name, 256)
    return torch.compile(flex_attention, dynamic=False)


def flex_calls(operands: Operands) -> Calls:
    """FlexAttention, with the features as functions of a score and its place."""
    torch, sample, given = operands.torch, operands.case.sample, operands.arguments
    from torch.nn.attention.flex_attention import create_block_mask

    refuse(operands.case, "flex_attention", "dropout", "sinks", "prefix")
    features, kinds = sample.features, sample.features.kinds()
    arrays = operands.arrays
    rows, columns, of_token = sample.seqlen_q, sample.seqlen_kv, None
    left, right = features.window or (None, None)
    if sample.is_packed:
        lengths = sample.packed_lengths[0]
        if sample.packed_lengths[1] != lengths:
            raise NotSupported("a document mask takes queries and keys of the same sequences")
        rows = columns = sum(lengths)
        of_token = operands.placed(numpy.repeat(numpy.arange(len(lengths)), lengths), "int64")
    key_mask = given["attn_mask"] if kinds.attn_mask == "bool" else None

    def visible(b: Any, h: Any, i: Any, j: Any) -> Any:
        seen = i >= j if sample.is_causal else i >= 0
        if left is not None and left >= 0:
            seen = seen & (i - j <= left)
        if right is not None and right >= 0:
            seen = seen & (j - i <= right)
        if kinds.segments:
            seen = seen & (given["segment_ids_q"][b, i] == given["segment_ids_kv"][b, j])
        if of_token is not None:
            seen = seen & (of_token[i] == of_token[j])
        if "seqlens_kv" in given:
            seen = seen & (j < given["seqlens_kv"][b])
        if key_mask is not None:
            seen = seen & key_mask[b, 0, 0, j]
        return seen

    if key_mask is not None and tuple(key_mask.shape[1:3]) != (1, 1):
        raise NotSupported("only key padding is written as a function here")
    hides = sample.is_causal or kinds.hides_keys or sample.is_packed or "seqlens_kv" in given
    per_batch = kinds.segments or key_mask is not None or "seqlens_kv" in given
    block_mask = None
    if hides:
        block_mask = create_block_mask(visible, sample.batch if per_batch else None, None, rows, columns, device=arrays["query"].device)

    def attention(query: Any, key: Any, value: Any, bias: Any = None) -> Any:
        def score(score: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
            if kinds.softcap:
                score = features.softcap * torch.tanh(score / features.softcap)
            if bias is not None:
                score = score + bias[0, h, i, j]
            return score - given["alibi_slopes"][h] * (i - j).abs() if kinds.alibi else score

        packed = [x[None].transpose(1, 2) for x in (query, key, value)] if sample.is_packed else [query, key, value]
        changes = kinds.softcap or kinds.alibi or bias is not None
        gqa = {"enable_gqa": True} if sample.num_heads_q != sample.num_heads_kv else {}
        out = _compiled_flex()(*packed, score_mod=score if changes else None, block_mask=block_mask, **gqa)
        return out.transpose(1, 2)[0] if sample.is_packed else out

    bias = given["attn_mask"] if features.need_attn_mask_grad else None
    return torch_calls(operands, attention, contextlib.nullcontext, transpose=not sample.is_packed, mask=bias)


def varlen_calls(operands: Operands) -> Calls:
    """torch.nn.attention.varlen, which is flash-attn's kernel for packed sequences."""
    from torch.nn.attention.varlen import varlen_attn

    sample, given = operands.case.sample, operands.arguments
    if not sample.is_packed:
        raise NotSupported("varlen_attn is for packed sequences")
    refuse(operands.case, "varlen_attn", "dropout", "softcap", "sinks", "alibi", "prefix", "window")
    call = functools.partial(
        varlen_attn, cu_seq_q=given["cu_seqlens_q"], cu_seq_k=given["cu_seqlens_kv"], max_q=given["max_seqlen_q"], max_k=given["max_seqlen_kv"],
        window_size=(-1, 0 if sample.is_causal else -1),
    )  # fmt: skip
    return torch_calls(operands, call, contextlib.nullcontext, transpose=False)


# --- flash-attn ---------------------------------------------------------------------------------------------------------------------------


def flash_attn_calls(operands: Operands) -> Calls:
    """flash-attn's two functions, which take arrays as they are stored."""
    import flash_attn

    sample, given = operands.case.sample, operands.arguments
    refuse(operands.case, "flash_attn", "sinks", "segments", "prefix", "attn_mask", "seqlens_kv")
    window = tuple(-1 if limit is None else limit for limit in sample.features.window or (None, None))
    options: dict[str, Any] = {"causal": sample.is_causal, "window_size": window, "dropout_p": sample.features.dropout}
    options |= {"softcap": sample.features.softcap or 0.0, "alibi_slopes": given.get("alibi_slopes")}
    call = functools.partial(flash_attn.flash_attn_func, **options)
    if sample.is_packed:
        call = functools.partial(
            flash_attn.flash_attn_varlen_func, cu_seqlens_q=given["cu_seqlens_q"], cu_seqlens_k=given["cu_seqlens_kv"],
            max_seqlen_q=given["max_seqlen_q"], max_seqlen_k=given["max_seqlen_kv"], **options,
        )  # fmt: skip
    note = "not checked: draws another dropout mask" if sample.features.dropout else ""
    return torch_calls(operands, call, contextlib.nullcontext, transpose=False, note=note)


# --- FlashInfer and Triton ----------------------------------------------------------------------------------------------------------------


def flashinfer_calls(operands: Operands) -> Calls:
    """FlashInfer's prefill of packed sequences, which is made for inference: there is no backward pass. Its planning is not timed."""
    import flashinfer

    torch, case, sample, given = operands.torch, operands.case, operands.case.sample, operands.arguments
    refuse(case, "flashinfer", "dropout", "alibi", "sinks", "segments", "prefix", "attn_mask", "seqlens_kv")
    left, right = sample.features.window or (None, None)
    if right not in (None, -1) and not (sample.is_causal and right == 0):
        raise NotSupported("flashinfer has no window to the right")
    query, key, value = (operands.arrays[name] for name in ("query", "key", "value"))
    if sample.is_packed:
        offsets = given["cu_seqlens_q"], given["cu_seqlens_kv"]
    else:
        lengths = (sample.seqlen_q, sample.seqlen_kv)
        offsets = tuple(torch.arange(sample.batch + 1, dtype=torch.int32, device=query.device) * length for length in lengths)
    workspace = torch.empty(128 << 20, dtype=torch.uint8, device=query.device)
    wrapper = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(workspace, "NHD")
    wrapper.plan(
        *offsets, sample.num_heads_q, sample.num_heads_kv, sample.head_dim, head_dim_vo=case.head_dim_v, causal=sample.is_causal,
        window_left=-1 if left is None else left, logits_soft_cap=sample.features.softcap, q_data_type=query.dtype, kv_data_type=key.dtype,
    )  # fmt: skip
    packed = [x if sample.is_packed else x.flatten(0, 1) for x in (query, key, value)]
    shape = operands.arrays["grad_out"].shape

    def forward() -> Any:
        return wrapper.run(*packed)

    forward()
    return Calls(forward, None, lambda name, x: x.reshape(shape))


def triton_calls(operands: Operands) -> Calls:
    """Attention written in Triton (bench/triton_attention.py)."""
    from bench import triton_attention

    case, sample = operands.case, operands.case.sample
    refuse(
        case,
        "bench.triton_attention",
        *("dropout", "window", "softcap", "alibi", "sinks", "segments", "prefix", "attn_mask"),
        "varlen",
        "seqlens_kv",
    )
    dims = triton_attention.FORWARD_BLOCKS
    if sample.head_dim not in dims or case.head_dim_v != sample.head_dim:
        raise NotSupported(f"bench.triton_attention is written for head dimensions {', '.join(map(str, dims))}")
    if sample.num_heads_q != sample.num_heads_kv or sample.seqlen_q != sample.seqlen_kv or sample.seqlen_q % 64:
        raise NotSupported("bench.triton_attention takes as many key heads as query heads, and as many keys as queries, a multiple of 64")
    attention = triton_attention.Attention(operands.arrays, is_causal=sample.is_causal)
    attention.forward()
    return Calls(attention.forward, attention.backward, forward_lse=attention.forward)
