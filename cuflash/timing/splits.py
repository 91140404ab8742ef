"""What a step of generation takes: keys that are shared out among blocks come from memory, once, and the kernels beside are short.

`memory_machine` is an SM whose copies come from memory in the place of L2. `block_overhead` is what a block of `forward_split`
takes beside its trips. `clocks_of_merge` and `clocks_of_append` are the kernels behind and before it, which walk over no tiles.

Caches are taken to be full, and to lie in memory: between two steps a model reads its weights. Nothing here was measured.
"""

from __future__ import annotations

from dataclasses import replace
from math import ceil

from cuflash.planning import cache_append, stream_k
from cuflash.planning.kernel_plan import KernelPlan
from cuflash.planning.merge_kernels import row_groups, row_lanes
from cuflash.problem.problem import Problem
from cuflash.timing.machine import SHARED_BYTES_PER_CLOCK, Card, Multiprocessor
from cuflash.timing.visits import Data, tiles_of_sequences, visits_of_launch

_FLOAT = 4
_PART_STATE = 2 * _FLOAT  # reference and sum of a row in a part
_LOOKUPS = 2  # of a block before its first copy, one behind the other: its sequence's length, and the page of its first key
_PARTS_AHEAD = 4  # of a thread that merges, whose rows travel at a time (kernels/merge_attention.cu)
_NEW_KEY_TRIPS = (
    3  # of a block that appends, while its first copies travel: its new keys for itself, its queries, and new keys for the cache
)


def memory_machine(machine: Multiprocessor, card: Card, blocks: int, together: int) -> Multiprocessor:
    """An SM with so many blocks of `together` on the whole card, where copies come from memory: each block gets as much of its bandwidth as any other, but an SM no
    more than L2 hands on."""
    of_memory = card.memory_bytes_per_second / (card.clock_ghz * 1e9) * blocks / max(1, together)
    return replace(machine, copy_latency=card.memory_latency * card.clock_ghz * 1e9, l2_bytes=min(machine.l2_bytes, of_memory))


def parts_of_row(kernel: KernelPlan, problem: Problem, data: Data) -> float:
    """How many a row has, on an average."""
    if not kernel.splits.stream_k:
        return kernel.splits.number
    parts = sum(len(block) for block in walks_of_blocks(kernel, problem, data))
    return parts / max(1, problem.sequences * kernel.num_tiles * problem.num_heads_kv)


def memory_clocks(kernel: KernelPlan, problem: Problem, card: Card) -> float:
    """Clocks of memory for the keys and values of one tile."""
    tile_bytes = kernel.tile.tile_kv * problem.kv_itemsize * (problem.head_dim + problem.head_dim_v)
    return tile_bytes / (card.memory_bytes_per_second / (card.clock_ghz * 1e9))


def walks_of_blocks(kernel: KernelPlan, problem: Problem, data: Data) -> list[list[float]]:
    """Key tiles that each block visits, of one output tile after the other; sequences are as long as `data` says, or as they have room for."""
    if not kernel.splits.stream_k:
        return [[of.total] for head in visits_of_launch(kernel, problem, data) for of in head]
    tiles = [count for sequence in tiles_of_sequences(kernel, problem, data) for count in sequence for _ in range(problem.num_heads_kv)]
    return [list(share) for share in stream_k.shares(tiles, kernel.num_blocks)]


def block_overhead(kernel: KernelPlan, problem: Problem, machine: Multiprocessor, card: Card) -> float:
    """Clocks of a block beside its trips: it starts, looks up where its keys are, waits for the first of them, merges its warps' O in shared memory, and writes.

    `machine` is that of `memory_machine`.
    """
    tile, columns = kernel.tile, problem.head_dim_v
    rows = min(tile.tile_q, problem.max_seqlen_q * problem.heads_per_kv)
    of_warps = tile.num_warps * rows * columns * _FLOAT
    stored = rows * (columns * _FLOAT + _PART_STATE if kernel.splits.makes_parts else columns * problem.itemsize)
    merged = 2 * of_warps / SHARED_BYTES_PER_CLOCK + 2 * (machine.barrier_latency + machine.barrier_arrival * tile.num_warps)
    first_copy = max(machine.copy_latency, _NEW_KEY_TRIPS * machine.global_latency * cache_append.is_fused(kernel.spec, problem))
    return card.block_start + _LOOKUPS * machine.global_latency + first_copy + merged + stored / machine.l2_bytes


def clocks_of_merge(kernel: KernelPlan, problem: Problem, machine: Multiprocessor, card: Card, parts: float) -> float:
    """Of the kernel that merges the parts, so many of a row, which L2 still has. `machine` is that of the architecture."""
    rows = problem.query_rows
    moved = rows * (parts * (problem.head_dim_v * _FLOAT + 2 * _PART_STATE) + problem.head_dim_v * problem.itemsize)
    at_a_time = min(card.num_sms, kernel.num_blocks)
    lanes, groups = row_lanes(problem.head_dim_v), row_groups(kernel.spec, problem.seqlen_q, problem.head_dim_v, ceil(parts))
    states = 1 + (parts > lanes * groups)  # once more where a thread has several
    rows_of_parts = ceil(parts / groups / _PARTS_AHEAD)
    return card.block_start + (states + rows_of_parts) * machine.global_latency + moved / (at_a_time * machine.l2_bytes)


def clocks_of_append(kernel: KernelPlan, problem: Problem, machine: Multiprocessor, card: Card) -> float:
    """Of the kernel that writes new keys and values into the cache. `machine` is that of the architecture."""
    rows = problem.batch * problem.num_heads_kv * problem.seqlen_q
    moved = rows * (problem.head_dim + problem.head_dim_v) * (problem.itemsize + problem.kv_itemsize)
    at_a_time = min(card.num_sms, kernel.num_blocks)
    return card.block_start + _LOOKUPS * machine.global_latency + moved / (at_a_time * machine.l2_bytes)
