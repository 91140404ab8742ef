"""Tiles in which nothing is visible are not visited: the simulator's counters of matrix instructions say what was computed."""

from __future__ import annotations

from collections.abc import Callable
from math import ceil
from typing import Any

import numpy
import pytest
from conftest import Target

import cuflash
from cuflash.planning.kernel_plan import KernelPlan, LaunchShape
from cuflash.planning.visits import all_tiles, visited_tiles
from cuflash.problem.tile import Tile
from cuflash.runtime import launch

TILE = Tile(32, 32, 2, 2)
SEQLEN = 256

Work = dict[str, int]
"""Matrix instructions of each kernel."""

_of_whole_calls: dict[tuple[int, int], Work] = {}
"""Lengths -> what a call with nothing to leave out takes, which most tests compare with."""


@pytest.fixture
def work(simulator: Target, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that runs both calls with options and returns the matrix instructions of their kernels."""
    counted: list[int] = []

    def launch_and_count(self: Any, shape: LaunchShape, arguments: Any, stream: int, buffers: Any) -> None:
        counters = self._module.launch((shape.num_blocks, 1, 1), (shape.num_threads, 1, 1), shape.shared_bytes, bytes(arguments), buffers)
        counted.append(counters.matrix_instructions)

    monkeypatch.setattr(launch._SimulatorExecutable, "launch", launch_and_count)

    def run(seqlens: tuple[int, int] = (SEQLEN, SEQLEN), **options: Any) -> Work:
        if not options and seqlens in _of_whole_calls:
            return _of_whole_calls[seqlens]
        shapes = [(2, seqlens[0], 2, 32), (2, seqlens[1], 2, 32), (2, seqlens[1], 2, 32)]
        inputs = [simulator.random(shape, "bfloat16", seed) for seed, shape in enumerate(shapes)]
        plans = [cuflash.plan(*inputs, tile=TILE, backward=backward, **options) for backward in (False, True)]
        counted.clear()
        if options:
            simulator.check(*inputs, tile=TILE, backward_tile=TILE, **options)
        else:
            simulator.run(*inputs, tile=TILE, backward_tile=TILE)
        kernels = [kernel.name for plan in plans for kernel in plan.kernels]
        found = {name: count for name, count in zip(kernels, counted, strict=True) if name not in ("backward_delta", "visible_tiles")}
        if not options:
            _of_whole_calls[seqlens] = found
        return found

    return run


def kernels_of(options: dict[str, Any], seqlens: tuple[int, int]) -> tuple[Any, list[KernelPlan]]:
    query, key = (numpy.zeros((2, length, 2, 32), numpy.float16) for length in seqlens)
    plans = [cuflash.plan(query, key, key, tile=TILE, backward=backward, **options) for backward in (False, True)]
    return plans[0].problem, [kernel for plan in plans for kernel in plan.kernels if kernel.name != "backward_delta"]


@pytest.mark.sample(6)
@pytest.mark.parametrize("seqlens", [(256, 256), (256, 100), (70, 256)], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"is_causal": True},
        {"is_causal": True, "causal_alignment": "bottom_right"},
        {"window": (40, 10)},
        {"window": (0, 0), "causal_alignment": "bottom_right"},
        {"window": (33, None), "is_causal": True},
        {"window": (None, 5)},
    ],
    ids=str,
)
def test_the_plan_knows_what_windows_and_the_causal_mask_leave(work: Any, options: dict[str, Any], seqlens: tuple[int, int]) -> None:
    problem, kernels = kernels_of(options, seqlens)
    full, got = work(seqlens), work(seqlens, **options)
    for kernel in kernels:
        visited = visited_tiles(problem, kernel.tile, by_keys=kernel.spec.owns_keys)
        assert visited is not None
        assert got[kernel.name] * all_tiles(problem, kernel.tile) == full[kernel.name] * visited, kernel.name
        assert visited == brute_force(options, seqlens, kernel.tile), kernel.name


def brute_force(options: dict[str, Any], seqlens: tuple[int, int], tile: Tile) -> int:
    """Tiles with a visible pair, by looking at all pairs; the ranges of a band of diagonals leave no others."""
    shift = seqlens[1] - seqlens[0] if options.get("causal_alignment") == "bottom_right" else 0
    difference = numpy.arange(seqlens[1])[None, :] - numpy.arange(seqlens[0])[:, None] - shift
    left, right = options.get("window", (None, None))
    seen = numpy.ones(seqlens, bool)
    if options.get("is_causal"):
        seen &= difference <= 0
    if left is not None:
        seen &= difference >= -left
    if right is not None:
        seen &= difference <= right
    return int(tiles_of(seen, tile).sum())


def tiles_of(seen: Any, tile: Tile) -> Any:
    """Whether anything is seen in each tile."""
    rows, columns = ceil(seen.shape[0] / tile.tile_q), ceil(seen.shape[1] / tile.tile_kv)
    padded = numpy.zeros((rows * tile.tile_q, columns * tile.tile_kv), bool)
    padded[: seen.shape[0], : seen.shape[1]] = seen
    return padded.reshape(rows, tile.tile_q, columns, tile.tile_kv).any(axis=(1, 3))


MASK_VIEWS: dict[str, Callable[[Any], Any]] = {
    "contiguous": lambda mask: mask,
    "transposed": lambda mask: numpy.ascontiguousarray(mask.swapaxes(2, 3)).swapaxes(2, 3),
    "reversed": lambda mask: numpy.ascontiguousarray(mask[..., ::-1])[..., ::-1],
    "unaligned": lambda mask: numpy.pad(mask, ((0, 0), (0, 0), (0, 0), (1, 6)))[..., 1:-6],
    "unaligned_rows": lambda mask: numpy.pad(mask, ((0, 0), (0, 0), (0, 0), (0, 9)))[..., :-9],
}


@pytest.mark.sample(4)
@pytest.mark.parametrize("view", MASK_VIEWS)
@pytest.mark.parametrize("per_head", [False, True])
def test_tiles_that_a_boolean_mask_empties_are_skipped(work: Any, per_head: bool, view: str) -> None:
    rng = numpy.random.default_rng(3)
    blocks = rng.random((2, 2 if per_head else 1, 8, 8)) < 0.3
    blocks[0, 0, 2] = False  # queries that see nothing
    blocks[:, :, :, 5] = False  # keys that nobody sees
    mask = blocks.repeat(32, axis=2).repeat(32, axis=3) & (rng.random((1, 1, SEQLEN, SEQLEN)) < 0.5)
    full, got = work(), work(attn_mask=MASK_VIEWS[view](mask))
    visible = sum(int(tiles_of(mask[b, h % mask.shape[1]], TILE).sum()) for b in range(2) for h in range(2))
    for name, count in got.items():
        assert count * 4 * 64 == full[name] * visible, name


@pytest.mark.sample(3)
@pytest.mark.parametrize("shape", [(2, 1, 1, SEQLEN), (SEQLEN, 1), (1, 1)], ids=str)
@pytest.mark.parametrize("is_causal", [False, True])
def test_masks_broadcast_along_an_axis_skip_tiles_too(work: Any, shape: tuple[int, ...], is_causal: bool) -> None:
    mask = (numpy.random.default_rng(4).random(shape) < 0.05) | (numpy.arange(SEQLEN).reshape(shape[-2:]) < 40 if SEQLEN in shape else True)
    full, got = work(), work(attn_mask=mask, is_causal=is_causal)
    seen = numpy.broadcast_to(mask, (2, 2, SEQLEN, SEQLEN)) & (numpy.tri(SEQLEN, dtype=bool) if is_causal else True)
    visible = sum(int(tiles_of(seen[b, h], TILE).sum()) for b in range(2) for h in range(2))
    for name, count in got.items():
        assert count * 4 * 64 == full[name] * visible, name


def test_one_byte_of_a_chunk_decides(simulator: Target) -> None:
    """Whole tiles of True but for one element, and of False but for one, at every place of a chunk: results, and no tile too many."""
    inputs = [simulator.random((1, 64, 1, 32), "float16", seed) for seed in (1, 2, 3)]
    for place in range(16):
        mask = numpy.ones((64, 64), bool)
        mask[:32, :32], mask[5, place], mask[40, 40 - place] = False, True, False
        simulator.check(*inputs, attn_mask=mask, tile=TILE, backward_tile=TILE)


def test_a_mask_shared_by_all_heads_is_listed_once(simulator: Target) -> None:
    """Lists take four bytes for each pair of tiles, and only for the batches and heads that differ."""
    x = numpy.zeros((2, SEQLEN, 4, 32), numpy.float16)
    sizes = {}
    for shape in [(SEQLEN, SEQLEN), (2, 1, SEQLEN, SEQLEN), (2, 4, SEQLEN, SEQLEN), (1, 4, 1, SEQLEN)]:
        plan = cuflash.plan(x, x, x, attn_mask=numpy.ones(shape, bool), tile=TILE)
        sizes[shape] = plan.workspace_bytes
        assert plan.kernels[0].name == "visible_tiles"
        assert "forward visits as many of 64 per head as data leave visible" in plan.describe()
    assert list(sizes.values()) == [count * 8 * (1 + 8) * 4 for count in (1, 2, 8, 4)]


def test_documents_that_leave_and_come_back(work: Any) -> None:
    """Ids that are not sorted: ranges of two tiles overlap where no id is equal."""
    of_queries = numpy.tile(numpy.repeat(numpy.array([0, 9, 4, 9, 0, 2, 2, 7], numpy.int32), SEQLEN // 8), (2, 1))
    of_keys = of_queries[:, ::-1].copy()
    of_keys[1, ::2] = 100
    full, got = work(), work(segment_ids_q=of_queries, segment_ids_kv=of_keys)
    visible = sum(2 * int(tiles_of(of_queries[b][:, None] == of_keys[b][None, :], TILE).sum()) for b in range(2))
    for name, count in got.items():
        assert count * 4 * 64 == full[name] * visible, name


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"window": (50, 50)}], ids=str)
def test_tiles_between_documents_are_skipped(work: Any, options: dict[str, Any]) -> None:
    ids = numpy.repeat(numpy.array([[0, 1, 2, 3], [0, 0, 4, 4]], numpy.int32), SEQLEN // 4, axis=1)
    difference = numpy.arange(SEQLEN)[None, :] - numpy.arange(SEQLEN)[:, None]
    full, got = work(), work(segment_ids_q=ids, segment_ids_kv=ids, **options)
    visible = 0
    for b in range(2):
        seen = ids[b][:, None] == ids[b][None, :]
        if "is_causal" in options:
            seen &= difference <= 0
        if "window" in options:
            seen &= abs(difference) <= 50
        visible += 2 * int(tiles_of(seen, TILE).sum())
    for name, count in got.items():
        assert count * 4 * 64 == full[name] * visible, name


def test_prefixes_visit_the_prefix_and_the_causal_triangle(work: Any) -> None:
    lengths = numpy.array([0, 100], numpy.int32)
    full, got = work(), work(is_causal=True, prefix_lengths=lengths)
    keys = numpy.arange(SEQLEN)
    visible = sum(2 * int(tiles_of((keys[None, :] <= keys[:, None]) | (keys < length)[None, :], TILE).sum()) for length in lengths)
    for name, count in got.items():
        assert count * 4 * 64 == full[name] * visible, name


def test_features_that_hide_nothing_visit_everything(work: Any) -> None:
    assert work(softcap=3.0, dropout_p=0.2, dropout_seed=1) == work()
