"""How much of a problem one thread block works on: the public tunables of a kernel. Which of them are legal, and which are best, is said in `planning/`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TypeAlias

from cuflash.arrays.descriptions import describe


@dataclass(frozen=True)
class Tile:
    """The tunables of one kernel.

    Attributes:
        tile_q: query rows that a block holds at a time.
        tile_kv: key rows that a block holds at a time.
        num_warps: warps of a block. In the forward and dQ kernels they share out tile_q, in kernels of dK and dV tile_kv, at least 16 rows each. Warps
            of forward_wgmma that do nothing but copy come on top.
        num_stages: tiles of the streamed operands in flight in shared memory; 1 on sm_75, which has no asynchronous copies.
    """

    tile_q: int
    tile_kv: int
    num_warps: int
    num_stages: int

    def transposed(self) -> Tile:
        """The same tile with the roles of queries and keys exchanged: from the dK/dV kernel's to the dQ kernel's."""
        return Tile(self.tile_kv, self.tile_q, self.num_warps, self.num_stages)

    def __str__(self) -> str:
        return ", ".join(f"{field.name}={describe(getattr(self, field.name))}" for field in fields(self))


Tiles: TypeAlias = Tile | Mapping[str, Tile] | None
"""What `tile=` takes: one tile; for the backward pass also a mapping from kernel names to tiles; or None for the defaults."""
