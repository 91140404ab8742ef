"""Draw the pictures of docs/pictures: the way of a call through the modules, and the pipeline of each kernel. No GPU is needed.

    python docs/draw_pictures.py                  # all of them
    python docs/draw_pictures.py way_of_a_call    # one

The way of a call is read from docs/design.md and from the imports of the modules, as tests/test_rooms.py reads them. A pipeline is a run of the model of
an SM (cuflash/timing): the machine code of the kernel's loop, instruction by instruction. What an instruction is for is said by the line of the kernel that
the assembler notes for it, so that names in a picture are those of the code.

Each file carries the fingerprint of what it was drawn from: steps, floors and imports; or the tile and the operations of the kernel's loop.
Comments and machine code are not part of it. tests/test_docs.py compares.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import io
import itertools
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # cuflash of this clone, whether it is installed or not

import cuflash
from cuflash.hardware import device
from cuflash.jit import compiler, disassembly
from cuflash.planning import tile_choice
from cuflash.planning.kernel_cases import KernelCase
from cuflash.planning.kernel_plan import KernelPlan
from cuflash.planning.kernel_specs import TILED_KERNELS
from cuflash.planning.offline import offline_kernels
from cuflash.problem.features import FeatureSet
from cuflash.timing import prediction
from cuflash.timing.control_flow import steady_trace, tile_loop
from cuflash.timing.machine import Multiprocessor, multiprocessor
from cuflash.timing.multiprocessor import Issue, record
from cuflash.timing.operations import Kind, Operation, Unit, operations
from cuflash.timing.sass import Function, parse_listing

DOCS = Path(__file__).resolve().parent
FOLDER = DOCS / "pictures"
PACKAGE = Path(cuflash.__file__).parent
KERNELS = DOCS.parent / "kernels"

ADDITIVE_MASK = FeatureSet(attn_mask="bfloat16")
CASES: dict[str, dict[str, Any]] = {
    "forward": {"dtype": "bfloat16", "head_dim": 128},
    "backward_dkdv": {"dtype": "bfloat16", "head_dim": 128},
    "backward_dq": {"dtype": "bfloat16", "head_dim": 128},
    "backward_fused": {"dtype": "bfloat16", "head_dim": 128},
    "backward_row_sums": {"dtype": "bfloat16", "head_dim": 128, "features": ADDITIVE_MASK},
    "backward_mask": {"dtype": "bfloat16", "head_dim": 128, "features": ADDITIVE_MASK},
}
"""Kernel -> what it is compiled for; the architecture is the one whose clocks were measured (docs/timing.md)."""
ARCH = "sm_90"
DPI = 110


# --- Files --------------------------------------------------------------------------------------------------------------------------------


def fingerprint_of(lines: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def save(figure: Any, path: Path, fingerprint: str) -> None:
    """With few colours, which is a third of the bytes."""
    from PIL import Image, PngImagePlugin

    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=DPI)
    text = PngImagePlugin.PngInfo()
    text.add_text("Description", fingerprint)
    Image.open(drawn).convert("RGB").quantize(64, dither=Image.Dither.NONE).save(path, optimize=True, pnginfo=text)


def fingerprint_in(path: Path) -> str:
    """What `save` wrote into a picture."""
    match = re.search(rb"tEXtDescription\0([0-9a-f]{16})", path.read_bytes())
    return match[1].decode() if match else ""


# --- The way of a call --------------------------------------------------------------------------------------------------------------------


def picture_in_design(heading: str) -> list[str]:
    """The lines of the first picture below a heading of docs/design.md."""
    text = (DOCS / "design.md").read_text(encoding="utf-8")
    return text[text.index(f"## {heading}\n") :].split("```\n")[1].splitlines()


def steps_of_a_call() -> list[tuple[str, str]]:
    """Step -> its module, in the order of a new forward call."""
    found = [re.fullmatch(r" *([\w.]+) +.*?(\S+\.py)", line) for line in picture_in_design("One call, a straight line")]
    return [(step[1], step[2]) for step in found if step]


def floors() -> list[str]:
    """Rooms, the uppermost first; a file that is no room stands for itself."""
    names = (re.match(r"[\w./]+(?:  ?[\w./]+)*", line) for line in picture_in_design("Rooms"))
    return [name.rstrip("/") for line in names if line for name in line[0].split()]


def imports(module: str) -> list[str]:
    """Modules of the package that a module imports when it is loaded, or where a function first needs them."""
    found: dict[str, None] = {}
    for node in ast.walk(ast.parse((PACKAGE / module).read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "cuflash":
            base = "/".join(node.module.split(".")[1:])
            for name in node.names:
                for path in (f"{base}/{name.name}.py".lstrip("/"), f"{base}.py", f"{base}/__init__.py"):
                    if (PACKAGE / path).is_file():
                        found[path] = None
                        break
    return list(found)


def way_of_a_call() -> tuple[list[str], list[tuple[str, str]], list[dict[str, list[str]]]]:
    """Floors that a call comes through; its steps; for each step, what its module brings in that no step before has, by floor."""
    steps = steps_of_a_call()
    own = {module for _, module in steps}
    seen: set[str] = set(own)
    brought: list[dict[str, list[str]]] = []
    for _, module in steps:
        by_floor: dict[str, list[str]] = {}
        for found in imports(module):
            if found not in seen and found != "errors.py":
                by_floor.setdefault(found.split("/")[0], []).append(
                    Path(found).stem if "__init__" not in found else Path(found).parent.name
                )
                seen.add(found)
        brought.append(by_floor)
    used = {module.split("/")[0] for module in own} | {floor for by_floor in brought for floor in by_floor}
    return [floor for floor in floors() if floor in used], steps, brought


def fingerprint_of_the_way() -> str:
    rooms, steps, brought = way_of_a_call()
    return fingerprint_of([*rooms, *map(str, steps), *map(str, brought)])


def draw_way_of_a_call(path: Path) -> None:
    """Floors from top to bottom, steps from left to right; below each step what its module imports."""
    import matplotlib.pyplot as plt
    from matplotlib.patches import FancyArrowPatch

    rooms, steps, brought = way_of_a_call()
    columns = [(module.split("/")[0], by_floor) for (_, module), by_floor in zip(steps, brought, strict=True)]
    step_height, line_height, gap, width, left = 0.62, 0.27, 0.24, 2.05, 2.25
    heights = {
        room: 2 * gap + max((step_height + gap) * (own == room) + line_height * len(by_floor.get(room, ())) for own, by_floor in columns)
        for room in rooms
    }
    tops = {room: -sum(heights[above] for above in rooms[:index]) for index, room in enumerate(rooms)}
    total, height = left + width * len(steps), sum(heights.values())
    figure, axes = plt.subplots(figsize=(total * 0.66, height * 0.66), dpi=DPI)
    for index, room in enumerate(rooms):
        axes.axhspan(tops[room] - heights[room], tops[room], color=("#f2f2f2", "#ffffff")[index % 2], zorder=0)
        axes.text(0.1, tops[room] - gap, room if room.endswith(".py") else f"{room}/", va="top", fontsize=11, weight="bold")
    boxes = []
    for column, ((step, module), (own, by_floor)) in enumerate(zip(steps, columns, strict=True)):
        x = left + width * (column + 0.5)
        name = step if len(step) < 16 else step.replace("_product_", "_product_\n") if "_product_" in step else step
        y = tops[own] - gap
        boxes.append(axes.text(x, y - step_height / 2, f"{column + 1}  {name}\n{Path(module).name}", ha="center", va="center", fontsize=9.5, zorder=4,
                               bbox={"boxstyle": "round,pad=0.35", "fc": "#cfe3f7", "ec": "#2b6cb0"}))  # fmt: skip
        for room, names in by_floor.items():
            top = tops[room] - gap - (step_height + gap) * (room == own)
            axes.plot([x, x], [y, top], color="#999999", lw=1, zorder=1)
            axes.text(x, top, "\n".join(names), ha="center", va="top", fontsize=8.5, zorder=3,
                      bbox={"boxstyle": "round,pad=0.2", "fc": "white", "ec": "#999999"})  # fmt: skip
    axes.set_xlim(0, total)
    axes.set_ylim(-height, 0)
    axes.axis("off")
    figure.subplots_adjust(0, 0, 1, 1)
    figure.canvas.draw()  # after which boxes have their places
    for here, there in itertools.pairwise(boxes):
        places, patches = (here.get_position(), there.get_position()), (here.get_bbox_patch(), there.get_bbox_patch())
        bends = (
            "arc3"
            if places[0][1] == places[1][1]
            else "angle,angleA=0,angleB=90"
            if places[0][1] > places[1][1]
            else "angle,angleA=90,angleB=0"
        )
        arrow = FancyArrowPatch(*places, patchA=patches[0], patchB=patches[1], connectionstyle=bends, arrowstyle="-|>", mutation_scale=13)
        arrow.set(color="#2b6cb0", linewidth=1.6, zorder=2)
        axes.add_patch(arrow)
    save(figure, path, fingerprint_of_the_way())
    plt.close(figure)


# --- Pipelines ----------------------------------------------------------------------------------------------------------------------------

REST, WAIT_BARRIER, WAIT_COPIES = "between the products", "waits for other warps", "waits for copies"
ADDITIONS = "additions in global memory"
_COLOURS = {
    "S": "#2b6cb0",
    "P": "#2b6cb0",
    "dP": "#9c36b5",
    "dS": "#9c36b5",
    "O": "#2f9e44",
    "dV": "#2f9e44",
    "dK": "#0c8599",
    "dQ": "#d6336c",
}  # by what a product makes
_FIXED = {REST: "#f2c14e", WAIT_BARRIER: "#d9d9d9", WAIT_COPIES: "#c92a2a", ADDITIONS: "#343a40"}
_COPY = "#e8590c"
_OPERATION = re.compile(
    r"multiply_rows\((?P<c>\w+), (?P<a>\w+), \w+, (?P<b>\w+)\)|multiply_accumulator\((?P<sum>\w+), (?P<p>\w+), (?P<by>\w+)\)"
    r"|gemm_columns<.*?>\((?P<shared>\w+), \S+?\((?P<of>\w+)_smem,.*?\((?P<rows>\w+)_smem,|add_to_sums\((?P<added>\w+),"
    r"|(?P<copied>\w+?)(?:_loader\.issue|_of\(step\)\.issue|\.load)\(|(?P<wait>wait_for_tiles|begin_step|end_step)\b"
)


def statements(source: str) -> list[str]:
    """For each line of a file, without comments, the whole statement that it belongs to; one that ends in the middle of a line is that line."""
    lines = [line.partition("//")[0].strip() for line in source.splitlines()]
    found: list[str] = []
    while len(found) < len(lines):
        first = len(found)
        last = next((i for i in range(first, len(lines)) if lines[i].endswith((";", "{", "}")) or not lines[i]), len(lines) - 1)
        found += [" ".join(lines[first : last + 1])] * (last + 1 - first)
    return found


def operation_of(statement: str) -> str | None:
    """What a statement of a kernel's loop does, in the names of the code; None where it is neither a product nor a copy nor a wait."""
    match = _OPERATION.search(statement)
    if match is None:
        return None
    if match["c"]:
        return f"{match['c']} = {match['a']} {match['b']}ᵀ"
    if match["sum"]:
        return f"{match['sum']} += {match['p']} {match['by']}"
    if match["shared"]:
        return f"{match['shared']} = {match['of']} {match['rows']}"
    if match["added"]:
        return ADDITIONS
    return f"copy of {match['copied']}" if match["copied"] else match["wait"]


def planned(name: str) -> KernelPlan:
    """The kernel with its default tile, which pins it where another way to the gradients is the faster one."""
    on, case = device.of_arch(ARCH, "gpu"), KernelCase(TILED_KERNELS[name], **CASES[name])
    tile = {name: tile_choice.default_tile(case, on)}
    kernels = offline_kernels(on, **CASES[name], tile=tile, need_attn_mask_grad=case.kernel.sums_scores)
    return next(kernel for kernel in kernels if kernel.name == name)


def fingerprint_of_pipeline(name: str) -> str:
    kernel = planned(name)
    source = statements((KERNELS / kernel.source).read_text(encoding="utf-8"))
    return fingerprint_of([str(kernel.tile), *(found for statement in source if (found := operation_of(statement)))])


def main_lines(listing: str, entry: str, source: str) -> list[int]:
    """For each instruction of a function, the line of the kernel's own file that it comes from, 0 for none."""
    lines: list[int] = []
    inside, fresh, line = False, True, 0
    for text in listing.splitlines():
        if text.startswith(".text."):
            inside = text == f".text.{entry}:"
        elif not inside:
            continue
        elif place := re.match(r'\s*//## File "([^"]*)", line (\d+)', text):
            if fresh:
                fresh, line = False, 0
            if not line and Path(place[1]).name == source:
                line = int(place[2])
        elif re.match(r"\s*/\*[0-9a-f]{4,}\*/", text):
            fresh = True
            lines.append(line)
    return lines


def traced(name: str) -> tuple[KernelPlan, int, tuple[Operation, ...], list[str], Multiprocessor]:
    """A kernel, its resident blocks, one trip of a warp through its loop, and what each instruction of that is for."""
    kernel = planned(name)
    request = replace(kernel.request(device.of_arch(ARCH, "gpu")), target="cubin")
    artifact = compiler.compile_kernel(request)  # and not from the cache, whose lines may be those of other comments
    listing = disassembly.disassemble(artifact.data, source_lines=True)
    assert listing is not None, "nvdisasm is missing: pip install 'cuflash[inspect]'"
    function: Function = parse_listing(listing)[kernel.entry]
    lines = main_lines(listing, kernel.entry, kernel.source)
    assert len(lines) == len(function)
    source = ["", *statements((KERNELS / kernel.source).read_text(encoding="utf-8"))]
    trace = steady_trace(function, tile_loop(function))
    machine = multiprocessor(ARCH)
    described = prediction.describe(kernel, artifact.resources_of(kernel.entry), request, causal=False)
    labels = [operation_of(source[lines[index]]) or REST for index in trace.indices]
    return kernel, prediction.resident_blocks(described), operations(trace.instructions, machine), labels, machine


Span = tuple[float, float, str]


def spans_of(issues: Sequence[Issue], trace: Sequence[Operation], labels: Sequence[str]) -> Iterator[Span]:
    """What one warp does, clock by clock: an instruction until it lets the next one go, and then what the next one waits for."""
    for issue, after in itertools.pairwise(issues):
        own, following = trace[issue.position], trace[after.position]
        end = min(after.clock, issue.clock + max(own.stall, own.clocks))
        waits = labels[issue.position] in ("wait_for_tiles", "begin_step", "end_step")
        if own.kind is Kind.BARRIER:
            yield issue.clock, after.clock, WAIT_BARRIER
            continue
        yield issue.clock, end, REST if waits else labels[issue.position]
        if after.clock > end:
            later = labels[after.position]
            yield end, after.clock, WAIT_COPIES if following.kind is Kind.WAIT else REST if later.endswith(("tiles", "step")) else later


def binned(spans: Sequence[Span], begin: float, end: float, bins: int) -> list[Span]:
    """The same in coarse steps: each shows what took most of it."""
    step = (end - begin) / bins
    shares: list[Counter[str]] = [Counter() for _ in range(bins)]
    for start, stop, label in spans:
        for index in range(max(0, int((start - begin) / step)), min(bins, int((stop - begin) / step) + 1)):
            low = begin + index * step
            shares[index][label] += max(0.0, min(stop, low + step) - max(start, low))  # type: ignore[assignment]
    merged: list[Span] = []
    for index, share in enumerate(shares):
        label = max(share, key=lambda name: share[name]) if share else REST
        low = begin + index * step
        if merged and merged[-1][2] == label:
            merged[-1] = (merged[-1][0], low + step, label)
        else:
            merged.append((low, low + step, label))
    return merged


def draw_pipeline(name: str, path: Path) -> None:
    """Two steps of the walk: a row for each warp of the resident blocks; below, the copies of the first block and the matrix units."""
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch

    kernel, blocks, trace, labels, machine = traced(name)
    warps = kernel.tile.num_warps
    issues = record(trace, machine, warps=warps, blocks=blocks, trips=8)
    heads = {issue.trip: issue.clock for issue in issues if issue.warp == 0 and issue.position == 0}
    begin, end = heads[4], heads[6]
    colours = dict(_FIXED)
    products = dict.fromkeys(label for label in labels if "=" in label)
    colours |= {label: _COLOURS[label.split()[0]] for label in products}
    copies = list(dict.fromkeys(label for label in labels if label.startswith("copy")))
    colours |= dict.fromkeys(copies, _COPY)

    rows = warps * blocks
    figure, (axes, units) = plt.subplots(
        2, 1, figsize=(11, 1.9 + 0.27 * (rows + len(copies)) + 0.6), height_ratios=(rows + len(copies) + 1, 2.2), sharex=True
    )
    names: list[tuple[float, str]] = []
    shown = {*products, REST, WAIT_BARRIER}
    for warp in range(rows):
        own = [issue for issue in issues if issue.warp == warp]
        y = -warp - 0.4 * (warp // warps)
        names.append((y, f"block {warp // warps}, warp {warp % warps}" if blocks > 1 else f"warp {warp}"))
        for start, stop, label in binned(list(spans_of(own, trace, labels)), begin, end, 500):
            axes.broken_barh([(start - begin, stop - start)], (y - 0.42, 0.84), color=colours[label], lw=0)
            shown.add(label)
    for row, copy in enumerate(copies):
        y = names[rows - 1][0] - 1.5 - row
        names.append((y, f"block 0, {copy}" if blocks > 1 else copy))
        for trip in sorted({issue.trip for issue in issues}):
            travelling = [
                i
                for i in issues
                if i.warp < warps and i.trip == trip and labels[i.position] == copy and trace[i.position].kind is Kind.COPY
            ]
            if travelling:
                first, last = min(i.clock for i in travelling), max(i.done for i in travelling)
                axes.broken_barh([(first - begin, last - first)], (y - 0.3, 0.6), facecolor=_COPY, edgecolor="white", lw=1)
    for clock in (heads[4], heads[5], heads[6]):
        axes.axvline(clock - begin, color="black", lw=0.8, ls=":")
    for step, trip in (("step j", 4), ("step j + 1", 5)):
        axes.text((heads[trip] + heads[trip + 1]) / 2 - begin, 0.75, step, ha="center", va="bottom", fontsize=9)
    axes.set_ylim(names[-1][0] - 0.7, 0.7)
    axes.set_yticks([y for y, _ in names], [text for _, text in names], fontsize=8.5)
    axes.tick_params(axis="x", length=0)

    bins = 160
    busy = [0.0] * bins
    for issue in issues:
        if trace[issue.position].unit is Unit.MATRIX and begin <= issue.clock < end:
            busy[int((issue.clock - begin) / (end - begin) * bins)] += trace[issue.position].clocks / 4
    step = (end - begin) / bins
    units.fill_between([(i + 0.5) * step for i in range(bins)], [min(1.0, b / step) for b in busy], step="mid", color="#666666", lw=0)
    units.set_ylim(0, 1)
    units.set_yticks([0, 1], ["idle", "matrix units busy"], fontsize=8.5)
    units.set_xlim(0, end - begin)
    units.set_xlabel("clocks of the SM", fontsize=9)
    units.tick_params(axis="x", labelsize=8.5)
    tile, mask = kernel.tile, ", additive mask" if kernel.case.features.additive_mask else ""
    height = figure.get_size_inches()[1]
    figure.suptitle(
        f"{kernel.source}, {CASES[name]['dtype']}, head_dim {CASES[name]['head_dim']}{mask}, tiles of {tile.tile_q} queries and {tile.tile_kv} keys, "
        f"{warps} warps, {tile.num_stages} stage{'s' * (tile.num_stages > 1)}, on the model of an H100",
        fontsize=9.5, y=1 - 0.14 / height,
    )  # fmt: skip
    legend = [
        Patch(color=colours[label], label=label) for label in (*products, ADDITIONS, REST, WAIT_BARRIER, WAIT_COPIES) if label in shown
    ] + [Patch(color=_COPY, label="copies: issued; on their way")]
    figure.legend(handles=legend, loc="lower center", ncol=min(5, len(legend)), fontsize=8.5, frameon=False)
    figure.subplots_adjust(left=0.16, right=0.985, top=1 - 0.55 / height, bottom=0.95 / height, hspace=0.08)
    save(figure, path, fingerprint_of_pipeline(name))
    plt.close(figure)


# --- All --------------------------------------------------------------------------------------------------------------------------------

PICTURES: dict[str, tuple[Callable[[Path], None], Callable[[], str]]] = {
    "way_of_a_call": (draw_way_of_a_call, fingerprint_of_the_way),
    **{name: (partial(draw_pipeline, name), partial(fingerprint_of_pipeline, name)) for name in CASES},
}
"""Name of a file below docs/pictures -> what draws it, and the fingerprint of what it would be drawn from now."""


def main() -> None:
    import matplotlib

    matplotlib.use("Agg")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[[], *PICTURES], default=[], metavar="NAME", help=", ".join(PICTURES))
    FOLDER.mkdir(exist_ok=True)
    for name in parser.parse_args().names or PICTURES:
        PICTURES[name][0](FOLDER / f"{name}.png")
        print(FOLDER / f"{name}.png")


if __name__ == "__main__":
    main()
