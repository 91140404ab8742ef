"""Predicted beside measured times: prints the tables of docs/timing.md.

    python benchmarks/predicted.py --kernels DIR            # tiles.csv: one kernel with many tiles
    python benchmarks/predicted.py --kernels DIR --calls    # attention.csv: whole calls with default tiles

DIR holds the kernels that were timed, as `python -m cuflash inspect --save DIR` writes them: NAME.cubin and NAME.json, and if there is a NAME.sass, that is
read in the place of what nvdisasm prints. A kernel that is not there is left out, or compiled as it is now with `--compile`.

The times in tiles.csv of a backward kernel are those of a whole backward pass in which that kernel had another tile. So is what is predicted.
"""

from __future__ import annotations

import argparse
import csv
import math
import os
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cuflash.cli import samples
from cuflash.hardware import device
from cuflash.planning import fused_backward, planner
from cuflash.planning.kernel_plan import KernelPlan
from cuflash.planning.plan import Plan
from cuflash.problem.tile import Tile, Tiles
from cuflash.timing import description, prediction, sass
from cuflash.timing.machine import CARDS
from cuflash.timing.prediction import KernelPrediction
from kernels_of_mma import rule_out_wgmma

RESULTS = Path(__file__).resolve().parent / "results" / "nvidia-h100-80gb-hbm3"
ARCH = "sm_90"


@dataclass(frozen=True)
class Timed:
    """One row of a CSV file with what was predicted for it."""

    kernel: str
    head_dim: int
    causal: bool
    seqlen: int
    tile: Tile | None
    measured: float
    predicted: float
    share: float
    binds: str

    @property
    def ratio(self) -> float:
        """Measured over predicted: above 1 where the model is too fast."""
        return self.measured / self.predicted


class Kernels:
    """Steady states of the kernels of a folder, each predicted once."""

    def __init__(self, folder: Path, compile_missing: bool) -> None:
        self.folder, self.compile_missing = folder, compile_missing
        self.known: dict[str, KernelPrediction | None] = {}

    def predict(self, kernel: KernelPlan, plan: Plan) -> KernelPrediction | None:
        """The steady state of a planned kernel; None where it was not kept."""
        named = description.Description(
            kernel.name,
            ARCH,
            kernel.dtype,
            kernel.head_dim,
            kernel.head_dim_v or kernel.head_dim,
            plan.problem.is_causal,
            kernel.tile,
            0,
            0,
            0,
        ).name
        if named not in self.known:
            self.known[named] = self._predict(named, kernel, plan)
        return self.known[named]

    def _predict(self, name: str, kernel: KernelPlan, plan: Plan) -> KernelPrediction | None:
        path = self.folder / f"{name}.cubin"
        if path.exists():
            described, cubin = description.load(path)
            listing = path.with_suffix(".sass")
            functions = sass.parse_listing(listing.read_text()) if listing.exists() else sass.read_functions(cubin)
            return prediction.predict_kernel(max(functions.values(), key=len), described, limits=False)
        if not self.compile_missing:
            return None
        described, function = prediction.compiled(kernel, plan.device, causal=plan.problem.is_causal)
        return prediction.predict_kernel(function, described, limits=False)


def predicted_milliseconds(plan: Plan, kernels: Kernels, of: str) -> tuple[float, KernelPrediction] | None:
    """The time of a plan and the steady state of the kernel `of`; None where one of its kernels was not kept."""
    total, asked = 0.0, None
    for kernel in plan.kernels:
        if kernel.name in ("backward_delta", "backward_dq_convert"):
            total += prediction.predict_traffic(kernel, plan.problem, CARDS[ARCH]).milliseconds
            continue
        steady = kernels.predict(kernel, plan)
        if steady is None:
            return None
        total += prediction.lay_out(steady, kernel, plan.problem, CARDS[ARCH]).milliseconds
        asked = steady if kernel.name == of else asked
    return None if asked is None else (total, asked)


def plan_of(row: dict[str, str], backward: bool, tiles: Tiles) -> Plan:
    """The plan of a row's call on the architecture that was timed."""
    sample = samples.Sample(
        batch=int(row["batch"]), seqlen_q=int(row["seqlen"]), seqlen_kv=int(row["seqlen"]), num_heads_q=int(row["heads"]), num_heads_kv=int(row["heads"]),
        head_dim=int(row["head_dim"]), dtype=row["dtype"], is_causal=row["causal"] == "1",
    )  # fmt: skip
    problem = samples.plan_of(sample, backward=backward).problem
    return planner.make_plan(problem, device.of_arch(ARCH, "gpu"), backward=backward, tile=tiles)


def tile_of(row: dict[str, str]) -> Tile:
    """The tile of a row of tiles.csv."""
    return Tile(*(int(row[name]) for name in ("tile_q", "tile_kv", "num_warps", "num_stages")))


def timed_tiles(path: Path, kernels: Kernels) -> Iterable[Timed]:
    """The rows of tiles.csv whose kernels are there; the other kernels of a backward pass had the tiles of rank 0."""
    rows = list(csv.DictReader(path.open(newline="")))
    defaults: dict[tuple[str, str], dict[str, Tile]] = defaultdict(dict)
    for row in rows:
        if row["rank"] == "0":
            defaults[row["head_dim"], row["causal"]][row["kernel"]] = tile_of(row)
    for row in rows:
        backward = row["kernel"] != "forward"
        others = {name: tile for name, tile in defaults[row["head_dim"], row["causal"]].items() if (name != "forward") == backward}
        plan = plan_of(row, backward, others | {row["kernel"]: tile_of(row)})
        found = predicted_milliseconds(plan, kernels, row["kernel"])
        if found is not None:
            yield _timed(row, row["kernel"], tile_of(row), *found)


def timed_calls(path: Path, kernels: Kernels) -> Iterable[Timed]:
    """The last timing of each call without features in bfloat16 whose kernels are there."""
    last: dict[tuple[str, ...], dict[str, str]] = {}
    for row in csv.DictReader(path.open(newline="")):
        plain = row["library"] == "cuflash" and row["dtype"] == "bfloat16" and not row["case"] and row["milliseconds"]
        if plain and row["pass"] in ("forward", "backward") and row["heads_kv"] == row["heads"] and row["head_dim_v"] == row["head_dim"]:
            last[tuple(row[name] for name in ("pass", "batch", "heads", "seqlen", "head_dim", "causal"))] = row
    os.environ[fused_backward.VARIABLE] = "0"  # those calls were timed before there was a kernel for all gradients
    rule_out_wgmma()
    for row in sorted(last.values(), key=lambda row: (row["pass"] == "backward", int(row["head_dim"]), row["causal"], int(row["seqlen"]))):
        plan = plan_of(row, row["pass"] == "backward", None)
        found = predicted_milliseconds(plan, kernels, next(kernel.name for kernel in plan.kernels if kernel.name != "backward_delta"))
        if found is not None:
            yield _timed(row, row["pass"], None, *found)


def _timed(row: dict[str, str], kernel: str, tile: Tile | None, milliseconds: float, steady: KernelPrediction) -> Timed:
    return Timed(
        kernel, int(row["head_dim"]), row["causal"] == "1", int(row["seqlen"]), tile, float(row["milliseconds"]), milliseconds, steady.matrix_share,
        steady.binds,
    )  # fmt: skip


# --- Tables -------------------------------------------------------------------------------------------------------------------------------


def rank_correlation(pairs: Sequence[tuple[float, float]]) -> float:
    """Spearman's; pairs without ties."""
    count = len(pairs)
    first, second = ([sorted(column).index(value) for value in column] for column in zip(*pairs, strict=True))
    distance = sum((a - b) ** 2 for a, b in zip(first, second, strict=True))
    return 1 - 6 * distance / (count * (count**2 - 1))


def geometric_mean(values: Iterable[float]) -> float:
    """Of positive numbers."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs))


def print_summary(found: Sequence[Timed]) -> None:
    """For each kernel, head dimension and mask: how well the model orders tiles, and what its choice would lose."""
    groups: dict[tuple[str, int, bool], list[Timed]] = defaultdict(list)
    for timed in found:
        groups[timed.kernel, timed.head_dim, timed.causal].append(timed)
    print("| kernel | head_dim | causal | tiles | measured / predicted | rank correlation | measured best | predicted best | its loss |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for (kernel, head_dim, causal), group in groups.items():
        ratios = [timed.ratio for timed in group]
        best, chosen = min(group, key=lambda timed: timed.measured), min(group, key=lambda timed: timed.predicted)
        correlation = f"{rank_correlation([(timed.measured, timed.predicted) for timed in group]):.2f}" if len(group) > 2 else "–"
        loss = chosen.measured / best.measured - 1
        print(
            f"| {kernel} | {head_dim} | {'yes' if causal else 'no'} | {len(group)} | {geometric_mean(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) | "
            f"{correlation} | {_short(best.tile)} | {_short(chosen.tile)} | {100 * loss:.0f} % |"
        )


def print_rows(found: Sequence[Timed]) -> None:
    """One line for each timing."""
    print(
        "| kernel | head_dim | causal | seqlen | tile | measured ms | predicted ms | measured / predicted | predicted matrix share | busiest |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for timed in found:
        print(
            f"| {timed.kernel} | {timed.head_dim} | {'yes' if timed.causal else 'no'} | {timed.seqlen} | {_short(timed.tile)} | {timed.measured:.3f} | "
            f"{timed.predicted:.3f} | {timed.ratio:.2f} | {timed.share:.2f} | {timed.binds} |"
        )


def _short(tile: Tile | None) -> str:
    return "default" if tile is None else f"{tile.tile_q}x{tile.tile_kv} w{tile.num_warps} s{tile.num_stages}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser(description="Predicted beside measured times of an H100.")
    parser.add_argument(
        "--kernels", type=Path, required=True, metavar="DIR", help="the kernels that were timed, as `inspect --save` writes them"
    )
    parser.add_argument("--calls", action="store_true", help="whole calls of attention.csv instead of tiles.csv")
    parser.add_argument("--compile", action="store_true", help="compile kernels that are not in DIR, as they are now")
    parser.add_argument("--csv", type=Path, help="another file of measured times")
    options = parser.parse_args(arguments)
    kernels = Kernels(options.kernels, options.compile)
    if options.calls:
        found = list(timed_calls(options.csv or RESULTS / "attention.csv", kernels))
    else:
        found = list(timed_tiles(options.csv or RESULTS / "tiles.csv", kernels))
    if not found:
        print(f"predicted.py: none of the kernels is in {options.kernels}; --compile makes them", file=sys.stderr)
        return 2
    if not options.calls:
        print_summary(found)
        print()
    print_rows(found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
