"""What share of a GPU's bandwidth a step of generation is predicted to have, and how long it takes, as the table of docs/log-decoding.md.

    python benchmarks/decoding_shares.py

Nothing is measured. Two models say it. That of splits (cuflash/planning/split_cost.py), by which the number of splits is chosen, counts waves, the beginning and
end of blocks, and merging, with constants that others fitted to their kernel. The timing model (cuflash/timing/splits.py) runs the machine code of the kernel's loop
with keys from memory, and adds the kernels that append new keys and merge the splits.
"""

from __future__ import annotations

from bench.steps import GROUP, HEAD_DIM, PAIRS, ROOMS
from cuflash.cli.cached_calls import CachedCall
from cuflash.cli.samples import Sample
from cuflash.hardware import device
from cuflash.planning import kernel_specs, split_forward
from cuflash.planning.planner import make_plan
from cuflash.timing import machine, prediction


def row(arch: str, pairs: int) -> str:
    """Of so many pairs of sequence and key head: for each room splits or stream-K, share by the model of splits, share and time of all kernels by the timing model."""
    on, card = device.of_arch(arch, "gpu"), machine.CARDS[arch]
    cells = []
    for room in ROOMS:
        sample = Sample(
            batch=pairs, seqlen_q=1, seqlen_kv=room, num_heads_q=GROUP, num_heads_kv=1, head_dim=HEAD_DIM, dtype="bfloat16", cache=CachedCall(64)
        )  # fmt: skip
        assert sample.cache is not None
        plan = make_plan(sample.cache.problem(sample), on)
        kernel = next(kernel for kernel in plan.kernels if kernel.spec == kernel_specs.FORWARD_SPLIT)
        microseconds = 1e3 * prediction.predict_plan(plan, card, limits=False).milliseconds
        share = 1e6 * split_forward.traffic(kernel, plan.problem, on).key_bytes / card.memory_bytes_per_second / microseconds
        cells.append(f"{kernel.splits}: {split_forward.predicted_share(plan):.0%}, {share:.0%}, {microseconds:.1f} µs")
    return f"| {pairs} | " + " | ".join(cells) + " |"


def main() -> None:
    """Print a table for each card."""
    for arch in ("sm_80", "sm_90"):
        print(f"| {machine.CARDS[arch].name}: batch · key heads | " + " | ".join(f"{room} keys" for room in ROOMS) + " |")
        print("| --- " * (1 + len(ROOMS)) + "|")
        for pairs in PAIRS:
            print(row(arch, pairs))
        print()


if __name__ == "__main__":
    main()
