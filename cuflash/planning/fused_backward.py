"""The two ways to the gradients: one kernel with five products for dQ, dK and dV, or kernels of their own with seven or eight.

The fused kernel adds dQ up in global memory in a fixed order (kernels/tile/query_sums.cuh), so both ways give the same bits on every run. It takes 16-bit
types from sm_80 on, heads that are not cut into slices, and no features that hide tiles by data.

Which way a call takes, the first of these decides: a mapping of tiles that names a kernel of either way; a single tile, which is for those of their own;
CUFLASH_FUSED_BACKWARD=0; tables of tuned tiles, where both ways were timed on one call (`tuned_tiles.faster_way`); the timing model's prediction
(`predicted_backward`), if it knows both ways on this architecture, with this head_dim and these features; else the kernels of their own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import ceil

from cuflash.hardware.architectures import architecture
from cuflash.hardware.device import Device
from cuflash.planning import asked_for, predicted_backward, predicted_tiles, predicted_time, tile_choice
from cuflash.planning.asked_for import Choice
from cuflash.planning.block_order import L2_SHARE
from cuflash.planning.kernel_cases import KernelCase, case_of
from cuflash.planning.kernel_plan import Buffer, KernelPlan
from cuflash.planning.kernel_specs import (
    BACKWARD_DK,
    BACKWARD_DKDV,
    BACKWARD_DQ,
    BACKWARD_DQ_MASK,
    BACKWARD_DV,
    BACKWARD_FUSED,
    KernelSpec,
)
from cuflash.problem.problem import Problem
from cuflash.problem.tile import Tile, Tiles
from cuflash.system import switches

VARIABLE = "CUFLASH_FUSED_BACKWARD"
"""Environment variable; 0: never. Looked at when a call is planned, so not by calls whose like was made before."""

OF_THEIR_OWN = (BACKWARD_DKDV, BACKWARD_DK, BACKWARD_DV, BACKWARD_DQ, BACKWARD_DQ_MASK)
"""Kernels of the other way."""

_SLACK = 1.1
"""With it sections on an H100 are those that were fast there, of 32 MiB (docs/hopper.md)."""

_SIDE_BY_SIDE = {"sm_90": 16}
"""By architecture, where it is known: blocks of one head that run at one time and want the same tiles at about the same time, whatever L2 holds of the others. On an H100 8 of them were
within 1 % of sections that fit L2, 4 were 5 to 13 % slower (docs/hopper.md); more wait longer for each other to add to the first tile."""


def choose(problem: Problem, device: Device, tile: Tiles, others: Sequence[KernelSpec]) -> Choice:
    """Decide.

    Args:
        problem: the call.
        device: where.
        tile: as the caller pins it.
        others: the kernels of the other way that would run.

    Raises:
        OptionError: a value of the variable that is neither 0 nor 1.
    """
    if why_not(problem, device) is not None:
        return Choice(False)
    own, fused = " and ".join(kernel.name for kernel in others), BACKWARD_FUSED.name
    by_name = asked_for.named(BACKWARD_FUSED, tile, OF_THEIR_OWN)
    if by_name is not None:
        return Choice(by_name, f"{fused}, which the tile is for; {asked_for.SIMULATED}" if by_name else f"{own}, which the tile is for")
    if isinstance(tile, Tile):
        return Choice(False, f"{own}, which a single tile is for; a mapping may name {fused}")
    if switches.setting(VARIABLE) is False:
        return Choice(False, f"{own}, not {fused}, by {VARIABLE}=0")
    cases = [case_of(kernel, problem) for kernel in others]
    if (timed := asked_for.by_tables(([case_of(BACKWARD_FUSED, problem)], cases), (fused, own), problem, device)) is not None:
        return timed
    return _predicted(problem, device, cases, own)


def may_choose(problem: Problem, device: Device) -> bool:
    """Whether both ways can run, and nobody has ruled one out."""
    return why_not(problem, device) is None and switches.setting(VARIABLE) is not False


def _predicted(problem: Problem, device: Device, others: Sequence[KernelCase], own: str) -> Choice:
    """By the timing model."""
    case = case_of(BACKWARD_FUSED, problem)
    pin = f'pin it by tile={{"{case.kernel.name}": ...}}'
    lengths = "varlen" if problem.num_sequences is not None else "seqlens_kv"
    known_lengths = not problem.is_ragged or lengths in predicted_tiles.FUSED_WITH_FEATURE.get((device.arch, case.head_dim), ())
    known = known_lengths and tile_choice.known_tile(case, device) is not None
    if not known or not all(predicted_backward.is_known(of.kernel, problem, device) for of in (case, *others)):
        return Choice(False, f"{own}; {case.kernel.name} can run too, but nothing is predicted of it here: {pin}")
    fused = tile_choice.default_tile(case, device)
    if (much := too_much_memory(case, problem, fused)) is not None:
        return Choice(False, f"{own}; {much}: {pin}", True)
    ratio = time_ratio(problem, device, others)
    if ratio * predicted_backward.LEAST_GAIN <= 1.0:
        return Choice(True, f"{case.kernel.name}, predicted to take {ratio:.2f} of the time of {own}; {asked_for.SIMULATED}", True)
    return Choice(False, f"{own}; {case.kernel.name} is predicted to take {ratio:.2f} of their time here: {pin}", True)


def too_much_memory(case: KernelCase, problem: Problem, tile: Tile) -> str | None:
    """That the sums of dQ would take more memory than Q, out, dO and dQ together, in words; None where they do not."""
    needed = sums_bytes(problem, tile, case.head_dim)
    arrays = 2 * problem.itemsize * problem.query_rows * (problem.head_dim + problem.head_dim_v)
    return (
        None
        if needed <= arrays
        else f"the sums of {case.kernel.name} would take {needed / arrays:.3g} times the memory of Q, out, dO and dQ"
    )


def time_ratio(problem: Problem, device: Device, others: Sequence[KernelCase]) -> float:
    """Predicted time of the fused kernel and the conversion of its sums over that of the kernels of their own."""
    case = case_of(BACKWARD_FUSED, problem)
    fused = predicted_time.conversion_clocks(problem, device) + _clocks(case, problem, device, heads_together(problem, device))
    return fused / max(1.0, sum(_clocks(of, problem, device) for of in others))


def _clocks(case: KernelCase, problem: Problem, device: Device, section: int = 0) -> float:
    tile = tile_choice.default_tile(case, device)
    return predicted_backward.clocks(case, tile, problem, device, section)


def why_not(problem: Problem, device: Device) -> str | None:
    """What of a call the fused kernel cannot do, in words; None where it can run."""
    case = case_of(BACKWARD_FUSED, problem)
    if device.capability < 80:
        return f"it needs asynchronous copies, and this is {device.arch}"
    if case.dtype == "float32":
        return "it takes 16-bit types, and this is float32"
    if case.head_slices(device) > 1:
        return "it takes heads that are not cut into slices"
    if not problem.same_groups:
        return "key and value have gradients of different batches or heads"
    if problem.seqlen_kv == 0:
        return "there are no keys, whose blocks would add up dQ"
    return None if tile_choice.legal_tiles_for(case, device) else "no tile fits the registers and the shared memory"


def section_heads(problem: Problem, device: Device, group_heads: int, *, pairs: int) -> int:
    """K/V heads whose queries, dO and sums of dQ fit the part of L2 that is for what blocks walk over (`block_order.L2_SHARE`), or a little more; or
    with which enough blocks of each run side by side.

    A divisor of all `pairs` that is near enough: else the last section is a small one, whose long blocks start when there are no short ones left to fill the SMs beside them.
    """
    of_head = group_heads * problem.max_seqlen_q * (problem.itemsize * (problem.head_dim + problem.head_dim_v) + 4 * problem.head_dim)
    most = max(1, int(_SLACK * L2_SHARE * architecture(device.arch).l2_bytes) // max(1, of_head))
    if (side_by_side := _SIDE_BY_SIDE.get(device.arch)) is not None:
        most = max(most, device.num_sms // side_by_side)
    dividing = next(heads for heads in range(min(most, max(1, pairs)), 0, -1) if pairs % heads == 0)
    return dividing if 2 * dividing > most else most


def heads_together(problem: Problem, device: Device) -> int:
    """K/V heads of a section, no more than there are."""
    batch, _, heads, _ = problem.key_shape
    pairs = heads * (batch if problem.num_sequences is None else problem.sequences)
    return min(pairs, section_heads(problem, device, problem.num_heads_q // heads, pairs=pairs))


def workspace(problem: Problem, kernels: Iterable[KernelPlan]) -> tuple[Buffer, ...]:
    """Sums of dQ and turns of a fused kernel, as kernels/tile/query_sums.cuh lays them out; nothing without it."""
    for kernel in kernels:
        if kernel.spec.added_up:
            chains = max(1, kernel.splits.chains)
            return (
                Buffer("query_sums", (chains * sums_bytes(problem, kernel.tile, kernel.head_dim) // 4,), "float32"),
                Buffer("turns", (1 + chains * slots(problem, kernel.tile),), "int32"),
            )
    return ()


def sums_bytes(problem: Problem, tile: Tile, head_dim: int) -> int:
    """Of dQ in float32, tiles and columns rounded up."""
    return 4 * slots(problem, tile) * tile.tile_q * ceil(head_dim / 16) * 16


def slots(problem: Problem, tile: Tile) -> int:
    """Tiles of queries of all heads that have a sum; of packed sequences as many as there may be."""
    tiles = ceil(problem.seqlen_q / tile.tile_q)
    return problem.num_heads_q * (problem.batch * tiles if problem.num_sequences is None else tiles + problem.num_sequences)
