"""Tiles that the timing model finds best (docs/timing.md), of those that spill no register, and that were not timed on a GPU.

`TILES` has the fused backward kernel where the model predicts that it takes at least 3 % less time than the kernels with seven products (docs/performance.md).
"""

from __future__ import annotations

TILES: dict[tuple[str, str, int], tuple[int, int, int, int]] = {
    ("sm_80", "backward_fused", 64): (32, 128, 4, 2),
    ("sm_80", "backward_fused", 128): (64, 128, 8, 2),
    ("sm_86", "backward_fused", 64): (64, 128, 8, 2),
    ("sm_86", "backward_fused", 128): (32, 128, 8, 1),
    ("sm_89", "backward_fused", 64): (64, 128, 8, 2),
    ("sm_89", "backward_fused", 128): (32, 128, 8, 1),
    ("sm_90", "backward_fused", 64): (128, 64, 4, 2),
    ("sm_90", "backward_fused", 128): (64, 128, 8, 2),
    ("sm_120", "backward_fused", 64): (64, 128, 8, 2),
    ("sm_120", "backward_fused", 128): (32, 128, 8, 1),
}
"""(architecture, kernel, head_dim) -> tile_q, tile_kv, num_warps, num_stages; 16-bit types, value of the same head_dim, no score features."""
