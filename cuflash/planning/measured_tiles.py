"""Tiles that were faster on a GPU than what `tile_model` prefers, of those that spill at most a few registers (`tile_choice.TOLERATED_SPILLS`).

`TILES` has what benchmarks/results/nvidia-h100-80gb-hbm3/tiles.csv says of bfloat16 at seqlen 4096, full and causal: the tile with the least sum of both
times. The kernels of both 16-bit types are the same but for their conversions. Forward tiles of head_dim 64 and 128 are in `predicted_tiles`: the loop that
was timed rescaled O and clamped exponents in every tile, and no longer does. For calls with a feature `WITH_FEATURE` has the fastest of those tiles that
leave room for it, from the largest to the smallest. Where nothing was timed, the model decides. Tiles of `forward_wgmma` are those of the experiments in docs/hopper.md that were fastest at most
lengths; the kernel itself has not been timed.
"""

from __future__ import annotations

TILES: dict[tuple[str, str, int], tuple[int, int, int, int]] = {
    ("sm_90", "forward", 256): (64, 64, 4, 1),
    ("sm_90", "forward_wgmma", 64): (192, 128, 12, 2),
    ("sm_90", "forward_wgmma", 128): (192, 80, 12, 2),
    ("sm_90", "forward_wgmma", 256): (128, 80, 8, 2),
    ("sm_90", "backward_wgmma", 64): (128, 128, 8, 2),
    ("sm_90", "backward_wgmma", 128): (80, 128, 8, 2),
    ("sm_90", "backward_dkdv", 64): (48, 128, 4, 2),
    ("sm_90", "backward_dkdv", 128): (32, 64, 4, 2),
    ("sm_90", "backward_dv", 256): (64, 64, 4, 1),
    ("sm_90", "backward_dk", 256): (32, 64, 4, 1),
    ("sm_90", "backward_dq", 64): (128, 64, 4, 2),
    ("sm_90", "backward_dq", 128): (64, 64, 4, 2),
    ("sm_90", "backward_dq", 256): (64, 32, 4, 1),
}
"""(architecture, kernel, head_dim) -> tile_q, tile_kv, num_warps, num_stages; 16-bit types, value of the same head_dim."""

CHEAP = frozenset(("alibi", "sinks", "prefix"))
MASKS = frozenset(("float16", "bfloat16", "float32"))
ALL = CHEAP | MASKS | frozenset(("window", "softcap", "dropout", "segments", "bool"))
"""Features, a mask by its element type: those that take few registers, additive masks, and all."""

WITH_FEATURE: dict[tuple[str, str, int], dict[tuple[int, int, int, int], frozenset[str]]] = {
    ("sm_90", "backward_dkdv", 128): {(32, 64, 4, 2): ALL},
    ("sm_90", "backward_dq", 128): {(64, 64, 4, 2): ALL},
}
"""Tiles that were among the fastest without features (all but one), and the score features, or element types of a mask, of which one leaves each without spills (causal, bfloat16, NVRTC
12.9). They were not timed with it; the timing model predicts that they are faster than the choice of `tile_model` (docs/log-features.md, "What features cost")."""
