"""The table of architectures: what one multiprocessor (SM) of each can hold, and how fast it is, one row for each.

Limits come from the CUDA C++ Programming Guide, "Technical Specifications per Compute Capability", barriers and granularity from cuda_occupancy.h, rates from
"Arithmetic Instructions" there. What was measured, clock by clock and for cards that there are, is in `timing/machine.py`: this table is for choosing tiles
of any architecture, and changing a rate changes default tiles.
"""

from __future__ import annotations

from dataclasses import dataclass

KIB = 1024
MIB = 1024 * KIB


@dataclass(frozen=True)
class Architecture:
    """A row.

    Attributes:
        shared_memory_per_block: bytes that a block may opt in to.
        shared_memory_per_sm: bytes that the resident blocks of an SM share.
        num_sms: SMs of its largest common card.
        warps, blocks: that an SM holds at most.
        l2_bytes: of its common cards, the smallest that is not cut down. It decides an order of blocks and no result.
        mma_rate: dense multiply-adds per clock of an SM's tensor cores, 16-bit operands and float32 sums.
        barriers: named barriers of all blocks of an SM together; None where they are never what runs out.
        issue_rate: 32-bit instructions per clock of an SM.
        reserved_shared_bytes: per block, taken by the system.
        shared_granularity: bytes that a block's shared memory is rounded up to.
    """

    shared_memory_per_block: int
    shared_memory_per_sm: int
    num_sms: int
    warps: int
    blocks: int
    mma_rate: int
    l2_bytes: int
    barriers: int | None = None
    issue_rate: int = 128
    reserved_shared_bytes: int = KIB
    shared_granularity: int = 128


TABLE: dict[str, Architecture] = {
    "sm_75": Architecture(64 * KIB, 64 * KIB, 40, 32, 16, 512, 4 * MIB, issue_rate=64, reserved_shared_bytes=0, shared_granularity=256),
    "sm_80": Architecture(163 * KIB, 164 * KIB, 108, 64, 32, 1024, 40 * MIB, issue_rate=64),
    "sm_86": Architecture(99 * KIB, 100 * KIB, 84, 48, 16, 256, 6 * MIB),
    "sm_87": Architecture(163 * KIB, 164 * KIB, 16, 48, 16, 512, 4 * MIB),
    "sm_89": Architecture(99 * KIB, 100 * KIB, 142, 48, 24, 256, 72 * MIB),
    "sm_90": Architecture(227 * KIB, 228 * KIB, 132, 64, 32, 1024, 50 * MIB, barriers=64),
    "sm_100": Architecture(227 * KIB, 228 * KIB, 148, 64, 32, 1024, 126 * MIB, barriers=64),
    "sm_103": Architecture(227 * KIB, 228 * KIB, 148, 64, 32, 1024, 126 * MIB, barriers=64),
    "sm_120": Architecture(99 * KIB, 100 * KIB, 170, 48, 24, 256, 96 * MIB, barriers=24),
    "sm_121": Architecture(99 * KIB, 100 * KIB, 48, 48, 24, 256, 24 * MIB, barriers=24),
}


def architecture(arch: str) -> Architecture:
    """The row of an architecture; that of sm_90 for a GPU that the table does not know."""
    return TABLE.get(arch, TABLE["sm_90"])
