"""`--host`: what a warm call costs the host."""

from __future__ import annotations

import argparse
import functools
import json
import time
from collections.abc import Callable
from typing import Any

import numpy

import cuflash
from bench.cases import Case
from bench.machine import Machine, the_torch
from bench.operands import Operands
from bench.report import one_line
from bench.torch_libraries import sdpa_calls
from cuflash.cli.samples import Sample


def host_calls(machine: Machine) -> dict[tuple[str, str], Callable[[], Any]]:
    """(kind of arrays, name of the call) -> a call on small arrays, of cuflash and, on a GPU, of torch."""
    seqlen = 32 if machine.small else 128
    sample = Sample(seqlen_q=seqlen, seqlen_kv=seqlen, num_heads_q=2, num_heads_kv=2, dtype="float16", is_causal=True)
    torch = the_torch()
    found: dict[tuple[str, str], Callable[[], Any]] = {}
    values = {name: x.astype(numpy.float16) for name, x in sample.operands().items()}
    kinds = {"numpy": values} if machine.dry else {"cupy": {name: machine.cupy.asarray(x) for name, x in values.items()}}
    if torch is not None:
        kinds["torch"] = {name: torch.as_tensor(x, device="cpu" if machine.dry else "cuda") for name, x in values.items()}
    for kind, arrays in kinds.items():
        query, key, value, grad_out = (arrays[name] for name in ("query", "key", "value", "grad_out"))
        attention = functools.partial(cuflash.scaled_dot_product_attention, query, key, value, is_causal=True)
        out, lse = attention(return_lse=True)
        gradient = functools.partial(cuflash.scaled_dot_product_attention_backward, grad_out, query, key, value, out, lse, is_causal=True)
        calls: dict[str, Callable[[], Any]] = {
            "cuflash forward": attention,
            "cuflash forward with LSE": lambda attention=attention: attention(return_lse=True),
            "cuflash backward": gradient,
        }
        if kind == "torch" and not machine.dry:
            made = sdpa_calls(Operands(Case(sample), machine), "FLASH_ATTENTION")
            calls |= {"torch flash forward": made.forward, "torch flash backward with autograd": made.backward}
        found |= {(kind, name): call for name, call in calls.items()}
    return found


def host_cost(machine: Machine, arguments: argparse.Namespace) -> int:
    """`--host`: microseconds of a warm call on small arrays until it returns, the launch included and the GPU's work not."""
    rows: list[dict[str, Any]] = []
    wrong = 0
    for (kind, name), call in host_calls(machine).items():
        try:
            times = host_times(call, machine)
        except Exception as error:
            wrong += name.startswith("cuflash")
            print(f"{kind:8} {name:36} {one_line(error)}")
            continue
        rows.append({**machine.head(), "arrays": kind, "call": name, **times})
        print(f"{kind:8} {name:36} median {times['median']:7.1f} µs, 20 % {times['p20']:.1f}, 80 % {times['p80']:.1f}", flush=True)
    if arguments.output:
        arguments.output.mkdir(parents=True, exist_ok=True)
        (arguments.output / "host.json").write_text(json.dumps(rows, indent=1) + "\n")
    print(
        "SUMMARY: " + "; ".join(f"{row['arrays']} {row['call']} {row['median']:.0f} µs" for row in rows if "LSE" not in row["call"])[:150]
    )
    return int(wrong > 0)


def host_times(call: Callable[[], Any], machine: Machine) -> dict[str, float]:
    rounds, each = (2, 2) if machine.small else (100, 20)
    for _ in range(2 if machine.small else 50):
        call()
    times = []
    for _ in range(rounds):
        machine.synchronize()  # an empty queue: no launch waits for another
        started = time.perf_counter()
        for _ in range(each):
            call()
        times.append(1e6 * (time.perf_counter() - started) / each)
    machine.synchronize()
    p20, median, p80 = (float(x) for x in numpy.quantile(times, (0.2, 0.5, 0.8)))
    return {"median": median, "p20": p20, "p80": p80}
