"""Profiles of whole calls: what is counted fits the call, and what is printed is what was counted."""

from __future__ import annotations

import io
import json
import re
import time
import tracemalloc
from dataclasses import replace
from math import ceil

import pytest

from cuflash.cli import profiling
from cuflash.cli.profiling import CallProfile, View, announced, estimate_seconds, profile_call
from cuflash.cli.sample_features import SampleFeatures
from cuflash.cli.samples import Sample, numpy_call, plan_of

SAMPLE = Sample(batch=2, seqlen_q=128, seqlen_kv=128, num_heads_q=2, num_heads_kv=2, head_dim=64)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


WHOLE_TILES = replace(SAMPLE, seqlen_q=384, seqlen_kv=384)
"""What tiles of 64, 96 or 128 rows divide without a rest."""


@pytest.fixture(scope="module")
def forward() -> CallProfile:
    pytest.importorskip("cupy")
    return profile_call(SAMPLE)


def test_an_estimate_grows_with_what_is_visited() -> None:
    """In proportion to batch and heads, by half with a causal mask, and to the band of a window; the backward pass comes after a forward pass."""
    whole = estimate_seconds(WHOLE_TILES)
    assert estimate_seconds(replace(WHOLE_TILES, batch=6, num_heads_q=4)) == pytest.approx(6 * whole)
    long = replace(WHOLE_TILES, seqlen_q=64 * 384, seqlen_kv=64 * 384)
    assert estimate_seconds(long) == pytest.approx(64**2 * whole)
    assert estimate_seconds(replace(long, is_causal=True)) == pytest.approx(estimate_seconds(long) / 2, rel=0.05)
    band = replace(long, features=SampleFeatures(window=(255, 256)))
    assert estimate_seconds(band) == pytest.approx(estimate_seconds(long) * 512 / (64 * 384), rel=0.5)
    assert estimate_seconds(WHOLE_TILES, "backward") == pytest.approx(4.5 * whole, rel=0.2)
    assert estimate_seconds(replace(WHOLE_TILES, dtype="float32")) > 2 * whole


def test_an_estimate_counts_threads_that_have_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUFLASH_SIMULATOR_THREADS", "1")
    one = {sample: estimate_seconds(sample) for sample in (SAMPLE, replace(SAMPLE, batch=1, num_heads_q=1, num_heads_kv=1, seqlen_q=20))}
    monkeypatch.setenv("CUFLASH_SIMULATOR_THREADS", "2")
    assert [alone / estimate_seconds(sample) for sample, alone in one.items()] == pytest.approx([2, 1])


@pytest.mark.parametrize(
    "sample",
    [
        replace(WHOLE_TILES, lengths_q=(384, 5)),
        replace(WHOLE_TILES, lengths_kv=(5, 384)),
        replace(WHOLE_TILES, features=SampleFeatures(segments=4)),
        replace(WHOLE_TILES, is_causal=True, features=SampleFeatures(prefix=300)),
    ],
    ids=["packed", "seqlens_kv", "segments", "prefix"],
)
def test_an_estimate_takes_as_visited_what_data_may_hide(sample: Sample) -> None:
    assert estimate_seconds(sample) == pytest.approx(estimate_seconds(WHOLE_TILES))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_a_plan_without_operands_is_that_of_the_call(dtype: str) -> None:
    features = SampleFeatures(attn_mask="bfloat16", need_attn_mask_grad=True, sinks=True)
    sample = replace(SAMPLE, dtype=dtype, num_heads_kv=1, layout="bhsd", features=features)
    operands, arguments = numpy_call(sample)
    del operands["grad_out"]
    planned, real = plan_of(sample, backward=True), sample.plan(**operands, **arguments, need_attn_mask_grad=True, backward=True)
    assert planned.kernels == real.kernels
    assert str(planned) == str(real)


def test_an_estimate_of_huge_operands_takes_no_memory() -> None:
    """A gigabyte for each operand, had it to be made."""
    tracemalloc.start()
    try:
        estimate_seconds(replace(SAMPLE, seqlen_q=2**20, seqlen_kv=2**20, num_heads_q=8, num_heads_kv=8, dtype="bfloat16"))
        assert tracemalloc.get_traced_memory()[1] < 10 * 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(("seconds", "expected"), [(9.9, ""), (12.4, "12 s"), (600, "10 min"), (36000, "10 h")])
def test_a_long_run_is_announced(seconds: float, expected: str) -> None:
    stream = io.StringIO()
    with announced(seconds, stream):
        told = stream.getvalue()
    assert stream.getvalue() == told == (f"The simulator may need {expected} for this; {told.partition('; ')[2]}" if expected else "")


def test_a_terminal_counts_the_seconds_and_is_left_clean() -> None:
    terminal = Terminal()
    with announced(90, terminal):
        deadline = time.monotonic() + 30
        while "\r" not in terminal.getvalue() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert re.search(r"\r\d+ s of at most about 90 s\033\[K$", terminal.getvalue())
    assert terminal.getvalue().endswith("\r\033[K")


def rendered(result: CallProfile, view: View | None = None, stream: io.StringIO | None = None) -> str:
    stream = stream or io.StringIO()
    profiling.render(result, view, stream)
    return stream.getvalue()


def test_a_forward_call_of_whole_tiles(forward: CallProfile) -> None:
    (kernel,) = forward.kernels
    assert kernel.ctas == forward.plan.kernels[0].num_blocks
    tile = forward.plan.kernels[0].tile
    queries, keys = (ceil(128 / rows) * rows for rows in (tile.tile_q, tile.tile_kv))  # whole tiles are computed
    assert kernel.total.matrix_flops * 128 * 128 == forward.plan.problem.flops_forward * queries * keys
    operands = {operand.name: operand for operand in kernel.operands}
    nbytes = 2 * 128 * 2 * 64 * 2
    assert {name: operand.size for name, operand in operands.items()} == dict.fromkeys(("query", "key", "value", "out"), nbytes)
    tiles = 128 // forward.plan.kernels[0].tile.tile_q
    assert operands["query"].bytes_read == operands["out"].bytes_written == nbytes
    assert operands["key"].bytes_read == operands["value"].bytes_read == tiles * nbytes


def test_the_backward_pass_is_profiled_alone() -> None:
    pytest.importorskip("cupy")
    result = profile_call(replace(SAMPLE, dtype="bfloat16", num_heads_kv=1, layout="bhsd"), "backward")
    assert [kernel.name for kernel in result.kernels] == [plan.entry for plan in result.plan.kernels]
    products = {"backward_delta": 0, "backward_dkdv": 4, "backward_dq": 3, "backward_fused": 5, "backward_dq_convert": 0}
    for plan, kernel in zip(result.plan.kernels, result.kernels, strict=True):
        queries, keys = (ceil(128 / rows) * rows for rows in (plan.tile.tile_q, plan.tile.tile_kv))  # whole tiles are computed
        assert kernel.total.matrix_flops == products[plan.name] * 2 * 2 * 2 * queries * keys * 64
    sizes = {operand.name: operand.size for kernel in result.kernels for operand in kernel.operands}
    assert sizes["grad_key"] == sizes["key"] == sizes["query"] // 2
    assert all(line.counts.issued for kernel in result.kernels for line in (*kernel.lines, *kernel.kernel_lines))


def test_a_table_for_the_terminal_and_one_for_files(forward: CallProfile, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rich")
    monkeypatch.setenv("COLUMNS", "300")
    plain, rich = rendered(forward), rendered(forward, stream=Terminal())
    assert "\u2502" in rich
    assert "\u2502" not in plain
    (kernel,) = forward.kernels
    for number in (kernel.total.issued, kernel.total.instructions["matrix"], kernel.total.shared_reads.used, kernel.operands[1].bytes_read):
        assert str(number) in plain
        assert str(number) in rich
    monkeypatch.setenv("COLUMNS", "60")
    assert "forward_mma.cu" in rendered(forward, stream=Terminal())  # no cell is cut


def test_how_many_lines_are_shown(forward: CallProfile) -> None:
    (kernel,) = forward.kernels
    some, every = rendered(forward, View(top=3)), rendered(forward, View(top=0))
    assert f"(3 of {len(kernel.lines)})" in some
    assert every.count(".cu:") + every.count(".cuh:") == len(kernel.lines)
    assert f"of {len(kernel.kernel_lines)})" in rendered(forward, View("kernel"))


def test_json_holds_everything(forward: CallProfile) -> None:
    content = json.loads(json.dumps(forward.to_json()))
    assert content["call"]["head_dim"] == 64
    assert content["kernels"][0]["total"]["shared_reads"]["used"] == forward.kernels[0].total.shared_reads.used
    assert len(content["kernels"][0]["lines"]) == len(forward.kernels[0].lines)
