"""The kernels under every schedule: no check fires, and the results are the same bit for bit.

The ordinary run takes one kind of element per architecture and few random schedules; `pytest --exhaustive tests/test_schedules.py` takes everything
with 20 seeds.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from kernel_mutations import BLIND_ROWS, BROADCAST, BROADCAST_KEY, GROUPED, UNALIGNED, Inputs, Variant

from cuflash import Tile
from cuflash.simulator import check

pytest.importorskip("cupy")

ARCHITECTURES = {"sm_75": "float16", "sm_80": "bfloat16", "sm_90": "float32"}  # and the element type of the ordinary run
BACKWARD_KERNELS = ("backward_delta", "backward_dkdv_mma", "backward_dq_mma")


def _cases() -> Iterator[Any]:
    for arch, usual in ARCHITECTURES.items():
        for dtype in ("float16", "bfloat16", "float32"):
            for is_causal in (False, True):
                for stages in (1,) if arch == "sm_75" else (1, 2, 3):
                    marks = () if dtype == usual and stages < 3 else pytest.mark.exhaustive
                    name = f"{arch}-{dtype}{'-causal' if is_causal else ''}-{stages}"
                    yield pytest.param(arch, dtype, is_causal, Tile(32, 32, 2, stages), id=name, marks=marks)


@pytest.fixture
def seeds(request: pytest.FixtureRequest) -> range:
    """Of the random schedules."""
    return range(20 if request.config.getoption("--exhaustive") else 2)


def _inputs(is_causal: bool) -> tuple[Inputs, ...]:
    return (GROUPED, UNALIGNED, BROADCAST, BROADCAST_KEY, *((BLIND_ROWS,) if is_causal else ()))


@pytest.mark.sample(6)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize(("arch", "dtype", "is_causal", "tile"), list(_cases()))
def test_every_schedule_gives_the_same_bits(
    arch: str, dtype: str, is_causal: bool, tile: Tile, backward: bool, seeds: range, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUFLASH_SIMULATOR_ARCH", arch)
    variant = Variant("", arch, dtype, tile, _inputs(is_causal), backward, is_causal)
    for inputs, call in zip(variant.inputs, variant.calls(), strict=True):
        report = check(call, seeds=seeds)
        assert len(report.runs) == 2 + len(seeds)
        assert len(report.compared) == (3 if backward else 2)
        if not backward:
            assert report.kernels == ("forward_mma",)
        elif inputs is BROADCAST_KEY:
            assert report.kernels == ("backward_delta", "backward_dkdv_mma", "backward_dkdv_mma", "backward_dq_mma")
        else:
            assert report.kernels == BACKWARD_KERNELS


@pytest.mark.exhaustive
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("arch", list(ARCHITECTURES))
def test_default_tiles(arch: str, head_dim: int, dtype: str, seeds: range, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiles that calls take, some of which need two kernels for dK and dV."""
    monkeypatch.setenv("CUFLASH_SIMULATOR_ARCH", arch)
    inputs = Inputs((1, 200, 1, head_dim), (1, 300, 1, head_dim), (1, 300, 1, head_dim))
    for backward in (False, True):
        for call in Variant("", arch, dtype, None, (inputs,), backward, True).calls():
            check(call, seeds=seeds)
