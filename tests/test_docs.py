"""Tables in the documentation that are made from the code are what the code makes."""

from __future__ import annotations

import runpy
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "docs" / "generate_tables.py"


def test_features_page_is_generated() -> None:
    """If this fails: python docs/generate_tables.py."""
    script = runpy.run_path(str(SCRIPT))
    page = script["PAGE"].read_text()
    assert script["filled"](page) == page
