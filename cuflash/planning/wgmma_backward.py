"""The backward kernel that uses Hopper's own instructions, TMA copies and wgmma, in the place of those of mma.sync.

It makes all gradients, as the fused kernel of mma.sync does (`fused_backward`), whose sums of dQ and turns it shares. Until it has run on a GPU it is asked
for: by `tile`, which names it, or by the environment variable CUFLASH_BACKWARD_WGMMA=1, which takes it wherever it can run, unless `tile` names others. What it
cannot do stays on the kernels of mma.sync, and the plan says why.
"""

from __future__ import annotations

from collections.abc import Mapping

from cuflash.hardware.device import Device
from cuflash.planning import asked_for, mapped_arrays, tile_choice, tile_rules
from cuflash.planning.kernel_cases import case_of
from cuflash.planning.kernel_specs import BACKWARD_DK, BACKWARD_DKDV, BACKWARD_DQ, BACKWARD_DV, BACKWARD_FUSED, BACKWARD_WGMMA
from cuflash.problem.features import MaskLayout
from cuflash.problem.problem import DTYPES, Problem
from cuflash.problem.tile import Tiles

VARIABLE = "CUFLASH_BACKWARD_WGMMA"
"""Environment variable; 1: the kernel wherever it can run. Looked at when a call is planned, so not by calls whose like was made before."""

_OTHERS = (BACKWARD_FUSED, BACKWARD_DKDV, BACKWARD_DK, BACKWARD_DV, BACKWARD_DQ)


def is_taken(problem: Problem, device: Device, tile: Tiles) -> bool:
    """Whether it makes the gradients."""
    return _is_asked_for(problem, device, tile) and why_not(problem, device) is None


def _is_asked_for(problem: Problem, device: Device, tile: Tiles) -> bool:
    return asked_for.asked_by(case_of(BACKWARD_WGMMA, problem), device, tile, VARIABLE, _OTHERS) is not None


def why_not(problem: Problem, device: Device) -> str | None:
    """What of a call the kernel cannot do, in words; None where it can run."""
    case = case_of(BACKWARD_WGMMA, problem)
    if (lacking := tile_rules.lacking(case, device)) is not None:
        return lacking
    if not problem.same_groups:
        return "key and value have gradients of different batches or heads"
    if problem.seqlens_kv and problem.key_shape[0] != problem.batch:
        return "keys that batches share have one length there"
    if not tile_choice.legal_tiles_for(case, device):
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
    return f"{words}: ask for it by {VARIABLE}=1, or by a tile of {BACKWARD_WGMMA.name}, of which cuflash.legal_tiles has a list"
