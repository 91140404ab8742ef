"""Compiled kernels, kept: memory, then disk, then the compiler.

`fetch(request)` returns the artifact of a request and compiles it at most once: threads of a process wait for one another, and so do
processes that share a cache directory. A process that has fetched a request keeps the artifact for its lifetime; an edit of `kernels/` is
seen by the next request that is not in memory, or by the next process.

An entry on disk is two files named by the request's `compiler.fingerprint`:

    <fingerprint>.cubin or .ptx     exactly the compiler's output, so that `cupy.RawModule(path=...)` can load it
    <fingerprint>.json              request, log, resources, and the SHA-256 of both files; written last, so it completes the entry

Both are written under a temporary name and renamed, hence a reader sees whole files or none. A damaged entry counts as missing and is
replaced.

Nothing about the disk is an error: where the directory is missing, full or read-only, artifacts live in memory and one warning is logged.
Nothing hangs: the lock between processes only saves work, dies with its holder, and after `LOCK_TIMEOUT` seconds a process compiles for
itself.

Environment: `CUFLASH_CACHE_DIR` moves the cache; `CUFLASH_COMPILE=forbid` turns a miss into an error instead of a compilation.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import logging
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cuflash import compiler
from cuflash.compiler import Artifact, CompileRequest, KernelResources
from cuflash.errors import CompilationForbiddenError, OptionError

LOCK_TIMEOUT = 60.0
"""Seconds to wait for another process that compiles the same request; the slowest kernel takes a few."""

_POLL = 0.02  # seconds between two looks at a lock that another process holds
_MAX_WORKERS = 8  # compilations at once: each takes a core and some hundred MB

_log = logging.getLogger("cuflash")

Progress = Callable[[int, int, CompileRequest], None]
"""Called as `progress(done, total, request)` in the caller's thread after each artifact."""


@dataclass(frozen=True)
class Statistics:
    """What `fetch` did in this process: compilations, entries read from disk, artifacts found in memory."""

    compiles: int
    disk_hits: int
    memory_hits: int


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


class _State:
    """All that a process remembers.

    `lock` guards every field and is never held during a compilation; the request's gate is, by the thread that compiles.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.memory: dict[CompileRequest, Artifact] = {}
        self.gates: dict[CompileRequest, threading.Lock] = {}
        self.compiles = 0
        self.disk_hits = 0
        self.memory_hits = 0
        self.warned = False

    def renew_locks(self) -> None:
        """In a forked child: a lock that another thread of the parent held at the fork would never be released."""
        self.lock = threading.Lock()
        self.gates = {}


_state = _State()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: _state.renew_locks())


# --------------------------------------------------------------------------------------------------------------------------------- fetching


def fetch(request: CompileRequest) -> Artifact:
    """The artifact of a request, from memory, disk or the compiler. Thread-safe.

    Raises:
        CompileError: the compiler refused.
        CompilationForbiddenError: the request would have to be compiled, and `CUFLASH_COMPILE=forbid`.
        OptionError: an architecture, target or source that does not exist, or an unknown value of `CUFLASH_COMPILE`.
        SetupError: CuPy, NVRTC or the kernels' text is missing.
    """
    with _state.lock:
        artifact = _state.memory.get(request)
        if artifact is not None:
            _state.memory_hits += 1
            return artifact
        gate = _state.gates.setdefault(request, threading.Lock())
    with gate:
        with _state.lock:
            artifact = _state.memory.get(request)
            if artifact is not None:  # another thread was faster
                _state.memory_hits += 1
                return artifact
        artifact = _read_or_compile(request)
        with _state.lock:
            _state.memory[request] = artifact
            _state.gates.pop(request, None)
        return artifact


def fetch_many(requests: Iterable[CompileRequest], max_workers: int | None = None, progress: Progress | None = None) -> list[Artifact]:
    """Fetch many requests with threads; artifacts come back in the order of the requests.

    Args:
        requests: repeated ones are fetched once.
        max_workers: threads; by default one per available core, at most 8.
        progress: see `Progress`; counts distinct requests.
    Raises:
        what `fetch` raises, for the first request that fails; those not yet begun are dropped.
    """
    wanted = list(requests)
    distinct = list(dict.fromkeys(wanted))
    if not distinct:
        return []
    compiler.nvrtc_version()  # imports CuPy here rather than in every thread at once
    workers = max_workers or min(len(distinct), _available_cores(), _MAX_WORKERS)
    with ThreadPoolExecutor(workers, thread_name_prefix="cuflash-compile") as pool:
        futures = {pool.submit(fetch, request): request for request in distinct}
        try:
            for done, future in enumerate(as_completed(futures), start=1):
                future.result()
                if progress is not None:
                    progress(done, len(distinct), futures[future])
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    artifacts = {request: future.result() for future, request in futures.items()}
    return [artifacts[request] for request in wanted]


def path_of(request: CompileRequest) -> Path | None:
    """Fetch a request and return its file on disk, for `cupy.RawModule(path=...)`; None where nothing can be written.

    Another process may clear the cache at any time: a caller that must not fail loads `fetch(request).data` instead.
    Raises: what `fetch` raises.
    """
    artifact = fetch(request)
    place = _place(request)
    if place is None:
        return None
    if not place.data.is_file():
        _write(place, request, artifact)
    return place.data if place.data.is_file() else None


def _read_or_compile(request: CompileRequest) -> Artifact:
    place = _place(request)
    artifact = _read(place)
    if artifact is None:
        _check_compilation_allowed(request)
        with contextlib.closing(_Lock(place.lock if place else None)) as lock:
            artifact = _wait(lock, place)
            if artifact is None:
                artifact = compiler.compile_kernel(request)
                with _state.lock:
                    _state.compiles += 1
                # Text that was edited while it compiled may be half old, half new: it must not enter the cache under either name.
                if place is None or place.fingerprint == compiler.fingerprint(request):
                    _write(place, request, artifact)
                return artifact
    with _state.lock:
        _state.disk_hits += 1
    return artifact


def _wait(lock: _Lock, place: _Place | None) -> Artifact | None:
    """Wait until the lock is ours, and return the entry if another process stored it meanwhile; None means: compile."""
    deadline = time.monotonic() + LOCK_TIMEOUT
    while not lock.try_acquire():
        artifact = _read(place)
        if artifact is not None:
            return artifact
        if time.monotonic() > deadline:
            _log.info("cuflash waited %.0f s for another process to compile %s and now compiles it itself.", LOCK_TIMEOUT, lock.path)
            return None
        time.sleep(_POLL)
    return _read(place)


def _check_compilation_allowed(request: CompileRequest) -> None:
    value = os.environ.get("CUFLASH_COMPILE") or "allow"
    if value not in ("allow", "forbid"):
        raise OptionError("CUFLASH_COMPILE", repr(value), "'allow' or 'forbid'", "Correct or unset the environment variable.")
    if value == "forbid":
        raise CompilationForbiddenError(f"{request.describe()} is not in the cache ({directory() or 'which has no directory'})")


def _available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# --------------------------------------------------------------------------------------------------------------------------------- the disk


@dataclass(frozen=True)
class _Place:
    """Where the entry of one fingerprint lies."""

    folder: Path
    fingerprint: str
    target: str

    @property
    def data(self) -> Path:
        return self.folder / f"{self.fingerprint}.{self.target}"

    @property
    def record(self) -> Path:
        return self.folder / f"{self.fingerprint}.json"

    @property
    def lock(self) -> Path:
        return self.folder / f"{self.fingerprint}.lock"


def directory() -> Path | None:
    """Where entries lie, created if need be; None where there is no such directory and none can be made. It may be read-only.

    `$CUFLASH_CACHE_DIR/kernels`, else `kernels` in the user's cache directory for cuflash (`~/.cache/cuflash` on Linux).
    """
    base = os.environ.get("CUFLASH_CACHE_DIR") or _user_cache_directory()
    folder = Path(os.path.expanduser(base)) / "kernels"
    if str(folder).startswith("~"):  # no home directory
        return None
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return folder


def _user_cache_directory() -> str:
    try:
        return str(importlib.import_module("platformdirs").user_cache_dir("cuflash", appauthor=False))
    except ImportError:
        return os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "cuflash")


def _place(request: CompileRequest) -> _Place | None:
    fingerprint = compiler.fingerprint(request)  # first, so that a bad request is an error with and without a directory
    folder = directory()
    return None if folder is None else _Place(folder, fingerprint, request.target)


def _read(place: _Place | None) -> Artifact | None:
    """The entry at a place; None if there is none, or if any byte of it is not what was written."""
    if place is None:
        return None
    try:
        record = _read_record(place.record)
        data = place.data.read_bytes()
        if hashlib.sha256(data).hexdigest() != record["sha256"]:
            raise ValueError("checksum of the data")
        resources = tuple(KernelResources(**fields) for fields in record["resources"])
        return Artifact(data, record["log"], record["seconds"], resources, record["compiler"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        _log.info("cuflash ignores the damaged cache entry %s (%s).", place.record, error)
        return None


def _read_record(path: Path) -> dict[str, Any]:
    """Parse a .json file of the cache; ValueError, KeyError or TypeError if it is damaged."""
    content = json.loads(path.read_text(encoding="utf-8"))
    record: dict[str, Any] = content["record"]
    if content["sha256"] != _record_checksum(record):
        raise ValueError("checksum of the record")
    return record


def _record_checksum(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _write(place: _Place | None, request: CompileRequest, artifact: Artifact) -> None:
    """Store an entry; where that is impossible, say so once and go on."""
    if place is None:
        _warn_once("its directory cannot be created")
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
        _write_atomically(place.data, artifact.data)
        _write_atomically(place.record, json.dumps(content, indent=1).encode())
    except OSError as error:
        _warn_once(str(error))


def _write_atomically(path: Path, content: bytes) -> None:
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def _warn_once(reason: str) -> None:
    """Through `logging`, not `warnings`: a program that turns warnings into errors must not fail for want of a cache."""
    with _state.lock:
        if _state.warned:
            return
        _state.warned = True
    place = os.environ.get("CUFLASH_CACHE_DIR") or _user_cache_directory()
    _log.warning(
        "cuflash cannot store compiled kernels below %s (%s), so each process compiles them anew. "
        "Let CUFLASH_CACHE_DIR name a writable directory.",
        place,
        reason,
    )


class _Lock:
    """An advisory lock between processes on one file; released by the system when its holder dies.

    Only a way to save work: where files cannot be locked (no fcntl, a read-only directory, some network file systems) it is always granted.
    The holder removes the file when it is done. A process that still waits on the removed file then looks for the entry before it compiles.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._descriptor: int | None = None
        self._held = False
        if path is not None:
            with contextlib.suppress(OSError):
                self._descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o666)

    def try_acquire(self) -> bool:
        """Without waiting; False only if another process holds the lock."""
        if self._descriptor is None:
            return True
        try:
            import fcntl

            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except (ImportError, OSError):
            return True
        self._held = True
        return True

    def close(self) -> None:
        """Release the lock if it is held."""
        if self._descriptor is None:
            return
        if self._held:
            import fcntl

            with contextlib.suppress(OSError):
                os.unlink(str(self.path))
            with contextlib.suppress(OSError):
                fcntl.flock(self._descriptor, fcntl.LOCK_UN)  # a forked child may share the descriptor, so closing it is not enough
        os.close(self._descriptor)


# ----------------------------------------------------------------------------------------------------------------------------- housekeeping


def statistics() -> Statistics:
    """Counters of this process since its start or `reset_memory()`."""
    with _state.lock:
        return Statistics(_state.compiles, _state.disk_hits, _state.memory_hits)


def contents(folder: Path | None = None) -> list[Entry]:
    """All whole entries on disk, the youngest first; of `directory()` unless another folder is given. Their data is not verified; `fetch` does that."""
    folder = folder or directory()
    entries = []
    for path in [] if folder is None else folder.glob("*.json"):
        try:
            record = _read_record(path)
            request = CompileRequest(**record["request"])
            data = path.with_suffix("." + request.target)
            written = path.stat()
            size = written.st_size + data.stat().st_size
            entries.append(Entry(request, data, size, max(0.0, time.time() - written.st_mtime), record["seconds"]))
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return sorted(entries, key=lambda entry: entry.age)


def clear() -> int:
    """Remove every entry from disk, with what killed processes left, and forget the artifacts in memory. Returns the number of entries.

    Raises:
        OSError: a file that may not be removed.
    """
    folder = directory()
    removed = 0
    for path in [] if folder is None else list(folder.iterdir()):
        if path.suffix in (".json", ".cubin", ".ptx", ".lock", ".tmp"):
            path.unlink(missing_ok=True)
            removed += path.suffix == ".json"
    with _state.lock:
        _state.memory.clear()
    return removed


def reset_memory() -> None:
    """Make this process as good as new: no artifacts in memory, counters at zero, the warning not yet given. For tests."""
    with _state.lock:
        _state.memory.clear()
        _state.gates.clear()
        _state.compiles = _state.disk_hits = _state.memory_hits = 0
        _state.warned = False
    compiler.refresh()
