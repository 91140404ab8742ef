"""The two ways to the gradients: one kernel with five products for dQ, dK and dV, or kernels of their own with seven or eight.

The fused kernel adds dQ up in global memory in a fixed order (kernels/tile/query_sums.cuh), so both ways give the same bits on every run. It takes 16-bit
types from sm_80 on, heads that are not cut into slices, and no features that hide tiles by data. Until it has run on a GPU it is asked for: by `tile`, which
names it, or by the environment variable CUFLASH_FUSED_BACKWARD=1, which takes it in the cases in which the timing model predicts that it is faster
(`predicted_tiles`), unless `tile` names kernels of the other way.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import ceil

from cuflash.hardware.architectures import architecture
from cuflash.hardware.device import Device
from cuflash.planning import asked_for, kernel_specs, tile_choice
from cuflash.planning.block_order import L2_SHARE
from cuflash.planning.kernel_cases import KernelCase
from cuflash.planning.kernel_plan import Buffer, KernelPlan
from cuflash.problem.problem import Problem
from cuflash.problem.tile import Tiles

VARIABLE = "CUFLASH_FUSED_BACKWARD"
"""Environment variable; 1: the fused kernel wherever it is predicted to be faster. Looked at when a call is planned, so not by calls whose like was made before."""

_SLACK = 1.1
"""With it sections on an H100 are those that were fast there, of 32 MiB (docs/hopper.md)."""

_OTHER_WAY = (kernel_specs.BACKWARD_DKDV, kernel_specs.BACKWARD_DK, kernel_specs.BACKWARD_DV, kernel_specs.BACKWARD_DQ)


def is_taken(case: KernelCase, device: Device, tile: Tiles, *, ragged: bool) -> bool:
    """Whether the fused kernel runs.

    Args:
        case: of the fused kernel.
        device: where.
        tile: as the caller pins it.
        ragged: sequences have lengths that only the device knows, whose kernels are not predicted.
    """
    if not is_possible(case, device):
        return False
    asked_by = asked_for.asked_by(case, device, tile, VARIABLE, _OTHER_WAY)
    return asked_by == "tile" or (asked_by == "variable" and not ragged and is_faster(case, device))


def is_possible(case: KernelCase, device: Device) -> bool:
    """Whether the fused kernel can run at all."""
    return why_not(case, device) is None


def why_not(case: KernelCase, device: Device) -> str | None:
    """What of a case the fused kernel cannot do, in words; None where it can run."""
    if device.capability < 80:
        return f"it needs asynchronous copies, and this is {device.arch}"
    if case.dtype == "float32":
        return "it takes 16-bit types, and this is float32"
    if case.head_slices(device) > 1:
        return "it takes heads that are not cut into slices"
    if case.features.lists_tiles:
        return "it walks over no lists of visible tiles, which a boolean mask and segments need"
    return None if tile_choice.legal_tiles_for(case, device) else "no tile fits the registers and the shared memory"


def explain(case: KernelCase, device: Device, *, taken: bool, same_groups: bool) -> str:
    """Which of the two ways is taken and why not the other, where there is a choice."""
    if taken:
        return f"{kernel_specs.BACKWARD_FUSED.name}, as asked for; it has not run on a GPU yet"
    if not same_groups or not is_possible(case, device):
        return ""
    how = f"by a tile of {kernel_specs.BACKWARD_FUSED.name}, or where it is predicted to be faster by {VARIABLE}=1"
    here = "which is so here" if is_faster(case, device) else "which is not so here"
    return f"kernels of their own for dQ and for dK and dV; {kernel_specs.BACKWARD_FUSED.name} can run too, but has not run on a GPU yet: ask for it {how}, {here}"


def is_faster(case: KernelCase, device: Device) -> bool:
    """Whether the timing model says so by 3 % at least (docs/performance.md)."""
    return tile_choice.known_tile(case, device) is not None


def section_heads(problem: Problem, device: Device, group_heads: int, *, pairs: int) -> int:
    """K/V heads whose queries, dO and sums of dQ fit the part of L2 that is for what blocks walk over (`block_order.L2_SHARE`), or a little more.

    A divisor of all `pairs` that is near enough: else the last section is a small one, whose long blocks start when there are no short ones left to fill the SMs beside them.
    """
    of_head = group_heads * problem.max_seqlen_q * (problem.itemsize * (problem.head_dim + problem.head_dim_v) + 4 * problem.head_dim)
    most = max(1, int(_SLACK * L2_SHARE * architecture(device.arch).l2_bytes) // max(1, of_head))
    dividing = next(heads for heads in range(min(most, max(1, pairs)), 0, -1) if pairs % heads == 0)
    return dividing if 2 * dividing > most else most


def workspace(problem: Problem, kernels: Iterable[KernelPlan]) -> tuple[Buffer, ...]:
    """Sums of dQ and turns of a fused kernel, as kernels/tile/query_sums.cuh lays them out; nothing without it."""
    for kernel in kernels:
        if kernel.spec.added_up:
            tiles = ceil(problem.seqlen_q / kernel.tile.tile_q)
            slots = problem.num_heads_q * (problem.batch * tiles if problem.num_sequences is None else tiles + problem.num_sequences)
            columns = ceil(kernel.head_dim / 16) * 16
            return (
                Buffer("query_sums", (slots * kernel.tile.tile_q * columns,), "float32"),
                Buffer("turns", (1 + slots,), "int32"),
            )
    return ()
