"""The kernels that merge attention over disjoint sets of keys, as launches."""

from __future__ import annotations

from collections.abc import Iterator
from math import ceil

from cuflash.hardware.device import Device
from cuflash.planning.codegen import CPP_ELEMENTS, config_text
from cuflash.planning.kernel_cases import KernelCase
from cuflash.planning.kernel_plan import KernelPlan, LaunchShape
from cuflash.planning.kernel_specs import MERGE_ATTENTION, MERGE_ATTENTION_BACKWARD, MERGE_TABLE, KernelSpec
from cuflash.problem.tile import Tile

_VECTOR = 8  # columns that a thread takes at a time, as in kernels/tile/vector.cuh


def row_lanes(head_dim: int) -> int:
    """Neighbouring threads that share a row: a power of two, at most a warp."""
    return next(lanes for lanes in (1, 2, 4, 8, 16, 32) if lanes >= min(ceil(head_dim / _VECTOR), 32))


def row_groups(spec: KernelSpec, seqlen_q: int, head_dim: int, num_parts: int) -> int:
    """Groups of such threads that share out the parts of a row: as many as a block has threads for, if one holds all rows of a (batch, head); a power of two."""
    if spec.backward:
        return 1
    most = min(num_parts, 32 * spec.num_warps // row_lanes(head_dim) // max(1, seqlen_q))
    return 1 << max(0, most.bit_length() - 1)


def merge_blocks(spec: KernelSpec, seqlen_q: int, head_dim: int) -> int:
    """Blocks that the rows of one (batch, head) take."""
    return ceil(seqlen_q / (32 * spec.num_warps // row_lanes(head_dim)))


def kernels_of_chunks(on: Device, dtype: str, *, backward: bool) -> Iterator[KernelPlan]:
    """Those of `merge_attention` and, with `backward`, its gradient, for results of `dtype` from parts of it and of float32, any number of them."""
    for spec in (MERGE_ATTENTION, MERGE_ATTENTION_BACKWARD) if backward else (MERGE_ATTENTION,):
        for part_dtype in dict.fromkeys((dtype, "float32")):
            yield merge_kernel(spec, on, dtype, 1, part_dtype=part_dtype)
    yield merge_kernel(MERGE_TABLE, on, "float32", 1)


def merge_kernel(
    spec: KernelSpec,
    on: Device,
    dtype: str,
    num_blocks: int,
    *,
    num_tiles: int = 0,
    head_dim: int = 0,
    part_dtype: str | None = None,
    parts_have_sums: bool = False,
    log2_parts: bool = False,
    stream_k: bool = False,
) -> KernelPlan:
    """One of the kernels, which depend on element types alone: no head dimension or number of parts compiles anything.

    Args:
        spec: which.
        on: where.
        dtype: of what is merged into.
        num_blocks: of the launch.
        num_tiles, head_dim: blocks of one (batch, head) and columns of a row, for calls whose plan fills in the struct.
        part_dtype: of the parts, if it is another one.
        parts_have_sums: their LSE comes as reference and sum (kernels/tile/merge.cuh).
        log2_parts: the reference in units of log2.
        stream_k: each tile of grouped rows has parts of its own (kernels/tile/stream_k.cuh).
    """
    constants: dict[str, int | bool | str] = {
        "CAPABILITY": on.capability,
        "NUM_WARPS": spec.num_warps,
        "PartElement": CPP_ELEMENTS[part_dtype or dtype],
        "PARTS_HAVE_SUMS": parts_have_sums,
        "LOG2_PARTS": log2_parts,
        "STREAM_K": stream_k,
    }
    shape = LaunchShape(num_blocks, 32 * spec.num_warps, 0)
    return KernelPlan(KernelCase(spec, dtype, head_dim), Tile(1, 1, spec.num_warps, 1), config_text(dtype, constants), shape, num_tiles)
