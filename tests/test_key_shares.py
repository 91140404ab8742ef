"""Blocks of the forward kernel of wgmma that share out the keys of the last tiles of queries: when, as exact as without, the same bits under every schedule."""

from __future__ import annotations

import functools
from typing import Any

import numpy
import pytest
from conftest import HAS_GPU, Target
from test_wgmma_forward import NAME, inputs_of, names, with_sms

import cuflash
from cuflash import Tile
from cuflash.cli.samples import Sample, plan_of
from cuflash.planning import key_shares, predicted_loops, predicted_wgmma, wgmma_forward
from cuflash.planning.kernel_cases import case_of
from cuflash.planning.kernel_plan import UNSHARED, KeyShares
from cuflash.planning.kernel_specs import FORWARD_WGMMA
from cuflash.simulator import check

pytest.importorskip("cupy")

SHORT = {NAME: Tile(128, 16, 8, 2)}
"""Many tiles of few keys."""


@pytest.fixture(autouse=True)
def asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUFLASH_SIMULATOR_ARCH", "sm_90")
    monkeypatch.setenv(wgmma_forward.VARIABLE, "1")


def shares_of(*inputs: Any, **options: Any) -> KeyShares:
    plan = cuflash.plan(*inputs, enable_gqa=True, **options)
    assert names(plan) == [NAME]
    return plan.kernels[0].shares


# --- When ---------------------------------------------------------------------------------------------------------------------------------


def test_the_last_round_is_shared_out_where_it_leaves_blocks_idle() -> None:
    on = Target("sm_90").device
    assert on.num_sms == 132
    assert key_shares.choose(1376, 205, on) == KeyShares(56, 87)
    assert key_shares.choose(1320, 205, on) == UNSHARED  # no rest
    assert key_shares.choose(1450, 205, on) == UNSHARED  # nearly full
    assert key_shares.choose(1376, 4, on) == UNSHARED  # too few keys
    assert key_shares.choose(1, 205, on) == KeyShares(1, 14)  # a call that leaves most SMs idle
    assert key_shares.num_blocks(KeyShares(1, 14), 205) == 15
    assert key_shares.choose(88, 26, on) == UNSHARED  # half a trip less, and counters to be set to 0
    assert key_shares.choose(131, 2**25, on) == UNSHARED  # key tiles beyond 32 bits


def test_what_is_predicted_of_a_call_knows_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that stay take whole rounds, however few rows the last tile of a head has, and shares take the place of the last round."""
    on = Target("sm_90").device

    def milliseconds(seqlen: int, heads: int) -> float:
        sample = Sample(
            batch=1,
            seqlen_q=seqlen,
            seqlen_kv=seqlen,
            num_heads_q=heads,
            num_heads_kv=heads,
            head_dim=128,
            dtype="float16",
            is_causal=False,
        )
        problem = plan_of(sample).problem
        case = case_of(FORWARD_WGMMA, problem)
        loops = predicted_loops.loops_of([NAME], problem)
        assert loops is not None
        return predicted_wgmma.milliseconds(case, loops[0], problem, on)

    shared = {call: milliseconds(*call) for call in ((4096, 1), (4096, 8), (4096, 12))}
    monkeypatch.setattr(key_shares, "choose", lambda *_: UNSHARED)
    whole = {call: milliseconds(*call) for call in shared}
    assert shared[4096, 1] < 0.6 * whole[4096, 1]
    assert 0.7 * whole[4096, 8] < shared[4096, 8] < 0.95 * whole[4096, 8]
    assert shared[4096, 12] == whole[4096, 12]  # two full rounds
    assert 1.9 < whole[4096, 8] / whole[4096, 1] < 2.2  # two rounds, of which the second one is a third full, at a lower clock


def test_the_plan_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    with_sms(monkeypatch, 2)
    inputs = inputs_of(Target("sm_90"), (300, 500))
    assert shares_of(*inputs, tile=SHORT) == KeyShares(1, 16)
    plan = cuflash.plan(*inputs, tile=SHORT)
    assert "which stay for 3 tiles of queries, keys of the last one in equal shares" in str(plan)
    assert [(buffer.name, buffer.shape, buffer.is_zeroed) for buffer in plan.workspace] == [
        ("row_parts", (2, 2 * 10 * 512), False),
        ("row_arrivals", (8,), True),
    ]
    for options in ({"is_causal": True}, {"window": (100, 0)}, {"seqlens_kv": numpy.array([400], "int32")}):
        assert shares_of(*inputs, tile=SHORT, **options) == UNSHARED


def test_float32_knows_no_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernel computes whole tiles of queries, of which the plan is to leave none out."""
    on = Target("sm_90")
    with_sms(monkeypatch, 2)
    inputs = inputs_of(on, (100, 1000), dtype="float32")
    plan = cuflash.plan(*inputs)
    assert names(plan) == ["operand_terms", "forward_wgmma_float32"]
    assert plan.kernels[-1].num_work % 2 != 0
    assert [kernel.shares for kernel in plan.kernels] == [UNSHARED] * 2
    on.check(*inputs, backward=False)


# --- Right --------------------------------------------------------------------------------------------------------------------------------


def halves_hidden(rows: int, keys: int) -> Any:
    mask = numpy.zeros((rows, keys), "float32")
    mask[::3, : keys // 2] = mask[1::3, keys // 2 :] = mask[5] = -numpy.inf
    return mask


CASES: dict[str, tuple[int, tuple[int, int], int, int, dict[str, Any]]] = {
    "two parts": (2, (300, 500), 64, 1, {}),
    "shares that reach into two tiles": (4, (300, 490), 64, 2, {}),
    "fewer tiles than blocks": (9, (200, 500), 64, 1, {}),
    "wide": (2, (100, 330), 256, 3, {}),
    "softcap and sinks": (2, (300, 500), 64, 1, {"softcap": 5.0, "sinks": numpy.array([1.5], "float32")}),
    "dropout": (2, (300, 500), 64, 1, {"dropout_p": 0.3, "dropout_seed": 7}),
    "additive mask": (2, (300, 496), 64, 1, {"attn_mask": numpy.random.default_rng(1).standard_normal((300, 496)).astype("float32")}),
    "keys of a part, or of all, that rows do not see": (2, (100, 496), 64, 1, {"attn_mask": halves_hidden(100, 496)}),
}
"""SMs, lengths, head_dim, heads and options."""


@pytest.mark.sample(4)
@pytest.mark.parametrize("case", CASES)
def test_parts_are_merged(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    num_sms, lengths, head_dim, heads, options = CASES[case]
    on = Target("sm_90")
    with_sms(monkeypatch, num_sms)
    inputs = inputs_of(on, lengths, head_dim, heads=(heads, heads), dtype="float16")
    assert shares_of(*inputs, tile=SHORT, **options) != UNSHARED
    on.check(*inputs, backward=False, tile=SHORT, **options)


def test_rows_whose_scores_differ_from_part_to_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """By far more than a reference of one part leaves of the other."""
    on = Target("sm_90")
    with_sms(monkeypatch, 2)
    query, key, value = inputs_of(on, (100, 500), dtype="float16")
    key[:, 300:] *= 40
    assert shares_of(query, key, value, tile=SHORT) != UNSHARED
    on.check(query, key, value, backward=False, tile=SHORT)


def test_every_schedule_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Whichever block is the last to have stored its part."""
    with_sms(monkeypatch, 3)
    seeds = range(100 if request.config.getoption("--exhaustive") else 8)
    inputs = inputs_of(Target("sm_90"), (130, 430), heads=(2, 1), dtype="float16")
    assert shares_of(*inputs, tile=SHORT) == KeyShares(1, 9)
    report = check(
        functools.partial(cuflash.scaled_dot_product_attention, *inputs, enable_gqa=True, return_lse=True, tile=SHORT), seeds=seeds
    )
    assert report.kernels == (NAME,)
    assert len(report.runs) == 2 + len(seeds)


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="the simulator would take hours")
def test_on_a_whole_gpu() -> None:
    """The same bits each time."""
    on = Target("gpu")
    if on.device.capability != 90:
        pytest.skip("the GPU is no sm_90")
    inputs = inputs_of(on, (4000, 4000), 128, heads=(7, 7), dtype="bfloat16")
    assert shares_of(*inputs) != UNSHARED
    attend = functools.partial(cuflash.scaled_dot_product_attention, *inputs, return_lse=True)
    bits = [Target.bits(x) for x in attend()]
    for _ in range(20):
        assert [Target.bits(x) for x in attend()] == bits
    on.check(*inputs, backward=False)
