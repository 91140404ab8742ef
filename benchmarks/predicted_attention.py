"""Predicted share of the matrix rate of both passes beside FlashAttention-2's: prints the table of docs/performance.md, and with --publish writes it there.

    python benchmarks/predicted_attention.py                            # all architectures
    python benchmarks/predicted_attention.py --arch sm_80 --head-dim 128 --kernels
    python benchmarks/predicted_attention.py --publish
    python benchmarks/predicted_attention.py --keep CHECKOUT            # the kernels of another checkout, as what was before

A share is the time that the products of a pass would take at the matrix rate over what its kernels take in the steady state: two products forward, five
backward. Kernels that compute seven or eight products for five are charged for it. Where a call takes kernels of wgmma, whose rate is higher, they are shown as
shares of the rate of mma.sync, too, which is FlashAttention-2's; a second row has the kernels of mma.sync, which calls take that those of wgmma refuse. Runs are
long (docs/timing.md): the whole table takes some minutes. float16, default tiles. FlashAttention-2's figures are those of benchmarks/flash_attention_2.py, by the
same model and runs as long. Needs no GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cuflash.cli import samples
from cuflash.hardware import device
from cuflash.jit import cache
from cuflash.jit.compiler import CompileRequest
from cuflash.planning import kernel_specs, planner
from cuflash.planning.kernel_plan import KernelPlan
from cuflash.problem.tile import Tile
from cuflash.timing import prediction, sass
from cuflash.timing.description import Description
from cuflash.timing.machine import CARDS, SUB_PARTITIONS, multiprocessor
from cuflash.timing.multiprocessor import STEADY_TRIPS, WARMING
from cuflash.timing.prediction import KernelPrediction
from kernels_of_mma import rule_out_wgmma, without_wgmma
from marked_pages import print_prediction

ARCHITECTURES = ("sm_80", "sm_86", "sm_90", "sm_120")
HEAD_DIMS = (64, 128, 256)
FORWARD_PRODUCTS, BACKWARD_PRODUCTS = 2, 5
RESULTS = Path(__file__).resolve().parent / "results"
BEFORE, FLASH_ATTENTION = RESULTS / "predicted_before.json", RESULTS / "flash_attention_2.json"


@dataclass(frozen=True)
class Cell:
    """One pass of one call without features."""

    arch: str
    head_dim: int
    causal: bool
    backward: bool

    @property
    def key(self) -> str:
        """Its name in files."""
        return f"{self.arch} {self.head_dim} {'causal' if self.causal else 'full'} {'backward' if self.backward else 'forward'}"

    def share(self, clocks_per_pair: float) -> float:
        """Of the matrix rate of mma.sync, by the clocks of an SM for a pair of query and key."""
        products = BACKWARD_PRODUCTS if self.backward else FORWARD_PRODUCTS
        return products * self.head_dim / (SUB_PARTITIONS * multiprocessor(self.arch).matrix_rates["half"]) / clocks_per_pair


def cells(archs: Sequence[str], head_dims: Sequence[int]) -> Iterator[Cell]:
    """Row by row."""
    for arch in archs:
        for backward in (False, True):
            for head_dim in head_dims:
                for causal in (False, True):
                    yield Cell(arch, head_dim, causal, backward)


def rows(cell: Cell) -> Iterator[tuple[str, list[KernelPlan]]]:
    """What the column of the pass says, and the kernels: those that a call takes; where these are of wgmma those of mma.sync, too."""
    name, taken = "backward" if cell.backward else "forward", tiled_kernels(cell)
    yield name, taken
    if any(kernel.spec.implementation == "wgmma" for kernel in taken):
        with without_wgmma():
            others = tiled_kernels(cell)
        yield f"{name}, `mma.sync`", others


def tiled_kernels(cell: Cell) -> list[KernelPlan]:
    """The kernels that walk over tiles of a call that fills the card."""
    sample = samples.Sample(
        batch=4,
        seqlen_q=4096,
        seqlen_kv=4096,
        num_heads_q=16,
        num_heads_kv=16,
        head_dim=cell.head_dim,
        dtype="float16",
        is_causal=cell.causal,
    )
    problem = samples.plan_of(sample, backward=cell.backward).problem
    plan = planner.make_plan(problem, device.of_arch(cell.arch, "gpu"), backward=cell.backward)
    return [kernel for kernel in plan.kernels if kernel.spec.is_tiled]


def predict(kernel: KernelPlan, cell: Cell) -> KernelPrediction:
    """The steady state of a kernel of a call; of wgmma in tiles that a causal mask leaves whole."""
    described, function = prediction.compiled(kernel, device.of_arch(cell.arch, "gpu"), causal=cell.causal)
    return steady(function, described)


def steady(function: sass.Function, described: Description) -> KernelPrediction:
    """A run that is long enough for a table: how warps stand to each other settles in some tens of trips."""
    return prediction.predict_kernel(function, described, limits=False, trips=STEADY_TRIPS, warming=WARMING)


def clocks_per_pair(found: Sequence[KernelPrediction]) -> float:
    """Clocks of an SM for one pair of query and key of a head."""
    return sum(of.clocks / of.blocks / (of.description.tile.tile_q * of.description.tile.tile_kv) for of in found)


# --- What was before ----------------------------------------------------------------------------------------------------------------------

PLANNING = """
import json, sys
import numpy, cuflash
for head_dim, is_causal, backward in json.loads(sys.argv[1]):
    x = numpy.zeros((1, 4096, 4, head_dim), "float16")
    for kernel in cuflash.plan(x, x, x, is_causal=is_causal, backward=backward).kernels:
        tile = [kernel.tile.tile_q, kernel.tile.tile_kv, kernel.tile.num_warps, kernel.tile.num_stages]
        print(json.dumps({"call": [head_dim, is_causal, backward], "name": kernel.name, "source": kernel.source, "config": kernel.config, "tile": tile}))
"""
"""What another checkout is asked, in a process of its own. It uses names only that every version has."""


def keep(checkout: Path) -> None:
    """Write the clocks of another checkout's default kernels, compiled and predicted by this one, to the file of what was before."""
    calls = [(head_dim, causal, backward) for head_dim in HEAD_DIMS for causal in (False, True) for backward in (False, True)]
    commit = subprocess.run(
        ["git", "-C", checkout, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
    ).stdout.strip()
    clocks: dict[str, float] = {}
    os.environ["CUFLASH_KERNELS_DIR"] = str(checkout / "kernels")
    for arch in ARCHITECTURES:
        environment = {**os.environ, "PYTHONPATH": str(checkout), "CUFLASH_SIMULATOR_ARCH": arch}
        asked = subprocess.run(
            [sys.executable, "-c", PLANNING, json.dumps(calls)], env=environment, cwd=checkout, capture_output=True, text=True, check=True
        )
        for line in asked.stdout.splitlines():
            kernel = json.loads(line)
            if kernel["name"] in kernel_specs.TILED_KERNELS:
                head_dim, causal, backward = kernel["call"]
                key = Cell(arch, head_dim, causal, backward).key
                clocks[key] = clocks.get(key, 0.0) + clocks_per_pair([_predict_text(kernel, arch, head_dim, causal)])
    kept = {key: round(value, 5) for key, value in clocks.items()}
    BEFORE.write_text(json.dumps({"commit": commit, "clocks_per_pair": kept}, indent=1) + "\n")


def _predict_text(kernel: dict[str, object], arch: str, head_dim: int, causal: bool) -> KernelPrediction:
    request = CompileRequest(str(kernel["source"]), str(kernel["config"]), device.of_arch(arch).compile_arch, "cubin")
    artifact = cache.fetch(request)
    (resources,) = artifact.resources
    shared = re.search(r"SHARED_BYTES = (\d+)", request.config)
    assert shared is not None, "every version's Config says how much shared memory a kernel takes"
    tile = Tile(*kernel["tile"])  # type: ignore[misc]  # four numbers, read from JSON
    described = Description(
        str(kernel["name"]), arch, "float16", head_dim, head_dim, causal, tile, resources.registers, resources.spill_store_bytes,
        int(shared[1]) + resources.static_shared_bytes, resources.barriers,
    )  # fmt: skip
    return steady(sass.read_functions(artifact.data)[resources.entry], described)


# --- The table ----------------------------------------------------------------------------------------------------------------------------


class Known:
    """What is kept of other kernels: clocks for each pair of query and key."""

    def __init__(self) -> None:
        before, other = (json.loads(path.read_text(encoding="utf-8")) for path in (BEFORE, FLASH_ATTENTION))
        self.before: dict[str, float] = before["clocks_per_pair"]
        self.flash_attention: dict[str, float] = {
            Cell(case["arch"], case["head_dim"], case["causal"], case["backward"]).key: case["clocks_per_pair"] for case in other["cases"]
        }


def lines(archs: Sequence[str], head_dims: Sequence[int], known: Known, *, show_kernels: bool) -> Iterator[str]:
    """The table in Markdown; below the goal in bold."""
    yield "| card | pass | head_dim | causal | before | now | FlashAttention-2 | now / FlashAttention-2 | tiles |"
    yield "| --- " * 9 + "|"
    for cell in cells(archs, head_dims):
        before, other = cell.share(known.before[cell.key]), cell.share(known.flash_attention[cell.key])
        for name, taken in rows(cell):
            found = [predict(kernel, cell) for kernel in taken]
            for of in found if show_kernels else ():
                print(_of_kernel(cell, of), file=sys.stderr, flush=True)
            now = cell.share(clocks_per_pair(found))
            goal = 1.0 if cell.backward else 1.05
            ratio = f"{now / other:.2f}" if round(now / other, 2) >= goal else f"**{now / other:.2f}**"
            columns = [
                CARDS[cell.arch].name, name, str(cell.head_dim), "yes" if cell.causal else "no", f"{before:.2f}", f"{now:.2f}", f"{other:.2f}",
                ratio, ", ".join(f"{of.description.kernel} {_tile(of)}" for of in found),
            ]  # fmt: skip
            yield f"| {' | '.join(columns)} |"


def _tile(of: KernelPrediction) -> str:
    tile = of.description.tile
    return f"{tile.tile_q}x{tile.tile_kv} w{tile.num_warps} s{tile.num_stages}"


def _of_kernel(cell: Cell, of: KernelPrediction) -> str:
    busy = ", ".join(f"{name} {value:.2f}" for name, value in sorted(of.busy.items(), key=lambda item: -item[1])[:4])
    return (
        f"{cell.key}: {of.description.kernel} {_tile(of)} x{of.blocks}: {clocks_per_pair([of]):.4f} clocks per pair, "
        f"{of.description.registers} registers, {of.description.spill_bytes} bytes spilled, "
        f"{of.instructions / max(1, of.matrix):.2f} instructions per product; {busy}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Print or publish the table, or keep what another checkout does."""
    parser = argparse.ArgumentParser(description="Predicted share of the matrix rate beside FlashAttention-2's.")
    parser.add_argument("--arch", action="append", choices=ARCHITECTURES, help="may be repeated (default all)")
    parser.add_argument("--head-dim", action="append", type=int, choices=HEAD_DIMS, help="may be repeated (default all)")
    parser.add_argument("--kernels", action="store_true", help="also print each kernel")
    parser.add_argument("--publish", action="store_true", help="write the whole table to docs/performance.md")
    parser.add_argument(
        "--keep", type=Path, metavar="CHECKOUT", help="predict the kernels of another checkout and keep them as what was before"
    )
    options = parser.parse_args(arguments)
    if options.keep:
        rule_out_wgmma()
        keep(options.keep.resolve())
        return 0
    if options.publish and (options.arch or options.head_dim):
        parser.error("--publish writes the whole table: leave out --arch and --head-dim")
    table = lines(options.arch or ARCHITECTURES, options.head_dim or HEAD_DIMS, Known(), show_kernels=options.kernels)
    print_prediction(Path(__file__).name, table, publish=options.publish)
    return 0


if __name__ == "__main__":
    sys.exit(main())
