"""cuflash and its peers: which there are, and what JAX, CuPy and NumPy call for a case. Peers that take torch tensors are in torch_libraries."""

from __future__ import annotations

import functools
import os
from typing import Any

import numpy

import cuflash
from bench.calls import Calls, Library, NotSupported, cuflash_calls, refuse
from bench.cases import Case
from bench.machine import Machine, the_torch, version_of
from bench.operands import Operands
from bench.torch_libraries import SDPA_BACKENDS, flash_attn_calls, flashinfer_calls, flex_calls, sdpa_calls, triton_calls, varlen_calls
from cuflash import reference

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # JAX shares the GPU's memory with torch

LONGEST_OF_NAIVE = 4096
"""All scores of all heads are kept in memory, several times."""


# --- JAX, CuPy and NumPy ------------------------------------------------------------------------------------------------------------------


def _jax_calls(operands: Operands, implementation: str) -> Calls:
    """jax.nn.dot_product_attention on the same memory."""
    import jax

    sample, given = operands.case.sample, operands.arguments
    refuse(operands.case, "jax.nn.dot_product_attention", "dropout", "softcap", "sinks", "segments", "prefix", "alibi", "varlen")
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


class Naive:
    """Attention as the formula says it, on whole arrays of scores: what a user of CuPy or NumPy writes without a library.

    Args:
        xp: cupy or numpy.
        arrays: query, key, value and grad_out, (batch, heads, seqlen, head_dim), of as many heads.
        hidden: boolean, which scores are left out; None for none.

    Products are of the arrays' own type, the softmax is float32. The gradients are those of the last forward pass, which keeps its probabilities.
    """

    def __init__(self, xp: Any, arrays: list[Any], scale: float, hidden: Any) -> None:
        self._xp, self._scale, self._hidden = xp, scale, hidden
        self._query, self._key, self._value, self._grad_out = arrays
        self._weights: Any = None

    def forward(self) -> Any:
        xp, dtype = self._xp, self._query.dtype
        scores = (self._query @ self._key.swapaxes(2, 3)).astype(numpy.float32) * numpy.float32(self._scale)
        if self._hidden is not None:
            scores = xp.where(self._hidden, numpy.float32(-numpy.inf), scores)
        weights = xp.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        self._weights = weights
        return weights.astype(dtype) @ self._value

    def backward(self) -> list[Any]:
        weights, dtype = self._weights, self._query.dtype
        grad_value = weights.astype(dtype).swapaxes(2, 3) @ self._grad_out
        of_weights = (self._grad_out @ self._value.swapaxes(2, 3)).astype(numpy.float32)
        of_scores = weights * (of_weights - (weights * of_weights).sum(-1, keepdims=True)) * numpy.float32(self._scale)
        of_scores = of_scores.astype(dtype)
        return [of_scores @ self._key, of_scores.swapaxes(2, 3) @ self._query, grad_value]


def naive_calls(operands: Operands, xp: Any) -> Calls:
    """`Naive` on the operands; key heads are repeated for the query heads that share them."""
    case, sample, torch = operands.case, operands.case.sample, operands.torch
    refuse(case, "the written-out formula", *("dropout", "softcap", "alibi", "sinks"), "varlen")
    if sample.dtype == "bfloat16":
        raise NotSupported(f"{xp.__name__} has no bfloat16")
    if max(sample.seqlen_q, sample.seqlen_kv) > LONGEST_OF_NAIVE:
        raise NotSupported(f"it would keep {sample.seqlen_q} x {sample.seqlen_kv} scores of every head")
    if sample.features.attn_mask not in (None, "bool"):
        raise NotSupported("additive masks are not written out here")
    group = sample.num_heads_q // sample.num_heads_kv
    own = (lambda x: x) if torch is None else xp.from_dlpack
    arrays = [own(operands.arrays[name]).swapaxes(1, 2) for name in ("query", "key", "value", "grad_out")]
    arrays[1:3] = [xp.repeat(x, group, axis=1) if group > 1 else x for x in arrays[1:3]]
    visible = own(operands.visible)
    naive = Naive(xp, arrays, case.problem.scale, None if bool(visible.all()) else ~visible)
    naive.forward()

    def as_operands(name: str, x: Any) -> Any:
        if name in ("key", "value") and group > 1:
            batch, heads, seqlen, head_dim = x.shape
            x = x.reshape(batch, heads // group, group, seqlen, head_dim).astype(numpy.float32).sum(2)
        return (x if torch is None else torch.from_dlpack(x)).swapaxes(1, 2)

    return Calls(naive.forward, naive.backward, as_operands)


# --- Which there are ----------------------------------------------------------------------------------------------------------------------

NEEDED = {
    **dict.fromkeys(SDPA_BACKENDS, "torch"), "varlen": "torch", "flex": "torch", "triton": "triton with torch on a GPU", "flash-attn": "flash-attn",
    "flashinfer": "flashinfer-python", "jax": "jax", "naive": "cupy on a GPU",
}  # fmt: skip
"""label -> what has to be installed for it."""


def _sixteen_bits(case: Case) -> bool:
    return case.sample.dtype != "float32"


def _installed(machine: Machine) -> list[Library]:
    """All that are here, cuflash first."""
    found = [Library("cuflash", "cuflash", cuflash.__version__, cuflash_calls)]
    torch, xp = the_torch(), numpy if machine.dry else machine.cupy
    found.append(Library(xp.__name__, "naive", xp.__version__, functools.partial(naive_calls, xp=xp)))
    if torch is None:
        found.append(Library("numpy", "formula", numpy.__version__, _formula_calls, lambda case: case.seqlen <= 512))
        return found
    for name, backend in SDPA_BACKENDS.items():
        takes = _sixteen_bits if name in ("flash", "cudnn") else lambda case: True
        found.append(Library("torch", name, torch.__version__, functools.partial(sdpa_calls, backend=backend), takes))
    found.append(Library("torch", "varlen", torch.__version__, varlen_calls, lambda case: case.sample.is_packed))
    found.append(Library("torch", "flex", torch.__version__, flex_calls))
    if version_of("triton") and not machine.dry:
        found.append(Library("triton", "triton", version_of("triton"), triton_calls, _sixteen_bits))
    for name, distributions, prepare in (
        ("flash-attn", ("flash-attn", "flash_attn"), flash_attn_calls), ("flashinfer", ("flashinfer-python", "flashinfer"), flashinfer_calls),
    ):  # fmt: skip
        if version_of(*distributions):
            found.append(Library(name, name, version_of(*distributions), prepare, _sixteen_bits))
    if version_of("jax"):
        implementation = "xla" if machine.dry else "cudnn"
        jax_calls = functools.partial(_jax_calls, implementation=implementation)
        found.append(Library("jax", implementation, version_of("jax"), jax_calls, _sixteen_bits))
    return found


def libraries(machine: Machine, wanted: list[str]) -> list[Library]:
    """Those that are installed and wanted, cuflash first."""
    return [library for library in _installed(machine) if library.label in wanted]


def absent(machine: Machine) -> dict[str, str]:
    """label -> why it is not here, of every peer that is not."""
    here = {library.label for library in _installed(machine)}
    return {label: f"needs {needed}" for label, needed in NEEDED.items() if label not in here}
