"""Predicted speed of the wgmma forward kernel beside FlashAttention-3's best published: prints the tables of docs/performance.md, and with --publish writes them there.

    python benchmarks/predicted_hopper.py [--publish]
    python benchmarks/predicted_hopper.py --tiles            # other tiles, steady states at 16384; half an hour

bfloat16, 16384 tokens, 2048 features, H100 SXM. `in turn`: as if the tensor unit served warpgroups in turn, which is not what was measured on one. FlashAttention-3's figures are
those of its paper at 16384 (Shah et al. 2024, arXiv 2407.08608). In brackets, speeds times what kernels of this design reached of their prediction on an H100
(`errors`), both in runs of `STEADY_TRIPS`. Features: time of the steady state with the feature over that without, in settled runs, served in order of issue / in turn. Takes about ten
minutes, and needs no GPU.
"""

from __future__ import annotations

import functools
import itertools
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import predicted_hopper_experiments
from cuflash.cli.sample_features import SampleFeatures
from cuflash.cli.samples import Sample, plan_of
from cuflash.errors import CuflashError
from cuflash.hardware import device
from cuflash.planning import planner, tile_choice, wgmma_forward
from cuflash.planning.kernel_plan import KernelPlan
from cuflash.planning.plan import Plan
from cuflash.problem.tile import Tiles
from cuflash.timing import prediction
from cuflash.timing.machine import CARDS
from cuflash.timing.multiprocessor import STEADY_TRIPS, WARMING
from cuflash.timing.prediction import KernelPrediction
from marked_pages import predict_or_publish

CARD = CARDS["sm_90"]
SEQLENS = (2048, 4096, 8192, 16384)
FLASH_ATTENTION_3 = {(64, False): 497, (128, False): 648, (256, False): 756, (64, True): 473, (128, True): 616, (256, True): 642}
"""TFLOP/s at seqlen 16384 by head dimension and mask."""
GOALS = {(64, False): 522, (128, False): 694, (256, False): 756, (64, True): 497, (128, True): 693, (256, True): 706}
"""What the kernel is meant to reach: about 1.05 to 1.1 of FlashAttention-3's published figures."""
EXPERIMENTS = {64: "F_d64_g3_n128_s2_t0_p0", 128: "F_d128_g3_n80_s2_t0_p0", 256: "F_d256_g2_n80_s2_t0_p0"}
"""Kernels of this design that ran on an H100, without a token and with the tiles that are defaults where nothing is masked."""
FEATURES = {
    "window": (SampleFeatures(window=(512, 512)), False, 1.15),
    "alibi": (SampleFeatures(alibi=True), False, 1.15),
    "sinks": (SampleFeatures(sinks=True), False, 1.15),
    "boolean mask": (SampleFeatures(attn_mask="bool"), True, 1.15),
    "bfloat16 mask": (SampleFeatures(attn_mask="bfloat16"), False, 1.15),
    "segments": (SampleFeatures(segments=2), True, 1.15),
    "softcap": (SampleFeatures(softcap=30.0), False, 1.3),
    "dropout": (SampleFeatures(dropout=0.1), False, 1.3),
}
"""Options, whether each tile is looked at pair by pair, and how much dearer a call may be."""


def plan(head_dim: int, causal: bool, seqlen: int, features: SampleFeatures | None = None, tile: Tiles = None) -> Plan:
    """Of a call, on the wgmma kernel if it can run."""
    os.environ[wgmma_forward.VARIABLE] = "1"
    heads = 2048 // head_dim
    sample = Sample(16384 // seqlen, seqlen, seqlen, heads, heads, head_dim, dtype="bfloat16", is_causal=causal)
    problem = plan_of(sample if features is None else replace(sample, features=features)).problem
    return planner.make_plan(problem, device.of_arch("sm_90", "gpu"), backward=False, tile=tile)


def kernel_of(of: Plan) -> KernelPlan:
    """The one that walks over tiles."""
    return next(kernel for kernel in of.kernels if kernel.spec.is_tiled)


def steady(of: Plan, *, causal: bool, in_turn: bool = False) -> tuple[KernelPrediction, KernelPrediction]:
    """Steady states of whole and of masked tiles."""
    described, function = prediction.compiled(kernel_of(of), of.device, causal=causal)
    predict = functools.partial(prediction.predict_kernel, function, described, limits=False, in_turn=in_turn, trips=STEADY_TRIPS)
    return predict(), predict(masked=True, staying=False)


def speeds(head_dim: int, causal: bool, *, in_turn: bool = False, tile: Tiles = None, seqlens: Sequence[int] = SEQLENS) -> list[float]:
    """TFLOP/s at each length."""
    whole, masked = steady(plan(head_dim, causal, seqlens[0], tile=tile), causal=causal, in_turn=in_turn)
    found = []
    for seqlen in seqlens:
        of = plan(head_dim, causal, seqlen, tile=tile)
        launch = prediction.lay_out(whole, kernel_of(of), of.problem, CARD, masked=masked)
        found.append(of.problem.flops_forward / launch.milliseconds / 1e9)
    return found


def after_errors(head_dim: int, causal: bool, found: Sequence[float]) -> list[float]:
    """Predicted speeds times what kernels of this design reached of theirs on an H100, at each of `SEQLENS`; where they were faster, that is no promise."""
    reached = errors(head_dim, causal)
    return [speed * min(1.0, reached[seqlen]) for seqlen, speed in zip(SEQLENS, found, strict=True)]


@functools.cache
def errors(head_dim: int, causal: bool) -> dict[int, float]:
    """Measured over predicted speed of such a kernel at each seqlen, of two orders of tiles the one that was faster there."""
    base = f"{EXPERIMENTS[head_dim]}_c{int(causal)}"
    fastest = sorted(predicted_hopper_experiments.rows((base, f"{base}_snake"), STEADY_TRIPS), key=lambda row: row.measured)
    return {row.seqlen: row.ratio for row in fastest}


def speed_lines() -> Iterator[str]:
    """The table of speeds."""
    yield f"| head_dim | causal | service | {' | '.join(map(str, SEQLENS))} | FlashAttention-3 | goal | would be met at, by the prediction | and by the number in brackets |"
    yield "| --- " * (7 + len(SEQLENS)) + "|"
    for (head_dim, causal), peer in FLASH_ATTENTION_3.items():
        goal = GOALS[head_dim, causal]
        for in_turn in (False, True):
            found = speeds(head_dim, causal, in_turn=in_turn)
            real = after_errors(head_dim, causal, found)
            cells = " | ".join(f"{predicted:.0f} ({measured:.0f})" for predicted, measured in zip(found, real, strict=True))
            yield (
                f"| {head_dim} | {'yes' if causal else 'no'} | {'in turn' if in_turn else 'in order of issue'} | {cells} | "
                f"{peer} | {goal} | {_lengths_that_reach(goal, found)} | {_lengths_that_reach(goal, real)} |"
            )


def _lengths_that_reach(goal: float, found: Sequence[float]) -> str:
    return ", ".join(str(seqlen) for seqlen, speed in zip(SEQLENS, found, strict=True) if speed >= goal) or "–"


def feature_lines(head_dims: Sequence[int] = (64, 128)) -> Iterator[str]:
    """The table of features, in order of issue / in turn; bold where a cost is above the goal."""
    yield f"| feature | goal | {' | '.join(f'head_dim {head_dim}' for head_dim in head_dims)} |"
    yield "| --- " * (2 + len(head_dims)) + "|"
    plain = {(head_dim, in_turn): clocks_per_pair(head_dim, None, False, in_turn) for head_dim in head_dims for in_turn in (False, True)}
    for name, (features, pairwise, goal) in FEATURES.items():
        cells = []
        for head_dim in head_dims:
            try:
                costs = [clocks_per_pair(head_dim, features, pairwise, in_turn) / plain[head_dim, in_turn] for in_turn in (False, True)]
            except CuflashError:  # it is not modelled
                cells.append("–")
                continue
            cells.append(" / ".join(f"**{cost:.2f}**" if cost > goal + 0.005 else f"{cost:.2f}" for cost in costs))
        yield f"| {name} | {goal:g} | {' | '.join(cells)} |"


def clocks_per_pair(head_dim: int, features: SampleFeatures | None, pairwise: bool, in_turn: bool) -> float:
    """Clocks of an SM for a pair of query and key in the steady state; where the wgmma kernel cannot run, of the one that does."""
    of = plan(head_dim, False, 4096, features)
    described, function = prediction.compiled(kernel_of(of), of.device, causal=False)
    found = prediction.predict_kernel(
        function, described, limits=False, masked=pairwise, in_turn=in_turn, staying=False, trips=STEADY_TRIPS, warming=WARMING
    )
    tile = kernel_of(of).tile
    return found.clocks / found.blocks / (tile.tile_q * tile.tile_kv)


def tile_lines() -> Iterator[str]:
    """Other tiles, in order of issue / in turn."""
    yield "| head_dim | causal | tile | matrix share | TFLOP/s at 2048 | at 16384 |"
    yield "| --- " * 6 + "|"
    for head_dim in (64, 128, 192, 256):
        for causal in (False, True):
            first = kernel_of(plan(head_dim, causal, 4096))
            for tile in tile_choice.legal_tiles_for(first.case, device.of_arch("sm_90", "gpu"))[:8]:
                tiles = {"forward_wgmma": tile}
                found = [speeds(head_dim, causal, in_turn=in_turn, tile=tiles, seqlens=(2048, 16384)) for in_turn in (False, True)]
                shares = [
                    steady(plan(head_dim, causal, 4096, tile=tiles), causal=causal, in_turn=in_turn)[0].matrix_share
                    for in_turn in (False, True)
                ]
                cells = (
                    " / ".join(f"{share:.2f}" for share in shares),
                    *(f"{issue:.0f} / {turn:.0f}" for issue, turn in zip(*found, strict=True)),
                )
                shape = f"{tile.tile_q}x{tile.tile_kv} s{tile.num_stages}"
                yield f"| {head_dim} | {'yes' if causal else 'no'} | {shape} | {' | '.join(cells)} |"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print or publish the tables."""
    return predict_or_publish(
        arguments,
        Path(__file__).name,
        "the wgmma forward kernel",
        lambda: itertools.chain(speed_lines(), ("",), feature_lines()),
        tile_lines,
    )


if __name__ == "__main__":
    sys.exit(main())
