"""Decoded programs on disk, so that a process decodes only what no process has decoded before.

Contract: `read` gives what `write` stored under the same key, or None; a key covers the PTX, the entry, the Python that decodes and the core's
instruction table. What is read has the checksum, types and lengths of a program; whether its numbers make sense, the core finds out before it
uses them (core/validate.h). An entry is one file, written under a temporary name and renamed:

    SHA-256 of all that follows, 32 bytes
    length of the header, 4 bytes
    header: JSON of the plain fields of `Program` and the number of elements of each array
    the arrays, one behind the other

Nothing about the disk is an error: what cannot be written is decoded again, what is damaged or could be from others counts as missing.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np

from cuflash.simulator import native
from cuflash.simulator.program import Program, why_not_valid
from cuflash.system import cache_directory, cache_limit, private_files

PART = "simulator/programs"
"""The part of the cache directory that programs lie in."""

_SUFFIX = ".program"
_DIGEST_BYTES, _LENGTH_BYTES = 32, 4
_ARRAYS = {
    "records": np.uint16,
    "extra": np.uint16,
    "operands": np.uint32,
    "widths": np.uint8,
    "constants": np.uint64,
    "wide": np.uint8,
    "special": np.uint32,
    "jumps": np.uint32,
    "starts": np.uint32,
}  # fmt: skip
_COLUMNS = {"operands": 3, "special": 2, "jumps": 2}

_log = logging.getLogger("cuflash")


@functools.cache
def _decoder_fingerprint() -> bytes:
    """Changes with everything besides the PTX that decoding depends on."""
    digest = hashlib.sha256()
    folder = Path(__file__).parent
    for path in sorted((*folder.glob("*.py"), *folder.glob("instructions/*.py"))):
        digest.update(path.name.encode() + path.read_bytes())
    core = native.core()
    digest.update(repr((core.instructions, core.special_registers)).encode())
    return digest.digest()


def directory() -> Path | None:
    """Where programs are kept; None where there is no directory that can be trusted."""
    return cache_directory.find(PART)


def key(ptx: str, entry: str | None, aligned_as_declared: bool = False) -> str:
    """The name of an entry."""
    digest = hashlib.sha256(_decoder_fingerprint())
    digest.update(f"{entry} {aligned_as_declared}\n{ptx}".encode(errors="surrogatepass"))
    return digest.hexdigest()[:40]


def read(name: str) -> Program | None:
    """The program stored as `name`; None if there is none, or if it is damaged."""
    folder = directory()
    if folder is None:
        return None
    path = folder / (name + _SUFFIX)
    try:
        program = _unpack(private_files.read(path))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        _log.info("cuflash ignores the damaged program %s (%s).", path, error)
        return None
    cache_limit.used(path)
    return program


def write(name: str, program: Program) -> None:
    """Store a program that does not use variables, whose addresses are those of this process; does nothing where that is impossible."""
    folder = directory()
    if folder is None:
        return
    try:
        private_files.write(folder / (name + _SUFFIX), _pack(program))
    except OSError:
        return
    cache_limit.wrote(folder)


def _pack(program: Program) -> bytes:
    numbers = {field.name: getattr(program, field.name) for field in dataclasses.fields(program) if field.name not in _ARRAYS}
    arrays = {name: np.ascontiguousarray(getattr(program, name), element) for name, element in _ARRAYS.items()}
    header = json.dumps({"numbers": numbers, "sizes": {name: array.size for name, array in arrays.items()}}).encode()
    content = b"".join((len(header).to_bytes(_LENGTH_BYTES, "little"), header, *(array.tobytes() for array in arrays.values())))
    return hashlib.sha256(content).digest() + content


def _unpack(file: bytes) -> Program:
    """Read an entry; one of the exceptions that `read` expects if it is damaged."""
    digest, content = file[:_DIGEST_BYTES], memoryview(file)[_DIGEST_BYTES:]
    if hashlib.sha256(content).digest() != digest:
        raise ValueError("checksum")
    position = _LENGTH_BYTES + int.from_bytes(content[:_LENGTH_BYTES], "little")
    header = json.loads(bytes(content[_LENGTH_BYTES:position]))
    arrays: dict[str, Any] = {}
    for name, element in _ARRAYS.items():
        size = header["sizes"][name]
        if type(size) is not int or size < 0:
            raise ValueError(f"the size of {name}")
        array = np.frombuffer(content, element, size, position) if size else np.empty(0, element)
        arrays[name] = array.reshape(-1, _COLUMNS[name]) if name in _COLUMNS else array
        position += array.nbytes
    numbers = header["numbers"]
    program = Program(**{**numbers, "cluster": tuple(numbers["cluster"])}, **{name: array.copy() for name, array in arrays.items()})
    reason = why_not_valid(program)
    if position != len(content) or reason:
        raise ValueError(reason or "more than a program")
    return program


def clear() -> int:
    """Remove all entries, whole or not, with what killed processes left; returns how many there were.

    Raises:
        OSError: a file that may not be removed.
    """
    folder = directory()
    if folder is None:
        return 0
    found = [path for path in folder.iterdir() if path.suffix in (_SUFFIX, ".npz", ".tmp", ".lock")]
    private_files.remove(found)
    return sum(path.suffix in (_SUFFIX, ".npz") for path in found)


def contents() -> list[cache_limit.Group]:
    """All entries; their data is not verified."""
    folder = directory()
    return [] if folder is None else cache_limit.entries_of(folder)
