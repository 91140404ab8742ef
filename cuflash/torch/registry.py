"""cuflash as "CUFLASH" in torch's registry of flash kernels: `torch.nn.attention.activate_flash_attention_impl("CUFLASH")`, where torch has one.

While it is active, torch's operators of flash attention are cuflash's, so that everything which torch itself sends to them runs here: calls of
`scaled_dot_product_attention` for which it chooses its flash kernel, jagged nested tensors, and `torch.nn.attention.varlen.varlen_attn`. Importing cuflash.torch makes
the name known and activates nothing. What these operators ask for and cuflash does not have raises: torch's kernel cannot be reached from here.
"""

from __future__ import annotations

from typing import Any

import torch

from cuflash.attention import varlen_attention
from cuflash.decoding import attention_with_kvcache
from cuflash.errors import OptionError, UnsupportedError
from cuflash.torch.functions import Call
from cuflash.torch.inputs import dropout_source, lengths

NAME = "CUFLASH"
_DEVICES = ("CUDA", "CPU")
"""On the CPU torch has no kernels of its own for these operators: there cuflash's run on the simulator."""


class _Active:
    """cuflash's operators until they are removed, as the registry wants it."""

    def __init__(self) -> None:
        self._library: Any = torch.library.Library("aten", "IMPL")
        for device in _DEVICES:
            for name, function in (
                ("_flash_attention_forward", _forward),
                ("_flash_attention_backward", _backward),
                ("_scaled_dot_product_flash_attention", _padded_forward),
                ("_scaled_dot_product_flash_attention_backward", _padded_backward),
                ("_flash_attention_forward_no_dropout_inplace", _forward_into),
            ):
                if hasattr(torch.ops.aten, name):
                    self._library.impl(name, function, device)

    def remove(self) -> None:
        self._library._destroy()
        self._library = None


def register() -> bool:
    """Make the name known to torch's registry.

    Returns:
        whether torch has one.
    """
    try:
        from torch.nn.attention import register_flash_attention_impl
    except ImportError:
        return False
    register_flash_attention_impl(NAME, register_fn=_Active)
    return True


def _call(
    query: Any, dropout_p: float, is_causal: bool, scale: float | None, max_q: Any, max_k: Any, window: tuple[int | None, int | None], layout: str = "bshd"
) -> Call:  # fmt: skip
    left, right = (None if limit in (None, -1) else limit for limit in window)
    options: dict[str, Any] = {
        "dropout_p": dropout_p, "is_causal": is_causal, "scale": scale, "enable_gqa": True, "tile": None,
        "deterministic": False, "allow_tf32": False, "window": None if left is right is None else (left, right), "softcap": None,
    }  # fmt: skip
    options["causal_alignment"] = "top_left" if layout == "bhsd" else "bottom_right"  # torch's function, or flash-attn's
    if query.dim() == 3:
        return Call(True, options | {"max_seqlen_q": max_q, "max_seqlen_kv": max_k})
    return Call(False, options | {"layout": layout, "batch_first": True, "num_heads": None})


def _tensors(
    query: Any, key: Any, value: Any, cum_seq_q: Any, cum_seq_k: Any, seed: Any, slopes: Any = None, seqlens_kv: Any = None
) -> tuple[Any, ...]:
    packed = query.dim() == 3
    offsets = (lengths(cum_seq_q), lengths(cum_seq_k)) if packed else (None, None)
    return (query, key, value, None, None, slopes, None, lengths(seqlens_kv), None, None, None, *offsets, None, seed)


def _refuse(return_debug_mask: bool) -> None:
    hint = "torch.nn.attention.restore_flash_attention_impl() brings torch's kernels back."
    if return_debug_mask:
        raise UnsupportedError("return_debug_mask", "True", "False", hint)


def _from_pages(
    query: Any, keys: Any, values: Any, cum_seq_q: Any, max_q: Any, seqused_k: Any, block_table: Any, num_splits: Any, options: Any
) -> Any:
    """Packed queries, or a batch of them, and keys in pages, of which each sequence has `seqused_k`; torch has no gradients of it."""
    if seqused_k is None:
        hint = "Pass how many keys each sequence has in its pages."
        raise OptionError("seqused_k", "None beside block_table", "int32 (batch,)", hint)
    packed = {"cu_seqlens_q": lengths(cum_seq_q), "max_seqlen_q": max_q} if query.dim() == 3 else {}
    return attention_with_kvcache(
        query, keys, values, cache_seqlens=lengths(seqused_k), page_table=lengths(block_table), return_lse=True, num_splits=num_splits or None,
        **packed, **options,
    )  # fmt: skip


def _in_places(
    query: Any, key: Any, value: Any, cum_seq_q: Any, cum_seq_k: Any, max_q: Any, max_k: Any, seqused_k: Any, options: Any
) -> Any:
    """Packed sequences of which each has `seqused_k` keys; torch has no gradients of it."""
    return varlen_attention(
        query, key, value, lengths(cum_seq_q), lengths(cum_seq_k), max_q, max_k, enable_gqa=True, return_lse=True, seqused_kv=lengths(seqused_k), **options,
    )  # fmt: skip


@torch.no_grad()  # type: ignore[untyped-decorator]
def _forward(
    query: Any, key: Any, value: Any, cum_seq_q: Any, cum_seq_k: Any, max_q: Any, max_k: Any, dropout_p: float, is_causal: bool, return_debug_mask: bool, *,
    scale: float | None = None, window_size_left: Any = None, window_size_right: Any = None, seqused_k: Any = None, alibi_slopes: Any = None,
    block_table: Any = None, num_splits: Any = None,
) -> tuple[Any, ...]:  # fmt: skip
    """`aten::_flash_attention_forward`; num_splits is that of keys in pages, others are not split."""
    _refuse(return_debug_mask)
    if dropout_p and (block_table is not None or seqused_k is not None):
        raise UnsupportedError("dropout_p", dropout_p, "0.0 with seqused_k or block_table", "torch has no gradients of such a call either.")
    window = tuple(None if limit in (None, -1) else limit for limit in (window_size_left, window_size_right))
    plain = {"is_causal": is_causal, "scale": scale, "window": window, "alibi_slopes": alibi_slopes}
    if block_table is not None:
        out, lse = _from_pages(query, key, value, cum_seq_q, max_q, seqused_k, block_table, num_splits, plain)
        return out, lse, *_auxiliary(query, None)
    if seqused_k is not None and query.dim() == 3:
        out, lse = _in_places(query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, seqused_k, plain)
        return out, lse, *_auxiliary(query, None)
    seed, _ = dropout_source(dropout_p, None, query.device)
    call = _call(query, dropout_p, is_causal, scale, max_q, max_k, (window_size_left, window_size_right))
    out, lse = call.forward(_tensors(query, key, value, cum_seq_q, cum_seq_k, seed, alibi_slopes, seqused_k), True)
    return out, lse, *_auxiliary(query, seed)


def _auxiliary(query: Any, seed: Any) -> tuple[Any, Any, Any]:
    """The state of the generator, and two results that are not used."""
    state = torch.zeros(2, dtype=torch.int64, device=query.device) if seed is None else seed
    return state.view(torch.uint64), query.new_empty((), dtype=torch.uint64), query.new_empty(0)


def _forward_into(out: Any, *arguments: Any, **options: Any) -> Any:
    """`aten::_flash_attention_forward_no_dropout_inplace`."""
    result, lse, *_ = _forward(*arguments, **options)
    out.copy_(result)
    return lse


@torch.no_grad()  # type: ignore[untyped-decorator]
def _backward(
    grad_out: Any, query: Any, key: Any, value: Any, out: Any, logsumexp: Any, cum_seq_q: Any, cum_seq_k: Any, max_q: Any, max_k: Any, dropout_p: float,
    is_causal: bool, rng_state: Any, unused: Any, *, scale: float | None = None, window_size_left: Any = None, window_size_right: Any = None,
) -> tuple[Any, Any, Any]:  # fmt: skip
    """`aten::_flash_attention_backward`."""
    call = _call(query, dropout_p, is_causal, scale, max_q, max_k, (window_size_left, window_size_right))
    seed = rng_state.view(torch.int64) if dropout_p else None
    grads = call.backward(_tensors(query, key, value, cum_seq_q, cum_seq_k, seed), out, logsumexp, grad_out, None, False)
    return grads.query, grads.key, grads.value


@torch.no_grad()  # type: ignore[untyped-decorator]
def _padded_forward(
    query: Any, key: Any, value: Any, dropout_p: float = 0.0, is_causal: bool = False, return_debug_mask: bool = False, *, scale: float | None = None
) -> tuple[Any, ...]:  # fmt: skip
    """`aten::_scaled_dot_product_flash_attention`, in torch's order of dimensions."""
    _refuse(return_debug_mask)
    seed, _ = dropout_source(dropout_p, None, query.device)
    call = _call(query, dropout_p, is_causal, scale, None, None, (None, None), "bhsd")
    out, lse = call.forward(_tensors(query, key, value, None, None, seed), True)
    return out, lse, None, None, query.shape[2], key.shape[2], *_auxiliary(query, seed)


@torch.no_grad()  # type: ignore[untyped-decorator]
def _padded_backward(
    grad_out: Any, query: Any, key: Any, value: Any, out: Any, logsumexp: Any, cum_seq_q: Any, cum_seq_k: Any, max_q: Any, max_k: Any, dropout_p: float,
    is_causal: bool, philox_seed: Any, philox_offset: Any, *, scale: float | None = None,
) -> tuple[Any, Any, Any]:  # fmt: skip
    """`aten::_scaled_dot_product_flash_attention_backward`."""
    call = _call(query, dropout_p, is_causal, scale, None, None, (None, None), "bhsd")
    seed = philox_seed.view(torch.int64) if dropout_p else None
    grads = call.backward(_tensors(query, key, value, None, None, seed), out, logsumexp, grad_out, None, False)
    return grads.query, grads.key, grads.value
