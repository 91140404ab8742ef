"""`--one`: a call for a profiler; `--worst`: which one is worth profiling."""

from __future__ import annotations

import argparse
import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy

import cuflash
from bench.cases import Case
from bench.machine import Machine
from bench.operands import placed_without_torch
from cuflash.cli.samples import Sample


def one_call(machine: Machine, arguments: argparse.Namespace) -> int:
    """`--one`: two calls of one pass; a profiler looks at the kernels of the second."""
    dtype, head_dim, seqlen, causal, direction = arguments.one
    sample = Case.plain(dtype, int(head_dim), causal == "causal", int(seqlen)).sample
    if machine.small:
        sample = replace(sample, batch=1, num_heads_q=1, num_heads_kv=1)
    query, key, value, grad_out = random_operands(sample, machine)
    out, lse = sample.forward(query, key, value, return_lse=True, is_causal=sample.is_causal)
    for _ in range(2):
        if direction == "forward":
            sample.forward(query, key, value, return_lse=True, is_causal=sample.is_causal)
        else:
            sample.backward(grad_out, query, key, value, out, lse, is_causal=sample.is_causal)
    machine.synchronize()
    print(f"{Case(sample)} {direction}")
    return 0


def random_operands(sample: Sample, machine: Machine) -> list[Any]:
    """query, key, value and grad_out; made on the GPU, since the host would take longer than the profiler."""
    shapes = sample.shapes()
    if machine.dry:
        return [placed_without_torch(values, sample.dtype, machine) for values in sample.operands().values()]
    random = machine.cupy.random.RandomState(1)
    made = (random.standard_normal(shapes[name], dtype=numpy.float32) for name in ("query", "key", "value", "grad_out"))
    if sample.dtype == "bfloat16":  # the upper halves of float32, rounded toward zero: as good as any other random numbers
        return [cuflash.bfloat16((x.view(numpy.uint32) >> 16).astype(numpy.uint16)) for x in made]
    return [x.astype(sample.dtype) for x in made]


def worst(path: Path) -> int:
    """`--worst`: the plain case where the best other library is furthest ahead."""
    groups: dict[tuple[str, ...], dict[str, float]] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            if row["milliseconds"] and row["note"] == "" and row["case"] == "" and row["pass"] != "forward_lse":  # --one has plain cases
                key = tuple(row[name] for name in ("dtype", "head_dim", "seqlen", "causal", "pass"))
                rate = groups.setdefault(key, {})
                name = "cuflash" if row["library"] == "cuflash" else "other"
                rate[name] = max(rate.get(name, 0.0), float(row["tflops"]))
    ratios = {key: rate["cuflash"] / rate["other"] for key, rate in groups.items() if len(rate) == 2}
    if not ratios:
        return 1
    dtype, head_dim, seqlen, causal, direction = min(ratios, key=lambda key: ratios[key])
    print(dtype, head_dim, seqlen, "causal" if causal == "1" else "full", direction)
    return 0
