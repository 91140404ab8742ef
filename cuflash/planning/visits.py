"""How many tiles of scores a kernel visits, as far as that is known before it runs: mirrors the ranges of kernels/tile/visibility.cuh."""

from __future__ import annotations

from math import ceil

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
    if kinds.lists_tiles or kinds.prefix or problem.seqlens_kv or problem.num_sequences is not None:
        return None
    low, high = problem.window
    if problem.is_causal:
        high = min(high, problem.causal_offset)
    visited = []
    if by_keys:
        for first_kv in range(0, problem.seqlen_kv, tile.tile_kv):
            first_q = max(0, first_kv - high)
            end_q = min(problem.seqlen_q, min(problem.seqlen_kv, first_kv + tile.tile_kv) - low)
            visited.append(ceil(end_q / tile.tile_q) - first_q // tile.tile_q if first_q < end_q else 0)
        return visited
    for first_q in range(0, problem.seqlen_q, tile.tile_q):
        end_q = min(problem.seqlen_q, first_q + tile.tile_q)
        first_kv = max(0, first_q + low)
        end_kv = min(problem.seqlen_kv, end_q + high)
        visited.append(ceil(end_kv / tile.tile_kv) - first_kv // tile.tile_kv if first_kv < end_kv else 0)
    return visited
