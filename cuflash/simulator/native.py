"""Call the C++ core through ctypes.

Contract: the structures mirror core/program.h. `core()` loads the library once per process. A launch gives back the interpreter's
lock, and ends with the exception that a signal's handler raises, such as KeyboardInterrupt; in other threads than the main one Ctrl-C ends it likewise.
"""

from __future__ import annotations

import ctypes
import functools
import signal
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cuflash.errors import SetupError, SimulatorError
from cuflash.simulator import build

ABI = 6
NO_RECORD = 0xFFFFFFFF
NO_WARP = 0xFFFFFFFF
MAX_PLACES = 64
MESSAGE_BYTES = 2048


class ProgramDescription(ctypes.Structure):
    """A decoded kernel: arrays and their lengths."""

    _fields_ = (
        ("records", ctypes.c_void_p),
        ("extra", ctypes.c_void_p),
        ("operands", ctypes.c_void_p),
        ("widths", ctypes.c_void_p),
        ("constants", ctypes.c_void_p),
        ("wide", ctypes.c_void_p),
        ("special", ctypes.c_void_p),
        ("jumps", ctypes.c_void_p),
        ("num_records", ctypes.c_uint32),
        ("num_extra", ctypes.c_uint32),
        ("num_operands", ctypes.c_uint32),
        ("num_registers", ctypes.c_uint32),
        ("num_constants", ctypes.c_uint32),
        ("num_special", ctypes.c_uint32),
        ("num_jumps", ctypes.c_uint32),
        ("local_bytes", ctypes.c_uint32),
        ("shared_begin", ctypes.c_uint32),
    )


class LaunchDescription(ctypes.Structure):
    """One launch."""

    _fields_ = (
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("cluster", ctypes.c_uint32 * 3),
        ("params", ctypes.c_void_p),
        ("buffers", ctypes.c_void_p),
        ("param_bytes", ctypes.c_uint32),
        ("num_buffers", ctypes.c_uint32),
        ("shared_end", ctypes.c_uint32),
        ("dynamic_shared_bytes", ctypes.c_uint32),
        ("threads", ctypes.c_int32),
        ("schedule", ctypes.c_int32),
        ("seed", ctypes.c_uint64),
        ("checks", ctypes.c_int32),
        ("isa_rules", ctypes.c_int32),
        ("max_instructions", ctypes.c_uint64),
        ("record_profiles", ctypes.c_void_p),
        ("buffer_profiles", ctypes.c_void_p),
        ("ends_on_interrupt", ctypes.c_int32),
    )


RECORD_PROFILE_WORDS = 15
BUFFER_PROFILE_WORDS = 4
"""64-bit words of RecordProfile and BufferProfile in core/program.h."""


class CounterValues(ctypes.Structure):
    """What a launch counted."""

    _fields_ = (
        ("warp_instructions", ctypes.c_uint64),
        ("matrix_instructions", ctypes.c_uint64),
        ("matrix_flops", ctypes.c_uint64),
        ("barriers", ctypes.c_uint64),
        ("async_copies", ctypes.c_uint64),
        ("ctas", ctypes.c_uint64),
    )


class Place(ctypes.Structure):
    """Where some lanes of a warp stand."""

    _fields_ = (("warp", ctypes.c_uint32), ("lanes", ctypes.c_uint32), ("record", ctypes.c_uint32), ("rank", ctypes.c_uint32))


class Report(ctypes.Structure):
    """The check that stopped a launch."""

    _fields_ = (
        ("check", ctypes.c_char_p),
        ("message", ctypes.c_char * MESSAGE_BYTES),
        ("block", ctypes.c_uint32 * 3),
        ("where", Place),
        ("address", ctypes.c_uint64),
        ("bytes", ctypes.c_uint64),
        ("num_places", ctypes.c_uint32),
        ("places", Place * MAX_PLACES),
    )


@dataclass(frozen=True)
class Slot:
    """One operand of an instruction that the table describes.

    Attributes:
        word: which 16-bit word of the record holds it.
        kind: 32 or 64 bits of a register, 1 for a predicate, 0 for an immediate.
        defines: the instruction writes it.
    """

    word: int
    kind: int
    defines: bool


@dataclass(frozen=True)
class Instruction:
    """An entry of the core's instruction table."""

    number: int
    slots: tuple[Slot, ...]


_WORDS = {"d": 2, "a": 3, "b": 4, "c": 5, "x": 6}
_KINDS = {"32": 32, "64": 64, "p": 1, "i": 0}


def _parse_signature(signature: str) -> tuple[Slot, ...]:
    return tuple(Slot(_WORDS[item[0]], _KINDS[item[1:]], item[0] == "d") for item in signature.split())


class Interpreter(ctypes.Structure):
    """What of Python's C API the core uses between instructions, see core/interrupt.h."""

    _fields_ = (
        ("PyEval_SaveThread", ctypes.c_void_p),
        ("PyEval_RestoreThread", ctypes.c_void_p),
        ("PyErr_CheckSignals", ctypes.c_void_p),
        ("PyErr_SetNone", ctypes.c_void_p),
        ("PyExc_KeyboardInterrupt", ctypes.c_void_p),
    )

    @classmethod
    def of_this_process(cls) -> Interpreter:
        """The running one."""
        functions = (ctypes.cast(getattr(ctypes.pythonapi, name), ctypes.c_void_p).value for name, _ in cls._fields_[:-1])
        return cls(*functions, id(KeyboardInterrupt))


class Core:
    """The loaded library: its instruction table and its functions.

    Raises:
        OSError: the file is not a library, or lies where nothing may be run.
    """

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        if library.cuflash_simulator_abi() != ABI:
            raise SimulatorError(f"{path} does not match this version of the simulator; delete it.")
        library.cuflash_simulator_use_interpreter(ctypes.byref(Interpreter.of_this_process()))
        self.create = library.cuflash_simulator_create
        self.create.restype = ctypes.c_void_p
        self.create.argtypes = (ctypes.POINTER(ProgramDescription), ctypes.c_char_p, ctypes.c_uint32)
        self.destroy = library.cuflash_simulator_destroy
        self.destroy.restype = None
        self.destroy.argtypes = (ctypes.c_void_p,)
        self.rows = library.cuflash_simulator_rows
        self.rows.argtypes = (ctypes.c_void_p,)
        self.launch = ctypes.PyDLL(str(path)).cuflash_simulator_launch  # which gives back the interpreter's lock by itself
        self.launch.argtypes = (
            ctypes.c_void_p,
            ctypes.POINTER(LaunchDescription),
            ctypes.POINTER(CounterValues),
            ctypes.POINTER(Report),
        )
        self._classes = library.cuflash_simulator_classes
        self._classes.restype = None
        self._classes.argtypes = (ctypes.c_void_p, ctypes.c_uint32, ctypes.c_void_p)
        self.instructions = self._read_table(library)
        self.special_registers = {name: number for number, name in enumerate(_names(library.cuflash_simulator_special_register))}
        self.class_names = tuple(_names(library.cuflash_simulator_class_name))

    def classes(self, program: int, num_records: int) -> npt.NDArray[np.uint8]:
        """For each record of a program the class of its instruction, as an index into `class_names`."""
        classes = np.empty(num_records, dtype=np.uint8)
        self._classes(program, num_records, classes.ctypes.data)
        return classes

    @staticmethod
    def _read_table(library: ctypes.CDLL) -> dict[str, Instruction]:
        read = library.cuflash_simulator_instruction
        name, signature = ctypes.c_char_p(), ctypes.c_char_p()
        table: dict[str, Instruction] = {}
        signatures: dict[bytes, tuple[Slot, ...]] = {}
        while read(len(table), ctypes.byref(name), ctypes.byref(signature)):
            text = signature.value or b""
            if text not in signatures:
                signatures[text] = _parse_signature(text.decode())
            key = (name.value or b"").decode()
            if key in table:
                raise SimulatorError(f"The instruction table names {key} twice.")
            table[key] = Instruction(len(table), signatures[text])
        return table


def _names(read: Any) -> list[str]:
    """What a function of the core that names things by number knows."""
    read.restype = ctypes.c_char_p
    names: list[str] = []
    while (name := read(len(names))) is not None:
        names.append(name.decode())
    return names


def ends_on_interrupt() -> bool:
    """Whether SIGINT itself is to end a launch of the calling thread.

    In the main thread it is the handler that decides. Other threads never see what it raises; Python's own always raises KeyboardInterrupt, so it ends
    launches there too, and a program with another handler decides for itself.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()
    return not in_main_thread and signal.getsignal(signal.SIGINT) is signal.default_int_handler


@functools.cache
def core() -> Core:
    """The core for this process, built if necessary.

    Raises:
        SetupError: it cannot be built, or not be loaded from any directory.
        SimulatorError: the compiler refused.
    """
    path = build.library_path()
    try:
        return Core(path)
    except OSError:  # most likely a file system that forbids to run what is on it
        try:
            return Core(build.copy_that_can_be_loaded(path))
        except OSError as error:
            raise SetupError(
                f"The simulator's core cannot be loaded ({error}). Let CUFLASH_CACHE_DIR name a directory on a file system that allows to run "
                "programs (not mounted with noexec)."
            ) from error
