"""docs/reports.md shows what the simulator really says: each of its kernels is run, and its report compared.

`python tests/simulator/test_reports_page.py` writes the page's reports anew.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from simulated import run_cuda

from cuflash.errors import SimulatorError
from cuflash.simulator import Options

PAGE = Path(__file__).parents[2] / "docs" / "reports.md"
EXAMPLE = re.compile(r"<!-- (?P<launch>[^\n]*) -->\n```cuda\n(?P<source>.*?)```\n\n```\n(?P<report>.*?)```", re.DOTALL)
ARRAY = re.compile(r"(\w+)\[(\d+)\]")
NUMBER = re.compile(r"(\w+)=(\d+)")
ADDRESS = re.compile(r"0x[0-9a-f]{6,}")


class Example(NamedTuple):
    """A kernel of the page, how it is launched, what the page says comes of it."""

    name: str
    launch: str
    source: str
    report: str


def examples() -> list[Example]:
    return [
        Example(re.findall(r"__global__ void (?:__\w+__\([^)]*\) )*(\w+)", m["source"])[-1], m["launch"], m["source"], m["report"])
        for m in EXAMPLE.finditer(PAGE.read_text())
    ]


def run(example: Example) -> str:
    """The report of an example as it is printed; addresses differ from run to run and are left out."""
    arrays: list[Any] = [np.zeros(int(size), dtype) for dtype, size in ARRAY.findall(example.launch)]
    numbers = {name: int(value) for name, value in NUMBER.findall(example.launch)}
    arch = f"compute_{numbers.pop('arch')}a" if "arch" in numbers else "compute_80"
    shared = numbers.pop("shared", 0)
    takes_number = re.search(r"__global__[^{]*, int \w+\)", example.source) is not None
    with pytest.raises(SimulatorError) as caught:
        run_cuda(example.source, *arrays, *[0] * takes_number, arch=arch, shared=shared, options=Options(threads=1), **numbers)
    text = re.sub(r"\S*test\.cu", f"{example.name}.cu", str(caught.value))
    return ADDRESS.sub("0x…", text) + "\n"


@pytest.mark.parametrize("example", examples(), ids=lambda example: example.name)
def test_reports_are_as_the_page_says(example: Example) -> None:
    def without_ptx(text: str) -> list[str]:  # which differs between versions of the compiler
        return [line for line in text.splitlines() if not line.lstrip().startswith("PTX:")]

    assert without_ptx(run(example)) == without_ptx(example.report)


def test_the_page_has_examples() -> None:
    assert len(examples()) >= 6


if __name__ == "__main__":
    text = PAGE.read_text()
    for match, example in zip(list(EXAMPLE.finditer(text)), examples(), strict=True):
        text = text.replace(match[0], match[0][: match.start("report") - match.start()] + run(example) + "```")
    PAGE.write_text(text)
    sys.stdout.write(f"wrote {len(examples())} reports\n")
