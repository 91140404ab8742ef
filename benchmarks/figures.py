"""Tables and figures from the files that bench_attention.py writes.

    python benchmarks/figures.py benchmarks/results/nvidia-h200                    tables in Markdown, to stdout
    python benchmarks/figures.py benchmarks/results/nvidia-h200 --output docs      and figures: speed-*.svg, tiles.svg
    python benchmarks/figures.py --publish                                         README.md and docs/measured.md, from all of benchmarks/results

The folder may hold attention.csv, tiles.csv, host.json and facts.json; what is missing is left out. Of a case that was timed several times, the last
time counts. Only what was measured is shown: no row, no point. Figures need matplotlib; without it there are tables only.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from marked_pages import with_block

Row = dict[str, str]
Key = tuple[str, int, bool, int, str]
"""dtype, head_dim, causal, seqlen, pass."""

ORDER = (
    "cuflash", "torch flash", "torch cudnn", "torch efficient", "torch flex", "torch math", "jax cudnn", "numpy formula", "torch varlen", "flash-attn flash-attn",
)  # fmt: skip
COLORS = ("#d62728", "#1f77b4", "#2ca02c", "#9467bd", "#8c564b", "#7f7f7f", "#ff7f0e", "#bcbd22", "#17becf", "#e377c2")


def read(path: Path) -> list[Row]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def library(row: Row) -> str:
    return "cuflash" if row["library"] == "cuflash" else f"{row['library']} {row['backend']}"


def rates(rows: list[Row]) -> dict[Key, dict[str, Row]]:
    """For each plain case the last timed row of each library."""
    found: dict[Key, dict[str, Row]] = {}
    for row in rows:
        if row["milliseconds"] and not row["case"]:
            key = (row["dtype"], int(row["head_dim"]), row["causal"] == "1", int(row["seqlen"]), row["pass"])
            found.setdefault(key, {})[library(row)] = row
    return found


def tflops(row: Row | None) -> str:
    if row is None:
        return "–"
    rate = float(row["tflops"])
    return (f"{rate:.0f}" if rate >= 10 else f"{rate:.3g}") + ("*" if row["note"] else "")


def table(header: list[str], lines: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, ["---"] * len(header), *lines])


def named(found: dict[Key, dict[str, Row]]) -> list[str]:
    present = {name for group in found.values() for name in group}
    return [name for name in ORDER if name in present] + sorted(present - set(ORDER))


def speed_tables(found: dict[Key, dict[str, Row]]) -> list[str]:
    """One table per element type: TFLOP/s, forward / backward."""
    parts = []
    for dtype in dict.fromkeys(key[0] for key in found):
        here = {key: group for key, group in found.items() if key[0] == dtype}
        names, lines = named(here), []
        for head_dim, causal, seqlen in sorted({key[1:4] for key in here}):
            both = [here.get((dtype, head_dim, causal, seqlen, direction), {}) for direction in ("forward", "backward")]
            cells = [" / ".join(tflops(group.get(name)) for group in both) for name in names]
            lines.append([str(head_dim), "yes" if causal else "no", str(seqlen), *cells])
        parts.append(f"### {dtype}, TFLOP/s forward / backward\n\n" + table(["head_dim", "causal", "seqlen", *names], lines))
    if any(row["note"] for group in found.values() for row in group.values()):
        parts.append("\\* less exact than float32 (TF32).")
    return parts


def verdict(found: dict[Key, dict[str, Row]]) -> str:
    """cuflash's rate over the best other one's, by element type, head dimension and pass."""
    ratios: dict[tuple[str, int, str], list[float]] = {}
    for (dtype, head_dim, _, _, direction), group in found.items():
        others = [float(row["tflops"]) for name, row in group.items() if name != "cuflash" and not row["note"]]
        if "cuflash" in group and others:
            ratios.setdefault((dtype, head_dim, direction), []).append(float(group["cuflash"]["tflops"]) / max(others))
    lines = [
        [dtype, str(head_dim), direction, f"{min(each):.2f}", f"{statistics.median(each):.2f}", f"{max(each):.2f}", str(len(each))]
        for (dtype, head_dim, direction), each in ratios.items()
    ]
    header = ["dtype", "head_dim", "pass", "least", "median", "most", "cases"]
    return "### cuflash over the fastest other library\n\n" + table(header, lines) if lines else ""


def memory_table(found: dict[Key, dict[str, Row]]) -> str:
    """MiB beyond the inputs, at the greatest length."""
    lines, names = [], named(found)
    for dtype, head_dim, direction in dict.fromkeys((key[0], key[1], key[4]) for key in found):
        keys = [key for key in found if (key[0], key[1], key[4]) == (dtype, head_dim, direction)]
        group = found[max(keys, key=lambda key: key[3])]
        cells = [
            f"{int(row['peak_memory_bytes']) / 2**20:.1f}" if (row := group.get(name)) and row["peak_memory_bytes"] else "–"
            for name in names
        ]
        if any(cell != "–" for cell in cells):
            lines.append([dtype, str(head_dim), direction, str(max(key[3] for key in keys)), *cells])
    return (
        "### Peak memory beyond the inputs, results included, MiB\n\n" + table(["dtype", "head_dim", "pass", "seqlen", *names], lines)
        if lines
        else ""
    )


def feature_tables(rows: list[Row]) -> list[str]:
    """One line for each case of a feature, TFLOP/s of visible scores forward / backward; and why a library has none."""
    cases: dict[tuple[str, ...], dict[tuple[str, str], Row]] = {}
    for row in rows:
        if row["case"]:
            key = tuple(row[name] for name in ("case", "dtype", "batch", "heads", "seqlen", "head_dim", "head_dim_v", "causal", "features"))
            cases.setdefault(key, {})[library(row), row["pass"]] = row
    if not cases:
        return []
    present = {name for group in cases.values() for name, _ in group}
    names = [name for name in ORDER if name in present] + sorted(present - set(ORDER))
    lines: list[list[str]] = []
    reasons: dict[tuple[str, str], dict[str, None]] = {}
    for (case, *_, head_dim, head_dim_v, causal, features), group in cases.items():
        both = [[_feature_cell(group.get((name, direction))) for direction in ("forward", "backward")] for name in names]
        cells = [pair[0] if pair[0] == pair[1] and not pair[0][0].isdigit() else " / ".join(pair) for pair in both]
        share = f"{100 * float(next(iter(group.values()))['visible_share']):.0f} %"
        dims = head_dim if head_dim == head_dim_v else f"{head_dim}/{head_dim_v}"
        lines.append([case, features or "–", dims, "yes" if causal == "1" else "no", share, *cells])
        for (name, _), row in group.items():
            if row["note"]:
                reasons.setdefault((name, row["note"]), {})[case] = None
    told = [f"- {name}, {', '.join(cases_)}: {note}" for (name, note), cases_ in reasons.items()]
    header = ["case", "features", "head_dim", "causal", "visible scores", *names]
    title = "### Score features, lengths and head dimensions, TFLOP/s of visible scores, forward / backward\n\n"
    return [title + table(header, lines), *(["\n".join(told)] if told else [])]


def _feature_cell(row: Row | None) -> str:
    """A rate, with * where the notes below say something of it; or why there is none."""
    if row is None or row["milliseconds"]:
        return tflops(row)
    return "not supported" if row["note"].startswith("not supported") else row["note"].partition(":")[0] or "–"


def ranks(values: list[float]) -> list[float]:
    """Positions in ascending order; equal values share the mean of theirs."""
    return [sum(other < value for other in values) + (sum(other == value for other in values) - 1) / 2 for value in values]


def correlation(xs: list[float], ys: list[float]) -> float:
    return statistics.correlation(xs, ys) if len(xs) > 2 and len(set(xs)) > 1 and len(set(ys)) > 1 else float("nan")


def tile_groups(rows: list[Row]) -> dict[tuple[str, str, int, bool], list[Row]]:
    groups: dict[tuple[str, str, int, bool], dict[str, Row]] = {}
    for row in rows:
        if row["milliseconds"]:
            groups.setdefault((row["kernel"], row["dtype"], int(row["head_dim"]), row["causal"] == "1"), {})[row["rank"]] = row
    return {key: list(group.values()) for key, group in groups.items()}


def tile_table(rows: list[Row]) -> str:
    """How good the default tile is, and how well the model orders tiles."""
    lines = []
    for (kernel, dtype, head_dim, causal), group in tile_groups(rows).items():
        best = min(group, key=lambda row: float(row["milliseconds"]))
        default = next((row for row in group if row["rank"] == "0"), None)
        times, modelled = [float(row["milliseconds"]) for row in group], [float(row["modelled"]) for row in group]
        shape = "×".join(best[name] for name in ("tile_q", "tile_kv", "num_warps", "num_stages"))
        lines.append([
            kernel, dtype, str(head_dim), "yes" if causal else "no", "–" if default is None else f"{float(default['milliseconds']):.3f}",
            f"{float(best['milliseconds']):.3f}", best["rank"], shape, f"{correlation(ranks(times), ranks(modelled)):.2f}", str(len(group)),
        ])  # fmt: skip
    header = [
        "kernel",
        "dtype",
        "head_dim",
        "causal",
        "default, ms",
        "best, ms",
        "its rank",
        "q×kv×warps×stages",
        "rank correlation",
        "tiles",
    ]
    return "### Tiles: the whole pass, with one kernel's tile changed\n\n" + table(header, lines) if lines else ""


def host_table(path: Path) -> str:
    if not path.exists():
        return ""
    lines = [
        [row["arrays"], row["call"], f"{row['median']:.1f}", f"{row['p20']:.1f} to {row['p80']:.1f}"]
        for row in json.loads(path.read_text())
    ]
    return "### Host, µs per warm call\n\n" + table(["arrays", "call", "median", "20 % to 80 %"], lines)


def facts_line(folder: Path, rows: list[Row]) -> str:
    path, clocks = folder / "facts.json", [float(row["sm_clock_mhz"]) for row in rows if row["sm_clock_mhz"]]
    words = []
    if path.exists():
        facts = json.loads(path.read_text())
        packages, ceilings = facts.get("packages", {}), facts.get("ceilings", {})
        words += [facts["gpu"], f"driver {facts['driver']}" if facts["driver"] else "no driver", f"NVRTC {facts['nvrtc']}"]
        words += [f"{name} {packages[name]}" for name in ("torch", "jax", "nvidia-cudnn-cu13", "nvidia-cudnn-cu12") if name in packages]
        words += [f"{value} {name}" for name, value in ceilings.items() if name != "sm_clock_mhz"]
    for name in ("date", "commit"):
        words += [f"{name} {', '.join(sorted({row[name] for row in rows}))}"] if rows else []
    words += [f"SM clock under load {min(clocks):.0f} to {max(clocks):.0f} MHz"] if clocks else []
    return "; ".join(words)


# --- Figures ------------------------------------------------------------------------------------------------------------------------------


def pyplot() -> Any:
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    import matplotlib.pyplot

    matplotlib.rcParams |= {"svg.hashsalt": "cuflash", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    return matplotlib.pyplot


def draw_speed(found: dict[Key, dict[str, Row]], plt: Any, folder: Path, gpu: str) -> list[Path]:
    """One figure per element type and pass: a panel per head dimension, causal below."""
    made = []
    for dtype, direction in dict.fromkeys((key[0], key[4]) for key in found):
        here = {key: group for key, group in found.items() if (key[0], key[4]) == (dtype, direction)}
        head_dims, names = sorted({key[1] for key in here}), named(here)
        figure, panels = plt.subplots(2, len(head_dims), figsize=(3.2 * len(head_dims), 5), sharex=True, sharey=True, squeeze=False)
        for column, head_dim in enumerate(head_dims):
            for line, causal in enumerate((False, True)):
                panel = panels[line][column]
                for name in names:
                    points = sorted(
                        (key[3], float(group[name]["tflops"]))
                        for key, group in here.items()
                        if key[1:3] == (head_dim, causal) and name in group
                    )
                    if points:
                        color = COLORS[ORDER.index(name)] if name in ORDER else None
                        panel.plot(
                            *zip(*points, strict=True),
                            marker="o",
                            markersize=3,
                            label=name,
                            color=color,
                            linewidth=2 if name == "cuflash" else 1,
                        )
                panel.set_title(f"head_dim {head_dim}{', causal' if causal else ''}", fontsize=9)
                panel.set_xscale("log", base=2)
                panel.set_ylim(bottom=0)
                panel.grid(alpha=0.3)
        for panel in panels[1]:
            panel.set_xlabel("seqlen")
        for line in panels:
            line[0].set_ylabel("TFLOP/s")
        handles = {label: handle for panel in figure.axes for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)}
        figure.legend(
            handles.values(), handles.keys(), loc="lower center", ncols=max(1, min(len(handles), 2 * len(head_dims))), frameon=False
        )
        figure.suptitle(f"{dtype} {direction}, {gpu}", fontsize=10)
        figure.tight_layout(rect=(0, 0.06, 1, 1))
        made.append(folder / f"speed-{dtype}-{direction}.svg")
        figure.savefig(made[-1], metadata={"Date": None})
        plt.close(figure)
    return made


def draw_tiles(rows: list[Row], plt: Any, folder: Path) -> list[Path]:
    """Modelled against measured, both relative to the best: a good model lies on a rising line, and its first tile at the bottom."""
    groups = tile_groups(rows)
    if not groups:
        return []
    kernels = list(dict.fromkeys(key[0] for key in groups))
    figure, panels = plt.subplots(1, len(kernels), figsize=(3.4 * len(kernels), 3.4), squeeze=False)
    for panel, kernel in zip(panels[0], kernels, strict=True):
        for (name, dtype, head_dim, causal), group in groups.items():
            if name == kernel:
                best = min(float(row["milliseconds"]) for row in group)
                points = [(float(row["modelled"]), float(row["milliseconds"]) / best) for row in group]
                panel.plot(
                    *zip(*points, strict=True), "o", markersize=4, alpha=0.7, label=f"{dtype} {head_dim}{' causal' if causal else ''}"
                )
        panel.set_title(kernel, fontsize=9)
        panel.set_xlabel("modelled, relative to the default")
        panel.set_ylabel("pass, relative to the best tile's")
        panel.legend(fontsize=6, frameon=False)
        panel.grid(alpha=0.3)
    figure.tight_layout()
    path = folder / "tiles.svg"
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    return [path]


# --- README.md and docs/measured.md -----------------------------------------------------------------------------------------------------------

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- measured: benchmarks/figures.py --publish -->", "<!-- end of what was measured -->"


def results() -> list[Path]:
    """The folders of all GPUs that something was measured on."""
    return sorted(path.parent for path in RESULTS.glob("*/attention.csv"))


def gpu_of(folder: Path) -> str:
    return str(json.loads((folder / "facts.json").read_text())["gpu"])


def tables(folder: Path) -> list[str]:
    """All tables of a folder of results."""
    rows, found = read(folder / "attention.csv"), rates(read(folder / "attention.csv"))
    parts = [facts_line(folder, rows), verdict(found), *speed_tables(found), memory_table(found), *feature_tables(rows)]
    parts += [tile_table(read(folder / "tiles.csv")), host_table(folder / "host.json")]
    return [part for part in parts if part]


def measured_page() -> str:
    """docs/measured.md: all tables of all GPUs."""
    head = (
        "# Measured\n\nEvery figure of this page was measured on the GPU that its heading names. `benchmarks/figures.py --publish` writes the page from the raw "
        "files in\n`benchmarks/results/`. Each file says when, at which commit, and with which versions and clocks. TFLOP/s count the scores that are visible\n"
        '(`benchmarks/README.md`). "forward" gives the output alone, "forward_lse" also what the backward pass needs, which other libraries compute only where\n'
        "autograd asks for it. A backward pass of torch includes autograd's own work.\n"
    )
    pages = [f"## {gpu_of(folder)}\n\n" + "\n\n".join(tables(folder)) + "\n" for folder in results()]
    return "\n".join([head, *pages])


def readme_block() -> str:
    """What README.md shows: bfloat16 at three lengths, and how far cuflash is from the fastest other library."""
    parts = []
    for folder in results():
        found = {
            key: group
            for key, group in rates(read(folder / "attention.csv")).items()
            if key[0] == "bfloat16" and key[3] in (1024, 4096, 16384)
        }
        parts += [
            f"{gpu_of(folder)}, measured (batch · seqlen = 16384, heads · head_dim = 2048; protocol and all cells in [docs/measured.md](docs/measured.md)):"
        ]
        parts += speed_tables(found)
    return "\n\n".join(parts)


def published() -> dict[Path, str]:
    """The pages that depend on results, as they should be."""
    readme = ROOT / "README.md"
    return {ROOT / "docs" / "measured.md": measured_page(), readme: with_block(readme.read_text(), BEGIN, readme_block(), END)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--publish", action="store_true", help="write README.md and docs/measured.md from all results")
    parser.add_argument("folder", type=Path, nargs="?", help="where attention.csv, tiles.csv, host.json, facts.json are")
    parser.add_argument("--output", type=Path, help="folder for the figures; none without it")
    arguments = parser.parse_args()
    if arguments.publish:
        for path, text in published().items():
            path.write_text(text)
        return 0
    if arguments.folder is None:
        parser.error("name a folder of results, or pass --publish")
    rows, tile_rows = read(arguments.folder / "attention.csv"), read(arguments.folder / "tiles.csv")
    found = rates(rows)
    print("\n\n".join(tables(arguments.folder)))
    if not rows and not tile_rows:
        print(f"no measurements in {arguments.folder}", file=sys.stderr)
        return 1
    if arguments.output:
        plt = pyplot()
        if plt is None:
            print("matplotlib is not installed: no figures", file=sys.stderr)
            return 0
        arguments.output.mkdir(parents=True, exist_ok=True)
        made = draw_speed(found, plt, arguments.output, rows[0]["gpu"] if rows else "") + draw_tiles(tile_rows, plt, arguments.output)
        print(f"SUMMARY: {len(made)} figures in {arguments.output}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
