"""What the order of blocks and waves lose, predicted: prints the table of docs/performance.md.

    python benchmarks/predicted_grids.py                    # all cards of the model
    python benchmarks/predicted_grids.py --arch sm_86 --worst 8
    python benchmarks/predicted_grids.py --publish

The calls are those of `benchmarks/bench/cases.py`: 16384 tokens, heads times head_dim = 2048, bfloat16. Each kernel is compiled once and its steady state
predicted, in a long run (docs/timing.md); then its grid is laid out for each length. A cell says which part of the pass's time its SMs would not need if all
of them were busy to the end. Begin and end of a block count as work. Beyond 8 %, seqlen 512 apart, it is bold. Needs no GPU.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from cuflash.cli import samples
from cuflash.hardware import device
from cuflash.planning import planner
from cuflash.planning.kernel_plan import KernelPlan
from cuflash.planning.plan import Plan
from cuflash.timing import prediction
from cuflash.timing.machine import CARDS
from cuflash.timing.multiprocessor import STEADY_TRIPS, WARMING
from cuflash.timing.prediction import KernelPrediction
from kernels_of_mma import rule_out_wgmma
from marked_pages import print_prediction

TOKENS, HIDDEN = 16384, 2048
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
HEAD_DIMS = (64, 128, 256)
ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_120")
GOAL = 8.0
"""Percent that order and waves may lose beyond the shortest length."""


@dataclass(frozen=True)
class Cell:
    """One pass of one call on one card: its predicted time, and the part of it that order and waves lose."""

    arch: str
    backward: bool
    head_dim: int
    causal: bool
    seqlen: int
    milliseconds: float
    loss: float


class Steady:
    """Steady states of kernels, each compiled and predicted once."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, str, str], KernelPrediction] = {}

    def of(self, kernel: KernelPlan, plan: Plan) -> KernelPrediction:
        """The steady state of a planned kernel."""
        key = (plan.device.arch, kernel.source, kernel.config)
        if key not in self._known:
            described, function = prediction.compiled(kernel, plan.device, causal=plan.problem.is_causal)
            self._known[key] = prediction.predict_kernel(function, described, limits=False, trips=STEADY_TRIPS, warming=WARMING)
        return self._known[key]


def plan_of(arch: str, *, backward: bool, head_dim: int, causal: bool, seqlen: int) -> Plan:
    """The plan of a call of the protocol on a GPU."""
    heads = HIDDEN // head_dim
    sample = samples.Sample(
        batch=TOKENS // seqlen, seqlen_q=seqlen, seqlen_kv=seqlen, num_heads_q=heads, num_heads_kv=heads, head_dim=head_dim, dtype="bfloat16",
        is_causal=causal,
    )  # fmt: skip
    problem = samples.plan_of(sample, backward=backward).problem
    return planner.make_plan(problem, device.of_arch(arch, "gpu"), backward=backward)


def predict(plan: Plan, steady: Steady) -> Cell:
    """The time of a call and what its grids lose."""
    card, problem = CARDS[plan.device.arch], plan.problem
    milliseconds = lost = 0.0
    for kernel in plan.kernels:
        if not kernel.spec.is_tiled:
            milliseconds += prediction.predict_traffic(kernel, problem, card).milliseconds
            continue
        launch = prediction.lay_out(steady.of(kernel, plan), kernel, problem, card)
        milliseconds += launch.milliseconds
        lost += launch.milliseconds * (1 - launch.evenness)
    return Cell(plan.device.arch, plan.backward, problem.head_dim, problem.is_causal, problem.seqlen_q, milliseconds, lost / milliseconds)


def cells(arch: str, steady: Steady) -> Iterable[Cell]:
    """All cells of a card, row by row."""
    for backward in (False, True):
        for head_dim in HEAD_DIMS:
            for causal in (False, True):
                for seqlen in LENGTHS:
                    yield predict(plan_of(arch, backward=backward, head_dim=head_dim, causal=causal, seqlen=seqlen), steady)


def lines(found: Iterable[Cell]) -> Iterator[str]:
    """One row for each card, pass, head dimension and mask; one column for each length."""
    yield f"| card | pass | head_dim | causal | {' | '.join(map(str, LENGTHS))} |"
    yield "| --- " * (4 + len(LENGTHS)) + "|"
    for (arch, backward, head_dim, causal), row in groupby(found, lambda cell: (cell.arch, cell.backward, cell.head_dim, cell.causal)):
        what = f"{CARDS[arch].name} | {'backward' if backward else 'forward'} | {head_dim} | {'yes' if causal else 'no'}"
        yield f"| {what} | {' | '.join(map(_shown, row))} |"


def _shown(cell: Cell) -> str:
    percent = f"{max(0.0, 100 * cell.loss):.1f}"
    return f"{f'**{percent}**' if loses_more(cell, GOAL) else percent} %, {cell.milliseconds:.2f} ms"


def loses_more(cell: Cell, percent: float) -> bool:
    """Whether a cell beyond the shortest length loses more than it may."""
    return cell.seqlen > LENGTHS[0] and 100 * cell.loss > percent


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; 1 if a cell beyond seqlen 512 loses more than `--worst` percent."""
    parser = argparse.ArgumentParser(description="What the order of blocks and waves lose, predicted.")
    parser.add_argument("--arch", action="append", choices=sorted(CARDS), help=f"may be repeated (default {' '.join(ARCHITECTURES)})")
    parser.add_argument("--worst", type=float, default=100.0, metavar="PERCENT", help="fail if a cell beyond seqlen 512 loses more")
    parser.add_argument("--publish", action="store_true", help="write the whole table to docs/performance.md")
    options = parser.parse_args(arguments)
    if options.publish and options.arch:
        parser.error("--publish writes the whole table: leave out --arch")
    rule_out_wgmma()
    steady, found = Steady(), list[Cell]()

    def kept() -> Iterator[Cell]:
        for arch in options.arch or ARCHITECTURES:
            for cell in cells(arch, steady):
                found.append(cell)
                yield cell

    print_prediction(Path(__file__).name, lines(kept()), publish=options.publish)
    beyond = [cell for cell in found if loses_more(cell, options.worst)]
    for cell in beyond:
        print(f"predicted_grids.py: {cell} loses more than {options.worst:g} %", file=sys.stderr)
    return 1 if beyond else 0


if __name__ == "__main__":
    sys.exit(main())
