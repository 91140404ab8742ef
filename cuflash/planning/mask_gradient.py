"""Which kernel makes the gradient of an additive mask: the one of dQ on its way, or one of its own, which computes S and dP again.

The former stores dS as it is (kernels/tile/mask_gradient.cuh), so the mask has to have an element for each pair of query and key, of which nothing is summed. Where
dQ has a kernel of its own anyway, that one does less. Where one kernel would make all gradients (`fused_backward`, `wgmma_backward`), it gains what the mask's own
kernel takes, and loses what the kernels of their own take longer. The first of these decides then: a mapping of tiles that names kernels of either way;
CUFLASH_BACKWARD_WGMMA=1; tables of tuned tiles, where both ways were timed on one call; the timing model's `STEADY`, if it knows both ways; else the mask's own
kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from cuflash.hardware.device import Device
from cuflash.planning import asked_for, predicted_wgmma, wgmma_backward
from cuflash.planning.kernel_cases import case_of
from cuflash.planning.kernel_specs import BACKWARD_DQ, BACKWARD_DQ_MASK, BACKWARD_MASK, KernelSpec
from cuflash.problem.problem import Problem
from cuflash.problem.tile import Tiles

LEAST_GAIN = 1.03
"""Predictions that are closer to each other mean nothing."""


class Steady(NamedTuple):
    """What loops of kernels take with a float16 mask, in clocks of an SM for each pair of query and key.

    Attributes:
        together: the kernel of all gradients, the fused one or that of wgmma.
        mask: that of the mask's gradient alone, whose blocks have one step each, with what a block takes to begin and to store.
        apart: those of dK and dV.
        stored: the one of dQ and the mask's gradient.
    """

    together: float
    mask: float
    apart: float
    stored: float


STEADY: dict[tuple[str, int], Steady] = {
    ("sm_80", 64): Steady(together=0.591, mask=0.413, apart=0.400, stored=0.322),
    ("sm_86", 64): Steady(together=1.430, mask=0.666, apart=1.113, stored=0.888),
    ("sm_86", 128): Steady(together=2.655, mask=1.982, apart=2.316, stored=1.643),
    ("sm_90", 64): Steady(together=0.253, mask=0.436, apart=0.340, stored=0.311),
    ("sm_90", 128): Steady(together=0.386, mask=0.705, apart=0.781, stored=0.595),
    ("sm_120", 128): Steady(together=2.704, mask=1.845, apart=2.208, stored=1.661),
}
"""(architecture, head_dim) -> loops with default tiles; what benchmarks/predicted_tile_sweep.py --mask prints: float16, the mean of full and causal."""
STEADY |= {("sm_89", head_dim): steady for (arch, head_dim), steady in STEADY.items() if arch == "sm_86"}  # the same SM to the model


def why_not(problem: Problem) -> str | None:
    """Why the kernel of dQ cannot store the gradient, in words; None where it can."""
    mask = problem.features.attn_mask
    assert mask is not None
    if mask.extents != (problem.batch, problem.num_heads_q, problem.seqlen_q, problem.seqlen_kv):
        return "sums over the axes along which attn_mask is broadcast"
    return None


def choose(
    problem: Problem, device: Device, tile: Tiles, gradients: Sequence[KernelSpec], own: Sequence[KernelSpec]
) -> tuple[tuple[KernelSpec, ...], str]:
    """All kernels of the gradients, and why these, in words.

    Args:
        problem: the call, which asks for the mask's gradient.
        device: where.
        tile: as the caller pins it.
        gradients: the kernels of the other gradients that would run without.
        own: those of them where each has one of its own.
    """
    apart = (*gradients, BACKWARD_MASK)
    if (reason := why_not(problem)) is not None:
        return apart, f"{BACKWARD_MASK}, which {reason}"
    stored = tuple(BACKWARD_DQ_MASK if kernel == BACKWARD_DQ else kernel for kernel in own)
    by_name = asked_for.named(BACKWARD_DQ_MASK, tile, (BACKWARD_MASK, BACKWARD_DQ, *(set(gradients) - set(own))))
    if by_name is not None:
        return (stored if by_name else apart), f"{BACKWARD_DQ_MASK if by_name else BACKWARD_MASK}, by the kernels that the tile is for"
    if tuple(gradients) == tuple(own):
        return stored, f"{BACKWARD_DQ_MASK}, which has what {BACKWARD_MASK} would compute again"
    if wgmma_backward.is_asked_for(problem, device, tile):
        return apart, ""
    names, others = (" and ".join(kernel.name for kernel in way) for way in (stored, apart))
    cases = [case_of(kernel, problem) for kernel in stored], [case_of(kernel, problem) for kernel in apart]
    if (timed := asked_for.by_tables(cases, (names, others), problem, device)) is not None:
        return (stored if timed.is_taken else apart), timed.why
    ratio, pin = time_ratio(problem, device, gradients), f'pin it by tile={{"{BACKWARD_DQ_MASK}": ...}}'
    if ratio is None:
        return apart, f"{BACKWARD_MASK}; {BACKWARD_DQ_MASK} can run too, but nothing is predicted of it here: {pin}"
    if ratio * LEAST_GAIN <= 1.0:
        return stored, f"{names}, predicted to take {ratio:.2f} of the time of {others}"
    return apart, f"{BACKWARD_MASK}; {names} are predicted to take {ratio:.2f} of the time of {others} here: {pin}"


def time_ratio(problem: Problem, device: Device, gradients: Sequence[KernelSpec]) -> float | None:
    """Predicted time of the way on which dQ's kernel stores the gradient over that of `gradients` and the mask's own kernel, in long sequences; None where the model was
    not asked, of types or heads of the value that it does not know."""
    known = sorted(head_dim for arch, head_dim in STEADY if arch == device.arch and head_dim >= problem.head_dim)
    if problem.dtype == "float32" or problem.head_dim != problem.head_dim_v or not known:
        return None
    loops = STEADY[device.arch, known[0]]
    case = case_of(gradients[0], problem)
    slower = predicted_wgmma.measured(case, problem) if case.kernel.implementation == "wgmma" else 1.0
    return (loops.apart + loops.stored) / (loops.together / slower + loops.mask)
