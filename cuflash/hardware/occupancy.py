"""How many blocks of a kernel an SM holds at a time, as the hardware allots registers, shared memory, warps and barriers."""

from __future__ import annotations

from dataclasses import dataclass

from cuflash.hardware.architectures import architecture
from cuflash.hardware.device import Device

# -------------------------------------------------------------------------------------------------------------------------------- occupancy

WARP_SIZE = 32
MAX_REGISTERS_PER_THREAD = 255
_REGISTER_GRANULARITY = 256  # registers, per warp
_SUB_PARTITIONS = 4  # of an SM, each with a quarter of its registers; the warps of a block are dealt out to all four


@dataclass(frozen=True)
class Occupancy:
    """How many blocks of a kernel an SM holds at a time.

    Attributes:
        blocks: thread blocks (CTAs); 0 means that the kernel cannot be launched.
        warps: warps of these blocks.
        max_warps: warps that the SM could hold.
        limiter: what allows no further block: "registers", "shared memory", "warps", "barriers" or "blocks".
    """

    blocks: int
    warps: int
    max_warps: int
    limiter: str


def occupancy(device: Device, *, threads: int, registers: int, shared_bytes: int, barriers: int = 0) -> Occupancy:
    """Blocks per SM as the hardware allots them, assuming that the driver gives shared memory its largest share of the L1 cache.

    Args:
        device: whose SM.
        threads: of a block.
        registers: per thread.
        shared_bytes: static and dynamic shared memory of a block.
        barriers: named barriers of a block.
    """
    limits = architecture(device.arch)
    warps = -(-threads // WARP_SIZE)
    allowed = {
        "registers": _blocks_by_registers(device.registers_per_sm, warps, registers),
        "shared memory": _blocks_by_shared_memory(device, shared_bytes),
        "warps": limits.warps // warps,
        "blocks": limits.blocks,
        "barriers": limits.barriers // barriers if limits.barriers and barriers else limits.blocks,
    }
    limiter = min(allowed, key=lambda resource: allowed[resource])
    blocks = allowed[limiter]
    return Occupancy(blocks, blocks * warps, limits.warps, limiter)


def _blocks_by_registers(registers_per_sm: int, warps: int, registers: int) -> int:
    """A warp's registers lie in one sub-partition, and a block takes room in all four as if its warps were a multiple of four."""
    if registers > MAX_REGISTERS_PER_THREAD:
        return 0
    registers_per_warp = _round_up(max(registers, 1) * WARP_SIZE, _REGISTER_GRANULARITY)
    if registers_per_warp * _round_up(warps, _SUB_PARTITIONS) > registers_per_sm:
        return 0
    warps_per_sub_partition = registers_per_sm // _SUB_PARTITIONS // registers_per_warp
    return warps_per_sub_partition * _SUB_PARTITIONS // warps


def _blocks_by_shared_memory(device: Device, shared_bytes: int) -> int:
    limits = architecture(device.arch)
    if shared_bytes > device.shared_memory_per_block:
        return 0
    allocated = _round_up(shared_bytes + limits.reserved_shared_bytes, limits.shared_granularity)
    return device.shared_memory_per_sm // allocated if allocated else limits.blocks


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
