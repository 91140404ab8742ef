"""What launches did, per kernel and per source line: the result of `cuflash.simulator.profile()`.

Contract: a `Profile` collects what the core counted; the other classes are frozen values made from it on demand. Nothing here is a time: the
simulator has no clock. How requests are counted as wavefronts and sectors is described in core/profile.h.
"""

from __future__ import annotations

import bisect
import dataclasses
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from cuflash.simulator import native
from cuflash.simulator.source_map import SourceMap

if TYPE_CHECKING:
    from cuflash.simulator.module import Module

Attribution = Literal["innermost", "kernel"]
"""Which line an instruction of an inlined function belongs to: the function's own, or the kernel's line around all calls."""

NO_SOURCE = ("", 0)


@dataclass(frozen=True)
class Traffic:
    """Requests of warps for memory.

    Attributes:
        requests: executions that accessed memory for at least one lane.
        used: wavefronts of shared memory, or 32-byte sectors of global memory.
        ideal: the fewest that would have done: one wavefront for every (half, quarter) warp that accesses anything; the bytes that a request asks
            for, each once, in whole sectors.
    """

    requests: int = 0
    used: int = 0
    ideal: int = 0

    @property
    def excess(self) -> int:
        """Wavefronts lost to bank conflicts, or sectors to scattered and unaligned addresses."""
        return self.used - self.ideal

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.requests + other.requests, self.used + other.used, self.ideal + other.ideal)


@dataclass(frozen=True)
class Counts:
    """What a kernel or a line of it did.

    Attributes:
        instructions: class -> instructions issued, one per warp and group of converged lanes; classes are those of the core's table.
        matrix_flops: floating-point operations of matrix instructions.
        waits: how often a warp could not go on at a barrier or another waiting instruction when it came there; no time.
        shared_reads, shared_writes, global_reads, global_writes: memory requests; atomics are writes, the copies of cp.async are reads of
            global and writes of shared memory.
    """

    instructions: Mapping[str, int]
    matrix_flops: int
    waits: int
    shared_reads: Traffic
    shared_writes: Traffic
    global_reads: Traffic
    global_writes: Traffic

    @property
    def issued(self) -> int:
        """Instructions of all classes."""
        return sum(self.instructions.values())

    @property
    def shared_memory(self) -> Traffic:
        """Reads and writes together."""
        return self.shared_reads + self.shared_writes

    @property
    def global_memory(self) -> Traffic:
        """Reads and writes together."""
        return self.global_reads + self.global_writes


@dataclass(frozen=True)
class OperandProfile:
    """Traffic of one buffer of a launch.

    Attributes:
        name: as the launch calls it.
        size: bytes of the buffer, the largest of all launches.
        bytes_read, bytes_written: that requests asked for; what lanes of one request share counts once.
        sector_bytes_read, sector_bytes_written: of the 32-byte sectors that these requests moved.
    """

    name: str
    size: int
    bytes_read: int
    sector_bytes_read: int
    bytes_written: int
    sector_bytes_written: int


@dataclass(frozen=True)
class LineProfile:
    """One line of source; path "" and line 0 stand for instructions without one."""

    path: str
    line: int
    counts: Counts


@dataclass(frozen=True)
class KernelProfile:
    """One kernel over all launches of its module.

    Attributes:
        name: of the kernel.
        launches, ctas: how often it was launched, and blocks of all launches.
        total: what it did.
        operands: its buffers in the order in which they were first given.
        lines: by path and line, each instruction at its own line.
        kernel_lines: the same with inlined functions attributed to the line of the kernel that calls them.
    """

    name: str
    launches: int
    ctas: int
    total: Counts
    operands: tuple[OperandProfile, ...]
    lines: tuple[LineProfile, ...]
    kernel_lines: tuple[LineProfile, ...]

    def lines_by(self, attribution: Attribution) -> tuple[LineProfile, ...]:
        """`lines` or `kernel_lines`."""
        return self.lines if attribution == "innermost" else self.kernel_lines

    def to_json(self) -> dict[str, Any]:
        """Dictionaries and lists for the json module; the names are those of the attributes."""
        return dataclasses.asdict(self)


@dataclass(eq=False)
class _Recording:
    """The sums of one module's launches; columns are the words of RecordProfile and BufferProfile in core/program.h."""

    module: Module
    records: npt.NDArray[np.uint64]
    launches: int = 0
    ctas: int = 0
    buffers: dict[str, npt.NDArray[np.uint64]] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)

    def counts(self, classes: npt.NDArray[np.uint8], rows: npt.NDArray[np.intp] | slice = slice(None)) -> Counts:
        """The sum over some records."""
        names = native.core().class_names
        part = self.records[rows]
        issued = np.bincount(classes[rows], weights=part[:, 0], minlength=len(names))
        instructions = {name: int(count) for name, count in zip(names, issued, strict=True) if name != "none"}
        _, waits, matrix_flops, *words = (int(word) for word in part.sum(axis=0))
        traffic = [Traffic(*words[i : i + 3]) for i in range(0, len(words), 3)]
        return Counts(instructions, matrix_flops, waits, *traffic)

    def profile(self) -> KernelProfile:
        """The values that users see."""
        kernel, starts = self.module.kernel, self.module.program.starts
        classes = native.core().classes(self.module.handle, len(self.records))
        source_map = SourceMap(kernel)
        chains = []  # of every record that ran
        for record in np.flatnonzero(self.records[:, 0]):
            statement = bisect.bisect_right(starts, record) - 1
            loc = kernel.statements[statement].loc if 0 <= statement < len(kernel.statements) else -1
            chains.append((int(record), source_map.chain(loc) or [NO_SOURCE]))

        def lines(which: int) -> tuple[LineProfile, ...]:
            rows: dict[tuple[str, int], list[int]] = {}
            for record, chain in chains:
                rows.setdefault(chain[which], []).append(record)
            made = (LineProfile(path, line, self.counts(classes, np.array(rows[path, line]))) for path, line in sorted(rows))
            return tuple(line for line in made if line.counts.issued)

        operands = tuple(
            OperandProfile(name, self.sizes[name], int(read), 32 * int(sectors_read), int(written), 32 * int(sectors_written))
            for name, (read, sectors_read, written, sectors_written) in self.buffers.items()
        )
        return KernelProfile(kernel.name, self.launches, self.ctas, self.counts(classes), operands, lines(0), lines(-1))


class Profile:
    """Collects what profiled launches count; may be shared by threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._recordings: dict[int, _Recording] = {}  # by the identity of the module, which the recording keeps alive

    def add(
        self,
        module: Module,
        ctas: int,
        records: npt.NDArray[np.uint64],
        buffers: Sequence[tuple[str, int]],
        buffer_words: npt.NDArray[np.uint64],
    ) -> None:
        """Take in one launch: arrays that the core filled, and name and size of the buffers."""
        with self._lock:
            recording = self._recordings.setdefault(id(module), _Recording(module, np.zeros_like(records)))
            recording.launches += 1
            recording.ctas += ctas
            recording.records += records
            for (name, size), words in zip(buffers, buffer_words, strict=True):
                recording.buffers[name] = recording.buffers.get(name, np.zeros_like(words)) + words
                recording.sizes[name] = max(size, recording.sizes.get(name, 0))

    @property
    def kernels(self) -> tuple[KernelProfile, ...]:
        """One profile per kernel, in the order of first launches."""
        with self._lock:
            return tuple(recording.profile() for recording in self._recordings.values())

    def to_json(self) -> list[dict[str, Any]]:
        """`KernelProfile.to_json` of all kernels."""
        return [kernel.to_json() for kernel in self.kernels]
