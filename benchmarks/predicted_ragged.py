"""How long a step of generation is predicted to take where the lengths of sequences differ, by a number of splits and by stream-K, as the table of docs/log-decoding.md.

    python benchmarks/predicted_ragged.py

Nothing is measured: the timing model says it (docs/timing.md, "A step of generation"), of all three kernels. Splits are as many as are fastest for full caches.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy

from bench.steps import GROUP, HEAD_DIM
from cuflash.cli.cached_calls import CachedCall
from cuflash.cli.samples import Sample
from cuflash.hardware import device
from cuflash.planning import kernel_specs, split_forward
from cuflash.planning.plan import Plan
from cuflash.planning.planner import make_plan
from cuflash.problem.cache_call import STREAM_K
from cuflash.timing import machine, prediction

ROOM = 32768
SHAPES = ((4, 8), (8, 8), (16, 8), (32, 8), (64, 8), (128, 8), (32, 1))  # batch, key heads


def lengths_of(batch: int) -> dict[str, list[int]]:
    """Lengths of a batch in a cache of ROOM keys, by what they are called."""
    rng = numpy.random.default_rng(batch)
    return {
        "full": [ROOM] * batch,
        "spread": [ROOM * (i + 1) // batch for i in range(batch)],
        "one long": [ROOM] + [1024] * (batch - 1),
        "log-uniform": [int(length) for length in numpy.exp(rng.uniform(numpy.log(256), numpy.log(ROOM), batch))],
        "short": [1024] * batch,
    }


def plan_of(arch: str, batch: int, heads_kv: int, num_splits: int | str | None) -> Plan:
    """A step of one query for each sequence."""
    cache = CachedCall(64, num_splits=num_splits)
    sample = Sample(
        batch=batch, seqlen_q=1, seqlen_kv=ROOM, num_heads_q=GROUP * heads_kv, num_heads_kv=heads_kv, head_dim=HEAD_DIM, dtype="bfloat16", cache=cache
    )  # fmt: skip
    return make_plan(cache.problem(sample), device.of_arch(arch, "gpu"))


def splits_of(plan: Plan) -> int:
    """As many as are fastest for full caches."""
    kernel = next(kernel for kernel in plan.kernels if kernel.spec == kernel_specs.FORWARD_SPLIT)
    return split_forward.fastest_number(kernel.case, plan.problem, kernel.tile, plan.device)


def microseconds(plan: Plan, lengths: Sequence[int]) -> float:
    """Of all kernels."""
    predicted = prediction.predict_plan(plan, machine.CARDS[plan.device.arch], limits=False, data={"seqlens_kv": lengths})
    return 1e3 * predicted.milliseconds


def row(arch: str, batch: int, heads_kv: int) -> str:
    """Of each kind of lengths, microseconds by splits and by stream-K; what the plan takes is marked."""
    chosen = plan_of(arch, batch, heads_kv, None)
    number = splits_of(chosen)
    plans = [plan_of(arch, batch, heads_kv, splits) for splits in (number, STREAM_K)]
    takes_stream_k = any(kernel.splits.stream_k for kernel in chosen.kernels)
    cells = [" → ".join(f"{microseconds(plan, lengths):.1f}" for plan in plans) for lengths in lengths_of(batch).values()]
    return f"| {batch} | {heads_kv} | {number} | {'yes' if takes_stream_k else 'no'} | " + " | ".join(cells) + " |"


def main() -> None:
    """Print a table for each card."""
    for arch in ("sm_80", "sm_90"):
        print(f"| {machine.CARDS[arch].name}: batch | key heads | splits | takes stream-K | " + " | ".join(lengths_of(1)) + " |")
        print("| --- " * (4 + len(lengths_of(1))) + "|")
        for batch, heads_kv in SHAPES:
            print(row(arch, batch, heads_kv))
        print()


if __name__ == "__main__":
    main()
