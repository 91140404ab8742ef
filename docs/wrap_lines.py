"""Wrap the prose of docs/*.md, README.md and CHANGELOG.md at 100 characters. Only paragraphs with a longer line are touched; tables, code, headings and what a script fills in stay.

python docs/wrap_lines.py          # rewrites the pages; tests/test_docs.py looks for long lines
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

WIDTH = 100
DOCS = Path(__file__).resolve().parent
ELSEWHERE = ("measured.md", "mutations.md")
"""Pages that other scripts write as a whole."""
PAGES = [
    *(path for path in sorted(DOCS.glob("*.md")) if path.name not in ELSEWHERE),
    DOCS.parent / "README.md",
    DOCS.parent / "CHANGELOG.md",
]

_ITEM = re.compile(r"( *)([-*]|\d+\.) +")
_GENERATED = re.compile(r"<!-- (generated|measured)\b")
_END = re.compile(r"<!-- end of\b")
_NOT_AT_THE_START = re.compile(r" (?=(?:[-+*>|=]|[-+*]=|#+|\d+[.)])(?: |$))")
"""The space before what would be markup at the start of a line."""
_GLUED = "\x01"


def blocks(page: str) -> Iterator[tuple[bool, list[str]]]:
    """The lines of a page in groups: a paragraph or an item of a list, which is prose, or anything else."""
    fenced = filled = False
    paragraph: list[str] = []
    in_list = False
    for line in page.splitlines():
        fence = line.lstrip().startswith("```")
        verbatim = fenced or filled or fence or not line.strip() or line.startswith(("|", "#", "<", "!", ">"))
        verbatim = verbatim or (line.startswith("    ") and not paragraph and not in_list) or line.endswith("  ")
        if paragraph and (verbatim or _ITEM.match(line)):
            yield True, paragraph
            paragraph = []
        fenced ^= fence
        filled = (filled or bool(_GENERATED.match(line))) and not _END.match(line)
        if line.strip():
            in_list = bool(_ITEM.match(line)) or (in_list and line.startswith(" "))
        if verbatim:
            yield False, [line]
        else:
            paragraph.append(line)
    if paragraph:
        yield True, paragraph


def wrapped(paragraph: list[str]) -> list[str]:
    """The same with lines of at most `WIDTH` where words allow it. Code and what would be markup at the start of a line stay with the word before."""
    if max(map(len, paragraph)) <= WIDTH:
        return paragraph
    item = _ITEM.match(paragraph[0])
    first = item[0] if item else re.match(" *", paragraph[0])[0]  # type: ignore[index]
    text = " ".join([paragraph[0][len(first) :], *(line.strip() for line in paragraph[1:])])
    text = re.sub(r"`[^`]+`", lambda code: code[0].replace(" ", _GLUED), text)
    text = _NOT_AT_THE_START.sub(_GLUED, text)
    lines = textwrap.wrap(
        text, WIDTH, initial_indent=first, subsequent_indent=" " * len(first), break_long_words=False, break_on_hyphens=False
    )
    return [line.replace(_GLUED, " ") for line in lines]


def filled(page: str) -> str:
    """The page with its prose wrapped."""
    return "\n".join(line for is_prose, lines in blocks(page) for line in (wrapped(lines) if is_prose else lines)) + "\n"


def long_lines(page: str) -> list[str]:
    """Lines of prose that are longer than they have to be."""
    return [line for is_prose, lines in blocks(page) if is_prose and wrapped(lines) != lines for line in lines if len(line) > WIDTH]


if __name__ == "__main__":
    for path in PAGES:
        page = path.read_text(encoding="utf-8")
        path.write_text(filled(page), encoding="utf-8")
