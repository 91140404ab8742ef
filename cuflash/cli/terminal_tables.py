"""Tables for people: with rich where there is one and the stream is a terminal that is wide enough, else as plain text.

Contract: no cell is cut. `write` prints a table; `plain` gives its text.
"""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TextIO


@dataclass(frozen=True)
class Table:
    """Rows of text under a header.

    Attributes:
        header: one cell for each column; empty for a table without.
        rows: as many cells each.
        num_left: how many of the last columns are flush left; the others are flush right.
        marked: numbers of rows that a terminal shows in red.
    """

    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    num_left: int = 0
    marked: Collection[int] = ()

    @property
    def lines(self) -> list[tuple[str, ...]]:
        """The header, if there is one, and the rows."""
        return [*([self.header] if self.header else []), *self.rows]

    def widths(self) -> list[int]:
        """Characters of the widest cell of each column."""
        return [max(map(len, column)) for column in zip(*self.lines, strict=True)]


def write(table: Table, stream: TextIO, *, indent: str = "") -> None:
    """Print a table."""
    if not (stream.isatty() and _write_with_rich(table, stream)):
        stream.write(plain(table, indent))


def plain(table: Table, indent: str = "") -> str:
    """The table as text without trailing blanks, a rule below the header."""
    widths = table.widths()
    first_left = len(widths) - table.num_left

    def line(row: Sequence[str]) -> str:
        flush = (cell.ljust(w) if i >= first_left else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True)))
        return indent + "  ".join(flush).rstrip() + "\n"

    lines = list(map(line, table.lines))
    if table.header:
        lines.insert(1, indent + "-" * (len(lines[0].rstrip()) - len(indent)) + "\n")
    return "".join(lines)


def _write_with_rich(table: Table, stream: TextIO) -> bool:
    """False without rich, or where the terminal is too narrow: rich would cut cells where plain text only wraps lines."""
    between = 3  # characters of rich between two cells
    if sum(width + between for width in table.widths()) + 1 > shutil.get_terminal_size().columns:
        return False
    try:
        console = importlib.import_module("rich.console").Console(file=stream)
        view = importlib.import_module("rich.table").Table(header_style="bold")
        text = importlib.import_module("rich.text").Text
    except ImportError:
        return False
    for i, name in enumerate(table.header):
        view.add_column(name, justify="left" if i >= len(table.header) - table.num_left else "right")
    for number, row in enumerate(table.rows):
        view.add_row(*map(text, row), style="red" if number in table.marked else None)
    console.print(view)
    return True
