"""Tables in Markdown. Only what was timed is in them: no row, no cell. Those of the simulator's times begin by saying so."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

from reporting.results import ORDER, Key, Results, Row, lead, library, named, tile_groups


def tflops(row: Row | None) -> str:
    if row is None:
        return "–"
    rate = float(row["tflops"])
    return (f"{rate:.0f}" if rate >= 10 else f"{rate:.3g}") + ("*" if row["note"] else "")


def table(header: list[str], lines: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, ["---"] * len(header), *lines])


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
        found_lead = lead(group)
        if found_lead is not None:
            ratios.setdefault((dtype, head_dim, direction), []).append(found_lead[0])
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


def facts_line(results: Results) -> str:
    """The machine, its software and its ceilings; when, at which commit and at which clocks."""
    rows, facts = results.rows, results.facts
    clocks = [float(row["sm_clock_mhz"]) for row in rows if row["sm_clock_mhz"]]
    words = []
    if facts:
        packages, ceilings = facts.get("packages", {}), facts.get("ceilings", {})
        words += [facts["gpu"], f"driver {facts['driver']}" if facts["driver"] else "no driver", f"NVRTC {facts['nvrtc']}"]
        words += [f"{name} {packages[name]}" for name in ("torch", "jax", "nvidia-cudnn-cu13", "nvidia-cudnn-cu12") if name in packages]
        words += [f"{value} {name}" for name, value in ceilings.items() if name != "sm_clock_mhz"]
    for name in ("date", "commit"):
        words += [f"{name} {', '.join(sorted({row[name] for row in rows}))}"] if rows else []
    words += [f"SM clock under load {min(clocks):.0f} to {max(clocks):.0f} MHz"] if clocks else []
    return "; ".join(words)


def tables(results: Results) -> list[str]:
    """All tables of a folder of results."""
    rows, found = results.rows, results.found
    what = "" if results.measured else "**SIMULATOR, NOT MEASURED: rehearsed at tiny sizes; the times say nothing of a GPU.**"
    parts = [what, facts_line(results), verdict(found), *speed_tables(found), memory_table(found), *feature_tables(rows)]
    parts += [tile_table(results.tiles), host_table(results.folder / "host.json")]
    return [part for part in parts if part]
