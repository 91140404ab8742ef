"""Eager calls: autograd functions over cuflash's calls, and their rules under `torch.func.vmap`.

A `Call` holds what a call has besides tensors. Tensors come in the order of `TENSORS`, None for those that a call does not have, so that every function has one
signature. `Attention` is recorded by autograd; `AttentionBackward` is its gradient, a function of its own for the sake of vmap, and of an error that says what
is missing where somebody differentiates it.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.autograd import forward_ad

from cuflash.errors import UnsupportedError
from cuflash.problem.operands import Operands
from cuflash.problem.options import Options
from cuflash.runtime import calls
from cuflash.runtime.prepared import Gradients
from cuflash.torch import forward_mode
from cuflash.torch.inputs import TENSORS

_COUNT = len(TENSORS)
_OPERANDS_OF = operator.itemgetter(*(TENSORS.index(name) if name in TENSORS else _COUNT for name in Operands._fields))
"""Of the tensors of a call and None behind them, what each operand is."""
_BATCHED_DIMENSIONS = {"attn_mask": 4, "alibi_slopes": 2, "seqlens_kv": 1, "segment_ids_q": 2, "segment_ids_kv": 2, "prefix_lengths": 1}
"""Dimensions of each tensor when the batch is the first."""

Tensors = tuple[Any, ...]


class Call:
    """Which of cuflash's functions is called, and its options, all but tensors.

    Attributes:
        packed: `varlen_attention`; else `scaled_dot_product_attention`.
        options: its arguments by name that are no tensors, but for `return_lse`, `out` and `need_attn_mask_grad`.
        seed: a dropout_seed that is no tensor.
    """

    __slots__ = ("options", "packed", "seed")

    def __init__(self, packed: bool, options: dict[str, Any], seed: Any = None) -> None:
        self.packed = packed
        self.options = options
        self.seed = seed

    def forward(self, tensors: Tensors, return_lse: bool) -> Any:
        """out, or with `return_lse` out and lse."""
        return calls.forward(self._operands(tensors), Options(return_lse=return_lse, varlen=self.packed, **self.options))

    def backward(self, tensors: Tensors, out: Any, lse: Any, grad_out: Any, grad_lse: Any, need_attn_mask_grad: bool) -> Gradients:
        """Gradients of all tensors that have one; those of out and lse may be None for zero."""
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        operands = self._operands(tensors)._replace(out=out, lse=lse, grad_out=grad_out, grad_lse=grad_lse)
        options = {**self.options, "tile": None}  # what fits the forward kernel need not fit these
        return calls.backward(operands, Options(need_attn_mask_grad=need_attn_mask_grad, varlen=self.packed, **options))

    def _operands(self, tensors: Tensors) -> Operands:
        *others, state = tensors
        return Operands._make(_OPERANDS_OF((*others, self.seed if state is None else state, None)))

    def replaced(self, **options: Any) -> Call:
        """The same call with other options."""
        return Call(self.packed, {**self.options, **options}, self.seed)

    @property
    def dropout_p(self) -> float:
        return float(self.options["dropout_p"])


def attend(call: Call, tensors: Tensors, return_lse: bool) -> Any:
    """The call outside of tracing: recorded where something has to be, else nothing but the call."""
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        out, lse = Attention.apply(*tensors, call)
    elif torch.is_grad_enabled() and _is_recorded(*tensors[:5]):
        out, lse = _apply_attention(*tensors, call)
    else:
        return call.forward(tensors, return_lse)
    return (out, lse) if return_lse else out


def _is_recorded(query: Any, key: Any, value: Any, attn_mask: Any, sinks: Any) -> bool:
    inputs = query.requires_grad or key.requires_grad or value.requires_grad
    return inputs or (attn_mask is not None and attn_mask.requires_grad) or (sinks is not None and sinks.requires_grad)


class Attention(torch.autograd.Function):  # type: ignore[misc]
    """(out, lse) of a call, differentiable in query, key, value, an additive attn_mask and sinks."""

    @staticmethod
    def forward(*arguments: Any) -> Any:
        return arguments[_COUNT].forward(arguments[:_COUNT], True)

    @staticmethod
    def setup_context(ctx: Any, inputs: Tensors, output: tuple[Any, Any]) -> None:
        ctx.save_for_backward(*inputs[:_COUNT], *output)
        if forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active():
            ctx.save_for_forward(*inputs[:_COUNT], *output)
        ctx.call = inputs[_COUNT]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad_out: Any, grad_lse: Any) -> Tensors:
        *tensors, out, lse = ctx.saved_tensors
        needs_mask = ctx.needs_input_grad[3]
        if torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
            grads = AttentionBackward.apply(grad_out, grad_lse, *tensors, out, lse, ctx.call, needs_mask)
        else:
            grads = _gradients(ctx.call, tuple(tensors), out, lse, grad_out, grad_lse, needs_mask)
        return (*grads, *(None,) * (_COUNT - 4))

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Any, Any]:
        *tensors, out, lse = ctx.saved_tensors
        return forward_mode.derivative(_results, _input_gradients, ctx.call, tuple(tensors), tangents[:_COUNT], out, lse)

    @staticmethod
    def vmap(info: Any, in_dims: Tensors, *arguments: Any) -> tuple[Any, Any]:
        tensors, dims, call = arguments[:_COUNT], in_dims[:_COUNT], arguments[_COUNT]
        _check_randomness(info, call)
        if _foldable(dims, call, info):
            results = Attention.apply(*_folded(tensors, dims, info.batch_size, shared=True), call)
            return _unfolded(results, info.batch_size)
        each = [Attention.apply(*_sample(tensors, dims, i), call) for i in range(info.batch_size)]
        return _stacked(each)


def _results(call: Call, tensors: Tensors) -> tuple[Any, Any]:
    out, lse = Attention.apply(*tensors, call)
    return out, lse


def _input_gradients(call: Call, tensors: Tensors, out: Any, lse: Any, grad_out: Any) -> Tensors:
    grads: Tensors = AttentionBackward.apply(grad_out, None, *tensors, out, lse, call, False)
    return grads


# Without transforms of torch.func, `Attention.apply` does no more than this, after it has spent longer on the signature of `forward` than the call takes.
_apply_attention = super(torch.autograd.Function, Attention).apply


class AttentionBackward(torch.autograd.Function):  # type: ignore[misc]
    """The gradients of `Attention`, which have no gradient of their own."""

    @staticmethod
    def forward(*arguments: Any) -> Tensors:
        grad_out, grad_lse, *tensors, out, lse, call, needs_mask = arguments
        return _gradients(call, tuple(tensors), out, lse, grad_out, grad_lse, needs_mask)

    @staticmethod
    def setup_context(ctx: Any, inputs: Tensors, output: Tensors) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        hint = "Use create_graph=False; or, for small shapes, torch's own attention under torch.nn.attention.sdpa_kernel(SDPBackend.MATH)."
        raise UnsupportedError("attention", "a second derivative of it", "first derivatives", hint)

    @staticmethod
    def vmap(info: Any, in_dims: Tensors, *arguments: Any) -> tuple[Any, Any]:
        *given, call, needs_mask = arguments
        dims = in_dims[:-2]
        tensors, own = tuple(given[2 : 2 + _COUNT]), dims[2 : 2 + _COUNT]
        one_batch = len({_extent(x, dim) for x, dim in zip(tensors[:3], own[:3], strict=True)}) == 1
        if one_batch and not needs_mask and tensors[4] is None and _foldable(own, call, info):
            size = info.batch_size
            folded = _folded(tensors, own, size, shared=False)  # gradients of what samples share come for each of them
            grad_out, grad_lse, out, lse = (
                None if x is None else _first(x, dim, size).flatten(0, 1)
                for x, dim in zip((*given[:2], *given[-2:]), (*dims[:2], *dims[-2:]), strict=True)
            )
            return _unfolded(AttentionBackward.apply(grad_out, grad_lse, *folded, out, lse, call, False), size)
        each = [AttentionBackward.apply(*_sample(tuple(given), dims, i), call, needs_mask) for i in range(info.batch_size)]
        return _stacked(each)


def _gradients(call: Call, tensors: Tensors, out: Any, lse: Any, grad_out: Any, grad_lse: Any, needs_mask: bool) -> Tensors:
    grads = call.backward(tensors, out, lse, grad_out, grad_lse, needs_mask)
    return (*grads, grads.attn_mask, grads.sinks)


# --- vmap -------------------------------------------------------------------------------------------------------------------------------
#
# Samples become rows of the batch where every tensor of them can have a row of its own. Sinks cannot, packed sequences have no batch, and dropout that is to be
# the same for all samples differs between rows: these run sample by sample.


def _check_randomness(info: Any, call: Call) -> None:
    if call.dropout_p and info.randomness == "error":
        raise UnsupportedError(
            "dropout_p",
            f"{call.dropout_p} under vmap with randomness='error'",
            "0.0, or a choice",
            "Pass randomness='different' or 'same' to vmap.",
        )


def _foldable(dims: Tensors, call: Call, info: Any) -> bool:
    same_dropout = call.dropout_p and (info.randomness == "same" or dims[12] is not None)
    return not call.packed and call.options["layout"].startswith("b") and dims[4] is None and not same_dropout


def _extent(x: Any, dim: int | None) -> int:
    """The first extent of one sample."""
    return int(x.shape[0 if dim is None or dim > 0 else 1])


def _first(x: Any, dim: int | None, size: int) -> Any:
    """The samples along the first axis."""
    return x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)


def _folded(tensors: Tensors, dims: Tensors, size: int, shared: bool) -> Tensors:
    """Tensors whose batch are the rows of all samples; what has a batch of one for all samples stays as it is if it may be `shared`."""
    batch = _extent(tensors[0], dims[0])
    folded = []
    for name, x, dim in zip(TENSORS, tensors, dims, strict=True):
        is_input, ndim = name in TENSORS[:3], _BATCHED_DIMENSIONS.get(name, 4)
        for_all = x is None or name in ("sinks", "dropout_seed")
        if not for_all and dim is None:
            for_all = (x.shape[0] == 1 and shared and name != "query") if is_input else (x.dim() < ndim or x.shape[0] == 1)
        if for_all:
            folded.append(x)
            continue
        samples = _first(x, dim, size)
        while samples.dim() < ndim + 1:
            samples = samples[:, None]
        folded.append(samples.expand(size, batch, *samples.shape[2:]).flatten(0, 1))
    return tuple(folded)


def _unfolded(results: Tensors, size: int) -> tuple[Any, Any]:
    outputs = tuple(None if x is None else x.unflatten(0, (size, -1)) for x in results)
    return outputs, tuple(None if x is None else 0 for x in outputs)


def _sample(tensors: Tensors, dims: Tensors, i: int) -> Tensors:
    return tuple(x if x is None or dim is None else x.select(dim, i) for x, dim in zip(tensors, dims, strict=True))


def _stacked(each: list[Tensors]) -> tuple[Any, Any]:
    outputs = tuple(None if of_result[0] is None else torch.stack(of_result) for of_result in zip(*each, strict=True))
    return outputs, tuple(None if x is None else 0 for x in outputs)
