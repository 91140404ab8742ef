"""What decides whether and how well a tile fits a kernel, besides the device: `KernelCase`, and the sizes that follow from it.

Shared memory is what the kernels assert, registers are those of accumulators alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import ceil
from typing import TypeVar

from cuflash.hardware.device import Device
from cuflash.planning import mapped_arrays
from cuflash.planning.kernel_specs import TERM_PRODUCTS, TERMS, KernelSpec, columns_of
from cuflash.problem.features import BESIDE, MASK_ITEMSIZES, NO_FEATURES, Features, FeatureSet
from cuflash.problem.problem import KV_DTYPES, Problem
from cuflash.problem.tile import Tile

WIDEST_NARROW_HEAD = 256  # wider heads are cut into slices (kernels/tile/slices.cuh)
_SLICE_COLUMNS = 288  # of the outputs, per group of warps
_SLICE_COLUMNS_FLOAT32 = 144

ROW_STATISTICS_BYTES = 8  # reference and delta of one query row, float32 each; with an additive mask 4 more for its log2_sum

_MBARRIER_BYTES = 8
_SLAB_COLUMNS = 64  # as in kernels/tile/slab_tile.cuh
_TILE_WORK_BYTES, _LIST_ENTRY_BYTES = 32, 8  # of each stage of Q and of K: `SharedMemory` in kernels/tile/wgmma_block.cuh
_MASK_PLACE_BYTES = 16  # likewise
_WGMMA_DS_BUFFERS = 2  # as in kernels/tile/wgmma_backward_block.cuh
_STATE_BYTES = 8  # of a softmax: reference and sum of one row, float32 each


_Found = TypeVar("_Found")


def _found_once(method: Callable[[KernelCase, Device], _Found]) -> Callable[[KernelCase, Device], _Found]:
    """The result for each device is kept with the case: a choice among a few hundred tiles asks thousands of times."""
    name = f"_{method.__name__}"

    @functools.wraps(method)
    def found(self: KernelCase, device: Device) -> _Found:
        kept: dict[Device, _Found] = self.__dict__.setdefault(name, {})
        try:
            return kept[device]
        except KeyError:
            kept[device] = method(self, device)
            return kept[device]

    return found


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
        kv_dtype: of key and value; empty: dtype too.
        maps_mask: the TMA unit copies the mask, which only some kernels and masks let it (`mapped_arrays`).
        mask_in_chunks: rows of the mask start on 16 bytes, and are whole chunks of 16 bytes; of kernels that copy masks by threads only.
        value_in_key: value is the first columns of key, and not streamed; of kernels whose warps share out columns only.
        is_causal: a causal mask hides keys; of kernels whose blocks stay only, of which tile and registers depend on it.
    """

    kernel: KernelSpec
    dtype: str
    head_dim: int
    allow_tf32: bool = False
    head_dim_v: int = 0
    features: FeatureSet = NO_FEATURES
    kv_dtype: str = ""
    maps_mask: bool = True
    mask_in_chunks: bool = True
    value_in_key: bool = False
    is_causal: bool = False

    def __post_init__(self) -> None:
        of_mask = mapped_arrays.MASK_BYTES.get(self.features.attn_mask or "", 0)
        is_mapped = self.maps_mask and self.kernel.maps_masks and of_mask > 0 and not (of_mask == 1 and self.features.segments)
        object.__setattr__(self, "maps_mask", is_mapped)
        is_copied = self.mask_in_chunks and self.kernel.copies_masks and self.features.attn_mask is not None
        object.__setattr__(self, "mask_in_chunks", is_copied and not (self.features.attn_mask == "bool" and self.features.segments))
        object.__setattr__(self, "is_causal", self.is_causal and self.kernel.stays)
        if self.kernel.is_tiled and not (self.head_dim_v and self.kernel.reads_value):
            object.__setattr__(self, "head_dim_v", self.head_dim)

    def uses_simt(self, device: Device) -> bool:
        """Whether products run on the ordinary float32 units: what Turing's tensor cores cannot take."""
        return device.capability == 75 and self.dtype != "float16"

    def smem_itemsize(self, device: Device) -> int:
        """Bytes per element in shared memory; of a term, where numbers are sums of them."""
        if self.kernel.takes_terms:
            return 2
        return 4 if self.dtype == "float32" or self.uses_simt(device) else 2

    def streamed_itemsize(self, device: Device) -> int:
        """The same of what is streamed."""
        return KV_DTYPES[self.kv_dtype] if self.kv_dtype else self.smem_itemsize(device)

    @_found_once
    def head_slices(self, device: Device) -> int:
        """Groups of warps that share out the columns of a wide head, so that their accumulators fit the registers; 1 for a narrow head, unless the shared memory
        does not hold the smallest tiles of all operands of a kernel that has many."""
        if self.kernel.column_groups > 1:  # another way to the same
            return 1
        if max(self.head_dim, self.head_dim_v) <= WIDEST_NARROW_HEAD and self._fits_narrow(device):
            return 1
        many_instructions = self.uses_simt(device) or self.dtype == "float32"
        columns = self.kernel.output_columns(self.head_dim, self.head_dim_v)
        return max(2, ceil(columns / (_SLICE_COLUMNS_FLOAT32 if many_instructions else _SLICE_COLUMNS)))

    def _fits_narrow(self, device: Device) -> bool:
        """Whether 16 rows of each operand of a narrow head fit the shared memory, rounded up to what chunks are exchanged within."""
        d, dv = (ceil(columns / 32) * 32 for columns in (self.head_dim, self.head_dim_v))
        operands = (*self.kernel.stationary, *self.kernel.streamed)
        nbytes = 16 * self.smem_itemsize(device) * sum(columns_of(name, d, dv) for name in operands)
        return len(operands) <= 4 or nbytes <= device.shared_memory_per_block

    @_found_once
    def slice_pieces(self, device: Device) -> int:
        """Pieces into which each slice is cut, so that the smallest tile fits the shared memory; 1 where it does anyway."""
        slices = self.head_slices(device)
        smallest = Tile(16, 16, slices, 1)
        for pieces in (1, 2, 4) if slices > 1 else ():
            if _shared_bytes(self, smallest, device, pieces) <= device.shared_memory_per_block:
                return pieces
        return 8 if slices > 1 else 1

    @_found_once
    def columns(self, device: Device) -> tuple[int, int]:
        """head_dim and head_dim_v as the kernel computes them: pieces are rounded up to what the matrix instructions take."""
        pieces = self.head_slices(device) * self.slice_pieces(device)
        piece, piece_v = _piece_columns(self, pieces)
        return pieces * piece, pieces * piece_v

    def copies_mask(self, device: Device) -> bool:
        """Whether the mask passes through shared memory, copied ahead by threads; slices of a wide head would copy it once each."""
        return self.mask_in_chunks and device.capability >= 80 and self.head_slices(device) == 1

    def stationary_rows(self, tile: Tile) -> int:
        """Rows that the block keeps, shared out among its warps."""
        return tile.tile_kv if self.kernel.owns_keys else tile.tile_q

    def streamed_rows(self, tile: Tile) -> int:
        """Rows of each tile that the block walks over."""
        return tile.tile_q if self.kernel.owns_keys else tile.tile_kv

    def warp_tile(self, tile: Tile, device: Device) -> tuple[int, int]:
        """Stationary and streamed rows whose scores a warp computes at a time."""
        stationary, streamed = self.stationary_rows(tile), self.streamed_rows(tile)
        if self.kernel.warps_share == "streamed":
            return stationary, streamed // tile.num_warps
        sharing = self.sharing_warps(tile, device)
        return stationary * sharing * self.kernel.column_groups * self.head_slices(device) // tile.num_warps, streamed // sharing

    def sharing_warps(self, tile: Tile, device: Device) -> int:
        """Warps that have the same keys, where scores meet in shared memory: as few as have 32 keys together, or 16; 1 where keys are not shared,
        and of a warpgroup, which computes a product together.

        They share out the queries of a tile, and the columns of outputs, 16 or more to each.
        """
        if not self.kernel.added_up or self.kernel.implementation == "wgmma":
            return 1
        keys = {}
        for sharing in (1, 2, 4, 8):
            rows, rest = divmod(tile.tile_kv * sharing, tile.num_warps)
            if not (
                rest
                or rows % 16
                or tile.num_warps % sharing
                or tile.tile_q % (16 * sharing)
                or any(columns // 16 % sharing for columns in self.columns(device))
            ):
                keys[sharing] = min(rows, 32)
        return max(keys, key=lambda sharing: keys[sharing], default=1)


def case_of(spec: KernelSpec, problem: Problem) -> KernelCase:
    """A kernel for a call."""
    features = problem.features.kinds if spec.drops else replace(problem.features.kinds, dropout=False)
    return KernelCase(
        spec, problem.dtype, problem.head_dim, problem.allow_tf32 and problem.dtype == "float32", problem.head_dim_v, features,
        problem.kv_dtype if problem.kv_dtype != problem.dtype else "", mapped_arrays.maps_mask(problem), masks_in_chunks(problem.features), problem.value_in_key and spec.column_groups > 1,
        problem.is_causal,
    )  # fmt: skip


def masks_in_chunks(features: Features) -> bool:
    """Whether rows of the mask of a call start on 16 bytes, and are whole chunks of 16 bytes."""
    mask = features.attn_mask
    if mask is None:
        return False
    nbytes = MASK_ITEMSIZES[mask.dtype]
    *others, stride_key = mask.strides
    return mask.aligned and stride_key == 1 and not any(number * nbytes % 16 for number in (*others, mask.extents[3]))


def columns_of_terms(head_dim: int) -> int:
    """Of a row whose numbers are sums of terms: whole slabs of each. Mirrors `columns_of_terms` in kernels/tile/wgmma_block.cuh."""
    return TERMS * ceil(head_dim / _SLAB_COLUMNS) * _SLAB_COLUMNS


def _piece_columns(case: KernelCase, pieces: int) -> tuple[int, int]:
    return ceil(case.head_dim / pieces / 16) * 16, ceil(case.head_dim_v / pieces / 16) * 16


def row_bytes(case: KernelCase, device: Device, slice_pieces: int = 0, itemsize: int = 0) -> tuple[int, int]:
    """Bytes of one row of a tile of Q or K and of V or dO in shared memory, one piece of each slice.

    Mirrors `SmemTile::ROW_BYTES` in kernels/tile/smem_tile.cuh, and the slabs of kernels/tile/slab_tile.cuh. `slice_pieces` and `itemsize` instead of the case's if they
    are not 0.
    """
    itemsize, slices = itemsize or case.smem_itemsize(device), case.head_slices(device)

    def pitch(columns: int) -> int:
        if case.kernel.takes_terms:
            return columns_of_terms(columns) * itemsize
        chunks = columns * itemsize // 16
        if case.kernel.maps_tensors:
            return ceil(chunks / 8) * 128
        return (ceil(chunks / 8) * 8 if itemsize == 4 else chunks) * 16

    piece, piece_v = _piece_columns(case, slices * (slice_pieces or case.slice_pieces(device)))
    return slices * pitch(piece), slices * pitch(piece_v)


def operand_bytes(case: KernelCase, device: Device, slice_pieces: int = 0) -> tuple[int, int]:
    """Bytes of one row of what a block keeps, and of what it streams, one piece of each slice."""
    kept, passing = row_bytes(case, device, slice_pieces), row_bytes(case, device, slice_pieces, case.streamed_itemsize(device))
    stationary = sum(columns_of(name, *kept) for name in case.kernel.stationary)
    return stationary, sum(columns_of(name, *passing) for name in case.kernel.streamed if not (name == "value" and case.value_in_key))


def shared_bytes(case: KernelCase, tile: Tile, device: Device) -> int:
    """Dynamic shared memory of a block; the kernels assert the same number."""
    nbytes = _shared_bytes(case, tile, device, case.slice_pieces(device), stationary_stages(case, tile, device))
    of_grad_out = grad_out_stages(case, tile, device)
    nbytes -= (tile.num_stages - of_grad_out) * tile.tile_q * row_bytes(case, device)[1]
    makes_values_alone = case.kernel.owns_keys and case.kernel.maps_tensors and "dK" not in case.kernel.outputs
    if of_grad_out < tile.num_stages or makes_values_alone:  # dO has mbarriers of its own
        nbytes += 2 * of_grad_out * _MBARRIER_BYTES
    return nbytes


def stationary_stages(case: KernelCase, tile: Tile, device: Device) -> int:
    """How many tiles of what blocks own are in shared memory: 2 of a kernel whose blocks copy the next one ahead, where they fit, else 1."""
    fits = case.kernel.stays and _shared_bytes(case, tile, device, case.slice_pieces(device), 2) <= device.shared_memory_per_block
    return 2 if fits else 1


def converts_sums(kernel: KernelSpec, problem: Problem) -> bool:
    """Whether blocks of the kernel make dQ of the sums to which they add last, so that no other kernel has to.

    With a causal mask alone those are of their own diagonal. Without one, the block of a head's last keys would have all of them; what else hides keys
    decides who adds last; and of more queries than keys some see none, or one block has many.
    """
    kinds = problem.features.kinds
    hides = kinds.window or kinds.prefix or kinds.lists_tiles or problem.is_ragged
    return (
        bool(kernel.added_up)
        and kernel.implementation == "wgmma"
        and problem.is_causal
        and not hides
        and problem.seqlen_q <= problem.seqlen_kv
    )


def conversion_bytes(problem: Problem) -> int:
    """Of making dQ of its sums: float32 is read, dQ is written."""
    return problem.query_rows * (4 + problem.itemsize) * problem.head_dim


def terms_bytes(problem: Problem) -> int:
    """Of splitting query, key and value into terms: float32 is read, terms are written."""
    rows_kv = problem.batch * problem.seqlen_kv * problem.num_heads_kv
    operands = ((problem.query_rows, problem.head_dim), (rows_kv, problem.head_dim), (rows_kv, problem.head_dim_v))
    return sum(rows * (4 * head_dim + 2 * columns_of_terms(head_dim)) for rows, head_dim in operands)


def grad_out_stages(case: KernelCase, tile: Tile, device: Device) -> int:
    """How many tiles of dO are in shared memory of a backward kernel of wgmma: as many as of Q. One that is done with dO early, since it makes no dV, has a single one
    where there is no room for more."""
    needs_all = "dV" in case.kernel.outputs or not (case.kernel.maps_tensors and case.kernel.owns_keys)
    return tile.num_stages if needs_all or _shared_bytes(case, tile, device, 1) <= device.shared_memory_per_block else 1


def _shared_bytes(case: KernelCase, tile: Tile, device: Device, slice_pieces: int, stationary_stages: int = 1) -> int:
    stationary, streamed = operand_bytes(case, device, slice_pieces)
    slices = case.head_slices(device)
    exchange = 4 * slices * len(case.kernel.scores) * tile.tile_q * tile.tile_kv if slices > 1 else 0
    statistics = 0
    if case.kernel.statistics and device.capability >= 80:  # sm_75 reads them from global memory
        statistics = ROW_STATISTICS_BYTES + 4 * case.features.additive_mask
    if case.kernel.added_up:
        buffers = _WGMMA_DS_BUFFERS if case.kernel.maps_tensors else len(case.kernel.scores)
        exchange += buffers * case.smem_itemsize(device) * tile.tile_q * tile.tile_kv
    if case.kernel.owns_keys and case.kernel.maps_tensors:
        exchange += (2 * tile.num_stages + 9) * _MBARRIER_BYTES + tile.num_stages * _staged_mask_bytes(case, tile)
    elif case.kernel.column_groups > 1:  # `SharedMemory` in kernels/tile/wgmma_wide_block.cuh
        rings = (2 if case.value_in_key else 3) * 2 * tile.num_stages + 3
        exchange += tile.tile_q * (ceil(tile.tile_kv / 64) * 128 + 4) + rings * _MBARRIER_BYTES
    elif case.kernel.maps_tensors:
        of_queries, of_keys = _TILE_WORK_BYTES + 2 * _MBARRIER_BYTES, _LIST_ENTRY_BYTES + 4 * _MBARRIER_BYTES
        exchange += stationary_stages * of_queries + tile.num_stages * of_keys + _MBARRIER_BYTES
        if case.maps_mask:
            row = ceil(tile.tile_kv * mapped_arrays.MASK_BYTES[case.features.attn_mask or ""] / 128) * 128
            exchange += tile.num_stages * tile.tile_q * row + _MASK_PLACE_BYTES
    in_flight = tile.num_stages * case.streamed_rows(tile) * (streamed + statistics)
    if case.copies_mask(device):  # kernels/tile/copied_mask.cuh
        exchange += tile.num_stages * tile.tile_q * tile.tile_kv * _mask_itemsize(case.features)
    if case.kernel.warps_share == "streamed":  # outputs of all warps take the place of what they streamed (kernels/tile/warp_parts.cuh)
        rows = tile.num_warps * case.stationary_rows(tile)
        in_flight = max(in_flight, rows * ceil(case.head_dim_v / 32) * 128)
        exchange += rows * _STATE_BYTES
    return stationary_stages * stationary * case.stationary_rows(tile) + in_flight + exchange


def _staged_mask_bytes(case: KernelCase, tile: Tile) -> int:
    """What each stage of the backward kernel of wgmma holds of a mask, segment ids and an entry of a list: mirrors kernels/tile/staged_mask.cuh."""
    features = case.features
    ids = 4 * (tile.tile_q + tile.tile_kv) * features.segments
    return _mask_itemsize(features) * tile.tile_q * tile.tile_kv + ids + _LIST_ENTRY_BYTES * features.lists_tiles


def _mask_itemsize(features: FeatureSet) -> int:
    """Bytes of an element of the mask, of the additive one where there are two; 0 without."""
    return 0 if features.attn_mask is None else MASK_ITEMSIZES[features.attn_mask.removeprefix(BESIDE)]


def multiply_adds(case: KernelCase, tile: Tile, device: Device) -> int:
    """In the matrix products of one tile of scores, padding of the columns included, and all products of terms."""
    over_d, over_dv = case.kernel.products
    columns, columns_v = case.columns(device)
    return (TERM_PRODUCTS if case.kernel.takes_terms else 1) * tile.tile_q * tile.tile_kv * (over_d * columns + over_dv * columns_v)


def accumulated(case: KernelCase, device: Device) -> tuple[int, int]:
    """Columns of the outputs, and how many score matrices, that a warp accumulates at a time."""
    slices = case.head_slices(device)
    d, dv = (columns // slices for columns in case.columns(device))
    outputs = case.kernel.output_columns(d, dv)
    if case.kernel.column_groups > 1:  # whole slabs of the first group: FIRST_COLUMNS in kernels/tile/wgmma_wide_block.cuh
        outputs = ceil(outputs / 64 / case.kernel.column_groups) * 64
    return outputs, len(case.kernel.scores) + case.kernel.sums_scores


def added_up_registers(case: KernelCase, tile: Tile, device: Device) -> int:
    """Registers per thread of a tile's part of what blocks add up among each other. They live when the scores do not any more."""
    columns = sum(columns_of(name, *case.columns(device)) for name in case.kernel.added_up)
    return tile.tile_q * columns // (32 * tile.num_warps)


def accumulator_registers(case: KernelCase, tile: Tile, device: Device) -> int:
    """Registers per thread that hold results of matrix products, all live at once."""
    rows, streamed = case.warp_tile(tile, device)
    outputs, scores = accumulated(case, device)
    sharing = case.sharing_warps(tile, device)
    return rows * outputs // sharing // 32 + max(rows * scores * streamed // 32, added_up_registers(case, tile, device))


def head_dims(head_dim: int, head_dim_v: int) -> str:
    """Both for people: "64", or "192/128" where value has its own."""
    return str(head_dim) if head_dim == head_dim_v else f"{head_dim}/{head_dim_v}"
