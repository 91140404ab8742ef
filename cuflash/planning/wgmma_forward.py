"""The forward kernel that uses Hopper's own instructions, TMA copies and wgmma, in the place of that of mma.sync.

Which of the two a call takes, the first of these decides: what the kernel cannot do (`why_not`); a mapping of tiles that names one of them;
CUFLASH_FORWARD_WGMMA=1, which takes it wherever it can run, a single tile too if it fits; a single tile, which is for the other; an lse that a call of
float32 returns; CUFLASH_FORWARD_WGMMA=0; a version of NVRTC that is not trusted (`compiler_versions`); tables of tuned tiles, where both were timed on one
call (`tuned_tiles.faster_way`); the timing model's prediction (`predicted_wgmma`), if it knows both with these features; else the other kernel.
"""

from __future__ import annotations

from cuflash.hardware.device import Device
from cuflash.planning import asked_for, mapped_arrays, predicted_wgmma, tile_choice, tuned_tiles
from cuflash.planning.asked_for import Choice
from cuflash.planning.kernel_cases import case_of
from cuflash.planning.kernel_specs import FORWARD, FORWARD_WGMMA, FORWARD_WGMMA_FLOAT32, KernelSpec
from cuflash.problem.problem import Problem
from cuflash.problem.tile import Tile, Tiles

VARIABLE = "CUFLASH_FORWARD_WGMMA"
"""Environment variable; 0: never, 1: the kernel wherever it can run. Looked at when a call is planned, so not by calls whose like was made before."""


def kernel(problem: Problem) -> KernelSpec:
    """The kernel of wgmma for a call: to float32 accuracy it is another one."""
    return FORWARD_WGMMA_FLOAT32 if problem.dtype == "float32" else FORWARD_WGMMA


def choose(problem: Problem, device: Device, tile: Tiles) -> Choice:
    """Decide.

    Raises:
        OptionError: a value of the variable that is neither 0 nor 1.
    """
    spec = kernel(problem)
    name, other = spec.source, FORWARD.source
    is_asked = is_asked_for(problem, device, tile)
    if device.capability != 90 and not is_asked:
        return Choice(False)
    if (reason := why_not(problem, device)) is not None:
        return Choice(False, f"{other}, not {name}: {reason}{_others_cost(problem, device)}")
    if is_asked:
        return Choice(True, f"{name}, as asked for; {asked_for.SIMULATED}")
    if asked_for.named(spec, tile, (FORWARD,)) is False:
        return Choice(False, f"{other}, which the tile is for")
    if isinstance(tile, Tile):
        return Choice(False, f"{other}, which a single tile is for; a mapping may name {spec.name}")
    if spec.takes_terms and problem.return_lse:
        reason = (
            "lse may be for a backward pass, whose kernels round scores otherwise, so that probabilities of huge ones would not add up to 1"
        )
        return Choice(False, f"{other}, not {name}: {reason}; {VARIABLE}=1 takes it all the same")
    if (refused := asked_for.why_refused(VARIABLE)) is not None:
        return Choice(False, f"{other}, not {name}{refused}")
    return faster(spec, problem, device)


def faster(spec: KernelSpec, problem: Problem, device: Device) -> Choice:
    """Between one of these kernels that can run and that of mma.sync, by tables of tuned tiles, or by the timing model."""
    cases = case_of(spec, problem), case_of(FORWARD, problem)
    name, other = spec.source, FORWARD.source
    if (timed := asked_for.by_tables((cases[:1], cases[1:]), (name, other), problem, device)) is not None:
        return timed
    pin = f'pin it by tile={{"{spec.name}": ...}}'
    found = predicted_wgmma.compare(cases[:1], cases[1:], problem, device)
    if found is None:
        of_other_lengths = any(tuned_tiles.of_all_lengths(case, problem, device) for case in cases[:1])
        return Choice(False, f"{other}; {name} can run too, but nothing is predicted of it here: {pin}", of_other_lengths)
    if found.gains:
        return Choice(True, f"{name}, predicted to take {found.ratio:.2f} of the time of {other}; {asked_for.SIMULATED}", True)
    return Choice(False, f"{other}; {name} is predicted to take {found.ratio:.2f} of its time here: {pin}", True)


def may_choose(problem: Problem, device: Device) -> bool:
    """Whether both kernels can run, and nobody has ruled one out."""
    for_backward = kernel(problem).takes_terms and problem.return_lse
    return device.capability == 90 and why_not(problem, device) is None and not for_backward and asked_for.is_open(VARIABLE)


def _others_cost(problem: Problem, device: Device) -> str:
    found = predicted_wgmma.others_milliseconds([case_of(FORWARD, problem)], problem, device)
    return "" if not found else f"; predicted to take {found:.3g} ms"


def is_asked_for(problem: Problem, device: Device, tile: Tiles) -> bool:
    """Whether a tile or the variable asks for the kernel of wgmma."""
    return asked_for.asked_by(case_of(kernel(problem), problem), device, tile, VARIABLE, (FORWARD,)) is not None


def why_not(problem: Problem, device: Device) -> str | None:
    """What of a call the kernel cannot do, in words; None where it can run."""
    spec = kernel(problem)
    if (reason := tile_choice.why_none(case_of(spec, problem), device)) is not None:
        return reason
    if (reason := asked_for.why_not_of_lengths(problem)) is not None:
        return reason
    if problem.in_places:
        return "it knows no packed sequences that use less than their offsets give them"
    if problem.seqlen_kv == 0:
        return "there are no keys to copy"
    if spec.takes_terms:  # which are arrays of their own
        if problem.seqlens_q:
            return "it knows no seqlens_q"
        return "it knows no packed sequences" if problem.num_sequences is not None else None
    arrays = (("query", problem.query), ("key", problem.key), ("value", problem.value))
    return mapped_arrays.why_not(arrays, problem.itemsize, aligned=problem.aligned)
