"""Bank conflicts and wasted sectors of every kernel, counted on the simulator for contiguous inputs; needs no GPU.

    python benchmarks/memory_requests.py [--arch sm_80] [--dtype float16 float32] [--head-dim 64 128 256 72 80 33]

Prints a table in Markdown: what each kernel needs, as a multiple of the fewest wavefronts of shared memory and sectors of global memory; "ideal"
where nothing is wasted. docs/log-compiler.md holds one and gives the reasons.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cuflash import simulator
from cuflash.cli.profiling import profile_call
from cuflash.cli.samples import Sample
from cuflash.planning import fused_backward
from cuflash.simulator import KernelProfile
from kernels_of_mma import rule_out_wgmma

SEQLEN = 256
COLUMNS = ("forward", "backward_delta", "backward_dkdv", "backward_dq")


def wasted(kernel: KernelProfile) -> str:
    """What a kernel needs more than the ideal, such as "shared writes 1.17"."""
    total = kernel.total
    traffic = {
        "shared reads": total.shared_reads,
        "shared writes": total.shared_writes,
        "global reads": total.global_reads,
        "global writes": total.global_writes,
    }
    return ", ".join(f"{name} {t.used / t.ideal:.4g}" for name, t in traffic.items() if t.excess) or "ideal"


def cells(dtype: str, head_dim: int) -> dict[str, str]:
    """Column -> text; dK and dV of their own share a column."""
    found: dict[str, list[str]] = {}
    for direction in ("forward", "backward"):
        with simulator.configure(checks=False):
            result = profile_call(Sample(seqlen_q=SEQLEN, seqlen_kv=SEQLEN, head_dim=head_dim, dtype=dtype), direction)
        for plan, kernel in zip(result.plan.kernels, result.kernels, strict=True):
            column = "backward_dkdv" if plan.name in ("backward_dk", "backward_dv") else plan.name
            found.setdefault(column, []).append(wasted(kernel))
    return {column: "; ".join(dict.fromkeys(texts)) for column, texts in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="sm_80")
    parser.add_argument("--dtype", nargs="+", default=["float16", "float32"])
    parser.add_argument("--head-dim", nargs="+", type=int, default=[64, 128, 256, 80, 72, 33])
    options = parser.parse_args()
    os.environ["CUFLASH_SIMULATOR_ARCH"] = options.arch
    os.environ[fused_backward.VARIABLE] = "0"  # the columns are of kernels of their own
    rule_out_wgmma()
    print(f"| {options.arch} | head_dim |", " | ".join(COLUMNS), "|")
    print("|---" * (len(COLUMNS) + 2) + "|")
    for dtype in options.dtype:
        for head_dim in options.head_dim:
            row = cells(dtype, head_dim)
            print(f"| {dtype} | {head_dim} |", " | ".join(row[column] for column in COLUMNS), "|")


if __name__ == "__main__":
    main()
