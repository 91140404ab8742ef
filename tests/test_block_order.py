"""In which order causal blocks are launched: each piece of work once, the longest first, and the same bits in every order."""

from __future__ import annotations

from typing import Any

import numpy
import pytest
from conftest import Target

import predicted_grids
from cuflash.hardware import device
from cuflash.hardware.architectures import architecture
from cuflash.jit import disassembly
from cuflash.planning import block_order, fused_backward
from cuflash.problem.tile import Tile
from cuflash.runtime import calls


def test_sections_divide_the_heads() -> None:
    assert [block_order.nearest_divisor(*of) for of in ((32, 27), (128, 27), (17, 16), (1, 5), (12, 3))] == [32, 32, 17, 1, 3]


@pytest.mark.parametrize(("last_first", "expected"), [(True, [3, 3, 1, 1] * 2), (False, [1, 1, 3, 3] * 2)])
def test_within_a_section_equal_tiles_come_together(last_first: bool, expected: list[int]) -> None:
    assert list(block_order.in_order([[1, 3]] * 4, section=2, last_first=last_first)) == expected


def test_the_last_section_may_have_fewer_heads() -> None:
    assert list(block_order.in_order([[1, 3]] * 3, section=2, last_first=False)) == [1, 1, 3, 3, 1, 3]


@pytest.mark.skipif(disassembly.find_nvdisasm() is None, reason=disassembly.NVDISASM_HINT)
def test_less_time_is_lost_than_head_by_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the grid model, which knows nothing of L2."""
    steady, call = predicted_grids.Steady(), {"backward": False, "head_dim": 64, "causal": True, "seqlen": 2048}
    in_sections = predicted_grids.predict(predicted_grids.plan_of("sm_80", **call), steady)
    monkeypatch.setattr(block_order, "section_heads", lambda *_, **__: 1)
    head_by_head = predicted_grids.predict(predicted_grids.plan_of("sm_80", **call), steady)
    assert 0 <= in_sections.loss < 0.01 < head_by_head.loss < 0.08
    assert in_sections.milliseconds < head_by_head.milliseconds


@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_89", "sm_120"])
def test_sections_of_the_fused_kernel_follow_l2(arch: str) -> None:
    """Heads of 4096 queries take two MiB of Q and dO and two of sums; five eighths of L2 and a tenth more hold so many, one at least. Sections are equal where a divisor is near."""
    problem = predicted_grids.plan_of("sm_80", backward=True, head_dim=128, causal=True, seqlen=4096).problem
    most = max(1, int(1.1 * architecture(arch).l2_bytes * 5 / 8) // (4 * 2**20))
    on = device.of_arch(arch, "gpu")
    assert fused_backward.section_heads(problem, on, 1, pairs=most * 3) == most
    assert fused_backward.section_heads(problem, on, 4, pairs=most // 4 * 3) == max(1, most // 4)
    assert fused_backward.section_heads(problem, on, 1, pairs=max(1, most - 1) * 3) == max(1, most - 1)
    assert fused_backward.section_heads(problem, on, 1, pairs=997) == most, "no prime number of heads comes head by head, nor all at once"


def test_sections_on_hopper_run_sixteen_blocks_of_a_head_side_by_side() -> None:
    """Or fewer, where more heads fit L2: long heads, of which two or less do, have 132 // 16 in a section, short ones as many as fit."""
    on = device.of_arch("sm_90", "gpu")
    long, short = (
        predicted_grids.plan_of("sm_80", backward=True, head_dim=128, causal=True, seqlen=seqlen).problem for seqlen in (16384, 1024)
    )
    assert fused_backward.section_heads(long, on, 1, pairs=64) == fused_backward.section_heads(long, on, 4, pairs=64) == 132 // 16
    fits = int(1.1 * architecture("sm_90").l2_bytes * 5 / 8) // 2**20
    assert 132 // 16 < fused_backward.section_heads(short, on, 1, pairs=fits * 3) == fits


SECTIONS = (1, 2, 4)
"""Of two batches or sequences and one behind them, with four heads or two: each divides all."""


def _in_every_order(monkeypatch: pytest.MonkeyPatch, run: Any) -> list[Any]:
    found = []
    for section in SECTIONS:
        monkeypatch.setattr(block_order, "section_heads", lambda *_, pairs, section=section, **__: min(section, pairs & -pairs))
        monkeypatch.setattr(fused_backward, "section_heads", lambda *_, section=section, **__: section)
        monkeypatch.setattr(calls, "_calls", {})  # what is kept was planned in another order
        found.append(run())
    return found


@pytest.mark.parametrize("tile", [None, {"backward_fused": Tile(32, 32, 2, 2)}], ids=["of their own", "fused"])
@pytest.mark.parametrize(
    "options", [{}, {"window": (40, 0)}, {"seqlens_kv": numpy.array([150, 70], numpy.int32)}], ids=["causal", "window", "seqlens_kv"]
)
def test_every_order_gives_the_same_bits(simulator: Target, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], tile: Any) -> None:
    query = simulator.random((2, 150, 4, 32), "bfloat16", 1)
    key, value = (simulator.random((2, 150, 2, 32), "bfloat16", seed) for seed in (2, 3))
    bits = _in_every_order(
        monkeypatch, lambda: simulator.run(query, key, value, is_causal=True, enable_gqa=True, backward_tile=tile, **options).bits()
    )
    assert len(set(bits)) == 1


def test_every_order_of_packed_sequences_gives_the_same_bits(simulator: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = [simulator.random((150, heads, 32), "bfloat16", seed) for seed, heads in enumerate((4, 2, 2, 4))]
    offsets = numpy.array([0, 100, 140], numpy.int32)  # and ten tokens behind them
    bits = _in_every_order(
        monkeypatch, lambda: tuple(map(simulator.bits, simulator.run_packed(inputs, (offsets, offsets), is_causal=True, enable_gqa=True)))
    )
    assert len(set(bits)) == 1
