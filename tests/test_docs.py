"""Tables in the documentation that are made from the code are what the code makes, and the calls that it shows can be made."""

from __future__ import annotations

import ast
import inspect
import re
import runpy
from pathlib import Path

import pytest

import cuflash

DOCS = Path(__file__).parents[1] / "docs"
SCRIPT = runpy.run_path(str(DOCS / "generate_tables.py"))


@pytest.mark.parametrize("path", SCRIPT["PAGES"], ids=lambda path: path.name)
def test_tables_are_generated(path: Path) -> None:
    """If this fails: python docs/generate_tables.py."""
    page = path.read_text()
    assert "<!-- generated: " in page
    assert SCRIPT["filled"](page) == page


def test_calls_for_those_who_come_from_elsewhere() -> None:
    page = (DOCS / "coming-from.md").read_text()
    calls = re.findall(r"\| `(cuflash\.[^`]*)` \|", page)
    assert len(calls) == 6
    for call in calls:
        expression = ast.parse(call, mode="eval").body
        assert isinstance(expression, ast.Call)
        function = getattr(cuflash, ast.unparse(expression.func).removeprefix("cuflash."))
        inspect.signature(function).bind(*expression.args, **{str(keyword.arg): keyword.value for keyword in expression.keywords})
