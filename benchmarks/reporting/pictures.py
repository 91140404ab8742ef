"""Figures of a folder of results, with matplotlib.

Contract: what was measured has full markers and lines. What the timing model predicts is dotted, has open markers and says "predicted"; it is drawn beside what was
measured, never in its place. Everything that the simulator timed says so in its title.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from cuflash.timing.machine import CARDS, multiprocessor
from reporting.results import COLORS, ORDER, Key, Results, Row, named, tile_groups

PASSES = ("forward", "backward")
OURS, LOSS, GAIN = COLORS[0], "#c0392b", "#2471a3"


@dataclass
class Picture:
    """A figure and what is to be read beside it.

    Attributes:
        name: of its file.
        section: of the page: "losses", "speed", "memory", "model", "tiles".
        title, caption: for people; the title is not in the figure.
        figure: matplotlib's.
    """

    name: str
    section: str
    title: str
    caption: str
    figure: Any

    @functools.cached_property
    def svg(self) -> bytes:
        """The same bytes each time."""
        drawn = io.BytesIO()
        self.figure.savefig(drawn, format="svg", metadata={"Date": None})
        return drawn.getvalue()


def pyplot() -> Any:
    """matplotlib's, set up for files; None if it is not installed."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    import matplotlib.pyplot

    matplotlib.rcParams |= {
        "svg.hashsalt": "cuflash", "font.size": 9, "axes.titlesize": 9, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
    }  # fmt: skip
    return matplotlib.pyplot


def pictures(results: Results, plt: Any) -> Iterator[Picture]:
    """All that the folder has rows for, drawn; their figures are closed."""
    makers: list[Callable[[Results, Any], Iterator[Picture]]] = [speed, memory, speed_ups, predictions, tiles]
    for maker in makers:
        for picture in maker(results, plt):
            assert picture.svg
            plt.close(picture.figure)
            yield picture


def _heading(results: Results, text: str) -> str:
    return f"{text}, {results.gpu}" if results.measured else f"{text}: SIMULATOR, NOT MEASURED"


def _causal(causal: bool) -> str:
    return ", causal" if causal else ""


# --- Speed and memory against length ------------------------------------------------------------------------------------------------------


def speed(results: Results, plt: Any) -> Iterator[Picture]:
    """TFLOP/s of every library: a figure per element type and pass, a panel per head dimension, causal below."""
    found = results.found
    for dtype, direction in dict.fromkeys((key[0], key[4]) for key in found if key[4] in PASSES):
        here = {key: group for key, group in found.items() if (key[0], key[4]) == (dtype, direction)}
        head_dims = sorted({key[1] for key in here})
        causals = sorted({key[2] for key in here})
        size = 1.2 + 3.2 * len(head_dims), 1.0 + 2.2 * len(causals)
        figure, panels = plt.subplots(len(causals), len(head_dims), figsize=size, sharex=True, sharey=True, squeeze=False)
        for column, head_dim in enumerate(head_dims):
            for line, causal in enumerate(causals):
                panel = panels[line][column]
                _speed_panel(panel, results, here, (dtype, head_dim, causal, direction))
                panel.set_title(f"head_dim {head_dim}{_causal(causal)}")
        _finish(figure, panels, "seqlen", "TFLOP/s", _heading(results, f"{dtype} {direction}"))
        yield Picture(
            f"speed-{dtype}-{direction}", "speed", f"TFLOP/s against length: {dtype}, {direction}",
            "Rates count the scores that are visible. Dashed: what the card's matrix units can do with each kind of instruction, and a large matrix product "
            f"measured on the same card.{_dotted(results)}", figure,
        )  # fmt: skip


def _dotted(results: Results) -> str:
    """What a caption says of predictions, if there are any."""
    if not results.expected:
        return ""
    return f" Dotted with open circles: the timing model's prediction for cuflash's kernels as of commit {', '.join(results.predicted_at)}."


def overview(results: Results, plt: Any, dtype: str = "bfloat16") -> Picture:
    """For README.md: causal calls of one element type, forward above, backward below."""
    found = results.found
    head_dims = sorted({key[1] for key in found if key[0] == dtype})
    figure, panels = plt.subplots(2, len(head_dims), figsize=(1.2 + 3.2 * len(head_dims), 5.4), sharex=True, sharey="row", squeeze=False)
    for line, direction in enumerate(PASSES):
        here = {key: group for key, group in found.items() if (key[0], key[4]) == (dtype, direction)}
        for column, head_dim in enumerate(head_dims):
            _speed_panel(panels[line][column], results, here, (dtype, head_dim, True, direction))
            panels[line][column].set_title(f"{direction}, head_dim {head_dim}")
    drawn = "measured and predicted" if any(key[0] == dtype and key[2] for key in results.expected) else "measured"
    _finish(figure, panels, "seqlen", "TFLOP/s", _heading(results, f"{dtype}, causal, {drawn}"))
    return Picture("overview", "speed", f"{dtype}, causal", "", figure)


def _speed_panel(panel: Any, results: Results, here: dict[Key, dict[str, Row]], which: tuple[str, int, bool, str]) -> None:
    dtype, head_dim, causal, _ = which
    groups = {key[3]: group for key, group in sorted(here.items()) if key[1:3] == (head_dim, causal)}
    for name in named(here):
        points = [(seqlen, float(group[name]["tflops"])) for seqlen, group in groups.items() if name in group]
        if points:
            panel.plot(*zip(*points, strict=True), **_style(name))
    points = [(key[3], float(row["tflops"])) for key, row in sorted(results.expected.items()) if (*key[:3], key[4]) == which]
    if points:
        panel.plot(
            *zip(*points, strict=True), "o:", markersize=4, markerfacecolor="none", color=OURS, linewidth=1, label="cuflash, predicted"
        )
    for rate, label, style in ceilings(results, dtype):
        panel.axhline(rate, color="#444444", linewidth=0.8, linestyle=style, label=label)
    panel.set_xscale("log", base=2)
    panel.set_ylim(bottom=0)
    panel.grid(alpha=0.3)


WGMMA_RATE = {"sm_90": 512}
"""Multiply-adds of 16-bit operands per clock and sub-partition, as measured (docs/h100.md: m64nNk16 in N/2 clocks)."""


def ceilings(results: Results, dtype: str) -> list[tuple[float, str, Any]]:
    """The roof: (TFLOP/s, what it is, matplotlib's style of the line), of the instructions that each kernel can use, at the card's clock. None for the simulator.

    Memory's side of the roofline lies far to the left of the protocol's lengths: `Case.traffic` bytes would pass in a few per cent of the time.
    """
    found: list[tuple[float, str, Any]] = []
    arch = results.facts.get("device", {}).get("arch")
    if results.measured and arch in CARDS:
        card, rates, exact = CARDS[arch], multiprocessor(arch).matrix_rates, dtype == "float32"
        per_rate = 2 * 4 * card.num_sms * card.clock_ghz / 1000
        if exact:
            found.append((per_rate * rates["tf32"] / 3, "roof of mma.sync, three TF32 products each", "--"))
        else:
            found.append((per_rate * rates["half"], "roof of mma.sync", "--"))
            if arch in WGMMA_RATE:
                found.append((per_rate * WGMMA_RATE[arch], "roof of wgmma", "-."))
    measured = results.facts.get("ceilings", {}).get("bfloat16_matmul_tflops")
    if measured and dtype != "float32":
        found.append((float(measured), "matrix product 8192³, measured", (0, (1, 2, 5, 2))))
    return found


def memory(results: Results, plt: Any) -> Iterator[Picture]:
    """Peak memory of every library: a figure per element type, passes as rows, head dimensions as columns; full masks."""
    found = {key: group for key, group in results.found.items() if not key[2] and key[4] in PASSES}
    for dtype in dict.fromkeys(key[0] for key in found):
        here = {key: group for key, group in found.items() if key[0] == dtype}
        head_dims = sorted({key[1] for key in here})
        figure, panels = plt.subplots(2, len(head_dims), figsize=(1.2 + 3.2 * len(head_dims), 5.4), sharex=True, sharey=True, squeeze=False)
        drawn = False
        for column, head_dim in enumerate(head_dims):
            for line, direction in enumerate(PASSES):
                panel = panels[line][column]
                groups = {key[3]: group for key, group in sorted(here.items()) if (key[1], key[4]) == (head_dim, direction)}
                for name in named(here):
                    points = [
                        (seqlen, int(group[name]["peak_memory_bytes"]) / 2**20)
                        for seqlen, group in groups.items()
                        if name in group and group[name]["peak_memory_bytes"]
                    ]
                    if points:
                        drawn = True
                        panel.plot(*zip(*points, strict=True), **_style(name))
                panel.set_title(f"{direction}, head_dim {head_dim}")
                panel.set_xscale("log", base=2)
                if drawn:
                    panel.set_yscale("log")
                panel.grid(alpha=0.3)
        if not drawn:
            plt.close(figure)
            continue
        _finish(figure, panels, "seqlen", "MiB", _heading(results, f"{dtype}, peak memory beyond the inputs"))
        yield Picture(
            f"memory-{dtype}", "memory", f"Memory against length: {dtype}",
            "Results are included. batch · seqlen is the same for all lengths, so what is linear in the length is flat here, and scores that are kept rise.", figure,
        )  # fmt: skip


def _style(name: str) -> dict[str, Any]:
    color = COLORS[ORDER.index(name)] if name in ORDER else None
    return {"marker": "o", "markersize": 3, "label": name, "color": color, "linewidth": 2 if name == "cuflash" else 1}


def _finish(figure: Any, panels: Any, below: str, beside: str, title: str) -> None:
    for panel in panels[-1]:
        panel.set_xlabel(below)
    for line in panels:
        line[0].set_ylabel(beside)
    handles = {label: handle for panel in figure.axes for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)}
    columns = max(1, min(len(handles), 2 * len(panels[0])))
    lines = -(-len(handles) // columns)
    figure.legend(handles.values(), handles.keys(), loc="lower center", ncols=columns, fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.tight_layout(rect=(0, 0.02 + 0.035 * lines, 1, 1))


# --- Against peers ------------------------------------------------------------------------------------------------------------------------


def speed_ups(results: Results, plt: Any) -> Iterator[Picture]:
    """cuflash's rate over each peer's: a figure per element type and pass, a map per peer, lengths across, head dimension and mask down."""
    found = results.found
    for dtype, direction in dict.fromkeys((key[0], key[4]) for key in found if key[4] in PASSES):
        here = {key: group for key, group in found.items() if (key[0], key[4]) == (dtype, direction) and "cuflash" in group}
        peers = [name for name in named(here) if name != "cuflash"]
        if not peers:
            continue
        lines, columns = sorted({(key[1], key[2]) for key in here}), sorted({key[3] for key in here})
        wide = min(3, len(peers))
        high = -(-len(peers) // wide)
        size = (max(5.5, 1.2 + wide * (0.9 + 0.52 * len(columns))), 0.9 + high * (0.9 + 0.32 * len(lines)))
        figure, panels = plt.subplots(high, wide, figsize=size, squeeze=False, sharey=True)
        for panel, peer in zip(panels.flat, peers, strict=False):
            ratios = [[_ratio(here.get((dtype, *line, seqlen, direction), {}), peer) for seqlen in columns] for line in lines]
            _map(panel, ratios, centre=1.0)
            panel.set_title(f"cuflash over {peer}")
            panel.set_xticks(range(len(columns)), [_short(seqlen) for seqlen in columns])
            panel.set_yticks(range(len(lines)), [f"{head_dim}{_causal(causal)}" for head_dim, causal in lines])
        for panel in panels.flat[len(peers) :]:
            panel.set_axis_off()
        figure.suptitle(_heading(results, f"{dtype} {direction}, times as fast"), fontsize=10)
        figure.tight_layout()
        yield Picture(
            f"speed-up-{dtype}-{direction}", "losses", f"Speed-up over each peer: {dtype}, {direction}",
            "Above 1, blue: cuflash is faster. Below 1, red: it is slower. Empty: not timed, or the peer cannot.", figure,
        )  # fmt: skip


def _ratio(group: dict[str, Row], peer: str) -> float:
    if "cuflash" not in group or peer not in group:
        return float("nan")
    return float(group["cuflash"]["tflops"]) / float(group[peer]["tflops"])


def _short(seqlen: int) -> str:
    return f"{seqlen // 1024}k" if seqlen % 1024 == 0 else str(seqlen)


def _map(panel: Any, values: list[list[float]], centre: float, *, low_is_good: bool = False) -> None:
    """Numbers on colors: red is bad, blue good, white the centre; a factor of two is full color."""
    import matplotlib.colors
    import numpy

    colors = matplotlib.colors.LinearSegmentedColormap.from_list("loss-gain", [LOSS, "#ffffff", GAIN])
    shades = numpy.log2(numpy.array(values) / centre) * (-1 if low_is_good else 1)
    panel.imshow(numpy.ma.masked_invalid(shades), cmap=colors, vmin=-1, vmax=1, aspect="auto")
    for i, line in enumerate(values):
        for j, value in enumerate(line):
            if value == value:
                dark = abs(float(shades[i, j])) > 0.65
                panel.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=7, color="white" if dark else "black")
    panel.tick_params(length=0, labelsize=7)
    for spine in panel.spines.values():
        spine.set_visible(False)


# --- The model ----------------------------------------------------------------------------------------------------------------------------


def predictions(results: Results, plt: Any) -> Iterator[Picture]:
    """Predicted against measured milliseconds of cuflash: on the diagonal where the model is right."""
    found, expected = results.found, results.expected
    pairs = {
        key: (float(found[key]["cuflash"]["milliseconds"]), float(row["milliseconds"]))
        for key, row in expected.items()
        if "cuflash" in found.get(key, {})
    }
    if not pairs:
        return
    figure, panels = plt.subplots(1, 2, figsize=(8.6, 4.4), squeeze=False)
    for panel, direction in zip(panels[0], PASSES, strict=True):
        here = {key: pair for key, pair in pairs.items() if key[4] == direction}
        for number, (dtype, head_dim) in enumerate(sorted({key[:2] for key in here})):
            points = [pair for key, pair in here.items() if key[:2] == (dtype, head_dim)]
            panel.plot(
                *zip(*points, strict=True),
                "o",
                markersize=5,
                markerfacecolor="none",
                color=f"C{number}",
                label=f"{dtype}, head_dim {head_dim}",
            )
        if here:
            ends = [min(min(pair) for pair in here.values()) / 1.2, max(max(pair) for pair in here.values()) * 1.2]
            panel.plot(ends, ends, color="#444444", linewidth=0.8, label="as predicted")
            panel.fill_between(ends, [x / 1.2 for x in ends], [x * 1.2 for x in ends], color="#444444", alpha=0.08, label="within 20 %")
        panel.set_xscale("log")
        panel.set_yscale("log")
        panel.set_title(direction)
        panel.grid(alpha=0.3, which="both")
        panel.set_xlabel("measured, ms")
    panels[0][0].set_ylabel("predicted, ms")
    panels[0][0].legend(fontsize=7)
    figure.suptitle(_heading(results, "predicted against measured"), fontsize=10)
    figure.tight_layout()
    measured_at = ", ".join(sorted({found[key]["cuflash"]["commit"] for key in pairs}))
    yield Picture(
        "predicted", "model", "Predicted against measured",
        f"Predicted: the timing model, kernels of commit {', '.join(results.predicted_at)}. Measured: kernels of commit {measured_at}; where they changed in between, both differ. "
        "Above the line the model is too slow, below it too fast.", figure,
    )  # fmt: skip


def tiles(results: Results, plt: Any) -> Iterator[Picture]:
    """The landscape of tiles: for every kernel that was swept, the pass's time over that of the best tile, the best of its warps and stages."""
    groups = tile_groups(results.tiles)
    for kernel in dict.fromkeys(key[0] for key in groups):
        here = {key: group for key, group in groups.items() if key[0] == kernel}
        wide = min(4, len(here))
        high = -(-len(here) // wide)
        figure, panels = plt.subplots(high, wide, figsize=(max(5.5, 0.8 + 2.6 * wide), 0.7 + 2.3 * high), squeeze=False)
        for panel, ((_, dtype, head_dim, causal), group) in zip(panels.flat, here.items(), strict=False):
            _landscape(panel, group)
            panel.set_title(f"{dtype} {head_dim}{_causal(causal)}", fontsize=8)
        for panel in panels.flat[len(here) :]:
            panel.set_axis_off()
        figure.suptitle(_heading(results, f"{kernel}: time over the best tile's"), fontsize=10)
        figure.tight_layout()
        yield Picture(
            f"tiles-{kernel}", "tiles", f"Tile landscape: {kernel}",
            "Queries per tile down, keys across; of tiles of one size the fastest numbers of warps and stages (w, s). 1.00 is the best, red takes longer. Framed: the default "
            "of the day on which it was timed.", figure,
        )  # fmt: skip


def _landscape(panel: Any, group: list[Row]) -> None:
    best = min(float(row["milliseconds"]) for row in group)
    rows, columns = (sorted({int(row[name]) for row in group}) for name in ("tile_q", "tile_kv"))
    fastest: dict[tuple[int, int], Row] = {}
    for row in sorted(group, key=lambda row: -float(row["milliseconds"])):
        fastest[rows.index(int(row["tile_q"])), columns.index(int(row["tile_kv"]))] = row
    values = [
        [float(fastest[i, j]["milliseconds"]) / best if (i, j) in fastest else float("nan") for j in range(len(columns))]
        for i in range(len(rows))
    ]
    _map(panel, values, centre=1.0, low_is_good=True)
    for (i, j), row in fastest.items():
        panel.text(j, i + 0.33, f"w{row['num_warps']} s{row['num_stages']}", ha="center", va="center", fontsize=5.5, color="#333333")
    for row in group:
        if row["rank"] == "0":
            place = columns.index(int(row["tile_kv"])) - 0.5, rows.index(int(row["tile_q"])) - 0.5
            panel.add_patch(_frame(place))
    panel.set_xticks(range(len(columns)), columns)
    panel.set_yticks(range(len(rows)), rows)


def _frame(corner: tuple[float, float]) -> Any:
    import matplotlib.patches

    return matplotlib.patches.Rectangle(corner, 1, 1, fill=False, edgecolor="black", linewidth=1.2)
