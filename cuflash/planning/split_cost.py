"""How long the kernel of few queries takes, with so many splits of the keys of each sequence or with equal shares for all blocks (stream-K): the one place for such costs.

All times are in key tiles of one block. Constants are of two sources: the timing model (docs/timing.md, "A step of generation"), and, for heads above 256 columns and
in the comparison with stream-K, what others fitted to their kernel. Nothing was measured here.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, sqrt
from typing import NamedTuple

from cuflash.problem.cache_call import MAX_SPLITS

PART_TILES = 0.22
"""What a part more costs the merge, in tiles of 64 keys of the kernel that makes the parts: fitted by others on a GH200 (FlashInfer, pull request 4904)."""
LAUNCH_TILES = 1.0
"""The launch of the merge: 3 µs beside 32 KiB of keys and values of one of 216 blocks that share 2 TB/s."""
BEGIN_TILES = 2
"""The beginning and the end of an output tile, or of a part of it, by the timing model."""
_LENGTH_TILES = 0.25
"""What every block of stream-K does with the lengths of all sequences before its first key: one trip to L2 more than a block that reads one length."""
_MOST_OF_SPLITS = 0.95
"""Of the time with splits, on an average, where stream-K is taken."""


# --- Full caches --------------------------------------------------------------------------------------------------------------------------


class SplitCosts(NamedTuple):
    """What times are made of, in key tiles of one of as many blocks as the device holds, which share its memory.

    Attributes:
        block: a block's beginning and end, in its key tiles.
        of_part: what its part takes besides, where there are several splits.
        part: what each split costs the merge.
        merge: what the merge costs besides.
        alone: how long a block takes for its tile at least, however few blocks there are: what is left then is the latency of its copies.
    """

    block: float
    of_part: float = 0.0
    part: float = PART_TILES
    merge: float = 0.0
    alone: float = 1.0


PREDICTED = SplitCosts(block=BEGIN_TILES, part=0.015, merge=0.65, alone=0.5)
"""Of the kernel of mma.sync, by the timing model (docs/timing.md, "A step of generation"): with the number of splits that is fastest by them a step takes at most 5 %
longer than with the fastest one by it, on an A100 and an H100, for 1 to 16 output tiles (4 on the H100) of 256 to 32768 keys."""
FITTED = SplitCosts(block=10.0)
"""As others fitted them on a GH200 (FlashInfer, pull request 4904), where blocks fill the device."""
FITTED_BYTES = 2**15
"""Of a tile of theirs: 64 keys and values of 128 columns."""


def fastest_number(blocks: int, tiles: int, resident: int, costs: SplitCosts = PREDICTED) -> int:
    """How many splits are fastest, the fewest of equally fast ones.

    Args:
        blocks: of one split.
        tiles: of keys, in the longest sequence.
        resident: blocks that the device holds at a time.
        costs: of the kernel.
    """
    return min(range(1, min(tiles, MAX_SPLITS) + 1), key=lambda count: cost_of_splits(blocks, tiles, resident, count, costs))


def cost_of_splits(blocks: int, tiles: int, resident: int, count: int, costs: SplitCosts = PREDICTED) -> float:
    """Time that so many splits take, in the unit of `costs`: that of the blocks of all waves, each as fast as it can be, or that of memory."""
    several = count > 1
    of_blocks = costs.alone * ceil(blocks * count / resident) * (ceil(tiles / count) + costs.block + costs.of_part * several)
    of_memory = blocks * tiles / resident + costs.alone * costs.block
    return max(of_blocks, of_memory) + (costs.merge + costs.part * count) * several


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
