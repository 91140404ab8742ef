"""`python -m cuflash explain`: what would run and why, what cannot, what it costs, whether it is compiled; also for GPUs that are absent."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest

import cuflash
from cuflash.__main__ import main
from cuflash.cli import explanation
from cuflash.cli.sample_features import SampleFeatures
from cuflash.cli.samples import Sample
from cuflash.hardware import device
from cuflash.jit import compiler, disassembly
from cuflash.planning import planner
from cuflash.problem.tile import Tile
from cuflash.tuned import fingerprint, store
from cuflash.tuned.table import Entry, Timing
from cuflash.tuner import described_calls
from cuflash.tuner.tasks import problem_of, tasks_of

LARGE = Sample(batch=4, seqlen_q=4096, seqlen_kv=4096, num_heads_q=16, num_heads_kv=16, head_dim=64)


def explained(sample: Sample = LARGE, arch: str = "sm_80", *, backward: bool = False, **options: Any) -> explanation.Explanation:
    return explanation.explain(sample, device.of_arch(arch, "gpu"), backward=backward, **{"predict": False, **options})


def said(*arguments: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(("explain", *arguments)) == 0
    return capsys.readouterr().out


def test_it_begins_with_the_plan_and_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    text = said("--arch", "sm_80", "--no-predict", "--causal", capsys=capsys)
    plan = planner.make_plan(explained(replace(LARGE, is_causal=True)).plan.problem, device.of_arch("sm_80", "gpu"))
    assert text.startswith(str(plan))
    assert "forward: 192 tiles of the usual shapes are legal; refused: none" in text
    assert "others, best by the model of tiles first: " in text
    assert "no timing of this GPU decides: python -m cuflash autotune" in text
    assert "forward_wgmma: its instructions are those of sm_90, and this is sm_80" in text
    assert "not predicted: not asked for" in text


def test_refusals_are_counted_by_rule() -> None:
    (facts,) = explained(replace(LARGE, head_dim=256), "sm_86").tiles
    assert set(facts.refused) == {"shared memory", "registers"}
    assert facts.legal + sum(facts.refused.values()) == 192
    assert len(facts.next_best) == explanation.SHOWN_TILES


@pytest.mark.parametrize(
    ("change", "arch", "reason"),
    [
        ({"dtype": "float32"}, "sm_80", "it takes 16-bit types, and this is float32"),
        ({}, "sm_75", "it needs asynchronous copies, and this is sm_75"),
        ({"head_dim": 320}, "sm_80", "it takes heads that are not cut into slices"),
        ({"head_dim": 256, "head_dim_v": 208}, "sm_80", "no tile fits the registers and the shared memory"),
    ],
)
def test_why_the_fused_backward_kernel_cannot_run(change: dict[str, Any], arch: str, reason: str) -> None:
    found = explained(replace(LARGE, **change), arch, backward=True)
    assert found.ruled_out["backward_fused"] == reason
    assert found.plan.choice == ""


def test_the_plan_says_which_way_to_the_gradients_is_taken_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    found, own = explained(backward=True), "backward_dkdv and backward_dq"
    assert found.ruled_out == {"backward_wgmma": "its instructions are those of sm_90, and this is sm_80"}
    assert re.fullmatch(
        f"backward_fused, predicted to take 0.8\\d of the time of {own}; it has run on the simulator only", found.plan.choice
    )
    few = explained(replace(LARGE, batch=1, seqlen_q=512, seqlen_kv=512, num_heads_q=2, num_heads_kv=2), backward=True)
    assert few.plan.choice.startswith(f"{own}; backward_fused is predicted to take 1.")
    assert "pin it by tile=" in few.plan.choice
    unknown = explained(replace(LARGE, head_dim=96), backward=True)
    assert unknown.plan.choice.startswith(f"{own}; backward_fused can run too, but nothing is predicted of it here")
    monkeypatch.setenv("CUFLASH_FUSED_BACKWARD", "0")
    assert explained(backward=True).plan.choice == f"{own}, not backward_fused, by CUFLASH_FUSED_BACKWARD=0"


def test_bytes_and_bounds() -> None:
    found = explained()
    rows = 4 * 4096 * 16 * 64
    assert found.least_bytes == 2 * 4 * rows
    assert found.flops == 4 * 4 * 16 * 4096 * 4096 * 64
    assert found.bounds_ms is not None
    assert found.bounds_ms[0] == pytest.approx(1e3 * found.flops / 312e12, rel=0.01), "an A100's matrix units"
    masked = explained(replace(LARGE, features=SampleFeatures(attn_mask="bool")), backward=True)
    assert masked.least_bytes == 8 * 2 * rows + 4 * 4 * 16 * 4096 + 4096 * 4096, "three inputs, out, four gradients, lse and the mask"
    assert explained(arch="sm_75").bounds_ms is None


def test_whether_it_is_compiled(cold_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUFLASH_SIMULATOR_ARCH", "sm_80")
    on, sample = device.of_arch("sm_80"), Sample(seqlen_q=20, seqlen_kv=20, head_dim=16)
    before = explanation.explain(sample, on, backward=False, predict=False)
    assert before.compiled == {"forward": False}
    by = "by NVRTC " + ".".join(map(str, compiler.nvrtc_version()))
    assert f"compiled: not yet forward, {by}; " in explanation.lines(before)[-1]
    x = numpy.zeros((1, 20, 1, 16), numpy.float16)
    cuflash.scaled_dot_product_attention(x, x, x)
    assert explanation.lines(explanation.explain(sample, on, backward=False, predict=False))[-1] == f"compiled: all in the cache, {by}"
    with_lists = replace(sample, features=SampleFeatures(attn_mask="bool"))
    assert explanation.explain(with_lists, on, backward=True, predict=False).compiled == dict.fromkeys(
        ("backward_delta", "visible_tiles", "backward_dkdv", "backward_dq"), False
    )


def test_it_names_a_tuned_tile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on = replace(device.of_arch("sm_80", "gpu"), name="Card")
    (task,) = tasks_of(described_calls.of_sample(LARGE), problem_of(LARGE, backward=False), on, passes=("forward",), effort="quick")
    timings = (Timing(task.default, 2.0), Timing(Tile(32, 16, 2, 1), 1.0))
    entry = Entry(task.bucket, "", task.default, timings, fingerprint.of_source("forward_mma.cu"), fingerprint.of_compiler())
    store.save(tmp_path / "card.json", on, entry)
    monkeypatch.setenv(store.VARIABLE, str(tmp_path / "card.json"))
    found = explanation.explain(LARGE, on, backward=False, predict=False)
    assert found.tiles[0].tile_by == "timed for seqlen up to 4096 x 4096 (CUFLASH_TUNING)"
    assert not any("autotune" in line for line in explanation.lines(found))


@pytest.mark.skipif(disassembly.find_nvdisasm() is None, reason=disassembly.NVDISASM_HINT)
def test_what_is_predicted_and_what_binds(capsys: pytest.CaptureFixture[str]) -> None:
    shape = ("--seqlen", "64", "--head-dim", "16", "--heads", "1", "--batch", "1", "--tile", "16", "16", "1", "1")
    text = said("--arch", "sm_80", "--fast", *shape, capsys=capsys)
    assert "predicted for A100 SXM 80 GB" in text
    assert re.search(r"^    forward: [\d.e-]+ ms, [\w ]+ binds$", text, re.M)
    assert "tile by    forward: pinned" in text
    found = json.loads(said("--arch", "sm_80", "--fast", "--json", *shape, capsys=capsys))
    assert found["prediction"]["predicted_milliseconds"] > 0
    assert found["kernels"][0]["tile"] == [16, 16, 1, 1]
    assert found["kernels"][0]["compiled"] is True


@pytest.mark.skipif(disassembly.find_nvdisasm() is None, reason=disassembly.NVDISASM_HINT)
def test_memory_binds_where_nothing_can_be_faster(capsys: pytest.CaptureFixture[str]) -> None:
    """A window of few keys leaves less to do than there is to move, which the steady state does not know."""
    shape = ("--seqlen", "8192", "--head-dim", "16", "--batch", "8", "--window", "0", "0", "--tile", "16", "16", "1", "1")
    text = said("--arch", "sm_89", "--fast", *shape, capsys=capsys)
    assert re.search(r"^    forward: [\d.e-]+ ms, memory binds$", text, re.M), text
    found = json.loads(said("--arch", "sm_89", "--fast", "--json", *shape, capsys=capsys))
    assert found["prediction"]["kernels"][0]["binds"] == "memory"


def test_a_very_short_time_can_be_read() -> None:
    tiny = Sample(batch=1, seqlen_q=64, seqlen_kv=64, num_heads_q=1, num_heads_kv=1, head_dim=16)
    assert re.search(r"products by mma\.sync 0\.00\d+ µs, memory 0\.00\d+ µs;", "\n".join(explanation.lines(explained(tiny))))


def test_what_the_model_does_not_know_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    text = said("--arch", "sm_75", "--dtype", "bfloat16", capsys=capsys)
    assert "not predicted: the timing model knows sm_80, sm_86, sm_89, sm_90, sm_120, and this is sm_75" in text
    assert main(("explain", "--arch", "sm_70")) == 2
    assert "arch: got 'sm_70'" in capsys.readouterr().err
    assert main(("explain", "--arch", "A100")) == 2
    assert "sm_80 for an A100" in capsys.readouterr().err
