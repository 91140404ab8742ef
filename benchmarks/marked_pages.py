"""Pages of which a script writes what stands between two marks.

Contract: the rest of a page is left as it is; a page without its marks is an error.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator, Sequence
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


def predict_or_publish(
    arguments: Sequence[str] | None, script: str, kernel: str, tables: Callable[[], Iterable[str]], tiles: Callable[[], Iterator[str]]
) -> int:
    """The command line of a script that predicts one kernel: its tables, with --publish into their page, too; or with --tiles what other tiles would do."""
    parser = argparse.ArgumentParser(description=f"Predicted speed of {kernel}.")
    parser.add_argument("--publish", action="store_true", help=f"write the tables to docs/{PERFORMANCE.name}")
    parser.add_argument("--tiles", action="store_true", help="other tiles instead")
    options = parser.parse_args(arguments)
    if options.tiles:
        for line in tiles():
            print(line, flush=True)
    else:
        print_prediction(script, tables(), publish=options.publish)
    return 0
