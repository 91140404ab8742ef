"""cuflash and its peers on the same arrays: what each of them calls for a case, or why it cannot.

A peer that has no argument for a feature, but takes a mask, is given what a user would give it: a mask of the size of the scores. Backends of torch are
pinned, since it would choose another one without saying so; what torch says of a backend that it refuses is the reason that is reported.
"""

from __future__ import annotations

import contextlib
import functools
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import numpy

import cuflash
from bench.cases import Case
from bench.machine import Machine, the_torch, version_of
from bench.operands import Operands
from cuflash import reference

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # JAX shares the GPU's memory with torch

SDPA_BACKENDS = {"flash": "FLASH_ATTENTION", "cudnn": "CUDNN_ATTENTION", "efficient": "EFFICIENT_ATTENTION", "math": "MATH"}
LONGEST_OF_MATH = 4096
"""torch's math backend keeps all scores in memory."""


WORDS = {"alibi": "ALiBi", "varlen": "packed sequences", "seqlens_kv": "key lengths"}
"""What the reasons call features whose names are short."""
KNOWN = ("attn_mask", "dropout", "window", "softcap", "alibi", "sinks", "segments", "prefix", "varlen", "seqlens_kv")
"""Features that each library is known to have or to lack; no library has another one."""


class NotSupported(Exception):
    """A library cannot do a case; the message says why."""


@dataclass
class Calls:
    """A library on the operands of one case.

    Attributes:
        forward: gives out, and nothing else is computed.
        forward_lse: gives out as training needs it, with the LSE that the backward pass takes; None where a library has no such call.
        backward: gives the gradients of query, key, value and of an additive mask.
        as_operands: turns what both give into arrays like the operands, given the name of what it is or is the gradient of.
        wait: ends what a call started, where events do not see it.
        note: what the table has to say of the times.
        context: entered around all calls of the case; entering it costs the host more than a call.
    """

    forward: Callable[[], Any]
    backward: Callable[[], Any]
    as_operands: Callable[[str, Any], Any] = lambda name, x: x
    wait: Callable[[], None] | None = None
    note: str = ""
    forward_lse: Callable[[], Any] | None = None
    context: Callable[[], Any] = contextlib.nullcontext

    def of(self, direction: str) -> Callable[[], Any] | None:
        """The call of a pass: "forward", "forward_lse" or "backward"."""
        call: Callable[[], Any] | None = getattr(self, direction)
        return call


@dataclass(frozen=True)
class Library:
    """Something to time.

    Attributes:
        name, backend, version: for the tables.
        prepare: makes `Calls`; raises `NotSupported`, or what the library raises for a case that it does not take.
        takes: whether it is worth asking.
    """

    name: str
    backend: str
    version: str
    prepare: Callable[[Operands], Calls]
    takes: Callable[[Case], bool] = lambda case: True

    @property
    def label(self) -> str:
        """What `--libraries` calls it."""
        return "jax" if self.name == "jax" else self.backend


def cuflash_calls(operands: Operands, forward_tile: Any = None, backward_tile: Any = None) -> Calls:
    """The two calls, with tiles pinned or the default ones."""
    sample, arrays = operands.case.sample, operands.arrays
    inputs = [arrays[name] for name in ("query", "key", "value")]
    forward = functools.partial(sample.forward, *inputs, tile=forward_tile, **operands.arguments)
    out, lse = forward(return_lse=True)
    backward = functools.partial(
        sample.backward, arrays["grad_out"], *inputs, out, lse, tile=backward_tile, **operands.arguments, **sample.backward_options
    )

    def gradients() -> list[Any]:
        found = backward()
        return [*found, found.attn_mask] if sample.features.need_attn_mask_grad else list(found)

    return Calls(forward, gradients, forward_lse=lambda: forward(return_lse=True)[0])


def _refuse(case: Case, library: str, *lacking: str) -> None:
    """Raise if the case uses anything that is `lacking`, or not `KNOWN`."""
    sample = case.sample
    kinds = sample.features.kinds()
    used = {flag.name: True for flag in fields(kinds) if flag.name != "attn_mask" and getattr(kinds, flag.name)}
    used |= {"attn_mask": sample.features.attn_mask is not None, "varlen": sample.is_packed}
    used["seqlens_kv"] = sample.lengths_kv is not None and not sample.is_packed
    missing = [WORDS.get(name, name) for name in used if used[name] and (name in lacking or name not in KNOWN)]
    if missing:
        raise NotSupported(f"{library} has no {' and no '.join(missing)}")


# --- torch --------------------------------------------------------------------------------------------------------------------------------


def _torch_calls(
    operands: Operands, call: Callable[..., Any], context: Callable[[], Any], *, transpose: bool = True, mask: Any = None, note: str = ""
) -> Calls:
    """Calls of `call(query, key, value[, mask])` with autograd; `mask` is given where its gradient is wanted."""
    torch = operands.torch

    def turned(x: Any) -> Any:
        return x.transpose(1, 2) if transpose else x  # a view: the memory is the same

    inputs = [turned(operands.arrays[name]) for name in ("query", "key", "value")] + ([] if mask is None else [mask])
    grad_out = turned(operands.arrays["grad_out"])

    leaves = [x.detach().requires_grad_() for x in inputs]
    with context():
        out = call(*leaves)

    def forward() -> Any:
        with torch.no_grad():
            return call(*inputs)

    def backward() -> Any:
        return torch.autograd.grad(out, leaves, grad_out, retain_graph=True)

    def as_operands(name: str, x: Any) -> Any:
        return x.detach() if name == "attn_mask" else turned(x.detach())

    with context():
        forward()
    return Calls(forward, backward, as_operands, note=note, forward_lse=lambda: call(*leaves), context=context)


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

    _refuse(case, "scaled_dot_product_attention", "softcap", "sinks", "varlen")
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
            return _torch_calls(operands, attention, pinned, mask=gradient_of, note=note)
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


def _flex_calls(operands: Operands) -> Calls:
    """FlexAttention, with the features as functions of a score and its place."""
    torch, sample, given = operands.torch, operands.case.sample, operands.arguments
    from torch.nn.attention.flex_attention import create_block_mask

    _refuse(operands.case, "flex_attention", "dropout", "sinks", "prefix")
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
    return _torch_calls(operands, attention, contextlib.nullcontext, transpose=not sample.is_packed, mask=bias)


def _torch_varlen_calls(operands: Operands) -> Calls:
    """torch.nn.attention.varlen, which is flash-attn's kernel for packed sequences."""
    from torch.nn.attention.varlen import varlen_attn

    sample, given = operands.case.sample, operands.arguments
    if not sample.is_packed:
        raise NotSupported("varlen_attn is for packed sequences")
    _refuse(operands.case, "varlen_attn", "dropout", "softcap", "sinks", "alibi", "prefix", "window")
    call = functools.partial(
        varlen_attn, cu_seq_q=given["cu_seqlens_q"], cu_seq_k=given["cu_seqlens_kv"], max_q=given["max_seqlen_q"], max_k=given["max_seqlen_kv"],
        window_size=(-1, 0 if sample.is_causal else -1),
    )  # fmt: skip
    return _torch_calls(operands, call, contextlib.nullcontext, transpose=False)


# --- flash-attn ---------------------------------------------------------------------------------------------------------------------------


def _flash_attn_calls(operands: Operands) -> Calls:
    """flash-attn's two functions, which take arrays as they are stored."""
    import flash_attn

    sample, given = operands.case.sample, operands.arguments
    _refuse(operands.case, "flash_attn", "sinks", "segments", "prefix", "attn_mask", "seqlens_kv")
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
    return _torch_calls(operands, call, contextlib.nullcontext, transpose=False, note=note)


# --- JAX and NumPy ------------------------------------------------------------------------------------------------------------------------


def _jax_calls(operands: Operands, implementation: str) -> Calls:
    """jax.nn.dot_product_attention on the same memory."""
    import jax

    sample, given = operands.case.sample, operands.arguments
    _refuse(operands.case, "jax.nn.dot_product_attention", "dropout", "softcap", "sinks", "segments", "prefix", "alibi", "varlen")
    features, options = sample.features, {"is_causal": sample.is_causal, "implementation": implementation}
    query, key, value, grad_out = (jax.dlpack.from_dlpack(operands.arrays[name]) for name in ("query", "key", "value", "grad_out"))
    inputs = [query, key, value]
    if features.window is not None:
        options["local_window_size"] = tuple(sample.seqlen_kv if limit is None or limit < 0 else limit for limit in features.window)
    if "seqlens_kv" in given:
        options["key_value_seq_lengths"] = jax.dlpack.from_dlpack(given["seqlens_kv"])
        options["query_seq_lengths"] = jax.numpy.full(sample.batch, sample.seqlen_q, jax.numpy.int32)
    if features.attn_mask == "bool":
        options["mask"] = jax.dlpack.from_dlpack(given["attn_mask"])
    elif features.attn_mask is not None:
        inputs.append(jax.dlpack.from_dlpack(given["attn_mask"]))

    @jax.jit
    def attention(*arrays: Any) -> Any:
        return jax.nn.dot_product_attention(*arrays, **options)

    _, pull_back = jax.vjp(attention, *inputs)
    pull = jax.jit(lambda back, x: back(x))
    last: list[Any] = [None]

    def kept(x: Any) -> Any:
        last[0] = x
        return x

    def wait() -> None:
        if last[0] is not None:
            jax.block_until_ready(last[0])

    jax.block_until_ready((attention(*inputs), pull(pull_back, grad_out)))
    return Calls(
        lambda: kept(attention(*inputs)), lambda: kept(pull(pull_back, grad_out)), lambda name, x: operands.torch.from_dlpack(x), wait
    )


def _formula_calls(operands: Operands) -> Calls:
    """Something to compare with where nothing is installed."""
    sample, given = operands.case.sample, dict(operands.arguments)
    if sample.is_packed:
        raise NotSupported("the formula is for padded batches")
    if sample.features.attn_mask == "bfloat16":
        given["attn_mask"] = operands.case.arguments["attn_mask"]
    values = {name: reference.to_float64(x) for name, x in operands.arrays.items()}
    inputs = [values[name] for name in ("query", "key", "value")]
    return Calls(
        lambda: reference.attention(*inputs, **given)[0],
        lambda: list(reference.attention_backward(values["grad_out"], *inputs, **given)),
    )


# --- Which there are ----------------------------------------------------------------------------------------------------------------------


def _sixteen_bits(case: Case) -> bool:
    return case.sample.dtype != "float32"


def libraries(machine: Machine, wanted: list[str]) -> list[Library]:
    """Those that are installed and wanted, cuflash first."""
    found = [Library("cuflash", "cuflash", cuflash.__version__, cuflash_calls)]
    torch = the_torch()
    if torch is None:
        found.append(Library("numpy", "formula", numpy.__version__, _formula_calls, lambda case: case.seqlen <= 512))
        return [library for library in found if library.label in wanted]
    for name, backend in SDPA_BACKENDS.items():
        takes = _sixteen_bits if name in ("flash", "cudnn") else lambda case: True
        found.append(Library("torch", name, torch.__version__, functools.partial(sdpa_calls, backend=backend), takes))
    found.append(Library("torch", "varlen", torch.__version__, _torch_varlen_calls, lambda case: case.sample.is_packed))
    found.append(Library("torch", "flex", torch.__version__, _flex_calls))
    flash_attn = version_of("flash-attn", "flash_attn")
    if flash_attn:
        found.append(Library("flash-attn", "flash-attn", flash_attn, _flash_attn_calls, _sixteen_bits))
    implementation = "xla" if machine.dry else "cudnn"
    if version_of("jax"):
        jax_calls = functools.partial(_jax_calls, implementation=implementation)
        found.append(Library("jax", implementation, version_of("jax"), jax_calls, _sixteen_bits))
    return [library for library in found if library.label in wanted]
