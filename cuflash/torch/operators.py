"""The calls as registered operators: what `torch.compile`, `torch.export`, selective checkpointing and other modes of torch see in the place of a call.

Each operator has one contract: optional tensors, options as numbers and words, every result always there. Their shapes and strides depend on shapes alone, which
may be symbols: a new length traces and compiles nothing. Eager calls do not come here (`functions.py`): an operator costs more than the rest of a call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch._C._functorch import TransformType

from cuflash.errors import UnsupportedError
from cuflash.merging import merge_attention as merge
from cuflash.merging import merge_attention_backward as merge_backward
from cuflash.problem.tangents import Tangents
from cuflash.problem.tile import Tile
from cuflash.torch import batching, last_calls
from cuflash.torch.functions import Call, Tensors
from cuflash.torch.inputs import TENSORS, TRACED

_OPTIONS = (
    "SymInt? max_seqlen_q, SymInt? max_seqlen_kv, float dropout_p, bool is_causal, float? scale, bool enable_gqa, str layout, str causal_alignment, "
    "int[]? window, float? softcap, int[]? tile, bool allow_tf32"
)
_INPUTS = "Tensor query, Tensor key, Tensor value, " + ", ".join(f"Tensor? {name}" for name in TENSORS[3:])
_COUNT = len(TENSORS)
_TANGENTS = len(Tangents._fields)
_NAMES_BACKWARD = ("grad_out", "grad_lse", *TENSORS, "out", "lse")
_UNLIMITED = -1

_SCHEMAS = {
    "attention": f"({_INPUTS}, {_OPTIONS}) -> (Tensor, Tensor)",
    "attention_backward": f"(Tensor? grad_out, Tensor? grad_lse, {_INPUTS}, {_OPTIONS}, Tensor out, Tensor lse, bool need_attn_mask_grad) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    "attention_jvp": "(Tensor? query_dot, Tensor? key_dot, Tensor? value_dot, Tensor? sinks_dot, "
    f"{_INPUTS}, {_OPTIONS}, Tensor out, Tensor lse) -> (Tensor, Tensor)",
    "merge": "(Tensor[] outs, Tensor[] lses, str layout) -> (Tensor, Tensor)",
    "merge_backward": "(Tensor grad_out, Tensor? grad_lse, Tensor[] outs, Tensor[] lses, Tensor out, Tensor lse, str layout) -> (Tensor, Tensor)",
}
for _name, _schema in _SCHEMAS.items():
    torch.library.define(f"cuflash::{_name}", _schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout))

_attention = torch.ops.cuflash.attention.default
_attention_backward = torch.ops.cuflash.attention_backward.default
_attention_jvp = torch.ops.cuflash.attention_jvp.default
_merge = torch.ops.cuflash.merge.default
_merge_backward = torch.ops.cuflash.merge_backward.default


def looked_at(tensors: Sequence[Any], plain: bool) -> bool:
    """Whether somebody traces the call, watches operators or wants shapes alone, so that it has to be an operator.

    Args:
        tensors: of the call.
        plain: all of them are of torch's own types, or None.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0 or tensors[0].is_meta or torch._C._is_tracing():
        return True
    return not plain and any(isinstance(x, TRACED) for x in tensors)


_GRAD_IN_GRAPHS = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 14)
"""Whether operators with a registered gradient have one under `torch.func.grad`; older versions look for a `setup_context` that their own function lacks."""


@torch._dynamo.assume_constant_result  # type: ignore[untyped-decorator]
def breaks_graph() -> bool:
    """Whether a call that Dynamo traces is under a transform of `torch.func` in which registered operators have no derivative."""
    kinds = {interpreter.key() for interpreter in torch._C._functorch.get_interpreter_stack() or ()}
    without = {TransformType.Jvp} if _GRAD_IN_GRAPHS else {TransformType.Jvp, TransformType.Grad}
    return not kinds.isdisjoint(without)


def attend(call: Call, tensors: Tensors, return_lse: bool) -> Any:
    """The call as an operator."""
    out, lse = _attention(*_with_seed(call, tensors), *_options_of(call))
    return (out, lse) if return_lse else out


def gradients(call: Call, tensors: Tensors, out: Any, lse: Any, grad_out: Any, grad_lse: Any, needs_mask: bool) -> Tensors:
    """Those of query, key, value, attn_mask and sinks as an operator, None for what has none."""
    *grads, mask, sinks = _attention_backward(grad_out, grad_lse, *_with_seed(call, tensors), *_options_of(call), out, lse, needs_mask)
    return (*grads, mask if needs_mask else None, None if tensors[4] is None else sinks)


def tangents(call: Call, tensors: Tensors, out: Any, lse: Any, of_inputs: Tensors) -> tuple[Any, Any]:
    """Those of out and lse as an operator."""
    out_dot, lse_dot = _attention_jvp(*of_inputs, *_with_seed(call, tensors), *_options_of(call), out, lse)
    return out_dot, lse_dot


def merge_parts(outs: Sequence[Any], lses: Sequence[Any], layout: str) -> tuple[Any, Any]:
    """`merge_attention` of lists as an operator."""
    out, lse = _merge(list(outs), list(lses), layout)
    return out, lse


# --- Options as an operator takes them -----------------------------------------------------------------------------------------------------


def _with_seed(call: Call, tensors: Tensors) -> Tensors:
    """A seed of ints in a tensor, which is what an operator takes."""
    if call.seed is None:
        return tensors
    pair = call.seed if isinstance(call.seed, tuple) else (call.seed, 0)
    words = [word - 2**64 if word >= 2**63 else word for word in pair]
    return (*tensors[:-1], torch.tensor(words, dtype=torch.int64, device=tensors[0].device))


def _options_of(call: Call) -> tuple[Any, ...]:
    options = call.options
    window, tile = options["window"], options["tile"]
    if tile is not None:
        if not isinstance(tile, Tile):
            raise UnsupportedError(
                "tile", type(tile).__name__, "a cuflash.Tile, or None", "Under tracing all kernels of a call share one tile."
            )
        tile = [tile.tile_q, tile.tile_kv, tile.num_warps, tile.num_stages]
    if window is not None:
        window = [_UNLIMITED if limit is None else limit for limit in window]
    return (
        options.get("max_seqlen_q"), options.get("max_seqlen_kv"), options["dropout_p"], options["is_causal"], options["scale"], options["enable_gqa"],
        options.get("layout", "packed"), options["causal_alignment"], window, options["softcap"], tile, options["allow_tf32"],
    )  # fmt: skip


def _call_of(options: Sequence[Any]) -> Call:
    max_q, max_kv, dropout_p, is_causal, scale, enable_gqa, layout, alignment, window, softcap, tile, allow_tf32 = options
    named: dict[str, Any] = {
        "dropout_p": dropout_p, "is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa, "causal_alignment": alignment,
        "tile": None if tile is None else Tile(*tile), "deterministic": False, "allow_tf32": allow_tf32,
        "window": None if window is None else tuple(window), "softcap": softcap,
    }  # fmt: skip
    if layout == "packed":
        return Call(True, named | {"max_seqlen_q": max_q, "max_seqlen_kv": max_kv})
    return Call(False, named | {"layout": layout, "batch_first": True, "num_heads": None})


# --- Attention -----------------------------------------------------------------------------------------------------------------------------


def _asked_forward(*arguments: Any) -> Any:
    return _call_of(arguments[_COUNT:]).asked_forward(arguments[:_COUNT], True)


_forward = last_calls.Remembering("forward", TENSORS, _asked_forward)


def _attention_impl(*arguments: Any) -> Any:
    return _forward.run(arguments)


def _attention_fake(*arguments: Any) -> Any:
    query, value, layout = arguments[0], arguments[2], arguments[_COUNT + 6]
    if layout == "packed":
        tokens, heads, _ = query.shape
        return query.new_empty((tokens, heads, value.shape[2])), query.new_empty((heads, tokens), dtype=torch.float32)
    batch, heads, seqlen = (query.shape[layout.index(letter)] for letter in "bhs")
    shape = [(value if letter == "d" else query).shape[axis] for axis, letter in enumerate(layout)]
    return query.new_empty(shape), query.new_empty((batch, heads, seqlen), dtype=torch.float32)


def _asked_backward(grad_out: Any, grad_lse: Any, *arguments: Any) -> Any:
    tensors, (out, lse, *options, need_attn_mask_grad) = arguments[:_COUNT], arguments[_COUNT:]
    return _call_of(options).asked_backward(tensors, out, lse, grad_out, grad_lse, need_attn_mask_grad)


_backward = last_calls.Remembering("backward", _NAMES_BACKWARD, _asked_backward)


def _attention_backward_impl(*arguments: Any) -> Any:
    first = _COUNT + 2
    grads = _backward.run((*arguments[:first], *arguments[-3:-1], *arguments[first:-3], arguments[-1]))
    query = arguments[2]
    return (*grads, *(_nothing(query) if grad is None else grad for grad in (grads.attn_mask, grads.sinks)))


def _nothing(query: Any) -> Any:
    """What an operator gives in the place of a gradient that there is none of; as `query.new_empty(0)`, in less time."""
    return torch.empty_strided((0,), (1,), dtype=query.dtype, device=query.device)


def _attention_backward_fake(grad_out: Any, grad_lse: Any, *arguments: Any) -> Any:
    query, key, value, attn_mask, sinks = arguments[:5]
    need_attn_mask_grad = arguments[-1]
    mask = attn_mask if need_attn_mask_grad else None
    return tuple(query.new_empty(0) if x is None else x.new_empty(x.shape) for x in (query, key, value, mask, sinks))


def _attention_jvp_impl(*arguments: Any) -> Any:
    tangents, (*others, out, lse) = arguments[:_TANGENTS], arguments[_TANGENTS:]
    return _call_of(others[_COUNT:]).jvp(tuple(others[:_COUNT]), out, lse, tangents)


def _attention_jvp_fake(*arguments: Any) -> Any:
    *_, out, lse = arguments
    return out.new_empty(out.shape), lse.new_empty(lse.shape)


def _attention_context(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs[:_COUNT], *output)
    ctx.options = inputs[_COUNT:]
    ctx.set_materialize_grads(False)


def _attention_gradients(ctx: Any, grad_out: Any, grad_lse: Any) -> Any:
    *tensors, out, lse = ctx.saved_tensors
    needs_mask = ctx.needs_input_grad[3]
    *grads, mask, sinks = _attention_backward(grad_out, grad_lse, *tensors, *ctx.options, out, lse, needs_mask)
    optional = (mask if needs_mask else None, None if tensors[4] is None else sinks)
    return (*grads, *optional, *(None,) * (_COUNT - 5 + len(ctx.options)))


def _attention_batched(info: Any, in_dims: Any, *arguments: Any) -> Any:
    options = arguments[_COUNT:]
    return batching.attention(info, in_dims[:_COUNT], arguments[:_COUNT], _call_of(options), lambda tensors: _attention(*tensors, *options))


def _attention_backward_batched(info: Any, in_dims: Any, *arguments: Any) -> Any:
    given, needs_mask = (*arguments[: 2 + _COUNT], *arguments[-3:-1]), arguments[-1]
    dims, options = (*in_dims[: 2 + _COUNT], *in_dims[-3:-1]), arguments[2 + _COUNT : -3]

    def run(given: Tensors) -> Tensors:
        *others, out, lse = given
        *grads, mask, sinks = _attention_backward(*others, *options, out, lse, needs_mask)
        return (*grads, mask if needs_mask else None, None if given[6] is None else sinks)

    grads, found = batching.gradients(info, dims, given, _call_of(options), needs_mask, run)
    return tuple(_nothing(given[2]) if grad is None else grad for grad in grads), found


def _attention_jvp_batched(info: Any, in_dims: Any, *arguments: Any) -> Any:
    first, behind = _TANGENTS + _COUNT, len(arguments) - 2
    options = arguments[first:behind]

    def run(given: Tensors) -> Tensors:
        *others, out, lse = given
        found: Tensors = _attention_jvp(*others, *options, out, lse)
        return found

    given, dims = ((*x[:first], *x[behind:]) for x in (arguments, in_dims))
    return batching.tangents(info, dims, given, _call_of(options), run)


# --- Merging -------------------------------------------------------------------------------------------------------------------------------


def _merge_impl(outs: Any, lses: Any, layout: str) -> Any:
    return merge(outs, lses, layout=layout)


def _merge_fake(outs: Any, lses: Any, layout: str) -> Any:
    return outs[0].new_empty(outs[0].shape), lses[0].new_empty(lses[0].shape)


def _merge_backward_impl(grad_out: Any, grad_lse: Any, outs: Any, lses: Any, out: Any, lse: Any, layout: str) -> Any:
    given = torch.stack(outs), torch.stack(lses)
    return tuple(merge_backward(grad_out, *given, out, lse, grad_lse, layout=layout))


def _merge_backward_fake(grad_out: Any, grad_lse: Any, outs: Any, lses: Any, out: Any, lse: Any, layout: str) -> Any:
    return outs[0].new_empty((len(outs), *outs[0].shape)), lses[0].new_empty((len(lses), *lses[0].shape))


def _merge_context(ctx: Any, inputs: Any, output: Any) -> None:
    outs, lses, ctx.layout = inputs
    ctx.count = len(outs)
    ctx.save_for_backward(*outs, *lses, *output)
    ctx.set_materialize_grads(False)


def _merge_gradients(ctx: Any, grad_out: Any, grad_lse: Any) -> Any:
    *parts, out, lse = ctx.saved_tensors
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    grad_outs, grad_lses = _merge_backward(grad_out, grad_lse, parts[: ctx.count], parts[ctx.count :], out, lse, ctx.layout)
    return list(grad_outs.unbind()), list(grad_lses.unbind()), None


# --- Registration --------------------------------------------------------------------------------------------------------------------------

for _name, _run, _shapes in (
    ("attention", _attention_impl, _attention_fake),
    ("attention_backward", _attention_backward_impl, _attention_backward_fake),
    ("attention_jvp", _attention_jvp_impl, _attention_jvp_fake),
    ("merge", _merge_impl, _merge_fake),
    ("merge_backward", _merge_backward_impl, _merge_backward_fake),
):
    # Closed to Dynamo, which otherwise compiles what an operator of a compiled function runs.
    torch.library.impl(f"cuflash::{_name}", "CompositeExplicitAutograd", torch._disable_dynamo(_run))
    torch.library.register_fake(f"cuflash::{_name}", _shapes)
torch.library.register_vmap("cuflash::attention", _attention_batched)
torch.library.register_vmap("cuflash::attention_backward", _attention_backward_batched)
torch.library.register_vmap("cuflash::attention_jvp", _attention_jvp_batched)
torch.library.register_autograd("cuflash::attention", _attention_gradients, setup_context=_attention_context)
torch.library.register_autograd("cuflash::merge", _merge_gradients, setup_context=_merge_context)
