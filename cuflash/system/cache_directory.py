"""Where cuflash keeps what it has compiled: below `$CUFLASH_CACHE_DIR`, else in the user's cache directory (`~/.cache/cuflash` on Linux).

Contract: `find(part)` gives a directory that exists and that nobody else can write to, or None; `why_not(part)` says why there is none. Neither ever
raises. What has no directory lives in memory, or in a private directory of the process, and `warn_once` says so, once.
"""

from __future__ import annotations

import importlib
import logging
import os
import threading
from pathlib import Path

from cuflash.system import private_files

VARIABLE = "CUFLASH_CACHE_DIR"

_log = logging.getLogger("cuflash")
_lock = threading.Lock()
_warned = False


def find(part: str) -> Path | None:
    """The directory for one part of the cache, such as "kernels", made if need be; None if there can be none. It may be read-only."""
    found = _look_for(part)
    return None if isinstance(found, str) else found


def why_not(part: str) -> str:
    """What is wrong where `find` gives None; empty where it gives a directory."""
    found = _look_for(part)
    return found if isinstance(found, str) else ""


def describe() -> str:
    """Where the cache is meant to be, for messages."""
    return os.environ.get(VARIABLE) or _user_cache_directory()


def _look_for(part: str) -> Path | str:
    base = os.path.expanduser(describe())
    if base.startswith("~"):
        return f"{base} names no home directory"
    try:
        folder = Path(os.path.realpath(Path(base, part)))
        private_files.make_directory(folder)
        return private_files.why_not_private(folder) or folder
    except (OSError, ValueError) as error:
        return str(error)


def _user_cache_directory() -> str:
    try:
        return str(importlib.import_module("platformdirs").user_cache_dir("cuflash", appauthor=False))
    except Exception:  # it is not installed, or finds no home directory, which it says in several ways
        return os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "cuflash")


def warn_once(reason: str) -> None:
    """Say that nothing is kept. Through `logging`, not `warnings`: a program that turns warnings into errors must not fail for want of a cache."""
    global _warned
    with _lock:
        if _warned:
            return
        _warned = True
    _log.warning(
        "cuflash cannot store what it compiles below %s (%s), so each process compiles it anew. "
        "Let CUFLASH_CACHE_DIR name a directory that you and nobody else can write to.",
        describe(),
        reason,
    )


def reset_warning() -> None:
    """As if nothing had been said yet. For tests."""
    global _warned
    with _lock:
        _warned = False


def _renew_lock() -> None:
    """In a forked child: a lock that another thread of the parent held at the fork would never be released."""
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)
