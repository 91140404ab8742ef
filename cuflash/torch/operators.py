"""The calls as registered operators: what `torch.compile`, `torch.export`, selective checkpointing and other modes of torch see in the place of a call.

Each operator has one contract: optional tensors, options as numbers and words, every result always there. Their shapes and strides depend on shapes alone, which
may be symbols: a new length traces and compiles nothing. Eager calls do not come here (`functions.py`): an operator costs more than the rest of a call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch._C._functorch import TransformType

from cuflash.errors import UnsupportedError
from cuflash.merging import merge_attention as merge
from cuflash.merging import merge_attention_backward as merge_backward
from cuflash.problem.operands import Operands
from cuflash.problem.options import Options
from cuflash.problem.tangents import Tangents
from cuflash.problem.tile import Tile
from cuflash.torch import batching, last_calls
from cuflash.torch.functions import AttentionBackward, Call, Tensors
from cuflash.torch.inputs import TENSORS, TRACED

_OPTIONS: dict[str, tuple[str, Any]] = {
    "max_seqlen_q": ("SymInt?", None), "max_seqlen_kv": ("SymInt?", None), "dropout_p": ("float", 0.0), "is_causal": ("bool", False), "scale": ("float?", None),
    "enable_gqa": ("bool", False), "layout": ("str", "bhsd"), "causal_alignment": ("str", "top_left"), "window": ("int[]?", None), "softcap": ("float?", None),
    "tile": ("int[]?", None), "allow_tf32": ("bool", False),
}  # fmt: skip
"""Type and default of each option. Torch hands an operator only what differs from a default, and each argument that it hands over takes time in each call."""
_DEFAULTS = {name: default for name, (_, default) in _OPTIONS.items()}
_OPTIONS_SCHEMA = "*, " + ", ".join(f"{kind} {name}={default!r}" for name, (kind, default) in _OPTIONS.items())
_INPUTS = "Tensor query, Tensor key, Tensor value, " + ", ".join(f"Tensor? {name}=None" for name in TENSORS[3:])
_COUNT = len(TENSORS)
_GIVEN_BACKWARD = ("grad_out", "grad_lse", "out", "lse")
_GIVEN_JVP = (*Tangents._fields, "out", "lse")
_UNLIMITED = -1

_SCHEMAS = {
    "attention": f"({_INPUTS}, {_OPTIONS_SCHEMA}) -> (Tensor, Tensor)",
    "attention_backward": f"(Tensor? grad_out, Tensor? grad_lse, Tensor out, Tensor lse, {_INPUTS}, {_OPTIONS_SCHEMA}) -> (Tensor, Tensor, Tensor)",
    "attention_backward_of_all": "(Tensor? grad_out, Tensor? grad_lse, Tensor out, Tensor lse, "
    f"{_INPUTS}, {_OPTIONS_SCHEMA}, bool need_attn_mask_grad=False) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    "attention_jvp": "(Tensor? query_dot, Tensor? key_dot, Tensor? value_dot, Tensor? sinks_dot, Tensor out, Tensor lse, "
    f"{_INPUTS}, {_OPTIONS_SCHEMA}) -> (Tensor, Tensor)",
    "merge": "(Tensor[] outs, Tensor[] lses, str layout) -> (Tensor, Tensor)",
    "merge_backward": "(Tensor grad_out, Tensor? grad_lse, Tensor outs, Tensor lses, Tensor out, Tensor lse, str layout) -> (Tensor, Tensor)",
}
for _name, _schema in _SCHEMAS.items():
    torch.library.define(f"cuflash::{_name}", _schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout))

_attention = torch.ops.cuflash.attention.default
_attention_backward = torch.ops.cuflash.attention_backward.default
_attention_backward_of_all = torch.ops.cuflash.attention_backward_of_all.default  # of calls with sinks, or a mask whose gradient is wanted
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


_IS_RECENT = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 14)  # in 2.6, asking Dynamo for its callback loses a reference
_GRAD_IN_GRAPHS = _IS_RECENT
"""Whether operators with a registered gradient have one under `torch.func.grad`; older versions look for a `setup_context` that their own function lacks."""


@torch._dynamo.assume_constant_result  # type: ignore[untyped-decorator]
def breaks_graph() -> bool:
    """Whether a call that Dynamo traces is under a transform of `torch.func` in which registered operators have no derivative."""
    kinds = {interpreter.key() for interpreter in torch._C._functorch.get_interpreter_stack() or ()}
    without = {TransformType.Jvp} if _GRAD_IN_GRAPHS else {TransformType.Jvp, TransformType.Grad}
    return not kinds.isdisjoint(without)


def attend(call: Call, tensors: Tensors, return_lse: bool) -> Any:
    """The call as an operator."""
    out, lse = _attention(*_with_seed(call, tensors), **_options_of(call))
    return (out, lse) if return_lse else out


def gradients(call: Call, tensors: Tensors, out: Any, lse: Any, grad_out: Any, grad_lse: Any, needs_mask: bool) -> Tensors:
    """Those of query, key, value, attn_mask and sinks as an operator, None for what has none."""
    return _gradients((grad_out, grad_lse, out, lse), _with_seed(call, tensors), _options_of(call), needs_mask)


def tangents(call: Call, tensors: Tensors, out: Any, lse: Any, of_inputs: Tensors) -> tuple[Any, Any]:
    """Those of out and lse as an operator."""
    out_dot, lse_dot = _attention_jvp(*of_inputs, out, lse, *_with_seed(call, tensors), **_options_of(call))
    return out_dot, lse_dot


def merge_parts(outs: Any, lses: Any, layout: str) -> tuple[Any, Any]:
    """`merge_attention` of lists, or of tensors that hold all parts, as an operator."""
    of_outs, of_lses = (list(x) if isinstance(x, (list, tuple)) else list(x.unbind(0)) for x in (outs, lses))
    out, lse = _merge(of_outs, of_lses, layout)
    return out, lse


def merge_gradients(
    grad_out: Any, grad_lse: Any, outs: Sequence[Any], lses: Sequence[Any], out: Any, lse: Any, layout: str
) -> tuple[Any, Any]:
    """Those of the parts as an operator, which takes and gives them along a first axis of their own."""
    stacked = (x if isinstance(x, torch.Tensor) else torch.stack(tuple(x)) for x in (outs, lses))
    grad_outs, grad_lses = _merge_backward(grad_out, grad_lse, *stacked, out, lse, layout)
    return grad_outs, grad_lses


# --- Options as an operator takes them -----------------------------------------------------------------------------------------------------


def _with_seed(call: Call, tensors: Tensors) -> Tensors:
    """A seed of ints in a tensor, which is what an operator takes."""
    if call.seed is None:
        return tensors
    pair = call.seed if isinstance(call.seed, tuple) else (call.seed, 0)
    words = [word - 2**64 if word >= 2**63 else word for word in pair]
    return (*tensors[:-1], torch.tensor(words, dtype=torch.int64, device=tensors[0].device))


def _options_of(call: Call) -> dict[str, Any]:
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
    return {
        "max_seqlen_q": options.get("max_seqlen_q"), "max_seqlen_kv": options.get("max_seqlen_kv"), "dropout_p": options["dropout_p"],
        "is_causal": options["is_causal"], "scale": options["scale"], "enable_gqa": options["enable_gqa"], "layout": options.get("layout", "packed"),
        "causal_alignment": options["causal_alignment"], "window": window, "softcap": options["softcap"], "tile": tile, "allow_tf32": options["allow_tf32"],
    }  # fmt: skip


def _call_of(options: Mapping[str, Any]) -> Call:
    """`options` are those that differ from their defaults."""
    named = {**_DEFAULTS, **options, "deterministic": False}
    max_q, max_kv, layout = (named.pop(name) for name in ("max_seqlen_q", "max_seqlen_kv", "layout"))
    named["tile"] = None if named["tile"] is None else Tile(*named["tile"])
    named["window"] = None if named["window"] is None else tuple(named["window"])
    if layout == "packed":
        return Call(True, named | {"max_seqlen_q": max_q, "max_seqlen_kv": max_kv})
    return Call(False, named | {"layout": layout, "batch_first": True, "num_heads": None})


def _all(tensors: Tensors) -> Tensors:
    """The tensors of an operator in the order of `TENSORS`, of which torch leaves out the last ones where they are None."""
    return (*tensors, *(None,) * (_COUNT - len(tensors)))


# --- Attention -----------------------------------------------------------------------------------------------------------------------------


def _asked_forward(tensors: Tensors, options: Mapping[str, Any]) -> tuple[Operands, Options]:
    return _call_of(options).asked_forward(_all(tensors), True)


def _asked_backward(tensors: Tensors, options: Mapping[str, Any]) -> tuple[Operands, Options]:
    grad_out, grad_lse, out, lse, *others = tensors
    of_call = {**options}
    needs_mask = of_call.pop("need_attn_mask_grad", False)
    return _call_of(of_call).asked_backward(_all(tuple(others)), out, lse, grad_out, grad_lse, needs_mask)


_forward = last_calls.Remembering("forward", TENSORS, _asked_forward)
_backward = last_calls.Remembering("backward", (*_GIVEN_BACKWARD, *TENSORS), _asked_backward)


def _attention_fake(query: Any, key: Any, value: Any, *others: Any, layout: str = _DEFAULTS["layout"], **options: Any) -> Any:
    if layout == "packed":
        tokens, heads, _ = query.shape
        return query.new_empty((tokens, heads, value.shape[2])), query.new_empty((heads, tokens), dtype=torch.float32)
    batch, heads, seqlen = (query.shape[layout.index(letter)] for letter in "bhs")
    shape = [(value if letter == "d" else query).shape[axis] for axis, letter in enumerate(layout)]
    return query.new_empty(shape), query.new_empty((batch, heads, seqlen), dtype=torch.float32)


def _attention_backward_of_all_impl(tensors: Tensors, options: Mapping[str, Any]) -> Any:
    query, key, value, *others = _backward.run(tensors, options)
    mask = others.pop(0) if "need_attn_mask_grad" in options else _nothing(query)
    return query, key, value, mask, others[0] if others else _nothing(query)


def _nothing(query: Any) -> Any:
    """What an operator gives in the place of a gradient that there is none of; as `query.new_empty(0)`, in less time."""
    return torch.empty_strided((0,), (1,), dtype=query.dtype, device=query.device)


def _attention_backward_fake(*tensors: Any, **options: Any) -> Any:
    return tuple(x.new_empty(x.shape) for x in tensors[len(_GIVEN_BACKWARD) :][:3])


def _attention_backward_of_all_fake(*tensors: Any, need_attn_mask_grad: bool = False, **options: Any) -> Any:
    query, key, value, attn_mask, sinks, *_ = _all(tensors[len(_GIVEN_BACKWARD) :])
    mask = attn_mask if need_attn_mask_grad else None
    return tuple(query.new_empty(0) if x is None else x.new_empty(x.shape) for x in (query, key, value, mask, sinks))


def _attention_jvp_impl(tensors: Tensors, options: Mapping[str, Any]) -> Any:
    *of_inputs, out, lse = tensors[: len(_GIVEN_JVP)]
    return _call_of(options).jvp(_all(tensors[len(_GIVEN_JVP) :]), out, lse, tuple(of_inputs))


def _attention_jvp_fake(*tensors: Any, **options: Any) -> Any:
    out, lse = (tensors[_GIVEN_JVP.index(name)] for name in ("out", "lse"))
    return out.new_empty(out.shape), lse.new_empty(lse.shape)


def _gradients(given: Tensors, tensors: Tensors, options: Mapping[str, Any], needs_mask: bool) -> Tensors:
    """Those of query, key, value, attn_mask and sinks, None for what has none; `given` are grad_out, grad_lse, out and lse."""
    has_sinks = len(tensors) > 4 and tensors[4] is not None
    if not needs_mask and not has_sinks:
        return (*_attention_backward(*given, *tensors, **options), None, None)
    *grads, mask, sinks = _attention_backward_of_all(*given, *tensors, **options, need_attn_mask_grad=needs_mask)
    return (*grads, mask if needs_mask else None, sinks if has_sinks else None)


class _Recorded(torch.autograd.Function):  # type: ignore[misc]  # torch may be missing
    """The operator where autograd records it."""

    @staticmethod
    def forward(ctx: Any, keys: Any, options: Mapping[str, Any], *tensors: Any) -> Any:
        results = _below_autograd(keys, tensors, options)
        ctx.save_for_backward(*tensors, *results)
        ctx.options = options
        ctx.set_materialize_grads(False)
        return results

    @staticmethod
    def backward(ctx: Any, grad_out: Any, grad_lse: Any) -> Any:
        *tensors, out, lse = ctx.saved_tensors
        needs_mask = len(tensors) > 3 and ctx.needs_input_grad[2 + 3]
        if torch.is_grad_enabled():  # with create_graph
            grads = AttentionBackward.apply(grad_out, grad_lse, *_all(tuple(tensors)), out, lse, _call_of(ctx.options), needs_mask)
        else:
            grads = _gradients((grad_out, grad_lse, out, lse), tuple(tensors), ctx.options, needs_mask)
        return (None, None, *grads, *(None,) * _COUNT)[: 2 + len(tensors)]


def _keys(name: str) -> int:
    """Torch's dispatch keys of a call of nothing but plain tensors of a kind of device, which nobody watches, in one number."""
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, name)) | torch._C.DispatchKeySet(
        getattr(torch._C.DispatchKey, f"Autograd{name}")
    )
    return int(keys.raw_repr())


_KEYS_OF_PLAIN_CALLS = frozenset((_keys("CPU"), _keys("CUDA")))


def _attention_autograd(arguments: Tensors, options: Mapping[str, Any]) -> Any:
    """What comes first in each call: as `torch.library.register_autograd` has it, but that torch is not asked for defaults, nor for what comes next if it is us."""
    keys, tensors = arguments[0], arguments[1:]
    if torch.is_grad_enabled() and any([x is not None and x.requires_grad for x in tensors]):  # noqa: C419  # a list is quicker
        return _Recorded.apply(keys, options, *tensors)
    return _below_autograd(keys, tensors, options)


def _below_autograd(keys: Any, tensors: Tensors, options: Mapping[str, Any]) -> Any:
    if keys.raw_repr() in _KEYS_OF_PLAIN_CALLS:
        return _forward.run(tensors, options)
    with torch._C._AutoDispatchBelowAutograd():
        return _attention.redispatch(keys & torch._C._after_autograd_keyset, *tensors, **options)


def _attention_batched(info: Any, in_dims: Any, *tensors: Any, **options: Any) -> Any:
    return batching.attention(info, _all(in_dims), _all(tensors), _call_of(options), lambda tensors: _attention(*tensors, **options))


def _attention_backward_batched(info: Any, in_dims: Any, *tensors: Any, **options: Any) -> Any:
    grads, found = _attention_backward_of_all_batched(info, in_dims, *tensors, **options)
    return grads[:3], found[:3]


def _attention_backward_of_all_batched(info: Any, in_dims: Any, *tensors: Any, need_attn_mask_grad: bool = False, **options: Any) -> Any:
    count = len(_GIVEN_BACKWARD)

    def as_batching(x: Tensors) -> Tensors:
        """out and lse come last there."""
        return (*x[:2], *_all(x[count:]), *x[2:count])

    def run(given: Tensors) -> Tensors:
        grad_out, grad_lse, *others, out, lse = given
        return _gradients((grad_out, grad_lse, out, lse), tuple(others), options, need_attn_mask_grad)

    grads, found = batching.gradients(info, as_batching(in_dims), as_batching(tensors), _call_of(options), need_attn_mask_grad, run)
    return tuple(_nothing(tensors[count]) if grad is None else grad for grad in grads), found


def _attention_jvp_batched(info: Any, in_dims: Any, *tensors: Any, **options: Any) -> Any:
    count = len(_GIVEN_JVP)

    def as_batching(x: Tensors) -> Tensors:
        return (*x[: count - 2], *_all(x[count:]), *x[count - 2 : count])

    def run(given: Tensors) -> Tensors:
        of_inputs, others, results = given[: count - 2], given[count - 2 : -2], given[-2:]
        found: Tensors = _attention_jvp(*of_inputs, *results, *others, **options)
        return found

    return batching.tangents(info, as_batching(in_dims), as_batching(tensors), _call_of(options), run)


# --- Merging -------------------------------------------------------------------------------------------------------------------------------


def _merge_impl(arguments: Tensors, options: Mapping[str, Any]) -> Any:
    outs, lses, layout = arguments
    return merge(outs, lses, layout=layout)


def _merge_fake(outs: Any, lses: Any, layout: str) -> Any:
    return outs[0].new_empty(outs[0].shape), lses[0].new_empty(lses[0].shape)


def _merge_backward_impl(arguments: Tensors, options: Mapping[str, Any]) -> Any:
    grad_out, grad_lse, outs, lses, out, lse, layout = arguments
    return tuple(merge_backward(grad_out, outs, lses, out, lse, grad_lse, layout=layout))


def _merge_backward_fake(grad_out: Any, grad_lse: Any, outs: Any, lses: Any, out: Any, lse: Any, layout: str) -> Any:
    return outs.new_empty(outs.shape), lses.new_empty(lses.shape)


def _merge_context(ctx: Any, inputs: Any, output: Any) -> None:
    outs, lses, ctx.layout = inputs
    ctx.count = len(outs)
    ctx.save_for_backward(*outs, *lses, *output)
    ctx.set_materialize_grads(False)


def _merge_gradients(ctx: Any, grad_out: Any, grad_lse: Any) -> Any:
    *parts, out, lse = ctx.saved_tensors
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    grad_outs, grad_lses = merge_gradients(grad_out, grad_lse, parts[: ctx.count], parts[ctx.count :], out, lse, ctx.layout)
    return list(grad_outs.unbind()), list(grad_lses.unbind()), None


# --- Registration --------------------------------------------------------------------------------------------------------------------------

_dynamo_callback = getattr(torch._C._dynamo.eval_frame, "get_eval_frame_callback", None)
_skipped = getattr(torch._dynamo.decorators, "skip", None)
"""Both internal to torch: a version without one has Dynamo switched off."""


def _kernel(run: Callable[[Tensors, Mapping[str, Any]], Any]) -> Callable[..., Any]:
    """A function of arguments and keywords as what an operator runs, closed to Dynamo, which otherwise compiles it wherever torch.compile leaves a function to Python.

    Dynamo is off within what it has compiled: to ask whether it is takes a tenth of the time of switching it off. Older versions count references wrongly where
    they are asked.
    """
    without_dynamo = torch._dynamo.disable(run)
    if not _IS_RECENT or _dynamo_callback is None or _skipped is None:
        return lambda *arguments, **options: without_dynamo(arguments, options)

    def kernel(*arguments: Any, **options: Any) -> Any:
        return run(arguments, options) if _dynamo_callback() is None else without_dynamo(arguments, options)

    return _skipped(kernel)  # type: ignore[no-any-return]  # torch has no types for it


for _name, _run, _shapes in (
    ("attention", _forward.run, _attention_fake),
    ("attention_backward", _backward.run, _attention_backward_fake),
    ("attention_backward_of_all", _attention_backward_of_all_impl, _attention_backward_of_all_fake),
    ("attention_jvp", _attention_jvp_impl, _attention_jvp_fake),
    ("merge", _merge_impl, _merge_fake),
    ("merge_backward", _merge_backward_impl, _merge_backward_fake),
):
    torch.library.impl(f"cuflash::{_name}", "CompositeExplicitAutograd", _kernel(_run))
    torch.library.register_fake(f"cuflash::{_name}", _shapes)
torch.library.register_vmap("cuflash::attention", _attention_batched)
torch.library.register_vmap("cuflash::attention_backward", _attention_backward_batched)
torch.library.register_vmap("cuflash::attention_backward_of_all", _attention_backward_of_all_batched)
torch.library.register_vmap("cuflash::attention_jvp", _attention_jvp_batched)
_library = torch.library.Library("cuflash", "FRAGMENT")
_library.impl("attention", _kernel(_attention_autograd), "Autograd", with_keyset=True)
torch.library.register_autograd("cuflash::merge", _merge_gradients, setup_context=_merge_context)
