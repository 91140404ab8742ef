"""The forward kernel that uses Hopper's own instructions, TMA copies and wgmma, in the place of that of mma.sync.

Until it has run on a GPU it is asked for: by `tile`, which names it, or by the environment variable CUFLASH_FORWARD_WGMMA=1, which takes it wherever it
can run, unless `tile` names the other one. What it cannot do stays on the kernel of mma.sync, and the plan says why.
"""

from __future__ import annotations

from collections.abc import Mapping

from cuflash.hardware.device import Device
from cuflash.planning import asked_for, mapped_arrays, tile_choice, tile_rules
from cuflash.planning.kernel_cases import case_of
from cuflash.planning.kernel_specs import FORWARD, FORWARD_WGMMA, KernelSpec
from cuflash.problem.problem import Problem
from cuflash.problem.tile import Tile, Tiles

VARIABLE = "CUFLASH_FORWARD_WGMMA"
"""Environment variable; 1: the kernel wherever it can run. Looked at when a call is planned, so not by calls whose like was made before."""


def kernels(problem: Problem, device: Device, tile: Tiles) -> tuple[KernelSpec, ...]:
    """The tiled kernel that makes the output."""
    return (FORWARD_WGMMA,) if is_asked_for(problem, device, tile) and why_not(problem, device) is None else (FORWARD,)


def is_asked_for(problem: Problem, device: Device, tile: Tiles) -> bool:
    """Whether a tile or the variable asks for the kernel of wgmma."""
    return asked_for.asked_by(case_of(FORWARD_WGMMA, problem), device, tile, VARIABLE, (FORWARD,)) is not None


def why_not(problem: Problem, device: Device) -> str | None:
    """What of a call the kernel cannot do, in words; None where it can run."""
    if (lacking := tile_rules.lacking(case_of(FORWARD_WGMMA, problem), device)) is not None:
        return lacking
    if not tile_choice.legal_tiles_for(case_of(FORWARD_WGMMA, problem), device):
        return "no tile leaves room in the registers for all of these features"
    if problem.in_places:
        return "it knows no packed sequences that use less than their offsets give them"
    if problem.seqlen_kv == 0:
        return "there are no keys to copy"
    arrays = (("query", problem.query), ("key", problem.key), ("value", problem.value))
    return mapped_arrays.why_not(arrays, problem.itemsize, aligned=problem.aligned)


def explain(problem: Problem, device: Device, tile: Tiles) -> str:
    """Which kernel runs, and why not the other; nothing where there is no choice."""
    reason = why_not(problem, device)
    if device.capability != 90 and not is_asked_for(problem, device, tile):
        return ""
    if reason is not None:
        return f"{FORWARD.source}, not {FORWARD_WGMMA.source}: {reason}"
    if is_asked_for(problem, device, tile):
        return f"{FORWARD_WGMMA.source}, as asked for; it has not run on a GPU yet"
    if _is_for_the_other(problem, device, tile):
        return f"{FORWARD.source}, which the tile is for; {FORWARD_WGMMA.source} can run too, but has not run on a GPU yet"
    how = f"{VARIABLE}=1, or by a tile of {FORWARD_WGMMA.name}, of which cuflash.legal_tiles has a list"
    return f"{FORWARD.source}; {FORWARD_WGMMA.source} can run too, but has not run on a GPU yet: ask for it by {how}"


def _is_for_the_other(problem: Problem, device: Device, tile: Tiles) -> bool:
    if isinstance(tile, Mapping):
        return FORWARD.name in tile
    return isinstance(tile, Tile) and tile_rules.broken_rule(case_of(FORWARD_WGMMA, problem), tile, device) is not None
