"""Blocks of the kernels of mma.sync for dK and dV that share out the queries of a tile of keys: as exact, in a fixed order, and taken where it is predicted to gain."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy
import pytest
from conftest import Target
from test_fused_backward import plan_of
from test_wgmma_backward import backward_of
from test_wgmma_forward import MASKS, inputs_of, names

import cuflash
from cuflash.hardware import device
from cuflash.planning import fused_backward, planner, predicted_backward
from cuflash.planning.kernel_plan import UNSPLIT, Splits
from cuflash.planning.plan import Plan
from cuflash.problem.tile import Tile
from cuflash.runtime import calls
from cuflash.simulator import check

pytest.importorskip("cupy")

ARCH = "sm_80"
TILE = Tile(32, 32, 2, 2)


@pytest.fixture(autouse=True)
def in_kernels_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUFLASH_SIMULATOR_ARCH", ARCH)
    monkeypatch.setenv(fused_backward.VARIABLE, "0")


@pytest.fixture
def with_splits(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Make calls take so many splits, whatever is predicted."""

    def split(number: int) -> None:
        monkeypatch.setattr(calls, "_calls", {})
        monkeypatch.setattr(predicted_backward, "splits_of", lambda *_: Splits(number, chains=1))

    return split


# --- Right --------------------------------------------------------------------------------------------------------------------------------

FEATURES: dict[str, tuple[int, dict[str, Any]]] = {
    "none": (64, {}),
    "more keys": (64, MASKS["bottom_right"]),
    "window": (64, {"window": (70, 20)}),
    "dropout": (64, {"dropout_p": 0.3, "dropout_seed": 5, "is_causal": True}),
    "value": (72, {}),
    "wide": (256, MASKS["causal"]),
}


@pytest.mark.sample(2)
@pytest.mark.parametrize("splits", [3, 16], ids=str)
@pytest.mark.parametrize("case", FEATURES)
def test_parts_add_up(case: str, splits: int, with_splits: Callable[[int], None]) -> None:
    """Of heads that share keys, in splits that end within a head, and in more splits than there are tiles of queries."""
    head_dim, options = FEATURES[case]
    on = Target(ARCH)
    with_splits(splits)
    query, key, value = inputs_of(on, (90, 70), head_dim, heads=(3, 1), dtype="bfloat16")
    value = value[..., :40].copy() if case == "value" else value
    tile = TILE if head_dim <= 128 else None
    planned = names(cuflash.plan(query, key, value, enable_gqa=True, backward=True, tile=tile, **options))
    assert planned.count("backward_dkdv_merge") == len([name for name in planned if name in ("backward_dkdv", "backward_dk", "backward_dv")])
    on.check(query, key, value, enable_gqa=True, backward_tile=tile, **options)


@pytest.mark.sample(1)
@pytest.mark.parametrize("case", ["lengths", "shared batches", "value of its own heads"])
def test_members_of_batches(case: str, with_splits: Callable[[int], None]) -> None:
    """Batches with lengths of their own, and those that share keys, of which a block loads the next ones when it comes to them."""
    on = Target(ARCH)
    with_splits(3)
    if case == "lengths":
        lengths = {"seqlens_kv": numpy.array([30, 70], "int32"), "is_causal": True}
        on.check(*inputs_of(on, (90, 70), heads=(2, 1), batches=(2, 2)), enable_gqa=True, backward_tile=TILE, **lengths)
    elif case == "shared batches":
        on.check(*inputs_of(on, (70, 50), heads=(4, 2), batches=(2, 1)), enable_gqa=True, backward_tile=TILE)
    else:
        query, key, value = inputs_of(on, (70, 50), heads=(4, 4))
        on.check(query, key, value[:, :, :1].copy() if value.shape[2] == 4 else value[:, :1].copy(), enable_gqa=True, backward_tile=TILE)


@pytest.mark.sample(1)
@pytest.mark.parametrize("case", ["none", "dropout"])
def test_every_schedule_gives_the_same_bits(case: str, with_splits: Callable[[int], None], request: pytest.FixtureRequest) -> None:
    """And no two blocks write the same place, nor is anything read that nobody wrote, which the simulator checks."""
    head_dim, options = FEATURES[case]
    seeds = range(100 if request.config.getoption("--exhaustive") else 2)
    on = Target(ARCH)
    with_splits(16)
    inputs = inputs_of(on, (90, 70), head_dim, heads=(3, 1), dtype="bfloat16")
    report = check(functools.partial(backward_of(*inputs, **options), tile=TILE), seeds=seeds)
    assert "backward_dkdv_merge" in report.kernels
    assert len(report.runs) == 2 + len(seeds)
