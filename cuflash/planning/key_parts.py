"""What it costs that blocks share out the queries of a tile of keys and another kernel adds up their parts; and of the kernels of mma.sync for dK and dV, how many should.

They have a block for each tile of keys of a K/V head, whose queries are those of all heads and batches that share it. With one K/V head and few keys most SMs would be idle. So
several blocks have equal shares of them (kernels/tile/query_splits.cuh): as many as are predicted to be fastest, where that gains at least 5 % of the kernel's time with the merge and
its launch, and where the parts take at most 4.5 times the memory of the gradients. Where data hide tiles, those that are left are shared out, as often as if none were hidden. Heads that
are cut into slices are not split, nor calls of which nothing is predicted.
"""

from __future__ import annotations

import functools
from math import ceil

from cuflash.hardware.device import Device
from cuflash.planning import predicted_time
from cuflash.planning.kernel_cases import KernelCase
from cuflash.planning.kernel_plan import UNSPLIT, Splits
from cuflash.planning.predicted_time import TRAFFIC, Grid, Steady
from cuflash.problem.problem import Problem
from cuflash.problem.tile import Tile

LEAST_GAIN = 1.05
"""Of the time of a kernel of mma.sync."""
MOST_BLOCKS = 4
"""For each SM."""
LAUNCH_CLOCKS = 1800.0
"""Of one more kernel in a stream; timing/machine.py's `kernel_start`, 1 µs."""
_MORE_PARTS = 1.02
"""What more parts have to gain, for the memory that they take."""
_LEAST_CLOCKS = 50_000
"""Of a kernel that is split, about 35 µs: a host that launches one more takes as long as shorter ones gain."""
_MOST_SPLITS = 64
"""Of kernels of mma.sync."""
_MOST_MEMORY = 4.5
"""Of parts, in the memory of the gradients of a call: three splits of a call in 16 bits with a key head for each query head take 4, and more for padding."""


@functools.lru_cache(maxsize=256)
def fastest(case: KernelCase, tile: Tile, loop: Steady, problem: Problem, device: Device) -> tuple[Splits, float]:
    """The splits of a kernel of mma.sync that are predicted to be fastest, and the clocks with them and with the merge."""
    whole = predicted_time.grid_of(case, tile, problem)
    unsplit = predicted_time.clocks(loop, case, tile, whole, problem, device)
    best, least = (UNSPLIT, unsplit), unsplit / LEAST_GAIN
    blocks = max(whole.heads * len(whole.trips), launched_blocks(case, tile, problem))
    if unsplit < _LEAST_CLOCKS or blocks >= loop.blocks * device.num_sms or case.head_slices(device) > 1:
        return best
    by_memory = int(_MOST_MEMORY * _gradient_bytes(problem) / (blocks * part_bytes(case, tile)))
    for number in range(2, min(_MOST_SPLITS, MOST_BLOCKS * device.num_sms // blocks, by_memory, int(max(whole.trips))) + 1):
        found = predicted_time.clocks(loop, case, tile, split_grid(whole, Splits(number, chains=1)), problem, device)
        found += _merge_clocks(case, tile, blocks, number, device)
        if found < least:
            best, least = (Splits(number, chains=1), found), found / _MORE_PARTS
    return best


def launched_blocks(case: KernelCase, tile: Tile, problem: Problem) -> int:
    """Blocks of the grid without splits: of packed sequences one for each tile that the longest may have in the place of each, all of which have room for parts."""
    batch, _, heads, _ = problem.key_shape
    batch = batch if problem.num_sequences is None else problem.num_sequences + 1
    return batch * heads * ceil(problem.owned_keys / case.stationary_rows(tile))


def _gradient_bytes(problem: Problem) -> int:
    """Of dQ, dK and dV."""
    batch, rows, heads, _ = problem.key_shape
    return problem.itemsize * (problem.query_rows * problem.head_dim + batch * rows * heads * (problem.head_dim + problem.head_dim_v))


def _merge_clocks(case: KernelCase, tile: Tile, blocks: int, number: int, device: Device) -> float:
    """Of parts that are stored, and merged by a block for every 16 keys."""
    nbytes, l2 = part_bytes(case, tile), TRAFFIC[device.arch].l2
    merging = min(device.num_sms, blocks * tile.tile_kv // 16)  # SMs
    return nbytes / l2 + blocks * number * nbytes / l2 / merging + LAUNCH_CLOCKS


def split_grid(whole: Grid, splits: Splits) -> Grid:
    """The same blocks, each cut into splits of about as many trips."""
    trips = [ceil(count / splits.number) for count in whole.trips for _ in range(splits.number)]
    return whole._replace(trips=trips, splits=splits.number, chains=splits.chains)


def part_bytes(case: KernelCase, tile: Tile) -> int:
    """Of dK and dV of one block in float32, columns rounded up."""
    columns, columns_v = (ceil(of / 16) * 16 for of in (case.head_dim, case.head_dim_v))
    outputs = case.kernel.outputs
    return 4 * tile.tile_kv * (columns * ("dK" in outputs) + columns_v * ("dV" in outputs))
