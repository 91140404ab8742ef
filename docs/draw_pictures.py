"""Draw the pictures of docs/pictures: the way of a call through the modules, and the pipeline of each kernel. No GPU is needed.

    python docs/draw_pictures.py                  # all of them
    python docs/draw_pictures.py way_of_a_call    # one

The way of a call is read from docs/design.md and from the imports of the modules, as tests/test_rooms.py reads them; of pipelines, docs/pipeline_pictures.py
says what is drawn.

Each file carries the fingerprint of what it was drawn from: steps, floors and imports; or the tile and the operations of the kernel's loop.
Comments and machine code are not part of it. tests/test_docs.py compares.
"""

from __future__ import annotations

import argparse
import ast
import itertools
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # cuflash of this clone, whether it is installed or not

from picture_files import DOCS, DPI, FOLDER, fingerprint_in, fingerprint_of, save
from pipeline_pictures import CASES, draw_pipeline, fingerprint_of_pipeline

import cuflash

__all__ = ["FOLDER", "PICTURES", "fingerprint_in"]

PACKAGE = Path(cuflash.__file__).parent


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
