"""Whether blocks of the backward kernels that own keys share out the queries of a tile of keys, where a call has few tiles of keys, and into how many splits.

Each split stores its dK and dV in float32, and `backward_dkdv_merge` adds them up in the order of the splits. Blocks of one head that start together add to dQ one after the other, the
last one as many trips behind as there are tiles of keys: so tiles of keys are also cut into chains, each with sums of dQ of its own, which `backward_dq_convert` adds up. Both orders are
fixed, so the bits are the same on every run (kernels/tile/query_splits.cuh). By the timing model: of all numbers of splits and chains the fastest, if it gains more than predictions
may be wrong by; where nothing is predicted of a kernel, its calls are not split.

Of kernels of mma.sync see `key_parts`, where what both have is; here is what is of wgmma only, and what the plan needs.

Memory: the parts are `splits` times dK and dV in float32, of at most `MOST_BLOCKS` blocks for each SM; the sums are at most `_MOST_SUMS_BYTES`, or those of one chain.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from math import ceil

from cuflash.hardware.device import Device
from cuflash.planning import fused_backward, kernel_cases, predicted_backward, predicted_loops, predicted_time
from cuflash.planning.kernel_cases import KernelCase
from cuflash.planning.kernel_plan import UNSPLIT, Buffer, KernelPlan, Splits
from cuflash.planning.kernel_specs import KEY_PARTS
from cuflash.planning.key_parts import LAUNCH_CLOCKS, MOST_BLOCKS, launched_blocks, part_bytes, split_grid
from cuflash.planning.predicted_time import TRAFFIC, Grid, Steady
from cuflash.problem.problem import Problem
from cuflash.problem.tile import Tile

LEAST_GAIN = 1.1
"""Of a call's time, which other kernels are part of."""

_MOST_SPLITS = 16
_MOST_CHAINS = 16
_MOST_SUMS_BYTES = 2**26
"""Of more than one chain: a little more than L2 holds, of which blocks that run at one time add to a part."""


def choose(case: KernelCase, tile: Tile, problem: Problem, device: Device) -> Splits:
    """How blocks of a kernel share out queries; `UNSPLIT` where each has all that see its keys."""
    if case.kernel.implementation == "mma":
        return predicted_backward.splits_of(case, tile, problem, device)
    loops = predicted_loops.loops_of([case.kernel.name], problem)
    if device.arch != predicted_loops.ARCH or loops is None:
        return UNSPLIT
    return fastest(case, tile, loops[0], problem, device)[0]


@functools.lru_cache(maxsize=256)
def fastest(
    case: KernelCase, tile: Tile, loop: Steady, problem: Problem, device: Device, all_masked: bool = False
) -> tuple[Splits, float, Grid]:
    """The splits that are predicted to be fastest, the clocks of the kernel and of those that its results need behind it, and its blocks."""
    section = fused_backward.heads_together(problem, device) if case.kernel.added_up else 0
    whole = predicted_time.grid_of(case, tile, problem, section, masked=loop.masked, all_masked=all_masked)
    unsplit = predicted_time.clocks(loop, case, tile, whole, problem, device)
    launched = 0.0
    if case.kernel.added_up:
        by_blocks = kernel_cases.converts_sums(case.kernel, problem)
        unsplit += predicted_time.conversion_clocks(problem, device, by_blocks=by_blocks)
        launched = 0.0 if by_blocks else LAUNCH_CLOCKS
    best = UNSPLIT, unsplit, whole
    least = (unsplit + launched) / LEAST_GAIN
    for splits in _candidates(case, tile, whole, problem, device):
        grid = split_grid(whole, splits)
        found = predicted_time.clocks(loop, case, tile, grid, problem, device) + _clocks_behind(case, tile, grid, problem, device)
        if found < least:
            best, least = (splits, found, grid), found
    return best


def _candidates(case: KernelCase, tile: Tile, whole: Grid, problem: Problem, device: Device) -> Iterator[Splits]:
    """Of calls that have less than `MOST_BLOCKS` blocks for each SM; the fewest first."""
    blocks, longest = max(whole.heads * len(whole.trips), launched_blocks(case, tile, problem)), max(whole.trips, default=0)
    has_chains = bool(case.kernel.added_up) and not problem.features.kinds.lists_tiles
    sums = fused_backward.sums_bytes(problem, tile, case.head_dim)
    for number in range(1, _MOST_SPLITS + 1):
        if blocks * number > MOST_BLOCKS * device.num_sms or number > max(1, longest):
            return
        chains = 1
        while chains <= min(_MOST_CHAINS, len(whole.trips)):
            if number > 1 or chains > 1:
                yield Splits(number, chains=chains)
            chains *= 2
            if not has_chains or chains * sums > _MOST_SUMS_BYTES:
                break


def _clocks_behind(case: KernelCase, tile: Tile, grid: Grid, problem: Problem, device: Device) -> float:
    """Of parts that are stored and merged, and sums of chains that are added up, by kernels of their own."""
    traffic, sms = TRAFFIC[device.arch], device.num_sms
    blocks = grid.heads * len(grid.trips)
    stored = part_bytes(case, tile) / traffic.l2  # of a block, as it ends
    merged = blocks * part_bytes(case, tile) / traffic.l2 / sms + LAUNCH_CLOCKS
    if not case.kernel.added_up:
        return stored + merged
    more_sums = (grid.chains - 1) * 4 * problem.query_rows * problem.head_dim / traffic.memory / sms
    return stored + merged + predicted_time.conversion_clocks(problem, device) + more_sums + LAUNCH_CLOCKS


def arguments(kernel: KernelPlan, problem: Problem) -> dict[str, int | str]:
    """`QuerySplits` of a kernel that is split, or of one behind it."""
    chains = kernel.splits.chains
    if not chains:
        return {}
    return {
        "key_parts": KEY_PARTS, "num_splits": kernel.splits.number, "num_chains": chains, "chain_tiles": ceil(kernel.num_tiles / chains),
        "chain_slots": fused_backward.slots(problem, kernel.tile),
    }  # fmt: skip


def workspace(kernels: tuple[KernelPlan, ...]) -> tuple[Buffer, ...]:
    """Parts of the kernel that has the most; those of another take their place."""
    nbytes = [
        kernel.num_blocks * part_bytes(kernel.case, kernel.tile) for kernel in kernels if kernel.splits.chains and kernel.spec.is_tiled
    ]
    return (Buffer(KEY_PARTS, (max(nbytes) // 4,), "float32"),) if nbytes else ()
