"""A small model of the hardware that orders tiles: registers that a kernel will need, and clocks for each (query, key) pair.

It was fitted to what the compiler made of a few hundred tiles (docs/log-compiler.md) and depends on nothing that varies from call to call, least of all on
sequence lengths.
"""

from __future__ import annotations

from cuflash.hardware.architectures import architecture
from cuflash.hardware.device import Device
from cuflash.hardware.occupancy import occupancy
from cuflash.planning.kernel_cases import KernelCase, accumulated, added_up_registers, multiply_adds, operand_bytes, row_bytes, shared_bytes
from cuflash.planning.tile_rules import MAX_REGISTERS, REGISTERS_PER_BLOCK
from cuflash.problem.tile import Tile


def estimate_registers(case: KernelCase, tile: Tile, device: Device) -> int:
    """Registers per thread that a kernel needs, fitted to what the compiler made of a few hundred tiles (docs/log-compiler.md).

    Scores count half as much again, for they are converted to the next product's operand while they live.
    """
    rows, streamed = case.warp_tile(tile, device)
    outputs, scores = accumulated(case, device)
    outputs //= case.sharing_warps(tile, device)
    estimate = rows * (outputs + 3 * scores * streamed // 2) // 32
    estimate = max(estimate, rows * outputs // 32 + added_up_registers(case, tile, device))
    estimate += rows // 4  # the A operand
    if case.uses_simt(device):
        estimate += 108
    elif case.dtype == "float32" and not case.allow_tf32:
        estimate += 100
    else:
        estimate += case.kernel.costs.registers
    estimate += _feature_registers(case)
    if (
        not case.kernel.backward
        and (case.dtype, device.capability) == ("float32", 90)
        and 240 < case.head_dim_v <= 256
        and tile.num_stages < 3
    ):
        estimate += 12  # with fewer stages the compiler also keeps addresses, and spills 4 to 8 bytes
    if device.capability < 80 and case.kernel.costs.streams_through_registers:
        chunks = case.streamed_rows(tile) * max(row_bytes(case, device)) // 16 // (32 * tile.num_warps)
        estimate += 8 * chunks if chunks <= 8 else 0
    return estimate


def _feature_registers(case: KernelCase) -> int:
    """What score features and masks take beyond the rest, where tiles that fit without them spilled with them."""
    costs, estimate = case.kernel.costs, 0
    if case.features.attn_mask == "bool" or case.features.pair_mask:
        estimate += costs.boolean_mask_registers
    if case.features.dropout and case.dtype == "float32" and not case.allow_tf32:
        estimate += costs.float32_dropout_registers
    return estimate


# Rates per SM and clock that are the same everywhere: exponentials, bytes of shared memory and of L2.
_EXP_RATE = 16
_SMEM_RATE = 128
_L2_RATE = 32
_BARRIER_CYCLES = 120
_SPILL_PENALTY = 4.0


def estimate_cycles(case: KernelCase, tile: Tile, device: Device, *, spills: bool = True) -> float:
    """Modelled clocks of one SM per (query, key) pair and head; only the order of tiles matters.

    Args:
        spills: False: as if no tile spilled registers, for those who find out by timing: tiles that the estimate takes to spill were among the fastest on an H100.

    Matrix products, traffic of shared memory and of L2, and exponentials with their neighbours overlap between the warps of an SM as far as there are warps to
    overlap; barriers and uncovered loads do not. Tiles that by the register estimate would spill come last.
    """
    kernel, costs = case.kernel, case.kernel.costs
    rows, streamed = case.stationary_rows(tile), case.streamed_rows(tile)

    mma_rate = float(architecture(device.arch).mma_rate)
    if case.uses_simt(device):
        mma_rate = 64.0
    elif case.dtype == "float32":
        mma_rate /= 2 if case.allow_tf32 else 6
    mma = multiply_adds(case, tile, device) / mma_rate

    # Per streamed tile: every warp reads each streamed operand of each product; stationary operands are read again too; the copy writes once.
    slices, pieces = case.head_slices(device), case.slice_pieces(device)
    row, row_v = (pieces * nbytes for nbytes in row_bytes(case, device))
    stationary_bytes, streamed_bytes = (pieces * nbytes for nbytes in operand_bytes(case, device))
    over_d, over_dv = kernel.products
    readers = 1 if kernel.warps_share == "streamed" else tile.num_warps // slices // case.sharing_warps(tile, device)
    traffic = readers * streamed * (over_d * row + over_dv * row_v) + rows * stationary_bytes + streamed * streamed_bytes
    if slices > 1:  # parts of scores are exchanged
        traffic += 4 * (slices + slices * slices) * len(kernel.scores) * rows * streamed
    smem = traffic / _SMEM_RATE

    issue_rate = architecture(device.arch).issue_rate
    scores = slices * rows * streamed
    split = 3.0 if case.dtype == "float32" and not case.allow_tf32 else 1.0
    instructions = scores * costs.instructions + split * traffic / 16
    if kernel.online_softmax:  # once per tile: O is rescaled, and the maximum of each row found across lanes
        instructions += rows * (case.columns(device)[1] + 40 * slices)
    other = scores / _EXP_RATE + instructions / issue_rate

    fetched = streamed + (
        rows if pieces > 1 or kernel.sums_scores else 0
    )  # what sums scores walks over heads, each of which has other rows
    l2 = fetched * streamed_bytes / _L2_RATE  # every block fetches every streamed tile: only more rows per block save traffic

    blocks = blocks_per_sm(case, tile, device)
    warps_per_scheduler = blocks * tile.num_warps / 4
    overlap = min(1.0, warps_per_scheduler / 3)
    busiest = max(mma, smem, other, l2)
    rest = mma + smem + other + l2 - busiest
    exposed = costs.barriers * _BARRIER_CYCLES
    if tile.num_stages == 1:
        exposed += costs.uncovered_cycles
    cycles = busiest + rest * (1 - 0.75 * overlap) + exposed / blocks
    if device.capability >= 80 and warps_per_scheduler < 1:
        cycles *= 1.5
    limit = min(MAX_REGISTERS, REGISTERS_PER_BLOCK // (32 * tile.num_warps))
    over = estimate_registers(case, tile, device) - limit
    if spills and over > 0:
        cycles *= _SPILL_PENALTY * (1 + over / 100)
    return cycles / (rows * streamed)


def blocks_per_sm(case: KernelCase, tile: Tile, device: Device) -> int:
    """As many as the estimated registers and shared memory allow; at least one, since a kernel of too many registers spills them."""
    registers = min(MAX_REGISTERS, estimate_registers(case, tile, device))
    held = occupancy(
        device,
        threads=32 * (tile.num_warps + case.kernel.copying_warps),
        registers=registers,
        shared_bytes=shared_bytes(case, tile, device),
    )
    return max(1, held.blocks)
