"""Blocks of the backward kernels of wgmma that share out the queries of a tile of keys, and chains of them that add up dQ: as exact, in a fixed order, and taken where it is predicted to gain."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import test_wgmma_backward_features
from conftest import Target
from test_fused_backward import plan_of
from test_sequences import offsets, packed
from test_wgmma_backward import NAME, SHORT, backward_of
from test_wgmma_backward_features import HIDING, LENGTHS
from test_wgmma_forward import MASKS, inputs_of, names

import cuflash
from cuflash.cli.sample_features import SampleFeatures
from cuflash.cli.samples import Sample, problem_of
from cuflash.hardware.device import of_arch
from cuflash.planning import query_splits, wgmma_backward
from cuflash.planning.kernel_plan import UNSPLIT, KernelPlan, Splits
from cuflash.planning.offline import offline_kernels
from cuflash.planning.planner import make_plan
from cuflash.runtime import calls
from cuflash.simulator import check

pytest.importorskip("cupy")

SPLIT = ["backward_delta", NAME, "backward_dkdv_merge", "backward_dq_convert"]


@pytest.fixture(autouse=True)
def asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel wherever it can run."""
    monkeypatch.setenv("CUFLASH_SIMULATOR_ARCH", "sm_90")
    monkeypatch.setenv(wgmma_backward.VARIABLE, "1")


@pytest.fixture
def with_splits(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """Make calls take so many splits and chains, whatever is predicted."""

    def split(number: int, chains: int) -> None:
        monkeypatch.setattr(calls, "_calls", {})
        monkeypatch.setattr(query_splits, "choose", lambda *_: Splits(number, chains=chains))

    return split


# --- Right --------------------------------------------------------------------------------------------------------------------------------

FEATURES: dict[str, tuple[int, dict[str, Any]]] = {
    "none": (128, {}),
    "causal": (64, MASKS["causal"]),
    "more keys": (64, MASKS["bottom_right"]),
    "window": (64, {"window": (70, 20)}),
    "dropout": (64, {"dropout_p": 0.3, "dropout_seed": 5, "is_causal": True}),
    "value": (192, {}),
    "wide": (256, MASKS["causal"]),
    "wide dropout": (200, {"dropout_p": 0.3, "dropout_seed": 5}),
}


@pytest.mark.sample(1)
@pytest.mark.parametrize("splits", [(3, 2), (1, 4), (16, 1)], ids=str)
@pytest.mark.parametrize("case", FEATURES)
def test_parts_add_up(case: str, splits: tuple[int, int], with_splits: Callable[[int, int], None]) -> None:
    """Of heads that share keys, in splits that end within a head, in more splits than there are tiles, and in more chains than there are tiles of keys."""
    head_dim, options = FEATURES[case]
    on = Target("sm_90")
    with_splits(*splits)
    query, key, value = inputs_of(on, (170, 300), head_dim, heads=(2, 1), dtype="bfloat16")
    value = value[..., :128].copy() if case == "value" else value
    tile = SHORT if head_dim <= 128 else None
    planned = names(cuflash.plan(query, key, value, enable_gqa=True, backward=True, tile=tile, **options))
    assert planned.count("backward_dkdv_merge") == len([name for name in planned if "wgmma" in name])
    on.check(query, key, value, enable_gqa=True, backward_tile=tile, **options)


@pytest.mark.sample(1)
@pytest.mark.parametrize("case", HIDING)
def test_tiles_that_data_hide(case: str, with_splits: Callable[[int, int], None]) -> None:
    """Places in the table count all keys: there is one chain."""
    on = Target("sm_90")
    with_splits(3, 1)
    inputs = inputs_of(on, LENGTHS, heads=(2, 1), batches=(2, 2), dtype="bfloat16")
    on.check(*inputs, enable_gqa=True, backward_tile=SHORT, **HIDING[case])


@pytest.mark.sample(1)
@pytest.mark.parametrize("mask", MASKS)
def test_packed_sequences(mask: str, with_splits: Callable[[int, int], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of which some are empty, some have fewer tiles of queries than splits, and rows behind the last one are nobody's."""
    on, lengths_q, lengths_kv = Target("sm_90"), [40, 0, 170, 33, 5], [60, 20, 300, 0, 100]
    with_splits(3, 2)
    inputs = packed(on, (sum(lengths_q), sum(lengths_kv)), "float16", (64, 64), heads=(2, 1))
    monkeypatch.setattr(cuflash, "varlen_attention_backward", functools.partial(cuflash.varlen_attention_backward, tile=SHORT))
    on.check_packed(inputs, (offsets(on, lengths_q), offsets(on, lengths_kv)), enable_gqa=True, **MASKS[mask])


def test_rows_that_sequences_do_not_use(with_splits: Callable[[int, int], None]) -> None:
    """Of places in packed arrays, with NaN and infinity there: the first split fills them with zeros, and none merges them."""
    with_splits(2, 2)
    test_wgmma_backward_features.test_rows_of_nobody_take_part_in_nothing("both")


@pytest.mark.exhaustive
def test_batches_with_lengths_and_batches_that_share_keys(with_splits: Callable[[int, int], None]) -> None:
    on = Target("sm_90")
    with_splits(2, 2)
    lengths = {"seqlens_kv": numpy.array([130, 290], "int32"), "is_causal": True}
    on.check(*inputs_of(on, (100, 300), heads=(2, 1), batches=(2, 2)), enable_gqa=True, backward_tile=SHORT, **lengths)
    on.check(*inputs_of(on, (70, 190), heads=(4, 2), batches=(2, 1)), enable_gqa=True, backward_tile=SHORT)


@pytest.mark.sample(1)
@pytest.mark.parametrize("case", ["none", "causal", "wide"])
def test_every_schedule_gives_the_same_bits(case: str, with_splits: Callable[[int, int], None], request: pytest.FixtureRequest) -> None:
    """And no two blocks write the same place, which the simulator checks."""
    head_dim, options = FEATURES[case]
    seeds = range(100 if request.config.getoption("--exhaustive") else 2)
    on = Target("sm_90")
    with_splits(3, 2)
    tile = SHORT if head_dim <= 128 else None
    inputs = inputs_of(on, (100, 300), head_dim, heads=(2, 1), dtype="bfloat16")
    report = check(functools.partial(backward_of(*inputs, **options), tile=tile), seeds=seeds)
    assert "backward_dkdv_merge" in report.kernels
    assert len(report.runs) == 2 + len(seeds)


# --- Taken --------------------------------------------------------------------------------------------------------------------------------


def splits_of(head_dim: int, **call: Any) -> KernelPlan:
    """Of a call of any size."""
    return next(kernel for kernel in plan_of("sm_90", head_dim, **call).kernels if kernel.spec.shares_queries)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_few_tiles_of_keys_are_split(head_dim: int, is_causal: bool) -> None:
    """One head of 4096, whose 32 blocks would leave three of four SMs idle; not 32 heads, of which there are enough."""
    few = plan_of("sm_90", head_dim, batch=1, heads=1, seqlen=4096, is_causal=is_causal)
    kernel = next(kernel for kernel in few.kernels if kernel.spec.added_up)
    assert kernel.splits.number > 1
    assert kernel.splits.chains > 1
    assert 100 <= kernel.num_blocks <= 4 * 132
    assert f"queries of a tile of keys in {kernel.splits.number} splits, {kernel.splits.chains} chains" in str(few)
    many = splits_of(head_dim, batch=2, heads=16, seqlen=8192, is_causal=is_causal)
    assert many.splits == UNSPLIT


@pytest.mark.parametrize(("chains", "seqlen"), [(True, 2048), (False, 2048)])
def test_masks_of_data_have_one_chain(chains: bool, seqlen: int) -> None:
    ids = {name: numpy.zeros((1, seqlen), "int32") for name in ("segment_ids_q", "segment_ids_kv")}
    kernel = splits_of(64, batch=1, heads=1, seqlen=seqlen, **({} if chains else ids))
    assert kernel.splits.number > 1
    assert (kernel.splits.chains > 1) == chains


@pytest.mark.parametrize("seqlen", [1024, 4096, 16384, 2**18])
def test_memory_is_bounded(seqlen: int) -> None:
    """Sums of all chains by a number of bytes, and parts by one for each SM, whatever the length."""
    plan = plan_of("sm_90", 128, batch=1, heads=1, seqlen=seqlen)
    nbytes = {buffer.name: buffer.nbytes for buffer in plan.workspace}
    one_chain = 4 * 128 * -(-seqlen // 80) * 80
    assert nbytes["query_sums"] <= max(one_chain, 2**26)
    assert nbytes.get("key_parts", 0) <= 4 * 132 * 128 * 256 * 4
    kernel = plan.kernels[1]
    assert nbytes.get("key_parts", 0) == (kernel.num_blocks * 128 * 256 * 4 if kernel.splits.chains else 0)


@pytest.mark.parametrize("most", [1024, 4096, 8192, 32768])
def test_memory_is_bounded_where_lengths_differ(most: int) -> None:
    """Parts have room for a block for each tile of the longest sequence in the place of each, though most have fewer keys."""
    sample = Sample(lengths_q=(most,) + (64,) * 7, num_heads_q=1, num_heads_kv=1, head_dim=128)
    plan = make_plan(problem_of(sample, backward=True), of_arch("sm_90", "gpu"), backward=True)
    assert "backward_wgmma" in names(plan)
    assert sum(buffer.nbytes for buffer in plan.workspace if buffer.name == "key_parts") <= 4 * 132 * 128 * 256 * 4


@pytest.mark.parametrize(("seqlen", "heads"), [(304, 4), (4096, 1)])
@pytest.mark.parametrize(
    "features", [SampleFeatures(segments=4), SampleFeatures(attn_mask="bool"), SampleFeatures()], ids=["segments", "mask", "none"]
)
def test_warmup_compiles_kernels_that_share_out_queries(features: SampleFeatures, seqlen: int, heads: int) -> None:
    """Of 1024 queries and keys of one head those with segments or a boolean mask gain nothing, but calls with more do."""
    sample = Sample(seqlen_q=seqlen, seqlen_kv=seqlen, num_heads_q=heads, head_dim=64, is_causal=True, features=features)
    on = of_arch("sm_90", "gpu")
    problem = problem_of(sample, backward=True)
    plan = make_plan(problem, on, backward=True)
    assert "backward_dkdv_merge" in names(plan)
    kernels = offline_kernels(on, dtype="float16", head_dim=64, is_causal=True, features=problem.features.kinds, every_way=True)
    assert {kernel.request(on) for kernel in plan.kernels} <= {kernel.request(on) for kernel in kernels}


def test_nothing_is_split_where_nothing_is_predicted(monkeypatch: pytest.MonkeyPatch) -> None:
    call = {"batch": 1, "heads": 1, "seqlen": 4096}
    assert splits_of(64, **call).splits.number > 1
    monkeypatch.setattr(query_splits.predicted_loops, "loops_of", lambda *_: None)
    assert splits_of(64, **call).splits == UNSPLIT
