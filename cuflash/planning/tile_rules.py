"""Which tiles are legal: the rules that a device and a kernel set them, each in words."""

from __future__ import annotations

from dataclasses import fields
from math import ceil

from cuflash.arrays.descriptions import describe
from cuflash.hardware.device import Device
from cuflash.planning.kernel_cases import WIDEST_NARROW_HEAD, KernelCase, accumulated, accumulator_registers, head_dims, shared_bytes
from cuflash.planning.kernel_specs import MAX_TILE
from cuflash.problem.features import NO_FEATURES, FeatureSet
from cuflash.problem.tile import Tile

MAX_REGISTERS = 255
MAX_WARPS = 16
REGISTERS_PER_BLOCK = 65536


WGMMA_ARCH = "sm_90"
WGMMA_MAX_HEAD_DIM = 256
WGMMA_FLOAT32_MAX_HEAD_DIM = 128
WGMMA_MAX_HEAD_DIMS_TOGETHER = 192, 128
"""Of query and key, and of value, where one block has dK and dV."""
WGMMA_WIDE_MAX_HEAD_DIMS = 576, 512
"""The same of the forward kernel of wide heads."""
WGMMA_MAX_COLUMNS = 256
WGMMA_SLAB = 64
"""Columns of a tile that lie side by side in shared memory."""
WGMMA_REGISTERS = {8: 240, 12: 160}
"""Per thread, by warps of the tile, once the warps that copy have handed theirs on: mirrors COMPUTING_REGISTERS in kernels/tile/wgmma_block.cuh."""
_WGMMA_WIDE_REGISTERS = 232
"""The same of the forward kernel of wide heads: mirrors kernels/tile/wgmma_wide_block.cuh."""
_WGMMA_ORDER_REGISTERS = 8
"""That each warp which computes has less where dV is made in a kernel of its own: there warps that keep the order of dQ have more, and those that cut packed sequences."""
_WGMMA_OTHER_REGISTERS = 28  # besides accumulators and P; with four less, tiles spilled
_WGMMA_BESIDE_Q_REGISTERS = 32  # the same beside Q in registers; with one step more, tiles of 64 and 48 keys spilled
_WGMMA_CUT_REGISTERS = 8  # that the copying warp keeps of eight warps' 240 where something hides keys; a tile is legal whatever hides them
_WGMMA_TERMS_REGISTERS = 4  # of float32; without, tiles of 112 keys spilled
_WGMMA_SLABS_REGISTERS = 20  # the same where O has more than one slab; with fewer, tiles of 80 keys spilled
_WGMMA_SOFTCAP_REGISTERS = {8: 28, 12: 8}
_WGMMA_DROPOUT_REGISTERS = {8: 28, 12: 16}
_WGMMA_BACKWARD_DROPOUT_REGISTERS = 24
_WGMMA_SEGMENTS_REGISTERS = {8: 12, 12: 8}
_WGMMA_WIDE_SOFTCAP_REGISTERS, _WGMMA_WIDE_ALIBI_REGISTERS = 12, 16
_WGMMA_WIDE_DROPOUT_REGISTERS, _WGMMA_WIDE_SEGMENTS_REGISTERS = 25, 18
_WGMMA_WIDE_BOOLEAN_LOADS, _WGMMA_WIDE_DRAWS = 28, 25  # of a tile, and for each 16 keys five of draws, while nothing else waits
_WGMMA_WIDE_MASK_REGISTERS = {None: 0, "bool": 11, "float16": 14, "bfloat16": 14, "float32": 17}
_WGMMA_MASK_REGISTERS = {None: 0, "bool": 1, "float16": 1, "bfloat16": 1, "float32": 2}
"""Of a tile of a mask, for each four keys, unless the TMA unit copies it."""


def lacking(case: KernelCase, device: Device) -> str | None:
    """Why no tile of a kernel fits that does not take every case, in words; None where some may."""
    if case.kernel.column_groups > 1:
        if case.kv_dtype:
            return f"its keys and values have the type of queries, and these are {case.kv_dtype}"
        if max(case.head_dim, case.head_dim_v) <= WIDEST_NARROW_HEAD:
            return f"it is for heads above {WIDEST_NARROW_HEAD} columns, and this has {head_dims(case.head_dim, case.head_dim_v)}"
        if case.head_dim_v <= WGMMA_SLAB:
            return f"its warpgroups share out value's columns, more than {WGMMA_SLAB}, and these are {case.head_dim_v}"
    if case.features.pair_mask and (case.kernel.warps_share == "streamed" or case.kernel.implementation == "wgmma"):
        return "it knows one mask, and there is a boolean one beside an additive one"
    if case.kernel.warps_share == "streamed":
        if device.capability < 80:
            return f"it copies asynchronously, which sm_80 and later can, and this is {device.arch}"
        if case.dtype == "float32":
            return "it takes 16-bit types, and this is float32"
        if max(case.head_dim, case.head_dim_v) > WIDEST_NARROW_HEAD:
            return f"it takes a head_dim of at most {WIDEST_NARROW_HEAD}, and this is {head_dims(case.head_dim, case.head_dim_v)}"
    if case.kernel.implementation != "wgmma":
        return None
    if device.arch != WGMMA_ARCH:
        return f"its instructions are those of {WGMMA_ARCH}, and this is {device.arch}"
    if case.kernel.takes_terms:
        return _lacking_float32(case)
    if case.dtype == "float32":
        return "it takes 16-bit types, and this is float32"
    together = {"dK", "dV"} <= set(case.kernel.outputs)
    widest, widest_v = WGMMA_MAX_HEAD_DIMS_TOGETHER if together else (WGMMA_MAX_HEAD_DIM, WGMMA_MAX_HEAD_DIM)
    if case.kernel.column_groups > 1:
        widest, widest_v = WGMMA_WIDE_MAX_HEAD_DIMS
    if case.head_dim % 8 or case.head_dim_v % 8 or case.head_dim > widest or case.head_dim_v > widest_v:
        of_value = f", {widest_v} for value's" if widest_v != widest else ""
        return f"it takes multiples of 8 up to {widest} for head_dim{of_value}, and this is {head_dims(case.head_dim, case.head_dim_v)}"
    return None


def _lacking_float32(case: KernelCase) -> str | None:
    """The same of the forward kernel of wgmma for float32."""
    if case.dtype != "float32" or case.allow_tf32:
        return f"it is for float32 accuracy, and this is {'TF32' if case.allow_tf32 else case.dtype}"
    if max(case.head_dim, case.head_dim_v) > WGMMA_FLOAT32_MAX_HEAD_DIM:
        return f"it takes a head_dim of at most {WGMMA_FLOAT32_MAX_HEAD_DIM}, and this is {head_dims(case.head_dim, case.head_dim_v)}"
    if case.features != NO_FEATURES:
        return "it knows no score features and masks but the causal one"
    return None


def broken_rule(case: KernelCase, tile: Tile, device: Device) -> str | None:
    """The first rule that `tile` breaks on `device`, in words, or None when it is legal."""
    for field in fields(tile):
        count = getattr(tile, field.name)
        if type(count) is not int or not 1 <= count <= MAX_TILE:
            return f"{field.name} must be a positive int, got {describe(count)}"
    stationary, streamed = ("tile_kv", "tile_q") if case.kernel.owns_keys else ("tile_q", "tile_kv")
    if (cannot := lacking(case, device)) is not None:
        return cannot
    if case.kernel.block_warps and tile.num_warps not in case.kernel.block_warps:
        return f"num_warps must be {' or '.join(map(str, case.kernel.block_warps))}"
    if tile.num_warps > MAX_WARPS:
        return f"num_warps must be at most {MAX_WARPS}"
    slices = case.head_slices(device) * case.kernel.column_groups
    if tile.num_warps % slices:
        return f"num_warps must be a multiple of {slices}, the slices of the head"
    together = case.kernel.warps_per_product
    if tile.num_warps % (slices * together):
        return f"num_warps must be a multiple of {slices * together}, since {together} warps issue a product together"
    if case.kernel.warps_share == "streamed":
        if getattr(tile, stationary) % 16:
            return f"{stationary} must be a multiple of 16"
        if getattr(tile, streamed) not in (16 * tile.num_warps, 32 * tile.num_warps):
            return f"{streamed} must be 16 or 32 rows for each warp, {16 * tile.num_warps} or {32 * tile.num_warps}"
    elif case.kernel.added_up and tile.tile_kv * case.sharing_warps(tile, device) % (16 * tile.num_warps):
        shared = "or half, a quarter or an eighth of that where 2, 4 or 8 warps can share out tile_q and the columns, 16 or more to each"
        return f"tile_kv must be a multiple of 16 * num_warps = {16 * tile.num_warps}, {shared}"
    elif not case.kernel.added_up and getattr(tile, stationary) % (16 * tile.num_warps // slices):
        of_a_slice = f" / {slices} slices of the head" if slices > 1 else ""
        return f"{stationary} must be a multiple of 16 * num_warps{of_a_slice} = {16 * tile.num_warps // slices}"
    if getattr(tile, stationary) * slices > case.kernel.max_warp_rows * tile.num_warps:
        return f"{stationary} must be at most {case.kernel.max_warp_rows} rows for each warp"
    if getattr(tile, streamed) % case.kernel.streamed_multiple:
        return f"{streamed} must be a multiple of {case.kernel.streamed_multiple}"
    if device.capability < 80 and tile.num_stages != 1:
        return f"num_stages must be 1 on {device.arch}, which has no asynchronous copies"
    if case.slice_pieces(device) > 1 and tile.num_stages != 1:
        return f"num_stages must be 1 on {device.arch}, whose shared memory this head passes through in pieces"
    if case.kernel.added_up and case.kernel.implementation == "wgmma":
        if ceil(case.head_dim / WGMMA_SLAB) % 2 and tile.tile_q % 32 and tile.tile_q != 48:
            return (
                f"tile_q must be 48 or a multiple of 32 where two warpgroups share out the queries of the last {WGMMA_SLAB} columns of dQ"
            )
    elif case.kernel.added_up and not _shares_out(tile, case.columns(device)[0]):
        return f"the warps must share out tile_q x {case.columns(device)[0]} of dQ: 16 or 32 rows each, and 16 columns or a power of two times as many"
    if tile.num_stages < case.kernel.min_stages:
        return f"num_stages must be at least {case.kernel.min_stages}: copies run ahead of what is multiplied"
    if tile.num_stages > case.kernel.max_stages:
        if case.kernel.max_stages == 1:
            return "num_stages must be 1: this kernel copies its operands when it needs them"
        return f"num_stages must be at most {case.kernel.max_stages}"
    needed = shared_bytes(case, tile, device)
    if needed > device.shared_memory_per_block:
        return f"shared memory: {needed} bytes needed, {device.shared_memory_per_block} available on {device.arch}"
    limit = min(MAX_REGISTERS, REGISTERS_PER_BLOCK // (32 * tile.num_warps))
    needed = accumulator_registers(case, tile, device) + 24
    if case.kernel.implementation == "wgmma":
        if getattr(tile, streamed) > WGMMA_MAX_COLUMNS:
            return f"{streamed} must be at most {WGMMA_MAX_COLUMNS}, the columns of a wgmma and the rows of a TMA box"
        limit = _WGMMA_WIDE_REGISTERS if case.kernel.column_groups > 1 else WGMMA_REGISTERS[tile.num_warps]
        limit -= _WGMMA_ORDER_REGISTERS * (case.kernel.backward and not {"dK", "dV"} <= set(case.kernel.outputs))
        needed += _wgmma_registers(case, tile) - 24
        if case.kernel.takes_terms:  # beside O is the sum of one tile, a slab of it, and P is three terms
            columns = accumulated(case, device)[0]
            needed += case.warp_tile(tile, device)[0] * min(WGMMA_SLAB, columns) // 32 + tile.tile_kv // 2
            needed += _WGMMA_TERMS_REGISTERS + _WGMMA_SLABS_REGISTERS * (columns > WGMMA_SLAB)
    if needed > limit:
        return f"registers: at least {needed} per thread needed, {limit} available with {tile.num_warps} warps"
    return None


def _wgmma_registers(case: KernelCase, tile: Tile) -> int:
    """Registers per thread of a kernel of wgmma besides accumulators, by what spilled and what did not; forward, P lives beside the next scores."""
    features = case.features
    if case.kernel.backward:
        return _WGMMA_OTHER_REGISTERS + _wgmma_backward_registers(case, tile)
    if case.kernel.column_groups > 1:
        of_scores = _WGMMA_WIDE_SOFTCAP_REGISTERS * features.softcap + _WGMMA_WIDE_ALIBI_REGISTERS * features.alibi
        of_dropout = (_WGMMA_WIDE_DROPOUT_REGISTERS + tile.tile_kv // 8) * features.dropout
        of_mask, of_segments = _WGMMA_WIDE_MASK_REGISTERS[features.attn_mask], _WGMMA_WIDE_SEGMENTS_REGISTERS * features.segments
        if features.additive_mask:  # waits for the scores, and is added before segments are looked at
            of_data = max(of_mask + tile.tile_kv // 4 * _WGMMA_MASK_REGISTERS[features.attn_mask], of_segments)
        else:
            of_data = of_mask + of_segments
        loads = _WGMMA_WIDE_BOOLEAN_LOADS * (features.attn_mask == "bool")
        draws = (_WGMMA_WIDE_DRAWS + 5 * tile.tile_kv // 16) * features.dropout
        return tile.tile_kv // 4 + _WGMMA_OTHER_REGISTERS + max(max(of_scores, of_dropout) + of_data, loads, draws)
    of_features = _WGMMA_SOFTCAP_REGISTERS[tile.num_warps] * features.softcap + _WGMMA_DROPOUT_REGISTERS[tile.num_warps] * features.dropout
    of_features += _WGMMA_SEGMENTS_REGISTERS[tile.num_warps] * features.segments
    if tile.num_warps == 8:  # wide outputs, and the warp that copies keeps more where there are lists
        of_features += 28 * features.lists_tiles + 8 * (features.attn_mask is not None)
        of_features = max(of_features, _WGMMA_CUT_REGISTERS * (2 if case.head_dim_v > 192 else 1))  # these were found with 232
    if tile.num_warps == 12 and features.softcap and features != FeatureSet(softcap=True):
        of_features += 8  # with a second feature
    if case.maps_mask and features.segments:
        of_features += 12
    of_mask = 0 if case.maps_mask else _WGMMA_MASK_REGISTERS[features.attn_mask]
    return tile.tile_kv // 4 * (1 + of_mask) + _WGMMA_OTHER_REGISTERS + of_features


def q_register_steps(case: KernelCase, tile: Tile, device: Device) -> int:
    """How many steps of the depth of Q Kᵀ, 16 columns each, forward_wgmma has room for in registers, four per thread, so that products need not read them from shared memory.

    For two warpgroups with heads above 128 columns, whose products keep shared memory busy, and calls without features: with others there is less room.
    """
    if case.head_dim <= 128 or tile.num_warps != 8 or case.features != NO_FEATURES:
        return 0
    limit = WGMMA_REGISTERS[tile.num_warps] - _WGMMA_CUT_REGISTERS * case.is_causal
    free = limit - accumulator_registers(case, tile, device) - tile.tile_kv // 4 - _WGMMA_BESIDE_Q_REGISTERS
    return min(ceil(case.head_dim / 16), max(0, free // 4))


def key_register_steps(case: KernelCase, tile: Tile, device: Device) -> tuple[int, int]:
    """The same of K Qᵀ and V dOᵀ in the backward kernels of wgmma. Not for packed sequences, of which warps that copy have more registers.

    Of the kernel that makes dV alone in calls without features, and of the one that makes all gradients in calls with a single one, but a softcap, whose tiles leave room for K
    and for half of V; with several, or beside 128 queries, more spilled.
    """
    makes_all = bool(case.kernel.added_up) and "dV" in case.kernel.outputs
    if "dV" not in case.kernel.outputs or len(case.features.names()) != makes_all:
        return 0, 0
    free = WGMMA_REGISTERS[tile.num_warps] - accumulator_registers(case, tile, device) - _wgmma_registers(case, tile)
    room, of_keys, of_values = max(0, free // 4), ceil(case.head_dim / 16), ceil(case.head_dim_v / 16)
    if not makes_all:
        return min(of_keys, room), 0
    if case.features.softcap or tile.tile_q >= 128:
        return 0, 0
    return (of_keys, min(of_values, room - of_keys)) if room >= of_keys + of_values / 2 else (0, 0)


def _wgmma_backward_registers(case: KernelCase, tile: Tile) -> int:
    """What a backward kernel of wgmma has besides accumulators: where dV is made alone P of the tile before; the slope of a softcap, as large as the scores; draws."""
    of_values = 0 if case.kernel.added_up else tile.tile_q // 4
    of_slope = tile.tile_q // 2 * (case.features.softcap and bool(case.kernel.added_up))
    return of_values + of_slope + _WGMMA_BACKWARD_DROPOUT_REGISTERS * case.features.dropout


def _shares_out(tile: Tile, columns: int) -> bool:
    """Whether the warps can share out a tile of tile_q x columns: mirrors `column_groups` in kernels/tile/query_sum_parts.cuh."""
    for rows in (32, 16):
        groups, rest = divmod(tile.num_warps * rows, tile.tile_q)
        if tile.tile_q % rows == rest == 0 and columns // 16 % max(groups, 1) == 0 and groups & (groups - 1) == 0 and groups:
            return True
    return False
