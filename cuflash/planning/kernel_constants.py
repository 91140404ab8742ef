"""The constants of `Config` that a kernel with matrix products is compiled with: those that all have, and each kernel's own.

A file in `kernels/` that has constants of its own has a function here, which takes the launch as far as it is decided and returns them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from cuflash.hardware.device import Device
from cuflash.planning import cache_append, kernel_cases, kernel_specs, tile_rules, wide_forward
from cuflash.planning.codegen import CPP_ELEMENTS
from cuflash.planning.kernel_cases import KernelCase
from cuflash.planning.kernel_plan import Splits
from cuflash.problem.problem import Problem
from cuflash.problem.tile import Tile

Constants = dict[str, int | bool | str]

SMALLEST_SCALE = 2.0**-126
"""That is positive and a normal float32."""
MOST_OF_PACKED_DROPOUT = 0x7F80 / 2**16
"""bfloat16's infinity in halves of a word: kernels/tile/packed_dropout.cuh."""


class Launch(NamedTuple):
    """What decides a kernel's constants.

    Attributes:
        case: the kernel, and for what it is compiled.
        tile: of a block.
        splits: of the keys among blocks, or of the queries.
        shared_bytes: of a block.
        maps_out: the TMA unit stores the output.
        problem: the call.
        device: where.
    """

    case: KernelCase
    tile: Tile
    splits: Splits
    shared_bytes: int
    maps_out: bool
    problem: Problem
    device: Device


def constants_of(launch: Launch) -> Constants:
    """All of them."""
    case, tile, problem, device = launch.case, launch.tile, launch.problem, launch.device
    own = _OWN.get(case.kernel.source)
    return {
        "CAPABILITY": device.capability,
        "HEAD_DIM": problem.head_dim,
        "HEAD_DIM_V": case.head_dim_v,
        "HEAD_SLICES": case.head_slices(device),
        "SLICE_PIECES": case.slice_pieces(device),
        "TILE_Q": tile.tile_q,
        "TILE_KV": tile.tile_kv,
        "NUM_WARPS": tile.num_warps,
        "NUM_STAGES": tile.num_stages,
        "SHARED_BYTES": launch.shared_bytes,
        "CAUSAL": problem.is_causal,
        "VARLEN": problem.num_sequences is not None,
        "SEQLENS_KV": problem.seqlens_kv or problem.uses_places,
        "IN_PLACES": problem.uses_places,
        "ALLOW_TF32": case.allow_tf32,
        "VECTORIZED": problem.vectorized,
        **case.features.constants(),
        **dict(case.kernel.constants),
        **(own(launch) if own is not None else {}),
    }


def _forward_mma(launch: Launch) -> Constants:
    return {"COPIES_MASK": launch.case.copies_mask(launch.device)}


def _forward_wgmma(launch: Launch) -> Constants:
    case, tile, problem, device = launch.case, launch.tile, launch.problem, launch.device
    any_scale = problem.scale < SMALLEST_SCALE
    keeps_q = not (problem.is_ragged or any_scale)  # scores times a sign take the registers
    return {
        "DROPS_MOST": _drops_most(problem),
        "Q_STAGES": kernel_cases.stationary_stages(case, tile, device),
        "Q_REGISTER_STEPS": tile_rules.q_register_steps(case, tile, device) if keeps_q else 0,
        "ANY_SCALE": any_scale,
        "MAPS_MASK": case.maps_mask,
        "MAPS_OUT": launch.maps_out,
    }


def _forward_split_mma(launch: Launch) -> Constants:
    cache, element = launch.problem.cache, CPP_ELEMENTS[launch.problem.kv_dtype]
    return {
        "VECTORIZED": False,  # it looks at run time
        "PAGED": cache is not None and cache.is_paged,
        "CacheElement": element,
        **cache_append.constants(launch.case.kernel, launch.problem),
        "STREAM_K": launch.splits.stream_k,
    }


def _forward_wgmma_wide(launch: Launch) -> Constants:
    cache = launch.problem.cache
    return {
        "VECTORIZED": False,
        "PAGED": cache is not None and cache.is_paged,
        "VALUE_IN_KEY": launch.case.value_in_key,
        "BOX_ROWS": wide_forward.box_keys(launch.problem, launch.tile),
        "STREAM_K": launch.splits.stream_k,
    }


def _backward_dkdv_mma(launch: Launch) -> Constants:
    return {"SPLIT": bool(launch.splits.chains)}


def _backward_fused_mma(launch: Launch) -> Constants:
    return {"SHARING_WARPS": launch.case.sharing_warps(launch.tile, launch.device)}


def _backward_wgmma(launch: Launch) -> Constants:
    case, tile, splits, problem, device = launch.case, launch.tile, launch.splits, launch.problem, launch.device
    cuts_queries = problem.num_sequences is not None or problem.uses_places  # the warp that copies needs registers for it
    key_steps, value_steps = (0, 0) if cuts_queries else tile_rules.key_register_steps(case, tile, device)
    return {
        "SPLIT": bool(splits.chains),
        "GRAD_OUT_STAGES": kernel_cases.grad_out_stages(case, tile, device),
        "K_REGISTER_STEPS": key_steps,
        "V_REGISTER_STEPS": value_steps,
        "CONVERTS_SUMS": not splits.chains and kernel_cases.converts_sums(case.kernel, problem),
        "DROPS_MOST": _drops_most(problem),
    }


def _drops_most(problem: Problem) -> bool:
    return problem.features.dropout_p > MOST_OF_PACKED_DROPOUT


_OWN: dict[str, Callable[[Launch], Constants]] = {
    kernel_specs.FORWARD.source: _forward_mma,
    kernel_specs.FORWARD_WGMMA.source: _forward_wgmma,
    kernel_specs.FORWARD_WGMMA_FLOAT32.source: _forward_wgmma,
    kernel_specs.FORWARD_WGMMA_WIDE.source: _forward_wgmma_wide,
    kernel_specs.FORWARD_SPLIT.source: _forward_split_mma,
    kernel_specs.BACKWARD_DKDV.source: _backward_dkdv_mma,
    kernel_specs.BACKWARD_FUSED.source: _backward_fused_mma,
    kernel_specs.BACKWARD_WGMMA.source: _backward_wgmma,
}
