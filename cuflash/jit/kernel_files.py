"""Compiled kernels on disk.

Contract: `read` gives what `write` stored, and None for whatever else it finds. An entry is two files named by the request's `compiler.fingerprint`:

    <fingerprint>.cubin or .ptx     exactly the compiler's output
    <fingerprint>.json              request, log, resources, and the SHA-256 of both files; written last, so it completes the entry

Both are written under a temporary name and renamed, hence a reader sees whole files or none. A damaged entry, and a file that others could have
written (`private_files.py`), counts as missing and is replaced. Nothing about the disk is an error: where nothing can be written, one warning is logged.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from cuflash.jit import compiler
from cuflash.jit.compiler import Artifact, CompileRequest, KernelResources
from cuflash.system import cache_directory, cache_limit, private_files

PART = "kernels"
"""The part of the cache directory that entries lie in."""

_MAX_RECORD_BYTES = 16 * 2**20
_SUFFIXES = (".json", ".cubin", ".ptx", ".lock", ".tmp")
_DAMAGED = (OSError, ValueError, KeyError, TypeError, RecursionError)  # what comes of reading a file that may hold anything

_log = logging.getLogger("cuflash")


@dataclass(frozen=True)
class Place:
    """Where the entry of one fingerprint lies."""

    folder: Path
    fingerprint: str
    target: str

    @property
    def data(self) -> Path:
        """The compiler's output."""
        return self.folder / f"{self.fingerprint}.{self.target}"

    @property
    def record(self) -> Path:
        """What is known of it."""
        return self.folder / f"{self.fingerprint}.json"

    @property
    def lock(self) -> Path:
        """What a process locks while it compiles the entry."""
        return self.folder / f"{self.fingerprint}.lock"


@dataclass(frozen=True)
class Entry:
    """One entry on disk.

    Attributes:
        request: what it was compiled from.
        path: the cubin or PTX file.
        size: bytes of both its files.
        age: seconds since it was written.
        seconds: compile time that it saves.
    """

    request: CompileRequest
    path: Path
    size: int
    age: float
    seconds: float


def directory() -> Path | None:
    """Where entries lie, made if need be; None where there is no directory that can be trusted. It may be read-only."""
    return cache_directory.find(PART)


def place_of(request: CompileRequest) -> Place | None:
    """Where the entry of a request lies or would; None without a directory."""
    fingerprint = compiler.fingerprint(request)  # first, so that a bad request is an error with and without a directory
    folder = directory()
    return None if folder is None else Place(folder, fingerprint, request.target)


def read(place: Place | None) -> Artifact | None:
    """The entry at a place; None if there is none, or if any byte of it is not what was written."""
    if place is None:
        return None
    try:
        record = _read_record(place.record)
        data = private_files.read(place.data)
        if hashlib.sha256(data).hexdigest() != record["sha256"]:
            raise ValueError("checksum of the data")
        artifact = _artifact(data, record)
    except FileNotFoundError:
        return None
    except _DAMAGED as error:
        _log.info("cuflash ignores the damaged cache entry %s (%s).", place.record, error)
        return None
    cache_limit.used(place.data)
    return artifact


def _read_record(path: Path) -> dict[str, Any]:
    """Parse a .json file of the cache; one of `_DAMAGED` if it is damaged."""
    content = json.loads(private_files.read(path, _MAX_RECORD_BYTES))
    record: dict[str, Any] = content["record"]
    if content["sha256"] != _record_checksum(record):
        raise ValueError("checksum of the record")
    seconds = record["seconds"]
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not 0 <= seconds < math.inf:
        raise ValueError("the time of compilation")
    return record


def _artifact(data: bytes, record: dict[str, Any]) -> Artifact:
    if not isinstance(record["log"], str) or not isinstance(record["compiler"], str):
        raise TypeError("log and compiler are text")
    return Artifact(data, record["log"], float(record["seconds"]), tuple(map(_resources, record["resources"])), record["compiler"])


def _resources(values: dict[str, Any]) -> KernelResources:
    for field in fields(KernelResources):
        if type(values[field.name]) is not (str if field.name == "entry" else int):
            raise TypeError(f"{field.name} of the resources")
    return KernelResources(**values)


def _record_checksum(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def write(place: Place | None, request: CompileRequest, artifact: Artifact) -> None:
    """Store an entry; where that is impossible, say so once and go on."""
    if place is None:
        cache_directory.warn_once(cache_directory.why_not(PART) or "it has just been removed")
        return
    record = {
        "request": asdict(request),
        "log": artifact.log,
        "seconds": artifact.seconds,
        "resources": [asdict(resources) for resources in artifact.resources],
        "compiler": artifact.compiler,
        "sha256": hashlib.sha256(artifact.data).hexdigest(),
    }
    content = {"record": record, "sha256": _record_checksum(record)}
    try:
        private_files.write(place.data, artifact.data)
        private_files.write(place.record, json.dumps(content, indent=1).encode())
    except OSError as error:
        cache_directory.warn_once(str(error))
        return
    cache_limit.wrote(place.folder)


def contents(folder: Path | None = None) -> list[Entry]:
    """All whole entries on disk, the youngest first; of `directory()` unless another folder is given. Their data is not verified; `read` does that."""
    folder = folder or directory()
    found = [] if folder is None else [entry for path in _listed(folder, (".json",)) if (entry := _entry(path)) is not None]
    return sorted(found, key=lambda entry: entry.age)


def _entry(path: Path) -> Entry | None:
    try:
        record = _read_record(path)
        request = CompileRequest(**record["request"])
        if not all(type(value) is (int if name == "tolerated_spills" else str) for name, value in asdict(request).items()):
            raise TypeError("a request is text and a number")
        data = path.with_suffix("." + request.target)
        written = path.stat()
        return Entry(request, data, written.st_size + data.stat().st_size, max(0.0, time.time() - written.st_mtime), record["seconds"])
    except _DAMAGED:
        return None


def clear() -> int:
    """Remove every entry, whole or not, with what killed processes left. Returns the number of entries.

    Raises:
        OSError: a file that may not be removed.
    """
    folder = directory()
    found = [] if folder is None else list(_listed(folder, _SUFFIXES))
    private_files.remove(found)
    return sum(path.suffix == ".json" for path in found)


def _listed(folder: Path, suffixes: tuple[str, ...]) -> Iterator[Path]:
    try:
        yield from sorted(path for path in folder.iterdir() if path.suffix in suffixes)
    except OSError:
        return
