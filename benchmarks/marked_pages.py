"""Pages of which a script writes what stands between two marks.

Contract: the rest of a page is left as it is; a page without its marks is an error.
"""

from __future__ import annotations

from pathlib import Path

DOCS = Path(__file__).resolve().parents[1] / "docs"
PERFORMANCE, TIMING = DOCS / "performance.md", DOCS / "timing.md"


def with_block(page: str, begin: str, block: str, end: str) -> str:
    """A page with the text between its two marks renewed."""
    before, _, rest = page.partition(begin)
    _, found, after = rest.partition(end)
    assert found, f"the page lacks the marks {begin} and {end}"
    return f"{before}{begin}\n\n{block}\n\n{end}{after}"


def publish_prediction(script: str, table: str, page: Path = PERFORMANCE) -> None:
    """Put a table into a page, between the marks of the script that predicts it."""
    begin, end = f"<!-- predicted: benchmarks/{script} --publish -->", f"<!-- end of {script} -->"
    page.write_text(with_block(page.read_text(encoding="utf-8"), begin, table, end), encoding="utf-8")
