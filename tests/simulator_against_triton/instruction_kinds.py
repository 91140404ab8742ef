"""The table of docs/kernels_of_others.md: which instructions were executed by the cases of this directory, found out by running them.

python tests/simulator_against_triton/instruction_kinds.py          # rewrites the table; test_against_triton.py compares
"""

from __future__ import annotations

import bisect
import re
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parents[2] / "benchmarks")]

import numpy
import triton
from cases import Case, compiled, simulate
from every_case import every_case

from cuflash.simulator import Options
from cuflash.simulator.kernel_profile import Profile
from cuflash.simulator.parser import Statement

PAGE = Path(__file__).resolve().parents[2] / "docs" / "kernels_of_others.md"
BEGIN, END = "<!-- generated: kinds -->\n", "<!-- end of kinds -->\n"
VERSION = re.compile(r"Triton (\d+\.\d+\.\d+)")
ARCHES = ("sm_80", "sm_89", "sm_90")

_LAYOUT = re.compile(r"nvmma_shared<\{swizzlingByteWidth = (\d+), transposed = (true|false), elementBitWidth = (\d+)")
_WGMMA = re.compile(r"\.m64n\d+k")


def triton_version() -> str:
    """Of the compiler that is installed."""
    return str(triton.__version__)


def kind(statement: Statement) -> str:
    """What the table calls an instruction: its opcode, and of a wgmma where A comes from and which operands are transposed; all widths n are one."""
    opcode = _WGMMA.sub(".m64nNk", statement.opcode)
    if not opcode.startswith("wgmma.mma_async"):
        return opcode
    operands = [text.strip() for text in re.sub(r"\{[^}]*\}", "registers", statement.operands).split(",")]
    source = "A in registers" if operands[1] == "registers" else "A in shared memory"
    transposed = operands[6:] if operands[1] != "registers" else ["0", *operands[6:]]
    majors = "".join(f", {name} transposed" for name, flag in zip("AB", transposed, strict=False) if flag == "1")
    return f"{opcode} ({source}{majors})"


class ExecutedKinds(Profile):
    """Collects the kinds of all instructions that a launch executed."""

    def __init__(self) -> None:
        super().__init__()
        self.kinds: set[str] = set()

    def add(self, module: Any, ctas: int, records: Any, buffers: Any, buffer_words: Any) -> None:
        statements, starts = module.kernel.statements, module.program.starts
        for record in numpy.flatnonzero(records[:, 0]):
            index = bisect.bisect_right(starts, record) - 1
            if 0 <= index < len(statements):
                self.kinds.add(kind(statements[index]))


def executed(case: Case) -> set[str]:
    """The kinds of instructions that a case executes."""
    profile = ExecutedKinds()
    simulate(case, Options(threads=1, checks=False, profile=profile))
    return profile.kinds


def _layouts(case: Case) -> set[tuple[int, int, bool]]:
    """Swizzle, element bits and whether rows are columns, of the tiles in shared memory that wgmma and TMA share."""
    text = compiled(case, case.arguments()).asm["ttgir"]
    return {(int(span), int(bits), transposed == "true") for span, transposed, bits in _LAYOUT.findall(text)}


def table() -> str:
    """The generated part of the page."""
    cases = [case for case in every_case() if not case.exhaustive]
    counts: dict[str, Counter[str]] = defaultdict(Counter)  # kind -> architecture -> cases
    layouts: Counter[tuple[int, int, bool]] = Counter()
    for case in cases:
        for name in executed(case):
            counts[name][case.arch] += 1
        layouts.update(_layouts(case))
    of_arch = Counter(case.arch for case in cases)
    lines = [
        f"Triton {triton_version()}: "
        + ", ".join(f"{of_arch[arch]} kernels for {arch}" for arch in ARCHES)
        + ". After each instruction, how many of them "
        "executed it, in this order.",
        "",
        "| | executed |",
        "|---|---|",
    ]
    families: dict[str, list[str]] = defaultdict(list)
    for name in sorted(counts):
        families[name.split(".")[0]].append(f"`{name}` {'/'.join(str(counts[name][arch]) for arch in ARCHES)}")
    lines += [f"| {family} | {', '.join(names)} |" for family, names in sorted(families.items())]
    lines += [
        "",
        "Tiles in shared memory that wgmma and TMA read and write:",
        "",
        "| swizzle | bits of an element | contiguous along | kernels |",
        "|---|---|---|---|",
    ]
    for (span, bits, transposed), count in sorted(layouts.items()):
        lines.append(f"| {f'{span} bytes' if span else 'none'} | {bits} | {'columns' if transposed else 'rows'} | {count} |")
    return "\n".join(lines) + "\n"


def page_with(generated: str) -> str:
    """The page with the generated part replaced."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + generated + END + after


if __name__ == "__main__":
    PAGE.write_text(page_with(table()))
