"""Kernels that run where they are asked for, until they have run on a GPU: by a mapping of tiles that names them, or by an environment variable."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

from cuflash.hardware.device import Device
from cuflash.planning import tile_rules
from cuflash.planning.kernel_cases import KernelCase
from cuflash.planning.kernel_specs import KernelSpec
from cuflash.problem.tile import Tile, Tiles
from cuflash.system import switches


def asked_by(
    case: KernelCase, device: Device, tile: Tiles, variable: str, instead: Iterable[KernelSpec]
) -> Literal["tile", "variable"] | None:
    """How the kernel of `case` is asked for; None if it is not, because the tile is for one of those that run `instead` of it, or nobody asks.

    Raises:
        OptionError: a value of the variable that is neither 0 nor 1.
    """
    if isinstance(tile, Mapping):
        if case.kernel.name in tile:
            return "tile"
        if any(kernel.name in tile for kernel in instead):
            return None
    if isinstance(tile, Tile) and tile_rules.broken_rule(case, tile, device) is not None:
        return None
    return "variable" if switches.is_on(variable) else None
