"""cuflash as an attention of Hugging Face's transformers: `attn_implementation=cuflash.torch.register_transformers()`.

Masks are those that transformers makes for torch's function: none where the causal or full pattern says all, else boolean ones, which hold padding, windows, chunks and
packed documents, and whose empty tiles the kernels skip. A static cache is read as far as its mask shows any key. `transformers_cache` makes a cache of pages for
`generate(past_key_values=…)` (transformers_cache.py). Imported only when asked for; transformers with an
`AttentionInterface` is needed then.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch

from cuflash.errors import OptionError, SetupError, UnsupportedError
from cuflash.torch.attention import scaled_dot_product_attention
from cuflash.torch.transformers_cache import AppendedKeys

NAME = "cufl"
_FEW_QUERIES = 16
"""As few as a step of generation has: the kernel for more walks over lists of what a mask shows."""


def register_transformers(name: str = NAME) -> str:
    """Make cuflash known to transformers, for whoever asks for it by `name`.

    Args:
        name: must not contain "flash", which transformers takes for the flash-attn package.

    Returns:
        name, for `attn_implementation=`.

    Raises:
        SetupError: transformers is missing, or older than its interface for attention.
        OptionError: a name that transformers would take for something else.
    """
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import sdpa_mask
    except ImportError as error:
        raise SetupError(
            "cuflash.torch.register_transformers needs transformers with an AttentionInterface: pip install transformers."
        ) from error
    if not isinstance(name, str) or any(word in name for word in ("flash", "flex", "sdpa", "eager", "paged", "/")):
        hint = "transformers treats names with flash, flex, sdpa, eager, paged or a slash in ways of their own: leave the name out."
        raise OptionError("name", repr(name), "a name of its own", hint)
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, sdpa_mask)
    return name


def attention(
    module: Any,
    query: Any,
    key: Any,
    value: Any,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Any = None,
    softcap: float | None = None,
    s_aux: Any = None,
    **others: Any,
) -> tuple[Any, None]:
    """What transformers calls: query, key, value (batch, heads, seqlen, head_dim) to out (batch, seqlen, heads, head_dim), and no probabilities.

    Args:
        attention_mask: boolean or additive (batch, 1, seqlen, seqlen_kv); None where is_causal says all.
        position_bias: additive, (1, heads, seqlen, seqlen_kv), as T5 has it.
        softcap, s_aux: cap of the scores; sinks.
        others: what the mask says already, such as sliding_window, and what is no matter of attention.
    """
    if others.get("output_attentions"):
        hint = "The probabilities are never formed: attn_implementation='eager' forms them."
        raise UnsupportedError("output_attentions", "True", "False", hint)
    if isinstance(key, AppendedKeys):
        sinks = None if s_aux is None else s_aux.float()
        return key.attend(query, value, attention_mask, position_bias, dropout, scale=scaling, softcap=softcap, sinks=sinks), None
    seqlen_q, seqlen_kv = query.shape[2], key.shape[2]
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = bool(causal) and attention_mask is None and seqlen_q > 1  # one query without a mask is the last one
    if attention_mask is not None and attention_mask.shape[-1] > seqlen_kv:
        attention_mask = attention_mask[..., :seqlen_kv]
    if query.shape[0] != key.shape[0]:  # learned queries
        query = query.expand(key.shape[0], -1, -1, -1)
    if position_bias is not None:
        attention_mask, position_bias = _mask_and_bias(attention_mask, position_bias)
    out = scaled_dot_product_attention(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), attention_mask, dropout, causal, scaling, True, layout="bshd",
        attn_bias=position_bias, softcap=softcap, sinks=s_aux, seqlens_kv=_shown_lengths(attention_mask, query, key),
    )  # fmt: skip
    return out, None


_latest: tuple[Any, int, Any] = (None, 0, None)
"""A mask, by a weak reference, its version, and what it shows: each layer of a step has the same one."""


def _shown_lengths(mask: Any, query: Any, key: Any) -> Any:
    """Keys of each row up to the last one that a mask shows to any query, int32 on the device; None where it is not worth knowing, or not known to hold."""
    global _latest
    batch, _, seqlen_kv, _ = key.shape
    if mask is None or mask.dtype != torch.bool or mask.dim() != 4 or mask.shape[3] != seqlen_kv or query.shape[2] > _FEW_QUERIES:
        return None
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or type(mask) is not torch.Tensor:
        return None
    version = -1 if mask.is_inference() else mask._version  # how often it was written to, which no other tensor tells
    known, known_version, lengths = _latest
    if known is None or known() is not mask or version != known_version or version < 0:
        ends = torch.arange(1, seqlen_kv + 1, dtype=torch.int32, device=mask.device)
        lengths = torch.where(mask.any(1).any(1), ends, 0).amax(1).to(torch.int32)
        _latest = weakref.ref(mask), version, lengths
    return lengths.expand(batch).contiguous()


def _mask_and_bias(mask: Any, bias: Any) -> tuple[Any, Any]:
    """A mask and a bias in a form that the call takes: apart, but for a mask that is added, too."""
    if mask is None:
        return None, bias
    return (mask, bias) if mask.dtype == torch.bool else (None, bias + mask)
