"""Calls with a cache on the command line: `explain` plans what the call itself does, and `warmup` compiles it."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
from caches import CacheCall

import cuflash
from cuflash.__main__ import main
from cuflash.cli.cached_calls import CachedCall, requests_of
from cuflash.cli.samples import Sample
from cuflash.hardware import device
from cuflash.jit import cache
from cuflash.planning import split_forward
from cuflash.planning.planner import make_plan
from cuflash.timing import machine, prediction
from cuflash.timing.traffic import least_bytes
from cuflash.timing.visits import NO_DATA, visits_of_launch

CALL = ["--cache", "--batch", "3", "--seqlen", "2", "--seqlen-kv", "4000", "--heads", "12", "--heads-kv", "2", "--head-dim", "64"]


def explained(capsys: Any, *arguments: str) -> str:
    assert main(["explain", *CALL, *arguments, "--no-predict"]) == 0
    return str(capsys.readouterr().out)


@pytest.mark.parametrize("scales", ["", "heads"])
@pytest.mark.parametrize("page_size", [0, 16])
def test_the_plan_is_that_of_the_call(page_size: int, scales: str, capsys: Any) -> None:
    call = CacheCall(
        (9, 9, 9), 2, 2, 12, 2, 64, room=4000, page_size=page_size, scales=scales, options={"is_causal": True, "window": (100, 0)}
    )
    options = [
        "--causal",
        "--window",
        "100",
        "0",
        *(["--page-size", "16"] if page_size else []),
        *(["--kv-dtype", "float8_e4m3fn"] if scales else []),
    ]
    text = explained(capsys, *options)
    assert str(cuflash.kvcache_plan(**call.arrays())) in text
    assert "of its bandwidth, with full caches" in text
    bound = 3 * 4000 * 2 * 128 * (1 if scales else 2)
    assert bound < json.loads(explained(capsys, *options, "--json"))["least_bytes"] < 1.1 * bound


@pytest.mark.parametrize(("splits", "result_bytes"), [(1, 2), (3, 3 * 4)])
def test_least_bytes_count_results_or_parts(splits: int, result_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a wide head: keys, values, queries, and the output, or float32 parts of it."""
    monkeypatch.setenv("CUFLASH_FORWARD_WGMMA", "1")
    cached = CachedCall(64, num_splits=splits)
    sample = Sample(2, 5, 1024, 16, 1, 512, head_dim_v=384, dtype="bfloat16", cache=cached)
    plan = make_plan(cached.problem(sample), device.of_arch("sm_90", "gpu"))
    kernel = next(kernel for kernel in plan.kernels if kernel.spec.splits_keys)
    keys, queries = 2 * 1024, 2 * 5 * 16
    assert least_bytes(kernel, plan.problem) == keys * 2 * (512 + 384) + queries * (2 * 512 + result_bytes * 384)


@pytest.mark.parametrize("cached", [CachedCall(), CachedCall(16, "float8_e4m3fn", rotary="float32")], ids=["rows", "pages"])
def test_what_is_compiled_ahead_is_what_calls_of_any_shape_need(cached: CachedCall) -> None:
    on = device.of_arch("sm_90", "gpu")
    sample = Sample(head_dim=64, dtype="bfloat16", is_causal=True, cache=cached)
    ahead = set(requests_of(sample, on))
    for batch, seqlen_q, heads, room in ((1, 1, 4, 100), (64, 1, 8, 70000), (2, 5, 32, 500), (2, 40, 4, 4000)):
        call = Sample(batch, seqlen_q, room, heads, 4, 64, dtype="bfloat16", is_causal=True, cache=cached)
        problem = cached.problem(call)
        assert problem.cache is not None
        without_new = replace(problem, cache=replace(problem.cache, new=None, rotary=None))
        for plan in (make_plan(problem, on), make_plan(without_new, on)):
            assert {kernel.request(on) for kernel in plan.kernels} <= ahead


def test_what_does_not_rotate_knows_no_tables() -> None:
    """Kernels of attention that append nothing are the same whatever tables the kernel before them reads."""
    on = device.of_arch("sm_90", "gpu")
    sample = Sample(2, 40, 4000, 4, 4, 64, dtype="bfloat16")
    plans = [make_plan(CachedCall(16, rotary=of).problem(sample), on) for of in (None, "bfloat16", "float32")]
    assert len({kernel.request(on) for plan in plans for kernel in plan.kernels if kernel.spec.splits_keys}) == 1


def test_the_command_compiles_them(tmp_path: Any, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("cupy")
    fetched: list[Any] = []
    monkeypatch.setattr(cache, "fetch_many", fetched.extend)
    monkeypatch.setenv("CUFLASH_CACHE_DIR", "")  # is put back
    given = ["--cache", "--head-dim", "16", "--dtype", "float16", "--causal", "--kv-dtype", "float8_e4m3fn", "--into", str(tmp_path)]
    assert main(["warmup", *given]) == 0
    assert capsys.readouterr().out.startswith("11 kernels are in the cache")
    assert len(set(fetched)) == 11


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--page-size", "16"], "--page-size: got 16 without --cache"),
        (["--cache", "--pass", "backward"], "--cache: got it with the backward pass"),
        (["--cache", "--dropout", "0.5"], "--dropout: got it with --cache"),
        (["--cache", "--varlen"], "--varlen: got it with --cache"),
        (["--cache", "--kv-dtype", "bfloat16"], "key_cache: got bfloat16"),
        (["--cache", "--num-splits", "999"], "num_splits: got 999"),
    ],
)
def test_what_cannot_be_used_is_named(arguments: list[str], message: str, capsys: Any) -> None:
    assert main(["explain", "--no-predict", "--seqlen", "1", "--seqlen-kv", "64", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_shares_grow_with_keys_and_stay_below_one() -> None:
    on, cached = device.of_arch("sm_80", "gpu"), CachedCall(64)
    shares = []
    for room in (256, 4096, 2**18):
        plan = make_plan(cached.problem(Sample(8, 1, room, 4, 1, 128, dtype="bfloat16", cache=cached)), on)
        shares.append(split_forward.predicted_share(plan))
    assert 0 < shares[0] < shares[1] < shares[2] < 1
    assert shares[2] > 0.85


def test_predict_knows_the_kernels_of_caches(capsys: Any) -> None:
    pytest.importorskip("cupy")
    call = [
        "--arch",
        "sm_90",
        "--fast",
        "--seqlen",
        "1",
        "--head-dim",
        "128",
        "--dtype",
        "bfloat16",
        "--heads",
        "32",
        "--heads-kv",
        "8",
        "--json",
    ]
    found = {}
    for batch, room in ((1, 1024), (4, 262144)):
        assert main(["predict", *call, "--cache", "--page-size", "64", "--batch", str(batch), "--seqlen-kv", str(room)]) == 0
        found[room] = json.loads(capsys.readouterr().out)
    assert [of["kernel"] for of in found[1024]["kernels"]] == ["forward_split", "merge_attention"]
    assert 0.005 < found[1024]["predicted_milliseconds"] < 0.01
    memory = 1e3 * 4 * 8 * 262144 * 512 / machine.CARDS["sm_90"].memory_bytes_per_second
    assert memory <= found[262144]["predicted_milliseconds"] < memory / 0.85


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_a_short_cache_is_predicted_to_take_seven_microseconds_at_most(arch: str) -> None:
    """One sequence of 1024 keys, new key and merging included."""
    pytest.importorskip("cupy")
    cached = CachedCall(64)
    problem = cached.problem(Sample(1, 1, 1024, 16, 4, 128, dtype="bfloat16", cache=cached))
    predicted = prediction.predict_plan(make_plan(problem, device.of_arch(arch, "gpu")), machine.CARDS[arch], limits=False)
    assert [launch.name for launch in predicted.launches] == ["forward_split", "merge_attention"]
    assert 0.004 < predicted.milliseconds < 0.007


def test_a_cache_has_no_gradients_to_predict(capsys: Any) -> None:
    assert main(["predict", "--cache", "--backward", "--seqlen", "1", "--seqlen-kv", "64"]) == 2
    assert "--cache: got it with the backward pass" in capsys.readouterr().err


@pytest.mark.parametrize("given", [1, 7, 64, 256])
def test_splits_walk_over_all_tiles(given: int) -> None:
    on, cached = device.of_arch("sm_90", "gpu"), CachedCall(64, num_splits=given)
    plan = make_plan(cached.problem(Sample(3, 1, 5000, 8, 2, 128, dtype="bfloat16", cache=cached)), on)
    kernel = next(kernel for kernel in plan.kernels if kernel.spec.splits_keys)
    trips = [of.total for head in visits_of_launch(kernel, plan.problem, NO_DATA) for of in head]
    assert len(trips) == kernel.num_blocks == 3 * 2 * given
    assert sum(trips) == 3 * 2 * -(-5000 // kernel.tile.tile_kv)
    assert max(trips) == math.ceil(math.ceil(5000 / kernel.tile.tile_kv) / given)
