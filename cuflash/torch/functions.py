"""Eager calls: autograd functions over cuflash's calls.

A `Call` holds what a call has besides tensors. Tensors come in the order of `TENSORS`, None for those that a call does not have, so that every function has one
signature. `Attention` is recorded by autograd; `AttentionBackward` is its gradient, a function of its own for the sake of vmap, and of an error that says what
is missing where somebody differentiates it.
"""

from __future__ import annotations

import functools
import operator
from typing import Any

import torch
from torch.autograd import forward_ad

from cuflash.errors import UnsupportedError
from cuflash.problem.operands import Operands
from cuflash.problem.options import Options
from cuflash.problem.tangents import Tangents
from cuflash.runtime import calls, jvp_calls
from cuflash.runtime.prepared import Gradients
from cuflash.torch import batching
from cuflash.torch.inputs import TENSORS, TRACED

_COUNT = len(TENSORS)
_TANGENTS = len(Tangents._fields)
_OPERANDS_OF = operator.itemgetter(*(TENSORS.index(name) if name in TENSORS else _COUNT for name in Operands._fields))
"""Of the tensors of a call and None behind them, what each operand is."""

_WITHOUT_US = "for small shapes, call torch's own attention under torch.nn.attention.sdpa_kernel(SDPBackend.MATH)."

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
        return calls.forward(*self.asked_forward(tensors, return_lse))

    def backward(self, tensors: Tensors, out: Any, lse: Any, grad_out: Any, grad_lse: Any, need_attn_mask_grad: bool) -> Gradients:
        """Gradients of all tensors that have one; those of out and lse may be None for zero."""
        return calls.backward(*self.asked_backward(tensors, out, lse, grad_out, grad_lse, need_attn_mask_grad))

    def asked_forward(self, tensors: Tensors, return_lse: bool) -> tuple[Operands, Options]:
        """What cuflash is asked for it."""
        return self._operands(tensors), Options(return_lse=return_lse, varlen=self.packed, **self.options)

    def asked_backward(
        self, tensors: Tensors, out: Any, lse: Any, grad_out: Any, grad_lse: Any, need_attn_mask_grad: bool
    ) -> tuple[Operands, Options]:
        """What cuflash is asked for them; those of out and lse may be None for zero."""
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        operands = self._operands(tensors)._replace(out=out, lse=lse, grad_out=_written_out(grad_out), grad_lse=grad_lse)
        options = {**self.options, "tile": None}  # what fits the forward kernel need not fit these
        return operands, Options(need_attn_mask_grad=need_attn_mask_grad, varlen=self.packed, **options)

    def jvp(self, tensors: Tensors, out: Any, lse: Any, tangents: Tensors) -> tuple[Any, Any]:
        """Tangents of out and lse along those of query, key, value and sinks."""
        options = {**self.options, "tile": None}
        return jvp_calls.jvp(
            Tangents(*map(_written_out, tangents)),
            self._operands(tensors)._replace(out=out, lse=lse),
            Options(varlen=self.packed, **options),
        )

    def _operands(self, tensors: Tensors) -> Operands:
        *others, state = tensors
        return Operands._make(_OPERANDS_OF((*others, self.seed if state is None else state, None)))

    def replaced(self, **options: Any) -> Call:
        """The same call with other options."""
        return Call(self.packed, {**self.options, **options}, self.seed)

    @property
    def dropout_p(self) -> float:
        return float(self.options["dropout_p"])


def _written_out(x: Any) -> Any:
    """A gradient or tangent whose rows are one number each, as `.sum().backward()` gives it, as rows in memory: of such rows kernels copy elements one by one,
    and are compiled once more for it. Anything else as it is."""
    return x.contiguous() if x is not None and x.stride(-1) == 0 and x.shape[-1] > 1 else x


def is_transformed() -> bool:
    """Whether derivatives of operators would be lost: torch.func transforms calls, or dual tensors carry tangents."""
    return bool(torch._C._are_functorch_transforms_active()) or forward_ad._current_level >= 0


def attend(call: Call, tensors: Tensors, return_lse: bool) -> Any:
    """The call outside of tracing: recorded where something has to be, else nothing but the call."""
    if is_transformed():
        out, lse = Attention.apply(*tensors, call)
    elif torch.is_grad_enabled() and _is_recorded(*tensors[:5]):
        out, lse = _apply_recorded(*tensors, call)
    else:
        return call.forward(tensors, return_lse)
    return (out, lse) if return_lse else out


def _is_recorded(query: Any, key: Any, value: Any, attn_mask: Any, sinks: Any) -> bool:
    inputs = query.requires_grad or key.requires_grad or value.requires_grad
    return inputs or (attn_mask is not None and attn_mask.requires_grad) or (sinks is not None and sinks.requires_grad)


def _is_watched(query: Any) -> bool:
    """Whether a call is to be an operator below the transforms of torch.func, under which an operator with a gradient does not work."""
    return torch._C._len_torch_dispatch_stack() > 0 or query.is_meta or isinstance(query, TRACED)


@torch._disable_dynamo  # type: ignore[untyped-decorator]  # which warns that it cannot look into torch's function
def any_is_several(tensors: Tensors) -> bool:
    """Whether one is several that look like one: of `torch.autograd.grad(is_grads_batched=True)`, which is not `torch.func.vmap`. Torch takes them apart for an
    operator."""
    return any(x is not None and torch._C._functorch.is_legacy_batchedtensor(x) for x in tensors)


class Attention(torch.autograd.Function):  # type: ignore[misc]
    """(out, lse) of a call, differentiable in query, key, value, an additive attn_mask and sinks."""

    @staticmethod
    def forward(*arguments: Any) -> Any:
        *tensors, call = arguments
        if _is_watched(tensors[0]) or any_is_several(tuple(tensors)):
            from cuflash.torch import operators

            return operators.attend(call, tuple(tensors), True)
        return call.forward(tensors, True)

    @staticmethod
    def setup_context(ctx: Any, inputs: Tensors, output: tuple[Any, Any]) -> None:
        ctx.save_for_backward(*inputs[:_COUNT], *output)
        if is_transformed():
            ctx.save_for_forward(*inputs[:_COUNT], *output)
        ctx.call = inputs[_COUNT]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad_out: Any, grad_lse: Any) -> Tensors:
        *tensors, out, lse = ctx.saved_tensors
        grads = gradients(ctx.call, tuple(tensors), out, lse, grad_out, grad_lse, ctx.needs_input_grad[3])
        return (*grads, *(None,) * (_COUNT - 4))

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Any, Any]:
        *tensors, out, lse = ctx.saved_tensors
        *of_inputs, of_sinks = _tangents(tangents)
        if (of_inputs[0], of_inputs[1], of_sinks) == (
            None,
            None,
            None,
        ):  # P stays: attention over another value, which has derivatives of its own
            value_dot = of_inputs[2]
            out_dot = torch.zeros_like(out) if value_dot is None else Attention.apply(*tensors[:2], value_dot, *tensors[3:], ctx.call)[0]
            return out_dot, torch.zeros_like(lse)
        out_dot, lse_dot = AttentionJvp.apply(*of_inputs, of_sinks, *tensors, out, lse, ctx.call)
        return out_dot, lse_dot

    @staticmethod
    def vmap(info: Any, in_dims: Tensors, *arguments: Any) -> tuple[Any, Any]:
        call = arguments[_COUNT]
        return batching.attention(info, in_dims[:_COUNT], arguments[:_COUNT], call, lambda tensors: Attention.apply(*tensors, call))


def _tangents(tangents: Tensors) -> Tensors:
    """Of all tangents in the order of `TENSORS`, those of query, key, value and sinks; there are no others."""
    for name, tangent in zip(TENSORS[3:], tangents[3:_COUNT], strict=True):
        if tangent is not None and name != "sinks":
            raise UnsupportedError(
                name,
                "a forward-mode derivative by it",
                "derivatives by query, key, value and sinks",
                f"Use torch.func.vjp or autograd; or {_WITHOUT_US}",
            )
    return (*tangents[:3], tangents[TENSORS.index("sinks")])


class _Recorded(torch.autograd.Function):  # type: ignore[misc]
    """`Attention` without transforms of torch.func: a function whose `setup_context` is apart has its signature looked at in each call, for longer than the call takes."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Any:
        call, tensors = arguments[_COUNT], arguments[:_COUNT]
        results = call.forward(tensors, True)
        ctx.save_for_backward(*tensors, *results)
        ctx.call = call
        ctx.set_materialize_grads(False)
        return results

    backward = staticmethod(Attention.backward)


_apply_recorded = super(torch.autograd.Function, _Recorded).apply  # what `_Recorded.apply` does after it has looked for transforms


class AttentionBackward(torch.autograd.Function):  # type: ignore[misc]
    """The gradients of `Attention`, which have no gradient of their own."""

    @staticmethod
    def forward(*arguments: Any) -> Tensors:
        grad_out, grad_lse, *tensors, out, lse, call, needs_mask = arguments
        if _is_watched(tensors[0]):
            from cuflash.torch import operators

            return operators.gradients(call, tuple(tensors), out, lse, grad_out, grad_lse, needs_mask)
        return _gradients(call, tuple(tensors), out, lse, grad_out, grad_lse, needs_mask)

    @staticmethod
    def setup_context(ctx: Any, inputs: Tensors, output: Tensors) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise UnsupportedError("attention", "a second derivative of it", "first derivatives", f"Use create_graph=False; or {_WITHOUT_US}")

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        hint = f"Take gradients outside of the dual level, or of torch.func.jvp; or {_WITHOUT_US}"
        raise UnsupportedError("attention", "a second derivative of it", "first derivatives", hint)

    @staticmethod
    def vmap(info: Any, in_dims: Tensors, *arguments: Any) -> tuple[Any, Any]:
        *given, call, needs_mask = arguments
        gradients = functools.partial(_apply_backward, call, needs_mask)
        return batching.gradients(info, in_dims[:-2], tuple(given), call, needs_mask, gradients)


class AttentionJvp(torch.autograd.Function):  # type: ignore[misc]
    """The tangents of `Attention`, which have no derivative of their own; arguments are those of query, key, value and sinks, the tensors, out, lse and the call."""

    @staticmethod
    def forward(*arguments: Any) -> Tensors:
        tangents, (*tensors, out, lse, call) = arguments[:_TANGENTS], arguments[_TANGENTS:]
        if _is_watched(tensors[0]) or any_is_several(tangents):
            from cuflash.torch import operators

            return operators.tangents(call, tuple(tensors), out, lse, tangents)
        of_results: Tensors = call.jvp(tuple(tensors), out, lse, tangents)
        return of_results

    @staticmethod
    def setup_context(ctx: Any, inputs: Tensors, output: Tensors) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        hint = f"Detach the tangent, as losses of flow models do; or {_WITHOUT_US}"
        raise UnsupportedError("attention", "a derivative of its forward-mode derivative", "first derivatives", hint)

    jvp = backward

    @staticmethod
    def vmap(info: Any, in_dims: Tensors, *arguments: Any) -> tuple[Any, Any]:
        call = arguments[-1]
        return batching.tangents(info, in_dims[:-1], arguments[:-1], call, functools.partial(_apply_jvp, call))


def _apply_jvp(call: Call, given: Tensors) -> Tensors:
    tangents: Tensors = AttentionJvp.apply(*given, call)
    return tangents


def _apply_backward(call: Call, needs_mask: bool, given: Tensors) -> Tensors:
    grads: Tensors = AttentionBackward.apply(*given, call, needs_mask)
    return grads


def gradients(call: Call, tensors: Tensors, out: Any, lse: Any, grad_out: Any, grad_lse: Any, needs_mask: bool) -> Tensors:
    """Those of query, key, value, attn_mask and sinks, recorded where somebody wants derivatives of them; a tangent raises."""
    if torch.is_grad_enabled() or is_transformed():
        grads: Tensors = AttentionBackward.apply(grad_out, grad_lse, *tensors, out, lse, call, needs_mask)
        return grads
    return _gradients(call, tensors, out, lse, grad_out, grad_lse, needs_mask)


def _gradients(call: Call, tensors: Tensors, out: Any, lse: Any, grad_out: Any, grad_lse: Any, needs_mask: bool) -> Tensors:
    if any_is_several((grad_out, grad_lse)):
        from cuflash.torch import operators

        return operators.gradients(call, tensors, out, lse, grad_out, grad_lse, needs_mask)
    grads = call.backward(tensors, out, lse, grad_out, grad_lse, needs_mask)
    return (*grads, grads.attn_mask, grads.sinks)
