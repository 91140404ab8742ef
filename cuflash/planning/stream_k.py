"""Equal shares of all key tiles for every block, whatever the lengths of sequences are (stream-K): when, and which block has what.

A number of splits is chosen for sequences as long as they have room for. Where lengths differ, the blocks of long sequences are the last ones to end, and those of
short ones have little to do. Stream-K lays the key tiles of all output tiles (a tile of grouped rows of one sequence and key head) one behind the other, and
cuts them on the device into one share for each block that the GPU holds at a time (kernels/tile/stream_k.cuh). The launch is the same for all lengths.

The host does not know the lengths. The plan takes stream-K where it is predicted to gain on an average over three batches: full caches, lengths spread evenly from
almost none to as much as there is room for, and one full cache among empty ones. Costs are those of the timing model (docs/timing.md, "A step of generation");
nothing was measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, sqrt

from cuflash.planning.kernel_specs import FORWARD_SPLIT, KernelSpec
from cuflash.planning.merge_kernels import LAUNCH_TILES, PART_TILES
from cuflash.problem.problem import Problem

BEGIN_TILES = 2
"""What the beginning and the end of an output tile, or of a part of it, cost a block, in key tiles."""
_LENGTH_TILES = 0.25
"""What every block does with the lengths of all sequences before its first key: one trip to L2 more than a block that reads one length."""

MAX_ITEMS = 1024
"""Sequences times tiles of rows: each warp of each block counts the keys of all of them, 32 at a time."""
_MAX_POSITIONS = 2**30

_MOST_OF_SPLITS = 0.95
"""Of the time with splits, on an average, where stream-K is taken."""


def why_not(spec: KernelSpec, problem: Problem, row_tiles: int, key_tiles: int) -> str | None:
    """Why the kernel cannot work so, in words; None where it can."""
    if spec != FORWARD_SPLIT:
        return f"{spec} knows no stream-K"
    if problem.num_sequences is not None:
        return "packed queries have no stream-K"
    if problem.cache is None:
        return "calls without a cache have no stream-K"
    if problem.sequences * row_tiles > MAX_ITEMS:
        return f"every block counts the keys of at most {MAX_ITEMS} sequences times tiles of rows"
    if problem.sequences * row_tiles * problem.num_heads_kv * (key_tiles + BEGIN_TILES) > _MAX_POSITIONS:
        return f"there are more than {_MAX_POSITIONS} key tiles"
    return None


def is_faster(output_tiles: int, sequences: int, key_tiles: int, blocks: int, splits: int) -> bool:
    """Whether equal shares are predicted to be faster than so many splits.

    Args:
        output_tiles: of all sequences together.
        sequences: among which they are the same number each.
        key_tiles: that a sequence has room for.
        blocks: that the device holds at a time.
        splits: of each sequence, otherwise.
    """
    if sequences < 2:
        return False  # a single one is cut into equal parts whatever its length
    of_sequence = output_tiles // sequences
    full = [key_tiles] * sequences
    spread = [ceil(key_tiles * (i + 1) / sequences) for i in range(sequences)]
    one_long = [key_tiles] + [1] * (sequences - 1)
    ratios = [_cost(of, of_sequence, blocks) / _cost_of_splits(of, of_sequence, blocks, splits) for of in (full, spread, one_long)]
    return sum(ratios) / len(ratios) < _MOST_OF_SPLITS


def _cost(tiles: Sequence[int], of_sequence: int, blocks: int) -> float:
    """Time that equal shares take, in key tiles of one block, where each sequence has so many key tiles for each of its output tiles."""
    share = share_of_block(sum(BEGIN_TILES + count for count in tiles) * of_sequence, max(tiles), blocks)
    most_parts = ceil(max(tiles) / share) + 1
    return share + BEGIN_TILES + PART_TILES * most_parts + LAUNCH_TILES + _LENGTH_TILES


def _cost_of_splits(tiles: Sequence[int], of_sequence: int, blocks: int, splits: int) -> float:
    """The same with so many splits of each sequence, at best: where the longest block does not come last, all blocks together may be what takes longest."""
    parts = [ceil(count / splits) for count in tiles]
    used = sum(BEGIN_TILES * min(splits, count) + count for count in tiles) * of_sequence
    waves = ceil(len(tiles) * of_sequence * splits / blocks) if min(parts) == max(parts) else 1
    several = splits > 1
    return max(waves * (max(parts) + BEGIN_TILES), used / blocks) + (PART_TILES * splits + LAUNCH_TILES) * several


def share_of_block(positions: int, longest: int, blocks: int) -> int:
    """Positions of a block: an equal share of all of them; not fewer than where the parts of the longest output tile cost more in merging than they save."""
    return max(ceil(positions / blocks), int(sqrt(PART_TILES * longest)) + 1)


def shares(tiles: Sequence[int], blocks: int) -> list[list[int]]:
    """The key tiles of each block, of one output tile after the other, as kernels/tile/stream_k.cuh cuts them.

    Args:
        tiles: key tiles that each output tile sees, in the order of the kernel: sequence by sequence, tile of rows by tile of rows, key head by key head.
        blocks: of the launch.
    """
    counted = [max(1, count) for count in tiles]
    share = share_of_block(sum(BEGIN_TILES + count for count in counted), max(counted, default=1), blocks)
    of_blocks: list[list[int]] = [[] for _ in range(blocks)]
    start = 0
    for count, seen in zip(counted, tiles, strict=True):
        keys = start + BEGIN_TILES
        for block in range(keys // share, (keys + count - 1) // share + 1):
            begin, end = max(0, block * share - keys), min(count, (block + 1) * share - keys)
            of_blocks[block].append(min(seen, end - begin))
        start = keys + count
    return of_blocks
