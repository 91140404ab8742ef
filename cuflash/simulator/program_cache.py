"""Decoded programs on disk, so that a process decodes only what no process has decoded before.

Contract: `read` gives what `write` stored under the same key, or None; a key covers the PTX, the entry, the Python that decodes and the core's
instruction table. An entry is one file of plain arrays, written under a temporary name and renamed. Nothing about the disk is an error: what
cannot be written is decoded again, what is damaged counts as missing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import uuid
from pathlib import Path

import numpy as np

from cuflash.simulator import build, native
from cuflash.simulator.program import Program

_SUFFIX = ".npz"
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


def directory() -> Path:
    """Where programs are kept; it may not exist."""
    return build.cache_directory() / "programs"


def key(ptx: str, entry: str | None, aligned_as_declared: bool = False) -> str:
    """The name of an entry."""
    digest = hashlib.sha256(_decoder_fingerprint())
    digest.update(f"{entry} {aligned_as_declared}\n{ptx}".encode())
    return digest.hexdigest()[:40]


def read(name: str) -> Program | None:
    """The program stored as `name`; None if there is none, or if it is damaged."""
    try:
        with np.load(directory() / (name + _SUFFIX), allow_pickle=False) as content:
            numbers = json.loads(content["numbers"].tobytes())
            numbers["cluster"] = tuple(numbers["cluster"])
            arrays = {field: content[field] for field in _ARRAYS}
        if any(arrays[field].dtype != dtype for field, dtype in _ARRAYS.items()):
            return None
        return Program(**numbers, **arrays)
    except Exception:  # a damaged archive raises anything
        return None


def write(name: str, program: Program) -> None:
    """Store a program that does not use variables, whose addresses are those of this process; does nothing where that is impossible."""
    fields = {field.name: getattr(program, field.name) for field in dataclasses.fields(program)}
    arrays = {field: fields.pop(field) for field in _ARRAYS}
    numbers = np.frombuffer(json.dumps(fields).encode(), dtype=np.uint8)
    temporary = directory() / f"{name}.{uuid.uuid4().hex}.tmp"
    try:
        directory().mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            np.savez(file, numbers=numbers, **arrays)
        os.replace(temporary, directory() / (name + _SUFFIX))
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()


def clear() -> None:
    """Remove all entries.

    Raises:
        OSError: a file that may not be removed.
    """
    for path in (*directory().glob("*" + _SUFFIX), *directory().glob("*.tmp")):
        path.unlink(missing_ok=True)
