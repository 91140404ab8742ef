"""What README.md and docs/measured.md show of all results, and the picture beside it.

Contract: `published()` says what the pages have to be, so that a test can compare; a picture is renewed where its source is another one.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from marked_pages import with_block
from reporting.pictures import overview, pyplot
from reporting.results import Results
from reporting.tables import speed_tables, tables

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- measured: benchmarks/report.py --publish -->", "<!-- end of what was measured -->"


def results() -> list[Results]:
    """Of all GPUs that something was measured on."""
    return [Results.of(path.parent) for path in sorted(RESULTS.glob("*/attention.csv"))]


def measured_page() -> str:
    """docs/measured.md: all tables of all GPUs."""
    head = (
        "# Measured\n\nEvery figure of this page was measured on the GPU that its heading names. `benchmarks/report.py --publish` writes the page from the raw "
        "files in\n`benchmarks/results/`. Each file says when, at which commit, and with which versions and clocks. TFLOP/s count the scores that are visible\n"
        '(`benchmarks/README.md`). "forward" gives the output alone, "forward_lse" also what the backward pass needs, which other libraries compute only where\n'
        "autograd asks for it. A backward pass of torch includes autograd's own work.\n"
    )
    pages = [f"## {each.gpu}\n\n![{_caption(each)}]({picture(each).name})\n\n" + "\n\n".join(tables(each)) + "\n" for each in results()]
    return "\n".join([head, *pages])


def readme_block() -> str:
    """What README.md shows: bfloat16 at three lengths beside the other libraries, and a picture of causal calls."""
    parts = []
    for each in results():
        found = {key: group for key, group in each.found.items() if key[0] == "bfloat16" and key[3] in (1024, 4096, 16384)}
        parts += [
            f"{each.gpu}, measured (batch · seqlen = 16384, heads · head_dim = 2048; protocol and all cells in [docs/measured.md](docs/measured.md)):",
            f"![{_caption(each)}](docs/{picture(each).name})",
        ]
        parts += speed_tables(found)
    return "\n\n".join(parts)


def _caption(each: Results) -> str:
    return f"TFLOP/s of cuflash and other libraries against length on {each.gpu}, bfloat16, causal; dotted what the timing model predicts"


def published() -> dict[Path, str]:
    """The pages that depend on results, as they should be."""
    readme = ROOT / "README.md"
    return {ROOT / "docs" / "measured.md": measured_page(), readme: with_block(readme.read_text(), BEGIN, readme_block(), END)}


# --- Pictures -----------------------------------------------------------------------------------------------------------------------------


def picture(each: Results) -> Path:
    """Where the picture of a GPU is."""
    return ROOT / "docs" / f"measured-{each.folder.name}.png"


def source_of(each: Results) -> str:
    """What the picture is drawn from; it stands in the file, as its "Source"."""
    digest = hashlib.sha256()
    for name in ("attention.csv", "predicted.csv"):
        path = each.folder / name
        digest.update(path.read_bytes() if path.exists() else b"")
    return digest.hexdigest()


def publish() -> None:
    """Write pages and pictures."""
    plt = pyplot()
    for each in results():
        drawn = overview(each, plt)
        drawn.figure.savefig(picture(each), dpi=110, metadata={"Source": source_of(each), "Software": "benchmarks/report.py"})
        plt.close(drawn.figure)
    for path, text in published().items():
        path.write_text(text)
