"""The forward kernel of Hopper's own instructions for heads above 256 columns, those of multi-head latent attention among them.

Calls with a cache of such heads take it wherever it can run, unless CUFLASH_FORWARD_WGMMA=0 or the version of NVRTC is not trusted (`compiler_versions`), since they have no
other kernel. Of other calls the same decide as for narrower heads (`wgmma_forward`). What it cannot do stays on the kernel of mma.sync.
"""

from __future__ import annotations

from math import gcd

from cuflash.hardware.device import Device
from cuflash.planning import asked_for, mapped_arrays, split_forward, tile_choice, wgmma_forward
from cuflash.planning.asked_for import Choice
from cuflash.planning.kernel_cases import WIDEST_NARROW_HEAD, case_of
from cuflash.planning.kernel_specs import FORWARD, FORWARD_SPLIT, FORWARD_WGMMA_WIDE, WARPGROUP_ROWS
from cuflash.planning.wgmma_forward import VARIABLE
from cuflash.problem.problem import Problem
from cuflash.problem.tile import Tile, Tiles

_ROWS_OF_SWIZZLE = 8


def choose(problem: Problem, device: Device, tile: Tiles) -> Choice | None:
    """Decide; None where the kernel is out of the question.

    Raises:
        OptionError: a value of the variable that is neither 0 nor 1.
    """
    name, other = FORWARD_WGMMA_WIDE.source, (FORWARD if problem.cache is None else FORWARD_SPLIT).source
    is_asked = is_asked_for(problem, device, tile)
    if max(problem.head_dim, problem.head_dim_v) <= WIDEST_NARROW_HEAD or not (is_asked or device.capability == 90):
        return None
    if (reason := why_not(problem, device)) is not None:
        return Choice(False, f"{other}, not {name}: {reason}")
    if is_asked:
        return Choice(True, f"{name}, as asked for; {asked_for.SIMULATED}")
    if (refused := asked_for.why_refused(VARIABLE)) is not None:
        return Choice(False, f"{other}, not {name}{refused}")
    if problem.cache is not None:
        return Choice(True, f"{name}, which alone takes caches of such heads; {asked_for.SIMULATED}")
    if asked_for.named(FORWARD_WGMMA_WIDE, tile, (FORWARD,)) is False or isinstance(tile, Tile):
        return Choice(False, f"{other}, which the tile is for")
    return wgmma_forward.faster(FORWARD_WGMMA_WIDE, problem, device)


def may_choose(problem: Problem, device: Device) -> bool:
    """Whether both kernels can run, and nobody has ruled one out."""
    is_wide = max(problem.head_dim, problem.head_dim_v) > WIDEST_NARROW_HEAD and problem.cache is None
    return device.capability == 90 and is_wide and why_not(problem, device) is None and asked_for.is_open(VARIABLE)


def is_asked_for(problem: Problem, device: Device, tile: Tiles) -> bool:
    """Whether a tile or the variable asks for it."""
    return asked_for.asked_by(case_of(FORWARD_WGMMA_WIDE, problem), device, tile, VARIABLE, (FORWARD,)) is not None


def why_not(problem: Problem, device: Device) -> str | None:
    """What of a call the kernel cannot do, in words; None where it can run."""
    if (reason := tile_choice.why_none(case_of(FORWARD_WGMMA_WIDE, problem), device)) is not None:
        return reason
    if (reason := _why_not_listed(problem)) is not None:
        return reason
    if (reason := split_forward.why_not_grouped(problem)) is not None:
        return reason
    if problem.seqlen_kv == 0:
        return "there are no keys to copy"
    if problem.cache is not None and problem.cache.page_size % _ROWS_OF_SWIZZLE:
        return f"the TMA unit copies {_ROWS_OF_SWIZZLE} rows of a page at a time, and pages have {problem.cache.page_size}"
    arrays = (("key", problem.key), ("value", problem.value))
    of_calls = ("query",) if problem.cache is None else ()
    return mapped_arrays.why_not(arrays, problem.itemsize, aligned=problem.aligned, aligned_with=of_calls)


def _why_not_listed(problem: Problem) -> str | None:
    """Why lists of visible tiles, which are those of queries of one head or of all, say nothing of the kernel's tiles, whose rows are of all heads that share a key head."""
    if not problem.features.kinds.lists_tiles or (group := problem.heads_per_kv) == 1:
        return None
    if problem.list_extents[1] > 1:
        return f"it walks over tiles that some row sees, and rows are of {group} heads, each with a mask of its own"
    if WARPGROUP_ROWS % group:
        return f"it walks over tiles that some query sees, of which {WARPGROUP_ROWS} rows of {group} heads hold no whole number"
    return None


def box_keys(problem: Problem, tile: Tile) -> int:
    """Keys that one copy has: a tile of them, or as many as lie in one page."""
    page_size = problem.cache.page_size if problem.cache is not None else 0
    return gcd(tile.tile_kv, page_size)
