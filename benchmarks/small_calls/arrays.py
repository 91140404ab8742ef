"""The arrays of a case on a device, the calls on them, and what has to be compiled for both."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import numpy

import cuflash
from cuflash import reference
from cuflash.arrays.borrowing import borrow
from cuflash.cli.sample_features import DROPOUT_SEED
from cuflash.cli.samples import numpy_call
from cuflash.hardware import device
from cuflash.planning.planner import make_plan
from small_calls.cases import Case

NAMES = ("out", "lse", "grad_query", "grad_key", "grad_value")
"""Of the results that every case has."""

MERGED_PARTS = 17
"""How often a result with sinks is merged with itself: one part more than fit the parameter of a kernel."""


def values_of(case: Case) -> dict[str, Any]:
    """Operands in float32, rounded to the case's element type, and the arrays among the arguments."""
    generator, sample = numpy.random.default_rng(8), case.sample
    made = sample.operands(7)
    if case.with_grad_lse:
        rows = (
            (sample.num_heads_q, sum(sample.packed_lengths[0])) if sample.is_packed else (sample.batch, sample.num_heads_q, sample.seqlen_q)
        )
        made["grad_lse"] = generator.standard_normal(rows, dtype=numpy.float32)
    return made | {name: x for name, x in case.arguments.items() if isinstance(x, numpy.ndarray)}


def place(values: Any, dtype: str, view: str, xp: Any) -> Any:
    """The values as an array of `xp`, which is NumPy or CuPy. bfloat16 is tagged uint16, so that nothing else has to be installed."""
    elements = reference.to_bfloat16_bits(values) if dtype == "bfloat16" else values.astype(dtype)
    if view == "odd":
        buffer = numpy.zeros((*values.shape[:-1], values.shape[-1] + 1 + values.shape[-1] % 2), elements.dtype)
        buffer[..., : values.shape[-1]] = elements
        placed = xp.asarray(buffer)[..., : values.shape[-1]]
    elif view == "bhsd":
        placed = xp.asarray(numpy.ascontiguousarray(elements.swapaxes(1, 2))).swapaxes(1, 2)
    else:
        placed = xp.asarray(elements)
    return cuflash.bfloat16(placed) if dtype == "bfloat16" else placed


def operands_of(case: Case, values: dict[str, Any], xp: Any) -> dict[str, Any]:
    """All arrays of a case, by the names of arguments."""
    placed = {}
    for name, array in values.items():
        if name in ("query", "key", "value", "grad_out"):
            placed[name] = place(array, case.sample.dtype, case.view, xp)
        else:
            dtype = case.sample.features.attn_mask if name == "attn_mask" else None
            placed[name] = place(array, dtype or array.dtype.name, "aligned", xp)
    return placed


PAGE_SIZE = 16


def cached_call(case: Case, operands: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call with a cache of pages, to which the last keys and values are appended, as many as there are queries."""
    sample, new = case.sample, case.sample.seqlen_q
    arguments: dict[str, Any] = {"query": operands["query"], "is_causal": True}
    for name in ("key", "value"):
        tagged = hasattr(operands[name], "bits")
        rows = getattr(operands[name], "bits", operands[name])
        cache, last = rows.copy(), rows[:, -new:].copy()
        cache[:, -new:] = 0
        cache = cache.reshape(-1, PAGE_SIZE, *rows.shape[2:])
        arguments |= {name: cuflash.bfloat16(last) if tagged else last, f"{name}_cache": cuflash.bfloat16(cache) if tagged else cache}
    xp = sys.modules[type(rows).__module__.partition(".")[0]]
    lengths = xp.full(sample.batch, sample.seqlen_kv - new, "int32")
    table = xp.arange(sample.batch * sample.seqlen_kv // PAGE_SIZE, dtype="int32").reshape(sample.batch, -1)
    return arguments | {"cache_seqlens": lengths, "page_table": table}


def run(case: Case, operands: dict[str, Any]) -> dict[str, Any]:
    """Both calls, the mask of dropout, with sinks the result merged with itself and tangents along the inputs, and the call with a cache; the results by name."""
    sample, inputs = case.sample, [operands[name] for name in ("query", "key", "value")]
    arguments = {name: operands.get(name, argument) for name, argument in case.arguments.items()}
    capability = device.of_memory(*borrow(inputs[0], "query").device).capability
    tile, backward_tile = (case.tile(capability, backward=backward) for backward in (False, True))
    out, lse = sample.forward(*inputs, return_lse=True, **arguments, tile=tile)
    gradients = sample.backward(
        operands["grad_out"],
        *inputs,
        out,
        lse,
        grad_lse=operands.get("grad_lse"),
        **arguments,
        **sample.backward_options,
        tile=backward_tile,
    )
    results = dict(zip(NAMES, (out, lse, *gradients), strict=True))
    results |= {f"grad_{name}": x for name in ("attn_mask", "sinks") if (x := getattr(gradients, name)) is not None}
    if sample.features.dropout and not sample.is_packed:
        shape = (sample.batch, sample.num_heads_q, sample.seqlen_q, sample.seqlen_kv)
        results["dropout_mask"] = cuflash.dropout_mask(shape, sample.features.dropout, DROPOUT_SEED, like=operands["query"])
    if sample.features.sinks:
        parts = [out] * MERGED_PARTS, [lse] * MERGED_PARTS
        merged = cuflash.merge_attention(*parts)
        grad_part = cuflash.merge_attention_backward(operands["grad_out"], *parts, *merged).outs[-1]
        results |= {"merged_out": merged[0], "merged_lse": merged[1], "grad_part": grad_part}
    if case.has_tangents:
        results |= zip(
            ("out_dot", "lse_dot"),
            cuflash.scaled_dot_product_attention_jvp(*inputs, *inputs, out, lse, sinks_dot=operands["sinks"], **arguments),
            strict=True,
        )
    if case.cached and capability >= 80:
        results |= zip(
            ("cached_out", "cached_lse"), cuflash.attention_with_kvcache(**cached_call(case, operands), return_lse=True), strict=True
        )
    return results


def bits_of(array: Any) -> Any:
    """Elements in logical order as unsigned integers, in NumPy."""
    array = getattr(array, "bits", array)
    array = numpy.ascontiguousarray(array.get() if hasattr(array, "get") else array)
    return array.view({1: numpy.uint8, 2: numpy.uint16, 4: numpy.uint32}[array.itemsize])


def requests_of(cases: list[Case], on: Any) -> list[Any]:
    """What has to be compiled for the device `on` before these cases run."""
    found: dict[Any, None] = {}
    for case in cases:
        operands, arguments = numpy_call(case.sample)
        if case.cached and on.capability >= 80:
            problem = cuflash.kvcache_plan(**cached_call(case, operands)).problem
            found |= dict.fromkeys(kernel.request(on) for kernel in make_plan(problem, on).kernels)
        del operands["grad_out"]
        problem = case.sample.plan(**operands, **arguments, **case.sample.backward_options, backward=True).problem
        for backward in (False, True):
            tile = case.tile(on.capability, backward=backward)
            found |= dict.fromkeys(kernel.request(on) for kernel in make_plan(problem, on, backward=backward, tile=tile).kernels)
        if case.has_tangents:
            found |= dict.fromkeys(kernel.request(on) for kernel in make_plan(replace(problem, of_tangents=True), on).kernels)
    return list(found)


def the_gpu(dry_run: bool) -> Any:
    """CuPy, or with `dry_run` NumPy, whose arrays run on the simulator."""
    if dry_run:
        return numpy
    import cupy

    if not cupy.is_available():
        sys.exit("CuPy finds no GPU here; --dry-run takes the simulator.")
    return cupy
