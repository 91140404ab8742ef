"""Turn a failed check into text that names the source line.

Contract: `describe_statement` gives the PTX of a statement, and from its `.loc` the line of CUDA source with the chain of calls that were inlined.
`format_report` adds what failed, where, and who waits for whom. Source text is read from disk, or from the mapping given to the module.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from cuflash.simulator.native import NO_RECORD, NO_WARP, Place, Report
from cuflash.simulator.parser import Kernel
from cuflash.simulator.source_map import SourceMap, source_lines

_MAX_PLACES = 8


def _source_text(path: str, line: int, sources: Mapping[str, str]) -> str:
    lines = source_lines(path, sources)
    return lines[line - 1].strip() if 0 < line <= len(lines) else ""


def describe_statement(kernel: Kernel, index: int, sources: Mapping[str, str] | None = None) -> str:
    """The PTX of a statement and its source lines, one per line of text."""
    if not 0 <= index < len(kernel.statements):
        return "  at the end of the kernel"
    statement = kernel.statements[index]
    lines = [f"  PTX: {statement.text()[:160]}"]
    for i, (path, line) in enumerate(SourceMap(kernel).chain(statement.loc)):
        text = _source_text(path, line, sources or {})
        lines.append(f"  {'at' if i == 0 else 'inlined at'} {path}:{line}{': ' + text if text else ''}")
    return "\n".join(lines)


def _lanes(mask: int) -> str:
    """0-3, 8, 30-31."""
    if mask == 0xFFFFFFFF:
        return "all lanes"
    runs: list[str] = []
    lane = 0
    while lane < 32:
        if not mask >> lane & 1:
            lane += 1
            continue
        first = lane
        while lane < 32 and mask >> lane & 1:
            lane += 1
        runs.append(str(first) if lane - 1 == first else f"{first}-{lane - 1}")
    return ("lane " if runs and mask & (mask - 1) == 0 else "lanes ") + ", ".join(runs)


def nearest_buffer(address: int, nbytes: int, buffers: Sequence[tuple[int, int, str]]) -> str:
    """How far an access misses the buffer that is nearest to it."""
    best: tuple[int, str] | None = None
    for begin, size, name in buffers:
        end = begin + size
        if address + nbytes <= begin:
            miss, text = begin - address, f"starts {begin - address} bytes before the beginning of"
        elif address >= end:
            miss, text = address - end, f"starts {address - end} bytes past the end of" if address > end else "starts at the end of"
        else:
            over = address + nbytes - end
            miss, text = 0, f"ends {over} bytes past the end of" if over > 0 else f"starts {begin - address} bytes before the beginning of"
        if best is None or miss < best[0]:
            best = (miss, f"{text} '{name}' ({size} bytes at 0x{begin:x})")
    return best[1] if best else "the launch has no buffers"


def enclosing_buffer(address: int, buffers: Sequence[tuple[int, int, str]]) -> str:
    """Which byte of which buffer lies at an address."""
    for begin, size, name in buffers:
        if begin <= address < begin + size:
            return f"at byte {address - begin} of '{name}'"
    return f"at 0x{address:x}"


def format_report(
    report: Report,
    kernel: Kernel,
    starts: npt.NDArray[np.uint32],
    buffers: Sequence[tuple[int, int, str]],
    sources: Mapping[str, str],
) -> str:
    """The whole message of a SimulatorError."""

    def statement_of(record: int) -> int:
        return bisect.bisect_right(starts, record) - 1

    message = report.message.decode()
    check = (report.check or b"").decode()
    if check == "global-bounds":
        message += ", " + nearest_buffer(report.address, report.bytes, buffers)
    elif report.address:
        message += ", " + enclosing_buffer(report.address, buffers)
    where = f"kernel {kernel.name}, block {tuple(report.block)}"
    if report.where.record != NO_RECORD:
        where += f", warp {report.where.warp}, {_lanes(report.where.lanes)}"
    lines = [f"[{check}] {message}", f"  in {where}"]
    if report.where.record != NO_RECORD:
        lines.append(describe_statement(kernel, statement_of(report.where.record), sources))
    lines += _describe_places(report.where.rank, list(report.places[: report.num_places]), kernel, statement_of, sources)
    return "\n".join(lines)


def _describe_places(
    rank: int, places: Sequence[Place], kernel: Kernel, statement_of: Callable[[int], int], sources: Mapping[str, str]
) -> list[str]:
    """Who else stands where; warps at the same instruction together."""
    together: dict[int, list[str]] = {}
    for place in places:
        name = f"warp {place.warp} ({_lanes(place.lanes)})" if place.warp != NO_WARP else "issued by"
        if place.rank != rank:
            name += f" of block {place.rank} of the cluster"
        together.setdefault(statement_of(place.record), []).append(name)
    lines = []
    for index, who in list(together.items())[:_MAX_PLACES]:
        lines.append(f"  {', '.join(who)}:")
        lines.append("\n".join("  " + line for line in describe_statement(kernel, index, sources).splitlines()))
    return lines
