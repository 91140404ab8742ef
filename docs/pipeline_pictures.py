"""Draw the pipeline of a kernel: what its warps do in two steps of their walk, by the clock.

It is a run of the model of an SM (cuflash/timing): the machine code of the kernel's loop, instruction by instruction, and where a warp copies for the others,
that of its loop too. What an instruction is for is said by the line of the kernel that the assembler notes for it, so that names in a picture are those of the
code; but for scores, whose accumulators some kernels call by what they become.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from typing import Any

from kernel_statements import ADDITIONS, TURNS, WAIT, is_product, operation_of, statements
from picture_files import DOCS, fingerprint_of, save

from cuflash.hardware import device
from cuflash.jit import compiler, disassembly
from cuflash.planning import tile_choice
from cuflash.planning.kernel_cases import KernelCase
from cuflash.planning.kernel_plan import KernelPlan
from cuflash.planning.kernel_specs import TILED_KERNELS
from cuflash.planning.offline import offline_kernels
from cuflash.problem.features import FeatureSet
from cuflash.timing import prediction
from cuflash.timing.control_flow import Trace, steady_trace, tile_loop
from cuflash.timing.machine import SUB_PARTITIONS, Multiprocessor, multiprocessor
from cuflash.timing.multiprocessor import Issue, record_roles
from cuflash.timing.operations import Kind, Operation, Role, Unit, operations
from cuflash.timing.roles import Act, role_traces
from cuflash.timing.sass import Function, parse_listing

KERNELS = DOCS.parent / "kernels"
ADDITIVE_MASK = FeatureSet(attn_mask="bfloat16")
CASES: dict[str, dict[str, Any]] = {
    "forward": {"dtype": "bfloat16", "head_dim": 128},
    "forward_split": {"dtype": "bfloat16", "head_dim": 128},
    "forward_wgmma": {"dtype": "bfloat16", "head_dim": 128},
    "forward_wgmma_float32": {"dtype": "float32", "head_dim": 64},
    "forward_wgmma_wide": {"dtype": "bfloat16", "head_dim": 512},
    "forward_jvp": {"dtype": "bfloat16", "head_dim": 128},
    "backward_dkdv": {"dtype": "bfloat16", "head_dim": 128},
    "backward_dq": {"dtype": "bfloat16", "head_dim": 128},
    "backward_fused": {"dtype": "bfloat16", "head_dim": 128},
    "backward_wgmma": {"dtype": "bfloat16", "head_dim": 128},
    "backward_row_sums": {"dtype": "bfloat16", "head_dim": 128, "features": ADDITIVE_MASK},
    "backward_mask": {"dtype": "bfloat16", "head_dim": 128, "features": ADDITIVE_MASK},
}
"""Kernel -> what it is compiled for; the architecture is the one whose clocks were measured (docs/timing.md)."""
ARCH = "sm_90"
SOURCES_BESIDE = {
    "forward_wgmma": ("tile/copier.cuh",),
    "forward_wgmma_float32": ("tile/copier.cuh",),
    "backward_wgmma": ("tile/wgmma_backward_copier.cuh",),
}
"""Kernel -> files beside its own in which its roles are written."""
WARPGROUP_WARPS = 4
LEGEND_COLUMNS = 5

# --- Colours ------------------------------------------------------------------------------------------------------------------------------

REST, OTHER_WORK = "between the products", "other work"  # of warps that compute, and of others
WAIT_BARRIER, WAIT_COPIES, WAIT_PRODUCTS, WAIT_PHASE = (
    "waits for other warps",
    "waits for copies",
    "waits for products",
    "waits at an mbarrier",
)
_COLOURS = {
    "S": "#2b6cb0",
    "S_dot": "#9c36b5",
    "dP": "#9c36b5",
    "O": "#2f9e44",
    "O_dot": "#2f9e44",
    "dV": "#2f9e44",
    "dK": "#0c8599",
    "dQ": "#d6336c",
}  # by what a product makes
_FIXED = {
    ADDITIONS: "#343a40", REST: "#f2c14e", WAIT_PRODUCTS: "#adb5bd", WAIT_BARRIER: "#d9d9d9", WAIT_COPIES: "#c92a2a",
    TURNS: "#8d6e63", OTHER_WORK: "#fbe6a6", WAIT_PHASE: "#e9ecef",
}  # fmt: skip
_COPY = "#e8590c"


def sources_of(kernel: KernelPlan) -> dict[str, list[str]]:
    """Name of a file -> the statement of each of its lines, which count from 1."""
    paths = [KERNELS / name for name in (kernel.source, *SOURCES_BESIDE.get(kernel.name, ()))]
    return {path.name: ["", *statements(path.read_text(encoding="utf-8"))] for path in paths}


def planned(name: str) -> KernelPlan:
    """The kernel with its default tile, which pins it where another one is the default."""
    on, case = device.of_arch(ARCH, "gpu"), KernelCase(TILED_KERNELS[name], **CASES[name])
    tile = {name: tile_choice.default_tile(case, on)}
    kernels = offline_kernels(on, **CASES[name], tile=tile, need_attn_mask_grad=case.kernel.sums_scores, jvp=name == "forward_jvp")
    return next(kernel for kernel in kernels if kernel.name == name)


def fingerprint_of_pipeline(name: str) -> str:
    kernel = planned(name)
    found = (operation_of(statement) for source in sources_of(kernel).values() for statement in source)
    return fingerprint_of([str(kernel.tile), *filter(None, found)])


# --- The run ------------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """What is drawn.

    Attributes:
        kernel: as it is planned.
        blocks: resident on the SM.
        roles: of a block's warps; first those that compute.
        labels: for each role and each instruction of its trip, what that is for.
        machine: the SM.
    """

    kernel: KernelPlan
    blocks: int
    roles: tuple[Role, ...]
    labels: tuple[list[str], ...]
    machine: Multiprocessor

    @functools.cached_property
    def of_warp(self) -> tuple[tuple[int, int], ...]:
        """Block and role of each warp; they are counted role by role, block by block."""
        return tuple((block, number) for block in range(self.blocks) for number, role in enumerate(self.roles) for _ in range(role.warps))

    def operation(self, issue: Issue) -> Operation:
        return self.roles[self.of_warp[issue.warp][1]].trace[issue.position]

    def label(self, issue: Issue) -> str:
        return self.labels[self.of_warp[issue.warp][1]][issue.position]


def main_lines(listing: str, entry: str, sources: Sequence[str]) -> list[tuple[str, int]]:
    """For each instruction of a function, the innermost line of these files that it comes from, 0 for none."""
    lines: list[tuple[str, int]] = []
    inside, fresh, line = False, True, ("", 0)
    for text in listing.splitlines():
        if text.startswith(".text."):
            inside = text == f".text.{entry}:"
        elif not inside:
            continue
        elif place := re.match(r'\s*//## File "([^"]*)", line (\d+)', text):
            if fresh:
                fresh, line = False, ("", 0)
            if not line[1] and Path(place[1]).name in sources:
                line = Path(place[1]).name, int(place[2])
        elif re.match(r"\s*/\*[0-9a-f]{4,}\*/", text):
            fresh = True
            lines.append(line)
    return lines


def traced(name: str) -> Run:
    """A kernel's machine code as the model of an SM runs it."""
    kernel = planned(name)
    request = replace(kernel.request(device.of_arch(ARCH, "gpu")), target="cubin")
    artifact = compiler.compile_kernel(request)  # and not from the cache, whose lines may be those of other comments
    listing = disassembly.disassemble(artifact.data, source_lines=True)
    assert listing is not None, "nvdisasm is missing: pip install 'cuflash[inspect]'"
    function: Function = parse_listing(listing)[kernel.entry]
    sources = sources_of(kernel)
    lines = main_lines(listing, kernel.entry, list(sources))
    assert len(lines) == len(function)
    machine = multiprocessor(ARCH)
    described = prediction.describe(kernel, artifact.resources_of(kernel.entry), request, causal=False)
    traces: tuple[Trace, ...] = role_traces(function, steady_trace(function, tile_loop(function)))
    if len(traces) == 1:
        blocks, roles = prediction.resident_blocks(described), (Role(operations(traces[0].instructions, machine), kernel.tile.num_warps),)
    else:
        predicted = prediction.predict_kernel(function, described, limits=False, staying=False)
        blocks, roles = predicted.blocks, predicted.roles
    last_product = [of for source in sources.values() for of in map(operation_of, source) if of is not None and is_product(of)][-1]
    labels = []
    for role, trace in zip(roles, traces, strict=True):
        places = (lines[of] for of in trace.indices)
        of_trace = [(operation_of(sources[file][line]) if line else None) or REST for file, line in places]
        name_groups(role.trace, of_trace, last_product)
        join_copies(role.trace, of_trace, list(sources.values()))
        labels.append(of_trace)
    for role, labelled in zip(roles, labels, strict=True):
        assert len(role.trace) == len(labelled)
        assert all(is_product(label) for operation, label in zip(role.trace, labelled, strict=True) if operation.matrix), (
            f"{name}: products without a name"
        )
    return Run(kernel, blocks, roles, tuple(labels), machine)


def name_groups(trace: Sequence[Operation], labels: list[str], last: str) -> None:
    """Give all products of a group that a warpgroup issues the name that some of them have: the assembler notes the lines of what it has put between them.
    Where it notes none, they are the last products of the kernel."""
    first = 0
    for position, operation in enumerate(trace):
        if operation.closes:
            group = [of for of in range(first, position + 1) if trace[of].kind is Kind.PRODUCT]
            (label,) = {labels[of] for of in group if is_product(labels[of])} or {last}
            for of in group:
                labels[of] = label
            first = position + 1


def is_copy(operation: Operation) -> bool:
    return operation.kind is Kind.COPY or (operation.meeting is not None and operation.meeting.act is Act.COPY)


def join_copies(trace: Sequence[Operation], labels: list[str], sources: Sequence[Sequence[str]]) -> None:
    """Where copies stand side by side, the assembler may note one line for all: that of which it notes no copy joins the one before it."""
    made = {label for operation, label in zip(trace, labels, strict=True) if is_copy(operation)}
    noted = {label for label in labels if label.startswith("copy")}
    before, joined = "", dict[str, str]()
    for label in dict.fromkeys(operation_of(statement) or "" for source in sources for statement in source):
        if label in made:
            before = label
        elif label in noted and before:
            joined[before] = f"{joined.get(before, before)} and {label.removeprefix('copy of ')}"
    for position, operation in enumerate(trace):
        if is_copy(operation):
            labels[position] = joined.get(labels[position], labels[position])


Span = tuple[float, float, str]


def spans_of(issues: Sequence[Issue], run: Run) -> Iterator[Span]:
    """What one warp does, clock by clock: an instruction until it lets the next one go, and then what the next one waits for."""
    awaited: dict[int, str] = {}  # scoreboard -> what is waited for by it
    computes = run.roles[run.of_warp[issues[0].warp][1]].warps > 1
    rest = REST if computes else OTHER_WORK
    for issue, after in itertools.pairwise(issues):
        own, following = run.operation(issue), run.operation(after)
        if own.write_scoreboard is not None:
            phase = own.meeting is not None and own.meeting.act is Act.WAIT
            awaited[own.write_scoreboard] = (WAIT_COPIES if computes else WAIT_PHASE) if phase else ""
        if own.kind is Kind.BARRIER:
            yield issue.clock, after.clock, WAIT_BARRIER
            continue
        label, later = (rest if text in (WAIT, REST) else text for text in (run.label(issue), run.label(after)))
        end = min(after.clock, issue.clock + max(own.stall, own.clocks if own.kind is not Kind.PRODUCT else 0.0))
        yield issue.clock, end, label
        if after.clock > end:
            by_phase = next((awaited[board] for board in following.waits if awaited.get(board)), "")
            kinds = {Kind.WAIT: WAIT_COPIES, Kind.PRODUCTS_WAIT: WAIT_PRODUCTS}
            yield end, after.clock, kinds.get(following.kind) or by_phase or later


def binned(spans: Sequence[Span], begin: float, end: float, bins: int) -> list[Span]:
    """The same in coarse steps: each shows what took most of it."""
    step = (end - begin) / bins
    shares: list[defaultdict[str, float]] = [defaultdict(float) for _ in range(bins)]
    for start, stop, label in spans:
        for index in range(max(0, int((start - begin) / step)), min(bins, int((stop - begin) / step) + 1)):
            low = begin + index * step
            shares[index][label] += max(0.0, min(stop, low + step) - max(start, low))
    merged: list[Span] = []
    for index, share in enumerate(shares):
        label = max(share, key=lambda name: share[name]) if share else REST
        low = begin + index * step
        if merged and merged[-1][2] == label:
            merged[-1] = (merged[-1][0], low + step, label)
        else:
            merged.append((low, low + step, label))
    return merged


def busy_shares(issues: Sequence[Issue], run: Run, begin: float, end: float, bins: int) -> dict[str, list[float]]:
    """For each product, what share of the matrix units it takes, in coarse steps."""
    step = (end - begin) / bins
    shares: dict[str, list[float]] = {}
    for issue in issues:
        operation = run.operation(issue)
        if operation.unit is not Unit.MATRIX or issue.begun >= end:
            continue
        stop = issue.done if operation.kind is Kind.PRODUCT else issue.clock + operation.clocks
        of_product = shares.setdefault(run.label(issue), [0.0] * bins)
        for index in range(max(0, int((issue.begun - begin) / step)), min(bins, int((stop - begin) / step) + 1)):
            low = begin + index * step
            of_product[index] += max(0.0, min(stop, low + step) - max(issue.begun, low)) / step / SUB_PARTITIONS
    return shares


# --- The picture --------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """Warps that are drawn one below the other under one name."""

    name: str
    warps: tuple[int, ...]
    height: float
    gap: float = 0.0  # above it


def rows_of(run: Run) -> list[Row]:
    """A row for each warp; of a kernel of several roles for each warpgroup, the thin rows of its warps."""
    of_block = sum(role.warps for role in run.roles)
    if len(run.roles) == 1:
        named = "block {0}, warp {1}" if run.blocks > 1 else "warp {1}"
        return [
            Row(named.format(*divmod(warp, of_block)), (warp,), 1.0, 0.4 * (warp % of_block == 0 < warp))
            for warp in range(run.blocks * of_block)
        ]
    ends = list(itertools.accumulate(role.warps for role in run.roles))
    alone = [Row(f"warpgroup 0, warp {role.first}", (end - 1,), 1.0) for role, end in zip(run.roles, ends, strict=True) if role.warps == 1]
    together = [
        Row(
            f"warpgroup {(role.first + first) // WARPGROUP_WARPS}",
            tuple(end - role.warps + first + warp for warp in range(WARPGROUP_WARPS)),
            1.7,
            0.2,
        )
        for role, end in zip(run.roles, ends, strict=True)
        for first in range(0, role.warps - 1, WARPGROUP_WARPS)
    ]
    return alone + together


def title(run: Run, name: str) -> str:
    kernel, tile = run.kernel, run.kernel.tile
    mask = ", additive mask" if kernel.case.features.additive_mask else ""
    rows = "grouped rows" if kernel.spec.splits_keys else "queries"
    warps = f"{tile.num_warps} warps" if len(run.roles) == 1 else f"{tile.num_warps // WARPGROUP_WARPS} warpgroups that compute"
    text = (
        f"{kernel.source}, {CASES[name]['dtype']}, head_dim {CASES[name]['head_dim']}{mask}, tiles of {tile.tile_q} {rows} and {tile.tile_kv} keys, "
        f"{warps}, {tile.num_stages} stage{'s' * (tile.num_stages > 1)}, on the model of an H100"
    )
    return text if len(text) < 150 else text.replace(f", {warps}", f",\n{warps}")


def draw_pipeline(name: str, path: Path) -> None:
    """Two steps of the walk: what each warp of the resident blocks does; below, the copies of the first block and the matrix units."""
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch

    run = traced(name)
    first, trips = (4, 8) if len(run.roles) == 1 else (11, 15)  # from which on steps of warpgroups take equally long
    issues = record_roles(run.roles, run.machine, blocks=run.blocks, trips=trips)
    heads = {issue.trip: issue.clock for issue in issues if issue.warp == 0 and issue.position == 0}
    begin, end = heads[first], heads[first + 2]
    products = list(dict.fromkeys(label for label in run.labels[0] if is_product(label)))
    copies = list(dict.fromkeys(run.label(i) for i in issues if is_copy(run.operation(i))))
    colours = {**_FIXED, **{label: _COLOURS[label.split()[0]] for label in products}}

    rows = rows_of(run)
    units = sum(row.height + row.gap for row in rows) + len(copies) + 1
    figure, (axes, busy) = plt.subplots(2, 1, figsize=(11, 2.5 + 0.27 * units), height_ratios=(units, 2.2), sharex=True)
    height = figure.get_size_inches()[1]
    ticks: list[tuple[float, str]] = []
    shown: set[str] = set()
    top = 0.5
    for row in rows:
        top -= row.gap
        ticks.append((top - row.height / 2, row.name))
        each = row.height / len(row.warps)
        for place, warp in enumerate(row.warps):
            y = top - (place + 0.5) * each
            of_label: dict[str, list[tuple[float, float]]] = {}  # each drawn at once, which is quicker than span by span
            for start, stop, label in binned(list(spans_of([i for i in issues if i.warp == warp], run)), begin, end, 500):
                of_label.setdefault(label, []).append((start - begin, stop - start))
            for label, spans in of_label.items():
                colour = _COPY if label.startswith("copy") else colours[label]
                axes.broken_barh(spans, (y - 0.42 * each, 0.84 * each), color=colour, lw=0)
            shown |= of_label.keys()
        top -= row.height
    for copy in copies:
        top -= 1.0
        ticks.append((top, f"block 0, {copy}" if run.blocks > 1 else copy))
        each = 0.7 / run.kernel.tile.num_stages
        for trip, start, stop in travels(issues, run, copy):  # those into one stage in one line
            bottom = top + 0.35 - (trip % run.kernel.tile.num_stages + 1) * each
            axes.broken_barh([(start - begin, stop - start)], (bottom, each), facecolor=_COPY, edgecolor="white", lw=0.7)
    for clock in (heads[first], heads[first + 1], heads[first + 2]):
        axes.axvline(clock - begin, color="black", lw=0.8, ls=":")
    of_whom = " of warpgroup 1" if len(run.roles) > 1 else ""
    for step, trip in ((f"step j{of_whom}", first), (f"step j + 1{of_whom}", first + 1)):
        axes.text((heads[trip] + heads[trip + 1]) / 2 - begin, 0.75, step, ha="center", va="bottom", fontsize=9)
    axes.set_ylim(top - 0.7, 0.7)
    axes.set_yticks([y for y, _ in ticks], [text for _, text in ticks], fontsize=8.5)
    axes.tick_params(axis="x", length=0)

    bins = 160
    shares = busy_shares(issues, run, begin, end, bins)
    clocks = [(index + 0.5) * (end - begin) / bins for index in range(bins)]
    below = [0.0] * bins
    for product in products:
        above = [min(1.0, low + share) for low, share in zip(below, shares.get(product, below), strict=True)]
        busy.fill_between(clocks, below, above, step="mid", color=colours[product], lw=0)
        below = above
    busy.set_ylim(0, 1)
    busy.set_yticks([0, 1], ["idle", "matrix units busy"], fontsize=8.5)
    busy.set_xlim(0, end - begin)
    busy.set_xlabel("clocks of the SM", fontsize=9)
    busy.tick_params(axis="x", labelsize=8.5)
    text = title(run, name)
    figure.suptitle(text, fontsize=9.5, y=1 - 0.1 / height, va="top")
    legend = [Patch(color=colours[label], label=label) for label in (*products, *(label for label in _FIXED if label in shown))]
    legend.append(Patch(color=_COPY, label="copies: issued; on their way"))
    figure.legend(handles=legend, loc="lower center", ncol=LEGEND_COLUMNS, fontsize=8.5, frameon=False)
    lines, top_lines = ceil(len(legend) / LEGEND_COLUMNS), text.count("\n")
    figure.subplots_adjust(
        left=0.16, right=0.985, top=1 - (0.55 + 0.16 * top_lines) / height, bottom=(0.55 + 0.2 * lines) / height, hspace=0.08
    )
    save(figure, path, fingerprint_of_pipeline(name))
    plt.close(figure)


def travels(issues: Sequence[Issue], run: Run, copy: str) -> Iterator[tuple[int, float, float]]:
    """In which trip and from when to when each copy of the first block is on its way."""
    of_trip: dict[int, list[Issue]] = {}
    for issue in issues:
        if run.of_warp[issue.warp][0] == 0 and run.label(issue) == copy and is_copy(run.operation(issue)):
            of_trip.setdefault(issue.trip, []).append(issue)
    for trip, travelling in of_trip.items():
        yield trip, min(issue.clock for issue in travelling), max(issue.done for issue in travelling)
