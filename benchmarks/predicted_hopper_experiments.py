"""Predicted beside measured speeds of the wgmma kernels that were tried on an H100: prints the tables of docs/timing.md, and with --publish writes them there.

    python benchmarks/predicted_hopper_experiments.py [--publish]

Compiles the kernels of benchmarks/results/…/hopper-experiments with the variants that second.jsonl names, which are those that ran but for the compiler's version, and lays
their grids out as run.py did: blocks stay and take tiles at fixed strides, sections of heads one after the other. A backward kernel has a block for each tile of keys.
Measured is the median of four rounds. Takes about five minutes, and needs no GPU.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import re
import statistics
import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cuflash.jit import compiler
from cuflash.problem.tile import Tile
from cuflash.timing.description import Description
from cuflash.timing.grid import grid_clocks
from cuflash.timing.machine import CARDS
from cuflash.timing.prediction import KernelPrediction, predict_kernel
from cuflash.timing.sass import read_functions
from marked_pages import TIMING, print_prediction

FOLDER = Path(__file__).resolve().parent / "results" / "nvidia-h100-80gb-hbm3" / "hopper-experiments"
CARD = CARDS["sm_90"]
BACKWARD = {"base": [], "nosplit": ["SPLIT=0"], "order1": ["ORDER=1"], "token": ["TOKEN=1"], "m64": ["TILE=64"]}


@dataclass(frozen=True)
class Design:
    """One kernel.

    Attributes:
        name: as in second.jsonl, without what is no part of the kernel.
        head_dim: of it.
        warpgroups: that compute.
        rows, streamed: of its tiles, that a block owns and walks over.
        stages: of the rings.
        token: what is handed on when; 0 nothing, 1 Q K is done, 2 P V is done.
        causal: whether.
    """

    name: str
    head_dim: int
    warpgroups: int
    rows: int
    streamed: int
    stages: int
    token: int
    causal: bool

    @property
    def is_backward(self) -> bool:
        """Which pass."""
        return self.name.startswith("B_")


def design_of(name: str) -> Design:
    """The design of a name such as F_d128_g3_n80_s2_t1_p0_c0 or B_c0_base."""
    causal = "_c1" in name
    if name.startswith("B_"):
        return Design(name, 128, 2, 128, 64 if "m64" in name else 80, 2, int("token" in name), causal)
    head_dim, warpgroups, streamed, stages, token = (int(re.search(rf"_{key}(\d+)", name)[1]) for key in "dgnst")  # type: ignore[index]  # a name has all of them
    return Design(name, head_dim, warpgroups, 64 * warpgroups, streamed, stages, token, causal)


def compiled(design: Design) -> tuple[bytes, compiler.KernelResources]:
    """Its machine code, and what the compiler says of it."""
    from cupy.cuda import nvrtc

    sys.path.insert(0, str(FOLDER))
    import wgmma_text

    text = (FOLDER / ("backward.cu" if design.is_backward else "forward.cu")).read_text(encoding="utf-8")
    if design.is_backward:
        defines = [f"CAUSAL={int(design.causal)}", *BACKWARD[design.name.split("_")[2]]]
    else:
        text = text.replace("//WGMMA", wgmma_text.forward(design.head_dim, design.streamed))
        split = int("_p1" in design.name)
        defines = [
            f"HD={design.head_dim}",
            f"WG={design.warpgroups}",
            f"TN={design.streamed}",
            f"STAGES={design.stages}",
            f"TOKEN={design.token}",
        ]
        defines += [f"SPLIT={split}", f"CAUSAL={int(design.causal)}"]
    program = nvrtc.createProgram(text, f"{design.name}.cu", (), ())
    flags = ("-arch=sm_90a", "-std=c++17", "-default-device", "--ptxas-options=-v", *(f"-D{define}" for define in defines))
    nvrtc.compileProgram(program, flags)
    (resources,) = compiler.parse_resources(nvrtc.getProgramLog(program))
    return compiler._complete_elf(nvrtc.getCUBIN(program)), resources


@functools.cache
def steady(design: Design, trips: int | None = None) -> tuple[KernelPrediction, float]:
    """Its steady state, of a run of so many trips, and the clocks of a masked tile over those of others."""
    cubin, resources = compiled(design)
    function = max(read_functions(cubin).values(), key=len)
    tile = Tile(design.rows, design.streamed, 4 * design.warpgroups, design.stages)
    kernel = "backward_dkdv" if design.is_backward else "forward_wgmma"
    described = Description(
        kernel,
        "sm_90",
        "bfloat16",
        design.head_dim,
        design.head_dim,
        design.causal,
        tile,
        resources.registers,
        0,
        _shared_bytes(design),
        16,
    )
    found = predict_kernel(function, described, limits=False, trips=trips)
    return found, predict_kernel(function, described, limits=False, masked=True, staying=False, trips=trips).clocks / found.clocks


def _shared_bytes(design: Design) -> int:
    """One block of any of them fills an SM."""
    return 130 * 1024


@dataclass(frozen=True)
class Row:
    """One design at one length."""

    design: Design
    variant: str
    seqlen: int
    measured: float
    predicted: float
    share: float

    @property
    def ratio(self) -> float:
        """Measured over predicted speed: below 1 where the model is too fast."""
        return self.measured / self.predicted


def rows(only: Collection[str] = (), trips: int | None = None) -> Iterator[Row]:
    """All that was measured and can be predicted, or `only` some variants; `trips` as in `predict_kernel`."""
    cells = (json.loads(line) for line in (FOLDER / "second.jsonl").read_text(encoding="utf-8").splitlines())
    for cell in cells:
        if cell["what"] != "cell":
            continue
        for name, rates in cell["tflops"].items():
            if not name.startswith("cudnn") and (not only or name in only):
                base = re.sub(r"_(allheads|snake)$", "", name)
                predicted, share = predict(design_of(base), cell["S"], name.removeprefix(base), trips)
                yield Row(design_of(base), name, cell["S"], statistics.median(rates), predicted, share)


def predict(design: Design, seqlen: int, variant: str, trips: int | None = None) -> tuple[float, float]:
    """TFLOP/s, and the share of the matrix rate in the steady state."""
    found, masked = steady(design, trips)
    batch, heads = 16384 // seqlen, 2048 // design.head_dim
    pairs = batch * heads
    lengths = list(_lengths(design, seqlen, masked, found.idle_cost))
    section = pairs if variant == "_allheads" else _section(design, seqlen, pairs)
    tiles = [length for first in range(0, pairs, section) for length in reversed(lengths) for _ in range(min(section, pairs - first))]
    between = found.between_tiles or 0.0
    start = CARD.block_start + 1000
    if design.is_backward:  # a block for each tile; its begin and end cannot hide
        clocks = grid_clocks(
            reversed(tiles) if design.causal else tiles, num_sms=CARD.num_sms, trip_clocks=[found.clocks], overhead=2 * start
        )
    else:
        clocks = start + max(_strided(tiles, found.clocks, between, snake=variant == "_snake"))
    flops = 4 * pairs * seqlen**2 * design.head_dim * (0.5 * (1 + 1 / seqlen) if design.causal else 1) * (2.5 if design.is_backward else 1)
    busy = flops / 2 / (CARD.num_sms * 2048) / clocks
    return flops / (clocks / CARD.clock_under(busy)) / 1e3, found.matrix_share


def _lengths(design: Design, seqlen: int, masked: float, idle: float) -> Iterator[float]:
    """Trips of each tile of a head, as its warpgroups' mean."""
    for first in range(0, seqlen, design.rows):
        if design.is_backward:
            begin = first // design.streamed if design.causal else 0
            yield math.ceil(seqlen / design.streamed) - begin
            continue
        whole, walked = [], []
        for row in range(first, first + design.rows, 64):
            keys = (min(seqlen, row + 64), min(seqlen, row + 1)) if design.causal else (seqlen, seqlen)
            exists = row < seqlen
            walked.append(math.ceil(keys[0] / design.streamed) * exists)
            whole.append(keys[1] // design.streamed * exists)
        mean = statistics.fmean(walked)
        yield statistics.fmean(whole) + masked * (mean - statistics.fmean(whole)) + idle * (max(walked) - mean)


def _section(design: Design, seqlen: int, pairs: int) -> int:
    """Heads whose tiles come one after the other, as run.py had them."""
    budget, width = (32 << 20, 8) if design.is_backward else (24 << 20, 4)
    fitting = max(1, min(pairs, budget // (seqlen * design.head_dim * width)))
    return min(pairs, max(fitting, math.ceil(CARD.num_sms / math.ceil(seqlen / design.rows))))


def _strided(tiles: Sequence[float], trip: float, between: float, *, snake: bool) -> list[float]:
    """Clocks of each block."""
    clocks = [0.0] * CARD.num_sms
    for index, length in enumerate(tiles):
        turn, place = divmod(index, CARD.num_sms)
        clocks[CARD.num_sms - 1 - place if snake and turn % 2 else place] += length * trip + between
    return clocks


# --- Tables -------------------------------------------------------------------------------------------------------------------------------

TOKENS = ("none", "Q K done", "P V done")


def summary(found: Sequence[Row]) -> list[str]:
    """For each pass, head dimension, mask and hand-over: mean ratio and spread."""
    text = [
        "| pass | head_dim | causal | hand-over | timings | measured / predicted, seqlen 2048 to 16384 | 512 and 1024 |",
        "| --- " * 7 + "|",
    ]
    groups: dict[tuple[bool, int, bool, int], list[Row]] = {}
    for row in found:
        of = row.design
        groups.setdefault((of.is_backward, of.head_dim, of.causal, of.token), []).append(row)
    for (backward, head_dim, causal, token), group in sorted(groups.items()):
        parts = ([row.ratio for row in group if row.seqlen >= 2048], [row.ratio for row in group if row.seqlen < 2048])
        cells = [f"{statistics.geometric_mean(part):.2f} ({min(part):.2f} to {max(part):.2f})" if part else "–" for part in parts]
        kind = "backward" if backward else "forward"
        text.append(f"| {kind} | {head_dim} | {'yes' if causal else 'no'} | {TOKENS[token]} | {len(group)} | {cells[0]} | {cells[1]} |")
    return text


def details(found: Sequence[Row], seqlens: Sequence[int]) -> list[str]:
    """One line for each design and length."""
    text = ["| kernel | seqlen | measured TFLOP/s | predicted | measured / predicted | predicted matrix share |", "| --- " * 6 + "|"]
    for row in sorted(found, key=lambda row: (row.variant, -row.seqlen)):
        if row.seqlen in seqlens:
            text.append(
                f"| `{row.variant}` | {row.seqlen} | {row.measured:.0f} | {row.predicted:.0f} | {row.ratio:.2f} | {row.share:.2f} |"
            )
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    """Print or publish the tables."""
    parser = argparse.ArgumentParser(description="Predicted beside measured speeds of Hopper kernels.")
    parser.add_argument("--publish", action="store_true", help="write the tables to docs/timing.md")
    options = parser.parse_args(arguments)
    found = list(rows())
    table = [*summary(found), "", *details(found, (16384, 2048))]
    print_prediction(Path(__file__).name, table, publish=options.publish, page=TIMING)
    return 0


if __name__ == "__main__":
    sys.exit(main())
