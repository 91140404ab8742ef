"""Predict decoding with multi-head latent attention on an H100: 128 query heads share one key head of 576 columns, the first 512 of which are its values.

CUFLASH_FORWARD_WGMMA=1 python benchmarks/predicted_latent.py [--heads 128] [--queries 1]

By the timing model (docs/timing.md), in which L2 gives each SM what only it asks for, beside the bound of memory: every key, query, part and output moved once.
Nothing is measured. Needs no GPU.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import numpy

import cuflash
from cuflash.hardware import device
from cuflash.planning.planner import make_plan
from cuflash.timing import prediction
from cuflash.timing.machine import CARDS, multiprocessor

BATCHES, LENGTHS = (1, 4, 16, 64, 128), (4096, 16384, 65536)
NAME = "forward_wgmma_wide"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--heads", type=int, default=128)
    options.add_argument("--queries", type=int, default=1)
    given = options.parse_args()
    on, card, machine = device.of_arch("sm_90", "gpu"), CARDS["sm_90"], multiprocessor("sm_90")
    assert machine.warpgroups is not None
    alone = replace(machine, warpgroups=replace(machine.warpgroups, shared_l2_bytes=machine.l2_bytes))
    print(f"{'batch':>6} {'keys':>6} {'splits':>6} {'us':>9} {'bound us':>9} {'of bound':>8} {'TFLOP/s':>8}")
    for batch in BATCHES:
        for length in LENGTHS:
            query = numpy.broadcast_to(numpy.zeros((), "float16"), (batch, given.queries, given.heads, 576))
            cache = numpy.lib.stride_tricks.as_strided(numpy.zeros(8, "float16"), (batch, length, 1, 576), (length * 1152, 1152, 1152, 2))
            call = cuflash.plan(query, cache, cache[..., :512], enable_gqa=True, tile={NAME: cuflash.Tile(64, 64, 8, 2)})
            plan = make_plan(call.problem, on, tile={NAME: cuflash.Tile(64, 64, 8, 2)})
            kernel = plan.kernels[0]
            described, function = prediction.compiled(kernel, on, causal=False)
            steady = prediction.predict_kernel(function, described, limits=False, machine=alone)
            launch = prediction.lay_out(steady, kernel, plan.problem, card, machine=alone)
            merging = plan.workspace_bytes / 2 / card.memory_bytes_per_second * 1e3 if len(plan.kernels) > 1 else 0.0
            nbytes = batch * 2 * (length * 576 + given.queries * given.heads * (576 + 512)) + plan.workspace_bytes
            bound, predicted = nbytes / card.memory_bytes_per_second * 1e3, launch.milliseconds + merging
            rate = plan.problem.flops_forward / predicted / 1e9
            print(
                f"{batch:>6} {length:>6} {kernel.splits.number:>6} {1e3 * predicted:>9.1f} {1e3 * bound:>9.1f} {bound / predicted:>8.2f} {rate:>8.0f}"
            )


if __name__ == "__main__":
    main()
