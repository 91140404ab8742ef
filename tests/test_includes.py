"""Includes of kernels go one way: ptx, argument structs, tile, kernels. No file is reached from itself."""

from __future__ import annotations

import re
from collections.abc import Iterator
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


def test_every_file_is_in_the_order_of_reading() -> None:
    """Of docs/kernels.md."""
    page = (KERNELS.parent / "docs" / "kernels.md").read_text(encoding="utf-8").partition("## What a block does")[0]
    assert [name for name in INCLUDES if not name.startswith("ptx/") and f"{Path(name).name}`" not in page] == []


LONGEST = 130
"""Lines of a function."""


def lengths(lines: list[str]) -> Iterator[int]:
    """Of functions and of members of classes: as clang-format leaves them, what is not indented begins or ends something."""
    begin = 0
    for number, line in enumerate(lines):
        if line and not line.startswith((" ", "}", "#", "//", "private", "public")):
            begin = number
        elif line.startswith("}"):
            is_class = lines[begin].startswith(("class ", "struct "))
            yield from lengths([inner[2:] for inner in lines[begin + 1 : number]]) if is_class else (number - begin + 1,)


@pytest.mark.parametrize("name", INCLUDES)
def test_no_function_is_longer_than_a_reader_remembers(name: str) -> None:
    assert max(lengths((KERNELS / name).read_text(encoding="utf-8").splitlines()), default=0) <= LONGEST


def test_lengths_are_those_of_functions() -> None:
    kernels = [length for name in INCLUDES if name.endswith(".cu") for length in lengths((KERNELS / name).read_text().splitlines())]
    assert max(kernels) > 100
    assert list(lengths(["class A {", "  int f() {", "    x;", "  }", "};", "DEVICE int g(int a,", "             int b) {", "}"])) == [3, 3]
