"""The backward kernel that uses Hopper's own instructions, TMA copies and wgmma, in the place of those of mma.sync.

It makes all gradients, as the fused kernel of mma.sync does (`fused_backward`), whose sums of dQ and turns it shares; of heads whose dK and dV do not fit the
registers together it is compiled twice, for dV and for dK and dQ. Which way a call takes, the first of these decides: what the kernel cannot do (`why_not`); a
mapping of tiles that names it or others; CUFLASH_BACKWARD_WGMMA=1, which takes it wherever it can run, a single tile too if it fits; a single tile, which is for
dK and dV; CUFLASH_BACKWARD_WGMMA=0; a version of NVRTC that is not trusted (`compiler_versions`); tables of tuned tiles, where both ways were timed on one call;
a kernel or feature that the timing model was not asked about (`predicted_loops`), with which calls stay on mma.sync; sums of dQ that would take more memory than
the arrays; the model's prediction (`predicted_wgmma`).
"""

from __future__ import annotations

from collections.abc import Sequence

from cuflash.hardware.device import Device
from cuflash.planning import (
    asked_for,
    compiler_versions,
    fused_backward,
    mapped_arrays,
    predicted_wgmma,
    tile_choice,
    tile_rules,
    tuned_tiles,
)
from cuflash.planning.asked_for import Choice
from cuflash.planning.kernel_cases import case_of
from cuflash.planning.kernel_specs import (
    BACKWARD_FUSED,
    BACKWARD_WGMMA,
    BACKWARD_WGMMA_DKDQ,
    BACKWARD_WGMMA_DV,
    KernelSpec,
)
from cuflash.problem.features import MASK_ITEMSIZES, MaskLayout
from cuflash.problem.problem import Problem
from cuflash.problem.tile import Tile, Tiles
from cuflash.system import switches

VARIABLE = "CUFLASH_BACKWARD_WGMMA"
"""Environment variable; 0: never, 1: the kernel wherever it can run. Looked at when a call is planned, so not by calls whose like was made before."""

_OTHERS = (BACKWARD_FUSED, *fused_backward.OF_THEIR_OWN)


def kernels(problem: Problem) -> tuple[KernelSpec, ...]:
    """That make the gradients of a call: one, or two where a block cannot have dK and dV of the head."""
    widest, widest_v = tile_rules.WGMMA_MAX_HEAD_DIMS_TOGETHER
    together = problem.head_dim <= widest and problem.head_dim_v <= widest_v
    return (BACKWARD_WGMMA,) if together else (BACKWARD_WGMMA_DV, BACKWARD_WGMMA_DKDQ)


def choose(problem: Problem, device: Device, tile: Tiles, others: Sequence[KernelSpec]) -> Choice:
    """Decide.

    Args:
        problem: the call.
        device: where.
        tile: as the caller pins it.
        others: the kernels of mma.sync that would run.

    Raises:
        OptionError: a value of the variable that is neither 0 nor 1.
    """
    name, is_asked = BACKWARD_WGMMA.source, is_asked_for(problem, device, tile)
    if device.capability != 90 and not is_asked:
        return Choice(False)
    if (reason := why_not(problem, device)) is not None:
        return Choice(False, f"not {name}: {reason}{_others_cost(problem, device, others)}")
    if is_asked:
        return Choice(True, f"{name}, as asked for; {asked_for.SIMULATED}")
    if asked_for.named(BACKWARD_WGMMA, tile, _OTHERS) is False:
        return Choice(False, f"not {name}, since the tile is for others")
    if isinstance(tile, Tile):
        return Choice(False, f"not {name}: a single tile is for dK and dV; a mapping may name {kernels(problem)[0].name}")
    if switches.setting(VARIABLE) is False:
        return Choice(False, f"not {name}, by {VARIABLE}=0")
    if (untrusted := compiler_versions.why_not()) is not None:
        return Choice(False, f"not {name}: {untrusted}; {VARIABLE}=1 takes it all the same")
    return _faster(problem, device, others)


def _faster(problem: Problem, device: Device, others: Sequence[KernelSpec]) -> Choice:
    """By tables of tuned tiles, or by the timing model."""
    cases, of_others = [case_of(kernel, problem) for kernel in kernels(problem)], [case_of(kernel, problem) for kernel in others]
    name, other = BACKWARD_WGMMA.source, " and ".join(kernel.source for kernel in others)
    if (timed := asked_for.by_tables((cases, of_others), (name, other), problem, device)) is not None:
        return timed
    pin = f'pin it by tile={{"{cases[0].kernel.name}": ...}}'
    found = predicted_wgmma.compare(cases, of_others, problem, device, fused_backward.heads_together(problem, device))
    if found is None:
        of_other_lengths = any(tuned_tiles.of_all_lengths(case, problem, device) for case in cases)
        return Choice(False, f"not {name}: it can run, but nothing is predicted of it here: {pin}", of_other_lengths)
    for case in (case for case in cases if case.kernel.added_up):
        if (much := fused_backward.too_much_memory(case, problem, tile_choice.default_tile(case, device))) is not None:
            return Choice(False, f"not {name}: {much}: {pin}", True)
    if found.gains:
        return Choice(True, f"{name}, predicted to take {found.ratio:.2f} of the time of {other}; {asked_for.SIMULATED}", True)
    return Choice(False, f"not {name}, which is predicted to take {found.ratio:.2f} of the time of {other}: {pin}", True)


def may_choose(problem: Problem, device: Device) -> bool:
    """Whether it can run beside others, and nobody has ruled it out or asked for it."""
    return device.capability == 90 and why_not(problem, device) is None and asked_for.is_open(VARIABLE)


def _others_cost(problem: Problem, device: Device, others: Sequence[KernelSpec]) -> str:
    section = fused_backward.heads_together(problem, device)
    found = predicted_wgmma.others_milliseconds([case_of(kernel, problem) for kernel in others], problem, device, section)
    return "" if not found else f"; the others are predicted to take {found:.3g} ms"


def is_asked_for(problem: Problem, device: Device, tile: Tiles) -> bool:
    """Whether a tile or the variable asks for the kernel."""
    by = {asked_for.asked_by(case_of(kernel, problem), device, tile, VARIABLE, _OTHERS) for kernel in kernels(problem)}
    return "tile" in by or None not in by


def why_not(problem: Problem, device: Device) -> str | None:
    """What of a call the kernel cannot do, in words; None where it can run."""
    cases = [case_of(kernel, problem) for kernel in kernels(problem)]
    for case in cases:
        if (reason := tile_choice.why_none(case, device)) is not None:
            return reason
    if not problem.same_groups:
        return "key and value have gradients of different batches or heads"
    if problem.seqlens_q:
        return "it knows no seqlens_q"
    if problem.seqlens_kv and problem.key_shape[0] != problem.batch:
        return "keys that batches share have one length there"
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
    return stride_key == 1 and stride_query * MASK_ITEMSIZES[mask.dtype] % 16 == 0
