"""`MultiheadAttention` and `TransformerEncoderLayer` on cuflash: torch's modules, with torch's constructors, parameters and state dicts, and attention by kernels.

They are subclasses, so that what holds of torch's holds of them, but for torch's fast path in evaluation, which would bypass attention and is never taken.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.nn.functional import linear, pad

from cuflash.dropout import dropout_mask
from cuflash.torch.attention import scaled_dot_product_attention
from cuflash.torch.inputs import dropout_source


class _Masks(NamedTuple):
    """What hides keys and what is added to scores, each None or broadcast to (batch, heads, seqlen, seqlen_kv).

    Attributes:
        keys: boolean (batch, 1, 1, seqlen_kv): keys that a row of the batch has.
        pairs: boolean: pairs that attend; never beside bias.
        bias: additive.
        is_causal: the pairs that attend are those below the diagonal.
    """

    keys: Any
    pairs: Any
    bias: Any
    is_causal: bool


class MultiheadAttention(torch.nn.MultiheadAttention):  # type: ignore[misc]
    """`torch.nn.MultiheadAttention`, its parameters and arguments.

    Kernels read the projections where they are, in either order of batch and sequence. With need_weights=True, torch's default, the probabilities are formed beside them.
    A query that sees no key gives 0, where torch gives NaN. is_causal needs no attn_mask here; with one it says, as in torch, that this is the causal one.
    """

    def forward(
        self,
        query: Any,
        key: Any,
        value: Any,
        key_padding_mask: Any = None,
        need_weights: bool = True,
        attn_mask: Any = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Any, Any]:
        """(out, weights), weights None unless asked for; see torch's."""
        batched = query.dim() == 3
        if not batched:
            same = query is key and key is value
            query, key, value = (query[:, None],) * 3 if same else (x[:, None] for x in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
        batch_axis = 0 if self.batch_first and batched else 1
        query, key, value = self._projected(query, key, value)
        added = self.bias_k is not None or self.add_zero_attn
        if added:
            key, value = self._with_added_keys(key, value, 1 - batch_axis)
        masks = self._masks(key_padding_mask, attn_mask, is_causal, query.shape[batch_axis], key.shape[1 - batch_axis] if added else None)

        dropout_p = self.dropout if self.training else 0.0
        seed, _ = dropout_source(dropout_p, None, query.device)
        heads = [x.unflatten(-1, (self.num_heads, self.head_dim)) for x in (query, key, value)]
        layout = "bshd" if batch_axis == 0 else "sbhd"
        out = _attention(heads, masks, dropout_p=dropout_p, dropout_seed=seed, layout=layout, return_lse=need_weights)
        out, lse = out if need_weights else (out, None)
        out = linear(out.flatten(-2), self.out_proj.weight, self.out_proj.bias)
        out = out if batched else out[:, 0]
        if not need_weights:
            return out, None
        weights = _weights(heads[0], heads[1], lse, masks, layout)
        if dropout_p:
            weights = weights * dropout_mask(weights.shape, dropout_p, seed, like=weights.detach()) / (1.0 - dropout_p)
        weights = weights.to(out.dtype)
        weights = weights.mean(1) if average_attn_weights else weights
        return out, weights if batched else weights[0]

    def _projected(self, query: Any, key: Any, value: Any) -> tuple[Any, Any, Any]:
        """The three through their projections, by one product where they are the same."""
        if not self._qkv_same_embed_dim:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        elif query is key and key is value:
            return linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, -1)  # type: ignore[no-any-return]
        else:
            weights = self.in_proj_weight.chunk(3)
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        q, k, v = (linear(x, weight, bias) for x, weight, bias in zip((query, key, value), weights, biases, strict=True))
        return q, k, v

    def _with_added_keys(self, key: Any, value: Any, axis: int) -> tuple[Any, Any]:
        """Keys and values with those that the constructor's add_bias_kv and add_zero_attn add behind them."""
        keys, values, shape = [key], [value], [*key.shape]
        shape[axis] = 1
        if self.bias_k is not None:
            keys.append(self.bias_k.expand(shape).to(key.dtype))
            values.append(self.bias_v.expand(shape).to(value.dtype))
        if self.add_zero_attn:
            keys.append(key.new_zeros(shape))
            values.append(value.new_zeros(shape))
        return torch.cat(keys, axis), torch.cat(values, axis)

    def _masks(self, key_padding_mask: Any, attn_mask: Any, is_causal: bool, batch: int, seqlen_kv: int | None) -> _Masks:
        """Torch's masks, whose True hides; `seqlen_kv` says how many keys there are where some were added, which all queries see."""
        if is_causal and (attn_mask is None or seqlen_kv is None):
            attn_mask = None
        else:
            is_causal = False
        given = [key_padding_mask, attn_mask]
        if seqlen_kv is not None:
            given = [x if x is None else pad(x, (0, seqlen_kv - x.shape[-1])) for x in given]
        padding, attn_mask = given
        if padding is not None:
            padding = padding[:, None, None, :]
        if attn_mask is not None and attn_mask.dim() == 3:
            attn_mask = attn_mask.unflatten(0, (batch, self.num_heads))
        keys = ~padding if padding is not None and padding.dtype == torch.bool else None
        pairs = ~attn_mask if attn_mask is not None and attn_mask.dtype == torch.bool else None
        additive = [x for x in (padding, attn_mask) if x is not None and x.dtype != torch.bool]
        bias = sum(additive[1:], additive[0]) if additive else None
        return _Masks(keys, pairs, bias, is_causal)


def _attention(heads: Any, masks: _Masks, layout: str, **options: Any) -> Any:
    """The call, with a mask of keys as segment ids where another mask takes its place."""
    mask = masks.pairs
    if masks.keys is not None and mask is None:
        mask = masks.keys
    elif masks.keys is not None:
        ids_kv = masks.keys[:, 0, 0].to(torch.int32)
        options |= {"segment_ids_q": ids_kv.new_ones(1, heads[0].shape[layout.index("s")]), "segment_ids_kv": ids_kv}
    query, key, value = heads
    return scaled_dot_product_attention(query, key, value, mask, is_causal=masks.is_causal, layout=layout, attn_bias=masks.bias, **options)


def _weights(query: Any, key: Any, lse: Any, masks: _Masks, layout: str) -> Any:
    """exp(score - lse), written out: (batch, heads, seqlen, seqlen_kv) in float32."""
    axes = [layout.index(letter) for letter in "bhsd"]
    query, key = (x.permute(axes).float() for x in (query, key))
    scores = query.shape[-1] ** -0.5 * (query @ key.mT)
    if masks.bias is not None:
        scores = scores + masks.bias
    for mask in (masks.keys, masks.pairs):
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
    if masks.is_causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1), float("-inf"))
    return torch.exp(scores - lse.masked_fill(lse.isneginf(), 0.0)[..., None])


class TransformerEncoderLayer(torch.nn.TransformerEncoderLayer):  # type: ignore[misc]
    """`torch.nn.TransformerEncoderLayer`, its parameters and arguments, with `MultiheadAttention` of this module."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.self_attn.__class__ = MultiheadAttention  # with the parameters that torch has drawn, which a second module would draw again
        self.activation_relu_or_gelu = 0  # torch's fast path, which also nn.TransformerEncoder looks for, knows 1 and 2
