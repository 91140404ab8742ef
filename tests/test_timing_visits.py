"""`cuflash.timing.visits`: tiles that blocks visit, by the arrays of a call, against a look at every pair. Needs no compiler."""

from __future__ import annotations

from collections.abc import Callable
from math import ceil
from typing import Any

import numpy
import pytest
from numpy.typing import NDArray

import cuflash
from cuflash.errors import UnsupportedError
from cuflash.planning.kernel_plan import KernelPlan
from cuflash.planning.plan import Plan
from cuflash.problem.tile import Tile
from cuflash.timing.visits import Visits, visits_of_launch

TILE = Tile(32, 32, 2, 2)
BATCH, ROWS, COLUMNS, HEADS, HEADS_KV = 2, 150, 130, 4, 2

Pairs = NDArray[numpy.bool_]


def brute_force(kernel: KernelPlan, pairs: Callable[[int, int], Pairs], heads: int) -> list[list[Visits]]:
    """By (batch, head) of the kernel's rows and by tile; `pairs(batch, head)` is what a query head sees."""
    by_keys, found = kernel.spec.owns_keys, []
    for pair in range(kernel.num_blocks // kernel.num_tiles):
        batch, head = divmod(pair, heads // kernel.group_heads)
        any_of, all_of = numpy.zeros(kernel.num_tiles, int), numpy.zeros(kernel.num_tiles, int)
        for member in range(kernel.group_heads):
            seen = pairs(batch, head * kernel.group_heads + member)
            rows, columns = ceil(seen.shape[0] / kernel.tile.tile_q), ceil(seen.shape[1] / kernel.tile.tile_kv)
            for i in range(rows):
                for j in range(columns):
                    part = seen[i * kernel.tile.tile_q :, j * kernel.tile.tile_kv :][: kernel.tile.tile_q, : kernel.tile.tile_kv]
                    whole = part.all() and part.shape[1] == kernel.tile.tile_kv
                    any_of[j if by_keys else i] += part.any()
                    all_of[j if by_keys else i] += part.any() and whole
        found.append([Visits(int(full), int(total - full)) for total, full in zip(any_of, all_of, strict=True)])
    return found


def planned(**options: Any) -> list[Plan]:
    query, key = (numpy.zeros((BATCH, rows, heads, 32), numpy.float16) for rows, heads in ((ROWS, HEADS), (COLUMNS, HEADS_KV)))
    return [cuflash.plan(query, key, key, tile=TILE, enable_gqa=True, backward=backward, **options) for backward in (False, True)]


def tiled(plan: Plan) -> list[KernelPlan]:
    return [kernel for kernel in plan.kernels if kernel.spec.is_tiled]


IDS_Q = numpy.sort(numpy.random.default_rng(1).integers(0, 4, (BATCH, ROWS)).astype(numpy.int32))
IDS_KV = numpy.random.default_rng(2).permuted(
    numpy.repeat(numpy.arange(4, dtype=numpy.int32), 33)[None, :COLUMNS].repeat(BATCH, 0) // 2, axis=0
)
DIFFERENCE = numpy.arange(COLUMNS)[None, :] - numpy.arange(ROWS)[:, None]


def mask(*shape: int) -> Pairs:
    """Blocks of 64 by 64 that hide all, some or nothing."""
    rng = numpy.random.default_rng(len(shape) + shape[0])
    blocks = rng.integers(0, 3, (*shape[:-2], 3, 3)).repeat(64, -1).repeat(64, -2)[..., : shape[-2], : shape[-1]]
    return numpy.asarray((blocks == 2) | ((blocks == 1) & (rng.random(shape) < 0.5)))


CASES: dict[str, dict[str, Any]] = {
    "segments": {"segment_ids_q": IDS_Q, "segment_ids_kv": IDS_KV},
    "segments, causal": {"segment_ids_q": IDS_Q, "segment_ids_kv": IDS_KV, "is_causal": True},
    "mask": {"attn_mask": mask(ROWS, COLUMNS)},
    "mask of keys": {"attn_mask": mask(BATCH, 1, 1, COLUMNS)},
    "mask of queries": {"attn_mask": mask(1, HEADS, ROWS, 1)},
    "mask, causal, window": {"attn_mask": mask(BATCH, HEADS, ROWS, COLUMNS), "is_causal": True, "window": (70, None)},
    "mask, segments, lengths": {"attn_mask": mask(ROWS, COLUMNS), "segment_ids_q": IDS_Q, "segment_ids_kv": IDS_KV, "seqlens_kv": numpy.array([70, 0], "int32")},
    "mask, lengths of queries": {"attn_mask": mask(ROWS, COLUMNS), "seqlens_q": numpy.array([64, 0], "int32")},
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_tiles_that_data_leave(name: str) -> None:
    options = CASES[name]
    data = {of: value for of, value in options.items() if isinstance(value, numpy.ndarray)}

    def pairs(batch: int, head: int) -> Pairs:
        seen = numpy.ones((ROWS, COLUMNS), bool)
        if "segment_ids_q" in data:
            seen &= IDS_Q[batch][:, None] == IDS_KV[batch][None, :]
        if "attn_mask" in data:
            seen &= numpy.broadcast_to(data["attn_mask"], (BATCH, HEADS, ROWS, COLUMNS))[batch, head]
        if "is_causal" in options:
            seen &= DIFFERENCE <= 0
        if "window" in options:
            left, _ = options["window"]
            seen &= -left <= DIFFERENCE
        if "seqlens_kv" in data:
            seen &= numpy.arange(COLUMNS)[None, :] < data["seqlens_kv"][batch]
        if "seqlens_q" in data:
            seen &= numpy.arange(ROWS)[:, None] < data["seqlens_q"][batch]
        return seen

    for plan in planned(**options):
        for kernel in tiled(plan):
            found, expected = visits_of_launch(kernel, plan.problem, data), brute_force(kernel, pairs, HEADS)
            padded = [[*head, *[Visits(0)] * (kernel.num_tiles - len(head))] for head in found]
            assert padded == expected, kernel.name
            assert sum(of.total for head in found for of in head) > 0
            with pytest.raises(UnsupportedError, match=r"without its values; expected .* in data"):
                visits_of_launch(kernel, plan.problem, {})


@pytest.mark.parametrize("options", [{}, {"window": (40, 10)}, {"causal_alignment": "bottom_right"}], ids=str)
def test_prefixes_and_lengths_move_the_ends(options: dict[str, Any]) -> None:
    prefix, lengths = numpy.array([64, 0], numpy.int32), numpy.array([130, 64], numpy.int32)

    def pairs(batch: int, _: int) -> Pairs:
        shift = int(lengths[batch]) - ROWS if "causal_alignment" in options else 0
        seen = (DIFFERENCE - shift <= 0) | (numpy.arange(COLUMNS)[None, :] < prefix[batch])
        if "window" in options:
            seen &= (DIFFERENCE >= -40) & (DIFFERENCE <= 10)
        return numpy.asarray(seen & (numpy.arange(COLUMNS)[None, :] < lengths[batch]))

    data = {"prefix_lengths": prefix, "seqlens_kv": lengths}
    for plan in planned(is_causal=True, **data, **options):
        for kernel in tiled(plan):
            expected = [[of.total for of in head] for head in brute_force(kernel, pairs, HEADS)]
            found = [[of.total for of in head] for head in visits_of_launch(kernel, plan.problem, data)]
            assert found == expected, kernel.name


def test_packed_sequences_have_walks_of_their_own() -> None:
    offsets = numpy.array([0, 100, 100, 164], numpy.int32)
    query = numpy.zeros((170, 2, 32), numpy.float16)
    data = {"cu_seqlens_q": offsets, "cu_seqlens_kv": offsets}
    for backward in (False, True):
        plan = cuflash.varlen_plan(
            query, query, query, **data, max_seqlen_q=100, max_seqlen_kv=100, is_causal=True, tile=TILE, backward=backward
        )
        for kernel in tiled(plan):
            found = [[of.total for of in head] for head in visits_of_launch(kernel, plan.problem, data)]
            long, short = ([4, 3, 2, 1], [2, 1, 0, 0]) if kernel.spec.owns_keys else ([1, 2, 3, 4], [1, 2, 0, 0])
            assert found == [long, long, [0] * 4, [0] * 4, short, short, [0] * 4, [0] * 4], kernel.name


def test_the_tiles_of_a_masks_gradient_share_out_all_heads() -> None:
    query, key = (numpy.zeros((BATCH, rows, HEADS, 32), numpy.float16) for rows in (ROWS, COLUMNS))
    plan = cuflash.plan(query, key, key, attn_mask=numpy.zeros((ROWS, COLUMNS), numpy.float16), need_attn_mask_grad=True, backward=True)
    kernel = plan.kernels[-1]
    (visits,) = visits_of_launch(kernel, plan.problem, {})
    assert kernel.name == "backward_mask"
    assert {of.total for of in visits} == {BATCH * HEADS}
