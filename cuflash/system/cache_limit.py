"""A limit on what the cache takes, kept by removing what was used least recently.

Contract: `wrote(folder)` is called after each write and sweeps a directory only now and then; `used(path)` marks an entry as used; `entries_of(folder)`
says what there is. An entry is all files whose names are the same up to the first dot. Several processes may do all of that at a time: a reader that finds
half an entry takes it for none. Nothing here raises OSError.

Environment: `CUFLASH_CACHE_LIMIT`, in MiB, for each of kernels, decoded programs and cores of the simulator; 0 for no limit.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from cuflash.errors import OptionError
from cuflash.system.file_lock import FileLock

VARIABLE = "CUFLASH_CACHE_LIMIT"
DEFAULT = 1024
"""MiB. A kernel takes some 200 KiB, so this is thousands of them."""

_SWEEP_EVERY = 32  # writes of a process to one directory, beginning with its first
_MAX_LATENESS = 3600.0  # seconds: how exactly the time of last use is known
_LEFT_BEHIND = 3600.0  # seconds after which a file that somebody was writing has lost its writer
_TEMPORARY = (".tmp", ".lock")

_lock = threading.Lock()
_writes_until_sweep: dict[Path, int] = {}


@dataclass
class Group:
    """All files of one entry.

    Attributes:
        used: when it was last used, as time stamps of files are given.
        size: bytes.
    """

    used: float = 0.0
    size: int = 0
    paths: list[Path] = field(default_factory=list)


def limit_bytes() -> int | None:
    """The limit; None for none.

    Raises:
        OptionError: the variable holds no number.
    """
    value = os.environ.get(VARIABLE) or str(DEFAULT)
    if not (value.isascii() and value.isdecimal() and len(value) < 10):
        raise OptionError(VARIABLE, repr(value), "a number of MiB, or 0 for no limit", "Correct or unset the environment variable.")
    return int(value) * 2**20 or None


def used(path: Path) -> None:
    """Mark an entry, by one of its files, as used now; writes at most once an hour."""
    with contextlib.suppress(OSError):
        if time.time() - path.stat().st_mtime > _MAX_LATENESS:
            os.utime(path)


def wrote(folder: Path) -> None:
    """Sweep a directory in which this process has just written, if it has not lately.

    Raises:
        OptionError: see `limit_bytes`.
    """
    limit = limit_bytes()
    with _lock:
        left = _writes_until_sweep.get(folder, 0)
        _writes_until_sweep[folder] = left - 1 if left else _SWEEP_EVERY - 1
    if limit is None or left:
        return
    lock = FileLock(folder / "sweep.lock")
    with contextlib.closing(lock):
        if lock.try_acquire():
            sweep(folder, limit)
        else:  # who sweeps now may have looked before this write
            with _lock:
                _writes_until_sweep[folder] = 0


def sweep(folder: Path, limit: int) -> None:
    """Remove the least recently used entries until a tenth of the limit is free, and what processes that died have left behind."""
    groups = entries_of(folder)
    total = sum(group.size for group in groups)
    if total > limit:
        for group in sorted(groups, key=lambda group: group.used):
            if total <= limit * 0.9:
                break
            total -= group.size
            _remove(group.paths)
    _remove(path for path in _files(folder) if path.suffix in _TEMPORARY and path.name != "sweep.lock" and _age(path) > _LEFT_BEHIND)


def entries_of(folder: Path) -> list[Group]:
    """All entries of a directory in no order, whole or not."""
    groups: dict[str, Group] = {}
    for path in _files(folder):
        if path.suffix in _TEMPORARY:
            continue
        with contextlib.suppress(OSError):
            status = path.lstat()
            group = groups.setdefault(path.name.partition(".")[0], Group())
            group.used = max(group.used, status.st_mtime)
            group.size += status.st_size
            group.paths.append(path)
    return list(groups.values())


def _files(folder: Path) -> list[Path]:
    try:
        with os.scandir(folder) as found:
            return sorted(Path(entry.path) for entry in found if not entry.is_dir(follow_symlinks=False))
    except OSError:
        return []


def _age(path: Path) -> float:
    try:
        return time.time() - path.lstat().st_mtime
    except OSError:
        return 0.0


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        with contextlib.suppress(OSError):
            path.unlink()


def forget_writes() -> None:
    """As if this process had written nothing yet. For tests."""
    with _lock:
        _writes_until_sweep.clear()
