"""Which tiles the timing model finds best: prints, for cuflash/planning/predicted_tiles.py, the best of some tiles.

    python benchmarks/predicted_tile_sweep.py --arch sm_80 sm_86 sm_120
    python benchmarks/predicted_tile_sweep.py --arch sm_80 --steady          # lines of cuflash/planning/predicted_backward.py
    python benchmarks/predicted_tile_sweep.py --arch sm_80 --mask            # lines of cuflash/planning/mask_gradient.py
    python benchmarks/predicted_tile_sweep.py --arch sm_80 --kernel backward_dq --head-dim 128 --tile 128x32w4s2 64x64w4s2

float16, or with --dtype another type (docs/log-float32.md says which tiles of float32 were tried), no score features, steady states of long runs
(docs/timing.md). Tiles are compared without a causal mask; the best ones are then predicted with it, and the least sum of both decides, since a kernel has one
tile for both. The tile that is the default stays unless another one gains 2 %. Kernels are compiled at the assembler's highest level; of what they spill,
`tile_choice.TOLERATED_SPILLS` is allowed. Needs no GPU, and about five seconds for a tile.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from cuflash.cli import samples
from cuflash.cli.sample_features import SampleFeatures
from cuflash.errors import UnsupportedError
from cuflash.hardware import device
from cuflash.jit import cache
from cuflash.planning import kernel_specs, planner, predicted_loops, tile_choice, tile_rules, wgmma_backward
from cuflash.planning.kernel_cases import KernelCase, case_of
from cuflash.problem.tile import Tile
from cuflash.timing import prediction, sass
from cuflash.timing.machine import CARDS, multiprocessor
from cuflash.timing.multiprocessor import STEADY_TRIPS, WARMING, steady_clocks_of_roles

CANDIDATES: dict[tuple[str, int], str] = {
    ("forward", 64): "64x32w4s1 64x48w4s2 64x64w2s1 128x64w4s1 128x64w4s2 128x96w4s1 128x112w4s1 128x128w4s1",
    ("forward", 128): "64x32w4s1 64x48w4s1 64x64w4s1 128x32w4s1 128x48w4s1 128x64w4s1 128x128w8s1",
    ("forward", 256): "64x32w4s1 64x64w4s1 128x32w8s1 128x64w8s1 128x80w8s1 128x96w8s1 128x112w8s1",
    ("backward_dkdv", 64): "32x64w2s2 32x128w4s1 32x128w4s2 48x128w4s2 64x128w4s1",
    ("backward_dkdv", 128): "32x64w4s1 32x64w4s2 48x64w4s1 64x64w4s1 32x128w8s1 32x128w8s2 64x128w8s1",
    ("backward_dv", 256): "32x64w4s1 64x64w4s1 32x128w8s1 64x128w8s1",
    ("backward_dk", 256): "16x64w4s1 32x64w4s1 32x128w8s1",
    ("backward_dq", 64): "128x32w4s2 128x48w4s2 128x64w4s1 128x64w4s2",
    ("backward_dq", 128): "64x32w2s2 64x32w4s2 64x64w4s2 128x32w4s1 128x32w4s2 128x64w8s1",
    ("backward_dq", 256): "64x16w4s1 64x32w4s1 128x16w8s1 128x32w8s1",
    ("backward_fused", 64): "32x64w4s2 64x64w4s2 32x128w4s2 64x128w8s1 64x128w8s2 128x128w8s1",
    ("backward_fused", 128): "64x64w4s1 32x128w8s1 32x128w8s2 64x128w8s1 64x128w8s2",
    ("backward_fused", 256): "32x32w4s1 32x64w8s1 64x32w4s1 64x64w8s1 64x64w8s2",
}
"""Warps of 32 rows and of 16, as many keys or queries as registers may hold. The tile that is the default at the time is tried too."""

FINALISTS = 3
HALF_BYTES = 2
"""Of an element of the gradient of a float16 mask."""
LEAST_GAIN = 1.02


@dataclass(frozen=True)
class Found:
    """One tile's steady state: clocks of an SM for a pair of query and key, and bytes spilled."""

    tile: Tile
    clocks: float
    spill_bytes: int


def predict(arch: str, name: str, head_dim: int, tile: Tile, *, causal: bool, dtype: str = "float16") -> Found:
    """One kernel with a tile."""
    spec, on = kernel_specs.TILED_KERNELS[name], device.of_arch(arch, "gpu")
    sample = samples.Sample(batch=1, seqlen_q=1024, seqlen_kv=1024, head_dim=head_dim, dtype=dtype, is_causal=causal)
    problem = samples.plan_of(sample, backward=spec.backward).problem
    kernel = planner.tiled_kernel(spec, problem, on, {name: tile})
    request = replace(kernel.request(on), tolerated_spills=tile_choice.TOLERATED_SPILLS)
    artifact = cache.fetch(request)
    described = prediction.describe(kernel, artifact.resources_of(kernel.entry), request, causal=causal)
    found = prediction.predict_kernel(
        sass.read_functions(artifact.data)[kernel.entry], described, limits=False, trips=STEADY_TRIPS, warming=WARMING
    )
    return Found(tile, found.clocks / found.blocks / (tile.tile_q * tile.tile_kv), described.spill_bytes)


def best(arch: str, name: str, head_dim: int, candidates: Sequence[Tile], dtype: str = "float16") -> Found | None:
    """The best of some tiles, among them the default, by the sum of full and causal; None if all are illegal or spill too much."""
    case = KernelCase(kernel_specs.TILED_KERNELS[name], dtype, head_dim, False, head_dim)
    on = device.of_arch(arch, "gpu")
    default = tile_choice.default_tile(case, on)
    full = []
    for tile in dict.fromkeys((*candidates, default)):
        if tile_rules.broken_rule(case, tile, on) is None:
            try:
                full.append(predict(arch, name, head_dim, tile, causal=False, dtype=dtype))
            except UnsupportedError as error:  # more resources than an SM has
                print(f"{arch} {name} {head_dim} {tile}: {error}", file=sys.stderr)
                continue
            print(f"{arch} {name} {head_dim} {full[-1]}", file=sys.stderr, flush=True)
    most = tile_choice.TOLERATED_SPILLS
    finalists = sorted((found for found in full if found.spill_bytes <= most), key=lambda found: found.clocks)[:FINALISTS]
    finalists += [found for found in full if found.tile == default and found not in finalists]
    both = []
    for found in finalists:
        causal = predict(arch, name, head_dim, found.tile, causal=True, dtype=dtype)
        print(f"{arch} {name} {head_dim} causal {causal}", file=sys.stderr, flush=True)
        if causal.spill_bytes <= most:
            both.append(Found(found.tile, found.clocks + causal.clocks, 0))
    return min(both, key=lambda found: found.clocks / (LEAST_GAIN if found.tile == default else 1.0), default=None)


def steady(arch: str, head_dim: int, dtype: str = "float16") -> Iterator[str]:
    """Lines of predicted_backward.STEADY: the loops of both ways to the gradients with their default tiles, alone on an SM and with as many blocks as it holds;
    of float32 those of the kernels whose blocks may share out queries."""
    on = device.of_arch(arch, "gpu")
    problems = [
        samples.plan_of(
            samples.Sample(seqlen_q=1024, seqlen_kv=1024, head_dim=head_dim, dtype=dtype, is_causal=causal), backward=True
        ).problem
        for causal in (False, True)
    ]
    is_float32 = dtype == "float32"
    names = (
        [kernel_specs.BACKWARD_DQ.name] if is_float32 else [kernel_specs.BACKWARD_FUSED.name, kernel_specs.BACKWARD_DQ.name]
    )  # of either way
    pins = [{name: tile_choice.default_tile(KernelCase(kernel_specs.TILED_KERNELS[name], dtype, head_dim), on)} for name in names]
    for pinned in pins:
        found: dict[str, list[tuple[int, float, float]]] = {}
        for problem in problems:
            for kernel in planner.make_plan(problem, on, backward=True, tile=pinned).kernels:
                if kernel.spec.shares_queries if is_float32 else kernel.spec.is_tiled:
                    described, function = prediction.compiled(kernel, on, causal=problem.is_causal)
                    of = prediction.predict_kernel(function, described, limits=False, trips=STEADY_TRIPS, warming=WARMING)
                    alone = steady_clocks_of_roles(of.roles, multiprocessor(arch), blocks=1, trips=STEADY_TRIPS, warming=WARMING)
                    pairs = kernel.tile.tile_q * kernel.tile.tile_kv
                    found.setdefault(kernel.name, []).append((of.blocks, alone / pairs, of.clocks / of.blocks / pairs))
        for name, ((blocks, *full), (_, *causal)) in found.items():
            alone, together = ((a + b) / 2 for a, b in zip(full, causal, strict=True))
            line = predicted_loops.line_of(name, dtype)
            yield f'    ("{arch}", "{line}", {head_dim}): Steady({blocks}, {alone:.3f}, {together:.3f}),'


def mask_gradient(arch: str, head_dim: int) -> str | None:
    """A line of mask_gradient.STEADY: the loops of both ways to all gradients, that of a float16 mask included, with their default tiles; None where no kernel makes the
    others together."""
    on = device.of_arch(arch, "gpu")
    features = SampleFeatures(attn_mask="float16", mask_axes="bhqk", need_attn_mask_grad=True)
    found: dict[str, list[float]] = {}
    for causal in (False, True):
        sample = samples.Sample(1, 1024, 1024, 256, 256, head_dim=head_dim, dtype="float16", is_causal=causal, features=features)
        problem = samples.plan_of(sample, backward=True).problem
        together = wgmma_backward.kernels(problem)[0] if on.capability == 90 else kernel_specs.BACKWARD_FUSED
        *of_keys, _ = planner.kernels_of_their_own(problem, on)
        if tile_choice.known_tile(case_of(together, problem), on) is None:
            return None
        for name, kernels in (
            ("together", wgmma_backward.kernels(problem) if on.capability == 90 else (kernel_specs.BACKWARD_FUSED,)),
            ("mask", (kernel_specs.BACKWARD_MASK,)),
            ("apart", of_keys),
            ("stored", (kernel_specs.BACKWARD_DQ_MASK,)),
        ):
            clocks = 0.0
            for spec in kernels:
                kernel = planner.tiled_kernel(spec, problem, on, None)
                described, function = prediction.compiled(kernel, on, causal=causal)
                of = prediction.predict_kernel(function, described, limits=False)
                pairs = kernel.tile.tile_q * kernel.tile.tile_kv
                of_block = CARDS[arch].block_start + HALF_BYTES * pairs / multiprocessor(arch).l2_bytes if spec.sums_scores else 0.0
                clocks += (of.clocks + of_block) / of.blocks / pairs
            found.setdefault(name, []).append(clocks)
    return f'    ("{arch}", {head_dim}): Steady({", ".join(f"{name}={sum(of) / 2:.3f}" for name, of in found.items())}),'


def _tile(text: str) -> Tile:
    match = re.fullmatch(r"(\d+)x(\d+)w(\d+)s(\d+)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form 128x64w4s2")
    return Tile(*map(int, match.groups()))


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the best tiles as lines of predicted_tiles.py."""
    parser = argparse.ArgumentParser(description="Which tiles the timing model finds best.")
    parser.add_argument("--arch", nargs="+", required=True, choices=sorted(CARDS))
    parser.add_argument("--kernel", nargs="+", choices=sorted({name for name, _ in CANDIDATES}))
    parser.add_argument("--dtype", default="float16", choices=("float16", "bfloat16", "float32"))
    parser.add_argument("--head-dim", nargs="+", type=int, choices=(64, 128, 256))
    parser.add_argument("--tile", nargs="+", type=_tile, metavar="128x64w4s2", help="others than the usual candidates")
    parser.add_argument(
        "--steady", action="store_true", help="print the loops of both ways to the gradients instead, for predicted_backward.py"
    )
    parser.add_argument("--mask", action="store_true", help="print what the gradient of a mask takes on both ways, for mask_gradient.py")
    options = parser.parse_args(arguments)
    for arch in options.arch if options.mask else ():
        for line in filter(None, (mask_gradient(arch, head_dim) for head_dim in options.head_dim or (64, 128))):
            print(line, flush=True)
    for arch in options.arch if options.steady else ():
        for head_dim in options.head_dim or (64, 128, 256):
            print("\n".join(steady(arch, head_dim, options.dtype)), flush=True)
    for arch in () if options.steady or options.mask else options.arch:
        for (name, head_dim), texts in CANDIDATES.items():
            if name in (options.kernel or [name]) and head_dim in (options.head_dim or [head_dim]):
                found = best(arch, name, head_dim, options.tile or list(map(_tile, texts.split())), options.dtype)
                if found is not None:
                    tile = found.tile
                    print(
                        f'    ("{arch}", "{name}", {head_dim}): ({tile.tile_q}, {tile.tile_kv}, {tile.num_warps}, {tile.num_stages}),',
                        flush=True,
                    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
