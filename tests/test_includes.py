"""Includes of kernels go one way: ptx, argument structs, tile, kernels. No file is reached from itself."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

KERNELS = Path(__file__).parents[1] / "kernels"
INCLUDES = {
    path.relative_to(KERNELS).as_posix(): re.findall(r'^#include "([^"]*)"$', path.read_text(), re.M)
    for path in sorted(KERNELS.rglob("*.cu*"))
}


def layer(name: str) -> int:
    """What a file is, from what stands below everything to what nothing includes."""
    if name.endswith(".cu"):
        return 3
    return {"ptx": 0, "tile": 2, "": 1}["" if "/" not in name else name.split("/")[0]]


@pytest.mark.parametrize("name", INCLUDES)
def test_a_file_includes_only_what_stands_below_it_or_beside_it(name: str) -> None:
    for included in INCLUDES[name]:
        assert included in INCLUDES, f"{name} includes {included}, which is no file of kernels/"
        assert layer(included) <= layer(name), f"{name} includes {included}"
        assert not included.endswith(".cu"), f"{name} includes the kernel {included}"


def test_no_file_is_reached_from_itself() -> None:
    below: set[str] = set()  # files whose includes all end
    while True:
        more = {name for name, included in INCLUDES.items() if name not in below and set(included) <= below}
        if not more:
            break
        below |= more
    assert set(INCLUDES) - below == set()


def test_functions_of_kernels_are_short_enough_to_be_read() -> None:
    """A function starts at the left margin and ends with a brace there."""
    lengths = {}
    for name in INCLUDES:
        lines = (KERNELS / name).read_text().splitlines()
        start = None
        for number, line in enumerate(lines):
            if re.match(r"(DEVICE|extern) .*", line):
                start = number
            elif line == "}" and start is not None:
                lengths[f"{name}: {lines[start][:60]}"] = number - start + 1
                start = None
    assert len(lengths) > 50
    assert {name: length for name, length in lengths.items() if length > 130} == {}


def test_every_file_is_in_the_order_of_reading() -> None:
    """Of docs/kernels.md."""
    page = (KERNELS.parent / "docs" / "kernels.md").read_text(encoding="utf-8").partition("## What a block does")[0]
    assert [name for name in INCLUDES if not name.startswith("ptx/") and f"{Path(name).name}`" not in page] == []
