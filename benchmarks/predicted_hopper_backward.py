"""Predicted speed of the wgmma backward kernel beside FlashAttention-3's published figures: prints the tables of docs/performance.md, and with --publish writes them there.

    python benchmarks/predicted_hopper_backward.py [--publish]
    python benchmarks/predicted_hopper_backward.py --tiles            # other tiles

bfloat16, 16384 tokens, 2048 features, H100 SXM. "in turn": the share if the tensor unit served warpgroups in turn. FlashAttention-3's figures are those of its paper (Shah et al. 2024, arXiv 2407.08608), the causal ones
those of flash-attention's pull request 1893.
The bias is measured over predicted speed of the backward kernels that were tried on an H100 (predicted_hopper_experiments.py), without and with a causal mask, at each length.
Steady states are of long runs: in the few trips that the model takes by itself it is chance how the warpgroups stand to each other, which changes them by up to 6 %.

Features: time of the steady state with the feature over that without; of a boolean mask and of segments, in tiles without and with a hidden pair.

Calls of few heads: microseconds of whole calls without splits of the queries and as they are planned, at the clock of the model and before any bias. Needs no GPU.
"""

from __future__ import annotations

import functools
import itertools
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import predicted_hopper_experiments
from cuflash.cli.samples import Sample, plan_of
from cuflash.hardware import device
from cuflash.jit.compiler import CompileRequest
from cuflash.planning import planner, query_splits, tile_choice, wgmma_backward
from cuflash.planning.kernel_plan import UNSPLIT, KernelPlan
from cuflash.planning.plan import Plan
from cuflash.problem.tile import Tiles
from cuflash.timing import prediction
from cuflash.timing.machine import CARDS
from cuflash.timing.multiprocessor import STEADY_TRIPS
from cuflash.timing.prediction import KernelPrediction, Launch
from marked_pages import predict_or_publish
from predicted_hopper import FEATURES

CARD = CARDS["sm_90"]
SEQLENS = (2048, 4096, 8192, 16384)
HEAD_DIMS = (64, 128)
PUBLISHED = {(64, False, 16384): 474, (128, False, 16384): 561, (128, True, 8192): 575}
"""TFLOP/s of FlashAttention-3's backward pass by head dimension, mask and seqlen."""
GOAL = 1.05
"""Of what is published, that the kernel is meant to reach after the bias."""
LENGTHS: dict[str, dict[str, tuple[int, ...]]] = {
    "packed sequences": {"lengths_q": (4096,) * 4},
    "`seqlens_kv`": {"lengths_kv": (4096,) * 4},
}
"""Lengths that only the device knows, of sequences as long as those of the other lines."""
FEW_HEAD_DIMS = (64, 128, 256)
FEW = ((1, 1024), (1, 4096), (1, 16384), (4, 4096))
"""Heads and seqlen of calls that have few tiles of keys."""
DETERMINISTIC = {(128, True, 8192): 474}
"""The same with dQ in a fixed order, which this kernel always has; flash-attention's pull request 1893, as the 575 is."""


@functools.cache
def bias() -> dict[tuple[bool, int], float]:
    """Measured over predicted speed of kernels of this design, by mask and seqlen."""
    return {
        (row.design.causal, row.seqlen): row.ratio
        for row in predicted_hopper_experiments.rows(("B_c0_base", "B_c1_base"), STEADY_TRIPS)
        if row.seqlen in SEQLENS
    }


def plan(head_dim: int, causal: bool, seqlen: int, tile: Tiles = None, **more: Any) -> Plan:
    """Of a call, on the wgmma kernel; `more` are fields of its `Sample`."""
    os.environ[wgmma_backward.VARIABLE] = "1"
    heads = 2048 // head_dim
    sample = Sample(16384 // seqlen, seqlen, seqlen, heads, heads, head_dim, dtype="bfloat16", is_causal=causal)
    problem = plan_of(replace(sample, **more)).problem
    return planner.make_plan(problem, device.of_arch("sm_90", "gpu"), backward=True, tile=tile)


def kernel_of(of: Plan) -> KernelPlan:
    """The one that walks over tiles."""
    return next(kernel for kernel in of.kernels if kernel.name == wgmma_backward.BACKWARD_WGMMA.name)


def launches(head_dim: int, causal: bool, tile: Tiles = None, seqlens: Sequence[int] = SEQLENS) -> Iterator[tuple[Plan, list[Launch]]]:
    """The kernels of a call of each length; the steady states are the same, and run once."""
    first = plan(head_dim, causal, seqlens[0], tile)
    described, function = prediction.compiled(kernel_of(first), first.device, causal=causal)
    whole = prediction.predict_kernel(function, described, trips=STEADY_TRIPS)
    masked = prediction.predict_kernel(function, described, limits=False, masked=True, trips=STEADY_TRIPS)
    for seqlen in seqlens:
        of = plan(head_dim, causal, seqlen, tile)
        yield (
            of,
            [
                prediction.lay_out(whole, kernel, of.problem, CARD, masked=masked)
                if kernel == kernel_of(of)
                else prediction.predict_traffic(kernel, of.problem, CARD)
                for kernel in of.kernels
            ],
        )


def steady(of: Plan, *, in_turn: bool = False) -> KernelPrediction:
    """The steady state of tiles without a mask; `in_turn`: as if the tensor unit served warpgroups in turn."""
    described, function = prediction.compiled(kernel_of(of), of.device, causal=of.problem.is_causal)
    return prediction.predict_kernel(function, described, limits=False, in_turn=in_turn, trips=STEADY_TRIPS)


def speed(of: Plan, found: Sequence[Launch]) -> float:
    """TFLOP/s of a call."""
    return of.problem.flops_backward / sum(launch.milliseconds for launch in found) / 1e9


def speed_lines() -> Iterator[str]:
    """The table of speeds."""
    yield "| head_dim | causal | seqlen | matrix share | in turn | binds | kernel alone | whole call | bias | after the bias | FlashAttention-3 | ratio | in a fixed order | ratio |"
    yield "| --- " * 14 + "|"
    for head_dim, causal in itertools.product(HEAD_DIMS, (False, True)):
        in_turn = steady(plan(head_dim, causal, SEQLENS[0]), in_turn=True).matrix_share
        for (of, found), seqlen in zip(launches(head_dim, causal), SEQLENS, strict=True):
            main = next(launch for launch in found if launch.kernel is not None)
            assert main.kernel is not None
            key = (head_dim, causal, seqlen)
            published, deterministic = PUBLISHED.get(key), DETERMINISTIC.get(key)
            wrong = bias()[causal, seqlen]
            expected = wrong * speed(of, found)
            yield (
                f"| {head_dim} | {'yes' if causal else 'no'} | {seqlen} | {main.kernel.matrix_share:.2f} | {in_turn:.2f} | {main.kernel.binds} | {speed(of, [main]):.0f} | {speed(of, found):.0f} | "
                f"{wrong:.2f} | {expected:.0f} | {published or '–'} | {_ratio(expected, published)} | {deterministic or '–'} | {_ratio(expected, deterministic)} |"
            )


def _ratio(expected: float, published: int | None) -> str:
    """Bold where it misses the goal."""
    if published is None:
        return "–"
    ratio = expected / published
    return f"{ratio:.2f}" if ratio >= GOAL else f"**{ratio:.2f}**"


def feature_lines() -> Iterator[str]:
    """The table of features; bold where a cost is above the goal."""
    yield f"| feature | goal | {' | '.join(f'head_dim {head_dim}' for head_dim in HEAD_DIMS)} |"
    yield "| --- " * (2 + len(HEAD_DIMS)) + "|"
    plain = {head_dim: clocks_per_pair(head_dim, masked=False) for head_dim in HEAD_DIMS}
    of_features = {name: ({"features": features}, hides_pairs, goal) for name, (features, hides_pairs, goal) in FEATURES.items()}
    of_lengths = {name: (lengths, False, FEATURES["window"][2]) for name, lengths in LENGTHS.items()}
    for name, (more, hides_pairs, goal) in {**of_features, **of_lengths}.items():
        cells = []
        for head_dim in HEAD_DIMS:
            costs = [clocks_per_pair(head_dim, masked=masked, **more) / plain[head_dim] for masked in (False, True)[: 1 + hides_pairs]]
            cells.append(" / ".join(f"**{cost:.2f}**" if cost > goal + 0.005 else f"{cost:.2f}" for cost in costs))
        yield f"| {name} | {goal:g} | {' | '.join(cells)} |"


def clocks_per_pair(head_dim: int, *, masked: bool, **more: Any) -> float:
    """Clocks of an SM for a pair of query and key in the steady state; `masked`: in tiles in which data hide some pair."""
    of = plan(head_dim, False, 4096, **more)
    described, function = prediction.compiled(kernel_of(of), of.device, causal=False)
    found, tile = prediction.predict_kernel(function, described, limits=False, masked=masked, trips=STEADY_TRIPS), kernel_of(of).tile
    return found.clocks / found.blocks / (tile.tile_q * tile.tile_kv)


def few_lines() -> Iterator[str]:
    """The table of calls with few heads."""
    yield "| head_dim | causal | heads | seqlen | unsplit | as planned | ratio | splits, chains | workspace, MiB |"
    yield "| --- " * 9 + "|"
    for head_dim, causal, (heads, seqlen) in itertools.product(FEW_HEAD_DIMS, (False, True), FEW):
        call = {"batch": 1, "num_heads_q": heads, "num_heads_kv": heads}
        with unsplit():
            times = [microseconds(plan(head_dim, causal, seqlen, **call))]
        planned = plan(head_dim, causal, seqlen, **call)
        times.append(microseconds(planned))
        main = next(kernel for kernel in planned.kernels if kernel.spec.added_up)
        nbytes = sum(buffer.nbytes for buffer in planned.workspace)
        yield (
            f"| {head_dim} | {'yes' if causal else 'no'} | {heads} | {seqlen} | {times[0]:.0f} | {times[1]:.0f} | {times[1] / times[0]:.2f} | "
            f"{main.splits.number}, {max(1, main.splits.chains)} | {nbytes / 2**20:.0f} |"
        )


@contextmanager
def unsplit() -> Iterator[None]:
    """Plans within are of blocks that share out no queries."""
    choose, query_splits.choose = query_splits.choose, lambda *_: UNSPLIT
    try:
        yield
    finally:
        query_splits.choose = choose


def microseconds(of: Plan) -> float:
    """Of a call; the steady state of a kernel is found once for all lengths."""
    launched = []
    for kernel in of.kernels:
        if kernel.spec.is_tiled:
            whole, masked = _steady_of(kernel.request(of.device), kernel, of)
            launched.append(prediction.lay_out(whole, kernel, of.problem, CARD, masked=masked))
        else:
            launched.append(prediction.predict_without_tiles(kernel, of, CARD))
    return 1e3 * sum(launch.milliseconds for launch in launched)


_STEADY: dict[CompileRequest, tuple[KernelPrediction, KernelPrediction]] = {}


def _steady_of(request: CompileRequest, kernel: KernelPlan, of: Plan) -> tuple[KernelPrediction, KernelPrediction]:
    if request not in _STEADY:
        described, function = prediction.compiled(kernel, of.device, causal=of.problem.is_causal)
        whole, masked = (prediction.predict_kernel(function, described, limits=False, masked=masked) for masked in (False, True))
        _STEADY[request] = whole, masked
    return _STEADY[request]


def tile_lines() -> Iterator[str]:
    """Other tiles."""
    yield "| head_dim | causal | tile | matrix share | TFLOP/s at 2048 | at 16384 |"
    yield "| --- " * 6 + "|"
    for head_dim, causal in itertools.product(HEAD_DIMS, (False, True)):
        first = kernel_of(plan(head_dim, causal, 4096))
        for tile in tile_choice.legal_tiles_for(first.case, device.of_arch("sm_90", "gpu"))[:8]:
            found = list(launches(head_dim, causal, {first.name: tile}, (2048, 16384)))
            share = next(launch.kernel.matrix_share for launch in found[0][1] if launch.kernel is not None)
            speeds = " | ".join(f"{speed(*of):.0f}" for of in found)
            yield f"| {head_dim} | {'yes' if causal else 'no'} | {tile.tile_q}x{tile.tile_kv} s{tile.num_stages} | {share:.2f} | {speeds} |"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print or publish the tables."""
    return predict_or_publish(
        arguments,
        Path(__file__).name,
        "the wgmma backward kernel",
        lambda: itertools.chain(speed_lines(), ("",), feature_lines(), ("",), few_lines()),
        tile_lines,
    )


if __name__ == "__main__":
    sys.exit(main())
