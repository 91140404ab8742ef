"""Bring what torch's users pass into the form that cuflash takes: plain tensors of four dimensions, int32 lengths, float32 sinks and slopes, Python numbers.

What changes shapes or types here is done by torch's operators, so autograd undoes it. Nothing here waits for a GPU but `number`, which reads a tensor of one
element on the host, as it says.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.nn.attention.bias import CausalVariant

from cuflash.arrays.descriptions import describe
from cuflash.errors import DTypeError, OptionError, ShapeError, UnsupportedError
from cuflash.problem.features import check_dropout_p

TENSORS = (
    "query", "key", "value", "attn_mask", "sinks", "alibi_slopes", "seqlens_q", "seqlens_kv", "segment_ids_q", "segment_ids_kv", "prefix_lengths", "cu_seqlens_q",
    "cu_seqlens_kv", "pair_mask", "dropout_seed",
)  # fmt: skip
"""The tensors of a call, in the order in which all functions of this package take them, None for those that it does not have."""


def address_name(name: str) -> str:
    """What kernels know the address of a tensor by."""
    return "dropout_state" if name == "dropout_seed" else name


_PLAIN = (torch.Tensor, torch.nn.Parameter)
TRACED = (FakeTensor, FunctionalTensor)
"""Stand-ins for tensors while a call is traced."""
_HALF = (torch.float16, torch.bfloat16)
_INT32_MAX = 2**31 - 1


def check_tensors(tensors: tuple[Any, ...]) -> bool:
    """Refuse what is no tensor, and tensors that compute in ways of their own, whose memory may hold something else than their values.

    Returns:
        whether all are of torch's own types, or None.

    Raises:
        DTypeError: names the argument and its class.
    """
    if all([tensor is None or type(tensor) in _PLAIN for tensor in tensors]):  # noqa: C419  # a list is quicker, and traced by every version of Dynamo
        query, key, value = tensors[:3]
        if query is None or key is None or value is None:
            missing = TENSORS[0 if query is None else 1 if key is None else 2]
            raise DTypeError(missing, "None", "a torch tensor", f"Only what has a default may be left out: pass {missing}.")
        if query.is_nested:  # torch's older nested tensors, which are of its plain type
            hint = f"Make it with layout=torch.jagged; or pad it, {TENSORS[0]}.to_padded_tensor(0.0), with seqlens_kv."
            raise DTypeError(TENSORS[0], "a nested tensor of the older layout", "a dense or a jagged tensor", hint)
        return True
    for name, tensor in zip(TENSORS, tensors, strict=True):
        check_tensor(name, tensor)
    return False


def check_tensor(name: str, tensor: Any) -> None:
    """As `check_tensors`, of one that may be None."""
    kind = type(tensor)
    if tensor is None or kind in _PLAIN or isinstance(tensor, TRACED):
        return
    if not isinstance(tensor, torch.Tensor):
        raise DTypeError(name, describe(tensor), "a torch tensor", f"Convert it: torch.as_tensor({name}), or call cuflash's own functions.")
    if tensor.is_nested:
        hint = f"Pad it, {name}.to_padded_tensor(0.0), with seqlens_kv; or call varlen_attention with {name}.values() and {name}.offsets()."
        raise DTypeError(name, "a nested tensor", "a dense tensor", hint)
    if not _computes_as_usual(kind):
        got = f"a tensor of the subclass {kind.__module__}.{kind.__qualname__}"
        hint = f"Its operators are its own, so that its memory need not hold its values: pass {name}.as_subclass(torch.Tensor) if it does."
        raise DTypeError(name, got, "a plain torch tensor", hint)


def _computes_as_usual(kind: type) -> bool:
    """Whether a subclass overrides nothing that happens to its tensors, such as `torch.nn.Buffer`."""
    usual = (torch.Tensor.__torch_function__, torch._C._disabled_torch_function_impl)
    functions = [getattr(function, "__func__", function) for function in usual]
    dispatch, plain = kind.__torch_dispatch__, torch.Tensor.__torch_dispatch__  # type: ignore[attr-defined]
    if getattr(dispatch, "__func__", dispatch) is not getattr(plain, "__func__", plain):
        return False
    function: Any = kind.__torch_function__  # type: ignore[attr-defined]
    return getattr(function, "__func__", function) in functions


def from_causal_bias(bias: Any, is_causal: Any, query: Any, key: Any, layout: str) -> tuple[None, bool, str]:
    """What a `torch.nn.attention.bias.CausalBias` says, as attn_mask, is_causal and causal_alignment."""
    if is_causal:
        hint = "It says all that is_causal says: leave is_causal out."
        raise OptionError("is_causal", "True with a CausalBias as attn_mask", "one of the two", hint)
    axis = layout.index("s") - 4
    found = query.shape[axis], key.shape[axis]
    if (bias.seq_len_q, bias.seq_len_kv) != found:
        got = f"a CausalBias for {bias.seq_len_q} queries and {bias.seq_len_kv} keys"
        raise ShapeError("attn_mask", got, f"one for {found[0]} and {found[1]}", "Make it of the lengths of query and key.")
    return None, True, "top_left" if bias.variant == CausalVariant.UPPER_LEFT else "bottom_right"


def mask_beside_bias(
    attn_mask: Any, attn_bias: Any, extents: tuple[int, int, int, int], ids_q: Any, ids_kv: Any
) -> tuple[Any, Any, Any, Any]:
    """A boolean attn_mask and an additive attn_bias as what kernels take, each broadcast for itself and none copied.

    A boolean mask that hides the same keys from all queries and heads of a row becomes segment ids, by which whole tiles are passed over. Another one stands
    beside the additive one.

    Args:
        extents: batch, heads of the query, seqlen_q and seqlen_kv.

    Returns:
        The additive mask, the boolean one beside it, segment_ids_q and segment_ids_kv.
    """
    if attn_bias.dtype == torch.bool:
        raise DTypeError(
            "attn_bias", "a boolean tensor", "one that is added to the scores", "Pass what says which pairs attend as attn_mask."
        )
    if attn_mask is None:
        return _broadcastable("attn_bias", attn_bias, extents), None, ids_q, ids_kv
    if attn_mask.dtype != torch.bool:
        hint = "Add the two: attn_bias=attn_bias + attn_mask."
        raise UnsupportedError("attn_mask", f"a tensor of {attn_mask.dtype} beside attn_bias", "a boolean one", hint)
    bias, mask = _broadcastable("attn_bias", attn_bias, extents), _broadcastable("attn_mask", attn_mask, extents)
    of_pairs = mask[(None,) * (4 - mask.dim())]
    if ids_q is not None or ids_kv is not None or any(of_pairs.shape[axis] != 1 and of_pairs.stride(axis) != 0 for axis in (1, 2)):
        return bias, mask, ids_q, ids_kv
    ids_kv = of_pairs[:, 0, 0].expand(-1, extents[3]).to(torch.int32)
    return bias, None, ids_kv.new_ones(1, extents[2]), ids_kv


def _broadcastable(name: str, mask: Any, extents: tuple[int, int, int, int]) -> Any:
    if mask.dim() > 4 or not all(own in (1, extent) for own, extent in zip(reversed(mask.shape), reversed(extents), strict=False)):
        hint = "Its dimensions are those of (batch, heads, seqlen_q, seqlen_kv), or the last of them; each may be 1."
        raise ShapeError(name, f"shape {tuple(mask.shape)}", f"one that broadcasts to {extents}", hint)
    return mask


def number(x: Any) -> Any:
    """A tensor of one element as a Python number, for which a GPU is waited for; anything else as it is."""
    return x.item() if isinstance(x, torch.Tensor) and x.numel() == 1 else x


def probability(x: Any) -> Any:
    """A dropout_p as a Python number, as `number` has it; what is none is refused before anything asks whether it is 0."""
    x = number(x)
    return x if isinstance(x, (int, float, torch.SymInt, torch.SymFloat)) else check_dropout_p(x)


def pair(x: Any) -> Any:
    """A window whose limits may be tensors: one of two elements, or two of one element each."""
    if x is None:
        return None
    if isinstance(x, torch.Tensor):
        x = x.tolist()
    return tuple([number(limit) for limit in x]) if isinstance(x, (tuple, list)) else x


def lengths(x: Any) -> Any:
    """Offsets or lengths as contiguous int32; numbers that int32 cannot hold come out beyond every length, or below zero."""
    if x is None or x.dtype == torch.int32:
        return x
    return x.clamp(-1, _INT32_MAX).to(torch.int32).contiguous() if x.dtype == torch.int64 else x


def sinks_and_slopes(sinks: Any, alibi_slopes: Any) -> tuple[Any, Any]:
    """Both in float32, to which 16-bit types are converted exactly.

    Raises:
        UnsupportedError: slopes that require grad, since autograd would take a missing gradient for zero.
    """
    if alibi_slopes is not None and alibi_slopes.requires_grad and torch.is_grad_enabled():
        hint = "Pass alibi_slopes.detach(), or learn an additive attn_mask, which has a gradient."
        raise UnsupportedError("alibi_slopes", "a tensor that requires grad", "slopes, which have no gradient", hint)
    return _as_float32(sinks), _as_float32(alibi_slopes)


def _as_float32(x: Any) -> Any:
    return x.float() if x is not None and x.dtype in _HALF else x


def autocast(query: Any, key: Any, value: Any) -> tuple[Any, Any, Any]:
    """query, key and value in the type of an enclosing `torch.autocast`, all of them; float64 stays, as in torch's own functions."""
    kind = "cuda" if query.is_cuda else "cpu"
    if not torch.is_autocast_enabled(kind):
        return query, key, value
    dtype = torch.get_autocast_dtype(kind)
    cast = [x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in (query, key, value)]
    return cast[0], cast[1], cast[2]


def seed_and_offset(seed: Any) -> Any:
    """A tensor of one element with an offset of 0 beside it, on its device; anything else as it is."""
    return torch.cat([seed.reshape(1), seed.new_zeros(1)]) if isinstance(seed, torch.Tensor) and seed.numel() == 1 else seed


def dropout_source(dropout_p: Any, given: Any, device: Any) -> tuple[Any, Any]:
    """What dropout draws from: a tensor of seed and offset, or ints. Without either, both from torch's generator of the device, where they stay."""
    if given is None and not dropout_p:
        return None, None
    if isinstance(given, torch.Tensor):
        return seed_and_offset(given), None
    if given is not None:
        return None, given
    return drawn(device), None


def drawn(device: Any) -> Any:
    """Seed and offset from torch's generator of the device, where they stay."""
    return torch.randint(0, 2**63 - 1, (2,), dtype=torch.int64, device=device)


Restore = Callable[[Any], Any]


def four_dimensions(query: Any, key: Any, value: Any, *masks: Any) -> tuple[Any, Any, Any, tuple[Any, ...], Restore | None]:
    """Torch's (…, heads, seqlen, head_dim) as (batch, heads, seqlen, head_dim), with query broadcast over batch and heads of the keys.

    Two dimensions are one sequence of one head; of three, the first are heads, since masks of three dimensions fit these. Of more than four, the first ones
    are broadcast to each other and become one, which copies those that cannot be viewed so.

    Returns:
        query, key, value, the masks, and what brings out, or lse, into the caller's shape; None where that is theirs.
    """
    if query.dim() == 4 and key.dim() == 4 and value.dim() == 4:
        return _broadcast_query(query, key, value), key, value, masks, None
    query, key, value, masks, restore = _of_other_ranks(query, key, value, masks)
    return _broadcast_query(query, key, value), key, value, masks, restore


def _broadcast_query(query: Any, key: Any, value: Any) -> Any:
    """query with the batch and heads of key and value where its own are 1; these are broadcast by the kernels."""
    batch, heads, _, _ = query.shape
    if batch != 1 and heads != 1:
        return query
    (batch_k, heads_k, _, _), (batch_v, heads_v, _, _) = key.shape, value.shape
    wanted = (max(batch_k, batch_v) if batch == 1 else batch, max(heads_k, heads_v) if heads == 1 else heads)
    return query if wanted == (batch, heads) else query.expand(*wanted, -1, -1)


def _with_outer(x: Any, count: int) -> Any:
    """With so many dimensions of one before its own; to index does the same, in ten times the time."""
    for _ in range(count):
        x = x.unsqueeze(0)
    return x


def _broadcasts_to(shape: Any, wanted: Any) -> bool:
    return len(shape) <= len(wanted) and all(own in (1, extent) for own, extent in zip(reversed(shape), reversed(wanted), strict=False))


def _broadcast_batches(*tensors: Any) -> tuple[int, ...]:
    """The batches, all dimensions before (heads, seqlen, head_dim), to which those of query, key and value broadcast."""
    leading: list[int] = []
    for name, tensor in zip(TENSORS, tensors, strict=False):
        own = list(tensor.shape[:-3])
        length = max(len(own), len(leading))
        own, leading = [1] * (length - len(own)) + own, [1] * (length - len(leading)) + leading
        for one, other in zip(own, leading, strict=True):
            if one != other and 1 not in (one, other):
                got, expected = (
                    f"batches {tuple(tensor.shape[:-3])} in {tuple(tensor.shape)}",
                    f"batches that broadcast to {tuple(leading)}",
                )
                hint = "All dimensions before (heads, seqlen, head_dim) are batches: each is that of the others, or 1."
                raise ShapeError(name, got, expected, hint)
        leading = [other if one == 1 else one for one, other in zip(own, leading, strict=True)]
    return tuple(leading)


def _of_other_ranks(query: Any, key: Any, value: Any, masks: tuple[Any, ...]) -> tuple[Any, Any, Any, tuple[Any, ...], Restore]:
    """As `four_dimensions`, where not all have four."""
    ranks = (query.dim(), key.dim(), value.dim())
    if min(ranks) < 2:
        least = ranks.index(min(ranks))
        got = f"shape {tuple((query, key, value)[least].shape)}"
        raise ShapeError(TENSORS[least], got, "at least two dimensions, (..., seqlen, head_dim)", "Add the missing ones: x[None].")
    query, key, value = (_with_outer(x, 4 - x.dim()) for x in (query, key, value))
    if max(ranks) <= 4:
        outer = tuple(range(4 - max(ranks)))
        return query, key, value, masks, lambda x: x.squeeze(outer)
    leading = _broadcast_batches(query, key, value)
    for name, mask in zip(("attn_mask", "attn_bias"), masks, strict=True):
        if mask is not None and not _broadcasts_to(mask.shape[:-3], leading):
            wanted = f"one that broadcasts to {(*leading, query.shape[-3], query.shape[-2], key.shape[-2])}"
            hint = "Its dimensions are those of (batches, heads, seqlen_q, seqlen_kv), or the last of them; each may be 1."
            raise ShapeError(name, f"shape {tuple(mask.shape)}", wanted, hint)
    query, key, value = (x.expand(*leading, *x.shape[-3:]).flatten(0, -4) for x in (query, key, value))
    folded = tuple([x if x is None or x.dim() <= 3 else x.expand(*leading, *x.shape[-3:]).flatten(0, -4) for x in masks])
    return query, key, value, folded, lambda x: x.unflatten(0, leading)
