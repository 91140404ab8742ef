"""Pages of which a script writes what stands between two marks."""

from __future__ import annotations

from pathlib import Path

import pytest

import marked_pages
import predicted_hopper

PAGE = "before\n<!-- predicted: benchmarks/x.py --publish -->\n\nold\n\n<!-- end of x.py -->\nafter\n"


def test_a_table_is_printed_and_published(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It replaces what stood between the marks of its script, and nothing else; without `publish` the page stays."""
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    marked_pages.print_prediction("x.py", iter(["| a |", "| b |"]), publish=False, page=page)
    assert (page.read_text(), capsys.readouterr().out) == (PAGE, "| a |\n| b |\n")
    marked_pages.print_prediction("x.py", iter(["| a |", "| b |"]), publish=True, page=page)
    assert (page.read_text(), capsys.readouterr().out) == (PAGE.replace("old", "| a |\n| b |"), "| a |\n| b |\n")


def test_a_page_without_the_marks_is_an_error(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    with pytest.raises(AssertionError, match=r"the page lacks the marks .*y\.py"):
        marked_pages.print_prediction("y.py", [], publish=True, page=page)


def test_the_table_of_hopper_says_that_its_goals_are_met_by_prediction_alone() -> None:
    """In the script and on the page alike."""
    header = next(predicted_hopper.speed_lines())
    assert "would be met at, by the prediction" in header
    assert f"\n{header}\n" in marked_pages.PERFORMANCE.read_text(encoding="utf-8")
