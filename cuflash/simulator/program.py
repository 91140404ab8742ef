"""A decoded kernel as plain numbers and arrays: all that running it takes.

Contract: `Program` is what `decoder.decode` makes, what `program_cache` keeps and what `create` hands to the core. The arrays are those of
ProgramDescription in core/program.h.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cuflash.errors import SimulatorError
from cuflash.simulator import native

_MAX_ROWS = 0x8000


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


def create(program: Program) -> int:
    """Hand a program to the core, which copies it; returns the core's handle, to be given to `destroy`.

    Raises:
        SimulatorError: more constants or more live registers than a record can name.
    """
    core = native.core()
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
    handle = int(core.create(ctypes.byref(description)))
    if core.rows(handle) >= _MAX_ROWS:
        core.destroy(handle)
        raise SimulatorError(f"kernel {program.name} has too many live registers for the simulator")
    return handle
