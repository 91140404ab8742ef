"""`merge_attention` of tensors, recorded by autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import forward_ad

from cuflash import merging
from cuflash.errors import UnsupportedError
from cuflash.torch import batching, operators
from cuflash.torch.functions import any_is_several


def merge_attention(outs: Any, lses: Any, *, layout: str = "bhsd") -> tuple[Any, Any]:
    """`cuflash.merge_attention` of tensors: attention of the same queries over disjoint sets of keys as attention over all of them.

    Args:
        outs, lses: what the calls gave with `return_lse`: lists, or tensors with the parts along a first axis of their own.
        layout: the order of dimensions of outs; of packed sequences, whose outs have three dimensions and lses two, it says nothing.

    Returns:
        out and lse, both differentiable in all outs and lses.
    """
    parts_out = tuple(outs) if isinstance(outs, (list, tuple)) else (outs,)
    parts_lse = tuple(lses) if isinstance(lses, (list, tuple)) else (lses,)
    parts = (*parts_out, *parts_lse)
    order = _order(layout, parts_out, stacked=not isinstance(outs, (list, tuple)))
    is_dual = forward_ad._current_level >= 0
    if _is_watched(parts) and (torch.compiler.is_compiling() or not is_dual):
        return operators.merge_parts(outs, lses, order)
    recorded = torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in parts)
    if recorded or is_dual or torch._C._are_functorch_transforms_active():
        forms = tuple(len(own) if isinstance(x, (list, tuple)) else None for x, own in ((outs, parts_out), (lses, parts_lse)))
        out, lse = _Merge.apply(order, forms, *parts)
        return out, lse
    return merging.merge_attention(outs, lses, layout=order)


def _is_watched(parts: Any) -> bool:
    return operators.looked_at(parts, plain=all(type(x) is torch.Tensor for x in parts))


def _order(layout: str, outs: Any, stacked: bool) -> str:
    """The layout of padded batches; packed sequences have none, which cuflash calls "bshd"."""
    first = outs[0] if outs else None
    ndim = first.dim() - stacked if isinstance(first, torch.Tensor) else 4
    return "bshd" if ndim == 3 and layout == "bhsd" else layout


class _Merge(torch.autograd.Function):  # type: ignore[misc]
    """(out, lse) of parts that come one behind the other; `forms` are the lengths of the lists, None for one tensor that holds all parts."""

    @staticmethod
    def forward(order: str, forms: tuple[int | None, int | None], *parts: Any) -> Any:
        outs, lses = _in_forms(forms, parts)
        if _is_watched(parts):
            return operators.merge_parts(outs, lses, order)
        return merging.merge_attention(outs, lses, layout=order)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.order, ctx.forms, *parts = inputs
        ctx.save_for_backward(*parts, *output)
        if forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active():
            ctx.save_for_forward(*parts, *output)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad_out: Any, grad_lse: Any) -> Any:
        return (None, None, *_MergeBackward.apply(ctx.order, ctx.forms, grad_out, grad_lse, *ctx.saved_tensors))

    @staticmethod
    def vmap(info: Any, in_dims: Any, *arguments: Any) -> tuple[Any, Any]:
        return batching.one_by_one(info, in_dims, arguments, _Merge.apply)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Any, Any]:
        """lsė = Σ wᵢ lsėᵢ and Ȯ = Σ wᵢ (Ȯᵢ + (lsėᵢ − lsė) Oᵢ), with wᵢ = exp(lseᵢ − lse)."""
        *parts, out, lse = ctx.saved_tensors
        count = ctx.forms[0] or len(parts[0])
        outs, lses = _listed(ctx.forms, parts, count)
        out_dots, lse_dots = _listed(ctx.forms, tangents[2:], count)
        weights = [torch.exp(x - lse).where(lse > float("-inf"), 0.0) for x in lses]
        lse_dot = torch.zeros_like(lse)
        for weight, x in zip(weights, lse_dots, strict=True):
            if x is not None:
                lse_dot = lse_dot + torch.where(weight > 0.0, weight * x, 0.0)
        out_dot = torch.zeros_like(out, dtype=torch.float32)
        for weight, part, own_dot, own_lse_dot in zip(weights, outs, out_dots, lse_dots, strict=True):
            moved = torch.where(weight > 0.0, weight * ((0.0 if own_lse_dot is None else own_lse_dot) - lse_dot), 0.0)
            out_dot = out_dot + _beside_columns(moved, ctx.order) * part
            if own_dot is not None:
                out_dot = out_dot + _beside_columns(weight, ctx.order) * own_dot
        return out_dot.to(out.dtype), lse_dot


def _listed(forms: tuple[int | None, int | None], parts: Any, count: int) -> list[list[Any]]:
    """outs and lses, or their tangents, as lists of as many parts; a tangent of all parts may be None."""
    listed = []
    for form, own in zip(forms, _in_forms(forms, tuple(parts)), strict=True):
        listed.append(list(own) if form is not None else [None] * count if own is None else list(own.unbind(0)))
    return listed


def _beside_columns(x: Any, order: str) -> Any:
    """A number for each row, in the order of lse, as one column of out."""
    if x.dim() == 2:
        return x.transpose(0, 1)[..., None]
    return x.permute(["bhs".index(letter) for letter in order if letter != "d"]).unsqueeze(order.index("d"))


class _MergeBackward(torch.autograd.Function):  # type: ignore[misc]
    """The gradients of `_Merge`, which have none of their own."""

    @staticmethod
    def forward(order: str, forms: tuple[int | None, int | None], grad_out: Any, grad_lse: Any, *saved: Any) -> Any:
        *parts, out, lse = saved
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out
        of_outs, of_lses = _in_forms(forms, tuple(parts))
        if any_is_several((grad_out, grad_lse)):
            stacked = operators.merge_gradients(grad_out, grad_lse, of_outs, of_lses, out, lse, order)
            grads: Any = [own if form is None else own.unbind(0) for form, own in zip(forms, stacked, strict=True)]
        else:
            grads = merging.merge_attention_backward(grad_out, of_outs, of_lses, out, lse, grad_lse, layout=order)
        each = [grad for form, of_parts in zip(forms, grads, strict=True) for grad in ((of_parts,) if form is None else of_parts)]
        return tuple(each)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def vmap(info: Any, in_dims: Any, *arguments: Any) -> tuple[Any, Any]:
        return batching.one_by_one(info, in_dims, arguments, _MergeBackward.apply)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise UnsupportedError("merge_attention", "a second derivative of it", "first derivatives", "Use create_graph=False.")

    jvp = backward


def _in_forms(forms: tuple[int | None, int | None], parts: tuple[Any, ...]) -> tuple[Any, Any]:
    """outs and lses, each a list or one tensor."""
    count = 1 if forms[0] is None else forms[0]
    outs, lses = parts[:count], parts[count:]
    return (outs[0] if forms[0] is None else outs), (lses[0] if forms[1] is None else lses)
