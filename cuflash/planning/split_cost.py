"""How long the kernel of few queries takes, with so many splits of the keys of each sequence or with equal shares for all blocks (stream-K): the one place for such costs.

All times are in key tiles of one block. Constants are of two sources: those of splits of full caches others fitted to their kernel; those of batches whose lengths
differ are of the timing model (docs/timing.md, "A step of generation"). Nothing was measured here.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, sqrt

from cuflash.problem.cache_call import MAX_SPLITS

PART_TILES = 0.22
"""What a part more costs the merge, in tiles of 64 keys of the kernel that makes the parts: fitted by others on a GH200 (FlashInfer, pull request 4904)."""
LAUNCH_TILES = 1.0
"""The launch of the merge: 3 µs beside 32 KiB of keys and values of one of 216 blocks that share 2 TB/s."""
BLOCK_TILES = 10.0
"""A block's beginning and end, in such tiles of 64 keys and values of 128 columns: fitted by the same others."""
BEGIN_TILES = 2
"""The beginning and the end of an output tile, or of a part of it, by the timing model."""
_LENGTH_TILES = 0.25
"""What every block of stream-K does with the lengths of all sequences before its first key: one trip to L2 more than a block that reads one length."""
_MOST_OF_SPLITS = 0.95
"""Of the time with splits, on an average, where stream-K is taken."""


# --- Full caches --------------------------------------------------------------------------------------------------------------------------


def fastest_number(blocks: int, tiles: int, resident: int, block_tiles: float = BLOCK_TILES, part_tiles: float = 0.0) -> int:
    """How many splits are fastest, the fewest of equally fast ones.

    Args:
        blocks: of one split.
        tiles: of keys, in the longest sequence.
        resident: blocks that the device holds at a time.
        block_tiles, part_tiles: what a block takes besides its key tiles, and its parts where there are several splits, in key tiles.
    """

    return min(
        range(1, min(tiles, MAX_SPLITS) + 1), key=lambda count: cost_of_splits(blocks, tiles, resident, count, block_tiles, part_tiles)
    )


def cost_of_splits(blocks: int, tiles: int, resident: int, count: int, block_tiles: float = BLOCK_TILES, part_tiles: float = 0.0) -> float:
    """Time that so many splits take, in key tiles of one block."""
    waves = ceil(blocks * count / resident)
    several = count > 1
    return waves * (ceil(tiles / count) + block_tiles + part_tiles * several) + PART_TILES * count * several


# --- Lengths that may differ --------------------------------------------------------------------------------------------------------------


def stream_k_is_faster(output_tiles: int, sequences: int, key_tiles: int, blocks: int, splits: int) -> bool:
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
    ratios = [
        _cost_of_shares(of, of_sequence, blocks) / _cost_of_ragged_splits(of, of_sequence, blocks, splits)
        for of in (full, spread, one_long)
    ]
    return sum(ratios) / len(ratios) < _MOST_OF_SPLITS


def _cost_of_shares(tiles: Sequence[int], of_sequence: int, blocks: int) -> float:
    """Time that equal shares take, in key tiles of one block, where each sequence has so many key tiles for each of its output tiles."""
    share = share_of_block(sum(BEGIN_TILES + count for count in tiles) * of_sequence, max(tiles), blocks)
    most_parts = ceil(max(tiles) / share) + 1
    return share + BEGIN_TILES + PART_TILES * most_parts + LAUNCH_TILES + _LENGTH_TILES


def _cost_of_ragged_splits(tiles: Sequence[int], of_sequence: int, blocks: int, splits: int) -> float:
    """The same with so many splits of each sequence, at best: where the longest block does not come last, all blocks together may be what takes longest."""
    parts = [ceil(count / splits) for count in tiles]
    used = sum(BEGIN_TILES * min(splits, count) + count for count in tiles) * of_sequence
    waves = ceil(len(tiles) * of_sequence * splits / blocks) if min(parts) == max(parts) else 1
    several = splits > 1
    return max(waves * (max(parts) + BEGIN_TILES), used / blocks) + (PART_TILES * splits + LAUNCH_TILES) * several


def share_of_block(positions: int, longest: int, blocks: int) -> int:
    """Positions of a block: an equal share of all of them; not fewer than where the parts of the longest output tile cost more in merging than they save."""
    return max(ceil(positions / blocks), int(sqrt(PART_TILES * longest)) + 1)
