"""What a call of attention does on the simulator, kernel by kernel and line by line; needs no GPU.

`profile_call(sample)` runs one pass of a call under `cuflash.simulator.profile` and returns a `CallProfile`; `render` prints it: for each kernel instructions by
class, memory traffic against the ideal, bytes by operand, and the kernels' sources with what each line did. Counts are of PTX, before ptxas, and none is
a time. How long the simulator itself may take is what `estimate_seconds` says, and `announced` tells the user.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TextIO

from cuflash.cli import terminal_tables
from cuflash.cli.samples import Sample, numpy_call, plan_of
from cuflash.cli.terminal_tables import Table
from cuflash.jit import compiler
from cuflash.planning import kernel_cases
from cuflash.planning.plan import Plan
from cuflash.planning.visits import all_tiles, visited_tiles
from cuflash.problem.tile import Tiles
from cuflash.simulator import KernelProfile, LineProfile, Traffic, current_options, profile
from cuflash.simulator.kernel_profile import Attribution

Direction = Literal["forward", "backward"]


@dataclass(frozen=True)
class CallProfile:
    """What a call did.

    Attributes:
        sample: the call.
        plan: the pass that was profiled, with its kernels, tiles and grids.
        kernels: one profile per kernel, in the order of launches.
    """

    sample: Sample
    plan: Plan
    kernels: tuple[KernelProfile, ...]

    def to_json(self) -> dict[str, Any]:
        """Dictionaries and lists for the json module."""
        call = {**asdict(self.sample), "direction": "backward" if self.plan.backward else "forward"}
        return {"call": call, "arch": self.plan.device.arch, "kernels": [kernel.to_json() for kernel in self.kernels]}


def profile_call(sample: Sample, direction: Direction = "forward", *, tile: Tiles = None, seed: int = 0) -> CallProfile:
    """Run a call on the simulator and count what its kernels do.

    Args:
        sample: the call.
        direction: "backward" for its gradients; what the backward pass takes from the forward pass is not profiled.
        tile: of that pass; None for the default tiles.
        seed: of the arrays.

    Raises:
        CuflashError: what the call itself raises for these arguments.
    """
    plan = plan_of(sample, backward=direction == "backward", tile=tile)
    operands, arguments = numpy_call(sample, seed)
    grad_out = operands.pop("grad_out")
    if direction == "forward":
        with profile() as recorded:
            sample.forward(**operands, **arguments, tile=tile)
    else:
        out, lse = sample.forward(**operands, **arguments, return_lse=True)
        with profile() as recorded:
            sample.backward(grad_out, **operands, out=out, lse=lse, **arguments, **sample.backward_options, tile=tile)
    return CallProfile(sample, plan, recorded.kernels)


# --------------------------------------------------------------------------------------------------------------------------------- duration

_RATES = {"16-bit": 0.35e9, "float32": 0.11e9, "float32 units": 0.045e9}
"""Multiply-adds per second and thread of the simulator, somewhat below what it did on a busy server with any feature."""
_COLUMNS_OF_A_SCORE = 32
"""What else happens to a score takes about as long as so many multiply-adds."""
LONG = 10.0
"""Seconds from which on a user wants to know."""


def estimate_seconds(sample: Sample, direction: Direction = "forward", *, tile: Tiles = None) -> float:
    """Roughly how long `profile_call` takes here at most: the matrix products of all tiles that are visited, at a rate that the simulator should exceed.

    Tiles that data may hide count as visited; compilation, the making of the arrays and other processes are left out.

    Raises:
        CuflashError: what the call itself raises for these arguments.
    """
    if direction == "forward":
        return _seconds_of(plan_of(sample, tile=tile))
    return _seconds_of(plan_of(sample)) + _seconds_of(plan_of(sample, backward=True, tile=tile))


def _seconds_of(plan: Plan) -> float:
    problem, seconds = plan.problem, 0.0
    for kernel in plan.kernels:
        if not kernel.spec.is_tiled:
            continue
        case = kernel.case
        visited = visited_tiles(problem, kernel.tile, by_keys=kernel.spec.owns_keys)
        per_head = all_tiles(problem, kernel.tile) if visited is None else visited
        work = kernel_cases.multiply_adds(case, kernel.tile, plan.device) + _COLUMNS_OF_A_SCORE * kernel.tile.tile_q * kernel.tile.tile_kv
        units = "float32 units" if case.uses_simt(plan.device) else "float32" if problem.dtype == "float32" else "16-bit"
        num_threads = max(1, min(current_options().num_threads(), kernel.num_blocks))
        seconds += (problem.num_sequences or problem.batch) * problem.num_heads_q * per_head * work / _RATES[units] / num_threads
    return seconds


@contextmanager
def announced(seconds: float, stream: TextIO | None = None) -> Iterator[None]:
    """Around what takes so long: tell so beforehand on `stream`, by default standard error, and on a terminal count the seconds.

    What takes less than `LONG` is not worth a word.
    """
    stream = stream or sys.stderr
    if seconds < LONG:
        yield
        return
    stream.write(
        f"The simulator may need {_duration(seconds)} for this; Ctrl-C stops it, and a shorter --seqlen or fewer --heads take less.\n"
    )
    stream.flush()
    if not stream.isatty():
        yield
        return
    finished = threading.Event()
    counter = threading.Thread(target=_count_seconds, args=(seconds, finished, stream), daemon=True)
    counter.start()
    try:
        yield
    finally:
        finished.set()
        counter.join()


def _count_seconds(seconds: float, finished: threading.Event, stream: TextIO) -> None:
    start = time.monotonic()
    while not finished.wait(1.0):
        stream.write(f"\r{_duration(time.monotonic() - start)} of at most about {_duration(seconds)}\033[K")
        stream.flush()
    stream.write("\r\033[K")
    stream.flush()


def _duration(seconds: float) -> str:
    """For people: "42 s", "5 min" or "9 h"."""
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


# -------------------------------------------------------------------------------------------------------------------------------- rendering


@dataclass(frozen=True)
class View:
    """What to show of the lines.

    Attributes:
        attribution: see `cuflash.simulator.kernel_profile.Attribution`.
        top: the lines with the most instructions, that many; all with 0.
        full: every line of every file that has counts, instead.
    """

    attribution: Attribution = "innermost"
    top: int = 20
    full: bool = False


def render(result: CallProfile, view: View | None = None, stream: TextIO | None = None) -> None:
    """Print a profile to `stream`, by default standard output: with rich if there is one and the stream is a terminal."""
    stream = stream or sys.stdout
    view = view or View()
    stream.write(f"{result.plan}\n")
    for kernel in result.kernels:
        stream.write(f"\n{_headline(kernel)}\n")
        for title, table in _tables(kernel, view):
            stream.write(f"\n{title}\n")
            terminal_tables.write(table, stream, indent="  ")


def _headline(kernel: KernelProfile) -> str:
    total = kernel.total
    launches = "1 launch" if kernel.launches == 1 else f"{kernel.launches} launches"
    return (
        f"{kernel.name}: {launches}, {kernel.ctas} blocks, {total.issued} warp instructions, "
        f"{total.matrix_flops / 1e6:.4g} MFLOP in matrix instructions, {total.waits} waits"
    )


def _tables(kernel: KernelProfile, view: View) -> Iterable[tuple[str, Table]]:
    """Each with its title."""
    total = kernel.total
    used = {name: count for name, count in total.instructions.items() if count}
    shares = [(_share(n, total.issued), str(n), name) for name, n in used.items()]
    yield "Instructions by class", Table(("share", "issued", "class"), shares, 1)
    traffic = {
        "shared memory, reads: wavefronts": total.shared_reads,
        "shared memory, writes: wavefronts": total.shared_writes,
        "global memory, reads: sectors": total.global_reads,
        "global memory, writes: sectors": total.global_writes,
    }
    rows = [(*map(str, (t.requests, t.used, t.ideal, t.excess)), name) for name, t in traffic.items() if t.requests]
    yield "Memory requests", Table(("requests", "used", "ideal", "excess", ""), rows, 1)
    header = ("size", "read", "in sectors", "/ size", "written", "in sectors", "/ size", "operand")
    operands = [
        (str(o.size), *_moved(o.bytes_read, o.sector_bytes_read, o.size), *_moved(o.bytes_written, o.sector_bytes_written, o.size), o.name)
        for o in kernel.operands
        if o.bytes_read or o.bytes_written
    ]
    title = "Global memory by operand: bytes asked for, bytes of the sectors moved, how often that is the whole operand"
    yield title, Table(header, operands, 1)
    yield from _listing(kernel, view)


_LINE_HEADER = ("share", "issued", "matrix", "wavefronts", "ideal", "sectors", "ideal", "waits")


def _listing(kernel: KernelProfile, view: View) -> Iterable[tuple[str, Table]]:
    """The lines that did most, or all lines of all files."""
    lines = kernel.lines_by(view.attribution)
    if not view.full:
        ranked = sorted(lines, key=lambda line: -line.counts.issued)
        chosen = ranked[: view.top or None]
        rows = [(*_cells(line, kernel), _where(line), _text(line.path, line.line).strip()) for line in chosen]
        yield f"Lines with the most instructions ({len(chosen)} of {len(lines)})", Table((*_LINE_HEADER, "line", "source"), rows, 2)
        return
    for path in dict.fromkeys(line.path for line in lines):
        counts = {line.line: line for line in lines if line.path == path}
        texts = _source(path) or [""] * max(counts)
        rows = [
            (*(_cells(counts[number], kernel) if number in counts else [""] * len(_LINE_HEADER)), str(number), text)
            for number, text in enumerate(texts, 1)
        ]
        if 0 in counts:
            rows.append((*_cells(counts[0], kernel), "-", ""))
        yield path or "Instructions without a source line", Table((*_LINE_HEADER, "line", "source"), rows, 2)


def _cells(line: LineProfile, kernel: KernelProfile) -> tuple[str, ...]:
    counts = line.counts
    return (
        _share(counts.issued, kernel.total.issued),
        str(counts.issued),
        str(counts.instructions["matrix"] or ""),
        *_used_and_ideal(counts.shared_memory),
        *_used_and_ideal(counts.global_memory),
        str(counts.waits or ""),
    )


def _used_and_ideal(traffic: Traffic) -> tuple[str, str]:
    return (str(traffic.used), str(traffic.ideal)) if traffic.requests else ("", "")


def _moved(nbytes: int, sector_bytes: int, size: int) -> tuple[str, str, str]:
    return (str(nbytes), str(sector_bytes), f"{sector_bytes / size:.2f}") if nbytes else ("", "", "")


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f}%" if whole else ""


def _where(line: LineProfile) -> str:
    return f"{line.path.removeprefix('kernels/')}:{line.line or '-'}" if line.path else "-"


def _source(path: str) -> list[str]:
    """The lines of a kernel file as line information names it; none if it cannot be read."""
    try:
        return (compiler.kernels_directory().parent / Path(path)).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return []


def _text(path: str, number: int) -> str:
    lines = _source(path)
    return lines[number - 1] if 0 < number <= len(lines) else ""
