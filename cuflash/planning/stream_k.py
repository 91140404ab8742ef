"""Equal shares of all key tiles for every block, whatever the lengths of sequences are (stream-K): when, and which block has what.

A number of splits is chosen for sequences as long as they have room for. Where lengths differ, the blocks of long sequences are the last ones to end, and those of
short ones have little to do. Stream-K lays the key tiles of all output tiles (a tile of grouped rows of one sequence and key head) one behind the other, and
cuts them on the device into one share for each block that the GPU holds at a time (kernels/tile/stream_k.cuh). The launch is the same for all lengths.

The host does not know the lengths. The plan takes stream-K where it is predicted to gain on an average over three batches: full caches, lengths spread evenly from
almost none to as much as there is room for, and one full cache among empty ones (split_cost.py).
"""

from __future__ import annotations

from collections.abc import Sequence

from cuflash.planning.kernel_specs import FORWARD_SPLIT, KernelSpec
from cuflash.planning.split_cost import BEGIN_TILES, share_of_block
from cuflash.problem.problem import Problem

MAX_ITEMS = 1024
"""Sequences times tiles of rows: each warp of each block counts the keys of all of them, 32 at a time."""
_MAX_POSITIONS = 2**30


def why_not(spec: KernelSpec, problem: Problem, row_tiles: int, key_tiles: int) -> str | None:
    """Why the kernel cannot work so, in words; None where it can."""
    if spec != FORWARD_SPLIT:
        return f"{spec} knows no stream-K"
    if problem.cache is None:
        return "calls without a cache have no stream-K"
    if problem.sequences * row_tiles > MAX_ITEMS:
        return f"every block counts the keys of at most {MAX_ITEMS} sequences times tiles of rows"
    if problem.sequences * row_tiles * problem.num_heads_kv * (key_tiles + BEGIN_TILES) > _MAX_POSITIONS:
        return f"there are more than {_MAX_POSITIONS} key tiles"
    return None


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
