"""How long both passes over packed sequences of different lengths are predicted to take with blocks for the longest one in the place of each, and with those of a list
of the tiles that there are, as the table of docs/log-compiler.md.

    python benchmarks/predicted_packed.py

Nothing is measured: the timing model says it (docs/timing.md), of all kernels of a call.
"""

from __future__ import annotations

from collections.abc import Sequence
from unittest import mock

import numpy

from cuflash.cli.samples import Sample, problem_of
from cuflash.hardware import device
from cuflash.planning import packed_tiles
from cuflash.planning.planner import make_plan
from cuflash.timing import machine, prediction

NEVER = 2**31
HEADS, HEADS_KV, HEAD_DIM = 16, 8, 128


def batches() -> dict[str, list[int]]:
    """Lengths of a batch, by what they are called."""
    rng = numpy.random.default_rng(0)
    return {
        "32 of 1024": [1024] * 32,
        "31 of 512, one of 16384": [512] * 31 + [16384],
        "64 from 64 to 8192, log-uniform": [int(length) for length in numpy.exp(rng.uniform(numpy.log(64), numpy.log(8192), 64))],
        "256 from 16 to 2048, log-uniform": [int(length) for length in numpy.exp(rng.uniform(numpy.log(16), numpy.log(2048), 256))],
    }


def milliseconds(arch: str, lengths: Sequence[int], *, causal: bool, backward: bool, most_empty: int) -> float:
    """Of all kernels of a pass, with a list of tiles where more than so many blocks of each SM would be empty."""
    sample = Sample(
        lengths_q=tuple(lengths), num_heads_q=HEADS, num_heads_kv=HEADS_KV, head_dim=HEAD_DIM, dtype="bfloat16", is_causal=causal
    )
    offsets = numpy.cumsum([0, *lengths], dtype="int32")
    with mock.patch.object(packed_tiles, "EMPTY_BLOCKS", most_empty):
        plan = make_plan(problem_of(sample, backward=backward), device.of_arch(arch, "gpu"), backward=backward)
    data = {"cu_seqlens_q": offsets, "cu_seqlens_kv": offsets}
    return prediction.predict_plan(plan, machine.CARDS[arch], limits=False, data=data).milliseconds


def main() -> None:
    """Print a table for each card."""
    for arch in ("sm_80", "sm_90"):
        print(f"| {machine.CARDS[arch].name} | forward, full | causal | backward, full | causal |")
        print("| --- " * 5 + "|")
        for name, lengths in batches().items():
            cells = []
            for backward in (False, True):
                for causal in (False, True):
                    before, after = (
                        milliseconds(arch, lengths, causal=causal, backward=backward, most_empty=most)
                        for most in (NEVER, packed_tiles.EMPTY_BLOCKS)
                    )
                    cells.append(f"{before:.2f} → {after:.2f}")
            print(f"| {name} | {' | '.join(cells)} |")
        print()


if __name__ == "__main__":
    main()
