"""How many tiles of scores a kernel visits, as far as that is known before it runs: mirrors the ranges of kernels/tile/visibility.cuh."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil

from cuflash.problem.features import UNLIMITED
from cuflash.problem.problem import Problem
from cuflash.problem.tile import Tile


def all_tiles(problem: Problem, tile: Tile) -> int:
    """Tiles that the scores of one head are cut into, at most where lengths differ."""
    return ceil(problem.max_seqlen_q / tile.tile_q) * ceil(problem.max_seqlen_kv / tile.tile_kv)


def visited_tiles(problem: Problem, tile: Tile, *, by_keys: bool) -> int | None:
    """Tiles that a kernel visits for one head; None where that depends on data: on a boolean mask, segments, prefixes or lengths."""
    visits = visits_of_blocks(problem, tile, by_keys=by_keys)
    return None if visits is None else sum(visits)


def visits_of_blocks(problem: Problem, tile: Tile, *, by_keys: bool) -> list[int] | None:
    """Tiles that each block of one head visits, in the order of its own tiles; None where that depends on data.

    Args:
        problem: the call.
        tile: of the kernel.
        by_keys: its blocks own keys and walk over queries, as those of the dK/dV kernel.
    """
    kinds = problem.features.kinds
    if kinds.lists_tiles or kinds.prefix or problem.is_ragged:
        return None
    return [len(walk) for walk in walks(band_of(problem), tile, by_keys=by_keys)]


@dataclass(frozen=True)
class Band:
    """Which pairs the positions leave in one sequence: query i sees key j if low <= j - i <= high, and j - i <= causal or j < prefix.

    Attributes:
        seqlen_q, seqlen_kv: of the sequence.
        low, high: of the window.
        causal: of the causal mask; `UNLIMITED` without.
        prefix: keys that the causal mask does not hide.
    """

    seqlen_q: int
    seqlen_kv: int
    low: int
    high: int
    causal: int
    prefix: int = 0


def band_of(problem: Problem, seqlen_q: int | None = None, seqlen_kv: int | None = None, prefix: int = 0) -> Band:
    """The band of a sequence of these lengths; without them, of the arrays'."""
    rows, columns = problem.seqlen_q if seqlen_q is None else seqlen_q, problem.seqlen_kv if seqlen_kv is None else seqlen_kv
    offset = columns - rows if problem.causal_alignment == "bottom_right" else 0
    low, high = problem.features.window_low, problem.features.window_high
    return Band(
        rows, columns, low if low == -UNLIMITED else low + offset, high if high == UNLIMITED else high + offset,
        offset if problem.is_causal else UNLIMITED, min(prefix, columns),
    )  # fmt: skip


def walks(band: Band, tile: Tile, *, by_keys: bool, every: int = 1) -> list[range]:
    """For each tile that a block owns, or the first of so many of them, the tiles between the first and the last one in which positions leave a pair."""
    walked = []
    if by_keys:
        for first_kv in range(0, band.seqlen_kv, every * tile.tile_kv):
            first_q = max(0, first_kv - band.high, 0 if first_kv < band.prefix else first_kv - band.causal)
            end_q = min(band.seqlen_q, min(band.seqlen_kv, first_kv + tile.tile_kv) - band.low)
            walked.append(range(first_q // tile.tile_q, ceil(end_q / tile.tile_q)) if first_q < end_q else range(0))
        return walked
    for first_q in range(0, band.seqlen_q, every * tile.tile_q):
        end_q = min(band.seqlen_q, first_q + tile.tile_q)
        first_kv = max(0, first_q + band.low)
        end_kv = min(band.seqlen_kv, end_q + band.high, max(end_q + band.causal, band.prefix))
        walked.append(range(first_kv // tile.tile_kv, ceil(end_kv / tile.tile_kv)) if first_kv < end_kv else range(0))
    return walked


@dataclass(frozen=True)
class Visits:
    """Tiles that one block visits.

    Attributes:
        full: without a hidden pair, as far as data hide it. A tile that positions alone cut counts as full: a few of each block.
        partial: with one. Of kernels of wgmma, also those that positions cut; of blocks that stay both are means over the block's warpgroups.
        idle: of those, that one warpgroup leaves to others of its block.
    """

    full: float
    partial: float = 0
    idle: float = 0

    @property
    def total(self) -> float:
        """All of them."""
        return self.full + self.partial


def visits_of_warpgroups(band: Band, tile: Tile) -> list[Visits]:
    """Of kernels whose warpgroups walk each for itself: the mean of a block's warpgroups. Their tiles are masked where positions hide some pair."""
    rows = tile.tile_q * 4 // tile.num_warps
    walked = walks(band, replace(tile, tile_q=rows), by_keys=False)
    whole = [_whole_tiles(band, first_q, min(band.seqlen_q, first_q + rows) - 1, tile.tile_kv) for first_q in range(0, band.seqlen_q, rows)]
    of_warpgroups = [(len(range(max(a.start, b.start), min(a.stop, b.stop))), len(a)) for a, b in zip(walked, whole, strict=True)]
    warpgroups = tile.tile_q // rows
    blocks = [of_warpgroups[first : first + warpgroups] for first in range(0, len(of_warpgroups), warpgroups)]
    return [_mean(block, warpgroups) for block in blocks]


def visits_of_key_blocks(band: Band, tile: Tile, members: int = 1) -> list[Visits]:
    """Of kernels whose blocks own keys, and have a loop without masks for tiles of queries that see all of them."""
    found = []
    for index, walk in enumerate(walks(band, tile, by_keys=True)):
        last_kv = (index + 1) * tile.tile_kv - 1
        first_whole = -(-max(0, last_kv - band.causal) // tile.tile_q) if last_kv < band.seqlen_kv else walk.stop
        whole = max(0, walk.stop - max(walk.start, first_whole))
        found.append(Visits(members * whole, members * (len(walk) - whole)))
    return found


def _mean(block: Sequence[tuple[int, int]], warpgroups: int) -> Visits:
    """Of whole and of all tiles that each warpgroup of a block walks over; those behind the last one have none."""
    whole, walked = sum(full for full, _ in block) / warpgroups, sum(of for _, of in block) / warpgroups
    return Visits(whole, walked - whole, max(of for _, of in block) - walked)


def _whole_tiles(band: Band, first_q: int, last_q: int, tile_kv: int) -> range:
    """Tiles of keys that all of these queries see whole."""
    begin, end = max(0, last_q + band.low), min(band.seqlen_kv, first_q + 1 + band.high, max(first_q + 1 + band.causal, band.prefix))
    return range(-(-begin // tile_kv), max(0, end) // tile_kv)
