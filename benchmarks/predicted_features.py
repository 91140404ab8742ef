"""What each score feature costs in time, predicted: prints the table of docs/performance.md, and with --publish writes it there.

    python benchmarks/predicted_features.py                     # A100, H100; head_dim 64, 128
    python benchmarks/predicted_features.py --feature dropout --feature softcap --arch sm_80 --kernels
    python benchmarks/predicted_features.py --publish

A cell is the time of a steady state relative to that without any feature, forward / backward: clocks of an SM for each pair of query and key, of all kernels of the pass
that walk over tiles. float16, default tiles, no causal mask. Where data hide pairs, a row is for tiles without hidden pairs and one for tiles with some. Needs no GPU.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cuflash.cli import samples
from cuflash.cli.samples import Sample, SampleFeatures
from cuflash.hardware import device
from cuflash.planning import kernel_specs, planner
from cuflash.timing import prediction
from cuflash.timing.machine import CARDS
from cuflash.timing.prediction import KernelPrediction
from kernels_of_mma import rule_out_wgmma
from marked_pages import print_prediction

ARCHITECTURES = ("sm_80", "sm_90")
HEAD_DIMS = (64, 128)
CHEAP, DEAR = 1.15, 1.25


@dataclass(frozen=True)
class Row:
    """A feature, and how long a call with it may take.

    Attributes:
        name: for people, and without what follows a comma for `--feature`.
        sample: a call with it.
        goal: times the call without; None where nothing was set.
        masked: in tiles in which data hide some pair.
    """

    name: str
    sample: Sample
    goal: float | None
    masked: bool = False


def _row(name: str, goal: float, features: SampleFeatures, *, masked: bool = False) -> Row:
    return Row(name, replace(PLAIN, features=features), goal, masked)


PLAIN = Sample(batch=1, seqlen_q=1024, seqlen_kv=1024, dtype="float16")
ROWS = (
    _row("window", CHEAP, SampleFeatures(window=(512, 512))),
    _row("alibi", CHEAP, SampleFeatures(alibi=True)),
    _row("sinks", CHEAP, SampleFeatures(sinks=True)),
    _row("boolean mask", CHEAP, SampleFeatures(attn_mask="bool")),
    _row("boolean mask, some hidden", CHEAP, SampleFeatures(attn_mask="bool"), masked=True),
    _row("float16 mask", CHEAP, SampleFeatures(attn_mask="float16")),
    _row("float32 mask", CHEAP, SampleFeatures(attn_mask="float32")),
    _row("segments", CHEAP, SampleFeatures(segments=2)),
    _row("segments, some hidden", CHEAP, SampleFeatures(segments=2), masked=True),
    _row("softcap", DEAR, SampleFeatures(softcap=30.0)),
    _row("dropout", DEAR, SampleFeatures(dropout=0.1)),
    Row("packed sequences", replace(PLAIN, lengths_q=(1024,)), None),
    Row("seqlens_kv", replace(PLAIN, lengths_kv=(1024,)), None),
)


def kernels(arch: str, head_dim: int, sample: Sample, *, backward: bool, masked: bool) -> Iterator[KernelPrediction]:
    """The steady states of the kernels of a pass that walk over all tiles."""
    problem = samples.plan_of(replace(sample, head_dim=head_dim), backward=backward).problem
    plan = planner.make_plan(problem, device.of_arch(arch, "gpu"), backward=backward)
    for kernel in plan.kernels:
        if kernel.spec.is_tiled and kernel.spec != kernel_specs.BACKWARD_ROW_SUMS:
            described, function = prediction.compiled(kernel, plan.device, causal=False)
            yield prediction.predict_kernel(function, described, limits=False, masked=masked)


def clocks_per_pair(found: Sequence[KernelPrediction]) -> float:
    """Clocks of an SM for one pair of query and key."""
    return sum(of.clocks / of.blocks / (of.description.tile.tile_q * of.description.tile.tile_kv) for of in found)


class Table:
    """Cells, each found once."""

    def __init__(self, show_kernels: bool) -> None:
        self.show_kernels = show_kernels
        self._plain: dict[tuple[str, int, bool], float] = {}

    def cell(self, arch: str, head_dim: int, row: Row, *, backward: bool) -> float:
        """The time with the feature over that without."""
        key = (arch, head_dim, backward)
        if key not in self._plain:
            self._plain[key] = self._clocks(arch, head_dim, "none", PLAIN, backward, False)
        return self._clocks(arch, head_dim, row.name, row.sample, backward, row.masked) / self._plain[key]

    def _clocks(self, arch: str, head_dim: int, name: str, sample: Sample, backward: bool, masked: bool) -> float:
        found = list(kernels(arch, head_dim, sample, backward=backward, masked=masked))
        for of in found if self.show_kernels else ():
            tile, per_pair = of.description.tile, clocks_per_pair([of])
            line = f"{name}: {arch} {of.description.kernel} {head_dim} {tile.tile_q}x{tile.tile_kv} w{tile.num_warps} s{tile.num_stages} x{of.blocks}"
            print(
                f"{line}: {per_pair:.3f} clocks per pair, {of.description.registers} registers, {of.description.spill_bytes} bytes spilled, "
                f"{of.instructions / of.matrix:.2f} instructions per product, busiest {max(of.busy, key=lambda b: of.busy[b])}",
                file=sys.stderr,
                flush=True,
            )
        return clocks_per_pair(found)

    def lines(self, archs: Sequence[str], head_dims: Sequence[int], rows: Sequence[Row]) -> Iterator[str]:
        """The table in Markdown; what is above its goal by more than the model can tell stands in bold."""
        columns = [(arch, head_dim) for arch in archs for head_dim in head_dims]
        yield f"| feature | goal | {' | '.join(f'{CARDS[arch].name}, head_dim {head_dim}' for arch, head_dim in columns)} |"
        yield "| --- " * (2 + len(columns)) + "|"
        for row in rows:
            shown = []
            for arch, head_dim in columns:
                both = (self.cell(arch, head_dim, row, backward=backward) for backward in (False, True))
                shown.append(
                    " / ".join(f"**{cost:.2f}**" if row.goal is not None and cost > row.goal + 0.005 else f"{cost:.2f}" for cost in both)
                )
            yield f"| {row.name} | {'–' if row.goal is None else f'{row.goal:g}'} | {' | '.join(shown)} |"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print or publish the table."""
    names = list(dict.fromkeys(row.name.split(",")[0] for row in ROWS))
    parser = argparse.ArgumentParser(description="What each score feature costs in time, predicted.")
    parser.add_argument("--arch", action="append", choices=sorted(CARDS), help=f"may be repeated (default {' '.join(ARCHITECTURES)})")
    parser.add_argument("--head-dim", action="append", type=int, help=f"may be repeated (default {' '.join(map(str, HEAD_DIMS))})")
    parser.add_argument("--feature", action="append", choices=names, help="may be repeated (default all)")
    parser.add_argument("--kernels", action="store_true", help="also print each kernel")
    parser.add_argument("--publish", action="store_true", help="write the whole table to docs/performance.md")
    options = parser.parse_args(arguments)
    rule_out_wgmma()
    if options.publish and (options.arch or options.head_dim or options.feature):
        parser.error("--publish writes the whole table: leave out --arch, --head-dim and --feature")
    rows = [row for row in ROWS if row.name.split(",")[0] in (options.feature or names)]
    table = Table(options.kernels).lines(options.arch or ARCHITECTURES, options.head_dim or HEAD_DIMS, rows)
    print_prediction(Path(__file__).name, table, publish=options.publish)
    return 0


if __name__ == "__main__":
    sys.exit(main())
