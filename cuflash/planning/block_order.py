"""In which order the blocks of a causal kernel are launched: longest first, over as many heads at a time as share L2.

SMs take blocks in the order of their index. If one head comes after the other, each ends with short blocks and the next begins with long ones, so the last
head's long blocks begin when nothing is left to fill the SMs beside them. If all heads come together, longest first, the last blocks are the shortest of all.
But then the blocks that run at one time walk over the keys of all heads, which no longer are in L2 when the next blocks ask for them.

So (batch, head) pairs are cut into sections of equal size, one after the other; within a section all blocks with the most tiles come first, those of
neighbouring heads side by side, among them query heads that share K and V. Without a causal mask all blocks are equally long, and heads come one at a time.

The order changes no result: no block reads what another one writes. kernels/tile/schedule.cuh takes (batch, head, tile) from a block's index.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import isqrt, log
from typing import TypeVar

from cuflash.hardware.architectures import architecture
from cuflash.hardware.device import Device
from cuflash.planning.kernel_cases import KernelCase
from cuflash.planning.kernel_specs import columns_of
from cuflash.problem.problem import Problem

T = TypeVar("T")

L2_SHARE = 5 / 8
"""Of L2, for what blocks walk over; the rest is for what they own. On an H100 sections that fit 32 of 50 MB were fast (docs/hopper.md)."""
BLOCKS_IN_STEP = 8
"""Blocks that walk over one head at the same time, from which on it need not stay in L2: memory is asked once for all of them."""
FEW_VISIBLE = 1 / 2
"""Part of the keys from which on a window makes nearly all blocks equally long."""


def section_heads(case: KernelCase, problem: Problem, device: Device, *, pairs: int, resident_blocks: int) -> int:
    """How many (batch, head) pairs make up a section: a divisor of `pairs`; 1 where heads come one at a time, as those of a mask's gradient do.

    Args:
        case: the kernel.
        problem: the call.
        device: where.
        pairs: (batch, head) pairs among which the kernel's blocks are divided.
        resident_blocks: that all SMs hold together.
    """
    if not problem.is_causal or case.kernel.rows_of == "attn_mask" or _is_narrow(problem):
        return 1
    sharing = 1 if case.kernel.owns_keys else problem.num_heads_q // problem.num_heads_kv
    fitting = int(L2_SHARE * architecture(device.arch).l2_bytes) // max(1, _walked_bytes(case, problem, pairs))
    return nearest_divisor(pairs, sharing * max(1, fitting, resident_blocks // BLOCKS_IN_STEP))


def _is_narrow(problem: Problem) -> bool:
    return -problem.features.window_low < FEW_VISIBLE * problem.max_seqlen_kv


def _walked_bytes(case: KernelCase, problem: Problem, pairs: int) -> int:
    """What the blocks of one head walk over: K and V of its keys, or Q and dO of all queries that share its keys. Of packed sequences, the mean."""
    width = problem.itemsize * sum(columns_of(name, case.head_dim, case.head_dim_v) for name in case.kernel.streamed)
    if case.kernel.owns_keys:
        return problem.query_rows * width // max(1, pairs)
    return problem.seqlen_kv * width // (problem.num_sequences or 1)


def nearest_divisor(number: int, wanted: int) -> int:
    """The divisor of `number` that is nearest to `wanted` in ratio, the larger of two."""
    small = [divisor for divisor in range(1, isqrt(number) + 1) if number % divisor == 0]
    return min((*small, *(number // divisor for divisor in small)), key=lambda divisor: (abs(log(divisor / wanted)), -divisor))


def in_order(of_heads: Sequence[Sequence[T]], *, section: int, last_first: bool) -> Iterator[T]:
    """What belongs to each block, in the order of launch.

    Args:
        of_heads: for each (batch, head) pair and each of its tiles.
        section: of pairs; the last section may have fewer.
        last_first: the last tile of a head is the longest, as that of queries under a causal mask is.
    """
    for first in range(0, len(of_heads), section):
        heads = of_heads[first : first + section]
        tiles = range(max(map(len, heads), default=0))
        for tile in reversed(tiles) if last_first else tiles:
            yield from (head[tile] for head in heads)
