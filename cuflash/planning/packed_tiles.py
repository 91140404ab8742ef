"""Blocks for the tiles that packed sequences have, and not for those that the longest one might have in the place of each.

Only the device knows the lengths. The host knows that there are no more tiles than one for each `rows` of all packed rows, and one more for each sequence, and
makes a grid for so many. A kernel before lists the tiles, those with the most pairs first, and blocks look their work up (kernels/tile/packed_tiles.cuh). Where
lengths are much alike, the grid for the longest sequence is no larger, and there is no list.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from math import ceil

from cuflash.hardware.architectures import architecture
from cuflash.hardware.device import Device
from cuflash.planning import kernel_specs
from cuflash.planning.block_order import BLOCKS_IN_STEP, L2_SHARE, nearest_divisor
from cuflash.planning.codegen import config_text
from cuflash.planning.kernel_cases import KernelCase
from cuflash.planning.kernel_plan import Buffer, KernelPlan, LaunchShape
from cuflash.planning.kernel_specs import columns_of
from cuflash.problem.problem import Problem
from cuflash.problem.tile import Tile

EMPTY_BLOCKS = 16
"""Of each SM, from which on a list is made. A block without rows waits for its offsets from memory, about 1 µs, and one or two run beside it on an SM; a list takes
a launch and two such waits. Neither was measured."""
_WARP_TILES = 4  # as in kernels/packed_tiles.cu


def places(problem: Problem, device: Device, case: KernelCase, tile: Tile, *, num_tiles: int, heads: int) -> int:
    """Tiles of one head that packed sequences have at most, or 0 where blocks need no list of them.

    Args:
        problem: the call.
        device: where.
        case: the kernel.
        tile: its tile.
        num_tiles: that the longest sequence may have.
        heads: that have blocks.
    """
    if problem.num_sequences is None:
        return 0
    rows = problem.seqlen_kv if case.kernel.owns_keys else problem.seqlen_q
    found = rows // case.stationary_rows(tile) + problem.num_sequences + 1  # one more fills what lies behind the last
    empty = heads * ((problem.num_sequences + 1) * num_tiles - found)
    return found if empty >= EMPTY_BLOCKS * device.num_sms else 0


def section_heads(case: KernelCase, problem: Problem, device: Device, heads: int) -> int:
    """Heads whose blocks are launched together: a divisor of all, so many that what they walk over fits L2, and those at least that share K and V.

    As many as leave few blocks of one head side by side (`block_order.BLOCKS_IN_STEP`), which wait for each other where they add up dQ.
    """
    width = problem.itemsize * sum(columns_of(name, case.head_dim, case.head_dim_v) for name in case.kernel.streamed)
    owns_keys = case.kernel.owns_keys
    sharing = 1 if owns_keys else problem.num_heads_q // problem.num_heads_kv
    walked = problem.num_heads_q // heads * problem.seqlen_q if owns_keys else problem.seqlen_kv / sharing
    fitting = int(L2_SHARE * architecture(device.arch).l2_bytes / max(1, width * walked))
    return nearest_divisor(heads, max(sharing, fitting, device.num_sms // BLOCKS_IN_STEP))


def list_kernels(kernels: Iterable[KernelPlan], problem: Problem, device: Device) -> Iterator[KernelPlan]:
    """Those that make lists for these kernels, or would where lengths differ more."""
    for kernel in kernels:
        if kernel.spec == kernel_specs.BACKWARD_DQ_CONVERT or (kernel.spec.is_tiled and not kernel.spec.splits_keys):
            yield _list_kernel(kernel, problem, device)


def with_lists(kernels: Iterable[KernelPlan], problem: Problem, device: Device) -> list[KernelPlan]:
    """The kernels, each behind the one that lists its tiles if it has a list."""
    found = []
    for kernel in kernels:
        if kernel.packed_places:
            found.append(_list_kernel(kernel, problem, device))
        found.append(kernel)
    return found


def _list_kernel(of: KernelPlan, problem: Problem, device: Device) -> KernelPlan:
    """The kernel that lists the tiles for the kernel `of`."""
    spec = kernel_specs.PACKED_TILES
    constants: dict[str, int | bool | str] = {
        "CAPABILITY": device.capability,
        "NUM_WARPS": spec.num_warps,
        "TILE_ROWS": of.case.stationary_rows(of.tile),
        "BY_KEYS": of.spec.owns_keys,
        "CAUSAL": problem.is_causal,
        "VARLEN": True,
        "SEQLENS_KV": problem.in_places,
        "IN_PLACES": problem.in_places,
    }
    assert problem.num_sequences is not None
    num_blocks = problem.num_sequences * ceil(of.num_tiles / (spec.num_warps * _WARP_TILES)) + 1  # the last one counts
    return KernelPlan(
        KernelCase(spec, problem.dtype, problem.head_dim), of.tile, config_text("float32", constants),
        LaunchShape(num_blocks, 32 * spec.num_warps, 0), of.num_tiles, packed_places=of.packed_places,
    )  # fmt: skip


def buffer(kernels: tuple[KernelPlan, ...]) -> Buffer:
    """The list, which one kernel after the other has."""
    return Buffer("packed_tiles", (2 * max((1 + kernel.packed_places for kernel in kernels if kernel.packed_places), default=0),), "int32")
