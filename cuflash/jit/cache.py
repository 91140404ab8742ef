"""Compiled kernels, kept: memory, then disk, then the compiler.

`fetch(request)` returns the artifact of a request and compiles it at most once: threads of a process wait for one another, and so do
processes that share a cache directory. A process that has fetched a request keeps the artifact for its lifetime; an edit of `kernels/` is
seen by the next request that is not in memory, or by the next process.

What is on disk, `kernel_files.py` knows; which directory that is and whether it can be trusted, `cache_directory.py`; how much there may be,
`cache_limit.py`. Nothing about the disk is an error: where the directory is missing, full, read-only, or open to others, artifacts live in memory and one
warning is logged. Nothing hangs: the lock between processes only saves work, dies with its holder, and after `LOCK_TIMEOUT` seconds a process compiles for
itself.

Environment: `CUFLASH_CACHE_DIR` moves the cache; `CUFLASH_COMPILE=forbid` turns a miss into an error instead of a compilation.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from cuflash.errors import CompilationForbiddenError, OptionError
from cuflash.jit import compiler, kernel_files
from cuflash.jit.compiler import Artifact, CompileRequest
from cuflash.jit.kernel_files import Entry, contents, directory
from cuflash.system import cache_directory, cache_limit
from cuflash.system.file_lock import FileLock
from cuflash.system.threads import results_of

__all__ = ["Entry", "Statistics", "clear", "contents", "directory", "fetch", "fetch_many", "reset_memory", "statistics"]

LOCK_TIMEOUT = 60.0
"""Seconds to wait for another process that compiles the same request; the slowest kernel takes a few."""

_MAX_WORKERS = 8  # compilations at once: each takes a core and some hundred MB

Progress = Callable[[int, int, CompileRequest], None]
"""Called as `progress(done, total, request)` in the caller's thread after each artifact."""


@dataclass(frozen=True)
class Statistics:
    """What `fetch` did in this process: compilations, entries read from disk, artifacts found in memory."""

    compiles: int
    disk_hits: int
    memory_hits: int


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

    def renew_locks(self) -> None:
        """In a forked child: a lock that another thread of the parent held at the fork would never be released."""
        self.lock = threading.Lock()
        self.gates = {}


_state = _State()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: _state.renew_locks())


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
    workers = max_workers or min(_available_cores(), _MAX_WORKERS)
    artifacts: dict[CompileRequest, Artifact] = {}
    for request, artifact in results_of(fetch, distinct, workers):
        artifacts[request] = artifact
        if progress is not None:
            progress(len(artifacts), len(distinct), request)
    return [artifacts[request] for request in wanted]


def _read_or_compile(request: CompileRequest) -> Artifact:
    place = kernel_files.place_of(request)
    artifact = kernel_files.read(place)
    if artifact is None:
        _check_compilation_allowed(request)
        with contextlib.closing(FileLock(place.lock if place else None)) as lock:
            artifact = lock.wait(LOCK_TIMEOUT, lambda: kernel_files.read(place), f"compile {request.describe()}")
            if artifact is None:
                artifact = compiler.compile_kernel(request)
                with _state.lock:
                    _state.compiles += 1
                # Text that was edited while it compiled may be half old, half new: it must not enter the cache under either name.
                if place is None or place.fingerprint == compiler.fingerprint(request):
                    kernel_files.write(place, request, artifact)
                return artifact
    with _state.lock:
        _state.disk_hits += 1
    return artifact


def is_compilation_forbidden() -> bool:
    """By the environment.

    Raises:
        OptionError: CUFLASH_COMPILE has a value that says nothing.
    """
    value = os.environ.get("CUFLASH_COMPILE") or "allow"
    if value not in ("allow", "forbid"):
        raise OptionError("CUFLASH_COMPILE", repr(value), "'allow' or 'forbid'", "Correct or unset the environment variable.")
    return value == "forbid"


def _check_compilation_allowed(request: CompileRequest) -> None:
    cache_limit.limit_bytes()  # a bad value of its variable is an error before the work
    if is_compilation_forbidden():
        raise CompilationForbiddenError(f"{request.describe()} is not in the cache ({directory() or 'which has no directory'})")


def _available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def statistics() -> Statistics:
    """Counters of this process since its start or `reset_memory()`."""
    with _state.lock:
        return Statistics(_state.compiles, _state.disk_hits, _state.memory_hits)


def clear() -> int:
    """Remove every entry from disk, with what killed processes left, and forget the artifacts in memory. Returns the number of entries.

    Raises:
        OSError: a file that may not be removed.
    """
    removed = kernel_files.clear()
    with _state.lock:
        _state.memory.clear()
    return removed


def reset_memory() -> None:
    """Make this process as good as new: no artifacts in memory, counters at zero, the warning not yet given. For tests."""
    with _state.lock:
        _state.memory.clear()
        _state.gates.clear()
        _state.compiles = _state.disk_hits = _state.memory_hits = 0
    cache_directory.reset_warning()
    cache_limit.forget_writes()
    compiler.refresh()
