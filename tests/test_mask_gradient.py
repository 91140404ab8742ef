"""The gradient of an additive mask that has an element for each pair of query and key: the kernel of dQ stores it on its way, and zeros where it visits no tile."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy
import pytest
from conftest import Target, poison_new_memory
from test_features import FEATURES, SKV, SQ, B, H, additive_mask, inputs_of

import cuflash
from cuflash import Tile
from cuflash.cli.sample_features import SampleFeatures
from cuflash.cli.samples import Sample, plan_of
from cuflash.errors import TileError
from cuflash.hardware import device
from cuflash.planning import compiler_versions, mask_gradient, tuned_tiles, wgmma_backward
from cuflash.planning.offline import offline_kernels
from cuflash.planning.planner import make_plan, other_ways
from cuflash.problem.problem import Problem
from cuflash.tuned.store import Found

pytest.importorskip("cupy")

APART = {"backward_mask": Tile(32, 32, 2, 1)}
"""Pins the mask's own kernel."""


def full_mask(dtype: str = "float32", seqlens: tuple[int, int] = (SQ, SKV)) -> Any:
    """With rows that see nothing."""
    mask = additive_mask(B, H, *seqlens, dtype=dtype)
    mask[:, 1, 3:5] = -numpy.inf
    return mask


def kernels(inputs: list[Any], **options: Any) -> list[str]:
    plan = cuflash.plan(*inputs, enable_gqa=True, backward=True, need_attn_mask_grad=True, **options)
    return [kernel.name for kernel in plan.kernels]


def check(simulator: Target, inputs: list[Any], *, beside_apart: bool = False, **options: Any) -> None:
    """Against float64, and where it is asked for against what the mask's own kernel gives."""
    names = kernels(inputs, **options)
    assert "backward_dq_mask" in names
    assert "backward_mask" not in names
    grad_lse = simulator.random((B, H, SQ), "float32", seed=98)
    got = simulator.check(*inputs, enable_gqa=True, grad_lse=grad_lse, **options)
    assert not simulator.host(got.grad_attn_mask)[:, 1, 3:5].any()
    if beside_apart:
        apart = simulator.run(*inputs, enable_gqa=True, grad_lse=grad_lse, backward_tile=APART, **options)
        numpy.testing.assert_array_equal(simulator.host(got.grad_attn_mask), simulator.host(apart.grad_attn_mask))


# --- Results ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.small_tiles
@pytest.mark.sample(4)
@pytest.mark.parametrize("keys", [96, 90, 87], ids=["in_chunks", "rows_on_4_bytes", "odd_rows"])
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_types_and_lengths(dtype: str, is_causal: bool, keys: int, simulator: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    poison_new_memory(monkeypatch)
    inputs = inputs_of(simulator, "bfloat16", seqlens=(SQ, keys))
    check(simulator, inputs, attn_mask=full_mask(dtype, (SQ, keys)), is_causal=is_causal)


ALONE: dict[str, dict[str, Any]] = {name: FEATURES[name] for name in FEATURES if name not in ("boolean_mask", "additive_mask", "causal")}
ALONE["together"] = {key: value for features in ALONE.values() for key, value in features.items()} | {"window": (40, 60)}


@pytest.mark.small_tiles
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in ("together", "window") else [pytest.mark.exhaustive]) for name in ALONE]
)
def test_with_other_features(name: str, simulator: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """Segments, whose lists leave gaps between tiles, windows, prefixes, dropout and softcap, which the gradient knows nothing of."""
    poison_new_memory(monkeypatch)
    check(simulator, inputs_of(simulator, simulator.half), attn_mask=full_mask(), beside_apart=name == "together", **ALONE[name])


@pytest.mark.small_tiles
def test_gaps_between_segments(simulator: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles in the middle of a row in which no pair is visible, and rows without any."""
    poison_new_memory(monkeypatch)
    keys = 160
    ids = {
        "segment_ids_q": numpy.repeat([[0, 3, 1]], 32, axis=1)[:, :SQ],
        "segment_ids_kv": numpy.repeat([[1, 0, 2, 0, 1]], keys // 5, axis=1),
    }
    visible = {"prefix_lengths": numpy.array([keys, keys - 40], numpy.int32), "window": (40, 60)}  # from key 50 on: bottom_right
    options = ALONE["together"] | visible | {name: numpy.repeat(of, B, axis=0).astype(numpy.int32) for name, of in ids.items()}
    check(simulator, inputs_of(simulator, simulator.half, seqlens=(SQ, keys)), attn_mask=full_mask(seqlens=(SQ, keys)), **options)


@pytest.mark.small_tiles
@pytest.mark.exhaustive
@pytest.mark.parametrize("head_dim", [16, 72, 128, 264, 512])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_other_types_and_heads(dtype: str, head_dim: int, simulator: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wide ones too, of whose slices one stores the scores that all have."""
    poison_new_memory(monkeypatch)
    check(simulator, inputs_of(simulator, dtype, head_dim), attn_mask=full_mask(), is_causal=True)


@pytest.mark.small_tiles
def test_sums_over_many_sequences(simulator: Target) -> None:
    """One bias for 150 sequences, as for the rows of an alignment."""
    inputs = [simulator.random((150, rows, 1, 32), "bfloat16", seed) for seed, rows in enumerate((20, 24, 24))]
    mask = numpy.random.default_rng(5).standard_normal((20, 24)).astype(numpy.float32)
    results = simulator.check(*inputs, attn_mask=mask)
    assert results.grad_attn_mask.shape == mask.shape
    assert abs(results.grad_attn_mask).max() > 1.0, "a sum of many"


# --- Which kernel -------------------------------------------------------------------------------------------------------------------------


def problem_of_mask(*extents: int, head_dim: int = 64, heads: int = 4, batch: int = 2, seqlen: int = 1024) -> Problem:
    """With a mask of these extents."""
    features = SampleFeatures(attn_mask="float16", need_attn_mask_grad=True)
    sample = Sample(batch, seqlen, seqlen, heads, heads, head_dim=head_dim, features=features)
    problem = plan_of(sample, backward=True).problem
    assert problem.features.attn_mask is not None
    mask = replace(problem.features.attn_mask, extents=extents)
    return replace(problem, features=replace(problem.features, attn_mask=mask))


def of_mask(*extents: int, arch: str = "sm_80", head_dim: int = 64, tile: Any = None, heads: int = 4) -> tuple[list[str], str]:
    """The kernels of its gradients, and why they run."""
    problem = problem_of_mask(*extents, head_dim=head_dim, heads=heads)
    plan = make_plan(problem, device.of_arch(arch, "gpu"), backward=True, tile=tile)
    return [kernel.name for kernel in plan.kernels if kernel.spec.is_tiled and kernel.spec.is_tuned], plan.choice


def test_sums_take_a_kernel_of_their_own() -> None:
    for extents in ((1, 4, 1024, 1024), (2, 1, 1024, 1024), (2, 4, 1, 1024), (2, 4, 1024, 1)):
        names, why = of_mask(*extents)
        assert names[-1] == "backward_mask"
        assert "backward_mask, which sums over the axes along which attn_mask is broadcast" in why


@pytest.mark.parametrize("arch", ["sm_75", "sm_80"])
def test_kernels_of_their_own_store_it(arch: str) -> None:
    names, why = of_mask(2, 4, 1024, 1024, arch=arch, head_dim=128)
    assert names == ["backward_dkdv", "backward_dq_mask"]
    assert "backward_dq_mask, which has what backward_mask would compute again" in why


def test_the_faster_way_is_taken_by_prediction(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where one kernel would make all other gradients."""
    monkeypatch.delenv(wgmma_backward.VARIABLE, raising=False)
    monkeypatch.setattr(compiler_versions, "why_not", lambda: None)
    full = (2, 64, 1024, 1024)
    names, why = of_mask(*full, heads=64)
    assert names == ["backward_dkdv", "backward_dq_mask"]
    assert re.search(r"backward_dkdv and backward_dq_mask, predicted to take 0\.\d\d of the time of backward_fused and backward_mask", why)
    names, why = of_mask(*full, arch="sm_90", head_dim=128, heads=64)
    assert names == ["backward_wgmma", "backward_mask"], why
    assert re.search(
        r"backward_mask; backward_dkdv and backward_dq_mask are predicted to take 1\.\d\d of the time of backward_wgmma and backward_mask",
        why,
    )
    monkeypatch.setattr(mask_gradient, "STEADY", {})
    names, why = of_mask(*full, heads=64)
    assert names == ["backward_fused", "backward_mask"]
    assert 'nothing is predicted of it here: pin it by tile={"backward_dq_mask": ...}' in why


def test_tables_of_tuned_tiles_decide_where_both_ways_were_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {"backward_dkdv": 1.0, "backward_dq": 1.0, "backward_fused": 1.5, "backward_dq_mask": 3.0, "backward_mask": 2.0}
    stored, apart = ["backward_dkdv", "backward_dq_mask"], ["backward_fused", "backward_mask"]

    def tuned(case: Any, *_: Any) -> Found:
        return Found(milliseconds=times[case.kernel.name], call="one", timer="events") if case.kernel.name in times else Found()

    monkeypatch.setattr(tuned_tiles, "tuned_tile", tuned)
    full: dict[str, Any] = {"arch": "sm_80", "heads": 64}
    names, why = of_mask(2, 64, 1024, 1024, **full)
    assert names == apart, "though it is predicted to be slower"
    assert "backward_fused and backward_mask, timed to take 0.88 of the time of backward_dkdv and backward_dq_mask" in why
    times["backward_dq_mask"] = 1.8
    names, why = of_mask(2, 64, 1024, 1024, **full)
    assert names == stored
    assert "backward_dkdv and backward_dq_mask, timed to take 0.80 of the time of backward_fused and backward_mask" in why
    del times["backward_mask"]
    assert "predicted to take" in of_mask(2, 64, 1024, 1024, **full)[1], "tables of some kernels say nothing of which way is faster"


def test_autotune_times_both_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever a call takes without tables."""
    full, kernels = (2, 64, 1024, 1024), {"backward_dkdv", "backward_dq", "backward_dq_mask", "backward_fused", "backward_mask"}
    for steady in (mask_gradient.STEADY, {}):
        monkeypatch.setattr(mask_gradient, "STEADY", steady)
        found = set(of_mask(*full, heads=64)[0])
        for way in other_ways(problem_of_mask(*full, heads=64), device.of_arch("sm_80", "gpu"), backward=True):
            found |= set(of_mask(*full, heads=64, tile=way)[0])
        assert found == kernels


def test_a_tile_says_which(monkeypatch: pytest.MonkeyPatch) -> None:
    full, tile = (2, 4, 1024, 1024), Tile(64, 32, 4, 1)
    stored, apart = ["backward_dkdv", "backward_dq_mask"], ["backward_dkdv", "backward_dq", "backward_mask"]
    assert of_mask(*full, tile={"backward_dq_mask": tile})[0] == stored
    assert of_mask(*full, tile=Tile(32, 64, 4, 1))[0] == stored
    assert of_mask(*full, tile={"backward_mask": tile, "backward_dq": tile})[0] == apart
    assert of_mask(*full, tile={"backward_dq": tile})[0] == apart
    assert of_mask(*full, tile={"backward_fused": Tile(64, 64, 4, 1)})[0] == ["backward_fused", "backward_mask"]
    assert of_mask(*full, arch="sm_90", tile={"backward_dq_mask": tile})[0] == stored
    monkeypatch.setenv(wgmma_backward.VARIABLE, "1")
    assert of_mask(*full, arch="sm_90")[0] == ["backward_wgmma", "backward_mask"]
    with pytest.raises(TileError, match=r"backward_dq_mask.*kernels that run: .*backward_mask \(.*which sums"):
        of_mask(1, 4, 1024, 1024, tile={"backward_dq_mask": tile})


def test_warmup_compiles_what_calls_of_other_lengths_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """On sm_90 kernels of wgmma, though a call of one head takes others."""
    monkeypatch.delenv(wgmma_backward.VARIABLE, raising=False)
    monkeypatch.setattr(compiler_versions, "why_not", lambda: None)
    on = device.of_arch("sm_90", "gpu")
    problem = problem_of_mask(1, 1, 2048, 2048, batch=4, seqlen=2048, heads=32)
    ahead = offline_kernels(on, dtype="float16", head_dim=64, features=problem.features.kinds, need_attn_mask_grad=True, every_way=True)
    plan = make_plan(problem, on, backward=True)
    assert "backward_wgmma" in {kernel.name for kernel in plan.kernels}
    assert {kernel.request(on) for kernel in plan.kernels} <= {kernel.request(on) for kernel in ahead}
