"""The backward kernel that uses Hopper's own instructions, TMA copies and wgmma, in the place of those of mma.sync.

It makes all gradients, as the fused kernel of mma.sync does (`fused_backward`), whose sums of dQ and turns it shares; of heads whose dK and dV do not fit the registers
together it is compiled twice, for dV and for dK and dQ. Until it has run on a GPU it is asked
for: by `tile`, which names it, or by the environment variable CUFLASH_BACKWARD_WGMMA=1, which takes it wherever it can run, unless `tile` names others. What it
cannot do stays on the kernels of mma.sync, and the plan says why.
"""

from __future__ import annotations

from collections.abc import Mapping

from cuflash.hardware.device import Device
from cuflash.planning import asked_for, mapped_arrays, tile_choice, tile_rules
from cuflash.planning.kernel_cases import case_of
from cuflash.planning.kernel_specs import (
    BACKWARD_DK,
    BACKWARD_DKDV,
    BACKWARD_DQ,
    BACKWARD_DV,
    BACKWARD_FUSED,
    BACKWARD_WGMMA,
    BACKWARD_WGMMA_DKDQ,
    BACKWARD_WGMMA_DV,
    KernelSpec,
)
from cuflash.problem.features import MaskLayout
from cuflash.problem.problem import DTYPES, Problem
from cuflash.problem.tile import Tiles

VARIABLE = "CUFLASH_BACKWARD_WGMMA"
"""Environment variable; 1: the kernel wherever it can run. Looked at when a call is planned, so not by calls whose like was made before."""

_OTHERS = (BACKWARD_FUSED, BACKWARD_DKDV, BACKWARD_DK, BACKWARD_DV, BACKWARD_DQ)


def kernels(problem: Problem) -> tuple[KernelSpec, ...]:
    """That make the gradients of a call: one, or two where a block cannot have dK and dV of the head."""
    widest, widest_v = tile_rules.WGMMA_MAX_HEAD_DIMS_TOGETHER
    together = problem.head_dim <= widest and problem.head_dim_v <= widest_v
    return (BACKWARD_WGMMA,) if together else (BACKWARD_WGMMA_DV, BACKWARD_WGMMA_DKDQ)


def is_taken(problem: Problem, device: Device, tile: Tiles) -> bool:
    """Whether it makes the gradients."""
    return _is_asked_for(problem, device, tile) and why_not(problem, device) is None


def _is_asked_for(problem: Problem, device: Device, tile: Tiles) -> bool:
    by = {asked_for.asked_by(case_of(kernel, problem), device, tile, VARIABLE, _OTHERS) for kernel in kernels(problem)}
    return "tile" in by or None not in by


def why_not(problem: Problem, device: Device) -> str | None:
    """What of a call the kernel cannot do, in words; None where it can run."""
    cases = [case_of(kernel, problem) for kernel in kernels(problem)]
    for case in cases:
        if (lacking := tile_rules.lacking(case, device)) is not None:
            return lacking
    if not problem.same_groups:
        return "key and value have gradients of different batches or heads"
    if problem.features.kinds.lists_tiles and len(cases) > 1:
        return "of wide heads it walks over no lists of visible tiles, which a boolean mask and segments need"
    if problem.seqlens_kv and problem.key_shape[0] != problem.batch:
        return "keys that batches share have one length there"
    if not all(tile_choice.legal_tiles_for(case, device) for case in cases):
        return "no tile leaves room in the registers for all of these features"
    if problem.seqlen_kv == 0:
        return "there are no keys to copy"
    if (mask := problem.features.attn_mask) is not None and not _rows_start_on_16_bytes(mask):
        return "rows of attn_mask do not start 16 bytes apart, and would be copied element by element"
    arrays = [("query", problem.query), ("key", problem.key), ("value", problem.value)]
    if problem.grad_out is not None:
        arrays.append(("grad_out", problem.grad_out))
    return mapped_arrays.why_not(arrays, problem.itemsize, aligned=problem.aligned)


def _rows_start_on_16_bytes(mask: MaskLayout) -> bool:
    *_, stride_query, stride_key = mask.strides
    return stride_key == 1 and stride_query * (1 if mask.dtype == "bool" else DTYPES[mask.dtype]) % 16 == 0


def explain(problem: Problem, device: Device, tile: Tiles) -> str:
    """Whether it runs, and why not; nothing where nobody asks and there is no choice."""
    asked, reason = _is_asked_for(problem, device, tile), why_not(problem, device)
    if asked and reason is None:
        return f"{BACKWARD_WGMMA.source}, as asked for; it has not run on a GPU yet"
    if reason is not None:
        return f"not {BACKWARD_WGMMA.source}: {reason}" if asked or device.capability == 90 else ""
    words = f"{BACKWARD_WGMMA.source} can run too, but has not run on a GPU yet"
    if isinstance(tile, Mapping) and any(kernel.name in tile for kernel in _OTHERS):
        return words
    return f"{words}: ask for it by {VARIABLE}=1, or by a tile of {kernels(problem)[0].name}, of which cuflash.legal_tiles has a list"
