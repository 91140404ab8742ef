"""Tiles that were faster on a GPU than what `tile_model` prefers, of those that spill no register.

`TILES` has what benchmarks/results/nvidia-h100-80gb-hbm3/tiles.csv says of bfloat16 at seqlen 4096, full and causal: the tile with the least sum of both
times. The kernels of both 16-bit types are the same but for their conversions. Where nothing was timed, the model decides. Tiles of `forward_wgmma` are those
of the experiments in docs/hopper.md that were fastest at most lengths; the kernel itself has not been timed.
"""

from __future__ import annotations

TILES: dict[tuple[str, str, int], tuple[int, int, int, int]] = {
    ("sm_90", "forward", 64): (128, 96, 4, 1),
    ("sm_90", "forward", 128): (128, 128, 8, 1),
    ("sm_90", "forward", 256): (64, 64, 4, 1),
    ("sm_90", "forward_wgmma", 64): (192, 128, 12, 2),
    ("sm_90", "forward_wgmma", 128): (192, 80, 12, 2),
    ("sm_90", "forward_wgmma", 256): (128, 80, 8, 2),
    ("sm_90", "backward_dkdv", 64): (48, 128, 4, 2),
    ("sm_90", "backward_dkdv", 128): (32, 64, 4, 2),
    ("sm_90", "backward_dv", 256): (64, 64, 4, 1),
    ("sm_90", "backward_dk", 256): (32, 64, 4, 1),
    ("sm_90", "backward_dq", 64): (128, 64, 4, 2),
    ("sm_90", "backward_dq", 128): (64, 64, 4, 2),
    ("sm_90", "backward_dq", 256): (64, 32, 4, 1),
}
"""(architecture, kernel, head_dim) -> tile_q, tile_kv, num_warps, num_stages; 16-bit types, value of the same head_dim, no score features."""
