"""The machine code of the wgmma backward kernel: nothing spills, nothing is serialised, and products in flight have their registers to themselves."""

from __future__ import annotations

from typing import Any

import pytest
from test_kernels_compile import is_quick, named
from test_wgmma_machine_code import CASES, ON, assert_as_meant, code_of, loops_of

from cuflash.cli.inspection import Report, inspect_kernels
from cuflash.jit.compiler import CompileRequest
from cuflash.planning import query_splits, tile_choice, wgmma_backward
from cuflash.planning.kernel_cases import KernelCase
from cuflash.planning.kernel_plan import Splits
from cuflash.planning.kernel_specs import BACKWARD_WGMMA, BACKWARD_WGMMA_DKDQ, BACKWARD_WGMMA_DV
from cuflash.planning.offline import offline_kernels
from cuflash.problem.features import NO_FEATURES, FeatureSet
from cuflash.problem.tile import Tile

pytest.importorskip("cupy")


def default_tile(dtype: str, head_dim: int, features: FeatureSet = NO_FEATURES, head_dim_v: int = 0) -> Tile:
    return tile_choice.default_tile(KernelCase(BACKWARD_WGMMA, dtype, head_dim, head_dim_v=head_dim_v, features=features), ON)


def report_of(
    dtype: str, head_dim: int, is_causal: bool, features: FeatureSet = NO_FEATURES, head_dim_v: int = 0, tile: Tile | None = None,
    **lengths: bool,
) -> Report:  # fmt: skip
    tiles = {BACKWARD_WGMMA.name: tile or default_tile(dtype, head_dim, features, head_dim_v)}
    kernels = offline_kernels(
        ON, dtype=dtype, head_dim=head_dim, head_dim_v=head_dim_v or None, is_causal=is_causal, features=features, tile=tiles, **lengths
    )
    (report,) = inspect_kernels((ON, kernel) for kernel in kernels if kernel.spec == BACKWARD_WGMMA)
    return report


WIDE: dict[str, dict[str, Any]] = {
    "256": {}, "192": {"head_dim": 192}, "200/136": {"head_dim": 200, "head_dim_v": 136}, "128/256": {"head_dim": 128, "head_dim_v": 256}, "256/64": {"head_dim_v": 64},
    "packed": {"varlen": True}, "lengths": {"seqlens_kv": True}, "padded queries": {"seqlens_q": True},
    **{
        str(features): {"features": features}
        for features in (
            FeatureSet(window=True), FeatureSet(softcap=True), FeatureSet(alibi=True), FeatureSet(dropout=True), FeatureSet(attn_mask="float32"),
            FeatureSet(attn_mask="bool"), FeatureSet(segments=True),
            FeatureSet(window=True, softcap=True, alibi=True, dropout=True),
        )
    },
}  # fmt: skip


SPLIT: dict[str, tuple[int, dict[str, Any]]] = {
    "64": (24, {"head_dim": 64}), "128": (32, {"head_dim": 128, "is_causal": True}), "192/128": (40, {"head_dim": 192, "head_dim_v": 128}),
    "256": (0, {"head_dim": 256}), "packed": (0, {"head_dim": 128, "varlen": True, "is_causal": True}),
    "dropout": (32, {"head_dim": 128, "features": FeatureSet(dropout=True)}), "segments": (200, {"head_dim": 64, "features": FeatureSet(segments=True)}),
}  # fmt: skip
"""Bytes that may be spilled, which lie outside of the loops over tiles."""


@pytest.mark.sample(1)
@pytest.mark.parametrize("case", SPLIT)
def test_kernels_whose_blocks_share_out_queries(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spilled, of_call = SPLIT[case]
    monkeypatch.setenv(wgmma_backward.VARIABLE, "1")
    monkeypatch.setattr(query_splits, "choose", lambda *_: Splits(2, chains=1 if case == "segments" else 2))
    kernels = [kernel for kernel in offline_kernels(ON, dtype="bfloat16", **of_call) if kernel.splits.chains]
    reports = inspect_kernels((ON, kernel) for kernel in kernels)
    for report, kernel in zip(reports, kernels, strict=True):
        if kernel.spec.is_tiled:
            assert_as_meant(report, spilled)
            with_products = [loop for loop in loops_of(code_of(report)) if any(i.base == "HGMMA" for i in loop)]
            over_tiles = [loop for loop in with_products if not any(other != loop and other[0] in loop for other in with_products)]
            assert over_tiles
            assert case == "segments" or not [i for loop in over_tiles for i in loop if i.base in ("STL", "LDL")]
        else:
            assert report.resources.spill_store_bytes == 0, named(report)


@pytest.mark.sample(1)
@pytest.mark.parametrize("case", WIDE)
def test_wide_heads_in_two_kernels(case: str, monkeypatch: pytest.MonkeyPatch, compilation_seconds: dict[CompileRequest, float]) -> None:
    """Two products in one of them, four in the other."""
    monkeypatch.setenv(wgmma_backward.VARIABLE, "1")
    kernels = offline_kernels(ON, **{"dtype": "bfloat16", "head_dim": 256, "is_causal": True, **WIDE[case]})
    of_wgmma = [kernel for kernel in kernels if kernel.spec in (BACKWARD_WGMMA_DV, BACKWARD_WGMMA_DKDQ)]
    assert len(of_wgmma) == 2
    for report in inspect_kernels((ON, kernel) for kernel in of_wgmma):
        assert_as_meant(report)
        assert is_quick(report, compilation_seconds) or "features" in WIDE[case], f"{named(report)}: {report.seconds:.2f} seconds"


@pytest.mark.sample(1)
@CASES
def test_calls_without_features(dtype: str, head_dim: int, is_causal: bool, compilation_seconds: dict[CompileRequest, float]) -> None:
    """Loops of five products and additions of four numbers."""
    report = report_of(dtype, head_dim, is_causal)
    assert_as_meant(report)
    assert is_quick(report, compilation_seconds), f"{named(report)}: {report.seconds:.2f} seconds"
    tile = default_tile(dtype, head_dim)
    kind = "F32" if dtype == "float16" else "F32.BF16"
    scores, gradients = f"HGMMA.64x{tile.tile_q}x16.{kind}", f"HGMMA.64x{head_dim}x16.{kind}"
    queries = f"HGMMA.64x{tile.tile_q if head_dim > 64 else tile.tile_q // 2}x16.{kind}"
    hot = [loop for loop in loops_of(code_of(report)) if sum(i.base == "HGMMA" for i in loop) == head_dim // 8 + tile.tile_q // 8 + 8]
    assert len(hot) == 2, "tiles whose queries see all keys, and the others"
    for loop in hot:
        opcodes = [i.opcode for i in loop]
        assert {scores, gradients, queries} <= set(opcodes)
        assert sum(i.base == "MUFU" for i in loop) == tile.tile_q // 2
        assert sum(i.base == "STSM" for i in loop) == tile.tile_q // 16
        assert sum(opcode.startswith("REDG.E.ADD.F32x4") for opcode in opcodes) == (
            tile.tile_q // 8 if head_dim > 64 else tile.tile_q // 16
        )
        assert not {"LDL", "STL", "LDG"} & {i.base for i in loop}


ALL = FeatureSet(window=True, softcap=True, alibi=True, dropout=True)
OTHERS: dict[str, dict[str, Any]] = {
    **{f"values of {dims}": {"head_dim": dims[0], "head_dim_v": dims[1]} for dims in ((64, 128), (128, 64), (8, 8), (136, 128), (192, 64), (192, 128))},
    **{
        f"{features} at {head_dim}": {"head_dim": head_dim, "features": features}
        for head_dim in (64, 96, 128)
        for features in (
            NO_FEATURES, FeatureSet(window=True), FeatureSet(softcap=True), FeatureSet(alibi=True), FeatureSet(prefix=True), FeatureSet(dropout=True), ALL,
        )
    },
    **{
        f"{features} at 192/128": {"head_dim": 192, "head_dim_v": 128, "features": features}
        for features in (FeatureSet(window=True), FeatureSet(softcap=True), FeatureSet(alibi=True), FeatureSet(prefix=True))
    },
    **{f"{lengths} at {head_dim}": {"head_dim": head_dim, lengths: True} for head_dim in (64, 128) for lengths in ("varlen", "seqlens_kv", "seqlens_q")},
}  # fmt: skip


SPILLED = {f"{FeatureSet(window=True)} at 64": 12}
"""Bytes, of numbers that are wanted once for each query head, and in no step."""


@pytest.mark.exhaustive
@pytest.mark.parametrize("case", OTHERS)
def test_others_fit_the_registers(case: str) -> None:
    report = report_of("bfloat16", is_causal=True, **OTHERS[case])
    assert_as_meant(report, SPILLED.get(case, 0))
    if case in SPILLED:
        steps = min((loop for loop in loops_of(code_of(report)) if any(i.base == "HGMMA" for i in loop)), key=len)
        assert not {"LDL", "STL"} & {i.base for i in steps}


@pytest.mark.exhaustive
@pytest.mark.parametrize("head_dim", [64, 96, 128])
@pytest.mark.parametrize(
    "features", [FeatureSet(segments=True), *(FeatureSet(attn_mask=of) for of in ("bool", "bfloat16", "float32"))], ids=str
)
def test_masks_spill_little(features: FeatureSet, head_dim: int) -> None:
    """Most of it by warps that copy, and have time: by the timing model it costs nothing (docs/log-backward-wgmma.md)."""
    assert_as_meant(report_of("bfloat16", head_dim, True, features), spilled=120)


@pytest.mark.exhaustive
@pytest.mark.parametrize("head_dim", [64, 96, 128])
def test_the_longest_tiles_fit_the_registers(head_dim: int) -> None:
    """Those that the rules allow."""
    legal = tile_choice.legal_tiles_for(KernelCase(BACKWARD_WGMMA, "bfloat16", head_dim), ON)
    tile = max(legal, key=lambda tile: (tile.tile_q, tile.num_stages))
    assert_as_meant(report_of("bfloat16", head_dim, True, tile=tile))
