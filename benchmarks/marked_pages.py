"""Pages of which a script writes what stands between two marks.

Contract: the rest of a page is left as it is; a page without its marks is an error.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

DOCS = Path(__file__).resolve().parents[1] / "docs"
PERFORMANCE, TIMING = DOCS / "performance.md", DOCS / "timing.md"


def with_block(page: str, begin: str, block: str, end: str) -> str:
    """A page with the text between its two marks renewed."""
    before, _, rest = page.partition(begin)
    _, found, after = rest.partition(end)
    assert found, f"the page lacks the marks {begin} and {end}"
    return f"{before}{begin}\n\n{block}\n\n{end}{after}"


def print_prediction(script: str, lines: Iterable[str], *, publish: bool, page: Path = PERFORMANCE) -> None:
    """Print a table line by line, as it is made; with `publish` put it into a page, too, between the marks of the script that predicts it."""
    table = []
    for line in lines:
        print(line, flush=True)
        table.append(line)
    if publish:
        begin, end = f"<!-- predicted: benchmarks/{script} --publish -->", f"<!-- end of {script} -->"
        page.write_text(with_block(page.read_text(encoding="utf-8"), begin, "\n".join(table), end), encoding="utf-8")
