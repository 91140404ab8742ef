"""Blocks of the kernels of mma.sync for dK and dV that share out the queries of a tile of keys: as exact, in a fixed order, and taken where it is predicted to gain."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import test_lengths_in_places
from conftest import Target, poison_new_memory
from problems import checked
from test_query_splits import HIDING, LENGTHS
from test_sequences import offsets, packed
from test_wgmma_backward import backward_of
from test_wgmma_forward import MASKS, inputs_of, names

import cuflash
from cuflash.cli.samples import stand_in
from cuflash.hardware import device
from cuflash.hardware.device import Device
from cuflash.planning import fused_backward, key_parts, planner, predicted_backward, predicted_time
from cuflash.planning.kernel_cases import KernelCase
from cuflash.planning.kernel_plan import UNSPLIT, Splits
from cuflash.planning.plan import Plan
from cuflash.planning.predicted_time import Steady
from cuflash.problem.problem import Problem
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
    """Make calls take so many splits, whatever is predicted, of parts that are NaN before."""
    poison_new_memory(monkeypatch)

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
    assert planned.count("backward_dkdv_merge") == len(
        [name for name in planned if name in ("backward_dkdv", "backward_dk", "backward_dv")]
    )
    on.check(query, key, value, enable_gqa=True, backward_tile=tile, **options)


@pytest.mark.sample(1)
@pytest.mark.parametrize(("head_dim", "view"), [(40, "contiguous"), (40, "unaligned_base"), (128, "contiguous")])
def test_parts_of_float32_add_up(head_dim: int, view: str, with_splits: Callable[[int], None]) -> None:
    """With dK and dV in one kernel or in two; their rows are stored in whole pieces or element by element."""
    on = Target(ARCH)
    with_splits(3)
    query, key, value = inputs_of(on, (90, 70), head_dim, heads=(3, 1), dtype="float32", view=view)
    planned = names(cuflash.plan(query, key, value, enable_gqa=True, backward=True))
    assert planned.count("backward_dkdv_merge") == (1 if head_dim == 40 else 2)
    on.check(query, key, value, enable_gqa=True, is_causal=True, dropout_p=0.3, dropout_seed=5)


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
        on.check(query, key, value[:, :, :1].copy(), enable_gqa=True, backward_tile=TILE)


@pytest.mark.sample(1)
@pytest.mark.parametrize("splits", [3, 16], ids=str)
@pytest.mark.parametrize("case", HIDING)
def test_tiles_that_data_hide(case: str, splits: int, with_splits: Callable[[int], None]) -> None:
    """Of the tiles of queries that are left, which differ between heads and batches; of some tiles of keys none are."""
    on = Target(ARCH)
    with_splits(splits)
    inputs = inputs_of(on, LENGTHS, heads=(2, 1), batches=(2, 2), dtype="bfloat16")
    assert "backward_dkdv_merge" in names(
        cuflash.plan(*inputs, enable_gqa=True, backward=True, tile={"backward_dkdv": TILE}, **HIDING[case])
    )
    on.check(*inputs, enable_gqa=True, backward_tile={"backward_dkdv": TILE}, **HIDING[case])


@pytest.mark.sample(1)
@pytest.mark.parametrize("mask", MASKS)
def test_packed_sequences(mask: str, with_splits: Callable[[int], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of which some are empty, some have fewer tiles of queries than splits, and rows behind the last one are nobody's."""
    on, lengths_q, lengths_kv = Target(ARCH), [40, 0, 170, 33, 5], [60, 20, 100, 0, 40]
    with_splits(3)
    inputs = packed(on, (sum(lengths_q) + 7, sum(lengths_kv) + 9), "float16", (64, 64), heads=(2, 1))
    monkeypatch.setattr(cuflash, "varlen_attention_backward", functools.partial(cuflash.varlen_attention_backward, tile=TILE))
    on.check_packed(inputs, (offsets(on, lengths_q), offsets(on, lengths_kv)), enable_gqa=True, **MASKS[mask])


def test_rows_that_sequences_do_not_use(with_splits: Callable[[int], None]) -> None:
    """Of places in packed arrays, with NaN and infinity there: the first split fills them with zeros, and none merges them."""
    with_splits(2)
    test_lengths_in_places.test_rows_of_nobody_take_part_in_nothing("both", False, Target(ARCH))


@pytest.mark.sample(1)
@pytest.mark.parametrize("case", ["none", "dropout", "documents"])
def test_every_schedule_gives_the_same_bits(case: str, with_splits: Callable[[int], None], request: pytest.FixtureRequest) -> None:
    """And no two blocks write the same place, nor is anything read that nobody wrote, which the simulator checks."""
    head_dim, options = (64, HIDING[case]) if case in HIDING else FEATURES[case]
    seeds = range(100 if request.config.getoption("--exhaustive") else 2)
    on = Target(ARCH)
    with_splits(16)
    hides = case in HIDING
    inputs = inputs_of(on, LENGTHS if hides else (90, 70), head_dim, heads=(3, 1), batches=(2, 2) if hides else (1, 1), dtype="bfloat16")
    report = check(functools.partial(backward_of(*inputs, **options), tile=TILE), seeds=seeds)
    assert "backward_dkdv_merge" in report.kernels
    assert len(report.runs) == 2 + len(seeds)


# --- Taken --------------------------------------------------------------------------------------------------------------------------------


def own_plan(head_dim: int, seqlens: tuple[int, int], heads: tuple[int, int], dtype: str = "float16", **options: Any) -> Plan:
    """On an A100, of a call of any size."""
    query, key = (stand_in((1, length, count, head_dim), dtype) for length, count in zip(seqlens, heads, strict=True))
    arrays = {name: options.pop(name) for name in [*options] if isinstance(options[name], numpy.ndarray)}
    return planner.make_plan(checked(query, key, key, enable_gqa=True, **arrays, **options), device.of_arch(ARCH, "gpu"), backward=True)


@pytest.mark.parametrize(("dtype", "head_dim"), [("float16", 64), ("float16", 128), ("float16", 256), ("float32", 64), ("float32", 128)])
def test_few_tiles_of_keys_are_split(dtype: str, head_dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One K/V head with 512 keys, whose 4 or 8 blocks would leave most of 108 SMs idle, also where the fused kernel may be taken; not 32 of them."""
    monkeypatch.delenv(fused_backward.VARIABLE)
    few = own_plan(head_dim, (16384, 512), (32, 1), dtype)
    split = [kernel for kernel in few.kernels if kernel.spec.shares_queries]
    assert split
    for kernel in split:
        assert 100 <= kernel.num_blocks <= 4 * 108
        assert few.kernels[few.kernels.index(kernel) + 1].name == "backward_dkdv_merge"
        assert f"queries of a tile of keys in {kernel.splits.number} splits" in str(few)
    many = own_plan(head_dim, (16384, 4096), (32, 32), dtype)
    assert not any(kernel.splits.chains for kernel in many.kernels)


@pytest.mark.parametrize("seqlen", [1024, 16384, 2**18])
def test_memory_is_bounded(seqlen: int) -> None:
    """Parts are a number of blocks for each SM, whatever the length."""
    plan = own_plan(128, (seqlen, 512), (32, 1))
    (kernel,) = (kernel for kernel in plan.kernels if kernel.spec.shares_queries)
    nbytes = {buffer.name: buffer.nbytes for buffer in plan.workspace}
    assert nbytes == {"row_statistics": 8 * 32 * seqlen, "key_parts": kernel.num_blocks * kernel.tile.tile_kv * 256 * 4}
    assert nbytes["key_parts"] <= 4 * 108 * 128 * 256 * 4


@pytest.mark.parametrize(("seqlen", "heads"), [((1024, 1024), (8, 8)), ((2000, 2000), (4, 4)), ((4096, 512), (8, 1))])
def test_parts_take_at_most_four_and_a_half_times_the_gradients(seqlen: tuple[int, int], heads: tuple[int, int]) -> None:
    plan = own_plan(64, seqlen, heads)
    gradients = 2 * 64 * (seqlen[0] * heads[0] + 2 * seqlen[1] * heads[1])
    (parts,) = (buffer.nbytes for buffer in plan.workspace if buffer.name == "key_parts")
    assert 0 < parts <= 4.5 * gradients


@pytest.mark.parametrize("case", ["segments", "packed"])
def test_calls_that_data_cut_are_split(case: str) -> None:
    """Of packed sequences the blocks of the whole grid count, which has room for the longest one in the place of each."""
    if case == "segments":
        hidden = {name: numpy.zeros((1, length), "int32") for name, length in (("segment_ids_q", 16384), ("segment_ids_kv", 512))}
        plan = own_plan(128, (16384, 512), (32, 1), **hidden)
    else:
        plan = packed_plan([4096] * 4, [512] * 4)
        assert not any(kernel.splits.chains for kernel in packed_plan([4096] * 4, [64, 64, 64, 4096]).kernels)
    (kernel,) = (kernel for kernel in plan.kernels if kernel.spec.shares_queries)
    assert 100 <= kernel.num_blocks <= 4 * 108
    assert not kernel.packed_places
    assert plan.kernels[plan.kernels.index(kernel) + 1].name == "backward_dkdv_merge"


def packed_plan(lengths_q: list[int], lengths_kv: list[int]) -> Plan:
    query, key = (stand_in((sum(lengths), heads, 128), "float16") for lengths, heads in ((lengths_q, 32), (lengths_kv, 1)))
    cu_seqlens = [numpy.cumsum([0, *lengths]).astype("int32") for lengths in (lengths_q, lengths_kv)]
    problem = checked(
        query, key, key, enable_gqa=True, cu_seqlens_q=cu_seqlens[0], cu_seqlens_kv=cu_seqlens[1], max_seqlen_q=max(lengths_q),
        max_seqlen_kv=max(lengths_kv),
    )  # fmt: skip
    return planner.make_plan(problem, device.of_arch(ARCH, "gpu"), backward=True)


UNSPLIT_CALLS: dict[str, dict[str, Any]] = {
    "no prediction": {"head_dim": 96},
    "a short kernel": {"seqlen": 128},
    "one product of TF32": {"dtype": "float32", "head_dim": 64, "allow_tf32": True},
}


@pytest.mark.parametrize("case", UNSPLIT_CALLS)
def test_what_is_not_split(case: str) -> None:
    options = {"head_dim": 128, "seqlen": 2048, **UNSPLIT_CALLS[case]}
    head_dim, seqlen = options.pop("head_dim"), options.pop("seqlen")
    (kernel,) = (kernel for kernel in own_plan(head_dim, (seqlen, seqlen), (1, 1), **options).kernels if kernel.spec.shares_queries)
    assert kernel.splits == UNSPLIT


def test_fused_kernel_is_compared_with_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes a call of which the kernels of their own would be slower without splits."""
    monkeypatch.delenv(fused_backward.VARIABLE)
    call = 256, (4096, 512), (16, 1)
    assert "backward_fused" not in names(own_plan(*call))
    monkeypatch.setattr(key_parts, "fastest", lambda case, tile, loop, problem, on: (UNSPLIT, unsplit(case, tile, loop, problem, on)))
    assert "backward_fused" in names(own_plan(*call))


def unsplit(case: KernelCase, tile: Tile, loop: Steady, problem: Problem, on: Device) -> float:
    return predicted_time.clocks(loop, case, tile, predicted_time.grid_of(case, tile, problem), problem, on)
