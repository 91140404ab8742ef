"""Which of the two ways to the gradients is faster, by the timing model: one kernel with five products (`fused_backward`), or kernels of their own.

`STEADY` has what the model finds for the loops of both with their default tiles (docs/timing.md). From it, and from how many blocks a call has, how long they are, and
how long blocks wait for their turn to add to dQ, follows about how long each way takes. `timing/prediction.py` does the same with the kernels at hand, block by
block; here it takes milliseconds, of calls of a million tokens too, and no compiler.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from math import ceil
from typing import NamedTuple

from cuflash.hardware.device import Device
from cuflash.planning.kernel_cases import KernelCase
from cuflash.planning.kernel_specs import KernelSpec
from cuflash.planning.visits import band_of, walks
from cuflash.problem.problem import Problem
from cuflash.problem.tile import Tile

LEAST_GAIN = 1.03
"""Predictions that are closer to each other mean nothing."""


class Steady(NamedTuple):
    """The loop of a kernel.

    Attributes:
        blocks: that an SM holds.
        alone: clocks of an SM for a pair of query and key, of a block that has it for itself.
        full: the same with as many blocks as it holds.
    """

    blocks: int
    alone: float
    full: float


class Traffic(NamedTuple):
    """Bytes per clock and SM, if all SMs ask: what L2 delivers, and what memory does."""

    l2: float
    memory: float


STEADY: dict[tuple[str, str, int], Steady] = {
    ("sm_80", "backward_dkdv", 64): Steady(2, 0.416, 0.333),
    ("sm_80", "backward_dq", 64): Steady(2, 0.279, 0.235),
    ("sm_80", "backward_fused", 64): Steady(1, 0.461, 0.461),
    ("sm_80", "backward_dkdv", 128): Steady(2, 0.933, 0.741),
    ("sm_80", "backward_dq", 128): Steady(2, 0.782, 0.576),
    ("sm_80", "backward_fused", 128): Steady(1, 0.843, 0.843),
    ("sm_80", "backward_dv", 256): Steady(1, 0.972, 0.972),
    ("sm_80", "backward_dk", 256): Steady(1, 1.552, 1.552),
    ("sm_80", "backward_dq", 256): Steady(1, 1.528, 1.528),
    ("sm_80", "backward_fused", 256): Steady(1, 1.887, 1.887),
    ("sm_86", "backward_dkdv", 64): Steady(1, 1.069, 1.069),
    ("sm_86", "backward_dq", 64): Steady(4, 1.022, 0.759),
    ("sm_86", "backward_fused", 64): Steady(1, 1.340, 1.340),
    ("sm_86", "backward_dkdv", 128): Steady(1, 2.106, 2.106),
    ("sm_86", "backward_dq", 128): Steady(1, 1.597, 1.597),
    ("sm_86", "backward_fused", 128): Steady(1, 2.636, 2.636),
    ("sm_86", "backward_dv", 256): Steady(1, 2.202, 2.202),
    ("sm_86", "backward_dk", 256): Steady(1, 4.026, 4.026),
    ("sm_86", "backward_dq", 256): Steady(1, 3.938, 3.938),
    ("sm_86", "backward_fused", 256): Steady(1, 6.506, 6.506),
    ("sm_90", "backward_dkdv", 128): Steady(2, 0.921, 0.731),
    ("sm_90", "backward_dq", 128): Steady(2, 0.713, 0.525),
    ("sm_90", "backward_fused", 128): Steady(2, 1.141, 0.889),
    ("sm_90", "backward_dv", 256): Steady(2, 1.457, 0.848),
    ("sm_90", "backward_dk", 256): Steady(2, 2.221, 1.366),
    ("sm_90", "backward_dq", 256): Steady(2, 2.196, 1.336),
    ("sm_90", "backward_fused", 256): Steady(1, 1.790, 1.790),
    ("sm_120", "backward_dkdv", 64): Steady(1, 1.043, 1.043),
    ("sm_120", "backward_dq", 64): Steady(4, 1.035, 0.755),
    ("sm_120", "backward_fused", 64): Steady(1, 1.325, 1.325),
    ("sm_120", "backward_dkdv", 128): Steady(1, 2.180, 2.180),
    ("sm_120", "backward_dq", 128): Steady(1, 1.603, 1.603),
    ("sm_120", "backward_fused", 128): Steady(1, 2.618, 2.618),
    ("sm_120", "backward_dv", 256): Steady(1, 2.185, 2.185),
    ("sm_120", "backward_dk", 256): Steady(1, 4.355, 4.355),
    ("sm_120", "backward_dq", 256): Steady(1, 4.272, 4.272),
    ("sm_120", "backward_fused", 256): Steady(1, 6.501, 6.501),
}
"""(architecture, kernel, head_dim) -> its loop; what benchmarks/predicted_tile_sweep.py --steady prints: float16, default tiles, the mean of full and causal."""
STEADY |= {
    ("sm_89", kernel, head_dim): steady for (arch, kernel, head_dim), steady in STEADY.items() if arch == "sm_86"
}  # the same SM to the model

TRAFFIC: dict[str, Traffic] = {
    "sm_80": Traffic(36.0, 12.0),
    "sm_86": Traffic(24.0, 6.0),
    "sm_89": Traffic(24.0, 2.8),
    "sm_90": Traffic(30.0, 11.6),
    "sm_120": Traffic(24.0, 3.9),
}
"""Those of timing/machine.py."""

_MOST_TRIPS = 1024
"""Of blocks of one head that are counted; neighbours of more are taken to be alike, so that calls of a million tokens are planned as fast as others."""

_BLOCK_CLOCKS = 936.0
"""Of a block before its loop: it starts, and waits for its first copies; timing/machine.py's `block_start` and `copy_latency`."""


def is_known(kernel: KernelSpec, problem: Problem, device: Device) -> bool:
    """Whether the model was asked about a kernel."""
    of_16_bits = problem.dtype != "float32" and problem.head_dim == problem.head_dim_v
    return of_16_bits and (device.arch, kernel.name, problem.head_dim) in STEADY


class Grid(NamedTuple):
    """The blocks of a kernel.

    Attributes:
        heads: (batch, head) pairs whose rows blocks own.
        trips: of each block of one of them through its loop; of more blocks than `_MOST_TRIPS` those of every second, third, …, one, and so many times the pairs.
        section: pairs whose blocks start together, of kernels whose blocks wait for each other; 0 of others.
    """

    heads: int
    trips: Sequence[int]
    section: int = 0


def grid_of(case: KernelCase, tile: Tile, problem: Problem, section: int = 0) -> Grid:
    """The blocks of a kernel in a call. Of lengths that only the device knows: as if all were the longest there may be, packed ones all alike.

    Args:
        case: the kernel.
        tile: its tile.
        problem: the call.
        section: as in `Grid`.
    """
    sequences, rows, keys = problem.batch, problem.seqlen_q, problem.seqlen_kv
    if problem.num_sequences is not None:
        sequences = max(1, problem.num_sequences)
        rows, keys = (
            min(longest, ceil(tokens / sequences))
            for tokens, longest in ((problem.seqlen_q, problem.max_seqlen_q), (problem.seqlen_kv, problem.max_seqlen_kv))
        )
    every = max(1, ceil((keys if case.kernel.owns_keys else rows) / case.stationary_rows(tile) / _MOST_TRIPS))
    trips = [len(walk) for walk in walks(band_of(problem, rows, keys), tile, by_keys=case.kernel.owns_keys, every=every)]
    if not case.kernel.owns_keys:
        return Grid(every * sequences * problem.num_heads_q, trips)
    batch, _, heads, _ = problem.key_shape
    batch = batch if problem.num_sequences is None else sequences
    members = problem.num_heads_q // heads * (sequences // batch)  # whose queries a block walks over
    return Grid(every * batch * heads, [members * count for count in trips], section)


def clocks(case: KernelCase, tile: Tile, grid: Grid, problem: Problem, device: Device) -> float:
    """About how long a kernel takes, from the first block's begin to the last one's end, in clocks of an SM."""
    steady, traffic = STEADY[device.arch, case.kernel.name, case.head_dim], TRAFFIC[device.arch]
    pairs, sms = tile.tile_q * tile.tile_kv, device.num_sms

    def trip(blocks: int) -> float:  # of all blocks of an SM; between one and all that it holds, as many clocks more for each
        last = steady.blocks * steady.full
        return pairs * (steady.alone + (last - steady.alone) * (blocks - 1) / max(1, steady.blocks - 1))

    width = problem.itemsize * 2 * problem.head_dim
    moved = (tile.tile_q + tile.tile_kv + case.stationary_rows(tile)) * width  # first tiles, and results
    beside = (_BLOCK_CLOCKS + moved / traffic.l2) / trip(steady.blocks)  # in trips
    number, longest = grid.heads * len(grid.trips), max(grid.trips, default=0)
    if not longest:
        return 0.0
    waves, rest = divmod(number, steady.blocks * sms)
    if min(grid.trips) == longest:
        found = (longest + beside) * (waves * trip(steady.blocks) + (trip(ceil(rest / sms)) if rest else 0.0))
    else:
        even = grid.heads * sum(count + beside for count in grid.trips) / sms / steady.blocks * trip(steady.blocks)
        found = max(even, _first_sm(grid, beside, min(steady.blocks, ceil(number / sms)), sms, trip))
    if grid.section:  # blocks of one head that start together add to their first tile one after the other
        together = min(len(grid.trips), ceil(sms * steady.blocks / grid.section))
        found += (together - 1) * trip(steady.blocks)
    return max(found, _least_bytes(case, problem) / traffic.memory / sms)


def _first_sm(grid: Grid, beside: float, blocks: int, sms: int, trip: Callable[[int], float]) -> float:
    """Clocks of the SM with the longest block, the longest of those left after each SM has one, and so on, until all have ended; the fewer are left, the faster."""
    longest_first = sorted(grid.trips, reverse=True)
    lengths = [*(longest_first[place * sms // grid.heads] + beside for place in range(blocks)), 0.0]
    return sum((length - shorter) * trip(place + 1) for place, (length, shorter) in enumerate(pairwise(lengths)))


def conversion_clocks(problem: Problem, device: Device) -> float:
    """Of making dQ of float32 sums."""
    return problem.query_rows * problem.head_dim * (4 + problem.itemsize) / TRAFFIC[device.arch].memory / device.num_sms


def _least_bytes(case: KernelCase, problem: Problem) -> int:
    """Of operands and results, each moved once."""
    kernel = case.kernel
    moved = (*kernel.stationary, *kernel.streamed, *kernel.outputs)
    of_queries = sum(name in ("query", "grad_out", "dQ") and name not in kernel.added_up for name in moved)
    of_keys = sum(name in ("key", "value", "dK", "dV") for name in moved)
    keys = problem.key_shape[0] * problem.key_shape[1] * problem.key_shape[2]
    return problem.head_dim * (
        problem.query_rows * (problem.itemsize * of_queries + 4 * len(kernel.added_up)) + problem.itemsize * keys * of_keys
    )
