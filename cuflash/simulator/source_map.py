"""From the `.loc` lines of PTX to lines of CUDA source and the calls that were inlined around them.

Contract: `SourceMap.chain` names places; `source_lines` finds their text on the disk or in the mapping given to a module.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from cuflash.simulator.parser import Kernel

_LOC = re.compile(r"\.loc\s+(\d+)\s+(\d+)\s+(\d+)(?:.*?inlined_at\s+(\d+)\s+(\d+)\s+(\d+))?")
_MAX_DEPTH = 64  # of calls

Position = tuple[int, int, int]  # file, line, column
Place = tuple[str, int]  # path, line


def _parse_loc(text: str) -> tuple[Position, Position | None]:
    match = _LOC.match(text)
    if match is None:
        return (0, 0, 0), None
    numbers = [int(group) if group else 0 for group in match.groups()]
    here, caller = (numbers[0], numbers[1], numbers[2]), (numbers[3], numbers[4], numbers[5])
    return here, caller if match[4] else None


class SourceMap:
    """The places of a kernel's instructions.

    A `.loc` of inlined code names the position of the call. Where that call was inlined in turn says a `.loc` of the call's position: the nearest
    one before, or else the first one after.
    """

    def __init__(self, kernel: Kernel) -> None:
        self._files = kernel.files
        self._locs = [_parse_loc(text) for text in kernel.locations]
        first: dict[Position, int] = {}
        for number, (position, _) in enumerate(self._locs):
            first.setdefault(position, number)
        self._announced: list[int | None] = []  # for each .loc, that of the call around it
        latest: dict[Position, int] = {}
        for number, (position, caller) in enumerate(self._locs):
            self._announced.append(None if caller is None else latest.get(caller, first.get(caller)))
            latest[position] = number

    def chain(self, loc: int) -> list[Place]:
        """File and line of `.loc` number `loc`, then of the calls around it, innermost first; empty for -1, which stands for no `.loc`."""
        chain: list[Place] = []
        number: int | None = loc if loc >= 0 else None
        while number is not None and len(chain) < _MAX_DEPTH:
            position, caller = self._locs[number]
            chain.append(self._place(position))
            number = self._announced[number]
            if number is None and caller is not None:
                chain.append(self._place(caller))
        return chain

    def _place(self, position: Position) -> Place:
        return self._files.get(position[0], "?"), position[1]


def source_lines(path: str, sources: Mapping[str, str]) -> list[str]:
    """The lines of a source file, from `sources` or from the disk; none if it is nowhere."""
    text = sources.get(path) or sources.get(Path(path).name)
    if text is None:
        text = next((content for name, content in sources.items() if path.endswith("/" + name)), None)
    if text is None:
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            return []
    return text.splitlines()
