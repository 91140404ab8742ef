"""Shared-memory tiles: the rules that a device sets them, and a good default for every case.

What the rules need to know about a kernel is in `KernelCase`: which kernel, which
element type, how wide a row is. The default comes from a small model of the hardware (`estimate_cycles`), not from a table, so that any head
dimension on any architecture has one; it depends on nothing that varies from call to call, least of all on sequence lengths.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, fields
from math import ceil

from cuflash import measured_tiles
from cuflash.arrays import describe
from cuflash.device import Device
from cuflash.errors import TileError
from cuflash.features import NO_FEATURES, FeatureSet
from cuflash.kernel_specs import KernelSpec, columns_of
from cuflash.tile import Tile

MAX_REGISTERS = 255
MAX_WARPS = 16
REGISTERS_PER_BLOCK = 65536

WIDEST_NARROW_HEAD = 256  # wider heads are cut into slices (kernels/tile/slices.cuh)
_SLICE_COLUMNS = 288  # of the outputs, per group of warps
_SLICE_COLUMNS_FLOAT32 = 144

_ROW_STATISTICS_BYTES = 8  # reference and delta of one query row, float32 each; with an additive mask 4 more for its log2_sum


@dataclass(frozen=True)
class KernelCase:
    """What decides whether and how well a tile fits, besides the device.

    Attributes:
        kernel: which kernel.
        dtype: "float16", "bfloat16" or "float32".
        head_dim: of query and key, 1 … 576.
        allow_tf32: one TF32 product instead of three for float32.
        head_dim_v: of value and output, 1 … 576; 0 stands for head_dim, and so does whatever is given for a tiled kernel that reads neither.
        features: score features and masks, some of which take registers.
    """

    kernel: KernelSpec
    dtype: str
    head_dim: int
    allow_tf32: bool = False
    head_dim_v: int = 0
    features: FeatureSet = NO_FEATURES

    def __post_init__(self) -> None:
        if self.kernel.is_tiled and not (self.head_dim_v and self.kernel.reads_value):
            object.__setattr__(self, "head_dim_v", self.head_dim)

    def uses_simt(self, device: Device) -> bool:
        """Whether products run on the ordinary float32 units: what Turing's tensor cores cannot take."""
        return device.capability == 75 and self.dtype != "float16"

    def smem_itemsize(self, device: Device) -> int:
        """Bytes per element in shared memory."""
        return 4 if self.dtype == "float32" or self.uses_simt(device) else 2

    def head_slices(self, device: Device) -> int:
        """Groups of warps that share out the columns of a wide head, so that their accumulators fit the registers; 1 for a narrow head."""
        if max(self.head_dim, self.head_dim_v) <= WIDEST_NARROW_HEAD:
            return 1
        many_instructions = self.uses_simt(device) or self.dtype == "float32"
        columns = self.kernel.output_columns(self.head_dim, self.head_dim_v)
        return max(2, ceil(columns / (_SLICE_COLUMNS_FLOAT32 if many_instructions else _SLICE_COLUMNS)))

    def head_steps(self, device: Device) -> int:
        """Pieces into which each slice is cut, so that the smallest tile fits the shared memory; 1 where it does anyway."""
        slices = self.head_slices(device)
        smallest = Tile(16, 16, slices, 1)
        for steps in (1, 2, 4) if slices > 1 else ():
            if _shared_bytes(self, smallest, device, steps) <= device.shared_memory_per_block:
                return steps
        return 8 if slices > 1 else 1

    def columns(self, device: Device) -> tuple[int, int]:
        """head_dim and head_dim_v as the kernel computes them: pieces are rounded up to what the matrix instructions take."""
        pieces = self.head_slices(device) * self.head_steps(device)
        piece, piece_v = _piece_columns(self, pieces)
        return pieces * piece, pieces * piece_v

    def stationary_rows(self, tile: Tile) -> int:
        """Rows that the block keeps, shared out among its warps."""
        return tile.tile_kv if self.kernel.owns_keys else tile.tile_q

    def streamed_rows(self, tile: Tile) -> int:
        """Rows of each tile that the block walks over."""
        return tile.tile_q if self.kernel.owns_keys else tile.tile_kv


def _piece_columns(case: KernelCase, pieces: int) -> tuple[int, int]:
    return ceil(case.head_dim / pieces / 16) * 16, ceil(case.head_dim_v / pieces / 16) * 16


def row_bytes(case: KernelCase, device: Device, steps: int = 0) -> tuple[int, int]:
    """Bytes of one row of a tile of Q or K and of V or dO in shared memory, one piece of each slice.

    Mirrors `SmemTile::ROW_BYTES` in kernels/tile/smem_tile.cuh. `steps` instead of `case.head_steps` if it is not 0.
    """
    itemsize, slices = case.smem_itemsize(device), case.head_slices(device)

    def pitch(columns: int) -> int:
        chunks = columns * itemsize // 16
        return (ceil(chunks / 8) * 8 if itemsize == 4 else chunks) * 16

    piece, piece_v = _piece_columns(case, slices * (steps or case.head_steps(device)))
    return slices * pitch(piece), slices * pitch(piece_v)


def _operand_bytes(case: KernelCase, device: Device, steps: int = 0) -> tuple[int, int]:
    """Bytes of one row of what a block keeps, and of what it streams, one piece of each slice."""
    rows = row_bytes(case, device, steps)
    kept, streamed = (sum(columns_of(name, *rows) for name in names) for names in (case.kernel.kept, case.kernel.streamed))
    return kept, streamed


def shared_bytes(case: KernelCase, tile: Tile, device: Device) -> int:
    """Dynamic shared memory of a block; the kernels assert the same number."""
    return _shared_bytes(case, tile, device, case.head_steps(device))


def _shared_bytes(case: KernelCase, tile: Tile, device: Device, steps: int) -> int:
    kept, streamed = _operand_bytes(case, device, steps)
    slices = case.head_slices(device)
    exchange = 4 * slices * len(case.kernel.scores) * tile.tile_q * tile.tile_kv if slices > 1 else 0
    statistics = 0
    if case.kernel.statistics and device.capability >= 80:  # sm_75 reads them from global memory
        statistics = _ROW_STATISTICS_BYTES + 4 * case.features.additive_mask
    return kept * case.stationary_rows(tile) + tile.num_stages * case.streamed_rows(tile) * (streamed + statistics) + exchange


def multiply_adds(case: KernelCase, tile: Tile, device: Device) -> int:
    """In the matrix products of one tile of scores, padding of the columns included."""
    over_d, over_dv = case.kernel.products
    columns, columns_v = case.columns(device)
    return tile.tile_q * tile.tile_kv * (over_d * columns + over_dv * columns_v)


def _products(case: KernelCase, device: Device) -> tuple[int, int]:
    """Columns of the outputs, and how many score matrices, that a warp accumulates at a time."""
    slices = case.head_slices(device)
    d, dv = (columns // slices for columns in case.columns(device))
    return case.kernel.output_columns(d, dv), len(case.kernel.scores) + case.kernel.sums_scores


def accumulator_registers(case: KernelCase, tile: Tile, device: Device) -> int:
    """Registers per thread that hold results of matrix products, all live at once."""
    rows = case.stationary_rows(tile) * case.head_slices(device) // tile.num_warps
    outputs, scores = _products(case, device)
    return rows * (outputs + scores * case.streamed_rows(tile)) // 32


def estimate_registers(case: KernelCase, tile: Tile, device: Device) -> int:
    """Registers per thread that a kernel needs, fitted to what the compiler made of a few hundred tiles (docs/performance.md).

    Scores count half as much again, for they are converted to the next product's operand while they live.
    """
    rows = case.stationary_rows(tile) * case.head_slices(device) // tile.num_warps
    outputs, scores = _products(case, device)
    estimate = rows * (outputs + 3 * scores * case.streamed_rows(tile) // 2) // 32
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
    if case.features.attn_mask == "bool":
        estimate += costs.boolean_mask_registers
    if case.features.dropout and case.dtype == "float32" and not case.allow_tf32:
        estimate += costs.split_dropout_registers
    return estimate


_MAX_COUNT = 2**20  # of anything in a tile; what is possible is far less


def broken_rule(case: KernelCase, tile: Tile, device: Device) -> str | None:
    """The first rule that `tile` breaks on `device`, in words, or None when it is legal."""
    for field in fields(tile):
        count = getattr(tile, field.name)
        if type(count) is not int or not 1 <= count <= _MAX_COUNT:
            return f"{field.name} must be a positive int, got {describe(count)}"
    stationary, streamed = ("tile_kv", "tile_q") if case.kernel.owns_keys else ("tile_q", "tile_kv")
    if tile.num_warps > MAX_WARPS:
        return f"num_warps must be at most {MAX_WARPS}"
    slices = case.head_slices(device)
    if tile.num_warps % slices:
        return f"num_warps must be a multiple of {slices}, the slices of the head"
    if getattr(tile, stationary) % (16 * tile.num_warps // slices):
        of_a_slice = f" / {slices} slices of the head" if slices > 1 else ""
        return f"{stationary} must be a multiple of 16 * num_warps{of_a_slice} = {16 * tile.num_warps // slices}"
    if getattr(tile, streamed) % 16:
        return f"{streamed} must be a multiple of 16"
    if device.capability < 80 and tile.num_stages != 1:
        return f"num_stages must be 1 on {device.arch}, which has no asynchronous copies"
    if case.head_steps(device) > 1 and tile.num_stages != 1:
        return f"num_stages must be 1 on {device.arch}, whose shared memory this head passes through in steps"
    if tile.num_stages > case.kernel.max_stages:
        if case.kernel.max_stages == 1:
            return "num_stages must be 1: this kernel copies its operands when it needs them"
        return f"num_stages must be at most {case.kernel.max_stages}"
    needed = shared_bytes(case, tile, device)
    if needed > device.shared_memory_per_block:
        return f"shared memory: {needed} bytes needed, {device.shared_memory_per_block} available on {device.arch}"
    limit = min(MAX_REGISTERS, REGISTERS_PER_BLOCK // (32 * tile.num_warps))
    needed = accumulator_registers(case, tile, device) + 24
    if needed > limit:
        return f"registers: at least {needed} per thread needed, {limit} available with {tile.num_warps} warps"
    return None


def _candidates(case: KernelCase, device: Device) -> Iterator[Tile]:
    # Split float32 products and products on the ordinary units are many instructions each: longer tiles take seconds to compile. From sm_100 on the
    # compiler spills registers for them unless tiles are shortest and single, in the backward pass also few warps.
    many_instructions = case.uses_simt(device) or (case.dtype == "float32" and not case.allow_tf32)
    shortest = many_instructions and device.capability >= 100
    longest = 16 if shortest else 32 if many_instructions else 128
    slices = case.head_slices(device)
    stages = (1,) if device.capability < 80 or shortest or case.head_steps(device) > 1 else (1, 2, 3)
    for row_warps in (1, 2) if shortest and case.kernel.costs.small_blocks else (1, 2, 4, 8):
        num_warps = row_warps * slices
        for warp_rows in (16, 32):
            for streamed in (length for length in (16, 32, 48, 64, 80, 96, 112, 128) if length <= longest):
                for num_stages in stages:
                    rows = row_warps * warp_rows
                    if case.kernel.owns_keys:
                        yield Tile(streamed, rows, num_warps, num_stages)
                    else:
                        yield Tile(rows, streamed, num_warps, num_stages)


@functools.lru_cache(maxsize=4096)
def legal_tiles_for(case: KernelCase, device: Device) -> tuple[Tile, ...]:
    """All tiles of the usual shapes that `device` takes, the measured one first, then best by the model. Other legal ones exist, such as tile_q = 48."""
    legal = [tile for tile in _candidates(case, device) if broken_rule(case, tile, device) is None]
    first = measured_tile(case, device)

    def order(tile: Tile) -> tuple[float, ...]:
        return tile != first, estimate_cycles(case, tile, device), tile.tile_q, tile.tile_kv, tile.num_warps, tile.num_stages

    return tuple(sorted(legal, key=order))


def measured_tile(case: KernelCase, device: Device) -> Tile | None:
    """The fastest tile where all were timed (`measured_tiles`), else None."""
    if case.dtype == "float32" or case.head_dim != case.head_dim_v or case.features != NO_FEATURES:
        return None
    found = measured_tiles.TILES.get((device.arch, case.kernel.name, case.head_dim))
    return None if found is None else Tile(*found)


def default_tile(case: KernelCase, device: Device) -> Tile:
    """The measured tile or the best one by the model; every supported case has one."""
    tiles = legal_tiles_for(case, device)
    if not tiles:
        raise TileError(
            "tile", f"{case} on {device.name}", "a device whose shared memory holds the smallest tile", "Use a smaller head_dim."
        )
    return tiles[0]


def check_tile(case: KernelCase, tile: Tile, device: Device, argument: str = "tile") -> Tile:
    """Return `tile` if it is legal for `case` on `device`, else raise `TileError` with the broken rule and the nearest legal tiles."""
    if not isinstance(tile, Tile):
        raise TileError(argument, describe(tile), "a cuflash.Tile", "Write cuflash.Tile(tile_q=64, tile_kv=64, num_warps=4, num_stages=2).")
    rule = broken_rule(case, tile, device)
    if rule is None:
        return tile
    nearest = sorted(legal_tiles_for(case, device), key=lambda legal: _distance(legal, tile))[:3]
    listed = "; ".join(f"Tile({legal})" for legal in nearest)
    raise TileError(
        argument,
        f"Tile({tile})",
        f"a tile that fits {case.kernel} with {case.dtype}, head_dim {head_dims(case.head_dim, case.head_dim_v)}: {rule}",
        f"Nearest legal tiles: {listed}.",
    )


def head_dims(head_dim: int, head_dim_v: int) -> str:
    """Both for people: "64", or "192/128" where value has its own."""
    return str(head_dim) if head_dim == head_dim_v else f"{head_dim}/{head_dim_v}"


def _distance(left: Tile, right: Tile) -> float:
    def ratio(a: object, b: object) -> float:
        if type(a) is not int or type(b) is not int or not 1 <= min(a, b) <= max(a, b) <= _MAX_COUNT:
            return 0.0
        return max(a, b) / min(a, b)

    return sum(ratio(getattr(left, field.name), getattr(right, field.name)) for field in fields(left))


# --- The model ----------------------------------------------------------------------------------------------------------------------------

# Rates per SM and clock: dense multiply-adds of mma.sync with 16-bit operands and float32 sums, exponentials, 32-bit instructions.
_MMA_RATE = {75: 512, 80: 1024, 86: 256, 87: 512, 89: 256, 90: 1024, 100: 1024, 103: 1024, 120: 256, 121: 256}
_EXP_RATE = 16
_ISSUE_RATE = {75: 64, 80: 64}
_SMEM_RATE = 128
_L2_RATE = 32
_BARRIER_CYCLES = 120
_SPILL_PENALTY = 4.0


def estimate_cycles(case: KernelCase, tile: Tile, device: Device) -> float:
    """Modelled clocks of one SM per (query, key) pair and head; only the order of tiles matters.

    Matrix products, traffic of shared memory and of L2, and exponentials with their neighbours overlap between the warps of an SM as far as there are warps to
    overlap; barriers and uncovered loads do not. Tiles that by the register estimate would spill come last.
    """
    kernel, costs = case.kernel, case.kernel.costs
    rows, streamed = case.stationary_rows(tile), case.streamed_rows(tile)

    mma_rate = float(_MMA_RATE.get(device.capability, 1024))
    if case.uses_simt(device):
        mma_rate = 64.0
    elif case.dtype == "float32":
        mma_rate /= 2 if case.allow_tf32 else 6
    mma = multiply_adds(case, tile, device) / mma_rate

    # Per streamed tile: every warp reads each streamed operand of each product; stationary operands are read again too; the copy writes once.
    slices, steps = case.head_slices(device), case.head_steps(device)
    row, row_v = (steps * nbytes for nbytes in row_bytes(case, device))
    kept_bytes, streamed_bytes = (steps * nbytes for nbytes in _operand_bytes(case, device))
    over_d, over_dv = kernel.products
    traffic = tile.num_warps // slices * streamed * (over_d * row + over_dv * row_v) + rows * kept_bytes + streamed * streamed_bytes
    if slices > 1:  # parts of scores are exchanged
        traffic += 4 * (slices + slices * slices) * len(kernel.scores) * rows * streamed
    smem = traffic / _SMEM_RATE

    issue_rate = _ISSUE_RATE.get(device.capability, 128)
    scores = slices * rows * streamed
    split = 3.0 if case.dtype == "float32" and not case.allow_tf32 else 1.0
    instructions = scores * costs.instructions + split * traffic / 16
    if kernel.online_softmax:  # once per tile: O is rescaled, and the maximum of each row found across lanes
        instructions += rows * (case.columns(device)[1] + 40 * slices)
    other = scores / _EXP_RATE + instructions / issue_rate

    fetched = streamed + (rows if steps > 1 else 0)
    l2 = fetched * streamed_bytes / _L2_RATE  # every block fetches every streamed tile: only more rows per block save traffic

    blocks = _blocks_per_sm(case, tile, device)
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
    if over > 0:
        cycles *= _SPILL_PENALTY * (1 + over / 100)
    return cycles / (rows * streamed)


def _blocks_per_sm(case: KernelCase, tile: Tile, device: Device) -> int:
    reserved = 1024 if device.capability >= 80 else 0
    by_smem = device.shared_memory_per_sm // (shared_bytes(case, tile, device) + reserved)
    registers = min(MAX_REGISTERS, ceil(estimate_registers(case, tile, device) / 8) * 8)
    by_registers = device.registers_per_sm // (registers * 32 * tile.num_warps)
    return max(1, min(by_smem, by_registers, 16))
