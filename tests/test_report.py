"""The report of what was measured: its figures, and its page read by an HTML parser and opened in a real browser, if there is one.

The browser is a headless Chromium: `apt-get install chromium`, or CUFLASH_BROWSER names one. Without it that test is skipped by name.
"""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from bench.report import COLUMNS
from reporting import page, pictures, predictions, results, tables
from reporting.results import Results

pytest.importorskip("matplotlib")

MEASURED = Path(__file__).resolve().parents[1] / "benchmarks" / "results" / "nvidia-h100-80gb-hbm3"
BROWSER = os.environ.get("CUFLASH_BROWSER") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
SECTIONS = ("losses", "speed", "memory", "model", "tiles")


def some(name: str, keep: Any) -> str:
    """A file of the H100's results with the rows that `keep` takes."""
    with (MEASURED / name).open(newline="") as file:
        rows = list(csv.DictReader(file))
    chosen = [row for row in rows if keep(row)]
    assert 0 < len(chosen) < len(rows)
    return "\n".join([",".join(rows[0]), *(",".join(f'"{x}"' if "," in x else x for x in row.values()) for row in chosen)]) + "\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few of the results: one head dimension of one type, two features, one sweep of tiles."""
    made = tmp_path_factory.mktemp("results")
    (made / "facts.json").write_text((MEASURED / "facts.json").read_text())

    def of_interest(row: dict[str, str]) -> bool:
        return row["case"] in ("window", "softcap") or (row["case"], row["dtype"], row["head_dim"]) == ("", "bfloat16", "64")

    (made / "attention.csv").write_text(some("attention.csv", of_interest))
    (made / "predicted.csv").write_text(some("predicted.csv", lambda row: row["head_dim"] == "64"))
    (made / "tiles.csv").write_text(some("tiles.csv", lambda row: (row["kernel"], row["head_dim"]) == ("forward", "128")))
    return made


@pytest.fixture(scope="module")
def found(folder: Path) -> Results:
    return Results.of(folder)


@pytest.fixture(scope="module")
def drawn(found: Results) -> dict[str, pictures.Picture]:
    return {picture.name: picture for picture in pictures.pictures(found, pictures.pyplot())}


@pytest.fixture(scope="module")
def text(found: Results, drawn: dict[str, pictures.Picture]) -> str:
    return page.html(found, drawn.values())


class Outline(HTMLParser):
    """What a page is made of; complains of tags that are not closed in order."""

    VOID = frozenset({"meta", "img", "br", "link"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.images: dict[str, dict[str, str]] = {}
        self.sections: list[str] = []
        self.links: list[str] = []
        self.references: list[str] = []
        self.cells: list[tuple[str, str]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.tags[tag] += 1
        self.references += [given[name] for name in ("src", "href") if name in given]
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "img":
            self.images[given["id"]] = given
        elif tag == "section":
            self.sections.append(given["id"])
        elif tag == "a":
            self.links.append(given["href"].removeprefix("#"))
        elif tag == "td":
            self.cells.append((given.get("class", ""), ""))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "td":
            self.cells[-1] = (self.cells[-1][0], self.cells[-1][1] + data)


def test_the_page_has_everything_in_it(text: str, drawn: dict[str, pictures.Picture]) -> None:
    outline = Outline(text)
    assert tuple(outline.sections) == SECTIONS
    assert outline.links == outline.sections
    assert set(outline.images) == set(drawn)
    assert {"speed-bfloat16-forward", "memory-bfloat16", "speed-up-bfloat16-backward", "predicted", "tiles-forward"} <= set(drawn)
    assert all(image["alt"] and image["src"].startswith("data:image/svg+xml;base64,") for image in outline.images.values())
    assert all(reference.startswith(("data:", "#")) for reference in outline.references), "nothing from elsewhere"
    assert not outline.tags["script"] + outline.tags["link"] + outline.tags["iframe"]
    assert "url(" not in text
    assert "@import" not in text


def test_every_lost_case_is_red_and_stands_first(text: str, found: Results) -> None:
    """By the rows themselves: the rate of cuflash under the greatest other one."""
    rates: dict[tuple[str, ...], dict[str, float]] = {}
    for row in found.rows:
        if row["milliseconds"] and not (row["note"] and row["library"] != "cuflash"):
            key = tuple(row[name] for name in ("case", "dtype", "head_dim", "seqlen", "causal", "pass"))
            rates.setdefault(key, {})[row["library"] + row["backend"]] = float(row["tflops"])
    own = {key: group.pop("cuflashcuflash") for key, group in rates.items()}
    ratios = sorted(own[key] / max(group.values()) for key, group in rates.items() if group)
    shown = [(kind, float(cell)) for kind, cell in Outline(text).cells if kind in ("loss", "gain")]
    lost = [value for kind, value in shown if kind == "loss"]
    assert len(lost) == sum(ratio < 1 for ratio in ratios) > 0
    assert lost == pytest.approx([ratio for ratio in ratios if ratio < 1], abs=0.006)
    assert [kind for kind, _ in shown] == ["loss"] * len(lost) + ["gain"] * (len(shown) - len(lost))
    assert len(shown) == len(ratios)
    assert f"in {len(lost)} of {len(ratios)} cases" in text


def words(picture: pictures.Picture) -> list[str]:
    """The text of a figure, which matplotlib notes beside the outlines of its letters."""
    return re.findall(r"<!-- (.*?) -->", picture.svg.decode())


def test_predictions_are_drawn_as_predictions(drawn: dict[str, pictures.Picture], found: Results) -> None:
    speed = drawn["speed-bfloat16-forward"]
    lines = {str(line.get_label()): line for panel in speed.figure.axes for line in panel.get_lines()}
    assert lines["cuflash, predicted"].get_linestyle() == ":"
    assert lines["cuflash, predicted"].get_markerfacecolor() == "none"
    assert lines["cuflash"].get_linestyle() == "-"
    (panel,) = (axes for axes in speed.figure.axes if axes.get_title() == "head_dim 64, causal")
    (measured,) = (line for line in panel.get_lines() if line.get_label() == "cuflash")
    key = ("bfloat16", 64, True, 4096, "forward")
    assert measured.get_xydata()[[x for x, _ in measured.get_xydata()].index(4096)][1] == float(found.found[key]["cuflash"]["tflops"])
    assert "roof of wgmma" in words(speed)
    assert "predicted, ms" in words(drawn["predicted"])
    commits = {row["commit"] for row in found.predicted}
    assert all(commit in drawn["predicted"].caption for commit in commits)
    assert f"cuflash's kernels as of commit {', '.join(commits)}" in speed.caption


def test_only_what_is_predicted_is_called_so(found: Results) -> None:
    """By the heading of README.md's picture and the captions of the report's."""
    plt = pictures.pyplot()
    alone = replace(found, predicted=[])
    for results_of, heading in ((found, "causal, measured and predicted, NVIDIA"), (alone, "causal, measured, NVIDIA")):
        picture = pictures.overview(results_of, plt)
        assert heading in picture.figure.get_suptitle()
        plt.close(picture.figure)
    drawn_alone = list(pictures.speed(alone, plt))
    for picture in drawn_alone:
        assert "Dotted" not in picture.caption
        plt.close(picture.figure)
    assert drawn_alone


def test_no_rate_is_above_the_roof(found: Results) -> None:
    """Which no kernel exceeds: what would be above it was counted or timed wrong."""
    roof = max(rate for rate, _, _ in pictures.ceilings(found, "bfloat16"))
    assert roof == pytest.approx(2 * 4 * 512 * 132 * 1.965 / 1000)
    assert max(float(row["tflops"]) for row in Results.of(MEASURED).rows if row["milliseconds"]) < roof
    slow, _, _ = pictures.ceilings(found, "float32")[0]
    assert slow == pytest.approx(roof / 9, rel=0.02), "half the rate of 16 bits, a third of it for three products, two thirds by mma.sync"


def test_heat_maps_and_landscapes_have_the_numbers(drawn: dict[str, pictures.Picture], found: Results) -> None:
    group = found.found["bfloat16", 64, True, 2048, "backward"]
    ratio = float(group["cuflash"]["tflops"]) / float(group["torch flash"]["tflops"])
    assert f"{ratio:.2f}" in words(drawn["speed-up-bfloat16-backward"])
    assert "cuflash over torch flash" in words(drawn["speed-up-bfloat16-backward"])
    assert words(drawn["tiles-forward"]).count("1.00") >= len(results.tile_groups(found.tiles))


def simulated(folder: Path) -> Results:
    """What pytest writes without a GPU."""
    columns = dict.fromkeys(COLUMNS, "") | {
        "gpu": "simulator",
        "commit": "abc",
        "dtype": "float16",
        "head_dim": 64,
        "head_dim_v": 64,
        "batch": 1,
    }
    rows: list[dict[str, Any]] = [
        {**columns, "library": library, "backend": backend, "pass": direction, "seqlen": seqlen, "causal": 1, "milliseconds": 5.0, "tflops": rate,
         "peak_memory_bytes": 1 << 20, "visible_share": 0.5, "sm_clock_mhz": None, "measured": False, "gb_per_s": 1.0}
        for library, backend, rate in (("cuflash", "cuflash", 0.5), ("numpy", "naive", 0.25))
        for direction in ("forward", "both") for seqlen in (32, 64)
    ]  # fmt: skip
    written = {"benchmarks": [*({"extra_info": row} for row in rows), {"extra_info": {"call": "cuflash forward"}}]}
    (folder / "attention.json").write_text(json.dumps(written))
    return Results.of(folder)


def test_what_the_simulator_timed_says_so(tmp_path: Path) -> None:
    """Everywhere: over the page, and in every figure."""
    found = simulated(tmp_path)
    assert not found.measured
    made = list(pictures.pictures(found, pictures.pyplot()))
    assert {picture.section for picture in made} == {"losses", "speed"}
    assert all(any("SIMULATOR, NOT MEASURED" in word for word in words(picture)) for picture in made)
    assert pictures.ceilings(found, "float16") == [], "the simulator has no roof"
    assert "SIMULATOR, NOT MEASURED" in tables.tables(found)[0], "the tables in Markdown too"
    text = page.html(found, made)
    assert "Nothing on this page was measured on a GPU." in text
    assert "rehearsal on the simulator" in text
    assert [cell for cell in Outline(text).cells if cell[0] == "gain"] == [("gain", "2.00")] * 4


def test_rows_of_pytest_are_rows_of_the_table(tmp_path: Path) -> None:
    found = simulated(tmp_path)
    row = found.found["float16", 64, True, 32, "both"]["numpy naive"]
    assert (row["tflops"], row["sm_clock_mhz"], row["causal"]) == ("0.25", "", "1")
    assert "| 64 | yes | 32 | 0.5 / – | 0.25 / – |" in "\n".join(tables.tables(found))


def test_a_prediction_counts_as_the_benchmarks_do() -> None:
    """Rates over the same FLOP as measured ones; shapes that differ in length alone share their kernels' steady state."""
    kept = Results.of(MEASURED).expected
    assert {key[1] for key in kept} == {64, 128, 256}
    for (dtype, head_dim, causal, seqlen, direction), row in kept.items():
        case = predictions.Case.plain(dtype, head_dim, causal, seqlen)
        assert float(row["tflops"]) == pytest.approx(case.flops(direction) / float(row["milliseconds"]) / 1e9, rel=1e-4)
        assert row["card"] == "H100 SXM"


@pytest.mark.skipif(BROWSER is None, reason="no Chromium: apt-get install chromium, or CUFLASH_BROWSER")
def test_a_browser_shows_the_page(text: str, drawn: dict[str, pictures.Picture], tmp_path: Path) -> None:
    """Every picture is decoded and has a size, nothing is wider than the window, red is red, and the picture of the page is not blank."""
    count = """<script>addEventListener("load", () => { const seen = { pictures: [...document.images].filter(x => x.complete && x.naturalWidth > 200).length,
        wide: document.documentElement.scrollWidth > innerWidth, red: getComputedStyle(document.querySelector("td.loss")).backgroundColor,
        sections: [...document.querySelectorAll("section")].filter(x => x.offsetHeight > 100).length };
        document.body.dataset.seen = JSON.stringify(seen); });</script>"""
    file, shot = tmp_path / "page.html", tmp_path / "page.png"
    file.write_text(text.replace("</body>", count + "</body>"), encoding="utf-8")
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        "--window-size=1000,3000",
        f"--user-data-dir={tmp_path / 'profile'}",
    ]
    command = [str(BROWSER), *options, f"--screenshot={shot}", "--dump-dom", file.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    told = re.search(r'data-seen="([^"]*)"', done.stdout)
    if told is None:
        done = subprocess.run([*command[:-3], "--dump-dom", file.as_uri()], capture_output=True, text=True, check=False, timeout=240)
        told = re.search(r'data-seen="([^"]*)"', done.stdout)
    assert told is not None, done.stderr
    seen = json.loads(told[1].replace("&quot;", '"'))
    assert seen == {"pictures": len(drawn), "wide": False, "red": "rgb(192, 57, 43)", "sections": len(SECTIONS)}
    assert shot.stat().st_size > 50_000
