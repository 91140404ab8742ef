"""Tiles that the timing model finds best (docs/timing.md), of those that spill no register, and that were not timed on a GPU.

`FUSED_BACKWARD` has the cases in which the model predicts that the fused backward kernel takes at least 3 % less time than the kernels with seven products
(docs/performance.md): steady states, full and causal, without score features or lengths on the device.
"""

from __future__ import annotations

FUSED_BACKWARD: dict[tuple[str, int], tuple[int, int, int, int]] = {
    ("sm_80", 64): (64, 64, 4, 2),
    ("sm_80", 128): (64, 128, 8, 2),
    ("sm_86", 64): (64, 128, 8, 2),
    ("sm_86", 128): (32, 128, 8, 1),
    ("sm_89", 64): (64, 128, 8, 2),
    ("sm_89", 128): (32, 128, 8, 1),
    ("sm_120", 64): (64, 128, 8, 2),
    ("sm_120", 128): (32, 128, 8, 1),
}
"""(architecture, head_dim) -> tile_q, tile_kv, num_warps, num_stages; 16-bit types, value of the same head_dim, no score features."""
