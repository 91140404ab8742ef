"""A decoded kernel as plain numbers and arrays: all that running it takes.

Contract: `Program` is what `decoder.decode` makes, what `program_cache` keeps and what `create` hands to the core. The arrays are those of
ProgramDescription in core/program.h.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cuflash.arrays.descriptions import describe
from cuflash.errors import SimulatorError
from cuflash.simulator import native

_MAX_ROWS = 0x8000
_MAX_CLUSTER = 16
_SHARED_ADDRESSES = 2**20  # as MAX_SHARED_ADDRESS in core/validate.h
_MAX_BYTES = {"param_bytes": 2**16, "shared_begin": _SHARED_ADDRESSES, "dynamic_shared_begin": _SHARED_ADDRESSES, "local_bytes": 512 * 1024}
"""More than any GPU has: 32 KiB of parameters, 228 KiB of shared memory, 512 KiB of local memory per thread."""


@dataclass(frozen=True, eq=False)
class Program:
    """One kernel, decoded.

    Attributes:
        name: the kernel's (mangled) name.
        param_bytes: size of the parameter block.
        cluster: blocks of a cluster in x, y, z, as declared.
        shared_begin, dynamic_shared_begin: addresses of static and of dynamic shared memory.
        local_bytes: local memory per thread.
        uses_variables: whether addresses of global or constant variables of this process are among the constants.
        records: 16-bit words, eight per record.
        extra, operands, widths, constants, wide, special, jumps: as in core/program.h.
        starts: for each statement of the kernel the number of its first record.
    """

    name: str
    param_bytes: int
    cluster: tuple[int, int, int]
    shared_begin: int
    dynamic_shared_begin: int
    local_bytes: int
    uses_variables: bool
    records: npt.NDArray[np.uint16]
    extra: npt.NDArray[np.uint16]
    operands: npt.NDArray[np.uint32]
    widths: npt.NDArray[np.uint8]
    constants: npt.NDArray[np.uint64]
    wide: npt.NDArray[np.uint8]
    special: npt.NDArray[np.uint32]
    jumps: npt.NDArray[np.uint32]
    starts: npt.NDArray[np.uint32]

    @property
    def num_records(self) -> int:
        """Records of 16 bytes."""
        return len(self.records) // 8


def why_not_valid(program: Program) -> str | None:
    """What of a program's numbers and lengths no kernel can have; None if nothing. What the arrays hold, the core tests when it gets them."""
    counts = {name: getattr(program, name) for name in ("param_bytes", "shared_begin", "dynamic_shared_begin", "local_bytes")}
    for name, count in counts.items():
        if type(count) is not int or not 0 <= count <= _MAX_BYTES[name]:
            return f"{name} is {describe(count)}; at most {_MAX_BYTES[name]} bytes are possible"
    if program.shared_begin > program.dynamic_shared_begin:
        return "dynamic shared memory begins before the static one"
    cluster = program.cluster
    if len(cluster) != 3 or not all(type(extent) is int and 1 <= extent <= _MAX_CLUSTER for extent in cluster):
        return f"clusters of {describe(cluster)} blocks are not possible"
    if type(program.name) is not str or type(program.uses_variables) is not bool:
        return "its name is no text"
    if len(program.records) % 8 or len(program.wide) != len(program.constants) or not len(program.extra):
        return "its arrays do not fit together"
    if program.starts.size and (program.starts[-1] > program.num_records or (program.starts[1:] < program.starts[:-1]).any()):
        return "its statements do not follow each other"
    return None


def create(program: Program) -> int:
    """Hand a program to the core, which tests and copies it; returns the core's handle, to be given to `destroy`.

    Raises:
        SimulatorError: more constants or more live registers than a record can name, or numbers that no kernel has.
    """
    core = native.core()
    reason = why_not_valid(program)
    if reason is not None:
        raise SimulatorError(f"kernel {program.name} cannot be run: {reason}")
    description = native.ProgramDescription(
        **{
            name: getattr(program, name).ctypes.data
            for name in ("records", "extra", "operands", "widths", "constants", "wide", "special", "jumps")
        },
        num_records=program.num_records,
        num_extra=len(program.extra),
        num_operands=len(program.operands),
        num_registers=len(program.widths),
        num_constants=len(program.constants),
        num_special=len(program.special),
        num_jumps=len(program.jumps),
        local_bytes=program.local_bytes,
        shared_begin=program.shared_begin,
    )
    if len(program.constants) + int(program.wide.sum()) >= _MAX_ROWS:
        raise SimulatorError(f"kernel {program.name} has too many different constants for the simulator")
    message = ctypes.create_string_buffer(native.MESSAGE_BYTES)
    handle = int(core.create(ctypes.byref(description), message, len(message)) or 0)
    if not handle:
        raise SimulatorError(f"kernel {program.name} cannot be run: {message.value.decode()}")
    if core.rows(handle) >= _MAX_ROWS:
        core.destroy(handle)
        raise SimulatorError(f"kernel {program.name} has too many live registers for the simulator")
    return handle
