"""Profiles of whole calls: what is counted fits the call, and what is printed is what was counted."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from math import ceil

import pytest

from cuflash import profiling
from cuflash.profiling import CallProfile, View, profile_call
from cuflash.samples import Sample

SAMPLE = Sample(batch=2, seqlen_q=128, seqlen_kv=128, num_heads_q=2, num_heads_kv=2, head_dim=64)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(scope="module")
def forward() -> CallProfile:
    pytest.importorskip("cupy")
    return profile_call(SAMPLE)


def rendered(result: CallProfile, view: View | None = None, stream: io.StringIO | None = None) -> str:
    stream = stream or io.StringIO()
    profiling.render(result, view, stream)
    return stream.getvalue()


def test_a_forward_call_of_whole_tiles(forward: CallProfile) -> None:
    (kernel,) = forward.kernels
    assert kernel.ctas == forward.plan.kernels[0].num_blocks
    assert kernel.total.matrix_flops == forward.plan.problem.flops_forward
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
    products = {"backward_delta": 0, "backward_dkdv": 4, "backward_dq": 3}
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
