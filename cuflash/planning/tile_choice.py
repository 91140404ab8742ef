"""Tiles for every case: the legal ones in order, the default, and a check of one that a caller pins.

The default is the measured tile where there is one, or that of the timing model, else the best by `tile_model`, so that any head dimension on any architecture has one.
A tile that a caller pins comes before it, and one from a table that was tuned on the GPU (`tuned_tiles`).
"""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, fields

from cuflash.arrays.descriptions import describe
from cuflash.errors import TileError
from cuflash.hardware.device import Device
from cuflash.planning import measured_tiles, predicted_tiles
from cuflash.planning.kernel_cases import KernelCase, head_dims
from cuflash.planning.kernel_specs import BACKWARD_FUSED, MAX_TILE, WARPGROUP_ROWS
from cuflash.planning.tile_model import blocks_per_sm, estimate_cycles
from cuflash.planning.tile_rules import broken_rule, lacking
from cuflash.problem.features import NO_FEATURES
from cuflash.problem.tile import Tile

_Key = tuple[str, str, int]
_Numbers = tuple[int, int, int, int]
_WithFeature = Mapping[_Numbers, frozenset[str]]

_PREDICTED = predicted_tiles.TILES | {
    (arch, BACKWARD_FUSED.name, head_dim): tile for (arch, head_dim), tile in predicted_tiles.FUSED_BACKWARD.items()
}

TOLERATED_SPILLS = 80
"""Where tiles are known: on an H100 those that spill as much were as fast or faster, and the timing model takes spills into account."""


def _candidates(case: KernelCase, device: Device) -> Iterator[Tile]:
    if case.kernel.warps_share == "streamed":
        for num_warps, rows, keys, num_stages in itertools.product((1, 2, 4, 8), (16, 32), (16, 32), (2, 3, 4)):
            yield Tile(rows, keys * num_warps, num_warps, num_stages)
        return
    # float32 products that are three of TF32 each and products on the ordinary units are many instructions each: longer tiles take seconds to compile. From sm_100 on the
    # compiler spills registers for them unless tiles are shortest and single, in the backward pass also few warps.
    many_instructions = case.uses_simt(device) or (case.dtype == "float32" and not case.allow_tf32 and case.kernel.implementation == "mma")
    shortest = many_instructions and device.capability >= 100
    longest = 16 if shortest else 32 if many_instructions else 128
    slices = case.head_slices(device)
    stage_counts = (1,) if device.capability < 80 or shortest or case.slice_pieces(device) > 1 else (1, 2, 3)
    few = (1, 2) if shortest and case.kernel.costs.small_blocks else (1, 2, 4, 8)
    for row_warps in case.kernel.block_warps or few:
        num_warps = row_warps * slices
        row_warps //= case.kernel.column_groups
        of_few_keys = {32, 64} if case.kernel.added_up else set()  # which warps may share
        for rows in sorted({16 * row_warps, 32 * row_warps} | of_few_keys):
            for streamed in (length for length in (16, 32, 48, 64, 80, 96, 112, 128) if length <= longest):
                for num_stages in stage_counts:
                    if case.kernel.owns_keys:
                        yield Tile(streamed, rows, num_warps, num_stages)
                    else:
                        yield Tile(rows, streamed, num_warps, num_stages)


def why_none(case: KernelCase, device: Device) -> str | None:
    """Why a kernel has no legal tile for a case, in words; None where it has one."""
    if (reason := lacking(case, device)) is not None:
        return reason
    return None if legal_tiles_for(case, device) else "no tile leaves room in the registers for all of these features"


@functools.lru_cache(maxsize=4096)
def legal_tiles_for(case: KernelCase, device: Device) -> tuple[Tile, ...]:
    """All tiles of the usual shapes that `device` takes, the known one first, then best by the model. Other legal ones exist, such as tile_q = 48."""
    first = known_tile(case, device)
    candidates = dict.fromkeys((*_candidates(case, device), *(() if first is None else (first,))))  # it may be of no usual shape
    legal = [tile for tile in candidates if broken_rule(case, tile, device) is None]

    def order(tile: Tile) -> tuple[float, ...]:
        return tile != first, estimate_cycles(case, tile, device), tile.tile_q, tile.tile_kv, tile.num_warps, tile.num_stages

    return tuple(sorted(legal, key=order))


def refusals(case: KernelCase, device: Device) -> Counter[str]:
    """How many tiles of the usual shapes each rule refuses, by what it is about: shared memory, registers, or the rule in words."""
    rules = (broken_rule(case, tile, device) for tile in _candidates(case, device))
    return Counter(rule.partition(":")[0] for rule in rules if rule is not None)


def worth_timing(case: KernelCase, device: Device) -> tuple[Tile, ...]:
    """All legal tiles of the usual shapes in the order in which they are worth being timed, the default first.

    It is that of `tile_model` without its punishment of tiles that may spill, which is right for a choice that nobody checks.
    """
    legal = legal_tiles_for(case, device)
    return (*legal[:1], *sorted(legal[1:], key=lambda tile: estimate_cycles(case, tile, device, spills=False)))


def measured_tile(case: KernelCase, device: Device) -> Tile | None:
    """The fastest tile where all were timed (`measured_tiles`), with features the fastest that leaves room for them, else None."""
    return _of_tables(measured_tiles.TILES, measured_tiles.WITH_FEATURE, case, device)


def _of_tables(plain: Mapping[_Key, _Numbers], with_feature: Mapping[_Key, _WithFeature], case: KernelCase, device: Device) -> Tile | None:
    """The tile of a case in a pair of tables. Tiles with features stand from the largest to the smallest; of those of several features it is the last."""
    if case.dtype == "float32" or case.head_dim != case.head_dim_v:
        return None
    key = device.arch, case.kernel.name, case.head_dim
    if case.features == NO_FEATURES:
        found = plain.get(key)
        return None if found is None else Tile(*found)
    fitting, kinds = with_feature.get(key, {}), _kinds(case)
    if not all(any(kind in alone for alone in fitting.values()) for kind in kinds):
        return None
    first = (next(tile for tile, alone in fitting.items() if kind in alone) for kind in kinds)
    return Tile(*max(first, key=list(fitting).index))


def _kinds(case: KernelCase) -> frozenset[str]:
    """The features that are used, a mask by its element type, and odd where the kernel copies others than this one."""
    odd = "odd " if case.kernel.copies_masks and not case.mask_in_chunks else ""
    return frozenset(odd + str(value) if name == "attn_mask" else name for name, value in asdict(case.features).items() if value)


def known_tile(case: KernelCase, device: Device) -> Tile | None:
    """The measured tile, else the one that the timing model found (`predicted_tiles`), else None."""
    return _known(case, device)[0]


def _known(case: KernelCase, device: Device) -> tuple[Tile | None, str]:
    """The known tile, and where it is from, in words."""
    if case.kernel.column_groups > 1:
        return _wide_tile(case, device), "as many keys as fit twice"
    if case.kernel.implementation == "wgmma":
        numbers = _wgmma_with_feature(case)
        if numbers is not None and broken_rule(case, Tile(*numbers), device) is None:
            return Tile(*numbers), "predicted by the timing model (predicted_tiles.py)"
        if (measured := _wgmma_tile(measured_tiles.TILES, case, device)) is not None:
            return measured, "from experiments with Hopper's instructions (measured_tiles.py)"
        return _wgmma_tile(predicted_tiles.WGMMA, case, device), "predicted by the timing model (predicted_tiles.py)"
    if case.kernel.splits_keys:
        return _split_tile(case, device), "as many warps and copies in flight as fit"
    if case.kernel.added_up:
        return _fused_tile(case, device), "predicted by the timing model (predicted_tiles.py)"
    if case.dtype == "float32":
        return _float32_tile(case, device), "predicted by the timing model (predicted_tiles.py)"
    measured = measured_tile(case, device)
    if measured is not None:
        return measured, "measured on an H100 (measured_tiles.py)"
    predicted = _of_tables(_PREDICTED, predicted_tiles.WITH_FEATURE, case, device)
    return predicted, "predicted by the timing model (predicted_tiles.py)"


def tolerated_spills(case: KernelCase, tile: Tile, device: Device) -> int:
    """Bytes that the compiler may spill in each thread: some with tiles that were measured without features or predicted, none with others."""
    untimed = case.features != NO_FEATURES and measured_tile(case, device) is not None
    return TOLERATED_SPILLS if case.kernel.implementation == "mma" and not untimed and tile == known_tile(case, device) else 0


def _wgmma_with_feature(case: KernelCase) -> _Numbers | None:
    """The predicted tile of a kernel of wgmma with one feature and its causal mask, or without one."""
    features = _kinds(case)
    wide = max(case.head_dim, case.head_dim_v)
    if case.kernel.backward:  # with several features the smallest of their tiles
        return min(
            (numbers for of in features if (numbers := predicted_tiles.WGMMA_WITH_FEATURE.get((case.kernel.name, wide, of)))), default=None
        )
    if len(features) != 1:
        return None
    key = case.kernel.name, wide, next(iter(features))
    if not case.is_causal and key in predicted_tiles.WGMMA_WITH_FEATURE_FULL:
        return predicted_tiles.WGMMA_WITH_FEATURE_FULL[key]
    return predicted_tiles.WGMMA_WITH_FEATURE.get(key)


def _wgmma_tile(of_kernels: Mapping[_Key, _Numbers], case: KernelCase, device: Device) -> Tile | None:
    """That of the next larger head_dim in a table, with fewer keys where a feature takes registers. The model knows nothing of wgmma."""
    wide = max(case.head_dim, case.head_dim_v)
    for (arch, name, head_dim), (tile_q, tile_kv, num_warps, num_stages) in sorted(of_kernels.items()):
        if (arch, name) == (device.arch, case.kernel.name) and head_dim >= wide:
            if case.kernel.owns_keys:
                most = num_stages + (case.features.dropout and bool(case.kernel.added_up))  # it takes registers, not shared memory
                shorter = (
                    Tile(count, tile_kv, num_warps, stages) for count in range(tile_q, 0, -16) for stages in range(most, num_stages - 1, -1)
                )
            else:
                shorter = (Tile(tile_q, count, num_warps, num_stages) for count in range(tile_kv, 0, -16))
            return next((tile for tile in shorter if broken_rule(case, tile, device) is None), None)
    return None


def _wide_tile(case: KernelCase, device: Device) -> Tile | None:
    """The most keys of which two tiles fit."""
    tiles = (Tile(WARPGROUP_ROWS, keys, 8, 2) for keys in (64, 48, 32, 16))
    return next((tile for tile in tiles if broken_rule(case, tile, device) is None), None)


def _float32_tile(case: KernelCase, device: Device) -> Tile | None:
    """The predicted one of calls without features to float32 accuracy."""
    found = predicted_tiles.FLOAT32.get((device.arch, case.kernel.name, case.head_dim))
    plain = case.features == NO_FEATURES and case.head_dim == case.head_dim_v and not case.allow_tf32
    return Tile(*found) if found is not None and plain else None


def _fused_tile(case: KernelCase, device: Device) -> Tile | None:
    """The predicted one without features, and with one of those with which it is predicted to be faster than the kernels in whose place it comes."""
    found = predicted_tiles.FUSED_BACKWARD.get((device.arch, case.head_dim))
    if found is None or case.dtype == "float32" or case.head_dim != case.head_dim_v:
        return None
    features, tile = _kinds(case), Tile(*found)
    fits = len(features) <= 1 and features <= predicted_tiles.FUSED_WITH_FEATURE.get((device.arch, case.head_dim), frozenset())
    return tile if fits and broken_rule(case, tile, device) is None else None


def _split_tile(case: KernelCase, device: Device) -> Tile | None:
    """As many warps as fit, up to four; of these the most stages of which an SM holds two blocks, so that one fetches while the other begins or ends."""
    for num_warps in (4, 2, 1):
        tiles = [Tile(16, 16 * num_warps, num_warps, stages) for stages in (4, 3, 2)]
        fitting = [tile for tile in tiles if broken_rule(case, tile, device) is None]
        if fitting:
            return next((tile for tile in fitting if blocks_per_sm(case, tile, device) > 1), fitting[-1])
    return None


def default_tile(case: KernelCase, device: Device) -> Tile:
    """The known tile or the best one by the model; every supported case has one."""
    tiles = legal_tiles_for(case, device)
    if not tiles:
        raise TileError(
            "tile", f"{case} on {device.name}", "a device whose shared memory holds the smallest tile", "Use a smaller head_dim."
        )
    return tiles[0]


def why_default(case: KernelCase, device: Device) -> str:
    """Where the default tile is from, in words."""
    known, words = _known(case, device)
    return f"the model of tiles, best of {len(legal_tiles_for(case, device))} legal ones" if known is None else words


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


def _distance(left: Tile, right: Tile) -> float:
    def ratio(a: object, b: object) -> float:
        if type(a) is not int or type(b) is not int or not 1 <= min(a, b) <= max(a, b) <= MAX_TILE:
            return 0.0
        return max(a, b) / min(a, b)

    return sum(ratio(getattr(left, field.name), getattr(right, field.name)) for field in fields(left))
