"""Who decides between kernels that can take each other's place: a tile that the caller pins, or an environment variable."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

from cuflash.hardware.device import Device
from cuflash.planning import compiler_versions, tile_rules, tuned_tiles
from cuflash.planning.kernel_cases import KernelCase
from cuflash.planning.kernel_specs import KernelSpec
from cuflash.problem.problem import Problem
from cuflash.problem.tile import Tile, Tiles
from cuflash.system import switches

SIMULATED = "it has run on the simulator only"
SPILLS_WITH_LENGTHS = "with seqlens_q and a mask or segments the warps that copy would have too few registers"


class Choice(NamedTuple):
    """Whether a call takes a kernel that may come in the place of others.

    Attributes:
        is_taken: it runs.
        why: or why it does not, in words; empty where there is no choice.
        depends_on_lengths: another call of the same kind may take the other way, for it has other lengths, another batch or other heads.
    """

    is_taken: bool
    why: str = ""
    depends_on_lengths: bool = False


def named(kernel: KernelSpec, tile: Tiles, instead: Iterable[KernelSpec]) -> bool | None:
    """Whether a mapping of tiles names a kernel (True) or one of those that run `instead` of it (False); None if it leaves that open."""
    if isinstance(tile, Mapping):
        if kernel.name in tile:
            return True
        if any(other.name in tile for other in instead):
            return False
    return None


def asked_by(
    case: KernelCase, device: Device, tile: Tiles, variable: str, instead: Iterable[KernelSpec]
) -> Literal["tile", "variable"] | None:
    """How a kernel is asked for; None if it is not, because the tile is for another one, or nobody asks.

    Raises:
        OptionError: a value of the variable that is neither 0 nor 1.
    """
    by_name = named(case.kernel, tile, instead)
    if by_name is not None:
        return "tile" if by_name else None
    if isinstance(tile, Tile) and tile_rules.broken_rule(case, tile, device) is not None:
        return None
    return "variable" if switches.setting(variable) else None


def why_not_of_lengths(problem: Problem) -> str | None:
    """What kernels of wgmma cannot do of `seqlens_q`, in words; None where they can run."""
    kinds = problem.features.kinds
    return SPILLS_WITH_LENGTHS if problem.seqlens_q and (kinds.attn_mask is not None or kinds.segments) else None


def why_refused(variable: str) -> str | None:
    """Who rules kernels of wgmma out, as words behind their name: the variable, or a version of NVRTC that is not trusted; None if neither does.

    Raises:
        OptionError: a value of the variable that is neither 0 nor 1.
    """
    if switches.setting(variable) is False:
        return f", by {variable}=0"
    untrusted = compiler_versions.why_not()
    return None if untrusted is None else f": {untrusted}; {variable}=1 takes it all the same"


def is_open(variable: str) -> bool:
    """Whether neither the variable nor a version of NVRTC that is not trusted decides about kernels of wgmma."""
    return switches.setting(variable) is None and why_refused(variable) is None


def by_tables(
    ways: tuple[Sequence[KernelCase], Sequence[KernelCase]], names: tuple[str, str], problem: Problem, device: Device
) -> Choice | None:
    """Between kernels and those in whose place they come, by tables of tuned tiles in which both were timed on one call; None without."""
    timed = tuned_tiles.faster_way(ways, problem, device)
    if timed is None:
        return None
    number, part, how = timed
    return Choice(number == 0, f"{names[number]}, {how} to take {part:.2f} of the time of {names[1 - number]}", True)
