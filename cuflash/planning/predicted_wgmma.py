"""Whether a kernel of wgmma is faster than those of mma.sync that do the same, by the timing model, after what the model was wrong by.

`predicted_loops` has the loops of both, `predicted_time` lays out the grid of the call. The clock of the card falls with what its tensor cores do. Kernels of this design were slower on
an H100 than the model says, the more so the shorter the sequences are (`MEASURED`). Those of mma.sync were slower as well: of that the least that was found counts (`MEASURED_MMA`), so that
a kernel of wgmma is taken where it would gain even then.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from typing import NamedTuple

from cuflash.hardware.device import Device
from cuflash.planning import key_shares, predicted_loops, predicted_time, query_splits, tile_choice
from cuflash.planning.kernel_cases import WIDEST_NARROW_HEAD, KernelCase, converts_sums, multiply_adds
from cuflash.planning.kernel_plan import UNSHARED
from cuflash.planning.predicted_time import Grid, Steady
from cuflash.planning.visits import band_of
from cuflash.problem.features import UNLIMITED
from cuflash.problem.problem import Problem
from cuflash.problem.tile import Tile

LEAST_GAIN = 1.03
"""Predictions that are closer to each other mean nothing."""

LENGTHS = 512, 1024, 2048, 4096, 8192, 16384
MEASURED: dict[tuple[bool, int, bool], tuple[float, ...]] = {
    (False, 64, False): (0.69, 0.78, 0.85, 0.93, 0.97, 1.02),
    (False, 64, True): (0.68, 0.70, 0.80, 0.87, 0.91, 0.94),
    (False, 128, False): (0.72, 0.82, 0.95, 0.99, 1.03, 1.05),
    (False, 128, True): (0.60, 0.72, 0.88, 0.96, 0.91, 0.95),
    (False, 256, False): (0.74, 0.84, 0.95, 1.01, 1.01, 1.02),
    (False, 256, True): (0.55, 0.73, 0.88, 0.94, 0.99, 1.00),
    (True, 256, False): (0.55, 0.74, 0.92, 0.90, 0.95, 0.94),
    (True, 256, True): (0.53, 0.69, 0.85, 0.85, 0.93, 0.90),
}
"""(backward, largest head_dim, causal) -> measured over predicted speed at each of `LENGTHS`, of the kernels of benchmarks/predicted_hopper_experiments.py that have the tile which is
the library's default, no token, and of two orders of tiles the better one. Backward head_dim 128 was measured alone."""
MEASURED_MMA = {64: 1.19, 256: 1.10}
"""Largest head_dim -> least measured over predicted time of a forward kernel of mma.sync on an H100 (docs/timing.md); backward it was 1.00."""

_PEAK = 2048.0
"""Multiply-adds of wgmma per clock and SM."""
_CLOCK_GHZ, _POWER_SHARE, _POWER_GHZ, _POWER_EXPONENT = 1.965, 0.8, 1.56, 0.35
"""Those of timing/machine.py."""


class Compared(NamedTuple):
    """What is predicted of a call.

    Attributes:
        ratio: time of the kernel of wgmma, after `MEASURED`, over that of the others.
        others_ms: milliseconds of the others.
    """

    ratio: float
    others_ms: float

    @property
    def gains(self) -> bool:
        """More than predictions may be wrong by."""
        return self.ratio * LEAST_GAIN <= 1.0


def compare(
    wgmma: Sequence[KernelCase], others: Sequence[KernelCase], problem: Problem, device: Device, section: int = 0
) -> Compared | None:
    """Of kernels that take each other's place, each with its default tile; None where the model was not asked about one of them.

    Args:
        wgmma: the kernels of wgmma.
        others: those of mma.sync.
        problem: the call.
        device: where.
        section: as in `predicted_time.Grid`, of kernels that add up dQ.
    """
    cases = [*wgmma, *others]
    loops = predicted_loops.loops_of([case.kernel.name for case in cases], problem)
    if device.arch != predicted_loops.ARCH or loops is None:
        return None
    by_data = bool(predicted_loops.features_of(problem) & predicted_loops.BY_DATA)
    compared = []
    for all_masked in (False, True) if by_data else (False,):  # how many tiles data cut is not known: what is worse for wgmma counts
        times = [milliseconds(case, loop, problem, device, section, all_masked) for case, loop in zip(cases, loops, strict=True)]
        wgmma_ms = sum(times[: len(wgmma)]) / measured(wgmma[0], problem)
        others_ms = sum(times[len(wgmma) :]) * measured_mma(others[0])
        compared.append(Compared(wgmma_ms / others_ms if others_ms else 1.0, others_ms))
    return max(compared)


def others_milliseconds(others: Sequence[KernelCase], problem: Problem, device: Device, section: int = 0) -> float | None:
    """Of kernels of mma.sync in whose place nothing can come."""
    loops = predicted_loops.loops_of([case.kernel.name for case in others], problem)
    if device.arch != predicted_loops.ARCH or loops is None:
        return None
    return measured_mma(others[0]) * sum(
        milliseconds(case, loop, problem, device, section) for case, loop in zip(others, loops, strict=True)
    )


def milliseconds(case: KernelCase, loop: Steady, problem: Problem, device: Device, section: int = 0, all_masked: bool = False) -> float:
    """That a kernel takes with its default tile; one that adds up dQ together with the conversion of its sums."""
    tile = tile_choice.default_tile(case, device)
    if case.kernel.shares_queries and case.kernel.implementation == "wgmma":
        _, clocks, grid = query_splits.fastest(case, tile, loop, problem, device, all_masked)
        return _milliseconds(clocks, case, tile, grid, device)
    masked = loop.masked if all_masked or case.kernel.implementation == "wgmma" else 1.0
    of_section = section if case.kernel.added_up else 0
    grid = predicted_time.grid_of(case, tile, problem, of_section, masked=masked, all_masked=all_masked)
    if case.kernel.stays and not key_shares.works_differ(problem):
        clocks = _clocks_of_alike(loop, case, tile, grid, problem, device)
    else:
        clocks = predicted_time.clocks(loop, case, tile, grid, problem, device)
    if case.kernel.takes_terms:
        clocks += predicted_time.terms_clocks(problem, device)
    if case.kernel.added_up:
        clocks += predicted_time.conversion_clocks(problem, device, by_blocks=converts_sums(case.kernel, problem))
    return _milliseconds(clocks, case, tile, grid, device)


def _clocks_of_alike(loop: Steady, case: KernelCase, tile: Tile, grid: Grid, problem: Problem, device: Device) -> float:
    """Of blocks that stay, at fixed strides: the last tile of queries of a head, which has fewer, is another one in each block, and the longest round counts."""
    key_tiles, longest = ceil(problem.seqlen_kv / tile.tile_kv), max(grid.trips, default=0)
    alike = grid._replace(trips=[longest] * len(grid.trips))
    shares = key_shares.choose(grid.heads * len(grid.trips), key_tiles, device) if case.kernel.shares_keys else UNSHARED
    trips = key_shares.trips(shares, key_tiles)
    return predicted_time.clocks(loop, case, tile, alike, problem, device, shared_tiles=shares.tiles, shared_trips=trips)


def _milliseconds(clocks: float, case: KernelCase, tile: Tile, grid: Grid, device: Device) -> float:
    """At the clock that the card keeps with so many products."""
    if not clocks:
        return 0.0
    trips = grid.heads * sum(grid.trips)
    share = trips * multiply_adds(case, tile, device) / (clocks * device.num_sms * _PEAK)
    return clocks / (1e6 * clock_ghz(share))


def clock_ghz(share: float) -> float:
    """That the card keeps while so much of what its tensor cores can do is done."""
    return min(_CLOCK_GHZ, _POWER_GHZ * (_POWER_SHARE / share) ** _POWER_EXPONENT) if share > 0 else _CLOCK_GHZ


def measured(case: KernelCase, problem: Problem) -> float:
    """Measured over predicted speed of a kernel of wgmma, in sequences of this length; a window makes them shorter."""
    wide, length = _wide(case), min(problem.max_seqlen_q, _visible_keys(problem))
    of = next(
        found
        for (backward, widest, causal), found in MEASURED.items()
        if (backward, causal) == (case.kernel.backward, problem.is_causal) and wide <= widest
    )
    return next((found for least, found in zip(reversed(LENGTHS), reversed(of), strict=True) if length >= least), of[0])


def measured_mma(case: KernelCase) -> float:
    """Least measured over predicted time of kernels of mma.sync; of those of float32 none was measured."""
    wide = _wide(case)
    return (
        1.0 if case.kernel.backward or case.dtype == "float32" else next(times for widest, times in MEASURED_MMA.items() if wide <= widest)
    )


def _wide(case: KernelCase) -> int:
    """The larger head dimension; wider ones than were measured count as those."""
    return min(WIDEST_NARROW_HEAD, max(case.head_dim, case.head_dim_v))


def _visible_keys(problem: Problem) -> int:
    """Most keys that a query sees."""
    band = band_of(problem)
    if band.low == -UNLIMITED or min(band.high, band.causal) == UNLIMITED:
        return problem.max_seqlen_kv
    return max(0, min(problem.max_seqlen_kv, min(band.high, band.causal) - band.low + 1))
