"""About how long a kernel takes on a grid, from its steady state on one SM: waves, blocks of unequal length, blocks that wait for their turn to add to dQ, and what
memory has to move.

`timing/prediction.py` does the same with the kernels at hand, block by block; here it takes milliseconds, of calls of a million tokens too, and no compiler.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise, zip_longest
from math import ceil
from typing import NamedTuple

from cuflash.hardware.device import Device
from cuflash.planning.kernel_cases import KernelCase, conversion_bytes, terms_bytes
from cuflash.planning.visits import band_of, visits_of_key_blocks, visits_of_warpgroups, walks
from cuflash.problem.problem import Problem
from cuflash.problem.tile import Tile


class Steady(NamedTuple):
    """The loop of a kernel.

    Attributes:
        blocks: that an SM holds.
        alone: clocks of an SM for a pair of query and key, of a block that has it for itself.
        full: the same with as many blocks as it holds.
        masked: clocks of a tile in which some pair is hidden, over those of another one.
        between: clocks that a tile of queries takes beside its trips, of blocks that stay; else 0.
    """

    blocks: int
    alone: float
    full: float
    masked: float = 1.0
    between: float = 0.0


class Traffic(NamedTuple):
    """Bytes per clock and SM, if all SMs ask: what L2 delivers, and what memory does."""

    l2: float
    memory: float


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


class Grid(NamedTuple):
    """The blocks of a kernel.

    Attributes:
        heads: (batch, head) pairs whose rows blocks own.
        trips: of each block of one of them through its loop; of more blocks than `_MOST_TRIPS` those of every second, third, …, one, and so many times the pairs.
        section: pairs whose blocks start together, of kernels whose blocks wait for each other; 0 of others.
        splits: blocks that share out the trips of one tile of keys, neighbours in `trips`.
        chains: into which those blocks are cut that wait for each other.
    """

    heads: int
    trips: Sequence[float]
    section: int = 0
    splits: int = 1
    chains: int = 1


def grid_of(case: KernelCase, tile: Tile, problem: Problem, section: int = 0, *, masked: float = 1.0, all_masked: bool = False) -> Grid:
    """The blocks of a kernel in a call. Of lengths that only the device knows: as if all were the longest there may be, packed ones all alike.

    Args:
        case: the kernel.
        tile: its tile.
        problem: the call.
        section: as in `Grid`.
        masked: trips that one in a tile with hidden pairs counts for.
        all_masked: every tile has some; else those of kernels of wgmma that positions cut.
    """
    sequences, rows, keys = problem.batch, problem.seqlen_q, problem.seqlen_kv
    if problem.num_sequences is not None:
        sequences = max(1, problem.num_sequences)
        rows, keys = (
            min(longest, ceil(tokens / sequences))
            for tokens, longest in ((problem.seqlen_q, problem.max_seqlen_q), (problem.seqlen_kv, problem.max_seqlen_kv))
        )
    heads_q = problem.num_heads_q
    if case.kernel.column_groups > 1:  # rows of a tile are queries of all heads that share a key head
        shared, of_tile = problem.heads_per_kv, tile.tile_q
        heads_q = ceil(heads_q / min(shared, of_tile))
        tile = replace(tile, tile_q=max(1, of_tile // shared))
    every = max(1, ceil((keys if case.kernel.owns_keys else rows) / case.stationary_rows(tile) / _MOST_TRIPS))
    band = band_of(problem, rows, keys)
    trips: list[float]
    if all_masked or masked == 1.0 or every > 1:
        weight = masked if all_masked else 1.0
        trips = [weight * len(walk) for walk in walks(band, tile, by_keys=case.kernel.owns_keys, every=every)]
    else:
        found = visits_of_key_blocks(band, tile) if case.kernel.owns_keys else visits_of_warpgroups(band, tile)
        trips = [of.full + masked * of.partial for of in found]
    if not case.kernel.owns_keys:
        return Grid(every * sequences * heads_q, trips)
    batch, _, heads, _ = problem.key_shape
    batch = batch if problem.num_sequences is None else sequences
    members = problem.num_heads_q // heads * (sequences // batch)  # whose queries a block walks over
    return Grid(every * batch * heads, [members * count for count in trips], section)


def clocks(
    steady: Steady,
    case: KernelCase,
    tile: Tile,
    grid: Grid,
    problem: Problem,
    device: Device,
    *,
    shared_tiles: int = 0,
    shared_trips: float = 0.0,
) -> float:
    """About how long a kernel takes, from the first block's begin to the last one's end, in clocks of an SM.

    Args:
        steady: its loop.
        case: which it is.
        tile: of its blocks.
        grid: its blocks, or tiles of blocks that stay.
        problem: the call.
        device: where.
        shared_tiles: of those, whose keys all blocks share out (key_shares.py).
        shared_trips: that each block takes for them.
    """
    traffic = TRAFFIC[device.arch]
    pairs, sms = tile.tile_q * tile.tile_kv, device.num_sms

    def trip(blocks: int) -> float:  # of all blocks of an SM; between one and all that it holds, as many clocks more for each
        last = steady.blocks * steady.full
        return pairs * (steady.alone + (last - steady.alone) * (blocks - 1) / max(1, steady.blocks - 1))

    width = problem.itemsize * (problem.head_dim + problem.head_dim_v)
    moved = (tile.tile_q + tile.tile_kv + case.stationary_rows(tile)) * width  # first tiles, and results
    of_block = _BLOCK_CLOCKS + moved / traffic.l2
    beside = (steady.between if case.kernel.stays else of_block) / trip(steady.blocks)  # in trips
    number, longest = grid.heads * len(grid.trips) - shared_tiles, max(grid.trips, default=0)
    if not longest:
        return 0.0
    waves, rest = divmod(number, steady.blocks * sms)
    delays = _delays(grid, sms * steady.blocks)
    if min(grid.trips) == longest:
        found = (longest + beside) * (waves * trip(steady.blocks) + (trip(ceil(rest / sms)) if rest else 0.0)) + shared_trips * trip(1)
        found += max(delays, default=0) * trip(steady.blocks)
    else:
        waited = min(grid.section, grid.heads) * sum(delays)
        even = (grid.heads * sum(count + beside for count in grid.trips) + waited) / sms / steady.blocks * trip(steady.blocks)
        delayed = grid._replace(trips=[count + delay for count, delay in zip_longest(grid.trips, delays, fillvalue=0.0)])
        found = max(even, _first_sm(delayed, beside, min(steady.blocks, ceil(number / sms)), sms, trip))
    if case.kernel.stays:  # each once
        found += of_block
    return max(found, _least_bytes(case, problem) / traffic.memory / sms)


def _delays(grid: Grid, places: int) -> list[int]:
    """Trips that each of the first blocks of a head or chain waits, which start together and add to their first tile one after the other."""
    if not grid.section:
        return []
    of_chain = ceil(len(grid.trips) / grid.splits / grid.chains)
    first = grid.trips[: ceil(places / grid.section)]
    return [index // grid.splits % of_chain if count else 0 for index, count in enumerate(first)]


def _first_sm(grid: Grid, beside: float, blocks: int, sms: int, trip: Callable[[int], float]) -> float:
    """Clocks of the SM with the longest block, the longest of those left after each SM has one, and so on, until all have ended; the fewer are left, the faster."""
    longest_first = sorted(grid.trips, reverse=True)
    lengths = [*(longest_first[place * sms // grid.heads] + beside for place in range(blocks)), 0.0]
    return sum((length - shorter) * trip(place + 1) for place, (length, shorter) in enumerate(pairwise(lengths)))


def conversion_clocks(problem: Problem, device: Device, *, by_blocks: bool = False) -> float:
    """Of making dQ of float32 sums, which come from memory, or from L2 where the blocks do it that add them up."""
    traffic = TRAFFIC[device.arch]
    return conversion_bytes(problem) / (traffic.l2 if by_blocks else traffic.memory) / device.num_sms


def terms_clocks(problem: Problem, device: Device) -> float:
    """Of the kernel that splits operands of float32 into terms, which comes before another one."""
    return _BLOCK_CLOCKS + terms_bytes(problem) / TRAFFIC[device.arch].memory / device.num_sms


def _least_bytes(case: KernelCase, problem: Problem) -> int:
    """Of operands and results, each moved once."""
    kernel = case.kernel
    moved = (*kernel.stationary, *kernel.streamed, *kernel.outputs)
    of_queries = sum(name in ("query", "grad_out", "O", "dQ") and name not in kernel.added_up for name in moved)
    of_keys = sum(name in ("key", "value", "dK", "dV") for name in moved)
    keys = problem.key_shape[0] * problem.key_shape[1] * problem.key_shape[2]
    return (
        (problem.head_dim + problem.head_dim_v)
        // 2
        * (problem.query_rows * (problem.itemsize * of_queries + 4 * len(kernel.added_up)) + problem.itemsize * keys * of_keys)
    )
