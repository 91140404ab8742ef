"""One kernel launch as it is planned, and the memory that a call allocates."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from typing import NamedTuple

from cuflash.hardware.device import Device
from cuflash.jit.compiler import CompileRequest
from cuflash.planning import tile_choice, tile_rules
from cuflash.planning.kernel_cases import KernelCase
from cuflash.planning.kernel_specs import WARP_ROWS, WARPGROUP_ROWS, KernelSpec
from cuflash.problem.cache_call import STREAM_K
from cuflash.problem.problem import DTYPES
from cuflash.problem.tile import Tile

_ITEMSIZES = {**DTYPES, "int32": 4}


@dataclass(frozen=True)
class Buffer:
    """Memory that a call allocates: a result, or workspace that is given back when its kernels have run. Only they write it.

    Attributes:
        name: of its address in the argument structs.
        shape: of a result in the caller's form.
        dtype: element type.
        is_zeroed: before the first kernel of each call.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    is_zeroed: bool = False

    @property
    def nbytes(self) -> int:
        """Its size."""
        return prod(self.shape) * _ITEMSIZES[self.dtype]


class LaunchShape(NamedTuple):
    """What the driver is told of a launch, besides function, arguments and stream.

    Attributes:
        num_blocks: of the one-dimensional grid.
        num_threads: of a block.
        shared_bytes: dynamic shared memory of a block.
    """

    num_blocks: int
    num_threads: int
    shared_bytes: int


class Splits(NamedTuple):
    """How keys are shared out among blocks, or of kernels whose blocks own keys, queries.

    Attributes:
        number: blocks for each sequence, key head and tile of queries; or for each tile of keys.
        tiles: key tiles of each; 0: a sequence's tiles are cut into `number` equal parts on the device.
        stream_k: all blocks have equal shares of the key tiles of all sequences instead (stream_k.py); `number` is 1.
        chains: of tiles of keys, each with sums of dQ of its own (query_splits.py); 0 where blocks do not share out queries.
    """

    number: int
    tiles: int = 0
    stream_k: bool = False
    chains: int = 0

    def __str__(self) -> str:
        """As `num_splits` of a call asks for them."""
        return STREAM_K if self.stream_k else str(self.number)

    @property
    def makes_parts(self) -> bool:
        """Another kernel merges what blocks give."""
        return self.number > 1 or self.stream_k


UNSPLIT = Splits(1)


class KeyShares(NamedTuple):
    """The last tiles of queries of a kernel whose blocks stay, of which blocks share out the keys (key_shares.py).

    Attributes:
        tiles: of queries, the last ones of all; 0 where one block has all keys of each.
        length: key tiles of each block's share, of those of all these tiles one behind the other.
    """

    tiles: int
    length: int


UNSHARED = KeyShares(0, 0)


@dataclass(frozen=True)
class KernelPlan:
    """One kernel launch.

    Attributes:
        case: which kernel, and for what it is compiled.
        tile: of a block; of a kernel without matrix products what it has of one.
        config: the text of `struct Config`.
        shape: of the launch.
        num_tiles: tiles that one (batch, head) is cut into.
        group_batch, group_heads: batches and query heads summed into one K/V gradient; 1 elsewhere.
        section_heads: (batch, head) pairs whose blocks are launched together, the longest first (block_order.py), or of the fused kernel K/V heads.
        num_work: tiles of all heads: a block for each, or blocks that stay and compute one after the other.
        counts_work: those take the next one from a counter, not at fixed strides.
        splits: of the keys among blocks, or of the queries.
        shares: of the keys of the last tiles of queries, where blocks stay.
        box_keys: keys of a streamed tile that the TMA unit copies at a time; 0: all.
        maps_out: the TMA unit stores the output.
        packed_places: of the list of tiles of packed sequences by which its blocks find their work (packed_tiles.py); 0: there is none.
        tile_by: where the tile is from, in words: pinned, tuned, measured, predicted or by the model; empty of a kernel without matrix products.
    """

    case: KernelCase
    tile: Tile
    config: str
    shape: LaunchShape
    num_tiles: int
    group_batch: int = 1
    group_heads: int = 1
    section_heads: int = 1
    num_work: int = 0
    counts_work: bool = False
    splits: Splits = UNSPLIT
    shares: KeyShares = UNSHARED
    box_keys: int = 0
    maps_out: bool = False
    packed_places: int = 0
    tile_by: str = field(default="", compare=False)

    @property
    def spec(self) -> KernelSpec:
        """The kernel."""
        return self.case.kernel

    @property
    def name(self) -> str:
        """Of the kernel."""
        return self.case.kernel.name

    @property
    def source(self) -> str:
        """File in kernels/."""
        return self.case.kernel.source

    @property
    def entry(self) -> str:
        """Name of the `extern "C"` function."""
        return self.case.kernel.entry

    @property
    def dtype(self) -> str:
        """Element type of query, key, value and the output."""
        return self.case.dtype

    @property
    def head_dim(self) -> int:
        """Of query and key."""
        return self.case.head_dim

    @property
    def head_dim_v(self) -> int:
        """Of value and the output; 0 of a kernel that has no value."""
        return self.case.head_dim_v

    @property
    def num_blocks(self) -> int:
        """Blocks of the one-dimensional grid."""
        return self.shape.num_blocks

    @property
    def num_threads(self) -> int:
        """Threads of a block."""
        return self.shape.num_threads

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a block."""
        return self.shape.shared_bytes

    @property
    def registers_at_launch(self) -> int:
        """Per thread of a kernel that has an SM for itself: all that there are. Mirrors FIRST_REGISTERS in kernels/tile/wgmma_block.cuh."""
        return tile_rules.REGISTERS_PER_BLOCK // self.num_threads // 8 * 8

    @property
    def box_rows(self) -> dict[str, int]:
        """Of the arrays that the TMA unit copies, how many rows at a time: those of a warpgroup of what a block owns, whole tiles of what it streams and of a mask,
        those of a warp of the output; 0: none, they are others' columns."""
        if not self.spec.maps_tensors:
            return {}
        rows: dict[str, int] = dict.fromkeys(self.spec.streamed, self.box_keys or self.case.streamed_rows(self.tile))
        if self.spec.splits_keys:  # its rows are of several heads
            return {**rows, "value": 0} if self.case.value_in_key else rows
        rows |= dict.fromkeys(self.spec.stationary, WARPGROUP_ROWS)
        rows |= {"attn_mask": self.tile.tile_q} if self.case.maps_mask else {}
        return rows | ({"mapped_out": WARP_ROWS} if self.maps_out else {})

    def request(self, device: Device) -> CompileRequest:
        """What to compile for `device`: a cubin for a GPU, PTX for the simulator."""
        if device.kind == "simulator":
            return CompileRequest(self.source, self.config, device.compile_arch, "ptx")
        tolerated = tile_choice.tolerated_spills(self.case, self.tile, device)
        return CompileRequest(self.source, self.config, device.compile_arch, "cubin", tolerated)
