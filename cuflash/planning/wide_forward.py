"""The forward kernel of Hopper's own instructions for heads above 256 columns, those of multi-head latent attention among them.

Calls with a cache of such heads take it wherever it can run, unless CUFLASH_FORWARD_WGMMA=0 or the version of NVRTC is not trusted (`compiler_versions`), since they have no
other kernel. Until it has run on a GPU no other call takes it by itself, unlike the one for narrower heads (`wgmma_forward`): it is asked for by `tile`, which names it, or by
CUFLASH_FORWARD_WGMMA=1. What it cannot do stays on the kernel of mma.sync.
"""

from __future__ import annotations

from math import gcd

from cuflash.hardware.device import Device
from cuflash.planning import asked_for, compiler_versions, mapped_arrays, split_forward, tile_choice
from cuflash.planning.kernel_cases import WIDEST_NARROW_HEAD, case_of
from cuflash.planning.kernel_specs import FORWARD, FORWARD_WGMMA_WIDE
from cuflash.planning.wgmma_forward import VARIABLE
from cuflash.problem.problem import Problem
from cuflash.problem.tile import Tile, Tiles
from cuflash.system import switches

_ROWS_OF_SWIZZLE = 8


def is_taken(problem: Problem, device: Device, tile: Tiles) -> bool:
    """Whether the kernel makes the output of a call."""
    wanted = is_asked_for(problem, device, tile) or _is_alone(problem)
    return wanted and why_not(problem, device) is None


def _is_alone(problem: Problem) -> bool:
    """Whether no other kernel takes the call, and nobody has ruled this one out."""
    is_wide = max(problem.head_dim, problem.head_dim_v) > WIDEST_NARROW_HEAD
    return problem.cache is not None and is_wide and switches.setting(VARIABLE) is not False and compiler_versions.why_not() is None


def is_asked_for(problem: Problem, device: Device, tile: Tiles) -> bool:
    """Whether a tile or the variable asks for it."""
    return asked_for.asked_by(case_of(FORWARD_WGMMA_WIDE, problem), device, tile, VARIABLE, (FORWARD,)) is not None


def why_not(problem: Problem, device: Device) -> str | None:
    """What of a call the kernel cannot do, in words; None where it can run."""
    if (reason := tile_choice.why_none(case_of(FORWARD_WGMMA_WIDE, problem), device)) is not None:
        return reason
    if problem.num_sequences is not None and problem.cache is None:
        return "it knows no packed sequences without a cache"
    if (reason := split_forward.why_not_grouped(problem)) is not None:
        return reason
    if problem.seqlen_kv == 0:
        return "there are no keys to copy"
    if problem.cache is not None and problem.cache.page_size % _ROWS_OF_SWIZZLE:
        return f"the TMA unit copies {_ROWS_OF_SWIZZLE} rows of a page at a time, and pages have {problem.cache.page_size}"
    arrays = (("key", problem.key), ("value", problem.value))
    of_calls = ("query",) if problem.cache is None else ()
    return mapped_arrays.why_not(arrays, problem.itemsize, aligned=problem.aligned, aligned_with=of_calls)


def box_keys(problem: Problem, tile: Tile) -> int:
    """Keys that one copy has: a tile of them, or as many as lie in one page."""
    page_size = problem.cache.page_size if problem.cache is not None else 0
    return gcd(tile.tile_kv, page_size)


def explain(problem: Problem, device: Device, tile: Tiles) -> str | None:
    """Whether it runs, and why not; None where it is out of the question."""
    asked, name = is_asked_for(problem, device, tile), FORWARD_WGMMA_WIDE.source
    if max(problem.head_dim, problem.head_dim_v) <= WIDEST_NARROW_HEAD or not (asked or device.capability == 90):
        return None
    if (reason := why_not(problem, device)) is not None:
        return f"{FORWARD.source}, not {name}: {reason}"
    if asked:
        return f"{name}, as asked for; {asked_for.SIMULATED}"
    if _is_alone(problem):
        return f"{name}, which alone takes caches of such heads; {asked_for.SIMULATED}"
    how = f"{VARIABLE}=1, or by a tile of {FORWARD_WGMMA_WIDE.name}, of which cuflash.legal_tiles has a list"
    return f"{FORWARD.source}; {name} can run too, but has not run on a GPU yet: ask for it by {how}"
