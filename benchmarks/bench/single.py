"""`--one`: a call for a profiler; `--worst`: which one is worth profiling."""

from __future__ import annotations

import argparse
import csv
from dataclasses import replace
from pathlib import Path

from bench.cases import Case
from bench.machine import Machine
from bench.operands import placed_without_torch


def one_call(machine: Machine, arguments: argparse.Namespace) -> int:
    """`--one`: two calls of one pass; a profiler looks at the kernels of the second."""
    dtype, head_dim, seqlen, causal, direction = arguments.one
    sample = Case.plain(dtype, int(head_dim), causal == "causal", int(seqlen)).sample
    if machine.dry:
        sample = replace(sample, batch=1, num_heads_q=1, num_heads_kv=1)
    query, key, value, grad_out = (placed_without_torch(values, dtype, machine) for values in sample.operands().values())
    out, lse = sample.forward(query, key, value, return_lse=True, is_causal=sample.is_causal)
    for _ in range(2):
        if direction == "forward":
            sample.forward(query, key, value, return_lse=True, is_causal=sample.is_causal)
        else:
            sample.backward(grad_out, query, key, value, out, lse, is_causal=sample.is_causal)
    machine.synchronize()
    print(f"{Case(sample)} {direction}")
    return 0


def worst(path: Path) -> int:
    """`--worst`: the plain case where the best other library is furthest ahead."""
    groups: dict[tuple[str, ...], dict[str, float]] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            if row["milliseconds"] and row["note"] == "" and row["case"] == "":  # --one has plain cases
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
