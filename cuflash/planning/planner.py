"""From a problem and a device to the kernels that will run: which, with which constants, in which grid, with how much memory.

Pure but for tables of tuned tiles, which it reads: nothing here touches a GPU, CuPy or a compiler, so a plan can be made for any architecture anywhere, and
printed.

Memory beyond inputs and outputs is O(S): the forward pass needs none, but where blocks of `forward_wgmma` count their tiles four bytes, and where blocks
share out keys (`split_forward`, `key_shares`) their partial outputs, and of float32 on Hopper's own instructions 6 bytes for each element of query, key and
value (`operand_terms`), and of more than 1024 keys O of each block; the backward pass eight bytes per query row and head, with an additive mask twelve, and where one kernel makes all gradients
(`fused_backward`, `wgmma_backward`) another four for each element of dQ; where blocks share out queries (`query_splits`) a bounded number of times that, of
dK and of dV. With a boolean mask or segments, the lists of visible tiles take four bytes for each pair of tiles.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace
from math import ceil

from cuflash.arrays.descriptions import describe
from cuflash.errors import TileError, UnsupportedError
from cuflash.hardware.device import Device
from cuflash.planning import (
    block_order,
    cache_append,
    fused_backward,
    kernel_cases,
    kernel_specs,
    key_shares,
    mapped_arrays,
    mask_gradient,
    operand_terms,
    packed_tiles,
    query_splits,
    split_forward,
    tile_choice,
    tile_model,
    tile_rules,
    tuned_tiles,
    wgmma_backward,
    wgmma_forward,
    wide_forward,
)
from cuflash.planning.asked_for import Choice
from cuflash.planning.codegen import config_text
from cuflash.planning.kernel_cases import KernelCase, case_of
from cuflash.planning.kernel_constants import Launch, constants_of
from cuflash.planning.kernel_plan import UNSHARED, UNSPLIT, Buffer, KernelPlan, LaunchShape
from cuflash.planning.kernel_specs import KernelSpec
from cuflash.planning.plan import Plan
from cuflash.problem.features import NO_FEATURES
from cuflash.problem.problem import Problem
from cuflash.problem.tile import Tile, Tiles
from cuflash.system import switches

MAX_GRID = 2**31 - 1
MAX_SHARED_SLICES = 5  # of a wide head, beyond which dK and dV take a kernel each


def make_plan(problem: Problem, device: Device, *, backward: bool = False, tile: Tiles = None) -> Plan:
    """Choose kernels, tiles and grids.

    Args:
        problem: what to compute.
        device: where.
        backward: gradients instead of the output.
        tile: None for the default tiles. For the backward pass a single tile is meant for the dK/dV kernel, and the dQ kernel takes it with tile_q
            and tile_kv exchanged, backward_row_sums not at all; for the forward pass it is not for few queries; a mapping pins kernels by name, such as {"backward_dq": Tile(...)}, and with them
            which of the ways to the gradients is taken (`wgmma_backward`, `fused_backward`), or which forward kernel (`wgmma_forward`, `split_forward`).

    Raises:
        TileError: `tile` is not legal here, or names a kernel that does not run.
        UnsupportedError: more blocks than a grid can have.
    """
    kernels: tuple[KernelPlan, ...] = ()
    choice = ""
    if not problem.is_empty:
        tiled, choice = (_explained_backward if backward else _explained_forward)(problem, device, tile)
        check_names(tile, tiled, choice)
        planned = [kernel for kernel in (tiled_kernel(spec, problem, device, tile) for spec in tiled) if kernel.num_blocks]
        if problem.features.kinds.lists_tiles:
            with_lists = [
                (_visible_tiles_kernel(kernel, problem, device), kernel) if kernel.spec.walks_lists else (kernel,) for kernel in planned
            ]
            planned = [kernel for launched in with_lists for kernel in launched]
        planned = packed_tiles.with_lists(planned, problem, device)
        if any(spec.takes_terms for spec in tiled):
            planned.insert(0, operand_terms.kernel(problem, device))
        if backward:
            fused = next((kernel for kernel in planned if kernel.spec.added_up), None)
            planned.insert(0, _delta_kernel(problem, device, clears_turns=fused is not None))
            if fused is not None and (fused.splits.chains or not kernel_cases.converts_sums(fused.spec, problem)):
                converting = packed_tiles.with_lists([_convert_kernel(fused, problem, device)], problem, device)
                planned[planned.index(fused) + 1 : planned.index(fused) + 1] = converting
            for split in [kernel for kernel in planned if kernel.spec.shares_queries and kernel.splits.chains]:
                planned.insert(planned.index(split) + 1, _dkdv_merge_kernel(split, problem, device))
            if problem.features.kinds.sinks:
                planned.append(_sinks_kernel(problem, device))
        elif any(spec.splits_keys for spec in tiled):
            planned[:0] = cache_append.kernels(tiled[0], problem, device)
            planned += [merging for kernel in planned for merging in split_forward.merging_kernels(kernel, problem, device)]
        kernels = tuple(planned)
    for kernel in kernels:
        most = MAX_GRID - kernel.num_blocks if kernel.spec.stays else MAX_GRID  # a block that stays counts a stride further, with a sign
        if max(kernel.num_blocks, kernel.num_work) > most:
            hint = "Split the call along the batch."
            raise UnsupportedError(
                "query", f"{max(kernel.num_blocks, kernel.num_work)} tiles over batch and heads", f"at most {most}", hint
            )
    outputs = _gradients(problem) if backward else _results(problem)
    return Plan(problem, device, backward, kernels, outputs, _workspace(problem, kernels), choice)


def forward_kernels(problem: Problem, device: Device, tile: Tiles = None) -> tuple[KernelSpec, ...]:
    """The tiled kernel that makes the output; or its tangent, with an additive mask after the kernel that makes sums of rows of huge scores."""
    return _explained_forward(problem, device, tile)[0]


def _explained_forward(problem: Problem, device: Device, tile: Tiles) -> tuple[tuple[KernelSpec, ...], str]:
    """The same, and why that kernel and not another; nothing where there is no choice."""
    if problem.of_tangents:
        rows = (kernel_specs.BACKWARD_ROW_SUMS,) if problem.features.kinds.additive_mask else ()
        return (*rows, kernel_specs.FORWARD_JVP), ""
    of_wide = wide_forward.choose(problem, device, tile)
    if of_wide is not None and of_wide.is_taken:
        return (kernel_specs.FORWARD_WGMMA_WIDE,), of_wide.why
    words = split_forward.explain(problem, device, tile)
    if split_forward.is_taken(problem, device, tile):
        split_forward.check(problem, device, of_wide.why if of_wide is not None else "")
        return (kernel_specs.FORWARD_SPLIT,), words
    if of_wide is not None:
        return (kernel_specs.FORWARD,), of_wide.why
    choice = wgmma_forward.choose(problem, device, tile)
    kernel = wgmma_forward.kernel(problem) if choice.is_taken else kernel_specs.FORWARD
    return (kernel,), "; ".join(filter(None, (words, choice.why)))


def backward_kernels(problem: Problem, device: Device, tile: Tiles = None) -> tuple[KernelSpec, ...]:
    """The tiled kernels that make the gradients.

    All come from one kernel where that is possible and faster (`wgmma_backward`, `fused_backward`), or asked for. Otherwise dK and dV come from one kernel
    where the accumulators of both fit the registers and they are summed over the same heads and batches.
    """
    return _explained_backward(problem, device, tile)[0]


def _explained_backward(problem: Problem, device: Device, tile: Tiles) -> tuple[tuple[KernelSpec, ...], str]:
    """The same, and why these and not others; nothing where there is no choice."""
    fused, wgmma = backward_choices(problem, device, tile)
    gradients = wgmma_backward.kernels(problem)
    if not wgmma.is_taken:
        gradients = (kernel_specs.BACKWARD_FUSED,) if fused.is_taken else kernels_of_their_own(problem, device)
    words = [wgmma.why] if wgmma.is_taken else [wgmma.why, fused.why]
    before = (kernel_specs.BACKWARD_ROW_SUMS,) if problem.features.kinds.additive_mask else ()
    if problem.features.need_attn_mask_grad:
        own = kernels_of_their_own(problem, device)
        gradients, of_mask = mask_gradient.choose(problem, device, tile, gradients, own)
        words.append(of_mask)
    return (*before, *gradients), "; ".join(filter(None, words))


def backward_choices(problem: Problem, device: Device, tile: Tiles = None) -> tuple[Choice, Choice]:
    """Between one kernel of mma.sync for all gradients and kernels of their own, and between one of wgmma and what that gives."""
    own = kernels_of_their_own(problem, device)
    fused = fused_backward.choose(problem, device, tile, own)
    others = (kernel_specs.BACKWARD_FUSED,) if fused.is_taken else own
    return fused, wgmma_backward.choose(problem, device, tile, others)


def kernels_of_their_own(problem: Problem, device: Device) -> tuple[KernelSpec, ...]:
    if problem.same_groups and not separates_dkdv(case_of(kernel_specs.BACKWARD_DKDV, problem), device):
        return kernel_specs.BACKWARD_DKDV, kernel_specs.BACKWARD_DQ
    return kernel_specs.BACKWARD_DV, kernel_specs.BACKWARD_DK, kernel_specs.BACKWARD_DQ


def other_ways(problem: Problem, device: Device, *, backward: bool) -> tuple[dict[str, Tile], ...]:
    """Tiles that pin other kernels for a call than it takes by itself, where there are choices that tables of tuned tiles may make; of each other way one."""
    if backward:
        present = backward_kernels(problem, device)
        others = [wgmma_backward.kernels(problem)[0]] if wgmma_backward.may_choose(problem, device) else []
        others += [kernel_specs.BACKWARD_FUSED] if fused_backward.may_choose(problem, device) else []
        others += [kernel_specs.BACKWARD_DQ] if others else []
        if others and problem.features.need_attn_mask_grad and mask_gradient.why_not(problem) is None:
            others.append(kernel_specs.BACKWARD_DQ_MASK)
        if wgmma_backward.kernels(problem)[0] in present and switches.setting(wgmma_backward.VARIABLE):
            others = []
    else:
        present = forward_kernels(problem, device)
        others = [wgmma_forward.kernel(problem)] if wgmma_forward.may_choose(problem, device) else []
        others += [kernel_specs.FORWARD_WGMMA_WIDE] if wide_forward.may_choose(problem, device) else []
        others += [kernel_specs.FORWARD_SPLIT] if split_forward.may_choose(problem, device) else []
        others += [kernel_specs.FORWARD] if others else []
    ways = []
    for spec in (spec for spec in others if spec not in present):
        case = case_of(spec, problem)
        ways.append(
            {spec.name: split_forward.default_tile(problem, device) if spec.splits_keys else tile_choice.default_tile(case, device)}
        )
    return tuple(ways)


def ruled_out(problem: Problem, device: Device, *, backward: bool) -> dict[str, str]:
    """Kernels that a call cannot have at all, and why; those that it only does not take are in the plan's choice."""
    if problem.is_empty:
        return {}
    found: dict[str, str | None]
    if backward:
        reason = fused_backward.why_not(problem, device)
        of_wgmma = {kernel.name: wgmma_backward.why_not(problem, device) for kernel in wgmma_backward.kernels(problem)}
        found = {**of_wgmma, kernel_specs.BACKWARD_FUSED.name: reason}
        if kernel_specs.BACKWARD_DKDV not in kernels_of_their_own(problem, device) and reason is not None:
            found[kernel_specs.BACKWARD_DKDV.name] = (
                "the accumulators of dK and dV do not fit the registers together, or are summed over different heads"
            )
    else:
        found = {
            wgmma_forward.kernel(problem).name: wgmma_forward.why_not(problem, device),
            kernel_specs.FORWARD_WGMMA_WIDE.name: wide_forward.why_not(problem, device),
        }
    return {name: reason for name, reason in found.items() if reason is not None}


@functools.lru_cache(maxsize=4096)
def separates_dkdv(case: KernelCase, device: Device) -> bool:
    """Whether no tile of the joint dK/dV kernel fits the registers with room to spare, or too many warps would compute the same exponentials."""
    if tile_choice.known_tile(case, device) is not None:
        return False
    legal = tile_choice.legal_tiles_for(case, device)
    return (
        not legal
        or case.head_slices(device) > MAX_SHARED_SLICES
        or tile_model.estimate_registers(case, legal[0], device) > tile_rules.MAX_REGISTERS
    )


def check_names(tile: Tiles, kernels: tuple[KernelSpec, ...], choice: str = "") -> None:
    """A mapping pins kernels that run, no others; `choice` says why they do."""
    names = [kernel.name for kernel in kernels]
    for name in tile if isinstance(tile, Mapping) else ():
        if name not in names:
            raise TileError(
                "tile",
                f"a tile for {describe(name)}",
                "kernels that run: " + ", ".join(names) + (f" ({choice})" if choice else ""),
                "Correct the name, or remove it; print(plan) lists the kernels.",
            )


def tiled_kernel(spec: KernelSpec, problem: Problem, device: Device, pinned: Tiles) -> KernelPlan:
    """The launch of one kernel with matrix products, its tile as `pinned` says or the default."""
    case = case_of(spec, problem)
    tile, tile_by = _choose_tile(case, problem, device, pinned)
    shared_bytes = kernel_cases.shared_bytes(case, tile, device)
    of_out = kernel_cases.out_bytes(case, tile) if spec.maps_outputs and mapped_arrays.maps_out(problem) else 0
    maps_out = 0 < of_out <= device.shared_memory_per_block - shared_bytes
    shared_bytes += of_out * maps_out
    splits = UNSPLIT
    if spec.splits_keys:
        splits = split_forward.splits_of(case, problem, tile, device)
    elif spec.shares_queries:
        splits = query_splits.choose(case, tile, problem, device)
    constants = constants_of(Launch(case, tile, splits, shared_bytes, maps_out, problem, device))
    shape = LaunchShape(0, 32 * (tile.num_warps + spec.copying_warps), shared_bytes)
    kernel = KernelPlan(case, tile, config_text(problem.dtype, constants), shape, 0, splits=splits, maps_out=maps_out, tile_by=tile_by)
    return (_with_grid_of_splits if spec.splits_keys else _with_grid)(kernel, problem, device)


def _with_grid(kernel: KernelPlan, problem: Problem, device: Device) -> KernelPlan:
    """A kernel with its blocks: one for each tile of each head, or as many as stay."""
    spec, case, tile, splits = kernel.spec, kernel.case, kernel.tile, kernel.splits
    batch, heads, num_tiles = _owned(case, tile, problem)
    group_batch, group_heads = problem.batch // batch, problem.num_heads_q // heads
    if problem.num_sequences is not None:
        batch, num_tiles = problem.num_sequences + 1, max(1, num_tiles)  # blocks of one more fill what lies behind the last
    places = 0 if splits.chains else packed_tiles.places(problem, device, case, tile, num_tiles=num_tiles, heads=heads)
    if places:
        batch, section = 1, packed_tiles.section_heads(case, problem, device, heads)
    elif spec.added_up:
        section = fused_backward.section_heads(problem, device, group_heads, pairs=batch * heads)
    else:
        resident = tile_model.blocks_per_sm(case, tile, device) * device.num_sms
        section = block_order.section_heads(case, problem, device, pairs=batch * heads, resident_blocks=resident)
    num_work = (places or num_tiles) * heads * batch * splits.number
    num_blocks = min(num_work, device.num_sms) if spec.stays else num_work
    shares = UNSHARED
    if spec.shares_keys and not key_shares.works_differ(problem):
        shares = key_shares.choose(num_work, ceil(problem.seqlen_kv / tile.tile_kv), device)
        num_blocks = max(num_blocks, key_shares.num_blocks(shares, ceil(problem.seqlen_kv / tile.tile_kv)))
    return replace(
        kernel, shape=kernel.shape._replace(num_blocks=num_blocks), num_tiles=num_tiles, group_batch=group_batch, group_heads=group_heads,
        section_heads=section, num_work=num_work, counts_work=num_work > num_blocks and key_shares.works_differ(problem), shares=shares,
        packed_places=places,
    )  # fmt: skip


def _with_grid_of_splits(kernel: KernelPlan, problem: Problem, device: Device) -> KernelPlan:
    """The same of a kernel that shares out keys among blocks, each of which has rows of all heads that share a key head."""
    case, tile, splits = kernel.case, kernel.tile, kernel.splits
    num_tiles = split_forward.owned_row_tiles(problem, tile)
    num_blocks = split_forward.num_blocks(splits, problem, case, tile, device)
    box_keys, section = 0, 1
    if case.kernel.maps_tensors:
        box_keys = wide_forward.box_keys(problem, tile)
        if splits.number == 1:
            pairs = num_blocks // num_tiles
            section = max(1, block_order.section_heads(case, problem, device, pairs=pairs, resident_blocks=device.num_sms))
    shape = kernel.shape._replace(num_blocks=num_blocks)
    return replace(kernel, shape=shape, num_tiles=num_tiles, section_heads=section, box_keys=box_keys)


def _owned(case: KernelCase, tile: Tile, problem: Problem) -> tuple[int, int, int]:
    """Batches and heads of the array whose rows blocks own, and tiles that one head of it is cut into."""
    if case.kernel.rows_of == "attn_mask":  # blocks own tiles of its gradient, and sum over the axes that it is broadcast along
        assert problem.features.attn_mask is not None
        batch, heads, rows, columns = problem.features.attn_mask.extents
        return batch, heads, ceil(rows / tile.tile_q) * ceil(columns / tile.tile_kv)
    shapes = {"query": problem.query.shape, "key": problem.key_shape, "value": problem.value_shape}
    batch, _, heads, _ = shapes[case.kernel.rows_of]
    seqlen = problem.owned_keys if case.kernel.owns_keys else problem.owned_queries
    return batch, heads, ceil(seqlen / case.stationary_rows(tile))


def _choose_tile(case: KernelCase, problem: Problem, device: Device, pinned: Tiles) -> tuple[Tile, str]:
    """A tile, and where it is from: pinned, else tuned, else the default."""
    if isinstance(pinned, Mapping):
        pinned = pinned.get(case.kernel.name)
    elif case.kernel.takes_single_tile == "transposed" and isinstance(pinned, Tile):
        pinned = pinned.transposed()
    elif case.kernel.takes_single_tile == "not":
        pinned = None
    if pinned is not None:
        return tile_choice.check_tile(case, pinned, device), "pinned"
    tuned = tuned_tiles.tuned_tile(case, problem, device)
    if tuned.tile is not None:
        return tuned.tile, tuned.words
    default = (
        split_forward.default_tile(problem, device) if case.kernel == kernel_specs.FORWARD_SPLIT else tile_choice.default_tile(case, device)
    )
    return default, "; ".join(filter(None, (tile_choice.why_default(case, device), tuned.words)))


def _visible_tiles_kernel(of: KernelPlan, problem: Problem, device: Device) -> KernelPlan:
    """The kernel that lists which tiles the kernel `of` has to visit."""
    spec = kernel_specs.VISIBLE_TILES
    kinds = problem.features.kinds
    kinds = replace(
        NO_FEATURES,
        attn_mask="bool" if kinds.attn_mask == "bool" else None,
        **{name: getattr(kinds, name) for name in ("window", "segments", "prefix")},
    )
    constants: dict[str, int | bool | str] = {
        "CAPABILITY": device.capability,
        "TILE_Q": of.tile.tile_q
        if of.spec.column_groups == 1
        else of.tile.tile_q // problem.heads_per_kv,  # queries, if rows are of several heads
        "TILE_KV": of.tile.tile_kv,
        "NUM_WARPS": spec.num_warps,
        "BY_KEYS": of.spec.owns_keys and not of.spec.walks_table,
        "PLACES": of.spec.walks_table,
        "CAUSAL": problem.is_causal,
        "VARLEN": False,
        "SEQLENS_KV": problem.seqlens_kv or problem.seqlens_q,
        "IN_PLACES": problem.seqlens_q,
        **kinds.constants(),
    }
    batches, heads = problem.list_extents
    num_tiles = ceil(problem.seqlen_q / of.tile.tile_q) if of.spec.walks_table else of.num_tiles
    return KernelPlan(
        KernelCase(spec, problem.dtype, problem.head_dim, features=kinds), of.tile, config_text("float32", constants),
        LaunchShape(num_tiles * batches * heads, 32 * spec.num_warps, 4 * spec.num_warps), num_tiles,
    )  # fmt: skip


def _results(problem: Problem) -> tuple[Buffer, ...]:
    out = Buffer("out", problem.layout.from_canonical(problem.output_shape), problem.dtype)
    if problem.of_tangents:
        return replace(out, name="out_dot"), Buffer("lse_dot", problem.lse_shape, "float32")
    return (out, Buffer("lse", problem.lse_shape, "float32")) if problem.return_lse else (out,)


def _gradients(problem: Problem) -> tuple[Buffer, ...]:
    shapes = {"grad_query": problem.query.shape, "grad_key": problem.key_shape, "grad_value": problem.value_shape}
    gradients = [Buffer(name, problem.layout.from_canonical(shape), problem.dtype) for name, shape in shapes.items()]
    mask = problem.features.attn_mask
    if problem.features.need_attn_mask_grad and mask is not None:
        gradients.append(Buffer("grad_attn_mask", mask.shape, mask.dtype))
    if problem.features.kinds.sinks:
        gradients.append(Buffer("grad_sinks", (problem.num_heads_q,), "float32"))
    return tuple(gradients)


def _workspace(problem: Problem, kernels: tuple[KernelPlan, ...]) -> tuple[Buffer, ...]:
    """What the kernels of a call hand on to each other."""
    rows = problem.query_rows
    buffers = (
        Buffer("row_statistics", (rows, kernel_cases.ROW_STATISTICS_BYTES // 4), "float32"),
        Buffer("log2_sums", (rows if problem.features.kinds.additive_mask else 0,), "float32"),
        Buffer("visible_tiles", (max((_list_entries(kernel, problem) for kernel in kernels), default=0),), "int32"),
        packed_tiles.buffer(kernels),
        Buffer("next_work", (sum(kernel.counts_work for kernel in kernels),), "int32", is_zeroed=True),
    )
    needed = {name for kernel in kernels for name in kernel.spec.workspace}
    return tuple(
        buffer
        for buffer in (
            *buffers,
            *fused_backward.workspace(problem, kernels),
            *operand_terms.workspace(problem, kernels),
            *query_splits.workspace(kernels),
            *split_forward.workspace(problem, kernels),
            *key_shares.workspace(problem, kernels),
            *cache_append.workspace(problem),
        )
        if buffer.name in needed and buffer.nbytes
    )


def _list_entries(kernel: KernelPlan, problem: Problem) -> int:
    """Length of the lists of visible tiles of one kernel: for each tile that blocks own, a count and at most one entry for each tile that they walk over.

    A table has no counts.
    """
    if not (kernel.spec.is_tiled and kernel.spec.walks_lists):
        return 0
    walked = ceil(problem.seqlen_q / kernel.tile.tile_q) if kernel.spec.owns_keys else ceil(problem.seqlen_kv / kernel.tile.tile_kv)
    batches, heads = problem.list_extents
    return batches * heads * kernel.num_tiles * ((not kernel.spec.walks_table) + walked)


def _sinks_kernel(problem: Problem, device: Device) -> KernelPlan:
    """The gradient of the sinks, one block for each query head."""
    spec = kernel_specs.BACKWARD_SINKS
    constants: dict[str, int | bool | str] = {
        "CAPABILITY": device.capability,
        "NUM_WARPS": spec.num_warps,
        "ADDITIVE_MASK": problem.features.kinds.additive_mask,
        "SEQLENS_Q": problem.seqlens_q,
    }
    return KernelPlan(
        KernelCase(spec, problem.dtype, problem.head_dim), Tile(1, 1, spec.num_warps, 1), config_text("float32", constants),
        LaunchShape(problem.num_heads_q, 32 * spec.num_warps, 4 * spec.num_warps), 1,
    )  # fmt: skip


def _constants_behind(
    of: KernelPlan, tile: Tile, problem: Problem, device: Device, *, head_dim_v: int, shared_bytes: int = 0
) -> dict[str, int | bool | str]:
    """Of a kernel that makes gradients of what the blocks of another one have added up or given in parts."""
    return {
        "CAPABILITY": device.capability,
        "HEAD_DIM": problem.head_dim,
        "HEAD_DIM_V": head_dim_v,
        "HEAD_SLICES": 1,
        "SLICE_PIECES": 1,
        "TILE_Q": tile.tile_q,
        "TILE_KV": tile.tile_kv,
        "NUM_WARPS": tile.num_warps,
        "NUM_STAGES": 1,
        "SHARED_BYTES": shared_bytes,
        "CAUSAL": False,
        "VARLEN": problem.num_sequences is not None,
        "SEQLENS_KV": problem.uses_places,
        "IN_PLACES": problem.uses_places,
        "ALLOW_TF32": False,
        "VECTORIZED": problem.vectorized,
        "SPLIT": bool(of.splits.chains),
        **dict(of.spec.constants),
    }


def _convert_kernel(fused: KernelPlan, problem: Problem, device: Device) -> KernelPlan:
    """The kernel that makes dQ of the sums of the fused one."""
    spec = kernel_specs.BACKWARD_DQ_CONVERT
    tile = Tile(fused.tile.tile_q, 16, fused.tile.tile_q // 16, 1)
    shared_bytes = tile.tile_q * 2 * fused.case.columns(device)[0]
    constants = _constants_behind(fused, tile, problem, device, head_dim_v=problem.head_dim, shared_bytes=shared_bytes)
    case = KernelCase(spec, problem.dtype, problem.head_dim)
    batches, num_tiles = problem.batch, ceil(problem.owned_queries / tile.tile_q)
    if problem.num_sequences is not None:
        batches, num_tiles = problem.num_sequences + 1, max(1, num_tiles)  # as `tiled_kernel`
    places = packed_tiles.places(problem, device, case, tile, num_tiles=num_tiles, heads=problem.num_heads_q)
    return KernelPlan(
        case, tile, config_text(problem.dtype, constants),
        LaunchShape((places or num_tiles * batches) * problem.num_heads_q, 32 * tile.num_warps, shared_bytes), num_tiles, splits=fused.splits,
        packed_places=places,
    )  # fmt: skip


def _dkdv_merge_kernel(of: KernelPlan, problem: Problem, device: Device) -> KernelPlan:
    """The kernel that makes dK and dV of what the blocks of a split one give."""
    spec, tile = kernel_specs.BACKWARD_DKDV_MERGE, replace(of.tile, num_warps=kernel_specs.BACKWARD_DKDV_MERGE.num_warps, num_stages=1)
    constants = _constants_behind(of, tile, problem, device, head_dim_v=problem.head_dim_v)
    constants |= replace(NO_FEATURES, dropout=of.case.features.dropout).constants()
    heads = problem.num_heads_q // of.group_heads
    batches = problem.batch // of.group_batch if problem.num_sequences is None else problem.num_sequences
    return KernelPlan(
        KernelCase(spec, problem.dtype, problem.head_dim, head_dim_v=problem.head_dim_v), tile, config_text(problem.dtype, constants),
        LaunchShape(of.num_tiles * heads * batches * tile.tile_kv // 16, 32 * tile.num_warps, 0), of.num_tiles, of.group_batch, of.group_heads,
        splits=of.splits,
    )  # fmt: skip


def _delta_kernel(problem: Problem, device: Device, *, clears_turns: bool) -> KernelPlan:
    spec = kernel_specs.BACKWARD_DELTA
    chunks = ceil(problem.head_dim_v * problem.itemsize / 16)
    lanes = next(lanes for lanes in (1, 2, 4, 8, 16, 32) if lanes >= min(chunks, 32))
    rows = 32 * spec.num_warps // lanes
    constants: dict[str, int | bool | str] = {
        "CAPABILITY": device.capability,
        "HEAD_DIM_V": problem.head_dim_v,
        "TILE_Q": rows,
        "NUM_WARPS": spec.num_warps,
        "CLEARS_TURNS": clears_turns,
        "VECTORIZED": problem.vectorized,
    }
    num_tiles = ceil(problem.seqlen_q / rows)
    return KernelPlan(
        KernelCase(spec, problem.dtype, problem.head_dim, head_dim_v=problem.head_dim_v), Tile(rows, 1, spec.num_warps, 1),
        config_text(problem.dtype, constants), LaunchShape(num_tiles * problem.num_heads_q * problem.batch, 32 * spec.num_warps, 0), num_tiles,
    )  # fmt: skip
