"""Which of the two ways to the gradients is faster, by the timing model: one kernel of mma.sync with five products (`fused_backward`), or kernels of their own.

`STEADY` has what the model finds for the loops of both with their default tiles (docs/timing.md); `predicted_time` makes the time of a call of it.
"""

from __future__ import annotations

from cuflash.hardware.device import Device
from cuflash.planning import key_parts, predicted_time
from cuflash.planning.kernel_cases import KernelCase
from cuflash.planning.kernel_plan import UNSPLIT, Splits
from cuflash.planning.kernel_specs import KernelSpec
from cuflash.planning.predicted_loops import line_of
from cuflash.planning.predicted_time import Steady
from cuflash.problem.problem import Problem
from cuflash.problem.tile import Tile

LEAST_GAIN = 1.03
"""Predictions that are closer to each other mean nothing."""

STEADY: dict[tuple[str, str, int], Steady] = {
    ("sm_80", "backward_dkdv", 64): Steady(4, 0.761, 0.313),
    ("sm_80", "backward_dq", 64): Steady(2, 0.279, 0.235),
    ("sm_80", "backward_fused", 64): Steady(1, 0.467, 0.467),
    ("sm_80", "backward_dkdv", 128): Steady(2, 0.933, 0.741),
    ("sm_80", "backward_dq", 128): Steady(2, 0.782, 0.576),
    ("sm_80", "backward_fused", 128): Steady(1, 0.858, 0.858),
    ("sm_80", "backward_dv", 256): Steady(1, 0.971, 0.971),
    ("sm_80", "backward_dk", 256): Steady(1, 1.552, 1.552),
    ("sm_80", "backward_dq", 256): Steady(1, 1.527, 1.527),
    ("sm_80", "backward_fused", 256): Steady(1, 1.883, 1.883),
    ("sm_86", "backward_dkdv", 64): Steady(1, 1.074, 1.074),
    ("sm_86", "backward_dq", 64): Steady(4, 1.021, 0.755),
    ("sm_86", "backward_fused", 64): Steady(1, 1.382, 1.382),
    ("sm_86", "backward_dkdv", 128): Steady(1, 2.126, 2.126),
    ("sm_86", "backward_dq", 128): Steady(1, 1.610, 1.610),
    ("sm_86", "backward_fused", 128): Steady(1, 2.636, 2.636),
    ("sm_86", "backward_dv", 256): Steady(1, 2.226, 2.226),
    ("sm_86", "backward_dk", 256): Steady(1, 4.016, 4.016),
    ("sm_86", "backward_dq", 256): Steady(1, 3.933, 3.933),
    ("sm_86", "backward_fused", 256): Steady(1, 6.506, 6.506),
    ("sm_90", "backward_dkdv", 128): Steady(2, 0.921, 0.731),
    ("sm_90", "backward_dq", 128): Steady(2, 0.626, 0.499),
    ("sm_90", "backward_fused", 128): Steady(2, 1.365, 0.936),
    ("sm_90", "backward_dv", 256): Steady(2, 1.457, 0.848),
    ("sm_90", "backward_dk", 256): Steady(2, 2.221, 1.366),
    ("sm_90", "backward_dq", 256): Steady(2, 2.196, 1.336),
    ("sm_90", "backward_fused", 256): Steady(1, 1.790, 1.790),
    ("sm_120", "backward_dkdv", 64): Steady(1, 1.055, 1.055),
    ("sm_120", "backward_dq", 64): Steady(4, 1.035, 0.759),
    ("sm_120", "backward_fused", 64): Steady(1, 1.371, 1.371),
    ("sm_120", "backward_dkdv", 128): Steady(1, 2.112, 2.112),
    ("sm_120", "backward_dq", 128): Steady(1, 1.611, 1.611),
    ("sm_120", "backward_fused", 128): Steady(1, 2.657, 2.657),
    ("sm_120", "backward_dv", 256): Steady(1, 2.212, 2.212),
    ("sm_120", "backward_dk", 256): Steady(1, 4.355, 4.355),
    ("sm_120", "backward_dq", 256): Steady(1, 4.273, 4.273),
    ("sm_120", "backward_fused", 256): Steady(1, 6.502, 6.502),
    ("sm_80", "backward_dkdv float32", 64): Steady(1, 1.941, 1.941),
    ("sm_80", "backward_dv float32", 128): Steady(1, 1.924, 1.924),
    ("sm_80", "backward_dk float32", 128): Steady(1, 3.113, 3.113),
    ("sm_86", "backward_dkdv float32", 64): Steady(1, 6.243, 6.243),
    ("sm_86", "backward_dv float32", 128): Steady(1, 6.643, 6.643),
    ("sm_86", "backward_dk float32", 128): Steady(1, 10.676, 10.676),
    ("sm_90", "backward_dkdv float32", 64): Steady(1, 1.665, 1.665),
    ("sm_90", "backward_dv float32", 128): Steady(1, 1.618, 1.618),
    ("sm_90", "backward_dk float32", 128): Steady(1, 2.403, 2.403),
    ("sm_120", "backward_dkdv float32", 64): Steady(2, 7.090, 6.201),
    ("sm_120", "backward_dv float32", 128): Steady(1, 6.638, 6.638),
    ("sm_120", "backward_dk float32", 128): Steady(1, 10.723, 10.723),
}
"""(architecture, kernel, head_dim) -> its loop; what benchmarks/predicted_tile_sweep.py --steady prints: float16, default tiles, the mean of full and causal.
Runs were long, but for sm_90, `backward_fused` on sm_86 at head_dim 128 and 256, and on sm_80 dK/dV and dQ at 128: those are of few trips. Of float32,
`--dtype float32` prints those of kernels whose blocks may share out queries."""
STEADY |= {
    ("sm_89", kernel, head_dim): steady for (arch, kernel, head_dim), steady in STEADY.items() if arch == "sm_86"
}  # the same SM to the model


OTHER_TILES: dict[tuple[str, str, int, tuple[int, int, int, int]], Steady] = {
    ("sm_80", "backward_dkdv", 64, (32, 128, 4, 2)): Steady(2, 0.416, 0.341),
}
"""The same with tiles that calls with a feature have (`predicted_tiles.WITH_FEATURE`) and others do not, without the feature: both ways to the gradients take about as much longer with it."""


def steady_of(case: KernelCase, tile: Tile, device: Device) -> Steady:
    """The loop of a kernel that the model was asked about."""
    numbers = tile.tile_q, tile.tile_kv, tile.num_warps, tile.num_stages
    of_kernel = device.arch, line_of(case.kernel.name, case.dtype), case.head_dim
    return OTHER_TILES.get((*of_kernel, numbers), STEADY[of_kernel])


def is_known(kernel: KernelSpec, problem: Problem, device: Device) -> bool:
    """Whether the model was asked about a kernel."""
    is_like_lines = problem.head_dim == problem.head_dim_v and not (problem.dtype == "float32" and problem.allow_tf32)
    return is_like_lines and (device.arch, line_of(kernel.name, problem.dtype), problem.head_dim) in STEADY


def clocks(case: KernelCase, tile: Tile, problem: Problem, device: Device, section: int = 0) -> float:
    """Of a kernel that the model was asked about; where its blocks share out queries, with the merge of their parts."""
    if case.kernel.shares_queries:
        return key_parts.fastest(case, tile, steady_of(case, tile, device), problem, device)[1]
    grid = predicted_time.grid_of(case, tile, problem, section)
    return predicted_time.clocks(steady_of(case, tile, device), case, tile, grid, problem, device)


def splits_of(case: KernelCase, tile: Tile, problem: Problem, device: Device) -> Splits:
    """How blocks of a kernel of mma.sync share out the queries of a tile of keys."""
    if not is_known(case.kernel, problem, device):
        return UNSPLIT
    return key_parts.fastest(case, tile, steady_of(case, tile, device), problem, device)[0]
