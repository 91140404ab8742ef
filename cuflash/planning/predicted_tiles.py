"""Tiles that the timing model finds best (docs/timing.md), and that were not timed on a GPU.

Those of `TILES` and `WITH_FEATURE` may spill a few bytes, which the model takes into account. `FUSED_BACKWARD` has the cases in which the model predicts that the fused backward kernel takes at least 3 % less time than the kernels with seven products
(docs/log-forward.md): steady states, full and causal, without score features or lengths on the device.
"""

from __future__ import annotations

from cuflash.planning.measured_tiles import ALL, CHEAP, MASKS

TILES: dict[tuple[str, str, int], tuple[int, int, int, int]] = {
    ("sm_80", "forward", 64): (64, 64, 2, 1),
    ("sm_80", "forward", 128): (128, 48, 4, 1),
    ("sm_80", "forward", 256): (128, 96, 8, 1),
    ("sm_80", "backward_dkdv", 64): (32, 64, 2, 2),
    ("sm_80", "backward_dkdv", 128): (32, 64, 4, 2),
    ("sm_80", "backward_dv", 256): (64, 128, 8, 1),
    ("sm_80", "backward_dk", 256): (32, 128, 8, 1),
    ("sm_80", "backward_dq", 64): (128, 64, 4, 2),
    ("sm_80", "backward_dq", 128): (64, 32, 4, 2),
    ("sm_80", "backward_dq", 256): (128, 32, 8, 1),
    ("sm_86", "forward", 64): (64, 64, 2, 1),
    ("sm_86", "backward_dkdv", 128): (32, 128, 8, 2),
    ("sm_89", "forward", 64): (64, 64, 2, 1),
    ("sm_89", "backward_dkdv", 128): (32, 128, 8, 2),
    ("sm_90", "forward", 64): (128, 112, 4, 1),
    ("sm_90", "forward", 128): (128, 48, 4, 1),
    ("sm_120", "forward", 64): (64, 32, 4, 1),
    ("sm_120", "forward", 128): (64, 64, 4, 1),
    ("sm_120", "backward_dkdv", 128): (32, 128, 8, 2),
}
"""(architecture, kernel, head_dim) -> tile_q, tile_kv, num_warps, num_stages; what benchmarks/predicted_tile_sweep.py prints. 16-bit types, value of the same
head_dim, no score features."""

FLOAT32: dict[tuple[str, str, int], tuple[int, int, int, int]] = {
    ("sm_80", "forward", 64): (128, 32, 4, 1),
    ("sm_90", "forward", 64): (128, 32, 4, 1),
    ("sm_90", "forward", 128): (64, 32, 4, 2),
    ("sm_90", "backward_dk", 256): (16, 64, 4, 2),
    ("sm_120", "forward", 128): (128, 32, 8, 1),
    ("sm_120", "backward_dkdv", 64): (32, 64, 4, 1),
    ("sm_120", "backward_dv", 128): (32, 128, 8, 1),
    ("sm_120", "backward_dv", 256): (16, 64, 4, 1),
    ("sm_120", "backward_dk", 128): (32, 64, 4, 1),
    ("sm_120", "backward_dq", 64): (64, 16, 4, 2),
    ("sm_120", "backward_dq", 128): (64, 32, 4, 1),
}
"""The same of float32 with three products of TF32 each, of the tiles that that benchmark was given with `--dtype float32 --tile` (docs/log-float32.md, "float32")."""

_HALF_MASKS = frozenset(("float16", "bfloat16"))
_ODD_HALF_MASKS = frozenset(("odd float16", "odd bfloat16"))
_MASKS = _HALF_MASKS | {"bool", "float32"}
WITH_FEATURE: dict[tuple[str, str, int], dict[tuple[int, int, int, int], frozenset[str]]] = {
    ("sm_80", "forward", 64): {
        (128, 96, 4, 1): frozenset(("window", "sinks", "segments", "softcap")),
        (128, 80, 4, 1): _HALF_MASKS | {"alibi"},
        (64, 80, 2, 1): frozenset(("bool",)),
        (128, 64, 4, 1): _ODD_HALF_MASKS | {"prefix", "odd bool", "float32"},
        (128, 64, 4, 2): frozenset(("dropout", "odd float32")),
    },
    ("sm_80", "forward", 128): {
        (128, 64, 4, 1): frozenset(("bool",)),
        (128, 48, 4, 1): (ALL - {"bool"}) | {"odd bool"},
        (128, 128, 8, 1): _ODD_HALF_MASKS,
        (64, 64, 4, 1): frozenset(("odd float32",)),
    },
    **{(arch, "forward", 64): {(64, 64, 4, 1): _MASKS} for arch in ("sm_86", "sm_89", "sm_120")},
    **{(arch, "forward", 128): {(64, 32, 4, 1): _MASKS} for arch in ("sm_86", "sm_89", "sm_120")},
    ("sm_80", "backward_dkdv", 64): {
        (32, 128, 4, 2): frozenset(("alibi", "prefix")),
        (32, 64, 2, 2): MASKS | {"segments", "window", "sinks", "bool", "dropout", "softcap"},
    },
    ("sm_80", "backward_dkdv", 128): {(32, 64, 4, 2): ALL},
    ("sm_80", "backward_dq", 64): {
        (128, 64, 4, 2): ALL - {"softcap"},
        (128, 48, 4, 2): frozenset(("softcap",)),
    },
    ("sm_80", "backward_dq", 128): {(64, 32, 4, 2): ALL},
    ("sm_90", "forward", 64): {
        (128, 96, 4, 1): frozenset(("softcap", "dropout", "prefix", "bool")),
        (128, 80, 4, 1): _HALF_MASKS | {"alibi"},
        (128, 64, 4, 2): frozenset(("segments",)),
        (128, 64, 4, 1): _ODD_HALF_MASKS | {"window", "sinks", "float32", "odd bool"},
    },
    ("sm_90", "forward", 128): {
        (128, 48, 4, 1): ALL | {"odd bool"},
        (128, 32, 4, 2): _ODD_HALF_MASKS | {"odd float32"},
    },
    ("sm_90", "backward_dkdv", 64): {
        (48, 128, 4, 2): CHEAP | {"float32"},
        (32, 128, 4, 2): _HALF_MASKS | {"bool", "segments", "window", "dropout", "softcap"},
    },
    ("sm_90", "backward_dq", 64): {
        (128, 64, 4, 2): CHEAP | {"float32", "window", "dropout"},
        (128, 48, 4, 2): _HALF_MASKS | {"bool", "segments", "softcap"},
    },
    **{(arch, "backward_dq_mask", 64): {(128, 48, 4, 2): _HALF_MASKS, (64, 64, 4, 2): ALL - _HALF_MASKS} for arch in ("sm_80", "sm_90")},
    ("sm_80", "backward_dq_mask", 128): {(64, 32, 4, 2): ALL},
    ("sm_90", "backward_dq_mask", 128): {(64, 64, 4, 2): ALL},
    **{
        (arch, "backward_mask", 64): {(64, 128, 4, 1): MASKS, (64, 64, 4, 1): ALL - MASKS}
        for arch in ("sm_80", "sm_86", "sm_89", "sm_90", "sm_120")
    },
    **{(arch, "backward_mask", 32): {(64, 128, 4, 1): MASKS, (64, 64, 4, 1): ALL - MASKS} for arch in ("sm_80", "sm_90")},
    ("sm_80", "backward_mask", 128): {(64, 64, 4, 1): ALL},
    ("sm_90", "backward_mask", 128): {(128, 64, 4, 1): _HALF_MASKS, (64, 64, 4, 1): ALL - _HALF_MASKS},
    **{(arch, "backward_mask", 128): {(64, 32, 4, 1): ALL} for arch in ("sm_86", "sm_89", "sm_120")},
}
"""(architecture, kernel, head_dim) -> tiles, from the largest to the smallest, and the features with which each is the best of those that spill at most
`tile_choice.TOLERATED_SPILLS`, full and causal. Found with one feature at a time, full, float16; calls with several take the smallest of their tiles.
A mask that the kernel does not copy in chunks of 16 bytes, though it copies others, is an odd one."""

WGMMA: dict[tuple[str, str, int], tuple[int, int, int, int]] = {
    ("sm_90", "forward_wgmma_float32", 64): (192, 48, 12, 2),
    ("sm_90", "forward_wgmma_float32", 128): (128, 64, 8, 1),
    ("sm_90", "backward_wgmma_dv", 256): (80, 128, 8, 2),
    ("sm_90", "backward_wgmma_dkdq", 192): (64, 128, 8, 2),
    ("sm_90", "backward_wgmma_dkdq", 256): (48, 128, 8, 2),
    ("sm_90", "backward_wgmma", 192): (48, 128, 8, 2),
}
"""(architecture, kernel, head_dim) -> tile_q, tile_kv, num_warps, num_stages; heads of fewer columns take them, too, and features fewer queries where they need registers."""

WGMMA_WITH_FEATURE: dict[tuple[str, int, str], tuple[int, int, int, int]] = {
    ("forward_wgmma", 64, "window"): (192, 80, 12, 3),
    ("forward_wgmma", 64, "alibi"): (192, 96, 12, 3),
    ("forward_wgmma", 64, "softcap"): (192, 96, 12, 3),
    ("forward_wgmma", 64, "dropout"): (192, 112, 12, 4),
    ("forward_wgmma", 64, "bool"): (192, 112, 12, 3),
    ("forward_wgmma", 64, "float16"): (192, 64, 12, 4),
    ("forward_wgmma", 64, "bfloat16"): (192, 64, 12, 4),
    ("forward_wgmma", 64, "float32"): (192, 64, 12, 3),
    ("forward_wgmma", 128, "alibi"): (192, 80, 12, 3),
    ("forward_wgmma", 128, "softcap"): (192, 80, 12, 3),
    ("forward_wgmma", 128, "dropout"): (192, 48, 12, 3),
    ("forward_wgmma", 128, "float16"): (192, 64, 12, 3),
    ("forward_wgmma", 128, "bfloat16"): (192, 64, 12, 3),
    ("forward_wgmma", 128, "float32"): (192, 48, 12, 3),
    ("forward_wgmma", 128, "segments"): (192, 80, 12, 3),
    ("backward_wgmma", 64, "alibi"): (96, 128, 8, 3),
    ("backward_wgmma", 64, "bool"): (96, 128, 8, 3),
    ("backward_wgmma", 64, "segments"): (96, 128, 8, 3),
}
"""(kernel, head_dim, the only feature) -> tile_q, tile_kv, num_warps, num_stages, where it is not the tile without the feature, or that with as many keys as fit: a
warpgroup that takes longer for a tile holds its stage for longer, so three or four stages are predicted to be faster, and for masks of 16 bits, whose tiles
are as large as those of K and V together, more stages of fewer keys; of backward_wgmma fewer queries, which leave registers for K and V, and of
several features the smallest of their tiles."""

WGMMA_WITH_FEATURE_FULL: dict[tuple[str, int, str], tuple[int, int, int, int]] = {
    ("forward_wgmma", 64, "float16"): (192, 128, 12, 2),
    ("forward_wgmma", 64, "bfloat16"): (192, 128, 12, 2),
}
"""The same of calls without a causal mask, where it is another one."""

FUSED_BACKWARD: dict[tuple[str, int], tuple[int, int, int, int]] = {
    ("sm_80", 64): (128, 128, 8, 2),
    ("sm_80", 128): (64, 128, 8, 2),
    ("sm_80", 256): (64, 64, 8, 1),
    ("sm_86", 64): (64, 128, 8, 2),
    ("sm_86", 128): (32, 128, 8, 1),
    ("sm_86", 256): (32, 32, 4, 1),
    ("sm_89", 64): (64, 128, 8, 2),
    ("sm_89", 128): (32, 128, 8, 1),
    ("sm_89", 256): (32, 32, 4, 1),
    ("sm_90", 128): (32, 64, 4, 2),
    ("sm_90", 256): (64, 64, 8, 2),
    ("sm_120", 64): (64, 128, 8, 2),
    ("sm_120", 128): (32, 128, 8, 1),
    ("sm_120", 256): (32, 32, 4, 1),
}
"""(architecture, head_dim) -> tile_q, tile_kv, num_warps, num_stages; 16-bit types, value of the same head_dim."""

_LENGTHS = frozenset(("varlen", "seqlens_kv"))
_BY_DATA = frozenset(("bool", "segments"))
_ALL = _LENGTHS | _BY_DATA | {"window", "softcap", "alibi", "dropout", "sinks", "float16", "bfloat16", "float32"}
FUSED_WITH_FEATURE: dict[tuple[str, int], frozenset[str]] = {
    ("sm_80", 64): _ALL - {"softcap", "dropout"},
    ("sm_80", 128): _LENGTHS | _BY_DATA | {"window", "alibi", "sinks", "dropout"},
    ("sm_80", 256): _BY_DATA | {"window", "softcap", "alibi", "dropout"},
    ("sm_86", 64): _ALL,
    ("sm_86", 128): _ALL,
    ("sm_89", 64): _ALL,
    ("sm_89", 128): _ALL,
    ("sm_90", 128): frozenset(("dropout",)),
    ("sm_120", 128): _ALL,
}
"""Score features, element types of a mask and kinds of lengths that only the device knows, of which one leaves that tile with few spills, and with which it is predicted
to be faster, too (docs/log-forward.md)."""
