"""Steady states of kernels on an H100 with each score feature, by the timing model: makes cuflash/planning/loops_sm_90.csv, from which plans take what to expect of kernels of wgmma
and of those of mma.sync.

    python benchmarks/predicted_loops.py --write                                              # all lines that are missing
    python benchmarks/predicted_loops.py --write --again --kernel forward_wgmma --feature bool
    python benchmarks/predicted_loops.py --kernel backward_wgmma --head-dim 192x128           # prints what the lines would be
    python benchmarks/predicted_loops.py --publish                                            # what calls take by these lines, to docs/performance.md

float16, or float32 where a kernel's name is followed by it, default tiles. Lines of other kernels, head dimensions and features are kept, so a kernel that learns something needs its own lines only; one that cannot run, or that the
model does not know, has none. Needs no GPU, and some ten seconds for a line.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from cuflash.cli import samples
from cuflash.cli.sample_features import SampleFeatures
from cuflash.cli.samples import Sample
from cuflash.errors import CuflashError
from cuflash.hardware import device
from cuflash.planning import (
    fused_backward,
    kernel_specs,
    planner,
    predicted_loops,
    predicted_wgmma,
    tile_choice,
    wgmma_backward,
    wgmma_forward,
    wide_forward,
)
from cuflash.planning.kernel_cases import case_of
from cuflash.planning.kernel_plan import KernelPlan
from cuflash.planning.kernel_specs import (
    BACKWARD_FUSED,
    FORWARD_WGMMA,
    FORWARD_WGMMA_FLOAT32,
    FORWARD_WGMMA_WIDE,
    TILED_KERNELS,
    KernelSpec,
)
from cuflash.planning.predicted_loops import ARCH, Key
from cuflash.planning.predicted_time import Steady
from cuflash.problem.problem import Problem
from cuflash.timing import prediction
from cuflash.timing.machine import multiprocessor
from cuflash.timing.multiprocessor import steady_clocks_of_roles
from cuflash.tuned.store import untuned
from marked_pages import PERFORMANCE, print_prediction

ON = device.of_arch(ARCH, "gpu")
FORWARD, BACKWARD = (
    ("forward", "forward_wgmma", "forward_wgmma_wide", "forward float32", "forward_wgmma_float32"),
    (
        "backward_dkdv",
        "backward_dv",
        "backward_dk",
        "backward_dq",
        "backward_fused",
        "backward_wgmma",
        "backward_wgmma_dv",
        "backward_wgmma_dkdq",
    ),
)
KERNELS = (*FORWARD, *BACKWARD)
HEAD_DIMS = ((64, 64), (128, 128), (256, 256), (96, 96), (192, 128), (192, 192))
FORWARD_ROOMS = {FORWARD_WGMMA: wgmma_forward, FORWARD_WGMMA_FLOAT32: wgmma_forward, FORWARD_WGMMA_WIDE: wide_forward}
"""The modules that decide about the forward kernels of wgmma; `wgmma_backward` decides about the others."""
SAMPLE = Sample(seqlen_q=1024, seqlen_kv=1024, num_heads_q=256, num_heads_kv=256)
"""With so many heads that blocks share out nothing (query_splits.py): their loops are the same."""
CALLS: dict[str, Sample] = {
    "": SAMPLE,
    "window": replace(SAMPLE, features=SampleFeatures(window=(512, 512))),
    "softcap": replace(SAMPLE, features=SampleFeatures(softcap=30.0)),
    "dropout": replace(SAMPLE, features=SampleFeatures(dropout=0.1)),
    "alibi": replace(SAMPLE, features=SampleFeatures(alibi=True)),
    "sinks": replace(SAMPLE, features=SampleFeatures(sinks=True)),
    "bool": replace(SAMPLE, features=SampleFeatures(attn_mask="bool")),
    "float16": replace(SAMPLE, features=SampleFeatures(attn_mask="float16")),
    "float32": replace(SAMPLE, features=SampleFeatures(attn_mask="float32")),
    "segments": replace(SAMPLE, features=SampleFeatures(segments=2)),
    "prefix": replace(SAMPLE, features=SampleFeatures(prefix=64)),
    "varlen": replace(SAMPLE, lengths_q=(1024,)),
    "seqlens_kv": replace(SAMPLE, lengths_kv=(1024,)),
}
"""The features and kinds of lengths of `predicted_loops`, of which a call has one."""
NAMES = {
    "bool": "boolean mask",
    "float16": "float16 mask",
    "float32": "float32 mask",
    "prefix": "prefix, causal",
    "varlen": "packed sequences",
    "seqlens_kv": "`seqlens_kv`",
}


def problem_of(key: Key) -> Problem:
    """A call whose kernel a line is of."""
    dtype = "float32" if "float32" in key.kernel else SAMPLE.dtype
    sample = replace(CALLS[key.feature], dtype=dtype, head_dim=key.head_dim, head_dim_v=key.head_dim_v, is_causal=key.is_causal)
    return samples.plan_of(sample, backward=_spec(key).backward).problem


def _spec(key: Key) -> KernelSpec:
    return TILED_KERNELS[key.kernel.removesuffix(" float32")]


def kernel_of(key: Key) -> KernelPlan | None:
    """The kernel of a line; None where it cannot run, or has too many registers to be a way of its own."""
    spec, problem = _spec(key), problem_of(key)
    with untuned():
        if not tile_choice.legal_tiles_for(case_of(spec, problem), ON):
            return None
        if spec.implementation == "wgmma" and FORWARD_ROOMS.get(spec, wgmma_backward).why_not(problem, ON) is not None:
            return None
        if spec.implementation == "wgmma" and spec.backward and spec not in wgmma_backward.kernels(problem):
            return None
        if spec.added_up and spec.implementation == "mma" and tile_choice.known_tile(case_of(spec, problem), ON) is None:
            return None
        if spec.name in ("backward_dkdv", "backward_dv", "backward_dk") and spec not in planner.kernels_of_their_own(problem, ON):
            return None
        return planner.tiled_kernel(spec, problem, ON, None)


def loop_of(key: Key) -> Steady | None:
    """What the model finds; None where it finds nothing."""
    kernel = kernel_of(key)
    if kernel is None:
        return None
    described, function = prediction.compiled(kernel, ON, causal=key.is_causal)
    whole = prediction.predict_kernel(function, described, limits=False)
    apart = kernel.spec.implementation == "wgmma" or key.feature in predicted_loops.BY_DATA
    masked = prediction.predict_kernel(function, described, limits=False, masked=True, staying=False) if apart else whole
    alone = whole.clocks if whole.blocks == 1 else steady_clocks_of_roles(whole.roles, multiprocessor(ARCH), blocks=1)
    pairs = kernel.tile.tile_q * kernel.tile.tile_kv
    per_pair = alone / pairs, whole.clocks / whole.blocks / pairs
    return Steady(
        whole.blocks,
        round(per_pair[0], 4),
        round(per_pair[1], 4),
        round(masked.clocks / whole.clocks, 3),
        round(whole.between_tiles or 0.0),
    )


def keys(options: argparse.Namespace) -> Iterator[Key]:
    """Of the lines that are asked for, those first that matter most."""
    dims = [(int(d), int(v or d)) for d, _, v in (text.partition("x") for text in options.head_dim or ())] or HEAD_DIMS
    features = options.feature if options.feature is not None else list(CALLS)
    masks = {"no": (False,), "yes": (True,)}.get(options.causal, (False, True))
    for feature, (head_dim, head_dim_v), causal, kernel in itertools.product(features, dims, masks, options.kernel or KERNELS):
        if causal or feature != "prefix":
            yield Key(kernel, head_dim, head_dim_v, feature, causal)


# --- What calls take ----------------------------------------------------------------------------------------------------------------------

TOKENS, HIDDEN = 16384, 2048
SEQLENS = 256, 512, 1024, 2048, 4096, 16384


def ratio(sample: Sample, *, backward: bool) -> str:
    """Predicted time of the kernel of wgmma over that of those of mma.sync, bold where it is not taken; a dash where it cannot run, or nothing is predicted."""
    problem = samples.plan_of(sample, backward=backward).problem
    room = wgmma_backward if backward else wgmma_forward
    if room.why_not(problem, ON) is not None:
        return "–"
    if backward:
        own = planner.kernels_of_their_own(problem, ON)
        others = (BACKWARD_FUSED,) if fused_backward.choose(problem, ON, None, own).is_taken else own
        section = fused_backward.heads_together(problem, ON)
    else:
        others, section = (kernel_specs.FORWARD,), 0
    of = wgmma_backward.kernels(problem) if backward else (wgmma_forward.kernel(problem),)
    found = predicted_wgmma.compare(
        [case_of(kernel, problem) for kernel in of], [case_of(other, problem) for other in others], problem, ON, section
    )
    if found is None:
        return "–"
    return f"{found.ratio:.2f}" if found.gains else f"**{found.ratio:.2f}**"


def of_length(sample: Sample, seqlen: int, head_dim: int, head_dim_v: int, *, is_causal: bool) -> Sample:
    """A call of the protocol's size."""
    batch, heads = TOKENS // seqlen, max(1, HIDDEN // head_dim)
    lengths = {name: batch * (seqlen,) for name in ("lengths_q", "lengths_kv") if getattr(sample, name) is not None}
    return replace(
        sample, batch=batch, seqlen_q=seqlen, seqlen_kv=seqlen, num_heads_q=heads, num_heads_kv=heads, head_dim=head_dim,
        head_dim_v=head_dim_v, is_causal=is_causal, **lengths,
    )  # fmt: skip


def ratio_lines() -> Iterator[str]:
    """The tables of docs/performance.md."""
    yield f"| pass | head_dim | causal | {' | '.join(map(str, SEQLENS))} | one head of 4096 |"
    yield "| --- " * (4 + len(SEQLENS)) + "|"
    for backward, (head_dim, head_dim_v), causal in itertools.product((False, True), sorted(HEAD_DIMS), (False, True)):
        calls = [of_length(SAMPLE, seqlen, head_dim, head_dim_v, is_causal=causal) for seqlen in SEQLENS]
        one = Sample(1, 4096, 4096, head_dim=head_dim, head_dim_v=head_dim_v, is_causal=causal)
        cells = " | ".join(ratio(call, backward=backward) for call in (*calls, one))
        dims = head_dim if head_dim == head_dim_v else f"{head_dim}/{head_dim_v}"
        yield f"| {'backward' if backward else 'forward'} | {dims} | {'yes' if causal else 'no'} | {cells} |"
    yield ""
    columns = [(backward, dims) for backward in (False, True) for dims in ((64, 64), (128, 128), (192, 128), (256, 256))]
    names = (f"{'backward' if backward else 'forward'} {d if d == v else f'{d}/{v}'}" for backward, (d, v) in columns)
    yield f"| 4096, full, with | {' | '.join(names)} |"
    yield "| --- " * (1 + len(columns)) + "|"
    for feature, sample in CALLS.items():
        if feature:
            calls = ((backward, of_length(sample, 4096, *dims, is_causal=feature == "prefix")) for backward, dims in columns)
            yield f"| {NAMES.get(feature, feature)} | {' | '.join(ratio(call, backward=backward) for backward, call in calls)} |"


# --- The file -----------------------------------------------------------------------------------------------------------------------------


def write(table: dict[Key, Steady]) -> None:
    """The file, in order."""
    with predicted_loops.PATH.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow((*Key._fields, *Steady._fields))
        for key in sorted(table):
            writer.writerow((*key[:-1], int(key.is_causal), *(f"{number:g}" for number in table[key])))


def main(arguments: Sequence[str] | None = None) -> int:
    """Print lines, and with --write put them into the file."""
    parser = argparse.ArgumentParser(description="Steady states of kernels on an H100, by the timing model.")
    parser.add_argument("--kernel", nargs="+", choices=KERNELS)
    parser.add_argument("--head-dim", nargs="+", metavar="D[xDV]", help="such as 64 or 192x128")
    parser.add_argument("--feature", nargs="+", choices=list(CALLS), help="'' for none")
    parser.add_argument("--causal", choices=("no", "yes"), help="with or without a causal mask alone")
    parser.add_argument("--write", action="store_true", help=f"into {predicted_loops.PATH.name}")
    parser.add_argument("--again", action="store_true", help="lines that are there, too")
    parser.add_argument("--publish", action="store_true", help=f"which calls take kernels of wgmma, to docs/{PERFORMANCE.name}")
    options = parser.parse_args(arguments)
    if options.publish:
        print_prediction(Path(__file__).name, ratio_lines(), publish=True)
        return 0
    for key in keys(options):
        known = predicted_loops.read()
        if key in known and options.write and not options.again:
            continue
        try:
            found = loop_of(key)
        except CuflashError as error:
            print(f"{key}: {error}".partition("\n")[0], file=sys.stderr, flush=True)
            continue
        if found is not None:
            print(*key, *found, sep=",", flush=True)
            if options.write:
                write(predicted_loops.read() | {key: found})
    return 0


if __name__ == "__main__":
    sys.exit(main())
