"""The table beside FlashAttention-2: which kernels its rows are of, and what its ratios are. Nothing is compiled; steady states are made up."""

from __future__ import annotations

import os
from collections.abc import Sequence

import pytest

import kernels_of_mma
import predicted_attention
from cuflash.planning.kernel_plan import KernelPlan
from cuflash.timing.description import Description
from cuflash.timing.prediction import KernelPrediction
from predicted_attention import Cell, Known

KNOWN = Known()
CLOCKS = {"wgmma": 0.5, "mma": 2.0}
"""Clocks for a pair of query and key of made-up kernels, over FlashAttention-2's."""


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels take `CLOCKS`; two of one pass half of that each."""

    def predict(kernel: KernelPlan, cell: Cell) -> KernelPrediction:
        of = Description(kernel.name, cell.arch, kernel.dtype, cell.head_dim, cell.head_dim, cell.causal, kernel.tile, 0, 0, 0)
        count = len(next(taken for _, taken in predicted_attention.rows(cell) if kernel in taken))
        per_pair = CLOCKS[kernel.spec.implementation] * KNOWN.flash_attention[cell.key] / count
        clocks = 3 * per_pair * kernel.tile.tile_q * kernel.tile.tile_kv
        return KernelPrediction(of, 3, 1, 1, clocks, {"matrix": 1.0}, {}, (), 0.0)

    monkeypatch.setattr(predicted_attention, "predict", predict)
    for name in kernels_of_mma.SWITCHES:
        monkeypatch.delenv(name, raising=False)


def table(archs: Sequence[str], head_dims: Sequence[int]) -> list[list[str]]:
    """Its cells, row by row."""
    lines = predicted_attention.lines(archs, head_dims, KNOWN, show_kernels=False)
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines][2:]


@pytest.mark.usefixtures("made_up")
def test_on_hopper_each_call_has_what_it_takes_and_what_it_takes_without_wgmma() -> None:
    """Both by the clocks of one matrix rate, so that a kernel of wgmma may have more than all of it."""
    found = table(["sm_90"], [64, 128, 256])
    assert [row[1] for row in found] == 6 * ["forward", "forward, `mma.sync`"] + 6 * ["backward", "backward, `mma.sync`"]
    for taken, other in zip(found[::2], found[1::2], strict=True):
        assert taken[2:5] == other[2:5], "they are of one call"
        assert all("wgmma" in kernel for kernel in taken[8].split(", ")), taken
        assert "wgmma" not in other[8], other
        assert taken[6] == other[6], "beside the same kernel of FlashAttention-2"
        assert (taken[7], other[7]) == ("2.00", "**0.50**"), "clocks of FlashAttention-2's kernel over theirs"
        assert [float(row[5]) / float(row[6]) for row in (taken, other)] == pytest.approx([2.0, 0.5], abs=0.02), "shares of one rate"


@pytest.mark.usefixtures("made_up")
def test_where_there_is_no_wgmma_a_call_has_one_row() -> None:
    found = table(["sm_80", "sm_120"], [64, 128])
    assert [row[1] for row in found] == 2 * (4 * ["forward"] + 4 * ["backward"])
    assert not any("wgmma" in row[8] for row in found)


def test_variables_are_what_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also behind an error."""
    forward, backward = kernels_of_mma.SWITCHES
    monkeypatch.setenv(forward, "1")
    monkeypatch.delenv(backward, raising=False)

    def fail() -> None:
        with kernels_of_mma.without_wgmma():
            assert (os.environ[forward], os.environ[backward]) == ("0", "0")
            raise ValueError("a kernel that is not modelled")

    with pytest.raises(ValueError, match="not modelled"):
        fail()
    assert (os.environ.get(forward), os.environ.get(backward)) == ("1", None)
