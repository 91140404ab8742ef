"""A kernel that is ready to run, and its launch.

Contract: `Module` decodes once; `launch` may be called from several threads at the same time. Nothing here knows an instruction.
"""

from __future__ import annotations

import contextlib
import contextvars
import ctypes
import functools
import os
import re
import struct
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from cuflash.arrays.descriptions import describe
from cuflash.errors import OptionError, SimulatorError
from cuflash.simulator import native, parser, program_cache, report
from cuflash.simulator.decoder import decode
from cuflash.simulator.encoder import initial_data
from cuflash.simulator.options import SCHEDULES, Options, current_options
from cuflash.simulator.program import Program, create

MAX_THREADS = 1024
MAX_GRID = (2**31 - 1, 65535, 65535)
MAX_CLUSTER = 16
MAX_ADDRESS = 2**60  # above it are the windows of generic addresses
MAX_SHARED_BYTES = 228 * 1024  # of a multiprocessor, on any architecture; what a block may have is for the caller to know
Extent = tuple[int, int, int]

_TARGET = re.compile(r"^\s*\.target\s+sm_(\d+)\w?", re.M)


class Buffer(NamedTuple):
    """Global memory that a kernel may touch.

    Attributes:
        address: of its first byte.
        nbytes: its size.
        name: for reports.
        written: one byte for each of its bytes, not 0 once that was written: reading others is an error, writing sets it. None: all is initialised.
    """

    address: int
    nbytes: int
    name: str
    written: npt.NDArray[np.uint8] | None = None


@dataclass(frozen=True)
class Counters:
    """What a launch executed.

    Attributes:
        warp_instructions: instructions issued, one per warp and group of converged lanes.
        matrix_instructions: of these, matrix multiplications.
        matrix_flops: their floating-point operations.
        barriers: completed phases of barriers.
        async_copies: copies issued, one per warp.
        ctas: blocks.
    """

    warp_instructions: int
    matrix_instructions: int
    matrix_flops: int
    barriers: int
    async_copies: int
    ctas: int


class Launch(NamedTuple):
    """A launch that ran to its end."""

    kernel: str
    options: Options
    counters: Counters


_recording: contextvars.ContextVar[list[Launch] | None] = contextvars.ContextVar("cuflash_simulator_launches", default=None)


@contextlib.contextmanager
def record_launches() -> Iterator[list[Launch]]:
    """All launches inside a `with` block, in order, in a list that grows; of nested blocks the innermost takes them."""
    launches: list[Launch] = []
    token = _recording.set(launches)
    try:
        yield launches
    finally:
        _recording.reset(token)


def _pointer(values: npt.NDArray[np.generic]) -> int:
    return int(values.ctypes.data)


def _buffers(buffers: object) -> list[Buffer]:
    """What a launch was given, checked: the core believes it."""
    expected = "expected a sequence of Buffer(address, nbytes, name, written)"
    if not isinstance(buffers, (list, tuple)):
        raise SimulatorError(f"buffers: got {describe(buffers)}; {expected}")
    checked = []
    for buffer in buffers:
        if not isinstance(buffer, tuple) or not 3 <= len(buffer) <= 4 or not isinstance(buffer[2], str):
            raise SimulatorError(f"buffers: got {describe_all(buffer)} among them; {expected}")
        made = Buffer(*buffer)
        numbers = isinstance(made.address, int) and isinstance(made.nbytes, int)
        if not numbers or made.nbytes < 0 or not 0 <= made.address <= MAX_ADDRESS - made.nbytes:
            raise SimulatorError(
                f"buffer {made.name[:100]}: {describe(made.nbytes)} bytes at {describe(made.address)} are no range of addresses"
            )
        written = made.written
        if written is not None and not (
            isinstance(written, np.ndarray) and written.dtype == np.uint8 and written.flags.c_contiguous and written.flags.writeable
        ):
            raise SimulatorError(f"buffer {made.name[:100]}: written is {describe(written)}; expected a contiguous array of uint8, or None")
        checked.append(made)
    return checked


def describe_all(values: object) -> str:
    """A few numbers for a message."""
    return f"({', '.join(map(describe, values[:5]))})" if isinstance(values, (tuple, list)) else describe(values)


def _range(buffer: Buffer) -> tuple[int, int, int]:
    """As the core's `Buffer`."""
    if buffer.written is not None and buffer.written.size != buffer.nbytes:
        raise SimulatorError(f"buffer {buffer.name} has {buffer.nbytes} bytes, but {buffer.written.size} say whether they are written")
    return buffer.address, buffer.address + buffer.nbytes, 0 if buffer.written is None else _pointer(buffer.written)


def _check_target(ptx: str) -> None:
    """Whether the GPU that CUFLASH_SIMULATOR_ARCH names, if it does, would load this PTX."""
    named = os.environ.get("CUFLASH_SIMULATOR_ARCH")
    target = _TARGET.search(ptx)
    if not named or target is None:
        return
    capability = re.fullmatch(r"sm_(\d{2,3})[af]?", named)
    if capability is None:
        raise OptionError("CUFLASH_SIMULATOR_ARCH", repr(named), "an architecture such as sm_80", "Name one, or unset the variable.")
    if int(target[1][:9]) > int(capability[1]):
        raise SimulatorError(
            f"PTX for {target[0].split()[1]} does not run on {named}, which CUFLASH_SIMULATOR_ARCH names: compile it for that, or unset the variable"
        )


def _text(ptx: object) -> str:
    if isinstance(ptx, bytes):
        try:
            ptx = ptx.decode()
        except UnicodeDecodeError as error:
            raise SimulatorError(
                f"ptx: got bytes that are no text ({error.reason} at byte {error.start}); expected PTX, not a cubin"
            ) from error
    if not isinstance(ptx, str):
        raise SimulatorError(f"ptx: got {describe(ptx)}; expected the text of a PTX module, as str or bytes")
    return ptx.rstrip("\0")


@contextlib.contextmanager
def _reading() -> Iterator[None]:
    """Whatever odd numbers and names in PTX lead to is one kind of error."""
    try:
        yield
    except (ArithmeticError, LookupError, TypeError, ValueError, AttributeError, RecursionError, MemoryError, struct.error) as error:
        reason = str(error).partition("\n")[0][:200]
        raise SimulatorError(f"the PTX cannot be read: {type(error).__name__}{f' ({reason})' if reason else ''}") from error


class Module:
    """One decoded kernel.

    Args:
        ptx: the text of a PTX module.
        entry: the kernel's name; may be left out when there is only one.
        sources: names of source files -> their text, for reports about files that are not on disk.
        keep: decode once for all processes: the program is kept in the cache on disk.
        aligned_as_declared: dynamic shared memory is aligned as its declaration asks for and deliberately no better, so that a kernel that counts on
            more is found out. False: it starts at 1024 or behind the static variables, as on a GPU.

    Attributes:
        program: the decoded kernel.
        handle: the core's own copy of it.

    Raises:
        SimulatorError: an instruction is not supported; the message names it and its source line. Or the module is for a newer GPU than
            CUFLASH_SIMULATOR_ARCH names.
    """

    def __init__(
        self,
        ptx: str | bytes,
        entry: str | None = None,
        *,
        sources: Mapping[str, str] | None = None,
        keep: bool = False,
        aligned_as_declared: bool = False,
    ) -> None:
        self._ptx = _text(ptx)
        if entry is not None and not isinstance(entry, str):
            raise SimulatorError(f"entry: got {describe(entry)}; expected the name of a kernel, or None")
        _check_target(self._ptx)
        self._entry = entry
        self._aligned_as_declared = aligned_as_declared
        if sources is not None and not isinstance(sources, Mapping):
            raise SimulatorError(f"sources: got {describe(sources)}; expected a mapping of names to texts, or None")
        self._sources = dict(sources or {})
        self._data: npt.NDArray[np.uint8] | None = None  # global and constant variables
        self.program, self.handle = self._kept_or_decoded(keep)
        weakref.finalize(self, native.core().destroy, self.handle)

    def _kept_or_decoded(self, keep: bool) -> tuple[Program, int]:
        """The program and the core's copy of it. A kept one that the core refuses is as good as none."""
        name = program_cache.key(self._ptx, self._entry, self._aligned_as_declared) if keep else None
        program = None if name is None else program_cache.read(name)
        if program is not None:
            with contextlib.suppress(SimulatorError):
                return program, create(program)
        with _reading():
            data, addresses = initial_data(self.kernel)
            program = decode(self.kernel, native.core(), addresses)
            handle = create(program)
        if program.uses_variables:
            self._data = data
        elif name is not None:
            program_cache.write(name, program)
        return program, handle

    @functools.cached_property
    def kernel(self) -> parser.Kernel:
        """The text of the kernel, for reports and profiles; parsed when it is needed first."""
        with _reading():
            return parser.parse_kernel(self._ptx, self._entry, self._aligned_as_declared)

    @property
    def name(self) -> str:
        """The kernel's (mangled) name."""
        return self.program.name

    @property
    def param_bytes(self) -> int:
        """Size of the parameter block."""
        return self.program.param_bytes

    def launch(
        self,
        grid: Extent,
        block: Extent,
        shared_bytes: int,
        params: bytes | bytearray | memoryview,
        buffers: Sequence[Buffer | tuple[int, int, str]],
        options: Options | None = None,
        *,
        cluster: Extent | None = None,
    ) -> Counters:
        """Run the kernel to its end.

        Args:
            grid: number of blocks in x, y, z.
            block: number of threads in x, y, z.
            shared_bytes: dynamic shared memory of a block.
            params: the packed parameters, each aligned naturally: `param_bytes`, no more and no less.
            buffers: all global memory that the kernel may touch.
            options: how to run it; None: `current_options()`.
            cluster: blocks in x, y, z that run together and see each other's shared memory; None: as the kernel declares, else one.

        Raises:
            SimulatorError: a check failed.
        """
        chosen = options or current_options()
        if not isinstance(chosen, Options):
            raise SimulatorError(f"options: got {describe(options)}; expected Options, or None for the current ones")
        cluster = cluster or self.program.cluster
        self._check_launch(grid, block, cluster, shared_bytes, params)
        everything = _buffers(buffers)
        if self._data is not None:
            everything.append(Buffer(_pointer(self._data), self._data.size, "variables of the module"))
        ranges = np.array([_range(buffer) for buffer in everything], dtype=np.uint64)
        parameters = np.frombuffer(bytes(params) + bytes(16), dtype=np.uint8)
        description = native.LaunchDescription(
            grid=grid,
            block=block,
            cluster=cluster,
            params=_pointer(parameters),
            buffers=_pointer(ranges),
            param_bytes=self.program.param_bytes,
            num_buffers=len(everything),
            shared_end=self.program.dynamic_shared_begin + shared_bytes,
            dynamic_shared_bytes=shared_bytes,
            threads=chosen.num_threads(),
            schedule=SCHEDULES.index(chosen.schedule),
            seed=chosen.seed,
            checks=int(chosen.checks),
            isa_rules=int(chosen.isa_rules),
            max_instructions=chosen.max_instructions,
            ends_on_interrupt=int(native.ends_on_interrupt()),
        )
        if chosen.profile is not None:
            records = np.zeros((self.program.num_records, native.RECORD_PROFILE_WORDS), dtype=np.uint64)
            moved = np.zeros((len(everything), native.BUFFER_PROFILE_WORDS), dtype=np.uint64)
            description.record_profiles, description.buffer_profiles = _pointer(records), _pointer(moved)
        counters, failure = native.CounterValues(), native.Report()
        failed = native.core().launch(self.handle, ctypes.byref(description), ctypes.byref(counters), ctypes.byref(failure))
        if failed:
            with _reading():
                text = report.format_report(failure, self.kernel, self.program.starts, [buffer[:3] for buffer in everything], self._sources)
            raise SimulatorError(text, check=(failure.check or b"").decode())
        if chosen.profile is not None:
            chosen.profile.add(self, counters.ctas, records, [(buffer.name, buffer.nbytes) for buffer in everything], moved)
        executed = Counters(*(getattr(counters, name) for name, _ in native.CounterValues._fields_))
        launches = _recording.get()
        if launches is not None:
            launches.append(Launch(self.name, chosen, executed))
        return executed

    def _check_launch(
        self, grid: Extent, block: Extent, cluster: Extent, shared_bytes: int, params: bytes | bytearray | memoryview
    ) -> None:
        for name, extent in (("grid", grid), ("block", block), ("cluster", cluster)):
            if not isinstance(extent, (tuple, list)) or len(extent) != 3 or not all(isinstance(n, int) for n in extent):
                raise SimulatorError(f"{name}: got {describe_all(extent)}; expected three ints, x, y and z")
        static = self.program.dynamic_shared_begin - self.program.shared_begin
        if not isinstance(shared_bytes, int) or not 0 <= shared_bytes <= MAX_SHARED_BYTES - static:
            raise SimulatorError(
                f"shared_bytes: got {describe(shared_bytes)}; expected an int from 0 to {MAX_SHARED_BYTES - static}, what a block has besides its {static} static bytes"
            )
        too_many = any(extent > limit for extent, limit in zip(grid, MAX_GRID, strict=True))
        if too_many or min(grid) < 1 or min(block) < 1 or block[0] * block[1] * block[2] > MAX_THREADS:
            raise SimulatorError(f"a launch of {describe_all(grid)} blocks of {describe_all(block)} threads is not possible")
        if min(cluster) < 1 or cluster[0] * cluster[1] * cluster[2] > MAX_CLUSTER or any(g % c for g, c in zip(grid, cluster, strict=True)):
            raise SimulatorError(
                f"a launch of {grid} blocks in clusters of {describe_all(cluster)} is not possible: at most {MAX_CLUSTER} that divide the grid"
            )
        if self.program.cluster != (1, 1, 1) and cluster != self.program.cluster:
            raise SimulatorError(f"kernel {self.name} declares clusters of {self.program.cluster}, the launch has {cluster}")
        if not isinstance(params, (bytes, bytearray, memoryview)):
            raise SimulatorError(f"params: got {describe(params)}; expected bytes, a bytearray or a memoryview")
        if memoryview(params).nbytes != self.program.param_bytes:
            raise SimulatorError(
                f"kernel {self.name} takes {self.program.param_bytes} bytes of parameters, got {memoryview(params).nbytes}"
            )
